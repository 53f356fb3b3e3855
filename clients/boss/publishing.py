"""The sources of an ingest written into a volume with its lower resolutions, and proved."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.boss._keys import Position
from prefect_biomed.clients.boss.channels import ChannelTarget, ChannelVolume
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.errors import ChunkDamaged
from prefect_biomed.clients.boss.expectation import Expectation, Grid, Treatment
from prefect_biomed.clients.boss.ledger import Ledger, TileState, default_folder
from prefect_biomed.clients.boss.models import Channel, Made, UploadSettings
from prefect_biomed.clients.boss.pictures import Array
from prefect_biomed.clients.boss.preflight import preflight
from prefect_biomed.clients.boss.proofs import Region, Verification, VerifySettings
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.boss.verification import verify
from prefect_biomed.clients.boss.volumes import Triple, Volume, VolumeTarget, levels_of
from prefect_biomed.clients.errors import ConfigurationError, JobFailed
from prefect_biomed.clients.files import exclusive

__all__ = ["PublishIncomplete", "PublishReport", "publish", "write_cutouts"]

_ROUNDS = 3
T = TypeVar("T")

_BLOCK: Triple = (16, 512, 512)
_LOCK_SECONDS = 5.0
_NAMED_LIMIT = 1000
# In memory at once: planes of the source, the block, and what the store encodes; or eight finer voxels, and the same.
_COPIES, _COPIES_REDUCED = 3, 10


class PublishReport(BaseModel):
    """What became of a volume.

    Attributes:
        location: Folder or URL, or host and channel.
        format: `precomputed`, `ome-zarr`, or `channel` of the Boss.
        shapes: Voxels in x, y and z of each resolution, the finest first.
        blocks: Blocks of all resolutions.
        written: Blocks written by this run, healed ones included.
        written_before: Blocks that earlier runs of this machine had written.
        healed: Blocks that were not as they should be and were written again, before the next look.
        mended: Tiles, and blocks of lower resolutions, that a look found wrong before they were written again, and how.
        reduced_compared: Blocks of lower resolutions that were made again and compared in each voxel.
        blank: Tiles filled because their source is missing or damaged.
        padded: Tiles of which the source lacked a part that lies within the extent, and that part was filled.
        padding: How many tiles are not all from their source, and by which rule they were made whole.
        skipped: Tiles left out for the same reason; zeros stand for them.
        failed: Tiles that could not be read, with reasons: their blocks are missing.
        verification: The look at the finest resolution; None where blocks are missing.
        unsettled: Blocks that the last look found wrong, too. They were written again, and nobody has looked since.
        seconds: Duration.
    """

    model_config = ConfigDict(frozen=True)

    location: str
    format: str
    shapes: tuple[Triple, ...]
    blocks: int
    written: int = 0
    written_before: int = 0
    healed: int = 0
    mended: dict[str, str] = {}
    reduced_compared: int = 0
    blank: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    verification: Verification | None = None
    unsettled: tuple[str, ...] = ()
    seconds: float = 0.0

    def summary(self) -> str:
        """One paragraph for a log or an artifact."""
        parts = [
            f"{self.location} ({self.format}, {len(self.shapes)} resolutions): {self.written} of {self.blocks} blocks "
            f"written in {self.seconds:.1f} s"
        ]
        if self.written_before:
            parts.append(f"{self.written_before} by earlier runs")
        counts = {name: len(getattr(self, name)) for name in ("blank", "padded", "skipped", "failed", "unsettled")}
        counts |= {"healed": self.healed}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        if self.reduced_compared:
            parts.append(f"{self.reduced_compared} blocks of lower resolutions compared")
        told = [", ".join(parts) + ".", *self.padding, self.verification.summary() if self.verification else ""]
        return " ".join(filter(None, told))


class PublishIncomplete(JobFailed):
    """Some of a volume is not as the sources have it.

    Attributes:
        report: What is, and what is not; None where only the message was handed on.
    """

    def __init__(self, message: str, report: PublishReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    @classmethod
    def of(cls, report: PublishReport) -> PublishIncomplete:
        """Make the error of a report; its message names the first tiles.

        Args:
            report: What is there, and what is not.
        """
        wrong = report.verification.wrong if report.verification else ()
        shown = [f"  - {tile}: {why}" for tile, why in list(report.failed.items())[:20]]
        shown += [f"  - {tile}" for tile in wrong[:20]]
        shown += [f"  - {block}: is not as it was written" for block in report.unsettled[:20]]
        advice = "Mend the sources of these tiles and run it again; what is complete stays."
        return cls(f"{report.summary()} {advice}\n" + "\n".join(shown), report)


class _Block(NamedTuple):
    """A part of a resolution that is written at once: whole chunks, counted in blocks."""

    level: int
    z: int
    y: int
    x: int

    @property
    def name(self) -> str:
        return f"level {self.level}: {self.z} {self.y} {self.x}"


def publish(
    config: IngestConfig,
    target: VolumeTarget,
    settings: UploadSettings | None = None,
    *,
    sample: int | None = None,
    verification: VerifySettings | None = None,
    storage: StorageOptions | None = None,
    ledger_folder: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PublishReport:
    """Write the sources of a configuration into a volume, make its lower resolutions, and compare all that with them.

    Safe to repeat, also after a kill at any instant: what this machine has written of this very volume is not written
    again, unless a file that it was made from has changed; everything else is, with the same values in the same place.
    What is found to be wrong is written again, and all is looked at again, in up to three rounds; only a look that
    finds nothing is success.

    Args:
        config: Names the plugins, the extent and the size of tiles or chunks. Its channel and its host are not used.
        target: The volume.
        settings: How tiles are made, how many blocks at once, within which memory, and what becomes of bad sources:
            `fail` leaves the block out and ends in an error, `blank` fills the tile, `skip` and `quarantine` leave it
            zero; whatever was filled or left out is named and tried again by the next run.
        sample: Which time sample; the only one when None.
        verification: How much is compared; a sample when None.
        storage: Keys of the target; those of the machine when None. Those of sources are with the configuration.
        ledger_folder: Folder of ledgers; `default_folder` by default.
        on_progress: Called with the blocks that were dealt with, and all.

    Returns:
        What was written and proved.

    Raises:
        ConfigurationError: A plugin cannot be loaded; there are several samples and none was chosen; or the place holds
            something else.
        PublishIncomplete: Sources could not be read, or what was written does not stay as it was written.
        HeldElsewhere: Another process of this machine writes the volume.
        LocalStorageError: The volume cannot be written.
        ConnectionFailed: The store does not answer.
    """

    def opened(plan: _Plan) -> Volume:
        return Volume(target, plan.levels, plan.content, storage)

    return _published(config, target, opened, settings, sample, verification, ledger_folder, on_progress)


def write_cutouts(
    client: BossClient,
    config: IngestConfig,
    settings: UploadSettings | None = None,
    *,
    sample: int | None = None,
    verification: VerifySettings | None = None,
    ledger_folder: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PublishReport:
    """Write the sources of a configuration into its channel by the cutout service, without an ingest job.

    For small volumes: all goes through the web servers of the Boss. Safe to repeat as `publish`, with the same account
    and the same proof. The Boss leaves as it is what a source has zeros for.

    Args:
        client: Client of the Boss.
        config: Names the plugins, the extent, the size of tiles or chunks, and the channel.
        settings: As for `publish`.
        sample: Which time sample; the only one when None.
        verification: How much is compared; a sample when None.
        ledger_folder: Folder of ledgers; `default_folder` by default.
        on_progress: Called with the blocks that were dealt with, and all.

    Returns:
        What was written and proved.

    Raises:
        PreflightFailed: Channel, extent, dtype or sources do not fit; nothing was sent.
        ConfigurationError: There are several samples and none was chosen.
        PublishIncomplete: Sources could not be read, or what was written does not stay as it was written.
        HeldElsewhere: Another process of this machine writes this channel.
        BiomedError: As for `BossClient.write_cutout`.
    """
    extent = config.ingest_job.extent
    chosen = _sample(config, sample)
    if chosen != extent.t:
        config = config.of_extent({"x": extent.x, "y": extent.y, "z": extent.z, "t": chosen})
    preflight(client, config, settings or UploadSettings())
    names = config.database
    channel = client.channel(names.collection, names.experiment, names.channel)
    target = ChannelTarget.model_validate(
        {"location": f"{client.host}/{channel.path}", "datatype": channel.datatype, "kind": channel.type}
    )

    def opened(plan: _Plan) -> ChannelVolume:
        identity = hashlib.sha256(repr(sorted(plan.content.items())).encode()).hexdigest()
        return ChannelVolume(client, channel.path, target, plan.levels, sample=plan.grid.t[0], identity=identity)

    return _published(config, target, opened, settings, None, verification, ledger_folder, on_progress)


def _published(
    config: IngestConfig,
    target: VolumeTarget | ChannelTarget,
    opened: Callable[[_Plan], Volume | ChannelVolume],
    settings: UploadSettings | None,
    sample: int | None,
    verification: VerifySettings | None,
    ledger_folder: Path | None,
    on_progress: Callable[[int, int], None] | None,
) -> PublishReport:
    """Write and prove, whatever the destination is."""
    settings = (settings or UploadSettings()).model_copy(update={"encoding": "tiff"})  # it goes nowhere else
    begun, region = time.monotonic(), Region(t=_sample(config, sample))
    folder = ledger_folder or default_folder()
    lock = folder / f"volume-{hashlib.sha256(target.location.encode()).hexdigest()[:16]}.lock"
    with exclusive(lock, seconds=_LOCK_SECONDS, what=f"The volume {target.location}"):
        plan = _Plan(config, target, region)
        volume = opened(plan)
        identity: dict[str, str | int] = {"host": target.location, "job": volume.identity}
        with Ledger(folder, identity) as ledger:
            work = _Work(config, settings, plan, volume, ledger)
            work.write_all(on_progress)
            report = work.report()
            if report.failed:
                raise PublishIncomplete.of(report.model_copy(update={"seconds": time.monotonic() - begun}))
            look = work.prove(verification or VerifySettings(), region)
            seconds = time.monotonic() - begun
            report = work.report().model_copy(update={"verification": look, "seconds": seconds})
    if look.has_failed or report.failed or report.unsettled:
        raise PublishIncomplete.of(report)
    return report


def _sample(config: IngestConfig, sample: int | None) -> tuple[int, int]:
    low, high = config.ingest_job.extent.t
    if sample is None and high - low != 1:
        raise ConfigurationError(f"A volume has one sample, and there are those from {low} to {high - 1}: choose one.")
    chosen = low if sample is None else sample
    if not low <= chosen < high:
        raise ConfigurationError(f"There is no sample {chosen}: the extent has those from {low} to {high - 1}.")
    return chosen, chosen + 1


class _Plan:
    """The blocks of a volume, and which ones are made of which."""

    def __init__(self, config: IngestConfig, target: VolumeTarget | ChannelTarget, region: Region) -> None:
        extent = config.ingest_job.extent
        bounds = {"x": extent.x, "y": extent.y, "z": extent.z}
        channel = Channel(path=target.location, datatype=target.datatype, bounds=bounds, time_samples=extent.t[1])
        self.grid, self.channel = Grid(config, channel, region), channel
        piece = self.grid.piece
        ranges = (self.grid.z, self.grid.y, self.grid.x)
        self._piece: Triple = (piece[2], piece[1], piece[0])
        self.levels = levels_of(target, ranges, self._piece)
        chosen = ("format", "datatype", "kind", "voxel_size", "voxel_unit")
        made = {name: getattr(target, name) for name in chosen}
        sources = config.client.model_dump(mode="json", by_alias=True, exclude={"backend"})
        self.content = made | {
            "levels": [level._asdict() for level in self.levels],
            "sources": hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest(),
            "tile": piece,
            "sample": self.grid.t[0],
        }

    def size(self, level: int) -> Triple:
        """Voxels of a block."""
        if level == 0:
            return self._piece
        z, y, x = (chunk * max(1, most // chunk) for chunk, most in zip(self.levels[level].chunk, _BLOCK, strict=True))
        return z, y, x

    def blocks(self, level: int) -> Iterator[_Block]:
        """All blocks of a resolution."""
        return (_Block(level, *at) for at in itertools.product(*(range(n) for n in self._counts(level))))

    def count(self, level: int) -> int:
        """Number of blocks of a resolution."""
        return math.prod(self._counts(level))

    def where(self, block: _Block) -> tuple[slice, ...]:
        """The voxels of a block, counted from the beginning of its resolution."""
        shape = self.levels[block.level].shape
        return tuple(
            slice(at * size, min((at + 1) * size, length))
            for at, size, length in zip(block[1:], self.size(block.level), shape, strict=True)
        )

    def chunk(self, block: _Block) -> Position:
        """The piece of the source that a block of the finest resolution is."""
        z, y, x = (
            at + low // size for at, low, size in zip(block[1:], self.levels[0].offset, self._piece, strict=True)
        )
        return Position(x, y, z, self.grid.t[0])

    def block_of(self, tile: Position) -> _Block:
        """The block of the finest resolution that a tile lies in."""
        z = tile.z if self.grid.volumetric else tile.z // self._piece[0]
        at = (z, tile.y, tile.x)
        return _Block(
            0, *(n - low // size for n, low, size in zip(at, self.levels[0].offset, self._piece, strict=True))
        )

    def coarser(self, block: _Block) -> list[_Block]:
        """All blocks of coarser resolutions that are made of a block."""
        found: list[_Block] = []
        spans = [(part.start, part.stop) for part in self.where(block)]
        for level in range(block.level + 1, len(self.levels)):
            spans = [
                (low // by, -(-high // by)) for (low, high), by in zip(spans, self.levels[level].step, strict=True)
            ]
            sizes = self.size(level)
            at = [range(low // size, -(-high // size)) for (low, high), size in zip(spans, sizes, strict=True)]
            found += [_Block(level, *indices) for indices in itertools.product(*at)]
        return found

    def finer(self, block: _Block) -> list[_Block]:
        """The blocks of the next finer resolution that a block is made of."""
        level, steps = block.level - 1, self.levels[block.level].step
        spans = [(part.start * by, part.stop * by) for part, by in zip(self.where(block), steps, strict=True)]
        most = zip(spans, self.size(level), self._counts(level), strict=True)
        at = [range(low // size, min(-(-high // size), count)) for (low, high), size, count in most]
        return [_Block(level, *indices) for indices in itertools.product(*at)]

    def _counts(self, level: int) -> Triple:
        z, y, x = (-(-length // size) for length, size in zip(self.levels[level].shape, self.size(level), strict=True))
        return z, y, x


class _Work:
    """Writes blocks and looks at them; used by all threads."""

    def __init__(
        self,
        config: IngestConfig,
        settings: UploadSettings,
        plan: _Plan,
        volume: Volume | ChannelVolume,
        ledger: Ledger,
    ) -> None:
        self._config, self._settings, self._plan, self._volume, self._ledger = config, settings, plan, volume, ledger
        self._expectation = Expectation(config, plan.channel, settings, plan.grid)
        self._dtype = np.dtype(volume.target.datatype)
        levels = range(len(plan.levels))
        voxels = max(math.prod(plan.size(level)) * (_COPIES_REDUCED if level else _COPIES) for level in levels)
        self._threads = max(1, min(settings.threads, settings.chunk_bytes // (voxels * self._dtype.itemsize)))
        self._total = sum(plan.count(level) for level in levels)
        self._written: set[str] = set()
        self._before = 0
        self._healed: set[str] = set()
        self._mended: dict[str, str] = {}
        self._unsettled: list[str] = []
        self._compared = 0
        ledger.forget_failed()

    def write_all(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Write what is not written yet, the finest resolution first; coarser ones only of what is whole."""
        done = 0
        for level in range(len(self._plan.levels)):
            damaged: set[_Block] = set()
            for found in self._each(self._bring, self._plan.blocks(level)):
                damaged.update(found)
                done += 1
                if on_progress:
                    on_progress(done, self._total)
            self._heal(sorted(damaged))
            if self._ledger.failed():
                return

    def prove(self, settings: VerifySettings, region: Region) -> Verification:
        """Compare, heal, and compare again."""
        for _ in range(_ROUNDS):
            look = verify(
                self._volume,
                self._config,
                settings,
                upload=self._settings,
                region=region,
                treatments=self._treatments(),
            )
            wrong = sorted({self._plan.block_of(tile.position) for tile in look.wrong})
            self._mended |= {str(tile.position): f"{tile.kind}, {tile.detail}" for tile in look.wrong}
            self._heal(wrong)
            reduced = self._wrong_reduced(settings)
            self._unsettled = sorted({block.name for block in [*wrong, *reduced]})
            if not self._unsettled:
                break
        return look

    def report(self) -> PublishReport:
        """Say what became of the volume."""
        target = self._volume.target
        return PublishReport(
            location=target.location,
            format=target.format,
            shapes=tuple((x, y, z) for z, y, x in (level.shape for level in self._plan.levels)),
            blocks=self._total,
            written=len(self._written),
            written_before=self._before,
            healed=len(self._healed),
            mended=dict(itertools.islice(self._mended.items(), _NAMED_LIMIT)),
            reduced_compared=self._compared,
            blank=tuple(sorted(self._ledger.blank())),
            padded=tuple(sorted(self._ledger.padded())),
            padding=self._config.padding(self._settings.fill, self._ledger.padded()),
            skipped=tuple(sorted(self._ledger.tiles(TileState.SKIPPED))),
            failed=self._ledger.failed(),
            unsettled=tuple(self._unsettled),
        )

    def _each(self, work: Callable[[_Block], T], blocks: Iterable[_Block]) -> Iterator[T]:
        """Work on blocks, no more of them at once than memory is for."""
        remaining = iter(blocks)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="publish") as pool:
            while batch := list(itertools.islice(remaining, 4 * self._threads)):
                yield from pool.map(work, batch)

    def _bring(self, block: _Block) -> list[_Block]:
        """Write a block that is not there as its sources are now; returns it where finer ones cannot be decoded."""
        mark = self._fingerprint(block)
        entry = self._ledger.entries([block.name]).get(block.name)
        if entry and entry.state == TileState.FINISHED and entry.message == mark and not self._is_patched(block):
            self._before += 1
            return []
        try:
            self._write(block, mark)
        except ChunkDamaged:
            return [block]
        return []

    def _write(self, block: _Block, mark: str) -> bool:
        values = self._values(block)
        if values is None:
            return False
        # Noted before: a kill from here on leaves blocks that are written again, never ones that are believed.
        stale = [self._row(other, "") for other in self._plan.coarser(block)]
        self._ledger.mark([self._row(block, ""), *stale], TileState.INDEXING)
        self._volume.write(block.level, self._plan.where(block), values)
        self._ledger.mark([self._row(block, mark)], TileState.FINISHED)
        self._written.add(block.name)
        return True

    def _values(self, block: _Block) -> Array | None:
        """What a block has to be; None where sources cannot be read and are to be."""
        where = self._plan.where(block)
        if block.level:
            return self._volume.reduced(block.level, where)
        chunk = self._plan.chunk(block)
        box = self._plan.grid.chunk(chunk)
        values = np.zeros(box.shape, self._dtype)
        [planes] = self._expectation.planes(chunk, [box])
        policy, is_whole = self._settings.on_bad_source, True
        little = self._dtype.newbyteorder("<")
        for number, (z, plane) in enumerate(zip(range(*box.z), planes, strict=True)):
            tile = str(self._plan.grid.tile(chunk, z))
            if plane.content is not None:
                values[number] = np.frombuffer(plane.content, little).reshape(box.shape[1:])
                self._note(tile, plane.made)
            elif policy == "fail":
                self._ledger.fail(tile, plane.reason)
                is_whole = False
            elif policy == "blank":
                values[number] = self._settings.fill
                self._note(tile, "blank")
            else:
                self._note(tile, "left out")
        return values if is_whole else None

    def _note(self, tile: str, made: Made | Literal["left out"]) -> None:
        """Keep one account of a tile."""
        known = self._ledger.entries([tile]).get(tile)
        if made == "left out":
            self._ledger.mark([(tile, "", "")], TileState.SKIPPED)
            return
        if known:
            self._ledger.mark([(tile, "", "")], TileState.FINISHED)
        if made != "whole" or tile in self._ledger.blank([tile]) | self._ledger.padded([tile]):
            self._ledger.note_made(tile, made)

    def _is_patched(self, block: _Block) -> bool:
        """Whether a tile of a block was filled or left out, which the next run tries again."""
        if block.level:
            return False
        tiles = self._tiles(block)
        left_out = (entry.state == TileState.SKIPPED for entry in self._ledger.entries(tiles).values())
        return bool(self._ledger.blank(tiles)) or any(left_out)

    def _tiles(self, block: _Block) -> list[str]:
        return sorted(map(str, self._positions(block)))

    def _positions(self, block: _Block) -> set[Position]:
        """The tiles that a block of the finest resolution is made of."""
        chunk = self._plan.chunk(block)
        return {self._plan.grid.tile(chunk, z) for z in range(*self._plan.grid.chunk(chunk).z)}

    def _fingerprint(self, block: _Block) -> str:
        """Size and time of the files that a block is made of; nothing where the plugin names no files."""
        if block.level:
            return "made"
        return self._expectation.fingerprint(sorted(self._positions(block)))

    def _treatments(self) -> dict[str, Treatment]:
        left_out: dict[str, Treatment] = dict.fromkeys(self._ledger.tiles(TileState.SKIPPED), "left out")
        return left_out | dict.fromkeys(self._ledger.blank(), "blank")

    def _heal(self, blocks: list[_Block]) -> None:
        """Write blocks again, with all that is made of them; also what they are made of, where it cannot be decoded."""
        for level in range(len(self._plan.levels) - 1, 0, -1):
            below = [self._damaged_below(block) for block in blocks if block.level == level]
            blocks = sorted({*blocks, *itertools.chain(*below)})
        for level in range(len(self._plan.levels)):
            here = [block for block in blocks if block.level == level]
            for _ in self._each(self._healed_block, here):
                pass
            coarser = {other for block in here for other in self._plan.coarser(block) if other.level == level + 1}
            blocks = sorted({*blocks, *coarser})

    def _healed_block(self, block: _Block) -> None:
        if self._write(block, self._fingerprint(block)):
            self._healed.add(block.name)

    def _wrong_reduced(self, settings: VerifySettings) -> list[_Block]:
        """Compare blocks of lower resolutions with what they are made of, heal those that differ, and name them."""
        wrong: list[_Block] = []
        for level in range(1, len(self._plan.levels)):
            blocks, total = self._plan.blocks(level), self._plan.count(level)
            if settings.share < 1:
                wanted = min(total, settings.most, max(settings.least, math.ceil(settings.share * total)))
                chosen = set(random.Random(settings.seed).sample(range(total), wanted))
                blocks = (block for number, block in enumerate(blocks) if number in chosen)
            listed = list(blocks)
            equal = list(self._each(self._is_equal, listed))
            self._compared += len(listed)
            found = [block for block, is_equal in zip(listed, equal, strict=True) if not is_equal]
            self._mended |= {block.name: "is not what finer voxels make" for block in found}
            self._heal(found)
            wrong += found
        return wrong

    def _is_equal(self, block: _Block) -> bool:
        where = self._plan.where(block)
        try:
            made = self._volume.reduced(block.level, where)
            return bool(np.array_equal(self._volume.read(block.level, where), made))
        except ChunkDamaged:
            return False

    def _damaged_below(self, block: _Block) -> list[_Block]:
        return [finer for finer in self._plan.finer(block) if not self._is_decodable(finer)]

    def _is_decodable(self, block: _Block) -> bool:
        try:
            self._volume.read(block.level, self._plan.where(block))
        except ChunkDamaged:
            return False
        return True

    @staticmethod
    def _row(block: _Block, mark: str) -> tuple[str, str, str]:
        return block.name, f"level {block.level}", mark
