"""What the flows of the operator would do, and those that change nothing on a platform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect_biomed.blocks.boss import BossCredentials
from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.blocks.vip import VipCredentials
from prefect_biomed.clients.vip.finish import removable_session
from prefect_biomed.flows.boss_plans import plan_cancel
from prefect_biomed.flows.operations import check_accounts
from prefect_biomed.flows.plans import Plan, merged
from prefect_biomed.tasks.operations import running_executions

__all__ = ["plan_reading", "plan_removal"]


def plan_reading(**_: Any) -> Plan:
    """Plan a flow that reads only, or writes to this machine only.

    Returns:
        That nothing would be changed.
    """
    return Plan()


def plan_removal(
    vip: VipCredentials | None,
    vantage6: Vantage6Credentials | None,
    boss: BossCredentials | None,
    executions: Sequence[str],
    sessions: Sequence[str],
    tasks: Sequence[int],
    ingest_jobs: Sequence[int],
    vip_home: str,
) -> Plan:
    """Plan `remove_leftovers`; arguments as for it.

    Returns:
        What it would do.
    """
    check_accounts(vip, vantage6, boss, executions, sessions, tasks, ingest_jobs)
    parts: list[Plan] = []
    if vip is not None:
        with vip.get_client() as client:
            running = running_executions(client, executions, sessions, vip_home)
            folders = [f"{vip_home}/{session}" for session in sessions]
            removed = tuple(folder for folder in folders if removable_session(client, folder))
        parts.append(Plan(ends=tuple(f"execution {one}" for one in running), removes=removed))
    if vantage6 is not None:
        with vantage6.get_client() as server:
            found = [server.task(number) for number in tasks]
        parts.append(Plan(ends=tuple(f"task {one.id} ({one.name})" for one in found if not one.status.is_terminal)))
    if boss is not None:
        parts += [plan_cancel(boss, number) for number in ingest_jobs]
    return merged(parts)
