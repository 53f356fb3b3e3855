"""What clients make of a server that does what it should not; `make hostile` prints the table of all attacks."""

from __future__ import annotations

import pytest

from harness import hostile
from harness.hostile import Target

# Each attack on one platform, in turns.
QUICK = [
    one
    for number, (name, attack) in enumerate(hostile.EVERYWHERE.items())
    if name not in hostile.SLOW
    for one in [(name, hostile.PLATFORMS[number % 3], attack)]
] + hostile.IN_ONE_PLACE


@pytest.mark.usefixtures("no_pauses")
def test_no_attack_ends_in_anything_but_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "MOST_ENTRIES", 200)
    rows = [hostile.carry_out(*one) for one in QUICK]
    assert len(rows) >= 30
    assert {row.target for row in rows} >= {"VIP", "vantage6", "Boss", "VIP folder", "VIP file", "vantage6 login"}
    problems = [(row.attack, row.target, problem) for row in rows for problem in hostile.problems_of(row)]
    assert problems == []


def test_time_and_memory_are_bounded() -> None:
    for name, target in (("gzip of 1 GB", hostile.VIP), ("body byte by byte", hostile.BOSS)):
        row = hostile.carry_out(name, target, hostile.EVERYWHERE[name])
        assert hostile.problems_of(row) == []
        assert row.outcome in {"UnexpectedResponse", "RequestTimedOut"}


def test_a_client_that_sends_its_key_elsewhere_is_found() -> None:
    """The control: the same table is red for a careless client."""

    def careless(port: int) -> object:
        import requests

        first = requests.get(f"http://127.0.0.1:{port}/executions", allow_redirects=False, timeout=5)
        return requests.get(first.headers["Location"], headers={"apikey": hostile.KEY}, timeout=5).json()

    target = Target("careless", "/executions", careless, hostile.VIP.entry, hostile.VIP.listed, hostile.VIP.refused)
    row = hostile.carry_out("redirect", target, hostile.EVERYWHERE["redirect to another host"])
    assert "the key went elsewhere" in hostile.problems_of(row)
    broken = hostile.carry_out("page", target, hostile.EVERYWHERE["page for people"])
    assert any("not ours" in problem for problem in hostile.problems_of(broken))
