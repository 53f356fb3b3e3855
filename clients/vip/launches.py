"""Launching executions exactly once: what VIP and CARMIN platforms bring to the protocol of `clients.once`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect_biomed.clients.errors import BiomedError, LedgerError, PlatformError
from prefect_biomed.clients.once import Circumstances, Foreseen, Intent, IntentFolder, Launch, foresee, once
from prefect_biomed.clients.polling import PollSettings, now
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.carmin import name_files_by_url
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import NO_REASON, GenericVipError, ListUnavailable
from prefect_biomed.clients.vip.girder_sessions import make_run_folder, note_runs
from prefect_biomed.clients.vip.models import InputValue, VipSession, Workflow, WorkflowStatus
from prefect_biomed.clients.vip.preflight import preflight
from prefect_biomed.clients.vip.session_file import LOCKS, SessionFile
from prefect_biomed.clients.vip.session_record import LaunchRecord, SessionRecord
from prefect_biomed.clients.vip.upload import restore_inputs

__all__ = ["foresee_launch", "launch"]

logger = logger_of(__name__)

_QUEUE = PollSettings(interval_seconds=30.0, growth=1.5, max_interval_seconds=300.0)


def launch(
    client: VipClient,
    session: VipSession,
    repetition: int,
    *,
    max_jobs: int = 1000,
    settle_seconds: float | None = None,
    capacity: PollSettings | None = None,
    started_by: str | None = None,
    circumstances: Circumstances | None = None,
) -> Workflow:
    """Launch one repetition, once and never twice (`POST /executions`).

    The intent is written down, the platform is searched for its name, and only when nothing carries it the launch is
    sent. When the answer is lost, the name is looked for again. Safe to repeat, also after a kill at any moment, by two
    processes at once, and on another machine: the name is what counts. A repetition that finds an intent of which
    nobody knows how it ended looks until that request can take effect no more before it sends another one.

    Args:
        client: The account.
        session: The session; its inputs are on the platform.
        repetition: Number of the run, from 1.
        max_jobs: The platform's limit of jobs in one workflow.
        settle_seconds: The longest time after which a launch that was sent may still take effect; that of the client
            when None.
        capacity: How to wait while the platform's limit of running executions is reached; for ever when None.
        started_by: What launches it, to be written down with the intent.
        circumstances: What the caller knows of earlier attempts and of other machines.

    Returns:
        The execution, new or found.

    Raises:
        PreflightFailed: The settings do not fit the pipeline; nothing was sent.
        LaunchInDoubt: The answer was lost and no execution of that name has appeared. Repeating looks again first.
        DeadlineExceeded: No capacity became free in time; nothing was launched.
        SessionLocked: Another process is launching this repetition.
        LedgerError: Something else was launched under the token of the session.
        PlatformError: The launch was refused.
    """
    if session.pipeline_id is None:
        raise LedgerError(f"Session {session.session_name!r} has no pipeline_id. Give one.")
    run = _Run(client, session, session.pipeline_id, repetition, max_jobs, started_by)
    run.refuse_another()
    workflow = _made(run, run.as_launch(settle_seconds), circumstances, capacity or _QUEUE)
    client.play(workflow)
    note_runs(client, session, [workflow])
    return workflow


def foresee_launch(client: VipClient, session: VipSession, repetition: int) -> Foreseen:
    """Tell what `launch` would do now. It only reads (`GET /executions`).

    Args:
        client: The account.
        session: The session.
        repetition: Number of the run, from 1.

    Returns:
        Whether the run would be launched, or which execution is taken for it.

    Raises:
        LedgerError: Something else was launched under the token of the session, or its name belongs to other work.
    """
    if session.pipeline_id is None:
        raise LedgerError(f"Session {session.session_name!r} has no pipeline_id. Give one.")
    run = _Run(client, session, session.pipeline_id, repetition, max_jobs=1, started_by=None)
    run.refuse_another()
    return foresee(run.as_launch(None), run, ended=lambda workflow: workflow.status.is_terminal)


def _made(run: _Run, plan: Launch[Workflow], circumstances: Circumstances | None, capacity: PollSettings) -> Workflow:
    """Make the execution, or say what an answer means after which nothing can be done about it."""
    try:
        workflow = once(plan, run, circumstances, queue=capacity)
    except GenericVipError as error:
        if error is not run.answer:
            raise
        raise PlatformError(
            f"{run.name} was refused: {error} Its name did not appear. Check pipeline and inputs, or ask the "
            "platform's support whether its engine is enabled.",
            status=error.status,
            code=error.code,
            url=error.url,
            spoken=True,
        ) from error
    if run.leaves_behind and isinstance(run.answer, PlatformError) and run.answer.spoken:
        raise PlatformError(
            f"The platform refused {run.name} and left execution {workflow.identifier} behind ({run.answer}). "
            "Correct the settings and start a new session; nothing is repeated.",
            status=run.answer.status,
            code=run.answer.code,
            url=run.answer.url,
            spoken=True,
        ) from run.answer
    return workflow


class _Run:
    """One repetition of a session: how its execution is found and sent, and the intent of it in the session file.

    Attributes:
        name: Name of the execution, and identity of the intent.
        answer: How the last request of this process failed; None when none did.
    """

    def __init__(
        self,
        client: VipClient,
        session: VipSession,
        pipeline_id: str,
        repetition: int,
        max_jobs: int,
        started_by: str | None,
    ) -> None:
        self.name = session.workflow_name(repetition)
        self.answer: BiomedError | None = None
        self._client = client
        self._session = session
        self._pipeline_id = pipeline_id
        self._repetition = repetition
        self._max_jobs = max_jobs
        self._started_by = started_by
        self._file = SessionFile(session, client)
        self._values: dict[str, InputValue] = {}
        self._location: str | None = None
        self._settings: dict[str, InputValue] | None = None
        self._required_outputs: tuple[str, ...] | None = None
        self._seen: dict[str, Workflow] = {}

    @property
    def leaves_behind(self) -> bool:
        """Whether an error of the platform's own can leave an execution behind, which is not what was wanted."""
        return self._client.profile.keeps_refused_launches

    def as_launch(self, settle_seconds: float | None) -> Launch[Workflow]:
        """Say to the protocol how the execution is found, checked and sent."""
        return Launch(
            what=self.name,
            token=self.name,
            settle_seconds=self._client.settle_seconds if settle_seconds is None else settle_seconds,
            find=self.find,
            prepare=self.prepare,
            send=self.send,
            get=self.get,
            identify=lambda workflow: workflow.identifier,
            end=lambda workflow: self._client.kill(workflow.identifier),
            says_no=lambda error: error.code != NO_REASON,
        )

    def refuse_another(self) -> None:
        """Make sure that the token of the session stands for what is to be launched."""
        self._file.read().refuse_another(self._session)

    # -- the execution -------------------------------------------------------------------------------------------------

    def find(self, intent: Intent) -> list[Workflow]:
        """Look for executions of this name, oldest first.

        Raises:
            LedgerError: The name is that of other work, so nothing may be adopted and nothing sent.
        """
        try:
            listed = self._client.workflows()
        except ListUnavailable as error:
            # Where an execution starts only when it is played, one whose identifier is not known does nothing.
            logger.debug("%s is not looked for: %s", self.name, error)
            return []
        self._check_reach(listed, intent)
        # One that failed before it began was refused, and never runs.
        failed = WorkflowStatus.INITIALIZATION_FAILED
        named = [one for one in reversed(listed) if one.name == self.name and one.status != failed]
        for workflow in named:
            if workflow.pipeline_identifier not in {"", self._pipeline_id}:
                raise LedgerError(
                    f"{self.name} is there as {workflow.identifier} and runs {workflow.pipeline_identifier}, not "
                    f"{self._pipeline_id}: its session name or key belongs to other work. Give another one."
                )
        return [self._noticed(workflow) for workflow in named]

    def get(self, identifier: str) -> Workflow:
        """Describe the execution."""
        return self._client.workflow(identifier)

    def prepare(self, intent: Intent) -> dict[str, Any]:
        """Check the settings against the pipeline and make the folder of the results."""
        client, session = self._client, self._session
        record = self._file.read()
        record.refuse_incomplete_inputs(session)
        if (trusted := restore_inputs(client, session).trusted) and self._repetition == 1:
            logger.warning("%s: %s", session.session_name, trusted)
        pinned = _with_files_of_first_run(session, record)
        plan = preflight(client, pinned, max_jobs=self._max_jobs, inputs_uploaded=True)
        if pinned is session:
            self._settings = {**session.input_settings, **plan.settings}
        self._values = plan.input_values
        self._required_outputs = plan.required_outputs
        if client.profile.takes_files_as_urls:
            self._values = name_files_by_url(self._values, client.pipeline(self._pipeline_id), client.path_url)
        location = session.run_dir(self._repetition)
        if session.girder_output_dir is not None:
            location = make_run_folder(client, session, self._repetition)
        elif client.profile.takes_results_location:
            client.make_folder(location)
        self._location = location if client.profile.takes_results_location else None
        asked = {"results_location": location, "girder_inputs": plan.girder_inputs, "started_by": self._started_by}
        return {**intent.asked, **{key: value for key, value in asked.items() if value}}

    def send(self) -> Workflow:
        """Send the launch that was prepared."""
        self.answer = None
        try:
            workflow = self._client.launch(
                name=self.name,
                pipeline_id=self._pipeline_id,
                input_values=self._values,
                results_location=self._location,
            )
        except BiomedError as error:
            self.answer = error
            raise
        return self._noticed(workflow)

    def _noticed(self, workflow: Workflow) -> Workflow:
        self._seen[workflow.identifier] = workflow
        return workflow

    def _check_reach(self, listed: Sequence[Workflow], intent: Intent) -> None:
        """Refuse to take an execution for missing when the list does not go back to when it would have begun."""
        since = intent.since or intent.intended_at
        if since is None or not self._client.is_cut_off(listed):
            return
        oldest = listed[-1].start_date
        if oldest is None or oldest > since:
            raise LedgerError(
                f"It is not known whether {self.name} was launched on {since:%Y-%m-%d %H:%M} UTC: the "
                f"platform lists only its {len(listed)} newest executions, and all of them began later. Look for the "
                "name on the portal. When it is not there, start a new session."
            )

    # -- the intent in the session file --------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self, token: str, seconds: float) -> Iterator[None]:
        """Keep other processes from launching this repetition."""
        with self._file.exclusive(f"launch-{self._repetition}", seconds):
            yield

    def read(self, token: str) -> Intent | None:
        """Read the intent."""
        ledger = self._file.read().ledger
        known = ledger.launches.get(token)
        if known is None and self._session.backup is None:
            # Where earlier releases kept it.
            before = IntentFolder(self._session.output_dir / LOCKS / "intents").read(token)
            return before or (Intent(token=token) if token in ledger.begun else None)
        if known is None:
            return Intent(token=token) if token in ledger.begun else None
        asked = known.model_dump(mode="json", include=_ASKED)
        return Intent(
            token=token,
            intended_at=known.intended,
            uptime=known.uptime,
            since=known.since,
            id=known.workflow_id,
            origin=known.origin,
            asked=asked,
        )

    def write(self, intent: Intent) -> None:
        """Write the intent down."""
        with self._file.edit() as record:
            ledger = record.ledger
            if intent.token not in ledger.begun:
                ledger.begun.append(intent.token)
            if intent.id is None and intent.intended_at is None:
                ledger.launches.pop(intent.token, None)
                return
            ledger.launches[intent.token] = LaunchRecord.model_validate(
                {
                    "results_location": self._session.run_dir(self._repetition),
                    **intent.asked,
                    "intended": intent.intended_at or now(),
                    "uptime": intent.uptime,
                    "since": intent.since,
                    "workflow_id": intent.id,
                    "origin": intent.origin,
                }
            )
            if intent.id in self._seen:
                record.note_workflow(self._seen[intent.id])
            if intent.is_in_doubt:
                noted = record.note_intent(self._session, self._settings)
                noted.required_outputs = self._required_outputs or noted.required_outputs


_ASKED = {"results_location", "girder_inputs", "started_by"}


def _with_files_of_first_run(session: VipSession, record: SessionRecord) -> VipSession:
    """Name the files on Girder that an earlier run of the session got; a folder may hold others by now."""
    for repetition in range(1, session.nb_runs + 1):
        first = record.ledger.launches.get(session.workflow_name(repetition))
        if first is not None and first.girder_inputs:
            return session.model_copy(update={"input_settings": {**session.input_settings, **first.girder_inputs}})
    return session
