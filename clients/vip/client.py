"""REST client of VIP and other CARMIN platforms."""

from __future__ import annotations

import base64
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit

import requests
from pydantic import Field, JsonValue

from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import HttpSession, Timeouts, bare
from prefect_biomed.clients.rest import Answered, Refusal, RestClient
from prefect_biomed.clients.vip import carmin
from prefect_biomed.clients.vip.errors import GenericVipError, read_refusal
from prefect_biomed.clients.vip.girder import GirderStorage
from prefect_biomed.clients.vip.models import Descriptor, PathEntry, Pipeline, Platform, Workflow, without_tokens
from prefect_biomed.clients.vip.profiles import Profile

__all__ = ["VipClient"]


# VIP serialises the launches of all its users behind one lock, and goes on with those nobody waits for any more.
_LAUNCH_SECONDS = 300.0
_LAUNCH_LOCK_SECONDS = 120.0
# Fetching metadata of many outputs takes one or two storage calls each.
_RESULTS_SECONDS = 900.0
# VIP lists no more executions than this, whatever is asked for.
_LONGEST_LIST = 500


class _Named(Platform):
    """A platform that names its modules, as every CARMIN platform does; other JSON is not from one."""

    supported_modules: tuple[str, ...]


class _Login(Answered):
    key: str = Field(validation_alias="httpHeaderValue", repr=False)


class _ExternalKey(Answered):
    storage_id: str = Field(validation_alias="storageIdentifier")


class _Existence(Answered):
    exists: bool


class _Digest(Answered):
    md5: str


class _Api(RestClient):
    """REST as VIP and other CARMIN platforms speak it."""

    def _refusal(self, status: int, body: Any) -> Refusal | None:
        return read_refusal(status, body)


