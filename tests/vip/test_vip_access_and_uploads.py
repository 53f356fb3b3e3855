"""Keys, pipelines, paths and uploads."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.vip_steps import effects, methods, refused, run, send, start, until, wait
from harness.wire import exchange
from prefect_biomed.clients.errors import (
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    PreflightFailed,
    StorageFull,
    TransferFailed,
    is_transient,
)
from prefect_biomed.clients.vip import VipClient, VipSession, download, finish, launch, preflight, upload
from prefect_biomed.clients.vip.remote_files import delete_and_wait
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

HTML = "<!doctype html><html><body><h1>Bad things</h1></body></html>"


# -- keys --------------------------------------------------------------------------------------------------------------


def test_wrong_key_is_told_once_and_state_is_kept(
    vip: Sandbox, connect: Connect, client: VipClient, new_session: NewSession
) -> None:
    """A wrong key is refused on every URL; each step of a session says so after one request and loses nothing."""
    wrong = connect("not-a-key")
    for method, path in (("GET", "/platform"), ("PUT", "/platform"), ("GET", "/pipelines"), ("POST", "/executions")):
        with wrong._http.open(method, path) as response:
            assert response.status_code == 401
            assert "WWW-Authenticate" in response.headers
    with refused(8002, 401, kind=AuthenticationError, match="Put a valid API key"):
        wrong.check_key()

    session = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, files={"a.txt": b"1"})
    send(client, session)
    start(client, session)
    before = (session.output_dir / "session_data.json").read_bytes()
    again = session.model_copy(update={"nb_runs": 2})
    vip.vip.switches.key_generation = 1
    steps = (
        lambda: send(client, session),
        lambda: start(client, again),
        lambda: wait(client, session),
        lambda: download(client, session, get_status=["Running", "Finished"]),
        lambda: finish(client, session),
    )
    for step in steps:
        vip.vip.journal.clear()
        with pytest.raises(AuthenticationError) as caught:
            step()
        assert not is_transient(caught.value)
        assert [entry.status for entry in vip.vip.journal] == [401]
    assert (session.output_dir / "session_data.json").read_bytes() == before

    (workflow,) = wait(connect(), session)
    assert workflow.status == "Finished"


def test_no_key_sees_only_what_is_public(client: VipClient) -> None:
    """Without a key only the platform and the public pipelines are shown."""
    http = client._http
    response, body = exchange(http, "GET", "/pipelines", authenticate=False)
    assert (response.status_code, body["errorCode"]) == (401, 8003)
    assert exchange(http, "GET", "/platform", authenticate=False)[0].status_code == 200
    response, body = exchange(http, "GET", "/pipelines?public", authenticate=False)
    assert response.status_code == 200
    assert "GreyMatter/1.0" in {pipeline["identifier"] for pipeline in body}


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_pipelines_follow_the_groups_of_the_user(client: VipClient, connect: Connect) -> None:
    """The list has visible versions of one's groups, without parameters; anything else is refused with its reason."""
    mine = {pipeline.identifier: pipeline for pipeline in client.pipelines()}
    assert {"GreyMatter/1.0", "GreyMatter/1.1", "EveryType/1.0"} <= set(mine)
    assert not {"CardioFlow/2.0", "GreyMatter/0.9"} & set(mine)
    assert all(pipeline.parameters == () for pipeline in mine.values())
    assert "CardioFlow/2.0" in {pipeline.identifier for pipeline in connect("bob").pipelines()}

    with refused(8008, kind=PermissionDeniedError, match="Join the group"):
        client.pipeline("CardioFlow/2.0")
    for hidden_or_absent in ("GreyMatter/0.9", "NoSuch/1.0"):
        with refused(8007, kind=NotFoundError):
            client.pipeline(hidden_or_absent)
    with refused(8005):
        client.pipeline("x")


