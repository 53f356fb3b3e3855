"""Flows of the Virtual Imaging Platform."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from prefect import flow, get_run_logger
from prefect.logging.loggers import LoggingAdapter
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.vip import (
    InputValue,
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
from prefect_biomed.flows.cancellation import ending_remote_jobs
from prefect_biomed.tasks import vip as steps
from prefect_biomed.tasks._reporting import artifact_key, markdown, table

__all__ = [
    "PipelineRun",
    "kill_remote_workflows",
    "vip_collect",
    "vip_resume",
    "vip_session",
    "vip_shared_inputs",
    "vip_show_pipeline",
]

Runs = Annotated[int, Field(ge=1, le=1000, title="Number of runs")]
RefreshTime = Annotated[float, Field(gt=0, le=86400, title="Refresh time", json_schema_extra={"unit": "s"})]
Timeout = Annotated[float, Field(gt=0, title="Timeout")]
SessionName = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$", max_length=200)]
GirderFolder = Annotated[str, Field(pattern=r"^(girder:)?/(collection|user)/[^/]+(/[^/]+)*/?$")]
Status = Literal["Finished", "ExecutionFailed", "Killed"]
Settings = dict[str, InputValue]
Wait = bool | Literal["suspend"]


def _kill_workflows(credentials: VipCredentials, token: str, logger: LoggingAdapter) -> list[str]:
    with credentials.get_client() as client:
        running = [w for w in client.workflows() if w.name.endswith(f"-{token}") and not w.status.is_terminal]
        for workflow in running:
            client.kill(workflow.identifier)
    return [workflow.identifier for workflow in running]


kill_remote_workflows = ending_remote_jobs("vip-session", _kill_workflows, named_by="session_name")


@flow(name="vip-session", on_cancellation=[kill_remote_workflows])
def vip_session(
    credentials: VipCredentials,
    pipeline_id: str,
    input_settings: Settings,
    input_dir: Path | None = None,
    output_dir: Path | None = None,
    session_name: SessionName | None = None,
    nb_runs: Runs = 1,
    refresh_time: RefreshTime = 30.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    update_files: bool = True,
    inputs_of: str | None = None,
    get_status: Sequence[Status] = ("Finished",),
    unzip: bool = True,
    keep_archives: bool = False,
    strict: bool = False,
    wait: Wait = True,
    finish: bool = True,
    keep_input: bool = False,
    keep_output: bool = False,
    timeout_seconds: Timeout | None = None,
    queue_timeout_seconds: Timeout | None = None,
    cancel_remote: bool = False,
    backup_location: Literal["local", "vip"] | None = "local",
    vip_home: str = VIP_HOME,
    girder_output: GirderFolder | None = None,
    girder_metadata: dict[str, JsonValue] | None = None,
    girder_download: bool = False,
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
        include: Patterns of files to upload, relative to `input_dir`; all when empty.
        exclude: Patterns of files not to upload.
        update_files: Whether inputs that are on the platform already are compared with the local files.
        inputs_of: Folder of another session whose uploaded inputs are used.
        get_status: Statuses whose outputs are downloaded and that count as success.
        unzip: Whether archives are replaced by a folder with their content.
        keep_archives: Whether archives stay beside that folder.
        strict: Whether a run of which some jobs failed makes the session fail.
        wait: True watches the runs. False launches now; collect later with the deployment vip-collect or vip-resume.
            `suspend` gives the worker slot back after the launch; vip-collect resumes this flow run when all runs have
            ended. Without a schedule of vip-collect nobody does.
        finish: Whether the session's folders are removed from the platform at the end. They stay after a failure.
        keep_input: Whether the inputs stay on the platform all the same.
        keep_output: Whether the outputs stay on the platform all the same.
        timeout_seconds: Stop watching the runs after this time; they go on. The time of a suspension does not count.
        queue_timeout_seconds: Stop waiting for capacity after this time.
        cancel_remote: Whether cancelling this flow run kills what it has launched.
        backup_location: Where the session file is kept: `local`, `vip`, or nowhere when empty.
        vip_home: Folder on the platform that holds the folders of sessions.
        girder_output: Folder on Girder, `/collection/…`, in which the session gets a folder for its outputs, with one
            in it for each run. They go to `output_dir` when empty.
        girder_metadata: Metadata for the folder of each run on Girder.
        girder_download: Whether outputs on Girder are downloaded to `output_dir` too.

    Returns:
        The runs and the local files.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        ConfigurationError: This flow run cannot be suspended.
        WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
        DeadlineExceeded: The runs have not ended in time; `vip_resume` takes the session up again.
    """
    session = steps.new_session(
        pipeline_id=pipeline_id,
        input_settings=input_settings,
        input_dir=input_dir,
        output_dir=output_dir,
        session_name=session_name,
        nb_runs=nb_runs,
        backup_location=backup_location,
        vip_home=vip_home,
        girder_output=girder_output,
        girder_metadata=girder_metadata,
        girder_download=girder_download,
    )
    if wait == "suspend":
        steps.prepare_suspension(session)
    if inputs_of is not None:
        session = steps.get_inputs(credentials, session, open_session(Path(inputs_of).expanduser()))
    steps.upload_inputs(
        credentials, session, include=include, exclude=exclude, update_files=update_files and not inputs_of
    )
    launched = _launch(credentials, session, queue_timeout_seconds)
    workflow_ids = [workflow.identifier for workflow in launched]
    if wait == "suspend":
        steps.suspend_session(credentials, session, workflow_ids)
    elif not wait:
        return SessionResult(session=session, workflows=tuple(launched))
    return _collect(
        credentials,
        session,
        workflow_ids=workflow_ids,
        refresh_time=refresh_time,
        timeout_seconds=timeout_seconds,
        get_status=get_status,
        unzip=unzip,
        keep_archives=keep_archives,
        strict=strict,
        finish=finish,
        keep_input=keep_input,
        keep_output=keep_output,
    )


