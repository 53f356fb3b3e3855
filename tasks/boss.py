"""Tasks of the Boss: one remote effect each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from prefect import task
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.storage import StorageCredentials
from prefect_biomed.clients.boss import (
    Completion,
    Database,
    IngestConfig,
    IngestIncomplete,
    IngestJob,
    JobCounts,
    Proposal,
    PublishReport,
    Region,
    SourceChoices,
    StorageOptions,
    UploadProgress,
    UploadReport,
    UploadSettings,
    Verification,
    VerifySettings,
    VolumeTarget,
    account,
    complete,
    create_once,
    create_resources,
    downsample,
    keep_report,
    preflight,
    preview,
    propose,
    publish,
    treatments_of,
    upload,
    verify,
    write_array,
    write_configuration,
    write_cutouts,
    write_ingest_crate,
)
from prefect_biomed.clients.boss import wait_until_ready as wait_for_queue
from prefect_biomed.clients.boss.pictures import Array
from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.texts import inline
from prefect_biomed.tasks._reporting import Progress, artifact_key, image, link, markdown, run_logger, state_event
from prefect_biomed.tasks.policies import ONCE, RETRY, circumstances
from prefect_biomed.tasks.run_names import task_run_named

__all__ = [
    "NewResources",
    "cancel_ingest_job",
    "complete_ingest_job",
    "create_ingest_job",
    "downsample_channel",
    "ingest_status",
    "join_ingest_job",
    "publish_pixels",
    "report_ingest_job",
    "set_up_ingest",
    "verify_ingest",
    "wait_until_ready",
    "write_channel",
    "write_channel_array",
]


class NewResources(BaseModel):
    """What is needed to make a channel and what it lies in, when they do not exist yet.

    Attributes:
        datatype: dtype of the channel.
        kind: `image` for measured values, `annotation` for labels.
        voxel_size: Size of a voxel in x, y and z.
        voxel_unit: Unit of the voxel size.
        bounds: Upper ends of the coordinate frame in x, y and z, in voxels; those of the extent when empty.
        time_samples: Number of time samples; those of the extent when empty.
        levels: Resolutions that the experiment is to have, for downsampling by the Boss; so many as bring the longer
            side of a slice to 512 when empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    datatype: Literal["uint8", "uint16", "uint32", "uint64"]
    kind: Literal["image", "annotation"] = "image"
    voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    voxel_unit: Literal["nanometers", "micrometers", "millimeters", "centimeters"] = "nanometers"
    bounds: tuple[int, int, int] | None = None
    time_samples: int | None = Field(default=None, ge=1)
    levels: int | None = Field(default=None, ge=1)


@task(task_run_name=task_run_named("Set up ingest", "source"), **RETRY)
def set_up_ingest(
    credentials: BossCredentials,
    source: str,
    config_file: Path,
    database: Database,
    choices: SourceChoices | None = None,
    replace: bool = False,
    make: bool = True,
    storage: StorageCredentials | None = None,
) -> Proposal:
    """Look at files, make what they are to lie in, check that they can be ingested, and write the configuration.

    Safe to repeat: what is there is left as it is, and has to be what is needed (`GET` and `POST` of collection,
    experiment, channel and coordinate frame).

    Args:
        credentials: The account.
        source: Folder, file or URL.
        config_file: Where the configuration is written, after all else.
        database: Collection, experiment and channel.
        choices: What is not left to the files.
        replace: Whether a file that says something else is replaced.
        make: Whether the resources are made and the preflight is run; otherwise the Boss is not asked.
        storage: Keys of the sources; those of the machine when None.

    Returns:
        What was found, and what follows from it.

    Raises:
        ConfigurationError: What the source is cannot be told; or the file exists and says something else.
        PreflightFailed: A resource of that name exists and is another; or the Boss would not take what is proposed.
        PermissionDeniedError: The role `resource-manager` is missing.
    """
    logger = run_logger()
    host, protocol = credentials.host, credentials.protocol
    proposal = propose(source, database, host=host, protocol=protocol, choices=choices, storage=_keys(storage))
    logger.info("%s", proposal.summary())
    if make:
        x, y, z = proposal.bounds
        with credentials.get_client() as client:
            made = create_resources(
                client,
                proposal.config,
                datatype=proposal.datatype,
                kind=proposal.kind,
                voxel_size=proposal.voxel_size,
                voxel_unit=proposal.voxel_unit,
                bounds={"x": (0, x), "y": (0, y), "z": (0, z)},
                levels=proposal.levels,
            )
            logger.info("Made %s", ", ".join(made) or "nothing: all is there")
            convert = choices.convert if choices else frozenset()
            settings = UploadSettings(convert=convert, on_bad_source="skip" if proposal.holes else "fail")
            preflight(client, _with_keys(proposal.config, storage), settings)
    write_configuration(proposal, config_file, replace=replace)
    text = f"# {inline(proposal.config.channel_path)}\n\n" + "\n\n".join(map(inline, proposal.summary().splitlines()))
    markdown(artifact_key("boss-init", proposal.config.channel_path.replace("/", "-")), text, f"Ingest of {source}")
    return proposal


