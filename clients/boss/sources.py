"""The pixels of a job: plugins loaded, their output brought into the form that the Boss needs."""

from __future__ import annotations

import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from prefect_biomed.clients.boss import images
from prefect_biomed.clients.boss._keys import CUBOID_X, CUBOID_Y, CUBOID_Z, Position
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.errors import SourceTooSmall
from prefect_biomed.clients.boss.images import DecodeCache, ImageWindow, TileFormat
from prefect_biomed.clients.boss.models import Made, UploadSettings
from prefect_biomed.clients.boss.pictures import Conversion
from prefect_biomed.clients.boss.plugins import base
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, SourceUnreadable
from prefect_biomed.clients.files import home

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.generic]

__all__ = ["ChunkSource", "Piece", "TileSource", "open_source", "padded"]

_BLOSC_MAX = 2**31 - 17


class Piece(NamedTuple):
    """A tile or a chunk, and how much of it its source gave.

    Attributes:
        content: The encoded tile, or the array of a chunk.
        made: `whole`: all that lies within the extent is from the source; `padded`: the source lacks some of that,
            which is filled up; `blank`: it is not there, and the plugin was told to take the fill value.
    """

    content: Any
    made: Made = "whole"


class _Paths:
    """The path processor, made safe for threads."""

    def __init__(self, config: IngestConfig) -> None:
        self.job = config.ingest_job.model_dump(mode="json", by_alias=True, exclude_none=True)
        plugin = config.client.path_processor
        self._plugin = base.load(plugin.class_, plugin.params | {"ingest_job": self.job}, config.storage)
        self._guard = _guard(self._plugin)

    @property
    def names_files(self) -> bool:
        """Whether `path` is always the path of a local file, as the class says that makes the paths, or one below."""
        classes = type(self._plugin).__mro__
        maker = next((n for n, found in enumerate(classes) if "process" in vars(found)), 0)
        said_of_it = any("names_files" in vars(found) for found in classes[: maker + 1])
        return said_of_it and bool(getattr(self._plugin, "names_files", False))

    def path(self, position: Position) -> str:
        """Name the source of a tile or chunk; also what messages are grouped by."""
        with self._guard, _plugin_errors(self._plugin, position):
            return str(self._plugin.process(position.x, position.y, position.z, position.t))


class TileSource(_Paths):
    """The tiles of a job.

    Args:
        config: Names the plugins.
        tile: What every tile has to be.
        cache_bytes: Bound of the decoded images in memory.
        disk_bytes: Bound of those on the disk.

    Raises:
        ConfigurationError: A plugin cannot be loaded, or lacks a parameter.
    """

    def __init__(self, config: IngestConfig, tile: TileFormat, cache_bytes: int, disk_bytes: int = 0) -> None:
        super().__init__(config)
        plugin = config.client.tile_processor
        if plugin is None:
            raise ConfigurationError("The configuration has no tile_processor.")
        self.format = tile
        self.cache = DecodeCache(cache_bytes, disk_bytes, home("boss"))
        self._reader = base.load(plugin.class_, plugin.params | {"ingest_job": self.job}, config.storage)
        self._reader_guard = _guard(self._reader)

    def piece(self, position: Position, path: str | None = None) -> Piece:
        """Make one tile.

        Args:
            position: Tile indices, slice and sample.
            path: What `path` said, when it was asked already.

        Returns:
            The encoded tile: exactly the tile's size, one channel, a dtype that fits.

        Raises:
            SourceUnreadable: The source is missing, damaged, or of a kind that does not fit.
            SourceTooSmall: It lacks some of what lies within the extent, and `pad` is not allowed.
        """
        path = self.path(position) if path is None else path
        with self._reader_guard, _plugin_errors(self._reader, position):
            result = self._reader.process(path, position.x, position.y, position.z, position.t)
            if isinstance(result, ImageWindow):
                whole = result.whole or bool(getattr(self._plugin, "one_file_per_tile", False))
                result = ImageWindow(result.path, result.page, whole=True) if whole else result
            elif hasattr(result, "read"):
                with closing(result) as file:
                    file.seek(0)
                    result = file.read()
        if isinstance(result, base.Missing):
            return Piece(self.blank(), "blank")
        name = path or f"tile {position}"
        try:
            return Piece(self._encoded(result, replace(self.format, least=self._within_extent(position)), name))
        except SourceTooSmall:
            if "pad" not in self.format.convert:
                raise
            return Piece(self._encoded(result, self.format, name), "padded")

    def read(self, position: Position, path: str | None = None) -> bytes:
        """Make one tile, as `piece` does, and return the encoded tile alone."""
        content: bytes = self.piece(position, path).content
        return content

    def _encoded(self, result: Any, tile: TileFormat, name: str) -> bytes:
        """What a plugin returned, as a tile."""
        if isinstance(result, ImageWindow):
            return images.from_window(result, tile, self.cache)
        if isinstance(result, bytes | bytearray | memoryview):
            return images.from_bytes(bytes(result), tile, name)
        values, before = result if isinstance(result, base.Placed) else (result, (0, 0))
        if hasattr(values, "ndim"):
            return images.from_array(values, tile, name, before)
        raise SourceUnreadable(f"{name}: the plugin returned {type(values).__name__}, which is no image.")

    def _within_extent(self, position: Position) -> tuple[int, int]:
        """Columns and rows of a tile that lie within the extent of the job."""
        width = _part(position.x, self.format.width, self.job["extent"]["x"])
        return width, _part(position.y, self.format.height, self.job["extent"]["y"])

    def blank(self) -> bytes:
        """Make a tile of the fill value."""
        return images.blank(self.format)


