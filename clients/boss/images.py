"""Tiles as the Boss needs them: exactly the tile's size, one channel, the channel's dtype.

The ingest lambda of the Boss wraps values that do not fit, chokes on colour and moves tiles of a wrong size, all
without an error. So every tile is brought into the right form here, or refused. A file that is right already is sent
as it is: looking at its header and checksums costs a hundredth of encoding it again.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from prefect_biomed.clients.errors import SourceUnreadable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.generic]

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
]

ITEM_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}
"""Bytes of one value, by dtype; of others there are no tiles."""

# Modes whose values all fit the channel, by dtype; the first is the one we write.
_MODES = {
    "uint8": ("L",),
    "uint16": ("I;16", "L", "I;16B", "I;16L", "I;16N"),
    "uint32": ("I", "L", "I;16", "I;16B", "I;16L", "I;16N"),
}
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
_PIXEL_BYTES = {"I": 4, "F": 4} | dict.fromkeys(_SIXTEEN, 2)
_WORDS = {"1": "black and white", "P": "a palette image", "LA": "grey with transparency", "F": "floating point"}
_PASS_FORMATS = ("PNG", "TIFF", "JPEG")
_HEADER_BYTES = 8


@dataclass(frozen=True)
class TileFormat:
    """What every tile of a job must be.

    Attributes:
        width: Pixels in x.
        height: Pixels in y.
        datatype: dtype of the channel.
        colour: What to do with colour, palette, bilevel and too deep images: refuse them, or `convert` them to grey
            (ITU-R 601 luma; 16 bits keep their upper 8).
        fill: Value of pixels that the source does not have.
        encoding: Format of tiles that have to be encoded: `png` is smaller, `tiff` faster.
    """

    width: int
    height: int
    datatype: str
    colour: Literal["error", "convert"] = "error"
    fill: int = 0
    encoding: Literal["png", "tiff"] = "png"


@dataclass(frozen=True)
class ImageWindow:
    """A piece of an image file.

    Attributes:
        path: The file.
        page: Page of a multi-page file.
        left: First column; `top` likewise.
        top: First row.
        whole: The file is the tile: it may be smaller, never larger.
    """

    path: str
    page: int = 0
    left: int = 0
    top: int = 0
    whole: bool = False


class DecodeCache:
    """Decoded images, shared by all threads and bounded by bytes.

    An image that several threads want at once is decoded by one of them while the others wait. The least recently
    used go first; one that is larger than the bound is kept until the next one comes.

    Args:
        max_bytes: Bound of the decoded size of all images.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.decoded = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, tuple[Future[Any], int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Any, load: Callable[[], tuple[Any, int]]) -> Any:
        """Return what `load` makes, from memory when it was made before.

        Args:
            key: Identity of the image.
            load: Makes the image; returns it with its size in bytes.

        Returns:
            The image. It is shared: do not change it.

        Raises:
            BaseException: Whatever `load` raises; the next caller tries again.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                own: Future[Any] = Future()
                self._entries[key] = own, 0
        if entry is not None:
            return entry[0].result()
        try:
            image, size = load()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            own.set_exception(error)
            raise
        own.set_result(image)
        with self._lock:
            self.decoded += 1
            if key in self._entries:
                self._entries[key] = own, size
                self._bytes += size
            for old in [old for old in self._entries if old != key]:
                if self._bytes <= self.max_bytes:
                    break
                if self._entries[old][0].done():
                    self._bytes -= self._entries.pop(old)[1]
        return image


def from_window(window: ImageWindow, tile: TileFormat, cache: DecodeCache) -> bytes:
    """Make a tile of a piece of an image file.

    Args:
        window: Which piece.
        tile: What it has to be.
        cache: Where decoded images are kept; a file that is the tile itself does not go there.

    Returns:
        The encoded tile; the file's own bytes where they are right already.

    Raises:
        SourceUnreadable: The file is missing, damaged, too large, does not reach to the window, or has colour.
    """
    if window.whole or (window.page, window.left, window.top) == (0, 0, 0):
        with _named(window.path):
            content = Path(window.path).read_bytes() if window.whole else _small_file(window.path, tile)
        if content is not None:
            return from_bytes(content, tile, window.path, whole=True)

    def load() -> tuple[Image.Image, int]:
        with _named(window.path), Path(window.path).open("rb") as file:
            image = _open(file)
            if window.page:
                image.seek(window.page)
            image.load()
            return image, image.width * image.height * _PIXEL_BYTES.get(image.mode, len(image.getbands()))

    image = cache.get((window.path, window.page), load)
    if window.left >= image.width or window.top >= image.height:
        raise SourceUnreadable(
            f"{window.path}: has {image.width} x {image.height} pixels, but the extent asks for pixels from "
            f"({window.left}, {window.top}) on. Correct the extent."
        )
    box = (
        window.left,
        window.top,
        min(window.left + tile.width, image.width),
        min(window.top + tile.height, image.height),
    )
    return _encode(_fitted(_grey(image.crop(box), tile, window.path), tile), tile)


def from_bytes(content: bytes, tile: TileFormat, name: str, *, whole: bool = True) -> bytes:
    """Make a tile of an encoded image.

    Args:
        content: An image file that is one tile.
        tile: What it has to be.
        name: Of the source, for errors.
        whole: Refuse a larger image; otherwise its upper left corner is taken.

    Returns:
        The encoded tile; `content` itself where it is right already.

    Raises:
        SourceUnreadable: It cannot be decoded, is too large, or has colour.
    """
    with _named(name):
        image = _open(io.BytesIO(content))
        right = (
            image.size == (tile.width, tile.height)
            and image.mode in _MODES[tile.datatype]
            and image.format in _PASS_FORMATS
            and getattr(image, "n_frames", 1) == 1
        )
        if right and image.format == "PNG":
            image.verify()  # the checksums of all chunks; an eighth of the time that decoding takes
            return content
        image.load()
    if right:
        return content
    if whole and (image.width > tile.width or image.height > tile.height):
        raise SourceUnreadable(
            f"{name}: has {image.width} x {image.height} pixels, the tiles of the job have {tile.width} x "
            f"{tile.height}. The Boss would place it wrongly. Correct tile_size."
        )
    corner = image.crop((0, 0, min(image.width, tile.width), min(image.height, tile.height)))
    return _encode(_fitted(_grey(corner, tile, name), tile), tile)


def from_array(pixels: Array, tile: TileFormat, name: str) -> bytes:
    """Make a tile of an array.

    Args:
        pixels: Shape (y, x), at most the tile's size; of any integer dtype whose values fit the channel.
        tile: What it has to be.
        name: Of the source, for errors.

    Returns:
        The encoded tile.

    Raises:
        SourceUnreadable: Wrong shape, or values that the channel cannot hold.
    """
    import numpy as np

    if pixels.ndim != 2 or pixels.shape[0] > tile.height or pixels.shape[1] > tile.width:
        raise SourceUnreadable(
            f"{name}: an array of shape {pixels.shape} is not a tile of {tile.height} x {tile.width} (y, x)."
        )
    wanted = np.dtype(tile.datatype)
    if not np.can_cast(pixels.dtype, wanted, "safe"):
        limits: Any = np.iinfo(wanted)
        integers = np.issubdtype(pixels.dtype, np.integer)
        values: Any = pixels
        if not integers or (pixels.size and (values.min() < 0 or values.max() > limits.max)):
            raise SourceUnreadable(
                f"{name}: is {pixels.dtype} and does not fit a {tile.datatype} channel; its values would wrap."
            )
    padded = np.full((tile.height, tile.width), tile.fill, dtype=wanted)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    if tile.datatype == "uint32":
        if padded.size and padded.max() > 2**31 - 1:
            raise SourceUnreadable(f"{name}: values above 2147483647 need a volumetric ingest job.")
        padded = padded.astype(np.int32)
    return _encode(Image.fromarray(padded), tile)


def blank(tile: TileFormat) -> bytes:
    """Make a tile of the fill value alone."""
    return _encode(Image.new(_MODES[tile.datatype][0], (tile.width, tile.height), tile.fill), tile)


def pixels(content: bytes, tile: TileFormat, name: str) -> bytes:
    """Decode a tile to its values.

    Args:
        content: What one of the functions above made.
        tile: What it is.
        name: Of the source, for errors.

    Returns:
        The values in C order, little endian, in the channel's dtype.
    """
    with _named(name):
        image = _open(io.BytesIO(content))
        image.load()
    mode = _MODES[tile.datatype][0]
    return (image if image.mode == mode else image.convert(mode)).tobytes()


def check_datatype(datatype: str) -> str | None:
    """Why tiles cannot carry a dtype; None when they can."""
    if datatype in _MODES:
        return None
    return f"the channel is {datatype}, which no image file can carry; use a volumetric job (boss-v0.2-schema)"


def _open(file: IO[bytes]) -> Image.Image:
    """Open an image without Pillow's bound on its size: a slice of a brain has more pixels than a photograph."""
    head = file.read(_HEADER_BYTES)
    file.seek(0)
    if head.startswith(b"\x89PNG"):
        return PngImagePlugin.PngImageFile(file)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImagePlugin.TiffImageFile(file)
    if head.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(file)
    return Image.open(file)


