"""Routes as tables of small functions, for the platforms that answer with JSON."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from prefect_biomed.sandbox._core import annotate

T = TypeVar("T")
Handler = Callable[..., Awaitable[Any]]


class Routes(Generic[T]):
    """The routes of one API. A function that answers one gets the server, the request, and what is in the path.

    Args:
        *prefixes: paths that all of them begin with; each route is there once for each.
        suffixes: likewise what they end with.
    """

    def __init__(self, *prefixes: str, suffixes: tuple[str, ...] = ("",)) -> None:
        self._prefixes = prefixes or ("",)
        self._suffixes = suffixes
        self._entries: list[tuple[str, list[str], Handler]] = []

    def add(self, path: str, *methods: str) -> Callable[[Handler], Handler]:
        """Return a decorator that makes a function answer a route.

        Args:
            path: below the prefix, with `{name}` and `{name:path}`.
            *methods: HTTP verbs.
        """

        def register(handler: Handler) -> Handler:
            self._entries.append((path, list(methods), handler))
            return handler

        return register

    def put_into(self, app: FastAPI, server: T) -> FastAPI:
        """Have an application answer all routes, in the order in which they were added.

        Args:
            app: the application.
            server: what the functions get first.
        """
        for path, methods, handler in self._entries:
            endpoint = _endpoint(handler, server)
            for prefix, suffix in itertools.product(self._prefixes, self._suffixes):
                app.add_api_route(prefix + path + suffix, endpoint, methods=methods, response_model=None)
        return app


def _endpoint(handler: Handler, server: object) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        answer = await handler(server, request, **request.path_params)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return endpoint


async def client_went_away(request: Request, error: Exception) -> Response:
    """Answer, to nobody, a request whose client left before its end."""
    annotate(request, "the client went away")
    return Response(status_code=400)
