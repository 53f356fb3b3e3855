"""What our runs have left on the platforms, over all three of them, and taking it away."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.exceptions import ParameterTypeError
from prefect.states import Cancelling, Running
from pydantic import SecretStr

from harness.ingest_lab import Lab, lab, make_lab
from prefect_biomed.blocks import BossCredentials, Vantage6Credentials, VipCredentials
from prefect_biomed.clients.boss import IngestConfig
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.vantage6 import TaskRequest
from prefect_biomed.clients.vip import StillNeeded, VipClient, VipSession, WorkflowStatus, launch
from prefect_biomed.clients.vip.errors import ListUnavailable, StillRunning
from prefect_biomed.flows.operations import end_cancelled, remove_leftovers, what_is_running
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.flows.vip_parameters import Removal, SessionUpload, SessionWaiting
from prefect_biomed.sandbox import Fault, Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL
from prefect_biomed.tasks import boss as boss_steps
from prefect_biomed.tasks import vantage6 as vantage6_steps
from prefect_biomed.tasks.operations import running_executions
from prefect_biomed.tasks.policies import token_of_flow_run

__all__ = ["lab", "make_lab"]

pytestmark = pytest.mark.usefixtures("prefect_api")

TOKEN = "abcdefghij"
LAUNCH = SessionWaiting(wait=False)


@pytest.fixture
def account(vip: Sandbox) -> VipCredentials:
    ready = vip.vip.ready()
    credentials = VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"])
    credentials.save("operator", overwrite=True, _sync=True)
    return credentials


@pytest.fixture
def boss(lab: Lab) -> BossCredentials:
    facts = lab.boss.ready()
    return BossCredentials(
        token=SecretStr(facts["tokens"]["alice"]), host=facts["host"], protocol="http", aws_endpoint_url=facts["url"]
    )


@pytest.fixture
def vantage6() -> Iterator[Vantage6Credentials]:
    with Sandbox("vantage6", vantage6={"generation": 4, "key_bits": 2048}) as sandbox:
        facts = sandbox.vantage6.ready()
        name = "north-admin" if "north-admin" in facts["users"] else next(iter(facts["users"]))
        yield Vantage6Credentials(
            url=facts["url"], username=name, password=SecretStr(facts["users"][name]["password"]), read_seconds=30
        )


@pytest.fixture
def arguments(account: VipCredentials, input_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "credentials": account,
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": input_dir,
        "output_dir": tmp_path / "out",
        "refresh_time": 0.2,
    }


def rows() -> list[dict[str, Any]]:
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["what-is-running"]))
        )
    return list(json.loads(str(max(artifacts, key=lambda artifact: artifact.created).data)))


@pytest.mark.slow
def test_executions_and_folders_of_vip_are_shown_and_removed(
    vip: Sandbox, account: VipCredentials, arguments: dict[str, Any]
) -> None:
    vip.vip.switches.job_seconds = 60.0
    state = vip_session(**arguments, session_name="left", nb_runs=2, waiting=LAUNCH, return_state=True)
    found = what_is_running(vip=account)
    assert [(one.kind, one.name) for one in found if one.kind == "session folder"] == [("session folder", "left")]
    executions = [one for one in found if one.kind == "execution"]
    assert [one.status for one in executions] == ["Running", "Running"]
    assert {one.name.rpartition("-")[0] for one in executions} == {"left-r001", "left-r002"}
    assert all(one.since is not None for one in found)
    assert {one.flow_run_id for one in found} == {state.state_details.flow_run_id}
    assert len(rows()) == 3
    command = shlex.split(executions[0].remove)
    assert command[:4] == ["prefect", "deployment", "run", "remove-leftovers/remove-leftovers"]
    assert json.loads(command[5]) == {
        "vip": {"$ref": {"block_document_slug": "vip-credentials/operator"}},
        "executions": [executions[0].identifier],
    }
    resume = json.loads(shlex.split(executions[0].resume)[5])
    assert (resume["session_name"], resume["output_dir"]) == ("left", str(arguments["output_dir"]))
    assert account.api_key.get_secret_value() not in repr(found)

    assert remove_leftovers(vip=account, executions=[executions[0].identifier]) == [
        f"killed {executions[0].identifier}"
    ]
    done = remove_leftovers(vip=account, sessions=["left"])
    assert done == [f"killed {executions[1].identifier}", "removed /vip/Home/API/left"]
    assert what_is_running(vip=account) == []
    assert rows() == []
    assert remove_leftovers(vip=account, sessions=["left"]) == []


@pytest.mark.slow
def test_a_session_whose_inputs_another_one_uses_is_not_removed(
    account: VipCredentials, arguments: dict[str, Any], tmp_path: Path
) -> None:
    vip_session(**arguments, session_name="owner", waiting=LAUNCH)
    vip_session(
        **arguments | {"output_dir": tmp_path / "user"},
        session_name="user",
        upload=SessionUpload(inputs_of=arguments["output_dir"]),
        waiting=LAUNCH,
    )
    with pytest.raises(StillNeeded, match="user"):
        remove_leftovers(vip=account, sessions=["owner"])
    with account.get_client() as client:
        assert client.exists("/vip/Home/API/owner/INPUTS")
    remove_leftovers(vip=account, sessions=["user"])
    assert "removed /vip/Home/API/owner" in remove_leftovers(vip=account, sessions=["owner"])


def test_a_session_is_not_removed_where_nobody_can_tell_what_it_runs(
    account: VipCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_list(*_: object) -> list[object]:
        raise ListUnavailable("no list", status=500)

    monkeypatch.setattr("prefect_biomed.clients.vip.VipClient.workflows", no_list)
    with account.get_client() as client, pytest.raises(StillRunning, match=r"whether any run of it goes on.*no list"):
        running_executions(client, [], ["s"])


def launched(client: VipClient, session: str, name: str, folder: str) -> str:
    results = f"/vip/Home/API/{session}/OUTPUTS/{folder}".rstrip("/")
    client.make_folder(results)
    values: dict[str, Any] = {"text": "x"}
    return client.launch(
        name=name, pipeline_id="EveryType/1.0", input_values=values, results_location=results
    ).identifier


def test_a_session_of_which_a_run_is_not_listed_is_not_removed(
    vip: Sandbox, account: VipCredentials, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Unless each of its runs is named by its identifier, or written down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prefect_biomed.clients.vip.client._LONGEST_LIST", 2)
    vip.vip.switches.job_seconds = 60.0
    with account.get_client() as client:
        old = [launched(client, "old", f"old-r{number:03d}-t0k3n", f"r{number:03d}-t0k3n") for number in (1, 2)]
        launched(client, "on-girder", "on-girder-r001-t0k3n", "")
        other = [launched(client, "other", "other-r001-t0k3n", "r001-t0k3n") for _ in range(2)]
        with pytest.raises(StillRunning, match=r"whether old-r001-t0k3n, old-r002-t0k3n goes on\. Nothing was"):
            remove_leftovers(vip=account, sessions=["old"])
        with pytest.raises(StillRunning, match="whether old-r002-t0k3n goes on"):
            remove_leftovers(vip=account, executions=old[:1], sessions=["old"])
        with pytest.raises(StillRunning, match="whether any run of it goes on"):
            remove_leftovers(vip=account, sessions=["on-girder"])
        assert all(not client.workflow(one).status.is_terminal for one in [*old, *other])
        assert client.exists("/vip/Home/API/old/OUTPUTS/r001-t0k3n")
        assert remove_leftovers(vip=account, executions=old, sessions=["old"])[-1] == "removed /vip/Home/API/old"
        assert remove_leftovers(vip=account, sessions=["other"]) == [
            *(f"killed {one}" for one in other),
            "removed /vip/Home/API/other",
        ]


def test_runs_on_record_are_killed_before_a_session_is_removed_although_no_list_has_them(
    vip: Sandbox, account: VipCredentials, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    vip.vip.switches.job_seconds = 60.0
    session = VipSession.planned(
        session_name="kept",
        pipeline_id="EveryType/1.0",
        input_settings={"text": "x"},
        output_dir=tmp_path / "vip_outputs" / "kept",
        vip_input_dir="/vip/Home/API/kept/INPUTS",
        vip_output_dir="/vip/Home/API/kept/OUTPUTS",
        token="t0k3n",
    )
    with account.get_client() as client:
        run = launch(client, session, 1).identifier
        monkeypatch.setattr(VipClient, "workflows", lambda *_: [])
        monkeypatch.setattr(VipClient, "is_cut_off", lambda *_: True)
        assert remove_leftovers(vip=account, sessions=["kept"]) == [f"killed {run}", "removed /vip/Home/API/kept"]


def test_runs_of_vip_client_are_shown_and_killed_before_their_session_is_removed(
    vip: Sandbox, account: VipCredentials, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They carry the name of the session alone."""
    monkeypatch.chdir(tmp_path)
    vip.vip.switches.job_seconds = 60.0
    with account.get_client() as client:
        run = launched(client, "theirs", "theirs", "2026-01-01_00-00-00")
        assert [one.identifier for one in what_is_running(vip=account)] == [run, "/vip/Home/API/theirs"]
        assert remove_leftovers(vip=account, sessions=["theirs"]) == [f"killed {run}", "removed /vip/Home/API/theirs"]
        assert client.workflow(run).status == "Killed"


