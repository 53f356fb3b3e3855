"""The launch protocol under schedules that nobody has thought of; `make chaos-protocol` tries many more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from chaos.protocol import Violation, draw, explore, finish, table
from chaos.simulation import ENGINES, PLATFORMS, Fate, Process, Records, World, ours
from prefect_biomed.clients.errors import NetworkError, PlatformError
from prefect_biomed.clients.once import Intent


@pytest.mark.parametrize("name", PLATFORMS)
def test_no_schedule_makes_two_objects_for_one_intent(name: str) -> None:
    counts = explore(name, 100)
    print(counts)
    assert counts["schedules"] >= 100
    assert counts["once"] == 0
    assert counts["submit, then store"] > 0, "these schedules would not show a double"


class WithoutLock(Records):
    @contextmanager
    def exclusive(self, token: str, seconds: float) -> Iterator[None]:
        yield


class WithoutIntent(Records):
    """Only what was launched is written down."""

    def write(self, intent: Intent) -> None:
        if intent.id is not None:
            super().write(intent)


WEAKER = {
    "no time for a request on its way": partial(ours, settle_seconds=0.0),
    "no intent before the request": partial(ours, store=WithoutIntent),
    "no lock": partial(ours, store=WithoutLock),
    "no look": partial(ours, find=lambda _: []),
    "every 4xx is a refusal": partial(ours, says_no=lambda _: True),
}


@pytest.mark.slow
@pytest.mark.parametrize("weaker", WEAKER)
def test_schedules_show_what_each_part_of_the_protocol_is_for(weaker: str) -> None:
    # Which schedules a seed stands for depends on the constants in the code.
    with pytest.raises(Violation):
        for number in range(8):
            explore("vip", 3_000, number, engine=weaker, engines={weaker: WEAKER[weaker]})


def in_flight(process: Process) -> bool:
    return process.at == "request on its way"


def killed_in_flight(world: World) -> None:
    """A process that dies while its request is on the way."""
    world.fates = [Fate(effect=10.0, error=NetworkError("lost"), answer=5.0)]
    while not in_flight(world.step("north", "first")):
        pass
    world.kill("north", "first")


@pytest.mark.parametrize("seconds", [-1_700.0, 1_700.0])
def test_clock_that_is_set_while_a_request_is_on_its_way(seconds: float) -> None:
    world = World(PLATFORMS["vantage6"], ours, prefect=False)
    killed_in_flight(world)
    world.set_clock("north", seconds)
    finish(world)
    assert world.sent == 1


def test_machine_whose_clock_is_wrong_after_a_boot() -> None:
    world = World(PLATFORMS["vantage6"], ours, prefect=False)
    killed_in_flight(world)
    world.boot("north")
    world.set_clock("north", 1_700.0)
    finish(world)
    assert world.sent == 1


def test_doubles_of_others_are_counted_in_a_table_and_a_picture(tmp_path: Path) -> None:
    counts = {name: {"schedules": 200, **dict.fromkeys(ENGINES, 0), "submit, then store": 50} for name in PLATFORMS}
    assert "| vip | 200 | 0 (0.0%) | 0 (0.0%) | 50 (25.0%) |" in table(counts)
    draw(counts, tmp_path / "doubles.png")
    assert (tmp_path / "doubles.png").stat().st_size > 10_000


def test_engine_that_submits_and_stores_makes_two_when_its_answer_is_lost() -> None:
    world = World(PLATFORMS["vip"], ENGINES["submit, then store"])
    world.fates = [Fate(error=NetworkError("lost"))]
    with pytest.raises(Violation):
        for _ in range(2):
            while world.step("north", "first").alive:
                pass
        finish(world)


def test_typed_error_of_the_platform_reaches_the_caller() -> None:
    world = World(PLATFORMS["vip"], ours)
    refusal = PlatformError("no", status=400, spoken=True)
    world.fates = [Fate(effect=None, error=refusal)]
    process = world.step("north", "first")
    while process.alive:
        process.step()
    assert isinstance(process.outcome, PlatformError)
    assert (process.outcome.status, str(process.outcome)) == (400, "no")
