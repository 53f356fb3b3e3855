"""An ingest is killed at random moments and retried; two workers share a job. Every pixel is right all the same."""

from __future__ import annotations

import json
import random
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
from prefect_biomed.clients.boss import BossClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TILES = 640
KILLS = 10


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory"), platforms=["boss"]) as laboratory:
        facts = laboratory.sandbox["boss"]
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=crash",
            PREFECT_BIOMED_BOSS_TOKEN=facts["tokens"]["alice"],
            PREFECT_BIOMED_BOSS_HOST=facts["host"],
            PREFECT_BIOMED_BOSS_PROTOCOL="http",
            PREFECT_BIOMED_BOSS_AWS_ENDPOINT_URL=facts["url"],
        )
        yield laboratory


@pytest.fixture
def remote(laboratory: Laboratory) -> Remote:
    return Remote(laboratory, "boss")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    root = tmp_path_factory.mktemp("stack")
    pixels = volume((TILES, 64, 64))
    for z, plane in enumerate(pixels):
        (root / str(z)).mkdir()
        Image.fromarray(plane).save(root / str(z) / "0_0_0.png")
    return root, pixels


def config(root: Path, channel: str) -> dict[str, Any]:
    plugin = "ingestclient.plugins.catmaid.CatmaidFileImageStack"
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": "h", "protocol": "http"},
            "path_processor": {
                "class": f"{plugin}PathProcessor",
                "params": {"root_dir": str(root), "filetype": "png"},
            },
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": {"filetype": "png"}},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": channel},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, 64], "y": [0, 64], "z": [0, TILES], "t": [0, 1]},
            "tile_size": {"x": 64, "y": 64, "z": 1, "t": 1},
        },
    }


def ready(remote: Remote) -> dict[str, Any]:
    return dict(requests.get(f"{remote.url}/_sandbox/ready", timeout=10).json())


def job(remote: Remote, number: int) -> dict[str, Any]:
    return dict(ready(remote)["jobs"].get(str(number), {"puts": 0, "deleted": 0, "status": "", "seconds": 0}))


def read_back(remote: Remote, channel: str) -> np.ndarray:
    facts = ready(remote)
    with BossClient(facts["host"], facts["tokens"]["alice"], protocol="http") as client:
        block = client.cutout(f"sandbox/stack/{channel}", 0, (0, 64), (0, 64), (0, TILES))
    return np.frombuffer(block.content, block.datatype).reshape(block.shape)


def start(laboratory: Laboratory, deployment: str, **parameters: Any) -> FlowRun:
    credentials = {"$ref": {"block_document_slug": "boss-credentials/crash"}}
    return FlowRun(laboratory, deployment, {"credentials": credentials, **parameters})


def test_killed_at_ten_random_moments_and_every_pixel_right(
    laboratory: Laboratory, remote: Remote, stack: tuple[Path, np.ndarray]
) -> None:
    root, pixels = stack
    remote.switch(latency_ms=25, quiet_seconds=4, prepare_seconds=0.2)
    upload = {"threads": 2, "min_lease_seconds": 3}
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    run = start(laboratory, "boss-ingest/boss-ingest", config=config(root, "uint8"), upload=upload)
    wait_until(lambda: job(remote, 1)["puts"] > 0, 90, "the first tile")
    for number in range(KILLS):
        target = job(remote, 1)["puts"] + moments.randrange(3, 45)
        wait_until(lambda target=target: job(remote, 1)["puts"] >= target, 90, f"tile {target}")
        assert run.state == "RUNNING", f"ended before kill {number}: {run.message}"
        run.kill()
        run.wait("CRASHED", seconds=60)
        run.retry()
        before = job(remote, 1)["puts"]
        wait_until(lambda before=before: job(remote, 1)["puts"] > before, 90, "going on after the kill")
    run.wait(seconds=240)
    observed = job(remote, 1)
    assert run.state == "COMPLETED", run.logs()
    assert list(ready(remote)["jobs"]) == ["1"]
    assert observed["status"] == "COMPLETE"
    assert observed["late_indexed"] == 0
    assert observed["distinct_indexed"] == observed["distinct_puts"] == TILES
    assert np.array_equal(read_back(remote, "uint8"), pixels)
    reports = [a for a in run.artifacts() if a["key"] == "boss-report-1"]
    assert f"{TILES} of {TILES} tiles" in reports[-1]["data"]
    print(json.dumps(observed))


def test_two_workers_share_a_job(laboratory: Laboratory, remote: Remote, stack: tuple[Path, np.ndarray]) -> None:
    root, pixels = stack
    # Filling the queue takes long enough for both workers to be there when it is full.
    remote.switch(latency_ms=60, quiet_seconds=2, prepare_seconds=20)
    upload = {"threads": 2, "min_lease_seconds": 20}
    first = len(ready(remote)["jobs"]) + 1
    alone = start(laboratory, "boss-ingest/boss-ingest", config=config(root, "uint16"), upload=upload)
    alone.wait(seconds=240)
    assert alone.state == "COMPLETED", alone.logs()
    single = job(remote, first)
    laboratory.start_worker("second")
    number = first + 1
    owner = start(laboratory, "boss-ingest/boss-ingest", config=config(root, "uint32"), upload=upload)
    wait_until(lambda: str(number) in ready(remote)["jobs"], 90, "the job")
    helper = start(
        laboratory, "boss-join-ingest/boss-join-ingest", config=config(root, "uint32"), job_id=number, upload=upload
    )
    owner.wait(seconds=240)
    helper.wait(seconds=60)
    assert owner.state == "COMPLETED", owner.logs()
    assert helper.state in ("COMPLETED", "FAILED"), helper.logs()  # the job may be over before it comes
    double = job(remote, number)
    assert np.array_equal(read_back(remote, "uint32"), pixels)
    assert double["deleted"] == TILES
    assert double["late_indexed"] == 0
    rates = [TILES / observed["seconds"] for observed in (single, double)]
    print(f"one worker {rates[0]:.1f} tiles/s, two workers {rates[1]:.1f} tiles/s")
