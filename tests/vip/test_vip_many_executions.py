"""An account with more executions than the platform lists: what belongs to a session is asked for by itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from harness.vip_steps import QUICK, files_in, launch_others, run, send, start, wait
from prefect_biomed.clients.errors import LaunchInDoubt, LedgerError, NotFoundError
from prefect_biomed.clients.vip import (
    SessionFile,
    VipClient,
    VipSession,
    Workflow,
    download,
    find_all,
    finish,
    kill,
    kill_session,
    launch,
    monitor,
    open_session,
)
from prefect_biomed.clients.vip.errors import ListUnavailable, NotFetched, StillRunning
from prefect_biomed.clients.vip.monitoring import Listing, kill_intent
from prefect_biomed.sandbox import Sandbox

NewSession = Callable[..., VipSession]


def test_session_among_the_oldest_is_resumed_collected_and_killed(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_biomed.clients.vip.client._LONGEST_LIST", 10)
    vip.vip.switches.max_running_user = vip.vip.switches.max_running_platform = 10_000
    ended = new_session("CopyFile/1.0", {"file": "a.bin"}, name="ended", files={"a.bin": b"a"}, nb_runs=2)
    run(client, ended)
    vip.vip.switches.duration_seconds = 300
    running = new_session("SlowSegmentation/1.0", {"image": "a.bin"}, name="running", files={"a.bin": b"a"}, nb_runs=2)
    send(client, running)
    ids = [workflow.identifier for workflow in start(client, running)]
    launch_others(client, 12)
    assert len(client.workflows()) == 10
    assert find_all(client, running) == Listing((), "The platform lists only its 10 newest executions.")

    assert [look[0].status for look in monitor(client, open_session(ended.output_dir), QUICK)] == ["Finished"]
    assert download(client, open_session(ended.output_dir)).fetched == 2
    assert sorted(files_in(ended.output_dir).values()) == [b"a", b"a"]
    finish(client, open_session(ended.output_dir))
    assert not client.exists(ended.vip_dir)

    # A repeated launch takes what is on record, although no list has it.
    assert [launch(client, running, repetition).identifier for repetition in (1, 2)] == ids
    killed = kill_session(client, session_name="running", output_dir=running.output_dir)
    assert [(workflow.identifier, workflow.status) for workflow in killed] == [(one, "Killed") for one in ids]
    assert SessionFile(running).read().workflow_ids("Killed") == ids
    assert [workflow.status for workflow in wait(client, running)] == ["Killed"] * 2


def test_session_is_killed_by_name_alone(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Without its folder, by the names of its runs; sessions whose names begin alike are left alone."""
    vip.vip.switches.job_seconds = 300
    sessions = [
        new_session("CopyFile/1.0", {"file": "a.bin"}, name=name, files={"a.bin": b"a"}, nb_runs=2)
        for name in ("one", "one-1", "one-r001-abcd")
    ]
    for session in sessions:
        send(client, session)
        start(client, session)
    elsewhere = sessions[0].output_dir.parent / "elsewhere"
    killed = kill_session(client, session_name="one", output_dir=elsewhere)
    assert [(workflow.name, workflow.status) for workflow in killed] == [
        ("one-r001-t0k3n", "Killed"),
        ("one-r002-t0k3n", "Killed"),
    ]
    assert [workflow.status for workflow in kill_session(client, session_name="one", output_dir=elsewhere)] == [
        "Killed"
    ] * 2
    for session in sessions[1:]:
        assert {client.workflow(one).status.is_terminal for one in SessionFile(session).read().workflow_ids()} == {
            False
        }
        kill(client, SessionFile(session).read().workflow_ids())
    with pytest.raises(LedgerError, match=r"Session 'none' has no session file in .* and no execution"):
        kill_session(client, session_name="none", output_dir=elsewhere)
    with pytest.raises(LedgerError, match="There is no"):
        kill_session(client, session_name=None, output_dir=elsewhere)


def test_damaged_session_file_is_no_reason_to_kill_by_name(client: VipClient, new_session: NewSession) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, name="one")
    session.output_dir.mkdir(parents=True)
    (session.output_dir / "session_data.json").write_text("{")
    with pytest.raises(LedgerError, match="damaged"):
        kill_session(client, session_name="one", output_dir=session.output_dir)


