"""VipGirder of vip-client and we read each other's sessions out of the metadata of folders on Girder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import girder_client
import pytest

from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    GirderStorage,
    VipClient,
    VipSession,
    Workflow,
    download,
    launch,
    monitor,
    open_girder_session,
    share_girder_key,
)
from prefect_biomed.sandbox import Sandbox

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]

FOLDER = "/collection/Sandbox/Results/study"
PROGRAM = """
import json, sys
from vip_client import VipGirder
arguments = json.loads(sys.argv[1])
session = VipGirder.init(
    vip_key=arguments["api_key"], girder_key=arguments["girder_key"], vip_portal_url=arguments["url"],
    girder_api_url=arguments["girder_url"], girder_id_prefix="pilotGirder", output_dir=arguments["folder"],
    **arguments["new"],
)
for name, keywords in arguments["steps"]:
    getattr(session, name)(**keywords)
print("SESSION", json.dumps([session.session_name, session.pipeline_id, session.input_settings, session.workflows]))
"""


@pytest.fixture
def official(official_environment: Callable[..., Path], vip: Sandbox, tmp_path: Path) -> Callable[..., list[Any]]:
    interpreter = official_environment("vip-client", ["vip-client==0.1.10"])
    ready = vip.vip.ready()

    def run(*steps: tuple[str, dict[str, Any]], **new: Any) -> list[Any]:
        """Open a session, do some steps, and tell what vip-client knows of it."""
        arguments = {
            "url": ready["url"],
            "api_key": ready["api_key"],
            "girder_url": ready["girder"]["api_url"],
            "girder_key": ready["girder"]["api_key"],
            "folder": FOLDER,
            "steps": steps,
            "new": new,
        }
        done = subprocess.run(
            [str(interpreter), "-c", PROGRAM, json.dumps(arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        known: list[Any] = json.loads(done.stdout.rpartition("SESSION")[2])
        return known

    return run


@pytest.fixture
def client(vip: Sandbox) -> Iterator[VipClient]:
    ready = vip.vip.ready()
    girder = GirderStorage(ready["girder"]["api_url"], ready["girder"]["api_key"])
    with VipClient(ready["url"], ready["api_key"], girder=girder) as client:
        share_girder_key(client)
        yield client


@pytest.fixture
def girder(vip: Sandbox, volume: Path) -> Any:
    facts = vip.vip.ready()["girder"]
    client = girder_client.GirderClient(apiUrl=facts["api_url"])
    client.authenticate(apiKey=facts["api_key"])
    inputs = client.resourceLookup("/collection/Sandbox/Inputs")["_id"]
    for name in ("one.nii", "two.nii"):
        client.uploadFileToFolder(inputs, str(volume), filename=name)
    return client


def wait(client: VipClient, session: VipSession) -> list[Workflow]:
    workflows: list[Workflow] = []
    settings = PollSettings(interval_seconds=0.2, deadline_seconds=60)
    for workflows in monitor(client, session, settings):  # noqa: B007  # the last look is what counts
        pass
    return workflows


def test_begun_by_vip_girder_ended_by_us(
    official: Callable[..., list[Any]], client: VipClient, girder: Any, vip: Sandbox, tmp_path: Path
) -> None:
    vip.vip.switches.job_seconds = 3.0
    # The client names the folder of a run by the second.
    vip.vip.switches.launch_seconds = 1.1
    *_, begun = official(
        ("launch_pipeline", {"nb_runs": 2}),
        session_name="theirs",
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "/collection/Sandbox/Inputs"},
        custom_wf_metadata={"study": "conformance"},
    )
    assert len(begun) == 2

    session = open_girder_session(client, FOLDER, tmp_path / "out", download=True)
    assert (session.session_name, session.pipeline_id) == ("theirs", "GreyMatter/1.0")
    assert session.input_settings == {
        "t1": [f"/collection/Sandbox/Inputs/{name}/{name}" for name in ("one.nii", "two.nii")]
    }
    assert {workflow.status.value for workflow in wait(client, session)} == {"Finished"}
    summary = download(client, session)
    assert sorted(summary.files) == sorted(begun)
    assert all(len([p for p in files if p.name == "measures.csv"]) == 2 for files in summary.files.values())
    for run in girder.listFolder(girder.resourceLookup(FOLDER)["_id"]):
        assert run["meta"]["workflow_status"] == "Finished"
        assert run["meta"]["study"] == "conformance"

    # vip-client reads what we wrote, and goes on saving it.
    name, pipeline, settings, known = official(("monitor_workflows", {"refresh_time": 1}), ("finish", {}))
    assert (name, pipeline) == ("theirs", "GreyMatter/1.0")
    assert settings == session.input_settings
    assert {identifier: run["status"] for identifier, run in known.items()} == dict.fromkeys(begun, "Finished")
    assert {identifier: run["output_path"] for identifier, run in known.items()} == {
        identifier: run["output_path"] for identifier, run in begun.items()
    }
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 2


def test_begun_by_us_ended_by_vip_girder(
    official: Callable[..., list[Any]], client: VipClient, girder: Any, vip: Sandbox, tmp_path: Path
) -> None:
    vip.vip.switches.job_seconds = 2.0
    session = VipSession(
        session_name="ours",
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "girder:/collection/Sandbox/Inputs", "threshold": 0.4},
        output_dir=tmp_path / "out",
        vip_input_dir="/vip/Home/API/ours/INPUTS",
        vip_output_dir="/vip/Home/API/ours/OUTPUTS",
        nb_runs=2,
        token="changeshands",
        girder_output_dir=FOLDER,
    )
    launched = [launch(client, session, repetition).identifier for repetition in (1, 2)]
    name, pipeline, settings, known = official(("monitor_workflows", {"refresh_time": 1}), ("finish", {}))
    assert (name, pipeline) == ("ours", "GreyMatter/1.0")
    assert settings["t1"] == [f"/collection/Sandbox/Inputs/{name}/{name}" for name in ("one.nii", "two.nii")]
    assert {identifier: run["status"] for identifier, run in known.items()} == dict.fromkeys(launched, "Finished")
    runs = list(girder.listFolder(girder.resourceLookup(FOLDER)["_id"]))
    assert {run["name"] for run in runs} == {"ours-r001-changeshands", "ours-r002-changeshands"}
    assert {run["meta"]["workflow_status"] for run in runs} == {"Finished"}

    # And we read what it wrote, on another machine: nothing is left to launch.
    again = open_girder_session(client, FOLDER, tmp_path / "elsewhere")
    assert (again.token, again.nb_runs) == ("changeshands", 2)
    assert [launch(client, again, repetition).identifier for repetition in (1, 2)] == launched
    assert {workflow.status.value for workflow in wait(client, again)} == {"Finished"}
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 2
