"""A whole session with everything going wrong: the key is in no log, error, file or journal."""

from __future__ import annotations

import json
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from harness.vip_steps import EXECUTIONS, send, start, wait
from prefect_biomed.clients.errors import AuthenticationError, BiomedError, TransferFailed
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    VipClient,
    VipSession,
    download,
    failures,
    finish,
    kill,
    monitor,
    share_inputs,
)
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

HTML = "<!doctype html><html><body><h1>Bad things</h1></body></html>"
LOOKS = PollSettings(interval_seconds=0.02, error_budget=1)


class Evidence:
    """Everything a session leaves behind that somebody may read."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Expect an error of ours and keep it."""
        with pytest.raises(BiomedError) as caught:
            yield
        self.errors.append(caught.value)

    def texts(self) -> Iterator[str]:
        """Each error in every form it is shown or stored in, with what it came from."""
        for error in self.errors:
            yield "".join(traceback.format_exception(error))
            yield "".join(traceback.TracebackException.from_exception(error, capture_locals=False).format())
            yield repr(pickle.dumps(error))
            seen: list[BaseException] = [error]
            for one in seen:
                yield f"{one} {one!r} {one.args!r}"
                if isinstance(one, BiomedError):
                    yield repr(vars(one))
                seen += [other for other in (one.__cause__, one.__context__) if other is not None and other not in seen]
                if isinstance(one, TransferFailed):
                    seen += [other for other in one.failures.values() if other not in seen]


@pytest.mark.usefixtures("no_pauses")
def test_key_is_nowhere_after_a_session_full_of_errors(
    vip: Sandbox,
    connect: Connect,
    new_session: NewSession,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("prefect_biomed", "urllib3", "requests"):
        caplog.set_level(logging.DEBUG, logger=name)
    evidence = Evidence()
    canary = vip.ready()["vip"]["api_key"]
    client = connect(read_seconds=0.3)
    session = new_session("EveryType/1.0", {"text": ["x", "y"], "file": "a.txt"}, files={"a.txt": b"1", "b.txt": b"2"})
    faults = vip.vip.faults

    def broken(**fault: object) -> None:
        faults.clear()
        faults.add(Fault.model_validate(fault))

    broken(method="PUT", path=r"a\.txt", status=500, body=HTML)
    with evidence.collected():
        send(client, session, settle_seconds=0.05)
    broken(method="PUT", path=r"a\.txt", drop="before", calls=[1])
    send(client, session, settle_seconds=0.05)
    broken(method="POST", path=EXECUTIONS, drop="before")
    with evidence.collected():
        start(client, session, settle_seconds=0.05)
    broken(method="POST", path=EXECUTIONS, drop="after", calls=[1])
    (workflow,) = start(client, session)
    for fault in (
        {"status": 500, "body": HTML},
        {"status": 502, "body": HTML},
        {"status": 200, "body": HTML},
        {"drop": "before"},
        {"delay_seconds": 0.5, "times": 6},
        {"truncate_bytes": 5},
        {"status": 302, "headers": {"Location": "http://127.0.0.1:9/elsewhere"}},
        {"status": 403, "body": HTML},
        {"status": 500, "body": '{"errorCode": 8000, "errorMessage": "no"}', "content_type": "application/json"},
    ):
        broken(method="GET", path="/executions", **fault)
        with evidence.collected():
            list(monitor(client, session, LOOKS))
    faults.clear()
    wait(client, session)
    failures(client, session, [client.workflow(workflow.identifier)])
    broken(method="GET", query="action=content", truncate_bytes=3)
    with evidence.collected():
        download(client, session, retry_seconds=(0.01,))
    faults.clear()
    download(client, session)
    guest = share_inputs(client, new_session("EveryType/1.0", {"text": "x"}, name="guest"), session)
    finish(client, session)
    vip.vip.switches.job_seconds = 30
    kill(client, [workflow.identifier for workflow in start(client, guest)])
    with evidence.collected():
        client.pipeline("CardioFlow/2.0")

    # The key stops working, and somebody gives a broken one.
    vip.vip.switches.key_generation = 1
    for step in (lambda: client.check_key(), lambda: wait(client, guest), lambda: finish(client, guest)):
        with evidence.collected():
            step()
        assert isinstance(evidence.errors[-1], AuthenticationError)
    with evidence.collected():
        connect(f"{canary}\nX-Header: 1").check_key()
    with evidence.collected():
        VipClient(vip.vip.url.replace("http://", f"http://user:{canary}@"), "key").check_key()
    assert len(evidence.errors) == 18

    # The key was really used, and logs were really written.
    assert len(vip.vip.journal) > 100
    assert len(caplog.records) > 100
    assert {record.name.split(".")[0] for record in caplog.records} >= {"prefect_biomed", "urllib3"}
    out, err = capfd.readouterr()
    formatter = logging.Formatter("%(name)s %(message)s %(args)s %(exc_text)s")
    places = {
        "output": [out, err],
        "log": [formatter.format(record) + repr(vars(record)) for record in caplog.records],
        "errors": list(evidence.texts()),
        "client": [repr(client), repr(vars(client)), repr(session), session.model_dump_json()],
        "journal": [json.dumps([entry.model_dump() for entry in vip.vip.journal])],
        "files": [f"{path} {path.read_bytes()!r}" for path in sorted(tmp_path.rglob("*")) if path.is_file()],
        "platform": [path.read_bytes().decode("latin-1") for path in vip.vip.directory.rglob("*") if path.is_file()],
    }
    assert "session_data.json" in " ".join(places["files"])
    for place, texts in places.items():
        found = [text for text in texts if canary in text]
        assert not found, f"the key is in {place}: {found[0][:2000]}"


def test_control_the_search_would_find_a_key(vip: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """A client that is careless with its key is caught by the same search."""
    canary = vip.ready()["vip"]["api_key"]
    evidence = Evidence()
    try:
        raise BiomedError(f"GET /x?apikey={canary}")
    except BiomedError as error:
        evidence.errors.append(error)
    assert any(canary in text for text in evidence.texts())
    with caplog.at_level(logging.DEBUG):
        requests.get(f"{vip.vip.url}/rest/platform?apikey={canary}", timeout=5)
    assert re.search(canary, caplog.text)
    assert canary not in json.dumps([entry.model_dump() for entry in vip.vip.journal])
