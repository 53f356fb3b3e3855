"""What the REST clients of all platforms share: answers become models, refusals become errors, lists have an end.

An answer is believed only when it has the shape that was asked for. Everything else is a typed error: proxies, caches
and servers that break down answer too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Self, TypeVar, cast

import requests
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from prefect_biomed.clients.errors import (
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    ServerUnavailable,
    StorageFull,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import UNAVAILABLE, HttpSession, bare
from prefect_biomed.clients.texts import logger_of, one_line

__all__ = ["MAX_ENTRIES", "Answered", "OpenEnum", "Refusal", "RestClient", "pages_of", "read_body", "walk"]

logger = logger_of(__name__)

T = TypeVar("T")

MAX_ENTRIES = 1_000_000
"""Longer lists and larger folder trees than this are taken for a fault of the server."""

_MAX_SAID = 1000
_MAX_BARREN_PAGES = 2


class Answered(BaseModel):
    """Base of what a platform tells about something: fields that are not needed here may be there or not.

    A number in the place of a text is another shape; a number that is written as text is read.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)


class OpenEnum(Enum):
    """Base of enumerations that a platform may extend: a value that is unknown here is kept, and logged once.

    Written after the type of the values, as in `class Status(str, OpenEnum)`.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if type(value) is not cls._member_type_:  # type: ignore[attr-defined]  # of mixed-in types
            return None
        logger.warning("%s %r is unknown here; it is kept as it is", cls.__name__, value)
        member: Self = type(value).__new__(cls, value)  # type: ignore[call-arg]  # text and numbers take their value
        member._name_, member._value_ = str(value), value
        # Known from now on, so that equal values are one object and one line in the log.
        cls._value2member_map_[value] = member
        return member


@dataclass(frozen=True)
class Refusal:
    """What a platform says in its own error shape.

    Attributes:
        said: Its words, without secrets.
        code: Its own error code.
        kind: Class of the error, when the code tells more than the HTTP status.
        advice: What to do next.
        details: Further arguments of the error's class.
    """

    said: str
    code: int | None = None
    kind: type[PlatformError] | None = None
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class RestClient(ABC):
    """Base of the client of one platform.

    A platform overrides `_refusal`, by which it reads its own error shape, and the tables where a status means
    something else there.

    Args:
        http: The session to its server.
    """

    _unavailable: ClassVar[frozenset[int]] = UNAVAILABLE
    """Statuses that say *later*, whatever the body is."""

    _by_status: ClassVar[dict[int, tuple[type[PlatformError], str]]] = {
        401: (AuthenticationError, "The credentials were refused; check them."),
        403: (PermissionDeniedError, "The credentials are good, but do not allow this."),
        404: (NotFoundError, "Check the name."),
        507: (StorageFull, "Make room on the platform; then run this again."),
    }
    """Error class and advice by HTTP status, for answers in the platform's own shape; `PlatformError` for others."""

    def __init__(self, http: HttpSession) -> None:
        self._session = http

    @property
    def _http(self) -> HttpSession:
        return self._session

    def ask(self, shape: type[T], method: str, path: str, *, about: str = "", **request: Any) -> T:
        """Send a request and read its answer as a model.

        Never repeated here, but for reads on a broken connection (see `HttpSession`).

        Args:
            shape: A pydantic model, or any type that pydantic can read, such as `list[Job]`.
            method: HTTP verb.
            path: Appended to the base URL; already percent-encoded.
            about: What it is about, for errors.
            **request: As for `HttpSession.open`.

        Returns:
            The answer.

        Raises:
            UnexpectedResponse: The answer has another shape, or is an error in no shape of the platform's.
            ServerUnavailable: The server is out of order for the moment.
            PlatformError: The platform refused, in a class that says why.
            NetworkError: As for `HttpSession.open`.
        """
        with self.opened(method, path, about=about, **request) as response:
            return read_body(shape, self._http.read_text(response), response, about=about)

    def tell(self, method: str, path: str, *, about: str = "", **request: Any) -> None:
        """Send a request whose answer says nothing beyond its status; arguments and errors as for `ask`.

        A page for people is not an answer: something before the platform has sent it.
        """
        with self.opened(method, path, about=about, **request) as response:
            text = self._http.read_text(response)
            if _is_page(text):
                url, subject = bare(response.url), f"{about}: " if about else ""
                raise UnexpectedResponse(
                    f"{subject}{url} answered HTTP {response.status_code} with an HTML page, so it is not known "
                    "whether the platform did it. Check the URL of the platform and what lies between.",
                    status=response.status_code,
                    url=url,
                )

    @contextmanager
    def opened(self, method: str, path: str, *, about: str = "", **request: Any) -> Iterator[requests.Response]:
        """Send a request and hand out the answer with its body unread; arguments and errors as for `ask`.

        Yields:
            An answer with a status of success.
        """
        with self._http.open(method, path, **request) as response:
            if not response.ok:
                raise self._error(response, self._http.read_text(response), about)
            yield response

    @abstractmethod
    def _refusal(self, status: int, body: Any) -> Refusal | None:
        """Read the platform's own error shape.

        Args:
            status: HTTP status of the answer.
            body: The decoded body; None when it is empty or no JSON.

        Returns:
            What it says; None when it is not in the platform's shape.
        """

    def _error(self, response: requests.Response, text: str, about: str) -> PlatformError:
        """Make the error that an answer stands for. The only table from status to error."""
        status, url = response.status_code, bare(response.url)
        refusal = self._refusal(status, _decoded(text))
        subject = f"{about}: " if about else ""
        if refusal is None:
            return _unspoken(status, url, text, subject, later=status in self._unavailable)
        known = {"status": status, "code": refusal.code, "url": url, "spoken": True} | refusal.details
        code = f", code {refusal.code}" if refusal.code is not None else ""
        said = f"{subject}{one_line(refusal.said, most=_MAX_SAID)} (HTTP {status}{code})."
        if refusal.kind is not None:
            kind, advice = refusal.kind, refusal.advice
        elif status in self._unavailable:
            kind, advice = ServerUnavailable, "The server is out of order for the moment."
        else:
            kind, advice = self._by_status.get(status, (PlatformError, ""))
        return kind(f"{said} {refusal.advice or advice}".rstrip(), **known)


