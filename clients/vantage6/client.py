"""REST client of vantage6: one set of verbs for generations 3, 4 and 5."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, Literal, Self, TypeVar, overload
from urllib.parse import urlsplit

import requests
from pydantic import Field, JsonValue, SecretStr, ValidationError

from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import HttpSession, Timeouts
from prefect_biomed.clients.rest import Answered, pages_of
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6._long_json import LongText, TooLarge, read_json
from prefect_biomed.clients.vantage6.answers import Vantage6Rest
from prefect_biomed.clients.vantage6.authentication import Authenticator, Login, claims_of
from prefect_biomed.clients.vantage6.encryption import PrivateKey
from prefect_biomed.clients.vantage6.errors import CancelNotPermitted, RequestRefused, TaskGone
from prefect_biomed.clients.vantage6.known_keys import KnownKeys
from prefect_biomed.clients.vantage6.models import (
    Collaboration,
    Column,
    Dataframe,
    EncodedResult,
    Node,
    Organization,
    Record,
    Role,
    Rule,
    Run,
    Status,
    Study,
    Task,
    User,
    Version,
)
from prefect_biomed.clients.vantage6.resources import resource_of, rows_of

__all__ = ["Encryption", "Vantage6Client", "nodes_of"]

logger = logger_of(__name__)

R = TypeVar("R", bound=Record)

_PAGE_SIZE = 100
_MEMORY_BYTES = 16 * 1024**2
# A page of results may hold a large output of each organization.
_MAX_LIST_BYTES = 16 * 1024**3
_MAX_PLAIN_BYTES = 64 * 1024**2
# Servers count what they list in a header; one that does not gets no further than this.
_MAX_UNCOUNTED = 10_000
# Objects that are made while a list is read make it longer than was counted.
_MEANWHILE = 1000
# So long a proxy or a busy server may hold a request whose client is gone, and carry it out then.
_HELD_SECONDS = 60.0

Encryption = Literal["required", "as the collaboration says"]
"""Whether arguments may leave in the clear where the server says that a collaboration is not encrypted."""

Texts = Mapping[str, LongText]
"""Strings of a record that are too long for memory, by the name of their field."""


class _TaskStatus(Answered):
    status: Status


class _Columns(Answered):
    columns: tuple[JsonValue, ...] = ()


class _BlobStore(Answered):
    blob_store_enabled: bool = False


class _Blob(Answered):
    uuid: str = Field(pattern="^[0-9a-zA-Z-]{1,100}$")


class _NodeKey(Answered):
    api_key: SecretStr


@dataclass
class _Told:
    """What a server has told of an account, and of what hardly ever changes."""

    me: User | None = None
    blob_store: bool | None = None
    names: dict[int, dict[int, str]] = field(default_factory=dict)


class Vantage6Client(Vantage6Rest):
    """One account on a vantage6 server, of whatever generation.

    Made by `connect`. May be used by many threads.

    Args:
        base_url: URL of the API.
        version: Version of the server.
        login: How to log in.
        private_key: The organization's private key.
        timeouts: Seconds to wait.
        verify_tls: False accepts any certificate.
        settle_seconds: Longest time after which a request of ours may still take effect although its answer was lost;
            a minute more than the limit for a read when None.
        encryption: Whether arguments may leave in the clear; as `requires_encryption` when None.
        known_keys: Fingerprints of public keys that a person vouches for, by name or id of the organization.

    Attributes:
        version: Version of the server.
        private_key: The organization's private key, None when none was given.
        requires_encryption: Whether nothing is sent to a collaboration of which the server says that it is not
            encrypted. By default so when there is a private key: whoever gives one means it to be used.
        settle_seconds: As given.
        known_keys: Public keys of organizations that were written to before.
    """

    def __init__(
        self,
        base_url: str,
        version: Version,
        login: Login,
        *,
        private_key: PrivateKey | None = None,
        timeouts: Timeouts | None = None,
        verify_tls: bool = True,
        settle_seconds: float | None = None,
        encryption: Encryption | None = None,
        known_keys: Mapping[str, str] | None = None,
    ) -> None:
        timeouts = timeouts or Timeouts()
        self.version = version
        self.private_key = private_key
        self.requires_encryption = encryption == "required" or (encryption is None and private_key is not None)
        self.settle_seconds = timeouts.read_seconds + _HELD_SECONDS if settle_seconds is None else settle_seconds
        own_key = private_key.public_key.fingerprint if private_key is not None else ""
        self.known_keys = KnownKeys(base_url, own_key, known_keys)
        self._authenticator = Authenticator(login)
        self._timeouts, self._verify_tls = timeouts, verify_tls
        super().__init__(self._connected(base_url))
        self._lock = threading.Lock()
        self._told = _Told()

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections."""
        self.close()

    def __repr__(self) -> str:
        return f"Vantage6Client({self.url}, {self.version.text}, {self._authenticator.identity})"

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def again(self) -> Vantage6Client:
        """Make a further client of the same account, with connections of its own.

        It goes on with the log-in of this one, and does not ask again who the account is, how the members of a
        collaboration are called, and whether there is a blob store.
        """
        twin = copy(self)
        twin._session = self._connected(self.url)
        return twin

    def _connected(self, url: str) -> HttpSession:
        return HttpSession(
            url, auth_headers=self._authenticator.headers, timeouts=self._timeouts, verify_tls=self._verify_tls
        )

    @property
    def url(self) -> str:
        """URL of the API."""
        return self._http.base_url

    # -- the account ---------------------------------------------------------------------------------------------------

    @property
    def me(self) -> User:
        """The account that is logged in, read once (``GET user/me``, before generation 5 ``GET user/{id}``).

        Raises:
            AuthenticationError: The login was refused.
        """
        with self._lock:
            if self._told.me is None:
                self._told.me = self.ask(User, "GET", f"/user/{self._my_id()}", about="the account")
            return self._told.me

    @property
    def organization_id(self) -> int:
        """The account's organization."""
        if self.me.organization_id is None:
            raise UnexpectedResponse(f"{self.url} does not tell the organization of {self.me.username!r}.")
        return self.me.organization_id

    def _my_id(self) -> int | str:
        if self.version.major == 5:
            return "me"
        claims = claims_of(self._authenticator.access_token())
        # Old servers of generation 3 call it identity.
        number = claims.sub if claims.sub is not None else claims.identity
        if not str(number).isdecimal():
            raise UnexpectedResponse(f"{self.url} gives a token that does not tell the number of its account.")
        return int(str(number))

    # -- resources -----------------------------------------------------------------------------------------------------

    @overload
    def records(
        self,
        kind: type[R],
        *,
        fields: None = None,
        include: Sequence[str] = (),
        limit: int | None = None,
        **filters: Any,
    ) -> list[R]: ...
    @overload
    def records(
        self,
        kind: type[R],
        *,
        fields: Sequence[str],
        include: Sequence[str] = (),
        limit: int | None = None,
        **filters: Any,
    ) -> list[dict[str, JsonValue]]: ...
    def records(
        self,
        kind: type[R],
        *,
        fields: Sequence[str] | None = None,
        include: Sequence[str] = (),
        limit: int | None = None,
        **filters: Any,
    ) -> list[R] | list[dict[str, JsonValue]]:
        """List objects, all pages of them. Safe to repeat.

        Args:
            kind: What to list, for instance `Organization`.
            fields: Names of attributes; each object is a mapping of these only. ``organization`` does for
                ``organization_id``, as in the official client, and ``organizations`` are included unasked.
            include: Related objects to include, for instance ``["organizations"]`` of a collaboration.
            limit: Stop after so many, at least one.
            **filters: As in the table of resources, or as the official client calls them; text filters take the
                wildcards ``%`` and ``_``.

        Returns:
            The objects in the server's order.

        Raises:
            ConfigurationError: The server has no such list or filter, or the objects no such field.
            PermissionDeniedError: The account may not see them.
        """
        if fields is not None:
            rows_of(kind, (), fields)  # wrong ones are said before anything is read
            if "organizations" in fields and self.version.major > 3:
                include = [*include, "organizations"]
            listed = self.pages(kind, include=include, limit=limit, **filters)
            return rows_of(kind, (record for record, _ in listed), fields)
        return [record for record, _ in self.pages(kind, include=include, limit=limit, **filters)]

    def pages(
        self,
        kind: type[R],
        *,
        include: Sequence[str] = (),
        limit: int | None = None,
        max_bytes: int | None = None,
        page_size: int | None = None,
        **filters: Any,
    ) -> Iterator[tuple[R, Texts]]:
        """Read a list page after page, `page_size` objects at a time; arguments and errors as for `records`.

        A page above `max_bytes` is `TooLarge`; by default above 64 MiB, and above 16 GiB of runs and results. One too
        large for memory waits on disk: its long strings are given beside their records, good until the next
        record is asked for.

        Yields:
            Each object without its strings that are too long for memory, and these.
        """
        resource = resource_of(kind)
        resource.check_verb("list", self.version)
        if limit is not None and limit < 1:
            raise ConfigurationError(f"limit is {limit}; leave it out to list all of them.")
        filters = resource.filters_named(filters)
        if max_bytes is None:
            max_bytes = _MAX_LIST_BYTES if issubclass(kind, Run | EncodedResult) else _MAX_PLAIN_BYTES
        owner = {name: filters.pop(name) for name in resource.owner_fields if name in filters}
        if len(owner) < len(resource.owner_fields):
            raise ConfigurationError(f"{resource.name}: give {' and '.join(resource.owner_fields)} to list them.")
        path = "/" + resource.collection_path(self.version, owner)
        # The server's links lose repeated parameters, so pages are counted here.
        params = resource.query(self.version, filters)
        if include:
            params["include"] = list(include)
        page_size = page_size or _PAGE_SIZE
        with ExitStack() as open_page:

            def page(number: int) -> tuple[Sequence[tuple[R, Texts]], bool]:
                open_page.close()
                # Generation 3 gives everything in a bare list when no page is asked for.
                if self.version.major > 3:
                    params.update(page=number, per_page=min(limit or page_size, page_size))
                records, more = open_page.enter_context(self._page(path, params, number, max_bytes))
                return [self._entry(kind, record) for record in records], more

            listed = pages_of(page, identity=lambda entry: entry[0].id, what=f"The list {self.url}{path}")
            yield from islice(listed, limit)

    @contextmanager
    def _page(
        self, path: str, params: Mapping[str, Any], number: int, max_bytes: int
    ) -> Iterator[tuple[list[Any], bool]]:
        """Open one page of a list: its records, and whether more follow."""
        what = f"The list {self.url}{path}"
        with self.opened("GET", path, about=path, params=params) as response:
            count = response.headers.get("total-count", "")
            bound = int(count) + _MEANWHILE if count.isdecimal() and len(count) < 10 else _MAX_UNCOUNTED
            if (number - 1) * int(params.get("per_page", 0)) > bound:
                raise UnexpectedResponse(
                    f"{what} goes on beyond {bound} entries; the server repeats itself. Refused.", url=self.url + path
                )
            length = response.headers.get("content-length", "")
            if length.isdecimal() and int(length) > max_bytes:
                raise TooLarge(f"{what} has {length} bytes, more than {max_bytes}. It was not read.")
            chunks = self._http.chunks(response)
            with read_json(chunks, memory_bytes=_MEMORY_BYTES, max_bytes=max_bytes, what=what) as answer:
                records: Any = answer
                links: Any = {} if self.version.major == 3 else None
                if isinstance(answer, dict):
                    records, links = answer.get("data"), answer.get("links")
                # A list without links may be a part of one.
                if not isinstance(records, list) or not isinstance(links, dict):
                    raise UnexpectedResponse(f"{what} is no list with links to its pages.", url=self.url + path)
                yield records, "next" in links

    def _entry(self, kind: type[R], record: Any) -> tuple[R, Texts]:
        texts: dict[str, LongText] = {}
        if isinstance(record, dict):
            texts = {name: value for name, value in record.items() if isinstance(value, LongText)}
            record = {name: value for name, value in record.items() if name not in texts}
        try:
            return kind.model_validate(record), texts
        except (ValidationError, RecursionError) as error:
            # The input is left out: it may hold secrets.
            problems = error.errors(include_input=False) if isinstance(error, ValidationError) else []
            fields = ", ".join(".".join(map(str, problem["loc"])) or "all of it" for problem in problems)
            raise UnexpectedResponse(
                f"{self.url} describes a {kind.resource} in a way unknown here: {fields or 'too deep'}.", url=self.url
            ) from None

    def get(self, kind: type[R], object_id: int, *, include: Sequence[str] = ()) -> R:
        """Read one object. Safe to repeat.

        Args:
            kind: What it is, for instance `Task`.
            object_id: Its id.
            include: Related objects to include.

        Raises:
            NotFoundError: There is none of this id, or it is hidden.
            PermissionDeniedError: The account may not see it.
        """
        resource = resource_of(kind)
        resource.check_verb("get", self.version)
        path = "/" + resource.item_path(self.version, object_id)
        params = {"include": list(include)} if include else None
        return self.ask(kind, "GET", path, params=params, about=f"{resource.name} {object_id}")

    def create(self, kind: type[R], **fields: Any) -> R:
        """Make an object. Not safe to repeat: most kinds can be made twice.

        Args:
            kind: What to make.
            **fields: In the server's words; those that are None are left out.

        Returns:
            The object; secrets that the server shows once are in it.

        Raises:
            RequestRefused: The server finds fault with a field, or the name is taken.
            PermissionDeniedError: The account may not make it.
            NetworkError: No answer; it may have been made.
        """
        resource = resource_of(kind)
        resource.check_verb("create", self.version)
        owner = {name: fields.pop(name) for name in resource.owner_fields if name in fields}
        path = "/" + resource.collection_path(self.version, owner)
        return self.ask(kind, "POST", path, json_body=_without_none(fields), about=f"new {resource.name}")

    def update(self, kind: type[R], object_id: int, **fields: Any) -> R:
        """Change fields of an object. Safe to repeat.

        Args:
            kind: What it is.
            object_id: Its id.
            **fields: New values; those that are None are left out, because servers refuse them.

        Raises:
            RequestRefused: The server finds fault with a field.
            PermissionDeniedError: The account may not change it.
            NotFoundError: There is none of this id.
        """
        resource = resource_of(kind)
        resource.check_verb("update", self.version)
        path = "/" + resource.item_path(self.version, object_id)
        about = f"{resource.name} {object_id}"
        return self.ask(kind, "PATCH", path, json_body=_without_none(fields), about=about)

    def delete(self, kind: type[Record], object_id: int, *, delete_dependents: bool = False) -> None:
        """Delete an object. Safe to repeat, but for the `NotFoundError` of the second time.

        Args:
            kind: What it is.
            object_id: Its id.
            delete_dependents: Delete what belongs to it too. Servers take any value of this parameter for true, so it
                is sent for True only.

        Raises:
            RequestRefused: Other objects depend on it.
            PermissionDeniedError: The account may not delete it.
            NotFoundError: There is none of this id.
        """
        resource = resource_of(kind)
        resource.check_verb("delete", self.version)
        if delete_dependents and not resource.cascades:
            raise ConfigurationError(f"{resource.name}: nothing depends on these, so delete_dependents has no meaning.")
        path = "/" + resource.item_path(self.version, object_id)
        params = {"delete_dependents": "true"} if delete_dependents else None
        self.tell("DELETE", path, params=params, about=f"{resource.name} {object_id}")

    def add_member(self, kind: type[Record], object_id: int, member: type[Record], member_id: int) -> None:
        """Put an object into another: an organization into a collaboration or study, a rule into a role.

        The rules of a role are read and written back as a whole, because generation 5 knows no other way and 3 says
        that it has taken one out and has not: of two who change the same role at the same moment, the later wins.

        Args:
            kind: What takes the member.
            object_id: Its id.
            member: What is put in.
            member_id: Its id.

        Raises:
            ConfigurationError: There is no such membership.
            NotFoundError: There is no such object, or it is to be taken out and is not in.
            PermissionDeniedError: The account may not do this.
        """
        self._change_members("POST", kind, object_id, member, member_id)

    def remove_member(self, kind: type[Record], object_id: int, member: type[Record], member_id: int) -> None:
        """Take an object out of another; arguments and errors as for `add_member`."""
        self._change_members("DELETE", kind, object_id, member, member_id)

    def _change_members(
        self, verb: str, kind: type[Record], object_id: int, member: type[Record], member_id: int
    ) -> None:
        resource = resource_of(kind)
        if member not in resource.members:
            raise ConfigurationError(f"{resource.name}: no {member.resource} can be put in or taken out.")
        about = f"{member.resource} {member_id} of {resource.name} {object_id}"
        if kind is Role:
            rules = {rule.id for rule in self.records(Rule, role_id=object_id)}
            if verb == "DELETE" and member_id not in rules:
                raise NotFoundError(f"There is no {about}.")
            rules = rules | {member_id} if verb == "POST" else rules - {member_id}
            self.update(Role, object_id, rules=sorted(rules))
        else:
            path = f"/{resource.item_path(self.version, object_id)}/{resource.members[member]}"
            self.tell(verb, path, json_body={"id": member_id}, about=about)

    # -- what is asked for by name -------------------------------------------------------------------------------------

    def collaboration(self, name_or_id: str | int) -> Collaboration:
        """Find a collaboration, with its members and their public keys.

        One request on generations 4 and 5, two on 3.

        Args:
            name_or_id: Its exact name, or its id.

        Raises:
            NotFoundError: There is none; the message lists those the account sees.
        """
        if self.version.major == 3:
            found = self._one_of(Collaboration, name_or_id, ())
            members = tuple(self.records(Organization, collaboration_id=found.id))
            found = found.model_copy(update={"organizations": members})
        else:
            found = self._one_of(Collaboration, name_or_id, ("organizations",))
        self._told.names[found.id] = {member.id: member.name for member in found.organizations}
        return found

    def names_of_members(self, collaboration_id: int, *, including: Collection[int | None] = ()) -> dict[int, str]:
        """Tell how the members of a collaboration are called, as far as the account may see them.

        Read once, and again when one is asked for that was not there (``GET organization``). Safe to repeat.

        Args:
            collaboration_id: The collaboration.
            including: Ids of those whose names are needed.

        Raises:
            PermissionDeniedError: The account may not see them.
        """
        known = self._told.names.get(collaboration_id, {})
        if not known or set(including) - {None} - known.keys():
            members = self.records(Organization, collaboration_id=collaboration_id)
            known = self._told.names[collaboration_id] = {member.id: member.name for member in members}
        return known

    def study(self, name_or_id: str | int, collaboration_id: int) -> Study:
        """Find a study with its members.

        Args:
            name_or_id: Its exact name, or its id.
            collaboration_id: The collaboration it is part of.

        Raises:
            NotFoundError: There is none; the message lists those the account sees.
        """
        return self._one_of(Study, name_or_id, ("organizations",), collaboration_id=collaboration_id)

    def _one_of(self, kind: type[R], name_or_id: str | int, include: Sequence[str], **filters: Any) -> R:
        resource = resource_of(kind)
        # Names of digits only are refused by servers, so digits are an id.
        if isinstance(name_or_id, str) and name_or_id.isdecimal():
            name_or_id = int(name_or_id)
        if isinstance(name_or_id, int):
            try:
                return self.get(kind, name_or_id, include=include)
            except NotFoundError:
                wanted = f"id {name_or_id}"
        else:
            # The server's filter knows wildcards and may ignore case.
            for found in self.records(kind, fields=None, name=name_or_id, include=include, **filters):
                if getattr(found, "name", None) == name_or_id:
                    return found
            wanted = f"name {name_or_id!r}"
        known = ", ".join(
            f"{getattr(one, 'name', '')!r} (id {one.id})" for one in self.records(kind, fields=None, **filters)
        )
        raise NotFoundError(f"There is no {resource.name} of {wanted}. Known: {known or 'none'}.", url=self.url)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def tasks_named(self, name: str, collaboration_id: int) -> list[Task]:
        """Look for tasks by their exact name. Safe to repeat.

        Args:
            name: The name, unique by its token.
            collaboration_id: Where they were made.

        Returns:
            The tasks, the oldest first; usually one or none.
        """
        # The server's filter knows wildcards and may ignore case.
        found = self.records(Task, name=name, collaboration_id=collaboration_id)
        return sorted((task for task in found if task.name == name), key=lambda task: task.id)

    def create_task(self, body: Mapping[str, Any] | IO[bytes]) -> Task:
        """Send a task (``POST task``). Never repeated here: look for its name first.

        Args:
            body: In the words of the server's generation; or a file with the same as JSON, which is sent from its
                beginning piece by piece.

        Raises:
            RequestRefused: The server finds fault with it; nothing was made.
            PermissionDeniedError: The account may not create tasks in this collaboration.
            NetworkError: No answer; the task may exist.
        """
        if isinstance(body, Mapping):
            return self.ask(Task, "POST", "/task", json_body=body, about="new task")
        headers = {"Content-Type": "application/json"}
        return self.ask(Task, "POST", "/task", body=body, headers=headers, about="new task")

    def task_status(self, task_id: int) -> Status:
        """Ask for the state of a task, with as little traffic as the server allows. Safe to repeat.

        Args:
            task_id: The task.

        Raises:
            TaskGone: It was deleted.
        """
        if (self.version.major, self.version.minor) < (4, 11):
            return self.task(task_id).status
        try:
            return self.ask(_TaskStatus, "GET", f"/task/{task_id}/status", about=f"task {task_id}").status
        except NotFoundError as error:
            raise _gone(task_id, error) from error

    def task(self, task_id: int) -> Task:
        """Read a task. Safe to repeat.

        Args:
            task_id: The task.

        Raises:
            TaskGone: It was deleted.
        """
        try:
            return self.get(Task, task_id)
        except NotFoundError as error:
            raise _gone(task_id, error) from error

    def runs(self, task_id: int, *, max_bytes: int = _MAX_LIST_BYTES) -> list[Run]:
        """List the runs of a task, with their logs. Safe to repeat.

        Servers add the arguments of each run, which is why an answer may be large.

        Args:
            task_id: The task.
            max_bytes: A larger answer is not read.

        Raises:
            TooLarge: A page of the answer has more than `max_bytes`.
            TaskGone: The task was deleted.
        """
        try:
            listed = [run for run, _ in self.pages(Run, max_bytes=max_bytes, task_id=task_id)]
            return sorted(listed, key=lambda run: run.id)
        except RequestRefused as error:
            # An unknown task is a wrong request here.
            raise _gone(task_id, error) from error

    def kill_task(self, task_id: int) -> bool:
        """Kill a task and its subtasks (``POST kill/task``). Safe to repeat.

        Args:
            task_id: The task.

        Returns:
            False when there was nothing left to kill.

        Raises:
            CancelNotPermitted: The role does not allow it; the task goes on.
            TaskGone: It was deleted.
        """
        try:
            self.tell("POST", "/kill/task", json_body={"id": task_id}, about=f"task {task_id}")
        except PermissionDeniedError as error:
            raise CancelNotPermitted(
                f"{self.me.username!r} may not kill task {task_id}; it goes on. The role needs the rule to send events "
                "in the collaboration, as Collaboration Admin has. Deleting the task also stops it, and deletes its "
                "results and logs; that is never done unasked.",
                status=error.status,
                url=error.url,
            ) from error
        except RequestRefused:
            return False
        except NotFoundError as error:
            raise _gone(task_id, error) from error
        return True

    def kill_node_tasks(self, node_id: int) -> None:
        """Kill everything that runs on a node (``POST kill/node/tasks``). Servers of generation 4 fail at it.

        Args:
            node_id: The node.

        Raises:
            CancelNotPermitted: The role does not allow it.
            ServerFault: The server is of generation 4.
        """
        try:
            self.tell("POST", "/kill/node/tasks", json_body={"id": node_id}, about=f"node {node_id}")
        except PermissionDeniedError as error:
            raise CancelNotPermitted(str(error), status=error.status, url=error.url) from error

    def columns(
        self,
        *,
        dataframe_id: int | None = None,
        label: str | None = None,
        collaboration_id: int | None = None,
        organization_ids: Sequence[int] | None = None,
    ) -> list[Column]:
        """List columns: of a dataframe on generation 5, of a database on generation 4. Safe to repeat.

        On generation 4 the nodes tell them while they are online; where one does not, the server is asked
        (``POST column``), which may start a task there.

        Args:
            dataframe_id: The dataframe (generation 5).
            label: Label of the database (generation 4).
            collaboration_id: The collaboration of the nodes (generation 4).
            organization_ids: Whose nodes to look at; all of the collaboration when None (generation 4).

        Returns:
            The columns; empty when the server had to start a task to find out.

        Raises:
            ConfigurationError: What the server's generation needs is missing, or it is 3, which knows no columns.
        """
        if self.version.major == 5 and dataframe_id is not None:
            return list(self.get(Dataframe, dataframe_id).columns)
        if self.version.major != 4 or label is None or collaboration_id is None:
            raise ConfigurationError(
                "Columns are listed by dataframe_id on generation 5, by label and collaboration_id on generation 4; "
                f"{self.url} is {self.version.text}."
            )
        nodes = nodes_of(self, collaboration_id)
        wanted = list(nodes) if organization_ids is None else list(organization_ids)
        shared = [nodes[one].columns(label) if one in nodes else () for one in wanted]
        if all(shared):
            return [
                Column(name=name, node_id=nodes[one].id)
                for one, names in zip(wanted, shared, strict=True)
                for name in names
            ]
        organizations = [{"id": organization_id} for organization_id in wanted]
        body = {"db_label": label, "collaboration_id": collaboration_id, "organizations": organizations}
        answer = self.ask(_Columns, "POST", "/column", json_body=body, about=f"columns of {label!r}")
        return [Column(name=str(name)) for name in answer.columns]

    def preprocess(self, dataframe_id: int, task: Mapping[str, Any]) -> Dataframe:
        """Send a step that changes a dataframe (``POST session/dataframe/{id}/preprocess``). Never repeated here.

        Args:
            dataframe_id: The dataframe.
            task: Image, method and the organizations with their arguments.

        Returns:
            The dataframe; its ``last_session_task`` is the step.
        """
        path = f"/session/dataframe/{dataframe_id}/preprocess"
        body = {"dataframe_id": dataframe_id, "task": task}
        return self.ask(Dataframe, "POST", path, json_body=body, about=f"dataframe {dataframe_id}")

    # -- blob store ----------------------------------------------------------------------------------------------------

    @property
    def has_blob_store(self) -> bool:
        """Whether large inputs and results go through a blob store (``GET blobstream/status``, 4.13), read once."""
        with self._lock:
            if self._told.blob_store is None:
                self._told.blob_store = (self.version.major, self.version.minor) >= (4, 13) and self._ask_blob_store()
            return self._told.blob_store

    def _ask_blob_store(self) -> bool:
        try:
            return self.ask(_BlobStore, "GET", "/blobstream/status", about="the blob store").blob_store_enabled
        except PlatformError as error:
            # Builds without it answer as for any page that is not there.
            if error.status == requests.codes.not_found:
                return False
            raise

    def upload_blob(self, content: bytes | IO[bytes]) -> str:
        """Put a blob into the store (``POST blobstream``). Repeating makes another blob.

        Args:
            content: Encrypted in blob form, or base64. A file is sent from its beginning piece by piece.

        Returns:
            Its name.

        Raises:
            PlatformError: The store refused it.
        """
        headers = {"Content-Type": "application/octet-stream"}
        return self.ask(_Blob, "POST", "/blobstream", body=content, headers=headers, about="the blob store").uuid

    @contextmanager
    def download(self, path: str, params: Mapping[str, Any] | None = None) -> Iterator[Iterator[bytes]]:
        """Open an answer to be read piece by piece. Safe to repeat.

        Args:
            path: Below the API, for instance ``/blobstream/{uuid}``.
            params: Query parameters.

        Yields:
            The pieces of the body.

        Raises:
            NotFoundError: There is nothing of this name.
            NetworkError: The connection broke.
        """
        with self.opened("GET", path, about=path, params=params) as response:
            yield self._http.chunks(response)

    def beside(self, url: str) -> AbstractContextManager[Vantage6Rest]:
        """Open another service of the federation, such as an algorithm store.

        Args:
            url: Where it is. It is asked as the account on the server's own origin, and without a login elsewhere: a
                key of ours goes to no other host.

        Returns:
            Its REST interface; connections are closed at the end of the block.

        Raises:
            ConfigurationError: The URL is none.
        """
        if urlsplit(url)[:2] == urlsplit(self.url)[:2]:
            return _closing(self._connected(url))
        return _closing(HttpSession(url, timeouts=self._timeouts, verify_tls=self._verify_tls))

    # -- the server's affairs ------------------------------------------------------------------------------------------

    def health(self) -> dict[str, JsonValue]:
        """Ask whether the server is well (``GET health``); needs no login."""
        return self.ask(dict[str, JsonValue], "GET", "/health", authenticate=False)

    def recover_node_key(self, node_id: int) -> SecretStr:
        """Give a node a new API key (``POST recover/node``). The key so far is no longer good.

        Args:
            node_id: The node.

        Returns:
            The new key; the server shows it once.

        Raises:
            PermissionDeniedError: The account may not edit the node.
        """
        about = f"node {node_id}"
        return self.ask(_NodeKey, "POST", "/recover/node", json_body={"id": node_id}, about=about).api_key

    # -- requests ------------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(
        self, method: str, path: str, *, about: str = "", authenticate: bool = True, **request: Any
    ) -> Iterator[requests.Response]:
        """Send a request; where its token was refused, once more with a new one. A refused request had no effect.

        Args:
            method: HTTP verb.
            path: Appended to the base URL; already percent-encoded.
            about: What it is about, for errors.
            authenticate: False for the routes that need no login.
            **request: As for `HttpSession.open`.

        Yields:
            An answer with a status of success, its body unread.

        Raises:
            AuthenticationError: The login was refused, or even a new token is.
            PlatformError: As for `ask`.
            NetworkError: As for `HttpSession.open`.
        """
        renewed = False
        while True:
            if hasattr(request.get("body"), "seek"):
                request["body"].seek(0)
            with self._http.open(method, path, authenticate=authenticate, **request) as response:
                if response.ok:
                    yield response
                    return
                error = self._error(response, self._http.read_text(response), about)
                token = str(response.request.headers.get("Authorization", "")).removeprefix("Bearer ")
            renew = self._cure_for(error) if authenticate else None
            if renew is None:
                raise error
            if renewed:
                raise AuthenticationError(
                    f"{self._authenticator.identity}: the server refuses even a new token ({error}).",
                    status=error.status,
                    url=self.url,
                    spoken=True,
                )
            renew(token)
            renewed = True

    def _cure_for(self, error: PlatformError) -> Callable[[str], None] | None:
        """Tell what helps against a refusal; only the server's own words tell of a token that is not good."""
        if not error.spoken:
            return None
        if error.status == requests.codes.unauthorized and "Token has expired" in str(error):
            return self._authenticator.renew
        return self._authenticator.log_in_again if error.status == requests.codes.unprocessable_entity else None


@contextmanager
def _closing(session: HttpSession) -> Iterator[Vantage6Rest]:
    with session:
        yield Vantage6Rest(session)


def nodes_of(client: Vantage6Client, collaboration_id: int) -> dict[int, Node]:
    """List the nodes of a collaboration by their organization.

    Args:
        client: The account.
        collaboration_id: The collaboration.
    """
    nodes = client.records(Node, collaboration_id=collaboration_id)
    return {node.organization_id: node for node in nodes if node.organization_id is not None}


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _gone(task_id: int, error: PlatformError) -> TaskGone:
    return TaskGone(
        f"Task {task_id} does not exist any more; somebody deleted it. Its results are lost.",
        status=error.status,
        url=error.url,
    )
