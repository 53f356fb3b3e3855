"""Repeatability experiments against the sandbox, with a Prefect API."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.states import State
from pydantic import SecretStr

from harness.federation import CLINICAL, federation
from prefect_biomed.analysis import Agreement, Comparison, Experiment, Report
from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError, JobFailed, PreflightFailed
from prefect_biomed.flows.repeatability import compare_folders, repeatability_experiment
from prefect_biomed.flows.vantage6 import federated_analysis
from prefect_biomed.flows.vantage6_parameters import AnalysisWaiting, TaskDetails
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.tasks import repeatability as experiments

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def arguments(vip: Sandbox, input_dir: Path, tmp_path: Path) -> dict[str, Any]:
    ready = vip.vip.ready()
    return {
        "credentials": VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"]),
        "pipelines": ["SkullStripNoisy/1.0"],
        "input_settings": {"t1": "anatomical.nii"},
        "experiment_dir": tmp_path / "experiment",
        "input_dir": input_dir,
        "refresh_time": 0.1,
    }


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Events that the experiment emits."""
    emitted: list[dict[str, Any]] = []

    def emit(name: str, resource: str, title: str | None = None, /, **payload: Any) -> None:
        emitted.append({"event": name, "resource": resource, **payload})

    monkeypatch.setattr(experiments, "event", emit)
    return emitted


def posts(vip: Sandbox) -> int:
    return len(vip.vip.journal.entries("POST", "/rest/executions"))


@pytest.mark.slow
def test_noisy_and_exact_pipelines_on_one_upload(
    vip: Sandbox, arguments: dict[str, Any], tmp_path: Path, events: list[dict[str, Any]]
) -> None:
    report = repeatability_experiment(**arguments | {"pipelines": ["SkullStripNoisy/1.0", "GreyMatter/1.0"]})
    noisy, exact = report.pipelines
    assert noisy.comparison.runs == tuple(f"run {number}" for number in range(1, 6))
    assert noisy.comparison.differing == ("anatomical_brain.nii.gz", "anatomical_volumes.csv")
    volume, table = noisy.comparison.files
    (voxels,) = volume.measures
    assert voxels.digits == pytest.approx(vip.vip.switches.noise_digits, abs=0.1)
    assert voxels.runs == 5
    assert not volume.facts
    (mean,) = table.measures
    assert (mean.name, mean.where) == ("column mean_intensity", ("row brain, column mean_intensity",))
    # The archives differ in their bytes, for gzip and tar write down the time.
    archives = sorted(arguments["experiment_dir"].rglob("*.tar.gz"))
    assert len({path.read_bytes() for path in archives}) == 5
    assert exact.comparison.differing == ()
    assert {file.name.rpartition("/")[2]: file.agreement for file in exact.comparison.files} == {
        "measures.csv": Agreement.IDENTICAL,
        "settings.json": Agreement.IDENTICAL,
        "mask.nii.gz": Agreement.SAME_CONTENT,
    }
    assert len(vip.vip.journal.entries("PUT", "anatomical.nii")) == 1
    assert posts(vip) == 10
    records = Experiment(arguments["experiment_dir"]).records()
    assert len({record.execution for record in records}) == 10
    assert all(record.answer["identifier"] == record.execution and record.digests for record in records)
    assert records[0].parameters == {"t1": "anatomical.nii"}
    assert events == []
    folder = arguments["experiment_dir"] / "reports" / report.series
    assert Report.model_validate_json((folder / "report.json").read_text()) == report
    assert (folder / "report.html").read_text().count("data:image/png") == 1
    assert "api_key" not in (arguments["experiment_dir"] / "experiment.jsonl").read_text()
    assert len(vip.vip.journal.entries("DELETE", "/INPUTS")) == 1


