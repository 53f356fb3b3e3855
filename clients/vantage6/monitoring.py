"""Watching tasks until every run has ended, and finding out what went wrong where."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from prefect_biomed.clients.diagnosis import Category, diagnose
from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    NotFoundError,
    PermissionDeniedError,
    PollingFailed,
)
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6._long_json import TooLarge
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.errors import TaskFailed
from prefect_biomed.clients.vantage6.models import Action, Organization, Run, RunFailure, Task, TaskOutcome

__all__ = [
    "DEFAULT_POLLING",
    "LogLine",
    "Look",
    "TaskState",
    "failures_of",
    "organization_names",
    "outcome_of",
    "outcomes_so_far",
    "polling_for",
    "task_failed",
    "tasks_failed",
    "watch",
]

logger = logger_of(__name__)

DEFAULT_POLLING = PollSettings(
    interval_seconds=0.5, growth=1.2, max_interval_seconds=1.8, part_of_wait=0.018, longest_seconds=27.0
)
"""Two looks a second at first; with the tenth that intervals vary by, soon one each 2 s, later one each 2 % of the time
waited, and one each 30 s at most."""

# So far apart are looks at many tasks for each of them: at 500, a minute.
_SECONDS_FOR_EACH = 0.125
_MANY = 100
_MAX_PAGE = 1000
_RUNS_EVERY_SECONDS = 5.0
# Lists of runs carry the arguments of each; with large ones they are read at the end only.
_FOLLOWED_BYTES = 1024**2
_LOG_LINES = 15
_LOG_LINE_CHARACTERS = 300
_NEW_LINES_AT_ONCE = 200
_SUBTASKS_EXPLAINED = 10
_SIBLING_FAILED = "Marked as failed because sibling run"
# Generation 5 lets these make no tasks; of an action that is not known here nobody can say that.
_WITHOUT_SUBTASKS = frozenset(Action) - {Action.CENTRAL_COMPUTE}


def polling_for(
    tasks: int,
    *,
    refresh_time: float = DEFAULT_POLLING.interval_seconds,
    max_refresh_time: float = DEFAULT_POLLING.longest_seconds,
    timeout_seconds: float | None = None,
    error_budget: int = DEFAULT_POLLING.error_budget,
) -> PollSettings:
    """Choose how to look at tasks: the end is noticed within 2 s or 2 %, and many tasks do not burden a server.

    Args:
        tasks: How many are watched together. Looks at more than a hundred are an eighth of a second apart for each.
        refresh_time: Seconds between the first looks.
        max_refresh_time: Looks at up to a hundred tasks are never further apart, in seconds.
        timeout_seconds: Stop waiting after this time; never when None.
        error_budget: So many looks in a row may fail.
    """
    first = max(refresh_time, _SECONDS_FOR_EACH * tasks) if tasks > _MANY else refresh_time
    return PollSettings(
        interval_seconds=first,
        growth=DEFAULT_POLLING.growth,
        max_interval_seconds=max(first, min(DEFAULT_POLLING.max_interval_seconds or first, max_refresh_time)),
        deadline_seconds=timeout_seconds,
        error_budget=error_budget,
        part_of_wait=DEFAULT_POLLING.part_of_wait,
        longest_seconds=max(first, max_refresh_time),
    )


@dataclass(frozen=True)
class TaskState:
    """A watched task at one look.

    Attributes:
        task: With its status now.
        runs: Its runs at their last look, empty when they have not been looked at.
        finished: Whether every run has ended. A task can be failed while runs of it go on.
    """

    task: Task
    runs: tuple[Run, ...]
    finished: bool


@dataclass(frozen=True)
class LogLine:
    """One line that an algorithm has printed.

    Attributes:
        task_id: The task.
        organization_id: Where it was printed.
        node: Name of the node.
        text: Without its line end.
    """

    task_id: int
    organization_id: int | None
    node: str
    text: str


@dataclass(frozen=True)
class Look:
    """All watched tasks at one look.

    Attributes:
        states: In the order asked for.
        changed: Those whose status, or whose runs' statuses, differ from the look before.
        log_lines: What the algorithms have printed since.
    """

    states: tuple[TaskState, ...]
    changed: tuple[TaskState, ...]
    log_lines: tuple[LogLine, ...]

    @property
    def finished(self) -> bool:
        """Whether everything has ended."""
        return all(state.finished for state in self.states)


def watch(
    client: Vantage6Client,
    task_ids: Sequence[int],
    settings: PollSettings = DEFAULT_POLLING,
    *,
    follow_logs: bool = True,
    kill_at_deadline: bool = False,
) -> Iterator[Look]:
    """Watch tasks until every run of all of them has ended. Safe to repeat.

    One request for each look whatever the number of tasks. Each five seconds the runs of one task are read for what
    they print, in place of its status when it is the only one, and beside the list of several; those of more than a
    hundred tasks at their ends only. Only what REST says counts: events may come before the result is there.

    Args:
        client: The account.
        task_ids: The tasks.
        settings: Interval, deadline and error budget.
        follow_logs: Whether to read what the algorithms print while they run (4.11 and later).
        kill_at_deadline: Whether to kill at the deadline what has not ended.

    Yields:
        Each look; the last one has ``finished`` True.

    Raises:
        TaskGone: A task was deleted.
        DeadlineExceeded: Some run has not ended, or the server could not be asked; the message names organizations, and
            what was killed. What was not killed goes on.
        PollingFailed: Too many looks in a row failed. The tasks go on.
    """
    if not task_ids:
        raise ConfigurationError("There is no task to wait for.")
    watching = _Watching(client, task_ids, follow_logs)
    listed = ", ".join(map(str, task_ids))
    what = f"vantage6 task {listed}" if len(task_ids) == 1 else f"vantage6 tasks {listed}"
    again = f"task_id={task_ids[0]}" if len(task_ids) == 1 else f"tasks=[{listed}]"
    take_up = f"federated_analysis or wait_for_results with {again} takes it up again."
    try:
        yield from poll(
            watching.look,
            settings,
            done=lambda look: look.finished,
            what=what,
            take_up_again=take_up,
            at_deadline=lambda: watching.at_deadline(kill=kill_at_deadline),
        )
    except PollingFailed as error:
        raise PollingFailed(f"{error}{watching.still_open()}") from error


class _Watching:
    """What is known of the tasks from look to look."""

    def __init__(self, client: Vantage6Client, task_ids: Sequence[int], follow_logs: bool) -> None:
        self._client = client
        self._ids = tuple(dict.fromkeys(task_ids))
        self._follow_logs = follow_logs and len(self._ids) <= _MANY
        self._states: dict[int, TaskState] = {}
        self._runs_read: dict[int, float] = {}
        self._printed: dict[int, list[str]] = {}
        self._too_large: set[int] = set()

    def look(self) -> Look:
        """Look at everything that has not ended."""
        before = dict(self._states)
        open_ids = [task_id for task_id in self._ids if not self._is_finished(task_id)]
        read = self._followed_runs(open_ids)
        # While runs of it go on a task does not end, so its state need not be asked, too.
        goes_on = [task_id for task_id, runs in read.items() if not _all_finished(runs)] if len(open_ids) == 1 else []
        lines: list[LogLine] = []
        for task_id, task in self._statuses([one for one in open_ids if one not in goes_on]).items():
            if task.status.is_terminal and not _all_finished(read.get(task_id, ())):
                read[task_id] = tuple(self._client.runs(task_id))
            old = self._states.get(task_id)
            runs = read.get(task_id, old.runs if old else ())
            self._states[task_id] = TaskState(task, runs, task.status.is_terminal and _all_finished(runs))
        for task_id in goes_on:
            self._states[task_id] = replace(self._states[task_id], runs=read[task_id])
        for task_id, runs in read.items():
            self._runs_read[task_id] = time.monotonic()
            lines += self._new_lines(runs) if self._follow_logs else ()
        states = tuple(self._states[task_id] for task_id in self._ids)
        changed = tuple(state for state in states if _summary(before.get(state.task.id)) != _summary(state))
        return Look(states, changed, tuple(lines))

    def at_deadline(self, *, kill: bool) -> str:
        """Kill what has not ended if that is wished, and tell what has not, for an error."""
        left = self.still_open()
        if not kill:
            return f"Nothing was stopped remotely.{left}"
        killed, problems = [], []
        for task_id in self._ids:
            if not self._is_finished(task_id):
                try:
                    self._client.kill_task(task_id)
                    killed.append(task_id)
                except BiomedError as error:
                    problems.append(f"task {task_id} could not be killed and may go on ({error})")
        said = f"Killed: {', '.join(map(str, killed)) or 'nothing'}.{left}"
        return f"{said} {'; '.join(problems)}." if problems else said

    def still_open(self) -> str:
        """Name what has not ended, for an error."""
        parts = []
        for state in self._states.values():
            if not state.finished:
                waiting = self._waiting_for(state)
                status = state.task.status.value
                parts.append(f"task {state.task.id} {f'waits for {waiting}' if waiting else f'is {status}'}")
        return f" Not ended: {'; '.join(parts)}." if parts else ""

    def _waiting_for(self, state: TaskState) -> str:
        try:
            runs = self._client.runs(state.task.id)
            names = organization_names(self._client, state.task.collaboration_id)
        except BiomedError as error:
            # The server may be the reason why we stop waiting.
            logger.debug("No details for a message: %s", error)
            runs, names = list(state.runs), {}
        return ", ".join(
            f"{names.get(run.organization_id, f'organization {run.organization_id}')} "
            f"({run.status.value}{f', node {run.node_name}' if run.node_name else ''})"
            for run in runs
            if not run.is_finished
        )

    def _is_finished(self, task_id: int) -> bool:
        return task_id in self._states and self._states[task_id].finished

    def _log_due(self, open_ids: Iterable[int]) -> int | None:
        """Choose the task whose runs are read next; they carry their input, so they are read now and then only."""
        now = time.monotonic()
        followed = [one for one in open_ids if one in self._states and one not in self._too_large]
        read = {task_id: self._runs_read.setdefault(task_id, now) for task_id in followed}
        if not self._follow_logs or not read or now - max(self._runs_read.values()) < _RUNS_EVERY_SECONDS:
            return None
        return min(read, key=lambda task_id: read[task_id])

    def _followed_runs(self, open_ids: Sequence[int]) -> dict[int, tuple[Run, ...]]:
        """Read the runs of one task, when it is time to."""
        task_id = self._log_due(open_ids)
        if task_id is None:
            return {}
        try:
            return {task_id: tuple(self._client.runs(task_id, max_bytes=_FOLLOWED_BYTES))}
        except TooLarge as error:
            logger.info("What task %d prints is shown at its end: %s", task_id, error)
            self._too_large.add(task_id)
            return {}

    def _statuses(self, open_ids: Sequence[int]) -> dict[int, Task]:
        tasks: dict[int, Task] = {}
        for task_id in open_ids:
            if task_id not in self._states and task_id not in tasks:
                tasks[task_id] = task = self._client.task(task_id)
                if len(open_ids) > _MANY:
                    tasks |= self._neighbours(task, set(open_ids) - self._states.keys())
        known = [task_id for task_id in open_ids if task_id not in tasks]
        if len(known) == 1:
            (task_id,) = known
            status = self._client.task_status(task_id)
            tasks[task_id] = self._states[task_id].task.model_copy(update={"status": status})
        elif known:
            tasks |= self._listed(known)
        return tasks

    def _listed(self, task_ids: Sequence[int]) -> dict[int, Task]:
        """Read many tasks with one list for each collaboration."""
        found: dict[int, Task] = {}
        by_collaboration: dict[tuple[int | None, int | None], set[int]] = {}
        for task_id in task_ids:
            task = self._states[task_id].task
            by_collaboration.setdefault((task.collaboration_id, task.init_user_id), set()).add(task_id)
        for wanted in by_collaboration.values():
            found |= self._neighbours(self._states[min(wanted)].task, wanted)
        # A deletion between two pages can hide a task that is there.
        return found | {task_id: self._client.task(task_id) for task_id in task_ids if task_id not in found}

    def _neighbours(self, task: Task, wanted: Set[int]) -> dict[int, Task]:
        """List those of the same user in the same collaboration, as far as they are wanted."""
        found: dict[int, Task] = {}
        listed = self._client.pages(
            Task,
            page_size=min(max(len(wanted), _MANY), _MAX_PAGE),
            collaboration_id=task.collaboration_id,
            init_user_id=task.init_user_id,
        )
        for one, _ in listed:
            if one.id in wanted:
                found[one.id] = one
                # Newest first, so what is watched is usually on the first page.
                if wanted <= found.keys():
                    break
        return found

    def _new_lines(self, runs: Iterable[Run]) -> Iterator[LogLine]:
        for run in runs:
            lines = run.log.splitlines()
            if not run.is_finished and run.log and not run.log.endswith("\n"):
                lines = lines[:-1]
            printed = self._printed.get(run.id, [])
            # The log so far is replaced by the whole log when the run ends; it has at least as many lines.
            new = lines[len(printed) :]
            self._printed[run.id] = lines if len(lines) > len(printed) else printed
            hidden = max(0, len(new) - _NEW_LINES_AT_ONCE)
            for text in [f"… {hidden} lines left out"] * bool(hidden) + new[hidden:]:
                yield LogLine(run.task_id or 0, run.organization_id, run.node_name, text)


def _all_finished(runs: Sequence[Run]) -> bool:
    """Whether a task has ended; one of which no run is listed has not: it was made for somebody."""
    return bool(runs) and all(run.is_finished for run in runs)


def _summary(state: TaskState | None) -> object:
    return state and (state.task.status, [(run.id, run.status) for run in state.runs], state.finished)


def organization_names(
    client: Vantage6Client, collaboration_id: int | None, including: Iterable[int | None] = ()
) -> Mapping[int | None, str]:
    """Tell the names of the members of a collaboration, which are read once. Safe to repeat.

    Args:
        client: The account.
        collaboration_id: The collaboration.
        including: Ids of those whose names are needed.

    Returns:
        Names by id; empty when the account may not see them.
    """
    try:
        if collaboration_id is not None:
            return dict(client.names_of_members(collaboration_id, including=tuple(including)).items())
        return {member.id: member.name for member in client.records(Organization)}
    except PermissionDeniedError as error:
        logger.debug("No names of organizations: %s", error)
        return {}


def outcome_of(client: Vantage6Client, state: TaskState) -> TaskOutcome:
    """Sum up a task that has ended. Safe to repeat.

    Args:
        client: The account.
        state: The task at the last look.
    """
    failures: tuple[RunFailure, ...] = ()
    tolerated: tuple[RunFailure, ...] = ()
    if state.task.status.is_failure or any(_has_failed(run) for run in state.runs):
        failures = failures_of(client, state.task, state.runs)
    else:
        tolerated = tuple(_failures_of_subtasks(client, state.task))
    return TaskOutcome(
        task=state.task,
        runs=tuple(run.model_copy(update={"log": _tail(run.log)}) for run in state.runs),
        failures=failures,
        tolerated=tolerated,
    )


def outcomes_so_far(client: Vantage6Client, look: Look) -> list[TaskOutcome]:
    """Sum up tasks of which some runs have not ended. Safe to repeat.

    Args:
        client: The account.
        look: The last look.
    """
    outcomes = []
    for state in look.states:
        if not state.finished:
            state = TaskState(client.task(state.task.id), tuple(client.runs(state.task.id)), finished=False)
        outcomes.append(outcome_of(client, state))
    return outcomes


def failures_of(client: Vantage6Client, task: Task, runs: Sequence[Run]) -> tuple[RunFailure, ...]:
    """Find out what went wrong where. Safe to repeat.

    A central task fails because a subtask of it did, at another organization; so the subtasks are looked at too.

    Args:
        client: The account.
        task: A task that failed.
        runs: Its runs.

    Returns:
        The failures, those that caused others first.
    """
    failed = [run for run in runs if _has_failed(run)]
    own = _failures(client, task, [(task.id, run) for run in failed], in_subtask=False)
    deeper = _failures_of_subtasks(client, task)
    return tuple(sorted([*deeper, *own], key=lambda failure: (failure.not_run, not failure.in_subtask)))


def _has_failed(run: Run) -> bool:
    return run.is_finished and not run.status.is_success


def _failures_of_subtasks(client: Vantage6Client, task: Task) -> list[RunFailure]:
    found: list[RunFailure] = []
    if task.action in _WITHOUT_SUBTASKS:
        return found
    try:
        job = client.records(Task, job_id=task.job_id) if task.job_id is not None else []
        subtasks = [one for one in job if one.id > task.id and one.status.is_failure]
        for subtask in sorted(subtasks, key=lambda one: one.id)[:_SUBTASKS_EXPLAINED]:
            failed = [run for run in client.runs(subtask.id) if run.status.is_failure]
            found += _failures(client, task, [(subtask.id, run) for run in failed], in_subtask=True)
    except (PermissionDeniedError, NotFoundError) as error:
        logger.warning("The subtasks of task %d cannot be looked at: %s", task.id, error)
    return found


def _failures(
    client: Vantage6Client, task: Task, failed: Sequence[tuple[int, Run]], *, in_subtask: bool
) -> list[RunFailure]:
    if not failed:
        return []
    names = organization_names(client, task.collaboration_id, [run.organization_id for _, run in failed])
    return [
        RunFailure(
            task_id=task_id,
            run_id=run.id,
            organization=names.get(run.organization_id, f"organization {run.organization_id}"),
            node=run.node_name or "unknown",
            status=run.status,
            log=_tail(run.log),
            in_subtask=in_subtask,
            not_run=run.log.startswith(_SIBLING_FAILED),
            left_open=run.finished_at is None,
        )
        for task_id, run in failed
    ]


def _tail(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()][-_LOG_LINES:]
    return "\n".join(line[:_LOG_LINE_CHARACTERS] for line in lines)


def task_failed(outcome: TaskOutcome) -> TaskFailed:
    """Make the error for a task with failures.

    Args:
        outcome: The task and its failures.
    """
    task = outcome.task
    causes = "\n".join(f"  - {failure}" for failure in outcome.failures) or f"  - the server says {task.status.value}"
    good = sum(run.status.is_success for run in outcome.runs)
    rest = f"\n{good} of {len(outcome.runs)} organizations have a result; get_results with partial=True fetches them."
    why = diagnose(causes)
    told = "" if why.category is Category.UNKNOWN else f"\nDiagnosis: {why}"
    return TaskFailed(
        f"vantage6 task {task.id} ({task.name}) failed:\n{causes}{rest if good else ''}{told}",
        task_id=task.id,
        failures=outcome.failures,
    )


def tasks_failed(outcomes: Sequence[TaskOutcome]) -> TaskFailed:
    """Make one error for all tasks with failures.

    Args:
        outcomes: The tasks and their failures; at least one.
    """
    errors = [task_failed(outcome) for outcome in outcomes]
    if len(errors) == 1:
        return errors[0]
    return TaskFailed(
        f"{len(errors)} vantage6 tasks failed.\n" + "\n".join(map(str, errors)),
        task_id=errors[0].task_id,
        failures=[failure for error in errors for failure in error.failures],
    )
