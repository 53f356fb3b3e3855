"""The rules of `examples/snakemake` with the real Snakemake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conformance.conftest import OfficialEnvironment
from PIL import Image

from harness.laboratory import wait_until
from prefect_biomed.cli.laboratory import slice_stack
from prefect_biomed.sandbox import Sandbox

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(1400)]

SNAKEFILE = Path(__file__).parents[2] / "examples" / "snakemake" / "Snakefile"
SAMPLES = [f"sub-{number:02d}" for number in range(1, 7)]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip", "vantage6", "boss", boss={"prepare_seconds": 0.0, "quiet_seconds": 0.1}) as sandbox:
        yield sandbox


@pytest.fixture
def folder(tmp_path: Path, sandbox: Sandbox, volume: Path) -> Path:
    """What the rules read."""
    shutil.copy(SNAKEFILE, tmp_path)
    for name in ("images", "tables", "volumes", "slices"):
        (tmp_path / name).mkdir()
    for sample in SAMPLES:
        shutil.copy(volume, tmp_path / "images" / f"{sample}.nii")
    session = {"pipeline_id": "GreyMatter/1.0", "refresh_time": 0.5}
    (tmp_path / "session.yaml").write_text(json.dumps(session))
    analysis = {
        "collaboration": "plain",
        "image": "prefect-biomed/clinical:1.0",
        "method": "partial_average",
        "arguments": {"column": "age"},
        "databases": "default",
    }
    (tmp_path / "tables" / "average.yaml").write_text(json.dumps(analysis))
    for z in range(4):
        Image.effect_noise((512, 512), 60 + z).save(tmp_path / "slices" / f"slice_{z:03d}.png")
    config = slice_stack(sandbox.ready()["boss"]["host"], tmp_path / "slices", (4, 512, 512), "uint8")
    (tmp_path / "volumes" / "mouse.json").write_text(json.dumps(config))
    return tmp_path


def environment(facts: dict[str, Any], folder: Path) -> dict[str, str]:
    """Programs and credentials; no Prefect server, so that each run has one of its own, on one database."""
    hospital = facts["vantage6"]["users"]["north-researcher"]
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
        "PREFECT_BIOMED_VIP_URL": facts["vip"]["url"],
        "PREFECT_BIOMED_VIP_API_KEY": facts["vip"]["api_key"],
        "PREFECT_BIOMED_VANTAGE6_URL": facts["vantage6"]["url"],
        "PREFECT_BIOMED_VANTAGE6_USERNAME": "north-researcher",
        "PREFECT_BIOMED_VANTAGE6_PASSWORD": hospital["password"],
        "PREFECT_BIOMED_BOSS_HOST": facts["boss"]["host"],
        "PREFECT_BIOMED_BOSS_PROTOCOL": "http",
        "PREFECT_BIOMED_BOSS_TOKEN": facts["boss"]["tokens"]["alice"],
        "PREFECT_BIOMED_BOSS_AWS_ENDPOINT_URL": facts["boss"]["aws_endpoint_url"],
    }


def test_six_samples_killed_in_the_middle_and_run_again_are_six_executions(
    official_environment: OfficialEnvironment, sandbox: Sandbox, folder: Path
) -> None:
    snakemake = official_environment("snakemake", ["snakemake==9.27.1"])
    typed = [str(snakemake), "-m", "snakemake", "--cores", "2"]
    variables = environment(sandbox.ready(), folder)

    def launched() -> int:
        return len(sandbox.vip.journal.entries(method="POST", path="/executions$"))

    sandbox.vip.switches.job_seconds = 5.0
    with (folder / "first.log").open("wb") as log:
        first = subprocess.Popen(
            typed, cwd=folder, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: launched() >= 3 or first.poll() is not None, 600, "the third launch")
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # Snakemake with all rules that are running
        first.wait(60)
    assert 3 <= launched() <= len(SAMPLES) - 1, (folder / "first.log").read_text()
    sandbox.vip.switches.job_seconds = 0.2

    def again(*words: str) -> None:
        done = subprocess.run(
            [*typed, *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=1000, check=False
        )
        logs = "".join(log.read_text()[-2000:] for log in folder.glob("logs/*.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs

    again("--unlock")
    again("--rerun-incomplete", "--", "all", "results/average.analysis.json", "results/mouse.ingest.json")
    assert launched() == len(SAMPLES)
    for sample in SAMPLES:
        files = json.loads((folder / "results" / f"{sample}.session.json").read_text())["files"]
        assert files and all(Path(file).is_file() for file in files)
    analysed = json.loads((folder / "results" / "average.analysis.json").read_text())
    assert len(analysed["result"]["results"]) >= 2
    ingested = json.loads((folder / "results" / "mouse.ingest.json").read_text())
    assert ingested["state"] == "Completed"
