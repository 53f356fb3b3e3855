"""Whether what arrived is what was sent: cuboids read back through the cutout service and compared with the source.

Two looks, made together. A sample of cuboids, or all of them, is compared in every voxel, which bounds the share of
wrong ones. And a small window of every chunk tells for sure which tiles and chunks are not there at all, whoever sent
them: the Boss completes a job without noticing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import IO, Literal, Protocol

from prefect_biomed.clients.boss._keys import Position
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.cutouts import Cutout
from prefect_biomed.clients.boss.errors import ChunkDamaged
from prefect_biomed.clients.boss.expectation import Expectation, Grid, Plane, Treatment, crop
from prefect_biomed.clients.boss.models import Channel, UploadSettings
from prefect_biomed.clients.boss.proofs import Box, Range, Region, Verification, VerifySettings, WrongTile
from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.texts import logger_of

__all__ = ["PixelStore", "extents_to_heal", "verify"]

logger = logger_of(__name__)

_WINDOW = 32
_READ_BYTES = 64 * 1024 * 1024
_HELD_BYTES = 512 * 1024 * 1024
_BATCH = 256
_NAMED_LIMIT = 1000
_MANIFEST_VERSION = 1


class PixelStore(Protocol):
    """Where pixels have arrived and can be read back: the Boss, or a volume.

    Attributes:
        host: Name of it.
    """

    host: str

    def channel(self, collection: str, experiment: str, channel: str) -> Channel:
        """Describe a channel; as `BossClient.channel`."""

    def cutout(
        self, channel_path: str, resolution: int, x: Range, y: Range, z: Range, t: int = 0, *, fresh: bool = False
    ) -> Cutout:
        """Read a block back; as `BossClient.cutout`. Raises `ChunkDamaged` where it cannot be decoded."""


def verify(
    client: PixelStore,
    config: IngestConfig,
    settings: VerifySettings | None = None,
    *,
    upload: UploadSettings | None = None,
    region: Region | None = None,
    treatments: Mapping[str, Treatment] | None = None,
    also: Collection[Position] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Compare what a channel has with what the sources of a configuration say it should have.

    Safe to repeat: it only reads (`GET /cutout/…?no-cache=true`). No job is needed, so that data which were ingested
    years ago can be looked at, too.

    Args:
        client: Client of the Boss, or another store.
        config: What was ingested.
        settings: How much is compared.
        upload: How tiles were made, as for the upload.
        region: Part of it; all of it when None.
        treatments: Tiles whose source was not sent, by name.
        also: Chunks of which one cuboid is compared whatever the sample says.
        on_progress: Called with the chunks that were looked at, and all.

    Returns:
        What was found.

    Raises:
        ConfigurationError: A plugin cannot be loaded, or the region has nothing of the job.
        LocalStorageError: The manifest cannot be written.
        BiomedError: As for `BossClient.cutout`.
    """
    settings, begun = settings or VerifySettings(), time.monotonic()
    names = config.database
    channel = client.channel(names.collection, names.experiment, names.channel)
    grid = Grid(config, channel, region)
    upload = upload or UploadSettings()
    if settings.share < 1 and not settings.compare_windows:
        # A sample uses up nothing: all that leaves the memory would be written to the disk, and hardly any of it read.
        upload = upload.model_copy(update={"cache_disk_bytes": 0})
    expectation = Expectation(config, channel, upload, grid, treatments)
    look = _Look(client, channel, grid, expectation, compares_windows=settings.compare_windows)
    plan = _Plan(grid, settings, also)
    sx, sy, sz = grid.piece
    threads = max(1, min(settings.threads, _HELD_BYTES // (2 * sx * sy * sz * look.item_bytes)))
    found = _Chunk()
    with atomic_write(settings.manifest) if settings.manifest else nullcontext() as manifest:
        if manifest:
            _write_line(manifest, _head(client, channel, grid))
        with ThreadPoolExecutor(threads, thread_name_prefix="boss-verify") as pool:
            for done, chunk in enumerate(_mapped(pool, lambda task: look.at(*task), plan.tasks()), 1):
                found.add(chunk)
                for line in chunk.digests if manifest else ():
                    _write_line(manifest, line)
                if on_progress:
                    on_progress(done, plan.size)
    return Verification(
        channel=channel.path,
        region=grid.ranges,
        cuboids=len(grid),
        compared=found.compared,
        wrong_cuboids=found.wrong_cuboids,
        chunks_looked_at=found.looked_at,
        wrong=tuple(sorted(found.wrong.values(), key=lambda tile: (tile.t, tile.z, tile.y, tile.x))),
        verified_tiles=found.verified,
        padded_tiles=len(found.padded),
        left_out=len(found.left_out),
        unreadable_tiles=len(found.unreadable),
        unreadable=dict(itertools.islice(found.unreadable.items(), _NAMED_LIMIT)),
        requests=look.requests,
        bytes_read=look.bytes_read,
        seconds=time.monotonic() - begun,
        seed=settings.seed,
        manifest=str(settings.manifest or ""),
    )


def extents_to_heal(config: IngestConfig, wrong: Sequence[WrongTile]) -> list[dict[str, Range]]:
    """Tell the extents of jobs that write wrong tiles again: whole chunks, neighbours in x together.

    Args:
        config: What was ingested.
        wrong: Tiles that are missing or different.

    Returns:
        Extents by axis, each one aligned as a job needs it.
    """
    extent, size = config.ingest_job.extent, config.piece_size
    depth = size["z"] if config.volumetric else 16
    of_chunk = 1 if config.volumetric else depth
    chunks = sorted({(tile.t, tile.z // of_chunk, tile.y, tile.x) for tile in wrong})
    found: list[dict[str, Range]] = []
    for t, z, y, x in chunks:
        right = min((x + 1) * size["x"], extent.x[1])
        box = {
            "x": (x * size["x"], right),
            "y": (y * size["y"], min((y + 1) * size["y"], extent.y[1])),
            "z": (z * depth, min((z + 1) * depth, extent.z[1])),
            "t": (t, t + 1),
        }
        last = found[-1] if found else None
        if last and all(last[axis] == box[axis] for axis in "yzt") and last["x"][1] == box["x"][0]:
            last["x"] = (last["x"][0], right)
        else:
            found.append(box)
    return found


class _Plan:
    """Which cuboids are compared, and which chunks are looked at, chunk by chunk."""

    def __init__(self, grid: Grid, settings: VerifySettings, also: Collection[Position]) -> None:
        self._grid, self._every_chunk = grid, settings.every_chunk
        total = len(grid)
        wanted = total if settings.share == 1 else max(math.ceil(settings.share * total), settings.least)
        if settings.share < 1:
            wanted = min(wanted, settings.most, total)
        self._all = wanted == total
        self._chosen: dict[Position, list[Box]] = {}
        if not self._all:
            for number in sorted(random.Random(settings.seed).sample(range(total), wanted)):
                box = grid.cuboid(number)
                self._chosen.setdefault(grid.chunk_of(box), []).append(box)
        self._also = set() if self._all else set(also) - self._chosen.keys()
        self.size = (
            sum(1 for _ in grid.chunks()) if self._all or self._every_chunk else len(self._chosen.keys() | self._also)
        )

    def tasks(self) -> Iterator[tuple[Position, list[Box], list[Box], bool]]:
        """Yield chunks with the cuboids of the sample, others to be compared, and whether to look at all of it."""
        if self._all:
            for chunk in self._grid.chunks():
                yield chunk, self._grid.cuboids_of(chunk), [], False
            return
        chunks = self._grid.chunks() if self._every_chunk else sorted(self._chosen.keys() | self._also)
        for chunk in chunks:
            more = self._grid.cuboids_of(chunk)[:1] if chunk in self._also else []
            yield chunk, self._chosen.get(chunk, []), more, self._every_chunk


@dataclass
class _Chunk:
    """What was found in one chunk, or in many."""

    compared: int = 0
    wrong_cuboids: int = 0
    looked_at: int = 0
    verified: int = 0
    wrong: dict[Position, WrongTile] = field(default_factory=dict)
    padded: set[Position] = field(default_factory=set)
    left_out: set[Position] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)
    digests: list[dict[str, object]] = field(default_factory=list)

    def add(self, other: _Chunk) -> None:
        """Take over what was found in another one, but for its digests."""
        self.compared += other.compared
        self.wrong_cuboids += other.wrong_cuboids
        self.looked_at += other.looked_at
        self.verified += other.verified
        self.wrong |= other.wrong
        self.padded |= other.padded
        self.left_out |= other.left_out
        self.unreadable |= other.unreadable


class _Look:
    """Looks at chunks; used by all threads."""

    def __init__(
        self, client: PixelStore, channel: Channel, grid: Grid, expectation: Expectation, *, compares_windows: bool
    ) -> None:
        self._client, self._channel, self._grid, self._expectation = client, channel, grid, expectation
        self._compares_windows = compares_windows
        self.item_bytes = expectation.item_bytes
        self.requests = 0
        self.bytes_read = 0
        self._lock = threading.Lock()

    def at(self, chunk: Position, sample: list[Box], more: list[Box], everywhere: bool) -> _Chunk:
        """Look at one chunk.

        Args:
            chunk: The chunk; its z counts chunks.
            sample: Cuboids of the random sample.
            more: Others that are compared as well.
            everywhere: Whether to find out which tiles of it are not there at all.
        """
        try:
            return self._at(chunk, sample, more, everywhere)
        except ChunkDamaged as error:
            return self._damaged(chunk, sample, everywhere, str(error))

    def _at(self, chunk: Position, sample: list[Box], more: list[Box], everywhere: bool) -> _Chunk:
        found = _Chunk()
        boxes = [*sample, *more]
        if boxes:
            wrong, unknown = self._compare(chunk, boxes, found)
            comparable = [box for box in sample if box not in unknown]
            found.compared = len(comparable)
            found.wrong_cuboids = sum(box in wrong for box in comparable)
        if everywhere:
            found.looked_at = 1
            for unit in self._grid.cuboids_of(chunk) if self._grid.volumetric else [self._grid.chunk(chunk)]:
                self._find_gaps(chunk, unit, found)
        return found

    def _damaged(self, chunk: Position, sample: list[Box], everywhere: bool, detail: str) -> _Chunk:
        """Name all tiles of a chunk of which something is stored that cannot be decoded."""
        tiles = {self._grid.tile(chunk, z) for z in range(*self._grid.chunk(chunk).z)}
        return _Chunk(
            compared=len(sample),
            wrong_cuboids=len(sample),
            looked_at=int(everywhere),
            wrong={tile: WrongTile(**tile._asdict(), kind="damaged", detail=detail) for tile in tiles},
        )

    def _compare(self, chunk: Position, boxes: list[Box], found: _Chunk) -> tuple[set[Box], set[Box]]:
        """Compare cuboids in every voxel; returns those that differ, and those that cannot be compared as a whole."""
        wrong: set[Box] = set()
        unknown: set[Box] = set()
        expected = self._expectation.planes(chunk, boxes)
        equal_tiles = {self._grid.tile(chunk, z) for box in boxes for z in range(*box.z)}
        for box, planes, had in zip(boxes, expected, self._read(chunk, boxes), strict=True):
            for z, plane, content in zip(range(*box.z), planes, had, strict=True):
                tile = self._grid.tile(chunk, z)
                if plane.made == "padded":
                    found.padded.add(tile)
                if plane.content is None:
                    unknown.add(box)
                    equal_tiles.discard(tile)
                    self._note_unknown(tile, plane, found)
                elif content != plane.content and not self._is_near(plane, content):
                    wrong.add(box)
                    equal_tiles.discard(tile)
                    found.wrong.setdefault(tile, self._wrong(tile, box, z, plane.content, content))
            digest = hashlib.sha256(b"".join(had)).hexdigest()
            state = None if box in unknown else box not in wrong
            spans = {"x": box.x, "y": box.y, "z": box.z, "t": box.t}
            found.digests.append(spans | {"sha256": digest, "equal": state})
        if len(boxes) == len(self._grid.cuboids_of(chunk)):
            found.verified = len(equal_tiles)
        return wrong, unknown

    def _read(self, chunk: Position, boxes: list[Box]) -> list[list[bytes]]:
        """Read cuboids, in one request where most of the chunk is wanted; the planes of each."""
        whole = self._grid.chunk(chunk)
        depth, height, width = whole.shape
        is_small = depth * height * width * self.item_bytes <= _READ_BYTES
        if is_small and 2 * len(boxes) > len(self._grid.cuboids_of(chunk)):
            planes = self._cutout(whole)
            return [[crop(planes[z - whole.z[0]], whole, box, self.item_bytes) for z in range(*box.z)] for box in boxes]
        return [self._cutout(box) for box in boxes]

    def _find_gaps(self, chunk: Position, unit: Box, found: _Chunk) -> None:
        """Find the tiles of which the Boss has nothing, from a small window, and more of them where it is black."""
        window = _around((unit.x[0] + unit.x[1]) // 2, (unit.y[0] + unit.y[1]) // 2, unit)
        slices = range(*unit.z)
        had = dict(zip(slices, self._cutout(window), strict=True))
        if self._compares_windows:
            self._compare_window(chunk, window, had, found)
        empty = {z for z, plane in had.items() if _is_black(plane) and self._grid.tile(chunk, z) not in found.wrong}
        if not empty:
            return
        [planes] = self._expectation.planes(chunk, [unit], empty)
        pending: dict[int, bytes] = {}
        for z, plane in zip(slices, planes, strict=True):
            if z not in empty:
                continue
            if plane.content is None:
                self._note_unknown(self._grid.tile(chunk, z), plane, found)
            elif not _is_black(plane.content):
                pending[z] = plane.content
        while pending:
            for z in list(pending):
                expected = crop(pending[z], unit, window, self.item_bytes)
                if _is_black(expected):
                    continue
                tile = self._grid.tile(chunk, z)
                if _is_black(had[z]):
                    found.wrong.setdefault(tile, self._wrong(tile, window, z, expected, had[z]))
                del pending[z]
            if pending:
                content = next(iter(pending.values()))
                offset = (len(content) - len(content.lstrip(b"\0"))) // self.item_bytes
                y, x = divmod(offset, unit.x[1] - unit.x[0])
                window = _around(unit.x[0] + x, unit.y[0] + y, unit)
                had = dict(zip(slices, self._cutout(window), strict=True))

    def _compare_window(self, chunk: Position, window: Box, had: Mapping[int, bytes], found: _Chunk) -> None:
        [planes] = self._expectation.planes(chunk, [window])
        for (z, content), plane in zip(had.items(), planes, strict=True):
            tile = self._grid.tile(chunk, z)
            if plane.made == "padded":
                found.padded.add(tile)
            if plane.content is None:
                self._note_unknown(tile, plane, found)
            elif content != plane.content and not self._is_near(plane, content):
                found.wrong.setdefault(tile, self._wrong(tile, window, z, plane.content, content))

    def _cutout(self, box: Box) -> list[bytes]:
        """Read a block; its planes."""
        path, resolution = self._channel.path, self._channel.base_resolution
        content = self._client.cutout(path, resolution, box.x, box.y, box.z, box.t, fresh=True).content
        with self._lock:
            self.requests += 1
            self.bytes_read += len(content)
        size = len(content) // box.shape[0]
        return [content[start : start + size] for start in range(0, len(content), size)]

    def _note_unknown(self, tile: Position, plane: Plane, found: _Chunk) -> None:
        if plane.reason:
            found.unreadable[str(tile)] = plane.reason
        elif self._expectation.is_left_out(tile):
            found.left_out.add(tile)

    @staticmethod
    def _is_near(plane: Plane, content: bytes) -> bool:
        return plane.tolerance > 0 and all(
            abs(one - other) <= plane.tolerance for one, other in zip(plane.content or b"", content, strict=True)
        )

    def _wrong(self, tile: Position, box: Box, z: int, expected: bytes, content: bytes) -> WrongTile:
        """Describe how a plane differs."""
        size, width = self.item_bytes, box.x[1] - box.x[0]
        kind: Literal["missing", "different"] = "missing" if _is_black(content) else "different"
        row = width * size
        differing = [
            start
            for top in range(0, len(expected), row)
            if expected[top : top + row] != content[top : top + row]
            for start in range(top, top + row, size)
            if expected[start : start + size] != content[start : start + size]
        ]
        first = differing[0]
        y, x = divmod(first // size, width)
        values = [int.from_bytes(side[first : first + size], "little") for side in (expected, content)]
        share = f"{len(differing):,} of {len(expected) // size:,} voxels differ"
        detail = f"{share}; at ({box.x[0] + x}, {box.y[0] + y}, {z}) the source has {values[0]}, the Boss {values[1]}"
        return WrongTile(**tile._asdict(), kind=kind, detail=detail)


def _around(x: int, y: int, unit: Box) -> Box:
    """A small window of a block around a column of it."""

    def span(middle: int, low: int, high: int) -> Range:
        start = max(low, min(middle - _WINDOW // 2, high - _WINDOW))
        return start, min(start + _WINDOW, high)

    return unit._replace(x=span(x, *unit.x), y=span(y, *unit.y))


def _is_black(content: bytes) -> bool:
    return content.count(0) == len(content)


def _mapped(
    pool: ThreadPoolExecutor,
    work: Callable[[tuple[Position, list[Box], list[Box], bool]], _Chunk],
    tasks: Iterator[tuple[Position, list[Box], list[Box], bool]],
) -> Iterator[_Chunk]:
    """As `pool.map`, but for more tasks than should wait in memory."""
    while batch := list(itertools.islice(tasks, _BATCH)):
        yield from pool.map(work, batch)


def _head(client: PixelStore, channel: Channel, grid: Grid) -> dict[str, object]:
    return {
        "version": _MANIFEST_VERSION,
        "host": client.host,
        "channel": channel.path,
        "resolution": channel.base_resolution,
        "datatype": channel.datatype,
        "region": grid.ranges,
        "values": "little endian, C order of z, y, x",
    }


def _write_line(file: IO[bytes] | None, line: Mapping[str, object]) -> None:
    if file is not None:
        file.write(json.dumps(line).encode() + b"\n")
