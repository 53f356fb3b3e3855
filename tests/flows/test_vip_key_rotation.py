"""A key is replaced while a flow run waits for its executions."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prefect import flow
from pydantic import SecretStr

from harness.laboratory import wait_until
from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import AuthenticationError
from prefect_biomed.clients.vip import SessionResult
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vip._model import Users, VipSwitches

pytestmark = pytest.mark.usefixtures("prefect_api")


def next_key(vip: Sandbox) -> str:
    users = Users(0, VipSwitches(key_generation=1))
    assert Users(0, VipSwitches()).key(users.main) == vip.vip.ready()["api_key"]
    return users.key(users.main)


def saved(vip: Sandbox, key: str) -> VipCredentials:
    credentials = VipCredentials(api_key=SecretStr(key), url=vip.vip.ready()["url"])
    credentials.save("rotated", overwrite=True, _sync=True)
    return credentials


def run_and_rotate(vip: Sandbox, input_dir: Path, tmp_path: Path, key: str | None) -> SessionResult:
    """Save the key, if one is given, and make the platform refuse the old one, both during the monitor."""
    old = vip.vip.ready()["api_key"]
    saved(vip, old)
    vip.vip.switches.job_seconds = 6.0

    def rotate() -> None:
        wait_until(lambda: len(vip.vip.journal.entries("GET", "/rest/executions$")) > 3, 60, "the monitor")
        if key is not None:
            saved(vip, key)
        vip.vip.switches.key_generation = 1

    operator = threading.Thread(target=rotate)
    operator.start()
    try:
        # By name, as a run of a deployment gets it.
        return vip_session(
            VipCredentials.load("rotated", _sync=True),
            "GreyMatter/1.0",
            {"t1": "anatomical.nii"},
            input_dir=input_dir,
            output_dir=tmp_path / "out",
            refresh_time=0.5,
        )
    finally:
        operator.join()


@pytest.mark.slow
def test_a_key_replaced_in_the_saved_block_is_taken_up(vip: Sandbox, input_dir: Path, tmp_path: Path) -> None:
    result = run_and_rotate(vip, input_dir, tmp_path, next_key(vip))
    assert result.is_finished
    assert len(vip.vip.journal.entries("POST", "/rest/executions")) == 1
    refusals = [entry for entry in vip.vip.journal.entries() if entry.status == 401]
    assert len(refusals) == 1


def test_a_key_that_was_not_replaced_is_tried_once(vip: Sandbox, input_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError):
        run_and_rotate(vip, input_dir, tmp_path, None)
    refusals = [entry for entry in vip.vip.journal.entries() if entry.status == 401]
    assert len(refusals) == 1


def test_what_was_changed_in_the_flow_stays(vip: Sandbox) -> None:
    saved(vip, "old")
    loaded: VipCredentials = VipCredentials.load("rotated", _sync=True)
    mine = loaded.model_copy(update={"parallelism": 2})
    saved(vip, vip.vip.ready()["api_key"])

    @flow
    def uses_it() -> int:
        with mine.get_client() as client:
            client.check_key()
            return client.parallelism

    assert uses_it() == 2
