"""Flows of the Virtual Imaging Platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

from prefect.logging.loggers import LoggingAdapter
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.diagnosis import Category
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.texts import inline, inline_code
from prefect_biomed.clients.vip import (
    FinishSummary,
    Outcome,
    Pipeline,
    SessionResult,
    VipSession,
    Workflow,
    WorkflowFailed,
    judge,
    open_girder_session,
    open_intents,
    open_session,
    with_bids_files,
)
from prefect_biomed.clients.vip.monitoring import diagnoses, kill_intent
from prefect_biomed.clients.vip.session_file import VIP_HOME, SessionFile, sessions_below
from prefect_biomed.flows import sessions as naming
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.cancellation import ending_remote_jobs
from prefect_biomed.flows.parameters import CancellableWaiting, RefreshTime, Runs, Seconds, Waiting
from prefect_biomed.flows.suspension import prepare_suspension, resume_session, suspend_session
from prefect_biomed.flows.vip_parameters import (
    Girder,
    GirderSession,
    Outputs,
    PipelineId,
    Removal,
    SessionName,
    SessionUpload,
    SessionWaiting,
    Settings,
    Upload,
    VipHome,
    accepting,
    chosen,
)
from prefect_biomed.tasks import vip as steps
from prefect_biomed.tasks._reporting import artifact_key, markdown, run_logger, table
from prefect_biomed.tasks.run_names import flow_run_named

__all__ = [
    "PipelineRun",
    "end_session",
    "finish_session",
    "kill_remote_workflows",
    "open_sessions",
    "session_on_inputs_of",
    "vip_collect",
    "vip_kill",
    "vip_resume",
    "vip_session",
    "vip_shared_inputs",
    "vip_show_pipeline",
]


def _kill_workflows(parameters: Mapping[str, Any], token: str, logger: LoggingAdapter) -> list[str]:
    credentials: VipCredentials = parameters["credentials"]
    name = parameters["session_name"] or f"session-{token}"
    given = parameters.get("output_dir") or parameters.get("experiment_dir")
    # Whether the run was one of a deployment, and so where its outputs went, cannot be told here.
    places = [given.expanduser()] if given else [home / "vip_outputs" / name for home in (Path.cwd(), Path.home())]
    upload = parameters.get("upload") or Upload()
    with credentials.get_client() as client:
        killed, doubts = kill_intent(
            client, token, [place.absolute() for place in places], session_name=name, vip_home=upload.vip_home
        )
    for doubt in doubts:
        logger.warning("%s", doubt)
    return killed


kill_remote_workflows = ending_remote_jobs("vip-session", _kill_workflows, named_by="session_name")


@checked_flow(
    name="vip-session",
    flow_run_name=flow_run_named("session_name", "pipeline_id"),
    on_cancellation=[kill_remote_workflows],
)
def vip_session(
    credentials: VipCredentials,
    pipeline_id: PipelineId,
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
        outputs=outputs,
        removal=removal,
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
    return end_session(credentials, session, workflow_ids, refresh_time, waiting)


@checked_flow(name="vip-resume", flow_run_name=flow_run_named("session_name", "output_dir"))
def vip_resume(
    credentials: VipCredentials,
    session_name: SessionName | None = None,
    output_dir: Path | None = None,
    refresh_time: RefreshTime = 30.0,
    vip_home: VipHome = VIP_HOME,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
    girder: GirderSession | None = None,
    waiting: Waiting | None = None,
) -> SessionResult:
    """Continue a session from its name or folder alone, whoever began it and wherever it stopped.

    The session file tells what was intended: inputs that are missing are uploaded, runs that were not launched are
    launched, and success is judged as it was asked for when the session was begun. Runs of vip-client are taken as they
    are.

    Args:
        credentials: The account.
        session_name: Name of the session; enough when its folder is `vip_outputs/<session_name>`, or its session file
            is kept on the platform.
        output_dir: Folder that holds the session's `session_data.json`.
        refresh_time: Seconds between two looks at the runs.
        vip_home: Folder on the platform that holds the folders of sessions.
        outputs: Which outputs are downloaded, in which shape, and what counts as success. What is left out stays as it
            was when the session was begun.
        removal: What is removed from the platform at the end. What is left out stays as it was when the session was
            begun. All stays after a failure.
        girder: Where the session is on Girder, and whether its outputs are downloaded; not needed with a local folder.
        waiting: How long to wait for capacity and for the runs; to the end when empty.

    Returns:
        The runs and the local files.

    Raises:
        LedgerError: There is no session file, it is damaged, or it belongs to another session; or inputs are missing,
            and their folder is not on this machine.
        WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
        DeadlineExceeded: The runs have not ended in time; they go on.
        BiomedError: What was begun under this name before the newest could not be taken up again; the newest was.
    """
    waiting = waiting or Waiting()
    intents = open_sessions(credentials, session_name, output_dir, vip_home, girder or GirderSession())
    intents = [one.model_copy(update={"options": chosen(one.options, outputs, removal)}) for one in intents]
    *older, newest = intents
    failed = [told for session in older if (told := _complete_older(credentials, session, waiting))]
    _complete(credentials, newest, waiting, is_newest=True)
    fetched = [_fetch(credentials, one, ids, refresh_time, waiting) for one, ids in _runs_of(credentials, intents)]
    try:
        result = _conclude(credentials, newest, fetched)
    except WorkflowFailed as error:
        raise WorkflowFailed("\n".join([str(error), *failed]), error.workflows) from error
    if failed:
        raise BiomedError("\n".join([*failed, f"The newest was: its outputs are in {newest.output_dir}."]))
    return result


class PipelineRun(BaseModel):
    """One parameter set of `vip_shared_inputs`.

    Attributes:
        pipeline_id: Pipeline to run, `Application/version`.
        input_settings: Values of its parameters.
        nb_runs: How often it is run with these settings.
    """

    model_config = ConfigDict(frozen=True)

    pipeline_id: PipelineId
    input_settings: Settings
    nb_runs: Runs = 1


@checked_flow(
    name="vip-shared-inputs",
    flow_run_name=flow_run_named("session_name", "runs"),
    on_cancellation=[kill_remote_workflows],
)
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
    girder: Girder | None = None,
    waiting: CancellableWaiting | None = None,
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
        girder: Where outputs go on Girder; they stay on VIP and go to `output_dir` when empty.
        waiting: How long to wait for capacity and for the runs, and whether a cancellation kills them; to the end, and
            it does not, when empty.

    Returns:
        The result of each parameter set, in their order.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        WorkflowFailed: Some runs failed. The others are downloaded; their inputs stay for those that failed.
        DeadlineExceeded: Some runs have not ended in time; they go on.
    """
    upload, waiting = upload or Upload(), waiting or CancellableWaiting()
    owner = naming.new_session(
        input_dir=input_dir,
        output_dir=output_dir,
        session_name=session_name,
        upload=SessionUpload(**upload.model_dump()),
        girder=girder,
        outputs=outputs,
        removal=removal,
    )
    sessions = [
        session_on_inputs_of(owner, number, run, owner.output_dir / str(number))
        for number, run in enumerate(runs, start=1)
    ]
    owner = owner.model_copy(update={"girder_output_dir": None})
    steps.check_sessions(credentials, sessions, include=upload.include, exclude=upload.exclude)
    _upload(credentials, owner, upload)
    sessions = [steps.get_inputs(credentials, session, owner) for session in sessions]
    for session in sessions:
        _launch(credentials, session, waiting)
    results, failed = _collect_each(credentials, sessions, refresh_time, waiting)
    finish_session(credentials, owner)
    if failed:
        raise WorkflowFailed("\n".join(map(str, failed)), [w for error in failed for w in error.workflows])
    return results


