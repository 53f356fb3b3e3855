"""CARMIN-server, profile `carmin`: the same protocol as VIP, and nearly everything different."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import json
import mimetypes
import posixpath
import random
import shutil
import tarfile
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response

from prefect_biomed.sandbox._routes import Routes, client_went_away
from prefect_biomed.sandbox.vip._api import error_response, file_response
from prefect_biomed.sandbox.vip._model import ApiError, Status, User, Users, VipSwitches, job_is_stopped
from prefect_biomed.sandbox.vip._pipelines import PIPELINES, Call, Pipeline, Stamps, ToolFailed

_EXECUTIONS = "executions"
_HIDDEN = ".carmin-files"
_LIMIT = 10
_MINIMUM_TIMEOUT = 2
_COMPLETED = (Status.FINISHED, Status.EXECUTION_FAILED, Status.UNKNOWN, Status.KILLED)
_MESSAGES = {
    1: "Something unexpected happened",
    10: "The model is not valid",
    20: "The header apiKey is missing",
    25: "The apiKey is not valid",
    30: "The user name or the password is wrong",
    35: "propertyValue needs a property",
    45: "You may not do this",
    50: "The path is not valid",
    55: "There is something of that name",
    56: "There is nothing of that name",
    60: "There is no such action",
    65: "Directories have no md5",
    70: "Files have no list",
    75: "This is a directory",
    85: "An action is needed",
    90: "This is not a zip archive",
    95: "This is not base64",
    100: "The identifier is given by the server",
    105: "There is no such execution",
    110: "An input file does not exist",
    115: "The pipeline identifier is not valid",
    125: "The field cannot be changed",
    130: "The execution was created, but its initialization failed",
    135: "The execution was played before",
    140: "The timeout is not valid",
    145: "The execution does not run",
    150: "The execution is about to end",
    155: "The execution has not ended",
    404: "There is no such page",
}


def _error(code: int, status: int = 400, detail: object = None) -> ApiError:
    return ApiError(code, f"{_MESSAGES[code]}.", status, detail)


def identifier_of(pipeline: Pipeline) -> str:
    """Return the identifier CARMIN-server gives a pipeline: a file name."""
    return "boutiques_" + pipeline.identifier.replace("/", "_").replace(" ", "_") + ".json"


@dataclass
class _Execution:
    identifier: str
    name: str
    owner: User
    pipeline: Pipeline
    values: dict[str, Any]
    files: dict[str, Path]
    number: int
    folder: Path
    timeout: int | None
    status: Status = Status.INITIALIZING
    started: int | None = None
    ended: int | None = None
    stopped: threading.Event = field(default_factory=threading.Event)


def _now() -> int:
    return round(time.time() * 1000)


class CarminServer:
    """The server: files and executions.

    Args:
        seed: identifiers and noise are derived from it.
        directory: where everything is kept.
        users: the accounts; the one with the SERVICE role is the administrator.
        switches: of the sandbox.
    """

    def __init__(self, seed: int, directory: Path, users: Users, switches: VipSwitches) -> None:
        self.root = directory
        self.users = users
        self._seed = seed
        self.switches = switches
        self._random = random.Random(f"{seed}/carmin")
        self._stamps = Stamps()
        self._lock = threading.RLock()
        self._executions: dict[str, _Execution] = {}
        self._threads: list[threading.Thread] = []
        self.pipelines = {identifier_of(one): one for one in PIPELINES.values() if one.visible}
        for user in users:
            (self.root / user.name / _EXECUTIONS).mkdir(parents=True, exist_ok=True)

    def stop(self) -> None:
        """Kill everything and wait for it."""
        with self._lock:
            for execution in self._executions.values():
                execution.stopped.set()
        for thread in self._threads:
            thread.join()

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give what a new process needs to go on, and change nothing meanwhile."""
        with self._lock:
            yield {"random": self._random, "executions": self._executions}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `frozen` gave. What ran ended with the server and says Running for ever."""
        self._random, self._executions = state["random"], state["executions"]

    # Files

    def place(self, path: str) -> Path:
        """Return where a path is kept, `..` resolved; it may be outside of everything."""
        return Path(posixpath.normpath(posixpath.join(self.root, path.lstrip("/"))))

    def may_read(self, user: User, place: Path) -> bool:
        """Tell whether a path is inside of what a user sees."""
        return place.is_relative_to(self.root if user.service else self.root / user.name)

    def may_write(self, user: User, place: Path) -> bool:
        """Tell whether a user may make or change a path: not in the results, not without a parent."""
        results = self.root / user.name / _EXECUTIONS
        return self.may_read(user, place) and not place.is_relative_to(results) and place.parent.exists()

    def describe(self, place: Path, base: str) -> dict[str, Any]:
        """Return the path object."""
        directory = place.is_dir()
        parts = place.relative_to(self.root).parts
        size = sum(one.stat().st_size for one in place.rglob("*") if one.is_file()) if directory else 0
        found: dict[str, Any] = {
            "platformPath": f"{base}path/{'/'.join(parts)}",
            "lastModificationDate": int(place.stat().st_mtime),
            "isDirectory": directory,
            "size": size if directory else place.stat().st_size,
        }
        if len(parts) > 2 and parts[1] == _EXECUTIONS:
            found["executionId"] = parts[2]
        if not directory and (mime := mimetypes.guess_type(place.name)[0]):
            found["mimeType"] = mime
        return found

    # Executions

    def find(self, identifier: str) -> _Execution:
        """Return an execution.

        Raises:
            ApiError: 105 when there is none.
        """
        with self._lock:
            if identifier not in self._executions:
                raise _error(105)
            return self._executions[identifier]

    def of(self, owner: User) -> list[_Execution]:
        """Return the executions of a user, newest first."""
        with self._lock:
            return [one for one in reversed(self._executions.values()) if one.owner is owner]

    def create(self, owner: User, body: dict[str, Any], base: str) -> _Execution:
        """Make an execution, which is to be played.

        Raises:
            ApiError: 100, 110, 115, 140; 130 or 500 when the execution is there all the same.
        """
        if body.get("identifier"):
            raise _error(100)
        pipeline = self.pipelines.get(body["pipelineIdentifier"])
        if pipeline is None:
            raise _error(115)
        given = body["inputValues"]
        prefix = len(f"{base}path/")
        files: dict[str, Path] = {}
        lists = False
        for parameter in pipeline.parameters:
            value = given.get(parameter.name)
            if parameter.kind != "File" or parameter.name not in given:
                continue
            lists = lists or isinstance(value, list)
            for one in value if isinstance(value, list) else [value]:
                if not isinstance(one, str):
                    raise _error(1, 500)
                # The server takes a URL of its own for granted and cuts off what it would begin with.
                files[parameter.name] = self.place(one[prefix:])
                if not files[parameter.name].exists():
                    raise _error(110, detail=one)
        timeout = body.get("timeout")
        if timeout and timeout < _MINIMUM_TIMEOUT:
            raise _error(140)
        with self._lock:
            identifier = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
            folder = self.root / owner.name / _EXECUTIONS / identifier
            (folder / _HIDDEN).mkdir(parents=True)
            number = 1 + sum(one.pipeline.name == pipeline.name for one in self._executions.values())
            execution = _Execution(
                identifier, body["name"], owner, pipeline, given, files, number, folder, timeout or None
            )
            self._executions[identifier] = execution
        if lists:
            # A list for a file breaks the server after the execution was stored.
            raise _error(1, 500)
        problem = _invalid(pipeline, given)
        if problem:
            execution.status = Status.INITIALIZATION_FAILED
            raise ApiError(130, f"The execution {identifier} was created, but is not valid.", 400, problem)
        return execution

    def play(self, execution: _Execution) -> None:
        """Start an execution.

        Raises:
            ApiError: 135 when it was started before.
        """
        with self._lock:
            if execution.status is not Status.INITIALIZING:
                raise ApiError(135, f"The execution was played before, its status is {execution.status}.")
            execution.status, execution.started = Status.RUNNING, _now()
            thread = threading.Thread(target=self._run, args=(execution,), name=f"sandbox-{execution.identifier}")
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _run(self, execution: _Execution) -> None:
        call = Call(
            values={name: _text(value) for name, value in _with_defaults(execution).items()},
            files=execution.files,
            folder=execution.folder,
            switches=self.switches,
            random=random.Random(f"{self._seed}/{execution.identifier}"),
            execution_number=execution.number,
            stopped=execution.stopped,
            stamp=self._stamps.next(),
            stdout=[f"{execution.pipeline.identifier}: execution report"],
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            execution.stopped.set()

        timer = threading.Timer(execution.timeout or 16384, stop)
        timer.start()
        try:
            if not job_is_stopped(execution.stopped, self.switches):
                for files in execution.pipeline.tool(call).values():
                    for name, source in files:
                        target = execution.folder / name.lstrip("/")
                        target.parent.mkdir(parents=True, exist_ok=True)
                        # Inputs stay where they are; what the tool wrote gets its name.
                        if source.is_relative_to(execution.folder):
                            source.replace(target)
                        else:
                            shutil.copyfile(source, target)
        except ToolFailed as error:
            call.stderr.append(str(error))
            call.stdout.append(f"exit code {error.exit_status}")
        except Exception as error:  # a directory for a file, and the like: the tool fails, and that is all
            call.stderr.append(repr(error))
            call.stdout.append("exit code 1")
        finally:
            timer.cancel()
            timer.join()
        if timed_out.is_set():
            call.stderr.append(f"timed out after {execution.timeout} seconds")
        (execution.folder / _HIDDEN / "stdout.txt").write_text("\n".join(call.stdout), encoding="utf-8")
        (execution.folder / _HIDDEN / "stderr.txt").write_text("\n".join(call.stderr), encoding="utf-8")
        with self._lock:
            if execution.status is Status.RUNNING:
                # Finished says only that the tool has run, whatever its exit code.
                execution.status = Status.EXECUTION_FAILED if timed_out.is_set() else Status.FINISHED
                execution.ended = _now()

    def kill(self, execution: _Execution) -> None:
        """Kill a running execution.

        Raises:
            ApiError: 145 when it does not run.
        """
        with self._lock:
            if execution.status is not Status.RUNNING:
                raise ApiError(145, f"The execution does not run, its status is {execution.status}.")
            execution.status, execution.ended = Status.KILLED, _now()
            execution.stopped.set()

    def remove(self, execution: _Execution) -> None:
        """Forget an execution and remove its files."""
        with self._lock:
            execution.stopped.set()
            self._executions.pop(execution.identifier, None)
        shutil.rmtree(execution.folder, ignore_errors=True)

    def results(self, execution: _Execution) -> list[Path]:
        """Return the files an execution has written."""
        found = (one for one in sorted(execution.folder.rglob("*")) if one.is_file())
        return [one for one in found if _HIDDEN not in one.parts]


def _with_defaults(execution: _Execution) -> dict[str, Any]:
    defaults = {one.name: one.default for one in execution.pipeline.parameters if one.default is not None}
    return {**defaults, **execution.values}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return " ".join(_text(one) for one in value)
    return str(value)


def _invalid(pipeline: Pipeline, values: dict[str, Any]) -> str | None:
    """Check values as Boutiques does an invocation: types are strict. Return what is wrong."""
    for name, value in values.items():
        parameter = pipeline.parameter(name)
        if parameter is None:
            return f"Additional properties are not allowed ({name!r} was unexpected)"
        kinds: tuple[type, ...] = {
            "File": (str,),
            "String": (str,),
            "Boolean": (bool,),
            "Int64": (int,),
            "Double": (int, float),
        }[parameter.kind]
        if parameter.is_list and not isinstance(value, list):
            return f"{value!r} is not of type 'array'"
        for one in value if parameter.is_list else [value]:
            if not isinstance(one, kinds) or (isinstance(one, bool) and parameter.kind != "Boolean"):
                return f"{one!r} is not of the type of {name}"
    for parameter in pipeline.parameters:
        if parameter.name not in values and not parameter.optional and parameter.default is None:
            return f"{parameter.name!r} is a required property"
    return None


def _definition(identifier: str, pipeline: Pipeline) -> dict[str, Any]:
    inputs = [
        {
            "id": parameter.name,
            "name": parameter.name.replace("_", " ").title(),
            "type": "List" if parameter.is_list else parameter.kind,
            "isOptional": parameter.optional,
            "isReturnedValue": False,
            "description": parameter.description,
        }
        | ({} if parameter.default is None else {"defaultValue": _text(parameter.default)})
        for parameter in pipeline.parameters
    ]
    outputs = [
        {
            "id": name,
            "name": name.replace("_", " ").title(),
            "type": "File",
            "isOptional": False,
            "isReturnedValue": True,
            "description": text,
        }
        for name, text in pipeline.outputs.items()
    ]
    return {
        "identifier": identifier,
        "name": pipeline.name,
        "version": pipeline.version,
        "description": pipeline.description,
        "canExecute": True,
        "parameters": inputs + outputs,
        "properties": {},
    }


routes: Routes[CarminServer] = Routes()


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    if error.status_code == 404:
        return error_response(_error(404, 404))
    return JSONResponse({"message": str(error.detail)}, error.status_code)


def build(server: CarminServer) -> FastAPI:
    """Build the API of the server."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.exception_handler(ApiError)(_api_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(ClientDisconnect)(client_went_away)
    return routes.put_into(app, server)


