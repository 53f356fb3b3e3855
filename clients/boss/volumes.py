"""A volume on disk or in a bucket as a second place for pixels: Neuroglancer precomputed or OME-Zarr 0.5.

Needs the `volumetric` extra: TensorStore writes both formats, to all kinds of stores, and each chunk of them whole or
not at all.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol
from uuid import uuid4

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from prefect_biomed.clients.boss.cutouts import Cutout
from prefect_biomed.clients.boss.errors import ChunkDamaged
from prefect_biomed.clients.boss.models import Channel
from prefect_biomed.clients.boss.pictures import Array
from prefect_biomed.clients.boss.storage import StorageOptions, key_value_store
from prefect_biomed.clients.errors import ConfigurationError, ConnectionFailed, LocalStorageError

__all__ = ["Level", "Volume", "VolumeTarget", "levels_of"]

Triple = tuple[int, int, int]
Range = tuple[int, int]

_MARKER = "prefect-biomed.json"
_MOST_LEVELS = 12
_PASSING = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED")
_DAMAGED = ("FAILED_PRECONDITION: Error reading", "DATA_LOSS")
_METRES = {"nanometers": 1.0, "micrometers": 1e3, "millimeters": 1e6, "centimeters": 1e7}


class VolumeTarget(BaseModel):
    """Which volume is written, and what it is like."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    location: str = Field(min_length=1, title="Folder or URL")
    """A folder, `s3://bucket/path` or `gs://bucket/path`. Keys come from storage credentials, or from the worker."""
    format: Literal["precomputed", "ome-zarr"] = Field(default="precomputed", title="Format")
    """`precomputed` of Neuroglancer, or `ome-zarr` 0.5."""
    datatype: Literal["uint8", "uint16", "uint32", "uint64"] = Field(default="uint8", title="dtype")
    """dtype of the values; sources are never changed to fit it but by `convert`."""
    kind: Literal["image", "annotation"] = Field(default="image", title="Measured values or labels")
    """Lower resolutions of an `image` are means, those of an `annotation` the most frequent label."""
    voxel_size: tuple[float, float, float] = Field(default=(1.0, 1.0, 1.0), title="Voxel size")
    """Size of a voxel in x, y and z."""
    voxel_unit: Literal["nanometers", "micrometers", "millimeters", "centimeters"] = "nanometers"
    """Unit of the voxel size."""
    levels: int | None = Field(default=None, ge=1, le=_MOST_LEVELS, title="Resolutions")
    """Number of resolutions, the finest included; as many as make the coarsest a few chunks wide when empty."""
    chunk: Triple = Field(default=(128, 128, 16), title="Chunk (voxels)")
    """Longest sides of a chunk in x, y and z; shorter ones are taken where tiles would not be whole chunks."""
    endpoint_url: str | None = Field(default=None, title="Endpoint of S3")
    """URL of a service like S3 (or like GCS: that of TENSORSTORE_GCS_HTTP_URL); Amazon's or Google's when empty."""
    region: str | None = Field(default=None, title="Region of S3")
    """Region of the bucket; needed with an endpoint of one's own."""

    @field_validator("location")
    @classmethod
    def _without_secrets(cls, location: str) -> str:
        if "@" in location.partition("://")[2] or "?" in location:
            raise ValueError("the location holds a user or a query, which might be a secret: use storage credentials")
        return location.rstrip("/") or "/"

    @field_validator("chunk")
    @classmethod
    def _positive(cls, chunk: Triple) -> Triple:
        if min(chunk) < 1:
            raise ValueError("a chunk has at least one voxel along each axis")
        return chunk


class Target(Protocol):
    """What resolutions of a destination are told by."""

    @property
    def chunk(self) -> Triple:
        """Longest sides of a chunk in x, y and z."""

    @property
    def levels(self) -> int | None:
        """Number of resolutions."""

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """Size of a voxel in x, y and z."""


class Level(NamedTuple):
    """One resolution; everything in the order z, y, x.

    Attributes:
        shape: Voxels.
        offset: Where it begins, in its own voxels.
        chunk: Voxels of a chunk.
        scale: Voxels of the finest resolution in one of this.
        step: Voxels of the next finer resolution in one of this.
    """

    shape: Triple
    offset: Triple
    chunk: Triple
    scale: Triple
    step: Triple


