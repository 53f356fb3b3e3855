"""Girder as a storage: its files, folders and metadata. Knows nothing of sessions.

A file on Girder is named `<storage>:<file id>` towards VIP, a folder for results `<storage>:<folder id>`. People name
them by path; this module finds one for the other, makes the folders and keeps their metadata.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qs, unquote, urlencode

import requests
from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    NotFoundError,
    PlatformError,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.http import HttpSession, Timeouts
from prefect_biomed.clients.rest import Answered, Refusal, RestClient, pages_of
from prefect_biomed.clients.vip.models import without_tokens

__all__ = [
    "GirderEntry",
    "GirderStorage",
    "file_id",
    "girder_path",
    "local_names",
]

Shape = TypeVar("Shape")
Item = TypeVar("Item")
Found = TypeVar("Found")

_API = "/api/v1"
_SIGN_IN = "api_key/token"
_PAGE_SIZE = 50


class GirderEntry(Answered):
    """A file, item, folder or collection on Girder.

    Attributes:
        id: Its identifier.
        kind: `file`, `item`, `folder`, `collection` or `user`.
        name: Its name; not unique for files.
        size: Bytes.
        access_level: 0 to read, 1 to write, 2 to administrate; None where Girder does not tell.
        meta: Its metadata.
    """

    id: Annotated[str, Field(alias="_id", pattern=r"^[0-9A-Za-z]+$")]
    kind: Annotated[str, Field(alias="_modelType")]
    name: str = ""
    size: int | None = None
    access_level: Annotated[int | None, Field(alias="_accessLevel")] = None
    meta: dict[str, JsonValue] = Field(default_factory=dict)


class GirderStorage:
    """One account on a Girder. Signs in when it is first needed, and again when its token has expired.

    Needs the extra `girder`. All its requests may be repeated: folders are found again by name, metadata is replaced.

    Args:
        url: Address of the Girder, with or without `/api/v1`.
        api_key: The key, or a function that returns it.
        storage_id: Identifier of this Girder as an external storage of VIP.
        verify_tls: False accepts any certificate.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read.
        parallelism: Number of requests at once where many are needed.
    """

    def __init__(
        self,
        url: str,
        api_key: str | Callable[[], str],
        *,
        storage_id: str = "pilotGirder",
        verify_tls: bool = True,
        connect_seconds: float = 10.0,
        read_seconds: float = 90.0,
        parallelism: int = 8,
    ) -> None:
        self.storage_id = storage_id
        self.parallelism = parallelism
        self._key = api_key if callable(api_key) else lambda: api_key
        http = HttpSession(
            url.rstrip("/").removesuffix(_API) + _API,
            auth_headers=self._auth_headers,
            timeouts=Timeouts(connect_seconds, read_seconds),
            verify_tls=verify_tls,
            connections=2 * parallelism,
        )
        self._http = http
        self._rest = _Rest(http)
        self._lock = threading.Lock()
        self._api: Any = None
        self._refusal: BiomedError | None = None

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    @property
    def key(self) -> str:
        """The API key."""
        return self._key()

    def location(self, identifier: str) -> str:
        """Name a file or folder towards VIP.

        Args:
            identifier: Its identifier on Girder.

        Returns:
            `<storage>:<identifier>`.
        """
        return f"{self.storage_id}:{identifier}"

    # -- looking -------------------------------------------------------------------------------------------------------

    def entry(self, path: str) -> GirderEntry:
        """Find what is at a path (`GET /resource/lookup`).

        Args:
            path: `/collection/<name>/…` or `/user/<login>/…`.

        Returns:
            The file, item, folder or collection.

        Raises:
            NotFoundError: There is nothing.
            PermissionDeniedError: The account may not see it.
        """
        api = self._connect()
        try:
            return _read(GirderEntry, api.resourceLookup(path))
        except PlatformError as error:
            if not _says_missing(error):
                raise
            raise NotFoundError(f"Girder has no {path}.", status=error.status, url=error.url) from error

    def input_files(self, path: str) -> str | list[str]:
        """Find the files that a path names as an input.

        Args:
            path: Path of a file, of an item with one file, or of a folder of such items.

        Returns:
            Identifier of the file; for a folder those of all its files, ordered by the names of their items. Folders in
            it are not looked into.

        Raises:
            NotFoundError: There is nothing.
            ConfigurationError: An item has several files or none, the folder is empty, or it is a collection.
        """
        found = self.entry(path)
        if found.kind == "file":
            return found.id
        if found.kind == "item":
            return self._only_files([found], path)[0]
        if found.kind != "folder":
            raise ConfigurationError(f"{path} is a {found.kind} on Girder. Name a folder, an item or a file in it.")
        items = self._all("item", folderId=found.id)
        if not items:
            raise ConfigurationError(f"The folder {path} on Girder has no items.")
        return self._only_files(sorted(items, key=lambda item: item.name), path)

    def _only_files(self, items: Sequence[GirderEntry], path: str) -> list[str]:
        files = self._each(lambda item: [file.id for file in self._all(f"item/{item.id}/files")], items)
        wrong = [f"{item.name!r} has {len(ids)}" for item, ids in zip(items, files, strict=True) if len(ids) != 1]
        if wrong:
            raise ConfigurationError(
                f"{path} on Girder: an item must have one file to be an input, but {', '.join(wrong[:20])}. "
                "Name the file within the item."
            )
        return [ids[0] for ids in files]

    def files(self, identifiers: Sequence[str]) -> list[GirderEntry | None]:
        """Describe files (`GET /file/{id}`), several at once.

        Args:
            identifiers: Their identifiers.

        Returns:
            Their descriptions in the same order; None for those that are not there.
        """
        api = self._connect()

        def describe(identifier: str) -> GirderEntry | None:
            try:
                return _read(GirderEntry, api.getFile(identifier))
            except PlatformError as error:
                if not _says_missing(error):
                    raise
                return None

        return self._each(describe, identifiers)

    def _all(self, path: str, **parameters: str) -> list[GirderEntry]:
        """Read a list to its end."""
        api = self._connect()

        def page(number: int) -> tuple[list[GirderEntry], bool]:
            where = {"limit": _PAGE_SIZE, "offset": (number - 1) * _PAGE_SIZE}
            entries = _read(list[GirderEntry], api.get(path, parameters={**parameters, **where}))
            return entries, len(entries) >= _PAGE_SIZE

        return list(pages_of(page, identity=attrgetter("id"), what=f"{path} on Girder"))

    def _each(self, look: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        with ThreadPoolExecutor(max_workers=self.parallelism) as pool:
            # In a context like the caller's, so that what is logged belongs to the same run.
            running = [pool.submit(copy_context().run, look, item) for item in items]
            return [looked.result() for looked in running]

    # -- folders -------------------------------------------------------------------------------------------------------

    def nearest(self, path: str) -> tuple[GirderEntry, list[str]]:
        """Find a folder, or the nearest one above it that exists.

        Args:
            path: Path of the folder.

        Returns:
            What was found, and the names below it that are missing.

        Raises:
            NotFoundError: Not even its collection exists.
        """
        missing: list[str] = []
        while True:
            try:
                return self.entry(path), missing[::-1]
            except NotFoundError:
                path, _, name = path.rpartition("/")
                missing.append(name)
                if path.count("/") < 2:
                    raise

    def make_folder(self, path: str, description: str = "") -> str:
        """Make a folder and what it lies in (`POST /folder` with `reuseExisting`). Safe to repeat.

        Args:
            path: Path of the folder; its collection exists.
            description: Free text for the folder.

        Returns:
            Its identifier, also when it was there already.
        """
        found, missing = self.nearest(path)
        for name in missing:
            made = self._connect().createFolder(
                found.id,
                name,
                description=description if name == missing[-1] else "",
                parentType=found.kind,
                reuseExisting=True,
            )
            found = _read(GirderEntry, made)
        return found.id

    def annotate(self, folder_id: str, metadata: dict[str, Any]) -> None:
        """Set metadata of a folder (`PUT /folder/{id}/metadata`); other keys stay. Safe to repeat.

        Args:
            folder_id: The folder.
            metadata: Values by key.
        """
        self._connect().addMetadataToFolder(folder_id, metadata)

    # -- content -------------------------------------------------------------------------------------------------------

    @contextmanager
    def open_file(self, file_id: str, *, start: int = 0) -> Iterator[tuple[requests.Response, Iterator[bytes]]]:
        """Open a file for reading (`GET /file/{id}/download`).

        Args:
            file_id: The file.
            start: First byte wanted; Girder may ignore it and answer 200 with the whole file.

        Yields:
            The answer, with status 200 or 206, and the pieces of its body.
        """
        self._connect()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        path = f"/file/{file_id}/download"
        # Where Girder keeps its files in an object store, it sends us there.
        with self._rest.opened("GET", path, about=path, headers=headers, redirect_elsewhere=True) as response:
            yield response, self._http.chunks(response)

    # -- the wire ------------------------------------------------------------------------------------------------------

    def _auth_headers(self) -> dict[str, str]:
        return {"Girder-Token": self._api.token} if self._api is not None and self._api.token else {}

    def _connect(self) -> Any:
        with self._lock:
            if self._refusal is not None:
                # Asked once: a wrong key must not lock an account.
                raise self._refusal
            if self._api is None or not self._api.token:
                try:
                    self._api = self._api or _girder_client(self._rest, self._key)
                    self._api.authenticate(apiKey=self.key)
                except PlatformError as error:
                    if is_transient(error) or isinstance(error, UnexpectedResponse) or not _is_refusal(error):
                        raise
                    self._refusal = AuthenticationError(
                        f"Girder refused the API key: {error} Put a valid one into girder_api_key of the credentials.",
                        status=error.status,
                        url=error.url,
                    )
                    raise self._refusal from None
        return self._api


def _girder_client(rest: _Rest, key: Callable[[], str]) -> Any:
    """Make girder-client speak through our session, which has timeouts, bounds, and errors that hide the key."""
    try:
        import girder_client
    except ImportError:
        raise ConfigurationError(
            "Girder needs the extra 'girder': pip install 'prefect-biomed[girder]', where this runs."
        ) from None

    class Client(girder_client.GirderClient):  # type: ignore[misc]  # girder-client ships no types
        token: str

        def sendRestRequest(  # noqa: N802  # the name of girder-client, whose every request comes through here
            self,
            method: str,
            path: str,
            parameters: dict[str, Any] | None = None,
            data: Any = None,
            files: Any = None,
            json: Any = None,
            **_: Any,
        ) -> Any:
            if path == _SIGN_IN:
                return rest.sign_in(parameters or {})

            def send() -> object:
                return rest.ask(object, method, f"/{path}", params=parameters, json_body=json, body=data)

            try:
                return send()
            except AuthenticationError:
                if not self.token:
                    raise
                # The token has expired, and nothing was done.
                self.token = ""
                self.authenticate(apiKey=key())
                return send()

    return Client(apiUrl=rest.url)


class _Token(Answered):
    token: str = Field(repr=False)


class _SignedIn(Answered):
    token: _Token = Field(validation_alias="authToken")


def _is_refusal(error: PlatformError) -> bool:
    """Whether it is about what was sent; Girder that breaks down says so in its own words too."""
    return error.status is not None and error.status < requests.codes.server_error


def _says_missing(error: PlatformError) -> bool:
    """Whether Girder itself says that there is no such object; a proxy's 404 says nothing of it."""
    return error.spoken and error.status in {requests.codes.bad_request, requests.codes.not_found}


