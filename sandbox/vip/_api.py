"""The REST API of VIP-portal, profile `vip`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefect_biomed.sandbox._core import annotate
from prefect_biomed.sandbox._routes import Routes, client_went_away
from prefect_biomed.sandbox.vip._engine import RESULTS_DIRECTORY, Engine, Execution, Job
from prefect_biomed.sandbox.vip._girder import Girder
from prefect_biomed.sandbox.vip._model import GIRDER_STORAGE, ApiError, Status, User, Users, VipSwitches, refused
from prefect_biomed.sandbox.vip._pipelines import PIPELINES, Parameter, Pipeline
from prefect_biomed.sandbox.vip._storage import ROOT, Storage

# Controllers of the portal that name no method answer every one.
_ANY = ["GET", "POST", "PUT", "DELETE", "PATCH"]
_LIMIT = 500
_PREFIX = "/rest"
_PLACEHOLDER = "$input.getDefaultValue()"
_VALUE = re.compile(r"[0-9.,A-Za-z\-+@/_(): \[\]?&=]+")
_NAME = re.compile(r"[0-9A-Za-z\-_ ]+")
_LIST = "@@"
_MESSAGES = {
    8000: "The request could not be carried out",
    8001: "Not implemented",
    8002: "Bad credentials",
    8003: "No credentials",
    8004: "The account cannot be used",
    8005: "The pipeline identifier is not valid",
    8007: "There is no such pipeline",
    8008: "You may not use this pipeline",
    8009: "A field is not valid",
    8013: "You may not access this path",
    8015: "The execution was deleted",
    8016: "This is not an example",
    8018: "An input is missing",
    8019: "The execution name is not valid",
    8020: "The execution cannot be made",
    2000: "The platform runs as many executions as it can",
    2001: "You have as many running executions as you may have",
}


def error_response(error: ApiError) -> JSONResponse:
    """Return the answer for an error; the official client relies on the order of its two keys."""
    body: dict[str, Any] = {"errorCode": error.code, "errorMessage": error.message}
    if error.detail is not None:
        body["errorDetail"] = error.detail
    return JSONResponse(body, error.status)


class SecuredApi:
    """The API behind its authentication.

    Args:
        users: who has a key.
        app: the API.
    """

    def __init__(self, users: Users, app: ASGIApp) -> None:
        self._users = users
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the user in `scope["state"]`."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path: str = scope["path"].removeprefix(_PREFIX)
        user: User | None = None
        answer: Response | None = None
        if b"apikey" in headers:
            user = self._users.with_key(headers[b"apikey"])
            if user is None:
                answer = _unauthorized(8002)
            elif user.locked:
                answer = _unauthorized(8004)
        elif headers.get(b"authorization", "").lower().startswith("bearer "):
            answer = _unauthorized(8002)
        elif not _is_public(scope["method"], path, scope["query_string"]):
            answer = _unauthorized(8003)
        if answer is None and re.fullmatch("/executions/[^/]+/summary/?", path) and not (user and user.service):
            answer = HTMLResponse(_FORBIDDEN, 403)
        if answer is not None:
            await answer(scope, receive, send)
            return
        if not path.startswith("/path/"):
            # The portal does not mind a slash at the end.
            scope = {**scope, "path": _PREFIX + (path.rstrip("/") or "/")}
        scope.setdefault("state", {})["user"] = user
        await self._app(scope, receive, send)


_FORBIDDEN = (
    "<!doctype html><html><head><title>HTTP Status 403 - Forbidden</title></head>"
    "<body><h1>HTTP Status 403 - Forbidden</h1></body></html>"
)


def _is_public(method: str, path: str, query: bytes) -> bool:
    if path.rstrip("/") in ("/platform", "/authenticate", "/session"):
        return True
    return method == "GET" and path == "/pipelines" and query == b"public"


def _unauthorized(code: int) -> JSONResponse:
    answer = error_response(ApiError(code, _MESSAGES[code], 401))
    answer.headers["WWW-Authenticate"] = "header; header-name=apikey"
    return answer


class _WholeFile(FileResponse):
    """A file that is always sent whole."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_ranges(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"accept-ranges"]
            await send(message)

        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, without_ranges)


def file_response(path: Path, switches: VipSwitches, media_type: str) -> Response:
    """Return an answer that streams a file from disk."""
    kind = FileResponse if switches.ranges else _WholeFile
    return kind(path, media_type=media_type)


