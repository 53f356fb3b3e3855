"""Worker and flow process are killed together; the automations bring the run back without a hand, nothing doubled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from ingest_lab import volume
from laboratory import FlowRun, Remote, wait_until
from PIL import Image

from examples.lab import Laboratory
from prefect_biomed.clients.boss import BossClient
from prefect_biomed.sandbox.vantage6 import CLINICAL

pytestmark = [pytest.mark.slow, pytest.mark.endurance, pytest.mark.timeout(900)]

CREDENTIALS = {"$ref": {"block_document_slug": "vip-credentials/lab"}}
TILES = 400
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
    settings = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_BIOMED_HOME": str(home / "ledgers")}
    with Laboratory(home, platforms=("vip", "vantage6", "boss"), **settings) as laboratory:
        vip, vantage6, boss = (laboratory.sandbox[platform] for platform in laboratory.platforms)
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=lab",
            PREFECT_BIOMED_VIP_API_KEY=vip["api_key"],
            PREFECT_BIOMED_VIP_URL=vip["url"],
            PREFECT_BIOMED_VANTAGE6_URL=vantage6["url"],
            PREFECT_BIOMED_VANTAGE6_USERNAME="north-researcher",
            PREFECT_BIOMED_VANTAGE6_PASSWORD=vantage6["users"]["north-researcher"]["password"],
            PREFECT_BIOMED_BOSS_TOKEN=boss["tokens"]["alice"],
            PREFECT_BIOMED_BOSS_HOST=boss["host"],
            PREFECT_BIOMED_BOSS_PROTOCOL="http",
            PREFECT_BIOMED_BOSS_AWS_ENDPOINT_URL=boss["url"],
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


def test_a_repeatability_experiment_goes_on(
    laboratory: Laboratory, remote: Remote, input_dir: Path, tmp_path: Path
) -> None:
    remote.switch(job_seconds=20.0)
    run = FlowRun(
        laboratory,
        "repeatability-experiment/repeatability-weekly",
        {
            "credentials": CREDENTIALS,
            "pipelines": ["GreyMatter/1.0"],
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(input_dir),
            "experiment_dir": str(tmp_path / "experiment"),
            "session_name": "experiment",
            "repetitions": 3,
            "refresh_time": 0.5,
        },
    )
    wait_until(lambda: launches(remote) == 2, 120, "two launches")
    power_cut(laboratory, run)
    assert run.wait("COMPLETED", "FAILED", seconds=BACK_WITHIN_SECONDS) == "COMPLETED", run.logs()
    assert sorted(names(remote, "experiment").values()) == [1, 1, 1]
    assert launches(remote) == 3
    assert len([e for e in remote.journal("PUT", "/INPUTS/anatomical.nii") if e["status"] == 201]) == 1


def test_a_federated_analysis_goes_on(laboratory: Laboratory) -> None:
    remote = Remote(laboratory, "vantage6")
    remote.url = remote.url.removesuffix("/api")
    remote.reset()
    run = FlowRun(
        laboratory,
        "federated-analysis/federated-analysis",
        {
            "credentials": {"$ref": {"block_document_slug": "vantage6-credentials/lab"}},
            "collaboration": "plain",
            "image": CLINICAL,
            "method": "sleep",
            "arguments": {"seconds": 30.0},
            "databases": "default",
        },
    )

    def created() -> int:
        return len([e for e in remote.journal("POST", "/task") if e["path"].endswith("/task") and e["status"] == 201])

    wait_until(lambda: created() == 1, 120, "the task")
    power_cut(laboratory, run)
    assert run.wait("COMPLETED", "FAILED", seconds=BACK_WITHIN_SECONDS) == "COMPLETED", run.logs()
    assert created() == 1


def test_an_ingest_goes_on(laboratory: Laboratory, tmp_path: Path) -> None:
    remote = Remote(laboratory, "boss")
    remote.switch(latency_ms=25, quiet_seconds=4, prepare_seconds=0.2)
    pixels = volume((TILES, 64, 64))
    for z, plane in enumerate(pixels):
        (tmp_path / "stack" / str(z)).mkdir(parents=True)
        Image.fromarray(plane).save(tmp_path / "stack" / str(z) / "0_0_0.png")
    plugin = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    params = {"root_dir": str(tmp_path / "stack"), "filetype": "png"}
    config = {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "http"},
            "path_processor": {"class": f"{plugin}PathProcessor", "params": params},
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": {"filetype": "png"}},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": "uint8"},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, 64], "y": [0, 64], "z": [0, TILES], "t": [0, 1]},
            "tile_size": {"x": 64, "y": 64, "z": 1, "t": 1},
        },
    }
    credentials = {"$ref": {"block_document_slug": "boss-credentials/lab"}}
    run = FlowRun(
        laboratory,
        "boss-ingest/boss-ingest",
        {"credentials": credentials, "config": config, "upload": {"threads": 2, "min_lease_seconds": 3}},
    )

    def jobs() -> dict[str, Any]:
        return dict(requests.get(f"{remote.url}/_sandbox/ready", timeout=10).json()["jobs"])

    wait_until(lambda: jobs().get("1", {}).get("puts", 0) > 20, 120, "some tiles")
    power_cut(laboratory, run)
    assert run.wait("COMPLETED", "FAILED", seconds=BACK_WITHIN_SECONDS) == "COMPLETED", run.logs()
    (job,) = jobs().values()
    assert job["status"] == "COMPLETE"
    assert job["distinct_indexed"] == TILES
    facts = remote.facts
    with BossClient(facts["host"], facts["tokens"]["alice"], protocol="http") as client:
        block = client.cutout("sandbox/stack/uint8", 0, (0, 64), (0, 64), (0, TILES))
    assert np.array_equal(np.frombuffer(block.content, block.datatype).reshape(block.shape), pixels)


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
