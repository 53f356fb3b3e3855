"""The one door from an image file to its values.

What a library makes of a file is not always what its author wrote: Pillow scales grey values of 2 and 4 bits to 255 and
those of a PGM to its own maximum, turns "white is zero" around and shows the first of many pages. So each file is first
described from its own header, and then read to exactly the values that it holds, or refused by name. TIFF files are
read strip by strip and tile by tile with tifffile (extra `tiff`), so that a section of any size costs only what is
asked of it; without it, Pillow reads those kinds of TIFF that it is known to read exactly.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from prefect_biomed.clients.boss import tiff
from prefect_biomed.clients.boss.caching import DecodeCache
from prefect_biomed.clients.boss.pictures import Array, Conversion, Description, Picture, check_density, named
from prefect_biomed.clients.errors import SourceUnreadable

__all__ = ["fitted", "opened"]

# Without EPS and its like, whose readers start other programs.
_FORMATS = ("PNG", "TIFF", "JPEG", "JPEG2000", "PPM", "BMP", "GIF", "WEBP", "PCX", "SGI", "TGA")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEAD_BYTES = 64
_ORIENTATION = 0x0112
_CODE_STREAM = b"\xff\x4f\xff\x51"  # SOC and SIZ of JPEG 2000
# What ImageJ and tifffile note of pages that have no directory of their own.
_HIDDEN_PAGES = re.compile(r'ImageJ=.*?\bimages=(\d+)|{"shape": \[(\d+)(?:, \d+){2}', re.DOTALL)
_LUMA = (19595, 38470, 7471)  # ITU-R 601 in 65536ths, as Pillow rounds it


def opened(
    source: Path | bytes, name: str, page: int | None, conversions: frozenset[Conversion], max_pixels: int
) -> Picture:
    """Open an image file and look at its header.

    Args:
        source: The file, or its content.
        name: Of the source, for errors.
        page: Which page; None when the file must have one only.
        conversions: `first_page` takes the first of many; `stored` takes pixels in the order of the file.
        max_pixels: Refuse what has more.

    Returns:
        The image.

    Raises:
        SourceUnreadable: It is missing, damaged, absurdly large, no image, has several pages and none was chosen, or
            is to be turned before it is shown.
    """
    with named(name):
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            head = file.read(_HEAD_BYTES)
        if head[:4] in _TIFF and tiff.is_there():
            picture: Picture = tiff.opened(source, name, page)
        else:
            picture = _Whole(source, name, page)
        _check(picture.about, name, page, conversions, max_pixels)
        if not isinstance(picture, tiff.TiffPicture):
            size = source.stat().st_size if isinstance(source, Path) else len(source)
            check_density(picture.about.width * picture.about.height, size, name)
        return picture


def _check(
    about: Description, name: str, page: int | None, conversions: frozenset[Conversion], max_pixels: int
) -> None:
    if about.width <= 0 or about.height <= 0:
        raise SourceUnreadable(f"{name}: is damaged: its header speaks of {about.width} x {about.height} pixels.")
    if about.width * about.height > max_pixels:
        raise SourceUnreadable(
            f"{name}: its header speaks of {about.width} x {about.height} pixels, and at most {max_pixels} are read. "
            "It is damaged, or max_pixels is too low."
        )
    if page is None and about.pages > 1 and "first_page" not in conversions:
        raise SourceUnreadable(
            f"{name}: has {about.pages} pages, and nothing says which is meant. Split it, use a plugin for files of "
            "several pages, or take the first with convert=['first_page']."
        )
    if about.orientation not in (0, 1) and "stored" not in conversions:
        raise SourceUnreadable(
            f"{name}: is to be turned or mirrored before it is shown (orientation {about.orientation}). Turn the "
            "files, or take pixels as they are stored with convert=['stored']."
        )


class _Whole:
    """An image that Pillow decodes in one piece."""

    def __init__(self, source: Path | bytes, name: str, page: int | None) -> None:
        self._source, self._name, self._page = source, name, page or 0
        self.header_bytes = 1024
        with self._open() as image:
            self.about, self._most = _described(image, self._head(image))

    def read(self, cache: DecodeCache, top: int, left: int, bottom: int, right: int) -> Array:
        """Read a piece of the image, which is decoded as a whole and kept."""
        if isinstance(self._source, bytes):
            return self._decode()[top:bottom, left:right]

        about = self.about
        shape = (about.height, about.width, 3 if about.palette else about.channels)
        itemsize = max(about.bits // 8, 1)
        where = slice(top, bottom), slice(left, right)
        return cache.part((self._name, self._page), shape, itemsize, self._decode, where)

    def _decode(self) -> Array:
        with self._open() as image:
            about = self.about
            if about.channels == 1 and _is_scaled_pgm(image):
                return self._stored(image)
            if about.palette:
                image = image.convert("RGB")  # the palette is of this image
            array = np.asarray(image)
        if array.dtype == bool:
            return array.astype(np.uint8)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if self._most is not None:
            most, shown = self._most
            # Pillow has stretched the values to what it shows; there are fewer of them, so that the way back is exact.
            array = np.rint(array * (most / shown)).astype(np.uint8 if most < 256 else np.uint16)
        return array

    def _stored(self, image: Any) -> Array:
        """The values of a binary PGM as they lie in the file: Pillow cuts off those above the maximum of its header."""
        dtype = np.dtype(">u2" if self.about.bits > 8 else "u1")
        count = image.width * image.height
        with named(self._name), self._file() as file:
            file.seek(image.tile[0][2])
            content = file.read(count * dtype.itemsize)
        if len(content) < count * dtype.itemsize:
            raise SourceUnreadable(f"{self._name}: is damaged: it ends before its last pixel.")
        return np.frombuffer(content, dtype).reshape(image.height, image.width).astype(dtype.newbyteorder("="))

    @contextmanager
    def _open(self) -> Iterator[Image.Image]:
        with named(self._name), self._file() as file:
            image = _opened_by_pillow(file)
            if self._page:
                image.seek(self._page)
            yield image

    def _file(self) -> IO[bytes]:
        return self._source.open("rb") if isinstance(self._source, Path) else io.BytesIO(self._source)

    def _head(self, image: Image.Image) -> bytes:
        with self._file() as file:
            return file.read(_HEAD_BYTES if image.format != "JPEG2000" else 4096)


def _opened_by_pillow(file: IO[bytes]) -> Image.Image:
    """Open an image without Pillow's bound on its size: a slice of a brain has more pixels than a photograph."""
    Image.init()
    head = file.read(16)
    for name in _FORMATS:
        make, accept = Image.OPEN[name]
        if accept is None or accept(head) is True:
            file.seek(0)
            try:
                return make(file, "")
            except (SyntaxError, TypeError):
                if accept is not None:
                    raise  # no other format begins like this
    raise UnidentifiedImageError


