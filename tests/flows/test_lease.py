"""The lease on an intent: two machines do not launch at once, and one that comes after another's crash knows of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError

from prefect_biomed.clients.errors import HeldElsewhere, NetworkError, ServerUnavailable, is_transient
from prefect_biomed.clients.once import Intent, IntentFolder, Launch, once
from prefect_biomed.tasks import _lease
from prefect_biomed.tasks._lease import lease
from prefect_biomed.tasks.policies import circumstances

pytestmark = pytest.mark.usefixtures("prefect_api")


def limits() -> list[str]:
    with get_client(sync_client=True) as client:
        return [one.name for one in client.read_global_concurrency_limits(limit=200) if "biomed" in one.name]


def test_lease_is_there_while_it_is_held_and_gone_afterwards() -> None:
    with lease("tok-plain") as open_since:
        assert open_since is None
        assert "biomed-intent-tok-plain" in limits()
    assert "biomed-intent-tok-plain" not in limits()


def test_attempt_that_failed_stays_open_and_the_next_is_told() -> None:
    with pytest.raises(ZeroDivisionError), lease("tok-open"):
        raise ZeroDivisionError
    with lease("tok-open") as open_since:
        assert open_since is not None
        assert timedelta() <= datetime.now(UTC) - open_since < timedelta(minutes=5)
    with lease("tok-open") as open_since:
        assert open_since is None


def test_second_machine_waits_for_the_first_and_begins_anew() -> None:
    order: list[str] = []
    held = threading.Event()

    def first() -> None:
        with lease("tok-two"):
            held.set()
            time.sleep(2)
            order.append("first ends")

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(30)
    with lease("tok-two"):
        order.append("second begins")
    thread.join(30)
    assert order == ["first ends", "second begins"]
    assert "biomed-intent-tok-two" not in limits()


def test_slot_that_the_dead_hold_is_not_waited_for_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lease, "_PATIENCE_SECONDS", 2.0)
    with lease("tok-alone"):  # as one that was killed leaves it, which nothing but a server frees
        monkeypatch.setattr(_lease, "_is_for_this_process_alone", lambda: True)
        with pytest.raises(ZeroDivisionError), lease("tok-alone") as open_since:
            assert open_since is not None
            raise ZeroDivisionError
        monkeypatch.undo()
    assert not _lease._is_for_this_process_alone()


def test_lease_that_is_never_free_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lease, "_PATIENCE_SECONDS", 2.0)
    held, free = threading.Event(), threading.Event()

    def first() -> None:
        with lease("tok-busy"):
            held.set()
            free.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(30)
    with pytest.raises(HeldElsewhere, match="prefect gcl delete biomed-intent-tok-busy"), lease("tok-busy"):
        pass
    free.set()
    thread.join(30)


OUT_OF_ORDER = PrefectHTTPStatusError(
    "out of order",
    request=httpx.Request("POST", "http://prefect"),
    response=httpx.Response(500, request=httpx.Request("POST", "http://prefect")),
)


def failing(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


each_outage = pytest.mark.parametrize(
    "outage", [httpx.ConnectError("refused"), OUT_OF_ORDER], ids=lambda error: type(error).__name__
)


@each_outage
def test_launch_whose_lease_cannot_be_given_back_is_a_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, outage: Exception
) -> None:
    launched = False
    with lease("tok-kept"):
        launched = True
        monkeypatch.setattr(SyncPrefectClient, "delete_global_concurrency_limit_by_name", failing(outage))
    assert launched
    assert "biomed-intent-tok-kept could not be given back" in caplog.text


@each_outage
def test_nothing_is_launched_while_the_server_cannot_tell_who_holds_the_lease(
    monkeypatch: pytest.MonkeyPatch, outage: Exception
) -> None:
    monkeypatch.setattr(SyncPrefectClient, "create_global_concurrency_limit", failing(outage))
    with pytest.raises(ServerUnavailable, match="biomed-intent-tok-out") as caught, lease("tok-out"):
        pytest.fail("launched without a lease")
    assert is_transient(caught.value)


def test_retry_of_a_flow_run_on_another_machine_looks_before_it_sends(tmp_path: Path) -> None:
    """The first machine's request is carried out late; the second knows of the attempt by Prefect alone."""
    objects: list[str] = []
    attempts: list[str] = []

    def effect() -> None:
        time.sleep(3)
        objects.append("job-1")

    def send() -> str:
        if not attempts[1:]:
            threading.Thread(target=effect, daemon=True).start()
            raise KeyboardInterrupt
        objects.append("job-2")
        return "job-2"

    def find(_: Intent) -> Sequence[str]:
        return list(objects)

    @task
    def launch_it() -> str:
        settings: dict[str, Any] = {"what": "job", "token": "tok-retry", "settle_seconds": 15.0}
        launch = Launch(
            **settings, find=find, prepare=lambda _: {}, send=send, get=str, identify=str, says_no=lambda _: True
        )
        try:
            return once(launch, IntentFolder(tmp_path / f"machine-{len(attempts)}"), circumstances("test", "job"))
        except KeyboardInterrupt:
            raise NetworkError("the machine is gone") from None

    @flow(retries=1, retry_delay_seconds=0)
    def work() -> str:
        attempts.append("attempt")
        return launch_it()

    assert work() == "job-1"
    assert len(attempts) == 2
    assert objects == ["job-1"]


def test_first_attempt_has_no_earlier_one() -> None:
    @task
    def tell() -> datetime | None:
        return circumstances("test", "job").attempted_since

    @flow
    def work() -> datetime | None:
        return tell()

    assert work() is None