def base(request: Request) -> str:
    return str(request.base_url)


def user_of(server: CarminServer, request: Request) -> User:
    key = request.headers.get("apikey")
    if key is None:
        raise _error(20, 401)
    user = server.users.with_key(key)
    if user is None:
        raise _error(25, 401)
    return user


async def model(request: Request, **required: type) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError:
        body = None
    if not isinstance(body, dict) or not body:
        raise _error(10)
    wrong = {
        name: ["Missing data for required field." if name not in body else "Not a valid value."]
        for name, kind in required.items()
        if not isinstance(body.get(name), kind)
    }
    if wrong:
        raise _error(10, detail=wrong)
    return body


# Platform


@routes.add("/platform", "GET")
async def platform(server: CarminServer, request: Request) -> dict[str, Any]:
    return {
        "platformName": "CARMIN sandbox",
        # The server spells the name of this field so.
        "APIErrorCodesAndMessage": [
            {"errorCode": code, "errorMessage": message} for code, message in _MESSAGES.items()
        ],
        "supportedTransferProtocols": ["http", "https"],
        "supportedModules": ["Processing", "Data", "AdvancedData"],
        "defaultLimitListExecutions": _LIMIT,
        "email": "support@example.org",
        "platformDescription": "CARMIN-server on loopback",
        "minAuthorizedExecutionTimeout": _MINIMUM_TIMEOUT,
        "maxAuthorizedExecutionTimeout": 0,
        "defaultExecutionTimeout": 16384,
        "unsupportedMethods": ["Management", "Commercial"],
        "supportedAPIVersion": "0.3",
        "supportedPipelineProperties": [],
    }


