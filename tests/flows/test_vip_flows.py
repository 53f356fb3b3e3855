"""The flows of VIP against the sandbox, with a Prefect API."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.exceptions import ParameterTypeError
from pydantic import SecretStr

from harness.laboratory import wait_until
from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import AuthenticationError, ConfigurationError, LedgerError, PreflightFailed
from prefect_biomed.clients.transfer import transfer_all
from prefect_biomed.clients.vip import JobStatus, StillRunning, VipSession, WorkflowFailed, WorkflowStatus
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.flows.vip import (
    PipelineRun,
    kill_remote_workflows,
    vip_collect,
    vip_kill,
    vip_resume,
    vip_session,
    vip_shared_inputs,
    vip_show_pipeline,
)
from prefect_biomed.flows.vip_parameters import Outputs, Removal, SessionUpload, SessionWaiting, Upload
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.tasks import vip as steps

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def credentials(vip: Sandbox) -> VipCredentials:
    ready = vip.vip.ready()
    return VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"])


@pytest.fixture
def arguments(credentials: VipCredentials, input_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "credentials": credentials,
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": input_dir,
        "output_dir": tmp_path / "out",
        "refresh_time": 0.2,
    }


def artifacts(key: str) -> list[Artifact]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def posts(vip: Sandbox) -> int:
    return len(vip.vip.journal.entries("POST", "/rest/executions"))


def home_of_sessions(vip: Sandbox, credentials: VipCredentials) -> list[str]:
    with credentials.get_client() as client:
        if not client.exists("/vip/Home/API"):
            return []
        return [entry.name for entry in client.list_folder("/vip/Home/API")]


@pytest.mark.slow
def test_session_is_killed_from_its_name_or_its_folder(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any], tmp_path: Path
) -> None:
    vip.vip.switches.duration_seconds = 300
    slow = {"pipeline_id": "SlowSegmentation/1.0", "input_settings": {"image": "anatomical.nii"}}
    arguments = {**arguments, **slow, "waiting": {"wait": False}}
    ways: dict[str, dict[str, Any]] = {
        "by-name": {"session_name": "by-name"},
        "by-folder": {"output_dir": tmp_path / "by-folder"},
    }
    for name, where in ways.items():
        launched = vip_session(**{**arguments, "output_dir": tmp_path / name}, session_name=name, nb_runs=2)
        killed = vip_kill(credentials, **where)
        assert [workflow.identifier for workflow in killed] == [one.identifier for one in launched.workflows]
        assert {workflow.status for workflow in killed} == {WorkflowStatus.KILLED}
    with pytest.raises(ConfigurationError, match="Give session_name or output_dir"):
        vip_kill(credentials)


@pytest.mark.parametrize("profile", ["vip", "carmin"])
def test_resuming_a_finished_session_says_that_it_is_finished(
    profile: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a CARMIN-server that can neither list its executions nor describe those that have ended."""
    monkeypatch.setattr(logging.getLogger("prefect.flow_runs"), "propagate", True)
    caplog.set_level(logging.INFO, logger="prefect.flow_runs")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"a")
    pipeline, home = (
        ("CopyFile/1.0", "/vip/Home/API") if profile == "vip" else ("boutiques_CopyFile_1.0.json", "/alice")
    )
    with Sandbox("vip", vip={"profile": profile, "carmin_stock": True}) as sandbox:
        account = VipCredentials(url=sandbox.vip.url, api_key=SecretStr(sandbox.ready()["vip"]["api_key"]))
        where: dict[str, Any] = {"output_dir": tmp_path / "out", "session_name": "done", "refresh_time": 0.2}
        first = vip_session(
            account,
            pipeline,
            {"file": "a.bin"},
            input_dir=tmp_path / "in",
            upload=SessionUpload(vip_home=home),
            **where,
        )
        assert first.is_finished
        assert "is finished" not in caplog.text
        sandbox.vip.journal.clear()
        again = vip_resume(account, vip_home=home, **where)
    assert "Session done is finished" in caplog.text
    assert again.files == first.files
    assert {entry.method for entry in sandbox.vip.journal} <= {"GET"}


