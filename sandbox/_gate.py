"""What every request of a platform passes first: control, latency, journal, faults."""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from typing import Annotated, Any
from urllib.parse import unquote_plus

from fastapi import Body, FastAPI, HTTPException, Request
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from prefect_biomed.sandbox._core import Platform, annotate
from prefect_biomed.sandbox._faults import Fault
from prefect_biomed.sandbox._journal import Entry
from prefect_biomed.sandbox._state import Keeper

_CONTROL = "/_sandbox"
_SECRET = re.compile(r"(?i)((?:^|&)[^=&]*(?:key|token|password|signature|secret|credential)[^=&]*=)[^&]*")


class Gate:
    """What every request of a platform passes first: control, latency, journal, faults.

    Args:
        platform: behind the gate.
        keeper: keeps its state before each answer; None when nobody wants it kept.
    """

    def __init__(self, platform: Platform, keeper: Keeper | None = None) -> None:
        self._platform = platform
        self._keeper = keeper
        self._control = _control_app(platform)
        self._held: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the sandbox serves HTTP only, not {scope['type']}")
        path: str = scope["path"]
        if path == _CONTROL or path.startswith(_CONTROL + "/"):
            await self._control(scope, receive, send)
            if self._keeper is not None:
                await self._keeper.keep()
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
                await self._carry_out(scope, counting_receive, counting_send)
            else:
                entry.fault = fault.label
                await self._fail(fault, scope, counting_receive, _Answer(fault, counting_send, send, counting_receive))
        except asyncio.CancelledError:
            # The server ends, and its connections are gone; uvicorn would print this as an error.
            return
        finally:
            self._platform.journal._end(entry)

    async def _carry_out(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the platform answer, and note what it says, whoever gets to hear it."""
        entry: Entry = scope["sandbox_entry"]

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.answered = message["status"]
                entry.effect = message["status"] < 400
                if self._keeper is not None:
                    await self._keeper.keep()
            await send(message)

        await self._platform.app(scope, receive, noting_send)

    async def _fail(self, fault: Fault, scope: Scope, receive: Receive, answer: _Answer) -> None:
        entry: Entry = scope["sandbox_entry"]
        if fault.hold_seconds:
            kept = await _keep(receive, entry)
            if kept is None:
                return
            receive = kept
            if fault.instead:
                self._carry_out_later(fault.hold_seconds, scope, kept)
            else:
                await asyncio.sleep(fault.hold_seconds)
        if fault.instead:
            await asyncio.sleep(fault.delay_seconds)
            if fault.drop is None and not fault.hold_seconds:
                await _drain(receive)
            await answer.instead()
        elif fault.late:
            await self._carry_out_first(fault, scope, receive, answer)
        elif fault.hold_seconds:
            await asyncio.sleep(fault.delay_seconds)
            await self._carry_out(scope, receive, answer)
        else:
            await self._carry_out_unless_withdrawn(fault, scope, receive, answer)

    async def _carry_out_first(self, fault: Fault, scope: Scope, receive: Receive, answer: _Answer) -> None:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._carry_out(scope, receive, keep)
        await asyncio.sleep(fault.delay_seconds)
        if fault.drop is not None or fault.status is not None:
            await answer.instead()
            return
        for message in messages:
            await answer(message)

    async def _carry_out_unless_withdrawn(self, fault: Fault, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if fault.delay_seconds:
            kept = await _keep(receive, scope["sandbox_entry"])
            if kept is None:
                return
            if await _left_within(fault.delay_seconds, receive):
                annotate(Request(scope), "the client went away while the request was delayed")
                return
            receive = kept
        await self._carry_out(scope, receive, answer)

    def _carry_out_later(self, seconds: float, scope: Scope, receive: Receive) -> None:
        entry: Entry = scope["sandbox_entry"]
        entry.held = True

        async def wait_and_carry_out() -> None:
            try:
                await asyncio.sleep(seconds)
                await self._carry_out(scope, receive, _swallow)
            finally:
                entry.held = False

        task = asyncio.create_task(wait_and_carry_out())
        self._held.add(task)
        task.add_done_callback(self._held.discard)


class _Answer:
    """What a client gets of a faulty answer: with headers added, cut short, another one, or none.

    Args:
        fault: what is wrong with it.
        send: counts what is sent.
        server_send: as uvicorn hands it over.
        receive: tells when the client has gone.
    """

    def __init__(self, fault: Fault, send: Send, server_send: Send, receive: Receive) -> None:
        self._fault = fault
        self._send = send
        self._server_send = server_send
        self._receive = receive
        self._left = fault.truncate_bytes
        self._dropped = False

    async def instead(self) -> None:
        """Drop the connection, or send the status and the body of the fault."""
        if self._fault.drop is not None:
            await _drop_connection(self._server_send, self._receive)
            return
        body = self._fault.body.encode()
        headers = [
            (b"content-type", self._fault.content_type.encode("latin-1")),
            (b"content-length", str(len(body)).encode()),
        ]
        await self({"type": "http.response.start", "status": self._fault.status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": False})

    async def __call__(self, message: Message) -> None:
        """Pass a message on."""
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


class _Kept:
    """A request body that has arrived, to be read as if it arrived now. The client never seems to go away."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = deque(chunks)
        self._read = False

    async def __call__(self) -> Message:
        if self._read:
            await asyncio.Event().wait()
        chunk = self._chunks.popleft() if self._chunks else b""
        self._read = not self._chunks
        return {"type": "http.request", "body": chunk, "more_body": not self._read}


async def _keep(receive: Receive, entry: Entry) -> _Kept | None:
    """Take in the whole body of a request; None when the client leaves before its end."""
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            entry.note = "the client went away while it sent the request"
            return None
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return _Kept(chunks)


async def _left_within(seconds: float, receive: Receive) -> bool:
    """Wait; return at once, and True, when a client whose whole request has arrived leaves."""
    try:
        async with asyncio.timeout(seconds):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


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