@routes.add("/authenticate", "POST")
async def authenticate(server: CarminServer, request: Request) -> dict[str, str]:
    body = await model(request, username=str, password=str)
    user = server.users.named(body["username"])
    if user is None or server.users.password(user) != body["password"]:
        raise _error(30)
    return {"httpHeader": "apiKey", "httpHeaderValue": server.users.key(user)}


# Pipelines


@routes.add("/pipelines", "GET")
async def pipelines(server: CarminServer, request: Request) -> list[dict[str, Any]]:
    user_of(server, request)
    if "propertyValue" in request.query_params and "property" not in request.query_params:
        raise _error(35)
    if "property" in request.query_params:
        return []
    return [_definition(identifier, one) for identifier, one in server.pipelines.items()]


@routes.add("/pipelines/{identifier}", "GET")
async def pipeline(server: CarminServer, request: Request, identifier: str) -> dict[str, Any]:
    user_of(server, request)
    if identifier not in server.pipelines:
        raise _error(115)
    return _definition(identifier, server.pipelines[identifier])


@routes.add("/pipelines/{identifier}/boutiquesdescriptor", "GET")
async def descriptor(server: CarminServer, request: Request, identifier: str) -> dict[str, Any]:
    user_of(server, request)
    if identifier not in server.pipelines:
        raise _error(115)
    return server.pipelines[identifier].boutiques()


