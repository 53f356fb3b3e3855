"""One HTTP session for all platforms: pooled, bounded, and the only place that knows the exceptions of `requests`."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from importlib.metadata import version
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util.retry import Retry

from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    ConnectionFailed,
    NetworkError,
    RequestTimedOut,
    UnexpectedResponse,
)
from prefect_biomed.clients.texts import logger_of

__all__ = ["UNAVAILABLE", "USER_AGENT", "HttpSession", "Timeouts", "bare"]

logger = logger_of(__name__)

USER_AGENT = f"prefect-biomed/{version('prefect-biomed')}"
UNAVAILABLE = frozenset({429, 502, 503, 504})
"""With these a server, or a proxy before it, says that it is out of order for the moment, whatever the body is."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 3
_CHUNK_BYTES = 1024 * 1024


class Timeouts:
    """Seconds to wait for a connection, for the next byte of an answer, and for the whole of it.

    Args:
        connect_seconds: Limit for making the connection.
        read_seconds: Limit for each read; a server that works for long before it answers needs a large one.
        total_seconds: Limit for the head of an answer, for a whole body of JSON or text, and for each MiB of any other:
            a server that sends a byte now and then would hold us for ever without it. Never below `read_seconds`.
    """

    def __init__(self, connect_seconds: float = 10.0, read_seconds: float = 90.0, total_seconds: float = 600.0) -> None:
        self.connect_seconds = connect_seconds
        self.read_seconds = read_seconds
        self.total_seconds = total_seconds


class _HeaderAuth(AuthBase):
    """Sets headers at the time of the call, so that a renewed key is used, and keeps ~/.netrc out."""

    def __init__(self, headers: Callable[[], Mapping[str, str]]) -> None:
        self._headers = headers

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        for name, value in self._headers().items():
            # Checked here because http.client repeats the value in its error.
            if not (value.isascii() and value.isprintable()):
                raise ConfigurationError(
                    f"The credentials have characters that the header {name!r} cannot carry, such as a line break. "
                    "Check the key."
                )
            request.headers[name] = value
        return request


