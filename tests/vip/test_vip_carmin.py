"""CARMIN-server, which speaks the same protocol and behaves differently."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from harness.vip_steps import EXECUTIONS, QUICK, effects, files_in, refused, run, send, start, until, wait
from harness.wire import exchange
from prefect_biomed.clients.errors import (
    AuthenticationError,
    LaunchInDoubt,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    PreflightFailed,
    TransferFailed,
    UnexpectedResponse,
)
from prefect_biomed.clients.vip import (
    SessionFile,
    VipClient,
    VipSession,
    Workflow,
    WorkflowStatus,
    complete_inputs,
    describe,
    download,
    failures,
    find_all,
    finish,
    kill,
    launch,
    monitor,
    open_session,
    preflight,
)
from prefect_biomed.clients.vip.carmin import list_pages
from prefect_biomed.clients.vip.errors import ListUnavailable
from prefect_biomed.clients.vip.models import PathEntry
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

EVERY_TYPE = "boutiques_EveryType_1.0.json"
GREY_MATTER = "boutiques_GreyMatter_1.0.json"


@pytest.fixture
def vip() -> Iterator[Sandbox]:
    """CARMIN-server on loopback."""
    with Sandbox("vip", vip={"profile": "carmin"}) as sandbox:
        yield sandbox


def test_profile_is_found_out(client: VipClient, connect: Connect) -> None:
    """What the platform tells of itself decides; the address has no `/rest` here."""
    assert client.profile.name == "carmin"
    client.check_key()
    with pytest.raises(AuthenticationError):
        connect("not-a-key").check_key()


# -- files -------------------------------------------------------------------------------------------------------------


def test_bytes_that_a_raw_upload_damages_are_sent_encoded(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """The server stores text and drops what is none; we notice by the size and send it in base64: bytes are exact."""
    contents = {
        "all.bin": bytes(range(256)),
        "random.bin": os.urandom(300_000),
        "text.txt": "näïve text\n".encode(),
        "a b é#?.txt": b"plain",
        "empty.txt": b"",
        "sub/deep/x": b"x",
    }
    session = new_session(files=contents)
    summary = send(client, session)
    assert summary.sent == 6
    for name, content in contents.items():
        assert client.read_file(f"{session.vip_input_dir}/{name}", max_bytes=10**6) == content
        assert not client.entry(f"{session.vip_input_dir}/{name}").is_directory
    assert len(vip.vip.journal.entries("PUT", "all.bin")) == 2
    assert len(vip.vip.journal.entries("PUT", "text.txt")) == 1
    assert send(client, session).sent == 0


def test_hidden_files_that_no_list_shows_are_sent_once(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    session = new_session(files={".hidden": b"abc", ".folder/in": b"de", "sub/.too": b"f", "seen": b"g"})
    assert send(client, session).sent == 4
    vip.vip.journal.clear()
    assert send(client, session).sent == 0
    (session.input_dir or Path()).joinpath(".hidden").write_bytes(b"abcd")
    assert (send(client, session).sent, len(vip.vip.journal.entries("DELETE"))) == (1, 1)
    assert client.read_file(f"{session.vip_input_dir}/.hidden", max_bytes=10) == b"abcd"


def test_upload_that_stays_damaged_is_an_error(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the digest differs even then, nobody is told that the file is there."""
    session = new_session(files={"all.bin": bytes(range(256))})
    monkeypatch.setattr(VipClient, "put_file_encoded", VipClient.put_file)
    with pytest.raises(
        TransferFailed, match=r"has MD5 [0-9a-f]{32} on the platform, the local file e2c865db4162bed963bfaa9ef6ac18f0"
    ):
        send(client, session)


