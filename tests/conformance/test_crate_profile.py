"""The crates that are left beside results, looked at by the validator of the RO-Crate community."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conformance.conftest import OfficialEnvironment

from prefect_biomed.analysis import Experiment, RunRecord
from prefect_biomed.analysis.crate import write_experiment_crate
from prefect_biomed.clients.crates import METADATA, Execution, Provenance, Source, write_crate
from prefect_biomed.clients.vantage6 import Result, Run, Status, Task, TaskOutcome, write_analysis_crate

pytestmark = pytest.mark.conformance

VALIDATOR = ("roc-validator", ["roc-validator==0.13.0", "rocrate==0.16.0"])
RUN = Path(__file__).parents[1] / "harness" / "crate_validation.py"
# It asks that the address of a workflow begins with http, which that of a file in the crate cannot do.
KNOWN = [["RECOMMENDED", "process-run-crate-0.5_5.1"]] * 2

BEGAN, ENDED = datetime(2026, 5, 15, 10, tzinfo=UTC), datetime(2026, 5, 15, 11, tzinfo=UTC)


def provenance(*, succeeded: bool = True) -> Provenance:
    """A session of two runs."""
    url = "https://vip.example.org/rest"
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
                began=BEGAN,
                ended=ENDED,
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


def analysis(folder: Path) -> None:
    """A task of vantage6 at two organizations."""
    runs = tuple(
        Run(id=number, status=Status.COMPLETED, organization_id=number, started_at=BEGAN, finished_at=ENDED)
        for number in (1, 2)
    )
    task = Task(id=7, name="mean", image="example.org/a:1", status=Status.COMPLETED, databases=({"label": "default"},))
    results = [
        Result(
            run_id=run.id, task_id=7, organization_id=run.id, organization=f"o {run.id}", format="json", value={"n": 1}
        )
        for run in runs
    ]
    parameters = {"collaboration": "c", "image": task.image, "method": "mean", "arguments": {"column": "age"}}
    outcome = TaskOutcome(task=task, runs=runs)
    write_analysis_crate(
        folder, "https://v6.example.org/api", outcome, results, flow="federated-analysis", parameters=parameters
    )


def ingest(folder: Path) -> None:
    """A job of the Boss, as it is told of."""
    url = "https://api.example.org"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    source = Source(address="boss-source:0/a%20b.png", name="0/a b.png", sha256="0" * 64, size=3)
    execution = Execution(
        address=f"{url}/latest/ingest/3",
        name="ingest job 3",
        error=None,
        began=BEGAN,
        ended=ENDED,
        settings={"channel": "a/b/c", "tiles": 16},
        inputs=(source,),
        outputs=("report.json",),
    )
    told = Provenance(
        name="a/b/c, ingest job 3",
        flow="boss-ingest",
        parameters={"config": {"schema": {"name": "boss-v0.1-schema"}}},
        platform="Boss",
        platform_url=url,
        program="Boss ingest",
        program_version="v1",
        program_address=f"{url}/latest/ingest",
        executions=(execution,),
    )
    write_crate(folder, told)


def experiment(folder: Path) -> None:
    """Two runs of a series, one where nothing tells the page of the run."""
    made = Experiment(folder)
    records = []
    for number, url in ((1, "https://vip.example.org/portal"), (2, "")):
        outputs = made.output_dir("week-1", "Strip/1.0") / f"r{number}"
        outputs.mkdir(parents=True)
        (outputs / "mask.txt").write_text(f"{number}\n")
        record = {"series": "week-1", "began": BEGAN, "pipeline": "Strip/1.0", "repetition": number, "recorded": ENDED}
        place = outputs.relative_to(folder).as_posix()
        records.append(RunRecord(**record, inputs="0" * 64, execution=f"w-{number}", folder=place, url=url))
    made.append(records)
    write_experiment_crate(folder)


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
    for made in (analysis, ingest, experiment):
        folder = tmp_path / made.__name__
        made(folder)
        assert issues(interpreter, folder) == KNOWN, made.__name__
    # What is broken is seen, so the look is one.
    path = tmp_path / "done" / METADATA
    described = json.loads(path.read_text())
    described["@graph"] = [entity for entity in described["@graph"] if entity["@id"] != "#organization"]
    for entity in described["@graph"]:
        entity.pop("license", None)
    path.write_text(json.dumps(described))
    assert len(issues(interpreter, tmp_path / "done")) > len(KNOWN)
