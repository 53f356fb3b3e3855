"""A run that was cancelled does not go on, whatever its process and the automations make of its state afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Running, Scheduled, State
from pydantic import BaseModel

from prefect_biomed.clients.errors import JobFailed
from prefect_biomed.clients.errors import ServerUnavailable as PlatformDown
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.cancellation import AFTER_CRASH, NEVER_BEGAN, ending_remote_jobs, was_cancelled

pytestmark = pytest.mark.usefixtures("prefect_api")

RETRIED_BY_A_PERSON = "Retried by a person"


class Waiting(BaseModel):
    """As the flows have it."""

    cancel_remote: bool = True


WAITING = Waiting()


def run_of(flow: Flow[..., object], *states: State[object]) -> FlowRun:
    """A run of a deployment with these states behind it."""
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(flow_id=client.create_flow(flow), name="toy", entrypoint="toy.py:toy")
        run = client.create_flow_run_from_deployment(deployment)
        client.update_flow_run(run.id, infrastructure_pid="machine:1")
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)
        return client.read_flow_run(run.id)


def toy(do: Callable[[], object]) -> tuple[Flow[..., object], list[str]]:
    """A flow, and what it and its hook have done."""
    done: list[str] = []

    def end_remote_jobs(flow: Flow[..., object], run: FlowRun, state: State[object]) -> None:
        done.append("ended")

    @checked_flow(name="toy", on_cancellation=[end_remote_jobs])
    def toy() -> object:
        done.append("begun")
        return do()

    return toy, done


@pytest.mark.parametrize(
    ("asked_by", "does", "ends_as"),
    [
        (AFTER_CRASH, ["ended"], "Cancelled"),
        (NEVER_BEGAN, ["ended"], "Cancelled"),
        (RETRIED_BY_A_PERSON, ["begun"], "Completed"),
    ],
)
@pytest.mark.parametrize("cancelled", [Cancelling, Cancelled])
def test_a_cancelled_run_whose_process_crashed_ends_unless_a_person_asks_for_it_again(
    cancelled: Callable[[], State[object]], asked_by: str, does: list[str], ends_as: str
) -> None:
    flow, done = toy(lambda: 1)
    run = run_of(flow, Running(), cancelled(), Crashed(), Scheduled(message=asked_by))
    run_flow(flow, flow_run=run, return_type="state")
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run.id).state_name == ends_as
    assert done == does


def test_a_crashed_run_that_nobody_has_cancelled_goes_on() -> None:
    flow, done = toy(lambda: 1)
    run = run_of(flow, Running(), Crashed(), Scheduled(message=AFTER_CRASH))
    run_flow(flow, flow_run=run, return_type="state")
    assert done == ["begun"]


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_run_that_fails_because_its_job_was_ended_is_cancelled_and_not_failed(cancelled: bool) -> None:
    runs: list[FlowRun] = []

    def killed_remotely() -> None:
        if cancelled:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(runs[0].id, Cancelled(), force=True)
        raise JobFailed("its execution was killed")

    flow, _ = toy(killed_remotely)
    runs.append(run_of(flow))
    state = run_flow(flow, flow_run=runs[0], return_type="state")
    assert state.is_cancelled() == cancelled and state.is_failed() != cancelled
    assert "its execution was killed" in str(state.message)
    assert was_cancelled(runs[0].id) == cancelled


def test_a_worker_waits_for_a_platform_or_a_server_that_is_away() -> None:
    outages: list[Exception] = [ConnectionError("the Prefect server is restarted"), PlatformDown("HTTP 503")]
    ended: list[str] = []

    def end(parameters: object, token: str, logger: object) -> list[str]:
        if outages:
            raise outages.pop()
        ended.append(token)
        return [token]

    hook = ending_remote_jobs("toy", end, named_by="name")

    @checked_flow(name="toy", on_cancellation=[hook])
    def toy(name: str = "x", waiting: Waiting = WAITING) -> None:
        """Do nothing."""

    run = run_of(toy)
    hook(toy, run, Cancelling())
    assert len(ended) == 1 and not outages


def test_a_flow_without_a_deployment_is_as_it_was() -> None:
    flow, done = toy(lambda: Completed(message="its own"))
    assert flow(return_state=True).message == "its own"
    assert done == ["begun"]
