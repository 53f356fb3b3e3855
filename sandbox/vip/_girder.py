"""A small Girder beside the VIP sandbox: enough of its API for girder-client and for VIP to use it as a storage."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import mimetypes
import random
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response

from prefect_biomed.sandbox._routes import Routes, client_went_away
from prefect_biomed.sandbox.vip._model import User, Users, refused

PREFIX = "/girder/api/v1"
_PAGE = 50
_TOKEN_DAYS = 180.0
_KEPT = ("_random", "_tokens", "_resources", "_uploads", "_owners", "_user_ids")


class GirderError(Exception):
    """An answer that says no.

    Args:
        message: `message` of the body.
        kind: `type` of the body: `rest`, `validation` or `access`.
        status: HTTP status.
        field: `field` of the body, left out when None.
    """

    def __init__(self, message: str, kind: str = "rest", status: int = 400, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"message": message, "type": kind} | ({} if field is None else {"field": field})


@dataclass
class _Upload:
    record: dict[str, Any]
    path: Path


class Girder:
    """The store: users, tokens, collections, folders, items, files. Safe to use from any thread.

    Args:
        seed: keys and identifiers are derived from it.
        directory: where contents are kept.
        users: everyone has an account, with a key of its own.
    """

    def __init__(self, seed: int, directory: Path, users: Users) -> None:
        self._seed = seed
        self._files = directory
        self._files.mkdir(parents=True, exist_ok=True)
        self._users = users
        self._random = random.Random(f"{seed}/girder")
        self._lock = threading.RLock()
        self._tokens: dict[str, tuple[User, float]] = {}
        self._resources: dict[str, dict[str, Any]] = {}
        self._uploads: dict[str, _Upload] = {}
        self._owners: dict[str, str] = {}
        self.url = ""
        self._user_ids = {user.name: self._new_id() for user in users}
        sandbox = self._add("collection", "Sandbox", None)
        for name in ("Inputs", "Results"):
            self._add("folder", name, sandbox)
        closed = self._add("collection", "Restricted", None)
        self._owners[closed["_id"]] = "bob"
        self._add("folder", "Data", closed)

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give what a new process needs to go on, and change nothing meanwhile."""
        with self._lock:
            yield {name: getattr(self, name) for name in _KEPT}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `frozen` gave."""
        for name in _KEPT:
            setattr(self, name, state[name])

    @property
    def api_url(self) -> str:
        """Address of the API."""
        return self.url + PREFIX

    def key(self, user: User) -> str:
        """Return the API key of a user."""
        return hashlib.sha256(f"{self._seed}/{user.name}/girder".encode()).hexdigest()[:40]

    # Accounts

    def token(self, key: str, days: float = _TOKEN_DAYS) -> dict[str, Any]:
        """Return a user and a new token for an API key.

        Raises:
            GirderError: the key is wrong.
        """
        user = next((user for user in self._users if self.key(user) == key), None)
        if user is None:
            raise GirderError("Invalid API key.", "validation")
        return self._session(user, days)

    def log_in(self, name: str, password: str) -> dict[str, Any]:
        """Return a user and a new token for a password.

        Raises:
            GirderError: the password is wrong.
        """
        user = self._users.named(name)
        if user is None or self._users.password(user) != password:
            raise GirderError("Login failed.", "access", 401)
        return self._session(user, _TOKEN_DAYS)

    def _session(self, user: User, days: float) -> dict[str, Any]:
        with self._lock:
            token = "".join(self._random.choices("0123456789abcdefghijklmnopqrstuvwxyz", k=64))
            expires = time.time() + days * 86400
            self._tokens[token] = (user, expires)
        return {
            "user": self.describe_user(user),
            "authToken": {"token": token, "expires": _date(expires), "scope": ["core.user_auth"]},
            "message": "Login succeeded.",
        }

    def describe_user(self, user: User) -> dict[str, Any]:
        """Return the user object."""
        return {
            "_id": self._user_ids[user.name],
            "_modelType": "user",
            "login": user.name,
            "email": user.email,
            "firstName": user.name.title(),
            "lastName": "Sandbox",
            "admin": False,
        }

    def user_of(self, token: str) -> User:
        """Return whose token it is.

        Raises:
            GirderError: nobody's, or expired.
        """
        with self._lock:
            user, expires = self._tokens.get(token, (None, 0.0))
        if user is None or time.time() > expires:
            raise GirderError("You must be logged in.", "access", 401)
        return user

    # Resources

    def _new_id(self) -> str:
        return f"{self._random.getrandbits(96):024x}"

    def _add(
        self, kind: str, name: str, parent: dict[str, Any] | None, creator: User | None = None, **more: Any
    ) -> dict[str, Any]:
        now = _date(time.time())
        record: dict[str, Any] = {
            "_id": self._new_id(),
            "_modelType": kind,
            "name": name,
            "description": "",
            "created": now,
            "updated": now,
            "size": 0,
            "public": True,
            "creatorId": self._user_ids[creator.name] if creator else None,
            "meta": {},
        }
        if parent is not None:
            top = parent if parent["_modelType"] == "collection" else self._resources[parent["baseParentId"]]
            record |= {"baseParentId": top["_id"], "baseParentType": "collection"}
        if kind == "folder" and parent is not None:
            record |= {"parentId": parent["_id"], "parentCollection": parent["_modelType"]}
        elif kind == "item" and parent is not None:
            record["folderId"] = parent["_id"]
        elif kind == "file" and parent is not None:
            record["itemId"] = parent["_id"]
            del record["meta"], record["description"]
        record |= more
        self._resources[record["_id"]] = record
        return record

    def get(self, identifier: str, kind: str, user: User) -> dict[str, Any]:
        """Return a copy of a resource.

        Raises:
            GirderError: no such resource, or the user may not see it.
        """
        with self._lock:
            return json.loads(json.dumps(self._find(identifier, kind, user)))  # type: ignore[no-any-return]  # a dict

    def _find(self, identifier: str, kind: str, user: User) -> dict[str, Any]:
        if not re.fullmatch("[0-9a-f]{24}", identifier):
            raise GirderError(f"Invalid ObjectId: {identifier}", "validation", field="id")
        record = self._resources.get(identifier)
        if record is None or record["_modelType"] != kind:
            raise GirderError(f"Invalid {kind} id ({identifier}).")
        owner = self._owners.get(record.get("baseParentId", identifier))
        if owner not in (None, user.name):
            raise GirderError(f"Read access denied for {kind} {identifier} (user {user.name}).", "access", 403)
        return record

    def children(self, kind: str, parent: str | None) -> list[dict[str, Any]]:
        """Return the resources of a kind directly below a parent, by name."""
        field = {"collection": "", "folder": "parentId", "item": "folderId", "file": "itemId"}[kind]
        with self._lock:
            found = [
                dict(record)
                for record in self._resources.values()
                if record["_modelType"] == kind and (not field or record.get(field) == parent)
            ]
        return sorted(found, key=lambda record: str(record["name"]).lower())

    def lookup(self, path: str, user: User) -> dict[str, Any]:
        """Return the resource at `/collection/NAME/...`.

        Raises:
            GirderError: there is none, or the user may not see it.
        """
        parts = [part for part in path.split("/") if part]
        missing = GirderError(f"Path not found: {path}")
        if len(parts) < 2 or parts[0] != "collection":
            raise missing
        with self._lock:
            current = next((one for one in self.children("collection", None) if one["name"] == parts[1]), None)
            for part in parts[2:]:
                if current is None:
                    break
                kinds = {"item": ["file"], "file": []}.get(current["_modelType"], ["folder", "item"])
                below = [one for kind in kinds for one in self.children(kind, current["_id"])]
                current = next((one for one in below if one["name"] == part), None)
            if current is None:
                raise missing
            return self.get(current["_id"], current["_modelType"], user)

    def path_of(self, record: dict[str, Any]) -> str:
        """Return the path of a resource."""
        parts = [record["name"]]
        with self._lock:
            while record["_modelType"] != "collection":
                kind = record["_modelType"]
                above = record[{"folder": "parentId", "item": "folderId", "file": "itemId"}[kind]]
                record = self._resources[above]
                parts.insert(0, record["name"])
        return "/collection/" + "/".join(parts)

    def create(
        self,
        kind: str,
        name: str,
        parent: dict[str, Any],
        user: User,
        *,
        description: str = "",
        reuse: bool = False,
        meta: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make a folder or an item.

        Args:
            kind: `folder` or `item`.
            name: of the new resource.
            parent: what it is put into.
            user: who makes it.
            description: free text.
            reuse: return the one of that name if there is one.
            meta: its metadata.

        Raises:
            GirderError: the name is empty or taken.
        """
        name = name.strip()
        if not name:
            raise GirderError(f"{kind.title()} name must not be empty.", "validation", field="name")
        with self._lock:
            taken = {
                (other["_modelType"], other["name"]): other
                for other in self.children("folder", parent["_id"]) + self.children("item", parent["_id"])
            }
            if reuse and (kind, name) in taken:
                return taken[kind, name]
            for other in ("folder", "item"):
                if (other, name) in taken:
                    article = "A" if other == "folder" else "An"
                    message = f"{article} {other} with that name already exists here."
                    raise GirderError(message, "validation", field="name")
            made = self._add(kind, name, parent, user, description=description)
            return self.annotate(made["_id"], meta) if meta else dict(made)

    def annotate(self, identifier: str, meta: object, *, allow_null: bool = False) -> dict[str, Any]:
        """Add metadata; a null removes the key unless it is allowed.

        Raises:
            GirderError: not an object, or a key that MongoDB does not take.
        """
        if not isinstance(meta, dict):
            raise GirderError("Invalid JSON passed in request body.")
        for key in meta:
            if not key or "." in key or key.startswith("$"):
                raise GirderError(f"Invalid key {key}: it must not be empty, contain a '.' or begin with '$'.")
        with self._lock:
            record = self._resources[identifier]
            merged = {**record["meta"], **meta}
            record["meta"] = {key: value for key, value in merged.items() if allow_null or value is not None}
            record["updated"] = _date(time.time())
            return dict(record)

    def remove(self, record: dict[str, Any]) -> None:
        """Remove a resource and everything below it."""
        with self._lock:
            for kind in ("folder", "item", "file"):
                for child in self.children(kind, record["_id"]):
                    self.remove(child)
            self._resources.pop(record["_id"], None)
            if record["_modelType"] == "file":
                self.content(record).unlink(missing_ok=True)

    # Contents

    def content(self, record: dict[str, Any]) -> Path:
        """Return where the content of a file is kept."""
        return self._files / str(record["_id"])

    def begin_upload(self, record: dict[str, Any]) -> _Upload:
        """Return a new upload; `record` says where it belongs."""
        with self._lock:
            identifier = self._new_id()
            now = _date(time.time())
            upload = _Upload(
                {"_id": identifier, "received": 0, "created": now, "updated": now, **record},
                self._files / f"{identifier}.part",
            )
            upload.path.touch()
            self._uploads[identifier] = upload
            return upload

    def upload(self, identifier: str) -> _Upload:
        """Return an upload that has begun.

        Raises:
            GirderError: there is none of that id.
        """
        with self._lock:
            if identifier not in self._uploads:
                raise GirderError(f"Invalid upload id ({identifier}).")
            return self._uploads[identifier]

    def cancel_upload(self, identifier: str) -> None:
        """Forget an upload."""
        upload = self.upload(identifier)
        with self._lock:
            del self._uploads[identifier]
        upload.path.unlink(missing_ok=True)

    def received(self, upload: _Upload, user: User) -> dict[str, Any]:
        """Return the file once all of it has arrived, the upload until then.

        Raises:
            GirderError: more has arrived than was announced, or the parent is gone.
        """
        record = upload.record
        size = upload.path.stat().st_size
        record["received"], record["updated"] = size, _date(time.time())
        if size > record["size"]:
            self.cancel_upload(record["_id"])
            raise GirderError("Received too many bytes.", "validation")
        if size < record["size"]:
            return dict(record)
        with self._lock:
            del self._uploads[record["_id"]]
            if "fileId" in record:
                made = self._find(record["fileId"], "file", user)
                made["size"], made["updated"] = size, record["updated"]
            else:
                made = self._new_file(record, size, user)
            upload.path.replace(self.content(made))
            return dict(made)

    def _new_file(self, record: dict[str, Any], size: int, user: User) -> dict[str, Any]:
        name: str = record["name"]
        if record["parentType"] == "folder":
            folder = self._find(record["parentId"], "folder", user)
            names = {one["name"] for kind in ("item", "folder") for one in self.children(kind, folder["_id"])}
            free, number = name, 0
            while free in names:
                number += 1
                free = f"{name} ({number})"
            item = self._add("item", free, folder, user)
        else:
            item = self._find(record["parentId"], "item", user)
        mime = record.get("mimeType") or mimetypes.guess_type(name)[0] or "application/octet-stream"
        item["size"] += size
        return self._add("file", name, item, user, size=size, mimeType=mime, exts=name.lower().split(".")[1:])

    # As an external storage of VIP

    def input_uri(self, key: str | None, identifier: str) -> str:
        """Return the URI under which a job fetches a file, with a token in it.

        Args:
            key: the Girder key the user left on VIP; None when there is none.
            identifier: of a file or folder.

        Raises:
            ApiError: 8000 when the key does not work, or the file is not there.
        """
        try:
            token = self.token(key or "")["authToken"]["token"]
            user = self.user_of(token)
            try:
                name = self.get(identifier, "file", user)["name"]
            except GirderError:
                name = self.get(identifier, "folder", user)["name"]
        except GirderError as error:
            raise refused(f"Girder: {error}") from error
        return self._uri(name, identifier, token)

    def results_uri(self, key: str | None, identifier: str) -> str:
        """Return the URI of a folder for results; whether it exists is not looked at.

        Raises:
            ApiError: 8000 when the key does not work.
        """
        try:
            token = self.token(key or "")["authToken"]["token"]
        except GirderError as error:
            raise refused(f"Girder: {error}") from error
        return self._uri("//", identifier, token)

    def _uri(self, name: str, identifier: str, token: str) -> str:
        return f"girder:/{name}?apiurl={self.api_url}&fileId={identifier}&token={token}"

    def _resolved(self, uri: str) -> tuple[str, str, User]:
        query = parse_qs(urlsplit(uri).query)
        token = query["token"][0]
        return query["fileId"][0], token, self.user_of(token)

    def open_input(self, uri: str, folder: Path) -> Path | None:
        """Copy the file of a URI into a folder; None when that fails."""
        try:
            identifier, _, user = self._resolved(uri)
            record = self.get(identifier, "file", user)
            target = folder / Path(record["name"]).name
            shutil.copyfile(self.content(record), target)
        except (GirderError, KeyError, OSError):
            return None
        return target

    def add_result(self, uri: str, name: str, source: Path) -> str | None:
        """Store a result in the folder of a URI and return the URI of the file; None when that fails."""
        try:
            identifier, token, user = self._resolved(uri)
            self.get(identifier, "folder", user)
            upload = self.begin_upload(
                {
                    "name": name.rpartition("/")[2],
                    "parentType": "folder",
                    "parentId": identifier,
                    "size": source.stat().st_size,
                }
            )
            shutil.copyfile(source, upload.path)
            made = self.received(upload, user)
        except (GirderError, KeyError, OSError):
            return None
        return self._uri(made["name"], made["_id"], token)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


