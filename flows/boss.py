"""Flows of the Boss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from prefect.logging.loggers import LoggingAdapter
from pydantic import Field

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.storage import StorageCredentials
from prefect_biomed.clients.boss import (
    Database,
    IngestConfig,
    IngestIncomplete,
    Proposal,
    PublishReport,
    Region,
    SourceChoices,
    UploadReport,
    UploadSettings,
    Verification,
    VerificationFailed,
    VerifySettings,
    VolumeTarget,
    extents_to_heal,
    settled_job,
)
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.boss_parameters import IngestJobWaiting, IngestWaiting
from prefect_biomed.flows.cancellation import ending_remote_jobs
from prefect_biomed.tasks import boss as steps
from prefect_biomed.tasks.policies import intent_token
from prefect_biomed.tasks.run_names import flow_run_named

__all__ = [
    "account_for_job",
    "boss_cancel_ingest",
    "boss_downsample",
    "boss_ingest",
    "boss_init",
    "boss_join_ingest",
    "boss_verify",
    "boss_write_cutouts",
    "cancel_remote_job",
    "publish_volume",
    "work_on_job",
]

Processes = Annotated[int, Field(ge=1, le=64, title="Processes")]

_SLICE_SECONDS = 900.0
_ROUNDS_WITHOUT_PROGRESS = 3
# More jobs than this are rather a new ingest of the whole.
_MOST_HEALED = 100


def _cancel_job(parameters: Mapping[str, Any], token: str, logger: LoggingAdapter) -> list[str]:
    credentials: BossCredentials = parameters["credentials"]
    with credentials.get_client() as client:
        job_id = settled_job(client, token)
        if job_id is None:
            logger.warning("This machine knows of no job that the run has made; look with list_jobs")
            return []
        return [client.cancel(job_id)]


cancel_remote_job = ending_remote_jobs("boss-ingest", _cancel_job, named_by="idempotency_key")


@checked_flow(name="boss-init", flow_run_name=flow_run_named("source"))
def boss_init(
    credentials: BossCredentials,
    source: str,
    config_file: Path,
    collection: str,
    experiment: str,
    channel: str,
    choices: SourceChoices | None = None,
    make: bool = True,
    replace: bool = False,
    storage: StorageCredentials | None = None,
) -> Proposal:
    """Go from a folder, file or volume to an ingest that can begin: resources are made, the configuration is written.

    Run it again after anything: what is there is left as it is, and has to be what is needed.

    Args:
        credentials: An account with the role resource-manager.
        source: Folder of slices, tiles or DICOM slices, volume of any format, or URL of one.
        config_file: Where the configuration for boss-ingest is written.
        collection: Collection; made when missing, as are the others.
        experiment: Experiment.
        channel: Channel.
        choices: What is not left to the files: dtype, kind, voxel size, template, what is chosen in a volume.
        make: Turn this off to see the proposal and write the configuration without asking the Boss.
        replace: Whether a configuration that says something else is replaced.
        storage: Keys of the bucket or web server that the sources lie in; those of the machine when empty.

    Returns:
        What was found, everything that was inferred from it, and an estimate of tiles, bytes and hours.

    Raises:
        ConfigurationError: What the source is cannot be told; or the file exists and says something else.
        PreflightFailed: A resource of that name exists and is another; or the Boss would not take what is proposed.
        PermissionDeniedError: The role resource-manager is missing.
    """
    names = Database(collection=collection, experiment=experiment, channel=channel)
    return steps.set_up_ingest(credentials, source, config_file, names, choices, replace, make, storage)


@checked_flow(name="boss-ingest", flow_run_name=flow_run_named("config"), on_cancellation=[cancel_remote_job])
def boss_ingest(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    processes: Processes = 1,
    upload: UploadSettings | None = None,
    new_resources: steps.NewResources | None = None,
    complete: bool = True,
    waiting: IngestJobWaiting | None = None,
    idempotency_key: str | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
) -> UploadReport:
    """Ingest images into the Boss: check, create a job, upload, complete, account for every tile.

    A retry of the same flow run goes on with the same job; a new flow run, or a second call in the same parent flow, is
    a new job. More machines help with the deployment boss-join-ingest.

    Args:
        credentials: The account.
        config: What to ingest: a configuration of the official client, version 0.1 or 0.2, or the path of its file.
        processes: Processes at once on this machine, for sources that have to be decoded.
        upload: How to upload, and what to do with sources that are missing or damaged. It is done in slices of 900 s
            or of its `max_seconds`; one that fails for a passing reason is retried.
        new_resources: Makes collection, coordinate frame, experiment and channel where they are missing.
        complete: Turn this off to leave the job open, for instance when another flow run completes it.
        waiting: How long to wait for the queue and for the end, and whether a cancellation cancels the job; it does
            not when empty.
        idempotency_key: Name of this ingest; needed only when the flow is called from inside a task.
        verification: How much of what arrived is compared with the source at the end: a sample when empty.
        storage: Keys of the bucket or web server that the sources lie in; those of the machine when empty.

    Returns:
        What was done, with every hole named.

    Raises:
        PreflightFailed: All problems found before anything was sent, with the policy `fail` those of sources as well.
        IngestIncomplete: Some tiles are not in the Boss; the report is attached. The job stays open where it can be.
        JobFailed: The job was cancelled.
        DeadlineExceeded: The Boss took longer than `waiting` says; it goes on, and so does a retry of this flow run.
    """
    waiting = waiting or IngestJobWaiting()
    config = IngestConfig.load(config)
    token = intent_token("boss-ingest", explicit=idempotency_key)
    job = steps.create_ingest_job(
        credentials, config, token, new_resources, settings=upload or UploadSettings(), storage=storage
    )
    if steps.ingest_status(credentials, job.id).status.is_success:
        # A retry of a run that was killed near its end.
        return account_for_job(credentials, config, job.id, upload, verification, storage)
    steps.wait_until_ready(credentials, job.id, waiting.ready_timeout_seconds)
    return work_on_job(
        credentials, config, job.id, processes, upload, waiting, verification, storage, complete=complete
    )


@checked_flow(name="boss-join-ingest", flow_run_name=flow_run_named("job_id"))
def boss_join_ingest(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    job_id: Annotated[int, Field(ge=1)],
    processes: Processes = 1,
    upload: UploadSettings | None = None,
    complete: bool = False,
    waiting: IngestWaiting | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
) -> UploadReport:
    """Help with a job that exists, whoever made it: on a further machine, or after a crash.

    Args:
        credentials: The account that made the job.
        config: What the job was made with; paths may differ from machine to machine.
        job_id: Number of the job.
        processes: Processes at once on this machine.
        upload: How to upload, in slices of 900 s or of its `max_seconds`.
        complete: Whether to complete the job when nothing is left. Let one flow run do that.
        waiting: How long to wait for the queue and for the end.
        verification: How much is compared with the source when the job was completed: a sample when empty.
        storage: Keys of the bucket or web server that the sources lie in; those of the machine when empty.

    Returns:
        What was done by this machine; with every hole named when the job was completed.

    Raises:
        JobFailed: The job is complete, or was cancelled.
        PermissionDeniedError: It belongs to somebody else.
        IngestIncomplete: Some tiles could not be read or are not in the Boss.
        DeadlineExceeded: The Boss took longer than `waiting` says; it goes on.
    """
    waiting = waiting or IngestWaiting()
    config = IngestConfig.load(config)
    steps.wait_until_ready(credentials, job_id, waiting.ready_timeout_seconds)
    return work_on_job(
        credentials, config, job_id, processes, upload, waiting, verification, storage, complete=complete
    )


@checked_flow(name="boss-cancel-ingest", flow_run_name=flow_run_named("job_id"))
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


@checked_flow(name="boss-verify", flow_run_name=flow_run_named("config", "job_id"))
def boss_verify(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    job_id: Annotated[int, Field(ge=1)] | None = None,
    region: Region | None = None,
    verification: VerifySettings | None = None,
    upload: UploadSettings | None = None,
    heal: bool = False,
    waiting: IngestJobWaiting | None = None,
    storage: StorageCredentials | None = None,
) -> Verification:
    """Compare what the Boss has with the sources, for a job or a region, also of data that were ingested years ago.

    Args:
        credentials: An account that may read the channel; to heal it, one that may write.
        config: What was ingested: a configuration of the official client, or the path of its file.
        job_id: The job, if this machine has worked on it: then what it left out on purpose is not called wrong.
        region: Part of it; all of it when empty.
        verification: How much is compared: a sample of 1 % and a look at every chunk when empty.
        upload: How tiles were made, and how they are made when they are healed.
        heal: Ingest the chunks that are wrong again, and prove each of them in every voxel.
        waiting: How long to wait for a job that heals.
        storage: Keys of the bucket or web server that the sources lie in; those of the machine when empty.

    Returns:
        What was found; after healing, what was found then.

    Raises:
        VerificationFailed: Something is missing or different, and it names the tiles; or nothing could be compared,
            because no source can be read.
        IngestIncomplete: What was wrong could not be healed.
    """
    config = IngestConfig.load(config)
    look = steps.verify_ingest(credentials, config, job_id, region, verification, upload, storage)
    if look.wrong and heal:
        extents = extents_to_heal(config, look.wrong)
        if len(extents) > _MOST_HEALED:
            raise VerificationFailed.of(look)
        for extent in extents:
            part = config.of_extent(extent)
            boss_ingest(
                credentials, part, upload=upload, waiting=waiting, verification=VerifySettings(share=1), storage=storage
            )
        look = steps.verify_ingest(credentials, config, job_id, region, verification, upload, storage)
    if not look.is_right:
        raise VerificationFailed.of(look)
    return look


@checked_flow(name="boss-downsample", flow_run_name=flow_run_named("channel"))
def boss_downsample(
    credentials: BossCredentials, channel: str, timeout_seconds: Annotated[float, Field(gt=0)] = 24 * 3600.0
) -> int:
    """Have the Boss make the lower resolutions of a channel, and wait until it has. Run it again after anything.

    Args:
        credentials: An account that may write the channel.
        channel: `collection/experiment/channel`.
        timeout_seconds: How long to wait; the Boss goes on after it.

    Returns:
        Number of resolutions, the finest included; with 1 there is nothing to make.

    Raises:
        JobFailed: The Boss says that it has failed.
        DeadlineExceeded: Not made in time; the Boss goes on.
    """
    return steps.downsample_channel(credentials, channel, timeout_seconds)


@checked_flow(name="publish-volume", flow_run_name=flow_run_named("config"))
def publish_volume(
    config: IngestConfig | Path,
    target: VolumeTarget,
    upload: UploadSettings | None = None,
    sample: Annotated[int, Field(ge=0)] | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
    target_storage: StorageCredentials | None = None,
) -> PublishReport:
    """Write the sources of an ingest into a Neuroglancer precomputed or OME-Zarr volume instead of the Boss.

    With the lower resolutions, and with the same proof. Run it again after anything: it goes on where it was.

    Args:
        config: What to publish: a configuration of an ingest, or the path of its file. Its channel is not used.
        target: The volume: where, in which format, of which dtype.
        upload: How tiles are made, how many blocks at once, and what to do with sources that are missing or damaged.
        sample: Which time sample; the only one when empty.
        verification: How much of it is read back and compared with the source: a sample when empty.
        storage: Keys of the bucket or web server that the sources lie in; those of the machine when empty.
        target_storage: Keys of the bucket that the volume lies in; those of the machine when empty.

    Returns:
        What was written and proved.

    Raises:
        PublishIncomplete: Sources could not be read, or the volume does not keep what is written.
        ConfigurationError: The place holds something else, or a plugin cannot be loaded.
        LocalStorageError: The volume cannot be written.
    """
    return steps.publish_pixels(
        IngestConfig.load(config), target, upload, sample, verification, storage, target_storage
    )


@checked_flow(name="boss-write-cutouts", flow_run_name=flow_run_named("config"))
def boss_write_cutouts(
    credentials: BossCredentials,
    config: IngestConfig | Path,
    upload: UploadSettings | None = None,
    sample: Annotated[int, Field(ge=0)] | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
) -> PublishReport:
    """Write a small volume into a channel of the Boss by its cutout service, without an ingest job.

    With the same sources and the same proof as an ingest. Run it again after anything: it goes on where it was.

    Args:
        credentials: An account that may write the channel.
        config: What to write: a configuration of an ingest, or the path of its file.
        upload: How tiles are made, how many blocks at once, and what to do with sources that are missing or damaged.
        sample: Which time sample; the only one when empty.
        verification: How much of it is read back and compared with the source: a sample when empty.
        storage: Keys of the bucket or web server that the sources lie in; those of the machine when empty.

    Returns:
        What was written and proved.

    Raises:
        PreflightFailed: Channel, extent, dtype or sources do not fit; nothing was sent.
        PublishIncomplete: Sources could not be read, or the channel does not keep what is written.
    """
    return steps.write_channel(credentials, IngestConfig.load(config), upload, sample, verification, storage)


def work_on_job(
    credentials: BossCredentials,
    config: IngestConfig,
    job_id: int,
    processes: int,
    upload: UploadSettings | None,
    waiting: IngestWaiting,
    verification: VerifySettings | None,
    storage: StorageCredentials | None = None,
    *,
    complete: bool,
) -> UploadReport:
    """Upload and complete in turn until the Boss has everything. Safe to repeat.

    Args:
        credentials: The account that made the job.
        config: What the job was made with.
        job_id: Number of the job.
        processes: Processes at once on this machine.
        upload: How to upload.
        waiting: How long to wait for the end.
        verification: How much is compared with the source at the end.
        storage: Keys of the sources.
        complete: Whether the job is completed.

    Returns:
        What was done.

    Raises:
        IngestIncomplete: Some tiles are not in the Boss.
        JobFailed: The job was cancelled.
    """
    idle_rounds = 0
    max_seconds = (upload and upload.max_seconds) or _SLICE_SECONDS
    while True:
        report = steps.join_ingest_job(credentials, config, job_id, processes, max_seconds, upload, storage)
        if not report.exhausted:
            continue
        if not complete:
            return report
        completion = steps.complete_ingest_job(credentials, job_id, waiting.completion_timeout_seconds)
        if completion.outcome == "COMPLETE":
            break
        idle_rounds = idle_rounds + 1 if report.deleted + report.requeued == 0 else 0
        if idle_rounds >= _ROUNDS_WITHOUT_PROGRESS:
            raise IngestIncomplete.of(
                report,
                "The Boss asks again and again for tiles that were left out. It completes a job only when all sixteen "
                "slices of a chunk are left out together. Supply them, or take the policy blank.",
            )
    return account_for_job(credentials, config, job_id, upload, verification, storage)


def account_for_job(
    credentials: BossCredentials,
    config: IngestConfig,
    job_id: int,
    upload: UploadSettings | None,
    verification: VerifySettings | None,
    storage: StorageCredentials | None = None,
) -> UploadReport:
    """Make the report of a job that is complete. It only reads.

    Args:
        credentials: The account that made the job.
        config: What the job was made with.
        job_id: Number of the job.
        upload: How it was uploaded.
        verification: How much is compared with the source.
        storage: Keys of the sources.

    Returns:
        What was done, with every hole named.

    Raises:
        IngestIncomplete: Something is not in the Boss; the report is attached.
    """
    final = steps.report_ingest_job(credentials, config, job_id, upload, verification, storage)
    if final.holes:
        raise IngestIncomplete.of(final, "The job is complete, but not everything is in the Boss.")
    return final
