"""Launching executions exactly once."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

from prefect_biomed.clients.errors import (
    BiomedError,
    CapacityError,
    ConnectionFailed,
    DeadlineExceeded,
    LaunchInDoubt,
    LedgerError,
    NetworkError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings, sleep
from prefect_biomed.clients.vip.carmin import name_files_by_url
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import GenericVipError
from prefect_biomed.clients.vip.girder_sessions import make_run_folder, note_runs
from prefect_biomed.clients.vip.models import InputValue, VipSession, Workflow, WorkflowStatus
from prefect_biomed.clients.vip.monitoring import find
from prefect_biomed.clients.vip.preflight import preflight
from prefect_biomed.clients.vip.session_file import Launch, SessionFile, SessionRecord

__all__ = ["launch"]

logger = logging.getLogger(__name__)


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
    if client.profile.takes_files_as_urls:
        values = name_files_by_url(values, client.pipeline(session.pipeline_id), client.path_url)
    results_location = location if client.profile.takes_results_location else None
    if results_location is not None and session.girder_output_dir is None:
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
                if client.profile.keeps_refused_launches and isinstance(doubt, PlatformError):
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