routes: Routes[Girder] = Routes(PREFIX)


async def _girder_error(request: Request, error: GirderError) -> JSONResponse:
    return JSONResponse(error.body, error.status)


async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    route = request.url.path.removeprefix(PREFIX)
    return JSONResponse({"message": f'No matching route for "{request.method} {route}"', "type": "rest"}, 400)


def build(girder: Girder) -> FastAPI:
    """Build the API of a store."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.exception_handler(GirderError)(_girder_error)
    app.exception_handler(HTTPException)(_no_route)
    app.exception_handler(ClientDisconnect)(client_went_away)
    return routes.put_into(app, girder)


def user_of(girder: Girder, request: Request) -> User:
    token = request.headers.get("girder-token") or request.query_params.get("token", "")
    return girder.user_of(token)


def required(request: Request, *names: str) -> list[str]:
    for name in names:
        if name not in request.query_params:
            raise GirderError(f"Parameter '{name}' is required.")
    return [request.query_params[name] for name in names]


def flag(request: Request, name: str) -> bool:
    return request.query_params.get(name, "").lower() in ("true", "1", "on")


def number(request: Request, name: str, default: int | None = None) -> int:
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise GirderError(f"Invalid value for {name}: {text}.") from error


def page(request: Request, found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    name = request.query_params.get("name")
    chosen = [one for one in found if name is None or one["name"] == name]
    offset, limit = number(request, "offset", 0), number(request, "limit", _PAGE)
    return chosen[offset : offset + limit if limit else None]


async def body_json(request: Request) -> object:
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise GirderError("Invalid JSON passed in request body.") from error


def metadata(request: Request) -> dict[str, Any] | None:
    text = request.query_params.get("metadata")
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise GirderError("Parameter metadata must be valid JSON.") from error
    return found


# System and accounts


@routes.add("/system/version", "GET")
async def version(girder: Girder, request: Request) -> dict[str, str]:
    return {"release": "3.2.3", "apiVersion": "3.2.3"}


@routes.add("/api_key/token", "POST")
async def api_key_token(girder: Girder, request: Request) -> dict[str, Any]:
    # Girder takes parameters from the query and from a form alike.
    form = parse_qs((await request.body()).decode(errors="replace"))
    (key,) = form["key"] if "key" in form else required(request, "key")
    return girder.token(key, float(number(request, "duration", int(_TOKEN_DAYS))))


@routes.add("/user/authentication", "GET")
async def authentication(girder: Girder, request: Request) -> dict[str, Any]:
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    try:
        name, _, password = base64.b64decode(encoded).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        name = password = ""
    if scheme.lower() != "basic":
        raise GirderError("Use HTTP Basic Authentication", "access", 401)
    return girder.log_in(name, password)


@routes.add("/user/me", "GET")
async def me(girder: Girder, request: Request) -> dict[str, Any] | None:
    return girder.describe_user(user_of(girder, request))


# Resources


@routes.add("/resource/lookup", "GET")
async def lookup(girder: Girder, request: Request) -> Any:
    (path,) = required(request, "path")
    try:
        return girder.lookup(path, user_of(girder, request))
    except GirderError as error:
        if flag(request, "test") and error.status == 400:
            return None
        raise


@routes.add("/resource/{identifier}/path", "GET")
async def path_of(girder: Girder, request: Request, identifier: str) -> str:
    (kind,) = required(request, "type")
    return girder.path_of(girder.get(identifier, kind, user_of(girder, request)))


@routes.add("/resource/{identifier}", "GET")
async def resource(girder: Girder, request: Request, identifier: str) -> dict[str, Any]:
    (kind,) = required(request, "type")
    return girder.get(identifier, kind, user_of(girder, request))


@routes.add("/collection", "GET")
async def collections(girder: Girder, request: Request) -> list[dict[str, Any]]:
    user = user_of(girder, request)
    seen = []
    for one in girder.children("collection", None):
        try:
            seen.append(girder.get(one["_id"], "collection", user))
        except GirderError:
            continue
    return page(request, seen)


@routes.add("/folder", "GET")
async def folders(girder: Girder, request: Request) -> list[dict[str, Any]]:
    kind, parent = required(request, "parentType", "parentId")
    return page(request, girder.children("folder", girder.get(parent, kind, user_of(girder, request))["_id"]))


@routes.add("/folder", "POST")
async def create_folder(girder: Girder, request: Request) -> dict[str, Any]:
    user = user_of(girder, request)
    parent, name = required(request, "parentId", "name")
    kind = request.query_params.get("parentType", "folder")
    return girder.create(
        "folder",
        name,
        girder.get(parent, kind, user),
        user,
        description=request.query_params.get("description", ""),
        reuse=flag(request, "reuseExisting"),
        meta=metadata(request),
    )


@routes.add("/item", "GET")
async def items(girder: Girder, request: Request) -> list[dict[str, Any]]:
    (folder,) = required(request, "folderId")
    return page(request, girder.children("item", girder.get(folder, "folder", user_of(girder, request))["_id"]))


@routes.add("/item", "POST")
async def create_item(girder: Girder, request: Request) -> dict[str, Any]:
    user = user_of(girder, request)
    folder, name = required(request, "folderId", "name")
    return girder.create(
        "item",
        name,
        girder.get(folder, "folder", user),
        user,
        description=request.query_params.get("description", ""),
        reuse=flag(request, "reuseExisting"),
        meta=metadata(request),
    )


@routes.add("/item/{identifier}/files", "GET")
async def files(girder: Girder, request: Request, identifier: str) -> list[dict[str, Any]]:
    return page(request, girder.children("file", girder.get(identifier, "item", user_of(girder, request))["_id"]))


# Files; before the routes with a kind, which would take them for ids


async def append(girder: Girder, request: Request, identifier: str) -> dict[str, Any]:
    upload = girder.upload(identifier)
    with upload.path.open("ab") as stream:
        async for chunk in request.stream():
            stream.write(chunk)
    return girder.received(upload, user_of(girder, request))


@routes.add("/file", "POST")
async def begin_file(girder: Girder, request: Request) -> dict[str, Any]:
    user = user_of(girder, request)
    kind, parent, name = required(request, "parentType", "parentId", "name")
    girder.get(parent, kind, user)
    upload = girder.begin_upload(
        {
            "parentType": kind,
            "parentId": parent,
            "name": name,
            "size": number(request, "size", 0),
            "mimeType": request.query_params.get("mimeType"),
            "userId": girder.describe_user(user)["_id"],
        }
    )
    # The whole content, or its beginning, may come with the first request.
    return await append(girder, request, upload.record["_id"])


@routes.add("/file/chunk", "POST")
async def chunk(girder: Girder, request: Request) -> dict[str, Any]:
    user_of(girder, request)
    (identifier,) = required(request, "uploadId")
    offset, here = number(request, "offset"), girder.upload(identifier).path.stat().st_size
    if offset != here:
        raise GirderError(f"Server has received {here} bytes, but client sent offset {offset}.")
    return await append(girder, request, identifier)


@routes.add("/file/offset", "GET")
async def offset(girder: Girder, request: Request) -> dict[str, int]:
    user_of(girder, request)
    (identifier,) = required(request, "uploadId")
    return {"offset": girder.upload(identifier).path.stat().st_size}


@routes.add("/file/upload/{identifier}", "DELETE")
async def cancel(girder: Girder, request: Request, identifier: str) -> dict[str, str]:
    user_of(girder, request)
    girder.cancel_upload(identifier)
    return {"message": "Upload canceled."}


@routes.add("/file/{identifier}/contents", "PUT")
async def replace_content(girder: Girder, request: Request, identifier: str) -> dict[str, Any]:
    girder.get(identifier, "file", user_of(girder, request))
    upload = girder.begin_upload({"fileId": identifier, "size": number(request, "size")})
    return dict(upload.record)


@routes.add("/{kind}/{identifier}/download", "GET")
async def download(girder: Girder, request: Request, kind: str, identifier: str) -> Response:
    record = girder.get(identifier, kind, user_of(girder, request))
    if kind == "item":
        below = girder.children("file", identifier)
        if len(below) != 1:
            raise GirderError("Only items of one file can be downloaded.")
        record = below[0]
    elif kind != "file":
        raise HTTPException(404)
    return FileResponse(girder.content(record), media_type=record["mimeType"], filename=record["name"])


# What folders, items, files and collections have in common


@routes.add("/{kind}/{identifier}", "GET")
async def get(girder: Girder, request: Request, kind: str, identifier: str) -> dict[str, Any]:
    if kind not in ("collection", "folder", "item", "file"):
        raise HTTPException(404)
    return girder.get(identifier, kind, user_of(girder, request))


@routes.add("/{kind}/{identifier}/metadata", "PUT")
async def put_metadata(girder: Girder, request: Request, kind: str, identifier: str) -> dict[str, Any]:
    if kind not in ("collection", "folder", "item"):
        raise HTTPException(404)
    girder.get(identifier, kind, user_of(girder, request))
    return girder.annotate(identifier, await body_json(request), allow_null=flag(request, "allowNull"))


@routes.add("/{kind}/{identifier}", "DELETE")
async def delete(girder: Girder, request: Request, kind: str, identifier: str) -> dict[str, str]:
    if kind not in ("folder", "item", "file"):
        raise HTTPException(404)
    record = girder.get(identifier, kind, user_of(girder, request))
    girder.remove(record)
    return {"message": f"Deleted {kind} {record['name']}."}
