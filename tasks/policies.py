"""The only retry and cache settings, and the identity of an intent that survives retries.

Two facts of Prefect decide what is here. A child flow run that failed is created anew when its parent is retried, so a
cache key must hang on the outermost flow run. And identical calls in one flow run are one cache entry, so what tells
two intents apart must be among the inputs, or be the place of the call.
"""

from __future__ import annotations

import base64
import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow
from prefect.blocks.core import Block
from prefect.cache_policies import INPUTS, NO_CACHE, CachePolicy
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.runtime import flow_run
from prefect.tasks import Task

from prefect_biomed.clients.errors import AuthenticationError, ConfigurationError, is_transient
from prefect_biomed.clients.once import Circumstances
from prefect_biomed.tasks._lease import lease
from prefect_biomed.tasks._reporting import state_event

__all__ = [
    "ONCE",
    "RETRY",
    "PlaceOfCall",
    "RootRun",
    "circumstances",
    "if_transient",
    "intent_token",
    "is_deployed",
    "key_tag",
    "lasting_folder",
    "planned_child",
    "planned_run",
    "token_of_call",
    "token_of_flow_run",
]

_TOKEN_LENGTH = 10


def if_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry a task only when trying again later can help.

    Args:
        task: The task.
        task_run: Its run.
        state: The state it failed with.

    Returns:
        Whether the error is transient, or saved credentials that were refused have been replaced meanwhile.
    """
    try:
        state.result()
    except AuthenticationError:
        return _credentials_were_replaced(task_run)
    except Exception as error:
        return is_transient(error)
    return False


def _credentials_were_replaced(task_run: TaskRun) -> bool:
    """Whether a saved block among the task's inputs has changed since this attempt began; it is read again then."""
    context = TaskRunContext.get()
    blocks = [value for value in context.parameters.values() if isinstance(value, Block)] if context else []
    documents = [block._block_document_id for block in blocks if block._block_document_id is not None]
    if task_run.state is None:
        return False
    with get_client(sync_client=True) as client:
        changed = [client.read_block_document(document).updated for document in documents]
    return any(moment is not None and moment > task_run.state.timestamp for moment in changed)


@dataclass
class RootRun(CachePolicy):
    """Key on the outermost flow run, so that a child run created anew finds what the earlier one finished."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Compute the key.

        Args:
            task_ctx: Context of the task run.
            inputs: Not used.
            flow_parameters: Not used.
            **kwargs: Not used.

        Returns:
            The task's name and the root flow run's id; the task run's own id outside a flow, which matches nothing.
        """
        fn = task_ctx.task.fn
        return f"{fn.__module__}.{fn.__qualname__}:{flow_run.root_flow_run_id or task_ctx.task_run.id}"


RETRY: dict[str, Any] = {
    "retries": 5,
    "retry_delay_seconds": [10, 30, 60, 300, 900],
    "retry_jitter_factor": 0.3,
    "retry_condition_fn": if_transient,
    "cache_policy": NO_CACHE,
}
"""For effects that may be repeated: look, wait, download, remove."""

_WITHOUT_CREDENTIALS = INPUTS - "credentials" - "storage"

ONCE: dict[str, Any] = RETRY | {
    "persist_result": True,
    "result_serializer": "json",
    "cache_policy": _WITHOUT_CREDENTIALS + RootRun(),
}
"""For effects that must happen once: upload, launch, create. Their results are kept and found again by a retry."""


@dataclass
class PlaceOfCall(CachePolicy):
    """Tells apart calls with equal inputs: by the place of their flow, and by which of them a call is in that flow.

    Add it to the policy of `ONCE` for a task whose inputs do not name the intent. A call with a `token` is named.
    """

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        """Compute the key.

        Args:
            task_ctx: Context of the task run.
            inputs: Arguments of the call.
            flow_parameters: Not used.
            **kwargs: Not used.

        Returns:
            Place and number of the call; None for a call with a token and outside a flow. A key that matches nothing
            in a flow that was called from inside a task, which has another place on each retry.
        """
        if inputs.get("token") or task_ctx.task_run.flow_run_id is None:
            return None
        equal = _WITHOUT_CREDENTIALS.compute_key(task_ctx, inputs, flow_parameters)
        try:
            return _place(task_ctx.task_run, equal or "", explicit=None)
        except ConfigurationError:
            return str(task_ctx.task_run.id)


