"""Tasks of the Virtual Imaging Platform: one remote effect each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError, LedgerError, PreflightFailed
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.texts import code_block, inline, lines
from prefect_biomed.clients.vip import (
    DownloadSummary,
    FinishSummary,
    Pipeline,
    UploadSummary,
    VipSession,
    Workflow,
    WorkflowFailed,
    WorkflowStatus,
    describe,
    download,
    failures,
    find_all,
    kill,
    launch,
    monitor,
    preflight,
    share_inputs,
    upload,
    write_session_crate,
)
from prefect_biomed.clients.vip import complete_inputs as send_what_is_missing
from prefect_biomed.clients.vip import finish as finish_session
from prefect_biomed.clients.vip import kill_session as kill_runs_of_session
from prefect_biomed.clients.vip.bids import by_subject
from prefect_biomed.clients.vip.session_file import VIP_HOME, SessionFile
from prefect_biomed.tasks._reporting import (
    Progress,
    Table,
    artifact_key,
    link,
    markdown,
    run_logger,
    state_event,
    table,
)
from prefect_biomed.tasks.policies import ONCE, RETRY, circumstances
from prefect_biomed.tasks.run_names import task_run_named

__all__ = [
    "WatchSettings",
    "check_sessions",
    "complete_inputs",
    "download_outputs",
    "finish",
    "get_inputs",
    "kill_session",
    "kill_workflows",
    "launch_pipeline",
    "monitor_workflows",
    "show_pipeline",
    "upload_inputs",
    "write_crate",
]


class WatchSettings(BaseModel):
    """What a watch of runs puts up with, and what happens at the end of its time.

    Attributes:
        strict: Whether a run of which some jobs failed counts as failed; as the session's options say when None.
        kill_at_deadline: Whether runs that have not ended in time are killed.
        unknown_grace_seconds: How long the platform may have no trace of a run.
        error_budget: So many looks in a row may fail.
        report: Whether failures are told in the log and in an artifact; not for who looks again before they count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strict: bool | None = None
    kill_at_deadline: bool = False
    unknown_grace_seconds: float = Field(default=900.0, ge=0)
    error_budget: int = Field(default=20, ge=0)
    report: bool = True


@task(task_run_name=task_run_named("Show pipelines", "pipeline_id"), **RETRY)
def show_pipeline(credentials: VipCredentials, pipeline_id: str | None = None) -> list[Pipeline]:
    """List pipelines, or describe one with an `input_settings` to paste, as an artifact.

    Safe to repeat: it only reads (`GET /pipelines`).

    Args:
        credentials: The account.
        pipeline_id: Part of an identifier, in any case; all pipelines when None.

    Returns:
        The pipelines that match; with parameters when it is one.

    Raises:
        ConfigurationError: No pipeline matches; the message lists what there is.
        AuthenticationError: The key was refused.
    """
    with credentials.get_client() as client:
        known = client.pipelines()
        pattern = (pipeline_id or "").lower()
        found = [pipeline for pipeline in known if pipeline.identifier == pipeline_id] or [
            pipeline for pipeline in known if pattern in pipeline.identifier.lower()
        ]
        if not found:
            raise ConfigurationError(
                f"No pipeline matches {pipeline_id!r}. This account may use: "
                + (", ".join(sorted(pipeline.identifier for pipeline in known)) or "none")
                + ". Others need a group you can join on the portal."
            )
        if len(found) == 1:
            found = [client.pipeline(found[0].identifier)]
    key = artifact_key("vip-pipelines", pipeline_id or "all")
    if len(found) == 1:
        text = describe(found[0])
        run_logger().info("%s", lines(text))
        markdown(key, text, f"Pipeline {found[0].identifier}")
    else:
        table(key, [{"pipeline": p.identifier, "name": p.name, "version": p.version} for p in found], "Pipelines")
    return found


