"""Whether everything arrived: the Boss completes a job without noticing that a whole chunk is missing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from prefect_biomed.clients.boss._keys import CUBOID_Z
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.expectation import Treatment
from prefect_biomed.clients.boss.ledger import TileState, open_ledger
from prefect_biomed.clients.boss.models import UploadReport, UploadSettings
from prefect_biomed.clients.boss.proofs import VerifySettings
from prefect_biomed.clients.boss.verification import verify

__all__ = ["account", "preview", "treatments_of"]

_PREVIEW_READ = 1024
_PREVIEW_SHOWN = 512


def account(
    client: BossClient,
    config: IngestConfig,
    job_id: int,
    settings: UploadSettings | None = None,
    *,
    verification: VerifySettings | None = None,
    ledger_folder: Path | None = None,
    max_checks: int = 500,
    on_progress: Callable[[int, int], None] | None = None,
) -> UploadReport:
    """Compare what a finished job should hold with what this machine did, and look at what arrived.

    A sample of all cuboids is compared with the source, and every chunk is looked at, see `verify`. Of chunks that this
    machine did not finish, which others did or nobody, one cuboid is compared in any case.

    Args:
        client: Client of the Boss.
        config: Configuration of the job.
        job_id: Number of the job. Of one that is not complete nothing is called a hole: it may still come.
        settings: As for the upload; the format of tiles follows from them.
        verification: How much is compared.
        ledger_folder: Where ledgers are kept.
        max_checks: Of at most so many chunks of others a cuboid is compared.
        on_progress: As for `verify`.

    Returns:
        A report of all runs of this machine, with every tile that was found to be missing or different.

    Raises:
        NotFoundError: There is no such job, or it was cancelled.
    """
    settings, status = settings or UploadSettings(), client.counts(job_id).status
    with open_ledger(client, job_id, config.tile_count, ledger_folder) as ledger:
        finished = ledger.tiles(TileState.FINISHED)
        if status.is_success:
            # Of a complete job no message is left, so that what was indexed was also deleted, if only by a killed run.
            finished |= ledger.tiles(TileState.INDEXED)
        skipped, blank, padded = ledger.tiles(TileState.SKIPPED), ledger.blank(), ledger.padded()
        totals, kept, failed = ledger.totals(), ledger.quarantined(), ledger.failed()
    treatments: dict[str, Treatment] = dict.fromkeys(blank, "blank")
    aside = {item.tile for item in kept if item.tile}
    treatments |= dict.fromkeys(skipped | aside, "left out")
    unknown = [position for position in config.positions() if str(position) not in finished | skipped | aside]
    depth = 1 if config.volumetric else CUBOID_Z
    chunks = list(dict.fromkeys(position._replace(z=position.z // depth) for position in unknown))
    look = verify(
        client,
        config,
        verification,
        upload=settings,
        treatments=treatments,
        also=chunks[:max_checks],
        on_progress=on_progress,
    )
    holes = [str(tile.position) for tile in look.wrong] if status.is_success else []
    unchecked = len(chunks) - max_checks
    warnings = [*config.padding(settings.fill, padded)]
    if unchecked > 0:
        warnings.append(f"Of {unchecked} chunks that others did no cuboid was compared with the source for certain.")
    return UploadReport(
        job_id=job_id,
        tile_count=config.tile_count,
        **(totals.counts | {"deleted": len(finished - failed.keys())}),
        seconds=totals.seconds,
        blank=tuple(sorted(blank)),
        padded=tuple(sorted(padded)),
        skipped=tuple(sorted(skipped)),
        quarantined=tuple(f"{item.tile or item.message}: {item.reason}" for item in kept),
        failed=failed,
        holes=tuple(holes),
        unaccounted=len(unknown),
        by_others=len({str(position) for position in unknown}.difference(holes)) if status.is_success else 0,
        verified=look.verified_tiles,
        verification=look,
        exhausted=status.is_success,
        stopped=""
        if status.is_success
        else f"the job is {status.name}, not complete, and what is missing may still come",
        warnings=tuple(warnings),
    )


def treatments_of(
    client: BossClient, config: IngestConfig, job_id: int, *, ledger_folder: Path | None = None
) -> dict[str, Treatment]:
    """Tell which tiles of a job this machine has not sent from their source: filled ones, and those left out.

    Args:
        client: Client of the Boss.
        config: Configuration of the job.
        job_id: Number of the job.
        ledger_folder: Where ledgers are kept.

    Returns:
        Treatments by name of the tile; none when this machine has no ledger of the job.
    """
    with open_ledger(client, job_id, config.tile_count, ledger_folder) as ledger:
        left_out = ledger.tiles(TileState.SKIPPED) | {item.tile for item in ledger.quarantined() if item.tile}
        return {**dict.fromkeys(ledger.blank(), "blank"), **dict.fromkeys(left_out, "left out")}


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
