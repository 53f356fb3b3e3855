"""What the sandboxes of all platforms share: server, journal, fault plan, switches, ready line."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import unquote_plus

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from prefect_biomed.sandbox.vip import VipSandbox

# Looked up by name when asked for, so that one platform needs nothing of what another needs.
_PLATFORMS = {
    "vip": ("prefect_biomed.sandbox.vip", "VipSandbox"),
    "vantage6": ("prefect_biomed.sandbox.vantage6", "Vantage6Sandbox"),
    "boss": ("prefect_biomed.sandbox.boss", "BossSandbox"),
}
_CONTROL = "/_sandbox"
_SECRET = re.compile(r"(?i)((?:^|&)[^=&]*(?:key|token|password|signature|secret|credential)[^=&]*=)[^&]*")
_STARTED_WITHIN_SECONDS = 30.0


class Switches(BaseModel):
    """What can be changed about a running platform; each platform adds its own.

    Attributes:
        latency_ms: added to each request of the platform, in milliseconds.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    latency_ms: float = Field(default=0.0, ge=0.0)


class Entry(BaseModel):
    """One request in the journal. It never holds headers or bodies, and no secret of a query either.

    Attributes:
        number: 1 for the first request since the journal was emptied.
        time: when it arrived, seconds since the epoch.
        method: HTTP verb.
        path: as sent, still percent-encoded, without the query.
        query: as sent, without the question mark; keys, tokens and passwords are replaced by ***.
        status: of the answer; None while there is none, or when the connection was dropped.
        bytes_in: length of the request body read so far.
        bytes_out: length of the answer body sent so far.
        seconds: from arrival to the end of the answer.
        concurrent: requests in flight when it arrived, itself included.
        fault: name of the fault that was applied, if any.
        note: what the platform remarked about it, if anything.
    """

    number: int
    time: float
    method: str
    path: str
    query: str
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float | None = None
    concurrent: int
    fault: str | None = None
    note: str | None = None


