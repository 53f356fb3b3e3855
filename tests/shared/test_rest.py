"""What the REST clients share, against a server that answers as it is told."""

import json
from collections.abc import Iterator, Sequence
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.http import HttpSession
from prefect_biomed.clients.rest import Answered, OpenEnum, Refusal, RestClient, pages_of, walk


class Job(Answered):
    id: int
    name: str


class Client(RestClient):
    """Speaks `{"error": …, "code": …}`; code 7 is a full house."""

    def _refusal(self, status: int, body: Any) -> Refusal | None:
        if not isinstance(body, dict) or not isinstance(body.get("error"), str):
            return None
        code = body.get("code")
        return Refusal(body["error"], code, CapacityError if code == 7 else None, "Wait." if code == 7 else "")


class Touchy(Client):
    _unavailable: ClassVar[frozenset[int]] = Client._unavailable | {500}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    status = 200
    body = b""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with HttpSession(f"http://127.0.0.1:{server.server_port}", read_retries=0) as session:
        yield Client(session)


def test_answer_becomes_a_model_and_what_is_not_needed_may_be_odd(server: Server, client: Client) -> None:
    server.body = b'[{"id": 1, "name": "a", "more": null}, {"id": 2, "name": "b"}]'
    assert client.ask(list[Job], "GET", "/jobs") == [Job(id=1, name="a"), Job(id=2, name="b")]


ODD = {
    "nothing": b"",
    "blanks": b" \n",
    "null": b"null",
    "another shape": b"[]",
    "an empty object": b"{}",
    "a text": b'"x"',
    "an HTML page": b"<!doctype html><html><body>Oops</body></html>",
    "a field missing": b'{"id": 1}',
    "a field of null": b'{"id": 1, "name": null}',
    "a number for a text": b'{"id": 1, "name": 3}',
    "a text for a number": b'{"id": "one", "name": "a"}',
    "cut short": b'{"id": 1, "na',
    "depth of 10,000": b"[" * 10_000,
    "deep and closed": b"[" * 10_000 + b"]" * 10_000,
    "no UTF-8": b'{"id": 1, "name": "\xff\xfe"',
}


@pytest.mark.parametrize("body", ODD.values(), ids=ODD)
def test_success_of_another_shape_is_unexpected(server: Server, client: Client, body: bytes) -> None:
    server.body = body
    with pytest.raises(UnexpectedResponse, match=r"job 1: .*another shape") as caught:
        client.ask(Job, "GET", "/jobs/1", about="job 1")
    assert caught.value.status == 200
    assert not is_transient(caught.value)


def test_error_does_not_repeat_what_the_answer_held(server: Server, client: Client) -> None:
    server.body = b'{"id": "canary-secret", "name": 3}'
    with pytest.raises(UnexpectedResponse, match="id: ") as caught:
        client.ask(Job, "GET", "/jobs/1?key=canary-query")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b"null", b'{"error": "busy"}'])
def test_server_out_of_order_is_transient_whatever_the_body(
    server: Server, client: Client, status: int, body: bytes
) -> None:
    server.status, server.body = status, body
    with pytest.raises(ServerUnavailable) as caught:
        client.ask(Job, "GET", "/jobs/1")
    assert is_transient(caught.value)


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b'{"error": "busy"}'])
def test_platform_may_use_500_so(server: Server, client: Client, body: bytes) -> None:
    server.status, server.body = 500, body
    with pytest.raises(ServerUnavailable):
        Touchy(client._http).ask(Job, "GET", "/jobs/1")
    with pytest.raises(PlatformError) as caught:
        client.ask(Job, "GET", "/jobs/1")
    assert not is_transient(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, PlatformError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (418, PlatformError),
        (500, PlatformError),
    ],
)
def test_refusal_in_the_platforms_words(server: Server, client: Client, status: int, kind: type[BiomedError]) -> None:
    server.status, server.body = status, b'{"error": "no way", "code": 3}'
    with pytest.raises(kind, match=rf"job 1: no way \(HTTP {status}, code 3\)") as caught:
        client.ask(Job, "GET", "/jobs/1", about="job 1")
    assert type(caught.value) is kind
    assert isinstance(caught.value, PlatformError)
    assert (caught.value.status, caught.value.code, caught.value.spoken) == (status, 3, True)


def test_page_is_no_answer_even_where_nothing_is_asked_for(server: Server, client: Client) -> None:
    server.status, server.body = 200, b"<!doctype html><HTML>Maintenance</HTML>"
    with pytest.raises(UnexpectedResponse, match=r"job 1: .* with an HTML page, so it is not known whether"):
        client.tell("GET", "/jobs/1", about="job 1")
    server.body = b'"done"'
    client.tell("GET", "/jobs/1", about="job 1")