@task(task_run_name=task_run_named("Create ingest job", "config"), **ONCE)
def create_ingest_job(
    credentials: BossCredentials,
    config: IngestConfig,
    token: str,
    new_resources: NewResources | None = None,
    settle_seconds: float | None = None,
    settings: UploadSettings | None = None,
    storage: StorageCredentials | None = None,
) -> IngestJob:
    """Check everything that can be checked, then make an ingest job, once and never twice.

    Safe to repeat, also after a kill while the request is still on its way: the intent is written down before it is
    sent (`POST /ingest/`), and the user's jobs are searched until it can no longer take effect.

    Args:
        credentials: The account.
        config: What to ingest.
        token: Identity of the intent; `tasks.policies.intent_token` makes it.
        new_resources: Makes collection, coordinate frame, experiment and channel where they are missing.
        settle_seconds: Longest time after which a request whose answer was lost may still take effect; a minute more
            than the read timeout when None.
        settings: How it will be uploaded. With the policy `fail` a source that is seen to be missing or bad is a
            problem; otherwise, and when None, only when none of them can be read.
        storage: Keys of the sources; those of the machine when None.

    Returns:
        The job, PREPARING.

    Raises:
        PreflightFailed: All problems of channel, extent, dtype and sources at once; nothing was sent.
        LaunchInDoubt: It is not known whether the job was made; a retry looks first.
        PlatformError: The server refused.
    """
    logger = run_logger()
    config = _with_keys(config, storage)
    with credentials.get_client() as client:
        if new_resources:
            made = create_resources(
                client,
                config,
                datatype=new_resources.datatype,
                kind=new_resources.kind,
                voxel_size=new_resources.voxel_size,
                voxel_unit=new_resources.voxel_unit,
                bounds=_ranges(new_resources.bounds),
                time_samples=new_resources.time_samples,
                levels=new_resources.levels,
            )
            logger.info("Made %s", ", ".join(made) or "nothing: all is there")
        known = circumstances("boss", "ingest-job")
        job = create_once(client, config, token, settle_seconds=settle_seconds, circumstances=known, settings=settings)
    logger.info("Ingest job %d: %d tiles for %s", job.id, job.tile_count, config.channel_path)
    url = f"{credentials.protocol}://{credentials.host}/latest/ingest/{job.id}/status"
    link(artifact_key("boss-job", job.id), url, f"Ingest job {job.id} on {credentials.host}")
    _event(job.id, "created", channel=config.channel_path, tiles=job.tile_count)
    return job


@task(task_run_name=task_run_named("Wait until ready", "job_id"), **RETRY)
def wait_until_ready(credentials: BossCredentials, job_id: int, timeout_seconds: float = 3600.0) -> IngestJob:
    """Wait until the Boss has filled the job's queue, which takes minutes.

    Safe to repeat: it only asks (`GET /ingest/{id}`, which is also what makes the job UPLOADING).

    Args:
        credentials: The account.
        job_id: Number of the job.
        timeout_seconds: Stop waiting after this time.

    Returns:
        The job, ready to be worked on.

    Raises:
        JobFailed: The job is over, or can never be prepared.
        DeadlineExceeded: Not ready in time; the Boss goes on.
    """
    with credentials.get_client() as client:
        settings = PollSettings(1, 1.5, 15, deadline_seconds=timeout_seconds)
        job = wait_for_queue(client, job_id, settings).job
    run_logger().info("Ingest job %d is %s", job_id, job.status.name)
    _event(job_id, job.status.name)
    return job