@task(task_run_name=task_run_named("Check", "sessions"), **RETRY)
def check_sessions(
    credentials: VipCredentials,
    sessions: Sequence[VipSession],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_jobs: int = 1000,
) -> int:
    """Check everything that can be checked of several sessions, and report all problems at once.

    Safe to repeat: it only reads.

    Args:
        credentials: The account.
        sessions: The sessions.
        include: Patterns of files to send, relative to the input folder; all when empty.
        exclude: Patterns of files not to send.
        max_jobs: The platform's limit of jobs in one workflow.

    Returns:
        Number of jobs of one run of each.

    Raises:
        PreflightFailed: With the problems of all sessions.
    """
    problems: list[str] = []
    jobs = 0
    with credentials.get_client() as client:
        for session in sessions:
            try:
                plan = preflight(client, session, include=include, exclude=exclude, max_jobs=max_jobs)
            except PreflightFailed as error:
                problems += [f"{session.session_name}: {problem}" for problem in error.problems]
            else:
                jobs += plan.jobs
                if plan.undescribed:
                    run_logger().warning("%s: %s", session.session_name, plan.undescribed)
    if problems:
        raise PreflightFailed(f"{len(sessions)} sessions", problems)
    return jobs


@task(task_run_name=task_run_named("Upload inputs", "session"), **ONCE)
def upload_inputs(
    credentials: VipCredentials,
    session: VipSession,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    update_files: bool = True,
    max_jobs: int = 1000,
) -> UploadSummary:
    """Check everything that can be checked, then bring the inputs to the platform.

    Safe to repeat, also after a kill: only what is missing or differs is sent (`PUT /path/…`). A retry of the same flow
    run skips it once it has succeeded.

    Args:
        credentials: The account; its `parallelism` is the number of transfers at once.
        session: The session.
        include: Patterns of files to send, relative to the input folder; all when empty.
        exclude: Patterns of files not to send.
        update_files: False takes inputs that are on the platform as they are, and sends nothing when their folder
            exists; the log tells of it.
        max_jobs: The platform's limit of jobs in one workflow.

    Returns:
        How much was sent and how much was there already.

    Raises:
        PreflightFailed: All problems of files and settings at once; or inputs that are not on the platform, with
            `update_files` False. Nothing was sent.
        TransferFailed: Some files could not be sent; the others were.
        AuthenticationError: The key was refused.
    """
    logger = run_logger()
    with credentials.get_client() as client:
        plan = preflight(client, session, include=include, exclude=exclude, max_jobs=max_jobs)
        if session.input_dir is None:
            logger.info("Nothing to send: all inputs are on the platform or on Girder")
        logger.info("%d files, %d bytes; each run will have %d jobs", len(plan.files), plan.bytes, plan.jobs or 1)
        for told in filter(None, (plan.undescribed, plan.without_record)):
            logger.warning("%s", told)
        if plan.renamed:
            renamed = [f"{here!r} as {there!r}" for here, there in plan.renamed.items()]
            logger.info("%d files get other names: %s", len(renamed), ", ".join(renamed[:20]))
        if subjects := by_subject(session.input_settings):
            logger.info("Files by subject:\n%s", lines("\n".join(subjects)))
        if plan.left_out:
            logger.info("Not sent, because it belongs to sessions: %s", ", ".join(plan.left_out[:20]))
        progress = Progress(artifact_key("vip-upload", session.session_name), f"Upload of {session.session_name}")
        summary = upload(client, session, plan, update_files=update_files, progress=progress)
    logger.info("%d files sent, %d were there already", summary.sent, summary.skipped)
    if summary.trusted:
        logger.warning("%s", summary.trusted)
    return summary


@task(task_run_name=task_run_named("Complete the inputs of", "session"), **RETRY)
def complete_inputs(credentials: VipCredentials, session: VipSession) -> UploadSummary:
    """Send what is missing of the inputs of a session that was broken off.

    Safe to repeat: only what is missing or differs is sent (`PUT /path/…`), and nothing once all is there.

    Args:
        credentials: The account; its `parallelism` is the number of transfers at once.
        session: The session, as its session file has it.

    Returns:
        How much was sent and how much was there already.

    Raises:
        LedgerError: Inputs are missing, and their folder is not on this machine.
        PreflightFailed: The input folder has changed, so that it cannot be sent.
        TransferFailed: Some files could not be sent; the others were.
    """
    progress = Progress(artifact_key("vip-upload", session.session_name), f"Upload of {session.session_name}")
    with credentials.get_client() as client:
        summary = send_what_is_missing(client, session, progress=progress)
    run_logger().info("%d files sent, %d were there already", summary.sent, summary.skipped)
    if summary.trusted:
        run_logger().warning("%s", summary.trusted)
    return summary


