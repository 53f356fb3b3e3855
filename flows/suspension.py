"""Giving a worker slot back while a platform computes, and taking it again when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run

from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import VipSession
from prefect_biomed.clients.vip.session_file import SessionFile
from prefect_biomed.tasks._reporting import run_logger
from prefect_biomed.tasks.vip import monitor_workflows

__all__ = [
    "FlowRunOutlook",
    "prepare_suspension",
    "resume",
    "resume_session",
    "suspend",
    "suspend_session",
    "suspendable_flow_run",
]

FlowRunOutlook = Literal["resumed", "on its way", "failed", "over"]


def prepare_suspension(session: VipSession) -> None:
    """Make sure that the running flow can be suspended and found again. Call it before anything is sent.

    Args:
        session: The session.

    Raises:
        ConfigurationError: The flow run cannot be suspended, or the session has no local session file, by which
            the deployment vip-collect would find it.
    """
    suspendable_flow_run()
    if session.backup != "local":
        raise ConfigurationError(
            "wait='suspend' needs backup_location='local': vip-collect finds the suspended run by its session file."
        )


def suspend_session(credentials: VipCredentials, session: VipSession, workflow_ids: Sequence[str]) -> None:
    """Suspend the running flow unless the runs of its session have ended. `resume_session` brings it back.

    It ends the process. When the flow starts again, this is called again and looks again.

    Args:
        credentials: The account.
        session: The session; it was prepared with `prepare_suspension`.
        workflow_ids: The runs.

    Raises:
        prefect.exceptions.Pause: To end the process.
    """
    workflows = monitor_workflows(credentials, session, workflow_ids=workflow_ids, wait=False, raise_on_failure=False)
    if all(workflow.status.is_terminal for workflow in workflows):
        return
    with SessionFile(session).edit() as record:
        record.ledger.resume = str(suspendable_flow_run())
    suspend()


def resume_session(session: VipSession) -> FlowRunOutlook:
    """Resume the flow run that was suspended until the runs of a session have ended. Safe to repeat.

    Args:
        session: The session.

    Returns:
        `resumed`; `on its way` when the flow run is at work; `failed` when it has failed and left the session as it is;
        `over` when there is none.
    """
    waiting = SessionFile(session).read().ledger.resume
    return resume(UUID(waiting)) if waiting else "over"


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

    Tasks that have finished with `ONCE` are skipped when the flow starts again.

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
    run_logger().info("Flow run %s is resumed", flow_run_id)
    return "resumed"
