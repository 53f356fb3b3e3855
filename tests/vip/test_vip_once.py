"""Whatever happens to the answer of a launch, there is one execution in the end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.vip_steps import EXECUTIONS, until
from prefect_biomed.clients.errors import (
    BiomedError,
    CapacityError,
    LaunchInDoubt,
    LedgerError,
    PlatformError,
    is_transient,
)
from prefect_biomed.clients.once import Circumstances
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    GenericVipError,
    SessionFile,
    VipClient,
    VipSession,
    Workflow,
    launch,
    preflight,
    upload,
)
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

HTML = "<html><body><h1>Oops</h1></body></html>"
JSON = "application/json"
NO_REASON = {"status": 400, "body": '{"errorCode": 8000, "errorMessage": "no"}', "content_type": JSON}
LOST: dict[str, dict[str, Any]] = {
    "connection lost": {"drop": "after"},
    "502 page": {"status": 502, "body": HTML, "after_effect": True},
    "500 page": {"status": 500, "body": HTML, "after_effect": True},
    "500 empty": {"status": 500, "body": "", "after_effect": True},
    "400 page": {"status": 400, "body": HTML, "after_effect": True},
    "200 page": {"status": 200, "body": HTML, "after_effect": True},
    "201 empty": {"status": 201, "body": "", "after_effect": True},
    "201 {}": {"status": 201, "body": "{}", "content_type": JSON, "after_effect": True},
    "200 of another": {
        "status": 200,
        "body": '{"identifier": "workflow-other1", "name": "another"}',
        "content_type": JSON,
        "after_effect": True,
    },
    "400 without a reason": {**NO_REASON, "after_effect": True},
}
every_lost_answer = pytest.mark.parametrize("answer", LOST)
every_place_of_the_record = pytest.mark.parametrize("backup", ["local", "vip", None])
# Longer than any request of these tests is held.
SETTLE = 20.0


class Killed(BaseException):
    """The process is gone while its request is on the way."""


def lose(vip: Sandbox, answer: str, **more: Any) -> None:
    """Have the next answer lost."""
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, times=1, **LOST[answer] | more))


def late(vip: Sandbox, answer: str, *, seconds: float = 0.8) -> None:
    """Have the next request answered wrongly at once, and carried out later."""
    fault = {"drop": "before"} if "drop" in LOST[answer] else LOST[answer] | {"after_effect": False}
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, times=1, hold_seconds=seconds, **fault))


def executions(client: VipClient, session: VipSession) -> list[str]:
    name = session.workflow_name(1)
    return [workflow.identifier for workflow in client.workflows() if workflow.name == name]


def posts(vip: Sandbox) -> int:
    return len(vip.vip.journal.entries("POST", EXECUTIONS))


def die_in_flight(client: VipClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the client's process die right after its request has left; the request arrives all the same."""
    send = client.launch

    def nobody_listens(request: dict[str, Any]) -> None:
        with suppress(BiomedError):
            send(**request)

    def die(**request: Any) -> Workflow:
        threading.Thread(target=nobody_listens, args=(request,), daemon=True).start()
        time.sleep(0.3)
        raise Killed

    monkeypatch.setattr(client, "launch", die)


@pytest.fixture
def session(new_session: NewSession) -> VipSession:
    return new_session("EveryType/1.0", {"text": "x"})


@every_lost_answer
def test_lost_answer_is_found(vip: Sandbox, client: VipClient, session: VipSession, answer: str) -> None:
    lose(vip, answer)
    made = launch(client, session, 1, settle_seconds=SETTLE)
    again = launch(client, session, 1, settle_seconds=SETTLE)
    assert executions(client, session) == [made.identifier] == [again.identifier]
    assert posts(vip) == 1
    assert SessionFile(session).read().workflow_ids() == [made.identifier]