def _described(image: Image.Image, head: bytes) -> tuple[Description, tuple[int, int] | None]:
    """Describe an image, with the largest value that it may hold and what Pillow makes of that where they differ."""
    mode, kind = image.mode, image.format or ""
    fields: dict[str, Any] = {
        "format": kind,
        "width": image.width,
        "height": image.height,
        "channels": len(image.getbands()),
        "pages": 2 if "mp" in image.info else getattr(image, "n_frames", 1),
        "palette": mode in ("P", "PA"),
        "luminous": mode not in ("CMYK", "LAB", "YCbCr", "HSV"),
        "bits": {"1": 1, "I": 32, "F": 32}.get(mode, 16 if mode.startswith("I;16") else 8),
        "kind": "float" if mode == "F" else "unsigned",
        "compression": str(image.info.get("compression", "")),
        "orientation": _orientation(image),
    }
    stretched = None
    if kind == "PNG":
        bits, colour = head[24], head[25]
        fields |= {"bits": bits, "byte_order": "big", "compression": "deflate"}
        if colour == 0 and bits in (2, 4):
            stretched = 2**bits - 1, 255
    elif kind == "PPM":
        most = _maximum_of_pgm(image)
        fields["bits"] = 1 if mode == "1" else max(most.bit_length(), 8) if mode != "F" else 32
        fields["byte_order"] = "big"
        shown = 255 if mode == "L" else 65535
        if mode in ("L", "I") and most != shown:
            stretched = most, shown
    elif kind == "JPEG2000":
        bits, signed = _depth_of_jpeg2000(head)
        fields |= {"bits": bits, "kind": "signed" if signed else "unsigned", "compression": "jpeg2000"}
        if signed:
            raise SourceUnreadable("JPEG 2000 with signed values cannot be read exactly. Convert the files.")
        if fields["channels"] == 1 and bits not in (8, 16):
            shown_bits = 8 if mode == "L" else 16
            stretched = 2**bits, 2**shown_bits  # a shift to the left
        if bits > 16:
            raise SourceUnreadable(f"JPEG 2000 of {bits} bits cannot be read exactly. Convert the files.")
    elif kind == "SGI" and head[3] != 1:
        raise SourceUnreadable("SGI of 16 bits cannot be read exactly: Pillow keeps 8 of them. Convert the files.")
    elif kind == "TIFF":
        fields |= _fields_of_tiff(image)
    if fields["channels"] > 1 and (fields["bits"] != 8 or (kind == "PPM" and _maximum_of_pgm(image) != 255)):
        raise SourceUnreadable("colours of other than 8 bits cannot be read exactly. Convert the files to grey.")
    return Description(**fields), stretched


def _orientation(image: Image.Image) -> int:
    block = image.info.get("exif")
    if not block:
        return 1
    exif = Image.Exif()
    exif.load(block)
    return int(exif.get(_ORIENTATION, 1))


def _maximum_of_pgm(image: Any) -> int:
    arguments = image.tile[0][3] if image.tile else ()
    if isinstance(arguments, tuple) and len(arguments) == 2 and isinstance(arguments[1], int) and arguments[1] > 0:
        return arguments[1]
    return 65535 if image.mode == "I" else 255


