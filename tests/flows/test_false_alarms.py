"""A run that is called *Crashed* while it lives: its process ends it all the same, and a second one doubles nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Crashed, Scheduled
from pydantic import SecretStr

from harness.laboratory import wait_until
from prefect_biomed.blocks import VipCredentials
from prefect_biomed.flows.cancellation import AFTER_CRASH
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def run(vip: Sandbox, input_dir: Path, tmp_path: Path) -> FlowRun:
    """A session as a run of a deployment, with a saved block."""
    ready = vip.ready()["vip"]
    VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"]).save("alarm", overwrite=True, _sync=True)
    parameters = {
        "credentials": {"$ref": {"block_document_slug": "vip-credentials/alarm"}},
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": str(input_dir),
        "output_dir": str(tmp_path / "outputs"),
        "session_name": "alarm",
        "refresh_time": 0.2,
    }
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            flow_id=client.create_flow_from_name("vip-session"),
            name="alarm",
            entrypoint="prefect_biomed.flows.vip.vip_session",
        )
        made = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        client.update_flow_run(made.id, infrastructure_pid="machine:1")
        return client.read_flow_run(made.id)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("begun_again", [False, True], ids=["noticed by nobody", "begun again meanwhile"])
def test_a_run_that_is_called_crashed_while_it_lives_is_done_once(
    vip: Sandbox, run: FlowRun, begun_again: bool
) -> None:
    vip.vip.switches.job_seconds = 600.0

    def process() -> None:
        with get_client(sync_client=True) as client:
            mine = client.read_flow_run(run.id)
        run_flow(vip_session, flow_run=mine, return_type="state")

    def launches() -> int:
        return len([one for one in vip.vip.journal.entries("POST", "/executions") if one.status == 200])

    processes = [threading.Thread(target=process)]
    processes[0].start()
    wait_until(lambda: launches() == 1, 120, "the launch")
    with get_client(sync_client=True) as client:
        # No sign of life has come for a while, because the server was away.
        client.set_flow_run_state(run.id, Crashed(), force=True)
        if begun_again:
            client.set_flow_run_state(run.id, Scheduled(message=AFTER_CRASH), force=True)
            processes.append(threading.Thread(target=process))
            processes[1].start()
            time.sleep(3)
    vip.vip.switches.job_seconds = 0.0
    for one in processes:
        one.join()
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run.id).state_name == "Completed"
    assert launches() == 1
    assert len(list(Path(run.parameters["output_dir"]).rglob("measures.csv"))) == 1