def test_missing_path_is_not_a_bad_key(client: VipClient) -> None:
    """401 means many things here; the code tells which."""
    missing = "/alice/nothing"
    with client._http.open("GET", f"/path{missing}", params={"action": "properties"}) as response:
        assert response.status_code == 401
    assert not client.exists(missing)
    assert client.entry(missing) == PathEntry(path=missing, exists=False)
    for look in (lambda: client.list_folder(missing), lambda: client.read_file(missing, max_bytes=1)):
        with refused(56, 401, kind=NotFoundError):
            look()
    with refused(50, 401, kind=PermissionDeniedError):
        client.list_folder("/bob")


# -- executions --------------------------------------------------------------------------------------------------------


def test_execution_is_played_watched_and_its_results_fetched(
    vip: Sandbox, client: VipClient, new_session: NewSession, input_dir: Path
) -> None:
    """It is created Initializing and played once; playing again is no harm; the rest goes as on VIP."""
    before = datetime.now(UTC)
    session = new_session(GREY_MATTER, {"t1": "anatomical.nii", "threshold": 0.4}, input_dir=input_dir, nb_runs=2)
    send(client, session)
    workflows = start(client, session)
    assert [workflow.status for workflow in workflows] == [WorkflowStatus.INITIALIZING] * 2
    plays = vip.vip.journal.entries("PUT", "/play$")
    assert [entry.status for entry in plays] == [204, 204]
    client.play(workflows[0])
    assert vip.vip.journal.entries("PUT", "/play$")[-1].status == 400  # 135 counts as started

    ended = wait(client, session)
    assert [workflow.status for workflow in ended] == ["Finished"] * 2
    for workflow in ended:
        assert workflow.start_date is not None
        assert workflow.end_date is not None
        assert before <= workflow.start_date <= workflow.end_date <= datetime.now(UTC)
        assert workflow.outputs == (f"/alice/executions/{workflow.identifier}/anatomical_greymatter.tar.gz",)
    assert failures(client, session, ended) == ([], [])
    summary = download(client, session)
    assert {path.rpartition("/")[2] for path in files_in(session.output_dir)} == {
        "measures.csv",
        "mask.nii.gz",
        "settings.json",
    }
    assert len({path.parent for paths in summary.files.values() for path in paths}) == 2
    assert start(client, session)[0].identifier == workflows[0].identifier
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 2

    finish(client, open_session(session.output_dir))
    assert client.workflows() == []
    assert not client.exists(session.vip_dir)
    assert finish(client, session).removed == ()


def test_execution_that_was_created_and_not_played_is_adopted_and_played(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """The answer to the launch is lost, so nobody has played it: it is found by its name and played."""
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, drop="after", calls=[1]))
    session = new_session(EVERY_TYPE, {"text": "x", "flag": "true", "count": "7", "words": "a", "comment": 5})
    start(client, session)
    assert len(client.workflows()) == 1
    (workflow,) = wait(client, session)
    assert workflow.status == "Finished"
    download(client, session)
    (content,) = files_in(session.output_dir).values()
    assert b'"flag": "true"' in content
    assert b'"comment": "5"' in content


def test_many_executions_are_listed_page_by_page(client: VipClient, new_session: NewSession) -> None:
    """The server gives ten unless asked for more; all are found, newest first."""
    session = new_session(EVERY_TYPE, {"text": "x"})
    for number in range(53):
        name = f"n{number}"
        client.play(client.launch(name=name, pipeline_id=EVERY_TYPE, input_values={"text": "x"}, results_location=None))
    assert [workflow.name for workflow in client.workflows()] == [f"n{number}" for number in range(52, -1, -1)]
    assert [workflow.name for workflow in client.workflows(newest=3)] == ["n52", "n51", "n50"]
    start(client, session)
    until(lambda: all(workflow.status == "Finished" for workflow in client.workflows()))


def listing(number: int, most: int | None, *, knows_offset: bool = True) -> Callable[..., list[Workflow]]:
    """A server that gives so many executions at a time, whatever it is asked for."""
    there = [Workflow(identifier=f"{index}") for index in range(number)]

    def page(*, offset: int, limit: int) -> list[Workflow]:
        start = offset if knows_offset else 0
        return there[start : start + min(limit, most or limit)]

    return page


