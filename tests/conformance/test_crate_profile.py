"""The crates that are left beside results, looked at by the validator of the RO-Crate community."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conformance.conftest import OfficialEnvironment

from prefect_biomed.clients.crates import METADATA, Execution, Provenance, Source, write_crate

pytestmark = pytest.mark.conformance

VALIDATOR = ("roc-validator", ["roc-validator==0.13.0", "rocrate==0.16.0"])
RUN = Path(__file__).parents[1] / "harness" / "crate_validation.py"
# It asks that the address of a workflow begins with http, which that of a file in the crate cannot do.
KNOWN = [["RECOMMENDED", "process-run-crate-0.5_5.1"]] * 2


def provenance(*, succeeded: bool = True) -> Provenance:
    """A session of two runs."""
    url = "https://vip.example.org/rest"
    began, ended = datetime(2026, 5, 15, 10, tzinfo=UTC), datetime(2026, 5, 15, 11, tzinfo=UTC)
    source = Source(address="vip://vip.example.org/vip/Home/a%20b.nii", name="a b.nii", sha256="0" * 64, size=3)
    return Provenance(
        name="study",
        flow="vip-session",
        parameters={"pipeline_id": "A/1", "input_settings": {"file": "a b.nii", "levels": [1, 2]}, "nb_runs": 2},
        platform="VIP",
        platform_url=url,
        program="A/1",
        program_version="1",
        program_address=f"{url}/pipelines/A%2F1",
        executions=tuple(
            Execution(
                address=f"{url}/executions/workflow-{name}",
                name=f"study-r00{number}",
                error=None if succeeded else "ended as Killed",
                began=began,
                ended=ended,
                settings={"file": "a b.nii", "levels": [1, 2], "flag": True},
                inputs=(source,),
                outputs=(f"{name}/volume {name}.txt",) if succeeded else (),
            )
            for number, name in enumerate(("x", "y"), 1)
        ),
    )


def issues(interpreter: Path, folder: Path) -> list[list[str]]:
    """What the validator finds, required and recommended."""
    done = subprocess.run([interpreter, RUN, folder], capture_output=True, text=True, check=False, timeout=280)
    told = [line for line in done.stdout.splitlines() if line.startswith("ISSUES ")]
    assert told, done.stdout + done.stderr
    found: list[list[str]] = json.loads(told[0].removeprefix("ISSUES "))
    return sorted(found)


def test_the_validator_has_nothing_against_crates_of_ours(
    official_environment: OfficialEnvironment, tmp_path: Path
) -> None:
    interpreter = official_environment(*VALIDATOR)
    for name in ("x", "y"):
        (tmp_path / "done" / name).mkdir(parents=True)
        (tmp_path / "done" / name / f"volume {name}.txt").write_text(f"3.2 {name}\n")
    write_crate(tmp_path / "done", provenance())
    assert issues(interpreter, tmp_path / "done") == KNOWN
    (tmp_path / "failed").mkdir()
    write_crate(tmp_path / "failed", provenance(succeeded=False))
    # That a run should have results cannot be said of one that failed.
    without_results = [["RECOMMENDED", "process-run-crate-0.5_11.1"]] * 3
    assert issues(interpreter, tmp_path / "failed") == without_results + KNOWN
    # What is broken is seen, so the look is one.
    path = tmp_path / "done" / METADATA
    described = json.loads(path.read_text())
    described["@graph"] = [entity for entity in described["@graph"] if entity["@id"] != "#organization"]
    for entity in described["@graph"]:
        entity.pop("license", None)
    path.write_text(json.dumps(described))
    assert len(issues(interpreter, tmp_path / "done")) > len(KNOWN)