# Paths


@routes.add("/path/{path:path}", "GET")
async def read_path(server: CarminServer, request: Request, path: str) -> Any:
    user, place = user_of(server, request), server.place(path)
    action = request.query_params.get("action", "").lower()
    if not server.may_read(user, place):
        raise _error(50, 401)
    if action != "exists" and not place.exists():
        raise _error(56, 401)
    if not action:
        raise _error(85)
    if action == "content":
        if place.is_dir():
            packed = await asyncio.to_thread(_packed, place)
            headers = {"Content-Disposition": f"attachment; filename={quote(place.name)}.tar.gz"}
            return Response(packed, media_type="application/gzip", headers=headers)
        kind = mimetypes.guess_type(place.name)[0] or "application/octet-stream"
        return file_response(place, server.switches, kind)
    if action == "properties":
        return server.describe(place, base(request))
    if action == "exists":
        return {"exists": place.exists()}
    if action == "list":
        if not place.is_dir():
            raise _error(70)
        shown = (one for one in sorted(place.iterdir()) if not one.name.startswith("."))
        return [server.describe(one, base(request)) for one in shown]
    if action == "md5":
        if place.is_dir():
            raise _error(65)
        return {"md5": await asyncio.to_thread(_md5, place)}
    raise _error(60)


@routes.add("/path/{path:path}", "PUT")
async def write_path(server: CarminServer, request: Request, path: str) -> Response:
    user, place = user_of(server, request), server.place(path)
    kind = request.headers.get("content-type", "").lower()
    # A form is parsed, not read: the server sees an empty body.
    form = kind.startswith(("application/x-www-form-urlencoded", "multipart/form-data"))
    body = b"" if form and await request.body() else await request.body()
    if not server.may_write(user, place):
        raise _error(50, 401)
    if not body:
        try:
            place.mkdir()
        except FileExistsError as error:
            raise _error(55) from error
        found = server.describe(place, base(request))
        # JSON, but not announced as such.
        return Response(
            json.dumps(found), 201, media_type="text/html", headers={"Location": quote(found["platformPath"], ":/")}
        )
    if kind == "application/carmin+json":
        await model(request, base64Content=str, type=str)
        await asyncio.to_thread(_upload_encoded, place, json.loads(body))
    else:
        try:
            # Bytes that are not UTF-8 are lost.
            place.write_text(body.decode("utf-8", "ignore"), encoding="utf-8", newline="")
        except OSError as error:
            raise _error(50) from error
    return JSONResponse(server.describe(place, base(request)), 201)


