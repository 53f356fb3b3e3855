"""Flows of the Boss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.logging.loggers import LoggingAdapter
from pydantic import Field

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.clients.boss import IngestConfig, IngestIncomplete, UploadReport, UploadSettings, job_of_intent
from prefect_biomed.flows.cancellation import ending_remote_jobs
from prefect_biomed.tasks import boss as steps
from prefect_biomed.tasks.policies import intent_token

__all__ = ["boss_cancel_ingest", "boss_ingest", "boss_join_ingest", "cancel_remote_job"]

Processes = Annotated[int, Field(ge=1, le=64, title="Processes")]
Seconds = Annotated[float, Field(gt=0)]

_ROUNDS_WITHOUT_PROGRESS = 3


def _cancel_job(credentials: BossCredentials, token: str, logger: LoggingAdapter) -> list[str]:
    job_id = job_of_intent(token)
    if job_id is None:
        logger.warning("This machine knows of no job that the run has made; look with list_jobs")
        return []
    with credentials.get_client() as client:
        return [client.cancel(job_id)]


cancel_remote_job = ending_remote_jobs("boss-ingest", _cancel_job, named_by="idempotency_key")


@flow(name="boss-ingest", on_cancellation=[cancel_remote_job])
def boss_ingest(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    processes: Processes = 1,
    max_seconds: Seconds = 900.0,
    upload: UploadSettings | None = None,
    new_resources: steps.NewResources | None = None,
    complete: bool = True,
    idempotency_key: str | None = None,
    cancel_remote: bool = False,
) -> UploadReport:
    """Ingest images into the Boss: check, create a job, upload, complete, account for every tile.

    A retry of the same flow run goes on with the same job; a new flow run, or a second call in the same parent flow, is
    a new job. More machines help with the deployment boss-join-ingest.

    Args:
        credentials: The account.
        config: What to ingest: a configuration of the official client, version 0.1 or 0.2, or the path of its file.
        processes: Processes at once on this machine, for sources that have to be decoded.
        max_seconds: Length of one slice of the upload. A slice that fails for a passing reason is retried.
        upload: How to upload, and what to do with sources that are missing or damaged.
        new_resources: Makes collection, coordinate frame, experiment and channel where they are missing.
        complete: Turn this off to leave the job open, for instance when another flow run completes it.
        idempotency_key: Name of this ingest; needed only when the flow is called from inside a task.
        cancel_remote: Whether cancelling this flow run cancels the job.

    Returns:
        What was done, with every hole named.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        IngestIncomplete: Some tiles are not in the Boss; the report is attached. The job stays open where it can be.
        JobFailed: The job was cancelled.
    """
    config = IngestConfig.load(config)
    token = intent_token("boss-ingest", explicit=idempotency_key)
    job = steps.create_ingest_job(credentials, config, token, new_resources)
    if steps.ingest_status(credentials, job.id).status.is_success:
        return _account(credentials, config, job.id, upload)  # a retry of a run that was killed near its end
    steps.wait_until_ready(credentials, job.id)
    return _work(credentials, config, job.id, processes, max_seconds, upload, complete=complete)


@flow(name="boss-join-ingest")
def boss_join_ingest(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    job_id: Annotated[int, Field(ge=1)],
    processes: Processes = 1,
    max_seconds: Seconds = 900.0,
    upload: UploadSettings | None = None,
    complete: bool = False,
) -> UploadReport:
    """Help with a job that exists, whoever made it: on a further machine, or after a crash.

    Args:
        credentials: The account that made the job.
        config: What the job was made with; paths may differ from machine to machine.
        job_id: Number of the job.
        processes: Processes at once on this machine.
        max_seconds: Length of one slice of the upload.
        upload: How to upload.
        complete: Whether to complete the job when nothing is left. Let one flow run do that.

    Returns:
        What was done by this machine; with every hole named when the job was completed.

    Raises:
        JobFailed: The job is complete, or was cancelled.
        PermissionDeniedError: It belongs to somebody else.
        IngestIncomplete: Some tiles could not be read or are not in the Boss.
    """
    config = IngestConfig.load(config)
    steps.wait_until_ready(credentials, job_id)
    return _work(credentials, config, job_id, processes, max_seconds, upload, complete=complete)


@flow(name="boss-cancel-ingest")
def boss_cancel_ingest(credentials: BossCredentials, job_id: Annotated[int, Field(ge=1)]) -> str:
    """Cancel an ingest job. What was ingested stays, queues and keys go away.

    Args:
        credentials: The account that made the job.
        job_id: Number of the job.

    Returns:
        What happened, in words.

    Raises:
        NotFoundError: There never was such a job.
        PermissionDeniedError: It belongs to somebody else.
    """
    return steps.cancel_ingest_job(credentials, job_id)


def _work(
    credentials: BossCredentials,
    config: IngestConfig,
    job_id: int,
    processes: int,
    max_seconds: float,
    upload: UploadSettings | None,
    *,
    complete: bool,
) -> UploadReport:
    """Upload and complete in turn until the Boss has everything."""
    idle_rounds = 0
    while True:
        report = steps.join_ingest_job(credentials, config, job_id, processes, max_seconds, upload)
        if not report.exhausted:
            continue
        if not complete:
            return report
        if steps.complete_ingest_job(credentials, job_id).outcome == "COMPLETE":
            break
        idle_rounds = idle_rounds + 1 if report.deleted + report.requeued == 0 else 0
        if idle_rounds >= _ROUNDS_WITHOUT_PROGRESS:
            raise IngestIncomplete.of(
                report,
                "The Boss asks again and again for tiles that were left out. It completes a job only when all sixteen "
                "slices of a chunk are left out together. Supply them, or take the policy blank.",
            )
    return _account(credentials, config, job_id, upload)


def _account(
    credentials: BossCredentials, config: IngestConfig, job_id: int, upload: UploadSettings | None
) -> UploadReport:
    """Make the report of a job that is complete."""
    final = steps.report_ingest_job(credentials, config, job_id, upload)
    if final.holes:
        raise IngestIncomplete.of(final, "The job is complete, but not everything is in the Boss.")
    return final
