"""What the flows of vantage6 would do: their own decisions, and those of their steps, without what changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.clients.once import Deed, Foreseen
from prefect_biomed.clients.vantage6 import DataframeSpec, TaskRequest, Vantage6Client
from prefect_biomed.clients.vantage6.launches import foresee_dataframe, foresee_session, foresee_task
from prefect_biomed.clients.vantage6.preflight import task_name
from prefect_biomed.flows.plans import Plan, launch_of, merged
from prefect_biomed.flows.vantage6 import ANALYSIS, request_of
from prefect_biomed.flows.vantage6_parameters import AnalysisWaiting, FederatedWaiting, SessionDetails, TaskDetails
from prefect_biomed.tasks.policies import intent_token

__all__ = ["plan_analysis", "plan_session"]


def plan_analysis(
    credentials: Vantage6Credentials,
    details: TaskDetails | None,
    outputs: object,
    waiting: AnalysisWaiting | None,
    refresh_time: float,
    task_id: int | None,
    idempotency_key: str | None,
    **given: Any,
) -> Plan:
    """Plan `federated_analysis`; arguments as for it.

    Returns:
        What it would do.
    """
    details, waiting = details or TaskDetails(), waiting or AnalysisWaiting()
    with credentials.get_client() as client:
        if task_id is not None:
            task = client.task(task_id)
            deed = Deed.DONE if task.status.is_terminal else Deed.GO_ON
            return Plan(launches=(Foreseen(what=f"task {task.name}", deed=deed, id=str(task_id)),))
        request = request_of(**(given | {"arguments": given["arguments"] or {}}), **details.model_dump())
        return _task(client, request, intent_token(ANALYSIS, explicit=idempotency_key), waiting)


def plan_session(
    credentials: Vantage6Credentials,
    session_name: str,
    dataframes: Sequence[DataframeSpec],
    organizations: Sequence[str | int] | None,
    databases: Any,
    details: SessionDetails | None,
    outputs: object,
    waiting: FederatedWaiting | None,
    idempotency_key: str | None,
    **given: Any,
) -> Plan:
    """Plan `federated_session`; arguments as for it.

    Returns:
        What it would do. A computation on dataframes that are still to be made is checked once they are there.
    """
    details, waiting = details or SessionDetails(), waiting or FederatedWaiting()
    token = intent_token(ANALYSIS, explicit=idempotency_key)
    with credentials.get_client() as client:
        session = foresee_session(
            client, given["collaboration"], session_name, scope=details.scope, study=details.study
        )
        request = request_of(
            **(given | {"arguments": given["arguments"] or {}}),
            organizations=details.compute_at or organizations,
            databases=databases if databases is not None else [spec.name for spec in dataframes],
            session=session.id if session is not None else None,
            **details.model_dump(exclude={"scope", "compute_at"}),
        )
        if session is None:
            new = [launch_of(Foreseen(what=f"dataframe {one.name!r}", deed=Deed.LAUNCH), 0) for one in dataframes]
            made = Plan(makes=(f"session {session_name!r}",), bytes_to_send=None)
            return merged([made, *new, _later(request, token)])
        parts = [_dataframe(client, session.id, spec, organizations, details.store) for spec in dataframes]
        if all(not part.jobs for part in parts):
            return merged([*parts, _task(client, request, token, waiting)])
        return merged([*parts, _later(request, token)])


def _dataframe(
    client: Vantage6Client,
    session_id: int,
    spec: DataframeSpec,
    organizations: Sequence[str | int] | None,
    store: int | None,
) -> Plan:
    seen, functions, at = foresee_dataframe(
        client,
        session_id,
        spec.name,
        label=spec.label,
        functions=[spec.extraction, *spec.preprocessing],
        replace=spec.replace,
        organizations=organizations,
        store=store,
    )
    removed = tuple(f"dataframe {number}, which is made anew" for number in seen.ends)
    jobs = functions * at
    plan = Plan(
        launches=(seen.model_copy(update={"ends": ()}),),
        bytes_to_send=None if jobs else 0,
        jobs=jobs,
        removes=removed,
    )
    if seen.deed is Deed.ADOPT and functions:
        return plan.model_copy(update={"makes": (f"{functions} further steps of {seen.what}",)})
    return plan


def _task(client: Vantage6Client, request: TaskRequest, token: str, waiting: FederatedWaiting) -> Plan:
    seen, task = foresee_task(client, request, token, offline_nodes=waiting.offline_nodes)
    if task is None:
        return launch_of(seen, 0)
    plan = launch_of(seen, len(task.organizations))
    return plan.model_copy(update={"notes": task.warnings, "bytes_to_send": None})


def _later(request: TaskRequest, token: str) -> Plan:
    """A computation whose dataframes are not there yet, so that it cannot have been made before."""
    plan = launch_of(Foreseen(what=f"task {task_name(request, token)}", deed=Deed.LAUNCH), 0)
    notes = ("the computation is checked once its dataframes are there",)
    return plan.model_copy(update={"notes": notes, "bytes_to_send": None})