def test_cancellation_ends_what_the_platform_lists_no_more(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is written down is killed although no list has it, one that is listed although nobody wrote it down."""
    vip.vip.switches.job_seconds = 60.0
    session = new_session("EveryType/1.0", {"text": "x"}, nb_runs=2)
    send(client, session)
    written, listed = start(client, session)
    with SessionFile(session).edit() as record:
        del record.ledger.launches[session.workflow_name(2)]
    everything = client.workflows()
    monkeypatch.setattr(client, "workflows", lambda: [w for w in everything if w.identifier == listed.identifier])
    killed, doubts = kill_intent(client, session.token, [session.output_dir], session_name=session.session_name)
    assert (killed, doubts) == ([written.identifier, listed.identifier], [])

    def no_list() -> list[object]:
        raise ListUnavailable("no list", status=500)

    monkeypatch.setattr(client, "workflows", no_list)
    kill(client, [written.identifier, listed.identifier])
    killed, doubts = kill_intent(client, session.token, [session.output_dir], session_name=session.session_name)
    assert killed == []
    assert len(doubts) == 1
    assert "only what is written down here or listed was killed, 1 runs; others may run on" in doubts[0]
    assert kill_intent(client, "an0ther", [session.output_dir.parent], session_name="nobody")[0] == []
    # Where nothing is written down, and older executions than those listed there may be.
    monkeypatch.setattr(client, "workflows", lambda: everything)
    monkeypatch.setattr(client, "is_cut_off", lambda listed: True)
    killed, (doubt,) = kill_intent(client, "an0ther", [session.output_dir / "none"], session_name="nobody")
    assert "others may run on" in doubt


def test_kill_tells_of_a_launch_that_nobody_has_seen(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may run on; only when no request can take effect any more, and lists go back so far, it never did."""
    vip.vip.switches.job_seconds = 60.0
    session = new_session("EveryType/1.0", {"text": "x"}, nb_runs=2)
    send(client, session)
    seen, lost = start(client, session)
    with SessionFile(session).edit() as record:
        record.ledger.launches[session.workflow_name(2)].workflow_id = None
        del record.workflows[lost.identifier]
    everything = client.workflows()
    monkeypatch.setattr(client, "workflows", lambda: [w for w in everything if w.identifier != lost.identifier])
    where: dict[str, Any] = {"session_name": session.session_name, "output_dir": session.output_dir}
    with pytest.raises(LaunchInDoubt, match=f"whether {session.workflow_name(2)} was launched"):
        kill_session(client, **where)
    assert client.workflow(seen.identifier).status == "Killed"
    monkeypatch.setattr(client, "settle_seconds", 0)
    assert [one.identifier for one in kill_session(client, **where)] == [seen.identifier]
    monkeypatch.setattr(client, "is_cut_off", lambda listed: True)
    with SessionFile(session).edit() as record:
        record.ledger.launches[session.workflow_name(2)].intended = datetime(2020, 1, 1, tzinfo=UTC)
    with pytest.raises(LaunchInDoubt):
        kill_session(client, **where)


def test_run_that_the_platform_does_not_know_is_not_taken_for_killed(
    client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an account that may not see it, or on another platform; unless it is known to have ended."""
    session = new_session("EveryType/1.0", {"text": "x"}, nb_runs=2)
    send(client, session)
    start(client, session)
    lost, other = [one.identifier for one in wait(client, session)]
    code: int | None = None
    workflow = client.workflow

    def unknown(identifier: str) -> Workflow:
        if identifier == lost:
            raise NotFoundError(f"no {identifier}", status=404, code=code)
        return workflow(identifier)

    where: dict[str, Any] = {"session_name": session.session_name, "output_dir": session.output_dir}
    monkeypatch.setattr(client, "workflow", unknown)
    assert [one.status for one in kill_session(client, **where)] == ["Removed", "Finished"], "its end is on record"
    with SessionFile(session).edit() as record:
        record.ledger.ended.clear()
        record.workflows[lost].status = record.workflows[other].status = "Running"
    intended: dict[str, Any] = {"folders": [session.output_dir], "session_name": session.session_name}
    killed, (doubt,) = kill_intent(client, session.token, **intended)
    assert killed == []
    assert f"does not know {lost}, and nobody has seen it end" in doubt
    with pytest.raises(NotFoundError, match=f"does not know {lost}, .* may run on"):
        kill(client, [lost, other])
    with pytest.raises(NotFoundError, match=f"does not know {lost}, .* The others were killed"):
        kill_session(client, **where)
    statuses = {name: run.status for name, run in SessionFile(session).read().workflows.items()}
    assert statuses == {lost: "Running", other: "Finished"}
    code = 8015  # VIP says that it was deleted, which it allows only after the end.
    assert [one.status for one in kill_session(client, **where)] == ["Removed", "Finished"]
    assert kill_intent(client, session.token, **intended) == ([], [])


@pytest.mark.parametrize("backup", ["local", None])
def test_outputs_of_a_run_that_no_list_has_are_not_removed_with_those_of_the_others(
    client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backup: Any
) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"a"}, nb_runs=2, backup=backup)
    run(client, session)
    everything = client.workflows()
    monkeypatch.setattr(client, "workflows", lambda: everything[:1])
    elsewhere = session.model_copy(update={"output_dir": tmp_path / "elsewhere"})
    with pytest.raises(LedgerError):
        download(client, elsewhere)
    assert download(client, elsewhere, workflow_ids=[everything[0].identifier]).fetched == 1
    with pytest.raises(NotFetched, match="r001-t0k3n"):
        finish(client, elsewhere)
    nowhere = session.model_copy(update={"output_dir": tmp_path / "nowhere"})
    with monkeypatch.context() as patch:
        patch.setattr(client, "is_cut_off", lambda listed: True)
        with pytest.raises(StillRunning, match="not all its runs are listed, so some may go on"):
            finish(client, nowhere, keep_output=True)
    assert client.exists(session.vip_input_dir)
    assert client.exists(f"{session.run_dir(1)}/copies/a.bin")
    assert download(client, session).fetched == 2
    assert session.vip_output_dir in finish(client, session).removed
