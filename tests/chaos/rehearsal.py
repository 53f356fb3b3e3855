"""Seeded rehearsals of whole journeys on the sandbox: everything goes wrong for a while, then nothing does.

`make chaos SEEDS=500` runs so many on each platform. At any time an intent has at most one remote object, every failure
is an error of `clients.errors`, and what is removed remotely is here. When nothing goes wrong any more the work is
repeated until it ends; then results and reports are exact, nothing is left over and no secret is in any file.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from chaos.child import attempt
from chaos.journeys import JOURNEYS, Journey
from chaos.plans import LONGEST_HOLD, Attempt, plan
from prefect_biomed.sandbox import Sandbox

_ATTEMPT_SECONDS = 120.0
_CALLS_UNTIL_DONE = 5
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["chaos.child"])


@dataclass
class Outcome:
    """What came of one seed."""

    platform: str
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    processes: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


def rehearse(platform: str, seed: int, keep: Path | None = None) -> Outcome:
    """Rehearse one seed.

    Args:
        platform: Where.
        seed: Of the plan and of all contents.
        keep: Folder in which the files of this rehearsal stay, to be looked at.
    """
    # A platform that restarts cuts off requests in work, which is meant.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    outcome = Outcome(platform, seed)
    begun = time.monotonic()
    kind = JOURNEYS[platform]
    switches = dict(kind.switches)
    if platform == "vantage6":
        switches |= {"generation": 3 + seed % 3, "key_bits": 2048}
    folder = keep or Path(tempfile.mkdtemp(prefix=f"chaos-{platform}-{seed}-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    try:
        with Sandbox(platform, seed=seed, **{platform: switches}) as sandbox:
            journey = kind(sandbox, seed, folder / "files")
            journey.folder.mkdir()
            journey.prepare()
            _Rehearsal(journey, outcome, folder).run()
    finally:
        if keep is None:
            shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - begun
    return outcome


class _Rehearsal:
    def __init__(self, journey: Journey, outcome: Outcome, folder: Path) -> None:
        self._journey = journey
        self._platform = getattr(journey.sandbox, journey.platform)
        self._outcome = outcome
        self._logs = folder / "logs"
        self._logs.mkdir()
        self._finished: dict[str, Any] = {}
        self._secrets = set(journey.secrets())

    def run(self) -> None:
        for planned in plan(self._outcome.seed, self._journey.creates):
            self._outcome.faults.update(planned.happenings)
            self._platform.faults.clear()
            self._platform.faults.add(*planned.faults)
            self._disturbed(planned)
            self._check_now()
        self._platform.faults.clear()
        ends: list[tuple[str, str, Any]] = []
        for _ in range(_CALLS_UNTIL_DONE):
            ends = self._processes(Attempt())
            self._check_now()
            if ends[0][0] == "result":
                break
        self._platform.journal.settle(LONGEST_HOLD + 5.0)
        self._check_at_the_end(ends[0])
        self._outcome.faults.update(entry.fault for entry in self._journey.journal if entry.fault)

    def _disturbed(self, planned: Attempt) -> None:
        timers = [
            threading.Timer(seconds, happen)
            for seconds, happen in (
                (planned.keys_expire_after_seconds, self._journey.expire_keys),
                (planned.restart_after_seconds, partial(self._journey.sandbox.restart, self._journey.platform)),
            )
            if seconds is not None
        ]
        for timer in timers:
            timer.start()
        with _read_only(self._journey.folder) if planned.disk == "read-only" else _as_it_is():
            self._processes(planned)
        for timer in timers:
            timer.cancel()
            timer.join()
        self._secrets.update(self._journey.secrets())

    def _processes(self, planned: Attempt) -> list[tuple[str, str, Any]]:
        """Run one process, or two at a time; how each ended."""
        order = {**self._journey.order(), "disk": planned.disk}
        requests = len(self._platform.journal)
        running = []
        for _ in range(2 if planned.twin else 1):
            self._outcome.processes += 1
            log = self._logs / f"{self._outcome.processes}.log"
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            arguments = (self._journey.platform, order, dict(self._finished), log, theirs)
            process = _CONTEXT.Process(target=attempt, args=arguments)
            process.start()
            theirs.close()
            running.append((process, ours))
        self._kill_when_planned(planned, running[0][0], requests)
        return [self._ended(process, wire) for process, wire in running]

    def _kill_when_planned(self, planned: Attempt, process: Any, requests: int) -> None:
        begun = time.monotonic()
        at_request = planned.kill_at_request
        while process.is_alive() and (at_request is not None or planned.kill_after_seconds is not None):
            late = planned.kill_after_seconds is not None and time.monotonic() - begun > planned.kill_after_seconds
            if late or (at_request is not None and len(self._platform.journal) - requests >= at_request):
                process.kill()
                return
            if time.monotonic() - begun > _ATTEMPT_SECONDS:
                return
            time.sleep(0.002)

    def _ended(self, process: Any, wire: Any) -> tuple[str, str, Any]:
        end = ("killed", "", None)
        deadline = time.monotonic() + _ATTEMPT_SECONDS
        try:
            while wire.poll(max(deadline - time.monotonic(), 0.0)):
                said = wire.recv()
                if said[0] == "step":
                    self._finished.setdefault(said[1], said[2])
                else:
                    end = said
            if end[0] == "killed":
                self._violated(f"a process does not end within {_ATTEMPT_SECONDS:.0f} s")
        except EOFError:
            pass
        process.kill()
        process.join()
        wire.close()
        self._outcome.errors[end[1] or end[0]] += 1
        if end[0] == "crash":
            self._violated(f"an error that is none of ours:\n{end[2]}")
        return end

    def _violated(self, what: str) -> None:
        self._outcome.violations.append(what)

    def _check_now(self) -> None:
        for name, count in self._journey.made().items():
            if count > 1:
                self._violated(f"{count} remote objects for the intent {name}")
        for what in self._journey.lost():
            self._violated(what)

    def _check_at_the_end(self, end: tuple[str, str, Any]) -> None:
        if end[0] != "result":
            self._violated(f"not done after {_CALLS_UNTIL_DONE} calls without any fault, the last said: {end}")
            return
        for name, count in self._journey.made().items():
            if count != 1:
                self._violated(f"{count} remote objects for the intent {name} at the end")
        for what in [*self._journey.wrong(end[2]), *_left_over(self._journey.folder), *self._told()]:
            self._violated(what)

    def _told(self) -> Iterator[str]:
        secrets = [secret.encode() for secret in self._secrets]
        for path in [*self._journey.folder.rglob("*"), *self._logs.iterdir()]:
            if path.is_file():
                content = path.read_bytes()
                if any(secret in content for secret in secrets):
                    yield f"a secret is in {path}"


def _left_over(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.suffix in {".part", ".tmp"} or path.name.endswith(".vip"):
            yield f"{path} was left behind"
        if path.suffix == ".lock" or path.name == ".lock":
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                yield f"{path} is held, and no process is left"


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Nobody but root can write to a folder and what is below it meanwhile."""
    modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")] if not path.is_symlink()}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


