"""A world in which launches are tried: machines, processes, a platform and a clock, all of them stepped by hand.

A process is a greenlet that runs one engine's launch of one intent. It stops at every boundary, where it can go on, be
killed, or be left waiting while others go on. Time is virtual: it moves when somebody sleeps or the test lets it pass,
and with it the requests that are still on their way take effect. Nothing here is random, so a schedule repeats exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from greenlet import getcurrent, greenlet

from prefect_biomed.clients import polling
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    ConnectionFailed,
    HeldElsewhere,
    LaunchInDoubt,
    LocalStorageError,
    NetworkError,
    NotFoundError,
    PlatformError,
    RequestTimedOut,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.once import Circumstances, Intent, Launch, once
from prefect_biomed.clients.vip.errors import GenericVipError

# A request that was sent takes effect within this time or never, whatever its client does.
LONGEST_FLIGHT = 16.0
# A process that runs is never kept from going on for longer than this; it is part of each platform's constant.
LONGEST_STALL = 0.5
# Between the moment that is written down and the request, a process may be left waiting at three boundaries.
SETTLE = LONGEST_FLIGHT + 4 * LONGEST_STALL
READ_TIMEOUT = 5.0
LONGEST_LAG = 4.0
LEASE_SECONDS = 6.0

# Where a process can be stopped, killed or overtaken, in the order of a launch.
BOUNDARIES = (
    "before the lease",
    "after the lease",
    "before the lock",
    "after the lock",
    "before the first record",
    "after the first record",
    "before the look",
    "after the look",
    "sleep",
    "before the preparation",
    "before the record",
    "after the record",
    "before the request",
    "request on its way",
    "before the answer",
    "before reading the object",
    "before giving the lease back",
)


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class Killed(BaseException):
    """SIGKILL: nothing that is on the way out has an effect in the world."""


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fate:
    """What becomes of one request to launch.

    Attributes:
        effect: Seconds until it takes effect; None when it never does.
        error: What its client gets; None for the object.
        answer: Seconds until the client gets that.
    """

    effect: float | None = 0.0
    error: BiomedError | None = None
    answer: float = 0.0


def spoken(status: int, kind: type[PlatformError] = PlatformError, code: int | None = None) -> PlatformError:
    return kind("the platform says", status=status, code=code, spoken=True)


LOST: tuple[BiomedError, ...] = (
    NetworkError("connection lost"),
    RequestTimedOut("no answer in time"),
    ServerUnavailable("page of a proxy", status=502),
    UnexpectedResponse("page of a server that breaks down", status=500),
    UnexpectedResponse("page", status=200),
    UnexpectedResponse("nothing", status=201),
    UnexpectedResponse("page of a firewall", status=403),
    AuthenticationError("page of a proxy", status=401),
    spoken(500),
    spoken(503, ServerUnavailable),
)
NO: tuple[BiomedError, ...] = (
    spoken(400),
    spoken(401, AuthenticationError),
    spoken(429, ServerUnavailable),
    spoken(400, CapacityError),
    ConnectionFailed("nobody listens"),
)
BLIND: tuple[BiomedError, ...] = (
    NetworkError("connection lost"),
    ServerUnavailable("down", status=503),
    UnexpectedResponse("page", status=200),
    AuthenticationError("the key has expired", status=401),
)


@dataclass(frozen=True)
class PlatformKind:
    """How one platform tells its objects apart and says no.

    Attributes:
        name: Its name.
        named: Whether objects carry the name of their intent. Without names, an object counts as that of an intent
            when it was not there before the intent and no other intent of the folder has it.
        doubtful: Errors in its own shape with a status of 4xx that nevertheless may leave something behind.
        says_no: As for `Launch`.
    """

    name: str
    named: bool = True
    doubtful: tuple[BiomedError, ...] = ()
    says_no: Callable[[PlatformError], bool] = lambda _: True

    @property
    def lost(self) -> tuple[BiomedError, ...]:
        return LOST + self.doubtful


PLATFORMS = {
    "vip": PlatformKind(
        "vip", doubtful=(spoken(400, GenericVipError, 8000),), says_no=lambda error: error.code != 8000
    ),
    "vantage6": PlatformKind("vantage6"),
    "boss": PlatformKind(
        "boss",
        named=False,
        doubtful=(spoken(400, code=9001),),
        says_no=lambda error: error.code is None or error.code < 9000,
    ),
}


# -- the world ---------------------------------------------------------------------------------------------------------


@dataclass
class RemoteObject:
    """What a request has made: its number, the intent whose request it was, and from when lists show it."""

    number: int
    token: str
    made_at: float
    visible_from: float
    ended: bool = False


@dataclass
class Machine:
    """A host: the records on its disk, its locks, and its clock, which may be wrong."""

    name: str
    boot: str = "first boot"
    clock_offset: float = 0.0
    full_disk: int = 0
    records: dict[str, str] = field(default_factory=dict)
    locks: dict[str, Process] = field(default_factory=dict)


@dataclass
class Lease:
    """What machines share about one intent: who holds it until when, and since when it is begun and not ended well."""

    holder: Process | None = None
    until: float = float("inf")
    open_since: datetime | None = None
    quiet_until: float = 0.0


class Process:
    """One process on a machine that runs one engine's launch for an intent, stopped at a boundary."""

    def __init__(self, world: World, machine: Machine, token: str, work: Callable[[Process], str]) -> None:
        self.world = world
        self.machine = machine
        self.token = token
        self.ready_at = world.now
        self.at = "begin"
        # What Prefect knows: when the first attempt was begun, wherever that was.
        self.attempted_since = world.begun.get(token) if world.prefect else None
        world.begun.setdefault(token, world.now)
        self.outcome: str | BaseException | None = None
        self._greenlet = greenlet(lambda: work(self))

    @property
    def alive(self) -> bool:
        return self.outcome is None

    def step(self) -> None:
        """Go on to the next boundary; time passes first when the process sleeps."""
        self.world.pass_until(self.ready_at)
        if self.alive:
            self.go_on()

    def go_on(self) -> None:
        """Go on to the next boundary, now."""
        with self.world.running(self):
            try:
                result = self._greenlet.switch()
            except BiomedError as error:
                self.outcome = error
            else:
                if self._greenlet.dead:
                    self.outcome = result

    def kill(self) -> None:
        """End at this boundary, without any of the clearing up."""
        if not self.alive:
            return
        self.outcome = Killed()
        with self.world.running(self), suppress(Killed):
            self._greenlet.throw(Killed)
        for lease in self.world.leases.values():
            if lease.holder is self:
                lease.until = self.world.now + LEASE_SECONDS


