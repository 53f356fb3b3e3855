from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

from harness.shell import typed
from prefect_biomed.analysis import Experiment, Report, RunRecord, inventory, write_report
from prefect_biomed.analysis.experiment import inputs_digest
from prefect_biomed.clients.crates import METADATA
from prefect_biomed.clients.errors import ConfigurationError, LedgerError

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"
BEGAN = datetime(2026, 1, 5, 3, 0, tzinfo=UTC)


def add_series(
    experiment: Experiment,
    number: int,
    *,
    repetitions: int = 4,
    shift: float = 0.0,
    failed: int = 0,
    pipeline: str = "Strip/1.0",
    parameters: dict[str, object] | None = None,
) -> str:
    """Write a series of noisy runs, as a flow would."""
    series = f"series-{number}"
    generator = np.random.default_rng([number, len(pipeline)])
    base = np.linspace(50.0, 150.0, 40 * 30).reshape(40, 30)
    records = []
    for repetition in range(1, repetitions + 1):
        folder = experiment.output_dir(series, pipeline) / f"r{repetition}"
        folder.mkdir(parents=True)
        np.save(folder / "brain.npy", base * (1 + shift + 1e-6 * generator.standard_normal(base.shape)))
        (folder / "exact.csv").write_text("a,b\nx,1\n")
        succeeded = repetition > failed
        records.append(
            RunRecord(
                series=series,
                began=BEGAN + number * timedelta(days=7),
                pipeline=pipeline,
                repetition=repetition,
                parameters=parameters or {"t1": "a.nii"},
                execution=f"workflow-{number}{repetition}",
                status="Finished" if succeeded else "ExecutionFailed",
                succeeded=succeeded,
                message="" if succeeded else "exit code 3 <b>&",
                folder=folder.relative_to(experiment.folder).as_posix(),
                digests=inventory(folder),
                started=BEGAN,
                recorded=BEGAN,
                url="https://vip.example/portal",
            )
        )
    experiment.append(records)
    return series


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(tmp_path / "experiment")


def test_one_line_for_each_run_and_none_twice(experiment: Experiment) -> None:
    add_series(experiment, 0)
    records = experiment.records()
    assert len(records) == 4
    assert experiment.append(records) == []
    lines = (experiment.folder / "experiment.jsonl").read_text().splitlines()
    assert [json.loads(line)["execution"] for line in lines] == [f"workflow-0{n}" for n in range(1, 5)]
    assert set(json.loads(lines[0])["digests"]) == {"brain.npy", "exact.csv"}


def test_half_a_line_is_cut_off_and_a_damaged_one_is_an_error(
    experiment: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    add_series(experiment, 0)
    path = experiment.folder / "experiment.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"version": 1, "ser')
    assert len(experiment.records()) == 4
    add_series(experiment, 1)
    assert path.read_bytes().startswith(whole)
    assert len(experiment.records()) == 8
    assert "was cut off" in caplog.text
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(LedgerError, match="line 1 is damaged"):
        experiment.records()


def test_several_may_write_at_once(experiment: Experiment) -> None:
    def append(repetition: int) -> None:
        record = RunRecord(
            series="s", began=BEGAN, pipeline="p", repetition=repetition, recorded=BEGAN, message="x" * 10_000
        )
        Experiment(experiment.folder).append([record])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(40)))
    assert sorted(record.repetition for record in experiment.records()) == list(range(40))


def test_a_series_is_found_again_by_its_token(experiment: Experiment) -> None:
    name = experiment.open_series("abc123")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-abc123", name)
    assert experiment.open_series("abc123") == name
    assert experiment.open_series("abc124") != name


