"""Chunks of a volumetric job out of anything that CloudVolume reads. Needs the `cloud-volume` package."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from prefect_biomed.clients.boss.plugins.base import XYZT_ORDER, ChunkProcessor, PathProcessor, Placed, parameter
from prefect_biomed.clients.errors import ConfigurationError, SourceUnreadable

__all__ = ["CloudVolumeChunkProcessor", "CloudVolumePathProcessor"]


class CloudVolumePathProcessor(PathProcessor):
    """The chunk processor knows where the volume is."""

    thread_safe: ClassVar[bool] = True

    def process(self, x_index: int, y_index: int, z_index: int, t_index: int | None = None) -> str:
        """Return an empty path."""
        return ""


class CloudVolumeChunkProcessor(ChunkProcessor):
    """Reads a CloudVolume. Parameters: `cloudpath` and whatever else `CloudVolume` takes."""

    def setup(self, parameters: dict[str, Any]) -> None:
        """Open the volume.

        Raises:
            ConfigurationError: CloudVolume is not installed, or the volume is not there.
        """
        super().setup(parameters)
        parameter(parameters, "cloudpath", self)
        arguments = {key: value for key, value in parameters.items() if key not in ("ingest_job", "storage")}
        if "storage" in parameters:
            raise ConfigurationError(
                "CloudVolume finds keys on the machine only. Give no storage credentials, or read a precomputed volume "
                "with prefect_biomed.clients.boss.plugins.volume."
            )
        try:
            from cloudvolume import CloudVolume
        except ImportError as error:
            raise ConfigurationError("This plugin needs the package cloud-volume. Install it.") from error
        try:
            self._volume = CloudVolume(**arguments)
        except Exception as error:  # whatever its many drivers raise
            raise ConfigurationError(f"CloudVolume {arguments['cloudpath']} cannot be opened: {error!r}.") from error

    def process(self, file_path: str, x_index: int, y_index: int, z_index: int) -> tuple[Any, int]:
        """Read one chunk, smaller at the ends of the volume."""
        low, high = self._volume.bounds.minpt, self._volume.bounds.maxpt
        spans = self.bounds(x_index, y_index, z_index)
        clipped = [slice(max(s.start, int(a)), min(s.stop, int(b))) for s, a, b in zip(spans, low, high, strict=True)]
        if any(span.start >= span.stop for span in clipped):
            raise SourceUnreadable(
                f"{self._volume.cloudpath}: has nothing of chunk {x_index} {y_index} {z_index}; it lies from "
                f"{tuple(low)} to {tuple(high)}."
            )
        try:
            block = np.asarray(self._volume[clipped[0], clipped[1], clipped[2]])
        except Exception as error:  # whatever its many drivers raise
            raise SourceUnreadable(f"Chunk {x_index} {y_index} {z_index} cannot be read: {error!r}.") from error
        before = (clip.start - span.start for clip, span in zip(clipped, spans, strict=True))
        return Placed(block, (*before, 0)), XYZT_ORDER
