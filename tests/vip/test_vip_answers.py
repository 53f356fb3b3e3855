"""Answers in another shape than asked for have a type; what decides nothing may be odd; outages and disks end typed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.vip_steps import run, send, start, wait
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    DeadlineExceeded,
    LocalStorageError,
    PermissionDeniedError,
    ServerUnavailable,
    SourceUnreadable,
    TransferFailed,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    GirderStorage,
    SessionFile,
    VipClient,
    VipSession,
    download,
    finish,
    kill,
    launch,
    monitor,
    preflight,
    upload,
)
from prefect_biomed.clients.vip.models import PathEntry
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]

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
    "list of texts": '["x"]',
    "data": '{"data": [{}]}',
    "null fields": '{"identifier": null, "path": null, "exists": null, "md5": null, "httpHeaderValue": null}',
    "numbers for texts": '{"identifier": 5, "path": 5, "exists": "perhaps", "md5": 5, "httpHeaderValue": 5}',
    "status is a number": '{"identifier": "x", "status": 5, "path": "/x", "size": "much"}',
    "jobs are a text": '{"identifier": "x", "jobs": "none", "path": ["/x"]}',
    "jobs are null": '{"identifier": "x", "jobs": {"0": null}, "path": {}}',
    "outputs are numbers": '{"identifier": "x", "returnedFiles": {"a": [5]}, "parameters": [null]}',
    "outputs are a number": '{"identifier": "x", "returnedFiles": 5, "parameters": {}}',
    "html": "<html><body>Sorry</body></html>",
    "deep": DEEP,
    "deep in a field": '{"identifier": "x", "status": "Running", "jobs": ' + DEEP + ', "path": ' + DEEP + "}",
}
# An empty list is an answer where a list was asked for, and what a route does not need may be odd in it.
GOOD = {
    **{route: {"list"} for route in ("workflows", "results", "pipelines", "list_folder", "external_keys", "examples")},
    "pipeline": {"status is a number", "jobs are a text", "jobs are null"},
}

ROUTES: dict[str, Callable[[VipClient], object]] = {
    "workflows": lambda client: client.workflows(),
    "workflow": lambda client: client.workflow("workflow-abc123"),
    "results": lambda client: client.results("workflow-abc123"),
    "examples": lambda client: client.examples(),
    "pipelines": lambda client: client.pipelines(),
    "pipeline": lambda client: client.pipeline("CopyFile/1.0"),
    "exists": lambda client: client.exists("/vip/Home/x"),
    "entry": lambda client: client.entry("/vip/Home/x"),
    "list_folder": lambda client: client.list_folder("/vip/Home"),
    "md5": lambda client: client.md5("/vip/Home/x"),
    "external_keys": lambda client: client.external_keys(),
    "authenticate": lambda client: VipClient.authenticate(client.url, "alice", "x"),
    "launch": lambda client: client.launch(
        name="n", pipeline_id="CopyFile/1.0", input_values={"file": "/vip/Home/x"}, results_location="/vip/Home/o"
    ),
}


def answer(vip: Sandbox, body: str, *, status: int = 200, path: str = "", **more: Any) -> None:
    vip.vip.faults.clear()
    kind = "text/html" if body.startswith("<") else JSON
    path = path or r"/rest/(?!platform)"
    vip.vip.faults.add(Fault(path=path, status=status, body=body, content_type=kind, **more))


def test_answer_about_another_execution_is_not_taken_for_that_of_the_one_asked_for(
    vip: Sandbox, client: VipClient
) -> None:
    answer(vip, '{"identifier": "workflow-other1", "status": "Finished"}')
    with pytest.raises(UnexpectedResponse, match="the answer is about workflow-other1"):
        client.workflow("workflow-mine01")


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("route", ROUTES)
def test_answer_of_another_shape_has_a_type(vip: Sandbox, client: VipClient, route: str) -> None:
    assert client.profile.name == "vip"
    good = set()
    for name, body in BODIES.items():
        answer(vip, body)
        try:
            ROUTES[route](client)
        except UnexpectedResponse as error:
            assert not is_transient(error)
        else:
            good.add(name)
    assert good == GOOD.get(route, set())
    for status in (429, 502, 503, 504):
        for body in ("", "{}", "<html></html>", '{"errorCode": 8007, "errorMessage": "later"}', DEEP):
            answer(vip, body, status=status)
            with pytest.raises(ServerUnavailable) as later:
                ROUTES[route](client)
            assert is_transient(later.value)
    for status in (400, 404, 500):
        for body in ("", "{}", "<html></html>", '{"errorCode": "8007"}', '{"status": 404, "error": "Not Found"}'):
            answer(vip, body, status=status)
            with pytest.raises(UnexpectedResponse, match=f"HTTP {status}"):
                ROUTES[route](client)


def test_what_decides_nothing_may_be_odd(vip: Sandbox, client: VipClient) -> None:
    answer(
        vip,
        '{"identifier": "x", "name": "n", "status": "Hibernating", "pipelineIdentifier": 5, "startDate": "soon",'
        ' "endDate": 1e300, "jobs": {"0": {"status": "DREAMING", "exitCode": "none", "exitMessage": []}}, "more": {}}',
        path="/executions/x$",
    )
    workflow = client.workflow("x")
    assert (workflow.status.value, workflow.status.is_terminal, workflow.start_date) == ("Hibernating", False, None)
    assert (workflow.jobs[0].status.value, workflow.jobs[0].exit_code) == ("DREAMING", None)
    answer(vip, '[{"identifier": "a/1", "name": 5, "version": null, "description": []}]', path="/pipelines$")
    assert [(pipeline.identifier, pipeline.name) for pipeline in client.pipelines()] == [("a/1", "")]


def test_absence_is_believed_of_the_platform_only(vip: Sandbox, client: VipClient) -> None:
    """A proxy's 404 does not say that a file is missing, nor that it was deleted."""
    for body in ("<html>404</html>", "", '{"error": "Not Found"}'):
        answer(vip, body, status=404)
        for ask in (client.exists, client.entry, client.delete):
            with pytest.raises(UnexpectedResponse):
                ask("/vip/Home/x")
    vip.vip.faults.clear()
    assert client.exists("/vip/Home/x") is False


