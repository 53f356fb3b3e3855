"""What runs are called in the engine's lists."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client

from prefect_biomed.clients.vip import VipSession
from prefect_biomed.tasks.run_names import flow_run_named, task_run_named


def names_of_runs() -> tuple[list[str], list[str]]:
    with get_client(sync_client=True) as client:
        return [run.name for run in client.read_flow_runs()], [run.name for run in client.read_task_runs()]


def session(name: str, folder: Path) -> VipSession:
    return VipSession(
        session_name=name,
        output_dir=folder,
        vip_input_dir="/vip/Home/API/brains/INPUTS",
        vip_output_dir="/vip/Home/out",
        token="abcdefghij",
    )


@pytest.mark.usefixtures("prefect_api")
def test_names_say_what_was_given_and_leave_out_the_rest() -> None:
    @task(task_run_name=task_run_named("Launch", "session", "repetition", "note"))
    def launch(session: VipSession, repetition: int, note: str | None = None) -> None: ...

    @flow(flow_run_name=flow_run_named("session_name", "folder", "job_id"))
    def inner(session_name: str | None, folder: Path, job_id: int) -> None:
        launch(session("brains", folder), 2)
        launch.submit(session("x" * 200, folder), 3).wait()

    @flow(name="nothing-given", flow_run_name=flow_run_named("session_name"))
    def outer(session_name: str | None = None) -> None:
        inner(None, Path("/data/study"), 7)

    outer()
    flows, tasks = names_of_runs()
    assert {"nothing-given", "study, job 7"} <= set(flows)
    assert "Launch: brains, repetition 2" in tasks
    assert any(name.startswith("Launch: xxx") and name.endswith("…") and len(name) < 140 for name in tasks)
