"""Watching all executions of a session with one request, finding and killing them, reading their logs."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from prefect_biomed.clients.diagnosis import Category, Diagnosis, diagnose
from prefect_biomed.clients.errors import (
    BiomedError,
    JobFailed,
    LaunchInDoubt,
    LedgerError,
    NetworkError,
    NotFoundError,
    PlatformError,
)
from prefect_biomed.clients.polling import PollSettings, passed, poll
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import DELETED, ListUnavailable
from prefect_biomed.clients.vip.girder_sessions import note_runs
from prefect_biomed.clients.vip.models import (
    Job,
    Scalar,
    VipSession,
    Workflow,
    WorkflowStatus,
)
from prefect_biomed.clients.vip.outcome import Outcome, judge, options_of
from prefect_biomed.clients.vip.session_file import (
    FILE_NAME,
    VIP_HOME,
    SessionFile,
    open_intents,
    open_session,
    sessions_below,
)
from prefect_biomed.clients.vip.session_record import LaunchRecord, SessionRecord

__all__ = [
    "Listing",
    "details",
    "failures",
    "find_all",
    "foresee_kill",
    "is_named_after",
    "kill",
    "kill_intent",
    "kill_session",
    "launches_in_doubt",
    "list_all",
    "monitor",
    "session_on_file",
    "state",
]

logger = logger_of(__name__)

_DETAILS_EVERY_SECONDS = 300.0
_LOG_LINES = 15
_KILL_SECONDS = 300.0
# How a job has ended may be written down later than how its run has.
_JOBS_SECONDS = 60.0


@dataclass(frozen=True)
class Listing:
    """Executions of the account, as far as the platform lists them.

    Attributes:
        workflows: Summaries, oldest first.
        gap: Why there may be others that are not listed, in words; None when these are all.
    """

    workflows: tuple[Workflow, ...]
    gap: str | None = None

    @property
    def by_id(self) -> dict[str, Workflow]:
        """The same, by identifier."""
        return {workflow.identifier: workflow for workflow in self.workflows}

    def where(self, is_wanted: Callable[[Workflow], object]) -> Listing:
        """Those of the executions that are wanted; what is not listed is none the better known.

        Args:
            is_wanted: Tells whether one is.

        Returns:
            A part of the list.
        """
        return replace(self, workflows=tuple(filter(is_wanted, self.workflows)))


def list_all(client: VipClient) -> Listing:
    """List the executions of the account (`GET /executions`).

    Args:
        client: The account.

    Returns:
        The list; without executions where the platform cannot list, so that each must be asked for.
    """
    try:
        listed = client.workflows()
    except ListUnavailable as error:
        logger.debug("%s", error)
        return Listing((), str(error))
    is_short = client.is_cut_off(listed)
    gap = f"The platform lists only its {len(listed)} newest executions." if is_short else None
    return Listing(tuple(reversed(listed)), gap)


def find_all(client: VipClient, session: VipSession) -> Listing:
    """Look for all executions of a session, those too whose identifiers were never written down.

    Args:
        client: The account.
        session: The session.

    Returns:
        The executions whose names carry the session and its token; those VIP lists, which are the 500 newest of the
        account, and none where the platform cannot list. Those of the session file are others to ask for.
    """
    own = {session.workflow_name(repetition) for repetition in range(1, session.nb_runs + 1)}
    return list_all(client).where(lambda workflow: workflow.name in own)


def is_named_after(session_name: str, workflow: Workflow) -> bool:
    """Tell whether the name of an execution says that it is a run of a session, whatever its token.

    Args:
        session_name: Name of the session.
        workflow: The execution.

    Returns:
        True for our names of runs, and for that of the session, which vip-client gives to all of its runs.
    """
    return re.fullmatch(rf"{re.escape(session_name)}(-r\d{{3,}}-[0-9a-z]{{4,32}})?", workflow.name) is not None


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

    Where every job has to succeed (`strict`), one that has ended of which the platform does not tell how its jobs have
    is asked for again, for a minute at most.

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
        DeadlineExceeded: Some run still, or the platform could not be asked at the deadline; the message names the jobs
            that are held, what was killed and what could not be.
        PollingFailed: Too many looks in a row failed. The executions go on.
        JobFailed: The platform has no trace of an execution for longer than the grace.
    """
    file = SessionFile(session, client)
    record = file.read()
    ids = list(workflow_ids) if workflow_ids is not None else record.workflow_ids() or list(record.workflows)
    if not ids:
        raise LedgerError(f"Session {session.session_name!r} has no executions to watch. Launch it first.")
    watch = _Watch(client, session, record, ids, unknown_grace_seconds, settings.deadline_seconds)
    noted: dict[str, tuple[WorkflowStatus, int]] = {}
    for workflows in poll(
        watch.look,
        settings,
        done=watch.is_over,
        what=f"Session {session.session_name!r}",
        take_up_again=f"vip_resume with session_name={session.session_name!r} takes it up again.",
        at_deadline=lambda: _end_watch(client, session, watch.open_ids, kill_at_deadline),
    ):
        now = {workflow.identifier: (workflow.status, len(workflow.open_jobs)) for workflow in workflows}
        changed = [workflow for workflow in workflows if noted.get(workflow.identifier) != now[workflow.identifier]]
        noted |= now
        _note(file, changed)
        is_over = watch.is_over(workflows)
        if is_over or any(workflow.status.is_terminal for workflow in changed):
            # What Girder says stays; so at the end it has to be right.
            note_runs(client, session, workflows, strict=is_over)
        yield workflows


