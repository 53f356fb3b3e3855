"""Whatever happens to the answer of a request that makes something, there is one of it in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from harness.federation import CLINICAL, Federation, token
from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    LaunchInDoubt,
    LedgerError,
    NotFoundError,
    PreflightFailed,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.files import exclusive
from prefect_biomed.clients.once import Circumstances
from prefect_biomed.clients.polling import now
from prefect_biomed.clients.vantage6 import (
    Dataframe,
    NameConflict,
    RequestRefused,
    ServerFault,
    Session,
    SessionScope,
    Task,
    TaskGone,
    TaskRequest,
    Vantage6Client,
    add_preprocessing,
    connect,
    launch,
    make_dataframe,
    make_session,
)
from prefect_biomed.clients.vantage6.dataframes import steps_of
from prefect_biomed.sandbox import Fault

HTML = "<html><body><h1>Oops</h1></body></html>"
JSON = "application/json"
LOST: dict[str, dict[str, Any]] = {
    "connection lost": {"drop": "after"},
    "502 page": {"status": 502, "body": HTML, "after_effect": True},
    "500 page": {"status": 500, "body": HTML, "after_effect": True},
    "500 empty": {"status": 500, "body": "", "after_effect": True},
    "400 page": {"status": 400, "body": HTML, "after_effect": True},
    "200 page": {"status": 200, "body": HTML, "after_effect": True},
    "201 empty": {"status": 201, "body": "", "after_effect": True},
    "201 {}": {"status": 201, "body": "{}", "content_type": JSON, "after_effect": True},
}
every_lost_answer = pytest.mark.parametrize("answer", LOST)
newer_generations = pytest.mark.parametrize("generation", [4, 5])
# Longer than any request of these tests is held.
SETTLE = 20.0


class Killed(BaseException):
    """The process is gone while its request is on the way."""


def lose(here: Federation, answer: str, path: str = "/task$", **more: Any) -> None:
    """Have the next answer lost."""
    here.sandbox.faults.add(Fault(method="POST", path=path, times=1, **LOST[answer] | more))


def late(here: Federation, answer: str, path: str = "/task$", *, seconds: float = 0.8) -> float:
    """Have the next request answered wrongly at once, and carried out later; tells after how long that is over."""
    fault = {"drop": "before"} if "drop" in LOST[answer] else LOST[answer] | {"after_effect": False}
    here.sandbox.faults.add(Fault(method="POST", path=path, times=1, hold_seconds=seconds, **fault))
    return seconds + 0.5


def wait_until(moment: float) -> None:
    """Wait for a request that is held; it has been carried out long since when the launch was right."""
    time.sleep(max(0.0, moment - time.monotonic()))


def asked(here: Federation, client: Vantage6Client, name: str) -> TaskRequest:
    fields = here.data(client, "plain") if here.generation == 5 else {}
    return here.request("echo", "north", arguments={"a": 1}, name=name, **fields)


def named(here: Federation, name: str) -> list[Any]:
    return [task for task in here.sandbox.registry.tasks if task.name.startswith(f"{name}-")]


def die_in_flight(client: Vantage6Client, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Make the client's process die right after its request has left; the request arrives all the same."""
    send = client.create_task
    requests: list[threading.Thread] = []

    def nobody_listens(body: Any) -> None:
        with suppress(BiomedError):
            send(body)

    def die(body: Any) -> Task:
        requests.append(threading.Thread(target=nobody_listens, args=(body,), daemon=True))
        requests[0].start()
        time.sleep(0.3)
        raise Killed

    monkeypatch.setattr(client, "create_task", die)
    return requests


@newer_generations
@every_lost_answer
def test_a_lost_answer_is_found(
    federations: Callable[[int], Federation], generation: int, answer: str, tmp_path: Path
) -> None:
    here, name = federations(generation), f"first-{token()}"
    with here.client() as client:
        request = asked(here, client, name)
        lose(here, answer)
        made = launch(client, request, "abcdefghij", settle_seconds=SETTLE, folder=tmp_path)
        again = launch(client, request, "abcdefghij", settle_seconds=SETTLE, folder=tmp_path)
    assert made.name == f"{name}-abcdefghij" and again.id == made.id
    assert len(named(here, name)) == 1


