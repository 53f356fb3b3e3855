"""A machine dies with runs of five flows at work; the automations bring them back without a hand, nothing doubled."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from examples.lab import Laboratory
from harness.ingest_lab import volume
from harness.laboratory import FlowRun, Remote, wait_until
from harness.postgresql import PASSWORD, postgresql
from prefect_biomed.clients.boss import BossClient
from prefect_biomed.sandbox.vantage6 import CLINICAL

pytestmark = [pytest.mark.slow, pytest.mark.endurance, pytest.mark.timeout(900)]

CREDENTIALS = {"$ref": {"block_document_slug": "vip-credentials/lab"}}
TILES = 400
PIXELS = volume((TILES, 64, 64))
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
    # On SQLite, an event that comes while something else is written may be lost, and a run with it.
    with (
        postgresql() as port,
        Laboratory(
            home,
            platforms=("vip", "vantage6", "boss"),
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30",
            PREFECT_SERVER_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/prefect",
        ) as laboratory,
    ):
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
        assert printed.count("installed: ") == 4
        yield laboratory


@pytest.fixture(scope="module")
def remote(laboratory: Laboratory) -> Remote:
    return Remote(laboratory, "vip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, volume: Path) -> Path:
    """Inputs, and what the runs write."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "inputs").mkdir()
    shutil.copy(volume, folder / "inputs" / "anatomical.nii")
    return folder


def installed(laboratory: Laboratory) -> list[dict[str, Any]]:
    return list(requests.post(f"{laboratory.api_url}/automations/filter", json={}, timeout=30).json())


def session(laboratory: Laboratory, folder: Path, name: str, nb_runs: int = 1) -> FlowRun:
    return FlowRun(
        laboratory,
        "vip-session/vip-session",
        {
            "credentials": CREDENTIALS,
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(folder / "inputs"),
            "output_dir": str(folder / name),
            "session_name": name,
            "nb_runs": nb_runs,
            "refresh_time": 0.5,
        },
    )


def shared_inputs(laboratory: Laboratory, folder: Path) -> FlowRun:
    parameter_set = {"pipeline_id": "GreyMatter/1.0", "input_settings": {"t1": "anatomical.nii"}}
    return FlowRun(
        laboratory,
        "vip-shared-inputs/vip-shared-inputs",
        {
            "credentials": CREDENTIALS,
            "runs": [parameter_set, parameter_set],
            "input_dir": str(folder / "inputs"),
            "output_dir": str(folder / "shared"),
            "session_name": "shared",
            "refresh_time": 0.5,
        },
    )


def experiment(laboratory: Laboratory, folder: Path) -> FlowRun:
    return FlowRun(
        laboratory,
        "repeatability-experiment/repeatability-weekly",
        {
            "credentials": CREDENTIALS,
            "pipelines": ["GreyMatter/1.0"],
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(folder / "inputs"),
            "experiment_dir": str(folder / "experiment"),
            "session_name": "experiment",
            "repetitions": 3,
            "refresh_time": 0.5,
        },
    )


def analysis(laboratory: Laboratory) -> FlowRun:
    return FlowRun(
        laboratory,
        "federated-analysis/federated-analysis",
        {
            "credentials": {"$ref": {"block_document_slug": "vantage6-credentials/lab"}},
            "collaboration": "plain",
            "image": CLINICAL,
            "method": "sleep",
            "arguments": {"seconds": 60.0},
            "databases": "default",
        },
    )


def ingest(laboratory: Laboratory, folder: Path) -> FlowRun:
    for z, plane in enumerate(PIXELS):
        (folder / "stack" / str(z)).mkdir(parents=True)
        Image.fromarray(plane).save(folder / "stack" / str(z) / "0_0_0.png")
    plugin = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    params = {"root_dir": str(folder / "stack"), "filetype": "png"}
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
    return FlowRun(
        laboratory,
        "boss-ingest/boss-ingest",
        {"credentials": credentials, "config": config, "upload": {"threads": 2, "min_lease_seconds": 3}},
    )


def launches(remote: Remote) -> int:
    return len([entry for entry in remote.journal("POST", "/executions") if entry["status"] < 300])


def names(remote: Remote, session: str) -> Counter[str]:
    listed = requests.get(f"{remote.url}/rest/executions", headers={"apikey": remote.facts["api_key"]}, timeout=10)
    return Counter(entry["name"] for entry in listed.json() if entry["name"].startswith(session))


def uploads(remote: Remote, session: str) -> int:
    sent = remote.journal("PUT", "/INPUTS/anatomical.nii")
    return len([entry for entry in sent if entry["status"] == 201 and f"/{session}/" in entry["path"]])


def tasks(laboratory: Laboratory) -> int:
    remote = Remote(laboratory, "vantage6")
    remote.url = remote.url.removesuffix("/api")
    return len([e for e in remote.journal("POST", "/task") if e["path"].endswith("/task") and e["status"] == 201])


def jobs(laboratory: Laboratory) -> dict[str, Any]:
    return dict(requests.get(f"{Remote(laboratory, 'boss').url}/_sandbox/ready", timeout=10).json()["jobs"])


