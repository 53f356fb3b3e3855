"""A session is killed before and after every request, and taken up again in every way: the matrix.

`make chaos-kills` prints it, for VIP, for VIP with inputs and outputs on Girder, and for CARMIN-server, as its authors
mean it and as it was published. The process of the session is ended as SIGKILL ends it, at each request that it makes
and at each file that it puts in place. Whoever takes it up then must come to the same files with one execution for each
repetition, and must leave nothing on the platform; and once more, to the same list of files.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import girder_client
import requests
import requests.adapters

from prefect_biomed.clients.errors import BiomedError, LedgerError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    GirderStorage,
    SessionFile,
    VipClient,
    VipSession,
    complete_inputs,
    download,
    finish,
    judge,
    launch,
    monitor,
    open_intents,
    preflight,
    share_girder_key,
    upload,
)
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vip import Status

Backup = Literal["local", "vip", "nowhere"]
Profile = Literal["vip", "girder", "carmin", "carmin as published"]
WAYS = ("retry", "resume here", "resume elsewhere")
RUNS = 2
_FILES = {"a.bin": b"first", "sub/b.bin": bytes(range(256))}
_GIRDER = "/collection/Sandbox"
_BOTH = (False, True)
_KILLED = 137
_SETTLE_SECONDS = 0.6
_QUICK = PollSettings(interval_seconds=0.05, deadline_seconds=30.0)
_CASES_PER_SANDBOX = 60
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["chaos.kills"])


@dataclass(frozen=True)
class Kind:
    """Where a session is at home.

    Attributes:
        profile: The platform; `girder` is VIP, with inputs and outputs on Girder.
        backup: Where the session file is kept.
    """

    profile: Profile
    backup: Backup

    @property
    def is_carmin(self) -> bool:
        """Whether the platform is a CARMIN-server."""
        return self.profile.startswith("carmin")

    @property
    def contents(self) -> list[bytes]:
        """What the outputs of one run hold."""
        # Only VIP makes parallel jobs of a list.
        return [_FILES["sub/b.bin"]] if self.is_carmin else sorted(_FILES.values())

    def home(self, name: str) -> str:
        """Name the folder of a session on the platform."""
        return f"/alice/{name}" if self.is_carmin else f"/vip/Home/API/{name}"

    @property
    def switches(self) -> dict[str, Any]:
        """Those of the sandbox."""
        if self.is_carmin:
            return {"profile": "carmin", "carmin_stock": self.profile == "carmin as published"}
        return {"delete_seconds": 0}


ON_VIP = tuple(Kind("vip", backup) for backup in ("local", "vip", "nowhere"))
KINDS = (
    *ON_VIP,
    *(Kind("girder", backup) for backup in ("local", "nowhere")),
    *(Kind("carmin", backup) for backup in ("local", "vip", "nowhere")),
    *(Kind("carmin as published", backup) for backup in ("local", "nowhere")),
)


@dataclass(frozen=True)
class Kill:
    """When a process ends.

    Attributes:
        moment: Which of its requests and renamed files, from 1.
        after: Whether that is carried out before.
    """

    moment: int
    after: bool


# -- the process of a user -------------------------------------------------------------------------------------------


class _Clock:
    """Counts the moments of this process and ends it at one of them."""

    def __init__(self, kill: Kill | None, end: Callable[[], None]) -> None:
        self.passed: list[str] = []
        self._kill = kill
        self._end = end

    def at(self, what: str, do: Callable[[], Any]) -> Any:
        self.passed.append(what)
        reached = self._kill is not None and len(self.passed) == self._kill.moment
        if reached and self._kill is not None and not self._kill.after:
            self._end()
        done = do()
        if reached:
            if isinstance(done, requests.Response):
                done.close()
            self._end()
        return done


def _kill() -> None:
    # As SIGKILL does it: nothing is put in order.
    os._exit(_KILLED)


def wind(
    kill: Kill | None, end: Callable[[], None] = _kill, patch: Callable[[Any, str, Any], None] = setattr
) -> list[str]:
    """Count the requests and renamed files of this process, and end it at one of them.

    Args:
        kill: When; never when None.
        end: Ends it.
        patch: Replaces an attribute.

    Returns:
        What has passed, which grows.
    """
    clock = _Clock(kill, end)
    send, replace = requests.adapters.HTTPAdapter.send, os.replace

    def send_at(adapter: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        return clock.at(
            f"{request.method} {request.path_url.partition('?')[0]}", lambda: send(adapter, request, *args, **kwargs)
        )

    def replace_at(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if "prefect-biomed-sandbox-" in str(target):
            # A platform in this process goes on when its user is killed.
            return replace(source, target, *args, **kwargs)
        return clock.at(f"file {Path(target).name}", lambda: replace(source, target, *args, **kwargs))

    patch(requests.adapters.HTTPAdapter, "send", send_at)
    patch(os, "replace", replace_at)
    return clock.passed


def session_of(name: str, folder: Path, kind: Kind) -> VipSession:
    """Describe the session that is killed.

    Args:
        name: Its name.
        folder: Folder of its files.
        kind: Where it is at home.

    Returns:
        The session.
    """
    values: dict[Profile, list[str] | str] = {
        "vip": ["a.bin", "sub/b.bin"],
        "girder": ["a.bin", f"girder:{_GIRDER}/Inputs/b.bin"],
    }
    return VipSession(
        session_name=name,
        pipeline_id="boutiques_CopyFile_1.0.json" if kind.is_carmin else "CopyFile/1.0",
        input_settings={"file": values.get(kind.profile, "sub/b.bin")},
        input_dir=folder / "in",
        output_dir=folder / "out",
        vip_input_dir=f"{kind.home(name)}/INPUTS",
        vip_output_dir=f"{kind.home(name)}/OUTPUTS",
        nb_runs=RUNS,
        token="t0k3n",
        backup=None if kind.backup == "nowhere" else kind.backup,
        girder_output_dir=f"{_GIRDER}/Results/{name}" if kind.profile == "girder" else None,
        girder_download=kind.profile == "girder",
    )


def write_inputs(folder: Path) -> None:
    """Write the inputs of the session.

    Args:
        folder: Folder of its files.
    """
    for path, content in _FILES.items():
        (folder / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / path).write_bytes(content)


Step = Callable[[str, Callable[[], Any]], Any]


def work(client: VipClient, session: VipSession, step: Step) -> list[str]:
    """Do what `vip_session` does.

    Args:
        client: The account.
        session: The session.
        step: Does a step once and remembers it, as Prefect does.

    Returns:
        The local files.
    """
    step("upload", lambda: upload(client, session, preflight(client, session)) and None)
    ids = [step(f"launch {run}", lambda run=run: _launched(client, session, run)) for run in range(1, RUNS + 1)]
    return _collected(client, session, ids)


def take_up_again(client: VipClient, name: str, output_dir: Path, kind: Kind) -> list[str]:
    """Do what `vip_resume` does.

    Args:
        client: The account.
        name: Name of the session.
        output_dir: Folder of its outputs.
        kind: Where it is at home.

    Returns:
        The local files.
    """
    home = str(PurePosixPath(kind.home(name)).parent)
    *_, session = open_intents(output_dir, session_name=name, client=client, vip_home=home)
    complete_inputs(client, session)
    for run in SessionFile(session, client).read().repetitions_to_launch(session, is_newest=True):
        _launched(client, session, run)
    record = SessionFile(session, client).read()
    return _collected(client, session, record.open_runs(session.token) or record.workflows_of(session.token))


def _launched(client: VipClient, session: VipSession, run: int) -> str:
    return launch(client, session, run, capacity=_QUICK).identifier


def _collected(client: VipClient, session: VipSession, ids: list[str]) -> list[str]:
    *_, workflows = monitor(client, session, _QUICK, workflow_ids=ids)
    files = download(client, session, workflow_ids=ids).files
    if problems := [one.problems for one in judge(client, session, workflows, fetched=True) if one.problems]:
        raise AssertionError(problems)
    finish(client, session)
    return sorted(path.relative_to(session.output_dir).as_posix() for paths in files.values() for path in paths)


@contextmanager
def connected(facts: dict[str, Any]) -> Iterator[VipClient]:
    """Connect to a platform, and to the Girder beside it.

    Args:
        facts: What the sandbox tells of the platform.

    Yields:
        The account.
    """
    girder = facts.get("girder")
    storage = GirderStorage(girder["api_url"], girder["api_key"], storage_id=girder["storage_id"]) if girder else None
    with VipClient(
        facts["url"], facts["api_key"], girder=storage, parallelism=1, settle_seconds=_SETTLE_SECONDS
    ) as client:
        yield client


def _process(order: dict[str, Any], finished: dict[str, Any], wire: Any) -> None:
    passed = wind(order["kill"])

    def step(name: str, do: Callable[[], Any]) -> Any:
        if name not in finished:
            finished[name] = do()
            wire.send(("step", name, finished[name]))
        return finished[name]

    try:
        with connected(order["facts"]) as client:
            if order["resume"]:
                files = take_up_again(client, order["name"], order["folder"] / "out", order["kind"])
            else:
                files = work(client, session_of(order["name"], order["folder"], order["kind"]), step)
        wire.send(("files", files, passed))
    except BiomedError as error:
        wire.send(("error", type(error).__name__, str(error)))
    except BaseException:
        wire.send(("crash", traceback.format_exc(), ""))


# -- the matrix ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What came of one way to take up sessions of one kind, killed at every moment.

    Attributes:
        kind: Where they are at home.
        way: How they are taken up.
        moments: Number of moments of the session that are not the last one.
        ends: How many sessions came to which end.
        wrong: What must not be, in words.
        seconds: How long all of them took.
    """

    kind: Kind
    way: str
    moments: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Case:
    """One session that is killed once."""

    def __init__(self, sandbox: Sandbox, name: str, kind: Kind, folder: Path) -> None:
        self._sandbox = sandbox
        self._facts = sandbox.ready()["vip"]
        self._name = name
        self._kind = kind
        self._folder = folder
        self._plays_before = len(self._plays())
        self._finished: dict[str, Any] = {}
        write_inputs(folder)

    def run(self, *, kill: Kill | None = None, resume: bool = False) -> tuple[str, Any, Any]:
        """Run a process of a user to its end, which is `files`, `error`, `crash` or `killed`."""
        order = {
            "facts": self._facts,
            "name": self._name,
            "folder": self._folder,
            "kind": self._kind,
            "kill": kill,
            "resume": resume,
        }
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_process, args=(order, dict(self._finished), theirs))
        process.start()
        theirs.close()
        end: tuple[str, Any, Any] = ("killed", "", "")
        try:
            while ours.poll(120.0):
                said = ours.recv()
                if said[0] == "step":
                    self._finished[said[1]] = said[2]
                else:
                    end = said
        except EOFError:
            pass
        process.kill()
        process.join()
        ours.close()
        return end

    def move(self) -> None:
        """Take the folder of the outputs to another place, as to another machine."""
        elsewhere = self._folder.with_name(self._folder.name + "-elsewhere")
        if (self._folder / "out").exists():
            shutil.move(self._folder / "out", elsewhere / "out")
        self._folder = elsewhere

    @property
    def record_exists(self) -> bool:
        out = self._folder / "out"
        return (out / "session_data.json").exists() or (out / ".locks" / "session_data.json").exists()

    def wrong(self, end: tuple[str, Any, Any]) -> Iterator[str]:
        """Tell what is not as it must be once somebody has come to an end."""
        if end[0] != "files":
            yield f"ended with {end[0]} {end[1]}: {end[2]}"
            return
        by_run: dict[str, list[bytes]] = {}
        for name in end[1]:
            by_run.setdefault(PurePosixPath(name).parts[0], []).append((self._folder / "out" / name).read_bytes())
        if [sorted(contents) for contents in by_run.values()] != [self._kind.contents] * RUNS:
            yield f"listed {end[1]}, which hold {by_run}"
        yield from self._executions()
        yield from self.left()

    def _executions(self) -> Iterator[str]:
        if self._kind.is_carmin:
            # Records of executions go with their outputs; one that was never played has done nothing.
            if (played := len(self._plays()) - self._plays_before) != RUNS:
                yield f"{played} executions were played"
            return
        names = Counter(one.name for one in self._sandbox.vip.engine.of(self._sandbox.vip.users.main))
        own = {name: count for name, count in names.items() if name.startswith(f"{self._name}-r")}
        if own != {f"{self._name}-r{run:03d}-t0k3n": 1 for run in range(1, RUNS + 1)}:
            yield f"executions: {own}"

    def _plays(self) -> list[Any]:
        return [entry for entry in self._sandbox.vip.journal.entries("PUT", "/play$") if entry.effect]

    def left(self) -> Iterator[str]:
        """Tell what of the session is still on the platform."""
        with VipClient(self._facts["url"], self._facts["api_key"]) as client:
            if client.exists(self._kind.home(self._name)):
                yield "something is left on the platform"
        if self._kind.is_carmin:
            records = self._sandbox.vip.carmin.of(self._sandbox.vip.users.main)
            left = Counter(one.status for one in records if one.name.startswith(f"{self._name}-r"))
            if self._kind.profile == "carmin as published":
                # Nobody can list its records, so one of which the answer was lost is never found.
                left.pop(Status.INITIALIZING, None)
            if left:
                yield f"records of executions are left on the platform: {dict(left)}"


