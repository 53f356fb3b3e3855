"""Tiles and chunks out of a volume of any format: Zarr, N5, HDF5, precomputed, TIFF, DICOM, NIfTI."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import numpy as np

from prefect_biomed.clients.boss.plugins.base import (
    ZYX_ORDER,
    ChunkProcessor,
    PathProcessor,
    Placed,
    TileProcessor,
    only_sample,
)
from prefect_biomed.clients.boss.volume_formats import open_volume
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, SourceUnreadable

__all__ = ["VolumeChunkProcessor", "VolumePathProcessor", "VolumeTileProcessor"]

_SPATIAL = "zyx"


class VolumePathProcessor(PathProcessor):
    """The other processor knows where the volume is."""

    thread_safe: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Return an empty path."""
        return ""


class _Parts:
    """A volume, read by positions in the Boss."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.volume = volume = open_volume(parameters)
        weakref.finalize(self, volume.close)
        if len(volume.axes) != len(volume.shape) or not {"x", "y"} <= set(volume.axes):
            raise ConfigurationError(
                f"{volume.name}: has the shape {volume.shape}, and its axes are {''.join(volume.axes) or 'not told'}. "
                "Say in the parameter axes which they are, such as tczyx."
            )
        self._sizes = dict(zip(volume.axes, volume.shape, strict=True))
        self._origin = {**dict.fromkeys(_SPATIAL, 0), **volume.origin, **(parameters.get("origin") or {})}
        self._chosen = {axis: self._choice(axis, parameters) for axis in volume.axes if axis not in _SPATIAL}

    def read(self, spans: dict[str, slice]) -> Placed:
        """Read what the volume has of a box: of shape (z, y, x), smaller where the volume begins late or ends.

        Raises:
            SourceUnreadable: It has nothing of it, or is damaged there.
        """
        where: dict[str, slice | int] = dict(self._chosen)
        before = []
        for axis in _SPATIAL:
            low, high = (bound - self._origin[axis] for bound in (spans[axis].start, spans[axis].stop))
            where[axis] = slice(max(low, 0), min(high, self._sizes.get(axis, 1)))
            before.append(max(-low, 0))
            if max(low, 0) >= min(high, self._sizes.get(axis, 1)):
                raise SourceUnreadable(
                    f"{self.volume.name}: has nothing at {axis} {spans[axis].start} to {spans[axis].stop}; it lies at "
                    f"{self._origin[axis]} to {self._origin[axis] + self._sizes.get(axis, 1)}."
                )
        try:
            block = np.asarray(self.volume.read(tuple(where[axis] for axis in self.volume.axes)))
        except BiomedError:
            raise
        except Exception as error:  # whatever the codec or the store raises
            said = str(error).partition(" [tensorstore_spec")[0]
            told = ", ".join(f"{axis} {spans[axis].start}" for axis in "xyz")
            raise SourceUnreadable(f"{self.volume.name}: cannot be read at {told} ({said}).") from error
        left = [axis for axis in self.volume.axes if axis in _SPATIAL]
        block = block.transpose([left.index(axis) for axis in _SPATIAL if axis in left])
        if "z" not in left:
            block = block[np.newaxis]
        return Placed(block.astype(block.dtype.newbyteorder("="), copy=False), tuple(before))

    def _choice(self, axis: str, parameters: dict[str, Any]) -> int:
        size = self._sizes[axis]
        if axis not in parameters and size != 1:
            raise ConfigurationError(
                f"{self.volume.name}: has {size} indices on the axis {axis}. Say in the parameter {axis} which is read."
            )
        index = int(parameters.get(axis, 0))
        if not 0 <= index < size:
            raise ConfigurationError(f"{self.volume.name}: has {size} indices on the axis {axis}, not one of {index}.")
        return index


class VolumeChunkProcessor(ChunkProcessor):
    """Reads chunks of a volumetric job.

    Parameters: `source` (path, or URL that fsspec or TensorStore reads), `kind` (a key of `volume_formats.KINDS`; told
    from the name when empty), `dataset` (name of the array, number of a TIFF's series), `level` (0,
    the finest), `t`, `c` and other axes that are not of space (needed where there are several), `axes` (names of the
    axes in their order, when the file does not tell), `origin` (where the first voxel lies in the Boss, by axis; what a
    precomputed volume says, else 0), `series` (of DICOM), `stored` (take values as they are stored, where a header
    says that they mean others), `missing_chunks` (`fill`, or `refuse`, which is so for precomputed volumes
    and may be for N5), and `storage_options`, such as `{"anon": true}`, never keys.
    """

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Open the volume.

        Raises:
            ConfigurationError: It is not there, its axes are not known, or something has to be chosen.
        """
        super().setup(parameters)
        self._parts = _Parts(parameters)

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Any, int]:
        """Read one chunk, smaller at the ends of the volume."""
        x, y, z = self.bounds(x_index, y_index, z_index)
        return self._parts.read({"x": x, "y": y, "z": z}), ZYX_ORDER


class VolumeTileProcessor(TileProcessor):
    """Cuts tiles out of slices. Parameters as for chunks."""

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Open the volume; see `VolumeChunkProcessor.setup`."""
        super().setup(parameters)
        self._parts = _Parts(parameters)

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Placed:
        """Cut one tile, smaller at the ends of the volume."""
        only_sample(t_index, self)
        size = self.parameters["ingest_job"]["tile_size"]
        x, y = (slice(index * size[axis], (index + 1) * size[axis]) for axis, index in (("x", x_index), ("y", y_index)))
        block, before = self._parts.read({"x": x, "y": y, "z": slice(z_index, z_index + 1)})
        return Placed(block[0], before[1:])
