"""The official clients of vantage6, unmodified from PyPI, work against the sandbox as against the real servers."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from harness.vantage6_account import Account, until
from harness.vantage6_servers import ENVIRONMENTS
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL, Vantage6Sandbox

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

_ANSWER = "@answer "
# Every script gets the facts of the sandbox as its first argument and prints one answer as JSON.
_COMMON = """
import json, sys
facts = json.loads(sys.argv[1])
options = json.loads(sys.argv[2])
def answer(value):
    print("@answer " + json.dumps(value), flush=True)
"""
_USER_4 = (
    _COMMON
    + """
from vantage6.client import UserClient
host, port = facts["url"].removesuffix("/api").rsplit(":", 1)
client = UserClient(host, int(port), "/api")
client.authenticate(options["username"], facts["users"][options["username"]]["password"])
client.setup_encryption(options.get("key"))
"""
)
_USER_5 = (
    _COMMON
    + """
import webbrowser
# The test is the browser.
webbrowser.open = lambda url: print("@browser " + url, flush=True) or True
from vantage6.client import UserClient
client = UserClient(hq_url=facts["url"], auth_url=facts["auth_url"])
client.authenticate()
client.setup_encryption(options.get("key"))
"""
)
_LIST = """
def names(page, key="name"):
    return [record[key] for record in page["data"]]
answer({
    "organizations": names(client.organization.list(collaboration=options["collaboration"])),
    "collaborations": names(client.collaboration.list()),
    "nodes": {n["name"]: n["status"] for n in client.node.list(collaboration=options["collaboration"])["data"]},
    "users": names(client.user.list(), "username"),
    "roles": len(client.role.list(per_page=100)["data"]),
    "rules": len(client.rule.list()["data"]),
    "study": names(client.study.list()),
    "whoami": client.whoami.organization_name,
})
"""
_COMPUTE_4 = """
answers = {}
for method, organizations in options["tasks"].items():
    task = client.task.create(
        collaboration=options["collaboration"], organizations=organizations, name=method, image=options["image"],
        description="conformance", input_={"method": method, "kwargs": {"column": "bmi"}},
        databases=[{"label": "default"}],
    )
    answers[method] = [json.loads(r["result"]) for r in client.wait_for_results(task["id"], interval=0.1)["data"]]
listed = [t["name"] for t in client.task.list()["data"]]
answer({"results": answers, "tasks": listed})
"""
_COMPUTE_5 = """
client.setup_collaboration(options["collaboration"])
session = client.session.create(scope="organization", name=options["name"], collaboration=options["collaboration"])
frame = client.dataframe.create(
    label="default", image=options["image"], method="read_csv", arguments={}, session=session["id"],
    name=options["name"],
)
client.wait_for_results(frame["last_session_task"]["id"], interval=0.1)
frame = client.dataframe.get(frame["id"])
answers = {}
for method, organizations in options["tasks"].items():
    task = client.task.create(
        collaboration=options["collaboration"], organizations=organizations, name=method, image=options["image"],
        description="conformance", method=method, arguments={"column": "bmi"}, session=session["id"],
        databases=[[{"type": "dataframe", "dataframe_id": frame["id"]}]],
        action="central_compute" if method.startswith("central") else "federated_compute",
    )
    answers[method] = [json.loads(r["result"]) for r in client.wait_for_results(task["id"], interval=0.1)["data"]]
