"""One ingest job of the Boss: its queues, its state machine, its lambdas."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from prefect_biomed.sandbox.boss._queues import Queue
from prefect_biomed.sandbox.boss._volumes import (
    CUBOID_X,
    CUBOID_Y,
    CUBOID_Z,
    BlobRef,
)


class Status(IntEnum):
    """States of an ingest job, numbered as the Boss numbers them."""

    PREPARING = 0
    UPLOADING = 1
    COMPLETE = 2
    DELETED = 3
    FAILED = 4
    COMPLETING = 5
    WAIT_ON_QUEUES = 6


def hashed(*parts: int | str) -> str:
    """An object key: the parts joined by `&` behind the MD5 of just that."""
    text = "&".join(str(part) for part in parts)
    return f"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}&{text}"


def morton(x: int, y: int, z: int) -> int:
    """Interleave the lowest 21 bits of three cuboid indices, x first."""
    code = 0
    for bit in range(21):
        code |= (x >> bit & 1) << 3 * bit
        code |= (y >> bit & 1) << 3 * bit + 1
        code |= (z >> bit & 1) << 3 * bit + 2
    return code


def unmorton(code: int) -> tuple[int, int, int]:
    """Undo `morton`."""
    axes = [0, 0, 0]
    for bit in range(21):
        for axis in range(3):
            axes[axis] |= (code >> 3 * bit + axis & 1) << bit
    return axes[0], axes[1], axes[2]


@dataclass
class StoredObject:
    """One object of the tile or ingest bucket."""

    blob: BlobRef
    metadata: dict[str, str]


@dataclass
class Entry:
    """The tile index's entry of one chunk that is not ingested yet."""

    chunk_key: str
    wanted: int
    tiles: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, Any] | None = None


@dataclass
class Observed:
    """What the client did to a job, for tests and benchmarks to compare with what it says."""

    puts: Counter[str] = field(default_factory=Counter)
    indexed: Counter[str] = field(default_factory=Counter)
    late_indexed: list[str] = field(default_factory=list)
    """Tiles whose index message came after their chunk was ingested."""
    deleted: int = 0
    joins: int = 0
    denied: Counter[str] = field(default_factory=Counter)
    first_put: float = 0.0
    last_put: float = 0.0
    longest_lease: float = 0.0


@dataclass
class Job:
    """One ingest job.

    Args:
        id: Number of the job.
        creator: User that made it.
        config: What was posted.
        lookup_key: Numbers of collection, experiment and channel.
        resource: What a join tells about the channel.
        tile_count: Messages that the upload queue starts with.
    """

    id: int
    creator: str
    config: dict[str, Any]
    lookup_key: str
    resource: dict[str, Any]
    tile_count: int
    status: Status = Status.PREPARING
    filled: bool = False
    unready_joins: int = 0
    wait_until: float = 0.0
    created_on: str = ""
    completed_on: str | None = None
    upload_queue: Queue | None = None
    index_queue: Queue | None = None
    ingest_queue: Queue | None = None
    dead_letters: list[str] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    ingested_chunks: Counter[str] = field(default_factory=Counter)
    objects: dict[str, StoredObject] = field(default_factory=dict)
    observed: Observed = field(default_factory=Observed)

    def __post_init__(self) -> None:
        self.created_on = now_text()

    @property
    def volumetric(self) -> bool:
        """Whether chunks of cuboids are uploaded rather than tiles."""
        return bool(self.config["ingest_job"].get("ingest_type", "tile") == "volumetric")

    def messages(self) -> Iterator[str]:
        """The bodies of the upload queue, in the order in which the Boss fills it."""
        return self._chunk_messages() if self.volumetric else self._tile_messages()

    def tile_message(self, chunk_key: str, tile_key: str) -> str:
        """The body of one upload message of a tile job."""
        upload = self.upload_queue.name if self.upload_queue else ""
        ingest = self.ingest_queue.name if self.ingest_queue else ""
        return json.dumps(
            {
                "job_id": self.id,
                "upload_queue_arn": upload,
                "ingest_queue_arn": ingest,
                "chunk_key": chunk_key,
                "tile_key": tile_key,
            }
        )

    def _tile_messages(self) -> Iterator[str]:
        job = self.config["ingest_job"]
        extent, size = job["extent"], job["tile_size"]
        ids, resolution = self.lookup_key.split("&"), self.resource["channel"]["base_resolution"]
        z_start, z_stop = extent["z"]
        for t in range(*extent["t"]):
            for z in range(z_start, z_stop, CUBOID_Z):
                tiles = min(CUBOID_Z, z_stop - z)
                for y in _indices(extent["y"], size["y"]):
                    for x in _indices(extent["x"], size["x"]):
                        chunk = hashed(tiles, *ids, resolution, x, y, z // CUBOID_Z, t)
                        for slice_z in range(z, z + tiles):
                            tile = hashed(*ids, resolution, x, y, slice_z, t)
                            yield self.tile_message(chunk, tile)

    def _chunk_messages(self) -> Iterator[str]:
        job = self.config["ingest_job"]
        extent, size = job["extent"], job["chunk_size"]
        ids, resolution = self.lookup_key.split("&"), self.resource["channel"]["base_resolution"]
        steps = (("z", CUBOID_Z), ("y", CUBOID_Y), ("x", CUBOID_X))
        for t in range(*extent["t"]):
            for z in _indices(extent["z"], size["z"]):
                for y in _indices(extent["y"], size["y"]):
                    for x in _indices(extent["x"], size["x"]):
                        offsets = [range(0, size[axis], step) for axis, step in steps]
                        cuboids = [
                            {
                                "x": dx,
                                "y": dy,
                                "z": dz,
                                "key": hashed(
                                    *ids,
                                    resolution,
                                    t,
                                    morton(
                                        (x * size["x"] + dx) // CUBOID_X,
                                        (y * size["y"] + dy) // CUBOID_Y,
                                        (z * size["z"] + dz) // CUBOID_Z,
                                    ),
                                ),
                            }
                            for dz in offsets[0]
                            for dy in offsets[1]
                            for dx in offsets[2]
                        ]
                        chunk = hashed(1, *ids, resolution, x, y, z, t)
                        yield json.dumps({"chunk_key": chunk, "cuboids": cuboids})

    def missing_tiles(self, entry: Entry) -> list[str]:
        """The tile keys of a chunk that its index entry lacks."""
        numbers = [int(part) for part in entry.chunk_key.split("&")[1:]]
        tiles, ids, (resolution, x, y, z_chunk, t) = numbers[0], numbers[1:4], numbers[4:]
        start = max(z_chunk * CUBOID_Z, self.config["ingest_job"]["extent"]["z"][0])
        keys = (hashed(*ids, resolution, x, y, z, t) for z in range(start, start + tiles))
        return [key for key in keys if key not in entry.tiles]


def _indices(extent: list[int], size: int) -> list[int]:
    return [start // size for start in range(extent[0], extent[1], size)]


def now_text() -> str:
    """The present as the Boss writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