def _sum(counter: str, kind: str, outcomes: Sequence[Outcome]) -> int:
    return sum(getattr(outcome, counter)[kind] for outcome in outcomes)


def report(outcomes: Sequence[Outcome]) -> str:
    """The table of a run: seeds, processes, faults by kind, violations, time."""
    platforms = list(dict.fromkeys(outcome.platform for outcome in outcomes))
    of = {name: [outcome for outcome in outcomes if outcome.platform == name] for name in platforms}

    def row(title: str, figure: Callable[[list[Outcome]], object]) -> str:
        return f"| {title} | " + " | ".join(f"{figure(of[name])}" for name in platforms) + " |"

    faults = Counter(kind for outcome in outcomes for kind in outcome.faults.elements())
    errors = Counter(kind for outcome in outcomes for kind in outcome.errors.elements())
    return "\n".join(
        [
            "| | " + " | ".join(platforms) + " |",
            "|---|" + "---:|" * len(platforms),
            row("seeds", len),
            row("processes", lambda some: sum(one.processes for one in some)),
            *(
                row(kind, lambda some, kind=kind: sum(one.faults[kind] for one in some))
                for kind, _ in faults.most_common()
            ),
            *(
                row(f"ended: {end}", lambda some, end=end: sum(one.errors[end] for one in some))
                for end, _ in errors.most_common()
            ),
            row("**violations**", lambda some: sum(len(one.violations) for one in some)),
            row("seconds for a seed", lambda some: f"{sum(one.seconds for one in some) / len(some):.1f}"),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those after the program's name; by default those of this process.

    Returns:
        The exit status: 1 when something was violated.
    """
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"{', '.join(JOURNEYS)}; default: all")
    parser.add_argument("--seeds", type=int, default=30, help="how many on each platform; default 30")
    parser.add_argument("--seed", type=int, default=0, help="the first one; default 0")
    parser.add_argument("--keep", type=Path, help="keep the files and logs of each rehearsal in this folder")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="rehearsals at a time")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    outcomes: list[Outcome] = []
    orders = [
        (name, seed)
        for seed in range(options.seed, options.seed + options.seeds)
        for name in options.platforms or JOURNEYS
    ]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(rehearse, name, seed, options.keep and options.keep / f"{name}-{seed}") for name, seed in orders
        ]
        for job in jobs:
            outcome = job.result()
            outcomes.append(outcome)
            for what in outcome.violations:
                print(f"{outcome.platform}, seed {outcome.seed}: {what}")
            if outcome.violations:
                print(
                    f"Again: PYTHONPATH=tests {sys.executable} -m chaos {outcome.platform} --seeds 1 --seed "
                    f"{outcome.seed} --keep chaos-{outcome.platform}-{outcome.seed}\n",
                    flush=True,
                )
    print(report(outcomes))
    print(f"{time.monotonic() - begun:.0f} s in all")
    return 1 if any(outcome.violations for outcome in outcomes) else 0