def _end_watch(client: VipClient, session: VipSession, open_ids: Sequence[str], kill_them: bool) -> str:
    """Say at the deadline what holds executions up, and kill them when that was asked for."""
    held = _held_in_words(client, open_ids)
    if not kill_them:
        return f"Nothing was stopped remotely.{held}"
    refused = _send_kills(client, open_ids, ())
    sent = [identifier for identifier in open_ids if identifier not in refused]
    said = f"Killed: {', '.join(sent)}." if sent else "Nothing was killed."
    if refused:
        reasons = "; ".join(f"{identifier} ({error})" for identifier, error in refused.items())
        said += f" These could not be killed, kill them by hand: {reasons}."
    try:
        killed = _await_end(client, sent, _KILL_SECONDS)
        _note_killed(client, session, killed)
    except BiomedError as error:
        said += f" It was not seen to take effect: {error}"
    return f"{said}{held} What had finished can be downloaded."


def _held_in_words(client: VipClient, ids: Sequence[str]) -> str:
    held = []
    for identifier in ids:
        try:
            workflow = client.workflow(identifier)
        except BiomedError as error:
            logger.warning("It is not known which jobs of %s are held: %s", identifier, error)
            continue
        if workflow.failed_jobs:
            held.append(f"{identifier} {_jobs_in_words(workflow.failed_jobs)}")
    return f" Held in error: {'; '.join(held)}." if held else ""


def _note(file: SessionFile, workflows: Sequence[Workflow]) -> None:
    if not workflows:
        return
    with file.edit() as record:
        for workflow in workflows:
            record.note_workflow(workflow)


class _Watch:
    """What is known of the watched executions; one list serves all, details are asked for when something changes."""

    def __init__(
        self,
        client: VipClient,
        session: VipSession,
        record: SessionRecord,
        ids: Sequence[str],
        grace_seconds: float,
        deadline_seconds: float | None,
    ) -> None:
        self._client = client
        self._session = session
        self._record = record
        self._ids = ids
        self._grace_seconds = grace_seconds
        self._until = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
        self._unproven_since: dict[str, float] = {}
        self._states: dict[str, Workflow] = {}
        self._detailed_at: dict[str, float] = {}
        self._unknown_since: dict[str, float] = {}

    @property
    def open_ids(self) -> list[str]:
        """The executions that are not known to have ended."""
        return [i for i in self._ids if i not in self._states or not self._states[i].status.is_terminal]

    def look(self) -> list[Workflow]:
        """Look at all of them once."""
        listed = list_all(self._client).by_id
        now = time.monotonic()
        for identifier in self._unproven:
            self._states[identifier] = details(self._client, identifier, self._record)
        for identifier in self.open_ids:
            self._states[identifier] = self._latest(identifier, listed.get(identifier), now)
            self._check_trace(identifier, now)
        for identifier in self._unproven:
            self._unproven_since.setdefault(identifier, now)
        return [self._states[identifier] for identifier in self._ids]

    def is_over(self, workflows: Sequence[Workflow]) -> bool:
        """Tell whether all have ended, and their jobs too as far as that counts and can be had in time."""
        now = time.monotonic()
        if not all(workflow.status.is_terminal for workflow in workflows):
            return False
        waits = any(now - self._unproven_since[identifier] <= _JOBS_SECONDS for identifier in self._unproven)
        return not waits or now >= self._until

    @property
    def _unproven(self) -> list[str]:
        """Those that have succeeded, all jobs of which have to, and of which that is not told."""
        if not self._client.profile.tells_jobs:
            return []
        return [
            identifier
            for identifier, workflow in self._states.items()
            if workflow.status.is_success
            and (workflow.open_jobs or not workflow.jobs)
            and options_of(self._session, self._record, identifier).strict
        ]

    def _latest(self, identifier: str, summary: Workflow | None, now: float) -> Workflow:
        old = self._states.get(identifier)
        fresh = now - self._detailed_at.get(identifier, now) <= _DETAILS_EVERY_SECONDS
        if old is not None and summary is not None and summary.status == old.status and fresh:
            return old
        self._detailed_at[identifier] = now
        return details(self._client, identifier, self._record)

    def _check_trace(self, identifier: str, now: float) -> None:
        if self._states[identifier].status != WorkflowStatus.UNKNOWN:
            self._unknown_since.pop(identifier, None)
        elif now - self._unknown_since.setdefault(identifier, now) > self._grace_seconds:
            raise JobFailed(
                f"The platform has no trace of {identifier} for {self._grace_seconds:.0f} s. Look at it on the portal; "
                "vip_resume takes the session up again."
            )


