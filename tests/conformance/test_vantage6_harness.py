"""The harness of the real vantage6 servers works: by bare HTTP, without a line of this package's client."""

import time

import numpy as np
import pytest
import requests

from harness.vantage6_account import Account, until
from harness.vantage6_servers import RealServer

pytestmark = [pytest.mark.conformance]

VERSIONS = {3: "3.11.1", 4: "4.15.2", 5: "5.0.3"}


def pooled(server: RealServer, column: str) -> np.ndarray:
    tables = [np.genfromtxt(files["default"], delimiter=",", names=True) for files in server.cohorts.values()]
    return np.concatenate([table[column] for table in tables])


def test_the_published_version_answers(real_vantage6: RealServer) -> None:
    answer = requests.get(f"{real_vantage6.facts['url']}/version", timeout=10).json()
    assert answer == {"version": VERSIONS[real_vantage6.generation]}


@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_tasks_are_computed_by_the_nodes(real_vantage6: RealServer, collaboration: str) -> None:
    account = Account(real_vantage6.facts)
    bmi = pooled(real_vantage6, "bmi")
    parts = account.compute("partial_average", collaboration=collaboration, column="bmi")
    assert sum(part["sum"] for part in parts) == pytest.approx(bmi.sum())
    (whole,) = account.compute("central_average", "north", collaboration=collaboration, column="bmi")
    assert whole == {"average": pytest.approx(bmi.mean()), "count": 442}


def test_a_crash_a_kill_and_an_offline_node(real_vantage6: RealServer) -> None:
    account, admin = Account(real_vantage6.facts), Account(real_vantage6.facts, "north-admin")
    south = real_vantage6.facts["organizations"]["south"]["id"]
    task = account.create("crash", organizations=[south])["id"]
    assert account.wait(task) == ("crashed" if account.generation == 4 else "failed")
    assert [run["status"] for run in account.runs(task)] == ["completed", "crashed", "completed"]
    assert "ZeroDivisionError" in account.runs(task)[1]["log"]

    task = account.create("sleep", "north", seconds=60)["id"]
    until(lambda: account.runs(task)[0]["status"] == "active")
    assert account.ask("POST", "/kill/task", json={"id": task}).status_code == 401
    assert admin.ask("POST", "/kill/task", json={"id": task}).status_code == 200
    assert [run["status"] for run in account.runs(task)] == ["killed by user"]

    root = Account(real_vantage6.facts, "root")
    node = real_vantage6.nodes["west-plain"]
    node.stop()
    try:
        identifier = real_vantage6.facts["nodes"]["west-plain"]["id"]
        until(lambda: root.get(f"/node/{identifier}")["status"] == "offline")
        task = account.create("partial_average", "north", "west", column="bmi")["id"]
        until(lambda: account.runs(task)[0]["status"] == "completed")
        time.sleep(1)
        assert account.runs(task)[1]["status"] == "pending"
    finally:
        node.start()
    assert account.wait(task) == "completed"
    assert root.get(f"/node/{identifier}")["status"] == "online"