def _small_file(path: str, tile: TileFormat) -> bytes | None:
    """The file's bytes when it is one image of exactly the tile's size, which then needs no decoding."""
    with Path(path).open("rb") as file:
        image = _open(file)
        if image.size != (tile.width, tile.height) or getattr(image, "n_frames", 1) != 1:
            return None
    return Path(path).read_bytes()


def _grey(image: Image.Image, tile: TileFormat, name: str) -> Image.Image:
    if image.mode in _MODES[tile.datatype]:
        return image
    if image.mode == "I" and tile.datatype == "uint16":
        low, high = image.getextrema()
        if isinstance(low, int | float) and isinstance(high, int | float) and low >= 0 and high <= 65535:
            return image.convert("I;16")
    kind = _WORDS.get(image.mode, "16 bits deep" if image.mode in (*_SIXTEEN, "I") else "in colour")
    if tile.colour == "error" or image.mode in ("F", "I"):
        advice = "" if image.mode in ("F", "I") else " Convert the files, or set colour='convert'."
        raise SourceUnreadable(
            f"{name}: is {kind} ({image.mode}), the channel is {tile.datatype}. The Boss would wrap the values or lose "
            f"the chunk.{advice}"
        )
    if image.mode in _SIXTEEN:
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return image.convert("L")


