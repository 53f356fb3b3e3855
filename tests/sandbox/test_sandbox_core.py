"""The server around every sandbox: journal, faults, switches, ready line, command line."""

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from fastapi import FastAPI, Request
from pydantic import Field

from prefect_biomed.sandbox import Fault, Platform, Sandbox, Switches, _sandbox, annotate


class EchoSwitches(Switches):
    greeting: str = "hello"
    volume: int = 1
    colour: str = Field("red", frozen=True)


class EchoSandbox(Platform):
    name = "vip"
    switches_type = EchoSwitches
    switches: EchoSwitches

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]  # passed on as they come
        self.effects: list[bytes] = []
        self.deleted: list[str] = []
        self.events: list[str] = []
        self.app = app = FastAPI()

        @app.put("/things/{name:path}")
        async def put(name: str, request: Request) -> dict[str, object]:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
            self.effects.append(name.encode())
            annotate(request, f"{size} bytes")
            return {"name": name, "size": size, "greeting": self.switches.greeting}

        @app.delete("/things/{name:path}")
        async def delete(name: str) -> None:
            self.deleted.append(name)

        @app.get("/slow")
        def slow() -> str:
            time.sleep(0.2)
            return "x" * 1000

    def start(self, url: str) -> None:
        super().start(url)
        self.events.append("start")

    def stop(self) -> None:
        self.events.append("stop")

    def went_down(self) -> None:
        self.events.append("went down")

    def came_back(self) -> None:
        self.events.append("came back")

    def ready(self) -> dict[str, object]:
        return {"url": self.url, "seed": self.seed}


@pytest.fixture(autouse=True)
def echo_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_sandbox.PLATFORMS, "vip", (__name__, "EchoSandbox"))


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip", seed=3) as sandbox:
        yield sandbox


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def test_answers_and_journal(sandbox: Sandbox, session: requests.Session) -> None:
    url = sandbox.vip.url + "/things/a%20b"
    answer = session.put(url, params={"q": "1 2"}, data=b"12345", headers={"apikey": "canary"})
    assert answer.json() == {"name": "a b", "size": 5, "greeting": "hello"}
    (entry,) = sandbox.vip.journal
    assert (entry.number, entry.method, entry.path) == (1, "PUT", "/things/a%20b")
    assert (entry.query, entry.status, entry.bytes_in) == ("q=1+2", 200, 5)
    assert entry.bytes_out == len(answer.content)
    assert entry.concurrent == 1
    assert entry.note == "5 bytes"
    assert entry.seconds is not None
    over_http = session.get(sandbox.vip.url + "/_sandbox/journal")
    assert over_http.json() == [entry.model_dump()]
    assert "canary" not in over_http.text
    assert session.delete(sandbox.vip.url + "/_sandbox/journal").status_code == 204
    assert len(sandbox.vip.journal) == 0


def test_journal_keeps_no_secret_of_a_query(sandbox: Sandbox, session: requests.Session) -> None:
    session.get(sandbox.vip.url + "/slow?key=canary&page=2&X-Amz-Signature=canary&girder_token=canary")
    (entry,) = sandbox.vip.journal
    assert entry.query == "key=***&page=2&X-Amz-Signature=***&girder_token=***"


def test_concurrency_is_counted(sandbox: Sandbox) -> None:
    def get() -> None:
        requests.get(sandbox.vip.url + "/slow", timeout=10)

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.concurrent for entry in sandbox.vip.journal) == [1, 2, 3, 4]
    assert sandbox.vip.journal.peak() == 4
    get()
    get()
    assert sandbox.vip.journal.entries()[-1].concurrent == 1
    assert sandbox.vip.journal.peak(method="PUT") == 0


