"""Success is decided in one place: by status, jobs, required outputs and what was fetched; what is unknown is none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.vip_steps import QUICK, effects, run, send, start, until, wait
from prefect_biomed.clients.errors import LedgerError, NotFoundError, PlatformError, PreflightFailed
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    Asked,
    NotFetched,
    SessionFile,
    SessionOptions,
    StillNeeded,
    StillRunning,
    VipClient,
    VipSession,
    Workflow,
    WorkflowStatus,
    complete_inputs,
    download,
    finish,
    judge,
    kill,
    launch,
    monitor,
    open_intents,
    open_session,
    outcome,
    preflight,
    share_inputs,
    upload,
)
from prefect_biomed.clients.vip.models import PathEntry
from prefect_biomed.clients.vip.session_record import EndedRecord
from prefect_biomed.clients.vip.upload import foresee_inputs, foresee_upload
from prefect_biomed.sandbox import Fault, Sandbox

NewSession = Callable[..., VipSession]
COPY = ("CopyFile/1.0", {"file": "a.bin"})


def workflow(status: str = "Finished", jobs: str = "", outputs: tuple[str, ...] = ("/o/a",), **more: Any) -> Workflow:
    """An execution whose jobs are given by one letter each: `c`ompleted, `e`rror, `r`unning or `n`ew to us."""
    words = {"c": "COMPLETED", "e": "ERROR", "r": "RUNNING", "n": "HIBERNATING"}
    told = {str(number): {"status": words[job]} for number, job in enumerate(jobs)}
    return Workflow.model_validate(
        {"identifier": "w", "status": status, "jobs": told, "returnedFiles": {"result": list(outputs)}, **more}
    )


@pytest.mark.parametrize(
    ("seen", "asked", "problems"),
    [
        (workflow(), Asked(), ()),
        (workflow(jobs="cc"), Asked(options=SessionOptions(strict=True)), ()),
        (workflow(jobs="cec"), Asked(), ()),
        (workflow(jobs="cec"), Asked(options=SessionOptions(strict=True)), ("1 of 3 jobs failed",)),
        (workflow(), Asked(SessionOptions(strict=True), tells_jobs=True), ("tells nothing of its jobs",)),
        (workflow(jobs="cc"), Asked(SessionOptions(strict=True), tells_jobs=True), ()),
        (workflow(), Asked(tells_jobs=True), ()),
        (workflow(jobs="crn"), Asked(options=SessionOptions(strict=True)), ("of 2 of 3 jobs the platform",)),
        (workflow(jobs="crn"), Asked(), ()),
        (workflow(jobs="re"), Asked(options=SessionOptions(strict=True)), ("1 of 2 jobs failed", "of 1 of 2 jobs")),
        (workflow("ExecutionFailed"), Asked(), ("ExecutionFailed",)),
        (workflow("Killed"), Asked(), ("Killed",)),
        (workflow("Killed"), Asked(options=SessionOptions(get_status=("Finished", "Killed"))), ()),
        (workflow("Running"), Asked(), ("has not ended, it is Running",)),
        (workflow("Hibernating"), Asked(), ("has not ended, it is Hibernating",)),
        (workflow("Hibernating"), Asked(options=SessionOptions(get_status=("Hibernating",))), None),
        (workflow(outputs=()), Asked(required_outputs=frozenset({"result"})), ("without result",)),
        (workflow(), Asked(required_outputs=frozenset({"result", "log"})), ("without log",)),
        (workflow(), Asked(SessionOptions(accept_incomplete=True), required_outputs=frozenset({"result", "log"})), ()),
        (workflow(), Asked(required_outputs=frozenset({"other"})), ("1 of at least 1 outputs, without other",)),
        (workflow(returnedFiles=["/o/a"]), Asked(required_outputs=frozenset({"other"})), ()),
        (workflow(returnedFiles=["/o/a"]), Asked(required_outputs=frozenset({"b", "c"})), ("1 of at least 2 outputs",)),
        (workflow(), Asked(unfetched=("/o/a",)), ("1 outputs are not here: /o/a",)),
        (workflow("Killed"), Asked(unfetched=("/o/a",)), ("Killed",)),
        (workflow("Removed", outputs=()), Asked(), ("nothing tells how it ended",)),
        (workflow("Removed", outputs=()), Asked(ended=EndedRecord(status="Finished", outputs=1)), ()),
        (workflow("Removed", outputs=()), Asked(ended=EndedRecord(status="ExecutionFailed")), ("ExecutionFailed",)),
        (
            workflow("Removed", outputs=()),
            Asked(SessionOptions(strict=True), ended=EndedRecord(status="Finished", jobs=2, failed_jobs=1, outputs=1)),
            ("1 of 2 jobs failed",),
        ),
        (
            workflow("Removed", outputs=()),
            Asked(SessionOptions(strict=True), ended=EndedRecord(status="Finished", jobs=2, open_jobs=1, outputs=1)),
            ("of 1 of 2 jobs",),
        ),
        (
            workflow("Removed", outputs=()),
            Asked(required_outputs=frozenset("a"), ended=EndedRecord(status="Finished")),
            ("0 of at least 1 outputs",),
        ),
    ],
)
def test_what_is_asked_decides(seen: Workflow, asked: Asked, problems: tuple[str, ...] | None) -> None:
    found = outcome(seen, asked)
    if problems is None:
        assert not found.is_success
        return
    assert found.is_success is not bool(problems)
    assert len(found.problems) == len(problems)
    assert all(expected in told for expected, told in zip(problems, found.problems, strict=True))


def test_some_failed_jobs_are_a_success_that_says_so() -> None:
    assert outcome(workflow(jobs="ce"), Asked()).is_partial
    assert not outcome(workflow(jobs="cc"), Asked()).is_partial


@pytest.mark.parametrize("late", ["r", ""], ids=["running", "none told"])
def test_jobs_that_are_told_late_are_asked_for_again_for_a_while(
    client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """A run is Finished before the platform tells how its jobs are; strict waits for that, but not for ever."""
    session = new_session(*COPY, files={"a.bin": b"abc"}, options=SessionOptions(strict=True))
    (ended,) = run(client, session)
    told = iter([late, late, "c"])
    monkeypatch.setattr(client, "workflow", lambda _: ended.model_copy(update={"jobs": workflow(jobs=next(told)).jobs}))
    looks = list(monitor(client, session, QUICK))
    assert [len(look[0].jobs) - len(look[0].open_jobs) for look in looks] == [0, 0, 1]
    assert judge(client, session, looks[-1])[0].is_success
    assert SessionFile(session).read().ledger.ended[ended.identifier].open_jobs == 0

    told = iter([late, "r", "r", "r", "r", "r", "r", "r"])
    monkeypatch.setattr("prefect_biomed.clients.vip.monitoring._JOBS_SECONDS", 0.1)
    last = list(monitor(client, session, QUICK))[-1]
    assert not judge(client, session, last)[0].is_success
    assert SessionFile(session).read().ledger.ended[ended.identifier].open_jobs == 1
    # Nor longer than anybody waits.
    told = iter([late] * 9)
    monkeypatch.setattr("prefect_biomed.clients.vip.monitoring._JOBS_SECONDS", 60.0)
    hurried = PollSettings(interval_seconds=0.05, deadline_seconds=0.1)
    assert not judge(client, session, list(monitor(client, session, hurried))[-1])[0].is_success
    told = iter([late])
    relaxed = session.model_copy(update={"options": SessionOptions()})
    assert len(list(monitor(client, relaxed, QUICK))) == 1


def test_outputs_that_are_not_here_whole_are_no_success(client: VipClient, new_session: NewSession) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"}, nb_runs=2)
    ended = run(client, session)
    assert [one.unfetched for one in judge(client, session, ended, fetched=True)] == [(w.identifier,) for w in ended]
    files = [path for paths in download(client, session).files.values() for path in paths]
    assert all(one.is_success for one in judge(client, session, ended, fetched=True))
    files[0].write_bytes(b"ab")
    files[1].unlink()
    assert [len(one.unfetched) for one in judge(client, session, ended, fetched=True)] == [1, 1]
    assert download(client, session).fetched == 2


# -- fetched before removed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backup", ["local", "vip", None])
def test_what_was_not_fetched_is_not_removed(
    vip: Sandbox, client: VipClient, new_session: NewSession, backup: str | None
) -> None:
    vip.vip.switches.delete_seconds = 0
    session = new_session(*COPY, files={"a.bin": b"abc"}, backup=backup)
    (ended,) = run(client, session)
    vip.vip.journal.clear()
    with pytest.raises(NotFetched, match=f"{ended.identifier}.*Nothing was removed") as caught:
        finish(client, session)
    assert caught.value.workflow_ids == (ended.identifier,)
    assert [entry for entry in effects(vip) if entry.method == "DELETE" and "session_data" not in entry.path] == []
    assert finish(client, session, keep_output=True).removed == (session.vip_input_dir,)
    for paths in download(client, session).files.values():
        for path in paths:
            path.unlink()
    with pytest.raises(NotFetched, match="are not here"):
        finish(client, session)
    assert download(client, session).fetched == 1
    assert session.vip_output_dir in finish(client, session).removed
    assert not client.exists(session.vip_dir)


def test_outputs_of_which_nothing_is_written_down_are_not_removed(
    client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    run(client, session)
    for backup in ("local", None):
        elsewhere = session.model_copy(update={"output_dir": tmp_path / "elsewhere", "backup": backup})
        with pytest.raises(NotFetched):
            finish(client, elsewhere)
    assert client.exists(session.run_dir(1))


def test_outputs_that_vanish_before_they_are_fetched_are_no_success(
    client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    (ended,) = run(client, session)
    results = client.results

    def without(workflow_id: str) -> list[PathEntry]:
        return [entry.model_copy(update={"exists": False}) for entry in results(workflow_id)]

    monkeypatch.setattr(client, "results", without)
    summary = download(client, session)
    assert (summary.gone, summary.fetched) == (ended.outputs, 0)
    assert SessionFile(session).read().ledger.downloaded == []
    (judged,) = judge(client, session, [ended], fetched=True)
    assert judged.unfetched == ended.outputs
    with pytest.raises(NotFetched):
        finish(client, session)

    # Only the platform was wrong.
    monkeypatch.setattr(client, "results", results)
    assert download(client, session).fetched == 1
    assert session.vip_output_dir in finish(client, session).removed


def test_outputs_that_the_platform_does_not_list_are_asked_for_by_name(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    vip.vip.switches.delete_seconds = 0
    monkeypatch.setattr(client, "results", lambda workflow_id: [])
    session = new_session(*COPY, files={"a.bin": b"abc"})
    (ended,) = run(client, session)
    assert ended.outputs
    summary = download(client, session)
    assert (summary.gone, summary.fetched) == ((), 1)

    next(iter(summary.files.values()))[0].unlink()
    client.delete(ended.outputs[0])
    for _ in range(2):
        assert download(client, session).gone == ended.outputs, "also when the record has it that it is gone"
        assert not judge(client, session, [ended], fetched=True)[0].is_success


def test_what_was_not_wanted_is_removed(client: VipClient, new_session: NewSession) -> None:
    session = new_session("AlwaysFails/1.0", {"file": "a.bin"}, files={"a.bin": b"abc"})
    parameter = client.pipeline("AlwaysFails/1.0").inputs[0].name
    session = session.model_copy(update={"input_settings": {parameter: "a.bin"}})
    (ended,) = run(client, session)
    assert ended.status == "ExecutionFailed"
    assert session.vip_output_dir in finish(client, session).removed
    (again,) = judge(client, session, [Workflow.model_validate({"identifier": ended.identifier, "status": "Removed"})])
    assert again.problems == ("ExecutionFailed",)


def test_launch_in_doubt_keeps_a_session_from_being_removed(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    send(client, session)
    vip.vip.faults.add(Fault(method="POST", path="/executions$", drop="before", calls=[1]))
    with pytest.raises(Exception, match="not known whether"):
        start(client, session, settle_seconds=0.2)
    with pytest.raises(StillRunning, match="session-r001-t0k3n was launched"):
        finish(client, session)
    assert client.exists(session.vip_input_dir)


@pytest.mark.parametrize("backup", ["local", "vip", None])
def test_files_are_listed_again_after_everything_was_removed(
    vip: Sandbox, client: VipClient, new_session: NewSession, backup: str | None
) -> None:
    vip.vip.switches.delete_seconds = 0
    session = new_session(*COPY, files={"a.bin": b"abc"}, backup=backup)
    run(client, session)
    first = download(client, session)
    finish(client, session, delete_records=True)
    assert not client.exists(session.vip_dir)
    ended = wait(client, session)
    assert download(client, session).files == first.files
    assert all(one.is_success for one in judge(client, session, ended, fetched=True))
    assert not client.exists(session.vip_dir)
    if backup == "local":
        next(iter(first.files.values()))[0].unlink()
        again = download(client, session)
        assert [len(again.gone), again.fetched] == [1, 0]
        assert not judge(client, session, ended, fetched=True)[0].is_success


# -- asked for by id ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backup", ["local", None])
def test_execution_that_is_asked_for_is_fetched_or_an_error(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path, backup: str | None
) -> None:
    vip.vip.switches.unnamed_seconds = 60.0
    session = new_session(*COPY, files={"a.bin": b"abc"}, backup=backup)
    send(client, session)
    (launched,) = start(client, session)
    until(lambda: client.workflow(launched.identifier).status.is_terminal)
    elsewhere = session.model_copy(update={"output_dir": tmp_path / "elsewhere"})
    assert download(client, elsewhere, workflow_ids=[launched.identifier]).fetched == 1
    with pytest.raises(PlatformError):
        download(client, elsewhere, workflow_ids=["workflow-nobody"])
    with pytest.raises(LedgerError, match="has no executions"):
        download(client, session.model_copy(update={"output_dir": tmp_path / "third"}))


def test_outputs_of_what_runs_are_not_taken_for_all(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    vip.vip.switches.job_seconds = 30.0
    session = new_session(*COPY, files={"a.bin": b"abc"})
    send(client, session)
    (launched,) = start(client, session)
    with pytest.raises(StillRunning, match=f"{launched.identifier} .* have not ended"):
        download(client, session, workflow_ids=[launched.identifier])
    assert download(client, session).files == {}


# -- intents -----------------------------------------------------------------------------------------------------------


def test_another_pipeline_under_the_same_name_is_an_intent_beside_the_old_one(
    client: VipClient, new_session: NewSession
) -> None:
    first = new_session(*COPY, files={"a.bin": b"abc"}, token="first1")
    run(client, first)
    second = first.model_copy(
        update={"pipeline_id": "EveryType/1.0", "input_settings": {"text": "x"}, "token": "second", "nb_runs": 2}
    )
    run(client, second)
    old, new = open_intents(first.output_dir)
    assert (old.pipeline_id, old.token, old.nb_runs) == ("CopyFile/1.0", "first1", 1)
    assert (new.pipeline_id, new.token, new.nb_runs) == ("EveryType/1.0", "second", 2)
    assert open_session(first.output_dir) == new
    record = SessionFile(first).read()
    assert [len(record.workflows_of(token)) for token in ("first1", "second")] == [1, 2]
    # What vip-client reads is the newest.
    assert (record.pipeline_id, record.input_settings) == ("EveryType/1.0", {"text": "x"})
    assert old.input_settings == {"file": f"{first.vip_input_dir}/a.bin"}


@pytest.mark.parametrize("backup", ["local", None])
def test_inputs_stay_for_a_twin_that_has_not_launched_yet(
    client: VipClient, new_session: NewSession, backup: str | None
) -> None:
    """Two flow runs of one session name at the same time: who ends first leaves the inputs to the other one."""
    first = new_session(*COPY, files={"a.bin": b"a", "b.bin": b"b"}, token="first1", backup=backup)
    twin = first.model_copy(update={"input_settings": {"file": "b.bin"}, "token": "second"})
    (ended,) = run(client, first)
    send(client, twin)
    download(client, first, workflow_ids=[ended.identifier])
    summary = finish(client, first)
    assert (summary.removed, summary.kept_for) == ((first.vip_output_dir,), ("session-r001-second",))
    (launched,) = start(client, twin)
    until(lambda: client.workflow(launched.identifier).status.is_terminal)
    assert download(client, twin, workflow_ids=[launched.identifier]).fetched == 1
    finish(client, twin)
    assert not client.exists(first.vip_dir)


def test_what_somebody_else_has_put_beside_the_outputs_is_not_removed(
    client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    run(client, session)
    download(client, session)
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    client.make_folder(f"{session.vip_output_dir}/2026-01-01_00-00-00")
    client.put_file(notes, f"{session.vip_output_dir}/2026-01-01_00-00-00/theirs.txt")
    client.put_file(notes, f"{session.vip_output_dir}/notes.txt")
    strange = tuple(f"{session.vip_output_dir}/{name}" for name in ("2026-01-01_00-00-00", "notes.txt"))
    summary = finish(client, session)
    assert (summary.removed, tuple(sorted(summary.left_to))) == ((session.run_dir(1),), strange)
    assert client.read_file(f"{session.vip_output_dir}/notes.txt", max_bytes=9) == b"mine"


def test_outputs_of_which_the_platform_has_not_told_are_not_removed(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """A run that is said to have no outputs, and has files in its folder."""
    vip.vip.switches.delete_seconds = 0
    session = new_session(*COPY, files={"a.bin": b"abc"})
    session = session.model_copy(update={"options": SessionOptions(accept_incomplete=True)})
    (ended,) = run(client, session)
    download(client, session)
    with SessionFile(session).edit() as record:
        record.workflows[ended.identifier].outputs = []
    with pytest.raises(NotFetched, match="r001-t0k3n"):
        finish(client, session)
    assert client.exists(session.run_dir(1))
    client.delete(f"{session.run_dir(1)}/copies/a.bin")
    assert session.vip_output_dir in finish(client, session).removed


def test_one_answer_that_nothing_is_there_removes_nothing_and_leaves_nothing(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """As a catalogue that cannot be reached may answer; the list of the folder tells otherwise."""
    vip.vip.switches.delete_seconds = 0
    owner = new_session(*COPY, name="owner", files={"a.bin": b"abc"})
    run(client, owner)
    download(client, owner)
    guest = share_inputs(client, new_session(*COPY, name="guest"), owner)
    nothing = Fault(query="action=exists", status=200, content_type="application/json", body='{"exists": false}')
    vip.vip.faults.add(nothing)
    summary = finish(client, owner)
    assert (summary.removed, summary.kept_for) == ((owner.vip_output_dir,), ("guest",))
    vip.vip.faults.clear()
    assert client.exists(owner.vip_input_dir)
    assert not client.exists(owner.vip_output_dir)
    start(client, guest)
    wait(client, guest)
    download(client, guest)
    vip.vip.faults.add(nothing)
    finish(client, guest)
    vip.vip.faults.clear()
    assert not client.exists(owner.vip_dir)
    assert not client.exists(guest.vip_dir)


def test_records_of_runs_that_were_not_fetched_are_not_deleted(client: VipClient, new_session: NewSession) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    (ended,) = run(client, session)
    with pytest.raises(NotFetched, match=ended.identifier):
        finish(client, session, keep_output=True, delete_records=True)
    assert client.workflow(ended.identifier).status == WorkflowStatus.FINISHED
    download(client, session)
    finish(client, session, keep_output=True, delete_records=True)
    with pytest.raises(NotFoundError):
        client.workflow(ended.identifier)


def test_inputs_stay_for_a_run_that_was_never_launched(client: VipClient, new_session: NewSession) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"}, nb_runs=2)
    send(client, session)
    launch(client, session, 1)
    wait(client, session)
    download(client, session)
    with pytest.raises(StillNeeded, match=f"{session.workflow_name(2)} was never launched"):
        finish(client, session)
    assert client.exists(session.run_dir(1))
    assert finish(client, session, keep_input=True).removed == (session.vip_output_dir,)
    assert launch(client, session, 2).name == session.workflow_name(2)
    wait(client, session)
    download(client, session)
    assert session.vip_dir in finish(client, session).removed


def test_inputs_go_before_all_runs_were_launched_when_that_is_asked_for(
    client: VipClient, new_session: NewSession
) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"}, nb_runs=2)
    send(client, session)
    with pytest.raises(StillNeeded):
        finish(client, session)
    assert session.vip_input_dir in finish(client, session, keep_input=False).removed
    assert finish(client, session).removed == ()


def test_the_records_of_a_twin_are_not_deleted_with_those_of_the_first(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    first = new_session(*COPY, files={"a.bin": b"a", "b.bin": b"b"}, token="first1")
    (ended,) = run(client, first)
    download(client, first, workflow_ids=[ended.identifier])
    twin = first.model_copy(update={"input_settings": {"file": "b.bin"}, "token": "second", "nb_runs": 2})
    send(client, twin)
    done = launch(client, twin, 1)
    wait(client, twin, workflow_ids=[done.identifier])
    assert finish(client, first, keep_input=True, keep_output=True, delete_records=True).left_to == ()
    with pytest.raises(NotFoundError):
        client.workflow(ended.identifier)
    assert client.workflow(done.identifier).status == WorkflowStatus.FINISHED, "nobody has fetched it"
    vip.vip.switches.job_seconds = 30
    going_on = launch(client, twin, 2)
    assert finish(client, first, keep_output=True, delete_records=True).left_to == (going_on.identifier,)
    assert client.workflow(done.identifier).status == WorkflowStatus.FINISHED


def test_who_ends_first_leaves_to_a_twin_what_is_not_its_own(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """The twin runs, has ended without being fetched, or is of another machine; it is never an error of the first."""
    vip.vip.switches.delete_seconds = 0
    first = new_session(*COPY, files={"a.bin": b"a", "b.bin": b"b"}, token="first1")
    twin = first.model_copy(update={"input_settings": {"file": "b.bin"}, "token": "second"})
    (ended,) = run(client, first)
    files = download(client, first, workflow_ids=[ended.identifier]).files
    vip.vip.switches.job_seconds = 30
    send(client, twin)
    (running,) = start(client, twin)
    summary = finish(client, first)
    assert (summary.removed, summary.left_to) == ((first.run_dir(1),), (running.identifier,))
    assert client.exists(f"{first.vip_input_dir}/b.bin")
    with pytest.raises(StillRunning, match=running.identifier):
        finish(client, twin)
    vip.vip.switches.job_seconds = 0
    wait(client, twin, workflow_ids=[running.identifier])
    assert finish(client, first).left_to == (running.identifier,), "nobody has fetched it"
    with pytest.raises(NotFetched, match=running.identifier):
        finish(client, twin)
    assert download(client, twin, workflow_ids=[running.identifier]).fetched == 1
    elsewhere = first.model_copy(update={"output_dir": tmp_path / "elsewhere", "token": "third1"})
    (third,) = run(client, elsewhere)
    assert finish(client, twin).left_to == (elsewhere.run_dir(1),), "nothing is written down of it here"
    assert download(client, elsewhere, workflow_ids=[third.identifier]).fetched == 1
    assert first.vip_output_dir in finish(client, elsewhere).removed
    assert not client.exists(first.vip_dir)
    assert download(client, first, workflow_ids=[ended.identifier]).files == files


def test_run_that_is_found_by_its_name_belongs_to_its_own_intent(client: VipClient, new_session: NewSession) -> None:
    first = new_session(*COPY, files={"a.bin": b"a"}, token="first1")
    twin = first.model_copy(update={"token": "second", "options": SessionOptions(get_status=("Killed",))})
    (ended,) = run(client, first)
    download(client, first, workflow_ids=[ended.identifier])
    lost = run(client, twin)[1]
    with SessionFile(first).edit() as record:
        record.ledger.launches[twin.workflow_name(1)].workflow_id = None
        del record.workflows[lost.identifier]
    assert first.vip_output_dir in finish(client, first).removed, "the twin does not want what has finished"
    record = SessionFile(first).read()
    assert record.ledger.launches[twin.workflow_name(1)].workflow_id == lost.identifier
    assert record.intent_of(lost.identifier) == twin.token


def test_inputs_stay_while_another_process_uploads(client: VipClient, new_session: NewSession) -> None:
    session = new_session(*COPY, files={"a.bin": b"a"})
    run(client, session)
    download(client, session)
    with SessionFile(session).exclusive("upload"):
        assert finish(client, session).kept_for == ("an upload of session",)
        assert client.exists(session.vip_input_dir)
    assert session.vip_input_dir in finish(client, session).removed


def test_a_token_does_not_stand_for_two_experiments(client: VipClient, new_session: NewSession) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    run(client, session)
    changed = session.model_copy(update={"pipeline_id": "EveryType/1.0", "input_settings": {"text": "x"}})
    for step in (lambda: launch(client, changed, 1), lambda: send(client, changed)):
        with pytest.raises(LedgerError, match=r"has launched CopyFile/1\.0 with other settings"):
            step()
    assert open_session(session.output_dir).pipeline_id == "CopyFile/1.0"


# -- inputs ------------------------------------------------------------------------------------------------------------


def half_uploaded(vip: Sandbox, client: VipClient, session: VipSession) -> None:
    vip.vip.faults.add(Fault(method="PUT", path="c.bin$", status=401, content_type="application/json",
                             body='{"errorCode":8002,"errorMessage":"bad key"}'))  # fmt: skip
    with pytest.raises(PlatformError):
        send(client, session)
    vip.vip.faults.clear()


def test_nothing_is_launched_on_a_part_of_the_inputs(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    files = {f"sub/{name}.bin": name.encode() for name in "abc"}
    session = new_session("FolderChecksums/1.0", {"folder": "sub"}, files=files)
    half_uploaded(vip, client, session)
    with pytest.raises(LedgerError, match=r"upload .* has not come to its end"):
        start(client, session)
    with pytest.raises(LedgerError, match=r"upload .* has not come to its end"):
        share_inputs(client, new_session(name="guest"), session)
    # Nor is an upload that was broken off trusted because its folder is there.
    assert send(client, session, update_files=False).sent == 1
    start(client, session)
    inputs = SessionFile(session).read().ledger.intents["t0k3n"].inputs
    assert inputs.is_complete
    assert len(inputs.digest or "") == 64


def test_inputs_are_not_replaced_while_runs_may_read_them(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """By a second flow run of the same session name, after a file has changed here."""
    vip.vip.switches.delete_seconds = 0
    vip.vip.switches.job_seconds = 30
    first = new_session(*COPY, files={"a.bin": b"old", "b.bin": b"b"}, token="first1")
    send(client, first)
    (running,) = start(client, first)
    assert first.input_dir is not None
    (first.input_dir / "a.bin").write_bytes(b"new")
    second = first.model_copy(update={"token": "second"})
    for send_or_foresee in (upload, foresee_upload):
        with pytest.raises(LedgerError, match=r"a\.bin of .* and session-r001-first1 may still read it"):
            send_or_foresee(client, second, preflight(client, second))
    assert client.read_file(f"{first.vip_input_dir}/a.bin", max_bytes=9) == b"old"
    kill(client, [running.identifier])
    assert send(client, second).replaced == 1


def test_inputs_are_not_replaced_while_runs_of_a_guest_may_read_them(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    vip.vip.switches.delete_seconds = 0
    vip.vip.switches.job_seconds = 30
    owner = new_session(name="owner", files={"a.bin": b"old"})
    send(client, owner)
    guest = share_inputs(client, new_session(*COPY, name="guest"), owner)
    (running,) = start(client, guest)
    assert owner.input_dir is not None
    (owner.input_dir / "a.bin").write_bytes(b"new")
    with pytest.raises(LedgerError, match=r"a\.bin of .* and guest-r001-t0k3n may still read it"):
        send(client, owner)
    kill(client, [running.identifier])
    with monkeypatch.context() as patch:
        patch.setattr(client, "is_cut_off", lambda listed: True)
        with pytest.raises(LedgerError, match=r"a\.bin of .* and guest may still read it"):
            send(client, owner)
    assert send(client, owner).replaced == 1


def test_nothing_is_launched_on_inputs_that_another_upload_has_replaced(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    vip.vip.switches.delete_seconds = 0
    first = new_session(*COPY, files={"a.bin": b"old"}, token="first1")
    send(client, first)
    assert first.input_dir is not None
    (first.input_dir / "a.bin").write_bytes(b"new")
    second = first.model_copy(update={"token": "second"})
    assert send(client, second).replaced == 1
    for launch_or_complete in (complete_inputs, start):
        with pytest.raises(LedgerError, match="were replaced by another upload under this name"):
            launch_or_complete(client, first)
    start(client, second)


def test_inputs_that_are_taken_as_they_are_are_told_and_looked_at(
    client: VipClient, new_session: NewSession, caplog: pytest.LogCaptureFixture
) -> None:
    """With `update_files` False: one that is not there stops everything, another size is told."""
    files = {"sub/a.bin": b"a", "sub/b.bin": b"b"}
    session = new_session("FolderChecksums/1.0", {"folder": "sub"}, files=files)
    send(client, session)
    (session.output_dir / "session_data.json").unlink()
    assert session.input_dir is not None
    (session.input_dir / "sub" / "a.bin").write_bytes(b"changed")
    again = session.model_copy(update={"token": "an0ther"})
    taken = send(client, again, update_files=False)
    assert (taken.sent, taken.skipped) == (0, 2)
    assert "2 inputs in /vip/" in str(taken.trusted)
    assert "1 have other sizes than here: sub/a.bin" in str(taken.trusted)
    assert SessionFile(again).read().ledger.intents["an0ther"].inputs.expected == {"sub/a.bin": 1, "sub/b.bin": 1}
    assert foresee_upload(client, session, preflight(client, session), update_files=False).trusted == taken.trusted
    start(client, again)

    (session.input_dir / "sub" / "c.bin").write_bytes(b"c")
    other = session.model_copy(update={"token": "0ther"})
    for send_or_foresee in (upload, upload, foresee_upload):
        with pytest.raises(PreflightFailed, match=r"1 of 3 inputs are not in .*, among them sub/c\.bin"):
            send_or_foresee(client, other, preflight(client, other), update_files=False)
    assert not caplog.records


def test_inputs_of_which_nothing_is_written_down_are_told_before_a_launch(
    client: VipClient, new_session: NewSession, caplog: pytest.LogCaptureFixture
) -> None:
    owner = new_session(name="owner", files={"sub/a.bin": b"a", "sub/b.bin": b"b"})
    upload(client, owner, preflight(client, owner, exclude=["*a.bin"]))
    (owner.output_dir / "session_data.json").unlink()
    guest = share_inputs(client, new_session("FolderChecksums/1.0", {"folder": "sub"}, name="guest"), owner)
    told = "Nothing is written down here of what the inputs in /vip/Home/API/owner/INPUTS are"
    assert told in str(send(client, guest, update_files=False).trusted)
    assert not caplog.records
    start(client, guest)
    assert [told in record.getMessage() for record in caplog.records] == [True]
    assert told in str(complete_inputs(client, guest.model_copy(update={"nb_runs": 2})).trusted)


def test_a_second_upload_that_has_changed_nothing_yet_stops_no_launch(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    session = new_session("FolderChecksums/1.0", {"folder": "sub"}, files={"sub/a.bin": b"a"})
    send(client, session)
    proven = SessionFile(session).read().ledger.intents["t0k3n"].inputs
    plan = preflight(client, session)  # of a twin, or of a repetition, that goes no further than its first look
    vip.vip.faults.add(Fault(method="GET", path="/INPUTS", status=401, times=9))
    with pytest.raises(PlatformError):
        upload(client, session, plan)
    vip.vip.faults.clear()
    assert SessionFile(session).read().ledger.intents["t0k3n"].inputs == proven
    # One that has something to change is waited for.
    assert session.input_dir is not None
    (session.input_dir / "sub" / "c.bin").write_bytes(b"c")
    half_uploaded(vip, client, session)
    with pytest.raises(LedgerError, match=r"upload .* has not come to its end"):
        start(client, session)
    send(client, session)
    start(client, session)


@pytest.mark.parametrize("value", ["a.bin", "sub", ".", "/vip/Home/API/session/INPUTS/a.bin"])
def test_inputs_that_vanished_after_the_upload_are_told_as_that(
    vip: Sandbox, client: VipClient, new_session: NewSession, value: str
) -> None:
    vip.vip.switches.delete_seconds = 0
    session = new_session("FolderChecksums/1.0", {"folder": value}, files={"a.bin": b"a", "sub/b.bin": b"b"})
    send(client, session)
    client.delete(session.vip_input_dir)
    until(lambda: not client.exists(session.vip_input_dir))
    with pytest.raises(PreflightFailed) as caught:
        start(client, session)
    (problem,) = caught.value.problems
    assert f"{value!r} is not on the platform, in {session.vip_input_dir}" in problem
    assert "vip_session with session_name='session' sends what is missing" in problem
    assert send(client, session.model_copy(update={"token": "again1"})).sent == 2


def test_inputs_are_completed_from_the_record_alone(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    files = {f"{name}.bin": name.encode() for name in "abc"}
    session = new_session(*COPY, files=files)
    half_uploaded(vip, client, session)
    there = open_session(session.output_dir).model_copy(update={"input_dir": tmp_path / "not-here"})
    with pytest.raises(LedgerError, match=r"missing, among them c\.bin.*Run this where that folder is"):
        complete_inputs(client, there)
    assert complete_inputs(client, open_session(session.output_dir)).sent == 1
    assert complete_inputs(client, there).sent == 0


def test_inputs_that_had_arrived_are_found_complete_without_their_folder(
    client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc", "sub/b.bin": b"b"})
    plan = preflight(client, session)
    send(client, session)
    with SessionFile(session).edit() as record:
        inputs = record.ledger.intents["t0k3n"].inputs
        inputs.is_complete, inputs.expected = False, {item.name: item.size for item in plan.files}
    there = session.model_copy(update={"input_dir": tmp_path / "not-here"})
    assert complete_inputs(client, there).skipped == 2
    assert launch(client, there, 1)


@pytest.mark.parametrize("backup", ["local", "vip"])
def test_inputs_that_vanish_before_a_launch_are_sent_again_or_named(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path, backup: Any
) -> None:
    vip.vip.switches.delete_seconds = 0
    files = {f"sub/{name}.bin": name.encode() for name in "abc"}
    session = new_session("FolderChecksums/1.0", {"folder": "sub"}, files=files, backup=backup)
    upload(client, session, preflight(client, session, exclude=["*a.bin"]))
    assert session.input_dir is not None
    (session.input_dir / "sub" / "new.bin").write_bytes(b"not there when it was begun")
    client.delete(f"{session.vip_input_dir}/sub")
    there = session.model_copy(update={"input_dir": tmp_path / "not-here"})
    with pytest.raises(LedgerError, match=r"2 inputs .* among them sub/b\.bin, sub/c\.bin.*Run this where that folder"):
        complete_inputs(client, there)
    lost = session.input_dir / "sub" / "b.bin"
    lost.write_bytes(b"B")
    with pytest.raises(LedgerError, match=r"does not hold any more what was sent as sub/b\.bin\. Put it back"):
        complete_inputs(client, session)
    lost.write_bytes(b"b")
    assert foresee_inputs(client, session).sent == 2
    assert complete_inputs(client, session).sent == 2
    assert {entry.name for entry in client.list_folder(f"{session.vip_input_dir}/sub")} == {"b.bin", "c.bin"}
    # Whoever launches later than that looks by himself.
    client.delete(f"{session.vip_input_dir}/sub/c.bin")
    with SessionFile(session, client).edit() as record:
        proven = record.ledger.intents["t0k3n"].inputs.proven
        assert proven is not None
        record.ledger.intents["t0k3n"].inputs.proven = proven - timedelta(hours=1)
    start(client, session)
    assert client.exists(f"{session.vip_input_dir}/sub/c.bin")
    # And once all is launched the inputs are not needed.
    client.delete(session.vip_input_dir)
    assert complete_inputs(client, session).sent == 0


def test_borrowed_inputs_that_vanish_are_sent_again_as_their_owner_has_sent_them(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    vip.vip.switches.delete_seconds = 0
    owner = new_session(name="owner", files={"sub/a.bin": b"a", "sub/b.bin": b"b"})
    upload(client, owner, preflight(client, owner, exclude=["*a.bin"]))
    guest = new_session("FolderChecksums/1.0", {"folder": "sub"}, name="guest")
    with pytest.raises(PreflightFailed):
        share_inputs(client, guest.model_copy(update={"input_settings": {"folder": "sub/a.bin"}}), owner)
    assert not client.exists("/vip/Home/API/owner/HOLDERS")
    guest = share_inputs(client, guest, owner)
    send(client, guest, update_files=False)
    client.delete(f"{owner.vip_input_dir}/sub/b.bin")
    assert complete_inputs(client, open_session(guest.output_dir)).sent == 1
    assert [entry.name for entry in client.list_folder(f"{owner.vip_input_dir}/sub")] == ["b.bin"]


def test_watch_that_outlives_the_records_of_the_platform(client: VipClient, new_session: NewSession) -> None:
    session = new_session(*COPY, files={"a.bin": b"abc"})
    (ended,) = run(client, session)
    client.delete_workflow(ended.identifier)
    (last,) = list(monitor(client, session, QUICK))[-1]
    assert last.status == "Removed"
    assert judge(client, session, [last])[0].status == "Finished"


def test_preflight_says_what_cannot_be_promised_without_a_session_file(
    client: VipClient, new_session: NewSession
) -> None:
    told = {
        backup: preflight(client, new_session(*COPY, files={"a.bin": b"abc"}, backup=backup)).without_record
        for backup in ("local", "vip", None)
    }
    assert told["local"] is None
    assert "goes with the outputs" in str(told["vip"])
    assert "can resume the session" in str(told[None])
