"""Servers that send a byte now and then do not hold us for ever."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from prefect_biomed.clients.errors import RequestTimedOut, is_transient
from prefect_biomed.clients.http import HttpSession, Timeouts

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Trickling:
    """Sends one part at once and then a byte every 50 ms, without end."""

    def __init__(self, at_once: bytes, byte: bytes) -> None:
        self._at_once, self._byte = at_once, byte
        self._ended = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(self._at_once)
                    while not self._ended.wait(0.05):
                        connection.sendall(self._byte)
                except OSError:
                    continue

    def stop(self) -> None:
        self._ended.set()
        self._socket.close()
        self._thread.join(5)


@pytest.fixture(params=["status line", "headers", "body of known length", "body in pieces"])
def server(request: pytest.FixtureRequest) -> Iterator[Trickling]:
    trickling = {
        "status line": (b"HTTP/1.1 200 O", b"K"),
        "headers": (HEAD + b"X-Long: ", b"x"),
        "body of known length": (HEAD + b"Content-Length: 100000\r\n\r\n", b" "),
        "body in pieces": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    }[request.param]
    server = Trickling(*trickling)
    yield server
    server.stop()


@pytest.mark.parametrize("reader", ["text", "chunks"])
def test_answer_that_trickles_is_given_up(server: Trickling, reader: str) -> None:
    timeouts = Timeouts(read_seconds=1.0, total_seconds=1.0)
    begun = time.monotonic()
    with (
        HttpSession(server.url, timeouts=timeouts, read_retries=0) as session,
        pytest.raises(RequestTimedOut, match=r"GET http://127\.0\.0\.1:\d+/x: no answer in time") as caught,
        session.open("GET", "/x?key=secret") as response,
    ):
        if reader == "text":
            session.read_text(response)
        else:
            list(session.chunks(response))
    assert 0.9 < time.monotonic() - begun < 20
    assert is_transient(caught.value)


def test_answer_that_takes_long_but_not_too_long_is_read() -> None:
    server = Trickling(HEAD + b"Content-Length: 10\r\n\r\n", b"1")
    try:
        with HttpSession(server.url, timeouts=Timeouts(read_seconds=1.0, total_seconds=30.0)) as session:
            assert session.text("GET", "/x")[1] == "1111111111"
    finally:
        server.stop()