@pytest.mark.parametrize("drop", ["before", "after"])
def test_dropped_connection(sandbox: Sandbox, session: requests.Session, drop: str) -> None:
    url = sandbox.vip.url + "/things/x"
    # The second request of a kept connection: nothing of it may be answered either.
    sandbox.vip.faults.add(Fault.model_validate({"method": "PUT", "calls": [2], "drop": drop}))
    session.put(url, data=b"1")
    with pytest.raises(requests.ConnectionError):
        session.put(url, data=b"2" * 300_000)
    assert session.put(url, data=b"3").status_code == 200
    assert len(sandbox.vip.effects) == (3 if drop == "after" else 2)
    assert [entry.status for entry in sandbox.vip.journal] == [200, None, 200]
    assert [entry.fault for entry in sandbox.vip.journal] == [None, f"drop {drop}", None]


def test_drop_closes_the_connection_without_a_byte(sandbox: Sandbox) -> None:
    sandbox.vip.faults.add(Fault(drop="before"))
    host, port = sandbox.vip.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100) == b""


@pytest.mark.parametrize(
    "fault",
    [
        Fault(delay_seconds=60, status=500),
        Fault(hold_seconds=60),
        Fault(delay_seconds=60, status=500, after_effect=True),
    ],
)
def test_the_end_of_a_server_is_no_error_of_what_it_holds(fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    failed: list[Exception] = []

    def ask(url: str) -> None:
        try:
            requests.get(url, timeout=30)
        except requests.ConnectionError as error:
            failed.append(error)

    with Sandbox("vip") as sandbox:
        sandbox.vip.faults.add(fault)
        asking = threading.Thread(target=ask, args=(f"{sandbox.vip.url}/platform",))
        asking.start()
        deadline = time.monotonic() + 10
        while not len(sandbox.vip.journal) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    asking.join()
    assert len(failed) == 1
    assert caplog.records == []


def test_replaced_answer(sandbox: Sandbox, session: requests.Session) -> None:
    url = sandbox.vip.url + "/things/x"
    sandbox.vip.faults.add(
        Fault(path="^/things/x$", times=1, status=502, body="<h1>Bad</h1>", headers={"X-A": "1"}),
        Fault(skip=1, calls=[1], status=400, after_effect=True, body="late"),
    )
    answer = session.put(url, data=b"1" * 200_000)
    assert (answer.status_code, answer.text, answer.headers["X-A"]) == (502, "<h1>Bad</h1>", "1")
    assert sandbox.vip.effects == []
    assert session.put(url, data=b"2").text == "late"
    assert sandbox.vip.effects == [b"x"]
    assert session.put(url, data=b"3").status_code == 200
    assert [fault["hit"] for fault in sandbox.vip.faults.describe()] == [1, 1]
    assert [fault["matched"] for fault in sandbox.vip.faults.describe()] == [3, 3]


def test_truncated_answer(sandbox: Sandbox, session: requests.Session) -> None:
    sandbox.vip.faults.add(Fault(path="/slow", calls=[1], truncate_bytes=400))
    with session.get(sandbox.vip.url + "/slow", stream=True) as answer:
        assert answer.headers["Content-Length"] == "1002"
        body = answer.raw.read1(400, decode_content=False)
        with pytest.raises(Exception, match="IncompleteRead"):
            while more := answer.raw.read(1000):
                body += more
    assert len(body) <= 400
    assert sandbox.vip.journal.entries()[0].bytes_out == 400
    assert len(session.get(sandbox.vip.url + "/slow").content) == 1002


def test_delay_and_latency(sandbox: Sandbox, session: requests.Session) -> None:
    sandbox.vip.faults.add(Fault(query="^k=a b$", delay_seconds=0.3))
    url = sandbox.vip.url + "/things/x"
    session.put(url, params={"k": "a b"})
    session.put(url, params={"k": "c"})
    sandbox.vip.switches.latency_ms = 200
    session.put(url)
    slow, quick, late = (entry.seconds or 0 for entry in sandbox.vip.journal)
    assert slow >= 0.3
    assert quick < 0.2
    assert late >= 0.2


def _leave(sandbox: Sandbox, method: str = "PUT") -> None:
    """Ask, and go away before the answer."""
    with pytest.raises(requests.Timeout):
        requests.request(method, sandbox.vip.url + "/things/x", data=b"1" * 300_000, timeout=(5, 0.2))


def test_held_request_is_carried_out_though_its_client_has_gone(sandbox: Sandbox) -> None:
    sandbox.vip.faults.add(Fault(hold_seconds=0.6))
    _leave(sandbox)
    assert sandbox.vip.effects == []
    (entry,) = sandbox.vip.journal
    assert (entry.answered, entry.effect, entry.settled) == (None, False, False)
    assert not sandbox.vip.journal.settle(0.05)
    assert sandbox.vip.journal.settle(5)
    assert sandbox.vip.effects == [b"x"]
    (entry,) = sandbox.vip.journal
    assert (entry.answered, entry.effect, entry.settled) == (200, True, True)
    assert (entry.fault, entry.note, entry.bytes_in) == ("hold 0.6 s", "300000 bytes", 300_000)


def test_delayed_request_is_taken_back_by_a_client_that_goes_away(sandbox: Sandbox) -> None:
    sandbox.vip.faults.add(Fault(delay_seconds=0.6))
    _leave(sandbox)
    _leave(sandbox, "DELETE")
    assert sandbox.vip.journal.settle(0.3)
    assert sandbox.vip.effects == sandbox.vip.deleted == []
    assert [(entry.answered, entry.effect) for entry in sandbox.vip.journal] == [(None, False)] * 2
    assert all("went away while" in (entry.note or "") for entry in sandbox.vip.journal)


def test_held_request_that_did_not_arrive_whole_is_not_carried_out(sandbox: Sandbox) -> None:
    sandbox.vip.faults.add(Fault(hold_seconds=0.1))
    host, port = sandbox.vip.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(b"PUT /things/x HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
        time.sleep(0.1)
    assert sandbox.vip.journal.settle(5)
    time.sleep(0.3)
    (entry,) = sandbox.vip.journal
    assert (entry.effect, entry.held) == (False, False)
    assert sandbox.vip.effects == []


@pytest.mark.parametrize("fault", [{"drop": "before"}, {"status": 504, "body": "<h1>late</h1>"}])
def test_client_hears_at_once_of_a_request_that_is_carried_out_later(
    sandbox: Sandbox, session: requests.Session, fault: dict[str, object]
) -> None:
    sandbox.vip.faults.add(Fault.model_validate({**fault, "hold_seconds": 0.5, "times": 1}))
    began = time.monotonic()
    if "drop" in fault:
        with pytest.raises(requests.ConnectionError):
            session.put(sandbox.vip.url + "/things/late", data=b"1" * 300_000)
    else:
        answer = session.put(sandbox.vip.url + "/things/late", data=b"1")
        assert (answer.status_code, answer.text) == (504, "<h1>late</h1>")
    assert time.monotonic() - began < 0.4
    assert session.put(sandbox.vip.url + "/things/prompt").status_code == 200
    first = sandbox.vip.journal.entries()[0]
    assert (first.effect, first.held, first.settled) == (False, True, False)
    assert sandbox.vip.journal.settle(5)
    assert sandbox.vip.effects == [b"prompt", b"late"]
    first = sandbox.vip.journal.entries()[0]
    assert (first.status, first.answered, first.effect) == (fault.get("status"), 200, True)


def _kinds_of_faults() -> Iterator[Fault]:
    replaced: list[dict[str, object]] = [
        {},
        {"status": 502, "body": "<h1>Bad</h1>"},
        {"status": 200, "body": ""},
        {"status": 404, "body": "[]", "content_type": "application/json"},
    ]
    for drop, answer, after, cut, delay, hold in itertools.product(
        (None, "before", "after"), replaced, (False, True), (None, 1), (0.0, 0.02), (0.0, 0.02)
    ):
        effect = {"after_effect": after, "drop": drop, "delay_seconds": delay, "hold_seconds": hold}
        yield Fault.model_validate({**answer, **effect, "truncate_bytes": cut})


def test_all_kinds_of_faults_compose(sandbox: Sandbox) -> None:
    for fault in _kinds_of_faults():
        sandbox.vip.faults.clear()
        sandbox.vip.faults.add(fault)
        sandbox.vip.journal.clear()
        sandbox.vip.effects.clear()
        nothing_comes = fault.drop is not None or (fault.truncate_bytes and (fault.body or fault.status is None))
        try:
            answer = requests.put(sandbox.vip.url + "/things/x", data=b"1", timeout=5)
        except requests.RequestException:
            assert nothing_comes, fault
        else:
            assert not nothing_comes, fault
            assert answer.status_code == (fault.status or 200), fault
            assert fault.status is None or answer.text == fault.body, fault
        assert sandbox.vip.journal.settle(5), fault
        dropped_early = fault.drop == "before"
        replaced_early = fault.status is not None and not fault.after_effect and fault.drop is None
        carried_out = fault.hold_seconds > 0 or not (dropped_early or replaced_early)
        assert len(sandbox.vip.effects) == carried_out, fault
        assert [entry.effect for entry in sandbox.vip.journal] == [carried_out], fault


def test_refused_requests_have_no_effect_in_the_journal(sandbox: Sandbox, session: requests.Session) -> None:
    sandbox.vip.faults.add(Fault(path="/nowhere", status=200, after_effect=True), Fault(path="/things", status=200))
    session.get(sandbox.vip.url + "/nowhere")
    session.put(sandbox.vip.url + "/things/x")
    assert [(e.status, e.answered, e.effect) for e in sandbox.vip.journal] == [(200, 404, False), (200, None, False)]


def test_restarted_platform_refuses_connections_for_a_while_and_is_the_same_then(
    sandbox: Sandbox, session: requests.Session
) -> None:
    url = sandbox.vip.url
    session.put(url + "/things/before")
    sandbox.vip.faults.add(Fault(path="/never"))
    with sandbox.outage("vip"), pytest.raises(requests.ConnectionError):
        requests.get(url + "/slow", timeout=5)
    assert sandbox.vip.url == url
    session.put(url + "/things/after")
    sandbox.restart("vip", down_seconds=0.1)
    session.put(url + "/things/last")
    assert sandbox.vip.effects == [b"before", b"after", b"last"]
    assert len(sandbox.vip.journal) == 3
    assert len(sandbox.vip.faults) == 1
    assert sandbox.vip.events == ["start", "went down", "came back", "went down", "came back"]
    with pytest.raises(AttributeError, match="does not serve boss"):
        sandbox.restart("boss")


def test_restart_cuts_connections_and_loses_what_was_held(sandbox: Sandbox) -> None:
    sandbox.vip.faults.add(Fault(path="held", hold_seconds=1), Fault(path="later", hold_seconds=1, status=504))
    assert requests.put(sandbox.vip.url + "/things/later", timeout=5).status_code == 504
    errors: list[Exception] = []

    def put() -> None:
        try:
            requests.put(sandbox.vip.url + "/things/held", data=b"1", timeout=5)
        except requests.ConnectionError as error:
            errors.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    while len(sandbox.vip.journal) < 2:
        time.sleep(0.01)
    began = time.monotonic()
    sandbox.restart("vip")
    thread.join()
    assert len(errors) == 1
    assert time.monotonic() - began < 0.9
    assert sandbox.vip.journal.settle(0)
    time.sleep(1)
    assert sandbox.vip.effects == []
    assert [entry.effect for entry in sandbox.vip.journal] == [False, False]


def test_faults_over_http(sandbox: Sandbox, session: requests.Session) -> None:
    control = sandbox.vip.url + "/_sandbox/faults"
    assert session.post(control, json={"status": 503}).status_code == 201
    assert session.post(control, json=[{"path": "a"}, {"path": "b"}]).status_code == 201
    assert session.put(sandbox.vip.url + "/things/x").status_code == 503
    assert [fault["hit"] for fault in session.get(control).json()] == [1, 0, 0]
    assert session.post(control, json={"path": "("}).status_code == 422
    assert session.post(control, json={"sttus": 500}).status_code == 422
    assert session.delete(control).status_code == 204
    assert session.put(sandbox.vip.url + "/things/x").status_code == 200


def test_switches(sandbox: Sandbox, session: requests.Session) -> None:
    control = sandbox.vip.url + "/_sandbox/switches"
    assert session.get(control).json() == {"latency_ms": 0, "greeting": "hello", "volume": 1, "colour": "red"}
    assert session.patch(control, json={"greeting": "hei"}).json()["greeting"] == "hei"
    assert session.put(sandbox.vip.url + "/things/x").json()["greeting"] == "hei"
    refused = session.patch(control, json={"greeting": "never", "volume": "loud"})
    assert refused.status_code == 422
    assert session.patch(control, json={"nothing": 1}).status_code == 422
    assert session.patch(control, json={"greeting": "never", "colour": "blue"}).status_code == 422
    assert session.patch(control, json={"colour": "red"}).status_code == 200
    assert session.get(control).json()["greeting"] == "hei"
    with pytest.raises(ValueError, match="volume"):
        sandbox.vip.switches.volume = "loud"


def test_state_file_and_ready(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "sandbox.json"
    with Sandbox("vip", seed=5, state=state, vip={"volume": 4}) as sandbox:
        facts = json.loads(state.read_text())
        assert facts == sandbox.ready()
        assert facts["vip"] == {"url": sandbox.vip.url, "seed": 5}
        assert requests.get(sandbox.vip.url + "/_sandbox/ready", timeout=5).json() == facts["vip"]
        directory = sandbox.vip.directory
        assert directory.is_dir()
        with pytest.raises(AttributeError, match="does not serve boss"):
            _ = sandbox.boss
    assert sandbox.vip.events == ["start", "stop"]
    assert not state.exists()
    assert not directory.exists()
    with pytest.raises(requests.ConnectionError):
        requests.get(sandbox.vip.url, timeout=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ["vop"]}, "no platform 'vop'"),
        ({"vip": {"loudness": 1}}, "loudness"),
        ({"boss": {"x": 1}}, "which is not served"),
        ({"faults": {"vip": [{"status": 99}]}}, "status"),
        ({"faults": {"boss": []}}, "which is not served"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    platforms = arguments.pop("platforms", ["vip"])
    with pytest.raises(ValueError, match=message):
        Sandbox(*platforms, **arguments)  # type: ignore[misc,arg-type]  # wrong on purpose


def test_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        Sandbox("vip", port=taken.getsockname()[1]).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_line(tmp_path: Path, number: signal.Signals) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps({"vip": [{"path": "/platform", "calls": [1], "status": 503}]}))
    state = tmp_path / "state.json"
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1));"
        "from prefect_biomed.sandbox import _sandbox, __main__;"
        "_sandbox.PLATFORMS['vip'] = ('test_sandbox_core', 'EchoSandbox');"
        "sys.exit(__main__.main())"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), "vip", "--seed", "9"]
    command += ["--state", str(state), "--faults", str(faults), "--set", "vip.greeting=moi"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        assert facts["pid"] == process.pid
        assert facts["vip"]["seed"] == 9
        assert json.loads(state.read_text()) == facts
        assert requests.get(facts["vip"]["url"] + "/platform", timeout=5).status_code == 503
        answer = requests.put(facts["vip"]["url"] + "/things/x", timeout=5)
        assert answer.json()["greeting"] == "moi"
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
    assert not state.exists()


@pytest.mark.parametrize("arguments", [["vop"], ["vip", "--set", "profile"], ["--port", "x"]])
def test_command_line_refuses(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "prefect_biomed.sandbox", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("platform", "module"), [("vantage6", "joserfc"), ("boss", "numpy")])
def test_a_missing_extra_is_named(platform: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; from prefect_biomed.sandbox.__main__ import main; "
        f"sys.exit(main([{platform!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"the sandbox of {platform} needs {module}: pip install 'prefect-biomed[sandbox]'" in done.stderr
