"""The HTTP session, against a server that answers what it is told to."""

import contextlib
import datetime
import gzip
import http.server
import io
import ipaddress
import logging
import os
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    ConnectionFailed,
    NetworkError,
    RequestTimedOut,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.http import HttpSession, Timeouts, _converted
from prefect_biomed.clients.rest import Refusal, RestClient

CANARY = "canary-5e1f"


@dataclass
class Answer:
    """What the server says to one request."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    pause_seconds: float = 0.0
    hang_up: bool = False


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next prepared answer; the last one stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Conversation)
        self.answers = [Answer()]
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that refuses a certificate is no error of the server."""


class Conversation(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def converse(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        time.sleep(answer.pause_seconds)
        self.close_connection = True
        if answer.hang_up:
            return
        self.send_response(answer.status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(answer.length or len(answer.body)),
            "Connection": "close",
        }
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = converse  # noqa: N815  # the names http.server looks for

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(context: ssl.SSLContext | None = None) -> Server:
        server = Server()
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            server.scheme = "https"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


@pytest.fixture
def session(server: Server) -> Iterator[HttpSession]:
    with HttpSession(server.url, auth_headers=lambda: {"apikey": CANARY}) as session:
        yield session


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip the pauses of urllib3 and remember them."""
    taken: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=taken.append, time=time.time))
    return taken


class Plain(RestClient):
    """A platform without an error shape of its own."""

    def _refusal(self, status: int, body: object) -> Refusal | None:
        return None


def told(error: BaseException) -> str:
    return "".join([str(error), repr(error), *traceback.format_exception(error)])


# -- the key -----------------------------------------------------------------------------------------------------------


def test_key_is_asked_for_at_each_request(server: Server) -> None:
    keys = iter(["first", "second"])
    with HttpSession(server.url, auth_headers=lambda: {"apikey": next(keys)}) as session:
        session.text("GET", "/a")
        session.text("GET", "/b")
        session.text("GET", "/c", authenticate=False)
    assert [headers.get("apikey") for _, _, headers, _ in server.seen] == ["first", "second", None]


@pytest.mark.parametrize("key", [f"{CANARY}\nX-Other: 1", f"{CANARY}\r", f"{CANARY}é", f"{CANARY}\x00"])
def test_key_that_no_header_can_carry_is_refused_without_telling_it(server: Server, key: str) -> None:
    with (
        HttpSession(server.url, auth_headers=lambda: {"apikey": key}) as session,
        pytest.raises(ConfigurationError, match="cannot carry") as caught,
    ):
        session.text("GET", "/x")
    assert CANARY not in told(caught.value)
    assert server.seen == []


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_to_another_host_is_refused_and_the_key_stays_here(
    start: Callable[..., Server], server: Server, session: HttpSession, method: str, status: int
) -> None:
    other = start()
    server.answers = [Answer(status, headers={"Location": f"{other.url}/elsewhere?apikey={CANARY}"})]
    with pytest.raises(UnexpectedResponse, match=f"redirects to {other.url}/elsewhere") as caught:
        session.text(method, "/x")
    assert other.seen == []
    assert len(server.seen) == 1
    assert CANARY not in told(caught.value)


def test_redirect_on_the_same_host_is_followed_for_reads_only(server: Server, session: HttpSession) -> None:
    server.answers = [Answer(302, headers={"Location": "/new?b=2"}), Answer(body=b'{"a": 1}')]
    assert session.text("GET", "/old", params={"a": 1})[1] == '{"a": 1}'
    assert [path for _, path, _, _ in server.seen] == ["/old?a=1", "/new?b=2"]
    assert server.seen[1][2]["apikey"] == CANARY
    server.answers = [Answer(307, headers={"Location": "/new"})]
    with pytest.raises(UnexpectedResponse, match="redirects to"):
        session.text("PUT", "/old", body=b"x")
    assert len(server.seen) == 3


def test_redirect_elsewhere_is_followed_without_the_key_where_allowed(
    start: Callable[..., Server], server: Server, session: HttpSession
) -> None:
    store = start()
    there = Answer(303, headers={"Location": f"{store.url}/object?signature=x"})
    server.answers = [there]
    store.answers = [Answer(302, headers={"Location": f"{server.url}/back"})]
    server.answers.append(Answer(body=b"content"))
    with session.open("GET", "/file", headers={"Range": "bytes=1-"}, redirect_elsewhere=True) as response:
        assert response.content == b"content"
    assert store.seen[0][1] == "/object?signature=x"
    assert store.seen[0][2]["Range"] == "bytes=1-"
    assert "apikey" not in store.seen[0][2]
    # Nor does a stranger bring us back here with it.
    assert server.seen[0][2]["apikey"] == CANARY
    assert "apikey" not in server.seen[1][2]
    for method, location in (("POST", f"{store.url}/object"), ("GET", "file:///etc/passwd"), ("GET", "ftp://h/x")):
        server.answers = [Answer(303, headers={"Location": location})]
        with (
            pytest.raises(UnexpectedResponse, match="redirects to"),
            session.open(method, "/file", redirect_elsewhere=True),
        ):
            pass
    assert len(store.seen) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_redirect_to_what_is_no_url_is_an_unexpected_response(
    server: Server, session: HttpSession, method: str
) -> None:
    server.answers = [Answer(302, headers={"Location": f"http://[bad?key={CANARY}"})]
    with pytest.raises(UnexpectedResponse, match="which is no URL") as caught, session.open(method, "/x"):
        pass
    assert CANARY not in told(caught.value)


def test_endless_redirects_end(server: Server, session: HttpSession) -> None:
    server.answers = [Answer(302, headers={"Location": "/again"})]
    with pytest.raises(UnexpectedResponse, match="redirected too often"):
        session.text("GET", "/again")
    assert len(server.seen) == 4


def test_netrc_and_cookies_are_ignored(
    server: Server, session: HttpSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1\nlogin somebody\npassword secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert requests.utils.get_netrc_auth(server.url) == ("somebody", "secret")  # it would be used
    server.answers = [Answer(headers={"Set-Cookie": "JSESSIONID=1; Path=/"})]
    for authenticate in (True, False, True):
        session.text("GET", "/x", authenticate=authenticate)
    for _, _, headers, _ in server.seen:
        assert "Authorization" not in headers
        assert "Cookie" not in headers


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{CANARY}@127.0.0.1",
        f"ftp://user:{CANARY}@127.0.0.1",
        f"user:{CANARY}@127.0.0.1",
        "ftp://127.0.0.1",
        "127.0.0.1:80",
        "http://",
        "",
    ],
)
def test_urls_that_are_none_or_carry_a_password_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HttpSession(url)
    assert CANARY not in told(caught.value)


def test_no_error_tells_a_key_or_a_query(server: Server, session: HttpSession, pauses: list[float]) -> None:
    bad = [
        Answer(hang_up=True),
        Answer(503, b"<html>"),
        Answer(500, b"<html>"),
        Answer(200, b"{", length=100),
        Answer(302, headers={"Location": f"http://127.0.0.1:1/?k={CANARY}"}),
        Answer(200, b"not json"),
    ]
    for answer in bad:
        server.answers = [answer]
        with pytest.raises(BiomedError) as caught:
            Plain(session).ask(object, "GET", "/x", params={"token": CANARY})
        assert CANARY not in told(caught.value)
        assert f"{server.url}/x" in str(caught.value)
        # Some libraries pickle an error with all that it came from.
        assert getattr(caught.value.__context__, "request", None) is None


# -- what is sent again and what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [Answer(503, b"{}"), Answer(502, b"<html>"), Answer(504, b""), Answer(hang_up=True)])
def test_reads_are_repeated_twice(server: Server, session: HttpSession, pauses: list[float], answer: Answer) -> None:
    server.answers = [answer]
    with contextlib.suppress(NetworkError, ServerUnavailable):
        session.text("GET", "/x")
    assert [method for method, _, _, _ in server.seen] == ["GET"] * 3
    assert sum(pauses) < 3


def test_read_succeeds_after_a_short_outage(server: Server, session: HttpSession, pauses: list[float]) -> None:
    server.answers = [Answer(hang_up=True), Answer(503), Answer(body=b"[1]")]
    assert session.text("GET", "/x")[1] == "[1]"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
@pytest.mark.parametrize("answer", [Answer(503), Answer(502), Answer(hang_up=True), Answer(body=b"{", length=9)])
def test_effects_are_never_repeated(server: Server, session: HttpSession, method: str, answer: Answer) -> None:
    server.answers = [answer]
    try:
        response, _ = session.text(method, "/x", body=b"1")
        assert response.status_code in (502, 503)
    except NetworkError as error:
        assert not isinstance(error, ConnectionFailed)
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_server_cannot_make_us_sleep(server: Server, session: HttpSession, pauses: list[float], status: int) -> None:
    server.answers = [Answer(status, headers={"Retry-After": "86400"})]
    session.text("GET", "/x")
    assert sum(pauses) < 3


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_large_answers_are_refused(server: Server) -> None:
    with HttpSession(server.url, max_body_bytes=1000) as session:
        server.answers = [Answer(body=b"[" + b"1," * 5000 + b"1]")]
        with pytest.raises(UnexpectedResponse, match="more than 1000 bytes"):
            session.text("GET", "/x")
        server.answers = [Answer(body=b'"' + b"x" * 998 + b'"')]
        assert session.text("GET", "/x")[1] == '"' + "x" * 998 + '"'


def test_compressed_bomb_is_not_unpacked_whole(server: Server) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    server.answers = [Answer(body=bomb, headers={"Content-Encoding": "gzip"})]
    read = 0
    with HttpSession(server.url, max_body_bytes=3_000_000) as session, session.open("GET", "/x") as response:
        chunks = session.chunks(response)

        def counted() -> Iterator[bytes]:
            nonlocal read
            for chunk in chunks:
                read += len(chunk)
                yield chunk

        session.chunks = lambda _: counted()  # type: ignore[method-assign]  # counts what passes
        with pytest.raises(UnexpectedResponse, match="more than"):
            session.read_text(response)
    assert read < 5_000_000


def test_answer_that_does_not_come_is_a_timeout(server: Server) -> None:
    server.answers = [Answer(pause_seconds=0.5)]
    with HttpSession(server.url, timeouts=Timeouts(1, 0.05), read_retries=0) as session:
        for method in ("GET", "POST"):
            with pytest.raises(RequestTimedOut, match=f"{method} .*no answer in time"):
                session.text(method, "/x")
        session.text("GET", "/x", read_seconds=5)


def test_body_that_stops_coming_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n123")
                time.sleep(0.3)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with HttpSession(url, timeouts=Timeouts(1, 0.1)) as session, pytest.raises(RequestTimedOut):
            session.text("GET", "/x")
        thread.join()


def test_no_server_is_a_failed_connection(pauses: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with HttpSession(f"http://127.0.0.1:{port}") as session:
        for method in ("GET", "POST"):
            with pytest.raises(ConnectionFailed, match="connection failed"):
                session.text(method, "/x")


def test_short_body_is_an_error_and_not_a_short_file(server: Server, session: HttpSession) -> None:
    server.answers = [Answer(body=b"12345", length=10)]
    received = io.BytesIO()
    with session.open("GET", "/x") as response, pytest.raises(NetworkError, match="broke"):
        for chunk in session.chunks(response):
            received.write(chunk)


def test_file_is_streamed_with_its_length(server: Server, session: HttpSession, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)
    with path.open("rb") as file:
        session.text("PUT", "/x", body=file)
    _, _, headers, body = server.seen[0]
    assert headers["Content-Length"] == "256000"
    assert "Transfer-Encoding" not in headers
    assert body == path.read_bytes()


# -- the one place where exceptions are converted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "expected", "transient"),
    [
        (requests.exceptions.SSLError("broken record"), NetworkError, True),
        (requests.ConnectTimeout("slow"), ConnectionFailed, True),
        (requests.ReadTimeout("slow"), RequestTimedOut, True),
        (requests.ConnectionError(ConnectionResetError(104, "reset")), NetworkError, True),
        (
            requests.ConnectionError(
                urllib3.exceptions.MaxRetryError(
                    None,  # type: ignore[arg-type]  # as requests does
                    "/x",
                    urllib3.exceptions.NewConnectionError(None, "refused"),  # type: ignore[arg-type]  # the same
                )
            ),
            ConnectionFailed,
            True,
        ),
        (requests.exceptions.ChunkedEncodingError("cut"), NetworkError, True),
        (requests.exceptions.ContentDecodingError("no gzip"), NetworkError, True),
        (requests.exceptions.InvalidURL("no host"), ConfigurationError, False),
        (urllib3.exceptions.ReadTimeoutError(None, "/x", "slow"), RequestTimedOut, True),  # type: ignore[arg-type]  # the same
        (urllib3.exceptions.ProtocolError("broken"), NetworkError, True),
        (urllib3.exceptions.IncompleteRead(1, 2), NetworkError, True),
        (ConnectionResetError(104, "reset by peer"), NetworkError, True),
    ],
    ids=lambda value: getattr(value, "__class__", type(value)).__name__ if isinstance(value, Exception) else "",
)
def test_exceptions_of_requests_become_ours(raised: Exception, expected: type[BiomedError], transient: bool) -> None:
    with pytest.raises(BiomedError) as caught, _converted("GET", f"http://host/x?key={CANARY}"):
        raise raised
    assert type(caught.value) is expected
    assert is_transient(caught.value) is transient
    assert "GET http://host/x" in str(caught.value)
    assert CANARY not in told(caught.value)


def test_errors_of_local_files_are_not_network_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), _converted("PUT", "http://host/x"):
        (tmp_path / "gone").open()


@pytest.mark.parametrize(
    ("status", "body", "expected", "words"),
    [
        (200, b"<!doctype html><html><body>hello", UnexpectedResponse, "HTML page"),
        (404, b"<html>", UnexpectedResponse, "HTTP 404 with an HTML page"),
        (200, b"plain", UnexpectedResponse, "not JSON"),
        (429, b"slow down", ServerUnavailable, "out of order"),
        (502, b"<html>", ServerUnavailable, "out of order"),
        (503, b"<html>", ServerUnavailable, "out of order"),
        (504, b"<html>", ServerUnavailable, "out of order"),
    ],
)
def test_answers_that_are_not_json_name_the_url(
    server: Server, session: HttpSession, status: int, body: bytes, expected: type[BiomedError], words: str
) -> None:
    server.answers = [Answer(status, body)]
    with pytest.raises(expected, match=words) as caught:
        Plain(session).ask(object, "POST", "/x")
    assert f"{server.url}/x" in str(caught.value)


def test_empty_answer_is_no_error_where_nothing_is_asked_for(server: Server, session: HttpSession) -> None:
    server.answers = [Answer(201, b" \n")]
    Plain(session).tell("PUT", "/x")


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_certificate(tmp_path: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def test_unknown_certificate_is_refused(
    start: Callable[..., Server], own_certificate: ssl.SSLContext, pauses: list[float]
) -> None:
    server = start(own_certificate)
    with HttpSession(server.url) as session, pytest.raises(ConfigurationError, match="certificate was not accepted"):
        session.text("GET", "/x")
    assert server.seen == []


@pytest.mark.parametrize(
    "parting",
    [
        pytest.param(b"HTTP/1.1 502 Bad Gateway\r\n\r\n", id="words without TLS"),
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x50", id="alert"),
    ],
)
def test_request_is_sent_once_and_not_called_unsent_when_tls_breaks_after_it(
    own_certificate: ssl.SSLContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pauses: list[float],
    parting: bytes,
) -> None:
    """A proxy that dies may speak without TLS, or close it with an alert."""
    requests_seen: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with own_certificate.wrap_socket(connection, server_side=True) as secured:
                requests_seen.append(secured.recv(65536))
                with socket.socket(fileno=os.dup(secured.fileno())) as bare:
                    bare.sendall(parting)

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "server.pem"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        with HttpSession(url) as session, pytest.raises(NetworkError) as caught:
            session.text("POST", "/x")
        listener.shutdown(socket.SHUT_RDWR)
    assert type(caught.value) is NetworkError
    assert len(requests_seen) == 1


def test_certificate_authority_can_be_given(
    start: Callable[..., Server], own_certificate: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(own_certificate)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "server.pem"))
    with HttpSession(server.url) as session:
        assert session.text("GET", "/x")[0].status_code == 200


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
@pytest.mark.parametrize("bundle", [False, True])
def test_certificates_can_be_ignored_with_a_warning_each_time(
    start: Callable[..., Server],
    own_certificate: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bundle: bool,
) -> None:
    server = start(own_certificate)
    if bundle:  # must not turn verification on again
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", requests.certs.where())
    for _ in range(2):
        with caplog.at_level(logging.WARNING), HttpSession(server.url, verify_tls=False) as session:
            assert session.text("GET", "/x")[0].status_code == 200
    assert sum("not verified" in message for message in caplog.messages) == 2