@newer_generations
@every_lost_answer
def test_a_launch_that_takes_effect_late_is_found_by_the_repetition(
    federations: Callable[[int], Federation], generation: int, answer: str, tmp_path: Path
) -> None:
    here, name = federations(generation), f"repeated-{token()}"
    with here.client() as client:
        request = asked(here, client, name)
        over = time.monotonic() + late(here, answer)
        with pytest.raises(LaunchInDoubt, match="it looks before it sends"):
            launch(client, request, "abcdefghij", settle_seconds=0.2, folder=tmp_path)
        assert named(here, name) == []
        made = launch(client, request, "abcdefghij", settle_seconds=SETTLE, folder=tmp_path)
        wait_until(over)
    assert [task.id for task in named(here, name)] == [made.id]


@newer_generations
@every_lost_answer
def test_a_process_killed_in_flight_and_started_again_at_once_makes_no_second_task(
    federations: Callable[[int], Federation],
    generation: int,
    answer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, name = federations(generation), f"killed-{token()}"
    with here.client() as client, here.client() as second:
        request = asked(here, client, name)
        lose(here, answer, hold_seconds=1.0)
        requests = die_in_flight(client, monkeypatch)
        with pytest.raises(Killed):
            launch(client, request, "abcdefghij", settle_seconds=SETTLE, folder=tmp_path)
        assert named(here, name) == []
        made = launch(second, request, "abcdefghij", settle_seconds=SETTLE, folder=tmp_path)
        requests[0].join()
    assert [task.id for task in named(here, name)] == [made.id]


@newer_generations
@every_lost_answer
def test_two_processes_of_one_intent_make_one_task(
    federations: Callable[[int], Federation], generation: int, answer: str, tmp_path: Path
) -> None:
    here, name = federations(generation), f"twins-{token()}"
    ids: list[int] = []
    with here.client() as client, here.client() as twin:
        request = asked(here, client, name)
        lose(here, answer, delay_seconds=0.2)

        def work(client: Vantage6Client) -> None:
            ids.append(launch(client, request, "abcdefghij", settle_seconds=SETTLE, folder=tmp_path).id)

        threads = [threading.Thread(target=work, args=(one,)) for one in (client, twin)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(ids) == 2 and {task.id for task in named(here, name)} == set(ids)
    assert len(named(here, name)) == 1


PROCESS = """
import sys
from pathlib import Path
from harness.federation import TaskRequest
from pydantic import SecretStr
from prefect_biomed.clients.vantage6 import connect, launch
url, password, request, folder = sys.argv[1:]
with connect(url, username="north-researcher", password=SecretStr(password)) as client:
    print(launch(client, TaskRequest.model_validate_json(request), "abcdefghij", folder=Path(folder)).id)
"""


def test_a_process_that_is_killed_by_the_system_in_flight(here: Federation, tmp_path: Path) -> None:
    name = f"sigkill-{token()}"
    request = here.request("echo", "north", name=name)
    password = here.facts["users"]["north-researcher"]["password"]
    arguments = [here.facts["url"], password, request.model_dump_json(), str(tmp_path)]
    here.sandbox.faults.add(Fault(method="POST", path="/task$", times=1, hold_seconds=2.0))
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": tests}
    process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], env=environment)
    end = time.monotonic() + 60
    while not here.sandbox.faults.describe()[-1]["hit"]:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    over = time.monotonic() + 2.5
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and named(here, name) == []
    with connect(here.facts["url"], username="north-researcher", password=SecretStr(password)) as client:
        made = launch(client, request, "abcdefghij", folder=tmp_path)
    wait_until(over)
    assert [task.id for task in named(here, name)] == [made.id]


def test_what_never_arrived_is_sent_again_when_it_can_no_longer_take_effect(here: Federation, tmp_path: Path) -> None:
    name = f"lost-{token()}"
    request = here.request("echo", "north", name=name)
    with here.client() as client:
        here.sandbox.faults.add(Fault(method="POST", path="/task$", status=502, body=HTML, times=1))
        with pytest.raises(LaunchInDoubt) as doubt:
            launch(client, request, "abcdefghij", settle_seconds=0.3, folder=tmp_path)
        assert "HTTP 502" in str(doubt.value) and name in str(doubt.value)
        made = launch(client, request, "abcdefghij", settle_seconds=0.3, folder=tmp_path)
    assert [task.id for task in named(here, name)] == [made.id]