def _is_scaled_pgm(image: Any) -> bool:
    return bool(image.format == "PPM" and image.tile and image.tile[0][0] == "ppm")


def _depth_of_jpeg2000(head: bytes) -> tuple[int, bool]:
    start = head.find(_CODE_STREAM)
    if start < 0 or len(head) < start + 43:
        raise SourceUnreadable("the depth of a JPEG 2000 file cannot be told.")
    depth = head[start + 42]
    return (depth & 0x7F) + 1, bool(depth & 0x80)


def _fields_of_tiff(image: Any) -> dict[str, Any]:
    """What Pillow is known to read exactly; all else is left to tifffile."""
    tags = image.tag_v2
    bits, samples = tuple(tags.get(258, (1,))), int(tags.get(277, 1))
    form, colour = tuple(tags.get(339, (1,) * samples)), int(tags.get(262, 0))
    exact = (image.mode, colour) in (("L", 1), ("I;16", 1), ("I;16B", 1)) and bits in ((8,), (16,)) and form == (1,)
    known = exact or (colour == 2 and set(bits) == {8} and set(form) == {1}) or image.mode in ("P", "1", "F")
    rows = int(tags.get(278, image.height)) or image.height
    has_holes = 0 in tags.get(279, ()) or (273 in tags and len(tags[273]) < -(-image.height // rows))
    has_planes = int(tags.get(32997, 1)) != 1 or tiff.UIC2 in tags
    is_predicted = tags.get(259, 1) == 1 and tags.get(317, 1) != 1
    if not known or has_holes or has_planes or is_predicted:
        raise SourceUnreadable(
            "TIFF of this kind is read exactly by tifffile only: pip install 'prefect-biomed[tiff]'."
        )
    prefix = image.tag_v2.prefix
    hidden = _HIDDEN_PAGES.match(str(tags.get(270, "")))
    return {
        "pages": max(image.n_frames, int(hidden[1] or hidden[2]) if hidden else 1),
        "bits": bits[0],
        "byte_order": "big" if prefix == b"MM" else "little",
        "orientation": int(tags.get(274, 1)),
        "compression": "none" if tags.get(259, 1) == 1 else str(image.info.get("compression", "other")),
        "plain": not getattr(image.tag_v2, "_bigtiff", False) and tags.get(266, 1) == 1,
    }


def fitted(array: Array, about: Description, datatype: str, conversions: frozenset[Conversion], name: str) -> Array:
    """Bring values into the dtype of a channel without changing any that was not allowed to change.

    Args:
        array: What was read.
        about: Its description.
        datatype: dtype of the channel.
        conversions: `grey` makes one value of colours (ITU-R 601 luma), palettes and black and white (0 and 255);
            `shift` adds half the range to signed values; `scale` keeps the upper bits of values that are too deep;
            `clip` cuts off what lies outside.
        name: Of the source, for errors.

    Returns:
        Shape (rows, columns), dtype of the channel.

    Raises:
        SourceUnreadable: It is of another kind, or a value does not fit; nothing wraps.
    """
    wanted = np.dtype(datatype)
    special = about.palette or about.channels > 1 or about.bits == 1
    if about.kind == "float" or not np.issubdtype(array.dtype, np.integer):
        raise _misfit(about, datatype, name, "Convert the files to whole numbers.")
    if special:
        if "grey" not in conversions:
            raise _misfit(about, datatype, name, "Convert the files, or set convert=['grey'].")
        if not about.luminous:
            raise _misfit(about, datatype, name, "Convert the files to grey: what these are in grey is not known.")
        array = _luma(array) if array.ndim == 3 else array * np.uint8(255)
    bits = array.dtype.itemsize * 8 if special else about.bits
    if about.kind == "signed" and "shift" in conversions:
        array = (array.astype(np.int64) + 2 ** (about.bits - 1)).astype(np.uint64)
    limit = int(np.iinfo(wanted).max)
    if not array.size or np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted, copy=False)
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high <= limit:
        return array.astype(wanted, copy=False)
    if low >= 0 and "scale" in conversions:
        return (array >> (bits - wanted.itemsize * 8)).astype(wanted)
    if "clip" in conversions:
        return np.clip(array, 0, min(limit, int(np.iinfo(array.dtype).max))).astype(wanted)
    ways = "'shift' or 'clip'" if low < 0 else "'scale' or 'clip'"
    raise _misfit(about, datatype, name, f"It holds values from {low} to {high}. Convert the files, or allow {ways}.")


def _misfit(about: Description, datatype: str, name: str, advice: str) -> SourceUnreadable:
    return SourceUnreadable(
        f"{name}: is {about.words}, the channel is {datatype}. The Boss would wrap the values or lose the chunk. "
        f"{advice}"
    )


def _luma(array: Array) -> Array:
    if array.shape[2] in (1, 2):
        return array[..., 0]
    if array.shape[2] == 4:
        array = array[..., :3]
    weighted = sum(array[..., n].astype(np.uint64) * np.uint64(weight) for n, weight in enumerate(_LUMA))
    return ((weighted + np.uint64(0x8000)) >> np.uint64(16)).astype(array.dtype)