def circumstances(platform: str, kind: str) -> Circumstances:
    """Tell a launch what Prefect knows of it. Called in the task that launches.

    Args:
        platform: For the event about duplicates, for instance `vip`.
        kind: What is launched, for instance `execution`.

    Returns:
        Since when earlier attempts at this task were made, here or elsewhere; a lease on the server; and an event
        `biomed.<platform>.<kind>.duplicated` should two objects carry one token.
    """

    def report(identifiers: Sequence[str]) -> None:
        state_event(platform, kind, identifiers[0], "duplicated", others=list(identifiers[1:]))

    attempted_since = _attempted_since()
    held = partial(lease, attempted_since=attempted_since)
    return Circumstances(attempted_since=attempted_since, lease=held, on_duplicates=report)


def _attempted_since() -> datetime | None:
    """When the first attempt at the running task may have been made; None when this is the first."""
    context = TaskRunContext.get()
    if context is None or context.task_run.flow_run_id is None:
        return None
    with get_client(sync_client=True) as client:
        runs = [run for run, _ in _runs_to_root(client, context.task_run.flow_run_id)]
        named = _first_of_key(client, runs[-1])
    if named is not None:
        return named
    repeated = [run for run in runs if run.run_count > 1]
    if repeated:
        return repeated[-1].start_time
    return runs[0].start_time if context.task_run.run_count > 1 else None


def key_tag(key: str) -> str:
    """Name the intent of a flow run, so that another flow run of that name is a repetition of it.

    A program that starts flow runs itself, such as a command that another workflow engine calls again after a crash,
    gives the outermost flow run this tag. Tokens are made of the key then, in place of the run's id.

    Args:
        key: The name; the same for each repetition, another for each new intent.

    Returns:
        The tag.
    """
    return f"{_KEY_TAG}{key}"


_KEY_TAG = "biomed-key:"


def _identity(root: FlowRun) -> str:
    return next((tag for tag in sorted(root.tags) if tag.startswith(_KEY_TAG)), str(root.id))


def _first_of_key(client: SyncPrefectClient, root: FlowRun) -> datetime | None:
    """When the first flow run of the same key began; None when there is no key, or this is the only one."""
    tag = _identity(root)
    if tag not in root.tags:
        return None
    # A run that has never begun has made no attempt, and without a start it would be listed before those that have.
    begun = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), start_time=FlowRunFilterStartTime(is_null_=False))
    first = client.read_flow_runs(flow_run_filter=begun, sort=FlowRunSort.START_TIME_ASC, limit=2)
    return first[0].start_time if any(run.id != root.id for run in first) else None


def intent_token(kind: str, *, explicit: str | None = None) -> str:
    """Make the token of one intent: the same on every retry, different for every new call.

    Inside a flow it is made of the outermost flow run and the position of the call under it: which call of which flow
    under which parent, and which call of this function in the running flow. Outside a flow it is random.

    Args:
        kind: What is intended, for instance `vip-session`.
        explicit: A name that the user gave. It decides where Prefect cannot tell two calls apart.

    Returns:
        Ten lower-case letters and digits.

    Raises:
        ConfigurationError: The flow was called from inside a task, where Prefect gives every call a random key, and no
            name was given.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        planned = _PLANNED.get()
        return _digest(str(uuid.uuid4())) if planned is None else planned.token(kind, explicit)
    counter = f"prefect_biomed.{kind}"
    call = context.task_run_dynamic_keys[counter] = int(context.task_run_dynamic_keys.get(counter, -1)) + 1
    return token_of_flow_run(context.flow_run.id, kind, call=call, explicit=explicit)


@dataclass
class _PlannedRun:
    """A flow run that has not begun: the outermost one, with the calls that were planned in it."""

    place: tuple[str, ...]
    calls: Counter[str]

    def token(self, kind: str, explicit: str | None) -> str:
        """The token that the next call of its kind will have."""
        call = self.calls[kind]
        self.calls[kind] += 1
        return _token(self.place, kind, call, explicit)


_PLANNED: ContextVar[_PlannedRun | None] = ContextVar("prefect_biomed_planned", default=None)


@contextmanager
def planned_run(key: str | None) -> Iterator[None]:
    """Give the intents of this block the tokens that they will have in an outermost flow run.

    Args:
        key: Name of its intent, as for `key_tag`. Without one, the run is another one each time, and so are its tokens.

    Yields:
        Nothing.
    """
    with _planned(key_tag(key) if key else str(uuid.uuid4())):
        yield


@contextmanager
def planned_child(flow: Flow[..., Any]) -> Iterator[None]:
    """Give the intents of this block the tokens that they will have in a child of the planned run.

    Args:
        flow: The flow that is called, once, by that of the planned run.

    Yields:
        Nothing.
    """
    planned = _PLANNED.get()
    above = planned.place if planned else (str(uuid.uuid4()),)
    with _planned(*above, f"{flow.fn.__name__}:0"):
        yield


@contextmanager
def _planned(*place: str) -> Iterator[None]:
    before = _PLANNED.set(_PlannedRun(place, Counter()))
    try:
        yield
    finally:
        _PLANNED.reset(before)


def is_deployed() -> bool:
    """Tell whether the running flow is a run of a deployment."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def lasting_folder() -> Path:
    """Tell where results go when nobody says it.

    Returns:
        The current folder; the home folder for a run of a deployment, whose current folder does not outlive it.
    """
    return Path.home() if is_deployed() else Path.cwd()


