from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from prefect_biomed.analysis.exchange import Evidence, Labellings, Scan, intraclass_correlation
from prefect_biomed.analysis.monitor import Monitor, Shown, _set_on, _share_from, _win

LEVEL = 0.05


def test_no_more_money_is_set_than_there_is() -> None:
    series = range(1, 100_000)
    assert sum(map(_set_on, series)) <= 1.0
    assert sum(map(_share_from, series)) <= 1.0


@pytest.mark.parametrize("labellings", [20, 252, 3003, 10_001])
@pytest.mark.parametrize("ties", [1, 2])
def test_a_bet_wins_nothing_on_average_while_nothing_changes(labellings: int, ties: int) -> None:
    p = np.repeat(np.arange(ties, labellings + 1, ties), ties) / labellings
    won = [_win(Shown("", float(value), ties / labellings, 0.0)) for value in p]
    assert np.mean(won) <= 1.0 + 1e-9


@pytest.mark.parametrize("is_one_baseline", [False, True])
def test_few_years_raise_any_alarm_while_nothing_changes(is_one_baseline: bool) -> None:
    """52 weeks whose p values are independent, or as dependent as can be: the same all year."""
    generator = np.random.default_rng(7)
    years, alarms = 400, 0
    for year in range(years):
        luck = generator.integers(1, 253)
        monitor = Monitor(LEVEL)
        for week in range(52):
            p = (luck if is_one_baseline else generator.integers(1, 253)) / 252
            monitor.add(Shown(f"{year} {week}", float(p), 1 / 252, float(generator.standard_normal() - luck)))
        alarms += monitor.alarm is not None
    assert alarms <= stats.binom.ppf(0.975, years, LEVEL)


def test_a_large_change_is_told_at_once_and_a_small_one_after_some_series() -> None:
    generator = np.random.default_rng(3)

    def weeks_until_told(smallest: float, p: float, quiet: int) -> int:
        monitor = Monitor(LEVEL)
        for week in range(quiet):
            monitor.add(Shown(f"quiet {week}", float(generator.uniform(0.05, 1.0)), smallest, generator.random()))
        for week in range(1, 30):
            monitor.add(Shown(f"changed {week}", p, smallest, 5.0 + generator.random()))
            if monitor.alarm is not None:
                assert monitor.start()[0] == quiet
                return week
        return 30

    assert weeks_until_told(2 / 252, 2 / 252, 0) == 1
    assert weeks_until_told(1 / 3003, 1 / 3003, 10) <= 3
    # By the rank among the series before alone, since none of these p values wins anything.
    assert weeks_until_told(1 / 252, 0.04, 25) <= 6


def test_the_start_of_a_change_has_an_interval() -> None:
    generator = np.random.default_rng(9)
    monitor = Monitor(LEVEL)
    for week in range(30):
        changed = week >= 20
        p = float(generator.uniform(0.0004, 0.02) if changed else generator.uniform(0.1, 1.0))
        monitor.add(Shown(str(week), p, 1 / 3003, generator.random() + 4.0 * changed))
    best, earliest, latest = monitor.start()
    assert earliest <= best <= latest
    assert earliest <= 20 <= latest
    assert latest - earliest <= 6


def test_series_in_which_nothing_varies_are_no_evidence() -> None:
    monitor = Monitor(LEVEL, [Shown(str(week), None, 1 / 252, None) for week in range(52)])
    assert monitor.alarm is None


def test_all_who_look_see_the_same() -> None:
    series = [Shown(str(week), 0.5, 1 / 252, 1.0) for week in range(10)]
    assert Monitor(LEVEL, series).evidence == Monitor(LEVEL, series).evidence


def test_runs_of_one_series_are_alike_when_the_platform_varies() -> None:
    generator = np.random.default_rng(4)
    units = np.repeat(range(6), 4).tolist()
    found = []
    for between in (0.0, 1.0):
        level = between * np.repeat(generator.standard_normal((6, 2000)), 4, axis=0)
        values = level + generator.standard_normal((24, 2000))
        scan = Scan(Labellings(20, 4, units=units))
        scan.add(values)
        found.append(intraclass_correlation(scan.scatter, units))
    assert found == [pytest.approx(0.0, abs=0.03), pytest.approx(0.5, abs=0.1)]
    assert intraclass_correlation(np.eye(3), [0, 1, 2]) is None


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "t3", "smooth"])
def test_years_of_judged_series_raise_few_alarms(noise: str) -> None:
    generator = np.random.default_rng(21)
    labellings = Labellings(5, 5)
    make = {
        "normal": lambda: generator.standard_normal((5, 200)),
        "t3": lambda: generator.standard_t(3, (5, 200)),
        "smooth": lambda: np.cumsum(generator.standard_normal((5, 200)), axis=1),
    }[noise]
    years, alarms = 40, 0
    for year in range(years):
        baseline, monitor = make(), Monitor(LEVEL)
        for week in range(52):
            scan, evidence = Scan(labellings), Evidence(labellings)
            scan.add(np.concatenate([baseline, make()]))
            evidence.add(scan)
            monitor.add(Shown(f"{year} {week}", evidence.p, labellings.smallest_p, evidence.size))
        alarms += monitor.alarm is not None
    assert alarms <= stats.binom.ppf(0.975, years, LEVEL)