class VipClient(_Api):
    """One account on a CARMIN platform.

    Args:
        url: Address of the portal, with or without `/rest`; which of both serves the API is found out.
        api_key: The key, or a function that returns it, called for each request.
        verify_tls: False accepts any certificate.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read. VIP blocks up to 50 s for a transfer.
        parallelism: Number of transfers at once, 1 to 10. VIP shares about 20 among all users.
        girder: The user's account on the Girder that VIP knows as an external storage; closed with the client.
        settle_seconds: The longest time after which a launch that was sent may still take effect.
    """

    MAX_PARALLELISM = 10

    def __init__(
        self,
        url: str,
        api_key: str | Callable[[], str],
        *,
        verify_tls: bool = True,
        connect_seconds: float = 10.0,
        read_seconds: float = 90.0,
        parallelism: int = 8,
        girder: GirderStorage | None = None,
        settle_seconds: float = _LAUNCH_SECONDS + _LAUNCH_LOCK_SECONDS,
    ) -> None:
        if not 1 <= parallelism <= self.MAX_PARALLELISM:
            raise ConfigurationError(f"parallelism is {parallelism}; choose 1 to {self.MAX_PARALLELISM}.")
        self.parallelism = parallelism
        self.girder = girder
        self.settle_seconds = settle_seconds
        self.url = url.rstrip("/")
        self._key = api_key if callable(api_key) else lambda: api_key
        self._session_settings: dict[str, Any] = {
            "auth_headers": lambda: {"apikey": self._key()},
            "timeouts": Timeouts(connect_seconds, read_seconds),
            "verify_tls": verify_tls,
            "connections": 2 * self.MAX_PARALLELISM,
        }
        self._lock = threading.Lock()
        self._found: tuple[HttpSession, Platform] | None = None

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        if self._found:
            self._found[0].close()
        if self.girder:
            self.girder.close()

    # -- platform ------------------------------------------------------------------------------------------------------

    @property
    def platform(self) -> Platform:
        """What the platform tells of itself (`GET /platform`), read once."""
        return self._connect()[1]

    @property
    def profile(self) -> Profile:
        """Its ways, chosen from what it tells."""
        return self.platform.profile

    def check_key(self) -> None:
        """Ask whether the key is good (`PUT /platform`, as vip-client does; `GET /pipelines` on other platforms).

        Raises:
            AuthenticationError: It is not. Asked once, never retried.
        """
        if self.profile.checks_keys:
            self.ask(Platform, "PUT", "/platform")
        else:
            self.pipelines()

    @classmethod
    def authenticate(cls, url: str, username: str, password: str, **settings: Any) -> Self:
        """Exchange user name and password for a key (`POST /authenticate`). One attempt.

        Args:
            url: Address of the portal.
            username: Login.
            password: Password.
            **settings: As for the class.

        Returns:
            A client with the key.

        Raises:
            AuthenticationError: The login was refused.
        """
        anonymous = cls(url, "", **settings)
        login = {"username": username, "password": password}
        answer = anonymous.ask(_Login, "POST", "/authenticate", json_body=login, authenticate=False)
        return cls(url, answer.key, **settings)

    def _connect(self) -> tuple[HttpSession, Platform]:
        with self._lock:
            if self._found is None:
                self._found = self._discover()
            return self._found

    def _discover(self) -> tuple[HttpSession, Platform]:
        path = urlsplit(self.url).path
        bases = [self.url] if path.endswith("/rest") else [self.url + "/rest", self.url]
        tried: list[UnexpectedResponse | NotFoundError] = []
        for base in bases:
            http = HttpSession(base, **self._session_settings)
            try:
                return http, _Api(http).ask(_Named, "GET", "/platform", authenticate=False)
            except (UnexpectedResponse, NotFoundError) as error:
                tried.append(error)
                http.close()
        raise UnexpectedResponse(
            "No CARMIN platform found. "
            + " ".join(f"Tried {base}/platform: {error}" for base, error in zip(bases, tried, strict=True)),
            url=self.url,
        )

    # -- external storages ---------------------------------------------------------------------------------------------

    def external_keys(self) -> list[str]:
        """List the external storages for which VIP holds a key of the user (`GET /user/externalKeys`).

        Returns:
            Identifiers of storages. The keys, which VIP tells too, are dropped here.
        """
        return [entry.storage_id for entry in self.ask(list[_ExternalKey], "GET", "/user/externalKeys")]

    def set_external_key(self, storage_id: str, key: str) -> None:
        """Leave a key of an external storage on VIP, so that executions can read and write there. Safe to repeat.

        `PUT /user/externalKeys`; it takes the place of an older one.

        Args:
            storage_id: Identifier of the storage on VIP, such as `pilotGirder`.
            key: The user's key there.

        Raises:
            GenericVipError: VIP knows no storage of this name.
        """
        self.tell(
            "PUT",
            "/user/externalKeys",
            json_body={"storageIdentifier": storage_id, "apiKey": key},
            about=f"key of the storage {storage_id!r}",
        )

    def remove_external_key(self, storage_id: str) -> None:
        """Remove a key from VIP (`DELETE /user/externalKeys/{id}`). Safe to repeat.

        Args:
            storage_id: Identifier of the storage on VIP.
        """
        self.tell("DELETE", f"/user/externalKeys/{_part(storage_id)}", about=f"key of the storage {storage_id!r}")

    # -- pipelines -----------------------------------------------------------------------------------------------------

    def pipelines(self) -> list[Pipeline]:
        """List the pipelines of the user's groups (`GET /pipelines`).

        Returns:
            All visible pipelines; on VIP without their parameters.
        """
        return self.ask(list[Pipeline], "GET", "/pipelines")

    def pipeline(self, identifier: str) -> Pipeline:
        """Describe one pipeline (`GET /pipelines/{identifier}`).

        Args:
            identifier: As in the list, `Application/version` on VIP.

        Returns:
            The pipeline with its parameters, and with what its Boutiques descriptor says of lists and outputs; with the
            reason in `undescribed` where the descriptor was refused, cannot be read, or is not given.

        Raises:
            NotFoundError: There is none of this name, or it is hidden.
            PermissionDeniedError: It belongs to a group the user is not in; the message says how to join.
            AuthenticationError: The key was refused.
            PlatformError: The platform is out of order for the moment, so that it says nothing of the descriptor.
        """
        path = "/pipelines/" + quote(identifier, safe="/")
        pipeline = self.ask(Pipeline, "GET", path, about=f"pipeline {identifier!r}")
        try:
            descriptor = self.ask(Descriptor, "GET", path + self.profile.descriptor)
        except PlatformError as error:
            if error.transient or isinstance(error, AuthenticationError):
                raise
            return pipeline.model_copy(update={"undescribed": str(error)})
        return pipeline.described_by(descriptor)

    def descriptor(self, identifier: str) -> dict[str, JsonValue] | None:
        """Read the Boutiques descriptor of a pipeline as it is (`GET /pipelines/{identifier}`, as Boutiques).

        Args:
            identifier: As in the list.

        Returns:
            The descriptor; None where the platform gives none.

        Raises:
            AuthenticationError: The key was refused.
            PermissionDeniedError: The account may not see it, which says nothing of whether there is one.
        """
        path = "/pipelines/" + quote(identifier, safe="/") + self.profile.descriptor
        try:
            return self.ask(dict[str, JsonValue], "GET", path, about=f"descriptor of {identifier!r}")
        except PlatformError as error:
            if error.transient or isinstance(error, AuthenticationError | PermissionDeniedError):
                raise
            return None

    # -- workflows -----------------------------------------------------------------------------------------------------

    def launch(
        self, *, name: str, pipeline_id: str, input_values: dict[str, Any], results_location: str | None
    ) -> Workflow:
        """Launch an execution (`POST /executions`). Never repeated here; see `play` for platforms that need it.

        Args:
            name: Execution name: letters, digits, `-`, `_` and space.
            pipeline_id: Pipeline to run.
            input_values: Values by parameter; a list makes parallel jobs.
            results_location: Folder for the results; None on platforms that have none.

        Returns:
            The execution as it was just after the launch.

        Raises:
            CapacityError: A limit of running executions is reached; nothing was launched.
            NetworkError: No answer. The execution may exist: look for its name.
            GenericVipError: The same.
            UnexpectedResponse: The answer is about another execution; the same.
            PlatformError: The launch was refused.
        """
        body: dict[str, Any] = {"name": name, "pipelineIdentifier": pipeline_id, "inputValues": input_values}
        if results_location is not None:
            body["resultsLocation"] = results_location
        workflow = self.ask(
            Workflow,
            "POST",
            "/executions",
            json_body=body,
            read_seconds=_LAUNCH_SECONDS,
            about=f"launch of {pipeline_id!r}",
        )
        # VIP gives the identifier while it does not know the name yet.
        if workflow.name not in {"", name, workflow.identifier}:
            raise UnexpectedResponse(
                f"The launch of {name!r} was answered with {workflow.identifier}, which is called {workflow.name!r}."
            )
        return workflow

    def play(self, workflow: Workflow) -> None:
        """Start an execution that was created but does not start by itself (`PUT /executions/{id}/play`).

        Args:
            workflow: The execution. Nothing is done on VIP, or when it has been started already.
        """
        if not self.profile.plays_launches or workflow.status != "Initializing":
            return
        try:
            self.tell("PUT", f"/executions/{_part(workflow.identifier)}/play")
        except PlatformError as error:
            if error.code != carmin.PLAYED_ALREADY:
                raise

    def workflows(self, *, newest: int | None = None) -> list[Workflow]:
        """List executions, newest first (`GET /executions`). On VIP this refreshes the status of all running ones.

        Args:
            newest: How many to ask for; None for as many as VIP gives in one list, or all of another platform.

        Returns:
            Summaries: without jobs and outputs on VIP. Cleaned executions are not among them.

        Raises:
            ListUnavailable: The platform cannot list executions at all.
        """
        if self.profile.lists_in_pages:
            return carmin.list_pages(self._workflow_page, self._workflow_count, newest)
        return self._workflow_page(limit=min(newest or _LONGEST_LIST, _LONGEST_LIST))

    def is_cut_off(self, listed: Sequence[Workflow]) -> bool:
        """Tell whether there may be more executions than a list of the newest holds.

        Args:
            listed: What `workflows` gave.

        Returns:
            True when the platform lists no older ones.
        """
        longest = min(_LONGEST_LIST, self.platform.default_limit_list_executions)
        return not self.profile.lists_in_pages and len(listed) >= longest

    def _workflow_page(self, **params: int) -> list[Workflow]:
        return self.ask(list[Workflow], "GET", "/executions", params=params)

    def _workflow_count(self) -> int:
        return self.ask(int, "GET", "/executions/count")

    def workflow(self, identifier: str) -> Workflow:
        """Describe one execution (`GET /executions/{id}`).

        Args:
            identifier: Its identifier.

        Returns:
            The execution with its jobs and outputs.

        Raises:
            NotFoundError: It was cleaned, or is unknown on platforms that say so.
            GenericVipError: VIP does not know it, it is someone else's, or its engine cannot be reached.
            UnexpectedResponse: The answer is about another one.
        """
        path = f"/executions/{_part(identifier)}"
        try:
            workflow = self.ask(Workflow, "GET", path, about=f"workflow {identifier}")
        except PlatformError as error:
            if error.status != requests.codes.internal_server_error or self.profile.describes_ended_executions:
                raise
            return carmin.workflow_from_results(identifier, self.results, error)
        if workflow.identifier != identifier:
            raise UnexpectedResponse(f"Asked for workflow {identifier}, the answer is about {workflow.identifier}.")
        return workflow

    def results(self, identifier: str) -> list[PathEntry]:
        """List the outputs of an execution with their sizes (`GET /executions/{id}/results`).

        Args:
            identifier: Its identifier.

        Returns:
            Files and folders; deleted ones have `exists` False on VIP.
        """
        return self.ask(
            list[PathEntry],
            "GET",
            f"/executions/{_part(identifier)}/results",
            read_seconds=_RESULTS_SECONDS,
            about=f"results of workflow {identifier}",
        )

    def log(self, identifier: str, *, stream: str = "stdout", job: str | None = None) -> str:
        """Read a log (`GET /executions/{id}/stdout` or `/stderr`).

        Args:
            identifier: The execution.
            stream: `stdout` or `stderr`.
            job: Number of the job; needed where an execution has several.

        Returns:
            The text, at most 64 MiB, without tokens of Girder.
        """
        where = f"/jobs/{_part(job)}" if job is not None else ""
        path = f"/executions/{_part(identifier)}{where}/{stream}"
        with self.opened("GET", path, about=f"{stream} of workflow {identifier}") as response:
            return without_tokens(self._http.read_text(response))

    def kill(self, identifier: str) -> None:
        """Kill an execution (`PUT /executions/{id}/kill`).

        VIP does not look before it kills: a finished execution becomes `Killed`. So its status is read first. One that
        was created and never started, where that are two steps, does nothing and cannot be killed.

        Args:
            identifier: The execution. Nothing is done when it has ended.
        """
        status = self.workflow(identifier).status
        if status.is_terminal or (self.profile.plays_launches and status == "Initializing"):
            return
        try:
            self.tell("PUT", f"/executions/{_part(identifier)}/kill", about=f"kill of workflow {identifier}")
        except PlatformError as error:
            if error.code not in carmin.ENDED and not self._has_ended_all_the_same(identifier, error):
                raise

    def _has_ended_all_the_same(self, identifier: str, refused: PlatformError) -> bool:
        """Whether an execution whose kill was answered with an error does not run any more, or never did."""
        if self.profile.describes_ended_executions or refused.status != requests.codes.internal_server_error:
            return False
        return self.workflow(identifier).status.is_terminal

    def delete_workflow(self, identifier: str, *, delete_files: bool = False) -> None:
        """Remove the record of a finished or killed execution.

        `PUT /executions/{id}/delete` on VIP, where `DELETE` answers 200 and does nothing; `DELETE` elsewhere.

        Args:
            identifier: The execution.
            delete_files: Whether its output files go too.
        """
        path = f"/executions/{_part(identifier)}"
        if self.profile.deletes_with_put:
            self.tell("PUT", path + "/delete", json_body={"deleteFiles": delete_files})
        else:
            self.tell("DELETE", path, params={"deleteFiles": str(delete_files).lower()})

    def examples(self) -> list[Workflow]:
        """List the public example executions (`GET /executions/examples`).

        Returns:
            Executions whose inputs may serve as a model.
        """
        return self.ask(list[Workflow], "GET", "/executions/examples")

    # -- paths ---------------------------------------------------------------------------------------------------------

    def entry(self, path: str) -> PathEntry:
        """Describe a path (`GET /path/{path}?action=properties`).

        Args:
            path: Absolute path on the platform.

        Returns:
            Its description; `exists` is False when there is nothing.
        """
        try:
            return self.ask(PathEntry, "GET", _path(path), params={"action": "properties"}, about=path)
        except NotFoundError:
            return PathEntry(path=path, exists=False)

    def exists(self, path: str) -> bool:
        """Tell whether there is something at a path (`GET /path/{path}?action=exists`).

        Args:
            path: Absolute path on the platform.

        Returns:
            True for files and folders.
        """
        try:
            return self.ask(_Existence, "GET", _path(path), params={"action": "exists"}, about=path).exists
        except NotFoundError:
            return False

    def list_folder(self, path: str) -> list[PathEntry]:
        """List a folder, not its sub-folders (`GET /path/{path}?action=list`).

        Args:
            path: Absolute path on the platform.

        Returns:
            What is in it.

        Raises:
            NotFoundError: There is no such folder, on platforms that say so.
            GenericVipError: There is no such folder, or another reason VIP does not give.
        """
        return self.ask(list[PathEntry], "GET", _path(path), params={"action": "list"}, about=path)

    def md5(self, path: str) -> str:
        """Read the MD5 of a file (`GET /path/{path}?action=md5`), which VIP does not offer.

        Args:
            path: Absolute path on the platform.

        Returns:
            32 hexadecimal digits.
        """
        return self.ask(_Digest, "GET", _path(path), params={"action": "md5"}, about=path).md5

    def make_folder(self, path: str) -> None:
        """Make a folder and what it lies in (`PUT /path/{path}` without a body). Safe to repeat.

        Args:
            path: Absolute path on the platform.
        """
        missing = []
        while not self.exists(path):
            missing.append(path)
            path = path.rpartition("/")[0]
            if path.count("/") < 1:
                break
        for folder in reversed(missing):
            try:
                self._put(folder, b"")
            except PlatformError:
                # Another transfer may have made it meanwhile, which grid storage refuses.
                if not self.exists(folder):
                    raise

    def put_file(self, local: Path, path: str) -> None:
        """Send one file once (`PUT /path/{path}`), streamed with its length. Existing files are refused by VIP.

        Args:
            local: File to send; not empty, because an empty body makes a folder.
            path: Absolute path on the platform; its folder exists.

        Raises:
            NetworkError: No answer; the file may or may not arrive.
            GenericVipError: The file exists, the folder does not, or the file arrives later.
            UnexpectedResponse: The answer is not 201; the file may or may not have arrived.
        """
        with local.open("rb") as file:
            self._put(path, file)

    def put_file_encoded(self, local: Path, path: str) -> None:
        """Send one file as base64 in JSON (`PUT /path/{path}`, `application/carmin+json`).

        For platforms that damage raw uploads. The encoded file is held on disk, not in memory.

        Args:
            local: File to send.
            path: Absolute path on the platform.
        """
        with local.open("rb") as source, tempfile.TemporaryFile() as encoded:
            encoded.write(b'{"type": "File", "base64Content": "')
            while piece := source.read(3 * 256 * 1024):
                encoded.write(base64.b64encode(piece))
            encoded.write(b'"}')
            encoded.seek(0)
            self._put(path, encoded, content_type="application/carmin+json")

    def _put(self, path: str, body: Any, content_type: str = "application/octet-stream") -> None:
        headers = {"Content-Type": content_type}
        with self.opened("PUT", _path(path), about=path, body=body, headers=headers) as response:
            _require(response, {requests.codes.created}, path)

    @contextmanager
    def open_file(self, path: str, *, start: int = 0) -> Iterator[tuple[requests.Response, Iterator[bytes]]]:
        """Open a file for reading (`GET /path/{path}?action=content`).

        Args:
            path: Absolute path on the platform.
            start: First byte wanted; the platform may ignore it and answer 200 with the whole file.

        Yields:
            The answer, with status 200 or 206, and the pieces of its body.

        Raises:
            GenericVipError: A folder, a missing file, one that is too large, or one that the platform is still fetching
                from the grid; a later try may succeed.
        """
        # A coded body would have another length than the one announced.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self.opened("GET", _path(path), about=path, params={"action": "content"}, headers=headers) as response:
            _require(response, {requests.codes.ok, requests.codes.partial_content}, path)
            yield response, self._http.chunks(response)

    def path_url(self, path: str) -> str:
        """Name a file as platforms other than VIP want it in the inputs of a launch.

        Args:
            path: Absolute path on the platform.

        Returns:
            Its URL, not percent-encoded: CARMIN-server cuts its own address off and takes the rest as it is.
        """
        return f"{self._http.base_url}/path{path}"

    def read_file(self, path: str, *, max_bytes: int) -> bytes:
        """Read a small file whole.

        Args:
            path: Absolute path on the platform.
            max_bytes: Refuse more than this.

        Returns:
            Its content.
        """
        content = bytearray()
        with self.open_file(path) as (response, chunks):
            for chunk in chunks:
                content += chunk
                if len(content) > max_bytes:
                    raise UnexpectedResponse(f"{path} is larger than {max_bytes} bytes.", url=response.url)
        return bytes(content)

    def delete(self, path: str) -> None:
        """Delete a file or folder (`DELETE /path/{path}`). VIP only queues it; poll `exists`.

        Args:
            path: Absolute path on the platform. One that is gone already is no error.
        """
        try:
            self.tell("DELETE", _path(path), about=path)
        except (NotFoundError, GenericVipError):
            if self.exists(path):
                raise

    # -- the wire ------------------------------------------------------------------------------------------------------

    @property
    def _http(self) -> HttpSession:
        return self._connect()[0]


def _path(path: str) -> str:
    return "/path" + quote(path, safe="/")


def _part(identifier: str) -> str:
    return quote(identifier, safe="")


def _require(response: requests.Response, statuses: set[int], about: str) -> None:
    if response.status_code not in statuses:
        url = bare(response.url)
        raise UnexpectedResponse(
            f"{about}: {url} answered HTTP {response.status_code}, which says nothing.",
            status=response.status_code,
            url=url,
        )