@contextmanager
def platform(kind: Kind) -> Iterator[Sandbox]:
    """Start the platform of a kind.

    Args:
        kind: Where sessions are at home.

    Yields:
        The sandbox, with an input on Girder where the sessions ask for one.
    """
    with Sandbox("vip", vip=kind.switches) as sandbox:
        if kind.profile == "girder":
            facts = sandbox.ready()["vip"]
            with connected(facts) as client:
                share_girder_key(client)
            girder = girder_client.GirderClient(apiUrl=facts["girder"]["api_url"])
            girder.authenticate(apiKey=facts["girder"]["api_key"])
            content = _FILES["sub/b.bin"]
            girder.uploadStreamToFolder(
                girder.resourceLookup(f"{_GIRDER}/Inputs")["_id"], io.BytesIO(content), "b.bin", len(content)
            )
        yield sandbox


def moments(kind: Kind, folder: Path) -> list[str]:
    """Count the moments of a session that nobody kills.

    Args:
        kind: Where it is at home.
        folder: For its files.

    Returns:
        Its requests and files, in order.
    """
    with platform(kind) as sandbox:
        case = _Case(sandbox, "whole", kind, folder / "whole")
        end = case.run()
        if wrong := list(case.wrong(end)):
            raise AssertionError(wrong)
        return list(end[2])