def details(client: VipClient, identifier: str, record: SessionRecord) -> Workflow:
    """Describe an execution, also one whose record the platform has deleted since it ended.

    Args:
        client: The account.
        identifier: The execution.
        record: What is written down of the session.

    Returns:
        The execution; `Removed` when the platform has forgotten it, and the record tells that it had ended.

    Raises:
        NotFoundError: Neither the platform nor the record knows it.
    """
    try:
        return client.workflow(identifier)
    except NotFoundError:
        known = record.workflows.get(identifier)
        ended = record.ledger.ended.get(identifier)
        if known is None or (ended is None and known.status != WorkflowStatus.REMOVED):
            raise
        # The platform forgets only what has ended.
        return Workflow(identifier=identifier, status=WorkflowStatus.REMOVED)


def kill(
    client: VipClient,
    workflow_ids: Iterable[str],
    *,
    session: VipSession | None = None,
    timeout_seconds: float = _KILL_SECONDS,
) -> list[Workflow]:
    """Kill executions that still run and wait until they are killed. Safe to repeat; ended ones are left alone.

    Args:
        client: The account.
        workflow_ids: The executions.
        session: Theirs, in whose record it is written down how they end; None when there is none.
        timeout_seconds: How long to wait for all of them.

    Returns:
        All executions after it.

    Raises:
        DeadlineExceeded: Some are still running.
        LaunchInDoubt: It is not known whether further ones were launched, so they may run on; these were killed.
        NotFoundError: The platform does not know some of which nobody has seen the end; the others were killed.
        BiomedError: Some could not be killed; the others were.
    """
    ids = list(workflow_ids)
    record = SessionFile(session, client).read() if session else None
    over = record.over if record else frozenset()
    refused = _send_kills(client, ids, over)
    killed = _await_end(client, [identifier for identifier in ids if identifier not in refused], timeout_seconds)
    if session is not None and record is not None:
        _note_killed(client, session, [workflow for workflow in killed if _is_of(record, workflow)])
    for identifier, error in refused.items():
        if isinstance(error, NotFoundError):
            raise _unknown(client, identifier, error) from error
        raise error
    if record is not None and (doubtful := launches_in_doubt(client, record)):
        raise LaunchInDoubt(
            f"It is not known whether {', '.join(doubtful)} was launched, so it may run on. The others were killed. "
            f"Kill the session again in {client.settle_seconds:.0f} s, or look for the name on the portal."
        )
    return killed


