"""The category of a failure: right for recorded ones, unknown where nothing tells."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed

from prefect_biomed.clients import errors
from prefect_biomed.clients.diagnosis import _ADVICE, Category, diagnose
from prefect_biomed.clients.vip import WorkflowFailed
from prefect_biomed.flows import _checked
from prefect_biomed.flows.vip import vip_session

ROOT = Path(__file__).parents[2]
FAILURES = [json.loads(line) for line in (ROOT / "tests/vectors/failures.jsonl").read_text().splitlines()]


def test_recorded_failures_get_their_category() -> None:
    assert len(FAILURES) >= 60
    assert {one["platform"] for one in FAILURES} == {"vip", "vantage6", "boss"}
    wrong = [
        (one, diagnose(one["said"]).category) for one in FAILURES if diagnose(one["said"]).category != one["category"]
    ]
    assert len(wrong) <= 0.05 * len(FAILURES), wrong
    for one in FAILURES:
        found = diagnose(one["said"])
        assert found.category is Category.UNKNOWN or found.evidence.strip() in one["said"]
    assert len(Counter(one["category"] for one in FAILURES)) >= 17


@pytest.mark.parametrize(
    "said",
    [
        "",
        "403 voxels were written, 500 were left out",
        "step 137 of 401 is done",
        "stdout: writing to /home/killed/out",
        "0 of 12 files differ",
        "the memory was measured",
        "node 3 of the graph",
        "502 subjects",
    ],
)
def test_what_tells_nothing_stays_unknown(said: str) -> None:
    assert diagnose(said).category is Category.UNKNOWN


@given(st.text())
def test_any_text_has_a_diagnosis_of_one_line(text: str) -> None:
    assert "\n" not in str(diagnose(text))


def test_errors_of_ours_are_known_by_their_class() -> None:
    for kind, category in (
        (errors.AuthenticationError, "credentials"),
        (errors.StorageFull, "quota"),
        (errors.LocalStorageError, "local-disk"),
        (errors.RequestTimedOut, "network"),
        (errors.ServerUnavailable, "platform-down"),
        (errors.NotFoundError, "name-unknown"),
        (errors.HeldElsewhere, "record"),
        (errors.DeadlineExceeded, "out-of-time"),
        (errors.PreflightFailed, "parameters"),
        (errors.BiomedError, "unknown"),
    ):
        assert diagnose(kind("x")).category == category
    assert diagnose(WorkflowFailed("job 1: exit code 137")).category is Category.OUT_OF_MEMORY
    assert diagnose(ValueError("exit code 137")).category is Category.OUT_OF_MEMORY


def test_every_category_is_documented_with_what_helps() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert set(_ADVICE) == set(Category)
    for category, (summary, command) in _ADVICE.items():
        assert f"| `{category.value}` | {summary} | {command} |" in text


def test_a_flow_that_failed_emits_the_category(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted: list[Any] = []
    monkeypatch.setattr(_checked, "event", lambda *about, **labels: emitted.append((about, labels)))
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name="r")
    error = WorkflowFailed("w1 failed:\n  stderr: std::bad_alloc")
    (hook,) = vip_session.on_failure_hooks
    hook(vip_session, run, Failed(message="x", data=error))
    hook(vip_session, run, Failed(message="HTTP 503"))
    assert emitted[0][0][:2] == ("biomed.flow.failed", f"prefect.flow-run.{run.id}")
    assert emitted[0][1]["category"] == "out-of-memory"
    assert emitted[0][1]["evidence"] == "stderr: std::bad_alloc"
    assert emitted[0][1]["flow"] == "vip-session"