@flow(name="vip-resume")
def vip_resume(
    credentials: VipCredentials,
    session_name: SessionName | None = None,
    output_dir: Path | None = None,
    refresh_time: RefreshTime = 30.0,
    get_status: Sequence[Status] = ("Finished",),
    unzip: bool = True,
    keep_archives: bool = False,
    strict: bool = False,
    finish: bool = True,
    timeout_seconds: Timeout | None = None,
    vip_home: str = VIP_HOME,
    girder_folder: GirderFolder | None = None,
    girder_download: bool = False,
) -> SessionResult:
    """Continue a session from its name or folder alone, whoever began it and wherever it stopped.

    Runs that were intended but not launched are launched; a session of vip-client is taken as it is.

    Args:
        credentials: The account.
        session_name: Name of the session; enough when its folder is `vip_outputs/<session_name>`, or its session file
            is kept on the platform.
        output_dir: Folder that holds the session's `session_data.json`.
        refresh_time: Seconds between two looks at the runs.
        get_status: Statuses whose outputs are downloaded and that count as success.
        unzip: Whether archives are replaced by a folder with their content.
        keep_archives: Whether archives stay beside that folder.
        strict: Whether a run of which some jobs failed makes the session fail.
        finish: Whether the session's folders are removed from the platform at the end.
        timeout_seconds: Stop waiting for the runs after this time; they go on.
        vip_home: Folder on the platform that holds the folders of sessions.
        girder_folder: Folder of the session on Girder; enough alone when its outputs are there.
        girder_download: Whether outputs on Girder are downloaded too, also when they were not wanted before.

    Returns:
        The runs and the local files.

    Raises:
        LedgerError: There is no session file, it is damaged, or it belongs to another session.
        WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
    """
    if session_name is None and output_dir is None and girder_folder is None:
        raise ConfigurationError("Give session_name or output_dir, or girder_folder.")
    name = session_name or (girder_folder or "").rstrip("/").rpartition("/")[2]
    folder = (output_dir or steps.default_output_dir(name)).expanduser().absolute()
    with credentials.get_client() as client:
        if girder_folder is not None:
            session = open_girder_session(client, girder_folder, folder, download=girder_download)
        else:
            session = open_session(folder, session_name=session_name, client=client, vip_home=vip_home)
            session = session.model_copy(update={"girder_download": session.girder_download or girder_download})
        record = SessionFile(session, client).read()
    if not record.is_adopted or not record.workflows:
        _launch(credentials, session, None)
    return _collect(
        credentials,
        session,
        refresh_time=refresh_time,
        timeout_seconds=timeout_seconds,
        get_status=get_status,
        unzip=unzip,
        keep_archives=keep_archives,
        strict=strict,
        finish=finish,
    )


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


