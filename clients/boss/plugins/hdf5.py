"""Tiles and chunks out of HDF5 files. Needs the `volumetric` extra."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import h5py
import numpy as np
import numpy.typing as npt

from prefect_biomed.clients.boss.plugins.base import (
    ZYX_ORDER,
    ChunkProcessor,
    PathProcessor,
    Placed,
    TileProcessor,
    filled_in,
    local_file,
    only_sample,
    parameter,
)
from prefect_biomed.clients.errors import SourceUnreadable

__all__ = [
    "Hdf5ChunkPathProcessor",
    "Hdf5ChunkTileProcessor",
    "Hdf5SingleFilePathProcessor",
    "Hdf5SingleFileTileProcessor",
    "Hdf5SlicePathProcessor",
    "Hdf5SliceTileProcessor",
    "Hdf5TimeSeriesLabelTileProcessor",
    "Hdf5TimeSeriesPathProcessor",
    "Hdf5TimeSeriesTileProcessor",
    "Hdf5VolumeChunkProcessor",
]

Array = npt.NDArray[np.generic]
_OPEN_FILES = 32


class _Files:
    """Open files, the least recently used closed first. HDF5 is used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: OrderedDict[str, Any] = OrderedDict()

    @contextmanager
    def dataset(self, path: str, name: str) -> Iterator[Any]:
        with self._lock:
            try:
                if path not in self._open:
                    self._open[path] = h5py.File(path, "r")
                    while len(self._open) > _OPEN_FILES:
                        self._open.popitem(last=False)[1].close()
                self._open.move_to_end(path)
                yield self._open[path][name]
            except FileNotFoundError:
                raise SourceUnreadable(f"{path}: there is no such file.") from None
            except KeyError:
                raise SourceUnreadable(f"{path}: has no dataset {name!r}.") from None
            except (OSError, ValueError, IndexError) as error:
                raise SourceUnreadable(f"{path}: cannot be read ({error}).") from None


class _NamedFile(PathProcessor):
    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the parts of the name."""
        super().setup(parameters)
        self._root = str(parameter(parameters, "root_dir", self))
        self._name = f"{parameter(parameters, 'base_filename', self)}.{parameter(parameters, 'extension', self)}"

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file of a slice."""
        name = filled_in(self._name, z_index, x_index, y_index, z_index)
        return os.path.join(self._root, name)  # noqa: PTH118  # a hundred thousand times


class Hdf5TimeSeriesPathProcessor(_NamedFile):
    """One file per slice. Parameters: `root_dir`, `base_filename`, `extension`."""


class Hdf5SlicePathProcessor(_NamedFile):
    """One file per slice. Parameters: `root_dir`, `base_filename`, `extension`."""