def test_pipeline_with_an_awkward_name_has_three_addresses(client: VipClient) -> None:
    """Spaces and parentheses are quoted; all three addresses give one object, without `results-directory`."""
    http = client._http
    answers = [
        exchange(http, "GET", "/pipelines/Free%20Surf%20%28x%29/0.3.7")[1],
        exchange(http, "GET", "/pipelines/Free%20Surf%20%28x%29%2F0.3.7")[1],
        exchange(http, "GET", "/pipelines", params={"pipelineId": "Free Surf (x)/0.3.7"})[1],
    ]
    assert answers[0] == answers[1] == answers[2]
    pipeline = client.pipeline("Free Surf (x)/0.3.7")
    assert (pipeline.name, pipeline.version) == ("Free Surf (x)", "0.3.7")
    assert [parameter.name for parameter in pipeline.inputs] == ["nifti", "directives", "license"]


# -- paths -------------------------------------------------------------------------------------------------------------


def test_upload_needs_a_parent_and_an_empty_body_makes_a_folder(
    client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """A file without a parent folder is refused; an empty file would become a folder, so it is never sent."""
    local = tmp_path / "local"
    local.write_bytes(b"x")
    with refused(8000):
        client.put_file(local, "/vip/Home/none/x.txt")
    assert not client.exists("/vip/Home/none")

    local.write_bytes(b"")
    client.put_file(local, "/vip/Home/empty.txt")
    assert client.entry("/vip/Home/empty.txt").is_directory
    with pytest.raises(PreflightFailed, match=r"'b\.txt' is empty; VIP cannot store empty files"):
        preflight(client, new_session(files={"a.txt": b"1", "b.txt": b""}))


def test_names_are_mapped_as_the_server_does_and_collisions_refused_first(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """The server renames without telling; we apply the same mapping first and refuse two files of one name."""
    response, body = exchange(client._http, "PUT", "/path/vip/Home/a%20b%20%C3%A9.txt", body=b"x")
    assert (response.status_code, body) == (201, None)
    assert [entry.name for entry in client.list_folder("/vip/Home")] == ["a_b_e.txt"]

    session = new_session(
        "EveryType/1.0",
        {"text": "x", "file": "my dir/a b é.txt"},
        name="mapped",
        files={"my dir/a b é.txt": b"1", "my dir/plain.txt": b"2"},
    )
    (workflow,) = run(client, session)
    assert workflow.status == "Finished"
    assert {entry.name for entry in client.list_folder(f"{session.vip_input_dir}/my_dir")} == {"a_b_e.txt", "plain.txt"}

    vip.vip.journal.clear()
    colliding = new_session(
        name="colliding", files={"a b.txt": b"1", "a_b.txt": b"2", "d é/x": b"3", "d_e/x": b"4", "日本": b"5"}
    )
    with pytest.raises(PreflightFailed) as caught:
        send(client, colliding)
    assert sorted(caught.value.problems) == [
        "'a b.txt' and 'a_b.txt' would both be stored as 'a_b.txt'. Rename one.",
        "'d é/x' and 'd_e/x' would both be stored as 'd_e/x'. Rename one.",
        "'日本' has no character the platform can store. Rename it.",
    ]
    assert effects(vip) == []


def test_replacing_is_deleting_waiting_and_sending(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """The server refuses to overwrite and keeps the old content; so a changed file is deleted, awaited, and sent."""
    vip.vip.switches.storage_retries = 0  # the storage would try the refused file again behind our back
    session = new_session(files={"a.txt": b"old"})
    send(client, session)
    path = f"{session.vip_input_dir}/a.txt"
    local = tmp_path / "new"
    local.write_bytes(b"brand new")
    with refused(8000):
        client.put_file(local, path)
    assert client.read_file(path, max_bytes=100) == b"old"
    vip.vip.switches.delete_seconds = 0.3
    new_session(files={"a.txt": b"brand new"})
    vip.vip.journal.clear()
    assert send(client, session).replaced == 1
    assert client.read_file(path, max_bytes=100) == b"brand new"
    changes = [entry for entry in vip.vip.journal.entries(path=r"a\.txt") if "content" not in entry.query]
    assert methods(changes)[0] == "DELETE"
    assert set(methods(changes)[1:-1]) == {"GET"}
    assert methods(changes)[-1] == "PUT"
    assert changes[-1].time - changes[0].time >= 0.3


def test_deletion_takes_effect_later(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """A DELETE is answered at once and done later; we wait for it. What is missing cannot be deleted."""
    vip.vip.switches.delete_seconds = 0.4
    session = new_session(files={"a.txt": b"1"})
    send(client, session)
    client.delete(session.vip_input_dir)
    assert client.exists(session.vip_input_dir)
    until(lambda: not client.exists(session.vip_input_dir))

    response, body = exchange(client._http, "DELETE", f"/path{session.vip_input_dir}")
    assert (response.status_code, body["errorCode"]) == (400, 8000)
    client.delete(session.vip_input_dir)  # gone is gone

    send(client, session)
    delete_and_wait(client, session.vip_input_dir, timeout_seconds=5)
    assert not client.exists(session.vip_input_dir)
    # Sending again at once must not race with the deletion.
    assert send(client, session).sent == 1
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=10) == b"1"


def test_what_paths_do_not_give(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """A missing path has properties; lists of files, contents of folders, large files and MD5 are refused."""
    session = new_session(files={"a.txt": b"12345", "large": b"x" * 2000})
    send(client, session)
    missing = client.entry("/vip/Home/nothing")
    assert (missing.exists, missing.size, missing.is_directory) == (False, None, False)
    assert not client.exists("/vip/Home/nothing/at/all")
    for path in (f"{session.vip_input_dir}/a.txt", "/vip/Home/nothing"):
        with refused(8000):
            client.list_folder(path)
    vip.vip.switches.max_direct_transfer_bytes = 1000
    for path in (session.vip_input_dir, f"{session.vip_input_dir}/large", "/vip/Home/nothing"):
        with refused(8000):
            client.read_file(path, max_bytes=10_000)
    with refused(8000):
        client.md5(f"{session.vip_input_dir}/a.txt")
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=10) == b"12345"
    with pytest.raises(PermissionDeniedError):
        client.list_folder("/vip/Home/../Cardiology (group)")


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_two_processes_that_upload_for_one_session_take_turns(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    session = new_session(files={"a.txt": b"12345"})
    vip.vip.faults.add(Fault(method="PUT", path="/INPUTS/.+", delay_seconds=1.0, times=1))
    with ThreadPoolExecutor(2) as pool:
        summaries = [job.result() for job in [pool.submit(send, client, session) for _ in range(2)]]
    assert sorted(summary.sent for summary in summaries) == [0, 1]
    assert len(vip.vip.journal.entries("PUT", "/INPUTS/.+")) == 1


@pytest.mark.parametrize("how", ["too slow", "rescheduled"])
def test_upload_that_is_called_failed_and_arrives_later(
    vip: Sandbox, client: VipClient, new_session: NewSession, how: str
) -> None:
    """The answer is 400, the file appears a moment later: one PUT, no DELETE, success, right content."""
    if how == "rescheduled":
        vip.vip.switches.reschedule_uploads = 1
        vip.vip.switches.reschedule_seconds = 0.4
    else:
        vip.vip.switches.transfer_limit_seconds = 0.1
        vip.vip.switches.transfer_seconds = 0.4
    session = new_session(files={"a.txt": b"12345"})
    assert send(client, session).sent == 1
    assert [entry.status for entry in vip.vip.journal.entries("PUT", r"a\.txt")] == [400]
    assert vip.vip.journal.entries("DELETE") == []
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=10) == b"12345"
    vip.vip.switches.transfer_seconds = 0
    assert send(client, session).sent == 0


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 502, "body": HTML},
        {"status": 400, "body": HTML},
        {"status": 200, "body": HTML},
        {"drop": "before"},
    ],
    ids=lambda fault: str(fault.get("status", "dropped")),
)
def test_upload_in_doubt_is_a_success_only_when_the_size_is_right(
    vip: Sandbox, client: VipClient, new_session: NewSession, fault: dict[str, object]
) -> None:
    """HTML answers and broken connections: sent again until it is there; never called done when it is not."""
    content = os.urandom(200_000)
    session = new_session(files={"a.bin": content})
    vip.vip.faults.add(Fault.model_validate({"method": "PUT", "path": r"a\.bin", "calls": [1], **fault}))
    assert send(client, session, settle_seconds=0.05).sent == 1
    assert len(vip.vip.journal.entries("PUT", r"a\.bin")) == 2
    assert client.read_file(f"{session.vip_input_dir}/a.bin", max_bytes=10**6) == content

    lost = new_session(name="lost", files={"a.bin": content, "b.bin": content})
    vip.vip.faults.clear()
    vip.vip.faults.add(Fault.model_validate({"method": "PUT", "path": r"a\.bin", **fault}))
    with pytest.raises(TransferFailed, match=r"1 of 2 files failed, the others are complete") as caught:
        send(client, lost, settle_seconds=0.05)
    assert set(caught.value.failures) == {"a.bin"}
    assert not client.exists(f"{lost.vip_input_dir}/a.bin")
    vip.vip.faults.clear()
    summary = send(client, lost)
    assert (summary.sent, summary.skipped) == (1, 1)