def kill_session(
    client: VipClient,
    *,
    session_name: str | None,
    output_dir: Path,
    vip_home: str = VIP_HOME,
    timeout_seconds: float = _KILL_SECONDS,
) -> list[Workflow]:
    """Kill what still runs of a session, by its name or its folder. Safe to repeat; ended ones are left alone.

    Executions come from the session file, each asked for by itself, and from the list of the platform by their names.
    Where there is no session file, neither here nor on the platform, the names alone must do.

    Args:
        client: The account.
        session_name: Name of the session; may be left out when the folder has its session file.
        output_dir: Folder that may hold its `session_data.json`.
        vip_home: Folder on the platform that holds the folders of sessions.
        timeout_seconds: How long to wait for all of them.

    Returns:
        All its executions after it, but those whose outputs were removed.

    Raises:
        LedgerError: There is no session file, and no execution carries the name; or the file is damaged.
        NotFoundError: The platform does not know some of which nobody has seen the end; the others were killed.
        LaunchInDoubt: It is not known whether some were launched; the others were killed.
        DeadlineExceeded: Some are still running.
        BiomedError: Some could not be killed; the others were.
    """
    session, ids, gap = _executions_of(client, session_name, output_dir, vip_home)
    workflows = kill(client, ids, session=session, timeout_seconds=timeout_seconds)
    if session is None and gap is not None:
        logger.warning(
            "There is no session file of %s, so another one of this name may run on. Look on the portal, or give the "
            "folder that holds the session_data.json. (%s)",
            session_name,
            gap,
        )
    return workflows


def _is_of(record: SessionRecord, workflow: Workflow) -> bool:
    """Whether an execution belongs to a session, and not to an earlier one of its name."""
    return workflow.identifier in record.workflows or record.token_of(workflow.name) in record.ledger.intents


def _unknown(client: VipClient, identifier: str, error: PlatformError) -> NotFoundError:
    return NotFoundError(
        f"The platform at {client.url} does not know {identifier}, and nobody has seen it end, so it may run on. Use "
        f"the platform and the account that it was launched with. The others were killed. ({error})",
        status=error.status,
        code=error.code,
        url=error.url,
        spoken=error.spoken,
    )


def _note_killed(client: VipClient, session: VipSession, workflows: Sequence[Workflow]) -> None:
    _note(SessionFile(session, client), workflows)
    note_runs(client, session, workflows)


def launches_in_doubt(client: VipClient, record: SessionRecord) -> list[str]:
    """Name the launches of a session of which nobody knows what has come of them.

    Args:
        client: The account.
        record: What is written down of the session.

    Returns:
        Names of executions that no list has, and that may have been launched or may still be. None where an execution
        does nothing before it is played, which takes its identifier.
    """
    begun = {name: one for name, one in record.ledger.launches.items() if one.workflow_id is None}
    if not begun or client.profile.plays_launches:
        return []
    listed = client.workflows()
    names = {workflow.name for workflow in listed}
    oldest = listed[-1].start_date if client.is_cut_off(listed) else datetime.min.replace(tzinfo=UTC)

    def never_made(one: LaunchRecord) -> bool:
        is_over = passed(one.intended, one.uptime) > client.settle_seconds
        return is_over and oldest is not None and oldest <= (one.since or one.intended)

    return [name for name, one in begun.items() if name not in names and not never_made(one)]


def foresee_kill(
    client: VipClient, *, session_name: str | None, output_dir: Path, vip_home: str = VIP_HOME
) -> list[Workflow]:
    """Tell which executions `kill_session` would kill now. It only reads.

    Args:
        client: The account.
        session_name: As for `kill_session`.
        output_dir: As for `kill_session`.
        vip_home: As for `kill_session`.

    Returns:
        Those that have not ended.

    Raises:
        LedgerError: As for `kill_session`.
        NotFoundError: As for `kill_session`.
    """
    session, ids, _ = _executions_of(client, session_name, output_dir, vip_home)
    over = SessionFile(session, client).read().over if session else ()
    return [found for identifier in ids if not (found := state(client, identifier, over)).status.is_terminal]


def _executions_of(
    client: VipClient, session_name: str | None, output_dir: Path, vip_home: str
) -> tuple[VipSession | None, list[str], str | None]:
    """A session, when there is a record of it; its executions as far as they are known, and why others may not be."""
    session = session_on_file(client, session_name, output_dir, vip_home)
    name = session.session_name if session else session_name or ""
    known = SessionFile(session, client).read().workflow_ids() if session else []
    # Beside a record only what runs: an earlier session of this name may have ended long ago.
    found = list_all(client).where(
        lambda one: is_named_after(name, one) and (session is None or not one.status.is_terminal)
    )
    ids = list(dict.fromkeys([*known, *found.by_id]))
    if session is None and not ids:
        raise LedgerError(
            f"Session {name!r} has no session file in {output_dir} or {vip_home}, and no execution that the platform "
            "lists carries its name. Give the folder that holds its session_data.json, or look on the portal."
        )
    return session, ids, found.gap


