"""What a supervisor reads first, and that large reports stay legible."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib.figure import Figure

from prefect_biomed.analysis import Report, compare_runs, judge_runs, write_report
from prefect_biomed.analysis.models import (
    Agreement,
    Comparison,
    Effect,
    FileComparison,
    Judgement,
    MeasureComparison,
    PipelineReport,
    SeriesSummary,
    Verdict,
)
from prefect_biomed.analysis.outcomes import NotJudged, Outcome, Reason
from prefect_biomed.analysis.report import _panel

BEGAN = datetime(2026, 3, 2, 3, 0, tzinfo=UTC)


def large(runs: int, files: int) -> Report:
    """Files in ten folders, all of them noisy; thirty have changed, forty are not judged."""
    names = tuple(f"run {number}" for number in range(runs))
    measure = MeasureComparison(name="voxels", runs=runs, points=1000, differing=900, digits=5.5, max_difference=0.1)
    compared = tuple(
        FileComparison(
            name=f"folder{number % 10}/file{number:03d}.nii.gz", kind="NIfTI", agreement=Agreement.DIFFERENT,
            groups={name: f"#{index}" for index, name in enumerate(names)}, digests={}, measures=(measure,) * 4,
        )
        for number in range(files)
    )  # fmt: skip
    effect = Effect(
        points=1000, differing=1000, absolute=5.0, absolute_largest=9.0, relative=0.05, relative_largest=0.06
    )
    verdicts = tuple(
        Verdict(
            file=file.name, measure=f"voxels {index}", p=0.001, changed=True, points=1000, outside=999, effect=effect
        )
        for file in compared[:30]
        for index in range(10)
    )
    judgement = Judgement(
        outcome=Outcome.CHANGED, references=5, runs=names, level=0.05, labellings=252, smallest_p=0.004, p=0.004,
        files=files, tests=files, verdicts=verdicts, changed_files=tuple(file.name for file in compared[:30]),
        not_judged=tuple(NotJudged(file=file.name, reason=Reason.OPAQUE) for file in compared[30:70]),
        not_judged_files=40,
    )  # fmt: skip
    line = [SeriesSummary(series="w0", pipeline="Strip/1.0", began=BEGAN)]
    line += [
        SeriesSummary(series=f"w{n}", pipeline="Strip/1.0", began=BEGAN + n * timedelta(days=7), judgement=judgement)
        for n in range(1, 20)
    ]
    part = PipelineReport(
        pipeline="Strip/1.0", comparison=Comparison(runs=names, files=compared), baseline="w0",
        against_baseline=judgement, timeline=tuple(line),
    )  # fmt: skip
    return Report(title="Weekly", series="w19", created=BEGAN, pipelines=(part,))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(large(50, 500), tmp_path_factory.mktemp("report")).html.read_text()


def test_verdict_and_effect_come_first_then_where_then_what_is_not_judged(page: str) -> None:
    order = ["Strip/1.0: changed", "differs by 5 in the median", "What has changed, and how much", "Since when",
             "Not judged</h3>", "All files", "How to read this"]  # fmt: skip
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "Against the baseline of 2026-03-02" in page


def test_no_list_repeats_a_file_and_most_are_folded(page: str) -> None:
    unfolded = re.sub(r"<details(?! open).*?</details>", "", page, flags=re.DOTALL)
    changes = unfolded[unfolded.index("What has changed") : unfolded.index("Since when")]
    assert len(re.findall(r'<th scope="row">', changes)) == 10
    assert changes.count("and 9 more measures of this file") == 10
    for name in re.findall(r"folder\d/file\d{3}\.nii\.gz", changes):
        assert changes.count(name) == 1
    agreement = unfolded[unfolded.index("Agreement and precision") : unfolded.index("How alike the runs are")]
    assert len(re.findall(r'<th scope="row">', agreement)) == 10
    for name in re.findall(r"folder\d/file\d{3}\.nii\.gz", agreement):
        assert agreement.count(name) == 1
    assert len(unfolded) < len(page) / 5
    assert "20 more files that have changed" in page


def test_files_are_grouped_by_folder_with_what_is_said_of_them(page: str) -> None:
    assert "<strong>folder0</strong>: 3 changed, 4 not judged, 43 within the noise" in page
    assert page.count("<strong>folder") == 10


def test_what_differs_as_the_references_do_is_not_shown_as_bad(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    runs = {}
    for number in range(10):
        runs[f"run {number}"] = tmp_path / str(number)
        runs[f"run {number}"].mkdir()
        np.save(runs[f"run {number}"] / "a.npy", 100 + generator.standard_normal(500))
    names = list(runs)
    new = {name: runs[name] for name in names[5:]}
    judgement = judge_runs({name: runs[name] for name in names[:5]}, new)
    part = PipelineReport(pipeline="P", comparison=compare_runs(new), baseline="b", against_baseline=judgement)
    report = Report(title="T", series="s", created=BEGAN, pipelines=(part,))
    html = write_report(report, tmp_path / "report").html.read_text()
    assert judgement.outcome is Outcome.WITHIN
    assert '<div class="verdict ">' in html
    assert ">within the noise" in html
    assert report.sentences[0] == f"P against the baseline: {judgement.sentence}."
    assert report.sentences[-1] == f"P: {part.comparison.sentence}"


def test_sizes_of_a_change_are_written_without_exponents() -> None:
    effect = Effect(
        points=2,
        differing=2,
        absolute=0.361,
        absolute_largest=1234.0,
        relative=1.03,
        relative_largest=2e-8,
        spreads=99.6,
    )
    assert effect.sentence == (
        "differs by 0.361 in the median and 1230 at most; 100 % and 2e-06 %; 100 and 0 spreads of the references"
    )


def test_of_one_number_there_is_one_size(tmp_path: Path) -> None:
    """Its median was the middle of a bin, and larger than what it was said to be at most."""
    sides: tuple[dict[str, Path], dict[str, Path]] = {}, {}
    for side, shift in enumerate((0.0, 1.0)):
        for number in range(5):
            folder = sides[side][str(number)] = tmp_path / str(side) / str(number)
            folder.mkdir(parents=True)
            (folder / "a.json").write_text(f'{{"cnr": {100.0 + shift + 0.01 * number}}}')
    effect = judge_runs(*sides).verdicts[0].effect
    assert effect is not None
    assert effect.absolute is not None
    assert effect.absolute <= (effect.absolute_largest or 0.0)
    assert effect.sentence == "differs by 1; 1 %; 63 spreads of the references"


def test_the_baseline_has_no_place_among_what_was_judged() -> None:
    """It was drawn at the level, and at an alarm."""
    panel = Figure().add_subplot()
    part = large(3, 20).pipelines[0]
    _panel(panel, part, "evidence", [None, *(0.5 + 0.1 * n for n in range(19))], 20.0)
    heights = [float(height) for points in panel.collections for height in points.get_offsets()[:, 1]]
    assert max(heights) < 3.0
    panel.figure.canvas.draw()
    assert "e" not in "".join(label.get_text() for label in panel.get_yticklabels())


def test_maps_say_where_an_image_has_changed(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    runs = {}
    for number in range(10):
        runs[f"run {number}"] = tmp_path / str(number)
        runs[f"run {number}"].mkdir()
        voxels = 100 + generator.standard_normal((6, 7, 8))
        voxels[0, 0, 0] = 50.0
        voxels[2, 3, 4] += 1000.0 * (number >= 5)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / str(number) / "a.nii.gz")
    names = list(runs)
    old, new = {name: runs[name] for name in names[:5]}, {name: runs[name] for name in names[5:]}
    part = PipelineReport(
        pipeline="P/1", comparison=compare_runs(new), baseline="b", against_baseline=judge_runs(old, new)
    )
    report = Report(title="T", series="s", created=BEGAN, pipelines=(part,))
    files = write_report(report, tmp_path / "report", runs={"P/1": new}, references={"P/1": old})
    (path,) = files.maps
    image = nibabel.load(path)
    found = np.asarray(image.dataobj)
    assert np.array_equal(image.affine, affine)
    assert np.unravel_index(np.abs(found).argmax(), found.shape) == (2, 3, 4)
    assert found[2, 3, 4] > 300
    assert found[0, 0, 0] == 0.0
    assert "p-1-where/where-1.nii" in files.html.read_text()


def test_the_short_text_is_short_and_in_the_same_order(tmp_path: Path) -> None:
    text = write_report(large(5, 500), tmp_path).markdown.read_text()
    assert len(text.splitlines()) < 80
    assert text.index("what has changed") < text.index("not judged\n") < text.index("| file | agreement")
    assert "490 more files are in report.html and report.json." in text


def test_versions_that_have_changed_are_told_and_are_no_change(tmp_path: Path) -> None:
    runs = {}
    for number in range(10):
        runs[f"run {number}"] = tmp_path / str(number)
        runs[f"run {number}"].mkdir()
        version = "7.3.2" if number < 5 else "7.4.1"
        (runs[f"run {number}"] / "a.txt").write_text(f"# made by recon version {version}\nmean 3.5\n")
    names = list(runs)
    judgement = judge_runs({n: runs[n] for n in names[:5]}, {n: runs[n] for n in names[5:]})
    assert judgement.outcome is Outcome.WITHIN
    assert [item.values for item in judgement.environment] == [
        {"references": "version 7.3.2", "new runs": "version 7.4.1"}
    ]
    part = PipelineReport(pipeline="P", comparison=compare_runs(runs), baseline="b", against_baseline=judgement)
    html = write_report(Report(title="T", series="s", created=BEGAN, pipelines=(part,)), tmp_path / "report").html
    assert "was version 7.3.2, is version 7.4.1" in html.read_text()
    assert [fact.field for fact in part.comparison.files[0].environment] == ["line 1"]
