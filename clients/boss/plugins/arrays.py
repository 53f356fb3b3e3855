"""Tiles and chunks out of a NumPy file of any size. Needs the `volumetric` extra."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from prefect_biomed.clients.boss.plugins.base import (
    TZYX_ORDER,
    XYZ_ORDER,
    XYZT_ORDER,
    ZYX_ORDER,
    ChunkProcessor,
    PathProcessor,
    TileProcessor,
    only_sample,
    parameter,
)
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["ArrayChunkProcessor", "ArrayPathProcessor", "ArrayTileProcessor"]

Array = npt.NDArray[np.generic]
_ORDERS = {"xyz": XYZ_ORDER, "zyx": ZYX_ORDER, "xyzt": XYZT_ORDER, "tzyx": TZYX_ORDER}


class ArrayPathProcessor(PathProcessor):
    """The same file for all. Parameter: `filename`."""

    thread_safe: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Name the file."""
        return str(parameter(self.parameters, "filename", self))


def _open(parameters: dict[str, Any], plugin: object) -> tuple[Array, str]:
    path = str(parameter(parameters, "filename", plugin))
    order = str(parameters.get("order", "zyx")).lower()
    if order not in _ORDERS:
        raise ConfigurationError(f"order {order!r} is none of {', '.join(_ORDERS)}.")
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is not a NumPy file that can be mapped: {error}.") from error
    if array.ndim != len(order):
        raise ConfigurationError(f"{path} has {array.ndim} dimensions, not those of {order}.")
    return array, order


class ArrayTileProcessor(TileProcessor):
    """Cuts tiles out of a `.npy` file, which stays on disk.

    Parameters: `filename`, `order` of its axes (`zyx`, `xyz`, `xyzt` or `tzyx`).
    """

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Map the file."""
        super().setup(parameters)
        array, order = _open(parameters, self)
        axes = "tzyx" if "t" in order else "zyx"
        self._array = array.transpose([order.index(axis) for axis in axes])
        size = parameters["ingest_job"]["tile_size"]
        self._width, self._height = int(size["x"]), int(size["y"])

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int, t_index: int = 0) -> Array:
        """Cut one tile, smaller at the far ends of the array."""
        if self._array.ndim == 3:
            only_sample(t_index, self)
        try:
            volume = self._array[t_index] if self._array.ndim == 4 else self._array
            plane = volume[z_index]
        except IndexError:
            raise SourceUnreadable(f"{file_path}: has no slice {z_index} of sample {t_index}.") from None
        x, y = x_index * self._width, y_index * self._height
        part: Array = np.asarray(plane[y : y + self._height, x : x + self._width])
        return part


class ArrayChunkProcessor(ChunkProcessor):
    """Cuts chunks out of a `.npy` file, which stays on disk. Parameters as for tiles."""

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Map the file."""
        super().setup(parameters)
        self._array, self._order = _open(parameters, self)

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Array, int]:
        """Cut one chunk, smaller at the far ends of the array."""
        x, y, z = self.bounds(x_index, y_index, z_index)
        spans = {"x": x, "y": y, "z": z, "t": slice(0, 1)}
        return self._array[tuple(spans[axis] for axis in self._order)], _ORDERS[self._order]