def test_code_of_the_platform_wins_over_the_status(server: Server, client: Client) -> None:
    server.status, server.body = 400, b'{"error": "full", "code": 7}'
    with pytest.raises(CapacityError, match=r"full \(HTTP 400, code 7\)\. Wait\."):
        client.tell("GET", "/jobs/1")


@pytest.mark.parametrize("status", [400, 403, 404, 409, 500])
@pytest.mark.parametrize("body", [b"", b"<html>no</html>", b'{"detail": "another language"}', b"[]"])
def test_error_in_another_language_is_no_refusal(server: Server, client: Client, status: int, body: bytes) -> None:
    server.status, server.body = status, body
    with pytest.raises(UnexpectedResponse, match="not how the platform speaks") as caught:
        client.ask(Job, "GET", "/jobs/1")
    assert not caught.value.spoken


def test_refused_credentials_are_told_whoever_refuses_them(server: Server, client: Client) -> None:
    server.status, server.body = 401, b"<html>log in</html>"
    with pytest.raises(AuthenticationError) as caught:
        client.ask(Job, "GET", "/jobs/1")
    assert not caught.value.spoken


def test_answer_may_be_read_by_hand(server: Server, client: Client) -> None:
    server.body = b"some text"
    with client.opened("GET", "/log") as response:
        assert client._http.read_text(response) == "some text"


# -- enumerations ------------------------------------------------------------------------------------------------------


class Colour(str, OpenEnum):
    RED = "red"


class Level(int, OpenEnum):
    LOW = 1


class Painted(BaseModel):
    colour: Colour
    level: Level


def test_unknown_members_are_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    read = Painted.model_validate_json('{"colour": "blue", "level": 7}')
    assert (read.colour, read.level) == ("blue", 7)
    assert (read.colour.value, read.level.value) == ("blue", 7)
    assert read.colour is Painted.model_validate({"colour": "blue", "level": 1}).colour
    assert json.loads(read.model_dump_json()) == {"colour": "blue", "level": 7}
    assert caplog.text.count("'blue' is unknown here") == 1
    assert isinstance(read.colour, Enum)
    assert list(Colour) == [Colour.RED]


@pytest.mark.parametrize("answer", ['{"colour": 3, "level": 1}', '{"colour": "red", "level": "x"}'])
def test_members_of_another_type_are_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        Painted.model_validate_json(answer)


# -- lists and trees ---------------------------------------------------------------------------------------------------


def test_pages_are_read_to_the_end_and_moved_entries_given_once() -> None:
    pages = {1: ([1, 2], True), 2: ([2, 3], True), 3: ([4], False)}
    assert list(pages_of(lambda number: pages[number], identity=int, what="numbers")) == [1, 2, 3, 4]


def test_page_of_known_entries_does_not_end_the_list() -> None:
    pages = {1: ([1, 2], True), 2: ([1, 2], True), 3: ([3], False)}
    assert list(pages_of(lambda number: pages[number], identity=int, what="numbers")) == [1, 2, 3]


def test_list_that_repeats_itself_is_refused() -> None:
    asked: list[int] = []

    def page(number: int) -> tuple[Sequence[int], bool]:
        asked.append(number)
        return [1, 2], True

    with pytest.raises(UnexpectedResponse, match="numbers: the server gives the same entries again and again"):
        list(pages_of(page, identity=int, what="numbers"))
    assert asked == [1, 2, 3, 4]


def test_list_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_biomed.clients.rest.MAX_ENTRIES", 100)
    with pytest.raises(UnexpectedResponse, match="numbers has more than 100 entries"):
        list(pages_of(lambda number: (range(10 * number, 10 * number + 10), True), identity=int, what="numbers"))


def test_walk_gives_every_entry_of_a_tree() -> None:
    tree = {"/": ["/a/", "b"], "/a/": ["/a/c/", "d"], "/a/c/": []}
    found = walk("/", tree.__getitem__, folder=lambda entry: entry if entry.endswith("/") else None, what="tree")
    assert sorted(found) == ["/a/", "/a/c/", "b", "d"]


def test_folder_in_itself_is_refused() -> None:
    with pytest.raises(UnexpectedResponse, match="'/a' below itself"):
        list(walk("/", lambda _: ["/a"], folder=str, what="tree"))


def test_tree_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_biomed.clients.rest.MAX_ENTRIES", 100)
    with pytest.raises(UnexpectedResponse, match="tree has more than 100 entries"):
        list(walk("/", lambda path: [path + "x/"], folder=str, what="tree"))