def test_folder_that_lists_itself_is_refused(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"1"})
    run(client, session)
    folder = PathEntry(path=session.run_dir(1), is_directory=True)
    monkeypatch.setattr(client, "results", lambda _: [folder])
    monkeypatch.setattr(client, "list_folder", lambda _: [folder])
    with pytest.raises(UnexpectedResponse, match=r"lists the folder .* below itself"):
        download(client, session)


def test_file_of_another_size_than_told_is_not_taken(
    vip: Sandbox, client: VipClient, new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"abc"})
    run(client, session)
    results = client.results
    with monkeypatch.context() as patched:
        patched.setattr(client, "results", lambda one: [entry.model_copy(update={"size": 5}) for entry in results(one)])
        with pytest.raises(TransferFailed, match="3 bytes came, the platform told 5") as caught:
            download(client, session, retry_seconds=())
    assert [type(error) for error in caught.value.failures.values()] == [UnexpectedResponse]
    assert not [path for path in session.output_dir.rglob("*") if path.name == "a.bin" or path.suffix == ".part"]

    @contextmanager
    def short(*_: object, **__: object) -> Iterator[tuple[SimpleNamespace, Iterator[bytes]]]:
        yield SimpleNamespace(status_code=200, headers={}), iter([b"ab"])

    with monkeypatch.context() as patched:
        patched.setattr(client, "open_file", short)
        with pytest.raises(TransferFailed, match="2 of 3 bytes came"):
            download(client, session, retry_seconds=())
    assert not list(session.output_dir.rglob("a.bin"))
    assert download(client, session).fetched == 1


