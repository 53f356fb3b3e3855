"""TIFF read strip by strip and tile by tile, with tifffile (extra `tiff`)."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from prefect_biomed.clients.boss.caching import DecodeCache, Window
from prefect_biomed.clients.boss.pictures import Array, Description, check_density, named
from prefect_biomed.clients.errors import SourceUnreadable

if TYPE_CHECKING:
    import tifffile

__all__ = ["UIC2", "TiffPicture", "is_there", "opened"]

# Rows that are read together from a page in strips: few enough that what lies beside the tiles of one row is little.
_BAND_ROWS = 128
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_TRANSPARENCY = (1, 2)
UIC2 = 33629
"""Tag of MetaMorph with a value for each plane."""
_UNBOUNDED = ("zstd", "zstd_deprecated", "lzma", "webp", "jpegxl")


def is_there() -> bool:
    """Whether tifffile is installed."""
    return find_spec("tifffile") is not None


def opened(source: Path | bytes, name: str, page: int | None) -> TiffPicture:
    """Open a page and look at its header.

    Args:
        source: The file, or its content.
        name: Of the source, for errors.
        page: Which page; None for the first.

    Returns:
        The page. The file is closed; what is read later is read by place.

    Raises:
        SourceUnreadable: It is damaged, of a kind that no image of one plane is, or has no such page.
    """
    import tifffile

    with named(name), tifffile.TiffFile(source if isinstance(source, Path) else io.BytesIO(source)) as file:
        return TiffPicture(file, source, name, page)


class TiffPicture:
    """One page of a TIFF file."""

    def __init__(self, file: tifffile.TiffFile, source: Path | bytes, name: str, page: int | None) -> None:
        hidden = _hidden_pages(file)
        self._source, self._name = source, name
        self._page = page if page is not None else 0 if hidden else _first_full_page(file)
        if self._page >= max(len(file.pages), hidden):
            raise EOFError
        chosen: Any = file.pages[0 if hidden else self._page]
        if chosen.dtype is None or chosen.imagedepth != 1:
            raise SourceUnreadable(f"{name}: its pages hold no values, or are volumes of their own.")
        compression = str(getattr(chosen.compression, "name", chosen.compression)).lower()
        if compression == "none" and int(chosen.predictor) != 1:
            raise SourceUnreadable(f"{name}: has a predictor and no compression, which each reader takes differently.")
        self._chosen = chosen
        self._jpeg_tables = chosen.jpegtables
        if int(chosen.samplesperpixel) == 1:
            self._decode = chosen.decode  # what it has to look up in the file, it does now
        self._offsets = list(chosen.dataoffsets)
        self._counts = list(chosen.databytecounts)
        self.header_bytes = 16384 + 128 * len(self._offsets)
        is_plain = bool(chosen.is_memmappable) and len(chosen.shape) == 2
        self._rows_are_plain = is_plain and sum(self._counts) >= chosen.nbytes
        if hidden:
            if not self._rows_are_plain:
                raise SourceUnreadable(f"{name}: has {hidden} pages in one; they are compressed and cannot be found.")
            self._offsets = [self._offsets[0] + self._page * chosen.nbytes]
        is_usual = int(chosen.photometric) == _BLACK_IS_ZERO and int(chosen.fillorder) == int(chosen.sampleformat) == 1
        is_first = not self._page and not file.is_bigtiff
        self.about = Description(
            format="TIFF",
            width=int(chosen.imagewidth),
            height=int(chosen.imagelength),
            bits=int(chosen.bitspersample),
            kind=_kind(chosen.dtype),
            channels=int(chosen.samplesperpixel),
            pages=hidden or _full_pages(file),
            byte_order="big" if file.byteorder == ">" else "little",
            orientation=_orientation(chosen),
            compression=compression,
            palette=int(chosen.photometric) == _PALETTE,
            luminous=_is_luminous(chosen, compression),
            plain=is_first and is_usual and all(self._counts),
        )

    def read(self, cache: DecodeCache, top: int, left: int, bottom: int, right: int) -> Array:
        """Read a piece; only what covers it is decoded, and kept."""
        with named(self._name):
            shape, dtype = (self.about.height, self.about.width), self._chosen.dtype.newbyteorder("=")
            if self.about.channels > 1 or self.about.palette:
                channels = 3 if self.about.palette else self.about.channels
                where = slice(top, bottom), slice(left, right)
                return self._part(cache, "whole", (*shape, channels), self._coloured, where)
            blocks = self._bands(top, bottom) if not self._chosen.is_tiled else self._tiles(top, left, bottom, right)
            piece = np.empty((bottom - top, right - left), dtype)
            for key, segments, y, x in blocks:
                height, width = self._extent_of(segments)
                y0, x0 = max(y, top), max(x, left)
                y1, x1 = min(y + height, bottom), min(x + width, right)
                where = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
                decode = partial(self._decoded, segments)
                piece[y0 - top : y1 - top, x0 - left : x1 - left] = self._part(
                    cache, key, (height, width), decode, where
                )
            if self.about.bits == 1:  # light is 1, whichever stands for it
                piece = (piece != (int(self._chosen.photometric) == _WHITE_IS_ZERO)).astype(np.uint8)
            return piece

    def _part(
        self, cache: DecodeCache, key: Any, shape: tuple[int, ...], decode: Callable[[], Array], where: Window
    ) -> Array:
        if isinstance(self._source, bytes):
            return decode()[where]
        return cache.part((self._name, self._page, key), shape, self._chosen.dtype.itemsize, decode, where)

    def _extent_of(self, segments: range) -> tuple[int, int]:
        """Rows and columns of strips or tiles that are decoded together, or of rows that are plain."""
        if self._rows_are_plain:
            return len(segments), self.about.width
        sizes = [_extent(self._chosen, index)[2:] for index in (segments[0], segments[-1])]
        return sizes[0][0] * (len(segments) - 1) + sizes[1][0], sizes[0][1]

    def _bands(self, top: int, bottom: int) -> list[tuple[Any, range, int, int]]:
        height = 1 if self._rows_are_plain else int(self._chosen.rowsperstrip) or self.about.height
        height = min(height, self.about.height)
        together = max(_BAND_ROWS // height, 1)
        rows = together * height
        return [
            (("band", n), range(n * together, min((n + 1) * together, -(-self.about.height // height))), n * rows, 0)
            for n in range(top // rows, -(-bottom // rows))
        ]

    def _tiles(self, top: int, left: int, bottom: int, right: int) -> list[tuple[Any, range, int, int]]:
        height, width = int(self._chosen.tilelength), int(self._chosen.tilewidth)
        across = -(-self.about.width // width)
        return [
            (("tile", row * across + column), range(row * across + column, row * across + column + 1), *place)
            for row in range(top // height, -(-bottom // height))
            for column in range(left // width, -(-right // width))
            for place in [(row * height, column * width)]
        ]

    def _decoded(self, segments: range) -> Array:
        if self._rows_are_plain:
            return self._plain_rows(segments)
        with self._file() as file:
            parts = [self._segment(file, index) for index in segments]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _plain_rows(self, rows: range) -> Array:
        dtype = self._chosen.dtype.newbyteorder(self._chosen.parent.byteorder)
        size = self.about.width * dtype.itemsize
        with self._file() as file:
            file.seek(self._offsets[0] + rows.start * size)
            content = file.read(len(rows) * size)
        if len(content) != len(rows) * size:
            raise OSError("image file is truncated")
        array = np.frombuffer(content, dtype).reshape(len(rows), self.about.width)
        values: Array = array.astype(dtype.newbyteorder("="), copy=False)
        return values

    def _segment(self, file: IO[bytes], index: int) -> Array:
        page = self._chosen
        offset, count = self._offsets[index], self._counts[index]
        _, _, *shape = _extent(page, index)
        if not count:
            # Such a strip or tile was never written; what it stands for is said by the file or is 0.
            unwritten: Array = np.full(shape, page.nodata, page.dtype.newbyteorder("="))
            return unwritten
        if self.about.compression not in _UNBOUNDED:
            check_density(shape[0] * shape[1] * page.dtype.itemsize, count, self._name)
        file.seek(offset)
        content = file.read(count)
        if len(content) != count:
            raise OSError("image file is truncated")
        array, _, real = self._decode(content, index, jpegtables=self._jpeg_tables)
        if array is None or array.size != real[1] * real[2]:
            raise OSError("a strip or tile has too few values")
        values: Array = np.asarray(array).reshape(real[1], real[2])
        return values

    def _coloured(self) -> Array:
        import tifffile

        check_density(self._chosen.nbytes, max(sum(self._counts), 1) * 4, self._name)
        with tifffile.TiffFile(self._source if isinstance(self._source, Path) else io.BytesIO(self._source)) as file:
            page: Any = file.pages[self._page]
            array: Array = np.asarray(page.asarray(maxworkers=1))
            if self.about.palette:
                colours: Array = np.moveaxis(page.colormap[:, array] >> 8, 0, -1).astype(np.uint8)
                return colours
            if array.ndim == 3 and array.shape[0] == self.about.channels and int(page.planarconfig) == 2:
                array = np.moveaxis(array, 0, -1)
            return array

    def _file(self) -> IO[bytes]:
        return self._source.open("rb") if isinstance(self._source, Path) else io.BytesIO(self._source)


def _extent(page: Any, index: int) -> tuple[int, int, int, int]:
    """Row, column, height and width of a strip or tile, as far as it lies in the image."""
    if page.is_tiled:
        across = -(-page.imagewidth // page.tilewidth)
        row, column = index // across * page.tilelength, index % across * page.tilewidth
        return row, column, min(page.tilelength, page.imagelength - row), min(page.tilewidth, page.imagewidth - column)
    row = index * page.rowsperstrip
    return row, 0, min(page.rowsperstrip, page.imagelength - row), page.imagewidth


def _kind(dtype: Any) -> Literal["unsigned", "signed", "float"]:
    kinds: dict[str, Literal["unsigned", "signed", "float"]] = {"u": "unsigned", "i": "signed", "b": "unsigned"}
    return kinds.get(dtype.kind, "float")


def _orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return 1 if tag is None else int(tag.value)


def _is_luminous(page: Any, compression: str) -> bool:
    """Whether channels are grey, or red, green and blue, perhaps with transparency; JPEG is decoded to these."""
    extra = [int(sample) for sample in page.extrasamples]
    colours = int(page.samplesperpixel) - len(extra)
    photometric = int(page.photometric)
    is_rgb = photometric == _RGB or (photometric == _YCBCR and "jpeg" in compression)
    known = colours == (3 if is_rgb else 1) and (is_rgb or photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _PALETTE))
    return known and len(extra) <= 1 and all(sample in _TRANSPARENCY for sample in extra)


def _hidden_pages(file: tifffile.TiffFile) -> int:
    """Pages that ImageJ, MetaMorph and tifffile write behind the first without a directory; 0 when there are none."""
    if len(file.pages) != 1:
        return 0
    first: Any = file.pages[0]
    if planes := first.tags.get(UIC2):
        return int(planes.count) if planes.count > 1 else 0
    images = (file.imagej_metadata or {}).get("images", 1) if file.is_imagej else 1
    series = file.series[0] if file.is_shaped and file.series else None
    if series is not None and series.is_truncated:
        images = series.size // max(int(file.pages[0].size), 1)
    return int(images) if int(images) > 1 else 0


def _first_full_page(file: tifffile.TiffFile) -> int:
    """The first page that is no reduced copy of another one: some writers put a thumbnail in front."""
    pages: Any = file.pages
    return next((number for number, page in enumerate(pages) if not page.is_reduced), 0)


def _full_pages(file: tifffile.TiffFile) -> int:
    """Pages that are not reduced copies of another one."""
    if len(file.pages) == 1:
        return 1
    pages: Any = file.pages
    return max(sum(not page.is_reduced for page in pages), 1)
