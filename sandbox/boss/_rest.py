"""The REST interface of the Boss: ingest jobs, resources, cutouts."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from prefect_biomed.sandbox._routes import Routes
from prefect_biomed.sandbox.boss._aws import AwsApp, Receive, Scope, Send
from prefect_biomed.sandbox.boss._jobs import Job, Status
from prefect_biomed.sandbox.boss._resources import BossProblem
from prefect_biomed.sandbox.boss._service import Service
from prefect_biomed.sandbox.boss._volumes import Range

_READS = ("GET", "HEAD")


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


routes: Routes[Service] = Routes("/latest", "/v1", suffixes=("", "/"))
_COLLECTION = "/collection/{collection}"
_EXPERIMENT = _COLLECTION + "/experiment/{experiment}"
_CHANNEL = _EXPERIMENT + "/channel/{channel}"
_VOLUME = "/cutout/{collection}/{experiment}/{channel}/{resolution}/{x}/{y}/{z}"


async def _boss_problem(request: Request, problem: BossProblem) -> Response:
    body = {"status": problem.status, "code": problem.code, "message": problem.message}
    return JSONResponse(body, status_code=problem.status)


async def _not_authenticated(request: Request, problem: _NotAuthenticated) -> Response:
    return JSONResponse({"detail": str(problem)}, status_code=401, headers={"WWW-Authenticate": "Token"})


async def _old_version(rest: str) -> Response:
    raise BossProblem(400, 9003, "Unsupported API version requested.")


async def _nothing_here(rest: str) -> Response:
    return HTMLResponse("<html><h1>Not Found</h1></html>", status_code=404)


def _rest_app(service: Service) -> FastAPI:
    app = FastAPI(redirect_slashes=False, openapi_url=None)
    app.exception_handler(BossProblem)(_boss_problem)
    app.exception_handler(_NotAuthenticated)(_not_authenticated)
    routes.put_into(app, service)
    methods = ["GET", "POST", "PUT", "DELETE"]
    app.add_api_route("/v0.{rest:path}", _old_version, methods=methods)
    for version in ("latest", "v1"):
        app.add_api_route(f"/{version}/{{rest:path}}", _nothing_here, methods=methods)
    return app


def _user_of(service: Service, request: Request) -> str | None:
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


def _check_signed_in(service: Service, request: Request) -> None:
    if _user_of(service, request) is None:
        raise BossProblem(403, 3001, "You do not have read permission on the resource")


async def _json_body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise BossProblem(400, 1006, f"JSON parse error - {error}") from error


def _own_job(service: Service, request: Request, number: str) -> Job:
    user = _user_of(service, request)
    try:
        return service.job(user, int(number))
    except ValueError as error:
        raise BossProblem(404, 4004, "The ingest job does not exist") from error


# -- ingest jobs ---------------------------------------------------------------------------------


@routes.add("/ingest", "POST")
async def create(service: Service, request: Request) -> Response:
    user = _user_of(service, request)
    job = service.create(user or "", await _json_body(request))
    body = service.describe(job)
    del body["tile_index_queue"]
    return JSONResponse(body, status_code=201)


@routes.add("/ingest", *_READS)
async def list_jobs(service: Service, request: Request) -> Response:
    user = _user_of(service, request)
    jobs = []
    for job in service.jobs.values():
        if job.status != Status.DELETED and user in (job.creator, "admin"):
            described = service.describe(job)
            fields = ("id", "collection", "experiment", "channel", "status", "ingest_type")
            times = {"created_on": job.created_on, "completed_on": job.completed_on}
            jobs.append({field: described[field] for field in fields} | times)
    return JSONResponse({"ingest_jobs": jobs})


@routes.add("/ingest/{job}", *_READS)
async def join(service: Service, request: Request, job: str) -> dict[str, Any]:
    return service.join(_own_job(service, request, job))


@routes.add("/ingest/{job}/status", *_READS)
async def status(service: Service, request: Request, job: str) -> dict[str, int]:
    found = _own_job(service, request, job)
    if found.status == Status.DELETED:
        raise BossProblem(404, 2004, f"The ingest job {found.id} has been deleted")
    total, current = service.message_counts(found)
    counts = {"total_message_count": total, "current_message_count": current}
    return {"id": found.id, "status": int(found.status), **counts}


@routes.add("/ingest/{job}/complete", "POST")
async def complete(service: Service, request: Request, job: str) -> Response:
    code, body = service.complete(_own_job(service, request, job))
    return Response(status_code=204) if body is None else JSONResponse(body, status_code=code)


@routes.add("/ingest/{job}", "DELETE")
async def cancel(service: Service, request: Request, job: str) -> Response:
    service.cancel(_own_job(service, request, job))
    return Response(status_code=204)


# -- resources -----------------------------------------------------------------------------------


@routes.add("/collection", *_READS)
async def list_collections(service: Service, request: Request) -> dict[str, list[str]]:
    _user_of(service, request)
    return {"collections": sorted(service.resources.collections)}


@routes.add("/coord", *_READS)
async def list_frames(service: Service, request: Request) -> dict[str, list[str]]:
    _user_of(service, request)
    return {"coords": sorted(service.resources.frames)}


@routes.add(_COLLECTION, *_READS)
async def get_collection(service: Service, request: Request, collection: str) -> dict[str, Any]:
    _check_signed_in(service, request)
    return service.resources.collection(collection)


@routes.add(_EXPERIMENT, *_READS)
async def get_experiment(service: Service, request: Request, collection: str, experiment: str) -> dict[str, Any]:
    _check_signed_in(service, request)
    return service.resources.experiment(collection, experiment)


@routes.add(_CHANNEL, *_READS)
async def get_channel(
    service: Service, request: Request, collection: str, experiment: str, channel: str
) -> dict[str, Any]:
    _check_signed_in(service, request)
    return service.resources.channel(collection, experiment, channel)


@routes.add("/coord/{frame}", *_READS)
async def get_frame(service: Service, request: Request, frame: str) -> dict[str, Any]:
    _check_signed_in(service, request)
    return service.resources.frame(frame)


@routes.add(_COLLECTION, "POST")
async def add_collection(service: Service, request: Request, collection: str) -> Response:
    user = _user_of(service, request)
    body = await _json_body(request)
    made = service.resources.add_collection(user or "", collection, body.get("description", ""))
    return JSONResponse(made, status_code=201)


@routes.add("/coord/{frame}", "POST")
async def add_frame(service: Service, request: Request, frame: str) -> Response:
    user = _user_of(service, request)
    made = service.resources.add_frame(user or "", frame, await _json_body(request))
    return JSONResponse(made, status_code=201)


@routes.add(_EXPERIMENT, "POST")
async def add_experiment(service: Service, request: Request, collection: str, experiment: str) -> Response:
    user = _user_of(service, request)
    made = service.resources.add_experiment(user or "", collection, experiment, await _json_body(request))
    return JSONResponse(made, status_code=201)


@routes.add(_CHANNEL, "POST")
async def add_channel(service: Service, request: Request, collection: str, experiment: str, channel: str) -> Response:
    user = _user_of(service, request)
    made = service.resources.add_channel(user or "", collection, experiment, channel, await _json_body(request))
    return JSONResponse(made, status_code=201)


# -- lower resolutions ---------------------------------------------------------------------------


@routes.add("/downsample/{collection}/{experiment}/{channel}", *_READS)
async def downsampling(
    service: Service, request: Request, collection: str, experiment: str, channel: str
) -> dict[str, Any]:
    _check_signed_in(service, request)
    status = service.resources.channel(collection, experiment, channel)["downsample_status"]
    levels = service.resources.experiment(collection, experiment)["num_hierarchy_levels"]
    return {"status": status, "num_hierarchy_levels": levels}


@routes.add("/downsample/{collection}/{experiment}/{channel}", "POST")
async def downsample(service: Service, request: Request, collection: str, experiment: str, channel: str) -> Response:
    _user_of(service, request)
    service.downsample(collection, experiment, channel)
    return Response(status_code=201)


# -- reading back --------------------------------------------------------------------------------


@routes.add(_VOLUME, *_READS)
@routes.add(_VOLUME + "/{t}", *_READS)
async def cutout(service: Service, request: Request, **path: str) -> Response:
    names = (path["collection"], path["experiment"], path["channel"])
    t = _range(path["t"]) if "t" in path else (0, 1)
    block = service.cutout(names, _range(path["x"]), _range(path["y"]), _range(path["z"]), t)
    buffer = io.BytesIO()
    np.save(buffer, block if "t" in path else block[0])
    content = gzip.compress(buffer.getvalue(), compresslevel=1)
    return Response(content, media_type="application/npygz")


@routes.add(_VOLUME, "POST")
@routes.add(_VOLUME + "/{t}", "POST")
async def write_cutout(service: Service, request: Request, **path: str) -> Response:
    user = _user_of(service, request)
    if request.headers.get("content-type") != "application/blosc":
        raise BossProblem(415, 1006, "Unsupported media type in request: the sandbox takes application/blosc.")
    names = (path["collection"], path["experiment"], path["channel"])
    low, high = _range(path.get("t", "0:1"))
    if path["resolution"] != "0" or high - low != 1:
        raise BossProblem(400, 1001, "The sandbox writes one sample of resolution 0 at a time.")
    ranges = (_range(path["x"]), _range(path["y"]), _range(path["z"]))
    service.write_cutout(user or "", names, ranges, low, await request.body())
    return Response(status_code=201)


def _range(text: str) -> Range:
    start, _, stop = text.partition(":")
    try:
        low, high = int(start), int(stop)
    except ValueError as error:
        raise BossProblem(400, 1006, f"{text} is not a range") from error
    if not 0 <= low < high or high - low > 100_000:
        raise BossProblem(400, 1006, f"{text} is not a range")
    return low, high
