"""Tiles as the Boss needs them: exactly the tile's size, one channel, the channel's dtype.

The ingest lambda of the Boss wraps values that do not fit, chokes on colour, moves tiles of a wrong size and makes a
black tile of what it cannot decode, all without an error. So every tile is brought into the right form here, or
refused. A file that is right already, and of a kind that the Boss is known to decode, is sent as it is: looking at its
header and checksums costs a hundredth of encoding it again.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from prefect_biomed.clients.boss.caching import DecodeCache
from prefect_biomed.clients.boss.decoding import fitted, opened
from prefect_biomed.clients.boss.errors import SourceTooSmall
from prefect_biomed.clients.boss.pictures import MAX_PIXELS, Array, Conversion, Description, Picture, named
from prefect_biomed.clients.errors import SourceUnreadable

__all__ = [
    "ITEM_BYTES",
    "DecodeCache",
    "ImageWindow",
    "TileFormat",
    "blank",
    "check_datatype",
    "from_array",
    "from_bytes",
    "from_window",
    "pixels",
    "values",
]

ITEM_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}
"""Bytes of one value, by dtype; of others there are no tiles."""

_MOST_OF_MODE_I = 2**31 - 1


@dataclass(frozen=True)
class TileFormat:
    """What every tile of a job must be.

    Attributes:
        width: Pixels in x.
        height: Pixels in y.
        datatype: dtype of the channel.
        colour: `convert` stands for the conversions `grey` and `scale`.
        fill: Value of pixels that the source does not have.
        encoding: Format of tiles that have to be encoded: `png` is smaller, `tiff` faster.
        convert: What may be done to values that do not fit; everything else is refused. See `UploadSettings.convert`.
        max_pixels: Refuse images that have more.
        least: Columns and rows that the source has to give from the beginning of the tile on; what lies beyond them is
            filled. None where all that it lacks may be.
    """

    width: int
    height: int
    datatype: str
    colour: Literal["error", "convert"] = "error"
    fill: int = 0
    encoding: Literal["png", "tiff"] = "png"
    convert: frozenset[Conversion] = frozenset()
    max_pixels: int = MAX_PIXELS
    least: tuple[int, int] | None = None

    @property
    def conversions(self) -> frozenset[Conversion]:
        """All that may be done to values."""
        return self.convert | ({"grey", "scale"} if self.colour == "convert" else frozenset())


@dataclass(frozen=True)
class ImageWindow:
    """A piece of an image file.

    It can also be read as the file itself: a class that was written for boss-ingest and calls `process` of the class
    above it expects a file.

    Attributes:
        path: The file.
        page: Page of a multi-page file; None when the file must have one only.
        left: First column; `top` likewise.
        top: First row.
        whole: The file is the tile: it may be smaller, never larger.
        extent: Left, top, right and bottom of the job where it does not begin at (0, 0): an image that is no larger
            than it begins where it begins.
    """

    path: str
    page: int | None = None
    left: int = 0
    top: int = 0
    whole: bool = False
    extent: tuple[int, int, int, int] | None = None

    @cached_property
    def _file(self) -> IO[bytes]:
        return io.BytesIO(Path(self.path).read_bytes())

    def read(self, size: int = -1) -> bytes:
        """Read from the file."""
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Tell the place in the file."""
        return self._file.tell()

    def within(self, about: Description) -> ImageWindow:
        """The same window, counted from the corner of the image."""
        if self.extent is None:
            return self
        left, top, right, bottom = self.extent
        if about.width > right - left or about.height > bottom - top:
            return replace(self, extent=None)
        return replace(self, left=self.left - left, top=self.top - top, extent=None)


def from_window(window: ImageWindow, tile: TileFormat, cache: DecodeCache) -> bytes:
    """Make a tile of a piece of an image file.

    Args:
        window: Which piece.
        tile: What it has to be.
        cache: Where decoded images are kept; a file that is the tile itself does not go there.

    Returns:
        The encoded tile; the file's own bytes where they are right already.

    Raises:
        SourceUnreadable: The file is missing, damaged, too large, does not reach to the window, or holds values that
            the channel cannot.
    """
    if window.whole:
        with named(window.path):
            content = Path(window.path).read_bytes()
        return from_bytes(content, tile, window.path, page=window.page)
    picture = _opened(window, tile, cache)
    about = picture.about
    window = window.within(about)
    if not (window.page or window.left or window.top) and _is_right(about, tile):
        with named(window.path):
            content = Path(window.path).read_bytes()
        return from_bytes(content, tile, window.path, page=window.page)
    return _encode(_padded(_cut(picture, window, tile, cache), tile, window.path), tile, window.path)