@task(task_run_name=task_run_named("Take inputs", "session"), **ONCE)
def get_inputs(credentials: VipCredentials, session: VipSession, owner: VipSession) -> VipSession:
    """Let a session use the inputs another one has uploaded; the last one to finish removes them.

    Safe to repeat: a mark that is there is not made again (`PUT /path/…/HOLDERS/…`).

    Args:
        credentials: The account.
        session: The session that needs inputs.
        owner: The session that uploaded them.

    Returns:
        The session with the owner's input folders.

    Raises:
        LedgerError: The owner's inputs are not there, or the session has inputs of its own.
    """
    with credentials.get_client() as client:
        return share_inputs(client, session, owner)


@task(task_run_name=task_run_named("Launch", "session", "repetition"), **ONCE)
def launch_pipeline(
    credentials: VipCredentials,
    session: VipSession,
    repetition: int = 1,
    max_jobs: int = 1000,
    settle_seconds: float | None = None,
    queue_timeout_seconds: float | None = None,
    queue_interval_seconds: float = 30.0,
) -> Workflow:
    """Launch one run, once and never twice.

    Safe to repeat: the intent is written to the session file, then the platform is searched for the run's name, and
    only when nothing carries it the launch is sent (`POST /executions`). A lost answer is settled by looking again.
    While the platform's limit of running executions is reached, it waits and tries again.

    Args:
        credentials: The account.
        session: The session; its inputs are on the platform.
        repetition: Number of the run, from 1. Two runs of one session differ in it.
        max_jobs: The platform's limit of jobs in one workflow.
        settle_seconds: The longest time after which a launch that was sent may still take effect; the client's when
            None.
        queue_timeout_seconds: How long to wait for capacity; for ever when None.
        queue_interval_seconds: Seconds between the first tries while waiting; they grow to ten times as much.

    Returns:
        The run, launched now or found.

    Raises:
        PreflightFailed: The settings do not fit the pipeline; nothing was sent.
        LaunchInDoubt: It is not known whether it was launched; a retry looks first.
        DeadlineExceeded: No capacity in time; nothing was launched.
        PlatformError: The launch was refused.
    """
    capacity = PollSettings(
        interval_seconds=queue_interval_seconds,
        growth=1.5,
        max_interval_seconds=10 * queue_interval_seconds,
        deadline_seconds=queue_timeout_seconds,
    )
    with credentials.get_client() as client:
        workflow = launch(
            client,
            session,
            repetition,
            max_jobs=max_jobs,
            settle_seconds=settle_seconds,
            capacity=capacity,
            started_by=flow_run.root_flow_run_id,
            circumstances=circumstances("vip", "execution"),
        )
    run_logger().info("Run %d of %s is %s", repetition, session.session_name, workflow.identifier)
    link(
        artifact_key("vip", workflow.identifier),
        credentials.url,
        f"{workflow.identifier} ({workflow.name}) on the portal",
    )
    state_event("vip", "execution", workflow.identifier, "launched", session=session.session_name, run=repetition)
    return workflow