answer({
    "results": answers, "ready": frame["ready"], "columns": len(frame["columns"]),
    "sessions": [s["name"] for s in client.session.list()["data"]],
    "tasks": [t["name"] for t in client.task.list()["data"]],
})
"""


@pytest.fixture(scope="module")
def run(official_environment: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return what runs a script in the official environment of a generation and returns its answer."""
    folder = tmp_path_factory.mktemp("official")

    def run(sandbox: Vantage6Sandbox, script: str, username: str = "north-researcher", **options: Any) -> Any:
        options["username"] = username
        facts = sandbox.ready()
        interpreter = official_environment(*ENVIRONMENTS[facts["generation"]])
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "KEYCLOAK_REALM": "vantage6"}
        process = subprocess.Popen(
            [str(interpreter), "-u", "-c", script, json.dumps(facts), json.dumps(options)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        watchdog = threading.Timer(180, process.kill)
        watchdog.start()
        printed: list[str] = []
        found: list[Any] = []
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                printed.append(line)
                if line.startswith("@browser "):
                    log_in(line.split()[1], username)
                elif line.startswith(_ANSWER):
                    found.append(json.loads(line.removeprefix(_ANSWER)))
        watchdog.cancel()
        assert process.returncode == 0 and len(found) == 1, "".join(printed)
        return found[0]

    return run


def log_in(url: str, username: str) -> None:
    """Do what a person does at the page that a device code leads to."""
    code = re.findall("user_code=([^&]*)", url)[0]
    form = {"user_code": code, "username": username, "password": "Sandbox-1!"}
    assert requests.post(url.partition("?")[0], data=form, timeout=10).status_code == 200


def serve(generation: int) -> Iterator[Vantage6Sandbox]:
    with Sandbox("vantage6", vantage6={"generation": generation, "device_interval": 1}) as sandbox:
        assert isinstance(sandbox.vantage6, Vantage6Sandbox)
        yield sandbox.vantage6


@pytest.fixture(scope="module", params=[4, 5])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Vantage6Sandbox]:
    yield from serve(request.param)


def test_the_official_client_logs_in_and_lists(sandbox: Vantage6Sandbox, run: Callable[..., Any]) -> None:
    script = (_USER_4 if sandbox.generation == 4 else _USER_5) + _LIST
    answer = run(sandbox, script, collaboration=1)
    assert answer["organizations"] == ["north", "south", "west"]
    assert answer["collaborations"] == ["plain", "encrypted"]
    assert answer["nodes"] == {"north-plain": "online", "south-plain": "online", "west-plain": "online"}
    assert "north-researcher" in answer["users"] and answer["roles"] == 7
    assert answer["study"] == ["north-and-south"] and answer["whoami"] == "north"
    assert answer["rules"] == 20


@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_the_official_client_creates_waits_and_reads_results(
    sandbox: Vantage6Sandbox, run: Callable[..., Any], collaboration: str
) -> None:
    facts = sandbox.ready()
    place = facts["collaborations"][collaboration]
    options: dict[str, Any] = {
        "collaboration": place["id"],
        "image": CLINICAL,
        "name": f"official-{collaboration}",
        "tasks": {"partial_average": [2, 3, 4], "central_average": [2]},
    }
    if place["encrypted"]:
        options["key"] = facts["organizations"]["north"]["private_key"]
    public = [organization.public_key for organization in sandbox.registry.organizations]
    script = _USER_4 + _COMPUTE_4 if sandbox.generation == 4 else _USER_5 + _COMPUTE_5
    answer = run(sandbox, script, **options)
    files = [np.genfromtxt(f["default"], delimiter=",", names=True)["bmi"] for f in sandbox.cohorts.values()]
    # The client lists the newest run first.
    parts = [{"sum": pytest.approx(bmi.sum()), "count": len(bmi)} for bmi in reversed(files)]
    pooled = np.concatenate(files)
    assert answer["results"]["partial_average"] == parts
    assert answer["results"]["central_average"] == [{"average": pytest.approx(pooled.mean()), "count": 442}]
    assert {"partial_average", "central_average", "subtask"} <= set(answer["tasks"])
    if sandbox.generation == 5:
        assert answer["ready"] and answer["columns"] == 33 and f"official-{collaboration}" in answer["sessions"]
    # It compares the key and sees no need to upload another.
    assert public == [organization.public_key for organization in sandbox.registry.organizations]


_CRASH_AND_KILL = """
def create(method, **arguments):
    common = dict(collaboration=1, organizations=[2, 3, 4], name=method, image=options["image"], description="")
    if facts["generation"] == 4:
        return client.task.create(**common, input_={"method": method, "kwargs": arguments})["id"]
    return client.task.create(**common, method=method, arguments=arguments, session=session["id"],
        action="federated_compute", databases=[[]])["id"]
if facts["generation"] == 5:
    client.setup_collaboration(1)
    session = client.session.create(scope="own", name="crashes", collaboration=1)
crash = create("crash", organizations=[3])
while any(r["finished_at"] is None for r in client.run.from_task(crash)["data"]):
    pass
runs = client.run.from_task(crash)["data"]
sleep = create("sleep", seconds=60)
client.task.kill(sleep)
answer({
    "crash": sorted([r["organization"]["id"], r["status"], "ZeroDivisionError" in (r["log"] or "")] for r in runs),
    "killed": [r["status"] for r in client.run.from_task(sleep)["data"]],
})
"""


def test_the_official_client_reads_crashes_and_kills(sandbox: Vantage6Sandbox, run: Callable[..., Any]) -> None:
    script = (_USER_4 if sandbox.generation == 4 else _USER_5) + _CRASH_AND_KILL
    answer = run(sandbox, script, username="north-admin", image=CLINICAL)
    assert answer["crash"] == [[2, "completed", False], [3, "crashed", True], [4, "completed", False]]
    assert answer["killed"] == ["killed by user"] * 3


_NODE_4 = (
    _COMMON
    + """
from vantage6.common.client.node_client import NodeClient
host, port = facts["url"].removesuffix("/api").rsplit(":", 1)
client = NodeClient(host, int(port), "/api")
client.authenticate(facts["nodes"]["north-plain"]["api_key"])
"""
)
_NODE_5 = (
    _COMMON
    + """
from vantage6.common.client.node_client import NodeClient
client = NodeClient("north-plain", facts["nodes"]["north-plain"]["api_key"], facts["url"], facts["auth_url"])
client.authenticate()
"""
)
_RUN_ONE = """
client.setup_encryption(None)
assert not client.is_encrypted_collaboration()
runs = client.run.list(state="open", include_task=True)
runs = runs["data"] if isinstance(runs, dict) else runs
(run,) = [r for r in runs if r["organization"]["id"] == client.whoami.organization_id]
(client.set_task_start_time if facts["generation"] == 4 else client.set_run_start_time)(run["id"])
client.run.patch(id_=run["id"], data={"status": "active"})
from datetime import datetime, timezone
client.run.patch(
    id_=run["id"],
    data={"result": b'{"by": "the real node"}', "log": "done", "status": "completed",
          "finished_at": datetime.now(timezone.utc).isoformat()},
    init_org_id=run["task"]["init_org"]["id"],
)
answer({"name": client.whoami.name, "collaboration": client.collaboration_id, "image": run["task"]["image"],
        "input": run.get("input") is not None or run.get("arguments") is not None})
"""


def test_the_client_of_the_real_node_logs_in_and_works_off_a_run(
    sandbox: Vantage6Sandbox, run: Callable[..., Any]
) -> None:
    account = Account(sandbox.ready())
    body = account.body("echo", ("north",))
    sandbox.switches.offline = ["north-plain"]
    try:
        task = account.post("/task", body)["id"]
        answer = run(sandbox, (_NODE_4 if sandbox.generation == 4 else _NODE_5) + _RUN_ONE)
        assert answer == {"name": "north-plain", "collaboration": 1, "image": CLINICAL, "input": True}
        until(lambda: account.get(f"/task/{task}")["status"] == "completed")
        assert account.outputs(task) == [{"by": "the real node"}]
    finally:
        sandbox.switches.offline = []


_USER_3 = (
    _COMMON
    + """
from vantage6.client import Client
host, port = facts["url"].removesuffix("/api").rsplit(":", 1)
client = Client(host, int(port), "/api")
client.authenticate("north-researcher", facts["users"]["north-researcher"]["password"])
client.setup_encryption(options.get("key"))
import base64
def create(method, organizations, master):
    return client.task.create(collaboration=options["collaboration"], organizations=organizations, name=method,
        image=options["image"], description="", database="default", data_format="json",
        input={"master": master, "method": method, "args": [], "kwargs": {"column": "bmi"}, "output_format": "json"})
import time
answers = {}
for method, organizations in options["tasks"].items():
    task = create(method, organizations, method.startswith("central"))
    while not client.task.get(task["id"])["complete"]:
        time.sleep(0.1)
    results = client.result.from_task(task["id"])
    results = results["data"] if isinstance(results, dict) else results
    answers[method] = [r["result"] for r in results]
answer(answers)
"""
)


@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_the_official_client_3_computes(run: Callable[..., Any], collaboration: str) -> None:
    for sandbox in serve(3):
        facts = sandbox.ready()
        options: dict[str, Any] = {"collaboration": facts["collaborations"][collaboration]["id"], "image": CLINICAL}
        options["tasks"] = {"partial_average": [2, 3, 4], "central_average": [2]}
        if collaboration == "encrypted":
            options["key"] = facts["organizations"]["north"]["private_key"]
        answer = run(sandbox, _USER_3, **options)
        assert sum(part["count"] for part in answer["partial_average"]) == 442
        assert answer["central_average"][0]["count"] == 442