async def read_json(request: Request, *, media_type: str = "json") -> Any:
    """Return the JSON body of a request.

    Raises:
        ApiError: 8000, with 415 for another content type.
    """
    if media_type not in request.headers.get("content-type", ""):
        await request.body()
        raise refused("not sent as JSON", 415)
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise refused("the body is not JSON") from error


def _fields(body: Any, *required: str) -> dict[str, Any]:
    """Check that a body is an object with the required fields.

    Raises:
        ApiError: 8000 or 8009.
    """
    if not isinstance(body, dict):
        raise refused("the body is not an object")
    for name in required:
        if body.get(name) is None:
            raise ApiError(8009, f"The field {name} is not valid: it must be given.")
    return body


def _text(value: object) -> str:
    """Write a JSON value as Java does."""
    if value is None:
        raise refused("a null among the values", 500)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e7:
        sign, digits, _ = Decimal(repr(value)).as_tuple()
        text = "".join(map(str, digits)).rstrip("0")
        return f"{'-' * sign}{text[0]}.{text[1:] or '0'}E{Decimal(repr(value)).adjusted()}"
    if isinstance(value, list):
        return f"[{', '.join(_text(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}={_text(one)}" for name, one in value.items()) + "}"
    return str(value)


@dataclass(frozen=True)
class Portal:
    """What the routes need.

    Attributes:
        users: who may use it.
        storage: the files.
        engine: the executions.
        switches: of the sandbox.
        girder: known as an external storage.
    """

    users: Users
    storage: Storage
    engine: Engine
    switches: VipSwitches
    girder: Girder


routes: Routes[Portal] = Routes(_PREFIX)


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    for note in getattr(error, "__notes__", []):
        annotate(request, note)
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return error_response(refused(str(error.detail), error.status_code))