@task(task_run_name=task_run_named("Monitor", "session"), **RETRY)
def monitor_workflows(
    credentials: VipCredentials,
    session: VipSession,
    workflow_ids: Sequence[str] | None = None,
    refresh_time: float = 30.0,
    timeout_seconds: float | None = None,
    wait: bool = True,
    raise_on_failure: bool = True,
    settings: WatchSettings | None = None,
) -> list[Workflow]:
    """Watch the runs of a session until all have ended.

    Safe to repeat: it only reads, one list for all runs per look (`GET /executions`). Two processes may watch at once.

    Args:
        credentials: The account.
        session: The session.
        workflow_ids: The runs; all of the session when None.
        refresh_time: Seconds between the first looks; it grows with the age of the runs to five times as much.
        timeout_seconds: Stop waiting after this time; never when None.
        wait: False looks once and returns, or says at once why it cannot.
        raise_on_failure: Whether a failed run raises; its jobs and logs are reported either way.
        settings: What counts as failed, what the watch puts up with, and what happens at the end of its time.

    Returns:
        The runs with their jobs.

    Raises:
        WorkflowFailed: Some runs failed; with job exit codes, messages, failing inputs and the last lines of the logs.
        DeadlineExceeded: Not all have ended in time; they go on unless they were killed.
        PollingFailed: The platform could not be reached for long; the runs go on.
    """
    logger = run_logger()
    settings = settings or WatchSettings()
    if settings.strict is not None:
        options = session.options.model_copy(update={"strict": settings.strict})
        session = session.model_copy(update={"options": options})
    pace = PollSettings(
        interval_seconds=refresh_time,
        growth=1.1,
        max_interval_seconds=5 * refresh_time,
        deadline_seconds=timeout_seconds,
        # Whoever looks once comes back anyway.
        error_budget=settings.error_budget if wait else 0,
    )
    progress = Progress(artifact_key("vip-monitor", session.session_name), f"Runs of {session.session_name}")
    runs = Table(
        artifact_key("vip-workflows", session.session_name),
        f"Runs of {session.session_name}",
        state="status",
        usual={"Finished", "Running", "Queued"},
    )
    known: dict[str, WorkflowStatus] = {}
    workflows: list[Workflow] = []
    with credentials.get_client() as client:
        for workflows in monitor(
            client,
            session,
            pace,
            workflow_ids=workflow_ids,
            unknown_grace_seconds=settings.unknown_grace_seconds,
            kill_at_deadline=settings.kill_at_deadline,
        ):
            changed = [w for w in workflows if known.get(w.identifier) != w.status]
            for workflow in changed:
                known[workflow.identifier] = workflow.status
                logger.info("%s is %s", workflow.identifier, workflow.status.value)
                state_event("vip", "execution", workflow.identifier, workflow.status.value, name=workflow.name)
            over = not wait or all(w.status.is_terminal for w in workflows)
            runs.show(workflow_rows(workflows), last=over)
            progress(sum(w.status.is_terminal for w in workflows), len(workflows))
            if not wait:
                break
        ended = [workflow for workflow in workflows if workflow.status.is_terminal]
        texts, failed = failures(client, session, ended)
    if texts and settings.report:
        report = "\n".join(texts)
        logger.error("Not everything succeeded:\n%s", lines(report))
        markdown(
            artifact_key("vip-failures", session.session_name),
            f"# Failed jobs of {inline(session.session_name)}\n\n{code_block(report)}\n",
            "Failed jobs",
        )
    if failed and raise_on_failure:
        raise WorkflowFailed(
            f"{len(failed)} of {len(workflows)} runs of {session.session_name} failed.\n" + "\n".join(texts), failed
        )
    return workflows


