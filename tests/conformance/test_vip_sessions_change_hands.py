"""A session begun by vip-client is finished by us, and the other way round, on one sandbox and one session file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vip import (
    SessionFile,
    VipClient,
    VipSession,
    download,
    finish,
    launch,
    monitor,
    open_session,
    preflight,
    upload,
)
from prefect_biomed.sandbox import Sandbox

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(900)]

PROGRAM = """
import json, sys, time
from vip_client import VipSession
arguments = json.loads(sys.argv[1])
VipSession.init(api_key=arguments["api_key"], vip_portal_url=arguments["url"], verbose=True)
session = VipSession(session_name=arguments["name"], output_dir="out", **arguments["new"])
for step in arguments["steps"]:
    name, keywords = step
    getattr(session, name)(**keywords)
"""


@pytest.fixture
def official(official_environment: Callable[..., Path], vip: Sandbox, tmp_path: Path) -> Callable[..., str]:
    interpreter = official_environment("vip-client", ["vip-client==0.1.10"])
    ready = vip.vip.ready()

    def run(name: str, *steps: tuple[str, dict[str, Any]], **new: Any) -> str:
        arguments = {"url": ready["url"], "api_key": ready["api_key"], "name": name, "steps": steps, "new": new}
        done = subprocess.run(
            [str(interpreter), "-c", PROGRAM, json.dumps(arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def client(vip: Sandbox) -> VipClient:
    ready = vip.vip.ready()
    return VipClient(ready["url"], ready["api_key"])


def wait(client: VipClient, session: VipSession) -> None:
    for workflows in monitor(client, session, PollSettings(interval_seconds=0.2, deadline_seconds=60)):
        print([(workflow.identifier, workflow.status.value) for workflow in workflows])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and "session_data" not in path.name)


def test_begun_by_vip_client_finished_by_us(
    official: Callable[..., str], client: VipClient, vip: Sandbox, input_dir: Path, tmp_path: Path
) -> None:
    official(
        "theirs",
        ("upload_inputs", {}),
        ("launch_pipeline", {"nb_runs": 2}),
        input_dir=str(input_dir),
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": str(input_dir / "anatomical.nii")},
    )
    session = open_session(tmp_path / "out", session_name="theirs")
    assert session.pipeline_id == "GreyMatter/1.0"
    assert session.input_dir == input_dir
    wait(client, session)
    summary = download(client, session)
    assert [len(files) for files in summary.files.values()] == [3, 3]
    assert "/vip/Home/API/theirs" in finish(client, session).removed
    # vip-client reads what we wrote, and knows that the session is over.
    told = official("theirs", ("download_outputs", {}), ("finish", {}))
    assert "Already removed" in told
    record = json.loads((tmp_path / "out/session_data.json").read_text())
    assert {workflow["status"] for workflow in record["workflows"].values()} == {"Removed"}
    assert record["prefect_biomed"]["downloaded"] == sorted(record["workflows"])
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 2


def test_begun_by_us_finished_by_vip_client(
    official: Callable[..., str], client: VipClient, vip: Sandbox, input_dir: Path, tmp_path: Path
) -> None:
    home = "/vip/Home/API/ours"
    session = VipSession(
        session_name="ours",
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "anatomical.nii"},
        input_dir=input_dir,
        output_dir=tmp_path / "out",
        vip_input_dir=f"{home}/INPUTS",
        vip_output_dir=f"{home}/OUTPUTS",
        nb_runs=2,
        token="changeshands",
    )
    upload(client, session, preflight(client, session))
    for repetition in (1, 2):
        launch(client, session, repetition)
    told = official(
        "ours",
        ("monitor_workflows", {"refresh_time": 1}),
        ("download_outputs", {}),
        ("finish", {}),
    )
    assert "is now over" in told
    assert names(tmp_path / "out").count("measures.csv") == 2
    assert not client.exists(home)
    # And we read what it wrote: nothing is left to fetch, to remove or to launch.
    session = open_session(tmp_path / "out", session_name="ours")
    assert session.token == "changeshands"
    assert download(client, session).fetched == 0
    assert finish(client, session).removed == ()
    assert launch(client, session, 1).status == "Finished"
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 2


OUR_STEPS: dict[str, Callable[[VipClient, VipSession], object]] = {
    "upload": lambda client, session: upload(client, session, preflight(client, session)),
    "launch": lambda client, session: [launch(client, session, number) for number in range(1, session.nb_runs + 1)],
    "monitor": wait,
    "download": download,
    "finish": finish,
}
THEIR_STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "upload": ("upload_inputs", {}),
    # One run: vip-client gives all runs one folder, and those of one second replace each other's outputs.
    "launch": ("launch_pipeline", {}),
    "monitor": ("monitor_workflows", {"refresh_time": 1}),
    "download": ("download_outputs", {}),
    "finish": ("finish", {}),
}


def check_end(client: VipClient, vip: Sandbox, folder: Path) -> None:
    """The outputs are here, one execution was made, nothing is left, and there is nothing to take up any more."""
    assert names(folder).count("measures.csv") == 1
    assert not client.exists("/vip/Home/API/hands")
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 1
    session = open_session(folder, session_name="hands")
    record = SessionFile(session).read()
    assert record.is_adopted(session.token) or record.repetitions_to_launch(session, is_newest=True) == []
    wait(client, session)
    assert download(client, session).fetched == 0
    assert finish(client, session).removed == ()


@pytest.mark.parametrize("ours", range(1, 5))
def test_theirs_until_a_step_and_ours_from_it(
    official: Callable[..., str], client: VipClient, vip: Sandbox, input_dir: Path, tmp_path: Path, ours: int
) -> None:
    steps = list(OUR_STEPS)
    official(
        "hands",
        *(THEIR_STEPS[step] for step in steps[:ours]),
        input_dir=str(input_dir),
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": str(input_dir / "anatomical.nii")},
    )
    session = open_session(tmp_path / "out", session_name="hands")
    for step in steps[ours:]:
        OUR_STEPS[step](client, session)
    check_end(client, vip, tmp_path / "out")


@pytest.mark.parametrize("theirs", range(1, 5))
def test_ours_until_a_step_and_theirs_from_it(
    official: Callable[..., str], client: VipClient, vip: Sandbox, input_dir: Path, tmp_path: Path, theirs: int
) -> None:
    steps = list(OUR_STEPS)
    session = VipSession(
        session_name="hands",
        pipeline_id="GreyMatter/1.0",
        input_settings={"t1": "anatomical.nii"},
        input_dir=input_dir,
        output_dir=tmp_path / "out",
        vip_input_dir="/vip/Home/API/hands/INPUTS",
        vip_output_dir="/vip/Home/API/hands/OUTPUTS",
        token="changeshands",
    )
    for step in steps[:theirs]:
        OUR_STEPS[step](client, session)
    official("hands", *(THEIR_STEPS[step] for step in steps[theirs:]))
    check_end(client, vip, tmp_path / "out")
