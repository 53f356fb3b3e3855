"""What users get wrong: told at once and in full, before anything is sent."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.vip_steps import effects, files_in, refused, run, send, start, wait
from prefect_biomed.clients.archives import ArchiveLimits
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    ConnectionFailed,
    LedgerError,
    PreflightFailed,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.vip import (
    SessionFile,
    SessionLocked,
    VipClient,
    VipSession,
    download,
    finish,
    launch,
    open_session,
    preflight,
    upload,
)
from prefect_biomed.clients.vip.preflight import Preflight
from prefect_biomed.sandbox import Fault, Sandbox

Connect = Callable[..., VipClient]
NewSession = Callable[..., VipSession]


@pytest.fixture(scope="module")
def serving() -> Iterator[Sandbox]:
    """One platform for all: nothing of what is tried here may change it."""
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.fixture
def vip(serving: Sandbox) -> Sandbox:
    """The platform, with an empty journal and nothing going wrong."""
    serving.vip.faults.clear()
    serving.vip.journal.clear()
    return serving


def report(client: VipClient, session: VipSession) -> list[str]:
    """The problems a session is told of, by the check alone and by the step that would send something."""
    with pytest.raises(PreflightFailed, match=r"nothing was sent") as caught:
        preflight(client, session)
    problems = list(caught.value.problems)
    with pytest.raises(PreflightFailed) as again:
        send(client, session)
    assert list(again.value.problems) == problems
    for problem in problems:
        assert problem in str(caught.value)
    return problems


# -- key and address ---------------------------------------------------------------------------------------------------


def test_wrong_key_is_one_error_without_a_retry(vip: Sandbox, connect: Connect, new_session: NewSession) -> None:
    session = new_session("EveryType/1.0", {"text": "x"}, name="wrong-key", files={"a.txt": b"1"})
    vip.vip.journal.clear()
    with pytest.raises(AuthenticationError, match=r"code 8002.*Put a valid API key.*nothing is lost") as caught:
        send(connect("not-a-key"), session)
    assert not is_transient(caught.value)
    assert [entry.status for entry in vip.vip.journal].count(401) == 1
    assert effects(vip) == []
    assert send(connect(), session).sent == 1


def test_locked_account_is_told_as_such(connect: Connect) -> None:
    with refused(8004, 401, kind=AuthenticationError):
        connect("dave").check_key()


@pytest.mark.parametrize("path", ["/nothing", "/nothing/rest", "/index.html"])
def test_wrong_address_names_what_was_tried(vip: Sandbox, connect: Connect, path: str) -> None:
    with VipClient(vip.vip.url + path, "key") as client:
        with pytest.raises(UnexpectedResponse, match="No CARMIN platform found") as caught:
            client.pipelines()
        assert f"{vip.vip.url}{path.removesuffix('/rest')}/rest/platform" in str(caught.value)
        assert not is_transient(caught.value)
    assert effects(vip) == []


def test_address_with_rest_and_slashes_is_understood(vip: Sandbox) -> None:
    for suffix in ("", "/", "/rest", "/rest/"):
        with VipClient(vip.vip.url + suffix, vip.ready()["vip"]["api_key"]) as client:
            client.check_key()


def test_another_service_at_the_address_is_not_taken_for_a_platform(vip: Sandbox) -> None:
    vip.vip.faults.add(Fault(path="/platform", status=200, body='{"status": "up"}', content_type="application/json"))
    with VipClient(vip.vip.url, "key") as client, pytest.raises(UnexpectedResponse, match="No CARMIN platform found"):
        client.pipelines()


def test_nobody_at_the_address(no_pauses: None) -> None:
    with (
        VipClient("http://127.0.0.1:9", "key") as client,
        pytest.raises(ConnectionFailed, match=r"http://127\.0\.0\.1:9"),
    ):
        client.pipelines()


@pytest.mark.parametrize("url", ["vip.example.org", "ftp://vip.example.org", "https://user:secret@vip.example.org", ""])
def test_address_that_is_none(url: str) -> None:
    with VipClient(url, "key") as client, pytest.raises(ConfigurationError) as caught:
        client.pipelines()
    assert "secret" not in str(caught.value)


def test_html_instead_of_an_answer_names_the_url(vip: Sandbox, client: VipClient) -> None:
    assert client.profile.name == "vip"
    vip.vip.faults.add(Fault(path="/rest/", status=200, body="<!doctype html><html>Maintenance</html>"))
    calls: list[Callable[[], object]] = [
        client.pipelines,
        lambda: client.pipeline("EveryType/1.0"),
        client.workflows,
        lambda: client.workflow("workflow-abcdef"),
        lambda: client.exists("/vip/Home"),
        lambda: client.list_folder("/vip/Home"),
        lambda: client.make_folder("/vip/Home/x"),
        lambda: client.results("workflow-abcdef"),
        lambda: client.delete("/vip/Home/x"),
    ]
    for call in calls:
        with pytest.raises(UnexpectedResponse, match=f"{re.escape(vip.vip.url)}/rest/.*an HTML page.*Check the URL"):
            call()


@pytest.mark.parametrize(
    ("pipeline_id", "told"),
    [
        ("CardioFlow/2.0", "It belongs to a group you are not in. Join the group on the portal"),
        ("GreyMatter/0.9", "pipeline 'GreyMatter/0.9'"),
        ("NoSuch/1.0", "pipeline 'NoSuch/1.0'"),
        ("x", "pipeline 'x'"),
    ],
)
def test_pipeline_one_may_not_use(
    vip: Sandbox, client: VipClient, new_session: NewSession, pipeline_id: str, told: str
) -> None:
    with pytest.raises(BiomedError, match=re.escape(told)):
        client.pipeline(pipeline_id)
    (problem,) = report(client, new_session(pipeline_id, {"text": "x"}, files={"a.txt": b"1"}))
    assert told in problem
    assert effects(vip) == []


# -- inputs ------------------------------------------------------------------------------------------------------------


def test_missing_and_empty_input_folders(
    vip: Sandbox, client: VipClient, new_session: NewSession, tmp_path: Path
) -> None:
    (problem,) = report(client, new_session(input_dir=tmp_path / "nowhere"))
    assert problem == f"The input folder {tmp_path / 'nowhere'} does not exist."
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (problem,) = report(client, new_session(input_dir=tmp_path / "empty"))
    assert problem == f"The input folder {tmp_path / 'empty'} holds no file."
    (tmp_path / "file").write_text("x")
    (problem,) = report(client, new_session(input_dir=tmp_path / "file"))
    assert "does not exist" in problem
    assert effects(vip) == []


def test_unreadable_file(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    session = new_session(files={"a.txt": b"1", "gone": b"2"})
    assert session.input_dir is not None
    (session.input_dir / "gone").unlink()
    (session.input_dir / "gone").symlink_to("nowhere")
    (problem,) = report(client, session)
    assert problem == f"{session.input_dir}/gone cannot be read: No such file or directory."
    assert effects(vip) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_file_and_folder_without_permission(client: VipClient, new_session: NewSession) -> None:
    session = new_session(files={"a.txt": b"1", "sub/b.txt": b"2"})
    assert session.input_dir is not None
    (session.input_dir / "a.txt").chmod(0)
    (session.input_dir / "sub").chmod(0)
    try:
        problems = report(client, session)
    finally:
        (session.input_dir / "sub").chmod(0o755)
    assert len([problem for problem in problems if "cannot be read: Permission denied" in problem]) == 2


@pytest.mark.parametrize(
    ("pipeline_id", "settings", "told"),
    [
        ("EveryType/1.0", {"text": "it's"}, "'text' has characters VIP refuses in \"it's\""),
        ("", {"text": "x"}, "pipeline_id is ''. Give the pipeline to run"),
        ("EveryType/1.0/", {"text": "x"}, "pipeline_id is 'EveryType/1.0/', which the platform calls 'EveryType/1.0'"),
        ("EveryType/1.0", {"text": None}, "'text' has no value (None)"),
        ("EveryType/1.0", {"text": ["x", None]}, "'text' has no value (None)"),
        ("EveryType/1.0", {"text": []}, "'text' is an empty list"),
        ("EveryType/1.0", {}, "'text' is missing"),
        ("EveryType/1.0", {"text": "x", "nme": 1}, "has no parameter 'nme'"),
        ("EveryType/1.0", {"text": "x", "count": "many"}, "'count' is 'many': expected is a whole number"),
        ("EveryType/1.0", {"text": "x", "file": "b.txt"}, "the file 'b.txt' is not in the input folder"),
        ("EveryType/1.0", {"text": "x", "file": "/vip/Home/x"}, "/vip/Home/x does not exist on the platform"),
        (
            "PairwiseDifference/1.0",
            {"fixed": ["a.txt", "a.txt"], "moving": ["a.txt"]},
            "need equal lengths: fixed has 2, moving has 1",
        ),
        ("EveryType/1.0", {"text": ["x"] * 1001}, "The settings make 1001 jobs, the limit is 1000"),
    ],
)
def test_settings_that_cannot_work(
    vip: Sandbox, client: VipClient, new_session: NewSession, pipeline_id: str, settings: dict[str, object], told: str
) -> None:
    session = new_session(pipeline_id, settings, files={"a.txt": b"1"})
    problems = report(client, session)
    assert len(problems) == 1
    assert told in problems[0]
    with pytest.raises(PreflightFailed):
        launch(client, session, 1)
    assert effects(vip) == []
    assert vip.vip.journal.entries("POST") == []


def test_everything_wrong_at_once_is_in_one_report(vip: Sandbox, client: VipClient, new_session: NewSession) -> None:
    settings = {
        "text": None,
        "comment": "50%",
        "count": 1.5,
        "ratio": "half",
        "flag": "maybe",
        "file": "nowhere.txt",
        "files": ["a b.txt", "/vip/Home/none"],
        "words": [],
        "unknown": 1,
        "results-directory": "/vip/Home",
    }
    session = new_session(
        "EveryType/1.0", settings, files={"a b.txt": b"1", "a_b.txt": b"2", "zero": b"", "日本": b"3"}
    )
    problems = report(client, session)
    expected = [
        "would both be stored as 'a_b.txt'",
        "'zero' is empty",
        "'日本' has no character the platform can store",
        "'text' has no value (None)",
        "'comment' has characters VIP refuses in '50%': '%'",
        "'count' is 1.5",
        "'ratio' is 'half'",
        "'flag' is 'maybe'",
        "the file 'nowhere.txt' is not in the input folder",
        "/vip/Home/none does not exist on the platform",
        "'words' is an empty list",
        "has no parameter 'unknown'",
        "'results-directory' is set for each run",
    ]
    assert len(problems) == len(expected)
    for text in expected:
        assert [text in problem for problem in problems].count(True) == 1, text
    assert effects(vip) == []


# -- session files -----------------------------------------------------------------------------------------------------

Step = Callable[[VipClient, VipSession], object]
NOTHING_TO_SEND = Preflight(files=(), folders=(), input_values={}, jobs=1)
STEPS: dict[str, Step] = {
    "upload": lambda client, session: upload(client, session, NOTHING_TO_SEND),
    "launch": lambda client, session: start(client, session),
    "monitor": lambda client, session: wait(client, session),
    "download": lambda client, session: download(client, session),
    "finish": lambda client, session: finish(client, session),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"session_name": "session", "work', "is damaged or not a session file"),
        (b'{"a": 1}', "is damaged or not a session file"),
        (
            b'{"session_name": "other", "pipeline_id": null, "vip_output_dir": "/vip/Home/API/other/OUTPUTS",'
            b' "input_settings": {}, "workflows": {}}',
            "belongs to session 'other', not to 'session'",
        ),
    ],
    ids=["cut", "no session", "another"],
)
def test_session_file_that_cannot_be_used_stays_as_it_is(
    vip: Sandbox, client: VipClient, new_session: NewSession, step: str, content: bytes, told: str
) -> None:
    session = new_session("EveryType/1.0", {"text": "x"})
    session.output_dir.mkdir(parents=True)
    path = session.output_dir / "session_data.json"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=re.escape(str(path)) + ".*" + re.escape(told)) as caught:
        STEPS[step](client, session)
    assert "left as it" in str(caught.value)
    assert path.read_bytes() == content
    assert effects(vip) == []


@pytest.fixture
def locked_elsewhere(new_session: NewSession) -> Iterator[tuple[VipSession, bytes]]:
    """A session whose file and steps another process holds."""
    session = new_session("EveryType/1.0", {"text": "x"})
    with SessionFile(session).edit():
        pass
    script = (
        "import sys, time\n"
        "from prefect_biomed.clients.vip import SessionFile, VipSession\n"
        "file = SessionFile(VipSession.model_validate_json(sys.argv[1]))\n"
        "with file.exclusive('launch-1'), file.exclusive('download'), file.exclusive('finish'), file.edit():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, session.model_dump_json()], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield session, (session.output_dir / "session_data.json").read_bytes()
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_session_locked_by_another_process_is_told_and_left_alone(
    vip: Sandbox, client: VipClient, locked_elsewhere: tuple[VipSession, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, before = locked_elsewhere
    monkeypatch.setattr(SessionFile.__init__, "__kwdefaults__", {"lock_seconds": 0.05})
    for name in ("upload", "launch", "download", "finish"):
        with pytest.raises(
            SessionLocked, match=r"is locked: another process holds .*Wait for it, or stop it"
        ) as caught:
            STEPS[name](client, session)
        assert is_transient(caught.value)
    assert (session.output_dir / "session_data.json").read_bytes() == before
    assert effects(vip) == []
    assert open_session(session.output_dir) == session


def test_two_launches_of_one_run_at_once_make_one_execution(client: VipClient, new_session: NewSession) -> None:
    """The second waits for the first and finds what it launched."""
    session = new_session("EveryType/1.0", {"text": "x"}, name="raced")
    script = (
        "import sys\n"
        "from prefect_biomed.clients.vip import VipClient, VipSession, launch\n"
        "session = VipSession.model_validate_json(sys.argv[3])\n"
        "print(launch(VipClient(sys.argv[1], sys.argv[2]), session, 1).identifier)\n"
    )
    arguments = [sys.executable, "-c", script, client.url, client._key(), session.model_dump_json()]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.communicate(timeout=60)[0].strip() for process in processes}
    (workflow,) = (workflow for workflow in client.workflows() if workflow.name == session.workflow_name(1))
    assert told == {workflow.identifier}
    assert [process.returncode for process in processes] == [0, 0]


# -- archives ----------------------------------------------------------------------------------------------------------


def tarball(*members: tuple[str, bytes, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info, io.BytesIO(b""))
    return buffer.getvalue()


def million() -> bytes:
    """A zip whose directory claims a million members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "")
    raw = buffer.getvalue()
    end = raw.rindex(b"PK\x05\x06")
    count = (1_000_000).to_bytes(8, "little")
    record = b"PK\x06\x06" + (44).to_bytes(8, "little") + bytes([45, 0, 45, 0]) + bytes(8) + count * 2 + bytes(16)
    return raw[:end] + record + raw[end:]