class Journal:
    """The last 100 000 requests a platform has received, in order of arrival. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: deque[Entry] = deque(maxlen=100_000)
        self._count = 0
        self._in_flight = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries())

    def entries(self, method: str | None = None, path: str | None = None) -> list[Entry]:
        """Return copies of the entries, oldest first.

        Args:
            method: only this verb.
            path: only paths (as sent) in which this regular expression is found.
        """
        with self._lock:
            return [
                entry.model_copy()
                for entry in self._entries
                if (method is None or entry.method == method) and (path is None or re.search(path, entry.path))
            ]

    def peak(self, method: str | None = None, path: str | None = None) -> int:
        """Return how many of the matching requests were in flight at once, at most.

        Args:
            method: only this verb.
            path: only paths (as sent) in which this regular expression is found.
        """
        now = time.time()
        steps: list[tuple[float, int]] = []
        for entry in self.entries(method, path):
            end = now if entry.seconds is None else entry.time + entry.seconds
            steps += [(entry.time, 1), (end, -1)]
        # An end sorts before a beginning at the same instant: these two did not overlap.
        running = highest = 0
        for _, step in sorted(steps):
            running += step
            highest = max(highest, running)
        return highest

    def clear(self) -> None:
        """Forget all entries; numbers begin at 1 again."""
        with self._lock:
            self._entries.clear()
            self._count = 0

    def _begin(self, method: str, path: str, query: str) -> Entry:
        with self._lock:
            self._in_flight += 1
            self._count += 1
            entry = Entry(
                number=self._count,
                time=time.time(),
                method=method,
                path=path,
                query=query,
                concurrent=self._in_flight,
            )
            self._entries.append(entry)
            return entry

    def _end(self, entry: Entry) -> None:
        with self._lock:
            if entry.seconds is None:
                self._in_flight -= 1
                entry.seconds = max(0.0, time.time() - entry.time)


class Fault(BaseModel):
    """Something that goes wrong with chosen requests.

    Without `status`, `drop` and `truncate_bytes` the platform answers as usual, `delay_seconds`
    late and with `headers` added.

    Attributes:
        name: shown in the journal; made from the effect when not given.
        method: only requests with this verb; None is every verb.
        path: regular expression, searched for in the decoded path.
        query: regular expression, searched for in the decoded query.
        calls: which of the matching requests, counted from 1; None is every one.
        skip: matching requests that are let through first; `calls` counts after them.
        times: at most this many are hit.
        status: HTTP status of an answer given instead of the platform's.
        body: text of that answer.
        content_type: of that answer.
        headers: added to the answer, replacing those of the same name.
        after_effect: let the platform do what was asked before `delay_seconds` and before its
            answer is replaced by `status`. Without it the platform never sees the request.
        delay_seconds: wait this long before going on.
        drop: close the connection without an answer, `before` or `after` the platform did what
            was asked.
        truncate_bytes: send only this many bytes of the body that Content-Length announces, then
            close the connection.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    method: str | None = None
    path: str = ""
    query: str = ""
    calls: list[int] | None = None
    skip: int = Field(default=0, ge=0)
    times: int | None = Field(default=None, ge=1)
    status: int | None = Field(default=None, ge=200, le=599)
    body: str = ""
    content_type: str = "text/html; charset=utf-8"
    headers: dict[str, str] = Field(default_factory=dict)
    after_effect: bool = False
    delay_seconds: float = Field(default=0.0, ge=0.0)
    drop: Literal["before", "after"] | None = None
    truncate_bytes: int | None = Field(default=None, ge=0)

    def model_post_init(self, context: object) -> None:
        """Refuse expressions that do not compile now rather than at the first request."""
        for field in ("path", "query"):
            try:
                re.compile(getattr(self, field))
            except re.error as error:
                raise ValueError(f"{field} is not a regular expression: {error}") from error

    @property
    def label(self) -> str:
        """The name, or a short description of the effect."""
        effects = {
            f"status {self.status}": self.status is not None,
            f"drop {self.drop}": self.drop is not None,
            f"truncate to {self.truncate_bytes}": self.truncate_bytes is not None,
            f"delay {self.delay_seconds:g} s": self.delay_seconds > 0,
        }
        return self.name or ", ".join(text for text, given in effects.items() if given) or "headers"

    def _matches(self, method: str, path: str, query: str) -> bool:
        return (
            (self.method is None or self.method.upper() == method)
            and re.search(self.path, path) is not None
            and re.search(self.query, query) is not None
        )


