"""A flow process is killed at the worst moments; the same flow run is retried; there is one task, with its results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from examples.lab import Laboratory
from harness.laboratory import FlowRun, Remote, wait_until
from prefect_biomed.clients.vantage6 import Run, Status, Task, Vantage6Client, connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IMAGE = "prefect-biomed/clinical:1.0"


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory"), platforms=("vantage6",)) as laboratory:
        facts = laboratory.sandbox["vantage6"]
        for name in ("north-researcher", "north-admin"):
            laboratory.run(
                "python",
                "deployments/setup.py",
                f"--name={name}",
                PREFECT_BIOMED_VANTAGE6_URL=facts["url"],
                PREFECT_BIOMED_VANTAGE6_USERNAME=name,
                PREFECT_BIOMED_VANTAGE6_PASSWORD=facts["users"][name]["password"],
                PREFECT_BIOMED_VANTAGE6_ENCRYPTION="as the collaboration says",
                PREFECT_BIOMED_VANTAGE6_PRIVATE_KEY=Path(facts["organizations"]["north"]["private_key"]).read_text(),
            )
        yield laboratory


@pytest.fixture
def remote(laboratory: Laboratory) -> Iterator[Remote]:
    remote = Remote(laboratory, "vantage6")
    remote.url = remote.url.removesuffix("/api")
    remote.reset()
    yield remote
    remote.reset()


@pytest.fixture
def client(laboratory: Laboratory) -> Iterator[Vantage6Client]:
    facts = laboratory.sandbox["vantage6"]
    password = SecretStr(facts["users"]["north-admin"]["password"])
    with connect(facts["url"], username="north-admin", password=password) as client:
        yield client


def start(
    laboratory: Laboratory, output_dir: Path, name: str, account: str = "north-researcher", **changes: Any
) -> FlowRun:
    parameters = {
        "credentials": {"$ref": {"block_document_slug": f"vantage6-credentials/{account}"}},
        "collaboration": "encrypted",
        "image": IMAGE,
        "method": "sleep",
        "arguments": {"seconds": 12},
        "databases": "default",
        "details": {"name": name},
        "outputs": {"output_dir": str(output_dir)},
    }
    return FlowRun(laboratory, "federated-analysis/federated-analysis", parameters | changes)


def tasks(client: Vantage6Client, name: str) -> list[Task]:
    return [task for task in client.records(Task) if task.name.startswith(f"{name}-") and task.parent_id is None]


def check(client: Vantage6Client, run: FlowRun, name: str) -> None:
    run.retry()
    assert run.wait("COMPLETED", "FAILED", "CRASHED") == "COMPLETED", run.logs()
    (task,) = tasks(client, name)
    assert [run.status for run in client.records(Run, task_id=task.id)] == [Status.COMPLETED] * 3
    (results,) = [one for one in run.artifacts() if one["key"] == f"vantage6-results-{task.id}"]
    assert results["data"].count("organization") == 3


def test_killed_between_the_task_and_its_record(
    laboratory: Laboratory, remote: Remote, client: Vantage6Client, tmp_path: Path
) -> None:
    remote.fail(method="POST", path="/task$", after_effect=True, delay_seconds=20, status=504, times=1)
    run = start(laboratory, tmp_path, "launch")
    wait_until(lambda: bool(tasks(client, "launch")), 150, "a task on the server")
    run.kill()
    check(client, run, "launch")
    assert len(remote.journal("POST", "/api/task")) == 1


def test_killed_while_waiting(laboratory: Laboratory, remote: Remote, client: Vantage6Client, tmp_path: Path) -> None:
    run = start(laboratory, tmp_path, "waiting")
    wait_until(lambda: bool(tasks(client, "waiting")), 150, "a task on the server")
    wait_until(lambda: len(remote.journal("GET", "/status")) > 3, 60, "some looks")
    run.kill()
    check(client, run, "waiting")
    assert len(remote.journal("POST", "/api/task")) == 1


@pytest.mark.parametrize("asked", [True, False])
def test_a_cancelled_run_kills_its_task_when_asked(
    laboratory: Laboratory, client: Vantage6Client, tmp_path: Path, asked: bool
) -> None:
    name = f"cancel-{asked}".lower()
    run = start(laboratory, tmp_path, name, "north-admin", arguments={"seconds": 300}, waiting={"cancel_remote": asked})
    wait_until(lambda: bool(tasks(client, name)), 150, "a task on the server")
    wait_until(lambda: tasks(client, name)[0].status is Status.ACTIVE, 30, "the task is active")
    laboratory.run("prefect", "flow-run", "cancel", run.id)
    run.wait("CANCELLED", seconds=120)
    (task,) = tasks(client, name)
    if asked:
        wait_until(lambda: client.task_status(task.id) is Status.KILLED, 30, "the task is killed")
    else:
        assert client.task_status(task.id) is Status.ACTIVE
        client.kill_task(task.id)