def build(portal: Portal) -> FastAPI:
    """Build the API."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ClientDisconnect)(client_went_away)
    return routes.put_into(app, portal)


def user_of(request: Request) -> User:
    """Return who sent a request."""
    user: User = request.state.user
    return user


# Platform and accounts


@routes.add("/platform", *_ANY)
async def platform(portal: Portal, request: Request) -> dict[str, Any]:
    return {
        "platformName": "VIP sandbox",
        "APIErrorCodesAndMessages": [
            {"errorCode": code, "errorMessage": message} for code, message in _MESSAGES.items()
        ],
        "supportedTransferProtocols": ["http", "https"],
        "supportedModules": ["Processing", "Data"],
        "defaultLimitListExecutions": _LIMIT,
        "email": "support@example.org",
        "platformDescription": "The Virtual Imaging Platform on loopback",
        "unsupportedMethods": ["playExecution"],
        "supportedAPIVersion": "0.3",
        "maxSizeDirectTransfer": portal.switches.max_direct_transfer_bytes,
        "oidcLoginProviders": [],
    }


@routes.add("/authenticate", "POST")
@routes.add("/session", "POST")
async def authenticate(portal: Portal, request: Request) -> Response:
    body = _fields(await read_json(request), "username", "password")
    for user in portal.users:
        if user.email == body["username"] and portal.users.password(user) == body["password"]:
            return JSONResponse({"httpHeader": "apikey", "httpHeaderValue": portal.users.key(user)})
    return error_response(ApiError(8002, _MESSAGES[8002], 401))


@routes.add("/user/externalKeys", "GET")
async def external_keys(portal: Portal, request: Request) -> list[dict[str, str]]:
    user = user_of(request)
    return [
        {"storageIdentifier": storage_id, "userEmail": user.email, "apiKey": key}
        for storage_id, key in user.external_keys.items()
    ]


@routes.add("/user/externalKeys", "PUT")
async def add_external_key(portal: Portal, request: Request) -> Response:
    body = _fields(await read_json(request), "storageIdentifier", "apiKey")
    if body["storageIdentifier"] != GIRDER_STORAGE:
        raise refused("no such external storage")
    user_of(request).external_keys[body["storageIdentifier"]] = body["apiKey"]
    return Response(status_code=204)


@routes.add("/user/externalKeys/{storage_id}", "DELETE")
async def remove_external_key(portal: Portal, request: Request, storage_id: str) -> Response:
    user_of(request).external_keys.pop(storage_id, None)
    return Response(status_code=204)


@routes.add("/externalPlatforms", "GET")
async def external_platforms(portal: Portal, request: Request) -> list[dict[str, Any]]:
    return [
        {
            "identifier": GIRDER_STORAGE,
            "type": "GIRDER",
            "description": "The Girder of the sandbox",
            "url": portal.girder.url + "/girder",
        }
    ]


# Pipelines


@routes.add("/pipelines", *_ANY)
async def pipelines(portal: Portal, request: Request) -> Any:
    query = request.query_params
    if "public" in query:
        return [_brief(one) for one in PIPELINES.values() if one.visible and one.public]
    if "pipelineId" in query:
        return _definition(_usable(query["pipelineId"], user_of(request)), portal.switches)
    groups = set(user_of(request).groups)
    return [_brief(one) for one in PIPELINES.values() if one.visible and groups & set(one.groups)]


@routes.add("/pipelines/{identifier:path}", *_ANY)
async def pipeline(portal: Portal, request: Request, identifier: str) -> dict[str, Any]:
    found = _usable(identifier, user_of(request))
    if request.query_params.get("format") == "boutiques":
        return found.boutiques()
    return _definition(found, portal.switches)


# Paths


@routes.add("/path/{path:path}", "GET")
async def read_path(portal: Portal, request: Request, path: str) -> Any:
    user, path = user_of(request), "/" + path
    action = request.query_params.get("action")
    if action == "exists":
        return {"exists": portal.storage.exists(user, path)}
    if action == "properties":
        return portal.storage.properties(user, path)
    if action == "list":
        return portal.storage.listing(user, path)
    if action == "content":
        found = await portal.storage.fetch(user, path)
        return file_response(found, portal.switches, "application/octet-stream")
    if action == "md5":
        raise refused("md5 is not implemented")
    raise refused(f"no action {action!r}")


@routes.add("/path/{path:path}", "PUT")
async def write_path(portal: Portal, request: Request, path: str) -> Response:
    user, path = user_of(request), "/" + path
    if "application/carmin+json" in request.headers.get("content-type", ""):
        body = _fields(await read_json(request, media_type="carmin+json"), "base64Content", "type")
        if body["type"] != "File":
            raise refused("archives are not supported")
        try:
            content = base64.b64decode(body["base64Content"], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise refused("not base64") from error
        await portal.storage.store_content(user, path, content)
    else:
        annotate(request, await portal.storage.upload(user, path, _stream(request)))
    return Response(status_code=201)


@routes.add("/path/{path:path}", "DELETE")
async def delete_path(portal: Portal, request: Request, path: str) -> Response:
    portal.storage.delete(user_of(request), "/" + path)
    return Response(status_code=204)


# Executions


def own(portal: Portal, request: Request, identifier: str) -> Execution:
    found = portal.engine.find(identifier)
    if found is None or found.owner is not user_of(request):
        raise refused("no such execution, or of somebody else")
    return found


def shown(portal: Portal, execution: Execution) -> dict[str, Any]:
    if not execution.cleaned:
        portal.engine.refresh(execution)
    if execution.cleaned:
        raise ApiError(8015, f"The execution {execution.identifier} does not exist any more.")
    return portal.engine.describe(execution, summary=False)


@routes.add("/executions", "POST")
async def launch(portal: Portal, request: Request) -> dict[str, Any]:
    user = user_of(request)
    body = _fields(await read_json(request), "name", "pipelineIdentifier")
    given = body.get("inputValues", {})
    if given is None:
        raise ApiError(8009, "The field inputValues is not valid: it must be given.")
    if not isinstance(given, dict):
        raise refused("inputValues is not an object")
    texts = {name: _checked(name, value) for name, value in given.items()}
    if body.get("resultsLocation") is not None:
        texts[RESULTS_DIRECTORY] = _text(body["resultsLocation"])
    name = _execution_name(body["name"])
    found = _usable(_text(body["pipelineIdentifier"]), user)
    _complete(found, texts)
    async with portal.engine.launching:
        await asyncio.sleep(portal.switches.launch_seconds)
        # The portal looks at the number of running executions before it looks at the files.
        portal.engine.check_capacity(user)
        values = {
            parameter: [transformed(portal, found, user, parameter, one.strip()) for one in text.split(_LIST)]
            for parameter, text in texts.items()
        }
        execution = portal.engine.launch(user, found, values, name)
    annotate(request, execution.identifier)
    return shown(portal, execution)


def transformed(portal: Portal, found: Pipeline, user: User, name: str, value: str) -> str:
    parameter = found.parameter(name)
    if name != RESULTS_DIRECTORY and (parameter is None or parameter.kind != "File"):
        return value
    if re.match(r"\w+:", value):
        storage_id, _, identifier = value.partition(":")
        if storage_id == "file":
            return value
        if storage_id != GIRDER_STORAGE:
            raise refused("no such external storage")
        uri = portal.girder.results_uri if name == RESULTS_DIRECTORY else portal.girder.input_uri
        return uri(user.external_keys.get(storage_id), identifier)
    if not portal.storage.may_be_input(user, value):
        raise refused("an input of another user or group")
    return value


@routes.add("/executions", *[verb for verb in _ANY if verb != "POST"])
async def list_executions(portal: Portal, request: Request) -> list[dict[str, Any]]:
    query = request.query_params
    if "offset" in query or "studyIdentifier" in query:
        raise refused("offset and studyIdentifier are not supported")
    try:
        limit = int(query.get("limit", _LIMIT))
    except ValueError as error:
        raise refused("limit is not a number") from error
    if limit > _LIMIT:
        raise refused("limit is too high")
    found = portal.engine.of(user_of(request))
    for execution in found:
        portal.engine.refresh(execution)
    # The portal compares after adding: even a limit of 0 gives one.
    return [portal.engine.describe(one, summary=True) for one in found[: max(1, limit)]]


@routes.add("/executions/count", *_ANY)
async def count_executions(portal: Portal, request: Request) -> Response:
    if "studyIdentifier" in request.query_params:
        raise refused("studyIdentifier is not supported")
    found = portal.engine.of(user_of(request))
    for execution in found:
        portal.engine.refresh(execution)
    return PlainTextResponse(str(len(found)))


@routes.add("/executions/examples", *_ANY)
async def list_examples(portal: Portal, request: Request) -> list[dict[str, Any]]:
    return [portal.engine.describe(one, summary=True) for one in portal.engine.examples()]


@routes.add("/executions/examples/{identifier}", *_ANY)
async def example(portal: Portal, request: Request, identifier: str) -> dict[str, Any]:
    found = portal.engine.find(identifier)
    if found is None:
        raise refused("no such execution")
    shown(portal, found)
    if not found.example:
        raise ApiError(8016, f"The execution {identifier} is not an example.")
    return portal.engine.describe(found, summary=False)


@routes.add("/executions/{identifier}", "PUT")
async def rename(portal: Portal, request: Request, identifier: str) -> dict[str, Any]:
    body = _fields(await read_json(request), "name", "pipelineIdentifier")
    found = own(portal, request, identifier)
    timeout = body.get("timeout") or 0
    if not isinstance(timeout, int) or timeout > 0:
        raise refused("the timeout cannot be changed")
    found.name = _execution_name(body["name"])
    return shown(portal, found)


# DELETE comes here, too: it looks like a success and does nothing.
@routes.add("/executions/{identifier}", *[verb for verb in _ANY if verb != "PUT"])
async def get_execution(portal: Portal, request: Request, identifier: str) -> dict[str, Any]:
    return shown(portal, own(portal, request, identifier))


@routes.add("/executions/{identifier}/summary", *_ANY)
async def summary(portal: Portal, request: Request, identifier: str) -> dict[str, Any]:
    found = portal.engine.find(identifier)
    if found is None:
        raise refused("no such execution")
    shown(portal, found)
    return portal.engine.describe(found, summary=True)


@routes.add("/executions/{identifier}/results", *_ANY)
async def results(portal: Portal, request: Request, identifier: str) -> list[dict[str, Any]]:
    found = own(portal, request, identifier)
    paths = portal.engine.results(found)
    await asyncio.sleep(portal.switches.results_seconds * len(paths))
    return [portal.storage.properties(user_of(request), path) for path in paths]


@routes.add("/executions/{identifier}/stdout", *_ANY)
@routes.add("/executions/{identifier}/stderr", *_ANY)
async def log(portal: Portal, request: Request, identifier: str) -> Response:
    jobs = own(portal, request, identifier).jobs
    if not jobs:
        return PlainTextResponse("no log found")
    if len(jobs) > 1:
        return PlainTextResponse("there are several jobs: a job id is needed")
    return PlainTextResponse(_log(jobs[0], request))


@routes.add("/executions/{identifier}/jobs/{number}/stdout", *_ANY)
@routes.add("/executions/{identifier}/jobs/{number}/stderr", *_ANY)
async def job_log(portal: Portal, request: Request, identifier: str, number: str) -> Response:
    jobs = own(portal, request, identifier).jobs
    if not re.fullmatch(r"-?[0-9]+", number):
        raise refused("the job id is not a number")
    job = next((job for job in jobs if job.number == int(number)), None)
    return PlainTextResponse("no log found for this job" if job is None else _log(job, request))


@routes.add("/executions/{identifier}/play", "PUT")
async def play(portal: Portal, request: Request, identifier: str) -> Response:
    raise ApiError(8001, "playExecution is not implemented.")


@routes.add("/executions/{identifier}/kill", "PUT")
async def kill(portal: Portal, request: Request, identifier: str) -> Response:
    portal.engine.kill(own(portal, request, identifier))
    return Response(status_code=204)


@routes.add("/executions/{identifier}/delete", "PUT")
async def delete_execution(portal: Portal, request: Request, identifier: str) -> Response:
    body = _fields(await read_json(request), "deleteFiles")
    found = own(portal, request, identifier)
    if found.cleaned or found.status not in (Status.FINISHED, Status.KILLED):
        raise refused(f"status {found.status}")
    portal.engine.clean(found)
    if body["deleteFiles"] is True:
        for path in portal.engine.results(found):
            try:
                portal.storage.delete(user_of(request), path)
            except ApiError:
                annotate(request, f"{path} was gone")
    return Response(status_code=204)


async def _stream(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _log(job: Job, request: Request) -> str:
    return job.stdout if request.url.path.endswith("/stdout") else job.stderr


def _usable(identifier: str, user: User) -> Pipeline:
    """Return a pipeline the user may run.

    Raises:
        ApiError: 8005, 8007 or 8008.
    """
    if "/" not in identifier:
        raise ApiError(8005, f"{identifier} is not a pipeline identifier.")
    found = PIPELINES.get(identifier)
    if found is None or not found.visible:
        raise ApiError(8007, f"There is no pipeline {identifier}.")
    if not set(found.groups) & set(user.groups):
        raise ApiError(8008, f"You may not use the pipeline {identifier}.")
    return found


def _brief(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "identifier": pipeline.identifier,
        "name": pipeline.name,
        "description": None,
        "version": pipeline.version,
        "canExecute": True,
        "parameters": [],
    }


def _definition(pipeline: Pipeline, switches: VipSwitches) -> dict[str, Any]:
    def default(parameter: Parameter) -> object:
        if parameter.default is None and switches.placeholder_defaults:
            return _PLACEHOLDER
        return parameter.default

    parameters = [
        {
            "name": parameter.name,
            "type": "List" if parameter.is_list else parameter.kind,
            "isOptional": parameter.optional,
            "isReturnedValue": False,
            "defaultValue": default(parameter),
            "description": parameter.description,
        }
        for parameter in pipeline.parameters
    ]
    return {**_brief(pipeline), "description": pipeline.description, "parameters": parameters}


def _checked(name: str, value: object) -> str:
    """Write the values of a parameter as one text.

    Raises:
        ApiError: 8009 for a character that is not allowed, 500 for a null.
    """
    texts = [_text(one) for one in value] if isinstance(value, list) else [_text(value)]
    for text in texts:
        if not _VALUE.fullmatch(text):
            raise ApiError(8009, f"The field {name} is not valid: it has characters that are not allowed.")
    return _LIST.join(texts)


def _execution_name(name: object) -> str:
    text = _text(name)
    if not _NAME.fullmatch(text):
        raise ApiError(8019, "The execution name may have letters, digits, spaces, - and _ only.")
    return text


def _complete(pipeline: Pipeline, texts: dict[str, str]) -> None:
    """Fill in the defaults.

    Raises:
        ApiError: 8018 when a required input is missing.
    """
    for parameter in pipeline.parameters:
        if parameter.name in texts:
            continue
        if parameter.default is not None:
            texts[parameter.name] = _text(parameter.default)
        elif not parameter.optional:
            raise ApiError(8018, f"The input {parameter.name} is missing.")
    texts.setdefault(RESULTS_DIRECTORY, f"{ROOT}/Home")