@task(task_run_name=task_run_named("Upload tiles", "job_id"), **RETRY)
def join_ingest_job(
    credentials: BossCredentials,
    config: IngestConfig,
    job_id: int,
    processes: int = 1,
    max_seconds: float | None = None,
    settings: UploadSettings | None = None,
    storage: StorageCredentials | None = None,
) -> UploadReport:
    """Work on a job until its queue is empty or the time is over.

    Safe to repeat at any time, also after a kill, and on several machines at once: the queue holds what is left, and
    the ledger of this machine tells what it has sent (`PutObject`, index message, deletion, in this order).

    Args:
        credentials: The account.
        config: What the job was made with.
        job_id: Number of the job.
        processes: Processes at once on this machine.
        max_seconds: Stop after this time; what is in flight is finished. Another call goes on.
        settings: How to upload.
        storage: Keys of the sources; those of the machine when None.

    Returns:
        What was done, counted exactly.

    Raises:
        IngestIncomplete: Some sources are missing or damaged, and the policy is `fail`. All others were uploaded.
        JobFailed: The job was cancelled meanwhile.
        AuthenticationError: Token or keys are refused.
    """
    logger = run_logger()
    settings = settings or UploadSettings()
    if max_seconds is not None:
        settings = settings.model_copy(update={"max_seconds": max_seconds})
    progress = Progress(artifact_key("boss-upload", job_id), f"Upload of ingest job {job_id}")

    def show(state: UploadProgress) -> None:
        eta = "unknown" if state.eta_seconds is None else _duration(state.eta_seconds)
        note = (
            f"Ingest job {job_id}: {state.finished} of {state.total} tiles by this machine, {state.remaining} in the "
            f"queue, {state.tiles_per_second:.1f} tiles/s, time left {eta}"
        )
        progress(state.total - min(state.remaining, state.total), state.total, note)

    with credentials.get_client() as client:
        report = upload(client, _with_keys(config, storage), job_id, settings, processes=processes, on_progress=show)
    logger.info("%s", report.summary())
    for warning in report.warnings:
        logger.warning("%s", warning)
    markdown(artifact_key("boss-upload-report", job_id), report_text(report), f"Upload of ingest job {job_id}")
    _event(job_id, "uploaded", tiles=report.deleted, failed=len(report.failed), exhausted=report.exhausted)
    if report.failed:
        raise IngestIncomplete.of(report)
    return report


@task(task_run_name=task_run_named("Complete ingest job", "job_id"), **RETRY)
def complete_ingest_job(credentials: BossCredentials, job_id: int, timeout_seconds: float = 6 * 3600.0) -> Completion:
    """Tell the Boss that all is uploaded, and wait until it has verified that.

    Safe to repeat: a job that is complete stays so (`POST /ingest/{id}/complete`).

    Args:
        credentials: The account.
        job_id: Number of the job.
        timeout_seconds: Stop waiting after this time.

    Returns:
        `COMPLETE`, or `RESUME` when the Boss wants tiles again.

    Raises:
        JobFailed: The job was cancelled or never begun.
        DeadlineExceeded: Not verified in time; the Boss goes on.
    """
    with credentials.get_client() as client:
        settings = PollSettings(1, 1.2, 15, deadline_seconds=timeout_seconds, error_budget=20)
        completion = complete(client, job_id, settings)
    run_logger().info("Ingest job %d: %s (%s)", job_id, completion.outcome, completion.status.name)
    _event(job_id, completion.status.name, outcome=completion.outcome, missing=completion.missing)
    return completion


@task(task_run_name=task_run_named("Report ingest job", "job_id"), **RETRY)
def report_ingest_job(
    credentials: BossCredentials,
    config: IngestConfig,
    job_id: int,
    settings: UploadSettings | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
) -> UploadReport:
    """Account for every tile of a job that is complete, compare what arrived, and show the middle slice.

    The report is kept in `boss/reports` of the package's home, with an RO-Crate beside it. Safe to repeat: on the
    platform it only reads (`GET /cutout/…`).

    Args:
        credentials: The account.
        config: What the job was made with.
        job_id: Number of the job.
        settings: How it was uploaded.
        verification: How much of it is compared with the source.
        storage: Keys of the sources; those of the machine when None.

    Returns:
        A report of all runs of this machine, with every tile that is missing or different as far as was looked.

    Raises:
        NotFoundError: The channel is gone, or the job was cancelled.
    """
    logger = run_logger()
    config = _with_keys(config, storage)
    with credentials.get_client() as client:
        show = _looking(artifact_key("boss-account", job_id), f"ingest job {job_id}")
        report = account(client, config, job_id, settings, verification=verification, on_progress=show)
        try:
            picture: bytes | None = preview(client, config)
        except BiomedError as error:
            logger.warning("No preview: %s", error)
            picture = None
    if picture:
        image(artifact_key("boss-preview", job_id), picture, f"Middle slice of {config.channel_path}, read back")
        keep_report(report, client.host)
        crate = write_ingest_crate(client, config, job_id, settings or UploadSettings())
    logger.info("The report and how the channel came about are in %s", crate.parent)
    markdown(artifact_key("boss-report", job_id), report_text(report), f"Report of ingest job {job_id}")
    logger.info("%s", report.summary())
    for tile in (report.verification.wrong if report.verification else ())[:20]:
        logger.error("Not in the Boss as its source: %s", tile)
    return report


