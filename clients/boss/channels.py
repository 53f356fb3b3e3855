"""A channel as a place for pixels that are written by its cutout service, without an ingest job.

It is how users of intern write arrays. For small volumes: a request for each megabyte or so, through the web servers of
the Boss, where an ingest job puts into its buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.boss._keys import CUBOID_Z
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.cutouts import Cutout
from prefect_biomed.clients.boss.models import Channel
from prefect_biomed.clients.boss.pictures import Array
from prefect_biomed.clients.boss.sources import compress
from prefect_biomed.clients.boss.volumes import Level, Range, Triple
from prefect_biomed.clients.errors import ConfigurationError, JobFailed, is_transient
from prefect_biomed.clients.texts import logger_of

__all__ = ["ChannelTarget", "ChannelVolume", "write_array"]

logger = logger_of(__name__)

_SIDE = 1024


class ChannelTarget(BaseModel):
    """Which channel is written, and what it is like; as `VolumeTarget`.

    Attributes:
        location: Host and `collection/experiment/channel`.
        datatype: dtype of the channel.
        format: `channel`.
        kind: Type of the channel.
        levels: The Boss makes lower resolutions itself.
        chunk: Voxels of a cuboid.
        voxel_size: Not used; what the coordinate frame says holds.
        voxel_unit: See `voxel_size`.
    """

    model_config = ConfigDict(frozen=True)

    location: str
    datatype: Literal["uint8", "uint16", "uint32", "uint64"]
    format: Literal["channel"] = "channel"
    kind: Literal["image", "annotation"] = "image"
    levels: Literal[1] = 1
    chunk: Triple = (512, 512, 16)
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    voxel_unit: str = "voxels"


class ChannelVolume:
    """The part of a channel that is written.

    Args:
        client: Client of the Boss.
        path: `collection/experiment/channel`.
        target: The channel.
        levels: Its only resolution that is written.
        sample: Which time sample.
        identity: Of what is written; another source has another.

    Attributes:
        host: Of the Boss.
        identity: As given.
        levels: As given.
        target: As given.
    """

    def __init__(
        self,
        client: BossClient,
        path: str,
        target: ChannelTarget,
        levels: tuple[Level, ...],
        *,
        sample: int,
        identity: str,
    ) -> None:
        self.host, self.identity, self.levels, self.target = client.host, identity, levels, target
        self._client, self._path, self._sample = client, path, sample

    def channel(self, collection: str, experiment: str, channel: str) -> Channel:
        """Describe the channel; as `BossClient.channel`."""
        return self._client.channel(collection, experiment, channel)

    def cutout(
        self, channel_path: str, resolution: int, x: Range, y: Range, z: Range, t: int = 0, *, fresh: bool = False
    ) -> Cutout:
        """Read a block back; as `BossClient.cutout`."""
        return self._client.cutout(channel_path, resolution, x, y, z, t, fresh=fresh)

    def read(self, level: int, where: Sequence[slice]) -> Array:
        """Read a part, counted from its beginning in z, y and x.

        Args:
            level: 0.
            where: Which part.

        Raises:
            BiomedError: As for `BossClient.cutout`.
        """
        z, y, x = self._ranges(where)
        return _read(self._client, self._path, (x, y, z), self._sample)

    def write(self, level: int, where: Sequence[slice], values: Array) -> None:
        """Write a part, counted from its beginning in z, y and x.

        Safe to repeat: the same values in the same place.

        Args:
            level: 0.
            where: Which part.
            values: Of the dtype of the channel.

        Raises:
            BiomedError: As for `BossClient.write_cutout`.
        """
        z, y, x = self._ranges(where)
        _write(self._client, self._path, values, (x[0], y[0], z[0]), self._sample)

    def reduced(self, level: int, where: Sequence[slice]) -> Array:
        """Lower resolutions are made by the Boss.

        Args:
            level: Not used.
            where: Not used.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(f"{self.target.location}: the Boss makes lower resolutions itself.")

    def _ranges(self, where: Sequence[slice]) -> list[Range]:
        offset = self.levels[0].offset
        return [(part.start + low, part.stop + low) for part, low in zip(where, offset, strict=True)]