@pytest.mark.parametrize(
    ("status", "body"),
    [(413, HTML), (413, '{"errorMessage": "too large"}'), (400, '{"errorCode": 8009, "errorMessage": "no"}')],
)
def test_refused_upload_is_neither_repeated_nor_looked_for(
    vip: Sandbox, client: VipClient, new_session: NewSession, status: int, body: str
) -> None:
    """The file fails at once, the others are sent; nobody waits for what will not come."""
    session = new_session(files={f"{name}.bin": b"x" for name in "abc"})
    kind = "text/html" if body is HTML else "application/json"
    vip.vip.faults.add(Fault(method="PUT", path=r"a\.bin", status=status, body=body, content_type=kind))
    started = time.monotonic()
    with pytest.raises(TransferFailed, match=r"1 of 3 files failed") as caught:
        send(client, session)
    assert time.monotonic() - started < 10
    assert set(caught.value.failures) == {"a.bin"}
    assert not is_transient(caught.value)
    assert len(vip.vip.journal.entries("PUT", r"a\.bin")) == 1
    vip.vip.faults.clear()
    assert send(client, session).sent == 1


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (507, HTML, StorageFull),
        (507, '{"errorCode": 1, "errorMessage": "no"}', StorageFull),
        (400, '{"errorCode": 8042, "errorMessage": "Quota exceeded"}', StorageFull),
        (400, '{"errorCode": 8013, "errorMessage": "no"}', PermissionDeniedError),
        (403, '{"errorCode": 8000, "errorMessage": "no"}', PermissionDeniedError),
    ],
)
def test_refusal_that_concerns_all_stops_the_others(
    vip: Sandbox, connect: Connect, new_session: NewSession, status: int, body: str, expected: type[PlatformError]
) -> None:
    session = new_session(files={f"{number}.bin": b"x" for number in range(40)})
    kind = "text/html" if body is HTML else "application/json"
    vip.vip.faults.add(Fault(method="PUT", path=r"\.bin", status=status, body=body, content_type=kind))
    with pytest.raises(expected):
        send(connect(parallelism=2), session)
    assert len(vip.vip.journal.entries("PUT", r"\.bin")) <= 6


