"""Twenty sessions whose jobs overlap, in a queue that lets one flow run at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.lab import WORK_POOL, Laboratory
from harness.laboratory import FlowRun, Remote, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.endurance, pytest.mark.timeout(2400)]

CREDENTIALS = {"$ref": {"block_document_slug": "vip-credentials/lab"}}
SESSIONS = 20


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory")) as laboratory:
        laboratory.run("prefect", "work-queue", "set-concurrency-limit", "vip", "1", "--pool", WORK_POOL)
        facts = laboratory.sandbox["vip"]
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
            PREFECT_BIOMED_VIP_URL=facts["url"],
        )
        yield laboratory


@pytest.fixture
def remote(laboratory: Laboratory) -> Remote:
    remote = Remote(laboratory, "vip")
    remote.reset()
    return remote


def start(laboratory: Laboratory, input_dir: Path, folder: Path, name: str, wait: bool | str) -> FlowRun:
    return FlowRun(
        laboratory,
        "vip-session/vip-session",
        {
            "credentials": CREDENTIALS,
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(input_dir),
            "output_dir": str(folder / name),
            "session_name": name,
            "refresh_time": 1,
            "waiting": {"wait": wait},
        },
    )


def collect(laboratory: Laboratory, folder: Path) -> FlowRun:
    return FlowRun(laboratory, "vip-collect/vip-collect", {"credentials": CREDENTIALS, "folder": str(folder)})


def executions(remote: Remote, prefix: str) -> list[dict[str, Any]]:
    listed = requests.get(f"{remote.url}/rest/executions", headers={"apikey": remote.facts["api_key"]}, timeout=10)
    return [execution for execution in listed.json() if execution["name"].startswith(prefix)]


def test_the_form_offers_all_three_ways_to_wait(laboratory: Laboratory) -> None:
    answer = requests.get(f"{laboratory.api_url}/deployments/name/vip-session/vip-session", timeout=30).json()
    field = answer["parameter_openapi_schema"]["definitions"]["SessionWaiting"]["properties"]["wait"]
    assert field["default"] is True
    assert {tuple(sorted(choice.items())) for choice in field["anyOf"]} == {
        (("type", "boolean"),),
        (("const", "suspend"), ("type", "string")),
    }


def test_a_run_that_was_resumed_too_early_is_suspended_again(
    laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path
) -> None:
    remote.switch(job_seconds=45.0)
    run = start(laboratory, input_dir, tmp_path, "early", "suspend")
    assert run.wait("PAUSED", "FAILED", "CRASHED", "COMPLETED") == "PAUSED", run.logs()
    requests.post(f"{laboratory.api_url}/flow_runs/{run.id}/resume", json={}, timeout=30)
    run.wait("RUNNING")
    assert run.wait("PAUSED", "FAILED", "CRASHED", "COMPLETED") == "PAUSED", run.logs()
    wait_until(lambda: executions(remote, "early")[0]["status"] == "Finished", 90, "the execution")
    assert collect(laboratory, tmp_path).wait() == "COMPLETED"
    assert run.wait("COMPLETED", "FAILED", "CRASHED") == "COMPLETED", run.logs()
    assert len(executions(remote, "early")) == 1
    assert len([e for e in remote.journal("PUT", "/INPUTS/anatomical.nii") if e["status"] == 201]) == 1


def test_without_suspending_each_session_keeps_the_slot(
    laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path
) -> None:
    remote.switch(job_seconds=5.0)
    runs = [start(laboratory, input_dir, tmp_path, f"held{number}", True) for number in range(3)]
    for run in runs:
        assert run.wait("COMPLETED", "FAILED", "CRASHED", seconds=180) == "COMPLETED", run.logs()
    starts = sorted(execution["startDate"] for execution in executions(remote, "held"))
    assert len(starts) == 3
    assert all(later - earlier >= 5000 for earlier, later in pairwise(starts)), starts


def test_twenty_overlapping_sessions_on_one_slot(
    laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path
) -> None:
    remote.switch(job_seconds=7200.0)
    began = time.monotonic()
    runs = [start(laboratory, input_dir, tmp_path, f"many{number:02d}", "suspend") for number in range(SESSIONS)]
    for run in runs:
        assert run.wait("PAUSED", "FAILED", "CRASHED", "COMPLETED", seconds=900) == "PAUSED", run.logs()
    launched = time.monotonic() - began
    found = executions(remote, "many")
    assert [execution["status"] for execution in found] == ["Running"] * SESSIONS
    remote.switch(job_seconds=0.0)
    wait_until(lambda: {e["status"] for e in executions(remote, "many")} == {"Finished"}, 60, "all executions")
    assert collect(laboratory, tmp_path).wait(seconds=300) == "COMPLETED"
    for run in runs:
        assert run.wait("COMPLETED", "FAILED", "CRASHED", seconds=900) == "COMPLETED", run.logs()
    print(f"{SESSIONS} launched in {launched:.0f} s, all done after {time.monotonic() - began:.0f} s")
    found = executions(remote, "many")
    assert len({e["name"] for e in found}) == len(found) == SESSIONS
    assert len([e for e in remote.journal("PUT", "/INPUTS/anatomical.nii") if e["status"] == 201]) == SESSIONS
    assert len(list(tmp_path.glob("many*/**/measures.csv"))) == SESSIONS