def test_the_report_says_when_a_change_began(experiment: Experiment) -> None:
    for number, shift in enumerate((0.0, 0.0, 1e-3, 1e-3)):
        series = add_series(experiment, number, shift=shift, repetitions=5 if number else 8)
        (part,) = experiment.report(series).pipelines
    assert part.baseline == "series-0"
    findings = [summary.judgement and summary.judgement.changed for summary in part.timeline]
    assert findings == [None, False, True, True]
    assert [round(summary.evidence or 0.0, 1) > 20 for summary in part.timeline] == [False, False, True, True]
    assert part.evidence is not None
    assert part.evidence.alarm == part.evidence.since == BEGAN + timedelta(days=14)
    assert part.drifts
    assert part.evidence.sentence.endswith(
        "above 20 with the series of 2026-01-19. The change began with the series of 2026-01-19 03:00 "
        f"(95 %: {part.evidence.earliest:%Y-%m-%d} to 2026-01-19)"
    )
    assert part.against_baseline is not None
    assert part.against_baseline.changed_files == ("brain.npy",)
    assert part.comparison.differing == ("brain.npy",)


def test_earlier_judgements_are_not_computed_again(experiment: Experiment) -> None:
    for number in range(3):
        series = add_series(experiment, number)
        experiment.report(series)
    lines = (experiment.folder / "judgements.jsonl").read_text().splitlines()
    assert [json.loads(line)["series"] for line in lines] == ["series-1", "series-2"]
    experiment.report(series)
    assert (experiment.folder / "judgements.jsonl").read_text().splitlines() == lines


def test_failed_runs_are_kept_and_left_out(experiment: Experiment) -> None:
    report = experiment.report(add_series(experiment, 0, failed=2))
    (part,) = report.pipelines
    assert part.comparison.failed == ("run 1", "run 2")
    assert part.comparison.runs == ("run 3", "run 4")
    assert [run.succeeded for run in report.runs] == [False, False, True, True]


def test_a_baseline_of_several_series_is_exchanged_by_series(experiment: Experiment) -> None:
    names = [add_series(experiment, number) for number in range(4)]
    with pytest.raises(ConfigurationError, match="two at least"):
        experiment.report(names[0], unit="series")
    for name in names[:3]:
        (part,) = experiment.report(name, unit="series", baseline_series=3).pipelines
        assert (part.baseline, part.against_baseline) == ("", None)
    (part,) = experiment.report(names[3], unit="series", baseline_series=3).pipelines
    assert part.baseline == "series-0 to series-2, 3 series"
    assert [summary.judgement is None for summary in part.timeline] == [True, True, True, False]
    judgement = part.against_baseline
    assert judgement is not None
    assert (judgement.unit, judgement.units) == ("series", (3, 1))
    assert judgement.outcome.value == "not judged"
    assert "3 reference series and 1 new series cannot give a p below 0.25" in judgement.sentence
    assert judgement.alike == pytest.approx(0.0, abs=0.1)
    # The same baseline of single runs; kept judgements of the other unit are not taken for it.
    (part,) = experiment.report(names[3], baseline_series=3).pipelines
    judgement = part.against_baseline
    assert judgement is not None
    assert (judgement.unit, judgement.units, judgement.outcome.value) == ("run", (12, 4), "within")
    assert judgement.alike is not None
    assert "single runs were exchanged in 1820 ways" in judgement.exchanged


def test_series_with_other_settings_are_no_baseline(experiment: Experiment) -> None:
    add_series(experiment, 0, shift=1.0, parameters={"t1": "other.nii"})
    add_series(experiment, 1)
    (part,) = experiment.report(add_series(experiment, 2)).pipelines
    assert part.baseline == "series-1"
    assert [summary.series for summary in part.timeline] == ["series-1", "series-2"]


def test_a_baseline_can_be_named_or_be_a_folder(experiment: Experiment, tmp_path: Path) -> None:
    for number, shift in enumerate((0.0, 1e-3, 1e-3)):
        add_series(experiment, number, shift=shift)

    def changed(baseline: str) -> bool:
        judgement = experiment.report("series-2", baseline=baseline).pipelines[0].against_baseline
        assert judgement is not None
        return judgement.changed

    assert changed("series-0")
    assert not changed("series-1")
    assert changed(str(experiment.output_dir("series-0", "Strip/1.0")))
    with pytest.raises(ConfigurationError, match="has no runs of"):
        changed("nothing")
    with pytest.raises(ConfigurationError, match="no sub-folders"):
        changed(str(tmp_path / "nothing"))