def take_up(kind: Kind, way: str, kills: Sequence[Kill]) -> Row:
    """Kill sessions of one kind and take each up again in one way.

    Args:
        kind: Where they are at home.
        way: One of `WAYS`.
        kills: When each is killed.

    Returns:
        What came of them.
    """
    row, begun = Row(kind, way), time.monotonic()
    for first in range(0, len(kills), _CASES_PER_SANDBOX):
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        try:
            with platform(kind) as sandbox:
                for number, kill in enumerate(kills[first : first + _CASES_PER_SANDBOX]):
                    name = f"k{number}"
                    _take_up_one(row, _Case(sandbox, name, kind, folder / name), way, kill)
        finally:
            shutil.rmtree(folder)
    row.seconds = time.monotonic() - begun
    return row


def _take_up_one(row: Row, case: _Case, way: str, kill: Kill) -> None:
    where = f"{'after' if kill.after else 'before'} moment {kill.moment}"
    end = case.run(kill=kill)
    if end[0] != "killed":
        row.ends["not reached"] += 1
        row.wrong += [f"{where}, which it did not reach: {what}" for what in case.wrong(end)]
        return
    if way == "resume elsewhere":
        case.move()
    had_record = case.record_exists
    end = case.run(resume=way != "retry")
    if not had_record and end[:2] == ("error", LedgerError.__name__):
        # It had not come to write down what it was to do, and nothing was begun.
        row.ends["nothing was begun"] += 1
        row.wrong += [f"{where}: {what}" for what in case.left()]
        return
    found = list(case.wrong(end))
    if not found:
        again = case.run(resume=way != "retry")
        found = [f"once more: {what}" for what in case.wrong(again)]
        if not found and again[1] != end[1]:
            found = [f"once more: listed {again[1]} instead of {end[1]}"]
    row.ends["wrong" if found else "same files"] += 1
    row.wrong += [f"{where}: {what}" for what in found]


