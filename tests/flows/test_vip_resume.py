"""A session is taken up from its record alone: what was intended is done, as it was asked for when it was begun."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from harness.laboratory import wait_until
from harness.vip_steps import launch_others
from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import AuthenticationError, BiomedError, ConfigurationError
from prefect_biomed.clients.vip import (
    SessionFile,
    VipSession,
    WorkflowFailed,
    kill,
    open_intents,
    preflight,
    upload,
)
from prefect_biomed.flows.vip import vip_collect, vip_kill, vip_resume, vip_session
from prefect_biomed.flows.vip_parameters import Outputs, Removal, SessionUpload, SessionWaiting
from prefect_biomed.sandbox import Fault, Sandbox

pytestmark = pytest.mark.usefixtures("prefect_api")

BAD_KEY = {"status": 401, "content_type": "application/json", "body": '{"errorCode":8002,"errorMessage":"bad key"}'}
Credentials = Callable[[Sandbox], VipCredentials]


def account(sandbox: Sandbox) -> VipCredentials:
    ready = sandbox.ready()["vip"]
    return VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"], parallelism=1)


@pytest.fixture
def credentials(vip: Sandbox) -> VipCredentials:
    return account(vip)


@pytest.fixture
def carmin() -> Iterator[Sandbox]:
    with Sandbox("vip", vip={"profile": "carmin"}) as sandbox:
        yield sandbox


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    return tmp_path / "in"


@pytest.mark.parametrize("backup", ["local", "vip", None])
def test_half_uploaded_folder_is_completed_before_the_launch(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path, backup: Any
) -> None:
    vip.vip.switches.delete_seconds = 0
    vip.vip.faults.add(Fault(method="PUT", path="c.txt$", **BAD_KEY))
    with pytest.raises(AuthenticationError):
        vip_session(
            credentials,
            "FolderChecksums/1.0",
            {"folder": "sub"},
            input_dir=folder,
            output_dir=tmp_path / "out",
            session_name="half",
            refresh_time=0.1,
            upload=SessionUpload(backup_location=backup, exclude=("b.txt",)),
        )
    vip.vip.faults.clear()
    result = vip_resume(credentials, session_name="half", output_dir=tmp_path / "out", refresh_time=0.1)
    (files,) = result.files.values()
    assert len(files) == 2
    assert result.is_finished


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["vip", "carmin"])
@pytest.mark.parametrize("backup", ["local", "vip"])
def test_inputs_that_somebody_deleted_are_sent_again_before_the_launch(
    folder: Path, tmp_path: Path, profile: str, backup: Any
) -> None:
    with Sandbox("vip", vip={"profile": profile, "delete_seconds": 0}) as sandbox:
        credentials, home = account(sandbox), "/vip/Home/API" if profile == "vip" else "/alice"
        sandbox.vip.faults.add(Fault(method="POST", path="/executions$", **BAD_KEY))
        with pytest.raises(AuthenticationError):
            vip_session(
                credentials,
                "FolderChecksums/1.0" if profile == "vip" else "boutiques_CopyFile_1.0.json",
                {"folder": "sub"} if profile == "vip" else {"file": "sub/b.txt"},
                input_dir=folder,
                output_dir=tmp_path / "out",
                session_name="holes",
                upload=SessionUpload(backup_location=backup, vip_home=home),
            )
        sandbox.vip.faults.clear()
        with credentials.get_client() as client:
            client.delete(f"{home}/holes/INPUTS/sub/b.txt")
        result = vip_resume(
            credentials, session_name="holes", output_dir=tmp_path / "out", vip_home=home, refresh_time=0.1
        )
        (files,) = result.files.values()
        assert len(files) == (3 if profile == "vip" else 1)
        assert len(sandbox.vip.journal.entries("PUT", "b.txt$")) > 1


@pytest.mark.slow
def test_options_of_the_beginning_decide_unless_others_are_given(
    vip: Sandbox, credentials: VipCredentials, input_dir: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"credentials": credentials, "output_dir": tmp_path / "out", "refresh_time": 0.1}
    with pytest.raises(WorkflowFailed, match="1 of 2 jobs failed"):
        vip_session(
            pipeline_id="SliceStatistics/2.0",
            input_settings={"image": ["anatomical.nii"], "slice": [3, 7], "fail_on": 7},
            input_dir=input_dir,
            outputs=Outputs(strict=True),
            removal=Removal(keep_input=True),
            **asked,
        )
    with pytest.raises(WorkflowFailed, match="1 of 2 jobs failed"):
        vip_resume(**asked)
    # One that is scheduled does not remove it either.
    (collected,) = vip_collect(credentials, tmp_path)
    assert not collected.is_finished
    assert [len(problems) for problems in collected.problems.values()] == [1]
    assert not [e for e in vip.vip.journal.entries("DELETE") if e.effect]
    # Something else can be said for once; what is not said stays.
    result = vip_resume(outputs=Outputs(strict=False), **asked)
    assert result.is_finished
    assert result.problems == {}
    with credentials.get_client() as client:
        assert client.exists(result.session.vip_input_dir)
        assert not client.exists(result.session.vip_output_dir)


@pytest.mark.slow
def test_sessions_are_collected_wherever_their_file_is_kept(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path
) -> None:
    vip.vip.switches.delete_seconds = 0
    for backup in ("vip", None):
        vip_session(
            credentials,
            "CopyFile/1.0",
            {"file": "sub/a.txt"},
            input_dir=folder,
            output_dir=tmp_path / "sessions" / str(backup),
            session_name=f"kept-{backup}",
            upload=SessionUpload(backup_location=backup),
            waiting=SessionWaiting(wait=False),
        )
    with credentials.get_client() as client:
        wait_until(lambda: all(w.status.is_terminal for w in client.workflows()), 30, "both have ended")
    (half,) = open_intents(tmp_path / "sessions" / "None")
    _intend(half, runs=2)
    (collected,) = vip_collect(credentials, tmp_path / "sessions")
    assert (collected.session.session_name, collected.is_finished, len(collected.files)) == ("kept-vip", True, 1)
    # Its second run is still to be launched, and needs the inputs.
    _intend(half, runs=1)
    (collected,) = vip_collect(credentials, tmp_path / "sessions")
    assert (collected.session.session_name, collected.is_finished, len(collected.files)) == ("kept-None", True, 1)
    assert vip_collect(credentials, tmp_path / "sessions") == []


def _intend(session: VipSession, runs: int) -> None:
    with SessionFile(session).edit() as record:
        record.ledger.intents[session.token].nb_runs = runs


@pytest.mark.parametrize("strict", [False, True])
def test_finished_without_a_required_output_is_no_success(carmin: Sandbox, tmp_path: Path, strict: bool) -> None:
    credentials, home = account(carmin), carmin.ready()["vip"]["home"]
    asked: dict[str, Any] = {"credentials": credentials, "output_dir": tmp_path / "out", "refresh_time": 0.1}
    with pytest.raises(WorkflowFailed, match="0 of at least 1 outputs"):
        vip_session(
            pipeline_id="boutiques_AlwaysFails_1.0.json",
            input_settings={},
            upload=SessionUpload(vip_home=home),
            outputs=Outputs(strict=strict),
            **asked,
        )
    with pytest.raises(WorkflowFailed, match=r"0 of at least 1 outputs.*outputs=\{.*'accept_incomplete': True\} takes"):
        vip_resume(**asked)
    assert [entry for entry in carmin.vip.journal.entries("DELETE") if entry.effect] == []
    with credentials.get_client() as client:
        (left,) = client.workflows()
        assert "exit code" in client.log(left.identifier)
        assert vip_resume(outputs=Outputs(accept_incomplete=True), **asked).is_finished
        assert client.workflows() == []


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "strict"), [("vip", True), ("carmin", False)])
def test_one_of_three_runs_that_fails_keeps_the_session_until_it_is_accepted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, strict: bool
) -> None:
    with Sandbox("vip", vip={"profile": profile, "delete_seconds": 0}) as sandbox:
        facts, switches = sandbox.ready()["vip"], sandbox.vip.switches
        credentials = account(sandbox)
        asked: dict[str, Any] = {"credentials": credentials, "output_dir": tmp_path / "all" / "s", "refresh_time": 0.1}
        switches.job_seconds = 60
        launched = vip_session(
            pipeline_id="CopyFile/1.0" if profile == "vip" else "boutiques_CopyFile_1.0.json",
            input_settings={"file": "sub/a.txt"},
            input_dir=folder,
            session_name="s",
            nb_runs=3,
            upload=SessionUpload(vip_home="/vip/Home/API" if profile == "vip" else facts["home"]),
            outputs=Outputs(strict=strict),
            waiting=SessionWaiting(wait=False),
            **asked,
        ).workflows
        with credentials.get_client() as client:
            kill(client, [launched[1].identifier])
        switches.job_seconds = 0
        with pytest.raises(WorkflowFailed) as caught:
            vip_resume(**asked)
        assert [one.identifier for one in caught.value.workflows] == [launched[1].identifier]
        told = str(caught.value)
        assert "1 of 3 runs of s failed" in told
        accepted = ast.literal_eval(told.partition("vip_resume with outputs=")[2].partition(" takes")[0])
        assert accepted == {"get_status": ["Finished", "Killed"], **({"strict": False} if strict else {})}
        reported: list[str] = []
        monkeypatch.setattr("prefect_biomed.tasks.vip.markdown", lambda key, *_: reported.append(key))
        (collected,) = vip_collect(credentials, tmp_path / "all")
        assert [key.startswith("vip-failures") for key in reported] == [True], "once"
        assert (list(collected.problems), collected.is_finished) == ([launched[1].identifier], False)
        assert {name for name, files in collected.files.items() if files} == {
            launched[0].identifier,
            launched[2].identifier,
        }
        assert not [entry for entry in sandbox.vip.journal.entries("DELETE") if entry.effect]
        result = vip_resume(outputs=Outputs(**accepted), **asked)
        assert (result.problems, result.is_finished, len(result.workflows)) == ({}, True, 3)
        assert [entry for entry in sandbox.vip.journal.entries("DELETE") if entry.effect]


@pytest.mark.slow
def test_one_name_and_two_pipelines_are_two_intents(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "credentials": credentials,
        "input_dir": folder,
        "output_dir": tmp_path / "out",
        "session_name": "mine",
        "refresh_time": 0.1,
    }
    first = vip_session(pipeline_id="CopyFile/1.0", input_settings={"file": "sub/a.txt"}, **common)
    second = vip_session(
        pipeline_id="EveryType/1.0", input_settings={"text": "x"}, waiting=SessionWaiting(wait=False), **common
    )
    old, new = open_intents(tmp_path / "out")
    assert (old.pipeline_id, new.pipeline_id) == ("CopyFile/1.0", "EveryType/1.0")
    record = json.loads((tmp_path / "out" / "session_data.json").read_text())
    assert (record["pipeline_id"], record["input_settings"]) == ("EveryType/1.0", {"text": "x"})
    result = vip_resume(credentials, output_dir=tmp_path / "out", refresh_time=0.1)
    assert [w.identifier for w in result.workflows] == [w.identifier for w in second.workflows]
    assert all(path.is_file() for paths in first.files.values() for path in paths)
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("backup", ["local", "vip", None])
def test_what_was_intended_last_is_launched_elsewhere_and_not_what_was_done_before(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path, backup: Any
) -> None:
    vip.vip.switches.delete_seconds = 0
    common: dict[str, Any] = {
        "credentials": credentials,
        "input_dir": folder,
        "session_name": "mine",
        "refresh_time": 0.1,
        "upload": SessionUpload(backup_location=backup),
    }
    vip_session(pipeline_id="CopyFile/1.0", input_settings={"file": "sub/a.txt"}, output_dir=tmp_path / "out", **common)
    vip.vip.faults.add(Fault(method="POST", path="/executions$", **BAD_KEY))
    with pytest.raises(AuthenticationError):
        vip_session(
            pipeline_id="CopyFile/1.0", input_settings={"file": "sub/b.txt"}, output_dir=tmp_path / "out", **common
        )
    vip.vip.faults.clear()
    shutil.copytree(tmp_path / "out", tmp_path / "elsewhere")
    folder.rename(tmp_path / "gone")
    result = vip_resume(credentials, output_dir=tmp_path / "elsewhere", refresh_time=0.1)
    ((fetched,),) = result.files.values()
    assert fetched.read_text() == "b"
    assert result.is_finished
    assert len([e for e in vip.vip.journal.entries("POST", "/rest/executions") if e.status == 200]) == 2
    with credentials.get_client() as client:
        assert not client.exists("/vip/Home/API/mine")


@pytest.mark.slow
def test_what_cannot_be_done_of_an_older_intent_does_not_stop_the_newest(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path
) -> None:
    vip.vip.switches.delete_seconds = 0
    common: dict[str, Any] = {"input_dir": folder, "output_dir": tmp_path / "out", "session_name": "mine"}
    older = VipSession.planned(
        pipeline_id="CopyFile/1.0",
        input_settings={"file": "sub/a.txt"},
        vip_input_dir="/vip/Home/API/mine/INPUTS",
        vip_output_dir="/vip/Home/API/mine/OUTPUTS",
        token="0lder",
        **common,
    )
    with credentials.get_client() as client:
        upload(client, older, preflight(client, older))
    vip_session(credentials, "EveryType/1.0", {"text": "x"}, waiting=SessionWaiting(wait=False), **common)
    with credentials.get_client() as client:
        client.delete(f"{older.vip_input_dir}/sub/a.txt")
        folder.rename(tmp_path / "gone")
        with pytest.raises(
            BiomedError, match=r"(?s)with CopyFile/1\.0 and the token 0lder, could not .*The newest was"
        ) as told:
            vip_resume(credentials, output_dir=tmp_path / "out", refresh_time=0.1)
        assert "sub/a.txt" in str(told.value)
        newest = open_intents(tmp_path / "out")[-1]
        assert SessionFile(newest, client).read().workflow_ids() == [], "it is fetched and removed"
        assert client.exists(f"{older.vip_input_dir}/sub/b.txt"), "the older one may still be launched"


@pytest.mark.slow
def test_flows_find_sessions_that_are_among_the_oldest_of_six_hundred_executions(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path
) -> None:
    vip.vip.switches.max_running_user = vip.vip.switches.max_running_platform = 10_000
    vip.vip.switches.delete_seconds = 0
    sessions = tmp_path / "sessions"
    sent: dict[str, Any] = {"credentials": credentials, "input_dir": folder, "waiting": SessionWaiting(wait=False)}
    copied: dict[str, Any] = {"pipeline_id": "CopyFile/1.0", "input_settings": {"file": "sub/a.txt"}, **sent}
    vip_session(**copied, output_dir=sessions / "collected", session_name="collected")
    vip_session(**copied, output_dir=tmp_path / "resumed", session_name="resumed")
    vip.vip.switches.duration_seconds = 300
    slow: dict[str, Any] = {"pipeline_id": "SlowSegmentation/1.0", "input_settings": {"image": "sub/a.txt"}, **sent}
    (running,) = vip_session(**slow, output_dir=tmp_path / "killed", session_name="killed").workflows
    with credentials.get_client() as client:
        launch_others(client, 600)
        listed = client.workflows()
        assert len(listed) == 500
        assert all(one.name.startswith("other") for one in listed), "none of the sessions is listed"
    result = vip_resume(credentials, output_dir=tmp_path / "resumed", refresh_time=0.1)
    assert ([len(files) for files in result.files.values()], result.is_finished) == ([1], True)
    (collected,) = vip_collect(credentials, sessions)
    assert ([len(files) for files in collected.files.values()], collected.is_finished) == ([1], True)
    (killed,) = vip_kill(credentials, output_dir=tmp_path / "killed")
    assert (killed.identifier, killed.status) == (running.identifier, "Killed")
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 3 + 600


def test_collecting_tells_what_is_not_there(
    vip: Sandbox, credentials: VipCredentials, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is missing has no sessions to tell of, and a session of which nothing was launched is open."""
    with pytest.raises(ConfigurationError, match="There is no folder"):
        vip_collect(credentials, tmp_path / "unmounted")
    vip.vip.faults.add(Fault(method="POST", path="/executions$", **BAD_KEY))
    with pytest.raises(AuthenticationError):
        vip_session(
            credentials,
            "CopyFile/1.0",
            {"file": "sub/a.txt"},
            input_dir=folder,
            output_dir=tmp_path / "sessions" / "begun",
            session_name="begun",
        )
    rows: list[dict[str, object]] = []
    monkeypatch.setattr("prefect_biomed.flows.vip.table", lambda key, found, title: rows.extend(found))
    assert vip_collect(credentials, tmp_path / "sessions") == []
    (row,) = rows
    assert (row["session"], row["runs"], row["not launched"]) == ("begun", 0, 1)
