"""From a request to an answer: routes, who is calling, bodies, lists, errors."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlencode

import httpx
from fastapi import FastAPI
from marshmallow import Schema, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from prefect_biomed.sandbox.vantage6._permissions import Caller
from prefect_biomed.sandbox.vantage6._records import Record, Registry
from prefect_biomed.sandbox.vantage6._refusals import FlaskRefusal, Refusal, ServerFlaw, TokenRefusal
from prefect_biomed.sandbox.vantage6._views import View

_log = logging.getLogger(__name__)

_NOT_FOUND = (
    "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n"
    "<p>The requested URL was not found on the server. If you entered the URL manually please "
    "check your spelling and try again.</p>\n"
)
_NOT_ALLOWED = "The method is not allowed for the requested URL."
_NO_JSON = "Did not attempt to load JSON data because the request Content-Type was not 'application/json'."
_BAD_JSON = "The browser (or proxy) sent a request that this server could not understand."


class Server(Protocol):
    """What the routes need to know of the server they belong to."""

    registry: Registry
    view: View
    generation: int

    def authenticate(self, request: Request, kinds: Sequence[str]) -> Caller | None: ...


@dataclass(frozen=True)
class Call:
    """One request, as the routes see it."""

    server: Any
    request: Request
    content: bytes
    identity: Caller | None

    @property
    def registry(self) -> Registry:
        """The tables."""
        registry: Registry = self.server.registry
        return registry

    @property
    def view(self) -> View:
        """How records are written."""
        view: View = self.server.view
        return view

    @property
    def generation(self) -> int:
        """3, 4 or 5."""
        return self.registry.generation

    @property
    def caller(self) -> Caller:
        """Who sent it; only for routes that want somebody."""
        assert self.identity is not None
        return self.identity

    @property
    def id(self) -> int:
        """The id in the path."""
        return int(self.request.path_params["id"])

    def arg(self, name: str) -> str | None:
        """Return the first value of a query parameter."""
        return self.request.query_params.get(name)

    def integer(self, name: str) -> int | None:
        """Return a query parameter as a number; anything else breaks the real server too."""
        value = self.arg(name)
        return None if value is None else int(value)

    def includes(self, what: str) -> bool:
        """Return whether `include` asks for this; repeated, and from v4 comma-separated."""
        values = self.request.query_params.getlist("include")
        return what in [part for value in values for part in value.split(",")]

    def json(self) -> Any:
        """Return the body.

        Raises:
            Refusal: 415 or 400 as Flask answers, with `message` where the API says `msg`.
        """
        if "json" not in self.request.headers.get("content-type", ""):
            raise FlaskRefusal(415, _NO_JSON)
        try:
            return json.loads(self.content)
        except ValueError as error:
            raise FlaskRefusal(400, _BAD_JSON) from error

    def body(self, schema: Schema, *, partial: bool = False) -> dict[str, Any]:
        """Return the body when it is as the schema wants it.

        v3 looks at nothing of the kind.

        Raises:
            Refusal: 400 with the faults by field.
        """
        if self.generation == 5:
            try:
                data = self.json()
            except FlaskRefusal:
                data = None
            try:
                loaded: dict[str, Any] = schema.load(data, partial=partial)
            except ValidationError as error:
                raise Refusal(400, "Request body is incorrect", errors=error.messages) from error
            return loaded
        data = self.json()
        errors = schema.validate(data, partial=partial) if self.generation == 4 else {}
        if errors:
            raise Refusal(400, "Request body is incorrect", errors=errors)
        if not isinstance(data, dict):
            raise TypeError("the real server runs into this too")
        return data

    def like(self, records: Iterable[Any], *names: str) -> list[Any]:
        """Keep the records that match the query parameters of these names, as SQL LIKE does."""
        kept = list(records)
        for name in names:
            pattern = self.arg(name)
            if pattern is not None:
                wanted = like(pattern)
                kept = [r for r in kept if wanted.fullmatch(getattr(r, name) or "")]
        return kept

    def page(
        self,
        records: Iterable[Any],
        write: Callable[[Any], dict[str, Any]],
        *,
        name: str,
        columns: type[Record],
        newest_first: bool = False,
        paginate: bool = True,
    ) -> Response:
        """Return one page of records with links and headers.

        Args:
            records: all that the caller may see, in the order of their ids.
            write: makes JSON of one.
            name: of the table, for the message about an unknown sort column.
            columns: the kind of record.
            newest_first: order by falling id. A sort given by the caller then changes nothing,
                because ids are never equal.
            paginate: False returns all.

        Raises:
            Refusal: 500 for a page or a column that does not exist.
        """
        found = list(records)
        if self.generation > 3:
            self._sort(found, name, columns)
        if newest_first:
            found.sort(key=lambda r: r.id, reverse=True)
        number, per_page = self._page_wanted(len(found), paginate)
        pages = math.ceil(len(found) / per_page)
        chosen = found[(number - 1) * per_page : number * per_page]
        numbers = {
            "first": 1,
            "previous": number - 1,
            "self": number,
            "next": number + 1 if (number - 1) * per_page + len(chosen) < len(found) else 0,
            "last": pages,
        }
        # Of a repeated parameter only the first value survives in the links.
        given = {key: self.arg(key) for key in self.request.query_params}
        links = {
            rel: f"{self.request.url.path}?{urlencode({**given, 'page': to})}" for rel, to in numbers.items() if to
        }
        items = [write(record) for record in chosen]
        headers = {
            "total-count": str(len(found)),
            "Link": ",".join(f"<{url}>; rel={rel}" for rel, url in links.items()),
        }
        if self.generation == 4:
            headers["access-control-expose-headers"] = "total-count, Link"
        bare = self.generation == 3 and not self.includes("metadata")
        return JSONResponse(items if bare else {"data": items, "links": links}, headers=headers)

    def _sort(self, found: list[Any], name: str, columns: type[Record]) -> None:
        for given in reversed((self.arg("sort") or "").split(",")):
            falling = given.strip().startswith("-")
            column = given.strip().lstrip("+-")
            if not column:
                continue
            if column not in columns.__dataclass_fields__:
                raise Refusal(500, f"Cannot sort a '{name}' by '{column}' because it does not exist")
            found.sort(key=partial(_sort_key, column), reverse=falling)

    def _page_wanted(self, total: int, paginate: bool) -> tuple[int, int]:
        if not paginate or (self.generation == 3 and not self.arg("page")):
            return 1, total or 1
        try:
            number, per_page = int(self.arg("page") or 1), int(self.arg("per_page") or 10)
        except ValueError as error:
            raise Refusal(500, str(error)) from error
        for name, value in (("page", number), ("per_page", per_page)):
            if value <= 0:
                raise Refusal(500, f"{name} needs to be >= 1")
        return number, per_page


def like(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of an SQL LIKE pattern, as SQLite compares: without case."""
    parts = {"%": ".*", "_": "."}
    return re.compile("".join(parts.get(c, re.escape(c)) for c in pattern), re.I | re.S)


