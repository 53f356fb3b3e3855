"""Downloads, archives, shared inputs, the end of a session, and comparing runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.vip_steps import QUICK, effects, files_in, run, send, start, wait
from prefect_biomed.clients.errors import (
    AuthenticationError,
    DeadlineExceeded,
    LedgerError,
    PollingFailed,
    TransferFailed,
    UnsafeContent,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    NotFetched,
    SessionFile,
    StillRunning,
    VipClient,
    VipSession,
    download,
    finish,
    kill,
    monitor,
    open_session,
    share_inputs,
)
from prefect_biomed.clients.vip.download import _places, not_here
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

HTML = "<!doctype html><html><body><h1>Bad gateway</h1></body></html>"
AT_ONCE = (0.01, 0.01, 0.01)


# -- downloads ---------------------------------------------------------------------------------------------------------


@contextmanager
def never_partial(folder: Path, size: int) -> Iterator[None]:
    """Watch a folder: whatever has a final name must have its final size."""
    stop = threading.Event()
    wrong: list[str] = []

    def watch() -> None:
        while not stop.is_set():
            wrong.extend(str(path) for path in folder.rglob("*.bin") if path.stat().st_size != size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("ranges", [True, False], ids=["resumed", "begun anew"])
def test_broken_download_is_completed(vip: Sandbox, client: VipClient, new_session: NewSession, ranges: bool) -> None:
    """Cut in the middle, or refused at first: the file is exact and never half under its name; later nothing moves."""
    content = os.urandom(3_000_000)
    vip.vip.switches.ranges = ranges
    session = new_session("CopyFile/1.0", {"file": ["cut.bin", "refused.bin"]}, files={
        "cut.bin": content, "refused.bin": content
    })  # fmt: skip
    run(client, session)
    vip.vip.faults.add(
        Fault(method="GET", path="cut", query="action=content", truncate_bytes=1_500_000, calls=[1]),
        Fault.model_validate(
            {
                "method": "GET",
                "path": "refused",
                "query": "action=content",
                "status": 400,
                "body": '{"errorCode": 8000, "errorMessage": "no"}',
                "content_type": "application/json",
                "calls": [1],
            }
        ),
    )
    vip.vip.journal.clear()
    with never_partial(session.output_dir, len(content)):
        summary = download(client, session, retry_seconds=AT_ONCE)
    assert summary.fetched == 2
    assert [path.rpartition("/")[2] for path in files_in(session.output_dir)] == ["cut.bin", "refused.bin"]
    assert set(files_in(session.output_dir).values()) == {content}
    statuses = {
        name: [entry.status for entry in vip.vip.journal.entries("GET", name) if entry.query == "action=content"]
        for name in ("cut", "refused")
    }
    assert statuses == {"cut": [200, 206 if ranges else 200], "refused": [400, 200]}

    vip.vip.journal.clear()
    assert download(client, session).fetched == 0
    assert [entry for entry in vip.vip.journal if entry.query == "action=content"] == []


def test_slow_fetch_from_the_grid_is_asked_for_again(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """The platform gives up after its limit and goes on behind it; the next try is answered."""
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"12345"})
    run(client, session)
    vip.vip.switches.transfer_limit_seconds = 0.1
    vip.vip.switches.download_seconds = 0.3
    assert download(client, session, retry_seconds=(0.3, 0.3)).fetched == 1
    assert list(files_in(session.output_dir).values()) == [b"12345"]


def test_file_that_never_comes_does_not_stop_the_others(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """One output fails for good: the others are here, the failed one has no file, the next call fetches only it."""
    files = {f"{number}.bin": b"x" * 100 for number in range(5)}
    session = new_session("CopyFile/1.0", {"file": sorted(files)}, files=files)
    run(client, session)
    vip.vip.faults.add(Fault(method="GET", path=r"3\.bin", query="action=content", truncate_bytes=50))
    with pytest.raises(TransferFailed, match="1 of 5 files failed"):
        download(client, session, retry_seconds=AT_ONCE)
    assert {path.rpartition("/")[2] for path in files_in(session.output_dir) if not path.endswith(".part")} == {
        "0.bin",
        "1.bin",
        "2.bin",
        "4.bin",
    }
    vip.vip.faults.clear()
    summary = download(client, session)
    assert (summary.fetched, summary.skipped) == (1, 4)
    assert sorted(path.rpartition("/")[2] for path in files_in(session.output_dir)) == sorted(files)


# -- archives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parent", "absolute", "symlink", "hardlink", "device"])
def test_hostile_archives_are_refused(client: VipClient, new_session: NewSession, tmp_path: Path, kind: str) -> None:
    """Members that would leave the folder: the archive is kept as it is, nothing is outside, nothing half inside."""
    session = new_session("HostileOutputs/1.0", {"kind": kind})
    run(client, session)
    for _ in range(2):
        summary = download(client, session)
        ((path, reason),) = summary.packed.items()
        assert path.endswith("/result.tar.gz")
        assert "was not unpacked" in reason
        assert [path.rpartition("/")[2] for path in files_in(session.output_dir)] == ["result.tar.gz"]
        assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name or path.name == "good.txt"]
        assert not Path("/tmp/escaped.txt").exists()


def test_archives_are_recognised_by_their_content(client: VipClient, new_session: NewSession) -> None:
    """A tgz without a suffix is unpacked; a `.tgz` that is no tar stays a file; archives can be kept beside."""
    packed = new_session("HostileOutputs/1.0", {"kind": "no_suffix"}, name="packed")
    run(client, packed)
    download(client, packed)
    (path,) = files_in(packed.output_dir)
    assert path.endswith("/result/inside.txt")

    plain = new_session("HostileOutputs/1.0", {"kind": "not_a_tar"}, name="plain")
    run(client, plain)
    download(client, plain)
    assert list(files_in(plain.output_dir).values()) == [b"this is not an archive"]

    both = new_session("HostileOutputs/1.0", {"kind": "no_suffix"}, name="both")
    run(client, both)
    summary = download(client, both, keep_archives=True)
    names = [path.split("/", 2)[2] for path in files_in(both.output_dir)]
    assert names == ["result", "result.content/inside.txt"]
    assert sum(len(paths) for paths in summary.files.values()) == 2
    assert download(client, both, keep_archives=True).fetched == 0

    kept = new_session("HostileOutputs/1.0", {"kind": "no_suffix"}, name="kept")
    run(client, kept)
    download(client, kept, unzip=False)
    assert [path.split("/", 2)[2] for path in files_in(kept.output_dir)] == ["result"]
    assert download(client, kept).fetched == 0
    assert [path.split("/", 2)[2] for path in files_in(kept.output_dir)] == ["result/inside.txt"]


def test_interrupted_unpacking_is_done_again(
    vip: Sandbox, client: VipClient, new_session: NewSession, input_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first member: no half folder; the next call unpacks without fetching again."""
    session = new_session("GreyMatter/1.0", {"t1": "anatomical.nii"}, input_dir=input_dir)
    run(client, session)
    extract = tarfile.TarFile.extract
    extracted: list[object] = []

    def stop_at_the_second(self: tarfile.TarFile, *arguments: object, **options: object) -> None:
        if extracted:
            raise KeyboardInterrupt
        extracted.append(arguments)
        extract(self, *arguments, **options)  # type: ignore[arg-type]  # passed on as they come

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extract", stop_at_the_second)
        download(client, session)
    assert [path.rpartition("/")[2] for path in files_in(session.output_dir)] == ["anatomical_greymatter.tar.gz"]
    # A process that is killed cannot clean up.
    left = next(session.output_dir.rglob("anatomical_greymatter.tar.gz")).with_name(".unpack-killed")
    left.mkdir()
    (left / "half").write_text("x")
    vip.vip.journal.clear()
    summary = download(client, session)
    assert (summary.fetched, summary.skipped) == (0, 1)
    assert {path.rpartition("/")[2] for path in files_in(session.output_dir)} == {
        "measures.csv",
        "mask.nii.gz",
        "settings.json",
    }
    assert [entry for entry in vip.vip.journal if entry.query == "action=content"] == []


