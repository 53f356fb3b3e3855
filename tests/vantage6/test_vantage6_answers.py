"""Answers in another shape than asked for have a type; what decides nothing may be odd."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from harness.federation import Federation, token
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    DeadlineExceeded,
    LocalStorageError,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6 import (
    Collaboration,
    Node,
    NodeDatabase,
    Organization,
    OrganizationSpec,
    Run,
    Session,
    Task,
    Vantage6Client,
    connect,
    fetch_results,
    launch,
    make_organization,
    recover_password,
    watch,
)
from prefect_biomed.clients.vantage6.authentication import Tokens, claims_of
from prefect_biomed.sandbox import Fault

JSON = "application/json"
DEEP = "[" * 10_000 + "]" * 10_000
BODIES = {
    "empty": "",
    "null": "null",
    "list": "[]",
    "object": "{}",
    "text": '"x"',
    "list of null": "[null]",
    "list of objects": "[{}]",
    "data of objects": '{"data": [{}], "links": {}}',
    "data of null": '{"data": [null], "links": {}}',
    "data null": '{"data": null, "links": {}}',
    "no links": '{"data": []}',
    "null fields": '{"id": null, "status": null, "name": null}',
    "text for a number": '{"id": "x", "status": "completed", "name": "n"}',
    "number for a text": '{"id": 1, "status": 5, "name": 7, "encrypted": 8, "username": 1}',
    "list for a text": '{"id": 1, "status": ["completed"], "name": ["n"], "username": [1]}',
    "entries with ids only": '{"data": [{"id": 1}], "links": {}}',
    "html": "<html><body>Sorry</body></html>",
    "deep": DEEP,
    "deep in a field": '{"id": 1, "status": "completed", "databases": ' + DEEP + "}",
}

ROUTES: dict[str, Callable[[Vantage6Client], object]] = {
    "the account": lambda client: client.me,
    "task": lambda client: client.task(1),
    "task status": lambda client: client.task_status(1),
    "tasks": lambda client: client.records(Task),
    "runs": lambda client: client.runs(1),
    "collaboration": lambda client: client.collaboration("plain"),
    "new task": lambda client: client.create_task({"name": "n"}),
    "new organization": lambda client: client.create(Organization, name="n"),
    "node key": lambda client: client.recover_node_key(1),
    "blob": lambda client: client.upload_blob(b"x"),
    "results": lambda client: fetch_results(client, 1, output_dir=Path("unused")),
}


def answer(here: Federation, body: str, *, status: int = 200, path: str = "", **more: Any) -> None:
    here.sandbox.faults.clear()
    kind = "text/html" if body.startswith("<") else JSON
    here.sandbox.faults.add(Fault(path=path, status=status, body=body, content_type=kind, **more))


@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_of_another_shape_has_a_type(here: Federation, route: str) -> None:
    with here.client() as client:
        client.records(Task)
        for name, body in BODIES.items():
            answer(here, body)
            try:
                ROUTES[route](client)
            except UnexpectedResponse as error:
                assert not is_transient(error)
            else:
                assert (route, name) == ("task status", "text for a number")
        for body in ("", "{}", BODIES["html"], '{"msg": "later"}', '{"message": "later"}', DEEP):
            answer(here, body, status=429)
            with pytest.raises(ServerUnavailable) as later:
                ROUTES[route](client)
            assert is_transient(later.value)


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("body", ["", '{"msg": "later"}'])
def test_a_server_that_is_out_of_order_may_say_so_in_any_words(here: Federation, status: int, body: str) -> None:
    with here.client() as client:
        _ = client.me
        answer(here, body, status=status)
        with pytest.raises(ServerUnavailable, match=f"HTTP {status}") as later:
            client.task(1)
        assert is_transient(later.value)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("generation", [4, 5])
def test_a_login_of_another_shape_has_a_type(
    federations: Callable[[int], Federation], generation: int, body: str
) -> None:
    here = federations(generation)
    client = here.client()
    answer(here, body, path=r"token")
    with client, pytest.raises(UnexpectedResponse):
        client.records(Organization)
    with pytest.raises(BiomedError):
        answer(here, body, path="/version$")
        here.client()
    here.sandbox.faults.clear()


def test_only_what_the_server_says_itself_is_a_refused_login(here: Federation) -> None:
    for status, body in ((403, BODIES["html"]), (400, ""), (403, '{"message": "Forbidden"}')):
        client = here.client()
        answer(here, body, status=status, path="token/user")
        with client, pytest.raises(UnexpectedResponse):
            _ = client.me
    with here.client() as client:
        answer(here, '{"msg": "Failed to login"}', status=401, path="recover/lost")
        with pytest.raises(AuthenticationError, match="Failed to login"):
            recover_password(client, username="u")
        here.sandbox.faults.clear()
        assert client.me.username == "north-researcher"


@pytest.mark.parametrize("claims", ["x", "[]", "null", '{"exp": "soon"}', '{"exp": NaN}', '{"exp": -1}', DEEP])
def test_tokens_with_odd_claims_have_a_type(claims: str) -> None:
    part = base64.urlsafe_b64encode(claims.encode()).decode().rstrip("=")
    with pytest.raises(UnexpectedResponse, match="no JSON web token"):
        Tokens.from_jwt(f"x.{part}.x", None)
    with pytest.raises(UnexpectedResponse):
        claims_of("x")


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (Task, {"id": 1, "status": "completed", "created_at": "yesterday", "databases": 3, "depends_on": "x"}),
        (Run, {"id": 1, "status": "completed", "log": 5, "started_at": [], "cleanup_at": "x", "node": {"name": 7}}),
        (Organization, {"id": 1, "name": "north", "country": 31, "zipcode": 1234}),
        (
            Node,
            {
                "id": 1,
                "status": "online",
                "config": [None, 3, {"key": 1}, {"key": "a", "value": None}],
                "last_seen": 1.5,
            },
        ),
        (Session, {"id": 1, "name": "s", "scope": "own", "ready": "perhaps", "image": {}}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_odd_fields_that_decide_nothing_are_left_out(
    kind: type[Any], record: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert kind.model_validate_json(json.dumps(record)).id == 1
    assert kind is Node or "in a shape unknown here" in caplog.text


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (Task, {"id": 1}),
        (Task, {"id": 1, "status": None}),
        (Task, {"id": 1, "status": "completed", "init_org_id": "x"}),
        (Run, {"id": 1, "status": 3}),
        (Run, {"id": 1, "status": "x", "finished_at": "yesterday"}),
        (Collaboration, {"id": 1, "name": "c"}),
        (Collaboration, {"id": 1, "name": "c", "encrypted": None}),
        (Organization, {"id": 1, "public_key": 5}),
        (Session, {"id": 1, "scope": 4}),
        (Node, {"id": "x"}),
    ],
    ids=str,
)
def test_fields_that_decide_something_must_be_right(kind: type[Any], record: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(record)


def test_unknown_statuses_scopes_and_actions_are_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    session = Session.model_validate({"id": 1, "name": "s", "scope": "galaxy"})
    node = Node.model_validate({"id": 1, "status": "asleep"})
    task = Task.model_validate({"id": 1, "status": "dreaming", "action": "prophesy"})
    assert (session.scope.value, task.action and task.action.value) == ("galaxy", "prophesy")
    assert node.status == "asleep" and not node.is_online
    assert not task.status.is_terminal
    assert all(word in caplog.text for word in ("galaxy", "asleep", "dreaming", "prophesy"))


# -- lists without end --------------------------------------------------------------------------------------------


class Endless(BaseHTTPRequestHandler):
    """A server whose lists say that more follows, whatever is asked."""

    protocol_version = "HTTP/1.1"
    counted: str | None = None
    new_ids = True
    numbers = count(1)

    def do_GET(self) -> None:
        entries = [{"id": next(self.numbers) if self.new_ids else 1, "name": "o"} for _ in range(50)]
        answer: Any = {"data": entries, "links": {"next": "x"}}
        if self.path.endswith("/version"):
            answer = {"version": "4.15.2"}
        self.give(answer)

    def do_POST(self) -> None:
        claims = base64.urlsafe_b64encode(json.dumps({"sub": 1, "exp": time.time() + 9999}).encode()).decode()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.give({"access_token": f"x.{claims}.x"})

    def give(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", JSON)
        self.send_header("Content-Length", str(len(body)))
        if self.counted is not None:
            self.send_header("total-count", self.counted)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("counted", "new_ids"), [(None, True), ("100", True), ("0" * 5000, True), (None, False)])
def test_a_list_without_end_is_refused(counted: str | None, new_ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_biomed.clients.vantage6.client._MAX_UNCOUNTED", 2000)
    handler = type("Handler", (Endless,), {"counted": counted, "new_ids": new_ids})
    with served(handler) as url, connect(url, username="u", password=SecretStr("p")) as client:
        begin = time.monotonic()
        with pytest.raises(UnexpectedResponse, match=r"repeats itself|again and again"):
            client.records(Organization)
        assert time.monotonic() - begin < 60


# -- deadlines and disks ------------------------------------------------------------------------------------------


def test_a_deadline_that_passes_during_an_outage_says_so_and_tries_the_kill(here: Federation, tmp_path: Path) -> None:
    settings = PollSettings(interval_seconds=0.1, deadline_seconds=0.5, error_budget=50)
    request = here.request("sleep", "north", arguments={"seconds": 60}, name=f"late-{token()}")
    with here.client("north-admin") as client:
        task = launch(client, request, token(), folder=tmp_path)
        answer(here, "", status=503, path=f"/task/{task.id}|/run")
        with pytest.raises(DeadlineExceeded, match="could not be asked") as late:
            list(watch(client, [task.id], settings))
        assert not is_transient(late.value) and "Nothing was stopped remotely" in str(late.value)
        with pytest.raises(DeadlineExceeded, match=f"Killed: {task.id}"):
            list(watch(client, [task.id], settings, kill_at_deadline=True))
        answer(here, "", status=503, path=f"/task/{task.id}|/run|/kill")
        with pytest.raises(DeadlineExceeded, match=f"task {task.id} could not be killed and may go on"):
            list(watch(client, [task.id], settings, kill_at_deadline=True))
        here.sandbox.faults.clear()
        assert client.task_status(task.id).value == "killed by user"


def test_a_folder_that_cannot_be_written_to_has_a_type(here: Federation, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with here.client("root") as root:
        spec = OrganizationSpec(name=f"o-{token()}", databases=[NodeDatabase(uri="/x.csv")])
        with pytest.raises(LocalStorageError, match="file"):
            make_organization(root, spec, blocked, encrypted=True)
    with here.client() as client, pytest.raises(LocalStorageError, match="file"):
        launch(client, here.request("echo", "north"), token(), folder=blocked)
    assert blocked.read_text() == "no folder"


def test_names_and_secrets_of_odd_answers_are_not_repeated(here: Federation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with here.client() as client:
        _ = client.me
        answer(here, '{"api_key": ["canary"]}')
        with pytest.raises(UnexpectedResponse) as error:
            client.recover_node_key(1)
        answer(here, '{"data": [{"id": 1, "name": 5, "otp_secret": "canary"}], "links": {}}')
        with pytest.raises(UnexpectedResponse) as listed:
            client.records(Organization, name="x")
    assert "canary" not in str(error.value) + str(listed.value) + caplog.text
