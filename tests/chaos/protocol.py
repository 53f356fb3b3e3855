"""Schedules of faults and kills for the launch protocol, and how often each way of launching doubles under them.

`PYTHONPATH=tests python -m chaos.protocol --schedules 10000` tries the protocol of `clients.once` and two others under
the same schedules, prints the table, and fails with the shortest schedule when ours has made two objects for one
intent, or none.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from chaos.simulation import (
    BLIND,
    BOUNDARIES,
    ENGINES,
    LEASE_SECONDS,
    LONGEST_FLIGHT,
    LONGEST_LAG,
    NO,
    PLATFORMS,
    READ_TIMEOUT,
    SETTLE,
    Engine,
    Fate,
    PlatformKind,
    Process,
    World,
)
from prefect_biomed.clients.errors import BiomedError, LaunchInDoubt

_STEPS_OF_A_CALL = 500
_CALLS_UNTIL_DONE = 4
_PORTION = 500
MACHINES = ("north", "south")
TOKENS = ("first", "second")
# Two of them differ by less than the hour that is allowed for.
WRONG_CLOCKS = (0.0, -1_700.0, -10.0, 10.0, 1_700.0)

PLACE = {"machine": st.sampled_from(MACHINES), "token": st.sampled_from(TOKENS)}


class Violation(AssertionError):
    """An intent has more than one object, or none when everything worked again."""


def check(world: World) -> None:
    """At no time has an intent more than one object. Where objects have no names, intents may have swapped theirs."""
    if world.kind.named:
        doubled = [token for token in TOKENS if len(world.of(token)) > 1]
    else:
        doubled = ["one of all"] if len(world.objects) > len(world.begun) else []
    if doubled:
        raise Violation(f"{doubled[0]}: {world.objects}")


def finish(world: World) -> None:
    """Nothing goes wrong any more; each intent is called again until it is done, and has exactly one object then."""
    world.heal()
    for process in list(world.processes.values()):
        _to_its_end(world, process)
    taken = {token: _until_done(world, token) for token in world.begun}
    world.pass_until(world.now + LONGEST_FLIGHT)
    check(world)
    if None in taken.values():
        return
    if len(set(taken.values())) != len(taken) or len(world.objects) != len(taken):
        raise Violation(f"{taken}: {world.objects}")


def _go_to(world: World, machine: str, token: str, boundary: str, fate: Fate | None, number: int = 0) -> Process:
    """Go on until a process stands at a boundary or ends; its next request has that fate."""
    world.fates = [fate] if fate else []
    for _ in range(_STEPS_OF_A_CALL):
        process = world.step(machine, token, number)
        if not process.alive or process.at == boundary:
            return process
    raise Violation(f"a call does not end: {process.at}")


def _to_its_end(world: World, process: Process) -> None:
    for _ in range(_STEPS_OF_A_CALL):
        if not process.alive:
            return
        process.step()
    raise Violation(f"a call does not end: {process.at}")


def _until_done(world: World, token: str) -> str | None:
    """Call until the intent is done; None when objects without names leave it to a person which is whose."""
    for _ in range(_CALLS_UNTIL_DONE):
        process = world.step(MACHINES[0], token)
        _to_its_end(world, process)
        if isinstance(process.outcome, str):
            return process.outcome
        world.pass_until(world.now + LEASE_SECONDS)
    if not world.kind.named and isinstance(process.outcome, LaunchInDoubt):
        return None
    raise Violation(f"{token} is not done: {process.outcome!r}")


def fates(kind: PlatformKind) -> st.SearchStrategy[Fate]:
    flight = st.floats(0.0, LONGEST_FLIGHT - LONGEST_LAG).map(lambda seconds: round(seconds, 1))
    answer = st.floats(0.0, READ_TIMEOUT).map(lambda seconds: round(seconds, 1))
    return st.one_of(
        st.builds(Fate, effect=answer),
        st.builds(Fate, effect=st.none() | flight, error=st.sampled_from(kind.lost), answer=answer),
        st.builds(Fate, effect=st.none(), error=st.sampled_from(NO), answer=answer),
    )


def protocol_of(
    kind: PlatformKind, engine: str = "once", engines: Mapping[str, Engine] = ENGINES
) -> type[RuleBasedStateMachine]:
    """The state machine of one platform.

    Args:
        kind: The platform.
        engine: The engine that must not double; a schedule that makes it is a failure.
        engines: All that go through the same schedules; the doubles of the others are counted.
    """

    class LaunchProtocol(RuleBasedStateMachine):
        counts: ClassVar[dict[str, int]] = {"schedules": 0, **dict.fromkeys(engines, 0)}

        def __init__(self) -> None:
            super().__init__()
            self.worlds: dict[str, World] = {}
            self.doubled: set[str] = set()
            logging.disable(logging.CRITICAL)

        @initialize(prefect=st.booleans())
        def begin(self, prefect: bool) -> None:
            self.prefect = prefect
            self.worlds = {name: World(kind, way, prefect=prefect) for name, way in engines.items()}

        def everywhere(self, do: Any) -> None:
            for name, world in self.worlds.items():
                if name in self.doubled:
                    continue
                try:
                    do(world)
                    check(world)
                except Violation:
                    if name == engine:
                        raise
                    self.doubled.add(name)

        # Without a Prefect there is one machine. Intents do not know each other, but where objects have no names; there
        # those of two machines cannot be told apart.
        def place(self, machine: str, token: str) -> tuple[str, str]:
            machine = machine if self.prefect else MACHINES[0]
            return machine, TOKENS[0] if kind.named or self.prefect else token

        @rule(**PLACE, boundary=st.sampled_from(BOUNDARIES), kill=st.booleans(), fate=st.none() | fates(kind))
        def go_to(self, machine: str, token: str, boundary: str, kill: bool, fate: Fate | None) -> None:
            def do(world: World) -> None:
                process = _go_to(world, *self.place(machine, token), boundary, fate)
                if kill:
                    process.kill()

            self.everywhere(do)

        @rule(**PLACE, boundary=st.sampled_from(BOUNDARIES), elsewhere=st.booleans(), fate=st.none() | fates(kind))
        def overtake(self, machine: str, token: str, boundary: str, elsewhere: bool, fate: Fate | None) -> None:
            """Another process does the whole of it while the first stands at a boundary."""

            def do(world: World) -> None:
                here, known_as = self.place(machine, token)
                first = _go_to(world, here, known_as, boundary, None)
                other = next(name for name in MACHINES if name != here) if elsewhere and self.prefect else here
                _to_its_end(world, _go_to(world, other, known_as, "the end", fate, number=1))
                _to_its_end(world, first)

            self.everywhere(do)

        @rule(**PLACE, fate=st.none() | fates(kind))
        def run(self, machine: str, token: str, fate: Fate | None) -> None:
            self.everywhere(lambda world: _go_to(world, *self.place(machine, token), "the end", fate))

        @rule(seconds=st.sampled_from([0.5, 3.0, SETTLE / 2, SETTLE, 1000.0]))
        def time_passes(self, seconds: float) -> None:
            self.everywhere(lambda world: world.pass_until(world.now + seconds))

        @rule(lag=st.sampled_from([0.0, 1.0, LONGEST_LAG]), error=st.sampled_from(BLIND), times=st.integers(0, 5))
        def lists_lag_and_fail(self, lag: float, error: BiomedError, times: int) -> None:
            def do(world: World) -> None:
                world.lag, world.blind = lag, [error] * times

            self.everywhere(do)

        @rule(machine=st.sampled_from(MACHINES), seconds=st.sampled_from(WRONG_CLOCKS), boot=st.booleans())
        def clock_is_set(self, machine: str, seconds: float, boot: bool) -> None:
            def do(world: World) -> None:
                world.set_clock(machine, seconds)
                if boot:
                    world.boot(machine)

            self.everywhere(do)

        @rule(machine=st.sampled_from(MACHINES), times=st.integers(1, 3))
        def disk_is_full(self, machine: str, times: int) -> None:
            self.everywhere(lambda world: setattr(world.machine(machine), "full_disk", times))

        @precondition(lambda self: self.prefect)
        @rule(machine=st.sampled_from(MACHINES))
        def machine_is_replaced(self, machine: str) -> None:
            self.everywhere(lambda world: world.replace(machine))

        def teardown(self) -> None:
            try:
                self.everywhere(finish)
                type(self).counts["schedules"] += 1
                for name in self.doubled:
                    type(self).counts[name] += 1
            finally:
                for world in self.worlds.values():
                    world.close()
                logging.disable(logging.NOTSET)

    # The name is part of what a failure prints.
    LaunchProtocol.__name__ = LaunchProtocol.__qualname__ = f"LaunchProtocolOf{kind.name.title()}"
    return LaunchProtocol


def explore(
    name: str, schedules: int, number: int = 0, *, engine: str = "once", engines: Mapping[str, Engine] = ENGINES
) -> dict[str, int]:
    """Try so many schedules on one platform.

    Args:
        name: The platform.
        schedules: How many.
        number: Seed of the schedules.
        engine: As for `protocol_of`.
        engines: As for `protocol_of`.

    Returns:
        Schedules tried, and for each engine in how many of them it has doubled.

    Raises:
        Violation: The engine has doubled, or was not done when everything worked again. The shortest schedule that
            was found is among its notes.
    """
    machine = protocol_of(PLATFORMS[name], engine, engines)
    # What hypothesis remembers of its examples grows with each of them.
    for portion in range(0, schedules, _PORTION):
        seed(1_000 * number + portion // _PORTION)(machine)
        _run(machine, min(_PORTION, schedules - portion))
    return machine.counts


def _run(machine: type[RuleBasedStateMachine], schedules: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=schedules,
            stateful_step_count=20,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The doubles of each engine on each platform, as text in Markdown."""
    lines = ["| platform | schedules | " + " | ".join(ENGINES) + " |", "|---|" + "---:|" * (len(ENGINES) + 1)]
    for name, found in counts.items():
        tried = found["schedules"]
        shares = [f"{found[engine]:,} ({found[engine] / tried:.1%})" for engine in ENGINES]
        lines.append(f"| {name} | {tried:,} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def draw(counts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """Draw the table as bars, to be read at a width of 800 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"once": "#1b7837", "look, then submit": "#e08214", "submit, then store": "#b2182b"}
    labels = {"once": "prefect-biomed"}
    figure, axes = pyplot.subplots(figsize=(8, 3.4), dpi=200, layout="constrained")
    height = 0.26
    for offset, engine in enumerate(ENGINES):
        for row, found in enumerate(counts.values()):
            share = 100 * found[engine] / found["schedules"]
            place = row + (offset - 1) * height
            axes.barh(place, share, height * 0.9, color=colours[engine], label=labels.get(engine, engine) * (not row))
            axes.text(share + 0.4, place, f"{found[engine]:,}", va="center", fontsize=9, color=colours[engine])
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.set_xlabel("schedules with two remote jobs for one intent, %")
    tried = min(found["schedules"] for found in counts.values())
    axes.set_title(f"{tried:,} schedules of faults, kills and late requests on each platform", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    figure.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=len(ENGINES))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those after the program's name; by default those of this process.

    Returns:
        The exit status: 1 when ours has doubled.
    """
    parser = argparse.ArgumentParser(prog="python -m chaos.protocol", description=__doc__)
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"{', '.join(PLATFORMS)}; default: all")
    parser.add_argument("--schedules", type=int, default=10_000, help="for each platform; default 10000")
    parser.add_argument("--seed", type=int, default=0, help="of the schedules; default 0")
    parser.add_argument("--picture", type=Path, help="draw the table into this PNG file")
    options = parser.parse_args(arguments)
    names = options.platforms or list(PLATFORMS)
    begun = time.monotonic()
    with ProcessPoolExecutor(2) as pool:
        running = {name: pool.submit(explore, name, options.schedules, options.seed) for name in names}
        failed = {name: error for name, job in running.items() if (error := job.exception()) is not None}
    for name, error in failed.items():
        print(f"{name}: {error}", *getattr(error, "__notes__", ()), sep="\n")
        print(
            f"Again: PYTHONPATH=tests {sys.executable} -m chaos.protocol {name} --seed {options.seed} "
            f"--schedules {options.schedules}\n"
        )
    counts = {name: job.result() for name, job in running.items() if name not in failed}
    if counts:
        print(table(counts))
    print(f"{time.monotonic() - begun:.0f} s, seed {options.seed}")
    if options.picture and not failed:
        draw(counts, options.picture)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
