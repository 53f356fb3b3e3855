"""Girder as a storage: its files, folders and metadata. Knows nothing of sessions.

A file on Girder is named `<storage>:<file id>` towards VIP, a folder for results `<storage>:<folder id>`. People name
them by path; this module finds one for the other, makes the folders and keeps their metadata.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import parse_qs, unquote, urlencode

import requests
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.http import HttpSession, Timeouts, not_the_platform
from prefect_biomed.clients.vip.models import without_tokens

__all__ = [
    "GirderEntry",
    "GirderStorage",
    "file_id",
    "girder_path",
    "local_names",
]

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Found = TypeVar("Found")

_API = "/api/v1"
_SIGN_IN = "api_key/token"


class GirderEntry(BaseModel):
    """A file, item, folder or collection on Girder.

    Attributes:
        id: Its identifier.
        kind: `file`, `item`, `folder`, `collection` or `user`.
        name: Its name; not unique for files.
        size: Bytes.
        access_level: 0 to read, 1 to write, 2 to administrate; None where Girder does not tell.
        meta: Its metadata.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

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
        self._http = HttpSession(
            url.rstrip("/").removesuffix(_API) + _API,
            auth_headers=self._auth_headers,
            timeouts=Timeouts(connect_seconds, read_seconds),
            verify_tls=verify_tls,
            connections=2 * parallelism,
        )
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
            return _entry(api.resourceLookup(path))
        except PlatformError as error:
            if error.status not in {requests.codes.bad_request, requests.codes.not_found}:
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
        items = [_entry(item) for item in self._connect().listItem(found.id)]
        if not items:
            raise ConfigurationError(f"The folder {path} on Girder has no items.")
        return self._only_files(sorted(items, key=lambda item: item.name), path)

    def _only_files(self, items: Sequence[GirderEntry], path: str) -> list[str]:
        api = self._connect()
        files = self._each(lambda item: [_entry(file).id for file in api.listFile(item.id)], items)
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
                return _entry(api.getFile(identifier))
            except PlatformError as error:
                if error.status not in {requests.codes.bad_request, requests.codes.not_found}:
                    raise
                return None

        return self._each(describe, identifiers)

    def _each(self, look: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        with ThreadPoolExecutor(max_workers=self.parallelism) as pool:
            return list(pool.map(look, items))

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
            found = _entry(
                self._connect().createFolder(
                    found.id,
                    name,
                    description=description if name == missing[-1] else "",
                    parentType=found.kind,
                    reuseExisting=True,
                )
            )
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
        with self._http.open("GET", path, headers=headers, redirect_elsewhere=True) as response:
            if response.status_code not in {requests.codes.ok, requests.codes.partial_content}:
                _raise_for(response, self._http.read_text(response))
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
                    self._api = self._api or _girder_client(self._http, self._key)
                    self._api.authenticate(apiKey=self.key)
                except PlatformError as error:
                    if is_transient(error) or isinstance(error, UnexpectedResponse):
                        raise
                    self._refusal = AuthenticationError(
                        f"Girder refused the API key: {error} Put a valid one into girder_api_key of the credentials.",
                        status=error.status,
                        url=error.url,
                    )
                    raise self._refusal from None
        return self._api


def _girder_client(http: HttpSession, key: Callable[[], str]) -> Any:
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
            headers = {}
            if path == _SIGN_IN:
                # As a form, because queries are written to the logs of servers and libraries.
                data, parameters = urlencode(parameters or {}).encode(), None
                headers["Content-Type"] = "application/x-www-form-urlencoded"
            response, text = http.text(
                method, f"/{path}", params=parameters, json_body=json, body=data, headers=headers
            )
            if not response.ok:
                if response.status_code == requests.codes.unauthorized and self.token:
                    # The token has expired, and nothing was done.
                    self.token = ""
                    self.authenticate(apiKey=key())
                    return self.sendRestRequest(method, path, parameters, data=data, json=json)
                _raise_for(response, text)
            return _decoded(response, text)

    return Client(apiUrl=http.base_url)


def _decoded(response: requests.Response, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise not_the_platform(response, text) from None


def _raise_for(response: requests.Response, text: str) -> NoReturn:
    status, url = response.status_code, response.url.split("?", 1)[0]
    if status in {429, 502, 503, 504}:
        raise ServerUnavailable(f"Girder is out of order for the moment (HTTP {status}).", status=status, url=url)
    body = _decoded(response, text)
    said = without_tokens(str(body.get("message", "")))[:500] if isinstance(body, dict) else ""
    message = f"Girder: {said or 'no reason'} (HTTP {status}, {url})."
    kinds: dict[int, type[PlatformError]] = {
        requests.codes.unauthorized: AuthenticationError,
        requests.codes.forbidden: PermissionDeniedError,
    }
    raise kinds.get(status, PlatformError)(message, status=status, url=url)


def _entry(answer: Any) -> GirderEntry:
    try:
        return GirderEntry.model_validate(answer)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors(include_input=False))
        raise UnexpectedResponse(f"Girder describes an object in a way that is not known: {wrong}.") from None


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
