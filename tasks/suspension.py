"""Giving a worker slot back while a platform computes, and taking it again when it is done."""

from __future__ import annotations

from typing import Literal
from uuid import UUID, uuid4

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run

from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["FlowRunOutlook", "resume", "suspend", "suspendable_flow_run"]

FlowRunOutlook = Literal["resumed", "on its way", "failed", "over"]


def suspendable_flow_run() -> UUID:
    """Make sure that the running flow can be suspended. Call it before anything is sent.

    Returns:
        The flow run.

    Raises:
        ConfigurationError: It is not a run of a deployment, or it is the child of another flow run: Prefect can start
            neither again.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.deployment_id is None or run.parent_task_run_id is not None:
        raise ConfigurationError(
            "Only a run of a deployment of its own can be suspended: Prefect cannot start a script or a child flow "
            "again. Run the deployment, or wait in the flow."
        )
    return run.id


def suspend() -> None:
    """Suspend the running flow: its process ends and its worker slot is free. `resume` starts it again from the top.

    Not a task. Tasks that have finished with `ONCE` are skipped when the flow starts again.

    Raises:
        prefect.exceptions.Pause: Always, to end the process.
    """
    # A key of its own each time: Prefect lets a run that was resumed too early pass a suspension with a known key.
    suspend_flow_run(key=str(uuid4()))


def resume(flow_run_id: UUID) -> FlowRunOutlook:
    """Resume a flow run if it is suspended. Safe to repeat.

    Args:
        flow_run_id: The flow run.

    Returns:
        `resumed`; `on its way` when it is not suspended but has not ended either; `failed` when it has ended with an
        error, which somebody has to look at; `over` when it has ended otherwise or was deleted.
    """
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(flow_run_id).state
        except ObjectNotFound:
            return "over"
        if state is not None and state.is_failed():
            return "failed"
        if state is None or state.is_final() or state.is_cancelling():
            return "over"
        if not state.is_paused():
            return "on its way"
        client.resume_flow_run(flow_run_id)
    get_run_logger().info("Flow run %s is resumed", flow_run_id)
    return "resumed"