@pytest.mark.parametrize("kind", ["outside", "colon"])
def test_outputs_from_elsewhere_are_kept_below_the_folder(
    client: VipClient, new_session: NewSession, kind: str
) -> None:
    """A path that is not where we asked for, or has colons, is saved inside; each workflow apart from the others."""
    session = new_session("HostileOutputs/1.0", {"kind": kind}, nb_runs=2)
    run(client, session)
    summary = download(client, session)
    paths = [path for group in summary.files.values() for path in group]
    assert len(set(paths)) == 2
    assert all(path.is_relative_to(session.output_dir) for path in paths)
    assert set(files_in(session.output_dir).values()) == {b"harmless"}


def test_outputs_of_one_name_from_elsewhere_are_both_kept(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    """Two outputs of one workflow with one name in different folders do not replace each other."""
    session = new_session("EveryType/1.0", {"text": "x"})
    (workflow,) = run(client, session)
    returned = {}
    for name, content in (("a", b"first"), ("b", b"second")):
        client.make_folder(f"/vip/Home/{name}")
        (tmp_path / name).write_bytes(content)
        client.put_file(tmp_path / name, f"/vip/Home/{name}/result.txt")
        returned[name] = [f"/vip/Home/{name}/result.txt"]
    execution = vip.vip.engine.find(workflow.identifier)
    assert execution is not None
    execution.returned = returned
    with SessionFile(session).edit() as record:
        record.workflows[workflow.identifier].outputs = []
    download(client, session)
    assert sorted(files_in(session.output_dir).values()) == [b"first", b"second"]
    assert download(client, session).fetched == 0


@pytest.mark.parametrize("name", ["session_data.json", ".locks/download.lock"])
def test_output_cannot_take_the_place_of_our_own_files(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path, name: str
) -> None:
    """An output that is named as the session file is refused; the file stays what it is."""
    session = new_session("EveryType/1.0", {"text": "x"})
    (workflow,) = run(client, session)
    path = f"{session.vip_output_dir}/{name}"
    (tmp_path / "bad").write_text("not yours")
    client.make_folder(path.rpartition("/")[0])
    client.put_file(tmp_path / "bad", path)
    execution = vip.vip.engine.find(workflow.identifier)
    assert execution is not None
    execution.returned = {"bad": [path]}
    client.put_file(tmp_path / "bad", f"{session.vip_output_dir}/good.txt")
    execution.returned["good"] = [f"{session.vip_output_dir}/good.txt"]
    for _ in range(2):
        with pytest.raises(UnsafeContent, match=r"Refused"):
            download(client, session)
        assert (session.output_dir / "good.txt").read_text() == "not yours"
        assert SessionFile(session).read().ledger.downloaded == []
    assert SessionFile(session).read().session_name == "session"
    with pytest.raises(NotFetched, match=name):
        finish(client, session)


@pytest.mark.parametrize(
    ("identifier", "path"),
    [
        (".", "/session_data.json"),
        ("..", "/vip/Home/x/a"),
        ("session_data.json", "/vip/Home/x/a"),
        ("SESSION_DATA.json", "/vip/Home/x/a"),
        (".locks", "/vip/Home/x/upload.lock"),
        ("w" * 300, "/vip/Home/x/a"),
        ("a/../../b", "/vip/Home/x/a"),
        ("/etc", "/vip/Home/x/passwd"),
        ("workflow-1", "/vip/Home/x/../../../a"),
        ("workflow-1", "/vip/Home/x/" + "n" * 300),
        ("workflow-1", "/vip/Home/API/session/OUTPUTS"),
        ("workflow-1", "/vip/Home/API/session/OUTPUTS/./session_data.json"),
        ("workflow-1", "/vip/Home/API/session/OUTPUTS/.session_data.json.vip"),
        ("workflow-1", "/vip/Home/API/session/OUTPUTS/.unpack-abc/x"),
        ("workflow-1", "/vip/Home/API/session/OUTPUTS/." + "a" * 32 + ".kept.part"),
    ],
)
def test_names_from_the_platform_never_touch_files_of_ours(new_session: NewSession, identifier: str, path: str) -> None:
    session = new_session("EveryType/1.0")
    outputs = [{"path": path}, {"path": f"{session.vip_output_dir}/r001/fine.txt"}]
    places, refused = _places(session, identifier, [str(output["path"]) for output in outputs])
    assert refused.keys() == {path}
    assert places.keys() == {f"{session.vip_output_dir}/r001/fine.txt"}
    assert path in not_here(session, identifier, outputs)


def test_outputs_that_would_be_one_file_here_are_not_taken_for_each_other(new_session: NewSession) -> None:
    session = new_session("EveryType/1.0")
    first, second = (f"/vip/{place}/workflow-1/a.txt" for place in ("Home", "Group (group)"))
    places, refused = _places(session, "workflow-1", [first, second, first])
    assert (places.keys(), refused.keys()) == ({first}, {second})
    place = places[first]
    place.parent.mkdir(parents=True)
    place.write_text("a")
    assert not_here(session, "workflow-1", [{"path": first, "size": 1}, {"path": second, "size": 1}]) == (second,)


# -- outages -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pauses")
def test_monitoring_survives_outages_within_its_budget(vip: Sandbox, connect: Connect, new_session: NewSession) -> None:
    """HTML 502s, dropped connections and timeouts: the wait goes on; one look more than the budget ends it."""
    vip.vip.switches.job_seconds = 0.5
    client = connect(read_seconds=0.2)
    session = new_session("EveryType/1.0", {"text": "x"})
    start(client, session)
    looks = {"method": "GET", "path": "/executions"}
    vip.vip.faults.add(
        Fault.model_validate({**looks, "status": 502, "body": HTML, "times": 3}),
        Fault.model_validate({**looks, "drop": "before", "times": 3}),
        Fault.model_validate({**looks, "delay_seconds": 0.4, "times": 3}),
    )
    seen = list(monitor(client, session, PollSettings(interval_seconds=0.02, error_budget=3)))
    assert seen[-1][0].status == "Finished"
    assert {fault["hit"] for fault in vip.vip.faults.describe()} == {3}

    again = new_session("EveryType/1.0", {"text": "y"}, name="again")
    start(client, again)
    vip.vip.faults.add(Fault.model_validate({**looks, "status": 502, "body": HTML}))
    vip.vip.journal.clear()
    with pytest.raises(PollingFailed, match=r"3 looks in a row failed.*vip_resume with session_name='again'"):
        list(monitor(client, again, PollSettings(interval_seconds=0.02, error_budget=2)))
    assert effects(vip) == []
    vip.vip.faults.clear()
    assert wait(client, again)[0].status == "Finished"


def test_refused_key_ends_the_wait_at_once_and_a_new_one_resumes(
    vip: Sandbox, client: VipClient, connect: Connect, new_session: NewSession
) -> None:
    """A key that stops working in a long run is one 401, no retry; with a new key the same session goes on."""
    vip.vip.switches.job_seconds = 0.5
    session = new_session("EveryType/1.0", {"text": "x"})
    start(client, session)
    with pytest.raises(AuthenticationError):
        for _ in monitor(client, session, QUICK):
            vip.vip.switches.key_generation = 1
    assert [entry.status for entry in vip.vip.journal].count(401) == 1
    renewed = connect()
    resumed = open_session(session.output_dir)
    assert wait(renewed, resumed)[0].status == "Finished"
    assert download(renewed, resumed).fetched == 1


# -- shared inputs and the end of a session ----------------------------------------------------------------------------


def test_last_session_out_removes_the_shared_inputs(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """The owner finishes first: only its outputs go. The inputs stay for the borrowers, and go with the last one."""
    vip.vip.switches.delete_seconds = 0
    owner = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, name="owner", files={"a.txt": b"1"})
    run(client, owner)
    borrowers = [
        share_inputs(client, new_session("EveryType/1.0", {"text": "y", "file": "a.txt"}, name=name), owner)
        for name in ("first", "second")
    ]
    share_inputs(client, borrowers[0], owner)  # twice is once
    assert all(borrower.vip_input_dir == owner.vip_input_dir for borrower in borrowers)

    download(client, owner)
    summary = finish(client, owner)
    assert summary.kept_for == ("first", "second")
    assert client.exists(owner.vip_input_dir)
    assert not client.exists(owner.vip_output_dir)
    for borrower in borrowers:
        start(client, borrower)
        assert wait(client, borrower)[0].status == "Finished"
        download(client, borrower)
    assert finish(client, borrowers[0]).kept_for == ("second",)
    assert client.exists(f"{owner.vip_input_dir}/a.txt")
    assert finish(client, borrowers[1]).kept_for == ()
    assert client.list_folder("/vip/Home/API") == []
    assert len(vip.vip.journal.entries("PUT", r"INPUTS/a\.txt")) == 1


def test_borrowing_needs_inputs_and_none_of_ones_own(client: VipClient, new_session: NewSession) -> None:
    """Inputs that are not there cannot be shared, and a session with its own inputs does not borrow."""
    owner = new_session(name="owner", files={"a.txt": b"1"})
    with pytest.raises(LedgerError, match="Upload the inputs of the owner first"):
        share_inputs(client, new_session(name="guest"), owner)
    send(client, owner)
    own = new_session(name="own", files={"b.txt": b"2"})
    send(client, own)
    with pytest.raises(LedgerError, match="has inputs of its own"):
        share_inputs(client, own, owner)


def test_finishing_is_refused_while_something_runs_and_is_idempotent(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """The ids of what runs are told and nothing is removed; twice is as good as once."""
    vip.vip.switches.job_seconds = 30
    session = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, files={"a.txt": b"1"}, nb_runs=2)
    send(client, session)
    running = [workflow.identifier for workflow in start(client, session)]
    vip.vip.journal.clear()
    with pytest.raises(StillRunning, match="Nothing was removed") as caught:
        finish(client, session)
    assert sorted(caught.value.workflow_ids) == sorted(running)
    assert effects(vip) == []
    kill(client, running)
    assert set(finish(client, session).removed) == {session.vip_input_dir, session.vip_output_dir, session.vip_dir}
    assert not client.exists(session.vip_dir)
    assert set(SessionFile(session).read().workflow_ids("Removed")) == set(running)
    assert finish(client, session).removed == ()


def test_deletion_that_takes_too_long_is_told_and_taken_up_again(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    """A deletion that is lost behind its answer ends in a clear error; finishing again completes it."""
    session = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, files={"a.txt": b"1"})
    run(client, session)
    download(client, session)
    vip.vip.switches.lose_deletes = 1
    with pytest.raises(DeadlineExceeded, match=r"deletion of .*: not finished .* happen. Run this again later"):
        finish(client, session, timeout_seconds=0.2)
    assert SessionFile(session).read().workflow_ids("Removed") == []
    assert finish(client, session).removed
    assert not client.exists(session.vip_dir)
    assert len(SessionFile(session).read().workflow_ids("Removed")) == 1


@pytest.mark.parametrize("keep", [{}, {"keep_output": True}, {"keep_input": True}])
def test_records_that_were_deleted_do_not_stop_a_second_finish(
    client: VipClient, new_session: NewSession, keep: dict[str, bool]
) -> None:
    """With the platform's records gone, finishing again still works."""
    session = new_session("EveryType/1.0", {"text": "x", "file": "a.txt"}, files={"a.txt": b"1"})
    run(client, session)
    download(client, session)
    finish(client, session, delete_records=True, **keep)
    assert client.workflows() == []
    assert finish(client, session, delete_records=True, **keep).removed == ()
    assert client.exists(session.vip_output_dir) is keep.get("keep_output", False)
    assert client.exists(session.vip_input_dir) is keep.get("keep_input", False)


# -- together with vip-client ------------------------------------------------------------------------------------------


def test_session_of_vip_client_is_resumed(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    """Its file alone tells settings and workflows; what it removed is skipped, the rest is watched and downloaded."""
    begun = new_session(None, {}, name="begun", files={"a.txt": b"1"})
    send(client, begun)
    values = {"text": "x", "file": f"{begun.vip_input_dir}/a.txt"}
    vip.vip.switches.job_seconds = 0.3
    # vip-client gives all runs the name of the session and one folder.
    ids = [
        client.launch(
            name="begun", pipeline_id="EveryType/1.0", input_values=values, results_location=begun.vip_output_dir
        ).identifier
        for _ in range(2)
    ]
    path = begun.output_dir / "session_data.json"
    written = {
        "session_name": "begun",
        "pipeline_id": "EveryType/1.0",
        "local_input_dir": str(begun.input_dir),
        "local_output_dir": str(begun.output_dir),
        "vip_input_dir": begun.vip_input_dir,
        "vip_output_dir": begun.vip_output_dir,
        "input_settings": values,
        "workflows": {
            "workflow-gone00": {"status": "Removed", "start": "2026/01/01 00:00:00", "outputs": []},
            ids[0]: {"status": "Running", "start": "2026/01/01 00:00:01", "outputs": []},
            ids[1]: {"status": "Running", "start": "2026/01/01 00:00:02", "outputs": []},
        },
    }
    path.write_text(json.dumps(written, indent=4))

    session = open_session(begun.output_dir)
    assert session.input_settings == values
    vip.vip.journal.clear()
    assert [workflow.status for workflow in wait(client, session)] == ["Finished"] * 2
    assert vip.vip.journal.entries(path="workflow-gone00") == []
    assert vip.vip.journal.entries("POST") == []
    summary = download(client, session)
    assert set(summary.files) == set(ids)
    finish(client, session)
    assert not client.exists(session.vip_dir)
    after = json.loads(path.read_text())
    assert {entry["status"] for entry in after["workflows"].values()} == {"Removed"}
    assert after["input_settings"] == values
    assert set(written) <= set(after)


# -- comparing runs ----------------------------------------------------------------------------------------------------


def test_runs_differ_in_their_bytes_but_only_in_one_member(
    vip: Sandbox, client: VipClient, new_session: NewSession, input_dir: Path
) -> None:
    """Time stamps of gzip make all archives different; unpacked, the three runs are equal but for one member of one."""
    vip.vip.switches.odd_execution = 2
    session = new_session("GreyMatter/1.0", {"t1": "anatomical.nii"}, input_dir=input_dir, nb_runs=3)
    run(client, session)
    summary = download(client, session, keep_archives=True)
    archives = [
        next(path for path in summary.files[identifier] if path.name == "anatomical_greymatter.tar.gz")
        for identifier in SessionFile(session).read().workflow_ids()
    ]
    assert len({path.read_bytes() for path in archives}) == 3

    members: list[dict[str, bytes]] = []
    raw: list[dict[str, bytes]] = []
    for path in archives:
        folder = path.with_name(path.name + ".content")
        raw.append({file.name: file.read_bytes() for file in folder.iterdir()})
        members.append(
            {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in raw[-1].items()}
        )
        with tarfile.open(path) as archive:
            unpacked = {
                info.name: io.BytesIO(file.read()).getvalue()
                for info in archive
                if (file := archive.extractfile(info)) is not None
            }
        assert unpacked == raw[-1]
    assert [set(run_members) for run_members in members] == [{"measures.csv", "mask.nii.gz", "settings.json"}] * 3
    assert len({run_raw["mask.nii.gz"] for run_raw in raw}) == 3
    assert members[0] == members[2]
    assert [name for name in members[0] if members[0][name] != members[1][name]] == ["measures.csv"]