@task(task_run_name=task_run_named("Verify ingest", "config"), **RETRY)
def verify_ingest(
    credentials: BossCredentials,
    config: IngestConfig,
    job_id: int | None = None,
    region: Region | None = None,
    verification: VerifySettings | None = None,
    upload: UploadSettings | None = None,
    storage: StorageCredentials | None = None,
) -> Verification:
    """Compare what the Boss has with what the sources of a configuration say, whoever ingested it, and when.

    Safe to repeat: it only reads (`GET /cutout/…?no-cache=true`).

    Args:
        credentials: An account that may read the channel.
        config: What was ingested.
        job_id: The job, if this machine has worked on it: then what it left out on purpose is not called wrong.
        region: Part of it; all of it when None.
        verification: How much is compared.
        upload: How tiles were made.
        storage: Keys of the sources; those of the machine when None.

    Returns:
        What was found. Nothing is raised for tiles that are wrong.

    Raises:
        NotFoundError: There is no such channel.
        ConfigurationError: A plugin cannot be loaded, or the region has nothing of the job.
    """
    logger = run_logger()
    key = config.channel_path.replace("/", "-") if job_id is None else job_id
    with credentials.get_client() as client:
        treatments = {} if job_id is None else treatments_of(client, config, job_id)
        look = verify(
            client,
            _with_keys(config, storage),
            verification,
            upload=upload,
            region=region,
            treatments=treatments,
            on_progress=_looking(artifact_key("boss-verify", key), config.channel_path),
        )
    logger.info("%s", look.summary())
    for tile in look.wrong[:20]:
        logger.error("Not in the Boss as its source: %s", tile)
    markdown(artifact_key("boss-verification", key), verification_text(look), f"What {config.channel_path} has")
    event = {"wrong": len(look.wrong), "compared": look.compared, "cuboids": look.cuboids}
    state_event("boss", "channel", config.channel_path, _state_of(look), **event)
    return look


@task(task_run_name=task_run_named("Publish volume", "config"), **RETRY)
def publish_pixels(
    config: IngestConfig,
    target: VolumeTarget,
    upload: UploadSettings | None = None,
    sample: int | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
    target_storage: StorageCredentials | None = None,
) -> PublishReport:
    """Write the sources of a configuration into a volume on disk or in a bucket, and prove what is there.

    Safe to repeat at any time, also after a kill: what is written stays, and what is not is written.

    Args:
        config: What to publish.
        target: The volume.
        upload: How tiles are made, how many blocks at once, and what becomes of bad sources.
        sample: Which time sample; the only one when None.
        verification: How much is compared; a sample when None.
        storage: Keys of the sources; those of the machine when None.
        target_storage: Keys of the target.

    Returns:
        What was written and proved.

    Raises:
        PublishIncomplete: Sources could not be read, or the volume does not keep what is written.
        ConfigurationError: The place holds something else, or a plugin cannot be loaded.
        LocalStorageError: The volume cannot be written.
    """
    key = artifact_key("volume", hashlib.sha256(target.location.encode()).hexdigest()[:10])
    progress = Progress(f"{key}-progress", f"Volume {target.location}")

    def show(done: int, total: int) -> None:
        progress(done, total, f"{done} of {total} blocks of {target.location}")

    report = publish(
        _with_keys(config, storage),
        target,
        upload,
        sample=sample,
        verification=verification,
        storage=_keys(target_storage),
        on_progress=show,
    )
    run_logger().info("%s", report.summary())
    text = f"# {inline(report.location)}\n\n{inline(report.summary())}"
    markdown(f"{key}-report", text, f"Volume {report.location}")
    state_event("boss", "volume", report.location, "published", blocks=report.blocks, written=report.written)
    return report


