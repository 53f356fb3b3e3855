"""What our runs have left on the platforms, over all three of them, and taking it away."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.exceptions import ParameterTypeError
from pydantic import SecretStr

from harness.ingest_lab import Lab, lab, make_lab
from prefect_biomed.blocks import BossCredentials, Vantage6Credentials, VipCredentials
from prefect_biomed.clients.boss import IngestConfig
from prefect_biomed.clients.errors import BiomedError, ConfigurationError
from prefect_biomed.clients.vantage6 import TaskRequest
from prefect_biomed.clients.vip import StillNeeded
from prefect_biomed.flows.operations import remove_leftovers, what_is_running
from prefect_biomed.flows.parameters import Removal, SessionUpload, SessionWaiting
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL
from prefect_biomed.tasks import boss as boss_steps
from prefect_biomed.tasks import vantage6 as vantage6_steps

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
    with pytest.raises(BiomedError, match=r"Not all platforms could be asked.\nBoss: "):
        what_is_running(account, None, wrong)
    assert [row["name"] for row in rows() if row["what"] == "session folder"] == ["seen"]


def test_wrong_requests_are_refused_before_anything_is_done(account: VipCredentials) -> None:
    with pytest.raises(ConfigurationError, match="at least one platform"):
        what_is_running()
    with pytest.raises(ConfigurationError, match="credentials boss to remove 7"):
        remove_leftovers(vip=account, sessions=["any"], ingest_jobs=[7])
    with pytest.raises(ParameterTypeError, match="pattern"):
        remove_leftovers(vip=account, sessions=["../other"])


def test_repetitions_of_one_session_are_one_folder(account: VipCredentials, arguments: dict[str, Any]) -> None:
    vip_session(**arguments, session_name="three", nb_runs=3, removal=Removal(keep_input=True))
    found = what_is_running(vip=account)
    assert [(one.kind, one.name, one.flow_run_id is not None) for one in found] == [("session folder", "three", True)]