@task(task_run_name=task_run_named("Download outputs", "session"), **RETRY)
def download_outputs(
    credentials: VipCredentials,
    session: VipSession,
    workflow_ids: Sequence[str] | None = None,
    get_status: Sequence[str] | None = None,
    unzip: bool | None = None,
    keep_archives: bool | None = None,
) -> DownloadSummary:
    """Fetch the outputs of the runs that ended with one of the wanted statuses.

    Safe to repeat, also after a kill: files appear whole and complete ones are not fetched again
    (`GET /executions/{id}/results`, `GET /path/…?action=content`). Outputs on Girder stay there unless the session
    wants them here too.

    Args:
        credentials: The account; its `parallelism` is the number of transfers at once.
        session: The session.
        workflow_ids: The runs; all of the session when None.
        get_status: Statuses whose outputs are wanted, such as `["Finished", "Killed"]`; those of the session's options
            when None.
        unzip: Whether archives are replaced by a folder of the same name with their content; as the session's options
            say when None.
        keep_archives: Whether archives stay, beside a folder `<name>.content`; as the session's options say when None.

    Returns:
        What was fetched, with all local files.

    Raises:
        TransferFailed: Some outputs could not be fetched; the others are here. An archive that cannot be unpacked stays
            as it is, and the result and the log say why.
        StillRunning: A run that was named has not ended.
        LedgerError: The session has no runs.
        UnsafeContent: A name the platform gave would leave the output folder.
    """
    progress = Progress(artifact_key("vip-download", session.session_name), f"Download of {session.session_name}")
    with credentials.get_client() as client:
        summary = download(
            client,
            session,
            workflow_ids=workflow_ids,
            get_status=get_status,
            unzip=unzip,
            keep_archives=keep_archives,
            progress=progress,
        )
    logger = run_logger()
    logger.info("%d outputs fetched to %s, %d were here already", summary.fetched, session.output_dir, summary.skipped)
    for reason in summary.packed.values():
        logger.warning("%s It is kept as it came.", reason)
    return summary


@task(task_run_name=task_run_named("Finish", "session"), **RETRY)
def finish(
    credentials: VipCredentials,
    session: VipSession,
    keep_input: bool | None = None,
    keep_output: bool | None = None,
    timeout_seconds: float = 300.0,
    delete_records: bool | None = None,
) -> FinishSummary:
    """Remove the session's folders from the platform. Local files stay.

    Safe to repeat: what is gone is not deleted again (`DELETE /path/…`). Only outputs are removed that the session file
    shows as fetched, or as not wanted. Inputs that other sessions hold are kept.

    Args:
        credentials: The account.
        session: The session; its options say what stays when the next are None.
        keep_input: Whether the inputs stay on the platform. False removes them although some runs of the session were
            never launched.
        keep_output: Whether the outputs stay on the platform.
        timeout_seconds: How long to wait for each deletion, which the platform queues.
        delete_records: Whether the platform's records of finished and killed runs are deleted too.

    Returns:
        What was removed, and for whom inputs were kept. While runs of other intents of this session name go on, only
        the outputs of this one are removed.

    Raises:
        StillRunning: Some runs of this intent have not ended; nothing was removed.
        NotFetched: Some have wanted outputs that were not fetched; nothing was removed.
        StillNeeded: Some were never launched, and need the inputs; nothing was removed.
        DeadlineExceeded: A deletion takes longer; finishing again goes on with it.
    """
    with credentials.get_client() as client:
        summary = finish_session(
            client,
            session,
            timeout_seconds=timeout_seconds,
            keep_input=keep_input,
            keep_output=keep_output,
            delete_records=delete_records,
        )
    logger = run_logger()
    logger.info("Removed from the platform: %s", ", ".join(summary.removed) or "nothing")
    if summary.left_to:
        logger.info(
            "Other runs of this session name go on, the last to finish removes the rest: %s", ", ".join(summary.left_to)
        )
    elif summary.kept_for:
        logger.info("Inputs are kept for %s", ", ".join(summary.kept_for))
    state_event("vip", "session", session.session_name, "finished", removed=list(summary.removed))
    return summary


@task(task_run_name=task_run_named("Write crate", "session"), **RETRY)
def write_crate(credentials: VipCredentials, session: VipSession) -> Path:
    """Write the provenance of a session, as an RO-Crate, beside its outputs.

    Safe to repeat: the same session gives the same bytes. Nothing is asked of the platform unless it keeps the session
    file.

    Args:
        credentials: The account.
        session: The session; some of its executions have ended.

    Returns:
        `ro-crate-metadata.json` in the output folder.

    Raises:
        LedgerError: No execution has ended yet.
        LocalStorageError: The output folder cannot be read or written.
    """
    with credentials.get_client() as client:
        path = write_session_crate(session, client)
    run_logger().info("How the outputs came about is in %s", path)
    return path


