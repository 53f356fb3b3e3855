"""The only retry and cache settings, and the identity of an intent that survives retries.

Two facts of Prefect decide what is here. A child flow run that failed is created anew when its parent is retried, so a
cache key must hang on the outermost flow run. And identical calls in one flow run are one cache entry, so what tells
two intents apart must be among the inputs: the token and the repetition.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.blocks.core import Block
from prefect.cache_policies import INPUTS, NO_CACHE, CachePolicy
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.runtime import flow_run
from prefect.tasks import Task

from prefect_biomed.clients.errors import AuthenticationError, ConfigurationError, is_transient

__all__ = ["ONCE", "RETRY", "RootRun", "if_transient", "intent_token", "token_of_flow_run"]

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

ONCE: dict[str, Any] = RETRY | {
    "persist_result": True,
    "result_serializer": "json",
    "cache_policy": (INPUTS - "credentials") + RootRun(),
}
"""For effects that must happen once: upload, launch, create. Their results are kept and found again by a retry."""


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
        return _digest(str(uuid.uuid4()))
    counter = f"prefect_biomed.{kind}"
    call = context.task_run_dynamic_keys[counter] = int(context.task_run_dynamic_keys.get(counter, -1)) + 1
    return token_of_flow_run(context.flow_run.id, kind, call=call, explicit=explicit)


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
    return _digest("/".join([root, *reversed(position), kind, str(call), explicit or ""]))


_UNSTABLE = ":?"


def _steps_to_root(client: SyncPrefectClient, flow_run_id: UUID) -> Iterator[str]:
    """Climb to the outermost flow run by the tracking task runs; their keys count the calls under one parent."""
    while True:
        run = client.read_flow_run(flow_run_id)
        if run.parent_task_run_id is None:
            yield str(run.id)
            return
        tracking = client.read_task_run(run.parent_task_run_id)
        # The part of the key after the last hyphen is a hash of the source, which an update of the package changes.
        name = tracking.task_key.rpartition("-")[0]
        yield f"{name}:{tracking.dynamic_key}" if tracking.dynamic_key.isdecimal() else f"{name}{_UNSTABLE}"
        if tracking.flow_run_id is None:
            yield str(tracking.id)
            return
        flow_run_id = tracking.flow_run_id


def _digest(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:_TOKEN_LENGTH]