def token_of_call(inputs: str, *, explicit: str | None = None) -> str:
    """Make the token of the running task, for a task with the policy `PlaceOfCall`.

    Equal calls in one flow are counted, so that a repetition or a round of learning is an intent of its own; the
    count is the same on a retry. Calls that a task runner carries out in other processes are not counted: give them
    names.

    Args:
        inputs: What is asked for, as text; equal for equal calls.
        explicit: A name that the user gave.

    Returns:
        Ten lower-case letters and digits; random outside a task.

    Raises:
        ConfigurationError: As for `intent_token`.
    """
    context = TaskRunContext.get()
    if context is None:
        return _digest(str(uuid.uuid4()))
    if context.task_run.flow_run_id is None:
        # Outside a flow the task run itself is the intent; its id stays the same on its retries.
        return _digest(f"{context.task_run.id}/{inputs}")
    return _digest(f"{_place(context.task_run, inputs, explicit=explicit)}/{inputs}")


def _place(task_run: TaskRun, equal: str, *, explicit: str | None) -> str:
    if task_run.flow_run_id is None:
        raise ValueError("a task run outside a flow has no place")
    return token_of_flow_run(task_run.flow_run_id, "task", call=_number_of_call(task_run, equal), explicit=explicit)


_COUNTING = threading.Lock()


def _number_of_call(task_run: TaskRun, equal: str) -> int:
    """Which of the equal calls in the running flow this one is, from 0; the same on each retry of the task."""
    context = FlowRunContext.get()
    if context is None:
        return 0
    numbers, known, counter = context.task_run_dynamic_keys, f"prefect_biomed.{task_run.id}", f"prefect_biomed.{equal}"
    with _COUNTING:
        if known not in numbers:
            numbers[known] = numbers[counter] = int(numbers.get(counter, -1)) + 1
        return int(numbers[known])


def token_of_flow_run(flow_run_id: UUID, kind: str, *, call: int = 0, explicit: str | None = None) -> str:
    """Compute the token that a call in a flow run has, from outside that run.

    Args:
        flow_run_id: The flow run in which the call is made.
        kind: As for `intent_token`.
        call: Number of the call in that run, from 0.
        explicit: As for `intent_token`.

    Returns:
        The token.

    Raises:
        ConfigurationError: As for `intent_token`.
    """
    with get_client(sync_client=True) as client:
        steps = list(_steps_to_root(client, flow_run_id))
    root, position = steps[-1], steps[:-1]
    if any(step.endswith(_UNSTABLE) for step in position):
        if explicit is None:
            raise ConfigurationError(
                "This flow was called from inside a task. Prefect gives such a call another identity on each retry, so "
                "its remote jobs could not be found again. Give it a name of its own (session_name, name or "
                "idempotency_key), or call it from a flow."
            )
        position = ["named"]
    return _token([root, *reversed(position)], kind, call, explicit)


def _token(place: Sequence[str], kind: str, call: int, explicit: str | None) -> str:
    return _digest("/".join([*place, kind, str(call), explicit or ""]))


_UNSTABLE = ":?"


def _steps_to_root(client: SyncPrefectClient, flow_run_id: UUID) -> Iterator[str]:
    """Climb to the outermost flow run by the tracking task runs; their keys count the calls under one parent."""
    for run, tracking in _runs_to_root(client, flow_run_id):
        if tracking is None:
            yield _identity(run)
            return
        # The part of the key after the last hyphen is a hash of the source, which an update of the package changes.
        name = tracking.task_key.rpartition("-")[0]
        yield f"{name}:{tracking.dynamic_key}" if tracking.dynamic_key.isdecimal() else f"{name}{_UNSTABLE}"
        if tracking.flow_run_id is None:
            yield str(tracking.id)


def _runs_to_root(client: SyncPrefectClient, flow_run_id: UUID | None) -> Iterator[tuple[FlowRun, TaskRun | None]]:
    """A flow run and those above it, each with the task run by which its parent tracks it."""
    while flow_run_id is not None:
        run = client.read_flow_run(flow_run_id)
        tracking = client.read_task_run(run.parent_task_run_id) if run.parent_task_run_id else None
        yield run, tracking
        flow_run_id = tracking.flow_run_id if tracking else None


def _digest(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:_TOKEN_LENGTH]