@checked_flow(name="vip-collect", flow_run_name=flow_run_named("folder"))
def vip_collect(
    credentials: VipCredentials,
    folder: Path,
    outputs: Outputs | None = None,
    removal: Removal | None = None,
) -> list[SessionResult]:
    """Finish every open session of a folder in one pass: what has ended is downloaded, what runs is left alone.

    A session of which a run was not launched yet is left alone, too: its flow run will do it, or `vip_resume`. One of
    which a run failed is downloaded as far as it succeeded, told in the table, and stays on the platform and open. Made
    for a schedule. Sessions that another run is watching may be collected too; that run then finds the files. A flow
    run that was suspended until its session has ended is resumed, and does the rest itself.

    Args:
        credentials: The account.
        folder: Folder whose sub-folders hold a `session_data.json`, or the record of a session that is kept elsewhere.
        outputs: Which outputs are downloaded, in which shape, and what counts as success. What is left out is as each
            session was begun with.
        removal: What is removed from the platform of sessions that have succeeded. What is left out is as each session
            was begun with.

    Returns:
        The sessions collected in this pass, with the problems of those that failed.

    Raises:
        ConfigurationError: There is no such folder.
        BiomedError: Some sessions could not be collected; the others were.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise ConfigurationError(
            f"There is no folder {folder}, so it is not known which sessions are open. Give the folder that holds "
            "those of the sessions, and see that its disk is there."
        )
    folders = sessions_below(folder)
    passed = [_pass(credentials, path, outputs, removal) for path in folders]
    table(
        artifact_key("vip-collect", folder.name), [one.row for one in passed if one.row], f"Open sessions of {folder}"
    )
    problems = [one.problem for one in passed if one.problem]
    if problems:
        raise BiomedError(f"{len(problems)} sessions were not collected:\n" + "\n".join(problems))
    return [one.result for one in passed if one.result]


@checked_flow(name="vip-show-pipeline", flow_run_name=flow_run_named("pipeline_id"))
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


@checked_flow(name="vip-kill", flow_run_name=flow_run_named("session_name", "output_dir"))
def vip_kill(
    credentials: VipCredentials,
    session_name: SessionName | None = None,
    output_dir: Path | None = None,
    vip_home: VipHome = VIP_HOME,
    timeout_seconds: Seconds = 300.0,
) -> list[Workflow]:
    """Kill what still runs of a session, from its name or folder alone. Outputs and inputs stay as they are.

    Args:
        credentials: The account.
        session_name: Name of the session; enough when its folder is `vip_outputs/<session_name>`, when its session file
            is kept on the platform, or when its runs are among those that the platform lists.
        output_dir: Folder that holds the session's `session_data.json`.
        vip_home: Folder on the platform that holds the folders of sessions.
        timeout_seconds: How long to wait until all are killed.

    Returns:
        The runs of the session after it; those that had ended before are as they were.

    Raises:
        ConfigurationError: Neither a name nor a folder was given.
        LedgerError: There is no session file, and no run carries the name; or the file is damaged.
        DeadlineExceeded: Some have not ended in time; they may still be killed.
    """
    if session_name is None and output_dir is None:
        raise ConfigurationError("Give session_name or output_dir.")
    folder = (output_dir or naming.default_output_dir(session_name or "")).expanduser().absolute()
    workflows = steps.kill_session(credentials, session_name, folder, vip_home, timeout_seconds)
    name = session_name or folder.name
    table(artifact_key("vip-kill", name), steps.workflow_rows(workflows), f"Runs of {name}")
    return workflows


def session_on_inputs_of(owner: VipSession, number: int, run: PipelineRun, output_dir: Path) -> VipSession:
    """Describe one of several sessions that are to use the inputs of another. Nothing is sent.

    Args:
        owner: The session that uploads the inputs.
        number: Number of the session among them, from 1.
        run: What it runs.
        output_dir: Local folder of its outputs.

    Returns:
        The session; `tasks.vip.get_inputs` lets it hold the inputs.

    Raises:
        ConfigurationError: With its number the name is too long.
    """
    name, on_girder = f"{owner.session_name}-{number}", owner.girder_output_dir
    fields = {
        "session_name": name,
        "pipeline_id": run.pipeline_id,
        "input_settings": run.input_settings,
        "questions": {},
        "nb_runs": run.nb_runs,
        "output_dir": output_dir,
        "vip_output_dir": f"{PurePosixPath(owner.vip_dir).parent}/{name}/OUTPUTS",
        "girder_output_dir": str(PurePosixPath(on_girder).with_name(name)) if on_girder else None,
    }
    return with_bids_files(VipSession.planned(**{**dict(owner), **fields}))


def finish_session(credentials: VipCredentials, session: VipSession) -> FinishSummary | None:
    """Remove a session from the platform as far as its options say.

    Args:
        credentials: The account.
        session: The session.

    Returns:
        What was removed, and what was left to whom; None when the options say that all stays.

    Raises:
        StillRunning: Some runs have not ended; nothing was removed.
        NotFetched: Some have wanted outputs that were not fetched; nothing was removed.
        DeadlineExceeded: A deletion takes longer; finishing again goes on with it.
    """
    return steps.finish(credentials, session) if session.options.finish else None


def open_sessions(
    credentials: VipCredentials,
    session_name: str | None,
    output_dir: Path | None,
    vip_home: str,
    girder: GirderSession,
) -> list[VipSession]:
    """Find a session by what a user knows of it. It only reads.

    Args:
        credentials: The account.
        session_name: Name of the session.
        output_dir: Folder of its outputs here.
        vip_home: Folder on the platform that holds the folders of sessions.
        girder: Where it is on Girder.

    Returns:
        What was intended with it, the newest last.

    Raises:
        ConfigurationError: None of these was given.
        LedgerError: There is no session file, or it is damaged.
    """
    if session_name is None and output_dir is None and girder.folder is None:
        raise ConfigurationError("Give session_name or output_dir, or girder with the folder of the session.")
    name = session_name or (girder.folder or "").rstrip("/").rpartition("/")[2]
    folder = (output_dir or naming.default_output_dir(name)).expanduser().absolute()
    with credentials.get_client() as client:
        if girder.folder is not None:
            session = open_girder_session(client, girder.folder, folder, download=girder.download)
            folder, session_name = session.output_dir, session.session_name
        found = open_intents(folder, session_name=session_name, client=client, vip_home=vip_home)
    return [one.model_copy(update={"girder_download": one.girder_download or girder.download}) for one in found]


def _complete(credentials: VipCredentials, session: VipSession, waiting: Waiting, *, is_newest: bool) -> None:
    """Upload and launch what was intended and is missing."""
    with credentials.get_client() as client:
        record = SessionFile(session, client).read()
    if record.is_adopted(session.token):
        return
    if not is_newest and (refused := record.left_alone(session)):
        run_logger().warning("%s: refused, and something else was begun since, so it is left alone", ", ".join(refused))
    steps.complete_inputs(credentials, session)
    for repetition in record.repetitions_to_launch(session, is_newest=is_newest):
        steps.launch_pipeline(credentials, session, repetition, queue_timeout_seconds=waiting.queue_timeout_seconds)


def _complete_older(credentials: VipCredentials, session: VipSession, waiting: Waiting) -> str | None:
    """Complete what was begun before the newest, which is not to wait for it; say why when that cannot be."""
    try:
        _complete(credentials, session, waiting, is_newest=False)
    except BiomedError as error:
        told = (
            f"What was begun before under {session.session_name}, with {session.pipeline_id} and the token "
            f"{session.token}, could not be taken up again: {error}"
        )
        run_logger().error("%s", told)
        return told
    return None


def _runs_of(credentials: VipCredentials, intents: Sequence[VipSession]) -> list[tuple[VipSession, list[str]]]:
    """The runs of each intent that have to be seen to; all of the newest one when none has to."""
    *older, newest = intents
    with credentials.get_client() as client:
        record = SessionFile(newest, client).read()
    if record.workflows and not record.workflow_ids():
        run_logger().info(
            "Session %s is finished: all its outputs were removed from the platform. What was fetched is in %s",
            newest.session_name,
            newest.output_dir,
        )
    runs = [(session, record.open_runs(session.token)) for session in older]
    own = record.open_runs(newest.token) or record.workflows_of(newest.token)
    return [(session, ids) for session, ids in runs if ids] + [(newest, own)]


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


def end_session(
    credentials: VipCredentials,
    session: VipSession,
    workflow_ids: Sequence[str],
    refresh_time: float,
    waiting: Waiting,
) -> SessionResult:
    """Watch runs to their end, fetch what they gave, and finish the session when all succeeded. Safe to repeat.

    Args:
        credentials: The account.
        session: The session.
        workflow_ids: Its runs.
        refresh_time: Seconds between two looks at the runs.
        waiting: How long to wait for them.

    Returns:
        The runs and the local files.

    Raises:
        WorkflowFailed: Some runs failed. What succeeded is downloaded, nothing is removed from the platform.
        DeadlineExceeded: The runs have not ended in time; they go on.
    """
    return _conclude(credentials, session, [_fetch(credentials, session, workflow_ids, refresh_time, waiting)])


class _Fetched(NamedTuple):
    """What has come of the runs of one intent, and where their outputs are."""

    outcomes: list[Outcome]
    files: dict[str, tuple[Path, ...]]
    packed: dict[str, str]


def _fetch(
    credentials: VipCredentials,
    session: VipSession,
    workflow_ids: Sequence[str],
    refresh_time: float,
    waiting: Waiting,
) -> _Fetched:
    """Monitor and download, and judge what has come of it."""
    workflows = steps.monitor_workflows(
        credentials,
        session,
        workflow_ids=workflow_ids,
        refresh_time=refresh_time,
        timeout_seconds=waiting.timeout_seconds,
        raise_on_failure=False,
    )
    downloaded = steps.download_outputs(credentials, session, workflow_ids=workflow_ids)
    with credentials.get_client() as client:
        outcomes = judge(client, session, workflows, fetched=True)
    return _Fetched(outcomes, downloaded.files, downloaded.packed)


def _conclude(
    credentials: VipCredentials, session: VipSession, fetched: Sequence[_Fetched], *, accept_failures: bool = False
) -> SessionResult:
    """Finish a session of which everything is here, and report it. One that failed stays on the platform."""
    outcomes = [one for part in fetched for one in part.outcomes]
    failed = [one for one in outcomes if not one.is_success]
    if outcomes:
        steps.write_crate(credentials, session)
    finished = None if failed else finish_session(credentials, session)
    result = SessionResult(
        session=session,
        workflows=tuple(one.workflow for one in outcomes),
        files={identifier: files for part in fetched for identifier, files in part.files.items()},
        is_finished=finished is not None and not finished.left_to,
        left_to=finished.left_to if finished else (),
        packed={path: why for part in fetched for path, why in part.packed.items()},
        problems={one.workflow.identifier: one.problems for one in failed},
    )
    markdown(
        artifact_key("vip-session", session.session_name),
        _summary(result, outcomes),
        f"Session {session.session_name}",
    )
    if failed and not accept_failures:
        with credentials.get_client() as client:
            known = diagnoses(client, session, [one.workflow for one in failed])
        why = {name: f" ({one})" for name, one in known.items() if one.category is not Category.UNKNOWN}
        raise WorkflowFailed(
            f"{len(failed)} of {len(outcomes)} runs of {session.session_name} failed: "
            + ", ".join(
                f"{one.workflow.identifier} {'; '.join(one.problems)}{why.get(one.workflow.identifier, '')}"
                for one in failed
            )
            + f". The logs above say why. What succeeded is in {session.output_dir}; nothing was removed from the "
            f"platform. {_what_helps(failed, session)}",
            [one.workflow for one in failed],
        )
    return result


def _what_helps(failed: Sequence[Outcome], session: VipSession) -> str:
    accepted = accepting(failed, session.options)
    if accepted is None:
        return "vip_resume looks again, and fetches what is missing. Or start a new run."
    return f"Start a new run. vip_resume with outputs={accepted} takes these as they are, and removes the session."


def _collect_each(
    credentials: VipCredentials, sessions: Sequence[VipSession], refresh_time: float, waiting: Waiting
) -> tuple[list[SessionResult], list[WorkflowFailed]]:
    """Collect all sessions; one that failed does not keep the others from it."""
    results: list[SessionResult] = []
    failed: list[WorkflowFailed] = []
    for session in sessions:
        try:
            runs = _runs_of(credentials, [session])
            fetched = [_fetch(credentials, one, ids, refresh_time, waiting) for one, ids in runs]
            results.append(_conclude(credentials, session, fetched))
        except WorkflowFailed as error:
            failed.append(error)
    return results, failed


class _Passed(NamedTuple):
    """What one pass of `vip_collect` has found of a session."""

    row: dict[str, object] | None = None
    result: SessionResult | None = None
    problem: str | None = None


def _pass(credentials: VipCredentials, folder: Path, outputs: Outputs | None, removal: Removal | None) -> _Passed:
    """Collect a session unless some run goes on or is still to be launched, or a suspended flow run will do it."""
    try:
        intents = [
            one.model_copy(update={"options": chosen(one.options, outputs, removal)}) for one in open_intents(folder)
        ]
        session = intents[-1]
        with credentials.get_client() as client:
            record = SessionFile(session, client).read()
        unlaunched = [name for one in intents for name in record.not_launched(one, is_newest=one is session)]
        if not record.workflow_ids() and not unlaunched:
            return _Passed()
        workflows = []
        if record.workflow_ids():
            # Who fetches them looks again, and tells of failures then.
            silent = steps.WatchSettings(report=False)
            workflows = steps.monitor_workflows(
                credentials, session, wait=False, raise_on_failure=False, settings=silent
            )
        running = [workflow.identifier for workflow in workflows if not workflow.status.is_terminal]
        # Only a session whose file is here can have been suspended.
        goes_on = bool(running or unlaunched)
        outlook = "over" if goes_on or session.backup != "local" else resume_session(session)
        result = None
        if not goes_on and outlook == "over":
            runs = [(one, ids) for one, ids in _runs_of(credentials, intents) if ids]
            fetched = [_fetch(credentials, one, ids, 1.0, Waiting()) for one, ids in runs]
            result = _conclude(credentials, session, fetched, accept_failures=True)
    except BiomedError as error:
        run_logger().error("%s: %s", folder, error)
        return _Passed(row={"session": folder.name, "error": str(error)}, problem=f"{folder}: {error}")
    row: dict[str, object] = {
        "session": session.session_name,
        "runs": len(workflows),
        "still running": len(running),
        "not launched": len(unlaunched),
        "failed": len(result.problems) if result else sum(map(_has_failed, workflows)),
        "flow run": "" if outlook == "over" else outlook,
    }
    return _Passed(row=row, result=result)


def _has_failed(workflow: Workflow) -> bool:
    return workflow.status.is_terminal and not workflow.status.is_success


def _summary(result: SessionResult, outcomes: Sequence[Outcome]) -> str:
    session = result.session
    rows = [
        f"| {inline(one.workflow.name)} | {inline(one.workflow.identifier)} | {inline(one.status.value)} "
        f"| {one.succeeded_jobs} of {one.jobs} | {len(result.files.get(one.workflow.identifier, ()))} "
        f"| {inline('; '.join(one.problems))} |"
        for one in outcomes
    ]
    return "\n".join(
        [
            f"# {inline(session.session_name)}",
            "",
            f"Pipeline **{inline(session.pipeline_id)}**, outputs in {inline_code(session.output_dir)}."
            + (
                f" On Girder they are in {inline_code(session.girder_output_dir)}." if session.girder_output_dir else ""
            ),
            "",
            "| run | execution | status | jobs | local files | problems |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            _whereabouts(result),
        ]
    )


def _whereabouts(result: SessionResult) -> str:
    if result.is_finished:
        return "Its folders were removed from the platform."
    still = f"Its folders are still on the platform, in {inline_code(result.session.vip_dir)}"
    if not result.left_to:
        return f"{still}."
    others = inline(", ".join(result.left_to))
    return (
        f"{still}, because other runs of this session name need them: {others}. The outputs of the runs above were "
        "removed as far as they were to be; who ends last removes the rest."
    )
