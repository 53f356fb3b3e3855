"""`prefect-biomed report`: what was found, read again."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness.shell import typed
from prefect_biomed.analysis import Report
from prefect_biomed.analysis.models import Judgement, PipelineReport
from prefect_biomed.analysis.outcomes import Outcome
from prefect_biomed.cli.reports import exit_code, exit_code_of_ingest
from prefect_biomed.cli.running import REFUSED
from prefect_biomed.clients.boss import UploadReport, Verification


def left(experiment: Path, series: str, day: int) -> None:
    folder = experiment / "reports" / series
    folder.mkdir(parents=True)
    made = datetime(2026, 1, day, tzinfo=UTC)
    report = Report(title=f"of {series}", series=series, created=made, level=0.05, pipelines=())
    (folder / "report.json").write_text(report.model_dump_json())


def test_the_newest_report_is_shown_or_the_one_that_was_named(tmp_path: Path) -> None:
    # By time, not by name.
    for series, day in (("a", 3), ("b", 1)):
        left(tmp_path, series, day)
    status, said = typed("prefect-biomed", "report", str(tmp_path), "--json")
    assert (status, json.loads(said)["title"]) == (0, "of a")
    status, said = typed("prefect-biomed", "report", str(tmp_path), "--series", "b", "--json")
    assert (status, json.loads(said)["title"]) == (0, "of b")
    status, said = typed("prefect-biomed", "report", str(tmp_path / "reports" / "b"))
    assert status == 0
    assert str(tmp_path / "reports" / "b" / "report.html") in said


def test_no_report_is_no_good_report(tmp_path: Path) -> None:
    status, said = typed("prefect-biomed", "report", str(tmp_path))
    assert (status, "holds no report" in said) == (REFUSED, True)
    left(tmp_path, "a", 1)
    status, said = typed("prefect-biomed", "report", str(tmp_path), "--series", "z")
    assert (status, "Series with a report: a" in said) == (REFUSED, True)
    (tmp_path / "reports" / "a" / "report.json").write_text("{")
    status, said = typed("prefect-biomed", "report", str(tmp_path))
    assert (status, "cannot be read" in said) == (REFUSED, True)


WITHIN, CHANGED, NOT_JUDGED = Outcome.WITHIN, Outcome.CHANGED, Outcome.NOT_JUDGED


@pytest.mark.parametrize(
    ("against_baseline", "against_version", "code"),
    [
        ([WITHIN], [], 0),
        ([WITHIN, CHANGED], [], 1),
        ([NOT_JUDGED, WITHIN], [], 3),
        ([NOT_JUDGED, CHANGED], [], 1),
        ([None], [], 3),
        ([None, None], [None, WITHIN], 0),
        ([None, None], [None, CHANGED], 1),
        ([WITHIN, WITHIN], [None, NOT_JUDGED], 3),
    ],
)
def test_the_exit_code_is_that_of_the_worst_and_nothing_judged_is_not_within(
    against_baseline: list[Outcome | None], against_version: list[Outcome | None], code: int
) -> None:
    def judged(outcome: Outcome | None) -> Judgement | None:
        return outcome and Judgement.model_construct(outcome=outcome)

    versions = [*against_version, *[None] * (len(against_baseline) - len(against_version))]
    parts = [
        PipelineReport.model_construct(pipeline="p", against_baseline=judged(one), against_version=judged(other))
        for one, other in zip(against_baseline, versions, strict=True)
    ]
    assert exit_code(Report.model_construct(pipelines=tuple(parts))) == code


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({}, 0),
        ({"blank": ("z=1",)}, 0),
        ({"verification": None}, 3),
        ({"holes": ("z=1",)}, 1),
        ({"failed": {"z=1": "damaged"}}, 1),
        ({"skipped": ("z=1",)}, 1),
        ({"quarantined": ("z=1",)}, 1),
        ({"quarantined": ("z=1",), "verification": None}, 1),
    ],
)
def test_tiles_that_lack_are_in_the_exit_code_of_an_ingest(told: dict[str, object], code: int) -> None:
    whole = UploadReport(job_id=1, tile_count=16, verification=Verification.model_construct())
    assert exit_code_of_ingest(whole.model_copy(update=told)) == code