@every_lost_answer
def test_launch_that_takes_effect_late_is_found_by_the_repetition(
    vip: Sandbox, client: VipClient, session: VipSession, answer: str
) -> None:
    late(vip, answer)
    with pytest.raises(BiomedError, match=r"it looks before it sends|was refused"):
        launch(client, session, 1, settle_seconds=0.2)
    assert executions(client, session) == []
    made = launch(client, session, 1, settle_seconds=SETTLE)
    assert executions(client, session) == [made.identifier]
    assert posts(vip) == 1


@every_lost_answer
def test_process_killed_in_flight_and_started_again_at_once_makes_no_second_execution(
    vip: Sandbox,
    client: VipClient,
    connect: Connect,
    session: VipSession,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose(vip, answer, hold_seconds=1.0)
    die_in_flight(client, monkeypatch)
    with pytest.raises(Killed):
        launch(client, session, 1, settle_seconds=SETTLE)
    second = connect()
    assert executions(second, session) == []
    made = launch(second, session, 1, settle_seconds=SETTLE)
    assert executions(second, session) == [made.identifier]
    assert posts(vip) == 1


@every_lost_answer
def test_two_processes_of_one_intent_make_one_execution(
    vip: Sandbox, connect: Connect, session: VipSession, answer: str
) -> None:
    lose(vip, answer, delay_seconds=0.2)
    ids: list[str] = []
    clients = [connect(), connect()]
    threads = [
        threading.Thread(target=lambda one=one: ids.append(launch(one, session, 1, settle_seconds=SETTLE).identifier))
        for one in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 2
    assert executions(clients[0], session) == [ids[0]] == [ids[1]]
    assert posts(vip) == 1


@every_place_of_the_record
def test_intent_is_remembered_wherever_the_session_is_kept(
    vip: Sandbox,
    client: VipClient,
    connect: Connect,
    new_session: NewSession,
    backup: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = new_session("EveryType/1.0", {"text": "x"}, backup=backup)
    lose(vip, "502 page", hold_seconds=1.0)
    die_in_flight(client, monkeypatch)
    with pytest.raises(Killed):
        launch(client, session, 1, settle_seconds=SETTLE)
    made = launch(connect(), session, 1, settle_seconds=SETTLE)
    assert executions(connect(), session) == [made.identifier]
    assert SessionFile(session, connect()).read().workflow_ids() == [made.identifier]


def test_intent_is_remembered_when_the_record_on_the_platform_is_lost_while_it_is_written(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VIP replaces no file: the old one is deleted before the new one is sent."""
    session = new_session("EveryType/1.0", {"text": "x"}, backup="vip")
    late(vip, "connection lost", seconds=4.0)
    with pytest.raises(LaunchInDoubt):
        launch(client, session, 1, settle_seconds=0.1)
    with monkeypatch.context() as patch:

        def die(*_: object, **__: object) -> None:
            raise Killed

        patch.setattr("prefect_biomed.clients.vip.session_file.put_and_verify", die)
        with pytest.raises(Killed), SessionFile(session, client).edit():
            pass
    assert not client.exists(f"{session.vip_output_dir}/session_data.json")
    made = launch(client, session, 1, settle_seconds=SETTLE)
    assert executions(client, session) == [made.identifier]
    assert posts(vip) == 1
    assert SessionFile(session, client).read().workflow_ids() == [made.identifier]


PROCESS = """
import sys
from prefect_biomed.clients.vip import VipClient, VipSession, launch
url, key, session = sys.argv[1:]
with VipClient(url, key) as client:
    launch(client, VipSession.model_validate_json(session), 1)
"""


def test_process_that_is_killed_by_the_system_in_flight(vip: Sandbox, client: VipClient, session: VipSession) -> None:
    facts = vip.ready()["vip"]
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, times=1, hold_seconds=3.0))
    arguments = [facts["url"], facts["api_key"], session.model_dump_json()]
    process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments])
    until(lambda: process.poll() is None and vip.vip.faults.describe()[-1]["hit"], 60)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert executions(client, session) == []
    made = launch(client, session, 1)
    assert executions(client, session) == [made.identifier]


# -- what is a doubt, and what is a refusal ----------------------------------------------------------------------------


def test_launch_that_vip_fails_without_a_reason_is_looked_for_and_then_told(
    vip: Sandbox, client: VipClient, session: VipSession
) -> None:
    """No retry of a task may send it again: a launch that the engine did not take disables it for everybody."""
    vip.vip.faults.add(Fault.model_validate({"method": "POST", "path": EXECUTIONS, "times": 1, **NO_REASON}))
    with pytest.raises(PlatformError, match=r"session-r001-t0k3n was refused: .*ask the platform's support") as caught:
        launch(client, session, 1, settle_seconds=0.5)
    assert not isinstance(caught.value, GenericVipError)
    assert not is_transient(caught.value)
    assert SessionFile(session).read().ledger.launches["session-r001-t0k3n"].workflow_id is None
    launch(client, session, 1, settle_seconds=0.5)
    assert len(executions(client, session)) == 1
    assert posts(vip) == 2


@pytest.mark.parametrize("code", [8001, 8007, 8009, 8018, 8020])
def test_refusal_is_no_doubt_and_the_next_attempt_need_not_wait(
    vip: Sandbox, client: VipClient, session: VipSession, code: int
) -> None:
    vip.vip.faults.add(
        Fault(
            method="POST",
            path=EXECUTIONS,
            times=1,
            status=400,
            body=f'{{"errorCode": {code}, "errorMessage": "no"}}',
            content_type=JSON,
        )
    )
    began = time.monotonic()
    with pytest.raises(PlatformError, match=f"code {code}"):
        launch(client, session, 1, settle_seconds=60.0)
    ledger = SessionFile(session).read().ledger
    assert (ledger.launches, ledger.begun) == ({}, ["session-r001-t0k3n"])
    launch(client, session, 1, settle_seconds=60.0)
    assert time.monotonic() - began < 30
    assert len(executions(client, session)) == 1


def test_launch_that_waits_for_capacity_is_recorded_anew_with_each_try(
    vip: Sandbox, client: VipClient, connect: Connect, session: VipSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies after a long wait leaves a young intent, which the next one waits for."""
    vip.vip.switches.max_running_platform = 0
    tries: list[datetime] = []
    send = client.launch

    def launched(**request: Any) -> Workflow:
        tries.append(SessionFile(session).read().ledger.launches["session-r001-t0k3n"].intended)
        if len(tries) == 3:
            raise Killed
        return send(**request)

    monkeypatch.setattr(client, "launch", launched)
    with pytest.raises(Killed):
        launch(client, session, 1, capacity=PollSettings(0.2), settle_seconds=SETTLE)
    assert tries == sorted(set(tries))
    vip.vip.switches.max_running_platform = 35
    began = time.monotonic()
    launch(connect(), session, 1, settle_seconds=2.0)
    assert time.monotonic() - began > 1
    assert len(executions(client, session)) == 1


def test_capacity_is_a_refusal_in_the_platforms_own_words_only(
    vip: Sandbox, client: VipClient, session: VipSession
) -> None:
    vip.vip.faults.add(
        Fault(method="POST", path=EXECUTIONS, times=1, status=503, body='{"errorCode": 2001}', content_type=JSON)
    )
    with pytest.raises(BiomedError) as caught:
        launch(client, session, 1, settle_seconds=0.5)
    assert not isinstance(caught.value, CapacityError)
    assert "session-r001-t0k3n" in SessionFile(session).read().ledger.launches


# -- what looking can and cannot tell ----------------------------------------------------------------------------------


def test_list_that_does_not_reach_back_to_the_launch_tells_nothing(
    vip: Sandbox, client: VipClient, session: VipSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VIP lists its newest executions only: an older one is not missing, it is not listed."""
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, times=1, drop="before"))
    with pytest.raises(LaunchInDoubt):
        launch(client, session, 1, settle_seconds=0.2)
    later = datetime.now(UTC) + timedelta(minutes=1)
    crowd = [Workflow(identifier=f"w{number}", name="other", start_date=later) for number in range(500)]
    monkeypatch.setattr(client, "workflows", lambda: crowd)
    with pytest.raises(LedgerError, match=r"lists only its 500 newest .* Look for the name on the portal"):
        launch(client, session, 1, settle_seconds=0.2)
    assert posts(vip) == 1
    before = [workflow.model_copy(update={"start_date": later - timedelta(days=1)}) for workflow in crowd]
    monkeypatch.setattr(client, "workflows", lambda: before)
    launch(client, session, 1, settle_seconds=0.2)
    assert posts(vip) == 2


def test_two_executions_of_one_name_are_named_and_the_younger_is_killed(
    vip: Sandbox, client: VipClient, session: VipSession, caplog: pytest.LogCaptureFixture
) -> None:
    vip.vip.switches.job_seconds = 60
    first, second = (
        client.launch(
            name=session.workflow_name(1),
            pipeline_id="EveryType/1.0",
            input_values={"text": "x"},
            results_location=f"/vip/Home/{place}",
        ).identifier
        for place in "ab"
    )
    with caplog.at_level(logging.ERROR):
        assert launch(client, session, 1).identifier == first
    assert f"{first} is taken" in caplog.text
    assert second in caplog.text
    until(lambda: client.workflow(second).status == "Killed")
    assert client.workflow(first).status == "Running"
    client.kill(first)


def test_record_of_an_earlier_release_is_read(vip: Sandbox, client: VipClient, session: VipSession) -> None:
    """It says when a launch was intended, and neither what was begun nor the machine's uptime."""
    with SessionFile(session).edit() as record:
        _ = record.ledger
    path = session.output_dir / "session_data.json"
    old = '{"session-r001-t0k3n": {"intended": "2026-01-01T00:00:00Z", "results_location": "/vip/Home/x"}}'
    path.write_text(path.read_text().replace('"launches": {}', f'"launches": {old}'))
    assert "intended" in path.read_text()
    began = time.monotonic()
    launch(client, session, 1, settle_seconds=60.0)
    assert time.monotonic() - began < 30
    assert len(executions(client, session)) == 1


def test_session_file_is_for_its_owner_only(client: VipClient, session: VipSession, tmp_path: Path) -> None:
    launch(client, session, 1)
    assert (session.output_dir / "session_data.json").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.rglob("*.part"))


def test_two_processes_that_upload_at_once_send_each_file_once(
    vip: Sandbox, connect: Connect, new_session: NewSession
) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"x", "b.bin": b"y"})
    vip.vip.faults.add(Fault(method="PUT", path=r"\.bin", delay_seconds=0.5))
    sent: list[int] = []
    threads = [
        threading.Thread(target=lambda one=one: sent.append(upload(one, session, preflight(one, session)).sent))
        for one in (connect(), connect())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sent) == [0, 2]
    assert len(vip.vip.journal.entries("PUT", r"\.bin")) == 2


@every_place_of_the_record
def test_refusal_gives_the_lease_back_and_a_doubt_does_not(
    vip: Sandbox, client: VipClient, new_session: NewSession, backup: str | None
) -> None:
    """A lease left open makes the next attempt look for minutes; after a refusal there is nothing to look for."""
    opened: list[bool] = []

    @contextmanager
    def lease(_: str) -> Iterator[datetime | None]:
        opened.append(True)
        yield None
        opened.pop()

    session = new_session("EveryType/1.0", {"text": "x"}).model_copy(update={"backup": backup})
    refusal = {"status": 400, "body": '{"errorCode": 8009, "errorMessage": "no"}', "content_type": "application/json"}
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, times=1, **refusal))
    with pytest.raises(PlatformError, match="8009"):
        launch(client, session, 1, settle_seconds=0.5, circumstances=Circumstances(lease=lease))
    assert opened == []
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, times=1, drop="before"))
    with pytest.raises(LaunchInDoubt):
        launch(client, session, 1, settle_seconds=0.5, circumstances=Circumstances(lease=lease))
    assert opened == [True]