def kill_intent(
    client: VipClient, token: str, folders: Iterable[Path], *, session_name: str, vip_home: str = VIP_HOME
) -> tuple[list[str], list[str]]:
    """Kill what still runs of one intent, and do not wait for it. Safe to repeat; ended ones are left alone.

    Executions come from the session files, each asked for by itself, and from the list of the platform by the token in
    their names: neither is complete alone. One that cannot be killed does not spare the others.

    Args:
        client: The account.
        token: The intent.
        folders: Local folders that may be the session's, or hold the folders of its sessions.
        session_name: Name of the session, whose file may be kept on the platform.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        The executions that were told to end; and what may run on, because it could not be looked for or is unknown.

    Raises:
        BiomedError: Some could not be killed; the others were.
    """
    doubts: list[str] = []
    ids: list[str] = []
    over: set[str] = set()
    sessions = _sessions_on_file(client, token, folders, session_name, vip_home, doubts)
    for session in sessions:
        record = SessionFile(session, client).read()
        over |= record.over
        for name, one in record.ledger.launched(token).items():
            if one.workflow_id is None:
                doubts.append(f"It is not written down whether {name} was launched.")
            elif one.workflow_id not in record.workflow_ids(WorkflowStatus.REMOVED):
                ids.append(one.workflow_id)
    listing = list_all(client)
    ids += listing.where(lambda workflow: workflow.name.endswith(f"-{token}")).by_id
    if listing.gap is not None:
        doubts.append(
            f"Of {session_name!r} only what is written down here or listed was killed, {len(set(ids))} runs; others "
            f"may run on. Look on the portal. ({listing.gap})"
        )
    running = [identifier for identifier in dict.fromkeys(ids) if not _has_surely_ended(client, identifier, over)]
    refused = _send_kills(client, running, over)
    doubts += [str(_unknown(client, one, error)) for one, error in refused.items() if isinstance(error, NotFoundError)]
    for refusal in refused.values():
        if not isinstance(refusal, NotFoundError):
            raise refusal
    return [identifier for identifier in running if identifier not in refused], doubts


def _has_surely_ended(client: VipClient, identifier: str, over: Collection[str]) -> bool:
    try:
        return state(client, identifier, over).status.is_terminal
    except BiomedError as error:
        logger.warning("It is not known whether %s runs, so it is killed: %s", identifier, error)
        return False


def _sessions_on_file(
    client: VipClient, token: str, folders: Iterable[Path], session_name: str, vip_home: str, doubts: list[str]
) -> list[VipSession]:
    """The sessions of one intent whose files can be read; of the others it is told what is wrong."""
    found: list[VipSession] = []
    for folder in folders:
        # The sessions of an experiment lie in `series/<token>/<pipeline>`.
        above = [folder, *folder.glob("series/*/")]
        for place in dict.fromkeys([folder, *(below for one in above for below in sessions_below(one))]):
            name = session_name if place == folder else None
            try:
                intents = open_intents(place, session_name=name, client=client, vip_home=vip_home)
            except LedgerError as error:
                if place != folder or os.path.lexists(place / FILE_NAME):
                    doubts.append(str(error))
                continue
            found += [session for session in intents if session.token == token]
    return found


def session_on_file(client: VipClient, session_name: str | None, output_dir: Path, vip_home: str) -> VipSession | None:
    """Open the session of a session file.

    Args:
        client: The account.
        session_name: Name of the session; may be left out when the folder has its session file.
        output_dir: Folder that may hold its `session_data.json`.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        The session; None when there is surely no file.

    Raises:
        LedgerError: The file is damaged, or belongs to another session.
    """
    try:
        return open_session(output_dir, session_name=session_name, client=client, vip_home=vip_home)
    except LedgerError:
        remote = f"{vip_home}/{session_name}/OUTPUTS/{FILE_NAME}"
        if session_name is None or os.path.lexists(output_dir / FILE_NAME) or client.exists(remote):
            raise
        return None


def _send_kills(client: VipClient, ids: Sequence[str], over: Collection[str]) -> dict[str, BiomedError]:
    """Kill executions; one that cannot be killed does not spare the others.

    Args:
        client: The account.
        ids: The executions.
        over: Executions that have ended, as somebody has seen.

    Returns:
        Why some could not be killed, or may run on.
    """
    refused: dict[str, BiomedError] = {}
    for identifier in ids:
        try:
            client.kill(identifier)
        except BiomedError as error:
            if _is_forgotten(error, identifier, over):
                continue
            logger.error("%s could not be killed: %s", identifier, error)
            refused[identifier] = error
    return refused