class _Session(requests.Session):
    """A session that leaves redirects alone: `requests` would read the body and the new place unasked."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


class _Overdue(threading.Timer):
    """Cuts a connection off when an answer takes too long as a whole.

    Args:
        seconds: The limit.
        cut: Shuts the socket down, so that the thread that reads from it wakes up.
    """

    def __init__(self, seconds: float, cut: Callable[[], object]) -> None:
        super().__init__(seconds, self._end)
        self.daemon = True
        self.passed = False
        self._cut = cut

    def _end(self) -> None:
        self.passed = True
        with suppress(OSError, ValueError, RuntimeError):  # the socket may have been closed at the same moment
            self._cut()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.cancel()
        if self.passed:
            raise TimeoutError("the answer took too long as a whole") from error


class _HandshakeFailed(ssl.SSLError):
    """TLS could not be agreed upon, so no request was sent. Later errors of TLS say nothing of that."""


class _BoundedHead:
    """A connection that waits a limited time for the status line and the headers together."""

    total_seconds: float
    sock: Any
    timeout: float | None

    def connect(self) -> None:
        try:
            super().connect()  # type: ignore[misc]  # of the class it is mixed with
        except ssl.SSLError as error:
            raise _HandshakeFailed(*error.args) from error

    def getresponse(self) -> Any:
        limit = max(self.total_seconds, self.timeout or 0.0)
        with _Overdue(limit, lambda: self.sock.shutdown(socket.SHUT_RDWR)):
            return super().getresponse()  # type: ignore[misc]  # of the class it is mixed with


def _bounded(total_seconds: float) -> Mapping[str, type[HTTPConnectionPool]]:
    """Make the pools whose connections bound the head of an answer."""
    pools: dict[str, type[HTTPConnectionPool]] = {}
    for scheme, connection, pool in (
        ("http", HTTPConnection, HTTPConnectionPool),
        ("https", HTTPSConnection, HTTPSConnectionPool),
    ):
        bounded = type("_Connection", (_BoundedHead, connection), {"total_seconds": total_seconds})
        pools[scheme] = type("_Pool", (pool,), {"ConnectionCls": bounded})
    return pools


class _BoundedAdapter(HTTPAdapter):
    """An adapter whose connections bound the time that an answer takes until its body begins."""

    def __init__(self, total_seconds: float, **settings: Any) -> None:
        self._total_seconds = total_seconds
        super().__init__(**settings)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _bounded(self._total_seconds)


class HttpSession:
    """A `requests` session bound to one server.

    Reads (GET and HEAD) are repeated twice by urllib3 for short outages; nothing else is ever repeated here.
    Redirects are followed for reads and on the same origin only, so that a key never reaches another host. Cookies are
    refused. Bodies of JSON and text answers are bounded.

    Args:
        base_url: Scheme, host and path prefix; paths of requests are appended to it.
        auth_headers: Called for each request; returns the headers that carry the credentials.
        timeouts: Seconds to wait.
        verify_tls: False accepts any certificate; a warning is logged each time a session is made.
        connections: Size of the connection pool.
        max_body_bytes: Bound of a JSON or text answer in bytes.
        read_retries: How often urllib3 repeats a read on a broken connection or HTTP 502, 503, 504.
    """

    def __init__(
        self,
        base_url: str,
        *,
        auth_headers: Callable[[], Mapping[str, str]] = dict,
        timeouts: Timeouts | None = None,
        verify_tls: bool = True,
        connections: int = 10,
        max_body_bytes: int = 64 * 1024 * 1024,
        read_retries: int = 2,
    ) -> None:
        parts = urlsplit(base_url)
        if "@" in base_url:
            raise ConfigurationError("Credentials do not belong into a URL. Use the block's fields.")
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise ConfigurationError(f"{base_url!r} is not a http(s) URL. Give scheme and host.")
        self.base_url = base_url.rstrip("/")
        self._auth = _HeaderAuth(auth_headers)
        self._timeouts = timeouts or Timeouts()
        self._max_body_bytes = max_body_bytes
        self._session = _Session()
        self._session.headers["User-Agent"] = USER_AGENT
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.verify = verify_tls
        if not verify_tls:
            logger.warning("TLS certificates of %s are not verified", parts.netloc)
        retry = Retry(
            total=read_retries,
            other=0,  # a broken TLS connection is among these, and they are repeated whatever the verb
            status_forcelist=UNAVAILABLE - {requests.codes.too_many_requests},
            allowed_methods=frozenset({"GET", "HEAD"}),
            backoff_factor=0.5,
            backoff_jitter=0.25,
            redirect=False,
            raise_on_status=False,
            respect_retry_after_header=False,  # a server must not decide for how long we sleep
        )
        adapter = _BoundedAdapter(
            self._timeouts.total_seconds, max_retries=retry, pool_connections=1, pool_maxsize=connections
        )
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def __enter__(self) -> Self:
        """Return the session itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json_body: Any = None,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        read_seconds: float | None = None,
        authenticate: bool = True,
        redirect_elsewhere: bool = False,
    ) -> Iterator[requests.Response]:
        """Send a request and hand out the answer with its body unread.

        Args:
            method: HTTP verb.
            path: Appended to the base URL; already percent-encoded.
            params: Query parameters.
            json_body: Sent as JSON.
            body: Sent as it is. An open file is streamed with its length announced.
            headers: Further headers.
            read_seconds: Overrides the read timeout.
            authenticate: False sends no credentials.
            redirect_elsewhere: Whether a read may be redirected to another origin, such as an object store. The
                credentials are not sent there.

        Yields:
            The answer, whatever its status.

        Raises:
            ConnectionFailed: No connection; nothing was sent.
            RequestTimedOut: No answer in time; the request may have taken effect.
            NetworkError: The connection broke; the request may have taken effect.
            UnexpectedResponse: The server redirects elsewhere.
        """
        url = self.base_url + path
        for _ in range(_MAX_REDIRECTS + 1):
            with _converted(method, url):
                request = requests.Request(
                    method,
                    url,
                    params=params,
                    json=json_body,
                    data=body,
                    headers=dict(headers or {}),
                    auth=self._auth if authenticate else _HeaderAuth(dict),
                )
                settings = self._session.merge_environment_settings(url, {}, True, self._session.verify, None)
                response = self._session.send(
                    self._session.prepare_request(request),
                    timeout=(
                        self._timeouts.connect_seconds,
                        read_seconds or self._timeouts.read_seconds,
                    ),
                    allow_redirects=False,
                    **settings,
                )
            with response:
                if response.status_code not in _REDIRECTS:
                    yield response
                    return
                target = self._redirected(method, url, response, redirect_elsewhere)
                authenticate = authenticate and _origin(target) == _origin(url)
                url, params = target, None
        raise UnexpectedResponse(f"{method} {bare(url)}: redirected too often.", url=bare(url))

    def text(self, method: str, path: str, **request: Any) -> tuple[requests.Response, str]:
        """Send a request and return its answer with its text; arguments and errors as for `open` and `read_text`."""
        with self.open(method, path, **request) as response:
            return response, self.read_text(response)

    def read_text(self, response: requests.Response) -> str:
        """Read the body of an open answer, up to the bound.

        Args:
            response: An answer from `open`.

        Returns:
            The decoded text.

        Raises:
            UnexpectedResponse: The body is larger than the bound.
            RequestTimedOut: It did not come in time.
        """
        body = bytearray()
        with _converted(response.request.method or "GET", response.url), self._bounded_body(response):
            for chunk in response.iter_content(_CHUNK_BYTES):
                body += chunk
                if len(body) > self._max_body_bytes:
                    raise UnexpectedResponse(
                        f"{bare(response.url)} answered with more than {self._max_body_bytes} bytes.",
                        status=response.status_code,
                        url=bare(response.url),
                    )
        return body.decode("utf-8", errors="replace")

    def chunks(self, response: requests.Response) -> Iterator[bytes]:
        """Read the body of an open answer piece by piece.

        Args:
            response: An answer from `open`.

        Yields:
            Pieces of at most 1 MiB.

        Raises:
            NetworkError: The connection broke, or the body is shorter than announced.
            RequestTimedOut: The next byte, or the next whole MiB, did not come in time.
        """
        pieces = response.iter_content(_CHUNK_BYTES)
        method, waited, read = response.request.method or "GET", 0.0, 0
        while True:
            begun = time.monotonic()
            with _converted(method, response.url), self._bounded_body(response):
                piece = next(pieces, None)
            if piece is None:
                return
            # A body that is sent in pieces of a byte each never meets the limit for one piece.
            waited, read = waited + time.monotonic() - begun, read + len(piece)
            if read >= _CHUNK_BYTES:
                waited, read = 0.0, 0
            elif waited > self._body_seconds:
                raise RequestTimedOut(f"{method} {bare(response.url)}: no answer in time.")
            yield piece

    @property
    def _body_seconds(self) -> float:
        return max(self._timeouts.total_seconds, self._timeouts.read_seconds)

    def _bounded_body(self, response: requests.Response) -> _Overdue:
        return _Overdue(self._body_seconds, response.raw.shutdown)

    def _redirected(self, method: str, url: str, response: requests.Response, elsewhere: bool) -> str:
        location = response.headers.get("Location", "")
        try:
            target = requests.compat.urljoin(url, location)
            allowed = _origin(target) == _origin(url)
        except ValueError:
            raise UnexpectedResponse(
                f"{method} {bare(url)}: the server redirects to {bare(location)[:200]!r}, which is no URL.",
                status=response.status_code,
                url=bare(url),
            ) from None
        if elsewhere and not allowed:
            # Never from https to http, nor to anything that is neither.
            allowed = urlsplit(target).scheme in {"https", urlsplit(url).scheme}
        if method in {"GET", "HEAD"} and allowed:
            return target
        raise UnexpectedResponse(
            f"{method} {bare(url)}: the server redirects to {bare(target)}. The credentials were not sent there. "
            "If that is the platform, give its URL.",
            status=response.status_code,
            url=bare(url),
        )