# -- outages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kill_them", "told"),
    [
        (r"/executions", False, r"could not be asked then.*Nothing was stopped remotely"),
        (r"/executions/workflow", False, r"Nothing was stopped remotely"),
        (r"/executions", True, r"could not be asked then.*Nothing was killed.*kill them by hand: workflow-\w+ \("),
    ],
    ids=["everything", "details", "kill"],
)
@pytest.mark.usefixtures("no_pauses")
def test_deadline_during_an_outage_is_a_deadline(
    vip: Sandbox, client: VipClient, new_session: NewSession, path: str, kill_them: bool, told: str
) -> None:
    vip.vip.switches.job_seconds = 60
    session = new_session("EveryType/1.0", {"text": "x"})
    start(client, session)
    settings = PollSettings(interval_seconds=0.1, deadline_seconds=1.0, error_budget=50)
    with pytest.raises(DeadlineExceeded, match=told) as caught:
        for _ in monitor(client, session, settings, kill_at_deadline=kill_them):
            vip.vip.faults.add(Fault(path=path, status=503, body="{}"))
    assert not is_transient(caught.value)
    assert "vip_resume" in str(caught.value)


def test_one_that_cannot_be_killed_does_not_spare_the_others(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    vip.vip.switches.job_seconds = 60
    session = new_session("EveryType/1.0", {"text": "x"}, nb_runs=3)
    first, *others = (workflow.identifier for workflow in start(client, session))
    vip.vip.faults.add(Fault(method="PUT", path=f"{first}/kill", status=500, body=""))
    with pytest.raises(BiomedError, match=first):
        kill(client, [first, *others])
    assert [client.workflow(identifier).status for identifier in others] == ["Killed", "Killed"]
    short = PollSettings(interval_seconds=0.05, deadline_seconds=0.3)
    with pytest.raises(DeadlineExceeded, match=rf"Nothing was killed\. These could not be killed.*{first}"):
        list(monitor(client, session, short, kill_at_deadline=True))


# -- disks -------------------------------------------------------------------------------------------------------------


def fetch_with_little_room(url: str, key: str, session: VipSession, answer: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with VipClient(url, key) as client:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            download(client, session)
        except TransferFailed as error:
            answer.put([(name, type(one).__name__, str(one)) for name, one in error.failures.items()])


def test_full_disk_is_named_and_the_other_files_are_here(
    vip: Sandbox, client: VipClient, new_session: NewSession
) -> None:
    files = {"small.bin": b"abc", "large.bin": b"x" * 300_000}
    session = new_session("CopyFile/1.0", {"file": sorted(f"./{name}" for name in files)}, files=files)
    run(client, session)
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    facts = vip.ready()["vip"]
    process = context.Process(target=fetch_with_little_room, args=(facts["url"], facts["api_key"], session, failures))
    process.start()
    ((name, kind, said),) = failures.get(timeout=60)
    process.join()
    assert (name.rpartition("/")[2], kind) == ("large.bin", LocalStorageError.__name__)
    assert str(session.output_dir) in said
    assert [path.name for path in session.output_dir.rglob("*.bin")] == ["small.bin"]
    assert download(client, session).fetched == 1
    assert not list(session.output_dir.rglob("*.part"))


def test_file_where_a_folder_must_be_is_a_typed_error(client: VipClient, new_session: NewSession) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"1"})
    run(client, session)
    (session.output_dir / f"r001-{session.token}").write_text("in the way")
    with pytest.raises(TransferFailed, match="Not a directory") as caught:
        download(client, session)
    assert [type(error) for error in caught.value.failures.values()] == [LocalStorageError]
    (session.output_dir.parent / "file").write_text("")
    with pytest.raises(LocalStorageError, match=r"file/out"):
        SessionFile(session.model_copy(update={"output_dir": session.output_dir.parent / "file" / "out"})).read()


def test_input_that_vanishes_during_the_upload_is_named(client: VipClient, new_session: NewSession) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"1", "b.bin": b"2"})
    plan = preflight(client, session)
    assert session.input_dir is not None
    (session.input_dir / "b.bin").unlink()
    with pytest.raises(TransferFailed, match=r"(?s)1 of 2 files failed.*b\.bin cannot be read any more") as caught:
        upload(client, session, plan)
    assert [type(error) for error in caught.value.failures.values()] == [SourceUnreadable]
    assert client.exists(f"{session.vip_input_dir}/a.bin")