def values(window: ImageWindow, tile: TileFormat, cache: DecodeCache) -> Array:
    """Read a piece of an image file into the dtype of the channel, which may be one that no tile can carry.

    Args:
        window: Which piece.
        tile: Its size and dtype, and what may be done to values.
        cache: Where decoded images are kept.

    Returns:
        Shape (rows, columns), smaller than the tile at the far ends of the image.

    Raises:
        SourceUnreadable: As for `from_window`.
    """
    picture = _opened(window, tile, cache)
    return _cut(picture, window.within(picture.about), tile, cache)


def from_bytes(content: bytes, tile: TileFormat, name: str, *, whole: bool = True, page: int | None = None) -> bytes:
    """Make a tile of an encoded image.

    Args:
        content: An image file that is one tile.
        tile: What it has to be.
        name: Of the source, for errors.
        whole: Refuse a larger image; otherwise its upper left corner is taken.
        page: Which page; None when there must be one only.

    Returns:
        The encoded tile; `content` itself where it is right already.

    Raises:
        SourceUnreadable: It cannot be decoded, is too large, or holds values that the channel cannot.
    """
    _check_tile(tile, name)
    picture = opened(content, name, page, tile.conversions, tile.max_pixels)
    about = picture.about
    if whole and (about.width > tile.width or about.height > tile.height):
        raise SourceUnreadable(
            f"{name}: has {about.width} x {about.height} pixels, the tiles of the job have {tile.width} x "
            f"{tile.height}. The Boss would place it wrongly. Correct tile_size."
        )
    right = _is_right(about, tile)
    if right and about.format == "PNG":
        with named(name):
            PngImagePlugin.PngImageFile(io.BytesIO(content)).verify()  # all checksums; an eighth of decoding
        return content
    cache = DecodeCache(0)
    array = picture.read(cache, 0, 0, min(about.height, tile.height), min(about.width, tile.width))
    if right:
        return content
    return _encode(_padded(fitted(array, about, tile.datatype, tile.conversions, name), tile, name), tile, name)


def from_array(pixels: Array, tile: TileFormat, name: str, before: tuple[int, ...] = (0, 0)) -> bytes:
    """Make a tile of an array.

    Args:
        pixels: Shape (y, x), at most the tile's size; of any integer dtype whose values fit the channel.
        tile: What it has to be.
        name: Of the source, for errors.
        before: Rows and columns of the tile before the first of the array.

    Returns:
        The encoded tile.

    Raises:
        SourceUnreadable: Wrong shape, or values that the channel cannot hold.
    """
    _check_tile(tile, name)
    ends = [lead + length for lead, length in zip(before, pixels.shape, strict=False)]
    if pixels.ndim != 2 or min(before) < 0 or ends[0] > tile.height or ends[1] > tile.width:
        raise SourceUnreadable(
            f"{name}: an array of shape {pixels.shape} is not a tile of {tile.height} x {tile.width} (y, x)."
        )
    kinds: dict[str, Literal["unsigned", "signed", "float"]] = {"u": "unsigned", "i": "signed"}
    bits = pixels.dtype.itemsize * 8
    kind = kinds.get(pixels.dtype.kind, "float")
    about = Description("array", pixels.shape[1], pixels.shape[0], bits=bits, kind=kind)
    exact = fitted(pixels, about, tile.datatype, tile.conversions, name)
    return _encode(_padded(exact, tile, name, before), tile, name)


def blank(tile: TileFormat) -> bytes:
    """Make a tile of the fill value alone."""
    return _encode(np.full((tile.height, tile.width), tile.fill, tile.datatype), tile, "blank tile")


def pixels(content: bytes, tile: TileFormat, name: str) -> bytes:
    """Decode a tile to its values.

    Args:
        content: What one of the functions above made.
        tile: What it is.
        name: Of the source, for errors.

    Returns:
        The values in C order, little endian, in the channel's dtype.
    """
    picture = opened(content, name, None, tile.conversions, tile.max_pixels)
    about = picture.about
    array = picture.read(DecodeCache(0), 0, 0, about.height, about.width)
    exact = fitted(array, about, tile.datatype, tile.conversions, name)
    return exact.astype(np.dtype(tile.datatype).newbyteorder("<")).tobytes()