def matrix(every: int = 1, processes: int = 2, kinds: Sequence[Kind] = KINDS) -> list[Row]:
    """Make the matrix.

    Args:
        every: Take only each so many-th moment.
        processes: Rows at a time.
        kinds: Where the sessions are at home.

    Returns:
        A row for each kind and each way to take a session up.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            places = [Path(folder, str(number)) for number in range(len(kinds))]
            counted = dict(zip(kinds, map(len, pool.map(moments, kinds, places)), strict=True))
        jobs = []
        for kind in kinds:
            for offset, way in enumerate(WAYS):
                # Each way begins elsewhere, so that together they come by more moments.
                first = 1 + offset * every // len(WAYS)
                kills = [Kill(moment, after) for moment in range(first, counted[kind] + 1, every) for after in _BOTH]
                jobs.append((kind, pool.submit(take_up, kind, way, kills)))
        rows = []
        for kind, job in jobs:
            row = job.result()
            row.moments = counted[kind]
            rows.append(row)
    return rows


def report(rows: list[Row]) -> str:
    """The matrix as a table of Markdown.

    Args:
        rows: Its rows.

    Returns:
        The table, and below it what is wrong.
    """
    ends = ["same files", "nothing was begun", "not reached", "wrong"]
    lines = [
        "| platform | backup_location | taken up by | moments | kills | " + " | ".join(ends) + " | seconds |",
        "|---|---|---|" + "---:|" * (3 + len(ends)),
    ]
    lines += [
        f"| {row.kind.profile} | {row.kind.backup} | {row.way} | {row.moments} | {sum(row.ends.values())} | "
        + " | ".join(str(row.ends[end]) for end in ends)
        + f" | {row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join(
        [*lines, *(f"{row.kind.profile}, {row.kind.backup}, {row.way}: {what}" for row in rows for what in row.wrong)]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those after the program's name; by default those of this process.

    Returns:
        The exit status: 1 when something is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m chaos kills", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take only each so many-th moment; default 1")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="rows at a time")
    profiles = list(dict.fromkeys(kind.profile for kind in KINDS))
    parser.add_argument("--only", choices=profiles, help="only on this platform")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in KINDS if options.only in {None, kind.profile}]
    rows = matrix(options.every, options.processes, kinds)
    print(report(rows))
    return 1 if any(row.wrong for row in rows) else 0
