"""Which benchmarks `make bench` runs; what they measure is not for a test."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import PLATFORMS, main


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