def state(client: VipClient, identifier: str, over: Collection[str] = ()) -> Workflow:
    """Describe an execution of ours, also one that the platform has forgotten since it ended.

    Args:
        client: The account.
        identifier: Its identifier, as the platform gave it.
        over: Executions that have ended, as somebody has seen.

    Returns:
        The execution; `Removed` when its record was deleted after the end.

    Raises:
        NotFoundError: The platform does not know it, which says nothing of its end: it may be one of another account
            or platform.
    """
    try:
        return client.workflow(identifier)
    except NotFoundError as error:
        if not _is_forgotten(error, identifier, over):
            raise
        return Workflow(identifier=identifier, status=WorkflowStatus.REMOVED)


def _is_forgotten(error: BiomedError, identifier: str, over: Collection[str]) -> bool:
    """Whether an execution that the platform does not know has surely ended, and was deleted since."""
    if not isinstance(error, NotFoundError):
        return False
    return error.code == DELETED or identifier in over


def _await_end(client: VipClient, ids: Sequence[str], timeout_seconds: float) -> list[Workflow]:
    states: dict[str, Workflow] = {}

    def look() -> list[Workflow]:
        for identifier in ids:
            if identifier not in states or not states[identifier].status.is_terminal:
                # The platform knew them all, so one that it has forgotten meanwhile was deleted.
                states[identifier] = state(client, identifier, ids)
        return [states[identifier] for identifier in ids]

    def nothing_runs(workflows: Sequence[Workflow]) -> bool:
        # Where an execution is created and then played, one that nobody has played never runs.
        never = {WorkflowStatus.INITIALIZING} if client.profile.plays_launches else frozenset()
        return all(workflow.status.is_terminal or workflow.status in never for workflow in workflows)

    for _ in poll(
        look,
        PollSettings(1.0, 1.5, 15.0, timeout_seconds),
        done=nothing_runs,
        what=f"Kill of {', '.join(ids)}",
        take_up_again="Kill them again.",
        at_deadline=lambda: "The kill was accepted and may still take effect.",
    ):
        pass
    return [states[identifier] for identifier in ids]


def failures(client: VipClient, session: VipSession, workflows: Iterable[Workflow]) -> tuple[list[str], list[Workflow]]:
    """Say in words what went wrong in executions that have ended.

    Args:
        client: The account.
        session: The session, whose lists tell the inputs of a job, and whose options tell what counts as success.
        workflows: Executions that have ended, with their jobs.

    Returns:
        One text for each execution with failed jobs or without success, with exit codes, messages, failing inputs and
        the last lines of the logs; and the executions that count as failed. See `outcome`.
    """
    values = SessionFile(session, client).read().input_settings or {}
    lists = {name: value for name, value in values.items() if isinstance(value, list) and len(value) > 1}
    outcomes = judge(client, session, list(workflows))
    wrong = [one for one in outcomes if not one.is_success or one.failed_jobs]
    texts = [_in_words(client, one, lists) for one in wrong]
    return texts, [one.workflow for one in outcomes if not one.is_success]


def diagnoses(client: VipClient, session: VipSession, workflows: Iterable[Workflow]) -> dict[str, Diagnosis]:
    """Tell why executions failed, by what `failures` says of them.

    Args:
        client: The account.
        session: The session.
        workflows: Executions that have ended, with their jobs.

    Returns:
        The diagnosis of each that failed, or of which jobs failed, by its identifier.
    """
    wrong = [one for one in judge(client, session, list(workflows)) if not one.is_success or one.failed_jobs]
    return {one.workflow.identifier: diagnose(_in_words(client, one, {})) for one in wrong}


def _in_words(client: VipClient, one: Outcome, lists: Mapping[str, Sequence[Scalar | None]]) -> str:
    workflow = one.workflow
    count = [f"{one.succeeded_jobs} of {one.jobs} jobs"] if client.profile.tells_jobs else []
    told = [one.status.value, *count, *(problem for problem in one.problems if problem != one.status.value)]
    lines = [f"{workflow.identifier} ({workflow.name}) {', '.join(told)}"]
    for job in workflow.failed_jobs or (None,):
        lines += _job_lines(client, workflow, job, lists)
    why = diagnose("\n".join(lines))
    if why.category is not Category.UNKNOWN:
        lines.append(f"  diagnosis: {why}")
    return "\n".join(lines)


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