class World:
    """One platform, machines with one engine, and everything that is still on its way between them."""

    def __init__(self, kind: PlatformKind, engine: Engine, *, prefect: bool = True) -> None:
        self.kind = kind
        self.engine = engine
        self.prefect = prefect
        self.now = 1_700_000_000.0
        self.objects: list[RemoteObject] = []
        self.sent = 0
        self.fates: list[Fate] = []
        self.blind: list[BiomedError] = []
        self.lag = 0.0
        self.machines: dict[str, Machine] = {}
        self.leases: dict[str, Lease] = {}
        self.processes: dict[tuple[str, str, int], Process] = {}
        self.begun: dict[str, float] = {}
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._current: Process | None = None

    # -- what a schedule does ------------------------------------------------------------------------------------------

    def machine(self, name: str) -> Machine:
        return self.machines.setdefault(name, Machine(name))

    def step(self, machine: str, token: str, number: int = 0) -> Process:
        """Let a process go on to its next boundary; one that has ended is started again."""
        key = (machine, token, number)
        process = self.processes.get(key)
        if process is None or not process.alive:
            process = self.processes[key] = Process(self, self.machine(machine), token, self.engine)
        process.step()
        return process

    def kill(self, machine: str, token: str, number: int = 0) -> None:
        """End a process where it stands."""
        process = self.processes.get((machine, token, number))
        if process is not None:
            process.kill()

    def boot(self, machine: str) -> None:
        """A machine is switched off and on: its processes are dead, its disk is as it was."""
        for process in self.processes.values():
            if process.machine is self.machines.get(machine):
                process.kill()
        self.machine(machine).boot += "+"

    def replace(self, machine: str) -> None:
        """A new container takes the place of a machine: its processes are dead, its disk is empty."""
        self.boot(machine)
        self.machines[machine] = Machine(f"{machine}'", clock_offset=self.machine(machine).clock_offset)

    def set_clock(self, machine: str, seconds: float) -> None:
        """The clock of a machine is set: it is so much fast."""
        self.machine(machine).clock_offset = seconds

    def heal(self) -> None:
        """Nothing goes wrong from now on. What is on its way stays so."""
        self.fates, self.blind, self.lag = [], [], 0.0
        for machine in self.machines.values():
            machine.full_disk = 0

    def close(self) -> None:
        """End all processes."""
        for process in self.processes.values():
            process.kill()

    def pass_until(self, moment: float) -> None:
        """Let time pass; requests take effect, and no process is kept waiting for longer than a stall."""
        while True:
            stalled = [
                (process.ready_at + LONGEST_STALL, number, process)
                for number, process in enumerate(self.processes.values())
                if process.alive
            ]
            happening = min(self._due, key=lambda due: due[:2], default=None)
            urgent = min(stalled, key=lambda due: due[:2], default=None)
            if happening and happening[0] <= moment and (not urgent or happening[0] <= urgent[0]):
                self._due.remove(happening)
                self.now = max(self.now, happening[0])
                happening[2]()
            elif urgent and urgent[0] <= moment:
                self.now = max(self.now, urgent[0])
                urgent[2].go_on()
            else:
                self.now = max(self.now, moment)
                return

    # -- what processes do ---------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, process: Process) -> Iterator[None]:
        before, self._current = self._current, process
        real = polling.time, polling.random, polling._boot
        polling.time, polling.random, polling._boot = _Clock(self), _NoChance, lambda: process.machine.boot
        try:
            yield
        finally:
            self._current = before
            polling.time, polling.random, polling._boot = real

    @property
    def current(self) -> Process:
        assert self._current is not None
        return self._current

    def boundary(self, name: str, seconds: float = 0.0) -> None:
        """Stop here, for at least so long; a process that is killed does not come back."""
        process = self.current
        process.at, process.ready_at = name, self.now + seconds
        getcurrent().parent.switch()

    def later(self, seconds: float, happen: Callable[[], object]) -> None:
        self._due.append((self.now + seconds, len(self._due), happen))

    def make(self, token: str) -> RemoteObject:
        made = RemoteObject(len(self.objects) + 1, token, self.now, self.now + self.lag)
        self.objects.append(made)
        return made

    def visible(self) -> list[RemoteObject]:
        return [one for one in self.objects if one.visible_from <= self.now and not one.ended]

    def of(self, token: str) -> list[RemoteObject]:
        return [one for one in self.objects if one.token == token]