def test_names_from_the_platform_cannot_leave_the_command(account: VipCredentials) -> None:
    hostile = "x' ; touch hacked ; '"
    with account.get_client() as client:
        client.make_folder("/vip/Home/API")
        client.make_folder(f"/vip/Home/API/{hostile}")
    (one,) = what_is_running(vip=account)
    assert one.remove == ""
    words = shlex.split(one.resume)
    assert words[:5] == ["prefect", "deployment", "run", "vip-resume/vip-resume", "--params"]
    assert json.loads(words[5])["session_name"] == one.name
    assert len(words) == 6


@pytest.mark.slow
def test_one_table_over_all_platforms(
    vip: Sandbox,
    account: VipCredentials,
    vantage6: Vantage6Credentials,
    boss: BossCredentials,
    lab: Lab,
    arguments: dict[str, Any],
) -> None:
    vip.vip.switches.job_seconds = 60.0
    vip_session(**arguments, session_name="mixed", waiting=LAUNCH)
    config = IngestConfig.model_validate(lab.config())
    job = boss_steps.create_ingest_job(boss, config, TOKEN)
    request = TaskRequest(
        collaboration="plain",
        organizations=["north"],
        image=CLINICAL,
        method="sleep",
        arguments={"seconds": 60.0},
        databases="default",
    )
    task = vantage6_steps.create_task(vantage6, request)
    found = {(one.platform, one.kind): one for one in what_is_running(account, vantage6, boss)}
    assert set(found) == {
        ("vip", "execution"),
        ("vip", "session folder"),
        ("vantage6", "task"),
        ("boss", "ingest job"),
    }
    assert found["vantage6", "task"].identifier == str(task.id)
    assert found["boss", "ingest job"].identifier == str(job.id)
    assert found["boss", "ingest job"].since is not None
    done = remove_leftovers(account, vantage6, boss, sessions=["mixed"], tasks=[task.id], ingest_jobs=[job.id])
    assert len(done) == 4
    assert what_is_running(account, vantage6, boss) == []


