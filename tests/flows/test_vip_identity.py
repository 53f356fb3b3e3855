"""Two identical calls are two experiments; the same call made again by a retry is the same one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from pydantic import SecretStr

from prefect_biomed.blocks import VipCredentials
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.flows.sessions import new_session
from prefect_biomed.flows.vip import vip_session
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.tasks import vip as steps

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def credentials(vip: Sandbox) -> Iterator[VipCredentials]:
    ready = vip.vip.ready()
    yield VipCredentials(api_key=SecretStr(ready["api_key"]), url=ready["url"])


def launches(vip: Sandbox) -> int:
    return len([entry for entry in vip.vip.journal.entries("POST", "/rest/executions") if entry.status == 200])


def arguments(credentials: VipCredentials, input_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "credentials": credentials,
        "pipeline_id": "GreyMatter/1.0",
        "input_settings": {"t1": "anatomical.nii"},
        "input_dir": input_dir,
        "refresh_time": 0.2,
    } | changes


@pytest.mark.slow
def test_identical_calls_are_two_experiments_and_a_retry_of_their_parent_adds_none(
    vip: Sandbox, credentials: VipCredentials, input_dir: Path, tmp_path: Path
) -> None:
    attempts = Counter[str]()
    ids: list[list[str]] = []

    @flow(retries=1, retry_delay_seconds=0)
    def parent() -> None:
        attempts["parent"] += 1
        results = [vip_session(**arguments(credentials, input_dir, nb_runs=2), output_dir=tmp_path / n) for n in "ab"]
        ids.append([workflow.identifier for result in results for workflow in result.workflows])
        if attempts["parent"] == 1:
            raise RuntimeError("after both")

    parent()
    assert attempts["parent"] == 2
    assert launches(vip) == 4
    assert len(set(ids[0])) == 4
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_a_child_that_failed_in_monitor_adopts_its_executions_two_levels_deep(
    vip: Sandbox, credentials: VipCredentials, input_dir: Path, tmp_path: Path
) -> None:
    child_runs: list[Any] = []
    attempts = Counter[str]()

    @flow
    def middle() -> None:
        attempts["middle"] += 1
        session = new_session(
            pipeline_id="GreyMatter/1.0",
            input_settings={"t1": "anatomical.nii"},
            input_dir=input_dir,
            output_dir=tmp_path / "out",
        )
        steps.upload_inputs(credentials, session)
        child_runs.append(steps.launch_pipeline(credentials, session, 1).identifier)
        if attempts["middle"] == 1:
            raise RuntimeError("in monitor")
        steps.monitor_workflows(credentials, session, refresh_time=0.2)

    @flow
    def upper() -> None:
        middle()

    @flow(retries=1, retry_delay_seconds=0)
    def root() -> None:
        upper()

    root()
    assert attempts["middle"] == 2
    assert launches(vip) == 1
    assert len(set(child_runs)) == 1


def test_a_retry_on_a_machine_without_the_session_file_finds_the_execution_by_its_name(
    vip: Sandbox, credentials: VipCredentials, input_dir: Path, tmp_path: Path
) -> None:
    attempts = Counter[str]()
    tokens: list[str] = []

    @flow(retries=1, retry_delay_seconds=0)
    def lost() -> None:
        attempts["lost"] += 1
        session = new_session(
            pipeline_id="GreyMatter/1.0",
            input_settings={"t1": "anatomical.nii"},
            input_dir=input_dir,
            output_dir=tmp_path / f"machine{attempts['lost']}",
        )
        tokens.append(session.token)
        steps.upload_inputs(credentials, session)
        steps.launch_pipeline(credentials, session, 1)
        if attempts["lost"] == 1:
            raise RuntimeError("the machine is gone")

    lost()
    assert tokens[0] == tokens[1]
    assert launches(vip) == 1


@pytest.mark.slow
def test_a_flow_called_from_a_task_needs_a_name(credentials: VipCredentials, input_dir: Path, tmp_path: Path) -> None:
    @flow
    def inner(name: str | None) -> str:
        return new_session(session_name=name, output_dir=tmp_path).token

    @task
    def calls_a_flow(name: str | None) -> str:
        return inner(name)

    @flow
    def outer(name: str | None) -> tuple[str, str]:
        return calls_a_flow(name), calls_a_flow(name)

    with pytest.raises(ConfigurationError, match="Give it a name of its own"):
        outer(None)
    first, second = outer("mine")
    assert first == second


def test_outside_a_flow_every_session_is_new(tmp_path: Path) -> None:
    tokens = {new_session(output_dir=tmp_path).token for _ in range(3)}
    assert len(tokens) == 3
