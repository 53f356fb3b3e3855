"""Worker and flow process are killed together; the automations bring the run back without a hand, nothing doubled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from laboratory import FlowRun, Remote, wait_until

from examples.lab import Laboratory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CREDENTIALS = {"$ref": {"block_document_slug": "vip-credentials/lab"}}
AUTOMATIONS = (
    "python",
    "deployments/automations.py",
    "--silence-seconds=50",
    "--quiet-seconds=15",
    "--begin-seconds=60",
    "--max-runs=3",
)
BACK_WITHIN_SECONDS = 240.0


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    home = tmp_path_factory.mktemp("laboratory")
    with Laboratory(home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30") as laboratory:
        facts = laboratory.sandbox["vip"]
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
            PREFECT_BIOMED_VIP_URL=facts["url"],
        )
        printed = laboratory.run(*AUTOMATIONS)
        assert printed.count("installed: ") == 3
        yield laboratory


@pytest.fixture
def remote(laboratory: Laboratory) -> Iterator[Remote]:
    remote = Remote(laboratory, "vip")
    remote.reset()
    yield remote
    remote.switch(transfer_seconds=0.0, job_seconds=0.0, latency_ms=0.0)


def installed(laboratory: Laboratory) -> list[dict[str, Any]]:
    return list(requests.post(f"{laboratory.api_url}/automations/filter", json={}, timeout=30).json())


def power_cut(laboratory: Laboratory, run: FlowRun) -> None:
    """Nobody is left who could report the crash; then the machine is there again."""
    laboratory.kill("worker")
    run.kill()
    laboratory.start_worker()


def launches(remote: Remote) -> int:
    return len([entry for entry in remote.journal("POST", "/executions") if entry["status"] < 300])


def names(remote: Remote, session: str) -> Counter[str]:
    listed = requests.get(f"{remote.url}/rest/executions", headers={"apikey": remote.facts["api_key"]}, timeout=10)
    return Counter(entry["name"] for entry in listed.json() if entry["name"].startswith(session))


def test_installing_again_changes_what_differs_and_leaves_paused_ones_paused(laboratory: Laboratory) -> None:
    before = {automation["name"]: automation["id"] for automation in installed(laboratory)}
    paused = next(iter(before))
    requests.patch(f"{laboratory.api_url}/automations/{before[paused]}", json={"enabled": False}, timeout=30)
    printed = laboratory.run(*AUTOMATIONS[:-1], "--max-runs=7")
    assert printed.count("updated: ") == 3
    assert f"{paused} (stays paused)" in printed
    after = installed(laboratory)
    assert {automation["name"]: automation["id"] for automation in after} == before
    assert [automation["name"] for automation in after if not automation["enabled"]] == [paused]
    counts = [a["trigger"]["match"].get("prefect.run-count") for a in after]
    assert [str(n) for n in range(1, 7)] in counts
    requests.patch(f"{laboratory.api_url}/automations/{before[paused]}", json={"enabled": True}, timeout=30)
    laboratory.run(*AUTOMATIONS)


def test_a_session_goes_on(laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path) -> None:
    remote.switch(job_seconds=20.0)
    run = FlowRun(
        laboratory,
        "vip-session/vip-session",
        {
            "credentials": CREDENTIALS,
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(input_dir),
            "output_dir": str(tmp_path / "out"),
            "session_name": "session",
            "nb_runs": 2,
            "refresh_time": 0.5,
        },
    )
    wait_until(lambda: launches(remote) == 2, 90, "two launches")
    looks = len(remote.journal("GET", "/executions"))
    wait_until(lambda: len(remote.journal("GET", "/executions")) > looks + 3, 60, "some looks")
    power_cut(laboratory, run)
    assert run.wait("COMPLETED", "FAILED", seconds=BACK_WITHIN_SECONDS) == "COMPLETED", run.logs()
    assert sorted(names(remote, "session").values()) == [1, 1]
    assert launches(remote) == 2
    assert len([e for e in remote.journal("PUT", "/INPUTS/anatomical.nii") if e["status"] == 201]) == 1
    assert len(list((tmp_path / "out").rglob("measures.csv"))) == 2


def test_shared_inputs_go_on(laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path) -> None:
    remote.switch(job_seconds=20.0)
    parameter_set = {"pipeline_id": "GreyMatter/1.0", "input_settings": {"t1": "anatomical.nii"}}
    run = FlowRun(
        laboratory,
        "vip-shared-inputs/vip-shared-inputs",
        {
            "credentials": CREDENTIALS,
            "runs": [parameter_set, parameter_set],
            "input_dir": str(input_dir),
            "output_dir": str(tmp_path / "out"),
            "session_name": "shared",
            "refresh_time": 0.5,
        },
    )
    wait_until(lambda: launches(remote) == 1, 90, "the first launch")
    power_cut(laboratory, run)
    assert run.wait("COMPLETED", "FAILED", seconds=BACK_WITHIN_SECONDS) == "COMPLETED", run.logs()
    assert sorted(names(remote, "shared").values()) == [1, 1]
    assert launches(remote) == 2
    assert len([e for e in remote.journal("PUT", "/INPUTS/anatomical.nii") if e["status"] == 201]) == 1
    for number in (1, 2):
        record = json.loads((tmp_path / "out" / str(number) / "session_data.json").read_text())
        assert {workflow["status"] for workflow in record["workflows"].values()} == {"Removed"}
        assert len(list((tmp_path / "out" / str(number)).rglob("measures.csv"))) == 1


def test_a_run_that_always_dies_is_given_up(
    laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path
) -> None:
    remote.switch(job_seconds=300.0)
    run = FlowRun(
        laboratory,
        "vip-session/vip-session",
        {
            "credentials": CREDENTIALS,
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(input_dir),
            "output_dir": str(tmp_path / "out"),
            "session_name": "poison",
            "refresh_time": 0.5,
        },
    )
    for count in (1, 2, 3):
        wait_until(lambda count=count: run.began == count, 120, f"begun {count} times, is {run.began}")
        run.wait("RUNNING")
        run.kill()
        run.wait("CRASHED")
    with pytest.raises(AssertionError):
        wait_until(lambda: run.state != "CRASHED", 45, "nothing happens any more")
    assert run.began == 3
    assert launches(remote) <= 1
