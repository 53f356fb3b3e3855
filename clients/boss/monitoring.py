"""Waiting for what the Boss does: filling a job's queue, and verifying that all of it arrived."""

from __future__ import annotations

import time
from pathlib import Path

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.errors import refuse_over
from prefect_biomed.clients.boss.ledger import open_ledger
from prefect_biomed.clients.boss.models import Completion, JobStatus, JoinedJob
from prefect_biomed.clients.errors import JobFailed, PlatformError
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.clients.texts import logger_of

__all__ = ["complete", "wait_until_ready"]

logger = logger_of(__name__)

_NOT_EMPTY = 1006
_LONGEST_WAIT_SECONDS = 900.0


def wait_until_ready(client: BossClient, job_id: int, settings: PollSettings | None = None) -> JoinedJob:
    """Wait until a job can be worked on.

    Args:
        client: Client of the Boss.
        job_id: Number of the job.
        settings: Interval and deadline; every 1 to 15 s for up to an hour by default.

    Returns:
        Queues and keys.

    Raises:
        JobFailed: The job is over, or was only half made and can never be worked on.
        DeadlineExceeded: Still not ready.
        BiomedError: As for `BossClient.join`.
    """
    looks = poll(
        _Joining(client, job_id).look,
        settings or PollSettings(1, 1.5, 15, deadline_seconds=3600),
        done=lambda joined: joined is not None,
        what=f"Ingest job {job_id}",
        take_up_again=f"Join job {job_id} later.",
    )
    *_, joined = looks
    assert joined is not None
    return joined


class _Joining:
    """Joins a job that is not over; the Boss tells better by its state than by a join whether it is."""

    def __init__(self, client: BossClient, job_id: int) -> None:
        self._client = client
        self._job_id = job_id
        self._is_open = False
        self._is_whole = False
        self._begun = time.monotonic()

    def look(self) -> JoinedJob | None:
        """Try to join; None while the job is being prepared."""
        if not self._is_open:
            refuse_over(self._job_id, self._client.counts(self._job_id).status)
            self._is_open = True
        joined = self._client.join(self._job_id)
        # By then the request that makes it has come to an end, and what is not there will never be.
        if joined is None and not self._is_whole and time.monotonic() - self._begun > self._client.settle_seconds:
            self._refuse_half_made()
        return joined

    def _refuse_half_made(self) -> None:
        """Refuse a job that the Boss keeps as PREPARING although making it has failed."""
        self._is_whole = self._client.has_queue(self._job_id)
        if not self._is_whole and self._client.counts(self._job_id).status == JobStatus.PREPARING:
            raise JobFailed(
                f"Ingest job {self._job_id} has no upload queue: the Boss failed while it made the job, and will never "
                "prepare it. Cancel it, then begin anew with another idempotency_key."
            )


def complete(
    client: BossClient, job_id: int, settings: PollSettings | None = None, *, ledger_folder: Path | None = None
) -> Completion:
    """Complete a job: tell the server that all is uploaded, wait for its queues and for its verification.

    Endpoints: `POST /ingest/{id}/complete` until the server verifies, then `GET /ingest/{id}/status`. Safe to repeat at
    any time. Make sure first that nothing is in flight. What the ledger of this machine calls in doubt, index messages
    whose answer was lost, is given the time to arrive before the server is asked.

    Args:
        client: Client of the Boss.
        job_id: Number of the job.
        settings: Interval of the looks, beside what the server asks for, and deadline for all; 1 to 15 s and six hours
            by default.
        ledger_folder: Where ledgers are kept; `default_folder` by default.

    Returns:
        `COMPLETE`, or `RESUME` when tiles are missing and wait in the upload queue.

    Raises:
        JobFailed: The job was cancelled, failed, or was never begun.
        DeadlineExceeded: Not finished in time; the server goes on.
        LedgerError: The ledger of this machine is damaged.
        BiomedError: As for `BossClient.counts`.
    """
    looks = poll(
        _Completing(client, job_id, ledger_folder).look,
        settings or PollSettings(1, 1.2, 15, deadline_seconds=6 * 3600, error_budget=20),
        done=lambda completion: completion is not None,
        what=f"Completion of ingest job {job_id}",
        take_up_again=f"Complete job {job_id} again later.",
    )
    *_, completion = looks
    assert completion is not None
    return completion


class _Completing:
    """Asks the server to complete a job, not more often than it wants to be asked."""

    def __init__(self, client: BossClient, job_id: int, ledger_folder: Path | None) -> None:
        self._client = client
        self._job_id = job_id
        self._ledger_folder = ledger_folder
        self._not_before = time.monotonic()

    def look(self) -> Completion | None:
        """Take one step; None while the server wants us to wait."""
        if time.monotonic() < self._not_before:
            return None
        counts = self._client.counts(self._job_id)
        job_id, status = self._job_id, counts.status
        if status == JobStatus.COMPLETE:
            return Completion(job_id=job_id, outcome="COMPLETE", status=status)
        if status == JobStatus.COMPLETING:
            return None
        if status in (JobStatus.DELETED, JobStatus.FAILED, JobStatus.PREPARING):
            raise JobFailed(f"Ingest job {job_id} is {status.name} and cannot be completed.")
        if (left := self._doubtful_seconds(counts.tile_count)) > 0:
            logger.info("Ingest job %d: an index message in doubt may arrive for %.0f s", job_id, left)
            self._not_before = time.monotonic() + left
            return None
        try:
            seconds = self._client.request_completion(job_id)
        except PlatformError as error:
            if error.code != _NOT_EMPTY:
                raise
            return self._to_resume(error)
        if seconds is None:
            return Completion(job_id=job_id, outcome="COMPLETE", status=JobStatus.COMPLETE)
        self._not_before = time.monotonic() + min(seconds, _LONGEST_WAIT_SECONDS)
        return None

    def _doubtful_seconds(self, tile_count: int) -> float:
        with open_ledger(self._client, self._job_id, tile_count, self._ledger_folder) as ledger:
            return ledger.doubtful_seconds(self._client.settle_seconds)

    def _to_resume(self, refusal: PlatformError) -> Completion:
        counts = self._client.counts(self._job_id)
        if counts.status not in (JobStatus.UPLOADING, JobStatus.WAIT_ON_QUEUES):
            raise refusal
        missing = max(counts.visible, 1)
        return Completion(job_id=self._job_id, outcome="RESUME", status=counts.status, missing=missing)