def test_threads_of_transfers_log_to_the_run_they_belong_to() -> None:
    @flow
    def transferring() -> list[str]:
        def transfer(item: int) -> str:
            return str(get_run_logger().extra["flow_name"])

        return transfer_all(range(3), transfer, name=str, subject="Test", parallelism=2)

    assert transferring() == ["transferring"] * 3


def test_session_from_upload_to_finish(vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]) -> None:
    result = vip_session(**arguments, session_name="whole", nb_runs=3)
    assert [workflow.status for workflow in result.workflows] == [WorkflowStatus.FINISHED] * 3
    assert [len(files) for files in result.files.values()] == [3, 3, 3]
    assert result.is_finished
    assert home_of_sessions(vip, credentials) == []
    summary = artifacts("vip-session-whole")[-1]
    assert all(workflow.identifier in str(summary.data) for workflow in result.workflows)
    assert artifacts("vip-upload-whole")[-1].data == 100.0
    assert artifacts("vip-download-whole")[-1].data == 100.0
    rows = json.loads(str(artifacts("vip-workflows-whole")[-1].data))
    assert {row["status"] for row in rows} == {"Finished"}
    assert all(artifacts(f"vip-{workflow.identifier}") for workflow in result.workflows)


@pytest.mark.slow
def test_launch_now_and_collect_later(vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]) -> None:
    vip.vip.switches.job_seconds = 8.0
    folder = arguments["output_dir"] / "sessions"
    for name in ("one", "two"):
        launched = vip_session(
            **arguments | {"output_dir": folder / name}, session_name=name, waiting=SessionWaiting(wait=False)
        )
        assert not launched.files
    assert vip_collect(credentials, folder) == []
    assert sorted(home_of_sessions(vip, credentials)) == ["one", "two"]
    with credentials.get_client() as client:
        wait_until(lambda: all(w.status.is_terminal for w in client.workflows()), 30, "both have ended")
    collected = vip_collect(credentials, folder)
    assert [result.session.session_name for result in collected] == ["one", "two"]
    assert all(len(files) == 3 for result in collected for files in result.files.values())
    assert home_of_sessions(vip, credentials) == []
    assert vip_collect(credentials, folder) == []