class FaultPlan:
    """The faults of a platform, with how often each matched and hit. Safe from any thread.

    Every fault counts the requests it matches; the first one due, in the order added, is applied.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._matched: list[int] = []
        self._hit: list[int] = []

    def __len__(self) -> int:
        with self._lock:
            return len(self._faults)

    def add(self, *faults: Fault) -> None:
        """Add faults at the end of the plan."""
        with self._lock:
            self._faults += faults
            self._matched += [0] * len(faults)
            self._hit += [0] * len(faults)

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults, self._matched, self._hit = [], [], []

    def describe(self) -> list[dict[str, Any]]:
        """Return each fault with `matched` and `hit`, its counts of requests."""
        with self._lock:
            return [
                {**fault.model_dump(), "matched": matched, "hit": hit}
                for fault, matched, hit in zip(self._faults, self._matched, self._hit, strict=True)
            ]

    def _due(self, method: str, path: str, query: str) -> Fault | None:
        due: int | None = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                if not fault._matches(method, path, query):
                    continue
                self._matched[index] += 1
                call = self._matched[index] - fault.skip
                if (
                    due is None
                    and call >= 1
                    and (fault.calls is None or call in fault.calls)
                    and (fault.times is None or self._hit[index] < fault.times)
                ):
                    self._hit[index] += 1
                    due = index
            return None if due is None else self._faults[due]


class Platform:
    """Base of one emulated platform.

    A subclass names itself and its `Switches`, builds `app` in its constructor, and may override
    `start`, `stop` and `ready`. The core wraps `app` with latency, journal and faults and serves
    it on a loopback port of its own.

    Attributes:
        name: what it is called in the ready line and on the command line.
        switches_type: model of its switches.
        app: what answers the requests.
        switches: may be changed at any time; what a change does is documented there.
        journal: the requests received.
        faults: the faults to apply.
        url: root under which it is served; empty until it is.
        directory: an empty folder of its own, removed at the end.
        seed: ids, keys and noise are derived from it.
    """

    name: ClassVar[str]
    switches_type: ClassVar[type[Switches]] = Switches
    app: ASGIApp
    switches: Switches

    def __init__(self, *, seed: int = 0, directory: Path, **switches: Any) -> None:
        self.seed = seed
        self.directory = directory
        self.switches = self.switches_type(**switches)
        self.journal = Journal()
        self.faults = FaultPlan()
        self.url = ""

    def start(self, url: str) -> None:
        """Begin background work; called once it is served.

        Args:
            url: root under which the platform is served, without a slash at the end.
        """
        self.url = url

    def stop(self) -> None:
        """End background work; called once nothing is served any more."""

    def ready(self) -> dict[str, Any]:
        """Return the facts a user needs: URL, keys, users, ids. Must be JSON."""
        return {"url": self.url}


def annotate(request: Request, note: str) -> None:
    """Write a remark into the journal entry of a request; a second one is appended.

    Args:
        request: as FastAPI hands it to the endpoint.
        note: the remark, without secrets.
    """
    entry: Entry = request.scope["sandbox_entry"]
    entry.note = note if entry.note is None else f"{entry.note}; {note}"


class Sandbox:
    """Serves platforms on loopback ports while the context is open.

    Args:
        *platforms: `vip`, `vantage6`, `boss`; none means all.
        seed: ids, keys and noise are derived from it: same seed, same ones.
        latency_ms: added to each request of each platform, in milliseconds.
        faults: by platform name, a list of `Fault` (or what makes one); or a JSON file of that.
        state: a file to which the ready line is written atomically and which is removed at the
            end, so that other processes find the sandbox.
        port: 0 takes free ports; otherwise the first platform gets this one, the next the one
            after it, and so on.
        vip: switches of the platform of that name.
        vantage6: switches of the platform of that name.
        boss: switches of the platform of that name.

    Raises:
        ValueError: an unknown platform or switch, a fault that makes no sense.
        OSError: a port that is taken, a state file that cannot be written.
    """

    def __init__(
        self,
        *platforms: str,
        seed: int = 0,
        latency_ms: float = 0.0,
        faults: Mapping[str, Sequence[Fault | Mapping[str, Any]]] | Path | str | None = None,
        state: Path | str | None = None,
        port: int = 0,
        vip: Mapping[str, Any] | None = None,
        vantage6: Mapping[str, Any] | None = None,
        boss: Mapping[str, Any] | None = None,
    ) -> None:
        names = list(dict.fromkeys(platforms or _PLATFORMS))
        switches = {"vip": vip, "vantage6": vantage6, "boss": boss}
        plan = _read_faults(faults)
        for given in [*names, *plan, *(key for key, value in switches.items() if value)]:
            if given not in _PLATFORMS:
                raise ValueError(f"no platform {given!r}: there are {', '.join(_PLATFORMS)}")
            if given not in names:
                raise ValueError(f"switches or faults for {given!r}, which is not served")
        self._directory = tempfile.TemporaryDirectory(prefix="prefect-biomed-sandbox-")
        self._state = None if state is None else Path(state)
        self._first_port = port
        self._platforms: dict[str, Platform] = {}
        self._servers: list[_Server] = []
        try:
            for name in names:
                module, class_name = _PLATFORMS[name]
                kind: type[Platform] = getattr(importlib.import_module(module), class_name)
                directory = Path(self._directory.name, name)
                directory.mkdir()
                own = {"latency_ms": latency_ms, **(switches[name] or {})}
                self._platforms[name] = kind(seed=seed, directory=directory, **own)
                self._platforms[name].faults.add(*plan.get(name, []))
        except BaseException:
            self._directory.cleanup()
            raise

    @property
    def vip(self) -> VipSandbox:
        """The Virtual Imaging Platform."""
        return cast("VipSandbox", self._platform("vip"))

    @property
    def vantage6(self) -> Platform:
        """vantage6."""
        return self._platform("vantage6")

    @property
    def boss(self) -> Platform:
        """The Boss."""
        return self._platform("boss")

    def _platform(self, name: str) -> Platform:
        if name not in self._platforms:
            raise AttributeError(f"this sandbox does not serve {name}")
        return self._platforms[name]

    def ready(self) -> dict[str, Any]:
        """Return process id and facts of every platform: the content of the ready line."""
        facts = {name: platform.ready() for name, platform in self._platforms.items()}
        return {"pid": os.getpid(), **facts}

    def start(self) -> Self:
        """Serve, and return once every platform answers."""
        try:
            for offset, platform in enumerate(self._platforms.values()):
                port = self._first_port + offset if self._first_port else 0
                server = _Server(platform, port)
                self._servers.append(server)
                server.start()
            if self._state is not None:
                _write_atomically(self._state, json.dumps(self.ready()) + "\n")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End serving, and remove the state file and all that was stored. Safe to repeat."""
        if self._state is not None and self._servers:
            self._state.unlink(missing_ok=True)
        while self._servers:
            self._servers.pop().stop()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _read_faults(
    faults: Mapping[str, Sequence[Fault | Mapping[str, Any]]] | Path | str | None,
) -> dict[str, list[Fault]]:
    if isinstance(faults, Path | str):
        faults = json.loads(Path(faults).read_text(encoding="utf-8"))
    return TypeAdapter(dict[str, list[Fault]]).validate_python(faults or {})


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