def _sort_key(column: str, record: object) -> tuple[bool, Any]:
    value = getattr(record, column)
    return (value is not None, value if isinstance(value, str | int | float) else str(value))


Answer = Any
Handler = Callable[[Call], Answer]

USER = ("user",)
USER_NODE = ("user", "node")
ANYONE = ("user", "node", "container")
NODE = ("node",)
NOBODY: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Route:
    method: str
    path: str
    kinds: tuple[str, ...]
    generations: tuple[int, ...]
    handler: Handler
    tells: str


class Routes:
    """The routes of one module; put into an application by `build`."""

    def __init__(self) -> None:
        self.entries: list[_Route] = []

    def add(
        self,
        method: str,
        path: str,
        kinds: tuple[str, ...] = NOBODY,
        generations: tuple[int, ...] = (3, 4, 5),
        *,
        tells: Literal["never", "inside", "always"] = "never",
    ) -> Callable[[Handler], Handler]:
        """Return a decorator that makes a function answer a route.

        Args:
            method: HTTP verb.
            path: below the API path, with `{id:int}` and the like.
            kinds: who may call it; nobody in particular means without a token.
            generations: which dialects have it.
            tells: whether a v5 server says what went wrong in it: never, once the caller is known, or always.
        """

        def register(handler: Handler) -> Handler:
            self.entries.append(_Route(method, path, kinds, generations, handler, tells))
            return handler

        return register


