"""The rehearsals of `make chaos`: they repeat, everything happens in them, and they see what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from chaos.child import _limit
from chaos.journeys import Journey, VipJourney, _sent_again
from chaos.plans import KINDS, plan
from chaos.rehearsal import Outcome, _left_over, _read_only, _Rehearsal, report
from prefect_biomed.sandbox import Entry, Sandbox


def test_plan_is_made_of_its_seed_alone() -> None:
    assert plan(7, "/task$") == plan(7, "/task$")
    assert plan(7, "/task$") != plan(8, "/task$")


def test_everything_happens_within_some_seeds() -> None:
    attempts = [attempt for seed in range(120) for attempt in plan(seed, "/task$")]
    assert {fault.name for attempt in attempts for fault in attempt.faults} == set(KINDS)
    assert {name for attempt in attempts for name in attempt.happenings} == {
        "killed at a request",
        "killed at a moment",
        "twin process",
        "full disk",
        "read-only disk",
        "keys expire",
        "platform restarts",
    }


class Wrong(VipJourney):
    """A journey of which nothing is right."""

    def made(self) -> Mapping[str, int]:
        return {"run": 2}

    def lost(self) -> Iterator[str]:
        yield "outputs are gone"

    def wrong(self, result: Any) -> Iterator[str]:
        yield "another result"


@pytest.fixture
def journey(vip: Sandbox, tmp_path: Path) -> Journey:
    (tmp_path / "files").mkdir()
    return Wrong(vip, 1, tmp_path / "files")


def test_everything_that_is_wrong_is_told(journey: Journey, tmp_path: Path) -> None:
    outcome = Outcome("vip", 1)
    rehearsal = _Rehearsal(journey, outcome, tmp_path)
    (journey.folder / "x.part").touch()
    (tmp_path / "logs" / "1.log").write_text(f"apikey: {journey.facts['api_key']}")
    with FileLock(journey.folder / "a.lock"):
        rehearsal._check_now()
        rehearsal._check_at_the_end(("result", "", {}))
    told = "\n".join(outcome.violations)
    for what in (
        "2 remote objects for the intent run",
        "outputs are gone",
        "another result",
        "x.part was left behind",
        "a.lock is held",
        "a secret is in",
    ):
        assert what in told
    assert "| **violations** | 7 |" in report([outcome])


def test_work_that_is_not_done_is_told(journey: Journey, tmp_path: Path) -> None:
    outcome = Outcome("vip", 1)
    _Rehearsal(journey, outcome, tmp_path)._check_at_the_end(("error", "NetworkError", "lost"))
    assert "not done after 5 calls" in outcome.violations[0]


def test_a_read_only_disk_keeps_root_from_writing_and_from_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "intents").mkdir()
    (tmp_path / "intents" / "a.json").write_text("{}")

    def refused(name: str) -> bool:
        try:
            (tmp_path / "intents" / name).write_text("x")
        except PermissionError:
            return True
        return False

    def user() -> tuple[list[bool], str]:
        _limit("read-only")
        return [refused("a.json"), refused("b.json")], (tmp_path / "intents" / "a.json").read_text()

    # What a thread may do is its own, so the limit ends with it.
    with _read_only(tmp_path), ThreadPoolExecutor(1) as thread:
        assert thread.submit(user).result() == ([True, True], "{}")


def test_lock_that_nobody_holds_is_no_left_over(tmp_path: Path) -> None:
    (tmp_path / "a.lock").touch()
    assert list(_left_over(tmp_path)) == []


def test_file_that_was_complete_must_not_be_sent_again_unless_it_was_removed() -> None:
    def entry(method: str, path: str = "/rest/path/a.bin", **fields: Any) -> Entry:
        return Entry(number=1, time=0.0, concurrent=1, method=method, path=path, query="", **fields)

    sent = entry("PUT", status=201, answered=201, effect=True)
    lost = entry("PUT", status=None, answered=201, effect=True, fault="dropped after the effect")
    assert list(_sent_again([lost, sent], r"a\.bin$")) == []
    assert list(_sent_again([sent, entry("DELETE", path="/rest/path", effect=True), sent], r"a\.bin$")) == []
    assert len(list(_sent_again([sent, sent], r"a\.bin$"))) == 1
