"""The matrix of `make chaos-kills`: killed at any moment, a session comes to the same end; what is wrong is seen."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NoReturn

import pytest

from chaos.kills import (
    KINDS,
    ON_VIP,
    WAYS,
    Kill,
    Kind,
    Row,
    connected,
    matrix,
    moments,
    platform,
    report,
    session_of,
    take_up,
    take_up_again,
    wind,
    work,
    write_inputs,
)

ELSEWHERE = [kind for kind in KINDS if kind not in ON_VIP]


class Killed(BaseException):
    """The end of a process."""


def killed() -> NoReturn:
    """End it."""
    raise Killed


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        (Kind("vip", "local"), 36),
        (Kind("vip", "local"), 83),
        (Kind("vip", "nowhere"), 48),
        (Kind("vip", "vip"), 90),
        (Kind("girder", "local"), 94),
        (Kind("carmin as published", "local"), 85),
    ],
    ids=lambda value: f"{value.profile}-{value.backup}" if isinstance(value, Kind) else str(value),
)
def test_session_that_was_killed_is_taken_up_from_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, moment: int
) -> None:
    folder = tmp_path / "k"
    write_inputs(folder)
    with platform(kind) as sandbox, connected(sandbox.ready()["vip"]) as client:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            wind(Kill(moment, after=True), killed, patched.setattr)
            work(client, session_of("k", folder, kind), lambda name, do: do())
        first = take_up_again(client, "k", folder / "out", kind)
        assert len(first) == 2 * len(kind.contents)
        assert take_up_again(client, "k", folder / "out", kind) == first
        assert not client.exists(kind.home("k"))
        assert len([e for e in sandbox.vip.journal.entries("POST", "/executions$") if e.effect]) == 2


def test_what_is_wrong_is_told() -> None:
    row = Row(Kind("vip", "local"), "retry", moments=3)
    row.ends["wrong"] += 1
    row.wrong.append("after moment 2: something is left on the platform")
    told = report([row])
    assert "| vip | local | retry | 3 | 1 | 0 | 0 | 0 | 1 | 0 |" in told
    assert told.endswith("vip, local, retry: after moment 2: something is left on the platform")


@pytest.mark.slow
def test_session_killed_just_after_a_launch_comes_to_the_same_files_elsewhere(tmp_path: Path) -> None:
    kind = Kind("vip", "nowhere")
    passed = moments(kind, tmp_path / "whole")
    posts = [number for number, what in enumerate(passed, start=1) if what == "POST /rest/executions"]
    assert len(posts) == 2
    row = take_up(kind, "resume elsewhere", [Kill(posts[1], after=True)])
    assert (dict(row.ends), row.wrong) == ({"same files": 1}, [])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("every", "kinds"), [(120, ON_VIP), (180, ELSEWHERE)], ids=["VIP", "other platforms"])
def test_session_killed_at_some_moments_comes_to_the_same_files_in_every_way(every: int, kinds: list[Kind]) -> None:
    # Every moment is tried by `make chaos-kills`; it takes the better part of an hour.
    rows = matrix(every=every, kinds=kinds)
    print(report(rows))
    assert [wrong for row in rows for wrong in row.wrong] == []
    assert {(row.kind, row.way) for row in rows} == set(product(kinds, WAYS))
    assert all(row.ends["same files"] >= row.ends.total() / 2 for row in rows)
