"""Chunks of a volumetric job out of a Zarr array. Needs the `volumetric` extra."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import zarr

from prefect_biomed.clients.boss.plugins.base import ZYX_ORDER, ChunkProcessor, PathProcessor, parameter
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["ZarrChunkProcessor", "ZarrPathProcessor"]


class ZarrPathProcessor(PathProcessor):
    """The chunk processor knows where the array is."""

    thread_safe: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Return an empty path."""
        return ""


class ZarrChunkProcessor(ChunkProcessor):
    """Reads an array of shape (z, y, x).

    Parameters: `cloud_path` (a local folder, or `s3://…` or `gs://…` where fsspec has the driver), `volume_name`
    (name of the array in the group; none when `cloud_path` is the array itself).
    """

    thread_safe: ClassVar[bool] = True

    def setup(self, parameters: dict[str, Any]) -> None:
        """Open the array.

        Raises:
            ConfigurationError: It is not there, or not three-dimensional.
        """
        super().setup(parameters)
        path = str(parameter(parameters, "cloud_path", self))
        name = str(parameters.get("volume_name", ""))
        try:
            opened: Any = zarr.open(path, mode="r", path=name or None)
        except Exception as error:  # whatever the driver of the store raises
            raise ConfigurationError(f"Zarr array {name!r} in {path} cannot be opened: {error}.") from error
        if getattr(opened, "ndim", 0) != 3:
            raise ConfigurationError(f"Zarr array {name!r} in {path} is not a three-dimensional array (z, y, x).")
        self._array, self._name = opened, f"{path}/{name}"

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Any, int]:
        """Read one chunk, smaller at the far ends of the array."""
        x, y, z = self.bounds(x_index, y_index, z_index)
        try:
            return np.asarray(self._array[z, y, x]), ZYX_ORDER
        except Exception as error:  # whatever the codec or the driver raises
            raise SourceUnreadable(
                f"{self._name}: chunk {x_index} {y_index} {z_index} is damaged ({error})."
            ) from error
