"""`session_data.json`: shared with vip-client, whole after every crash, changed by one process at a time."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_biomed.clients.errors import ConfigurationError, LedgerError, LocalStorageError, is_transient
from prefect_biomed.clients.vip.models import PathEntry, SessionOptions, VipSession, Workflow
from prefect_biomed.clients.vip.session_file import SessionFile, SessionLocked, open_intents, open_session
from prefect_biomed.clients.vip.session_record import LaunchRecord, SessionRecord, UploadedFile

FILE = "session_data.json"


def of_vip_client(folder: Path) -> dict[str, Any]:
    """What vip-client 0.1.10 writes after a session with two workflows, one of which is cleaned already."""
    return {
        "session_name": "brains",
        "pipeline_id": "Free Surf (x)/0.3.7",
        "local_input_dir": "data/input",
        "local_output_dir": str(folder),
        "vip_input_dir": "/vip/Home/API/brains/INPUTS",
        "vip_output_dir": "/vip/Home/API/brains/OUTPUTS",
        "input_settings": {
            "nifti": "/vip/Home/API/brains/INPUTS/a.nii",
            "directives": ["-all", "-qcache"],
            "n": 3,
            "flag": "true",
        },
        "workflows": {
            "workflow-aaaaaa": {"status": "Removed", "start": "2026/01/02 03:04:05", "outputs": []},
            "workflow-bbbbbb": {
                "status": "Running",
                "start": "2026/01/02 03:05:06",
                "outputs": [
                    {
                        "path": "/vip/Home/API/brains/OUTPUTS/2026-01-02_030506/a.tgz",
                        "isDirectory": False,
                        "size": 12,
                        "exists": True,
                    },
                    {"path": "/vip/Home/API/brains/OUTPUTS/2026-01-02_030506/b.txt"},
                ],
            },
        },
    }


def of_vip_launcher() -> dict[str, Any]:
    content = of_vip_client(Path())
    for key in ("local_input_dir", "local_output_dir", "vip_input_dir"):
        del content[key]
    return content


def put(folder: Path, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=4))
    return path


@pytest.fixture
def session(tmp_path: Path) -> VipSession:
    return VipSession(
        session_name="brains",
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "a.nii", "threshold": 0.4, "files": ["a", None]},
        input_dir=tmp_path / "in",
        output_dir=tmp_path / "out",
        vip_input_dir="/vip/Home/API/brains/INPUTS",
        vip_output_dir="/vip/Home/API/brains/OUTPUTS",
        nb_runs=2,
        token="t0k3n",
    )


# -- together with vip-client ------------------------------------------------------------------------------------------


def test_session_of_vip_client_is_opened(tmp_path: Path) -> None:
    put(tmp_path, of_vip_client(tmp_path))
    session = open_session(tmp_path)
    assert session.session_name == "brains"
    assert session.pipeline_id == "Free Surf (x)/0.3.7"
    assert session.input_dir == Path("data/input")
    assert session.output_dir == tmp_path
    assert session.vip_input_dir == "/vip/Home/API/brains/INPUTS"
    assert session.input_settings["directives"] == ["-all", "-qcache"]
    assert session.input_settings["n"] == 3
    record = SessionFile(session).read()
    assert record.workflow_ids() == ["workflow-bbbbbb"]
    assert record.workflow_ids("Removed") == ["workflow-aaaaaa"]
    assert record.workflow_ids("Running", "Removed") == ["workflow-aaaaaa", "workflow-bbbbbb"]


def test_file_of_vip_client_comes_back_as_it_was(tmp_path: Path) -> None:
    before = of_vip_client(tmp_path) | {"something_new": {"a": [1, None]}}
    before["workflows"]["workflow-bbbbbb"]["custom"] = "kept"
    path = put(tmp_path, before)
    with SessionFile(open_session(tmp_path)).edit() as record:
        record.ledger.uploads["a.nii"] = UploadedFile(size=1, mtime_ns=2, sha256="3")
    after = json.loads(path.read_text())
    assert after.pop("prefect_biomed")["uploads"] == {"a.nii": {"size": 1, "mtime_ns": 2, "sha256": "3"}}
    assert after == before
    assert list(after) == list(before)


def test_our_file_has_what_vip_client_asks_for(session: VipSession) -> None:
    with SessionFile(session).edit() as record:
        record.note_workflow(
            Workflow.model_validate(
                {
                    "identifier": "workflow-cccccc",
                    "status": "Running",
                    "startDate": 1767225600000,
                    "returnedFiles": None,
                }
            )
        )
    written = json.loads((session.output_dir / FILE).read_text())
    # vip-client refuses a file that lacks one of these.
    assert set(of_vip_client(Path())) <= set(written)
    entry = written["workflows"]["workflow-cccccc"]
    assert set(entry) == {"status", "start", "outputs"}
    assert re.fullmatch(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d", entry["start"])
    assert time.mktime(time.strptime(entry["start"], "%Y/%m/%d %H:%M:%S")) == 1767225600


def test_file_of_a_launcher_has_fewer_keys(tmp_path: Path) -> None:
    put(tmp_path, of_vip_launcher())
    session = open_session(tmp_path)
    assert session.input_dir is None
    assert session.vip_input_dir == "/vip/Home/API/brains/INPUTS"


def test_file_vip_client_has_rewritten_keeps_our_ledger(session: VipSession) -> None:
    with SessionFile(session).edit() as record:
        record.ledger.downloaded = ["workflow-x"]
    path = session.output_dir / FILE
    content = json.loads(path.read_text())
    content["workflows"]["workflow-y"] = {"status": "Finished", "start": "2026/01/01 00:00:00", "outputs": []}
    path.write_text(json.dumps(content, indent=4, sort_keys=True))
    record = SessionFile(session).read()
    assert record.ledger.downloaded == ["workflow-x"]
    assert list(record.ledger.intents) == ["t0k3n"]
    assert record.workflow_ids() == ["workflow-y"]


# -- round trip --------------------------------------------------------------------------------------------------------


def test_session_is_made_again_from_its_file_alone(session: VipSession) -> None:
    with SessionFile(session).edit():
        pass
    assert open_session(session.output_dir) == session
    assert open_session(session.output_dir, session_name="brains") == session


def test_nothing_is_written_before_something_happens(session: VipSession) -> None:
    assert SessionFile(session).read() == SessionRecord.of(session)
    assert not session.output_dir.exists()


def test_workflows_are_updated_and_removed_ones_stay_removed(session: VipSession) -> None:
    record = SessionRecord.of(session)

    def at(status: str, returned: object = None) -> Workflow:
        return Workflow.model_validate(
            {"identifier": "w", "status": status, "startDate": 1767225600000, "returnedFiles": returned}
        )

    record.note_workflow(at("Running"))
    assert record.workflows["w"].outputs == []
    record.note_workflow(at("Finished", {"a": ["/vip/x", "/vip/y"]}))
    record.note_outputs("w", [PathEntry(path="/vip/x", size=3)])
    assert record.workflows["w"].outputs == [{"path": "/vip/x", "isDirectory": False, "exists": True, "size": 3}]
    # A list of executions tells no outputs; what is known stays.
    record.note_workflow(at("Finished"))
    assert record.workflows["w"].outputs[0]["size"] == 3
    record.note_workflow(at("Finished", {"a": ["/vip/x", "/vip/z"]}))
    assert record.workflows["w"].outputs[1] == {"path": "/vip/z"}
    record.workflows["w"].status = "Removed"
    record.note_workflow(at("Finished"))
    assert record.workflows["w"].status == "Removed"


def test_failed_change_is_not_written(session: VipSession) -> None:
    file = SessionFile(session)
    with file.edit() as record:
        record.ledger.downloaded = ["a"]
    before = file.path.read_bytes()
    with pytest.raises(ZeroDivisionError), file.edit() as record:
        record.ledger.downloaded = ["a", "b"]
        raise ZeroDivisionError
    assert file.path.read_bytes() == before


# -- files that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 2.5, "3", "2.5"])
def test_record_of_a_later_version_asks_for_the_newer_package(
    tmp_path: Path, session: VipSession, version: object
) -> None:
    """It may hold what this version would lose, whatever else has changed in it."""
    session = session.model_copy(update={"output_dir": tmp_path})
    path = put(tmp_path, json.dumps({**of_vip_client(Path()), "prefect_biomed": {"version": version, "intents": []}}))
    before = path.read_bytes()
    later = r"session_data\.json: .*'brains' was written by a later version of prefect-biomed\. Update the package"
    with pytest.raises(LedgerError, match=later):
        SessionFile(session).read()
    with pytest.raises(LedgerError, match=later), SessionFile(session).edit():
        raise AssertionError
    with pytest.raises(LedgerError, match=later):
        open_session(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "{}",
        "\x00" * 100,
        json.dumps({**of_vip_client(Path()), "workflows": []}),
        json.dumps({**of_vip_client(Path()), "workflows": {"w": {"start": "x"}}}),
        json.dumps({**of_vip_client(Path()), "session_name": None}),
        json.dumps({key: value for key, value in of_vip_client(Path()).items() if key != "vip_output_dir"}),
        json.dumps({**of_vip_client(Path()), "prefect_biomed": {"version": "one", "token": "abcd"}}),
        json.dumps({**of_vip_client(Path()), "prefect_biomed": {"version": 1}}),
    ],
)
def test_damaged_file_is_an_error_and_left_as_it_is(tmp_path: Path, session: VipSession, damage: str) -> None:
    session = session.model_copy(update={"output_dir": tmp_path})
    path = put(tmp_path, damage)
    before = path.read_bytes()
    file = SessionFile(session)
    with pytest.raises(LedgerError, match=r"session_data\.json is damaged.*left as it is") as caught:
        file.read()
    assert not is_transient(caught.value)
    with pytest.raises(LedgerError, match="damaged"), file.edit():
        pytest.fail("the file was opened for a change")
    with pytest.raises(LedgerError, match="damaged"):
        open_session(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("folder", ["", "/", "/vip/Home", "vip/Home/API/s", "/vip/Home/API/../..", "/vip/Home/./."])
def test_folder_that_no_session_may_remove_is_damage(tmp_path: Path, folder: str) -> None:
    put(tmp_path, of_vip_client(tmp_path) | {"vip_output_dir": folder})
    with pytest.raises(LedgerError, match=r"damaged.*vip_output_dir: .*is not the whole path"):
        open_session(tmp_path)
    if folder:
        put(tmp_path, of_vip_client(tmp_path) | {"vip_input_dir": folder})
        with pytest.raises(LedgerError, match=r"damaged.*vip_input_dir: .*is not the whole path"):
            open_session(tmp_path)


def test_text_that_is_no_unicode_is_never_written(session: VipSession, tmp_path: Path) -> None:
    """Python keeps bytes of names so; a file that held them could not be read again."""
    file = SessionFile(session)
    with file.edit() as record:
        record.ledger.resume = "\U0001f600"
    before = file.path.read_bytes()
    for text in ("\udcff", "\U0001f600\ud83d"):
        with pytest.raises(LedgerError, match="no Unicode"), file.edit() as record:
            record.ledger.resume = text
    assert file.path.read_bytes() == before
    for name in ("input_dir", "output_dir"):
        with pytest.raises(ConfigurationError, match=f"{name}: .*bytes in it that are no text"):
            VipSession.planned(**{**dict(session), name: tmp_path / "in\udcff"})


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\xfe{}")
    with pytest.raises(LedgerError, match="damaged"):
        open_session(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"session_name": "a.b"},
        {"input_settings": {"a": "x"}, "prefect_biomed": {"token": "NOT LOWER"}},
    ],
)
def test_values_no_session_can_have_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = put(tmp_path, of_vip_client(tmp_path) | change)
    with pytest.raises(LedgerError, match=re.escape(str(path))):
        open_session(tmp_path)


def test_file_of_another_session_is_refused_and_left(tmp_path: Path, session: VipSession) -> None:
    path = put(session.output_dir, of_vip_client(session.output_dir) | {"session_name": "other"})
    before = path.read_bytes()
    file = SessionFile(session)
    for attempt in (file.read, lambda: file.edit().__enter__()):
        with pytest.raises(LedgerError, match="belongs to session 'other', not to 'brains'"):
            attempt()
    with pytest.raises(LedgerError, match="belongs to session 'other'"):
        open_session(session.output_dir, session_name="brains")
    assert path.read_bytes() == before


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"There is no .*session_data\.json"):
        open_session(tmp_path)


# -- other processes ---------------------------------------------------------------------------------------------------

_CHILD = """
import sys, time
from pathlib import Path
from prefect_biomed.clients.vip.session_file import (SessionFile, open_session)
from prefect_biomed.clients.vip.session_record import (UploadedFile)
file = SessionFile(open_session(Path(sys.argv[1])))
"""


def child(folder: Path, script: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", _CHILD + script, str(folder)], stdout=subprocess.PIPE)


def test_lock_of_another_process_is_respected_and_told(tmp_path: Path) -> None:
    path = put(tmp_path, of_vip_client(tmp_path))
    before = path.read_bytes()
    session = open_session(tmp_path)
    holding = "with file.exclusive('launch-1'), file.edit():\n    print('held', flush=True); time.sleep(60)\n"
    with child(tmp_path, holding) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        file = SessionFile(session, lock_seconds=0.1)
        for enter in (lambda: file.edit().__enter__(), lambda: file.exclusive("launch-1").__enter__()):
            with pytest.raises(SessionLocked, match="another process holds") as caught:
                enter()
            assert is_transient(caught.value)
        with file.exclusive("launch-2"):
            pass  # another step is free
        assert file.read().workflow_ids() == ["workflow-bbbbbb"]  # and reading always works
        assert path.read_bytes() == before
        other.send_signal(signal.SIGKILL)
    # A lock dies with its process.
    with SessionFile(session, lock_seconds=0.1).edit() as record:
        record.ledger.downloaded = ["x"]


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    put(tmp_path, of_vip_client(tmp_path))
    session = open_session(tmp_path)
    writing = (
        "for count in range(10**6):\n"
        "    with file.edit() as record:\n"
        "        record.ledger.uploads = {f'{count}-{i}': UploadedFile(size=i, mtime_ns=0, sha256='0' * 64)"
        " for i in range(300)}\n"
        "    if count == 0: print('writing', flush=True)\n"
    )
    for pause in (0.0, 0.013, 0.041):
        with child(tmp_path, writing) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"writing\n"
            time.sleep(pause)
            other.send_signal(signal.SIGKILL)
        uploads = SessionFile(session, lock_seconds=5).read().ledger.uploads
        assert len(uploads) == 300
        assert len({name.split("-")[0] for name in uploads}) == 1


def test_changes_of_many_threads_are_all_kept(session: VipSession) -> None:
    def add(number: int) -> None:
        with SessionFile(session).edit() as record:
            record.ledger.launches[str(number)] = LaunchRecord.model_validate(
                {"intended": "2026-01-01T00:00:00Z", "results_location": "/vip"}
            )

    threads = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(SessionFile(session).read().ledger.launches) == 16


def test_link_that_leads_nowhere_is_not_taken_for_a_session_to_which_nothing_has_happened(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / FILE).symlink_to(tmp_path / "disk-that-is-not-there" / FILE)
    with pytest.raises(LocalStorageError, match=str(folder)):
        open_session(folder)
    assert (folder / FILE).is_symlink()


# -- properties --------------------------------------------------------------------------------------------------------

_TOKENS = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=4, max_size=12)
_SETTINGS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.one_of(st.text(max_size=8), st.booleans(), st.integers(-(2**63), 2**63), st.lists(st.text(max_size=4))),
    max_size=3,
)
_INTENTS = st.lists(
    st.tuples(_TOKENS, st.text(min_size=1, max_size=8), _SETTINGS, st.integers(1, 1000), st.booleans()),
    min_size=1,
    max_size=4,
    unique_by=lambda intent: intent[0],
)


@given(_INTENTS)
def test_every_intent_comes_back_as_it_was_intended(intents: list[tuple[str, str, dict[str, Any], int, bool]]) -> None:
    """Also when a program that knows nothing of our part has written the file in between, as vip-client does."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = [
            VipSession(
                session_name="brains",
                pipeline_id=pipeline,
                input_settings=settings,
                output_dir=Path(folder),
                vip_input_dir="/vip/Home/API/brains/INPUTS",
                vip_output_dir="/vip/Home/API/brains/OUTPUTS",
                nb_runs=nb_runs,
                token=token,
                options=SessionOptions(strict=strict, unzip=not strict),
            )
            for token, pipeline, settings, nb_runs, strict in intents
        ]
        for session in sessions:
            with SessionFile(session).edit() as record:
                record.note_intent(session)
            path = Path(folder, FILE)
            theirs = json.loads(path.read_text())
            # What vip-client reads is the newest.
            assert (theirs["pipeline_id"], theirs["session_name"]) == (session.pipeline_id, "brains")
            assert theirs["input_settings"] == json.loads(json.dumps(session.input_settings))
            path.write_text(json.dumps(theirs, indent=4, sort_keys=False))
        assert open_intents(Path(folder)) == sessions


@given(_TOKENS, _SETTINGS, st.integers(1, 1000), st.booleans())
def test_file_of_the_release_before_is_one_intent(
    token: str, settings: dict[str, Any], nb_runs: int, launched: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours: dict[str, Any] = {"version": 1, "token": token, "nb_runs": nb_runs, "downloaded": ["workflow-bbbbbb"]}
        workflows = of_vip_client(Path(folder))["workflows"] if launched else {}
        put(
            Path(folder),
            of_vip_client(Path(folder)) | {"input_settings": settings, "workflows": workflows, "prefect_biomed": ours},
        )
        session = open_session(Path(folder))
        assert (session.token, session.nb_runs) == (token, nb_runs)
        assert json.dumps(session.input_settings) == json.dumps(settings)
        with SessionFile(session).edit() as record:
            assert record.ledger.downloaded == ["workflow-bbbbbb"]
            assert record.ledger.intents[token].inputs.is_complete is (True if launched else None)
        assert open_session(Path(folder)) == session
