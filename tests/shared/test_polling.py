"""The poll loop, with a clock that only moves when somebody sleeps."""

import itertools
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    DeadlineExceeded,
    NetworkError,
    PollingFailed,
    ServerUnavailable,
)
from prefect_biomed.clients.polling import PollSettings, poll, sleep, tries


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("prefect_biomed.clients.polling.time", clock)
    monkeypatch.setattr("prefect_biomed.clients.polling.random", SimpleNamespace(uniform=lambda low, high: 1.0))
    return clock


def looks(clock: Clock, *outcomes: object) -> tuple[Callable[[], object], list[float]]:
    """A look that gives the outcomes one after the other, the last one for ever; and when it was made."""
    left = list(outcomes)
    made: list[float] = []

    def look() -> object:
        made.append(round(clock.now - 1000.0, 6))
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return look, made


def watch(look: Callable[[], object], settings: PollSettings, until: object = "end") -> list[object]:
    return list(poll(look, settings, done=lambda seen: seen == until, what="The job", take_up_again="Ask again."))


def test_looks_at_once_and_then_at_the_interval(clock: Clock) -> None:
    look, made = looks(clock, "a", "b", "end")
    assert watch(look, PollSettings(interval_seconds=30)) == ["a", "b", "end"]
    assert made == [0, 30, 60]


def test_interval_grows_to_its_maximum(clock: Clock) -> None:
    look, made = looks(clock, "a", "b", "c", "d", "end")
    watch(look, PollSettings(interval_seconds=10, growth=2, max_interval_seconds=35))
    assert made == [0, 10, 30, 65, 100]


def test_interval_without_maximum_stays(clock: Clock) -> None:
    look, made = looks(clock, "a", "b", "end")
    watch(look, PollSettings(interval_seconds=10, growth=2))
    assert made == [0, 10, 20]


def test_jitter_spreads_the_looks(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return high

    monkeypatch.setattr("prefect_biomed.clients.polling.random", SimpleNamespace(uniform=uniform))
    look, made = looks(clock, "a", "end")
    watch(look, PollSettings(interval_seconds=10))
    assert made == [0, 11]
    assert asked == [(0.9, 1.1)]


def test_failures_within_the_budget_are_survived(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    down = NetworkError("GET http://host: gone")
    look, made = looks(clock, "a", down, down, down, "b", down, down, down, "end")
    with caplog.at_level(logging.WARNING):
        assert watch(look, PollSettings(interval_seconds=1, error_budget=3)) == ["a", "b", "end"]
    assert len(made) == 9
    assert [m for m in caplog.messages if "failed" in m][
        3
    ] == "Look 1 in a row at The job failed: GET http://host: gone"


def test_one_failure_more_than_the_budget_ends_the_wait(clock: Clock) -> None:
    look, made = looks(clock, ServerUnavailable("down"))
    with pytest.raises(PollingFailed, match=r"4 looks in a row failed.*down.*Nothing was stopped.*Ask again\."):
        watch(look, PollSettings(interval_seconds=1, error_budget=3))
    assert len(made) == 4


def test_looks_become_rarer_while_they_fail(clock: Clock) -> None:
    look, made = looks(clock, *[NetworkError("x")] * 12, "end")
    watch(look, PollSettings(interval_seconds=10, error_budget=20))
    gaps = [later - earlier for earlier, later in itertools.pairwise(made)]
    assert gaps[:4] == [20, 40, 80, 160]
    assert set(gaps[4:]) == {300}


def test_failure_that_waiting_does_not_mend_ends_it_at_once(clock: Clock) -> None:
    look, made = looks(clock, "a", AuthenticationError("bad key"))
    with pytest.raises(AuthenticationError):
        watch(look, PollSettings(interval_seconds=1))
    assert len(made) == 2


def test_errors_that_are_not_ours_pass(clock: Clock) -> None:
    look, _ = looks(clock, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        watch(look, PollSettings(interval_seconds=1))


def test_last_look_is_made_at_the_deadline(clock: Clock) -> None:
    look, made = looks(clock, "a")
    with pytest.raises(DeadlineExceeded, match=r"The job: not finished after 25 s.*Ask again"):
        watch(look, PollSettings(interval_seconds=10, deadline_seconds=25))
    assert made == [0, 10, 20, 25]


def test_end_seen_at_the_deadline_counts(clock: Clock) -> None:
    look, _ = looks(clock, "a", "end")
    assert watch(look, PollSettings(interval_seconds=100, deadline_seconds=25)) == ["a", "end"]


def test_deadline_ends_a_series_of_failures(clock: Clock) -> None:
    look, _ = looks(clock, NetworkError("x"))
    with pytest.raises(DeadlineExceeded):
        watch(look, PollSettings(interval_seconds=10, deadline_seconds=60, error_budget=1000))
    assert clock.now == 1060


def test_sleep_is_taken_in_short_naps(clock: Clock) -> None:
    sleep(3.5)
    assert clock.naps == [1, 1, 1, 0.5]
    sleep(0)
    sleep(-1)
    assert len(clock.naps) == 4


@pytest.mark.parametrize("settings", [{"interval_seconds": 0}, {"interval_seconds": -1}, {"growth": 0.5}])
def test_polling_without_a_pause_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="interval above 0"):
        PollSettings(**settings)  # type: ignore[arg-type]  # one of them


def test_tries_pause_between_and_end_with_the_last_error(clock: Clock) -> None:
    look, made = looks(clock, NetworkError("x"))
    with pytest.raises(NetworkError):
        tries(look, [1, 3], what="A file")
    assert made == [0, 1, 4]


def test_tries_end_with_the_first_that_succeeds(clock: Clock) -> None:
    look, made = looks(clock, NetworkError("x"), "here")
    assert (tries(look, [2, 2], what="A file"), made) == ("here", [0, 2])


def test_tries_end_at_once_for_what_stays_the_same(clock: Clock) -> None:
    look, made = looks(clock, AuthenticationError("x"))
    with pytest.raises(AuthenticationError):
        tries(look, [1, 3], what="A file")
    assert made == [0]
    look, made = looks(clock, AuthenticationError("x"), "here")
    assert tries(look, [1], what="A file", again=lambda _: True) == "here"