@flow(name="vip-shared-inputs")
def vip_shared_inputs(
    credentials: VipCredentials,
    runs: Annotated[list[PipelineRun], Field(min_length=1)],
    input_dir: Path,
    output_dir: Path | None = None,
    session_name: SessionName | None = None,
    refresh_time: RefreshTime = 30.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    get_status: Sequence[Status] = ("Finished",),
    strict: bool = False,
    finish: bool = True,
    timeout_seconds: Timeout | None = None,
    vip_home: str = VIP_HOME,
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
        include: Patterns of files to upload, relative to `input_dir`; all when empty.
        exclude: Patterns of files not to upload.
        get_status: Statuses whose outputs are downloaded and that count as success.
        strict: Whether a run of which some jobs failed makes the session fail.
        finish: Whether the sessions' folders are removed from the platform at the end.
        timeout_seconds: Stop waiting for the runs after this time; they go on.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        The result of each parameter set, in their order.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        WorkflowFailed: Some runs failed. The others are downloaded; their inputs stay for those that failed.
    """
    owner = steps.new_session(input_dir=input_dir, output_dir=output_dir, session_name=session_name, vip_home=vip_home)
    sessions = [
        owner.model_copy(
            update={
                "session_name": f"{owner.session_name}-{number}",
                "pipeline_id": run.pipeline_id,
                "input_settings": run.input_settings,
                "nb_runs": run.nb_runs,
                "output_dir": owner.output_dir / str(number),
                "vip_output_dir": f"{vip_home}/{owner.session_name}-{number}/OUTPUTS",
            }
        )
        for number, run in enumerate(runs, start=1)
    ]
    steps.check_sessions(credentials, sessions, include=include, exclude=exclude)
    steps.upload_inputs(credentials, owner, include=include, exclude=exclude)
    sessions = [steps.get_inputs(credentials, session, owner) for session in sessions]
    for session in sessions:
        _launch(credentials, session, None)
    results: list[SessionResult] = []
    failed: list[WorkflowFailed] = []
    for session in sessions:
        try:
            results.append(
                _collect(
                    credentials,
                    session,
                    refresh_time=refresh_time,
                    timeout_seconds=timeout_seconds,
                    get_status=get_status,
                    strict=strict,
                    finish=finish,
                )
            )
        except WorkflowFailed as error:
            failed.append(error)
    if finish:
        steps.finish(credentials, owner)
    if failed:
        raise WorkflowFailed(
            "\n".join(map(str, failed)), [workflow for error in failed for workflow in error.workflows]
        )
    return results


@flow(name="vip-collect")
def vip_collect(
    credentials: VipCredentials,
    folder: Path,
    get_status: Sequence[Status] = ("Finished", "Killed"),
    unzip: bool = True,
    finish: bool = True,
) -> list[SessionResult]:
    """Finish every open session of a folder in one pass: what has ended is downloaded, what runs is left alone.

    Made for a schedule. Sessions that another run is watching may be collected too; that run then finds the files. A
    flow run that was suspended until its session has ended is resumed, and does the rest itself.

    Args:
        credentials: The account.
        folder: Folder whose sub-folders hold a `session_data.json`.
        get_status: Statuses whose outputs are downloaded.
        unzip: Whether archives are replaced by a folder with their content.
        finish: Whether the folders of sessions that have ended are removed from the platform.

    Returns:
        The sessions collected in this pass.

    Raises:
        BiomedError: Some sessions could not be collected; the others were.
    """
    logger = get_run_logger()
    collected: list[SessionResult] = []
    problems: list[str] = []
    rows: list[dict[str, object]] = []
    for path in sorted(folder.expanduser().absolute().glob(f"*/{FILE_NAME}")):
        try:
            session = open_session(path.parent)
            if not SessionFile(session).read().workflow_ids():
                continue
            workflows = steps.monitor_workflows(credentials, session, wait=False, raise_on_failure=False)
            running = [workflow.identifier for workflow in workflows if not workflow.status.is_terminal]
            outlook = "over" if running else steps.resume_session(session)
            if not running and outlook == "over":
                collected.append(
                    _collect(
                        credentials,
                        session,
                        refresh_time=1.0,
                        get_status=get_status,
                        unzip=unzip,
                        finish=finish,
                        accept_failures=True,
                    )
                )
            rows.append(
                {
                    "session": session.session_name,
                    "runs": len(workflows),
                    "still running": len(running),
                    "flow run": "" if outlook == "over" else outlook,
                }
            )
        except BiomedError as error:
            logger.error("%s: %s", path.parent, error)
            problems.append(f"{path.parent}: {error}")
            rows.append({"session": path.parent.name, "error": str(error)})
    table(artifact_key("vip-collect", folder.name), rows, f"Open sessions of {folder}")
    if problems:
        raise BiomedError(f"{len(problems)} sessions were not collected:\n" + "\n".join(problems))
    return collected


@flow(name="vip-show-pipeline")
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


def _launch(credentials: VipCredentials, session: VipSession, queue_timeout_seconds: float | None) -> list[Workflow]:
    return [
        steps.launch_pipeline(credentials, session, repetition, queue_timeout_seconds=queue_timeout_seconds)
        for repetition in range(1, session.nb_runs + 1)
    ]


def _collect(
    credentials: VipCredentials,
    session: VipSession,
    *,
    refresh_time: float,
    get_status: Sequence[Status],
    workflow_ids: list[str] | None = None,
    timeout_seconds: float | None = None,
    unzip: bool = True,
    keep_archives: bool = False,
    strict: bool = False,
    finish: bool = True,
    keep_input: bool = False,
    keep_output: bool = False,
    accept_failures: bool = False,
) -> SessionResult:
    """Monitor, download, finish. Outputs are fetched before a failed run is reported."""
    workflows = steps.monitor_workflows(
        credentials,
        session,
        workflow_ids=workflow_ids,
        refresh_time=refresh_time,
        timeout_seconds=timeout_seconds,
        raise_on_failure=False,
    )
    downloaded = steps.download_outputs(
        credentials,
        session,
        workflow_ids=workflow_ids,
        get_status=get_status,
        unzip=unzip,
        keep_archives=keep_archives,
    )
    accepted = {*get_status, WorkflowStatus.REMOVED}
    failed = [w for w in workflows if w.status not in accepted or (strict and w.failed_jobs)]
    is_finished = finish and (accept_failures or not failed)
    if is_finished:
        steps.finish(credentials, session, keep_input=keep_input, keep_output=keep_output)
    result = SessionResult(session=session, workflows=tuple(workflows), files=downloaded.files, is_finished=is_finished)
    markdown(artifact_key("vip-session", session.session_name), _summary(result), f"Session {session.session_name}")
    if failed and not accept_failures:
        raise WorkflowFailed(
            f"{len(failed)} of {len(workflows)} runs of {session.session_name} failed: "
            + ", ".join(f"{workflow.identifier} {workflow.status.value}" for workflow in failed)
            + f". The logs above say why. What succeeded is in {session.output_dir}; nothing was removed from the "
            "platform. Start a new run, or remove the rest with vip_resume and get_status set to accept these.",
            failed,
        )
    return result


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