@routes.add("/path/{path:path}", "DELETE")
async def delete_path(server: CarminServer, request: Request, path: str) -> Response:
    user, place = user_of(server, request), server.place(path)
    if not server.may_write(user, place) or place == server.root / user.name:
        raise _error(45, 403)
    if place.is_dir():
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
    elif place.exists():
        place.unlink()
    else:
        raise _error(56)
    return Response(status_code=204)


# Executions


def shown(server: CarminServer, execution: _Execution, user: User, request: Request) -> dict[str, Any]:
    if execution.status in _COMPLETED and server.switches.carmin_stock:
        raise _error(1, 500)
    found = {
        "identifier": execution.identifier,
        "name": execution.name,
        "pipelineIdentifier": identifier_of(execution.pipeline),
        "timeout": execution.timeout,
        "status": execution.status,
        # The inputs are looked for below the directory of whoever asks.
        "inputValues": execution.values
        if execution.owner is user
        else {"error": "Error retrieving inputs for execution."},
        "returnedFiles": [server.describe(one, base(request))["platformPath"] for one in server.results(execution)]
        if execution.status in _COMPLETED
        else None,
        "startDate": execution.started,
        "endDate": execution.ended,
    }
    return {name: value for name, value in found.items() if value is not None}


def own(server: CarminServer, request: Request, identifier: str, *, administrator: bool = False) -> _Execution:
    user = user_of(server, request)
    execution = server.find(identifier)
    if execution.owner is not user and not (administrator and user.service):
        raise _error(45)
    return execution