@task(task_run_name=task_run_named("Downsample channel", "channel"), **RETRY)
def downsample_channel(credentials: BossCredentials, channel: str, timeout_seconds: float = 24 * 3600.0) -> int:
    """Ask the Boss for the lower resolutions of a channel, and wait until they are made.

    Safe to repeat: what is being made is waited for, what is made is left alone (`GET` and `POST /downsample/…`).

    Args:
        credentials: An account that may write the channel.
        channel: `collection/experiment/channel`.
        timeout_seconds: Stop waiting after this time.

    Returns:
        Number of resolutions, the finest included; with 1 there is nothing to make.

    Raises:
        JobFailed: The Boss says that it has failed.
        DeadlineExceeded: Not made in time; the Boss goes on.
    """
    settings = PollSettings(1, 1.3, 60, deadline_seconds=timeout_seconds, error_budget=20)
    with credentials.get_client() as client:
        levels = downsample(client, channel, settings)
    run_logger().info("%s has %d resolutions", channel, levels)
    state_event("boss", "channel", channel, "downsampled", levels=levels)
    return levels


@task(task_run_name=task_run_named("Write cutouts", "config"), **RETRY)
def write_channel(
    credentials: BossCredentials,
    config: IngestConfig,
    upload: UploadSettings | None = None,
    sample: int | None = None,
    verification: VerifySettings | None = None,
    storage: StorageCredentials | None = None,
) -> PublishReport:
    """Write the sources of a configuration into its channel by the cutout service, and prove what is there.

    Safe to repeat at any time, also after a kill: the same values go to the same place (`POST /cutout/…`), and what
    this machine has written of the same sources is not written again.

    Args:
        credentials: An account that may write the channel.
        config: What to write, and into which channel.
        upload: How tiles are made, how many blocks at once, and what becomes of bad sources.
        sample: Which time sample; the only one when None.
        verification: How much is compared; a sample when None.
        storage: Keys of the sources; those of the machine when None.

    Returns:
        What was written and proved.

    Raises:
        PreflightFailed: Channel, extent, dtype or sources do not fit; nothing was sent.
        PublishIncomplete: Sources could not be read, or the channel does not keep what is written.
    """
    key = artifact_key("boss-cutouts", config.channel_path.replace("/", "-"))
    progress = Progress(f"{key}-progress", f"Cutouts into {config.channel_path}")

    def show(done: int, total: int) -> None:
        progress(done, total, f"{done} of {total} blocks of {config.channel_path}")

    with credentials.get_client() as client:
        report = write_cutouts(
            client,
            _with_keys(config, storage),
            upload,
            sample=sample,
            verification=verification,
            on_progress=show,
        )
    run_logger().info("%s", report.summary())
    text = f"# {inline(report.location)}\n\n{inline(report.summary())}"
    markdown(f"{key}-report", text, f"Cutouts into {config.channel_path}")
    state_event("boss", "channel", config.channel_path, "written", blocks=report.blocks, written=report.written)
    return report


@task(task_run_name=task_run_named("Write array", "channel"), **RETRY)
def write_channel_array(
    credentials: BossCredentials,
    channel: str,
    values: Array,
    first: tuple[int, int, int] = (0, 0, 0),
    sample: int = 0,
) -> int:
    """Write an array into a channel by the cutout service, and read all of it back.

    Safe to repeat: the same values go to the same place (`POST /cutout/…`); a block whose answer was lost is looked for
    before it is sent again.

    Args:
        credentials: An account that may write the channel.
        channel: `collection/experiment/channel`.
        values: Array in z, y and x, of the dtype of the channel.
        first: Where its first voxel goes, in x, y and z.
        sample: Which time sample.

    Returns:
        Voxels written and compared.

    Raises:
        ConfigurationError: Its dtype is not that of the channel, or it does not fit into the channel.
        JobFailed: What is read back is not what was written.
    """
    with credentials.get_client() as client:
        voxels = write_array(client, channel, values, first=first, sample=sample)
    run_logger().info("%s: %d voxels written and compared", channel, voxels)
    return voxels


