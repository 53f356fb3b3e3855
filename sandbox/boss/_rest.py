"""The REST interface of the Boss: ingest jobs, resources, cutouts."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from prefect_biomed.sandbox.boss._aws import AwsApp, Receive, Scope, Send
from prefect_biomed.sandbox.boss._jobs import Status
from prefect_biomed.sandbox.boss._resources import BossProblem
from prefect_biomed.sandbox.boss._service import Service
from prefect_biomed.sandbox.boss._volumes import Range

_READS = ("GET", "HEAD")

Endpoint = Callable[[Request], Awaitable[Response]]
Route = Callable[[str, str], Callable[[Endpoint], Endpoint]]
UserOf = Callable[[Request], str | None]
JsonBody = Callable[[Request], Awaitable[Any]]


class _NotAuthenticated(Exception):
    """Answered as Django REST framework does, not as the Boss does."""


class BossApp:
    """REST under `/latest` and `/v1`, SQS and S3 everywhere else.

    Args:
        service: State of the emulated Boss.
    """

    def __init__(self, service: Service) -> None:
        self._rest = _rest_app(service)
        self._aws = AwsApp(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        first = scope.get("path", "").split("/", 2)[1]
        # Told apart before any routing: thousands of objects are put for each request to the REST interface.
        app = self._rest if first in ("latest", "v1") or first.startswith("v0.") else self._aws
        await app(scope, receive, send)


def _rest_app(service: Service) -> FastAPI:
    app = FastAPI(redirect_slashes=False, openapi_url=None)

    @app.exception_handler(BossProblem)
    async def boss_problem(request: Request, problem: BossProblem) -> Response:
        body = {"status": problem.status, "code": problem.code, "message": problem.message}
        return JSONResponse(body, status_code=problem.status)

    @app.exception_handler(_NotAuthenticated)
    async def not_authenticated(request: Request, problem: _NotAuthenticated) -> Response:
        headers = {"WWW-Authenticate": "Token"}
        return JSONResponse({"detail": str(problem)}, status_code=401, headers=headers)

    def user_of(request: Request) -> str | None:
        header = request.headers.get("authorization", "")
        scheme, _, token = header.partition(" ")
        if not header and request.method in _READS:
            return None
        if not header:
            raise _NotAuthenticated("Authentication credentials were not provided.")
        user = service.users.get(token.strip()) if scheme in ("Token", "Bearer") else None
        if user is None:
            raise _NotAuthenticated("Invalid token.")
        return user

    def route(method: str, path: str) -> Callable[[Endpoint], Endpoint]:
        def register(endpoint: Endpoint) -> Endpoint:
            for version in ("latest", "v1"):
                for slash in ("", "/"):
                    app.router.add_route(f"/{version}{path}{slash}", endpoint, methods=[method])
            return endpoint

        return register

    async def json_body(request: Request) -> Any:
        try:
            return json.loads(await request.body())
        except ValueError as error:
            raise BossProblem(400, 1006, f"JSON parse error - {error}") from error

    def number(request: Request) -> int:
        try:
            return int(request.path_params["job"])
        except ValueError as error:
            raise BossProblem(404, 4004, "The ingest job does not exist") from error

    @route("POST", "/ingest")
    async def create(request: Request) -> Response:
        user = user_of(request)
        job = service.create(user or "", await json_body(request))
        body = service.describe(job)
        del body["tile_index_queue"]
        return JSONResponse(body, status_code=201)

    @route("GET", "/ingest")
    async def list_jobs(request: Request) -> Response:
        user = user_of(request)
        jobs = []
        for job in service.jobs.values():
            if job.status != Status.DELETED and user in (job.creator, "admin"):
                described = service.describe(job)
                fields = ("id", "collection", "experiment", "channel", "status", "ingest_type")
                times = {"created_on": job.created_on, "completed_on": job.completed_on}
                jobs.append({field: described[field] for field in fields} | times)
        return JSONResponse({"ingest_jobs": jobs})

    @route("GET", "/ingest/{job}")
    async def join(request: Request) -> Response:
        return JSONResponse(service.join(service.job(user_of(request), number(request))))

    @route("GET", "/ingest/{job}/status")
    async def status(request: Request) -> Response:
        job = service.job(user_of(request), number(request))
        if job.status == Status.DELETED:
            raise BossProblem(404, 2004, f"The ingest job {job.id} has been deleted")
        total, current = service.message_counts(job)
        counts = {"total_message_count": total, "current_message_count": current}
        return JSONResponse({"id": job.id, "status": int(job.status), **counts})

    @route("POST", "/ingest/{job}/complete")
    async def complete(request: Request) -> Response:
        code, body = service.complete(service.job(user_of(request), number(request)))
        return Response(status_code=204) if body is None else JSONResponse(body, status_code=code)

    @route("DELETE", "/ingest/{job}")
    async def cancel(request: Request) -> Response:
        service.cancel(service.job(user_of(request), number(request)))
        return Response(status_code=204)

    _add_resources(service, route, user_of, json_body)
    _add_cutouts(service, route)

    @app.api_route("/v0.{rest:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def old_version(rest: str) -> Response:
        raise BossProblem(400, 9003, "Unsupported API version requested.")

    @app.api_route("/latest/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"])
    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"])
    async def nothing_here(rest: str) -> Response:
        return HTMLResponse("<html><h1>Not Found</h1></html>", status_code=404)

    return app


def _add_resources(service: Service, route: Route, user_of: UserOf, json_body: JsonBody) -> None:
    collection = "/collection/{collection}"
    experiment = collection + "/experiment/{experiment}"
    channel = experiment + "/channel/{channel}"

    @route("GET", "/collection")
    async def list_collections(request: Request) -> Response:
        user_of(request)
        return JSONResponse({"collections": sorted(service.resources.collections)})

    @route("GET", "/coord")
    async def list_frames(request: Request) -> Response:
        user_of(request)
        return JSONResponse({"coords": sorted(service.resources.frames)})

    @route("GET", collection)
    async def get_collection(request: Request) -> Response:
        _signed_in(user_of(request))
        return JSONResponse(service.resources.collection(request.path_params["collection"]))

    @route("GET", experiment)
    async def get_experiment(request: Request) -> Response:
        _signed_in(user_of(request))
        path = request.path_params
        return JSONResponse(service.resources.experiment(path["collection"], path["experiment"]))

    @route("GET", channel)
    async def get_channel(request: Request) -> Response:
        _signed_in(user_of(request))
        path = request.path_params
        found = service.resources.channel(path["collection"], path["experiment"], path["channel"])
        return JSONResponse(found)

    @route("GET", "/coord/{frame}")
    async def get_frame(request: Request) -> Response:
        _signed_in(user_of(request))
        return JSONResponse(service.resources.frame(request.path_params["frame"]))

    @route("POST", collection)
    async def add_collection(request: Request) -> Response:
        user, name = user_of(request), request.path_params["collection"]
        body = await json_body(request)
        made = service.resources.add_collection(user or "", name, body.get("description", ""))
        return JSONResponse(made, status_code=201)

    @route("POST", "/coord/{frame}")
    async def add_frame(request: Request) -> Response:
        user, name = user_of(request), request.path_params["frame"]
        made = service.resources.add_frame(user or "", name, await json_body(request))
        return JSONResponse(made, status_code=201)

    @route("POST", experiment)
    async def add_experiment(request: Request) -> Response:
        user, path = user_of(request), request.path_params
        body = await json_body(request)
        made = service.resources.add_experiment(user or "", path["collection"], path["experiment"], body)
        return JSONResponse(made, status_code=201)

    @route("POST", channel)
    async def add_channel(request: Request) -> Response:
        user, path = user_of(request), request.path_params
        names = (path["collection"], path["experiment"], path["channel"])
        made = service.resources.add_channel(user or "", *names, await json_body(request))
        return JSONResponse(made, status_code=201)

    def _signed_in(user: str | None) -> None:
        if user is None:
            raise BossProblem(403, 3001, "You do not have read permission on the resource")


def _add_cutouts(service: Service, route: Route) -> None:
    volume = "/cutout/{collection}/{experiment}/{channel}/{resolution}/{x}/{y}/{z}"

    def answer(request: Request, t: Range) -> Response:
        path = request.path_params
        names = (path["collection"], path["experiment"], path["channel"])
        block = service.cutout(names, _range(path["x"]), _range(path["y"]), _range(path["z"]), t)
        buffer = io.BytesIO()
        np.save(buffer, block if "t" in path else block[0])
        content = gzip.compress(buffer.getvalue(), compresslevel=1)
        return Response(content, media_type="application/npygz")

    @route("GET", volume)
    async def cutout(request: Request) -> Response:
        return answer(request, (0, 1))

    @route("GET", volume + "/{t}")
    async def cutout_in_time(request: Request) -> Response:
        return answer(request, _range(request.path_params["t"]))


def _range(text: str) -> Range:
    start, _, stop = text.partition(":")
    try:
        low, high = int(start), int(stop)
    except ValueError as error:
        raise BossProblem(400, 1006, f"{text} is not a range") from error
    if not 0 <= low < high or high - low > 100_000:
        raise BossProblem(400, 1006, f"{text} is not a range")
    return low, high
