"""What every request of a platform passes first: control, latency, journal, faults."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Annotated, Any
from urllib.parse import unquote_plus

from fastapi import Body, FastAPI, HTTPException
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from prefect_biomed.sandbox._core import Platform
from prefect_biomed.sandbox._faults import Fault
from prefect_biomed.sandbox._journal import Entry

_CONTROL = "/_sandbox"
_SECRET = re.compile(r"(?i)((?:^|&)[^=&]*(?:key|token|password|signature|secret|credential)[^=&]*=)[^&]*")


class Gate:
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