def whole(request: Request, name: str) -> int | None:
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() else None


@routes.add("/executions", "GET")
async def executions(server: CarminServer, request: Request) -> list[dict[str, Any]]:
    user = user_of(server, request)
    offset, limit = whole(request, "offset") or 0, whole(request, "limit") or _LIMIT
    return [shown(server, one, user, request) for one in server.of(user)[offset : offset + limit]]


@routes.add("/executions/count", "GET")
async def count(server: CarminServer, request: Request) -> int:
    return len(server.of(user_of(server, request)))


@routes.add("/executions", "POST")
async def create(server: CarminServer, request: Request) -> dict[str, Any]:
    user = user_of(server, request)
    body = await model(request, name=str, pipelineIdentifier=str, inputValues=dict)
    return shown(server, server.create(user, body, base(request)), user, request)


@routes.add("/executions/{identifier}", "GET")
async def execution(server: CarminServer, request: Request, identifier: str) -> dict[str, Any]:
    user = user_of(server, request)
    return shown(server, server.find(identifier), user, request)


@routes.add("/executions/{identifier}", "PUT")
async def change(server: CarminServer, request: Request, identifier: str) -> Response:
    user_of(server, request)
    body = await model(request)
    for name in ("identifier", "status"):
        if body.get(name):
            raise ApiError(125, f"The field {name} cannot be changed.")
    found = server.find(identifier)
    found.name = body.get("name") or found.name
    found.timeout = body.get("timeout") or found.timeout
    return Response(status_code=204)


@routes.add("/executions/{identifier}", "DELETE")
async def delete(server: CarminServer, request: Request, identifier: str) -> Response:
    found = own(server, request, identifier)
    files = request.query_params.get("deleteFiles", "").lower() in ("true", "1")
    if not files or found.status is Status.RUNNING:
        server.kill(found)
    if files:
        await asyncio.to_thread(server.remove, found)
    return Response(status_code=204)


@routes.add("/executions/{identifier}/play", "PUT")
async def play(server: CarminServer, request: Request, identifier: str) -> Response:
    server.play(own(server, request, identifier))
    return Response(status_code=204)


@routes.add("/executions/{identifier}/kill", "PUT")
async def kill(server: CarminServer, request: Request, identifier: str) -> Response:
    found = own(server, request, identifier, administrator=True)
    if server.switches.carmin_stock:
        raise _error(1, 500)
    server.kill(found)
    return Response(status_code=204)


@routes.add("/executions/{identifier}/results", "GET")
async def results(server: CarminServer, request: Request, identifier: str) -> list[dict[str, Any]]:
    found = own(server, request, identifier, administrator=True)
    if found.status not in _COMPLETED:
        raise ApiError(155, f"The execution has not ended, its status is {found.status}.")
    return [server.describe(one, base(request)) for one in server.results(found)]


@routes.add("/executions/{identifier}/stdout", "GET")
@routes.add("/executions/{identifier}/stderr", "GET")
async def log(server: CarminServer, request: Request, identifier: str) -> Response:
    found = own(server, request, identifier, administrator=True)
    if server.switches.carmin_stock and found.status in _COMPLETED:
        raise _error(1, 500)
    place = found.folder / _HIDDEN / (request.url.path.rpartition("/")[2] + ".txt")
    if not place.exists():
        raise _error(56)
    return PlainTextResponse(place.read_text(encoding="utf-8"))


def _packed(place: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(place, arcname=place.name)
    return buffer.getvalue()


def _md5(place: Path) -> str:
    with place.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _upload_encoded(place: Path, body: dict[str, Any]) -> None:
    """Store the content of an upload in base64; an archive is expanded.

    Raises:
        ApiError: 10, 75, 90, 95.
    """
    if body["type"] not in ("File", "Archive"):
        raise _error(10, detail={"type": ["Invalid value."]})
    if body["type"] == "File" and place.is_dir():
        raise _error(75)
    try:
        content = base64.decodebytes(body["base64Content"].encode())
    except binascii.Error as error:
        raise _error(95) from error
    if body["type"] == "File":
        place.write_bytes(content)
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(place)
    except zipfile.BadZipFile as error:
        raise _error(90) from error