class _Server:
    """One platform on one loopback port, in a thread of its own."""

    def __init__(self, platform: Platform, port: int) -> None:
        self._platform = platform
        self._started = False
        self._socket = socket.create_server(("127.0.0.1", port), backlog=512)
        # Inherited by each connection. asyncio sets it only on sockets that name their protocol; without it each answer
        # waits 40 ms for an acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                _Gate(platform),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                # Longer than any client polls: a kept connection must not die under its request.
                timeout_keep_alive=120,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(
            target=self._uvicorn.run,
            kwargs={"sockets": [self._socket]},
            name=f"sandbox-{platform.name}",
            daemon=True,
        )

    def start(self) -> None:
        self._thread.start()
        deadline = time.monotonic() + _STARTED_WITHIN_SECONDS
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the sandbox of {self._platform.name} did not start")
            time.sleep(0.005)
        host, port = self._socket.getsockname()
        self._started = True
        self._platform.start(f"http://{host}:{port}")

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
        if self._started:
            self._platform.stop()


class _Gate:
    """What every request of a platform passes first: control, latency, journal, faults."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._control = _control_app(platform)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the sandbox serves HTTP only, not {scope['type']}")
        path: str = scope["path"]
        if path == _CONTROL or path.startswith(_CONTROL + "/"):
            await self._control(scope, receive, send)
            return
        method: str = scope["method"]
        query = scope["query_string"].decode("latin-1")
        entry = self._platform.journal._begin(method, scope["raw_path"].decode("latin-1"), _SECRET.sub(r"\1***", query))
        scope["sandbox_entry"] = entry

        async def counting_receive() -> Message:
            message = await receive()
            entry.bytes_in += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            # Before sending, so that whoever has the answer finds it in the journal.
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            else:
                entry.bytes_out += len(message.get("body", b""))
                if not message.get("more_body", False):
                    self._platform.journal._end(entry)
            await send(message)

        try:
            if self._platform.switches.latency_ms:
                await asyncio.sleep(self._platform.switches.latency_ms / 1000)
            fault = self._platform.faults._due(method, path, unquote_plus(query))
            if fault is None:
                await self._platform.app(scope, counting_receive, counting_send)
            else:
                entry.fault = fault.label
                await self._fail(fault, scope, counting_receive, counting_send, send)
        finally:
            self._platform.journal._end(entry)

    async def _fail(self, fault: Fault, scope: Scope, receive: Receive, send: Send, server_send: Send) -> None:
        late = fault.after_effect or fault.drop == "after"
        if not late:
            await asyncio.sleep(fault.delay_seconds)
        if fault.drop == "before":
            await _drop_connection(server_send, receive)
            return
        if fault.drop == "after" or (fault.status is not None and late):
            await self._platform.app(scope, receive, _swallow)
        if late:
            await asyncio.sleep(fault.delay_seconds)
        if fault.drop == "after":
            await _drop_connection(server_send, receive)
            return
        answer = _Cut(fault, send, server_send, receive)
        if fault.status is None:
            await self._platform.app(scope, receive, answer)
            return
        if not late:
            await _drain(receive)
        body = fault.body.encode()
        headers = [
            (b"content-type", fault.content_type.encode("latin-1")),
            (b"content-length", str(len(body)).encode()),
        ]
        await answer({"type": "http.response.start", "status": fault.status, "headers": headers})
        await answer({"type": "http.response.body", "body": body, "more_body": False})


class _Cut:
    """Passes an answer on, with the headers of a fault added and its body cut short."""

    def __init__(self, fault: Fault, send: Send, server_send: Send, receive: Receive) -> None:
        self._fault = fault
        self._send = send
        self._server_send = server_send
        self._receive = receive
        self._left = fault.truncate_bytes
        self._dropped = False

    async def __call__(self, message: Message) -> None:
        if self._dropped:
            return
        if message["type"] == "http.response.start":
            added = {
                name.lower().encode("latin-1"): value.encode("latin-1") for name, value in self._fault.headers.items()
            }
            kept = [(name, value) for name, value in message["headers"] if name not in added]
            await self._send({**message, "headers": [*kept, *added.items()]})
            return
        body: bytes = message.get("body", b"")
        if self._left is None or (len(body) <= self._left and message.get("more_body", False)):
            if self._left is not None:
                self._left -= len(body)
            await self._send(message)
            return
        self._dropped = True
        await self._send({**message, "body": body[: self._left], "more_body": True})
        await _drop_connection(self._server_send, self._receive, flush=True)


async def _drop_connection(send: Send, receive: Receive, *, flush: bool = False) -> None:
    """Close the TCP connection of a request, kept alive or not, without finishing the answer.

    ASGI has no word for this. `send` as uvicorn hands it over is a bound method of the object
    that serves this request, and that one knows the transport.
    """
    transport: asyncio.Transport = send.__self__.transport  # type: ignore[attr-defined]  # see above
    if flush:
        transport.close()
    else:
        transport.abort()
    # uvicorn answers 500 on its own when we return before it noticed that nobody is there.
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


async def _swallow(message: Message) -> None:
    """Stand in for `send` where the answer is lost."""


def _control_app(platform: Platform) -> FastAPI:
    """Build what answers under /_sandbox, outside journal, faults and latency."""
    app = FastAPI(title=f"prefect-biomed sandbox control: {platform.name}")

    @app.get(_CONTROL + "/ready")
    def get_ready() -> dict[str, Any]:
        return platform.ready()

    @app.get(_CONTROL + "/journal")
    def get_journal() -> list[Entry]:
        return platform.journal.entries()

    @app.delete(_CONTROL + "/journal", status_code=204)
    def empty_journal() -> None:
        platform.journal.clear()

    @app.get(_CONTROL + "/faults")
    def get_faults() -> list[dict[str, Any]]:
        return platform.faults.describe()

    @app.post(_CONTROL + "/faults", status_code=201)
    def add_faults(faults: Fault | list[Fault]) -> list[dict[str, Any]]:
        platform.faults.add(*(faults if isinstance(faults, list) else [faults]))
        return platform.faults.describe()

    @app.delete(_CONTROL + "/faults", status_code=204)
    def clear_faults() -> None:
        platform.faults.clear()

    @app.get(_CONTROL + "/switches")
    def get_switches() -> dict[str, Any]:
        return platform.switches.model_dump(mode="json")

    @app.patch(_CONTROL + "/switches")
    def change_switches(changes: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        current = platform.switches
        for name, field in type(current).model_fields.items():
            if field.frozen and changes.get(name, getattr(current, name)) != getattr(current, name):
                raise HTTPException(422, f"{name} cannot be changed while the sandbox runs")
        try:
            # All or nothing: a wrong one among several must not leave half of them changed.
            changed = type(current).model_validate({**current.model_dump(), **changes})
        except ValidationError as error:
            raise HTTPException(422, json.loads(error.json(include_url=False))) from error
        for name in changes:
            if not type(current).model_fields[name].frozen:
                setattr(current, name, getattr(changed, name))
        return current.model_dump(mode="json")

    return app
