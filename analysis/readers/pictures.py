"""Pictures by their pixels: PNG, JPEG, TIFF with pages, GIF, BMP, WebP."""

from __future__ import annotations

import warnings
from typing import IO, Any

import numpy as np
from PIL import Image, ImageSequence

from prefect_biomed.analysis.comparators import Content, Measure
from prefect_biomed.analysis.readers.source import Parts, Source, Unreadable
from prefect_biomed.analysis.volatile import Volatile

__all__ = ["MAGIC", "picture", "picture_parts"]

MAGIC = (
    b"\x89PNG\r\n", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+", b"\xff\xd8\xff", b"GIF87a", b"GIF89a",
)  # fmt: skip
_FORMATS = ("PNG", "TIFF", "JPEG", "GIF", "BMP", "WEBP", "PPM", "JPEG2000")
_MAX_PIXELS = 256 * 1024**2
# What these say of a picture is how it is packed, or is in the pixels.
_PACKING = frozenset(
    {"compression", "interlace", "icc_profile", "exif", "jfif", "jfif_version", "jfif_unit", "transparency"}
)


def picture(source: Source) -> Content:
    """Read a picture: mode, size, words beside it, and the pixels of each page."""
    return picture_parts(source.path.open("rb"), source.volatile).content("image")


def picture_parts(file: IO[bytes], volatile: Volatile) -> Parts:
    """Collect what a picture says.

    Args:
        file: The picture; closed afterwards.
        volatile: What is not a change.

    Returns:
        Its parts.

    Raises:
        ValueError: It has too many pixels.
        OSError: It cannot be read.
    """
    parts = Parts(volatile)
    with file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            parts.facts |= {"format": str(image.format), "mode": image.mode, "size": f"{image.width} x {image.height}"}
            frames = int(getattr(image, "n_frames", 1))
            parts.facts["pages"] = str(frames)
            if image.width * image.height * frames > _MAX_PIXELS:
                raise Unreadable(f"it has more than {_MAX_PIXELS} pixels")
            for key, value in image.info.items():
                if isinstance(key, str) and isinstance(value, str) and key not in _PACKING:
                    parts.text(f"beside {key}", value, "numbers beside", str(key))
            for number, page in enumerate(ImageSequence.Iterator(image), start=1):
                title = "pixels" if frames == 1 else f"pixels of page {number}"
                parts.measures[title] = _pixels(title, page)
    return parts


def _pixels(title: str, page: Any) -> Measure:
    pixels = np.asarray(page.convert("RGBA") if page.mode == "P" else page)
    return Measure(title, pixels.reshape(-1), pixels.shape, point="pixel (row, column)")
