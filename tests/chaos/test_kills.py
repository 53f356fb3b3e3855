"""The matrix of `make chaos-kills`: killed at any moment, a session comes to the same end; what is wrong is seen."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from chaos.kills import (
    BACKUPS,
    WAYS,
    Backup,
    Kill,
    Row,
    matrix,
    moments,
    report,
    session_of,
    take_up,
    take_up_again,
    wind,
    work,
    write_inputs,
)
from prefect_biomed.clients.vip import VipClient
from prefect_biomed.sandbox import Sandbox


class Killed(BaseException):
    """The end of a process."""


def killed() -> NoReturn:
    """End it."""
    raise Killed


@pytest.mark.parametrize(("backup", "moment"), [("local", 36), ("local", 83), ("nowhere", 48), ("vip", 90)])
def test_session_that_was_killed_is_taken_up_from_its_record(
    vip: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backup: Backup, moment: int
) -> None:
    vip.vip.switches.delete_seconds = 0
    facts, folder = vip.ready()["vip"], tmp_path / "k"
    write_inputs(folder)
    with VipClient(facts["url"], facts["api_key"], parallelism=1, settle_seconds=0.2) as client:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            wind(Kill(moment, after=True), killed, patched.setattr)
            work(client, session_of("k", folder, backup), lambda name, do: do())
        first = take_up_again(client, "k", folder / "out")
        assert len(first) == 4
        assert take_up_again(client, "k", folder / "out") == first
        assert not client.exists("/vip/Home/API/k")
    assert len([e for e in vip.vip.journal.entries("POST", "/executions$") if e.effect]) == 2


def test_what_is_wrong_is_told() -> None:
    row = Row("local", "retry", moments=3)
    row.ends["wrong"] += 1
    row.wrong.append("after moment 2: something is left on the platform")
    told = report([row])
    assert "| local | retry | 3 | 1 | 0 | 0 | 0 | 1 | 0 |" in told
    assert told.endswith("local, retry: after moment 2: something is left on the platform")


@pytest.mark.slow
def test_session_killed_just_after_a_launch_comes_to_the_same_files_elsewhere(tmp_path: Path) -> None:
    passed = moments("nowhere", tmp_path / "whole")
    posts = [number for number, what in enumerate(passed, start=1) if what == "POST /rest/executions"]
    assert len(posts) == 2
    row = take_up("nowhere", "resume elsewhere", [Kill(posts[1], after=True)])
    assert (dict(row.ends), row.wrong) == ({"same files": 1}, [])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_session_killed_at_some_moments_comes_to_the_same_files_in_every_way() -> None:
    # Every moment is tried by `make chaos-kills`; it takes the better part of an hour.
    rows = matrix(every=60)
    print(report(rows))
    assert [row.wrong for row in rows] == [[]] * len(BACKUPS) * len(WAYS)
    assert all(row.ends["same files"] > row.ends.total() / 2 for row in rows)