class _Clock:
    """Takes the place of the module `time`: the clock of the machine whose process runs."""

    def __init__(self, world: World) -> None:
        self._world = world

    def time(self) -> float:
        return self._world.now + self._world.current.machine.clock_offset

    def monotonic(self) -> float:
        # Time never stands still between two looks at the clock; a wait ends although sums of floats are not exact.
        self._world.now += 1e-6
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.boundary("sleep", seconds)


class _NoChance:
    """Takes the place of the module `random`."""

    @staticmethod
    def uniform(low: float, high: float) -> float:
        return (low + high) / 2


# -- what a process reaches of the world -------------------------------------------------------------------------------


class Records:
    """The records of a machine: what is written is there whole or not at all."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._machine = process.machine

    @contextmanager
    def exclusive(self, token: str, seconds: float) -> Iterator[None]:
        """A lock of the operating system; it ends with its process."""
        name = token if self._world.kind.named else "the folder"
        self._world.boundary("before the lock")
        end = self._world.now + seconds
        while (holder := self._machine.locks.get(name)) is not None and holder.alive:
            if self._world.now >= end:
                raise HeldElsewhere("another process")
            self._world.boundary("waiting for the lock", 1.0)
        self._machine.locks[name] = self._process
        self._world.boundary("after the lock")
        try:
            yield
        finally:
            if self._process.alive:
                del self._machine.locks[name]

    def read(self, token: str) -> Intent | None:
        text = self._machine.records.get(token)
        return Intent.model_validate_json(text) if text else None

    def write(self, intent: Intent) -> None:
        first = "" if intent.token in self._machine.records else "first "
        self._world.boundary(f"before the {first}record")
        if self._machine.full_disk:
            self._machine.full_disk -= 1
            raise LocalStorageError("no space left on device")
        self._machine.records[intent.token] = intent.model_dump_json()
        self._world.boundary(f"after the {first}record")

    def claimed(self, token: str) -> set[str]:
        """Objects of the other intents on this machine."""
        return {intent.id for intent in self.all() if intent.token != token and intent.id is not None}

    def all(self) -> list[Intent]:
        """All intents of this machine."""
        return [Intent.model_validate_json(text) for text in self._machine.records.values()]


class Remote:
    """The platform as one process reaches it."""

    def __init__(self, process: Process) -> None:
        self._world = process.world
        self._token = process.token
        self._attempted_since = process.attempted_since
        self._records = Records(process)

    def find(self, intent: Intent) -> Sequence[RemoteObject]:
        self._world.boundary("before the look")
        self._fail_when_blind()
        seen = self._world.visible()
        self._world.boundary("after the look")
        if self._world.kind.named:
            return [one for one in seen if one.token == self._token]
        if intent.intended_at is None and intent.since is None:
            return []
        claimed = self._records.claimed(self._token)
        found = [one for one in seen if str(one.number) not in claimed and _may_have_made(intent, one)]
        if len(found) > 1 or any(_may_have_made(rival, one) for rival in self._rivals() for one in found):
            raise LaunchInDoubt("Several could be meant. Cancel those that are not wanted, or give job_id.")
        return found

    def _rivals(self) -> list[Intent]:
        """Other intents of which nobody knows how they ended."""
        others = [intent for intent in self._records.all() if intent.token != self._token]
        return [intent for intent in others if intent.is_in_doubt and "known" in intent.asked]

    def prepare(self, intent: Intent) -> Mapping[str, Any]:
        if self._world.kind.named:
            return {}
        self._world.boundary("before the preparation")
        self._fail_when_blind()
        if "known" in intent.asked and intent.is_in_doubt:
            return intent.asked
        return {"known": [one.number for one in self._world.visible()]}

    def send(self) -> RemoteObject:
        world, token = self._world, self._token
        world.boundary("before the request")
        fate = world.fates.pop(0) if world.fates else Fate()
        world.sent += 1
        made: list[RemoteObject] = []
        if fate.effect is not None:
            world.later(fate.effect, lambda: made.append(world.make(token)))
        answered = fate.answer if fate.error is not None else max(fate.answer, fate.effect or 0.0)
        world.boundary("request on its way", answered)
        world.boundary("before the answer")
        if fate.error is not None:
            raise copy(fate.error)
        return made[0]

    def get(self, identifier: str) -> RemoteObject:
        self._world.boundary("before reading the object")
        self._fail_when_blind()
        for one in self._world.visible():
            if str(one.number) == identifier:
                return one
        raise NotFoundError(f"no {identifier}", status=404, spoken=True)

    def end(self, one: RemoteObject) -> None:
        one.ended = True

    def _fail_when_blind(self) -> None:
        if self._world.blind:
            raise copy(self._world.blind.pop(0))


def _may_have_made(intent: Intent, one: RemoteObject) -> bool:
    """Whether an object without a name may come from a request of an intent."""
    known = intent.asked.get("known", [])
    return one.number not in known and (intent.since is None or moment(one.made_at) >= intent.since)


@contextmanager
def leased(process: Process, token: str) -> Iterator[datetime | None]:
    """A lease that a server keeps: renewed while its holder lives, free some time after it has died."""
    world = process.world
    world.boundary("before the lease")
    lease = world.leases.setdefault(token, Lease())
    if lease.holder is not None and (lease.holder.alive or world.now < lease.until):
        raise HeldElsewhere("another machine")
    open_since = lease.open_since
    lease.holder, lease.until, lease.open_since = process, float("inf"), open_since or moment(world.now)
    # Nobody else takes over what has just ended well: a flow run does not change machines within seconds.
    world.boundary("after the lease", max(lease.quiet_until - world.now, 0.0))
    try:
        yield open_since
    except Exception:
        lease.holder = None
        raise
    world.boundary("before giving the lease back")
    lease.holder, lease.open_since, lease.quiet_until = None, None, world.now + LONGEST_LAG


# -- engines -----------------------------------------------------------------------------------------------------------

Engine = Callable[[Process], str]


def ours(process: Process, store: type[Records] = Records, **changes: Any) -> str:
    """`clients.once`, with what Prefect knows when the world has a Prefect.

    Args:
        process: Where it runs.
        store: Keeps the records; another one weakens the protocol.
        **changes: To the launch, which weaken the protocol.
    """
    world, token, remote = process.world, process.token, Remote(process)
    known = Circumstances()
    if world.prefect:
        known = Circumstances(
            attempted_since=process.attempted_since and moment(process.attempted_since),
            lease=lambda token: leased(process, token),
        )
    launch = Launch(
        what=f"object of {token}",
        token=token,
        settle_seconds=SETTLE,
        find=remote.find,
        prepare=remote.prepare,
        send=remote.send,
        get=remote.get,
        identify=lambda one: str(one.number),
        end=remote.end if world.kind.named else None,
        says_no=world.kind.says_no,
    )
    return str(once(replace(launch, **changes), store(process), known).number)


def submit_then_store(process: Process) -> str:
    """What most engines do: submit, store the identifier, and on a retry submit again when none is stored."""
    return _without_a_window(process, look=False)


def look_then_submit(process: Process) -> str:
    """The better ones: look once for what an earlier attempt has made, and submit when nothing is there."""
    return _without_a_window(process, look=True)


def _without_a_window(process: Process, *, look: bool) -> str:
    """With the same lock and the same lease as ours."""
    token, records, remote = process.token, Records(process), Remote(process)
    lease = leased(process, token) if process.world.prefect else nullcontext()
    with lease, records.exclusive(token, SETTLE):
        since = process.attempted_since and moment(process.attempted_since)
        intent = records.read(token) or Intent(token=token, since=since or None)
        if intent.id is not None:
            return str(remote.get(intent.id).number)
        found = remote.find(intent) if look else []
        if not found:
            intent = intent.from_now(remote.prepare(intent))
            if look:
                records.write(intent)
            found = [remote.send()]
        records.write(intent.model_copy(update={"id": str(found[0].number)}))
        return str(found[0].number)


ENGINES: dict[str, Engine] = {
    "once": ours,
    "look, then submit": look_then_submit,
    "submit, then store": submit_then_store,
}