@pytest.mark.parametrize(
    "content",
    [
        tarball(("good", tarfile.REGTYPE, ""), ("../x", tarfile.REGTYPE, "")),
        tarball(("/tmp/x-from-archive", tarfile.REGTYPE, "")),
        tarball(("link", tarfile.SYMTYPE, "/tmp"), ("link/x-from-archive", tarfile.REGTYPE, "")),
        tarball(("link", tarfile.SYMTYPE, "../../..")),
        tarball(*((f"m{number}", tarfile.DIRTYPE, "") for number in range(201))),
        million(),
    ],
    ids=["parent", "absolute", "through a link", "link out", "many members", "a million members"],
)
def test_archive_that_would_do_harm_is_refused_and_kept_as_it_is(
    client: VipClient, new_session: NewSession, tmp_path: Path, content: bytes, request: pytest.FixtureRequest
) -> None:
    """What a pipeline returns is not trusted: nothing is written outside of the folder, or half."""
    name = re.sub("[^a-z]", "-", request.node.callspec.id)
    session = new_session(
        "CopyFile/1.0", {"file": ["bad.tgz", "good.txt"]}, name=name, files={"bad.tgz": content, "good.txt": b"1"}
    )
    run(client, session)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(session.output_dir)}
    summary = download(client, session, limits=ArchiveLimits(max_members=200))
    ((path, reason),) = summary.packed.items()
    assert path.endswith("/bad.tgz")
    assert "bad.tgz was not unpacked" in reason
    found = {path.rpartition("/")[2]: data for path, data in files_in(session.output_dir).items()}
    assert found == {"bad.tgz": content, "good.txt": b"1"}
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(session.output_dir)} == before
    assert not Path("/tmp/x-from-archive").exists()
    assert ArchiveLimits().max_members < 1_000_000