class _Rest(RestClient):
    """REST as Girder speaks it."""

    @property
    def url(self) -> str:
        """Address of the API."""
        return self._http.base_url

    def sign_in(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Get a token for the key, in the shape in which girder-client wants it."""
        # As a form, because queries are written to the logs of servers and libraries.
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = self.ask(_SignedIn, "POST", f"/{_SIGN_IN}", body=urlencode(parameters).encode(), headers=headers)
        return {"user": {}, "authToken": {"token": answer.token.token}}

    def _refusal(self, status: int, body: Any) -> Refusal | None:
        said = body.get("message") if isinstance(body, dict) else None
        return Refusal(f"Girder: {without_tokens(said)}"[:500]) if isinstance(said, str) else None


def _read(shape: type[Shape], answer: object) -> Shape:
    """Read what girder-client hands on as it came."""
    try:
        return TypeAdapter(shape).validate_python(answer)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors(include_input=False))
        raise UnexpectedResponse(f"Girder describes an object in a way that is not known: {wrong or 'body'}.") from None


# -- names -------------------------------------------------------------------------------------------------------------


def girder_path(value: object) -> str | None:
    """Tell the path on Girder that a value names.

    Args:
        value: A value of `input_settings`: `girder:/collection/…`, or `/collection/…` as vip-client writes it.

    Returns:
        The path, or None when the value names none.
    """
    if not isinstance(value, str):
        return None
    path = value.removeprefix("girder:").rstrip("/")
    return path if (path != value and path.startswith("/")) or path.startswith("/collection/") else None


def file_id(address: str) -> str:
    """Read the identifier of a file out of the address that VIP gives for an output on Girder.

    Args:
        address: `girder:/<name>?apiurl=…&fileId=…`.

    Returns:
        The identifier.

    Raises:
        UnexpectedResponse: The address has none.
    """
    (identifier, *_) = parse_qs(address.partition("?")[2]).get("fileId", [""])
    if not re.fullmatch("[0-9A-Za-z]+", identifier):
        raise UnexpectedResponse(f"VIP gave the address {address[:200]!r}, which names no file on Girder.")
    return identifier


def local_names(addresses: Iterable[str]) -> dict[str, str]:
    """Choose local names for the outputs of one run, which Girder lets have the same name.

    Args:
        addresses: Addresses as VIP gives them.

    Returns:
        Name by address: that of the file; below a folder with its identifier when others have the same.
    """
    names = {
        address: PurePosixPath(unquote(address.partition(":")[2].partition("?")[0])).name or file_id(address)
        for address in addresses
    }
    several = Counter(names.values())
    return {address: name if several[name] == 1 else f"{file_id(address)}/{name}" for address, name in names.items()}