@task(task_run_name=task_run_named("Kill", "session"), **RETRY)
def kill_workflows(
    credentials: VipCredentials,
    session: VipSession,
    workflow_ids: Sequence[str] | None = None,
    timeout_seconds: float = 300.0,
) -> list[Workflow]:
    """Kill the runs of a session that have not ended, and wait until they are killed.

    Safe to repeat: ended runs are left alone (`PUT /executions/{id}/kill`).

    Args:
        credentials: The account.
        session: The session.
        workflow_ids: The runs; when None all of the session, also those whose launch was never written down.
        timeout_seconds: How long to wait for all of them.

    Returns:
        The runs after it.

    Raises:
        LaunchInDoubt: It is not known whether some were launched; the others were killed.
        LedgerError: Nothing is written down of the session, and the platform lists no run of it.
        NotFoundError: The platform does not know some of which nobody has seen the end.
        DeadlineExceeded: Some have not ended in time.
    """
    with credentials.get_client() as client:
        file = SessionFile(session, client)
        if workflow_ids is None:
            found = find_all(client, session)
            workflow_ids = list(dict.fromkeys([*file.read().workflow_ids(), *found.by_id]))
            if not workflow_ids and not file.exists:
                raise LedgerError(
                    f"It is not known which runs session {session.session_name!r} has: nothing is written down in "
                    f"{session.output_dir}, and the platform lists none. Give workflow_ids, or its folder."
                )
            if len(workflow_ids) < session.nb_runs and found.gap and not file.exists:
                run_logger().warning(
                    "Nothing is written down of %s in %s, so another run of it may go on. Give workflow_ids, or its "
                    "folder. (%s)",
                    session.session_name,
                    session.output_dir,
                    found.gap,
                )
        workflows = kill(client, workflow_ids, session=session, timeout_seconds=timeout_seconds)
    for workflow in workflows:
        state_event("vip", "execution", workflow.identifier, workflow.status.value, name=workflow.name)
    return workflows


@task(task_run_name=task_run_named("Kill", "session_name", "output_dir"), **RETRY)
def kill_session(
    credentials: VipCredentials,
    session_name: str | None,
    output_dir: Path,
    vip_home: str = VIP_HOME,
    timeout_seconds: float = 300.0,
) -> list[Workflow]:
    """Kill what still runs of a session, by its name or its folder, and wait until it is killed.

    Safe to repeat: ended runs are left alone (`GET /executions`, `PUT /executions/{id}/kill`).

    Args:
        credentials: The account.
        session_name: Name of the session; may be left out when the folder has its session file.
        output_dir: Folder that may hold its `session_data.json`.
        vip_home: Folder on the platform that holds the folders of sessions.
        timeout_seconds: How long to wait for all of them.

    Returns:
        Its runs after it.

    Raises:
        LedgerError: There is no session file, and no run carries the name.
        NotFoundError: The platform does not know some of which nobody has seen the end.
        LaunchInDoubt: It is not known whether some were launched; the others were killed.
        DeadlineExceeded: Some have not ended in time.
    """
    with credentials.get_client() as client:
        workflows = kill_runs_of_session(
            client,
            session_name=session_name,
            output_dir=output_dir,
            vip_home=vip_home,
            timeout_seconds=timeout_seconds,
        )
    for workflow in workflows:
        run_logger().info("%s is %s", workflow.identifier, workflow.status.value)
        state_event("vip", "execution", workflow.identifier, workflow.status.value, name=workflow.name)
    return workflows


def workflow_rows(workflows: Sequence[Workflow]) -> list[dict[str, object]]:
    """Make the rows of a table of runs and jobs.

    Args:
        workflows: The runs.

    Returns:
        One row for each run.
    """
    return [
        {
            "run": workflow.name,
            "workflow": workflow.identifier,
            "status": workflow.status.value,
            "started": workflow.start_date.isoformat(timespec="seconds") if workflow.start_date else "",
            "jobs": len(workflow.jobs),
            "failed jobs": len(workflow.failed_jobs),
            "outputs": len(workflow.outputs),
        }
        for workflow in workflows
    ]