def check_datatype(datatype: str) -> str | None:
    """Why tiles cannot carry a dtype; None when they can."""
    if datatype in ITEM_BYTES:
        return None
    return f"the channel is {datatype}, which no image file can carry; use a volumetric job (boss-v0.2-schema)"


def _check_tile(tile: TileFormat, name: str) -> None:
    if reason := check_datatype(tile.datatype):
        raise SourceUnreadable(f"{name}: {reason}.")


def _opened(window: ImageWindow, tile: TileFormat, cache: DecodeCache) -> Picture:
    """Open an image, or take it from the memory: its header may list a million strips."""

    def load() -> tuple[Picture, int]:
        picture = opened(Path(window.path), window.path, window.page, tile.conversions, tile.max_pixels)
        return picture, picture.header_bytes

    picture: Picture = cache.get((window.path, window.page, "header"), load, counted=False)
    return picture


def _cut(picture: Picture, window: ImageWindow, tile: TileFormat, cache: DecodeCache) -> Array:
    about = picture.about
    if not 0 <= window.left < about.width or not 0 <= window.top < about.height:
        raise SourceUnreadable(
            f"{window.path}: has {about.width} x {about.height} pixels, but the extent asks for pixels from "
            f"({window.left}, {window.top}) on. Correct the extent."
        )
    bottom = min(window.top + tile.height, about.height)
    right = min(window.left + tile.width, about.width)
    array = picture.read(cache, window.top, window.left, bottom, right)
    return fitted(array, about, tile.datatype, tile.conversions, window.path)


def _is_right(about: Description, tile: TileFormat) -> bool:
    """Whether a file may be sent as it is: of the tile's size and of a kind that the Boss is known to decode exactly.

    Its own client sends what Pillow writes when nothing is asked of it: PNG of 8 and 16 bits, TIFF in its plain form,
    JPEG. What other codecs become there is not known, and what it cannot decode becomes a black tile.
    """
    if (about.width, about.height) != (tile.width, tile.height) or about.pages != 1 or not about.plain:
        return False
    if about.channels != 1 or about.palette or about.kind != "unsigned" or about.orientation not in (0, 1):
        return False
    if about.bits != 8 and (about.bits != 16 or tile.datatype == "uint8"):
        return False
    if about.format == "TIFF":
        return about.compression == "none" and (about.bits == 8 or about.byte_order == "little")
    return about.format in ("PNG", "JPEG")


def _padded(array: Array, tile: TileFormat, name: str, before: tuple[int, ...] = (0, 0)) -> Array:
    """Bring values to the size of a tile.

    Raises:
        SourceTooSmall: They do not cover what the source has to give.
        SourceUnreadable: There are none.
    """
    if array.shape == (tile.height, tile.width):
        return array
    (height, width), (top, left) = array.shape, before
    if not array.size:
        raise SourceUnreadable(f"{name}: has nothing of this tile. Correct the extent.")
    if tile.least and (top or left or left + width < tile.least[0] or top + height < tile.least[1]):
        begins = f"begins late, at ({left}, {top})" if top or left else "ends early"
        raise SourceTooSmall(
            f"{name}: {begins}: it gives {width} x {height} pixels of a tile of which {tile.least[0]} x "
            f"{tile.least[1]} lie within the extent. Correct the extent, or allow the conversion 'pad', which fills up "
            "the rest."
        )
    padded = np.full((tile.height, tile.width), tile.fill, dtype=array.dtype)
    padded[top : top + height, left : left + width] = array
    return padded


def _encode(array: Array, tile: TileFormat, name: str) -> bytes:
    _check_tile(tile, name)
    if tile.datatype == "uint32":
        if array.size and array.max() > _MOST_OF_MODE_I:
            raise SourceUnreadable(f"{name}: values above {_MOST_OF_MODE_I} need a volumetric ingest job.")
        array = array.astype(np.int32)
    image = Image.fromarray(np.ascontiguousarray(array))
    buffer = io.BytesIO()
    if tile.encoding == "tiff" or tile.datatype == "uint32":
        image.save(buffer, "TIFF")
    else:
        # Of what microscopes make, only runs are worth looking for: a third less time than for matches, and no larger.
        image.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()
