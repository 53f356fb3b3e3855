"""Known faults of vantage6 servers, which switches of the sandbox bring about: what the client says of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness.dataframe_chains import chain
from harness.federation import CLINICAL, FAST, Federation, federation, federations, token, wait
from prefect_biomed.clients.errors import PreflightFailed
from prefect_biomed.clients.vantage6 import (
    Dataframe,
    DataframeStuck,
    Session,
    Status,
    Task,
    TaskFailed,
    TaskRequest,
    Vantage6Client,
    add_preprocessing,
    fetch_results,
    launch,
    make_dataframe,
    make_session,
    outcome_of,
    task_failed,
    wait_for_dataframe,
)
from prefect_biomed.clients.vantage6.errors import ServerFault

__all__ = ["federations"]


@pytest.fixture
def five(federations: Callable[[int], Federation]) -> Iterator[Federation]:
    here = federations(5)
    yield here
    switches = here.sandbox.switches
    switches.stuck_dataframes = switches.failed_is_ready = switches.failures_stay_open = False


def extracted(client: Vantage6Client, session: Session, name: str, method: str = "read_csv") -> Dataframe:
    return make_dataframe(client, session.id, name, label="default", image=CLINICAL, method=method)


def _taken_up_again(client: Vantage6Client, task: Task, ends: Status) -> bool:
    (run,) = client.runs(task.id)
    return run.status is ends and "the disk was not mounted" not in run.log


def compute(client: Vantage6Client, session: Session, name: str, *organizations: str) -> Task:
    request = TaskRequest(
        collaboration="plain",
        image=CLINICAL,
        method="partial_summary",
        databases=name,
        session=session.id,
        organizations=list(organizations) or None,
    )
    return launch(client, request, token())


def test_a_dataframe_that_a_good_step_leaves_unready_is_named_with_what_helps(five: Federation) -> None:
    """vantage6 #2233."""
    first, *_ = chain("f").preprocessing
    five.sandbox.switches.stuck_dataframes = True
    with five.client() as client:
        session, name = make_session(client, "plain", f"s-{token()}"), f"f-{token()}"
        frame = extracted(client, session, name)
        assert wait_for_dataframe(client, frame.id, FAST).ready
        step = add_preprocessing(client, frame.id, 1, **first.model_dump())
        helps = rf"task {step.id}, its last step, went well.*#2233.*delete_dataframe\(credentials, {frame.id}\)"
        with pytest.raises(DataframeStuck, match=helps):
            wait_for_dataframe(client, frame.id, FAST)
        with pytest.raises(PreflightFailed, match=helps):
            compute(client, session, name)
        with pytest.raises(PreflightFailed, match=helps):
            add_preprocessing(client, frame.id, 2, **first.model_dump())
        with pytest.raises(ServerFault):
            client.delete(Task, step.id)
        # What the message advises does help.
        client.delete(Dataframe, frame.id)
        anew = extracted(client, session, name)
        assert wait_for_dataframe(client, anew.id, FAST).ready
        wait(client, compute(client, session, name))


def test_a_dataframe_that_counts_as_ready_after_a_failure_is_not_computed_on(five: Federation) -> None:
    """vantage6 #2170."""
    table = five.sandbox.cohorts["south"]["default"]
    away = table.with_suffix(".away")
    five.sandbox.switches.failed_is_ready = True
    with five.client() as client:
        session, name = make_session(client, "plain", f"s-{token()}"), f"f-{token()}"
        table.rename(away)
        try:
            frame = extracted(client, session, name)
            with pytest.raises(TaskFailed, match="south"):
                wait_for_dataframe(client, frame.id, FAST)
        finally:
            away.rename(table)
        assert client.get(Dataframe, frame.id).ready and client.get(Session, session.id).ready
        before = five.tasks_created()
        with pytest.raises(PreflightFailed, match=r"not there for .*south.* is failed\. Mend what its log names"):
            compute(client, session, name)
        assert five.tasks_created() == before
        # Making it again, as is advised, makes it anew.
        anew = extracted(client, session, name)
        assert anew.id != frame.id and wait_for_dataframe(client, anew.id, FAST).ready
        wait(client, compute(client, session, name))


@pytest.mark.parametrize("generation", [3, 4, 5])
def test_a_failure_that_a_node_takes_up_again_is_told_with_what_may_come(generation: int, tmp_path: Any) -> None:
    """vantage6 #2371."""
    with federation(generation, {"failures_stay_open": True}) as here, here.client() as client:
        mended: list[bool] = []

        def fails_once(job: Any) -> int:
            if not mended:
                raise ValueError("the disk was not mounted")
            return 42

        here.sandbox.add_image("me/once:1", {"fails_once": fails_once})
        task = here.launch(client, "fails_once", "west", image="me/once:1")
        # It is over at once, although the server never tells its end.
        look = wait(client, task)
        failed = task_failed(outcome_of(client, look.states[0]))
        assert "the disk was not mounted" in str(failed)
        taken_up = rf"run {failed.failures[0].run_id}.*when it restarts \(vantage6 #2371\).*get_results"
        assert failed.failures[0].left_open
        with pytest.raises(TaskFailed, match=taken_up):
            raise failed
        mended.append(True)
        node = here.sandbox.nodes["west-plain"]
        node.stop()
        node.start()
        # Before generation 5, every run needs a token, and a task that has failed gets none.
        again = Status.COMPLETED if generation == 5 else Status.FAILED
        end = time.monotonic() + 30
        while not _taken_up_again(client, task, again):
            assert time.monotonic() < end, "the node has not taken the run up again"
            time.sleep(0.1)
        outcome = outcome_of(client, wait(client, task).states[0])
        assert outcome.is_success == (generation == 5)
        if generation == 5:
            (result,) = fetch_results(client, task.id, output_dir=tmp_path)
            assert result.value == 42
        # Other failures say nothing of it.
        here.sandbox.switches.failures_stay_open = False
        mended.clear()
        failed = task_failed(
            outcome_of(client, wait(client, here.launch(client, "fails_once", "west", image="me/once:1")).states[0])
        )
        assert "#2371" not in str(failed)
