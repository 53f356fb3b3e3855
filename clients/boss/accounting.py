"""Whether everything arrived: the Boss completes a job without noticing that a whole chunk is missing."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from prefect_biomed.clients.boss import images
from prefect_biomed.clients.boss._keys import CUBOID_Z, Position
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.ledger import TileState, open_ledger
from prefect_biomed.clients.boss.models import Channel, UploadReport, UploadSettings
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource, open_source
from prefect_biomed.clients.errors import SourceUnreadable

__all__ = ["account", "preview"]

logger = logging.getLogger(__name__)

_PREVIEW_READ = 1024
_PREVIEW_SHOWN = 512


def account(
    client: BossClient,
    config: IngestConfig,
    job_id: int,
    settings: UploadSettings | None = None,
    *,
    ledger_folder: Path | None = None,
    max_checks: int = 500,
) -> UploadReport:
    """Compare what a finished job should hold with what this machine did, and look at the rest.

    Tiles that this machine did not finish were either done by others or lost: their chunks are read back and compared
    with the source. A chunk is in the Boss as a whole or not at all, so one tile of each is enough.

    Args:
        client: Client of the Boss.
        config: Configuration of the job.
        job_id: Number of the job; it is complete.
        settings: As for the upload; the format of tiles follows from them.
        ledger_folder: Where ledgers are kept.
        max_checks: At most so many chunks are read back.

    Returns:
        A report of all runs of this machine, with every hole that was found.
    """
    settings = settings or UploadSettings()
    names = config.database
    channel = client.channel(names.collection, names.experiment, names.channel)
    with open_ledger(client, job_id, config.tile_count, ledger_folder) as ledger:
        # Of a complete job no message is left, so that what was indexed was also deleted, if only by a killed run.
        finished = ledger.tiles(TileState.FINISHED) | ledger.tiles(TileState.INDEXED)
        skipped, blank = ledger.tiles(TileState.SKIPPED), ledger.blank()
        totals = ledger.totals()
        quarantined = [f"{kept.tile or kept.message}: {kept.reason}" for kept in ledger.quarantined()]
        failed = ledger.failed()
    chunks = list(_chunks_without(finished | skipped, config))
    check = _Check(client, config, channel, settings)
    holes = [str(position) for chunk in chunks[:max_checks] if not check.is_there(chunk) for position in chunk]
    unchecked = len(chunks) - max_checks
    return UploadReport(
        job_id=job_id,
        tile_count=config.tile_count,
        **(totals.counts | {"deleted": len(finished)}),
        seconds=totals.seconds,
        blank=tuple(sorted(blank)),
        skipped=tuple(sorted(skipped)),
        quarantined=tuple(quarantined),
        failed=failed,
        holes=tuple(holes),
        unaccounted=sum(map(len, chunks)),
        exhausted=True,
        warnings=(f"{unchecked} chunks that others did were not compared with the source.",) if unchecked > 0 else (),
    )


def _chunks_without(known: set[str], config: IngestConfig) -> Iterator[list[Position]]:
    """Group the tiles of a job that are not among the known ones by their chunks."""
    depth = 1 if config.volumetric else CUBOID_Z

    def chunk(position: Position) -> tuple[int, int, int, int]:
        return position.t, position.z // depth, position.y, position.x

    missing = (position for position in config.positions() if str(position) not in known)
    for _, positions in itertools.groupby(sorted(missing, key=lambda position: (*chunk(position), position.z)), chunk):
        yield list(positions)


class _Check:
    """Compares chunks with their source."""

    def __init__(self, client: BossClient, config: IngestConfig, channel: Channel, settings: UploadSettings) -> None:
        self._client, self._config, self._channel, self._settings = client, config, channel, settings
        self._source: TileSource | ChunkSource | None = None

    def is_there(self, chunk: list[Position]) -> bool:
        """Whether what the Boss has at a chunk is what the source has there."""
        return any(self._compare(chunk))

    def _compare(self, chunk: list[Position]) -> Iterator[bool]:
        for position in chunk:
            try:
                expected, ranges = self._expected(position)
            except SourceUnreadable as error:
                logger.warning("%s cannot be compared: %s", position, error)
                continue
            if not any(expected):
                continue  # black either way; another slice of the chunk tells
            (x, y, z), t = ranges, position.t
            found = self._client.cutout(self._channel.path, self._channel.base_resolution, x, y, z, t)
            yield found.content == expected or (self._is_lossy(position) and any(found.content))
            return
        yield True

    def _expected(self, position: Position) -> tuple[bytes, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]]:
        config, size = self._config, self._config.piece_size
        extent, bounds = config.ingest_job.extent, self._channel.bounds
        depth = size["z"] if config.volumetric else 1
        x0, y0, z0 = position.x * size["x"], position.y * size["y"], position.z * depth
        x1 = min(x0 + size["x"], extent.x[1], bounds["x"][1])
        y1 = min(y0 + size["y"], extent.y[1], bounds["y"][1])
        z1 = min(z0 + depth, extent.z[1], bounds["z"][1])
        source = self._opened()
        if isinstance(source, ChunkSource):
            block = source.read(position)[: z1 - z0, : y1 - y0, : x1 - x0]
            ranges = (x0, x0 + block.shape[2]), (y0, y0 + block.shape[1]), (z0, z0 + block.shape[0])
            return block.tobytes(), ranges
        item = images.ITEM_BYTES[self._channel.datatype]
        whole = images.pixels(source.read(position), source.format, str(position))
        row = size["x"] * item
        kept = b"".join(whole[n * row : n * row + (x1 - x0) * item] for n in range(y1 - y0))
        return kept, ((x0, x1), (y0, y1), (z0, z1))

    def _opened(self) -> TileSource | ChunkSource:
        if self._source is None:
            self._source = open_source(self._config, self._channel.datatype, self._settings)
        return self._source

    def _is_lossy(self, position: Position) -> bool:
        source = self._opened()
        # Decoders of JPEG may differ in the last bit.
        return isinstance(source, TileSource) and source.read(position).startswith(b"\xff\xd8")


def preview(client: BossClient, config: IngestConfig) -> bytes:
    """Read the middle of the middle slice back and make a picture of it.

    Args:
        client: Client of the Boss.
        config: Configuration of a job that is complete.

    Returns:
        A PNG of at most 512 x 512 pixels; deep channels are stretched to their range.
    """
    names, extent = config.database, config.ingest_job.extent
    channel = client.channel(names.collection, names.experiment, names.channel)
    z = (extent.z[0] + extent.z[1]) // 2
    x, y = _middle(extent.x), _middle(extent.y)
    block = client.cutout(channel.path, channel.base_resolution, x, y, (z, z + 1), extent.t[0])
    size = (x[1] - x[0], y[1] - y[0])
    if block.datatype == "uint8":
        image = Image.frombytes("L", size, block.content)
    elif block.datatype == "uint64":
        image = Image.frombytes("L", size, block.content[::8])  # labels: their last byte tells neighbours apart
    else:
        image = Image.frombytes("I;16" if block.datatype == "uint16" else "I", size, block.content).convert("I")
        low, high = image.getextrema()
        if isinstance(low, int | float) and isinstance(high, int | float):
            scale = 255.0 / max(high - low, 1)
            image = image.point(lambda value: value * scale + (-low * scale)).convert("L")
    image.thumbnail((_PREVIEW_SHOWN, _PREVIEW_SHOWN))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _middle(extent: tuple[int, int]) -> tuple[int, int]:
    length = min(extent[1] - extent[0], _PREVIEW_READ)
    start = extent[0] + (extent[1] - extent[0] - length) // 2
    return start, start + length
