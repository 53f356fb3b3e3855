"""`prefect-biomed plan`: what a run would do, and does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.plans import differences
from harness.shell import typed
from harness.vip_steps import send, until
from prefect_biomed.cli.planning import planned_flows, unplanned_flows
from prefect_biomed.cli.running import flow_names
from prefect_biomed.clients.vip import VipClient, WorkflowStatus, launch
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.tasks.policies import planned_run


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox("vip") as sandbox:
        yield sandbox


@pytest.mark.usefixtures("prefect_api")
def test_a_session_in_any_state_is_run_as_it_was_planned(sandbox: Sandbox, tmp_path: Path) -> None:
    found = [difference for seed in (0, 1, 8) for difference in differences(sandbox, tmp_path / f"{seed}", seed)]
    found += differences(sandbox, tmp_path / "whole", 7, whole=True)
    assert found == []


def test_each_flow_is_planned_or_refused(tmp_path: Path) -> None:
    assert sorted([*planned_flows(), *unplanned_flows()]) == sorted(flow_names())
    status, said = typed("prefect-biomed", "plan", "end-cancelled")
    assert status == 2 and "cannot be planned" in said
    folders = ("-s", f"runs_dir={tmp_path}", "-s", "output_dir=x")
    status, said = typed("prefect-biomed", "plan", "compare-folders", *folders)
    assert status == 0 and "Nothing would be changed" in said


def test_the_plan_is_for_people_and_for_machines(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = sandbox.ready()["vip"]
    monkeypatch.setenv("PREFECT_BIOMED_VIP_URL", facts["url"])
    monkeypatch.setenv("PREFECT_BIOMED_VIP_API_KEY", facts["api_key"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"12345")
    settings = {
        "pipeline_id": "CopyFile/1.0",
        "input_settings": {"file": ["a.txt"]},
        "input_dir": str(tmp_path / "in"),
        "output_dir": str(tmp_path / "out"),
        "session_name": "told",
        "nb_runs": 2,
    }
    given = [f"-s{name}={json.dumps(value)}" for name, value in settings.items()]
    words = ("prefect-biomed", "plan", "vip-session", "--key", "k", *given)
    status, said = typed(*words)
    assert status == 0, said
    assert "send     1 files, 5 bytes; 0 are there already" in said
    assert "launch   told-r002-" in said and "remove   /vip/Home/API/told" in said
    status, said = typed(*words, "--json")
    told = json.loads(said)
    assert (told["bytes_to_send"], told["jobs"], [one["deed"] for one in told["launches"]]) == (5, 2, ["launch"] * 2)
    assert not (tmp_path / "out").exists()
    status, said = typed(*words, '-sinput_settings={"file": "none.txt"}')
    assert status == 2 and "none.txt" in said


def test_what_a_key_has_launched_is_killed(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = sandbox.ready()["vip"]
    monkeypatch.setenv("PREFECT_BIOMED_VIP_URL", facts["url"])
    monkeypatch.setenv("PREFECT_BIOMED_VIP_API_KEY", facts["api_key"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"x")
    settings = {
        "pipeline_id": "SlowSegmentation/1.0",
        "input_settings": {"image": "a.txt", "duration": 300},
        "input_dir": str(tmp_path / "in"),
        "output_dir": str(tmp_path / "out"),
        "session_name": "slow",
    }
    words = ("prefect-biomed", "kill", *(f"-s{name}={json.dumps(value)}" for name, value in settings.items()))
    with VipClient(facts["url"], facts["api_key"]) as client:
        with planned_run("vip-session/k"):
            session = new_session(
                pipeline_id="SlowSegmentation/1.0",
                input_settings={"image": "a.txt", "duration": 300},
                input_dir=tmp_path / "in",
                output_dir=tmp_path / "out",
                session_name="slow",
            )
        send(client, session)
        workflow = launch(client, session, 1)
        status, said = typed(*words, "--flow", "vip-session", "--key", "other")
        assert (status, said.strip()) == (0, "Nothing was running.")
        assert not client.workflow(workflow.identifier).status.is_terminal
        status, said = typed(*words, "--flow", "vip-session", "--key", "k")
        assert status == 0 and workflow.identifier in said
        until(lambda: client.workflow(workflow.identifier).status is WorkflowStatus.KILLED)
    status, said = typed(*words, "--key", "k")
    assert status == 2 and "--key with --flow" in said
    status, said = typed("prefect-biomed", "kill", "--flow", "what-is-running", "--key", "k")
    assert status == 2 and "launches nothing" in said