@pytest.mark.parametrize("most", [1, 10, None])
def test_short_page_is_not_the_end_of_the_list(most: int | None) -> None:
    def count() -> int:
        raise AssertionError("nobody needs it")

    assert len(list_pages(listing(53, most), count, None)) == 53
    assert len(list_pages(listing(53, most), count, 12)) == 12
    assert list_pages(listing(0, most), count, None) == []


def test_server_that_knows_no_offset_is_believed_only_when_its_count_agrees() -> None:
    assert len(list_pages(listing(7, None, knows_offset=False), lambda: 7, None)) == 7
    with pytest.raises(UnexpectedResponse, match="again and again"):
        list_pages(listing(53, 10, knows_offset=False), lambda: 53, None)


def test_running_execution_is_killed(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Kill works, and is not sent to what has ended."""
    vip.vip.switches.job_seconds = 30
    session = new_session(EVERY_TYPE, {"text": "x"})
    (workflow,) = start(client, session)
    assert [killed.status for killed in kill(client, [workflow.identifier])] == ["Killed"]
    vip.vip.journal.clear()
    kill(client, [workflow.identifier])
    assert effects(vip) == []


def test_finished_without_its_output_is_a_failure(client: VipClient, new_session: NewSession) -> None:
    """The tool exits with 3 and the status is Finished; that an output lacks which there always is tells."""
    session = new_session("boutiques_AlwaysFails_1.0.json", {"reason": "no luck", "exit_status": 3})
    start(client, session)
    (workflow,) = wait(client, session)
    assert workflow.status == "Finished"
    texts, failed = failures(client, session, [workflow])
    assert failed == [workflow]
    assert "Finished, 0 of at least 1 outputs" in texts[0]
    assert "exit code 3" in texts[0]
    assert "no luck" in texts[0]


def test_launch_that_leaves_an_orphan_is_not_repeated(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """A list of files answers 500 and leaves an execution behind: refused before, and never sent twice."""
    session = new_session(EVERY_TYPE, {"text": "x", "files": ["a.txt"]}, files={"a.txt": b"1"})
    with pytest.raises(PreflightFailed, match="'files' lists files, which only VIP understands"):
        send(client, session)
    assert effects(vip) == []

    # A server that breaks for another reason after it has stored the execution.
    vip.vip.faults.add(
        Fault(
            method="POST",
            path=EXECUTIONS,
            after_effect=True,
            status=500,
            body='{"errorCode": 1, "errorMessage": "no"}',
            content_type="application/json",
        )
    )
    session = new_session(EVERY_TYPE, {"text": "x"}, name="broken")
    with pytest.raises(PlatformError, match=r"left execution .* behind"):
        start(client, session)
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 1
    assert [workflow.status for workflow in client.workflows()] == ["Initializing"]
    assert vip.vip.journal.entries("PUT", "play") == []


def test_invalid_invocation_is_refused_once(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """What the server would refuse after storing an execution, the pre-flight refuses; if not, one POST is made."""
    for settings in ({"text": ["x", "y"]}, {"txet": "x"}, {}, {"text": "x", "count": 1.5}, {"text": "x", "flag": "on"}):
        with pytest.raises(PreflightFailed):
            preflight(client, new_session(EVERY_TYPE, settings))
    assert effects(vip) == []
    with pytest.raises(PlatformError):
        client.launch(name="x", pipeline_id=EVERY_TYPE, input_values={"text": 5}, results_location=None)
    assert [workflow.status for workflow in client.workflows()] == ["InitializationFailed"]
    assert WorkflowStatus.INITIALIZATION_FAILED.is_terminal


def test_stock_server_that_cannot_describe_what_has_ended(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """Every GET of a completed execution is a 500 for ever: results tell that it has ended; no endless loop."""
    vip.vip.switches.carmin_stock = True
    vip.vip.switches.job_seconds = 0.3
    session = new_session(EVERY_TYPE, {"text": "x"})
    (launched,) = start(client, session)
    assert client.workflow(launched.identifier).status == "Running"
    began = time.monotonic()
    seen = [look[0].status for look in monitor(client, session, QUICK)]
    assert seen[-1] == "Finished"
    assert time.monotonic() - began < 10
    with client._http.open("GET", f"/executions/{launched.identifier}") as response:
        assert response.status_code == 500
    assert failures(client, session, [client.workflow(launched.identifier)]) == ([], [])
    assert download(client, session).fetched == 1

    # The list is broken as well, and everything goes on without it.
    with pytest.raises(ListUnavailable, match=r"cannot list its executions.*Delete the ended ones"):
        client.workflows()
    following = new_session(EVERY_TYPE, {"text": "y"}, name="next", nb_runs=2)
    started = start(client, following)
    assert len({launched.identifier, *(workflow.identifier for workflow in started)}) == 3
    assert [workflow.identifier for workflow in start(client, following)] == [one.identifier for one in started]
    assert find_all(client, following).workflows == ()
    finish(client, session)
    assert SessionFile(session).read().workflow_ids("Removed") == [launched.identifier]
    assert finish(client, session).removed == ()
    assert [workflow.status for workflow in wait(client, open_session(following.output_dir))] == ["Finished"] * 2
    assert download(client, following).fetched == 2


def test_twin_that_runs_keeps_its_inputs_and_its_record(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    first = new_session("boutiques_CopyFile_1.0.json", {"file": "a.bin"}, files={"a.bin": b"a"}, token="first1")
    twin = first.model_copy(update={"token": "second"})
    (ended,) = run(client, first)
    download(client, first, workflow_ids=[ended.identifier])
    vip.vip.switches.job_seconds = 30
    (running,) = start(client, twin)
    summary = finish(client, first)
    assert (summary.removed, summary.left_to) == ((), (running.identifier,))
    with pytest.raises(NotFoundError):
        client.workflow(ended.identifier)
    vip.vip.switches.job_seconds = 0
    wait(client, twin, workflow_ids=[running.identifier])
    assert download(client, twin, workflow_ids=[running.identifier]).fetched == 1
    assert finish(client, twin).left_to == ()
    assert not client.exists(first.vip_dir)
    with pytest.raises(NotFoundError):
        client.workflow(running.identifier)


def test_stock_server_loses_the_answer_to_a_launch(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Without the list nobody finds what was created; it was never played, so the next attempt makes no second run."""
    vip.vip.switches.carmin_stock = True
    run(client, new_session(EVERY_TYPE, {"text": "x"}, name="first"))
    vip.vip.faults.add(Fault(method="POST", path=EXECUTIONS, drop="after", calls=[1]))
    session = new_session(EVERY_TYPE, {"text": "y"})
    vip.vip.journal.clear()
    with pytest.raises(LaunchInDoubt):
        launch(client, session, 1, settle_seconds=0.2)
    workflow = launch(client, session, 1, settle_seconds=0.2)
    assert len(vip.vip.journal.entries("POST", EXECUTIONS)) == 2
    assert [entry.status for entry in vip.vip.journal.entries("PUT", "/play$")] == [204]
    assert [ended.identifier for ended in wait(client, session)] == [workflow.identifier]


def test_stock_server_cannot_kill_what_runs(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Its answer to a kill is always 500: an error while the execution runs, and none once it has ended."""
    vip.vip.switches.carmin_stock = True
    vip.vip.switches.job_seconds = 30
    session = new_session(EVERY_TYPE, {"text": "x"})
    (workflow,) = start(client, session)
    with pytest.raises(PlatformError, match="HTTP 500"):
        kill(client, [workflow.identifier])
    vip.vip.switches.job_seconds = 0
    wait(client, session)
    assert [ended.status for ended in kill(client, [workflow.identifier])] == ["Finished"]


def test_execution_that_nobody_has_played_needs_no_kill(vip: Sandbox, client: VipClient) -> None:
    created = client.launch(name="x", pipeline_id=EVERY_TYPE, input_values={"text": "x"}, results_location=None)
    began = time.monotonic()
    assert [workflow.status for workflow in kill(client, [created.identifier])] == ["Initializing"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("home", ["/vip/Home/API", "/bob", "/nobody/x"])
def test_home_that_the_account_may_not_use_is_found_before_anything_is_sent(
    vip: Sandbox, client: VipClient, new_session: NewSession, home: str
) -> None:
    session = new_session(EVERY_TYPE, {"text": "x"}, files={"a.txt": b"1"}).model_copy(
        update={"vip_input_dir": f"{home}/s/INPUTS", "vip_output_dir": f"{home}/s/OUTPUTS"}
    )
    with pytest.raises(PreflightFailed) as caught:
        preflight(client, session)
    (problem,) = caught.value.problems
    assert problem.startswith(f"The account may not use vip_home {home}: ")
    assert effects(vip) == []


def test_execution_that_can_neither_be_described_nor_listed_is_told(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """When the results cannot be listed either, it ends with a clear message."""
    vip.vip.switches.carmin_stock = True
    session = new_session(EVERY_TYPE, {"text": "x"})
    (workflow,) = start(client, session)
    vip.vip.faults.add(
        Fault(
            path="/results$", status=500, body='{"errorCode": 1, "errorMessage": "no"}', content_type="application/json"
        )
    )
    until(lambda: exchange(client._http, "GET", f"/executions/{workflow.identifier}")[0].status_code == 500)
    with pytest.raises(UnexpectedResponse, match=r"can neither be described .* nor its results be listed"):
        wait(client, session)


def test_inputs_are_named_by_their_keys(client: VipClient) -> None:
    """The server keys inputs by id and gives other names for people; ours are the keys."""
    text = describe(client.pipeline(GREY_MATTER))
    assert "`t1`" in text
    assert "'threshold': " in text


def test_inputs_that_vanish_before_a_launch_are_sent_again(client: VipClient, new_session: NewSession) -> None:
    """A file is deleted, and one cut short; the hidden one, which no list shows, is there."""
    files = {"a.bin": bytes(range(256)), "b.bin": b"abc", ".hidden": b"h"}
    session = new_session("boutiques_CopyFile_1.0.json", {"file": "b.bin"}, files=files)
    send(client, session)
    client.delete(f"{session.vip_input_dir}/a.bin")
    put_short = session.output_dir / "short"
    put_short.write_bytes(b"a")
    client.put_file(put_short, f"{session.vip_input_dir}/b.bin")
    assert complete_inputs(client, open_session(session.output_dir)).sent == 2
    assert client.read_file(f"{session.vip_input_dir}/a.bin", max_bytes=999) == bytes(range(256))
    assert client.entry(f"{session.vip_input_dir}/b.bin").size == 3


def test_name_with_a_line_break_is_refused(client: VipClient, new_session: NewSession) -> None:
    """The server finds no such page, and every try of the upload would fail."""
    with pytest.raises(PreflightFailed, match=r"a\\nb' has a control character in its name"):
        send(client, new_session(files={"a\nb": b"x"}))


def test_all_steps_of_a_plain_session(client: VipClient, new_session: NewSession) -> None:
    """Files, a folder of results, and nothing left."""
    session = new_session("boutiques_CopyFile_1.0.json", {"file": "a b.bin"}, files={"a b.bin": bytes(range(256))})
    (workflow,) = run(client, session)
    assert workflow.status == "Finished"
    download(client, session)
    assert list(files_in(session.output_dir).values()) == [bytes(range(256))]