def levels_of(target: Target, ranges: tuple[Range, Range, Range], piece: Triple) -> tuple[Level, ...]:
    """Tell the resolutions of a volume.

    An axis is halved as long as its voxels are less than twice as long as the shortest ones.

    Args:
        target: The volume.
        ranges: Half-open ranges in z, y and x.
        piece: What is written at once, in z, y and x.

    Returns:
        The finest first.

    Raises:
        ConfigurationError: Pieces do not line up with the beginning of the volume, or `levels` asks for a resolution
            that would begin between two voxels.
    """
    shape, offset = _triple(high - low for low, high in ranges), _triple(low for low, _ in ranges)
    for length, low, size in zip(shape, offset, piece, strict=True):
        if low % size and low % size + length > size:
            raise ConfigurationError(f"The extent begins at {low}, which is no multiple of {size}, the size of a tile.")
    wanted = _triple(reversed(target.chunk))
    chunk = _triple(
        min(most, length) if length <= size else math.gcd(most, size)
        for most, length, size in zip(wanted, shape, piece, strict=True)
    )
    found = [Level(shape, offset, chunk, (1, 1, 1), (1, 1, 1))]
    while len(found) < (target.levels or _MOST_LEVELS):
        last = found[-1]
        if target.levels is None and max(last.shape[1:]) <= 2 * max(wanted[1:]):
            break
        sizes = [size * scale for size, scale in zip(reversed(target.voxel_size), last.scale, strict=True)]
        step = _triple(
            2 if size < 2 * min(sizes) and length > 1 else 1 for size, length in zip(sizes, last.shape, strict=True)
        )
        aligned = all(low % by == 0 for low, by in zip(last.offset, step, strict=True))
        if not aligned or step == (1, 1, 1):
            if target.levels is None:
                break
            reason = "there is nothing left to halve" if aligned else "a coarser one would begin between two voxels"
            raise ConfigurationError(f"Only {len(found)} resolutions can be made of this extent: {reason}.")
        smaller = _triple(-(-length // by) for length, by in zip(last.shape, step, strict=True))
        found.append(
            Level(
                smaller,
                _triple(low // by for low, by in zip(last.offset, step, strict=True)),
                _triple(min(most, length) for most, length in zip(chunk, smaller, strict=True)),
                _triple(scale * by for scale, by in zip(last.scale, step, strict=True)),
                step,
            )
        )
    return tuple(found)


class Volume:
    """A volume that is there, or is made.

    What `write` was given is in the store when it returns. Parts that make whole chunks may be written at once.

    Args:
        target: Which one.
        levels: Its resolutions.
        content: What belongs into it, for a volume that is there already.
        storage: Keys of the place; those of the machine when None.

    Attributes:
        identity: Of this very volume; another one of the same place has another.

    Raises:
        ConfigurationError: The `volumetric` extra is missing; or something else is there: another volume, another
            dtype or size, or one that was not written by this package. Nothing was changed.
        LocalStorageError: It cannot be written.
        ConnectionFailed: The store does not answer.
    """

    def __init__(
        self,
        target: VolumeTarget,
        levels: tuple[Level, ...],
        content: Mapping[str, Any],
        storage: StorageOptions | None = None,
    ) -> None:
        self.target, self.levels = target, levels
        self.host = target.location
        self._ts = _tensorstore()
        self._place = _place(target, storage)
        with self._errors():
            store = self._ts.KvStore.open(self._place).result()
            self.identity = self._claimed(store, json.loads(json.dumps(dict(content))))
            self._describe(store)
            self._arrays = [self._opened(number) for number in range(len(levels))]

    def channel(self, collection: str, experiment: str, channel: str) -> Channel:
        """Describe the volume as a channel, whatever its name.

        Args:
            collection: Ignored, as are the others: a volume has one channel.
            experiment: See `collection`.
            channel: See `collection`.
        """
        level = self.levels[0]
        spans = zip("zyx", level.offset, level.shape, strict=True)
        return Channel(
            path=self.target.location,
            datatype=self.target.datatype,
            type=self.target.kind,
            bounds={axis: (low, low + length) for axis, low, length in spans},
            time_samples=2**31,
        )

    def cutout(
        self, channel_path: str, resolution: int, x: Range, y: Range, z: Range, t: int = 0, *, fresh: bool = False
    ) -> Cutout:
        """Read a block back, as `BossClient.cutout` does.

        Args:
            channel_path: Ignored.
            resolution: Number of the resolution, 0 for the finest.
            x: Half-open range in voxels of that resolution; `y` and `z` likewise.
            y: See `x`.
            z: See `x`.
            t: Ignored: a volume is of one sample.
            fresh: Ignored: it always reads what is stored.

        Raises:
            ChunkDamaged: A chunk cannot be decoded.
            LocalStorageError: It cannot be read.
            ConnectionFailed: The store does not answer.
        """
        offset = self.levels[resolution].offset
        where = tuple(slice(a - low, b - low) for (a, b), low in zip((z, y, x), offset, strict=True))
        values = np.ascontiguousarray(self.read(resolution, where))
        return Cutout(values.shape, self.target.datatype, values.tobytes())

    def read(self, level: int, where: tuple[slice, ...]) -> Array:
        """Read a part of a resolution, counted from its beginning in z, y and x.

        Args:
            level: Number of the resolution.
            where: Which part.

        Raises:
            ChunkDamaged: A chunk cannot be decoded.
            LocalStorageError: It cannot be read.
            ConnectionFailed: The store does not answer.
        """
        with self._errors():
            found: Array = self._arrays[level][where].read().result()
        return found

    def write(self, level: int, where: tuple[slice, ...], values: Array) -> None:
        """Write a part of a resolution, counted from its beginning in z, y and x.

        Safe to repeat: the same values in the same place.

        Args:
            level: Number of the resolution.
            where: Which part: whole chunks.
            values: Of the dtype of the volume.

        Raises:
            LocalStorageError: The disk is full, or the store refuses.
            ConnectionFailed: The store does not answer.
        """
        try:
            with self._errors():
                self._arrays[level][where].write(values).result()
        except ChunkDamaged:
            # Chunks at the ends of an OME-Zarr array are larger than it, and are read before they are written.
            with self._errors():
                self._removed(level, where)
                self._arrays[level][where].write(values).result()

    def _removed(self, level: int, where: tuple[slice, ...]) -> None:
        """Remove the chunks of a part of OME-Zarr."""
        store = self._ts.KvStore.open(self._place).result()
        chunk = self.levels[level].chunk
        touched = (range(part.start // size, -(-part.stop // size)) for part, size in zip(where, chunk, strict=True))
        for z, y, x in itertools.product(*touched):
            store.write(f"{level}/c/{z}/{y}/{x}", None).result()

    def reduced(self, level: int, where: tuple[slice, ...]) -> Array:
        """Make a part of a resolution from the next finer one.

        Args:
            level: Number of the resolution, at least 1.
            where: Which part, counted from its beginning in z, y and x.

        Raises:
            ChunkDamaged: A chunk of the finer resolution cannot be decoded.
            LocalStorageError: It cannot be read.
            ConnectionFailed: The store does not answer.
        """
        method = "mean" if self.target.kind == "image" else "mode"
        with self._errors():
            finer = self._ts.downsample(self._arrays[level - 1], list(self.levels[level].step), method)
            made: Array = finer[where].read().result()
        return made

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            text = str(error).partition(" [tensorstore_spec")[0][:500]
            if text.startswith(_PASSING):
                raise ConnectionFailed(f"{self.target.location}: the store does not answer ({text}).") from None
            if text.startswith(_DAMAGED):
                raise ChunkDamaged(f"{self.target.location}: {text}. Publish the volume again to mend it.") from None
            raise LocalStorageError(
                f"{self.target.location}: {text}. Make it writable, remove what is damaged, or choose another "
                "location, then run this again: what is complete stays."
            ) from None

    def _claimed(self, store: Any, content: dict[str, Any]) -> str:
        """The identity of the volume that is there, or of the one that is begun; of two that begin, the first's."""
        found = store.read(_MARKER).result()
        if found.state == "missing":
            foreign = [
                name
                for name in ("info", "zarr.json", ".zgroup", ".zarray", ".zattrs")
                if store.read(name).result().state != "missing"
            ]
            marker = json.dumps({"identity": uuid4().hex, "content": content}, indent=1).encode()
            if not foreign:
                store.write(_MARKER, marker, if_equal=found.stamp.generation).result()
            found = store.read(_MARKER).result()
            if found.state == "missing":
                raise ConfigurationError(
                    f"{self.target.location} holds a volume that this package has not written "
                    f"({', '.join(foreign) or 'nothing of what was just written there'}). Choose another location."
                )
        return self._known(found.value, content)

    def _known(self, marker: bytes, content: dict[str, Any]) -> str:
        try:
            known = json.loads(marker)
            identity, had = str(known["identity"]), known["content"]
        except (KeyError, TypeError, ValueError):
            raise ConfigurationError(
                f"{self.target.location}: its {_MARKER} cannot be read. Move the volume away."
            ) from None
        differing = sorted(name for name in content.keys() | had.keys() if content.get(name) != had.get(name))
        if differing:
            raise ConfigurationError(
                f"{self.target.location} holds another volume: {', '.join(differing)} of it "
                f"{'are' if len(differing) > 1 else 'is'} not what is to be published. Choose another location."
            )
        return identity

    def _describe(self, store: Any) -> None:
        """Write what other programs read to find the resolutions; the same on each run."""
        name, described = ("info", self._info()) if self._is_precomputed else ("zarr.json", self._multiscales())
        store.write(name, json.dumps(described, indent=1).encode()).result()

    @property
    def _is_precomputed(self) -> bool:
        return self.target.format == "precomputed"

    def _info(self) -> dict[str, Any]:
        factor = _METRES[self.target.voxel_unit]
        return {
            "@type": "neuroglancer_multiscale_volume",
            "type": "image" if self.target.kind == "image" else "segmentation",
            "data_type": self.target.datatype,
            "num_channels": 1,
            "scales": [
                {
                    "key": str(number),
                    "size": [*reversed(level.shape)],
                    "resolution": [
                        size * scale * factor
                        for size, scale in zip(self.target.voxel_size, reversed(level.scale), strict=True)
                    ],
                    "voxel_offset": [*reversed(level.offset)],
                    "chunk_sizes": [[*reversed(level.chunk)]],
                    "encoding": "raw",
                }
                for number, level in enumerate(self.levels)
            ],
        }

    def _multiscales(self) -> dict[str, Any]:
        sizes = [*reversed(self.target.voxel_size)]
        unit = self.target.voxel_unit.removesuffix("s")
        datasets = []
        for number, level in enumerate(self.levels):
            scale = [size * by for size, by in zip(sizes, level.scale, strict=True)]
            # A coarser voxel is centred between the finer ones that it stands for.
            moved = [
                (low * by + (by - 1) / 2) * size for low, by, size in zip(level.offset, level.scale, sizes, strict=True)
            ]
            transformations = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": moved}]
            datasets.append({"path": str(number), "coordinateTransformations": transformations})
        axes = [{"name": axis, "type": "space", "unit": unit} for axis in "zyx"]
        multiscale = {"name": "image", "axes": axes, "datasets": datasets}
        ome = {"version": "0.5", "multiscales": [multiscale]}
        return {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}

    def _opened(self, number: int) -> Any:
        ts, level = self._ts, self.levels[number]
        if self._is_precomputed:
            driver = {"driver": "neuroglancer_precomputed", "kvstore": self._place, "scale_index": number}
            array = ts.open(driver, open=True, recheck_cached_data=True).result()
            return array[ts.d["channel"][0]][ts.d["z", "y", "x"].transpose[:]][ts.d[:].translate_to[0]]
        shuffle = {"cname": "zstd", "clevel": 5, "shuffle": "shuffle"}
        metadata = {
            "shape": level.shape,
            "data_type": self.target.datatype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": level.chunk}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "blosc", "configuration": shuffle},
            ],
            "dimension_names": ["z", "y", "x"],
        }
        place = self._place | {"path": f"{self._place['path']}{number}/"}
        driver = {"driver": "zarr3", "kvstore": place, "metadata": metadata}
        return ts.open(driver, open=True, create=True, recheck_cached_data=True).result()


def _triple(values: Any) -> Triple:
    z, y, x = values
    return z, y, x


def _place(target: VolumeTarget, storage: StorageOptions | None) -> dict[str, Any]:
    scheme, has_scheme, _ = target.location.partition("://")
    if has_scheme and scheme not in ("s3", "gs"):
        raise ConfigurationError(f"A volume cannot be written to {scheme}://. Give a folder, s3://… or gs://….")
    told = {"endpoint_url": target.endpoint_url, "region": target.region}
    if not has_scheme and any(told.values()):
        raise ConfigurationError(f"{target.location}: is a folder, and endpoint_url and region are of no use for it.")
    if scheme == "gs" and storage and storage.anonymous:
        raise ConfigurationError(f"{target.location}: nobody writes to GCS without a key. Leave anonymous out.")
    if storage is None:
        return key_value_store(target.location, {"storage_options": told})
    differing = [name for name, value in told.items() if value and value != getattr(storage, name)]
    if differing:
        raise ConfigurationError(
            f"{target.location}: {' and '.join(differing)} of the target and of its storage credentials differ. Say it "
            "in the credentials."
        )
    return key_value_store(target.location, {"storage": storage})


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError:
        raise ConfigurationError(
            "Volumes are written with TensorStore: pip install 'prefect-biomed[volumetric]'."
        ) from None
    return tensorstore