def all_steps(url: str, key: str, session: VipSession, dies: bool) -> None:
    if dies:
        real = os.fsync

        def fsync(handle: int) -> None:
            real(handle)
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
    with VipClient(url, key) as client:
        send(client, session)
        launch(client, session, 1)
        wait(client, session)
        download(client, session)
        finish(client, session)


def test_what_a_killed_process_left_is_gone_after_the_next_run(vip: Sandbox, new_session: NewSession) -> None:
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": b"abc"})
    facts = vip.ready()["vip"]
    context = multiprocessing.get_context("spawn")
    seen = []
    for dies in (True, False):
        process = context.Process(target=all_steps, args=(facts["url"], facts["api_key"], session, dies))
        process.start()
        process.join()
        seen.append((process.exitcode, len(list(session.output_dir.rglob("*.part")))))
    assert seen == [(-signal.SIGKILL, 1), (0, 0)]


def test_download_that_broke_follows_no_planted_link(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    content = os.urandom(3_000_000)
    session = new_session("CopyFile/1.0", {"file": "a.bin"}, files={"a.bin": content})
    run(client, session)
    vip.vip.faults.add(Fault(query="action=content", truncate_bytes=2_500_000, times=1))
    with pytest.raises(TransferFailed):
        download(client, session, retry_seconds=())
    (part,) = session.output_dir.rglob("*.part")
    assert part.read_bytes() == content[: part.stat().st_size] != b""
    part.unlink()
    precious = tmp_path / "precious"
    precious.write_bytes(b"kept")
    part.symlink_to(precious)
    assert download(client, session).fetched == 1
    assert precious.read_bytes() == b"kept"
    assert [path.read_bytes() for path in session.output_dir.rglob("a.bin")] == [content]


# -- Girder ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_girder_answers_of_another_shape_have_a_type(vip: Sandbox, body: str) -> None:
    facts = vip.vip.ready()["girder"]
    girder = GirderStorage(facts["api_url"], facts["api_key"])
    folder = "/collection/pilot"
    try:
        answer(vip, body, path="api_key/token")
        with pytest.raises(UnexpectedResponse):
            girder.entry(folder)
        for path, call in {
            "resource/lookup": lambda: girder.entry(folder),
            "/file/": lambda: girder.files(["abc"]),
            "/item": lambda: girder._all("item", folderId="abc"),
        }.items():
            answer(vip, body, path=path)
            try:
                call()
            except UnexpectedResponse:
                pass
            else:
                assert (path, body) == ("/item", "[]")
    finally:
        girder.close()


def test_girder_list_without_end_is_refused(monkeypatch: pytest.MonkeyPatch, vip: Sandbox) -> None:
    monkeypatch.setattr("prefect_biomed.clients.rest.MAX_ENTRIES", 100)
    facts = vip.vip.ready()["girder"]
    girder = GirderStorage(facts["api_url"], facts["api_key"])
    numbers = iter(range(10_000))

    def page(*_: object, **__: object) -> list[dict[str, str]]:
        return [{"_id": f"{next(numbers)}", "_modelType": "item"} for _ in range(50)]

    monkeypatch.setattr(girder._connect(), "get", page)
    with pytest.raises(UnexpectedResponse, match="item on Girder has more than 100 entries"):
        girder._all("item", folderId="abc")
    girder.close()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [(401, "{}", AuthenticationError), (400, '{"errorCode": 8008, "errorMessage": "no"}', PermissionDeniedError)],
)
def test_a_descriptor_that_is_refused_is_not_one_that_there_is_none(
    vip: Sandbox, client: VipClient, status: int, body: str, error: type[Exception]
) -> None:
    answer(vip, "{}", status=404, path=r"/pipelines/")
    assert client.descriptor("CopyFile/1.0") is None
    answer(vip, body, status=status, path=r"/pipelines/")
    with pytest.raises(error):
        client.descriptor("CopyFile/1.0")
