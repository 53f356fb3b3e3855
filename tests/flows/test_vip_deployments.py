"""The deployments of VIP through a server and a process worker, as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.lab import Laboratory
from harness.documented import commands
from harness.laboratory import FlowRun, Remote, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEPLOYMENTS = (
    "vip-session",
    "vip-resume",
    "vip-collect",
    "vip-shared-inputs",
    "vip-kill",
    "vip-show-pipeline",
    "vip-replay",
    "vip-publish",
)
CREDENTIALS = {"$ref": {"block_document_slug": "vip-credentials/lab"}}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory")) as laboratory:
        facts = laboratory.sandbox["vip"]
        printed = laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
            PREFECT_BIOMED_VIP_URL=facts["url"],
        )
        assert "vip-credentials/lab saved with api_key, url" in printed
        assert facts["api_key"] not in printed
        yield laboratory


@pytest.fixture
def parameters(input_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "credentials": CREDENTIALS,
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": str(input_dir),
        "output_dir": str(tmp_path / "out"),
        "refresh_time": 0.5,
    }


def deployment(laboratory: Laboratory, name: str) -> dict[str, Any]:
    answer = requests.get(f"{laboratory.api_url}/deployments/name/{name}/{name}", timeout=30)
    assert answer.ok, answer.text
    return dict(answer.json())


def test_every_deployment_has_a_form_with_described_fields(laboratory: Laboratory) -> None:
    for name in DEPLOYMENTS:
        schema = deployment(laboratory, name)["parameter_openapi_schema"]
        assert all(field["description"] for field in schema["properties"].values()), name
        assert schema["definitions"]["VipCredentials"]["block_type_slug"] == "vip-credentials"
    schema = deployment(laboratory, "vip-session")["parameter_openapi_schema"]
    fields = schema["properties"]
    assert fields["credentials"]["$ref"] == "#/definitions/VipCredentials"
    assert (fields["nb_runs"]["minimum"], fields["nb_runs"]["maximum"]) == (1, 1000)
    assert fields["refresh_time"]["exclusiveMinimum"] == 0
    assert fields["outputs"]["anyOf"] == [{"$ref": "#/definitions/Outputs"}, {"type": "null"}]
    wanted = schema["definitions"]["Outputs"]["properties"]["get_status"]
    assert wanted["items"]["enum"] == ["Finished", "ExecutionFailed", "Killed"]


def test_values_out_of_bounds_are_refused_before_a_run(laboratory: Laboratory, parameters: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="greater than the maximum of 1000"):
        laboratory.run(
            "prefect",
            "deployment",
            "run",
            "vip-session/vip-session",
            "--params",
            json.dumps(parameters | {"nb_runs": 1001}),
        )
    with pytest.raises(RuntimeError, match="wiat"):
        laboratory.run(
            "prefect",
            "deployment",
            "run",
            "vip-session/vip-session",
            "--params",
            json.dumps(parameters | {"waiting": {"wiat": False}}),
        )


def test_collecting_is_scheduled_but_off(laboratory: Laboratory) -> None:
    (schedule,) = deployment(laboratory, "vip-collect")["schedules"]
    assert schedule["schedule"]["cron"] == "*/5 * * * *"
    assert schedule["active"] is False


def test_deployment_run_completes_and_no_file_holds_the_key(
    laboratory: Laboratory, parameters: dict[str, Any], tmp_path: Path
) -> None:
    laboratory.run(
        "prefect",
        "deployment",
        "run",
        "vip-session/vip-session",
        "--params",
        json.dumps(parameters | {"outputs": {"keep_archives": True}, "waiting": {"timeout_seconds": 300}}),
        "--watch",
    )
    assert len(list((tmp_path / "out").rglob("measures.csv"))) == 1
    assert len(list((tmp_path / "out").rglob("*.tar.gz"))) == 1
    key = laboratory.sandbox["vip"]["api_key"].encode()
    searched = [path for folder in (laboratory.home, tmp_path) for path in folder.rglob("*") if path.is_file()]
    kinds = {path.relative_to(laboratory.home).parts[0] for path in searched if path.is_relative_to(laboratory.home)}
    assert kinds >= {"prefect", "logs", "sandbox.json"}
    assert any("storage" in path.parts for path in searched), "no persisted result was searched"
    assert [path for path in searched if path.stem != "sandbox" and key in path.read_bytes()] == []
    for kind in ("artifacts", "logs", "flow_runs", "task_runs"):
        answer = requests.post(f"{laboratory.api_url}/{kind}/filter", json={"limit": 200}, timeout=30)
        assert answer.ok
        assert answer.json(), kind
        assert key not in answer.content
    events = requests.post(f"{laboratory.api_url}/events/filter", json={"limit": 50}, timeout=30)
    assert events.ok
    assert key not in events.content


def test_events_tell_of_each_execution(laboratory: Laboratory, parameters: dict[str, Any]) -> None:
    run = FlowRun(laboratory, "vip-session/vip-session", parameters)
    assert run.wait() == "COMPLETED", run.logs()

    def names() -> set[str]:
        body = {"filter": {"event": {"prefix": ["biomed."]}}, "limit": 50}
        answer = requests.post(f"{laboratory.api_url}/events/filter", json=body, timeout=30)
        return {event["event"] for event in answer.json()["events"]}

    expected = {"biomed.vip.execution.launched", "biomed.vip.execution.finished", "biomed.vip.session.finished"}
    wait_until(lambda: names() >= expected, 30, f"events {expected}")


@pytest.mark.parametrize("asked", [True, False])
def test_cancelling_kills_the_executions_when_asked(
    laboratory: Laboratory, parameters: dict[str, Any], asked: bool
) -> None:
    remote = Remote(laboratory, "vip")
    remote.reset()
    remote.switch(job_seconds=40.0)
    run = FlowRun(
        laboratory, "vip-session/vip-session", parameters | {"waiting": {"cancel_remote": asked}, "nb_runs": 2}
    )
    wait_until(lambda: len(remote.journal("POST", "/executions")) == 2, 60, "two launches")
    looks = len(remote.journal("GET", "/executions"))
    wait_until(lambda: len(remote.journal("GET", "/executions")) > looks + 2, 60, "the monitor")
    laboratory.run("prefect", "flow-run", "cancel", run.id)
    assert run.wait("CANCELLED", seconds=60) == "CANCELLED"

    def kills() -> int:
        return len([e for e in remote.journal("PUT", "/kill") if e["status"] == 204])

    if asked:
        wait_until(lambda: kills() == 2, 30, "two kills")
    assert kills() == (2 if asked else 0)
    remote.switch(job_seconds=0.0)


def test_relative_folders_are_refused_in_a_deployed_run(laboratory: Laboratory, parameters: dict[str, Any]) -> None:
    run = FlowRun(laboratory, "vip-session/vip-session", parameters | {"output_dir": "outputs"})
    assert run.wait() == "FAILED"
    assert "Give an absolute path" in run.message


def test_resume_and_collect_through_their_deployments(
    laboratory: Laboratory, parameters: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        launched = FlowRun(
            laboratory,
            "vip-session/vip-session",
            parameters
            | {"session_name": name, "output_dir": str(tmp_path / "sessions" / name), "waiting": {"wait": False}},
        )
        assert launched.wait() == "COMPLETED", launched.logs()
    first = {"credentials": CREDENTIALS, "output_dir": str(tmp_path / "sessions" / "first"), "refresh_time": 0.5}
    resumed = FlowRun(laboratory, "vip-resume/vip-resume", first)
    assert resumed.wait() == "COMPLETED", resumed.logs()
    collected = FlowRun(
        laboratory, "vip-collect/vip-collect", {"credentials": CREDENTIALS, "folder": str(tmp_path / "sessions")}
    )
    assert collected.wait() == "COMPLETED", collected.logs()
    for name in ("first", "second"):
        assert len(list((tmp_path / "sessions" / name).rglob("measures.csv"))) == 1


@pytest.mark.parametrize("where", [(), ("--dask",)], ids=["threads", "dask"])
def test_single_tasks_in_a_flow_of_ones_own(laboratory: Laboratory, where: tuple[str, ...]) -> None:
    printed = laboratory.run("python", "-m", "examples.own_flow", *where)
    assert [f"'threshold': '{threshold}'" in printed for threshold in (0.2, 0.35, 0.5)] == [True] * 3


@pytest.mark.parametrize(
    "begin",
    [
        "prefect block register",
        "prefect deployment schedule ls",
        "prefect flow-run ls",
        "prefect work-pool set-concurrency-limit",
        "prefect work-queue pause",
        "prefect work-queue set-concurrency-limit",
    ],
)
def test_what_the_documents_tell_to_type_works(laboratory: Laboratory, begin: str) -> None:
    documented = [words for command, words in commands().items() if command.startswith(begin)]
    assert documented
    for words in documented:
        laboratory.run(*words)