def test_versions_are_judged_by_the_first(experiment: Experiment) -> None:
    add_series(experiment, 0, repetitions=5)
    add_series(experiment, 0, pipeline="Strip/1.1", shift=1e-3)
    first, second = experiment.report("series-0").pipelines
    assert first.against_version is None
    assert second.against_version is not None
    assert second.against_version.sentence.startswith("changed: brain.npy")


def test_digest_of_inputs_changes_with_names_and_content(tmp_path: Path) -> None:
    seen = {inputs_digest(None), inputs_digest(tmp_path)}
    for name, text in (("a", "1"), ("b", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
        seen.add(inputs_digest(tmp_path))
    assert len(seen) == 5


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.lang: str | None = None
        self.headless_tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        if tag == "html":
            self.lang = found.get("lang")
        if tag == "th":
            assert found.get("scope") in ("row", "col")
        for name in ("src", "href"):
            self.links.append(found.get(name) or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_is_whole_in_one_page(experiment: Experiment, tmp_path: Path) -> None:
    add_series(experiment, 0, repetitions=5)
    series = add_series(experiment, 1, shift=1e-3, repetitions=6, failed=1)
    report = experiment.report(series, title="A <script>alert(1)</script> title")
    runs = {"Strip/1.0": experiment.runs(r for r in experiment.records() if r.series == series)}
    files = write_report(report, tmp_path / "out", runs=runs)
    html = files.html.read_text()
    page = _Page()
    page.feed(html)
    assert page.lang == "en"
    assert "<script" not in html
    assert "exit code 3 &lt;b&gt;&amp;" in html
    assert {link.split(":", 1)[0] for link in page.links if link} == {"data", "https"}
    assert [link for link in page.links if link.startswith("http")] == ["https://vip.example/portal"] * 6
    assert len(page.images) == 2
    assert all(len(image["alt"] or "") > 40 for image in page.images)
    text = " ".join(" ".join(page.text).split())
    assert "The change began with the series of 2026-01-12 03:00 (95 %: 2026-01-12 to 2026-01-12)." in text
    assert "changed: brain.npy, values (1200 of 1200 points stand out, most at element (" in text
    assert {path.name for path in files.images} == {
        "strip-1-0-files.png",
        "strip-1-0-drift.png",
        "strip-1-0-digits-1.png",
    }
    for path in files.images:
        with Image.open(path) as image:
            assert image.width > 200
    markdown = files.markdown.read_text()
    assert "| brain.npy: values | different |" in markdown
    assert "<script" not in markdown


def test_the_json_report_has_the_published_schema(experiment: Experiment, tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert schema == Report.model_json_schema(mode="serialization"), "write this schema to docs/report.schema.json"
    add_series(experiment, 0)
    report = experiment.report(add_series(experiment, 1, shift=1e-3))
    found = json.loads(write_report(report, tmp_path).json_file.read_text())
    jsonschema.validate(found, schema)
    assert Report.model_validate(found) == report


def test_one_crate_tells_of_all_series_and_proves_their_files(experiment: Experiment) -> None:
    add_series(experiment, 0, repetitions=2)
    add_series(experiment, 1, repetitions=2, failed=1)
    folder = experiment.folder
    assert typed("prefect-biomed", "crate", str(folder))[0] == 0
    before = (folder / METADATA).read_bytes()
    assert typed("prefect-biomed", "crate", str(folder))[0] == 0
    assert (folder / METADATA).read_bytes() == before
    told = json.loads(before)["@graph"]
    runs = [one for one in told if one["@type"] == "CreateAction" and "#workflow-" in one["@id"]]
    assert [run["actionStatus"].rpartition("/")[2] for run in runs].count("FailedActionStatus") == 1
    assert len(runs) == 4
    changed = next(folder.rglob("exact.csv"))
    changed.write_text("a,b\nx,2\n")
    assert typed("prefect-biomed", "crate", str(folder), "--check") == (
        1,
        f"{changed.relative_to(folder).as_posix()}: changed\n",
    )