def test_a_refusal_clears_the_record_so_that_nothing_is_waited_for(here: Federation, tmp_path: Path) -> None:
    name = f"refused-{token()}"
    request = here.request("echo", "north", name=name)
    with here.client() as client:
        for status, body in ((400, '{"msg": "no"}'), (400, '{"errors": {"image": ["bad"]}}'), (409, '{"msg": "no"}')):
            here.sandbox.faults.add(
                Fault(method="POST", path="/task$", status=status, body=body, content_type=JSON, times=1)
            )
            with pytest.raises(Exception, match=r"no \(HTTP|bad"):
                launch(client, request, "abcdefghij", settle_seconds=60.0, folder=tmp_path)
        begin = time.monotonic()
        launch(client, request, "abcdefghij", settle_seconds=60.0, folder=tmp_path)
    assert time.monotonic() - begin < 20


def test_an_error_of_the_servers_own_is_said_when_nothing_has_appeared(here: Federation, tmp_path: Path) -> None:
    name = f"fault-{token()}"
    body = '{"msg": "An internal error, because the input is missing"}'
    fault = Fault(method="POST", path="/task$", status=500, body=body, content_type=JSON, times=1)
    with here.client() as client:
        here.sandbox.faults.add(fault)
        with pytest.raises(ServerFault, match="because the input is missing"):
            launch(client, here.request("echo", "north", name=name), "abcdefghij", settle_seconds=0.3, folder=tmp_path)
        # What a web server or a proxy says in JSON is no refusal of the platform.
        here.sandbox.faults.add(fault.model_copy(update={"status": 403, "body": '{"message": "Forbidden"}'}))
        with pytest.raises(LaunchInDoubt, match="Forbidden"):
            launch(client, here.request("echo", "north", name=name), "klmnopqrst", settle_seconds=0.3, folder=tmp_path)


def test_a_page_with_the_status_of_an_old_token_sends_nothing_twice(here: Federation, tmp_path: Path) -> None:
    for status in (401, 422):
        name = f"status-{token()}"
        with here.client() as client:
            _ = client.me
            here.sandbox.journal.clear()
            here.sandbox.faults.add(
                Fault(method="POST", path="/task$", status=status, body=HTML, times=1, after_effect=True)
            )
            launch(client, here.request("echo", "north", name=name), "abcdefghij", folder=tmp_path)
            assert len(here.sandbox.journal.entries("POST", "/task$")) == 1
        assert len(named(here, name)) == 1