def test_only_a_run_of_a_deployment_can_be_suspended(vip: Sandbox, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Only a run of a deployment"):
        vip_session(**arguments, waiting=SessionWaiting(wait="suspend"))
    assert vip.vip.journal.entries("PUT", "") == []
    assert posts(vip) == 0


def test_resume_needs_only_the_folder_and_launches_what_was_not(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    @flow
    def stops_after_one_of_three() -> VipSession:
        keys = ("pipeline_id", "input_settings", "input_dir", "output_dir")
        session = new_session(**{key: arguments[key] for key in keys}, session_name="stopped", nb_runs=3)
        steps.upload_inputs(credentials, session)
        steps.launch_pipeline(credentials, session, 1)
        return session

    stops_after_one_of_three()
    # The local inputs are not needed any more.
    for path in arguments["input_dir"].iterdir():
        path.unlink()
    arguments["input_dir"].rmdir()
    result = vip_resume(credentials, output_dir=arguments["output_dir"], refresh_time=0.2)
    assert posts(vip) == 3
    assert len(result.files) == 3
    assert result.is_finished
    again = vip_resume(credentials, output_dir=arguments["output_dir"], refresh_time=0.2)
    assert posts(vip) == 3
    assert again.files == result.files


@pytest.mark.slow
def test_resume_from_a_name_alone_when_the_file_is_kept_on_the_platform(
    vip: Sandbox,
    credentials: VipCredentials,
    arguments: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload = SessionUpload(backup_location="vip")
    vip_session(**arguments, session_name="remote", upload=upload, waiting=SessionWaiting(wait=False))
    assert not (arguments["output_dir"] / "session_data.json").exists()
    monkeypatch.chdir(tmp_path)
    result = vip_resume(credentials, session_name="remote", refresh_time=0.2)
    assert posts(vip) == 1
    assert result.session.output_dir == tmp_path / "vip_outputs" / "remote"
    assert [len(files) for files in result.files.values()] == [3]
    assert home_of_sessions(vip, credentials) == []


def test_without_a_backup_nothing_is_written_and_all_works(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    result = vip_session(**arguments, upload=SessionUpload(backup_location=None))
    assert result.is_finished
    assert [len(files) for files in result.files.values()] == [3]
    assert not (arguments["output_dir"] / "session_data.json").exists()


def test_a_session_of_vip_client_is_never_launched_again(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    vip_session(**arguments, session_name="theirs", waiting=SessionWaiting(wait=False))
    path = arguments["output_dir"] / "session_data.json"
    record = json.loads(path.read_text())
    del record["prefect_biomed"]
    path.write_text(json.dumps(record))
    for _ in range(2):
        result = vip_resume(
            credentials, output_dir=arguments["output_dir"], refresh_time=0.2, removal=Removal(finish=False)
        )
        assert len(result.workflows) == 1
    assert posts(vip) == 1


def test_resume_of_nothing_says_so(credentials: VipCredentials, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"There is no .*session_data\.json"):
        vip_resume(credentials, output_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="session_name or output_dir"):
        vip_resume(credentials)


@pytest.mark.slow
def test_shared_inputs_are_sent_once_and_removed_by_the_last(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    runs = [
        PipelineRun(pipeline_id="GreyMatter/1.0", input_settings={"t1": "anatomical.nii", "threshold": 0.3}),
        PipelineRun(pipeline_id="GreyMatter/1.1", input_settings={"t1": "anatomical.nii"}, nb_runs=2),
    ]
    results = vip_shared_inputs(
        credentials, runs, arguments["input_dir"], arguments["output_dir"], session_name="shared", refresh_time=0.2
    )
    assert [len(result.files) for result in results] == [1, 2]
    assert len([e for e in vip.vip.journal.entries("PUT") if e.path.endswith("anatomical.nii")]) == 1
    assert home_of_sessions(vip, credentials) == []


def test_shared_inputs_and_their_shape_as_wanted(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    (arguments["input_dir"] / "notes.txt").write_text("not for the platform")
    (result,) = vip_shared_inputs(
        credentials,
        [PipelineRun(pipeline_id="GreyMatter/1.0", input_settings={"t1": "anatomical.nii"})],
        arguments["input_dir"],
        arguments["output_dir"],
        session_name="shared",
        refresh_time=0.2,
        upload=Upload(exclude=("*.txt",), vip_home="/vip/Home/elsewhere"),
        outputs=Outputs(unzip=False),
        removal=Removal(keep_input=True),
    )
    ((archive,),) = result.files.values()
    assert archive.name == "anatomical_greymatter.tar.gz"
    assert home_of_sessions(vip, credentials) == []
    with credentials.get_client() as client:
        inputs = [entry.name for entry in client.list_folder("/vip/Home/elsewhere/shared/INPUTS")]
        assert not client.exists("/vip/Home/elsewhere/shared/OUTPUTS")
        assert not client.exists("/vip/Home/elsewhere/shared-1/OUTPUTS")
    assert "anatomical.nii" in inputs
    assert "notes.txt" not in inputs


def test_groups_can_be_given_as_mappings_and_refuse_what_they_do_not_have(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"upload": {"include": ["anatomical.nii"]}, "waiting": {"wait": False}, "outputs": None}
    launched = vip_session(**arguments, **given)
    assert [workflow.status.is_terminal for workflow in launched.workflows] == [False]
    for wrong in ({"waiting": {"wiat": False}}, {"waiting": {"timeout_seconds": 0}}, {"removal": {"finish": "later"}}):
        with pytest.raises(ParameterTypeError):
            vip_session(**arguments | wrong)
    assert posts(vip) == 1


@pytest.mark.slow
def test_an_owner_that_finishes_first_leaves_the_inputs_to_the_borrower(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    vip_session(**arguments, session_name="owner", removal=Removal(finish=False))
    borrower = arguments | {"output_dir": arguments["output_dir"].parent / "borrower"}
    upload = SessionUpload(inputs_of=arguments["output_dir"])
    vip_session(**borrower, session_name="borrower", upload=upload, removal=Removal(finish=False))
    # What a session was begun with decides until something else is said.
    assert not vip_resume(credentials, output_dir=arguments["output_dir"], refresh_time=0.2).is_finished
    now = Removal(finish=True)
    vip_resume(credentials, output_dir=arguments["output_dir"], refresh_time=0.2, removal=now)
    with credentials.get_client() as client:
        assert client.exists("/vip/Home/API/owner/INPUTS/anatomical.nii")
        assert not client.exists("/vip/Home/API/owner/OUTPUTS")
    vip_resume(credentials, output_dir=borrower["output_dir"], refresh_time=0.2, removal=now)
    assert home_of_sessions(vip, credentials) == []


def test_all_problems_of_shared_inputs_at_once(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    runs = [
        PipelineRun(pipeline_id="GreyMatter/1.0", input_settings={}),
        PipelineRun(pipeline_id="Nothing/1.0", input_settings={}),
    ]
    with pytest.raises(PreflightFailed) as caught:
        vip_shared_inputs(credentials, runs, arguments["input_dir"], arguments["output_dir"])
    assert len(caught.value.problems) == 2
    assert not vip.vip.journal.entries("PUT")


@pytest.mark.slow
def test_some_jobs_failed(arguments: dict[str, Any], tmp_path: Path) -> None:
    partial = arguments | {
        "pipeline_id": "SliceStatistics/2.0",
        "input_settings": {"image": ["anatomical.nii"], "slice": [3, 7, 11], "fail_on": 7},
    }
    result = vip_session(**partial, session_name="partial", removal=Removal(finish=False))
    (workflow,) = result.workflows
    assert workflow.status is WorkflowStatus.FINISHED
    assert [job.status for job in workflow.jobs].count(JobStatus.COMPLETED) == 2
    report = str(artifacts("vip-failures-partial")[-1].data)
    assert "2 of 3 jobs" in report
    assert "slice=7" in report
    with pytest.raises(WorkflowFailed, match="1 of 1 runs"):
        vip_session(**partial | {"output_dir": tmp_path / "strict"}, outputs=Outputs(strict=True))


def test_a_failed_run_is_reported_with_its_log_and_stays_on_the_platform(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    with credentials.get_client() as client:
        (parameter, *_) = client.pipeline("AlwaysFails/1.0").inputs
    failing = arguments | {"pipeline_id": "AlwaysFails/1.0", "input_settings": {parameter.name: "anatomical.nii"}}
    with pytest.raises(WorkflowFailed, match="ExecutionFailed"):
        vip_session(**failing, session_name="failing")
    report = str(artifacts("vip-failures-failing")[-1].data)
    assert "exit code" in report
    assert "stderr:" in report
    assert home_of_sessions(vip, credentials) == ["failing"]


@pytest.mark.slow
def test_outputs_of_killed_runs_can_be_wanted(
    vip: Sandbox, credentials: VipCredentials, arguments: dict[str, Any]
) -> None:
    slow = arguments | {
        "pipeline_id": "SliceStatistics/2.0",
        "input_settings": {"image": ["anatomical.nii"], "slice": [3, 7]},
    }
    vip.vip.switches.held_jobs = [1]
    launched = vip_session(**slow, session_name="killed", waiting=SessionWaiting(wait=False))

    @flow
    def kill() -> list[WorkflowStatus]:
        with credentials.get_client() as client:
            wait_until(lambda: bool(client.workflow(launched.workflows[0].identifier).outputs), 30, "an output")
        with pytest.raises(StillRunning):
            steps.finish.with_options(retries=0)(credentials, launched.session)
        return [workflow.status for workflow in steps.kill_workflows(credentials, launched.session)]

    assert kill() == [WorkflowStatus.KILLED]
    wanted = Outputs(get_status=("Finished", "Killed"))
    result = vip_resume(credentials, output_dir=arguments["output_dir"], outputs=wanted)
    assert [len(files) > 0 for files in result.files.values()] == [True]
    assert result.is_finished


@pytest.mark.slow
def test_more_runs_than_the_platform_allows_are_queued(vip: Sandbox, arguments: dict[str, Any]) -> None:
    vip.vip.switches.max_running_user = 1
    vip.vip.switches.job_seconds = 3

    @flow
    def five() -> int:
        session = new_session(
            **{key: arguments[key] for key in ("pipeline_id", "input_settings", "input_dir", "output_dir")}, nb_runs=5
        )
        steps.upload_inputs(arguments["credentials"], session)
        ids = {
            steps.launch_pipeline(arguments["credentials"], session, number, queue_interval_seconds=0.3).identifier
            for number in range(1, 6)
        }
        finished = steps.monitor_workflows(arguments["credentials"], session, refresh_time=0.2)
        return len(ids & {workflow.identifier for workflow in finished})

    assert five() == 5
    refused = [entry for entry in vip.vip.journal.entries("POST", "/rest/executions") if entry.status == 400]
    assert refused


@pytest.mark.slow
def test_wrong_key_is_tried_once_and_the_session_is_kept(vip: Sandbox, arguments: dict[str, Any]) -> None:
    launched = vip_session(**arguments, session_name="kept", waiting=SessionWaiting(wait=False))
    vip.vip.switches.key_generation += 1
    vip.vip.journal.clear()
    with pytest.raises(AuthenticationError, match="valid API key"):
        vip_resume(arguments["credentials"], output_dir=arguments["output_dir"])
    assert len([entry for entry in vip.vip.journal if entry.status == 401]) == 1
    fresh = VipCredentials(api_key=SecretStr(vip.vip.ready()["api_key"]), url=arguments["credentials"].url)
    result = vip_resume(fresh, output_dir=arguments["output_dir"], refresh_time=0.2)
    assert [w.identifier for w in result.workflows] == [w.identifier for w in launched.workflows]


def test_show_pipeline_lists_describes_and_says_what_there_is(credentials: VipCredentials) -> None:
    assert len(vip_show_pipeline(credentials, "greymatter")) == 2
    (described,) = vip_show_pipeline(credentials, "slicestat")
    assert {parameter.name for parameter in described.inputs} >= {"image", "slice"}
    text = str(artifacts("vip-pipelines-slicestat")[-1].data)
    assert "input_settings = {" in text
    with pytest.raises(ConfigurationError, match=r"GreyMatter/1\.0"):
        vip_show_pipeline(credentials, "no such thing")


def test_the_cancellation_hook_kills_only_when_asked(vip: Sandbox, arguments: dict[str, Any]) -> None:
    vip.vip.switches.job_seconds = 30.0
    for asked in (False, True):
        output_dir = arguments["output_dir"].parent / str(asked)
        waiting = SessionWaiting(wait=False, cancel_remote=asked)
        state = vip_session(**arguments | {"output_dir": output_dir}, waiting=waiting, return_state=True)
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(state.state_details.flow_run_id)
        # What the server stored of a block that was not saved is masked; a deployment stores a reference.
        run.parameters["credentials"] = arguments["credentials"]
        (launched,) = state.result().workflows

        kill_remote_workflows(vip_session, run, state)
        with arguments["credentials"].get_client() as client:
            status = client.workflow(launched.identifier).status
        assert (status is not WorkflowStatus.RUNNING) == asked