def test_file_that_was_accepted_and_is_not_there_is_sent_again(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """A proxy says that a file was stored, and it was not: one more listing of each folder proves what is there."""
    session = new_session(files={"a.bin": b"1", "b.bin": b"2", "sub/a.bin": b"3"})
    vip.vip.faults.add(Fault(method="PUT", path=r"/a\.bin", status=201, calls=[1]))
    assert send(client, session).sent == 3
    names = {entry.name for entry in client.list_folder(session.vip_input_dir)}
    assert names == {"a.bin", "b.bin", "sub"}
    assert client.exists(f"{session.vip_input_dir}/sub/a.bin")

    lost = new_session(name="lost", files={"a.bin": b"1", "b.bin": b"2"})
    vip.vip.faults.add(Fault(method="PUT", path=r"lost/INPUTS/a\.bin", status=201))
    with pytest.raises(TransferFailed, match=r"a\.bin was accepted twice, with 1 bytes, but it is not there") as caught:
        send(client, lost)
    assert set(caught.value.failures) == {"a.bin"}
    vip.vip.faults.clear()
    summary = send(client, lost)
    assert (summary.sent, summary.skipped) == (1, 1)


def test_file_that_was_refused_and_arrived_all_the_same_is_there(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """Whatever the answer was, what the platform lists counts."""
    session = new_session(files={"a.bin": b"1", "b.bin": b"2"})
    vip.vip.faults.add(Fault(method="PUT", path=r"a\.bin", status=413, body=HTML, after_effect=True))
    assert send(client, session).sent == 2
    assert len(vip.vip.journal.entries("PUT", r"a\.bin")) == 1
    assert send(client, session).skipped == 2


def test_answer_lost_after_the_file_arrived(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """The file is there with its size although no answer came: it is not sent again."""
    session = new_session(files={"a.txt": b"12345"})
    vip.vip.faults.add(Fault(method="PUT", path=r"a\.txt", drop="after"))
    assert send(client, session).sent == 1
    assert len(vip.vip.journal.entries("PUT", r"a\.txt")) == 1
    assert vip.vip.journal.entries("DELETE") == []


def test_part_of_a_file_after_a_failed_upload_is_replaced(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """The answer is an error and a file of another size appears: it is deleted and the file sent again."""
    session = new_session(files={"a.txt": b"complete"})
    client.make_folder(session.vip_input_dir)
    vip.vip.faults.add(Fault(method="PUT", path=r"a\.txt", status=502, body=HTML, calls=[1]))
    half = tmp_path / "half"
    half.write_bytes(b"comp")

    def leave_a_part() -> None:
        until(lambda: vip.vip.journal.entries("PUT", r"a\.txt"))
        client.put_file(half, f"{session.vip_input_dir}/a.txt")

    other = threading.Thread(target=leave_a_part)
    other.start()
    assert send(client, session, settle_seconds=0.5).sent == 1
    other.join()
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=100) == b"complete"
    assert len(vip.vip.journal.entries("DELETE", r"a\.txt")) == 1


def test_truncated_file_on_the_platform_is_sent_again(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """A file of the right name and the wrong size is replaced; unchanged ones are sent once, ever."""
    session = new_session(files={"a.txt": b"complete", "b.txt": b"other", "sub/c.txt": b"third"})
    client.make_folder(session.vip_input_dir)
    half = tmp_path / "half"
    half.write_bytes(b"comp")
    client.put_file(half, f"{session.vip_input_dir}/a.txt")
    vip.vip.journal.clear()
    summary = send(client, session)
    assert (summary.sent, summary.replaced, summary.skipped) == (3, 1, 0)
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=100) == b"complete"
    summary = send(client, session)
    assert (summary.sent, summary.skipped) == (0, 3)
    for name in ("a.txt", "b.txt", "c.txt"):
        assert len(vip.vip.journal.entries("PUT", name)) == 1


def test_changed_file_of_the_same_size_is_sent_again(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Sizes cannot tell; the record of what was sent can. A file that was only touched is not sent."""
    session = new_session(files={"a.txt": b"12345", "b.txt": b"12345"})
    assert session.input_dir is not None
    send(client, session)
    vip.vip.journal.clear()
    (session.input_dir / "a.txt").write_bytes(b"54321")
    os.utime(session.input_dir / "a.txt", ns=(1, 1))
    os.utime(session.input_dir / "b.txt", ns=(1, 1))
    summary = send(client, session)
    assert (summary.sent, summary.replaced, summary.skipped) == (1, 1, 1)
    assert vip.vip.journal.entries("PUT", r"b\.txt") == []
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=100) == b"54321"


def test_file_that_changes_while_it_is_sent_is_sent_again(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """The record is of what was sent, not of what the file became meanwhile."""
    vip.vip.switches.transfer_seconds = 0.3
    session = new_session(files={"a.txt": b"12345"})
    assert session.input_dir is not None
    local = session.input_dir / "a.txt"

    def change() -> None:
        until(lambda: any(entry.bytes_in == 5 for entry in vip.vip.journal.entries("PUT", r"a\.txt")))
        local.write_bytes(b"54321")

    writer = threading.Thread(target=change)
    writer.start()
    send(client, session)
    writer.join()
    assert send(client, session).replaced == 1
    assert client.read_file(f"{session.vip_input_dir}/a.txt", max_bytes=10) == b"54321"


def test_excluded_files_stay_excluded_at_the_launch(client: VipClient, new_session: NewSession) -> None:
    """What was left out of the upload is no obstacle later, and neither is an input folder that is gone."""
    files = {"a.txt": b"1", "empty.txt": b"", "a b": b"1", "a_b": b"2"}
    session = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, files=files, nb_runs=2)
    upload(client, session, preflight(client, session, exclude=["empty.txt", "a b"]))
    launch(client, session, 1)
    assert session.input_dir is not None
    shutil.rmtree(session.input_dir)
    launch(client, session, 2)
    assert [workflow.status for workflow in wait(client, session)] == ["Finished"] * 2


@pytest.mark.parametrize("parallelism", [3, 8])
def test_many_files_are_sent_at_once_within_the_bound(
    vip: Sandbox, connect: Connect, new_session: NewSession, parallelism: int
) -> None:
    """40 files of 0.2 s each: nearly as much faster as there are transfers, and never one more of them."""
    vip.vip.switches.transfer_seconds = 0.2 if parallelism == 8 else 0.02
    session = new_session(files={f"{number:02d}.txt": b"x" * (number + 1) for number in range(40)})
    assert send(connect(parallelism=parallelism), session).sent == 40
    sent = vip.vip.journal.entries("PUT", r"\.txt")
    assert len(sent) == 40
    assert vip.vip.journal.peak("PUT", r"\.txt") == parallelism
    if parallelism == 8:
        one_after_the_other = sum(entry.seconds or 0 for entry in sent)
        took = max(entry.time + (entry.seconds or 0) for entry in sent) - sent[0].time
        assert one_after_the_other / took > 5


def test_names_with_special_characters_come_back(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Quoting keeps every name and byte; values with such characters are told before anything is sent."""
    names = ["a#b.txt", "what?.txt", "%41.txt", "c+d.txt", "e&f=g.txt", "with space.txt", "semi;colon", "star*"]
    contents = {name: os.urandom(50) for name in names}
    session = new_session(files=contents)
    send(client, session)
    stored = {entry.name for entry in client.list_folder(session.vip_input_dir)}
    assert stored == {name.replace(" ", "_") for name in names}
    for name, content in contents.items():
        path = f"{session.vip_input_dir}/{name.replace(' ', '_')}"
        assert client.entry(path).size == 50
        assert client.read_file(path, max_bytes=100) == content

    for name in ("a#b.txt", "%41.txt", "semi;colon", "star*"):
        value = f"{session.vip_input_dir}/{name}"
        with refused(8009):
            client.launch(
                name="x", pipeline_id="CopyFile/1.0", input_values={"file": value}, results_location="/vip/Home"
            )
        with pytest.raises(PreflightFailed, match="has characters VIP refuses"):
            preflight(
                client, session.model_copy(update={"pipeline_id": "CopyFile/1.0", "input_settings": {"file": name}})
            )

    for number, name in enumerate(["c+d.txt", "what?.txt", "e&f=g.txt", "with space.txt"]):
        copied = session.model_copy(
            update={"pipeline_id": "CopyFile/1.0", "input_settings": {"file": name}, "token": f"abc{number}"}
        )
        start(client, copied)
    assert {workflow.status for workflow in wait(client, session)} == {"Finished"}
    download(client, session)
    found = {path.name: path.read_bytes() for path in session.output_dir.rglob("*/copies/*")}
    assert found == {
        name.replace(" ", "_"): contents[name] for name in ("c+d.txt", "what?.txt", "e&f=g.txt", "with space.txt")
    }
