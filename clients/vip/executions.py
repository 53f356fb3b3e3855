"""Launching executions exactly once, watching all of them with one request, killing them, reading their logs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from prefect_biomed.clients.errors import (
    BiomedError,
    CapacityError,
    ConnectionFailed,
    DeadlineExceeded,
    JobFailed,
    LaunchInDoubt,
    LedgerError,
    NetworkError,
    NotFoundError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings, poll, sleep
from prefect_biomed.clients.vip.client import GenericVipError, VipClient
from prefect_biomed.clients.vip.girder import make_run_folder, note_runs
from prefect_biomed.clients.vip.inputs import preflight
from prefect_biomed.clients.vip.models import (
    InputValue,
    Job,
    Scalar,
    VipSession,
    Workflow,
    WorkflowStatus,
)
from prefect_biomed.clients.vip.session_file import Launch, SessionFile, SessionRecord

__all__ = ["WorkflowFailed", "failures", "find", "find_all", "kill", "launch", "monitor"]

logger = logging.getLogger(__name__)

_DETAILS_EVERY_SECONDS = 300.0
_LOG_LINES = 15


class WorkflowFailed(JobFailed):
    """Executions ended without success, or with failed jobs where none was allowed.

    Attributes:
        workflows: The executions that failed.
    """

    def __init__(self, message: str, workflows: Sequence[Workflow] = ()) -> None:
        super().__init__(message)
        self.workflows = tuple(workflows)


def find(client: VipClient, name: str) -> Workflow | None:
    """Look for the execution that carries a name of ours.

    Args:
        client: The account.
        name: Execution name, unique by its token.

    Returns:
        The execution; the oldest where there are several; None when there is none among those VIP lists.
    """
    matches = [workflow for workflow in client.workflows() if workflow.name == name]
    if len(matches) > 1:
        logger.warning("%d executions are named %s; the oldest is taken", len(matches), name)
    return matches[-1] if matches else None


def find_all(client: VipClient, session: VipSession) -> list[Workflow]:
    """Look for all executions of a session, those too whose identifiers were never written down.

    Args:
        client: The account.
        session: The session.

    Returns:
        The executions whose names carry the session and its token, oldest first.
    """
    names = {session.workflow_name(repetition) for repetition in range(1, session.nb_runs + 1)}
    return [workflow for workflow in reversed(client.workflows()) if workflow.name in names]


def list_by_id(client: VipClient) -> dict[str, Workflow]:
    """List the executions of the account.

    Args:
        client: The account.

    Returns:
        Summaries by identifier; empty where the platform cannot list, so that each must be asked for.
    """
    try:
        return {workflow.identifier: workflow for workflow in client.workflows()}
    except UnexpectedResponse as error:
        if client.profile == "vip":
            raise
        logger.debug("%s", error)
        return {}


def launch(
    client: VipClient,
    session: VipSession,
    repetition: int,
    *,
    max_jobs: int = 1000,
    doubt_seconds: float = 120.0,
    capacity: PollSettings | None = None,
    started_by: str | None = None,
) -> Workflow:
    """Launch one repetition, once and never twice.

    The intent is written down, the platform is searched for its name, and only when nothing carries it the launch is
    sent. When the answer is lost, the name is looked for again. Safe to repeat, also after a kill between the launch
    and the writing of its identifier, and on another machine: the name is what counts.

    Args:
        client: The account.
        session: The session; its inputs are on the platform.
        repetition: Number of the run, from 1.
        max_jobs: The platform's limit of jobs in one workflow.
        doubt_seconds: How long to look for an execution whose answer was lost.
        capacity: How to wait while the platform's limit of running executions is reached; for ever when None.
        started_by: What launches it, to be written down with the intent.

    Returns:
        The execution, new or found.

    Raises:
        PreflightFailed: The settings do not fit the pipeline; nothing was sent.
        LaunchInDoubt: The answer was lost and no execution of that name has appeared. Repeating looks again first.
        DeadlineExceeded: No capacity became free in time; nothing was launched.
        PlatformError: The launch was refused.
    """
    with SessionFile(session, client).exclusive(f"launch-{repetition}"):
        workflow = _launch_or_find(client, session, repetition, max_jobs, doubt_seconds, capacity, started_by)
        note_runs(client, session, [workflow])
    return workflow


def _launch_or_find(
    client: VipClient,
    session: VipSession,
    repetition: int,
    max_jobs: int,
    doubt_seconds: float,
    capacity: PollSettings | None,
    started_by: str | None,
) -> Workflow:
    file = SessionFile(session, client)
    name = session.workflow_name(repetition)
    record = file.read()
    known = record.ledger.launches.get(name)
    if known and known.workflow_id:
        return client.workflow(known.workflow_id)
    location = session.run_dir(repetition)
    workflow = find(client, name)
    if workflow is not None:
        logger.info("Run %d is %s already, launched as %s", repetition, workflow.identifier, name)
        client.play(workflow)
    else:
        pinned = _with_files_of_first_run(session, record)
        plan = preflight(client, pinned, max_jobs=max_jobs, inputs_uploaded=True)
        if session.girder_output_dir is not None:
            location = make_run_folder(client, session, repetition)
        with file.edit() as record:
            record.pipeline_id = session.pipeline_id
            if pinned is session:
                record.input_settings = {**session.input_settings, **plan.settings}
            record.ledger.note_girder(session)
            record.ledger.launches[name] = Launch(
                intended=datetime.now(UTC),
                results_location=location,
                girder_inputs=plan.girder_inputs or (known.girder_inputs if known else {}),
                started_by=started_by,
            )
        workflow = _send(client, session, name, location, plan.input_values, doubt_seconds, capacity)
    with file.edit() as record:
        intent = record.ledger.launches.get(name) or Launch(intended=datetime.now(UTC), results_location=location)
        record.ledger.launches[name] = intent.model_copy(update={"workflow_id": workflow.identifier})
        record.note_workflow(workflow)
    return workflow


def _with_files_of_first_run(session: VipSession, record: SessionRecord) -> VipSession:
    """Name the files on Girder that an earlier run of the session got; a folder may hold others by now."""
    for repetition in range(1, session.nb_runs + 1):
        first = record.ledger.launches.get(session.workflow_name(repetition))
        if first is not None and first.girder_inputs:
            return session.model_copy(update={"input_settings": {**session.input_settings, **first.girder_inputs}})
    return session


def _send(
    client: VipClient,
    session: VipSession,
    name: str,
    location: str,
    values: dict[str, InputValue],
    doubt_seconds: float,
    capacity: PollSettings | None,
) -> Workflow:
    if session.pipeline_id is None:
        raise LedgerError(f"Session {session.session_name!r} has no pipeline_id. Give one.")
    if client.profile == "carmin":
        files = {parameter.key for parameter in client.pipeline(session.pipeline_id).inputs if parameter.is_file}
        values = {key: client.path_url(str(value)) if key in files else value for key, value in values.items()}
        results_location = None
    else:
        results_location = location
        if session.girder_output_dir is None:
            client.make_folder(location)
    started = time.monotonic()
    capacity = capacity or PollSettings(interval_seconds=30.0, growth=1.5, max_interval_seconds=300.0)
    pause = capacity.interval_seconds
    while True:
        try:
            return client.launch(
                name=name, pipeline_id=session.pipeline_id, input_values=values, results_location=results_location
            )
        except CapacityError as error:
            waited = time.monotonic() - started
            if capacity.deadline_seconds is not None and waited + pause > capacity.deadline_seconds:
                raise DeadlineExceeded(
                    f"{name} was not launched: after {waited:.0f} s {error} Run this again when executions have ended."
                ) from error
            logger.info("%s is queued: %s", name, error)
            sleep(pause)
            _refresh(client)
            pause = min(pause * capacity.growth, capacity.max_interval_seconds or pause)
        except ConnectionFailed:
            raise
        except (NetworkError, GenericVipError, ServerUnavailable, UnexpectedResponse) as error:
            return _look_for(client, name, error, doubt_seconds)
        except PlatformError as error:
            if (error.status or 0) < 500:
                raise
            return _look_for(client, name, error, doubt_seconds)


def _refresh(client: VipClient) -> None:
    """VIP counts an execution as running until somebody looks at it."""
    try:
        client.workflows()
    except BiomedError as error:
        if not is_transient(error):
            raise
        logger.warning("Look at the running executions failed: %s", error)


def _look_for(client: VipClient, name: str, doubt: BiomedError, seconds: float) -> Workflow:
    """Settle a launch in doubt by looking. An answer that is an error is a refusal once nothing has appeared."""
    logger.warning("The launch of %s is in doubt, looking for it: %s", name, doubt)
    deadline = time.monotonic() + seconds
    pause = 1.0
    looked = False
    while True:
        try:
            workflow = find(client, name)
            looked = True
        except BiomedError as error:
            if not is_transient(error):
                raise
            logger.warning("Look for %s failed: %s", name, error)
        else:
            if workflow is not None and workflow.status != WorkflowStatus.INITIALIZATION_FAILED:
                if client.profile == "carmin" and isinstance(doubt, PlatformError):
                    raise PlatformError(
                        f"The platform refused {name} and left execution {workflow.identifier} behind ({doubt}). "
                        "Correct the settings and start a new session; nothing is repeated.",
                        status=doubt.status,
                        code=doubt.code,
                        url=doubt.url,
                    ) from doubt
                client.play(workflow)
                return workflow
        if time.monotonic() >= deadline:
            break
        sleep(min(pause, max(0.05, deadline - time.monotonic())))
        pause = min(2 * pause, 15.0)
    if looked and isinstance(doubt, GenericVipError):
        raise PlatformError(
            f"{name} was refused: {doubt} Its name did not appear within {seconds:.0f} s. Check pipeline and inputs, "
            "or ask the platform's support whether its engine is enabled.",
            status=doubt.status,
            code=doubt.code,
            url=doubt.url,
        ) from doubt
    raise LaunchInDoubt(
        f"It is not known whether {name} was launched ({doubt}). It did not appear within {seconds:.0f} s. "
        "Run this again: it looks for the name before it launches."
    ) from doubt


def monitor(
    client: VipClient,
    session: VipSession,
    settings: PollSettings,
    *,
    workflow_ids: Sequence[str] | None = None,
    unknown_grace_seconds: float = 900.0,
    kill_at_deadline: bool = False,
) -> Iterator[list[Workflow]]:
    """Watch the executions of a session until all have ended, with one list request per look. Safe to repeat.

    Args:
        client: The account.
        session: The session.
        settings: Interval, deadline and error budget.
        workflow_ids: The executions to watch; when None all of the session whose outputs were not removed, or all
            when all were.
        unknown_grace_seconds: How long the platform may say `Unknown` of one execution.
        kill_at_deadline: Whether executions that still run at the deadline are killed.

    Yields:
        All watched executions after each look; the last time all have ended, with their jobs.

    Raises:
        DeadlineExceeded: Some run still; the message names the jobs that are held.
        PollingFailed: Too many looks in a row failed. The executions go on.
        JobFailed: The platform has no trace of an execution for longer than the grace.
    """
    file = SessionFile(session, client)
    record = file.read()
    ids = list(workflow_ids) if workflow_ids is not None else record.workflow_ids() or list(record.workflows)
    if not ids:
        raise LedgerError(f"Session {session.session_name!r} has no executions to watch. Launch it first.")
    states: dict[str, Workflow] = {}
    detailed_at: dict[str, float] = {}
    unknown_since: dict[str, float] = {}

    def look() -> list[Workflow]:
        listed = list_by_id(client)
        now = time.monotonic()
        for identifier in ids:
            old = states.get(identifier)
            if old is not None and old.status.is_terminal:
                continue
            new = listed.get(identifier)
            stale = now - detailed_at.get(identifier, now) > _DETAILS_EVERY_SECONDS
            if new is None or old is None or new.status != old.status or stale:
                new = _details(client, identifier, record)
                detailed_at[identifier] = now
            elif new.status == old.status:
                new = old
            states[identifier] = new
            if new.status != WorkflowStatus.UNKNOWN:
                unknown_since.pop(identifier, None)
            elif now - unknown_since.setdefault(identifier, now) > unknown_grace_seconds:
                raise JobFailed(
                    f"The platform has no trace of {identifier} for {unknown_grace_seconds:.0f} s. Look at it on the "
                    "portal; vip_resume takes the session up again."
                )
        return [states[identifier] for identifier in ids]

    known: dict[str, WorkflowStatus] = {}
    take_up = f"vip_resume with session_name={session.session_name!r} takes it up again."
    try:
        for workflows in poll(look, settings, what=f"Session {session.session_name!r}", take_up_again=take_up):
            changed = [workflow for workflow in workflows if known.get(workflow.identifier) != workflow.status]
            if changed:
                with file.edit() as record:
                    for workflow in changed:
                        record.note_workflow(workflow)
                known.update({workflow.identifier: workflow.status for workflow in changed})
            ended = all(workflow.status.is_terminal for workflow in workflows)
            if ended or any(workflow.status.is_terminal for workflow in changed):
                # What Girder says stays; so at the end it has to be right.
                note_runs(client, session, workflows, strict=ended)
            yield workflows
            if ended:
                return
    except DeadlineExceeded as error:
        open_ids = [i for i in ids if i not in states or not states[i].status.is_terminal]
        running = [client.workflow(identifier) for identifier in open_ids]
        held = "; ".join(f"{w.identifier} {_jobs_in_words(w.failed_jobs)}" for w in running if w.failed_jobs)
        told = f" Held in error: {held}." if held else ""
        if not kill_at_deadline:
            raise DeadlineExceeded(f"{error}{told}") from error
        kill(client, [workflow.identifier for workflow in running])
        left = [client.workflow(identifier) for identifier in ids]
        with file.edit() as record:
            for workflow in left:
                record.note_workflow(workflow)
        note_runs(client, session, left)
        killed = ", ".join(workflow.identifier for workflow in running)
        raise DeadlineExceeded(
            f"Session {session.session_name!r} did not end within {settings.deadline_seconds:.0f} s. Killed: {killed}."
            f"{told} What had finished can be downloaded."
        ) from error


def _details(client: VipClient, identifier: str, record: SessionRecord) -> Workflow:
    try:
        return client.workflow(identifier)
    except NotFoundError:
        known = record.workflows.get(identifier)
        if known is None or known.status != WorkflowStatus.REMOVED:
            raise
        return Workflow(identifier=identifier, status=WorkflowStatus.REMOVED)


def kill(client: VipClient, workflow_ids: Iterable[str], *, timeout_seconds: float = 300.0) -> list[Workflow]:
    """Kill executions that still run and wait until they are killed. Safe to repeat; ended ones are left alone.

    Args:
        client: The account.
        workflow_ids: The executions.
        timeout_seconds: How long to wait for all of them.

    Returns:
        All executions after it.

    Raises:
        DeadlineExceeded: Some are still running.
    """
    ids = list(workflow_ids)
    for identifier in ids:
        client.kill(identifier)
    states: dict[str, Workflow] = {}

    def look() -> list[str]:
        for identifier in ids:
            if identifier not in states or not states[identifier].status.is_terminal:
                states[identifier] = client.workflow(identifier)
        return [identifier for identifier in ids if not states[identifier].status.is_terminal]

    settings = PollSettings(
        interval_seconds=1.0, growth=1.5, max_interval_seconds=15.0, deadline_seconds=timeout_seconds
    )
    for running in poll(look, settings, what=f"Kill of {', '.join(ids)}", take_up_again="Kill them again."):
        if not running:
            break
    return [states[identifier] for identifier in ids]


def failures(
    client: VipClient, session: VipSession, workflows: Iterable[Workflow], *, strict: bool = False
) -> tuple[list[str], list[Workflow]]:
    """Say in words what went wrong in executions that have ended.

    Args:
        client: The account.
        session: The session, whose lists tell the inputs of a job.
        workflows: Executions that have ended, with their jobs.
        strict: Whether an execution of which some jobs failed counts as failed.

    Returns:
        One text for each execution with failed jobs or without success, with exit codes, messages, failing inputs and
        the last lines of the logs; and the executions that count as failed. Where the platform calls every end
        Finished, one that lacks outputs the pipeline always has counts as failed, too.
    """
    values = SessionFile(session, client).read().input_settings or {}
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) > 1}
    due = _outputs_due(client, session)
    texts: list[str] = []
    failed: list[Workflow] = []
    for workflow in workflows:
        succeeded = workflow.status.is_success and len(workflow.outputs) >= due
        if succeeded and not workflow.failed_jobs:
            continue
        if strict or not succeeded:
            failed.append(workflow)
        count = (
            f"{len(workflow.jobs) - len(workflow.failed_jobs)} of {len(workflow.jobs)} jobs"
            if client.profile == "vip"
            else f"{len(workflow.outputs)} of at least {due} outputs"
        )
        lines = [f"{workflow.identifier} ({workflow.name}) {workflow.status.value}, {count}"]
        for job in workflow.failed_jobs or (None,):
            lines += _job_lines(client, workflow, job, lists)
        texts.append("\n".join(lines))
    return texts, failed


def _outputs_due(client: VipClient, session: VipSession) -> int:
    """How many outputs an execution has at least; 0 on VIP, which knows whether a job succeeded."""
    if client.profile == "vip" or session.pipeline_id is None:
        return 0
    parameters = client.pipeline(session.pipeline_id).parameters
    return sum(parameter.is_returned_value and not parameter.is_optional for parameter in parameters)


def _job_lines(
    client: VipClient, workflow: Workflow, job: Job | None, lists: Mapping[str, Sequence[Scalar | None]]
) -> list[str]:
    logs = {}
    for stream in ("stderr", "stdout"):
        try:
            logs[stream] = client.log(workflow.identifier, stream=stream, job=job.id if job else None)
        except (NotFoundError, PlatformError, NetworkError) as error:
            logs[stream] = f"(no {stream}: {error})"
    inputs = _inputs_in(logs["stdout"] + logs["stderr"], lists)
    lines = [f"  {_jobs_in_words([job])}" + (f", inputs {inputs}" if inputs else "")] if job else []
    for stream, text in logs.items():
        last = [line for line in text.splitlines() if line.strip()][-_LOG_LINES:]
        lines += [f"    {stream}: {line[:300]}" for line in last]
    return lines


def _inputs_in(log: str, lists: Mapping[str, Sequence[Scalar | None]]) -> str:
    """The platform does not say which values a job had; its log, which shows the command, does."""
    found = []
    for name, values in lists.items():
        named = [value for value in values if _names(log, str(value).rpartition("/")[2])]
        if len(named) == 1:
            found.append(f"{name}={named[0]}")
    return ", ".join(found)


def _names(log: str, value: str) -> bool:
    """Whether a log has a value as a whole word: 2, but not 2.0 or 12."""
    return re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w-]|\.\w)", log) is not None


def _jobs_in_words(jobs: Iterable[Job]) -> str:
    return "; ".join(
        f"job {job.id} {job.status.value}"
        + (f", exit code {job.exit_code}" if job.exit_code is not None else "")
        + (f": {job.exit_message}" if job.exit_message else "")
        for job in jobs
    )