def write_array(
    client: BossClient, channel_path: str, values: Array, *, first: Triple = (0, 0, 0), sample: int = 0
) -> int:
    """Write an array into a channel by the cutout service, and read all of it back.

    Safe to repeat: the same values in the same place. A block whose answer was lost is looked for before it is sent
    again. The Boss leaves as it is what an array has zeros for, so that zeros cannot replace what is there: the
    comparison notices that.

    Args:
        client: Client of the Boss.
        channel_path: `collection/experiment/channel`.
        values: Array in z, y and x, of the dtype of the channel.
        first: Where its first voxel goes, in x, y and z.
        sample: Which time sample.

    Returns:
        Voxels written and compared.

    Raises:
        ConfigurationError: Its dtype is not that of the channel, or it does not fit into the channel.
        JobFailed: What is read back is not what was written.
        BiomedError: As for `BossClient.write_cutout`.
    """
    names = channel_path.split("/")
    if len(names) != 3 or values.ndim != 3 or not values.size:
        raise ConfigurationError(
            f"{channel_path}: collection/experiment/channel and an array in z, y and x are needed."
        )
    channel = client.channel(*names)
    if values.dtype.newbyteorder("=") != np.dtype(channel.datatype):
        raise ConfigurationError(f"{channel_path} holds {channel.datatype}, and the array {values.dtype}. Convert it.")
    for axis, low, length in zip("xyz", first, values.shape[::-1], strict=True):
        least, most = channel.bounds[axis]
        if low < least or low + length > most:
            raise ConfigurationError(
                f"{channel_path} goes from {least} to {most} in {axis}, the array from {low} to {low + length}."
            )
    if not 0 <= sample < channel.time_samples:
        raise ConfigurationError(f"{channel_path} has the samples 0 to {channel.time_samples - 1}, not {sample}.")
    _write(client, channel_path, values, first, sample)
    for part, ranges in _parts(values, first):
        had = _read(client, channel_path, ranges, sample)
        differing = np.argwhere(had != part)
        if len(differing):
            z, y, x = (int(at) + low for at, (low, _) in zip(differing[0], reversed(ranges), strict=True))
            zeros = " Zeros do not replace what is there." if (part[had != part] == 0).all() else ""
            raise JobFailed(
                f"{channel_path}: {len(differing):,} voxels are not as they were written, such as ({x}, {y}, {z})."
                f"{zeros}"
            )
    return int(values.size)


def _write(client: BossClient, path: str, values: Array, first: Triple, sample: int) -> None:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    for part, ranges in _parts(little, first):
        if not part.any():
            continue  # it would change nothing
        frame = compress(np.ascontiguousarray(part).tobytes(), part.itemsize)
        try:
            client.write_cutout(path, 0, *ranges, frame, sample)
        except Exception as error:
            if not is_transient(error) or not np.array_equal(_read(client, path, ranges, sample), part):
                raise
            logger.info("%s: the answer to a block was lost (%s), it is there", path, error)


def _read(client: BossClient, path: str, ranges: tuple[Range, Range, Range], sample: int) -> Array:
    block = client.cutout(path, 0, *ranges, sample, fresh=True)
    return np.frombuffer(block.content, np.dtype(block.datatype).newbyteorder("<")).reshape(block.shape)


def _parts(values: Array, first: Triple) -> Iterator[tuple[Array, tuple[Range, Range, Range]]]:
    """Cut an array along the cuboids of the Boss, into parts that one request carries."""
    steps = (CUBOID_Z, _SIDE, _SIDE)
    cuts = []
    for low, length, step in zip(reversed(first), values.shape, steps, strict=True):
        inner = range((low // step + 1) * step, low + length, step)
        edges = [low, *inner, low + length]
        cuts.append(list(itertools.pairwise(edges)))
    x0, y0, z0 = first
    for z in cuts[0]:
        for y in cuts[1]:
            for x in cuts[2]:
                yield values[z[0] - z0 : z[1] - z0, y[0] - y0 : y[1] - y0, x[0] - x0 : x[1] - x0], (x, y, z)
