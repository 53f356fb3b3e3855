"""Flows of the Virtual Imaging Platform."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

from prefect import flow, get_run_logger
from prefect.logging.loggers import LoggingAdapter
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.vip import (
    Pipeline,
    SessionResult,
    VipSession,
    Workflow,
    WorkflowFailed,
    WorkflowStatus,
    open_girder_session,
    open_session,
)
from prefect_biomed.clients.vip.session_file import FILE_NAME, VIP_HOME, SessionFile
from prefect_biomed.flows import sessions as naming
from prefect_biomed.flows.cancellation import ending_remote_jobs
from prefect_biomed.flows.parameters import (
    CollectedOutputs,
    Girder,
    GirderSession,
    Outputs,
    RefreshTime,
    Removal,
    Runs,
    SessionName,
    SessionUpload,
    SessionWaiting,
    Settings,
    Upload,
    Waiting,
)
from prefect_biomed.flows.suspension import prepare_suspension, resume_session, suspend_session
from prefect_biomed.tasks import vip as steps
from prefect_biomed.tasks._reporting import artifact_key, markdown, table
from prefect_biomed.tasks.run_names import flow_run_named

__all__ = [
    "PipelineRun",
    "finish_session",
    "kill_remote_workflows",
    "session_on_inputs_of",
    "vip_collect",
    "vip_resume",
    "vip_session",
    "vip_shared_inputs",
    "vip_show_pipeline",
]


def _kill_workflows(credentials: VipCredentials, token: str, logger: LoggingAdapter) -> list[str]:
    with credentials.get_client() as client:
        running = [w for w in client.workflows() if w.name.endswith(f"-{token}") and not w.status.is_terminal]
        for workflow in running:
            client.kill(workflow.identifier)
    return [workflow.identifier for workflow in running]


kill_remote_workflows = ending_remote_jobs("vip-session", _kill_workflows, named_by="session_name")


@flow(
    name="vip-session",
    flow_run_name=flow_run_named("session_name", "pipeline_id"),
    on_cancellation=[kill_remote_workflows],
)
def vip_session(
    credentials: VipCredentials,
    pipeline_id: str,
    input_settings: Settings,
    input_dir: Path | None = None,
    output_dir: Path | None = None,
    session_name: SessionName | None = None,
    nb_runs: Runs = 1,
    refresh_time: RefreshTime = 30.0,
    upload: SessionUpload | None = None,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
    girder: Girder | None = None,
    waiting: SessionWaiting | None = None,
) -> SessionResult:
    """Run a pipeline on VIP: upload, launch, monitor, download, finish.

    A retry of the same flow run takes up where it stopped and launches nothing twice; a new flow run, or a second call
    in the same parent flow, is a new experiment.

    Args:
        credentials: The account.
        pipeline_id: Pipeline to run, `Application/version`.
        input_settings: Values of the pipeline's parameters. A list of values makes parallel jobs. Files are named
            relative to `input_dir`, by their path on the platform, or on Girder as `girder:/collection/…`, where a
            folder stands for the list of its files.
        input_dir: Local folder of input files; empty when all inputs are on the platform.
        output_dir: Local folder of the outputs; `vip_outputs/<session_name>` when empty.
        session_name: Name of the session: letters, digits, `-` and `_`. Made up when empty.
        nb_runs: How often the pipeline is run with the same settings.
        refresh_time: Seconds between two looks at the runs.
        upload: Which inputs are sent or taken from another session, and where the session is kept; all of `input_dir`
            when empty.
        outputs: Which outputs are downloaded, in which shape, and what counts as success; those of finished runs,
            unpacked, when empty.
        removal: What is removed from the platform at the end; all of the session when empty. All stays after a failure.
        girder: Where outputs go on Girder; they stay on VIP and go to `output_dir` when empty.
        waiting: Whether and how long to wait for capacity and for the runs, and whether a cancellation kills them; to
            the end, and it does not, when empty.

    Returns:
        The runs and the local files.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        ConfigurationError: This flow run cannot be suspended.
        WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
        DeadlineExceeded: The runs have not ended in time; `vip_resume` takes the session up again.
    """
    upload, waiting = upload or SessionUpload(), waiting or SessionWaiting()
    session = naming.new_session(
        pipeline_id=pipeline_id,
        input_settings=input_settings,
        input_dir=input_dir,
        output_dir=output_dir,
        session_name=session_name,
        nb_runs=nb_runs,
        upload=upload,
        girder=girder,
    )
    if waiting.wait == "suspend":
        prepare_suspension(session)
    if upload.inputs_of is not None:
        session = steps.get_inputs(credentials, session, open_session(upload.inputs_of.expanduser()))
    _upload(credentials, session, upload)
    launched = _launch(credentials, session, waiting)
    workflow_ids = [workflow.identifier for workflow in launched]
    if waiting.wait == "suspend":
        suspend_session(credentials, session, workflow_ids)
    elif not waiting.wait:
        return SessionResult(session=session, workflows=tuple(launched))
    return _collect(credentials, session, refresh_time, outputs, removal, waiting, workflow_ids=workflow_ids)


@flow(name="vip-resume", flow_run_name=flow_run_named("session_name", "output_dir"))
def vip_resume(
    credentials: VipCredentials,
    session_name: SessionName | None = None,
    output_dir: Path | None = None,
    refresh_time: RefreshTime = 30.0,
    vip_home: str = VIP_HOME,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
    girder: GirderSession | None = None,
    waiting: Waiting | None = None,
) -> SessionResult:
    """Continue a session from its name or folder alone, whoever began it and wherever it stopped.

    Runs that were intended but not launched are launched; a session of vip-client is taken as it is.

    Args:
        credentials: The account.
        session_name: Name of the session; enough when its folder is `vip_outputs/<session_name>`, or its session file
            is kept on the platform.
        output_dir: Folder that holds the session's `session_data.json`.
        refresh_time: Seconds between two looks at the runs.
        vip_home: Folder on the platform that holds the folders of sessions.
        outputs: Which outputs are downloaded, in which shape, and what counts as success; those of finished runs,
            unpacked, when empty.
        removal: What is removed from the platform at the end; all of the session when empty. All stays after a failure.
        girder: Where the session is on Girder, and whether its outputs are downloaded; not needed with a local folder.
        waiting: How long to wait for capacity and for the runs; to the end when empty.

    Returns:
        The runs and the local files.

    Raises:
        LedgerError: There is no session file, it is damaged, or it belongs to another session.
        WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
        DeadlineExceeded: The runs have not ended in time; they go on.
    """
    waiting = waiting or Waiting()
    session, is_complete = _open_session(credentials, session_name, output_dir, vip_home, girder or GirderSession())
    if not is_complete:
        _launch(credentials, session, waiting)
    return _collect(credentials, session, refresh_time, outputs, removal, waiting)


class PipelineRun(BaseModel):
    """One parameter set of `vip_shared_inputs`.

    Attributes:
        pipeline_id: Pipeline to run, `Application/version`.
        input_settings: Values of its parameters.
        nb_runs: How often it is run with these settings.
    """

    model_config = ConfigDict(frozen=True)

    pipeline_id: str
    input_settings: Settings
    nb_runs: Runs = 1


@flow(name="vip-shared-inputs", flow_run_name=flow_run_named("session_name", "runs"))
def vip_shared_inputs(
    credentials: VipCredentials,
    runs: Annotated[list[PipelineRun], Field(min_length=1)],
    input_dir: Path,
    output_dir: Path | None = None,
    session_name: SessionName | None = None,
    refresh_time: RefreshTime = 30.0,
    upload: Upload | None = None,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
    waiting: Waiting | None = None,
) -> list[SessionResult]:
    """Run several parameter sets or pipelines on one upload.

    Each parameter set is a session of its own that holds the inputs; the last one to finish removes them.

    Args:
        credentials: The account.
        runs: Pipelines and their settings.
        input_dir: Local folder of input files.
        output_dir: Local folder; each parameter set gets a sub-folder. `vip_outputs/<session_name>` when empty.
        session_name: Name of the session that owns the inputs; made up when empty.
        refresh_time: Seconds between two looks at the runs.
        upload: Which inputs are sent, and where to; all of `input_dir` when empty.
        outputs: Which outputs are downloaded, in which shape, and what counts as success; those of finished runs,
            unpacked, when empty.
        removal: What is removed from the platform at the end; all of the sessions when empty. What failed stays.
        waiting: How long to wait for capacity and for the runs; to the end when empty.

    Returns:
        The result of each parameter set, in their order.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        WorkflowFailed: Some runs failed. The others are downloaded; their inputs stay for those that failed.
        DeadlineExceeded: Some runs have not ended in time; they go on.
    """
    upload, removal, waiting = upload or Upload(), removal or Removal(), waiting or Waiting()
    owner = naming.new_session(
        input_dir=input_dir,
        output_dir=output_dir,
        session_name=session_name,
        upload=SessionUpload(**upload.model_dump()),
    )
    sessions = [
        session_on_inputs_of(owner, number, run, owner.output_dir / str(number))
        for number, run in enumerate(runs, start=1)
    ]
    steps.check_sessions(credentials, sessions, include=upload.include, exclude=upload.exclude)
    _upload(credentials, owner, upload)
    sessions = [steps.get_inputs(credentials, session, owner) for session in sessions]
    for session in sessions:
        _launch(credentials, session, waiting)
    results, failed = _collect_each(credentials, sessions, refresh_time, outputs, removal, waiting)
    finish_session(credentials, owner, removal)
    if failed:
        raise WorkflowFailed("\n".join(map(str, failed)), [w for error in failed for w in error.workflows])
    return results


@flow(name="vip-collect", flow_run_name=flow_run_named("folder"))
def vip_collect(
    credentials: VipCredentials,
    folder: Path,
    outputs: CollectedOutputs | None = None,
    removal: Removal | None = None,
) -> list[SessionResult]:
    """Finish every open session of a folder in one pass: what has ended is downloaded, what runs is left alone.

    Made for a schedule. Sessions that another run is watching may be collected too; that run then finds the files. A
    flow run that was suspended until its session has ended is resumed, and does the rest itself.

    Args:
        credentials: The account.
        folder: Folder whose sub-folders hold a `session_data.json`.
        outputs: Which outputs are downloaded, and in which shape; those of finished and killed runs, unpacked, when
            empty.
        removal: What is removed from the platform of sessions that have ended; all of them when empty.

    Returns:
        The sessions collected in this pass.

    Raises:
        BiomedError: Some sessions could not be collected; the others were.
    """
    wanted = Outputs(**(outputs or CollectedOutputs()).model_dump())
    paths = sorted(folder.expanduser().absolute().glob(f"*/{FILE_NAME}"))
    passed = [_pass(credentials, path.parent, wanted, removal or Removal()) for path in paths]
    table(
        artifact_key("vip-collect", folder.name), [one.row for one in passed if one.row], f"Open sessions of {folder}"
    )
    problems = [one.problem for one in passed if one.problem]
    if problems:
        raise BiomedError(f"{len(problems)} sessions were not collected:\n" + "\n".join(problems))
    return [one.result for one in passed if one.result]


@flow(name="vip-show-pipeline", flow_run_name=flow_run_named("pipeline_id"))
def vip_show_pipeline(credentials: VipCredentials, pipeline_id: str | None = None) -> list[Pipeline]:
    """List pipelines, or describe the one that matches with an `input_settings` to paste.

    Args:
        credentials: The account.
        pipeline_id: Part of an identifier, in any case; all pipelines when empty.

    Returns:
        The pipelines that match.

    Raises:
        ConfigurationError: No pipeline matches; the message lists what there is.
    """
    return steps.show_pipeline(credentials, pipeline_id)


def session_on_inputs_of(owner: VipSession, number: int, run: PipelineRun, output_dir: Path) -> VipSession:
    """Describe one of several sessions that are to use the inputs of another. Nothing is sent.

    Args:
        owner: The session that uploads the inputs.
        number: Number of the session among them, from 1.
        run: What it runs.
        output_dir: Local folder of its outputs.

    Returns:
        The session; `tasks.vip.get_inputs` lets it hold the inputs.
    """
    name = f"{owner.session_name}-{number}"
    return owner.model_copy(
        update={
            "session_name": name,
            "pipeline_id": run.pipeline_id,
            "input_settings": run.input_settings,
            "nb_runs": run.nb_runs,
            "output_dir": output_dir,
            "vip_output_dir": f"{PurePosixPath(owner.vip_dir).parent}/{name}/OUTPUTS",
        }
    )


def finish_session(credentials: VipCredentials, session: VipSession, removal: Removal) -> None:
    """Remove a session from the platform as far as wanted.

    Args:
        credentials: The account.
        session: The session.
        removal: What is removed.

    Raises:
        StillRunning: Some runs have not ended; nothing was removed.
        DeadlineExceeded: A deletion takes longer; finishing again goes on with it.
    """
    if removal.finish:
        steps.finish(credentials, session, keep_input=removal.keep_input, keep_output=removal.keep_output)


def _open_session(
    credentials: VipCredentials,
    session_name: str | None,
    output_dir: Path | None,
    vip_home: str,
    girder: GirderSession,
) -> tuple[VipSession, bool]:
    """Find a session, and whether it was launched by vip-client, so that nothing is missing from it."""
    if session_name is None and output_dir is None and girder.folder is None:
        raise ConfigurationError("Give session_name or output_dir, or girder with the folder of the session.")
    name = session_name or (girder.folder or "").rstrip("/").rpartition("/")[2]
    folder = (output_dir or naming.default_output_dir(name)).expanduser().absolute()
    with credentials.get_client() as client:
        if girder.folder is not None:
            session = open_girder_session(client, girder.folder, folder, download=girder.download)
        else:
            session = open_session(folder, session_name=session_name, client=client, vip_home=vip_home)
            session = session.model_copy(update={"girder_download": session.girder_download or girder.download})
        record = SessionFile(session, client).read()
    return session, record.is_adopted and bool(record.workflows)


def _upload(credentials: VipCredentials, session: VipSession, upload: Upload) -> None:
    is_borrowed = isinstance(upload, SessionUpload) and upload.inputs_of is not None
    steps.upload_inputs(
        credentials,
        session,
        include=upload.include,
        exclude=upload.exclude,
        update_files=upload.update_files and not is_borrowed,
    )


def _launch(credentials: VipCredentials, session: VipSession, waiting: Waiting) -> list[Workflow]:
    return [
        steps.launch_pipeline(credentials, session, repetition, queue_timeout_seconds=waiting.queue_timeout_seconds)
        for repetition in range(1, session.nb_runs + 1)
    ]


def _collect(
    credentials: VipCredentials,
    session: VipSession,
    refresh_time: float,
    outputs: Outputs | None,
    removal: Removal | None,
    waiting: Waiting,
    *,
    workflow_ids: list[str] | None = None,
    accept_failures: bool = False,
) -> SessionResult:
    """Monitor, download, finish. Outputs are fetched before a failed run is reported."""
    outputs, removal = outputs or Outputs(), removal or Removal()
    workflows = steps.monitor_workflows(
        credentials,
        session,
        workflow_ids=workflow_ids,
        refresh_time=refresh_time,
        timeout_seconds=waiting.timeout_seconds,
        raise_on_failure=False,
    )
    downloaded = steps.download_outputs(
        credentials,
        session,
        workflow_ids=workflow_ids,
        get_status=outputs.get_status,
        unzip=outputs.unzip,
        keep_archives=outputs.keep_archives,
    )
    accepted = {*outputs.get_status, WorkflowStatus.REMOVED}
    failed = [w for w in workflows if w.status not in accepted or (outputs.strict and w.failed_jobs)]
    is_finished = removal.finish and (accept_failures or not failed)
    if is_finished:
        finish_session(credentials, session, removal)
    result = SessionResult(
        session=session,
        workflows=tuple(workflows),
        files=downloaded.files,
        is_finished=is_finished,
        packed=downloaded.packed,
    )
    markdown(artifact_key("vip-session", session.session_name), _summary(result), f"Session {session.session_name}")
    if failed and not accept_failures:
        raise WorkflowFailed(
            f"{len(failed)} of {len(workflows)} runs of {session.session_name} failed: "
            + ", ".join(f"{workflow.identifier} {workflow.status.value}" for workflow in failed)
            + f". The logs above say why. What succeeded is in {session.output_dir}; nothing was removed from the "
            "platform. Start a new run, or remove the rest with vip_resume and get_status of outputs set to accept "
            "these.",
            failed,
        )
    return result


def _collect_each(
    credentials: VipCredentials,
    sessions: Sequence[VipSession],
    refresh_time: float,
    outputs: Outputs | None,
    removal: Removal,
    waiting: Waiting,
) -> tuple[list[SessionResult], list[WorkflowFailed]]:
    """Collect all sessions; one that failed does not keep the others from it."""
    results: list[SessionResult] = []
    failed: list[WorkflowFailed] = []
    for session in sessions:
        try:
            results.append(_collect(credentials, session, refresh_time, outputs, removal, waiting))
        except WorkflowFailed as error:
            failed.append(error)
    return results, failed


class _Passed(NamedTuple):
    """What one pass of `vip_collect` has found of a session."""

    row: dict[str, object] | None = None
    result: SessionResult | None = None
    problem: str | None = None


def _pass(credentials: VipCredentials, folder: Path, outputs: Outputs, removal: Removal) -> _Passed:
    """Collect a session unless some run goes on, or a suspended flow run will do it."""
    try:
        session = open_session(folder)
        if not SessionFile(session).read().workflow_ids():
            return _Passed()
        workflows = steps.monitor_workflows(credentials, session, wait=False, raise_on_failure=False)
        running = [workflow.identifier for workflow in workflows if not workflow.status.is_terminal]
        outlook = "over" if running else resume_session(session)
        result = None
        if not running and outlook == "over":
            result = _collect(credentials, session, 1.0, outputs, removal, Waiting(), accept_failures=True)
    except BiomedError as error:
        get_run_logger().error("%s: %s", folder, error)
        return _Passed(row={"session": folder.name, "error": str(error)}, problem=f"{folder}: {error}")
    row: dict[str, object] = {
        "session": session.session_name,
        "runs": len(workflows),
        "still running": len(running),
        "flow run": "" if outlook == "over" else outlook,
    }
    return _Passed(row=row, result=result)


def _summary(result: SessionResult) -> str:
    session = result.session
    rows = [
        f"| {w.name} | {w.identifier} | {w.status.value} | {len(w.jobs) - len(w.failed_jobs)} of {len(w.jobs)} "
        f"| {len(result.files.get(w.identifier, ()))} |"
        for w in result.workflows
    ]
    return "\n".join(
        [
            f"# {session.session_name}",
            "",
            f"Pipeline **{session.pipeline_id}**, outputs in `{session.output_dir}`."
            + (f" On Girder they are in `{session.girder_output_dir}`." if session.girder_output_dir else ""),
            "",
            "| run | execution | status | jobs | local files |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Its folders were removed from the platform."
            if result.is_finished
            else f"Its folders are still on the platform, in `{session.vip_dir}`.",
        ]
    )
