"""The report of an ingest on this machine, and its provenance as an RO-Crate beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from pydantic import ValidationError

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.models import UploadReport, UploadSettings
from prefect_biomed.clients.boss.sources import open_source
from prefect_biomed.clients.crates import Execution, Provenance, Source, write_crate
from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.files import atomic_write, digest, home, on_disk

__all__ = ["REPORT", "keep_report", "read_report", "report_folder", "write_ingest_crate"]

REPORT = "report.json"
# Of more files the crate tells the number: to read them all once more takes as long as the ingest.
_MOST_SOURCES = 1000
# What makes two reports of one job different although they say the same.
_PASSING = {"seconds", "verification", "verified", "unaccounted", "by_others"}


def report_folder(host: str, job_id: int) -> Path:
    """Tell where the report of a job is kept: in `boss/reports` of the package's home.

    Args:
        host: Server of the job.
        job_id: Number of the job.

    Returns:
        The folder. It may not exist yet.
    """
    return home("boss", "reports", host.replace(":", "_"), f"job-{job_id}")


def keep_report(report: UploadReport, host: str) -> Path:
    """Keep the report of a job that is complete.

    Safe to repeat: a report that says the same is left as it is, with its times and its sample.

    Args:
        report: The report.
        host: Server of the job.

    Returns:
        Its file.

    Raises:
        LocalStorageError: It cannot be written.
    """
    path = report_folder(host, report.job_id) / REPORT
    try:
        kept = read_report(path) if path.is_file() else None
    except LedgerError:
        kept = None  # what it said is in the report that takes its place
    if kept is None or _said(kept) != _said(report):
        with on_disk(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(report.model_dump_json(indent=2).encode())
    return path


def read_report(path: Path) -> UploadReport:
    """Read the report of an ingest.

    Args:
        path: Its file.

    Returns:
        The report.

    Raises:
        LedgerError: It is not there, or damaged.
    """
    try:
        return UploadReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise LedgerError(
            f"{path} is no report of an ingest ({type(error).__name__}). Run the ingest with its key again to write it "
            "anew."
        ) from error


def write_ingest_crate(client: BossClient, config: IngestConfig, job_id: int, settings: UploadSettings) -> Path:
    """Write how a channel came about, as an RO-Crate beside the report of the job.

    The pixels are on the Boss, so the report is what the crate proves; sources have digests where they are at most a
    thousand local files. Safe to repeat: the same report and sources give the same bytes (`GET /ingest`).

    Args:
        client: The account.
        config: What the job was made with.
        job_id: Number of the job, whose report is kept here.
        settings: How it was uploaded.

    Returns:
        `ro-crate-metadata.json`.

    Raises:
        LedgerError: The report is not there, or damaged.
        LocalStorageError: The folder cannot be written.
    """
    folder = report_folder(client.host, job_id)
    report = read_report(folder / REPORT)
    ended = datetime.fromtimestamp((folder / REPORT).stat().st_mtime, UTC)
    made = next((job.created_on for job in client.list_jobs() if job.id == job_id), None)
    address = f"https://{client.host}/latest/ingest/{job_id}"
    missing = len(report.holes)
    execution = Execution(
        address=address,
        name=f"ingest job {job_id}",
        error=f"{missing} tiles are not in the Boss" if missing else None,
        began=made or ended,
        ended=ended,
        settings={
            "channel": config.channel_path,
            "tiles": report.tile_count,
            "filled": len(report.blank),
            "padded": len(report.padded),
            "left out": len(report.skipped) + len(report.quarantined),
            "verified": report.verified,
        },
        inputs=tuple(_sources(config, settings)),
        outputs=(REPORT,),
    )
    provenance = Provenance(
        name=f"{config.channel_path}, ingest job {job_id}",
        flow="boss-ingest",
        parameters={"config": config.body()},
        platform="Boss",
        platform_url=f"https://{client.host}",
        program="Boss ingest",
        program_version="v1",
        program_address=f"https://{client.host}/latest/ingest",
        executions=(execution,),
    )
    return write_crate(folder, provenance)


def _said(report: UploadReport) -> UploadReport:
    return report.model_copy(update={name: UploadReport.model_fields[name].default for name in _PASSING})


def _sources(config: IngestConfig, settings: UploadSettings) -> Iterator[Source]:
    source = open_source(config, "uint8", settings)
    if config.tile_count > _MOST_SOURCES or not source.names_files:
        reader = config.client.path_processor.class_
        yield Source(address=f"boss-source:{quote(reader)}", name=f"{config.tile_count} tiles by {reader}")
        return
    paths = sorted({source.path(position) for position in config.positions()})
    # Names below the folder of all: where that is on this machine concerns nobody.
    top = os.path.commonpath(paths) if len(paths) > 1 else str(Path(paths[0]).parent)
    for path in map(Path, paths):
        name = path.relative_to(top).as_posix()
        there = path.is_file()  # holes are named by the report
        yield Source(
            address=f"boss-source:{quote(name)}",
            name=name,
            sha256=digest(path) if there else None,
            size=path.stat().st_size if there else None,
        )