def build(
    server: Any, app: FastAPI, prefix: str, groups: Iterable[Routes]
) -> Callable[[httpx.Request], httpx.Response]:
    """Put routes into an application, and make its errors those of the real servers.

    Args:
        server: has `registry` and `authenticate`, and whatever the routes want of it.
        app: the application.
        prefix: path that all of them begin with.
        groups: the routes.

    Returns:
        What answers a request without a network, with all routes put into the application so far
        and later.
    """
    generation: int = server.registry.generation
    for group in groups:
        for route in group.entries:
            if generation in route.generations:
                app.router.add_route(prefix + route.path, _endpoint(server, route), methods=[route.method])
    app.add_exception_handler(HTTPException, _missing)
    return partial(_directly, app)


def _endpoint(server: Any, route: _Route) -> Callable[[Request], Any]:
    answer = partial(_answer, server, route)

    async def endpoint(request: Request) -> Response:
        content = await request.body()
        return await run_in_threadpool(answer, request, content)

    endpoint.answer = answer  # type: ignore[attr-defined]  # for `_directly` below
    return endpoint


def _answer(server: Any, route: _Route, request: Request, content: bytes) -> Response:
    generation: int = server.registry.generation
    told = generation == 5 and route.tells == "always"
    try:
        with server.registry.lock:
            caller = server.authenticate(request, route.kinds) if route.kinds else None
            told = generation == 5 and route.tells != "never"
            return _response(route.handler(Call(server, request, content, caller)))
    except TokenRefusal as refusal:
        if told:
            return JSONResponse({"msg": f"An unexpected error occurred: {refusal.technical}"}, 500)
        return JSONResponse(refusal.body, refusal.status)
    except Refusal as refusal:
        return JSONResponse(refusal.body, refusal.status)
    except FlaskRefusal as refusal:
        return JSONResponse({"message": str(refusal)}, refusal.status)
    except Exception as error:
        # The real servers answer so whatever goes wrong in them; what was not meant is in the log.
        if not isinstance(error, ServerFlaw):
            _log.warning("%s %s failed", request.method, request.url.path, exc_info=True)
        if told:
            return JSONResponse({"msg": f"An unexpected error occurred: {error}"}, 500)
        return JSONResponse(
            {"msg": "An unexpected error occurred" + (" on the server!" if generation < 5 else "!")}, 500
        )


async def _missing(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        return JSONResponse({"message": _NOT_ALLOWED}, 405)
    return HTMLResponse(_NOT_FOUND, 404)


def _directly(app: FastAPI, request: httpx.Request) -> httpx.Response:
    scope: Scope = {
        "type": "http",
        "method": request.method,
        "path": request.url.path,
        "root_path": "",
        "query_string": request.url.query,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
    }
    for route in app.router.routes:
        match, more = route.matches(scope)
        if match is Match.FULL:
            found: Response = more["endpoint"].answer(Request({**scope, **more}), request.read())
            if isinstance(found, FileResponse):
                return httpx.Response(200, content=Path(found.path).read_bytes(), request=request)
            headers = {"content-type": found.headers.get("content-type", "")}
            return httpx.Response(found.status_code, content=bytes(found.body), headers=headers, request=request)
    raise LookupError(f"no route {request.method} {request.url.path}")


def _response(answer: Answer) -> Response:
    if isinstance(answer, Response):
        return answer
    if isinstance(answer, tuple):
        body, status = answer
        return JSONResponse(body, status)
    return JSONResponse(answer)
