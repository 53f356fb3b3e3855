"""The programs of the tutorials run, those of the official clients as well as ours, and have the same averages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.vantage6 import OFFICIAL, requirements
from benchmarks.vantage6_tutorials import follow

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]


@pytest.mark.parametrize("generation", OFFICIAL)
def test_a_tutorial_gives_the_averages_of_the_cohorts_with_each_client(
    official_environment: Callable[..., Path], tmp_path: Path, generation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_BIOMED_HOME", str(tmp_path / "home"))
    python = OFFICIAL[generation][1]
    official = official_environment(f"vantage6-client-{generation}", requirements(generation), python)
    for client in (official, sys.executable):
        figures = follow(generation, client, tmp_path / Path(client).parents[1].name, seconds=0.5)
        assert figures.lines > 10
        assert 0 <= figures.delay_seconds < 60