class ChunkSource(_Paths):
    """The chunks of a volumetric job, cut into compressed cuboids.

    Args:
        config: Names the plugins and the size of a chunk.
        datatype: dtype of the channel.
        fill: Value of chunks that are filled because their source is missing.
        convert: What may be done to sources that do not fit; see `UploadSettings.convert`.

    Raises:
        ConfigurationError: A plugin cannot be loaded, or NumPy is not installed.
    """

    def __init__(
        self, config: IngestConfig, datatype: str, fill: int = 0, convert: Collection[Conversion] = ()
    ) -> None:
        super().__init__(config)
        plugin = config.client.chunk_processor
        if plugin is None or config.ingest_job.chunk_size is None:
            raise ConfigurationError("The configuration has no chunk_processor or chunk_size.")
        try:
            import numpy as np
        except ImportError:
            raise ConfigurationError("Volumetric jobs need NumPy: install prefect-biomed[volumetric].") from None
        size = config.ingest_job.chunk_size
        self.shape = (size.z, size.y, size.x)
        self.datatype = datatype
        self._dtype: Any = np.dtype(datatype)
        self._fill = fill
        self._may_pad = "pad" in convert
        self._reader = base.load(plugin.class_, plugin.params | {"ingest_job": self.job}, config.storage)
        self._reader_guard = _guard(self._reader)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk in memory."""
        depth, height, width = self.shape
        return depth * height * width * int(self._dtype.itemsize)

    def piece(self, position: Position, path: str | None = None) -> Piece:
        """Make one chunk.

        Args:
            position: Indices of the chunk.
            path: What `path` said, when it was asked already.

        Returns:
            Array of shape (z, y, x) in the channel's dtype, smaller than a chunk where the source ends.

        Raises:
            SourceUnreadable: The source is missing, damaged, or does not fit.
            SourceTooSmall: It lacks some of what lies within the extent, and `pad` is not allowed.
        """
        import numpy as np

        path = self.path(position) if path is None else path
        name = path or f"chunk {position}"
        with self._reader_guard, _plugin_errors(self._reader, position):
            result, order = self._reader.process(path, position.x, position.y, position.z)
            values, placed = result if isinstance(result, base.Placed) else (result, None)
            block = np.asarray(values)
        axes = _spatial(block.shape, order, name)
        before = tuple(placed[axis] for axis in axes) if placed else (0, 0, 0)
        block = block.transpose(*axes, *set(range(block.ndim)).difference(axes)).reshape([block.shape[n] for n in axes])
        shape = tuple(lead + length for lead, length in zip(before, block.shape, strict=True))
        if any(have > most for have, most in zip(shape, self.shape, strict=True)):
            raise SourceUnreadable(f"{name}: shape {shape} (z, y, x) is larger than a chunk {self.shape}.")
        if not block.size:
            raise SourceUnreadable(f"{name}: has nothing of this chunk. Correct the extent.")
        if block.dtype != self._dtype:
            if not np.can_cast(block.dtype, self._dtype, "safe"):
                raise SourceUnreadable(f"{name}: is {block.dtype}, the channel is {self.datatype}; values would wrap.")
            block = block.astype(self._dtype)
        least = self._within_extent(position)
        if not any(before) and all(have >= some for have, some in zip(shape, least, strict=True)):
            return Piece(block)
        if not self._may_pad:
            begins = f"begins late, at {before}" if any(before) else "ends early"
            raise SourceTooSmall(
                f"{name}: {begins}: it gives {block.shape} (z, y, x) of a chunk of which {least} lie within the "
                "extent. Correct the extent, or allow the conversion 'pad', which fills up the rest."
            )
        return Piece(np.pad(block, [(lead, 0) for lead in before]), "padded")

    def read(self, position: Position, path: str | None = None) -> Array:
        """Make one chunk, as `piece` does, and return the array alone."""
        content: Array = self.piece(position, path).content
        return content

    def _within_extent(self, position: Position) -> tuple[int, int, int]:
        """Slices, rows and columns of a chunk that lie within the extent of the job."""
        depth, height, width = self.shape
        extent = self.job["extent"]
        return (
            _part(position.z, depth, extent["z"]),
            _part(position.y, height, extent["y"]),
            _part(position.x, width, extent["x"]),
        )

    def blank(self) -> Array:
        """Make a chunk of the fill value."""
        import numpy as np

        return np.full(self.shape, self._fill, dtype=self._dtype)

    def cuboid(self, chunk: Array, x: int, y: int, z: int) -> bytes:
        """Cut and compress one cuboid of 512 x 512 x 16 voxels, padded with zeros.

        Args:
            chunk: What `read` made.
            x: Offset of the cuboid in the chunk; `y` and `z` likewise.
            y: See `x`.
            z: See `x`.

        Returns:
            A blosc frame of the voxels in the order t, z, y, x.
        """
        part = chunk[z : z + CUBOID_Z, y : y + CUBOID_Y, x : x + CUBOID_X]
        return compress(padded(part, (CUBOID_Z, CUBOID_Y, CUBOID_X)).tobytes(), int(chunk.dtype.itemsize))


def _spatial(shape: Sequence[int], order: int, name: str) -> list[int]:
    """Which axes of an array that a plugin gave are z, y and x.

    Raises:
        SourceUnreadable: It is no chunk, or has several samples.
    """
    named = base.AXES.get(order, "")
    if not named or len(named) != len(shape):
        raise SourceUnreadable(f"{name}: shape {tuple(shape)} with axis order {order} is no chunk.")
    if "t" in named and shape[named.index("t")] != 1:
        raise SourceUnreadable(f"{name}: shape {tuple(shape)} has not exactly one sample.")
    return [named.index(axis) for axis in "zyx"]


def _part(index: int, size: int, extent: Sequence[int]) -> int:
    """How much of a piece, counted from its beginning, lies before the end of the extent."""
    return max(1, min(size, extent[1] - index * size))


def open_source(config: IngestConfig, datatype: str, settings: UploadSettings) -> TileSource | ChunkSource:
    """Open the source of a job.

    Args:
        config: Configuration of the job.
        datatype: dtype of the channel.
        settings: How tiles are to be made.

    Returns:
        The source of tiles, or of chunks where the job is volumetric.

    Raises:
        ConfigurationError: The channel cannot hold tiles or the fill value, or a plugin cannot be loaded.
    """
    if config.volumetric:
        return ChunkSource(config, datatype, settings.fill, settings.convert)
    reason = images.check_datatype(datatype)
    if reason:
        raise ConfigurationError(f"{config.channel_path}: {reason}.")
    if settings.fill >= 2 ** (8 * images.ITEM_BYTES[datatype]):
        raise ConfigurationError(f"The fill value {settings.fill} does not fit a {datatype} channel.")
    size = config.piece_size
    tile = TileFormat(
        size["x"],
        size["y"],
        datatype,
        settings.colour,
        settings.fill,
        settings.encoding,
        settings.convert,
        settings.max_pixels,
    )
    return TileSource(config, tile, settings.cache_bytes, settings.cache_disk_bytes)


def padded(block: Array, shape: tuple[int, int, int]) -> Array:
    """Bring a block to a shape, with zeros behind its ends, as the Boss stores what a source does not have.

    Args:
        block: Array of shape (z, y, x), no larger than that.
        shape: The shape wanted.
    """
    import numpy as np

    if block.shape == shape:
        return np.ascontiguousarray(block)
    result = np.zeros(shape, dtype=block.dtype)
    result[: block.shape[0], : block.shape[1], : block.shape[2]] = block
    return result


def compress(content: bytes, item_size: int) -> bytes:
    """Make a blosc1 frame: compressed when the blosc package is installed, else uncompressed and just as valid.

    The layout of the header is that of c-blosc 1: version, format version, flags (bit 1: memory copy), item size, then
    bytes, block size and frame size.

    Args:
        content: The values.
        item_size: Bytes of one value.
    """
    if len(content) > _BLOSC_MAX:
        raise ConfigurationError("A blosc frame cannot hold 2 GiB or more.")
    try:
        import blosc
    except ImportError:
        size = len(content)
        return struct.pack("<BBBBIII", 2, 1, 0x02, item_size, size, size, size + 16) + content
    with _blosc_lock:
        _prepare(blosc)
    frame: bytes = blosc.compress(content, typesize=item_size, clevel=5)
    return frame


_blosc_lock = threading.Lock()
_prepared = False


def _prepare(blosc: Any) -> None:
    global _prepared
    if not _prepared:
        blosc.set_nthreads(1)  # the threads are ours
        blosc.set_releasegil(True)
        _prepared = True


def _guard(plugin: object) -> AbstractContextManager[Any]:
    """A lock for plugins that were not written for threads, as all of boss-ingest were not."""
    return nullcontext() if getattr(plugin, "thread_safe", False) else threading.Lock()


@contextmanager
def _plugin_errors(plugin: object, position: Position) -> Iterator[None]:
    """Let an error of a plugin cost one tile, not the upload."""
    try:
        yield
    except BiomedError:
        raise
    except Exception as error:  # third-party code may raise anything
        raise SourceUnreadable(
            f"{position}: the plugin {type(plugin).__name__} failed ({type(error).__name__}: {error})."
        ) from error