@task(task_run_name=task_run_named("Cancel ingest job", "job_id"), **RETRY)
def cancel_ingest_job(credentials: BossCredentials, job_id: int) -> str:
    """Cancel a job; what was ingested stays.

    Safe to repeat: a job that is over is left alone (`DELETE /ingest/{id}`).

    Args:
        credentials: The account.
        job_id: Number of the job.

    Returns:
        What happened, in words.

    Raises:
        NotFoundError: There never was such a job.
        PermissionDeniedError: It belongs to somebody else.
    """
    with credentials.get_client() as client:
        outcome = client.cancel(job_id)
    run_logger().info("%s", outcome)
    _event(job_id, "cancelled")
    return outcome


@task(task_run_name=task_run_named("Status of ingest job", "job_id"), **RETRY)
def ingest_status(credentials: BossCredentials, job_id: int) -> JobCounts:
    """Ask how far a job is.

    Safe to repeat: it only reads (`GET /ingest/{id}/status`).

    Args:
        credentials: The account.
        job_id: Number of the job.

    Returns:
        State and counts.

    Raises:
        NotFoundError: There is no such job, or it was cancelled.
        PermissionDeniedError: It belongs to somebody else.
    """
    with credentials.get_client() as client:
        counts = client.counts(job_id)
    run_logger().info("Ingest job %d is %s, %d messages wait", job_id, counts.status.name, counts.visible)
    return counts


def _keys(storage: StorageCredentials | None) -> StorageOptions | None:
    return storage.get_client() if storage else None


def _with_keys(config: IngestConfig, storage: StorageCredentials | None) -> IngestConfig:
    return config.with_storage(storage.get_client()) if storage else config


def _state_of(look: Verification) -> str:
    if look.wrong:
        return "wrong"
    return "verified" if look.is_right else "not_compared"


def verification_text(look: Verification) -> str:
    """Write what a look has found in Markdown.

    Args:
        look: What was found.
    """
    lines = [f"# {inline(look.channel)}", "", inline(look.summary()), "", "| axis | from | to |", "|---|---|---|"]
    lines += [f"| {axis} | {low} | {high} |" for axis, (low, high) in look.region.items()]
    found = {
        "Wrong": (len(look.wrong), [str(tile) for tile in look.wrong]),
        "Not compared": (look.unreadable_tiles, [f"{tile}: {reason}" for tile, reason in look.unreadable.items()]),
    }
    for title, (count, items) in found.items():
        if items:
            lines += ["", f"## {title} ({count})", "", *(f"- {inline(item)}" for item in items[:100])]
    return "\n".join(lines)


def report_text(report: UploadReport) -> str:
    """Write a report in Markdown.

    Args:
        report: The report.

    Returns:
        A summary, the counts, and the first names of everything that is not as it should be.
    """
    counts = ("received", "put", "indexed", "deleted", "deleted_before", "requeued", "duplicates", "abandoned", "joins")
    lines = [f"# Ingest job {report.job_id}", "", inline(report.summary()), "", "| count | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {getattr(report, name)} |" for name in counts]
    lines += [f"| bytes put | {report.put_bytes} |", f"| not by this machine | {report.unaccounted} |"]
    if report.verification:
        tiles = {"delivered": report.delivered, "by others": report.by_others, "verified": report.verified}
        lines += [f"| {name} | {count} |" for name, count in (tiles | {"unverified": report.unverified}).items()]
    wrong = report.verification.wrong if report.verification else ()
    named: dict[str, list[str]] = {
        "Holes": [str(tile) for tile in wrong] or list(report.holes),
        "Failed": [f"{tile}: {reason}" for tile, reason in report.failed.items()],
        "Filled": list(report.blank),
        "Padded": list(report.padded),
        "Skipped": list(report.skipped),
        "Quarantined": list(report.quarantined),
        "Warnings": list(report.warnings),
    }
    for title, items in named.items():
        if items:
            lines += ["", f"## {title} ({len(items)})", "", *(f"- {inline(item)}" for item in items[:100])]
    return "\n".join(lines)


def _looking(key: str, what: str) -> Callable[[int, int], None]:
    progress = Progress(key, f"Look at {what}")

    def show(done: int, total: int) -> None:
        progress(done, total, f"{done} of {total} chunks of {what} looked at")

    return show


def _event(job_id: int, state: str, **payload: object) -> None:
    state_event("boss", "ingest-job", str(job_id), state, **payload)


def _ranges(bounds: tuple[int, int, int] | None) -> dict[Literal["x", "y", "z"], tuple[int, int]] | None:
    return {"x": (0, bounds[0]), "y": (0, bounds[1]), "z": (0, bounds[2])} if bounds else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