@pytest.mark.slow
def test_drift_is_announced_and_dated(vip: Sandbox, arguments: dict[str, Any], events: list[dict[str, Any]]) -> None:
    first = repeatability_experiment(**arguments | {"repetitions": 8})
    assert first.pipelines[0].against_baseline is None
    same: State[Report] = repeatability_experiment(**arguments | {"repetitions": 2}, return_state=True)
    assert "within the numerical noise of the 8 reference runs" in (same.message or "")
    assert same.name == "Completed"
    assert [event["event"] for event in events] == ["biomed.repeatability.within"]
    events.clear()
    vip.vip.switches.math_library = "alternative"
    state: State[Report] = repeatability_experiment(**arguments | {"repetitions": 4}, return_state=True)
    assert (state.message or "").startswith("SkullStripNoisy/1.0 changed: ")
    assert state.name == "Changed"
    assert "anatomical_brain.nii.gz, voxels (19329 of 19329 points stand out, most at voxel (" in state.message
    report = state.result()
    (part,) = report.pipelines
    assert part.baseline == first.series
    assert part.evidence is not None
    assert part.evidence.alarm == part.evidence.since == part.timeline[-1].began
    assert f". {part.evidence.sentence}" in state.message
    changed, event = events
    assert changed["event"] == "biomed.repeatability.changed"
    assert event["event"] == "biomed.repeatability.drift"
    assert sorted(event["changed_files"]) == ["anatomical_brain.nii.gz", "anatomical_volumes.csv"]
    assert event["series"] == report.series
    assert Path(event["report"]).is_file()
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["repeatability-repeatability-experiment"]))
        texts = [str(artifact.data) for artifact in client.read_artifacts(artifact_filter=wanted)]
    assert sum("against the baseline: changed: " in text for text in texts) == 1


@pytest.mark.slow
def test_a_plain_pipeline_is_inside_the_variability_of_its_perturbed_twin(
    vip: Sandbox, arguments: dict[str, Any], events: list[dict[str, Any]]
) -> None:
    plain = arguments | {"pipelines": ["SkullStrip/1.0"], "baseline_pipeline": "SkullStripNoisy/1.0"}
    both: State[Report] = repeatability_experiment(**plain | {"repetitions": 3}, return_state=True)
    assert posts(vip) == 6
    assert both.name == "NotJudged"
    assert "3 perturbed reference runs cannot give a p below 0.75" in (both.message or "")
    repeatability_experiment(**arguments | {"repetitions": 19})
    events.clear()
    state: State[Report] = repeatability_experiment(**plain | {"repetitions": 1}, return_state=True)
    assert posts(vip) == 6 + 19 + 1
    assert "SkullStrip/1.0 within the numerical variability of the 19 reference runs (p = 1; " in (state.message or "")
    (part,) = state.result().pipelines
    assert part.baseline.startswith("SkullStripNoisy/1.0, ")
    assert part.evidence is None
    assert [event["event"] for event in events] == ["biomed.repeatability.within"]
    vip.vip.switches.math_library = "alternative"
    state = repeatability_experiment(**plain | {"repetitions": 1}, return_state=True)
    assert state.name == "Changed"
    assert "anatomical_brain.nii.gz" in (state.message or "")


@pytest.mark.slow
def test_versions_are_compared_with_each_other(arguments: dict[str, Any]) -> None:
    report = repeatability_experiment(
        **arguments | {"pipelines": ["GreyMatter/1.0", "GreyMatter/1.1"], "repetitions": 4}
    )
    old, new = report.pipelines
    assert old.against_version is None
    assert new.against_version is not None
    assert new.against_version.changed
    assert "anatomical_greymatter.tar.gz/measures.csv" in new.against_version.changed_files
    smoothed = [v for v in new.against_version.verdicts if v.measure == "$.smoothed"]
    assert smoothed[0].reason == "now 'true', in all references 'false'"


def test_the_odd_run_is_found_in_its_archive(vip: Sandbox, arguments: dict[str, Any]) -> None:
    vip.vip.switches.odd_execution = 2
    report = repeatability_experiment(**arguments | {"pipelines": ["GreyMatter/1.0"], "repetitions": 3})
    (part,) = report.pipelines
    assert part.comparison.differing == ("anatomical_greymatter.tar.gz/measures.csv",)
    groups = {file.name: file.groups for file in part.comparison.files}[part.comparison.differing[0]]
    assert groups == {"run 1": "A", "run 2": "B", "run 3": "A"}