@contextmanager
def _converted(method: str, url: str) -> Iterator[None]:
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if isinstance(error, requests.RequestException):
            # They hold the request with its key, and go with our error wherever a library pickles that.
            error.request = error.response = None
        raise _failure(f"{method} {bare(url)}", error) from None


def _failure(what: str, error: Exception) -> BiomedError:
    """Make our error of what `requests` says."""
    wrapped = _wrapped(error)
    if isinstance(error, requests.exceptions.SSLError) and _is_of_handshake(wrapped):
        return ConfigurationError(
            f"{what}: the server's TLS certificate was not accepted ({_reason(error)}). "
            "Check the URL, or give the certificate authority in REQUESTS_CA_BUNDLE."
        )
    if isinstance(error, requests.exceptions.InvalidURL):
        return ConfigurationError(f"{what}: not a valid URL.")
    if isinstance(error, requests.ConnectTimeout):
        return ConnectionFailed(f"{what}: no connection ({_reason(error)}).")
    late = (requests.Timeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)
    # requests says "connection error" of a timeout too, when it came in the body or on the last repetition.
    if isinstance(error, late) or isinstance(wrapped, urllib3.exceptions.ReadTimeoutError):
        return RequestTimedOut(f"{what}: no answer in time.")
    if isinstance(wrapped, urllib3.exceptions.NewConnectionError):
        return ConnectionFailed(f"{what}: the connection failed ({_reason(error)}).")
    if isinstance(error, requests.ConnectionError):
        return NetworkError(f"{what}: the connection failed ({_reason(error)}).")
    return NetworkError(f"{what}: the connection broke ({_reason(error)}).")


def _is_of_handshake(error: Any) -> bool:
    return any(isinstance(cause, _HandshakeFailed) for cause in getattr(error, "args", ()))


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def bare(url: str | None) -> str:
    """Cut the query off a URL, because it may hold secrets.

    Args:
        url: Any URL; None counts as empty.

    Returns:
        The URL up to its question mark.
    """
    return (url or "").split("?", 1)[0]


def _wrapped(error: BaseException) -> Any:
    """What urllib3 said, without the layers around it."""
    cause = error.args[0] if error.args else error
    return getattr(cause, "reason", cause)


def _reason(error: BaseException) -> str:
    """The innermost cause in words; the outer texts repeat the whole URL with its query."""
    cause = _wrapped(error)
    while isinstance(cause, BaseException) and cause.args and isinstance(cause.args[-1], BaseException):
        cause = cause.args[-1]
    return cause.__class__.__name__ if isinstance(cause, BaseException) else str(cause)[:200]