def _fitted(image: Image.Image, tile: TileFormat) -> Image.Image:
    wanted = _MODES[tile.datatype][0]
    if image.mode != wanted and (image.mode != "L" or tile.fill > 255):
        image = image.convert(wanted)
    if image.size == (tile.width, tile.height):
        return image
    padded = Image.new(image.mode, (tile.width, tile.height), tile.fill)
    padded.paste(image, (0, 0))
    return padded


def _encode(image: Image.Image, tile: TileFormat) -> bytes:
    buffer = io.BytesIO()
    if tile.encoding == "tiff" or image.mode == "I":
        image.save(buffer, "TIFF")
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn what Pillow and the file system raise into one error that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise SourceUnreadable(f"{name}: there is no such file.") from None
    except EOFError:
        raise SourceUnreadable(f"{name}: has fewer pages than the extent asks for.") from None
    except UnidentifiedImageError:
        raise SourceUnreadable(f"{name}: is not an image.") from None
    except OSError as error:
        what = f"cannot be read ({error.strerror})" if error.errno else f"is damaged ({error})"
        raise SourceUnreadable(f"{name}: {what}.") from None
    except (SyntaxError, ValueError, KeyError, IndexError, struct.error, zlib.error) as error:
        raise SourceUnreadable(f"{name}: is damaged ({error}).") from None
