"""A flow process is killed at the worst moments; the same flow run is retried; nothing is doubled, nothing is lost."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from examples.lab import Laboratory
from harness.laboratory import FlowRun, Remote, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = 12
BYTES = 300_000


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with Laboratory(tmp_path_factory.mktemp("laboratory")) as laboratory:
        facts = laboratory.sandbox["vip"]
        laboratory.run(
            "python",
            "deployments/setup.py",
            "--name=crash",
            PREFECT_BIOMED_VIP_API_KEY=facts["api_key"],
            PREFECT_BIOMED_VIP_URL=facts["url"],
            PREFECT_BIOMED_VIP_PARALLELISM="2",
        )
        yield laboratory


@pytest.fixture
def remote(laboratory: Laboratory) -> Iterator[Remote]:
    remote = Remote(laboratory, "vip")
    remote.reset()
    yield remote
    remote.switch(transfer_seconds=0.0, job_seconds=0.0, latency_ms=0.0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    for number in range(FILES):
        content = hashlib.shake_256(str(number).encode()).digest(BYTES)
        (folder / ("sub" if number % 2 else "") / f"f{number:02d}.bin").write_bytes(content)
    return folder


def start(laboratory: Laboratory, files: Path, output_dir: Path, name: str, **changes: Any) -> FlowRun:
    parameters = {
        "credentials": {"$ref": {"block_document_slug": "vip-credentials/crash"}},
        "pipeline_id": "CopyFile/1.0",
        "input_settings": {"file": ["f00.bin", "sub/f01.bin", "f02.bin", "sub/f03.bin"]},
        "input_dir": str(files),
        "output_dir": str(output_dir),
        "session_name": name,
        "nb_runs": 2,
        "refresh_time": 0.5,
    }
    return FlowRun(laboratory, "vip-session/vip-session", parameters | changes)


def executions(remote: Remote, name: str) -> Counter[str]:
    listed = requests.get(f"{remote.url}/rest/executions", headers={"apikey": remote.facts["api_key"]}, timeout=10)
    return Counter(entry["name"] for entry in listed.json() if entry["name"].startswith(f"{name}-r"))


def stored(remote: Remote) -> list[str]:
    """Paths of the files the server has taken, once for each time."""
    puts = remote.journal("PUT", "/INPUTS/")
    return [entry["path"] for entry in puts if entry["status"] == 201 and entry["path"].endswith(".bin")]


def check(remote: Remote, run: FlowRun, files: Path, output_dir: Path, name: str) -> None:
    run.retry()
    assert run.wait("COMPLETED", "FAILED", "CRASHED") == "COMPLETED", run.logs()
    assert sorted(executions(remote, name).values()) == [1, 1]
    assert Counter(stored(remote)).most_common(1)[0][1] == 1
    assert len(stored(remote)) == FILES
    session = json.loads((output_dir / "session_data.json").read_text())
    sources = [files / "f00.bin", files / "sub/f01.bin", files / "f02.bin", files / "sub/f03.bin"]
    expected = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    for workflow in session["workflows"].values():
        local = [output_dir / Path(o["path"]).relative_to(session["vip_output_dir"]) for o in workflow["outputs"]]
        assert sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in local) == expected
    assert list(output_dir.rglob("*.part")) == []


def test_killed_in_mid_upload(laboratory: Laboratory, remote: Remote, files: Path, tmp_path: Path) -> None:
    remote.switch(transfer_seconds=0.8)
    run = start(laboratory, files, tmp_path / "out", "upload")
    wait_until(lambda: len(stored(remote)) >= 4, 60, "four files stored")
    run.kill()
    assert 4 <= len(stored(remote)) < FILES
    check(remote, run, files, tmp_path / "out", "upload")


def test_killed_between_the_launch_and_its_record(
    laboratory: Laboratory, remote: Remote, files: Path, tmp_path: Path
) -> None:
    remote.fail(method="POST", path="/executions$", after_effect=True, delay_seconds=20, status=504, times=1)
    run = start(laboratory, files, tmp_path / "out", "launch")
    wait_until(lambda: bool(executions(remote, "launch")), 60, "an execution on the platform")
    record = json.loads((tmp_path / "out" / "session_data.json").read_text())
    run.kill()
    assert record["workflows"] == {}
    assert [launch["workflow_id"] for launch in record["prefect_biomed"]["launches"].values()] == [None]
    check(remote, run, files, tmp_path / "out", "launch")


def test_killed_in_monitor(laboratory: Laboratory, remote: Remote, files: Path, tmp_path: Path) -> None:
    remote.switch(job_seconds=8.0)
    run = start(laboratory, files, tmp_path / "out", "monitor")
    wait_until(lambda: sum(executions(remote, "monitor").values()) == 2, 60, "two executions")
    looks = len(remote.journal("GET", "/executions"))
    wait_until(lambda: len(remote.journal("GET", "/executions")) > looks + 3, 60, "some looks")
    run.kill()
    check(remote, run, files, tmp_path / "out", "monitor")


def test_killed_in_mid_download(laboratory: Laboratory, remote: Remote, files: Path, tmp_path: Path) -> None:
    remote.fail(method="GET", path="/OUTPUTS/", query="action=content", delay_seconds=0.7)
    run = start(laboratory, files, tmp_path / "out", "download")

    def fetched() -> list[str]:
        return [e["path"] for e in remote.journal("GET", "/OUTPUTS/") if e["bytes_out"] == BYTES and e["status"] == 200]

    wait_until(lambda: len(fetched()) >= 3, 60, "three files fetched")
    run.kill()
    complete = {path.name for path in (tmp_path / "out").rglob("*.bin") if path.stat().st_size == BYTES}
    assert complete
    before = Counter(fetched())
    check(remote, run, files, tmp_path / "out", "download")
    again = Counter(fetched()) - before
    # What was under its final name when the process died is not fetched again; what was in flight may be.
    assert sum(again.values()) <= 8 - len(complete) + 2
