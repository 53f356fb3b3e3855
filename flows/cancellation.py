"""What happens on the platform when a flow run is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import FlowStateHook
from prefect.logging.loggers import LoggingAdapter, flow_run_logger

from prefect_biomed.tasks.policies import token_of_flow_run

__all__ = ["ending_remote_jobs"]


def ending_remote_jobs(
    kind: str, end: Callable[[Any, str, LoggingAdapter], Sequence[str]], *, named_by: str
) -> FlowStateHook[..., Any]:
    """Make the hook that ends what a cancelled flow run has launched, when `cancel_remote` of its `waiting` is true.

    The hook may run in a new process, so what was launched is found again by the token of the intent. Safe to repeat.

    Args:
        kind: Kind of the intent, as the flow gives it to `intent_token`.
        end: Gets the credentials, the token and the logger of the flow run; ends what carries the token and returns
            what it has ended.
        named_by: The parameter of the flow by which a user names the intent.

    Returns:
        The hook, for `on_cancellation` of the flow.
    """

    def end_remote_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
        parameters = flow.validate_parameters(flow_run.parameters)
        waiting = parameters.get("waiting")
        if waiting is None or not waiting.cancel_remote:
            return
        token = token_of_flow_run(flow_run.id, kind, explicit=parameters.get(named_by))
        logger = flow_run_logger(flow_run, flow)
        ended = end(parameters["credentials"], token, logger)
        logger.info("Ended on the platform: %s", ", ".join(ended) or "nothing")

    return end_remote_jobs