def read_body(shape: type[T], text: str, response: requests.Response, *, about: str = "") -> T:
    """Read the body of an answer of success as a model.

    Args:
        shape: As for `RestClient.ask`.
        text: The body.
        response: Its answer.
        about: What it is about, for errors.

    Returns:
        The model.

    Raises:
        UnexpectedResponse: The body has another shape. What it held is not repeated: it may be a secret.
    """
    try:
        return cast("T", _adapter(cast("Any", shape)).validate_json(text))
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        places = "; ".join(
            one_line(f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}", most=500) for one in problems[:5]
        )
        subject = f"{about}: " if about else ""
        raise UnexpectedResponse(
            f"{subject}{bare(response.url)} answered HTTP {response.status_code} in another shape than asked for: "
            f"{_kind_of(text)} ({places}). Check the URL of the platform and what lies between.",
            status=response.status_code,
            url=bare(response.url),
        ) from None


def pages_of(
    page: Callable[[int], tuple[Sequence[T], bool]],
    *,
    identity: Callable[[T], Hashable],
    what: str,
    most: int | None = None,
) -> Iterator[T]:
    """Read a list page by page until its end.

    Entries that move to the next page while it is read are given once.

    Args:
        page: Reads the page of this number, from 1; returns its entries and whether more may follow.
        identity: What makes an entry the same on two pages.
        what: What is listed, for the error.
        most: More entries than this are a fault of the server; `MAX_ENTRIES` when None.

    Yields:
        The entries.

    Raises:
        UnexpectedResponse: The server repeats itself, or there are more entries than any platform has.
    """
    seen: set[Hashable] = set()
    number, more, barren = 1, True, 0
    while more:
        entries, more = page(number)
        fresh = [entry for entry in entries if identity(entry) not in seen]
        seen.update(identity(entry) for entry in fresh)
        _bounded(len(seen), what, most)
        yield from fresh
        # Objects made meanwhile can push a page of known ones to here, but not page after page.
        barren = 0 if fresh else barren + 1
        if more and barren > _MAX_BARREN_PAGES:
            raise UnexpectedResponse(
                f"{what}: the server gives the same entries again and again, and says that more follow."
            )
        number += 1


def walk(
    root: str, children: Callable[[str], Iterable[T]], *, folder: Callable[[T], str | None], what: str
) -> Iterator[T]:
    """Walk through a tree of folders on a server.

    Args:
        root: Path of the folder to begin with.
        children: Lists one folder.
        folder: The path of an entry that is a folder, None for others.
        what: What is walked through, for errors.

    Yields:
        All entries below the root, folders included.

    Raises:
        UnexpectedResponse: A folder lies in itself, or there are more entries than any platform has.
    """
    waiting, seen, count = [root], {root}, 0
    while waiting:
        for entry in children(waiting.pop()):
            count += 1
            _bounded(count, what)
            yield entry
            path = folder(entry)
            if path is None:
                continue
            if path in seen:
                raise UnexpectedResponse(f"{what}: the server lists the folder {path[:200]!r} below itself. Refused.")
            seen.add(path)
            waiting.append(path)


def _bounded(count: int, what: str, most: int | None = None) -> None:
    most = most or MAX_ENTRIES
    if count > most:
        raise UnexpectedResponse(f"{what} has more than {most} entries; the server repeats itself. Refused.")


def _unspoken(status: int, url: str, text: str, subject: str, *, later: bool) -> PlatformError:
    """Make the error of an answer that is an error in no shape of the platform's."""
    what = f"{subject}{url} answered HTTP {status} with {_kind_of(text)}"
    if later:
        return ServerUnavailable(f"{what}. The server is out of order for the moment.", status=status, url=url)
    if status == requests.codes.insufficient_storage:
        return StorageFull(f"{what}. Make room on the platform; then run this again.", status=status, url=url)
    if status == requests.codes.unauthorized:
        return AuthenticationError(
            f"{what}. The credentials were refused; check them, and whether a proxy asks for others.",
            status=status,
            url=url,
        )
    return UnexpectedResponse(
        f"{what}, which is not how the platform speaks. Check its URL and what lies between.", status=status, url=url
    )


def _kind_of(text: str) -> str:
    if not text.strip():
        return "nothing"
    if _is_page(text):
        return "an HTML page"
    return "something that is not JSON" if _decoded(text) is None else "JSON"


def _is_page(text: str) -> bool:
    return "<html" in text[:2000].lower()


def _decoded(text: str) -> Any:
    try:
        return _adapter(object).validate_json(text)
    except ValidationError:
        return None


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
