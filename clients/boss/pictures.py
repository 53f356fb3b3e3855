"""What is said of an image file once it is open, whoever reads it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy.typing as npt
from PIL import UnidentifiedImageError

from prefect_biomed.clients.boss.caching import DecodeCache
from prefect_biomed.clients.errors import BiomedError, SourceUnreadable

__all__ = ["MAX_PIXELS", "Array", "Conversion", "Description", "Picture", "check_density", "named"]

Array: TypeAlias = npt.NDArray[Any]
Conversion: TypeAlias = Literal["grey", "scale", "clip", "shift", "first_page", "stored", "pad"]

MAX_PIXELS = 2**32
"""Most pixels of one page: a section of 65,536 x 65,536."""

# What is claimed in more pixels than this for one byte of the file is no picture but an attack or a damaged header.
_INNOCENT_BYTES = 64 * 1024 * 1024
_DENSEST = 2048


@dataclass(frozen=True)
class Description:
    """What the header of an image says.

    Attributes:
        format: `PNG`, `TIFF`, `JPEG`, …
        width: Pixels in x.
        height: Pixels in y.
        bits: Of one value.
        kind: `unsigned`, `signed` or `float`.
        channels: Values of one pixel.
        pages: Pages of the file; reduced copies of a page do not count.
        byte_order: `little` or `big`.
        orientation: As EXIF and TIFF number it; 1 is upright.
        compression: Name of the codec, in lower case.
        palette: Whether values are indices into a table of colours.
        luminous: Whether its channels are grey, or red, green and blue, perhaps with transparency; only of these is it
            known what they are in grey.
        plain: Whether it is a container and a meaning of values that every decoder understands alike: neither BigTIFF
            nor "white is zero", nothing left out, no thumbnail in front.
    """

    format: str
    width: int
    height: int
    bits: int = 8
    kind: Literal["unsigned", "signed", "float"] = "unsigned"
    channels: int = 1
    pages: int = 1
    byte_order: Literal["little", "big"] = "little"
    orientation: int = 1
    compression: str = ""
    palette: bool = False
    plain: bool = True
    luminous: bool = True

    @property
    def words(self) -> str:
        """The kind of image in words, for errors."""
        if self.palette:
            return "a palette image"
        if self.channels > 1 and not self.luminous:
            return f"of {self.channels} channels that are not red, green and blue"
        if self.channels > 1:
            return {2: "grey with transparency"}.get(self.channels, f"in colour ({self.channels} channels)")
        if self.bits == 1:
            return "black and white"
        if self.kind == "float":
            return f"floating point of {self.bits} bits"
        return f"{self.bits} bits deep" + (" and signed" if self.kind == "signed" else "")


class Picture(Protocol):
    """An image that is open: described, and to be read in pieces.

    Attributes:
        about: What its header says.
        header_bytes: Memory that this takes, about.
    """

    about: Description
    header_bytes: int

    def read(self, cache: DecodeCache, top: int, left: int, bottom: int, right: int) -> Array:
        """Read a piece, which lies within the image.

        Args:
            cache: Where what was decoded is kept.
            top: First row.
            left: First column.
            bottom: Row after the last.
            right: Column after the last.

        Returns:
            Values in native byte order, of shape (rows, columns), or (rows, columns, channels) in colour.
        """


def check_density(nbytes: int, encoded: int, name: str) -> None:
    """Refuse what claims to be far more than its bytes can hold.

    Raises:
        SourceUnreadable: It does.
    """
    if nbytes > _INNOCENT_BYTES and nbytes > _DENSEST * encoded:
        raise SourceUnreadable(f"{name}: is damaged: its header speaks of {nbytes} values in {encoded} bytes.")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Turn whatever a decoder or the file system raises into one error that names the file."""
    try:
        yield
    except SourceUnreadable as error:
        if str(error).startswith(name):
            raise
        raise SourceUnreadable(f"{name}: {error}") from None
    except BiomedError:
        raise
    except FileNotFoundError:
        raise SourceUnreadable(f"{name}: there is no such file.") from None
    except EOFError:
        raise SourceUnreadable(f"{name}: has fewer pages than the extent asks for.") from None
    except UnidentifiedImageError:
        raise SourceUnreadable(f"{name}: is not an image.") from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.errno else f"is damaged ({error})"
        raise SourceUnreadable(f"{name}: {what}.") from None
    except (ImportError, NotImplementedError) as error:  # the second: tifffile and imagecodecs, of codecs not built in
        raise SourceUnreadable(f"{name}: cannot be decoded here ({error}). It may need prefect-biomed[tiff].") from None
    except Exception as error:  # decoders raise anything at all for a damaged header
        said = str(error) if not isinstance(error, struct.error) else "its header is cut off"
        raise SourceUnreadable(f"{name}: is damaged ({type(error).__name__}: {said}).") from None
