"""Which benchmarks `make bench` runs; what they measure is not for a test."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import repeatability
from benchmarks.__main__ import PLATFORMS, main
from benchmarks.vantage6_tutorials import lines_of_code
from prefect_biomed.analysis.exchange import Labellings


@pytest.mark.parametrize(
    ("asked", "run"), [([], list(PLATFORMS)), (["boss"], ["boss"]), (["boss", "vip"], ["boss", "vip"])]
)
def test_the_platforms_asked_for_are_run_in_turn(
    asked: list[str], run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked])
    monkeypatch.setattr(
        importlib, "import_module", lambda name: SimpleNamespace(main=lambda: ran.append(name.split(".")[1]))
    )
    main()
    assert ran == run


def test_an_unknown_platform_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "vop"])
    with pytest.raises(SystemExit):
        main()
    assert "'vip'" in capsys.readouterr().err


def test_lines_of_code_are_those_that_say_something() -> None:
    text = '"""What\n\nit does."""\n\nimport config  # theirs\n\n# A comment.\nprint(\n    """a\nb""",\n)\n'
    assert lines_of_code(text) == 5


def test_a_cell_of_the_tables_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    experiment = partial(repeatability._alarms, Labellings(3, 3), "normal", 1, 50)
    cell = repeatability.Cell(tmp_path, "a cell")
    cell.run(10, experiment)
    cell = repeatability.Cell(tmp_path, "a cell")
    assert cell.experiments == 10
    cell.run(10, lambda generator: pytest.fail("as many as wanted are there"))
    cell.run(12, experiment)
    assert repeatability.Cell(tmp_path, "a cell").experiments == 12
    # Six runs cannot reach the level when the two groups are of one size.
    assert cell.counts == {"alarms": 0}


@pytest.mark.parametrize("noise", repeatability.NOISES)
def test_every_noise_varies_from_run_to_run(noise: str) -> None:
    values = repeatability.NOISES[noise](np.random.default_rng(1), (8, 2000))
    assert values.shape == (8, 2000)
    assert np.isfinite(values).all()
    assert (values != values[0]).any()


def test_every_change_is_found_where_it_is_large(tmp_path: Path) -> None:
    found = repeatability._found(Labellings(5, 3), 1000, np.random.default_rng(2))
    assert found["a moved affine|1"] == found["1 % of the labels flipped|1"] == found["the spread by 1.5|1"] == 1
    assert set(found.values()) <= {0, 1}
    lines = [repeatability._alarm_table, repeatability._power_table, repeatability._year_table]
    assert all(make(tmp_path)[0].startswith("| ") for make in lines)
