"""Reports that experiments, comparisons and ingests have left in their folders."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from prefect_biomed.analysis.models import Report
from prefect_biomed.analysis.outcomes import Outcome
from prefect_biomed.clients.boss import UploadReport, report_folder
from prefect_biomed.clients.errors import ConfigurationError, LedgerError

__all__ = ["exit_code", "exit_code_of_ingest", "ingest_folder", "is_of_ingest", "lines_of_ingest", "read_report"]

# By the worst outcome, the worst first; 2 says that something that was given is wrong.
_EXIT_CODES = {Outcome.CHANGED: 1, Outcome.NOT_JUDGED: 3}

_FILE = "report.json"


def ingest_folder(job_id: int) -> Path:
    """Find the report of an ingest on this machine.

    Args:
        job_id: Number of the job.

    Returns:
        Its folder.

    Raises:
        ConfigurationError: There is none, or jobs of several servers have this number.
    """
    folders = sorted(report_folder("*", job_id).parents[1].glob(f"*/job-{job_id}/{_FILE}"))
    if len(folders) != 1:
        found = ", ".join(str(file.parent) for file in folders) or "none"
        raise ConfigurationError(
            f"Reports of an ingest job {job_id} on this machine: {found}. One is kept when a job is complete; name its "
            "folder where there are several."
        )
    return folders[0].parent


def is_of_ingest(folder: Path) -> bool:
    """Tell whether a folder holds the report of an ingest."""
    try:
        return b'"job_id"' in (folder / _FILE).read_bytes()[:200]
    except OSError:
        return False


def lines_of_ingest(report: UploadReport) -> list[str]:
    """Say what an ingest came to.

    Args:
        report: The report.

    Returns:
        A summary, and each tile that is not as it should be.
    """
    named = {
        "not in the Boss": report.holes,
        "filled": report.blank,
        "padded": report.padded,
        "skipped": report.skipped,
        "quarantined": report.quarantined,
        "failed": [f"{tile}: {reason}" for tile, reason in report.failed.items()],
    }
    return [report.summary(), *(f"{what}: {tile}" for what, tiles in named.items() for tile in tiles), *report.warnings]


def exit_code_of_ingest(report: UploadReport) -> int:
    """Put an ingest into an exit code.

    Args:
        report: The report.

    Returns:
        0 when no tile is known to lack, 1 when one is, for whatever reason, 3 when nothing was compared with its
        source.
    """
    if report.holes or report.failed or report.skipped or report.quarantined:
        return 1
    return 0 if report.verification is not None else 3


def read_report(folder: Path, series: str | None = None) -> tuple[Path, Report]:
    """Read a report.

    Args:
        folder: Folder of an experiment, or of a report itself.
        series: Series of the experiment; that of the newest report when None.

    Returns:
        The file, and what it says.

    Raises:
        ConfigurationError: There is none; the message lists the series that have one.
        LedgerError: The file is damaged.
    """
    reports = {path.parent.name: path for path in folder.glob(f"reports/*/{_FILE}")}
    if series is None and (folder / _FILE).is_file():
        return folder / _FILE, _read(folder / _FILE)
    if series is not None and series not in reports:
        known = ", ".join(sorted(reports)) or "none"
        raise ConfigurationError(f"{folder} has no report of a series {series}. Series with a report: {known}.")
    if series is not None:
        return reports[series], _read(reports[series])
    if not reports:
        raise ConfigurationError(
            f"{folder} holds no report. Name the experiment_dir of a repeatability-experiment that has ended, or the "
            "folder that a comparison was written to."
        )
    read = {path: _read(path) for path in reports.values()}
    newest = max(read, key=lambda path: read[path].created)
    return newest, read[newest]


def exit_code(report: Report) -> int:
    """Put what a report has found into an exit code.

    Args:
        report: The report.

    Returns:
        0 when all that was judged is within, 1 when something has changed, 3 when something is not judged, which is so
        as well where nothing was: a baseline by itself, or runs that were compared with each other alone.
    """
    judgements = [one for part in report.pipelines for one in (part.against_baseline, part.against_version) if one]
    outcomes = {one.outcome for one in judgements}
    if report.pipelines and not outcomes:
        outcomes = {Outcome.NOT_JUDGED}
    return next((code for outcome, code in _EXIT_CODES.items() if outcome in outcomes), 0)


def _read(path: Path) -> Report:
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise LedgerError(
            f"{path} cannot be read ({type(error).__name__}). Run the comparison again to write it anew."
        ) from error