class Hdf5SingleFilePathProcessor(PathProcessor):
    """One file for all. Parameter: `filename`."""

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file."""
        return str(parameter(self.parameters, "filename", self))


class Hdf5ChunkPathProcessor(PathProcessor):
    """One file per block: `{prefix}_{x0}-{x1}_{y0}-{y1}_{z0}-{z1}.{extension}`.

    Parameters: `root_dir`, `prefix`, `extension`, `x_offset`, `y_offset`, `z_offset`, `x_chunk_size`,
    `y_chunk_size`, `z_chunk_size`, `use_python_convention` (ends are exclusive).
    """

    thread_safe: ClassVar[bool] = True
    names_files: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file of a block."""
        last = 0 if self.parameters.get("use_python_convention", False) else 1
        spans = []
        depth = int(parameter(self.parameters, "z_chunk_size", self))
        for axis, index in (("x", x_index), ("y", y_index), ("z", z_index // depth)):
            size = int(parameter(self.parameters, f"{axis}_chunk_size", self))
            start = index * size + int(self.parameters.get(f"{axis}_offset", 0))
            spans.append(f"{start}-{start + size - last}")
        name = "_".join([str(parameter(self.parameters, "prefix", self)), *spans])
        root = str(parameter(self.parameters, "root_dir", self))
        return os.path.join(root, f"{name}.{parameter(self.parameters, 'extension', self)}")  # noqa: PTH118  # as above


class _Dataset(TileProcessor):
    """Reads arrays; whatever `upload_format` says, the tile is encoded as the job's settings say."""

    thread_safe: ClassVar[bool] = True
    name_parameter: ClassVar[str] = "data_name"

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the name of the dataset."""
        super().setup(parameters)
        local_file(parameters, self)
        self._files = _Files()
        self._dataset = str(parameter(parameters, self.name_parameter, self))
        size = parameters["ingest_job"]["tile_size"]
        self._width, self._height = int(size["x"]), int(size["y"])


class Hdf5SingleFileTileProcessor(_Dataset):
    """Reads a dataset of shape (z, y, x).

    Parameters: `data_name`, `offset_x`, `offset_y`, `offset_z` (added to positions; 0). `datatype` is accepted and
    ignored: the channel decides.
    """

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Placed:
        """Read one tile."""
        only_sample(t_index, self)
        offset = {axis: int(self.parameters.get(f"offset_{axis}", 0)) for axis in "xyz"}
        left, top = x_index * self._width + offset["x"], y_index * self._height + offset["y"]
        with self._files.dataset(file_path, self._dataset) as data:
            z = z_index + offset["z"]
            if not 0 <= z < data.shape[0]:
                raise SourceUnreadable(f"{file_path}: has no slice {z}; it has {data.shape[0]}.")
            right, bottom = min(left + self._width, data.shape[2]), min(top + self._height, data.shape[1])
            x0, y0 = max(left, 0), max(top, 0)
            if right <= x0 or bottom <= y0:
                raise SourceUnreadable(f"{file_path}: has no pixels at ({left}, {top}).")
            part: Array = np.asarray(data[z, y0:bottom, x0:right])
        return Placed(part, (y0 - top, x0 - left))


class Hdf5TimeSeriesTileProcessor(_Dataset):
    """Reads a dataset of shape (t, x, y, colour), one file per slice.

    Parameters: `dataset`, `channel_index`, `scale_factor` (1).
    """

    name_parameter = "dataset"

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Array:
        """Read one tile, scaled and cut off to whole numbers."""
        x, y = x_index * self._width, y_index * self._height
        colour = int(parameter(self.parameters, "channel_index", self))
        with self._files.dataset(file_path, self._dataset) as data:
            part = np.asarray(data[t_index, x : x + self._width, y : y + self._height, colour])
        scale = self.parameters.get("scale_factor", 1)
        pixels: Array = part.T if scale == 1 else _whole(part.T * scale, file_path)
        return pixels


class Hdf5TimeSeriesLabelTileProcessor(_Dataset):
    """Reads a dataset of labels of shape (x, y), one file per slice. Parameter: `dataset`."""

    name_parameter = "dataset"

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Array:
        """Read one tile."""
        only_sample(t_index, self)
        x, y = x_index * self._width, y_index * self._height
        with self._files.dataset(file_path, self._dataset) as data:
            part: Array = np.asarray(data[x : x + self._width, y : y + self._height]).T
        return part


class Hdf5SliceTileProcessor(_Dataset):
    """Reads a slice that lies at an offset within the volume.

    Parameters: `data_name`, `offset_name` and `extent_name` (datasets with two numbers, y and x), `offset_origin_x`,
    `offset_origin_y` (added to the offset; 0).
    """

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Placed:
        """Read what the slice has of one tile."""
        only_sample(t_index, self)
        corner = []
        with self._files.dataset(file_path, str(parameter(self.parameters, "offset_name", self))) as offset:
            for position, axis in enumerate("yx"):
                corner.append(int(offset[position]) + int(self.parameters.get(f"offset_origin_{axis}", 0)))
        tops = (y_index * self._height, x_index * self._width)
        with self._files.dataset(file_path, self._dataset) as data:
            spans = [
                (max(top, start), min(top + size, start + length))
                for top, size, start, length in zip(tops, (self._height, self._width), corner, data.shape, strict=True)
            ]
            if any(low >= high for low, high in spans):
                raise SourceUnreadable(f"{file_path}: its slice begins at {corner} (y, x) and has nothing of the tile.")
            part = tuple(slice(low - start, high - start) for (low, high), start in zip(spans, corner, strict=True))
            before = tuple(low - top for (low, _), top in zip(spans, tops, strict=True))
            return Placed(np.asarray(data[part]), before)


class Hdf5ChunkTileProcessor(_Dataset):
    """Reads a slice out of a block of shape (z, y, x) that covers one tile.

    Parameters: `data_name`, `z_chunk_size`. A block that is missing counts as a missing source.
    """

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Array:
        """Read one tile."""
        only_sample(t_index, self)
        depth = int(parameter(self.parameters, "z_chunk_size", self))
        with self._files.dataset(file_path, self._dataset) as data:
            part: Array = np.asarray(data[z_index % depth])
        return part


class Hdf5VolumeChunkProcessor(ChunkProcessor):
    """Reads chunks of a volumetric job out of a dataset of shape (z, y, x). Parameters: `filename`, `data_name`."""

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Take the file and the dataset."""
        super().setup(parameters)
        self._files = _Files()
        self._path = str(parameter(parameters, "filename", self))
        self._dataset = str(parameter(parameters, "data_name", self))

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Array, int]:
        """Read one chunk, smaller at the far ends of the dataset."""
        x, y, z = self.bounds(x_index, y_index, z_index)
        with self._files.dataset(file_path or self._path, self._dataset) as data:
            return np.asarray(data[z, y, x]), ZYX_ORDER


def _whole(values: npt.NDArray[Any], name: str) -> Array:
    if not np.isfinite(values).all():
        raise SourceUnreadable(f"{name}: has values that are not finite.")
    return values.astype(np.int64)