@pytest.fixture(scope="module")
def runs(laboratory: Laboratory, remote: Remote, folder: Path) -> dict[str, FlowRun]:
    """Runs of the five flows that were at work when the machine died. It is there again, and nobody does more."""
    remote.switch(job_seconds=7200.0)
    runs = {"session": session(laboratory, folder, "session", nb_runs=2)}
    wait_until(lambda: names(remote, "session").total() == 2, 120, "two launches")
    looks = len(remote.journal("GET", "/executions"))
    wait_until(lambda: len(remote.journal("GET", "/executions")) > looks + 3, 60, "some looks")

    # The second launch has an effect, and the answer is not there yet.
    remote.fail(method="POST", path="/executions$", skip=1, times=1, after_effect=True, delay_seconds=120, status=504)
    runs["shared"] = shared_inputs(laboratory, folder)
    wait_until(lambda: names(remote, "shared").total() == 2, 120, "two launches")
    requests.delete(f"{remote.url}/_sandbox/faults", timeout=10)

    # The third launch has none, and the answer is not there yet either.
    remote.fail(method="POST", path="/executions$", skip=2, times=1, delay_seconds=120, status=503)
    runs["experiment"] = experiment(laboratory, folder)
    wait_until(lambda: names(remote, "experiment").total() == 2, 120, "two launches")
    requests.delete(f"{remote.url}/_sandbox/faults", timeout=10)

    runs["analysis"] = analysis(laboratory)
    wait_until(lambda: tasks(laboratory) == 1, 120, "the task")

    Remote(laboratory, "boss").switch(latency_ms=25, quiet_seconds=4, prepare_seconds=0.2)
    runs["ingest"] = ingest(laboratory, folder)
    wait_until(lambda: jobs(laboratory).get("1", {}).get("puts", 0) > 20, 120, "some tiles")

    # Nobody is left who could report the crash.
    laboratory.kill("worker")
    for run in runs.values():
        run.kill()
    assert {run.state for run in runs.values()} == {"RUNNING"}
    assert jobs(laboratory)["1"]["distinct_indexed"] < TILES
    remote.switch(job_seconds=0.0)
    laboratory.start_worker()
    return runs


def come_back(run: FlowRun) -> None:
    assert run.wait("COMPLETED", "FAILED", seconds=BACK_WITHIN_SECONDS) == "COMPLETED", run.logs()
    assert run.began == 2


def test_installing_again_changes_what_differs_and_leaves_paused_ones_paused(laboratory: Laboratory) -> None:
    before = {automation["name"]: automation["id"] for automation in installed(laboratory)}
    paused = next(iter(before))
    requests.patch(f"{laboratory.api_url}/automations/{before[paused]}", json={"enabled": False}, timeout=30)
    printed = laboratory.run(*AUTOMATIONS[:-1], "--max-runs=7")
    assert printed.count("updated: ") == 4
    assert f"{paused} (stays paused)" in printed
    after = installed(laboratory)
    assert {automation["name"]: automation["id"] for automation in after} == before
    assert [automation["name"] for automation in after if not automation["enabled"]] == [paused]
    counts = [a["trigger"]["match"].get("prefect.run-count") for a in after]
    assert [str(n) for n in range(1, 7)] in counts
    requests.patch(f"{laboratory.api_url}/automations/{before[paused]}", json={"enabled": True}, timeout=30)
    laboratory.run(*AUTOMATIONS)


def test_a_session_goes_on(runs: dict[str, FlowRun], remote: Remote, folder: Path) -> None:
    come_back(runs["session"])
    assert sorted(names(remote, "session").values()) == [1, 1]
    assert uploads(remote, "session") == 1
    assert len(list((folder / "session").rglob("measures.csv"))) == 2


def test_shared_inputs_go_on(runs: dict[str, FlowRun], remote: Remote, folder: Path) -> None:
    come_back(runs["shared"])
    assert sorted(names(remote, "shared").values()) == [1, 1]
    assert uploads(remote, "shared") == 1
    for number in (1, 2):
        record = json.loads((folder / "shared" / str(number) / "session_data.json").read_text())
        assert {workflow["status"] for workflow in record["workflows"].values()} == {"Removed"}
        assert len(list((folder / "shared" / str(number)).rglob("measures.csv"))) == 1


def test_a_repeatability_experiment_goes_on(runs: dict[str, FlowRun], remote: Remote, folder: Path) -> None:
    come_back(runs["experiment"])
    assert sorted(names(remote, "experiment").values()) == [1, 1, 1]
    assert uploads(remote, "experiment") == 1
    assert len(list((folder / "experiment" / "reports").rglob("report.html"))) == 1


def test_a_federated_analysis_goes_on(runs: dict[str, FlowRun], laboratory: Laboratory) -> None:
    come_back(runs["analysis"])
    assert tasks(laboratory) == 1


def test_an_ingest_goes_on(runs: dict[str, FlowRun], laboratory: Laboratory) -> None:
    come_back(runs["ingest"])
    (job,) = jobs(laboratory).values()
    assert job["status"] == "COMPLETE"
    assert job["distinct_indexed"] == TILES
    facts = laboratory.sandbox["boss"]
    with BossClient(facts["host"], facts["tokens"]["alice"], protocol="http") as client:
        block = client.cutout("sandbox/stack/uint8", 0, (0, 64), (0, 64), (0, TILES))
    assert np.array_equal(np.frombuffer(block.content, block.datatype).reshape(block.shape), PIXELS)


def test_the_launch_without_an_answer_was_not_repeated(runs: dict[str, FlowRun], remote: Remote) -> None:
    assert {run.state for run in runs.values()} == {"COMPLETED"}
    assert sum(names(remote, name).total() for name in ("session", "shared", "experiment")) == 7
    assert launches(remote) == 6


def test_a_run_that_always_dies_is_given_up(laboratory: Laboratory, remote: Remote, folder: Path) -> None:
    remote.switch(job_seconds=7200.0)
    run = session(laboratory, folder, "poison")
    for count in (1, 2, 3):
        wait_until(lambda count=count: run.began == count, 120, f"begun {count} times, is {run.began}")
        run.wait("RUNNING")
        run.kill()
        run.wait("CRASHED")
    with pytest.raises(AssertionError):
        wait_until(lambda: run.state != "CRASHED", 45, "nothing happens any more")
    assert run.began == 3
    assert names(remote, "poison").total() <= 1
