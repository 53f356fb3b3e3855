"""Tasks of vantage6: one remote effect each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from pydantic import BaseModel, ConfigDict, JsonValue

from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, DeadlineExceeded, LedgerError, NotFoundError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.texts import code_block, lines
from prefect_biomed.clients.vantage6 import (
    DEFAULT_POLLING,
    SPILL_BYTES,
    Collaboration,
    Column,
    Dataframe,
    DataframeDescription,
    DataframeSpec,
    Function,
    Look,
    Node,
    NodeDatabase,
    OfflineNodes,
    Organization,
    OrganizationSpec,
    Record,
    Result,
    Run,
    Session,
    SessionScope,
    Task,
    TaskOutcome,
    TaskRequest,
    User,
    UserSpec,
    Vantage6Client,
    add_preprocessing,
    description_of,
    fetch_results,
    launch,
    make_collaboration,
    make_dataframe,
    make_node,
    make_organization,
    make_session,
    make_user,
    outcome_of,
    outcomes_so_far,
    polling_for,
    resource_named,
    rows_of,
    task_failed,
    tasks_failed,
    watch,
    write_analysis_crate,
)
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
from prefect_biomed.tasks.policies import ONCE, RETRY, PlaceOfCall, circumstances, lasting_folder, token_of_call
from prefect_biomed.tasks.run_names import task_run_named

__all__ = [
    "Told",
    "create_collaboration",
    "create_dataframe",
    "create_organization",
    "create_session",
    "create_task",
    "create_user",
    "delete_dataframe",
    "delete_session",
    "describe_dataframe",
    "get_results",
    "kill_task",
    "list_resources",
    "preprocess_dataframe",
    "register_node",
    "wait_for_results",
    "write_crate",
]

_KILLED_WITHIN_SECONDS = 120.0
# Larger results would make a table that nobody reads.
_SHOWN_BYTES = 400
_MAX_PLACES = 20


@task(
    task_run_name=task_run_named("Create task", "request"),
    **(ONCE | {"cache_policy": ONCE["cache_policy"] + PlaceOfCall()}),
)
def create_task(
    credentials: Vantage6Credentials,
    request: TaskRequest,
    offline_nodes: OfflineNodes = "warn",
    waiting_seconds: float | None = None,
    settle_seconds: float | None = None,
    repetition: int = 1,
    token: str | None = None,
) -> Task:
    """Create a task, once and never twice.

    Safe to repeat: the token in its name is looked for first, and only when no task carries it, all checks are made and
    the task is sent (`POST task`). A lost answer is settled by looking again. Equal calls in one flow run are counted,
    so each is a task of its own; where Prefect cannot count them, give each another `repetition`.

    Args:
        credentials: The account.
        request: Collaboration, organizations, image, method, and all else that says what the task is.
        offline_nodes: With an offline node: `warn` creates the task, `wait` waits for the node, `fail` refuses.
        waiting_seconds: How long to wait for nodes, and for dataframes that are being made; for ever when None.
        settle_seconds: Longest time after which a request whose answer was lost may still take effect; a minute more
            than the limit for a read when None.
        repetition: Number of the run with these same settings, from 1.
        token: Token of the intent; made of the outermost flow run, the place of the running flow under it, these inputs
            and the repetition when None.

    Returns:
        The task, created now or found.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        LaunchInDoubt: It is not known whether it was created; a retry looks first.
        DeadlineExceeded: A node or a dataframe was not there in time; nothing was sent.
        PermissionDeniedError: The role may not create tasks.
        PlatformError: The task was refused.
    """
    waiting = PollSettings(
        interval_seconds=2.0, growth=1.2, max_interval_seconds=30.0, deadline_seconds=waiting_seconds
    )
    token = token or token_of_call(
        json.dumps([request.model_dump(), repetition], sort_keys=True, default=repr), explicit=request.name or None
    )
    with credentials.get_client() as client:
        made = launch(
            client,
            request,
            token,
            offline_nodes=offline_nodes,
            waiting=waiting,
            settle_seconds=settle_seconds,
            circumstances=circumstances("vantage6", "task"),
        )
        url = client.url
    run_logger().info("vantage6 task %d (%s) is %s", made.id, made.name, made.status.value)
    link(artifact_key("vantage6-task", made.id), f"{url}/task/{made.id}", f"vantage6 task {made.id} ({made.name})")
    state_event("vantage6", "task", str(made.id), "created", name=made.name, image=made.image, job_id=made.job_id)
    return made


@task(task_run_name=task_run_named("Wait for results", "tasks"), **RETRY)
def wait_for_results(
    credentials: Vantage6Credentials,
    tasks: Task | int | Sequence[Task | int],
    partial: bool = False,
    timeout_seconds: float | None = None,
    refresh_time: float = DEFAULT_POLLING.interval_seconds,
    max_refresh_time: float = DEFAULT_POLLING.longest_seconds,
    follow_logs: bool = True,
    error_budget: int = 20,
) -> list[TaskOutcome]:
    """Wait until every run of every task has ended, and say what went wrong where.

    Safe to repeat: it only reads, one request for all tasks per look. Two processes may wait at once. What the
    algorithms print appears in this log while they run.

    Args:
        credentials: The account.
        tasks: The tasks, or their ids.
        partial: Whether tasks with failures are returned rather than raised, and so is what there is when
            `timeout_seconds` have passed.
        timeout_seconds: Stop waiting after this time; never when None.
        refresh_time: Seconds between the first looks; it grows to 2 s, and to 2 % of the time waited. Looks at more
            than a hundred tasks are further apart, a minute at 500.
        max_refresh_time: The time between two looks at up to a hundred tasks never grows beyond this.
        follow_logs: Whether to show what the algorithms print, of up to a hundred tasks.
        error_budget: So many looks in a row may fail.

    Returns:
        Each task with its runs and its failures, in the order asked for.

    Raises:
        TaskFailed: Runs ended without success: organization, node, status and last log lines, causes in subtasks first;
            of all tasks that failed.
        TaskGone: A task was deleted.
        DeadlineExceeded: Not all runs have ended in time; the message names their organizations. They go on. With
            `partial` only when no run has ended well.
        PollingFailed: The server could not be reached for long; the tasks go on.
    """
    logger = run_logger()
    given = [tasks] if isinstance(tasks, Task | int) else list(tasks)
    ids = [one.id if isinstance(one, Task) else one for one in given]
    settings = polling_for(
        len(ids),
        refresh_time=refresh_time,
        max_refresh_time=max_refresh_time,
        timeout_seconds=timeout_seconds,
        error_budget=error_budget,
    )
    listed = "-".join(map(str, ids[:10]))
    progress = Progress(artifact_key("vantage6-runs", listed), f"Runs of vantage6 task {listed}")
    shown = Table(
        artifact_key("vantage6-tasks", listed),
        f"vantage6 tasks {listed}",
        state="status",
        usual={"completed", "active", "pending", "initializing", "awaiting"},
    )
    with credentials.get_client() as client:
        look: Look | None = None
        try:
            for look in watch(client, ids, settings, follow_logs=follow_logs):
                _show(look)
                shown.show(_rows(look), last=look.finished)
                runs = [run for state in look.states for run in state.runs]
                progress(sum(run.is_finished for run in runs), max(len(runs), 1))
            outcomes = [outcome_of(client, state) for state in look.states] if look else []
        except DeadlineExceeded as late:
            outcomes = _so_far(client, look, late) if partial and look is not None else []
            if not any(run.status.is_success for outcome in outcomes for run in outcome.runs):
                raise
            logger.warning("What there is of the results is taken: %s", late)
    _report_failures(outcomes)
    failed = [outcome for outcome in outcomes if outcome.is_failure]
    if failed and not partial:
        raise tasks_failed(failed)
    return outcomes


def _show(look: Look) -> None:
    """Say what is new: in the log and in events."""
    logger = run_logger()
    for line in look.log_lines:
        logger.info("[task %d, %s] %s", line.task_id, line.node or line.organization_id, line.text)
    for state in look.changed:
        status = state.task.status.value
        ended = sum(run.is_finished for run in state.runs)
        logger.info(
            "vantage6 task %d is %s%s",
            state.task.id,
            status,
            f", {ended} of {len(state.runs)} runs ended" if state.runs else "",
        )
        state_event("vantage6", "task", str(state.task.id), status.replace(" ", "-"), name=state.task.name)


def _so_far(client: Vantage6Client, look: Look, late: DeadlineExceeded) -> list[TaskOutcome]:
    """Sum up what there is at the deadline."""
    try:
        return outcomes_so_far(client, look)
    except BiomedError as error:
        # The server may be the reason why it is late.
        raise late from error


def _report_failures(outcomes: Sequence[TaskOutcome]) -> None:
    """Say what went wrong, in the log and in artifacts."""
    logger = run_logger()
    for outcome in outcomes:
        if outcome.tolerated:
            told = "\n".join(f"  - {failure}" for failure in outcome.tolerated)
            logger.warning(
                "vantage6 task %d ended well, but not all of its subtasks:\n%s", outcome.task.id, lines(told)
            )
            markdown(
                artifact_key("vantage6-warnings", outcome.task.id),
                f"# Task {outcome.task.id} ended well, but not all of its subtasks\n\n{code_block(told)}\n",
                "What failed in subtasks, and where",
            )
    for error in (task_failed(outcome) for outcome in outcomes if outcome.is_failure):
        logger.error("%s", error)
        markdown(
            artifact_key("vantage6-failures", error.task_id),
            f"# Task {error.task_id}\n\n{code_block(error)}\n",
            "What failed, and where",
        )


@task(task_run_name=task_run_named("Get results", "task"), **RETRY)
def get_results(
    credentials: Vantage6Credentials,
    task: Task | int,
    partial: bool = False,
    output_dir: Path | str | None = None,
    spill_bytes: int = SPILL_BYTES,
    ended: TaskOutcome | None = None,
) -> list[Result]:
    """Fetch the results of a task that has ended: organization names joined, decrypted, JSON decoded.

    Safe to repeat: it only reads (`GET result`, `GET run`, `GET blobstream/{uuid}`).

    Args:
        credentials: The account; its private key reads encrypted results.
        task: The task, or its id. The task that `create_task` gave tells who was asked, also where no run is listed.
        partial: Whether a run without a result is returned with the reason rather than raised.
        output_dir: Folder for results too large for memory; `vantage6_results` in the current folder when None,
            in the home folder for a run of a deployment.
        spill_bytes: Results above this size are written to files.
        ended: What `wait_for_results` gave of the task, so that its runs need not be read again.

    Returns:
        One result for each organization.

    Raises:
        ResultUnavailable: A run has no result; the class says why: empty, expired, foreign, cut short, a pickle.
        DecryptionFailed: The private key is missing or another one, or the result is damaged.
        TaskGone: The task was deleted.
    """
    task_id, asked = (task.id, task.asked) if isinstance(task, Task) else (task, ())
    folder = Path(output_dir or lasting_folder() / "vantage6_results").expanduser().absolute()
    with credentials.get_client() as client:
        results = fetch_results(
            client, task_id, output_dir=folder, partial=partial, spill_bytes=spill_bytes, asked=asked, ended=ended
        )
    logger = run_logger()
    logger.info("%d results of vantage6 task %d", len(results), task_id)
    table(
        artifact_key("vantage6-results", task_id),
        [
            {
                "organization": result.organization,
                "value": _shown(result),
                "format": result.format or "",
                "bytes": result.size_bytes,
                "file": str(result.path or ""),
                "unavailable": result.unavailable or "",
            }
            for result in results
        ],
        f"Results of vantage6 task {task_id}",
    )
    return results


class Told(BaseModel):
    """What the provenance of results tells of the flow that had them computed.

    Attributes:
        flow: Its name.
        parameters: What was given to it, without credentials.
    """

    model_config = ConfigDict(frozen=True)

    flow: str
    parameters: dict[str, JsonValue]


@task(task_run_name="Write crate", **RETRY)
def write_crate(
    credentials: Vantage6Credentials,
    outcome: TaskOutcome,
    results: Sequence[Result],
    output_dir: Path,
    told: Told,
) -> Path | None:
    """Write the results of a task into files, and their provenance as an RO-Crate beside them.

    Safe to repeat: the same task and results give the same bytes. Nothing is asked but the version (`GET /version`).

    Args:
        credentials: The account.
        outcome: The task that has ended.
        results: Its results.
        output_dir: Folder of this analysis.
        told: What it tells of the flow.

    Returns:
        `ro-crate-metadata.json`; None, with a warning, where the folder has the crate of another analysis.

    Raises:
        LocalStorageError: The folder cannot be written.
    """
    folder = output_dir.expanduser().absolute()
    with credentials.get_client() as client:
        url, version = client.url, client.version.text
    try:
        path = write_analysis_crate(
            folder, url, outcome, results, flow=told.flow, parameters=told.parameters, version=version
        )
    except LedgerError as error:
        run_logger().warning("%s", error)
        return None
    run_logger().info("How the results came about is in %s", path)
    return path


@task(task_run_name=task_run_named("Kill", "task"), **RETRY)
def kill_task(
    credentials: Vantage6Credentials, task: Task | int, timeout_seconds: float = _KILLED_WITHIN_SECONDS
) -> TaskOutcome:
    """Kill a task and its subtasks, and wait until its runs have ended.

    Safe to repeat: what has ended is left alone (`POST kill/task`).

    Args:
        credentials: The account; its role must be allowed to kill, which Researcher is not.
        task: The task, or its id.
        timeout_seconds: How long to wait for the runs to end.

    Returns:
        The task after it.

    Raises:
        CancelNotPermitted: The role does not allow it; the task goes on.
        DeadlineExceeded: Some run has not ended in time.
        TaskGone: The task was deleted.
    """
    task_id = task.id if isinstance(task, Task) else task
    settings = PollSettings(
        interval_seconds=0.5, growth=1.2, max_interval_seconds=5.0, deadline_seconds=timeout_seconds
    )
    with credentials.get_client() as client:
        if not client.kill_task(task_id):
            run_logger().info("vantage6 task %d had ended already", task_id)
        for look in watch(client, [task_id], settings, follow_logs=False):
            if look.finished:
                state_event("vantage6", "task", str(task_id), "killed")
                return outcome_of(client, look.states[0])
    raise DeadlineExceeded(f"vantage6 task {task_id} has not ended.")


@task(task_run_name=task_run_named("Create session", "name"), **ONCE)
def create_session(
    credentials: Vantage6Credentials,
    collaboration: str | int,
    name: str,
    scope: SessionScope = SessionScope.OWN,
    study: str | int | None = None,
) -> Session:
    """Make a session, or take the one of this name when it is what was asked for (generation 5).

    Safe to repeat: the name, unique in its collaboration, is looked for first (`POST session`).

    Args:
        credentials: The account.
        collaboration: Exact name or id.
        name: Name of the session.
        scope: Who may use it.
        study: Exact name or id of a study.

    Returns:
        The session.

    Raises:
        NameConflict: A session of this name has another scope or study, or is hidden.
        PermissionDeniedError: The role does not allow this scope.
    """
    with credentials.get_client() as client:
        known = circumstances("vantage6", "session")
        session = make_session(client, collaboration, name, scope=scope, study=study, circumstances=known)
    run_logger().info("vantage6 session %s has id %d", session.name, session.id)
    state_event("vantage6", "session", str(session.id), "created", name=session.name)
    return session


@task(task_run_name=task_run_named("Create dataframe", "dataframe"), **RETRY)
def create_dataframe(
    credentials: Vantage6Credentials,
    session: Session | int,
    dataframe: DataframeSpec,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
) -> Dataframe:
    """Have the nodes extract a dataframe, or take the one of this name when it is what was asked for (generation 5).

    Safe to repeat: the name, unique on the whole server, is looked for first (`POST session/{id}/dataframe`). Its
    `last_session_task` is the task to wait for. No result is kept, so that a dataframe whose extraction or step has
    failed is made anew: the old one is deleted before (`DELETE session/dataframe/{id}`).

    Args:
        credentials: The account.
        session: The session, or its id.
        dataframe: Its name, its database, the function that reads it, and what changes it after that: all of this is
            compared. `preprocess_dataframe` carries out each step. With `replace` a different one of this name is
            deleted and made anew.
        organizations: Exact names or ids; all of the session's collaboration or study when None.
        store: Id of the algorithm store that vouches for the image.

    Returns:
        The dataframe, perhaps not ready yet.

    Raises:
        PreflightFailed: All problems found before anything was sent.
        NameConflict: A dataframe of this name is another one, or is in use and cannot be replaced now.
    """
    with credentials.get_client() as client:
        frame = make_dataframe(
            client,
            session.id if isinstance(session, Session) else session,
            dataframe.name,
            label=dataframe.label,
            image=dataframe.extraction.image,
            method=dataframe.extraction.method,
            arguments=dataframe.extraction.arguments,
            preprocessing=dataframe.preprocessing,
            replace=dataframe.replace,
            organizations=organizations,
            store=store,
            circumstances=circumstances("vantage6", "dataframe"),
        )
    run_logger().info("vantage6 dataframe %s has id %d", frame.name, frame.id)
    state_event("vantage6", "dataframe", str(frame.id), "ready" if frame.ready else "created", name=frame.name)
    return frame


@task(task_run_name=task_run_named("Preprocess", "dataframe", "step"), **ONCE)
def preprocess_dataframe(
    credentials: Vantage6Credentials,
    dataframe: Dataframe | int,
    function: Function,
    step: int = 1,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
) -> Task:
    """Have the nodes change a dataframe, once for each step number (generation 5).

    Safe to repeat: a step that is there is not sent again (`POST session/dataframe/{id}/preprocess`).

    Args:
        credentials: The account.
        dataframe: The dataframe, or its id.
        function: What changes it.
        step: Number of the step in the life of the dataframe, from 1.
        organizations: Exact names or ids; all of the session's collaboration or study when None.
        store: Id of the algorithm store that vouches for the image.

    Returns:
        The task of the step, to wait for.

    Raises:
        NameConflict: The step of this number is another one.
        PreflightFailed: All problems found before anything was sent.
    """
    dataframe_id = dataframe.id if isinstance(dataframe, Dataframe) else dataframe
    with credentials.get_client() as client:
        made = add_preprocessing(
            client,
            dataframe_id,
            step,
            image=function.image,
            method=function.method,
            arguments=function.arguments,
            organizations=organizations,
            store=store,
            circumstances=circumstances("vantage6", "step"),
        )
    run_logger().info("Step %d of vantage6 dataframe %d is task %d", step, dataframe_id, made.id)
    state_event("vantage6", "task", str(made.id), "created", dataframe=dataframe_id, step=step)
    return made


@task(task_run_name=task_run_named("Describe dataframe", "dataframe"), **RETRY)
def describe_dataframe(credentials: Vantage6Credentials, dataframe: Dataframe | int) -> DataframeDescription:
    """Show how a dataframe came about: its extraction and each step, with image, method, arguments and status.

    Safe to repeat: it only reads (`GET session/dataframe/{id}`, `GET task`, `GET run`). Leaves a table artifact.

    Args:
        credentials: The account; in an encrypted collaboration its private key reads the arguments that were sent to
            its own organization.
        dataframe: The dataframe, or its id.

    Returns:
        The dataframe and its steps. Arguments that cannot be read are None, and it is said why.

    Raises:
        NotFoundError: There is none of this id.
        PermissionDeniedError: The account may not see it.
    """
    with credentials.get_client() as client:
        description = description_of(client, _id_of(dataframe))
    frame = description.dataframe
    table(
        artifact_key("vantage6-dataframe", frame.id),
        [
            {
                "step": step.number or f"extraction from {frame.db_label}",
                "method": step.method,
                "arguments": step.arguments_hidden or json.dumps(step.arguments),
                "image": step.image,
                "status": step.status.value,
                "task": step.task_id,
                "organizations": ", ".join(step.organizations),
            }
            for step in description.steps
        ],
        f"How the vantage6 dataframe {frame.name} (id {frame.id}) came about",
    )
    return description


@task(task_run_name=task_run_named("Delete dataframe", "dataframe"), **RETRY)
def delete_dataframe(credentials: Vantage6Credentials, dataframe: Dataframe | int) -> None:
    """Delete a dataframe on the server and at the nodes; its name can be used again.

    Safe to repeat: one that an earlier attempt of this call has deleted is left alone. Tasks and results that were
    computed on it stay (`DELETE session/dataframe/{id}`).

    Args:
        credentials: The account.
        dataframe: The dataframe, or its id.

    Raises:
        NotFoundError: There is none of this id.
        PermissionDeniedError: The account may not delete it.
    """
    _delete(credentials, Dataframe, _id_of(dataframe))


@task(task_run_name=task_run_named("Delete session", "session"), **RETRY)
def delete_session(credentials: Vantage6Credentials, session: Session | int, delete_dependents: bool = False) -> None:
    """Delete a session; its name can be used again.

    Safe to repeat: one that an earlier attempt of this call has deleted is left alone (`DELETE session/{id}`).

    Args:
        credentials: The account.
        session: The session, or its id.
        delete_dependents: Whether its dataframes, its tasks and their results are deleted too.

    Raises:
        NotFoundError: There is none of this id.
        RequestRefused: It holds dataframes or tasks, and `delete_dependents` is False.
        PermissionDeniedError: The account may not delete it.
    """
    _delete(credentials, Session, _id_of(session), delete_dependents=delete_dependents)


def _delete(
    credentials: Vantage6Credentials, kind: type[Record], object_id: int, *, delete_dependents: bool = False
) -> None:
    logger = run_logger()
    with credentials.get_client() as client:
        try:
            client.delete(kind, object_id, delete_dependents=delete_dependents)
        except NotFoundError:
            if circumstances("vantage6", kind.resource).attempted_since is None:
                raise
            logger.info("An earlier attempt has deleted %s %d", kind.resource, object_id)
    logger.info("Deleted vantage6 %s %d", kind.resource, object_id)
    state_event("vantage6", kind.resource.rpartition("/")[2], str(object_id), "deleted")


def _id_of(given: Record | int) -> int:
    return given.id if isinstance(given, Record) else given


@task(task_run_name=task_run_named("Create organization", "organization"), **ONCE)
def create_organization(
    credentials: Vantage6Credentials,
    organization: OrganizationSpec,
    configuration_dir: Path | str,
    encrypted: bool = True,
) -> Organization:
    """Make an organization with a key pair of 4096 bits, or take the one of this name.

    Safe to repeat: the name is looked for first, and keys that exist are never replaced (`POST organization`).

    Args:
        credentials: An account that may make organizations.
        organization: The organization.
        configuration_dir: Folder whose sub-folder for the organization gets the private key, in a file of mode 0600.
        encrypted: Whether it needs a key pair.

    Returns:
        The organization.

    Raises:
        KeyMismatch: The server has another public key than the folder. Neither was changed.
        PermissionDeniedError: The role does not allow it.
    """
    with credentials.get_client() as client:
        made = make_organization(
            client, organization, Path(configuration_dir).expanduser().absolute(), encrypted=encrypted
        )
    run_logger().info("vantage6 organization %s has id %d", made.name, made.id)
    return made


@task(task_run_name=task_run_named("Create collaboration", "name"), **RETRY)
def create_collaboration(
    credentials: Vantage6Credentials, name: str, organizations: Sequence[Organization | int], encrypted: bool = True
) -> Collaboration:
    """Make a collaboration, or take the one of this name and add the members it lacks.

    Safe to repeat: the name is looked for first (`POST collaboration`, `POST collaboration/{id}/organization`).

    Args:
        credentials: An account that may make collaborations.
        name: Name of the collaboration.
        organizations: Its members, or their ids.
        encrypted: Whether inputs and results are encrypted.

    Returns:
        The collaboration with its members.

    Raises:
        NameConflict: The one of this name differs in encryption.
        PermissionDeniedError: The role does not allow it.
    """
    ids = [one.id if isinstance(one, Organization) else one for one in organizations]
    with credentials.get_client() as client:
        made = make_collaboration(client, name, ids, encrypted=encrypted)
    run_logger().info("vantage6 collaboration %s has id %d", made.name, made.id)
    return made


@task(task_run_name=task_run_named("Register node", "organization"), **RETRY)
def register_node(
    credentials: Vantage6Credentials,
    collaboration: Collaboration,
    organization: Organization,
    configuration_dir: Path | str,
    databases: Sequence[NodeDatabase] = (),
) -> Node:
    """Register the node of an organization and write its configuration with the API key to a file of mode 0600.

    Safe to repeat: a node that is registered stays as it is, and so does its file (`POST node`).

    Args:
        credentials: An account that may register nodes.
        collaboration: The collaboration.
        organization: The organization.
        configuration_dir: Folder whose sub-folder for the organization gets `<collaboration>.yaml`.
        databases: What the node serves.

    Returns:
        The node. Its API key is in the file only.

    Raises:
        PermissionDeniedError: The role does not allow it.
    """
    with credentials.get_client() as client:
        node = make_node(
            client,
            collaboration,
            organization,
            Path(configuration_dir).expanduser().absolute(),
            databases=databases,
            auth_url=credentials.auth_url,
            realm=credentials.realm,
        )
    run_logger().info("vantage6 node %s has id %d", node.name, node.id)
    return node


@task(task_run_name=task_run_named("Create user", "user.username"), **RETRY)
def create_user(
    credentials: Vantage6Credentials, user: UserSpec, organization: Organization, configuration_dir: Path | str
) -> User:
    """Make a user with a made-up password, or a service account, or take the one of this name.

    Safe to repeat: the name is looked for first, and passwords that exist are never changed (`POST user`).

    Args:
        credentials: An account that may make users.
        user: The user.
        organization: Its organization.
        configuration_dir: Folder whose sub-folder for the organization gets `users/<username>.yaml`, of mode 0600.

    Returns:
        The user. Password and secret are in the file only.

    Raises:
        NameConflict: The user is in another organization, or a service account whose secret is not in the folder.
        NotFoundError: There is no role of a name; the message lists those there are.
        PermissionDeniedError: The role does not allow it.
    """
    with credentials.get_client() as client:
        made = make_user(client, user, organization, Path(configuration_dir).expanduser().absolute())
    run_logger().info("vantage6 user %s has id %d", made.username, made.id)
    return made


@task(task_run_name=task_run_named("List", "resource"), **RETRY)
def list_resources(
    credentials: Vantage6Credentials,
    resource: str,
    filters: dict[str, Any] | None = None,
    include: Sequence[str] = (),
    limit: int | None = None,
    fields: Sequence[str] | None = None,
) -> list[Record | Column | dict[str, JsonValue]]:
    """List what is on the server, all pages of it.

    Safe to repeat: it only reads.

    Args:
        credentials: The account.
        resource: `organization`, `collaboration`, `study`, `node`, `user`, `role`, `rule`, `task`, `run`, `result`,
            `session`, `dataframe`, `column` or `algorithmstore`.
        filters: Such as `{"collaboration_id": 1}`; texts take the wildcards `%` and `_`. Columns need `dataframe_id` on
            generation 5, `label` and `collaboration_id` on generation 4. The names of the official client do as well.
        include: Related objects to include, such as `["organizations"]` of a collaboration.
        limit: Stop after so many, at least one.
        fields: Names of attributes, such as `["id", "name"]`; each object is a mapping of these only.

    Returns:
        The objects. Secrets in them are hidden.

    Raises:
        ConfigurationError: There is no such resource, filter or field; the message lists those there are.
        PermissionDeniedError: The role may not see them.
    """
    found: list[Record | Column | dict[str, JsonValue]]
    with credentials.get_client() as client:
        if resource == Column.resource:
            columns = _columns(client, filters or {}, limit)
            found = list(columns if fields is None else rows_of(Column, columns, fields))
        else:
            model = resource_named(resource).model
            asked: dict[str, Any] = {"include": include, "limit": limit, **(filters or {})}
            found = list(
                client.records(model, **asked) if fields is None else client.records(model, fields=fields, **asked)
            )
    run_logger().info("%d of resource %s", len(found), resource)
    return found


def _columns(client: Vantage6Client, filters: dict[str, Any], limit: int | None) -> list[Column]:
    known = ("dataframe_id", "label", "collaboration_id", "organization_ids")
    if unknown := [name for name in filters if name not in known]:
        raise ConfigurationError(f"column: there is no filter {unknown[0]!r}. Known: {', '.join(known)}.")
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit is {limit}; leave it out to list all of them.")
    return client.columns(**filters)[:limit]


def _rows(look: Look) -> list[dict[str, object]]:
    return [
        {
            "task": state.task.id,
            "name": state.task.name,
            "status": state.task.status.value,
            "runs": len(state.runs),
            "ended": sum(run.is_finished for run in state.runs),
            "nodes": _places(state.runs),
        }
        for state in look.states
    ]


def _places(runs: Sequence[Run]) -> str:
    if len(runs) > _MAX_PLACES:
        return ", ".join(f"{count} {status}" for status, count in Counter(run.status.value for run in runs).items())
    return ", ".join(f"{run.node_name or run.organization_id}: {run.status.value}" for run in runs)


def _shown(result: Result) -> str:
    """The value of a small result, for a table."""
    if result.format != "json" or result.path is not None or result.size_bytes > _SHOWN_BYTES:
        return ""
    return json.dumps(result.value, ensure_ascii=False)
