"""Every organization that was asked is answered for: with a value, with a failure, or as missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.federation import CLINICAL, FAST, HOSPITALS, Federation, token, wait
from prefect_biomed.clients.errors import DeadlineExceeded, PreflightFailed
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6 import (
    AlgorithmStore,
    EncodedResult,
    Result,
    ResultMissing,
    ResultUnavailable,
    Run,
    Task,
    Vantage6Client,
    fetch_results,
    launch,
    outcome_of,
    outcomes_so_far,
    tasks_failed,
    watch,
)
from prefect_biomed.clients.vantage6.models import Action
from prefect_biomed.sandbox.vantage6 import Job
from prefect_biomed.sandbox.vantage6.algorithms import SubtaskFailed

every_generation = pytest.mark.parametrize("generation", [3, 4, 5])


@pytest.fixture
def client(here: Federation) -> Iterator[Vantage6Client]:
    with here.client() as account:
        yield account


def runs_of(here: Federation, task: Task) -> list[Any]:
    """The runs of a task as the sandbox keeps them, in the order of the hospitals."""
    return [run for run in here.sandbox.registry.runs if run.task.id == task.id]


@every_generation
@pytest.mark.parametrize("organizations", [None, ["north", "south"]])
def test_a_central_function_runs_at_one_organization(
    federations: Callable[[int], Federation], generation: int, organizations: list[str] | None
) -> None:
    here = federations(generation)
    with here.client() as client:
        fields = here.data(client, "plain") if generation == 5 else {}
        request = here.request("central_average", arguments={"column": "age"}, organizations=organizations, **fields)
        before = here.tasks_created()
        with pytest.raises(PreflightFailed, match="it runs at one organization; asked are 'north', 'south'"):
            launch(client, request, token())
        assert here.tasks_created() == before


@pytest.mark.parametrize("generation", [4, 5])
def test_the_algorithm_store_tells_whether_a_function_is_central(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client("root", key=None) as root:
        fields = {"server_url": here.facts["url"], "force": True} if generation == 4 else {"api_path": ""}
        store = root.create(
            AlgorithmStore, name="store", algorithm_store_url=here.facts["store_url"], collaboration_id=1, **fields
        )
    with here.client() as client:
        data = here.data(client, "plain") if generation == 5 else {}
        column = {"column": "age"}
        central = here.request("central_average", arguments=column, central=None, store=store.id, **data)
        partial = here.request("partial_average", arguments=column, central=None, store=store.id, **data)
        with pytest.raises(PreflightFailed, match="it runs at one organization; asked are 'north', 'south'"):
            launch(client, central, token())
        task = launch(client, central.model_copy(update={"organizations": ["north"]}), token())
        wait(client, task)
        (result,) = fetch_results(client, task.id, output_dir=tmp_path)
        assert result.value == {"average": pytest.approx(48.52, abs=0.1), "count": 442}
        assert len(wait(client, launch(client, partial, token())).states[0].runs) == len(HOSPITALS)
        if generation == 5:
            assert client.task(task.id).action == "central_compute"
        # Elsewhere it is asked without a login, which this one refuses; silence is no evidence of a partial function.
        record = here.sandbox.registry.stores.get(store.id)
        assert record is not None
        record.url = record.url.replace("127.0.0.1", "localhost")
        with pytest.raises(
            PreflightFailed, match=r"'partial_average' coordinates others.*Missing Authorization Header"
        ):
            launch(client, partial, token())
        # The server finds out itself when only one organization is asked.
        launch(client, partial.model_copy(update={"organizations": ["north"]}), token())
        wait(client, launch(client, partial.model_copy(update={"central": False}), token()))
    here.sandbox.registry.stores.remove(record)


def test_a_task_of_which_no_run_is_listed_has_not_ended(
    here: Federation, client: Vantage6Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = here.launch(client, "echo", "north")
    wait(client, task)
    monkeypatch.setattr(client, "runs", lambda _: [])
    impatient = PollSettings(interval_seconds=0.1, deadline_seconds=0.5)
    with pytest.raises(DeadlineExceeded):
        list(watch(client, [task.id], impatient))


def test_a_result_that_is_not_listed_is_missing(
    here: Federation, client: Vantage6Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = here.launch(client, "echo")
    wait(client, task)
    whole = client.pages

    def without_the_first(kind: Any, **filters: Any) -> Iterator[Any]:
        pages = whole(kind, **filters)
        if kind is EncodedResult:
            next(pages)
        return pages

    monkeypatch.setattr(client, "pages", without_the_first)
    with pytest.raises(ResultMissing, match="lists no result of run"):
        fetch_results(client, task.id, output_dir=tmp_path)
    results = fetch_results(client, task.id, output_dir=tmp_path, partial=True)
    assert {one.organization for one in results} == set(HOSPITALS)
    assert [one.missing for one in results].count(True) == 1


@pytest.mark.parametrize(
    ("status", "ended", "said", "missing"),
    [
        ("crashed", True, "ended as 'crashed' and has no result", False),
        ("postponed", True, "ended as 'postponed' and has no result", False),
        ("active", False, "is active", True),
    ],
)
def test_what_a_run_has_left_that_did_not_end_well_is_no_result(
    here: Federation, client: Vantage6Client, tmp_path: Path, status: str, ended: bool, said: str, missing: bool
) -> None:
    task = here.launch(client, "echo", "north", arguments={"number": 1})
    wait(client, task)
    (run,) = runs_of(here, task)
    run.status, run.finished_at = status, run.finished_at if ended else None
    with pytest.raises(ResultUnavailable, match=said):
        fetch_results(client, task.id, output_dir=tmp_path)
    (result,) = fetch_results(client, task.id, output_dir=tmp_path, partial=True)
    assert result.value is None and said in (result.unavailable or "") and result.missing == missing


@every_generation
def test_an_organization_of_which_no_run_is_listed_is_missing(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client() as client:
        fields = here.data(client, "plain") if generation == 5 else {}
        request, name = here.request("echo", arguments={"number": 1}, **fields), token()
        task = launch(client, request, name)
        assert task.asked == tuple(here.organization(one) for one in HOSPITALS)
        again = launch(client, request, name)
        assert (again.id, again.asked) == (task.id, task.asked)
        wait(client, task)
        here.sandbox.registry.runs.remove(runs_of(here, task)[-1])
        with pytest.raises(ResultMissing, match="west was asked, and the server lists no run of it"):
            fetch_results(client, task.id, output_dir=tmp_path, asked=task.asked)
        results = fetch_results(client, task.id, output_dir=tmp_path, asked=task.asked, partial=True)
    assert [(one.organization, one.value, one.missing) for one in results] == [
        ("north", {"number": 1}, False),
        ("south", {"number": 1}, False),
        ("west", None, True),
    ]
    assert results[2].run_id is None and Result.model_validate_json(results[2].model_dump_json()) == results[2]


def test_what_is_there_at_the_deadline_is_told(here: Federation, client: Vantage6Client, tmp_path: Path) -> None:
    seconds, west = 4.0, here.organization("west")
    task = here.launch(client, "sleep", arguments={"seconds": seconds, "organizations": [west]})
    looks = watch(client, [task.id], FAST)
    look = next(looks)
    while sum(run.status.is_success for run in client.runs(task.id)) < 2:
        look = next(looks)
    (outcome,) = outcomes_so_far(client, look)
    assert not (outcome.is_finished or outcome.is_success or outcome.is_failure)
    results = {one.organization: one for one in fetch_results(client, task.id, output_dir=tmp_path, partial=True)}
    assert {name: one.missing for name, one in results.items()} == {"north": False, "south": False, "west": True}
    *_, last = looks
    assert outcome_of(client, last.states[0]).is_success
    later = fetch_results(client, task.id, output_dir=tmp_path)
    assert {one.organization: one.value for one in later}["west"] == seconds


def test_a_subtask_that_failed_under_a_task_that_ended_well_is_told(here: Federation, client: Vantage6Client) -> None:
    def central_tolerant(job: Job) -> str:
        try:
            job.everywhere("crash", {}, [here.organization("south")])
        except SubtaskFailed:
            return "all is well"
        raise AssertionError("it has to fail")

    crash = here.sandbox.images[CLINICAL].algorithms["crash"]
    here.sandbox.add_image("tolerant:1", {"central_tolerant": central_tolerant, "crash": crash})
    task = here.launch(client, "central_tolerant", "north", image="tolerant:1")
    state = wait(client, task).states[0]
    unheard = state.task.model_copy(update={"action": Action("orchestrate")})  # of a server that knows more actions
    for seen in (state, replace(state, task=unheard)):
        outcome = outcome_of(client, seen)
        assert outcome.is_success and not outcome.failures
        (failure,) = outcome.tolerated
        assert failure.organization == "south" and failure.in_subtask and "ZeroDivisionError" in failure.log


def test_all_tasks_that_failed_are_in_the_error(here: Federation, client: Vantage6Client) -> None:
    tasks = [here.launch(client, "crash", name) for name in ("north", "west")]
    *_, last = watch(client, [task.id for task in tasks], FAST)
    error = tasks_failed([outcome_of(client, state) for state in last.states])
    assert all(f"task {task.id} " in str(error) for task in tasks)
    assert {failure.organization for failure in error.failures} == {"north", "west"}


def test_a_run_that_goes_on_is_no_failure(here: Federation, client: Vantage6Client) -> None:
    task = here.launch(client, "sleep", "north", arguments={"seconds": 2})
    (outcome,) = outcomes_so_far(client, next(watch(client, [task.id], FAST)))
    assert [type(run) for run in outcome.runs] == [Run] and not outcome.failures
