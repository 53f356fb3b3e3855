"""Several processes on one job: more than one core for sources that have to be decoded."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.errors import ProcessFailed
from prefect_biomed.clients.boss.ledger import TileState, open_ledger
from prefect_biomed.clients.boss.models import UploadProgress, UploadReport, UploadSettings
from prefect_biomed.clients.boss.monitoring import wait_until_ready
from prefect_biomed.clients.boss.uploader import Uploader
from prefect_biomed.clients.texts import logger_of

__all__ = ["upload"]

logger = logger_of(__name__)

_SUMMED = ("received", "put", "put_bytes", "indexed", "deleted", "requeued", "duplicates", "abandoned", "joins")
_LISTED = ("blank", "padded", "skipped", "quarantined")

_Lines: TypeAlias = queue.SimpleQueue[tuple[int, dict[str, Any] | None]]
"""Number of the process and what it told; None at its end."""


def upload(
    client: BossClient,
    config: IngestConfig,
    job_id: int,
    settings: UploadSettings | None = None,
    *,
    processes: int = 1,
    ledger_folder: Path | None = None,
    on_progress: Callable[[UploadProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> UploadReport:
    """Work on a job until its queue is empty.

    Safe to repeat at any time, also after a kill, and several at once.

    Args:
        client: Client of the Boss.
        config: Configuration that the job was made with.
        job_id: Number of the job.
        settings: How to upload; limits hold for each process.
        processes: Processes at once, each with its own keys and `settings.threads` threads.
        ledger_folder: Where ledgers are kept.
        on_progress: Called about every second in the calling thread.
        stop: Set it to end the upload politely.

    Returns:
        What was done, by all processes together.

    Raises:
        ProcessFailed: A process failed.
        BiomedError: As for `Uploader.run`.
    """
    settings = settings or UploadSettings()
    if processes == 1:
        uploader = Uploader(
            client, config, job_id, settings, ledger_folder=ledger_folder, on_progress=on_progress, stop=stop
        )
        try:
            return uploader.run()
        finally:
            uploader.close()
    report, dead = _upload_in_children(client, config, job_id, settings, processes, ledger_folder, on_progress, stop)
    if dead:
        note = f"{len(dead)} of {processes} processes died ({dead}); what they held came back to the others."
        report = report.model_copy(update={"warnings": (*report.warnings, note)})
    return report


def _upload_in_children(
    client: BossClient,
    config: IngestConfig,
    job_id: int,
    settings: UploadSettings,
    processes: int,
    ledger_folder: Path | None,
    on_progress: Callable[[UploadProgress], None] | None,
    stop: threading.Event | None,
) -> tuple[UploadReport, list[int]]:
    """Upload by several processes; returns what they did and the exit codes of those that died."""
    joined = wait_until_ready(client, job_id)
    order = {
        "client": client.arguments(),
        "config": config.body(),
        "storage": config.storage.as_order() if config.storage else None,
        "job_id": job_id,
        "settings": settings.model_dump(mode="json"),
        "ledger_folder": str(ledger_folder) if ledger_folder else None,
    }
    begun = time.monotonic()
    with open_ledger(client, job_id, joined.job.tile_count, ledger_folder) as ledger:
        ledger.forget_failed()
        before = ledger.count(TileState.FINISHED)
        with _children(processes, order) as (children, lines):
            told = _Told(on_progress)
            told.listen(lines, children, stop)
            dead = [child.returncode for child in children if child.wait() != 0]
        reports = told.reports_of(job_id, dead)
        failed = ledger.failed()
        if any(report.exhausted for report in reports):
            before += ledger.count(TileState.INDEXED)
    return _merged(reports, before, failed, time.monotonic() - begun), dead


class _Told:
    """What the processes tell."""

    def __init__(self, on_progress: Callable[[UploadProgress], None] | None) -> None:
        self._on_progress = on_progress
        self._latest: dict[int, UploadProgress] = {}
        self._reports: list[UploadReport] = []
        self._errors: list[tuple[str, bool]] = []

    def listen(self, lines: _Lines, children: list[subprocess.Popen[str]], stop: threading.Event | None) -> None:
        """Listen until all have ended; let them stop politely when that is wanted."""
        open_ends, told_to_stop = len(children), False
        while open_ends:
            try:
                number, line = lines.get(timeout=0.5)
            except queue.Empty:
                number, line = -1, {}
            if line is None:
                open_ends -= 1
            else:
                self._take(number, line)
            if stop and stop.is_set() and not told_to_stop:
                told_to_stop = True
                for child in children:
                    _close_stdin(child)

    def reports_of(self, job_id: int, dead: list[int]) -> list[UploadReport]:
        """Hand out the reports.

        Raises:
            ProcessFailed: A process failed, or none has reported.
        """
        if self._errors:
            transient = all(can_help for _, can_help in self._errors)
            reasons = "; ".join(text for text, _ in self._errors)
            raise ProcessFailed(f"Ingest job {job_id}: {reasons}", transient=transient)
        if not self._reports:
            raise ProcessFailed(f"Ingest job {job_id}: all processes died ({dead}).", transient=True)
        return self._reports

    def _take(self, number: int, line: dict[str, Any]) -> None:
        if "report" in line:
            self._reports.append(UploadReport.model_validate(line["report"]))
        elif "error" in line:
            self._errors.append((line["error"], line["transient"]))
        elif "progress" in line:
            self._latest[number] = UploadProgress(*line["progress"])
            if self._on_progress:
                self._on_progress(_together(list(self._latest.values())))


@contextmanager
def _children(count: int, order: dict[str, Any]) -> Iterator[tuple[list[subprocess.Popen[str]], _Lines]]:
    """Start the processes; they stop politely when their standard input ends, thus also when we are killed."""
    lines: _Lines = queue.SimpleQueue()
    children: list[subprocess.Popen[str]] = []

    def read(number: int, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        try:
            with child.stdout as stdout:
                for text in stdout:
                    lines.put((number, json.loads(text)))
        finally:
            lines.put((number, None))

    try:
        for number in range(count):
            child = subprocess.Popen(
                [sys.executable, "-m", "prefect_biomed.clients.boss._process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
            children.append(child)
            threading.Thread(target=read, args=(number, child), daemon=True).start()
            assert child.stdin is not None
            # Token and keys go through the pipe alone.
            child.stdin.write(json.dumps(order | {"retries_kept": number == 0}) + "\n")
            child.stdin.flush()
        yield children, lines
    finally:
        for child in children:
            _close_stdin(child)
        for child in children:
            try:
                child.wait(timeout=90)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _close_stdin(child: subprocess.Popen[str]) -> None:
    try:
        if child.stdin:
            child.stdin.close()
    except OSError:
        pass  # it ended already


def _together(parts: list[UploadProgress]) -> UploadProgress:
    rate = sum(part.tiles_per_second for part in parts)
    remaining = min(part.remaining for part in parts)
    return UploadProgress(
        finished=max(part.finished for part in parts),
        total=parts[0].total,
        remaining=remaining,
        tiles_per_second=rate,
        eta_seconds=remaining / rate if rate else None,
        put_bytes=sum(part.put_bytes for part in parts),
        failed=max(part.failed for part in parts),
    )


def _merged(reports: list[UploadReport], before: int, failed: dict[str, str], seconds: float) -> UploadReport:
    totals = {name: sum(getattr(report, name) for report in reports) for name in _SUMMED}
    lists = {
        name: tuple(dict.fromkeys(item for report in reports for item in getattr(report, name))) for name in _LISTED
    }
    total = reports[0].tile_count
    return UploadReport(
        job_id=reports[0].job_id,
        tile_count=total,
        **totals,
        **lists,
        deleted_before=before,
        failed=failed,
        unaccounted=max(0, min(report.unaccounted for report in reports)),
        seconds=seconds,
        exhausted=any(report.exhausted for report in reports),
        stopped="; ".join(dict.fromkeys(report.stopped for report in reports if report.stopped)),
    )