def test_failed_runs_are_written_down_and_fail_the_flow_when_none_is_left(arguments: dict[str, Any]) -> None:
    settings = {"pipelines": ["AlwaysFails/1.0"], "input_settings": {}, "input_dir": None, "repetitions": 2}
    with pytest.raises(JobFailed, match="None of the 2 runs"):
        repeatability_experiment(**arguments | settings)
    records = Experiment(arguments["experiment_dir"]).records()
    assert [record.succeeded for record in records] == [False, False]
    assert "exit code 3" not in records[0].status
    assert records[0].message.startswith("ExecutionFailed")
    (html,) = arguments["experiment_dir"].rglob("report.html")
    assert "2 failed and are left out" in html.read_text()


@pytest.mark.slow
def test_a_retry_continues_the_series(vip: Sandbox, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([True])
    original = experiments.assess_series

    def broken(*values: Any) -> Report:
        if next(failures, False):
            raise RuntimeError("the machine was switched off")
        return original(*values)

    monkeypatch.setattr(experiments, "assess_series", broken)

    @flow(retries=1)
    def weekly() -> Report:
        return repeatability_experiment(**arguments | {"repetitions": 3})

    report = weekly()
    assert posts(vip) == 3
    assert len(Experiment(arguments["experiment_dir"]).records()) == 3
    assert [path.name for path in (arguments["experiment_dir"] / "series").iterdir()] == [report.series]


def test_nothing_is_sent_when_one_pipeline_does_not_exist(vip: Sandbox, arguments: dict[str, Any]) -> None:
    with pytest.raises(PreflightFailed, match=r"Nowhere/1\.0"):
        repeatability_experiment(**arguments | {"pipelines": ["GreyMatter/1.0", "Nowhere/1.0"]})
    assert posts(vip) == 0
    assert vip.vip.journal.entries("PUT") == []


def test_runs_from_elsewhere_are_compared_and_judged(tmp_path: Path, volume: Path) -> None:
    for group, names in (("runs", "ab"), ("references", "cdefgh")):
        for name in names:
            folder = tmp_path / group / name
            folder.mkdir(parents=True)
            shutil.copy(volume, folder)
            (folder / "table.csv").write_text(f"x\n{3 if group == 'runs' else 2}\n")
    report = compare_folders(tmp_path / "runs", tmp_path / "out", baseline_dir=tmp_path / "references")
    (part,) = report.pipelines
    assert part.comparison.sentence == "All 2 files agree in all 2 runs."
    assert part.against_baseline is not None
    assert part.against_baseline.changed_files == ("table.csv",)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pipelines"][0]["pipeline"] == "runs"
    with pytest.raises(ConfigurationError, match="has no sub-folders"):
        compare_folders(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.slow
def test_a_repeated_federated_analysis_is_compared(tmp_path: Path) -> None:
    @flow
    def repeated() -> Report:
        for number in range(1, 4):
            analysis = federated_analysis(
                hospitals.credentials(),
                "plain",
                CLINICAL,
                "central_linear_regression",
                organizations=["north"],
                details=TaskDetails(central=True),
                arguments={"outcome": "progression", "predictors": ["bmi", "bp"]},
                databases="default",
                refresh_time=0.1,
                waiting=AnalysisWaiting(timeout_seconds=60),
            )
            folder = tmp_path / "runs" / f"run {number}"
            folder.mkdir(parents=True)
            for result in analysis.results:
                (folder / f"{result.organization}.json").write_text(json.dumps(result.value))
        return compare_folders(tmp_path / "runs", tmp_path / "report")

    with federation(4) as hospitals:
        report = repeated()
        assert hospitals.tasks_created() >= 3
    (part,) = report.pipelines
    assert part.comparison.sentence == "All 1 files agree in all 3 runs."
    assert part.comparison.files[0].name == "north.json"


def test_tasks_fit_into_another_flow(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(f'{{"estimate": {text}}}')

    @flow
    def mine() -> Comparison:
        return experiments.compare_runs([tmp_path / "a", tmp_path / "b"])

    comparison = mine()
    assert comparison.files[0].measures[0].name == "$.estimate"