def test_two_tasks_of_one_token_are_named_and_the_younger_is_ended(
    here: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"doubled-{token()}"
    request = here.request("sleep", "north", arguments={"seconds": 60}, name=name)
    with here.client("north-admin") as client:
        first = launch(client, request, "abcdefghij", folder=tmp_path / "here")
        body = {"collaboration_id": first.collaboration_id, "name": first.name, "image": CLINICAL, "description": ""}
        payload = "eyJtZXRob2QiOiAic2xlZXAiLCAia3dhcmdzIjogeyJzZWNvbmRzIjogNjB9fQ=="
        organizations = [{"id": here.organization("north"), "input": payload}]
        second = client.create_task(body | {"organizations": organizations, "databases": [{"label": "default"}]})
        adopted = launch(client, request, "abcdefghij", folder=tmp_path / "elsewhere")
        assert adopted.id == first.id
        assert client.task(second.id).status.value == "killed by user"
        assert not client.task(first.id).status.is_terminal
        assert any(str(second.id) in one.message and one.levelname == "ERROR" for one in caplog.records)
        client.kill_task(first.id)


def test_a_task_that_somebody_deleted_is_not_made_again(here: Federation, tmp_path: Path) -> None:
    name = f"deleted-{token()}"
    request = here.request("echo", "north", name=name)
    with here.client() as client:
        made = launch(client, request, "abcdefghij", folder=tmp_path)
        client.delete(Task, made.id)
        with pytest.raises(TaskGone, match=f"Task {made.id} "):
            launch(client, request, "abcdefghij", folder=tmp_path)
    assert named(here, name) == []


def test_a_known_task_takes_one_request(here: Federation, tmp_path: Path) -> None:
    request = here.request("echo", "north", name=f"known-{token()}")
    with here.client() as client:
        made = launch(client, request, "abcdefghij", folder=tmp_path)
        here.sandbox.journal.clear()
        assert launch(client, request, "abcdefghij", folder=tmp_path).id == made.id
    assert here.calls() == [f"GET /api/task/{made.id}"]


def test_records_hold_no_arguments_and_are_for_their_owner_only(here: Federation, tmp_path: Path) -> None:
    request = here.request("echo", "north", arguments={"secret": "canary"}, name="a name/with ../ all of it")
    with here.client() as client:
        made = launch(client, request, token(), folder=tmp_path)
    (record,) = tmp_path.glob("*.json")
    assert record.stat().st_mode & 0o777 == 0o600
    written = json.loads(record.read_text())
    assert written["id"] == str(made.id) and written["asked"]["server"] == client.url
    assert "canary" not in record.read_text() and "canary" not in record.name


def test_a_damaged_record_concerns_its_own_task_only(here: Federation, tmp_path: Path) -> None:
    first, other = (here.request("echo", "north", name=f"record-{token()}") for _ in range(2))
    with here.client() as client:
        launch(client, first, "abcdefghij", folder=tmp_path)
        (record,) = tmp_path.glob("*.json")
        content = json.loads(record.read_text())
        for text, reason in (
            ("{", "is damaged"),
            (json.dumps(content | {"id": "x"}), "no number"),
            (json.dumps(content | {"version": 99}), "later version"),
        ):
            record.write_text(text)
            with pytest.raises(LedgerError, match=reason):
                launch(client, first, "abcdefghij", folder=tmp_path)
            assert record.read_text() == text
        assert launch(client, other, "abcdefghij", folder=tmp_path).id
    assert len(named(here, first.name)) == 1


def test_servers_and_collaborations_do_not_share_records(
    federations: Callable[[int], Federation], tmp_path: Path
) -> None:
    name, ids = f"shared-{token()}", []
    for generation in (3, 4):
        here = federations(generation)
        for collaboration in ("plain", "encrypted"):
            request = here.request("echo", "north", name=name, collaboration=collaboration)
            with here.client() as client:
                ids.append(launch(client, request, "abcdefghij", folder=tmp_path).id)
        assert len(named(here, name)) == 2
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_a_process_that_works_for_long_on_the_same_task_is_named(here: Federation, tmp_path: Path) -> None:
    request = here.request("echo", "north", name=f"held-{token()}")
    with here.client() as client:
        made = launch(client, request, "abcdefghij", folder=tmp_path)
        (record,) = tmp_path.glob("*.json")
        done: list[int] = []
        waiting = threading.Thread(
            target=lambda: done.append(launch(client, request, "abcdefghij", folder=tmp_path).id)
        )
        with exclusive(tmp_path / f".{record.stem}.lock", seconds=1.0, what="it"):
            waiting.start()
            waiting.join(0.5)
            assert done == []
        waiting.join(20)
    assert done == [made.id]


# -- sessions, dataframes and their steps -------------------------------------------------------------------------


@pytest.fixture
def five(federations: Callable[[int], Federation]) -> Federation:
    return federations(5)


@every_lost_answer
def test_sessions_dataframes_and_steps_are_made_once(five: Federation, answer: str, tmp_path: Path) -> None:
    name = f"s-{token()}"
    options: dict[str, Any] = {"settle_seconds": SETTLE, "folder": tmp_path}
    function = {"image": CLINICAL, "method": "keep_above", "arguments": {"column": "age", "minimum": 18}}
    with five.client() as client:
        lose(five, answer, "/session$")
        sessions = [make_session(client, "plain", name, **options) for _ in range(2)]
        lose(five, answer, "/dataframe$")
        frames = [
            make_dataframe(client, sessions[0].id, name, label="default", image=CLINICAL, method="read_csv", **options)
            for _ in range(2)
        ]
        lose(five, answer, "/preprocess$")
        steps = [add_preprocessing(client, frames[0].id, 1, **function, **options) for _ in range(2)]
        assert (
            len({one.id for one in sessions}) == len({one.id for one in frames}) == len({one.id for one in steps}) == 1
        )
        assert len(client.records(Session, name=name)) == 1
        assert [one.name for one in client.records(Dataframe, session_id=sessions[0].id)] == [name]
        assert [one.id for one in steps_of(client, frames[0].id)][1:] == [steps[0].id]


def test_a_step_that_takes_effect_late_is_not_sent_again(five: Federation, tmp_path: Path) -> None:
    function = {"image": CLINICAL, "method": "keep_above", "arguments": {"column": "age", "minimum": 18}}
    with five.client() as client:
        session = make_session(client, "plain", f"s-{token()}", folder=tmp_path)
        frame = make_dataframe(
            client, session.id, f"f-{token()}", label="default", image=CLINICAL, method="read_csv", folder=tmp_path
        )
        over = time.monotonic() + late(five, "502 page", "/preprocess$")
        with pytest.raises(LaunchInDoubt):
            add_preprocessing(client, frame.id, 1, **function, settle_seconds=0.2, folder=tmp_path)
        step = add_preprocessing(client, frame.id, 1, **function, settle_seconds=SETTLE, folder=tmp_path)
        wait_until(over)
        assert [one.id for one in steps_of(client, frame.id)][1:] == [step.id]
        with pytest.raises(ConfigurationError, match="has had 1 steps"):
            add_preprocessing(client, frame.id, 3, **function, folder=tmp_path)


def test_a_name_that_is_free_again_is_made_anew(five: Federation, tmp_path: Path) -> None:
    name = f"s-{token()}"
    with five.client() as client:
        first = make_session(client, "plain", name, folder=tmp_path)
        client.delete(Session, first.id)
        second = make_session(client, "plain", name, folder=tmp_path)
        assert second.id != first.id and client.get(Session, second.id).name == name
        assert make_session(client, "plain", name, folder=tmp_path).id == second.id
        with pytest.raises(NameConflict, match="scope 'own'"):
            make_session(client, "plain", name, scope=SessionScope.ORGANIZATION, folder=tmp_path)


def test_a_name_that_is_free_again_is_not_waited_for_as_if_another_machine_had_begun(
    five: Federation, tmp_path: Path
) -> None:
    open_since: list[datetime] = []

    @contextmanager
    def lease(_: str) -> Iterator[datetime | None]:
        yield open_since[-1] if open_since else None
        open_since.clear()

    @contextmanager
    def watched(token: str) -> Iterator[datetime | None]:
        with lease(token) as since:
            open_since.append(now())
            yield since

    name, known = f"s-{token()}", Circumstances(lease=watched)
    with five.client() as client:
        first = make_session(client, "plain", name, folder=tmp_path, circumstances=known)
        client.delete(Session, first.id)
        begun = time.monotonic()
        second = make_session(client, "plain", name, folder=tmp_path, settle_seconds=60.0, circumstances=known)
    assert second.id != first.id and time.monotonic() - begun < 30


def test_an_id_that_the_server_has_given_to_another_session_is_not_believed(five: Federation, tmp_path: Path) -> None:
    name, other = f"s-{token()}", f"other-{token()}"
    with five.client() as client:
        first = make_session(client, "plain", name, folder=tmp_path)
        second = make_session(client, "plain", other, folder=tmp_path / "others")
        (record,) = tmp_path.glob("*.json")
        record.write_text(json.dumps(json.loads(record.read_text()) | {"id": str(second.id)}))
        client.delete(Session, first.id)
        made = make_session(client, "plain", name, folder=tmp_path)
        assert made.name == name and made.id not in (first.id, second.id)


def test_a_session_of_an_unknown_collaboration_is_not_begun(five: Federation, tmp_path: Path) -> None:
    with five.client() as client:
        with pytest.raises(NotFoundError, match="no collaboration"):
            make_session(client, "nowhere", f"s-{token()}", folder=tmp_path)
        with pytest.raises(PreflightFailed, match="no collaboration"):
            launch(client, five.request("echo", collaboration="nowhere"), token(), folder=tmp_path)
    assert five.calls("POST", "/(session|task)$") == []


def test_while_the_server_cannot_be_asked_nothing_is_sent(here: Federation, tmp_path: Path) -> None:
    request = here.request("echo", "north", name=f"away-{token()}")
    with here.client() as client:
        _ = client.me
        here.sandbox.journal.clear()
        here.sandbox.faults.add(Fault(method="GET", path="/task$", status=503, body=HTML))
        with pytest.raises(ServerUnavailable):
            launch(client, request, "abcdefghij", settle_seconds=0.2, folder=tmp_path)
        here.sandbox.faults.clear()
        here.sandbox.faults.add(Fault(method="GET", path="/task$", status=200, body="[]", content_type=JSON))
        with pytest.raises(UnexpectedResponse):
            launch(client, request, "abcdefghij", settle_seconds=0.2, folder=tmp_path)
    assert here.sandbox.journal.entries("POST", "/task$") == []


def test_a_refused_name_is_told_by_the_server(five: Federation, tmp_path: Path) -> None:
    with five.client() as client:
        fault = Fault(method="POST", path="/session$", status=400, body='{"msg": "no"}', content_type=JSON, times=1)
        five.sandbox.faults.add(fault)
        with pytest.raises(RequestRefused, match="no"):
            make_session(client, "plain", f"s-{token()}", folder=tmp_path)
