"""A small hostile server, and what the client of each platform makes of it: `python -m harness.hostile`.

It speaks honestly until the request that is meant, and then does what a broken proxy, a bad disk or an enemy would do.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from pydantic import SecretStr

from prefect_biomed.clients import http, rest
from prefect_biomed.clients.boss import BossClient
from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.clients.http import Timeouts
from prefect_biomed.clients.vantage6 import Organization, connect
from prefect_biomed.clients.vip import VipClient
from prefect_biomed.clients.vip.download import _walk

KEY = "CANARY-hostile-71ab"
NASTY = "run\n2026 ERROR forged\r\x1b[2J\u202e<img src=x>![x](javascript:y)"

READ_SECONDS = 1.0
WHOLE_SECONDS = 2.0
MOST_ENTRIES = 2000
"""Lists are cut at this number here, so that it takes no time; at a million otherwise."""


def jwt(**claims: Any) -> str:
    """Make an access token that lasts."""

    def part(data: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=").decode()

    return f"{part({})}.{part({'sub': '1', 'exp': time.time() + 9999, 'iat': time.time()} | claims)}.s"


Answer = Iterable[bytes]


def answer(body: bytes, *headers: str, status: str = "200 OK", kind: str = "application/json") -> Answer:
    """Write an honest answer."""
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return ["\r\n".join([*head, "", ""]).encode() + body]


@dataclass(frozen=True)
class Target:
    """A platform, what of it is attacked, and how it is asked.

    Attributes:
        name: Of the platform.
        path: Part of the path that is attacked.
        ask: Asks the server at a port.
        entry: An honest entry of a list, by number.
        listed: Makes the body of a list of entries.
        refused: Makes the body of an error of the platform with these words.
    """

    name: str
    path: str
    ask: Callable[[int], object]
    entry: Callable[[int], dict[str, Any]]
    listed: Callable[[list[dict[str, Any]]], Any]
    refused: Callable[[str], Any]


def _vip(port: int) -> object:
    with VipClient(f"http://127.0.0.1:{port}", KEY, read_seconds=READ_SECONDS) as client:
        return client.workflows()


def _vantage6(port: int) -> object:
    url = f"http://127.0.0.1:{port}"
    with connect(url, username="u", password=SecretStr(KEY), read_seconds=READ_SECONDS) as client:
        return client.records(Organization)


def _boss(port: int) -> object:
    limits = Timeouts(5.0, READ_SECONDS, WHOLE_SECONDS)
    with BossClient(f"127.0.0.1:{port}", KEY, protocol="http", timeouts=limits) as client:
        return client.list_jobs()


def _folder(port: int) -> object:
    with VipClient(f"http://127.0.0.1:{port}", KEY, read_seconds=READ_SECONDS) as client:
        return _walk(client, "/d")


def _file(port: int) -> object:
    with VipClient(f"http://127.0.0.1:{port}", KEY, read_seconds=READ_SECONDS) as client:
        return client.read_file("/d/f", max_bytes=10_000)


def _login(port: int) -> object:
    return _vantage6(port)


def _wrapped(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"data": entries, "links": {}}


VIP = Target(
    "VIP",
    "/executions",
    _vip,
    lambda n: {"identifier": f"w{n}", "name": "n", "status": "Running"},
    lambda entries: entries,
    lambda said: {"errorCode": 8000, "errorMessage": said},
)
VANTAGE6 = Target(
    "vantage6", "/organization", _vantage6, lambda n: {"id": n, "name": "o"}, _wrapped, lambda said: {"msg": said}
)
BOSS = Target(
    "Boss",
    "/ingest",
    _boss,
    lambda n: {"id": n, "collection": "c", "experiment": "e", "channel": "ch", "status": 1},
    lambda entries: {"ingest_jobs": entries},
    lambda said: {"status": 400, "code": 5000, "message": said},
)
PLATFORMS = (VIP, VANTAGE6, BOSS)


def _honest(path: str) -> Answer:
    if path.endswith("/platform"):
        return answer(json.dumps({"platformName": "CARMIN-server", "supportedModules": ["Processing"]}).encode())
    if path.endswith("/version"):
        return answer(b'{"version": "4.15.2"}')
    if path.endswith("/token/user"):
        return answer(json.dumps({"access_token": jwt(), "refresh_token": jwt()}).encode())
    return answer(b"{}", status="404 Not Found")


class Server:
    """The server.

    Args:
        path: Part of the path of the requests that are attacked.
        attack: Makes the answer to these.
    """

    def __init__(self, path: str = "", attack: Callable[[str], Answer] = lambda _: answer(b"{}")) -> None:
        self.seen: list[str] = []
        """Heads of the requests."""
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            timeout = 20

            def handle(self) -> None:
                try:
                    while self._one():
                        pass
                except (OSError, ValueError):
                    return

            def _one(self) -> bool:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = self.rfile.readline(70_000)
                    if not line:
                        return False
                    head += line
                text = head.decode("latin-1")
                outer.seen.append(text)
                length = next((int(one[15:]) for one in text.lower().split("\r\n") if one[:15] == "content-length:"), 0)
                self.rfile.read(length)
                asked = text.split(" ")[1]
                is_meant = path in asked.partition("?")[0]
                for piece in attack(asked) if is_meant else _honest(asked.partition("?")[0]):
                    self.wfile.write(piece)
                return not is_meant or not attack.__name__.startswith("closing_")

        class Listener(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self.port: int = self._listener.server_address[1]

    def __enter__(self) -> Server:
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()


# -- attacks on every platform -----------------------------------------------------------------------------------------

Attack = Callable[[Target, int], Callable[[str], Answer]]


def constant(*pieces: bytes) -> Attack:
    """Give always the same bytes, and close the connection after them."""

    def make(_: Target, __: int) -> Callable[[str], Answer]:
        def closing_answer(_: str) -> Answer:
            return pieces

        return closing_answer

    return make


def body(value: Callable[[Target], Any], *headers: str, status: str = "200 OK") -> Attack:
    """Give this value as JSON, or these bytes."""

    def make(target: Target, _: int) -> Callable[[str], Answer]:
        made = value(target)
        content = made if isinstance(made, bytes) else json.dumps(made).encode()
        return lambda _: answer(content, *headers, status=status)

    return make


def one(**changes: Any) -> Attack:
    """Give a list of one entry that was changed."""
    return body(lambda target: target.listed([target.entry(1) | changes]))


def _zeros(count: int) -> bytes:
    return gzip.compress(bytes(count), compresslevel=1)


def _endless(_: Target, __: int) -> Callable[[str], Answer]:
    def closing_endless(_: str) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        while True:
            yield piece

    return closing_endless


def _trickle(head: bytes, piece: bytes) -> Attack:
    def make(_: Target, __: int) -> Callable[[str], Answer]:
        def closing_trickle(_: str) -> Iterator[bytes]:
            yield head
            while True:
                time.sleep(0.05)
                yield piece

        return closing_trickle

    return make


def _silent(_: Target, __: int) -> Callable[[str], Answer]:
    def closing_silent(_: str) -> Iterator[bytes]:
        yield b""
        time.sleep(6 * READ_SECONDS)

    return closing_silent


def _to(place: str) -> Attack:
    def make(_: Target, elsewhere: int) -> Callable[[str], Answer]:
        to = place.format(elsewhere=elsewhere)
        return lambda _: answer(b"", f"Location: {to}", status="302 Found")

    return make


def _for_ever(target: Target, _: int) -> Callable[[str], Answer]:
    count = itertools.count()

    def more(_: str) -> Answer:
        listed = target.listed([target.entry(next(count)) for _ in range(50)])
        if isinstance(listed, dict) and "links" in listed:
            listed["links"] = {"next": "x"}
        return answer(json.dumps(listed).encode())

    return more


def _again_and_again(target: Target, _: int) -> Callable[[str], Answer]:
    listed = target.listed([target.entry(n) for n in range(50)])
    if isinstance(listed, dict) and "links" in listed:
        listed["links"] = {"next": "x"}
    return lambda _: answer(json.dumps(listed).encode())


HTML = b"<!doctype html><html><body>Login</body></html>"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

EVERYWHERE: dict[str, Attack] = {
    "page for people": body(lambda _: HTML),
    "nothing": body(lambda _: b""),
    "error page": body(lambda _: HTML, status="500 Oh"),
    "error with forged lines": body(lambda target: target.refused(NASTY), status="400 Bad\x1b[31m"),
    "retry after a year": body(lambda _: HTML, "Retry-After: 31536000", status="503 Later"),
    "no HTTP": constant(b"\x00\xff SSH-2.0 hello\r\n\r\n"),
    "connection closed": constant(b""),
    "cut short": constant(JSON_HEAD + b"Content-Length: 5000\r\n\r\n[{"),
    "length below zero": constant(JSON_HEAD + b"Content-Length: -5\r\n\r\n[]"),
    "a head of 1 MB in one line": constant(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    "10,000 headers": constant(b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 10_000 + b"\r\n"),
    "status out of range": constant(b"HTTP/1.1 99999 OK\r\n\r\n"),
    "damaged gzip": constant(JSON_HEAD + b"Content-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!"),
    "gzip of 1 GB": body(lambda _: _zeros(1_000_000_000), "Content-Encoding: gzip"),
    "body without end": _endless,
    "body byte by byte": _trickle(JSON_HEAD + b"Content-Length: 9999999\r\n\r\n[", b" "),
    "head byte by byte": _trickle(b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "silence": _silent,
    "redirect to another host": _to("http://127.0.0.1:{elsewhere}/steal"),
    "redirect in a circle": _to("?again"),
    "redirect to a file": _to("file:///etc/passwd"),
    "nested 200,000 deep": body(lambda _: b"[" * 200_000),
    "number without end": body(lambda target: json.dumps(target.listed([{"id": 0}])).encode().replace(b"0", b"9" * 99)),
    "another encoding": body(lambda _: '[{"identifier": "ü"}]'.encode("utf-16")),
    "names that are objects": one(identifier={"a": 1}, id={"a": 1}),
    "numbers that are none": body(lambda t: json.dumps(t.listed([t.entry(1)])).replace("1", "NaN").encode()),
    "a list that is a text": body(lambda target: (target.listed([]) and "x") or "text"),
    "list without end": _for_ever,
    "the same page again and again": _again_and_again,
    "names with forged lines": one(name=NASTY, identifier=NASTY, collection=NASTY),
    "dates that are none": one(startDate=10**30, created_on="0000-99-99", created_at="tomorrow"),
}

# -- attacks on one place ----------------------------------------------------------------------------------------------

FOLDER = Target("VIP folder", "/path/", _folder, VIP.entry, VIP.listed, VIP.refused)
FILE = Target("VIP file", "/path/", _file, VIP.entry, VIP.listed, VIP.refused)
LOGIN = Target("vantage6 login", "/token/user", _login, VANTAGE6.entry, VANTAGE6.listed, VANTAGE6.refused)


def _inside_itself(_: Target, __: int) -> Callable[[str], Answer]:
    listed = [{"path": "/d", "isDirectory": True, "exists": True, "size": 0}]
    return lambda _: answer(json.dumps(listed).encode())


def _ever_deeper(_: Target, __: int) -> Callable[[str], Answer]:
    count = itertools.count()

    def deeper(_: str) -> Answer:
        number = next(count)
        listed = [{"path": f"/d/{number}", "isDirectory": True, "exists": True, "size": 0}]
        return answer(json.dumps(listed).encode())

    return deeper


def _token(value: Any) -> Attack:
    return body(lambda _: {"access_token": value, "refresh_token": value})


IN_ONE_PLACE: list[tuple[str, Target, Attack]] = [
    ("folder in itself", FOLDER, _inside_itself),
    ("folder without end", FOLDER, _ever_deeper),
    ("file larger than it may be", FILE, _endless),
    ("token that is none", LOGIN, _token("x")),
    ("token that ended before 1970", LOGIN, _token(jwt(exp=-1))),
    ("token that never ends", LOGIN, _token(jwt(exp=1e308))),
    ("token with a line break", LOGIN, _token(f"{jwt()}\r\nX-Evil: 1")),
    ("token of 1 MB", LOGIN, _token(jwt(pad="x" * 1_000_000))),
    ("claims that are a list", LOGIN, _token("e30.W10.s")),
]

SLOW = {"gzip of 1 GB", "body without end", "body byte by byte", "head byte by byte", "silence", "list without end"}
"""What takes seconds; tried for one platform in the default suite."""


@dataclass(frozen=True)
class Row:
    """What has come of an attack.

    Attributes:
        attack: The attack.
        target: What was attacked.
        outcome: Class of the error, or `read`.
        said: Its text.
        is_typed: Whether the error is one of the package.
        megabytes: By how much the memory of the process has grown at the most.
        seconds: How long it took.
        is_kept: Whether the key went nowhere else.
    """

    attack: str
    target: str
    outcome: str
    said: str
    is_typed: bool
    megabytes: float
    seconds: float
    is_kept: bool


@contextmanager
def _memory() -> Iterator[Callable[[], float]]:
    process, over = psutil.Process(), threading.Event()
    begun = process.memory_info().rss
    peak = [begun]

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: (peak[0] - begun) / 1e6
    finally:
        over.set()
        thread.join()


def carry_out(name: str, target: Target, attack: Attack) -> Row:
    """Attack a platform once.

    Args:
        name: Name of the attack.
        target: What is attacked.
        attack: The attack.
    """
    said, typed = "", True
    limits = mock.patch.object(http.Timeouts.__init__, "__defaults__", (10.0, 90.0, WHOLE_SECONDS))
    with limits, mock.patch.object(rest, "MAX_ENTRIES", MOST_ENTRIES), Server() as elsewhere:
        with Server(target.path, attack(target, elsewhere.port)) as server, _memory() as grown:
            begun = time.monotonic()
            try:
                target.ask(server.port)
                outcome = "read"
            except BiomedError as error:
                outcome, said = type(error).__name__, str(error)
            except Exception as error:  # what is not ours is what is looked for
                outcome, said, typed = type(error).__name__, str(error), False
            seconds, megabytes = time.monotonic() - begun, grown()
        kept = not any(KEY in head for head in elsewhere.seen)
    return Row(name, target.name, outcome, said, typed, megabytes, seconds, kept)


def attacks() -> list[tuple[str, Target, Attack]]:
    """List all attacks."""
    return [(name, target, attack) for name, attack in EVERYWHERE.items() for target in PLATFORMS] + IN_ONE_PLACE


def problems_of(row: Row) -> list[str]:
    """Say what is wrong with what has come of an attack.

    Args:
        row: What has come of it.
    """
    wrong = []
    if not row.is_typed:
        wrong.append(f"an error that is not ours: {row.outcome}: {row.said[:200]}")
    if row.seconds > 10:
        wrong.append(f"it took {row.seconds:.0f} s")
    if row.megabytes > 400:
        wrong.append(f"it took {row.megabytes:.0f} MB")
    if not row.is_kept or KEY in row.said:
        wrong.append("the key went elsewhere")
    if any(character in row.said for character in "\r\x1b\u202e"):
        wrong.append("the error holds what the server sent, raw")
    return wrong


def main() -> None:
    """Try all attacks, and print the table."""
    with tempfile.TemporaryDirectory() as home, mock.patch.dict("os.environ", {"PREFECT_BIOMED_HOME": str(Path(home))}):
        rows = [carry_out(*one) for one in attacks()]
    print(f"{'attack':32} {'on':15} {'outcome':22} {'MB':>6} {'s':>6}")
    for row in rows:
        print(f"{row.attack:32} {row.target:15} {row.outcome:22} {row.megabytes:6.0f} {row.seconds:6.2f}")
    wrong = [(row, problem) for row in rows for problem in problems_of(row)]
    for row, problem in wrong:
        print(f"WRONG {row.attack} on {row.target}: {problem}")
    print(f"{len(rows)} attacks, {len(wrong)} problems")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