def test_a_platform_that_is_down_does_not_hide_the_others(
    vip: Sandbox, account: VipCredentials, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vip_session(**arguments, session_name="seen", waiting=LAUNCH)
    wrong = BossCredentials(token=SecretStr("x" * 40), host="127.0.0.1:9", protocol="http")
    monkeypatch.setattr("prefect_biomed.tasks.operations.boss_leftovers.retries", 0)
    with pytest.raises(BiomedError, match=r"Not all platforms could be asked.\n  Boss: "):
        what_is_running(account, None, wrong)
    assert [row["name"] for row in rows() if row["what"] == "session folder"] == ["seen"]


def test_wrong_requests_are_refused_before_anything_is_done(account: VipCredentials) -> None:
    with pytest.raises(ConfigurationError, match="at least one platform"):
        what_is_running()
    with pytest.raises(ConfigurationError, match="credentials boss to remove 7"):
        remove_leftovers(vip=account, sessions=["any"], ingest_jobs=[7])
    with pytest.raises(ParameterTypeError, match="pattern"):
        remove_leftovers(vip=account, sessions=["../other"])


@pytest.mark.slow
def test_repetitions_of_one_session_are_one_folder(account: VipCredentials, arguments: dict[str, Any]) -> None:
    vip_session(**arguments, session_name="three", nb_runs=3, removal=Removal(keep_input=True))
    found = what_is_running(vip=account)
    assert [(one.kind, one.name, one.flow_run_id is not None) for one in found] == [("session folder", "three", True)]


def cancelling(account: VipCredentials, name: str, waiting: dict[str, Any]) -> tuple[UUID, str]:
    """A run of a deployment that is being cancelled, with an execution of its own; their ids."""
    reference = {"$ref": {"block_document_slug": "vip-credentials/operator"}}
    parameters = {"credentials": reference, "pipeline_id": "SlowSegmentation/1.0", "input_settings": {}}
    parameters |= {"session_name": name, "waiting": waiting}
    with get_client(sync_client=True) as client, account.get_client() as vip:
        deployment = client.create_deployment(
            flow_id=client.create_flow_from_name("vip-session"),
            name="cancelled",
            entrypoint="prefect_biomed.flows.vip.vip_session",
        )
        run = client.create_flow_run_from_deployment(deployment, parameters=parameters, tags=["biomed-test"])
        token = token_of_flow_run(run.id, "vip-session", explicit=name)
        vip.make_folder(f"/vip/Home/{name}")
        execution = vip.launch(
            name=f"{name}-r001-{token}",
            pipeline_id="EveryType/1.0",
            input_values={"text": "x"},
            results_location=f"/vip/Home/{name}",
        )
        # As a worker leaves it that has begun the run.
        client.update_flow_run(run.id, infrastructure_pid="machine:1")
        client.set_flow_run_state(run.id, Running(), force=True)
        client.set_flow_run_state(run.id, Cancelling(), force=True)
    return run.id, execution.identifier


def test_runs_that_nobody_ends_are_ended_with_what_they_have_left(vip: Sandbox, account: VipCredentials) -> None:
    vip.vip.switches.job_seconds, vip.vip.switches.kill_seconds = 600.0, 0.0
    killed, doomed = cancelling(account, "killed", {"cancel_remote": True})
    kept, left = cancelling(account, "kept", {})
    assert end_cancelled(seconds=60, tag="biomed-test") == [], "their workers may be about to end them"
    assert len(end_cancelled(seconds=0, tag="biomed-test")) == 2
    with get_client(sync_client=True) as client, account.get_client() as platform:
        assert {client.read_flow_run(run).state_name for run in (killed, kept)} == {"Cancelled"}
        assert platform.workflow(doomed).status == WorkflowStatus.KILLED
        assert platform.workflow(left).status == WorkflowStatus.RUNNING
    assert end_cancelled(seconds=0, tag="biomed-test") == []


def test_a_cancelled_run_stays_while_its_platform_cannot_be_asked(vip: Sandbox, account: VipCredentials) -> None:
    vip.vip.switches.job_seconds, vip.vip.switches.kill_seconds = 600.0, 0.0
    run, execution = cancelling(account, "unreachable", {"cancel_remote": True})
    vip.vip.faults.add(Fault(method="GET", path="/executions", status=503, calls=range(1, 100)))
    with pytest.raises(BiomedError, match=f"Not all cancelled runs could be ended.\n.*{run}.*HTTP 503"):
        end_cancelled.with_options(retries=0)(seconds=0, tag="biomed-test")
    vip.vip.faults.clear()
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run).state_name == "Cancelling"
    end_cancelled(seconds=0, tag="biomed-test")
    with account.get_client() as platform:
        assert platform.workflow(execution).status == WorkflowStatus.KILLED
