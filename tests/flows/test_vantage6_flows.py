"""The flows and tasks of vantage6 against the sandbox."""

from __future__ import annotations

import io
import json
import logging
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, LogFilter
from pydantic import SecretStr, ValidationError

from harness.federation import CLINICAL, HOSPITALS, Federation, federation
from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.clients.crates import check_crate
from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    DeadlineExceeded,
    NotFoundError,
    PollingFailed,
    PreflightFailed,
)
from prefect_biomed.clients.vantage6 import (
    KeyMismatch,
    NameConflict,
    Node,
    NodeDatabase,
    Organization,
    OrganizationSpec,
    PrivateKey,
    Status,
    Task,
    TaskFailed,
    TaskRequest,
    UserSpec,
)
from prefect_biomed.flows.vantage6 import (
    DataframeSpec,
    Function,
    federated_analysis,
    federated_session,
    kill_remote_tasks,
    provision_collaboration,
)
from prefect_biomed.flows.vantage6_parameters import AnalysisWaiting, FederatedOutputs, SessionDetails, TaskDetails
from prefect_biomed.sandbox import Fault
from prefect_biomed.tasks import vantage6 as steps

pytestmark = pytest.mark.usefixtures("prefect_api")

every_generation = pytest.mark.parametrize("generation", [3, 4, 5])


@pytest.fixture
def printed() -> Iterator[list[logging.LogRecord]]:
    """Everything that Prefect's loggers get, at all levels."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    keep = Keep()
    loggers = [logging.getLogger(name) for name in ("prefect.task_runs", "prefect.flow_runs")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(keep)
        logger.setLevel(logging.DEBUG)
    yield records
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(keep)
        logger.setLevel(level)


def arguments(here: Federation, method: str = "echo", **changes: Any) -> dict[str, Any]:
    """Parameters of `federated_analysis`; those of its groups are sorted into them."""
    details = {name: changes.pop(name) for name in TaskDetails.model_fields if name in changes}
    waiting = {name: changes.pop(name) for name in AnalysisWaiting.model_fields if name in changes}
    found: dict[str, Any] = {
        "credentials": here.credentials(),
        "collaboration": "plain",
        "image": CLINICAL,
        "method": method,
        "databases": "default",
        "refresh_time": 0.1,
        "waiting": {"timeout_seconds": 60} | waiting,
    }
    if here.generation == 5:
        with here.client() as client:
            data = here.data(client, str(changes.get("collaboration", "plain")))
        found["databases"] = data["databases"]
        details["session"] = data["session"]
    return found | {"details": details} | changes


def request(method: str, *organizations: str, **fields: Any) -> TaskRequest:
    """What `create_task` is to create, on the database of each organization."""
    return TaskRequest(
        collaboration="plain",
        organizations=list(organizations) or None,
        image=CLINICAL,
        method=method,
        databases="default",
        **fields,
    )


@pytest.mark.slow
@every_generation
def test_what_an_algorithm_answers_with_is_had_as_a_table_or_a_picture(
    federations: Callable[[int], Federation], generation: int
) -> None:
    here = federations(generation)
    stacked = []
    for kind in ("csv", "parquet", "arrow", "jsonl"):
        table = federated_analysis(
            **arguments(here, "table", collaboration="encrypted", arguments={"kind": kind, "columns": ["age", "bmi"]})
        )
        assert {one.format for one in table.results} == {kind}
        stacked.append(table.to_frame().sort_values(["organization", "age", "bmi"], ignore_index=True))
    assert all(len(frame) == 442 and frame.equals(stacked[0]) for frame in stacked)
    picture = federated_analysis(
        **arguments(here, "plot", organizations=["north"], arguments={"column": "age"}, collaboration="encrypted")
    )
    assert isinstance(picture.value, bytes)
    assert PIL.Image.open(io.BytesIO(picture.value)).size == (160, 100)


@every_generation
def test_arguments_too_large_for_the_engine_come_from_a_file(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here, weights = federations(generation), [number / 7 for number in range(60_000)]
    (tmp_path / "weights.json").write_text(json.dumps({"weights": weights}))
    analysis = federated_analysis(
        **arguments(here, collaboration="encrypted", organizations=["north"], arguments={"rate": 0.5}),
        arguments_file=str(tmp_path / "weights.json"),
    )
    assert analysis.value == {"weights": weights, "rate": 0.5}


def test_arguments_too_large_for_the_engine_are_refused_before_it_is_asked(here: Federation) -> None:
    sent = here.tasks_created()
    large = {"weights": [0.123456789] * 60_000}
    with pytest.raises(ConfigurationError, match=r"arguments alone \d+; the engine takes 524288.*arguments_file"):
        federated_analysis(**arguments(here, arguments=large))

    @flow
    def of_my_own() -> Any:
        return federated_analysis(**arguments(here, arguments=large))

    with pytest.raises(ConfigurationError, match="arguments_file"):
        of_my_own()
    assert here.tasks_created() == sent


def test_a_task_of_a_flow_of_ones_own_takes_large_arguments_as_they_are(here: Federation) -> None:
    large = {"weights": [0.123456789] * 60_000}

    @flow
    def of_my_own() -> Any:
        made = steps.create_task(here.credentials(), request("echo", "north", arguments=large))
        steps.wait_for_results(here.credentials(), made, refresh_time=0.1)
        return steps.get_results(here.credentials(), made)[0].value

    assert of_my_own() == large


def test_the_table_of_results_shows_small_values(here: Federation) -> None:
    analysis = federated_analysis(
        **arguments(here, "partial_average", organizations=["north"], arguments={"column": "age"})
    )
    with get_client(sync_client=True) as client:
        kept = client.read_artifacts(
            artifact_filter=ArtifactFilter.model_validate({"key": {"any_": [f"vantage6-results-{analysis.task.id}"]}})
        )
    # Servers of other tests count their tasks from 1, too.
    newest = max(kept, key=lambda artifact: str(artifact.created))
    (row,) = json.loads(str(newest.data))
    assert json.loads(row["value"]) == analysis.value and row["format"] == "json"


def test_a_federated_regression_equals_the_pooled_fit(federations: Callable[[int], Federation], tmp_path: Path) -> None:
    for generation in (3, 4, 5):
        here = federations(generation)
        analysis = federated_analysis(
            **arguments(
                here,
                "central_linear_regression",
                collaboration="encrypted",
                organizations=["north"],
                arguments={"outcome": "progression", "predictors": ["bmi", "bp"]},
                central=True,
            ),
            outputs=FederatedOutputs(output_dir=tmp_path / str(generation)),
        )
        (result,) = analysis.results
        assert check_crate(tmp_path / str(generation)) == ()
        pooled = _pooled(here, "progression", ["bmi", "bp"])
        assert isinstance(result.value, dict)
        assert np.allclose(list(result.value["coefficients"].values()), pooled, rtol=1e-9)


def _pooled(here: Federation, outcome: str, predictors: list[str]) -> Any:
    tables = [np.genfromtxt(files["default"], delimiter=",", names=True) for files in here.sandbox.cohorts.values()]
    y = np.concatenate([table[outcome] for table in tables])
    columns = [np.concatenate([table[name] for table in tables]) for name in predictors]
    return np.linalg.lstsq(np.column_stack([np.ones(len(y)), *columns]), y, rcond=None)[0]


@every_generation
@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_an_analysis_gives_the_results_of_each_organization(
    federations: Callable[[int], Federation], generation: int, collaboration: str
) -> None:
    here = federations(generation)
    analysis = federated_analysis(**arguments(here, collaboration=collaboration, arguments={"a": [1, None]}))
    assert {one.organization: one.value for one in analysis.results} == {name: {"a": [1, None]} for name in HOSPITALS}
    assert analysis.task.status is Status.COMPLETED and analysis.failures == ()


def test_launch_now_and_collect_later(here: Federation) -> None:
    launched = federated_analysis(**arguments(here, arguments={"a": 1}, wait=False))
    assert launched.results == ()
    created = here.tasks_created()
    collected = federated_analysis(**arguments(here), task_id=launched.task.id)
    assert collected.task.id == launched.task.id and len(collected.results) == 3
    assert here.tasks_created() == created


@pytest.mark.slow
def test_what_algorithms_print_is_in_the_log_while_they_run(here: Federation, printed: list[logging.LogRecord]) -> None:
    federated_analysis(**arguments(here, "sleep", organizations=["north"], arguments={"seconds": 8}))
    lines = [record for record in printed if "north-plain] info > " in record.getMessage()]
    (ended,) = [record.created for record in printed if "is completed" in record.getMessage()]
    assert len(lines) == len({record.getMessage() for record in lines}) >= 8
    assert ended - lines[0].created > 1.5


def test_a_failure_names_everything_and_partial_results_are_enough_when_asked(here: Federation) -> None:
    crashing = arguments(here, "crash", arguments={"organizations": [here.organization("south")], "after_seconds": 0.5})
    with pytest.raises(TaskFailed) as failed:
        federated_analysis(**crashing)
    for part in ("south", "south-plain", "crashed", "ZeroDivisionError", "partial=True"):
        assert part in str(failed.value)
    analysis = federated_analysis(**crashing, outputs=FederatedOutputs(partial=True))
    assert {one.organization: one.unavailable is None for one in analysis.results} == {
        "north": True,
        "south": False,
        "west": True,
    }
    assert [failure.organization for failure in analysis.failures] == ["south"]


@pytest.mark.slow
def test_one_wait_for_many_tasks_is_one_request_for_each_look(here: Federation) -> None:
    @flow
    def many() -> int:
        made = [
            steps.create_task(
                here.credentials(), request("sleep", "north", arguments={"seconds": 8}), repetition=number
            )
            for number in range(1, 5)
        ]
        assert len({one.id for one in made}) == 4
        here.sandbox.journal.clear()
        outcomes = steps.wait_for_results(here.credentials(), made, refresh_time=0.3, follow_logs=False)
        return sum(outcome.is_success for outcome in outcomes)

    assert many() == 4
    listed = here.calls("GET", "/api/task$")
    assert len(listed) >= 4
    # Each task is read once at the start; then there are lists, and one request when a single task is left.
    assert len(here.calls("GET", r"/api/task/\d+$")) == 4


# -- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_identical_calls_are_two_tasks_and_a_retry_of_their_parent_adds_none(here: Federation) -> None:
    attempts = Counter[str]()
    ids: list[list[int]] = []
    created = here.tasks_created()

    @flow(retries=1, retry_delay_seconds=0)
    def parent() -> None:
        attempts["parent"] += 1
        ids.append([federated_analysis(**arguments(here)).task.id for _ in range(2)])
        if attempts["parent"] == 1:
            raise RuntimeError("after both")

    parent()
    assert attempts["parent"] == 2
    assert ids[0] == ids[1] and len(set(ids[0])) == 2
    assert here.tasks_created() == created + 2


@pytest.mark.slow
def test_a_child_that_failed_while_waiting_adopts_its_task_two_levels_deep(here: Federation) -> None:
    attempts = Counter[str]()
    ids: list[int] = []
    created = here.tasks_created()

    @flow
    def middle() -> None:
        attempts["middle"] += 1
        made = steps.create_task(here.credentials(), request("echo"))
        ids.append(made.id)
        if attempts["middle"] == 1:
            raise RuntimeError("while waiting")
        steps.wait_for_results(here.credentials(), made, refresh_time=0.1)

    @flow
    def upper() -> None:
        middle()

    @flow(retries=1, retry_delay_seconds=0)
    def root() -> None:
        upper()

    root()
    assert attempts["middle"] == 2 and len(set(ids)) == 1
    assert here.tasks_created() == created + 1


@pytest.mark.slow
def test_equal_calls_of_a_flow_and_of_two_child_flows_are_tasks_of_their_own(here: Federation) -> None:
    @flow
    def child() -> list[int]:
        return [
            steps.create_task(here.credentials(), request("echo", "north"), repetition=number).id
            for number in (1, 2, 2)
        ]

    @flow
    def parent() -> list[list[int]]:
        return [child(), child()]

    first, second = parent()
    assert len({*first, *second}) == 6


def test_a_flow_called_from_a_task_needs_a_key_of_its_own(here: Federation) -> None:
    @task
    def calls_a_flow(key: str | None) -> int:
        return federated_analysis(**arguments(here, wait=False), idempotency_key=key).task.id

    @flow
    def outer(key: str | None) -> list[int]:
        return [calls_a_flow(key), calls_a_flow(key)]

    with pytest.raises(ConfigurationError, match="idempotency_key"):
        outer(None)
    first, second = outer("mine")
    assert first == second


def test_outside_a_flow_every_call_is_a_task_of_its_own(here: Federation) -> None:
    made = [steps.create_task(here.credentials(), request("echo", "north")) for _ in range(2)]
    assert made[0].id != made[1].id


# -- cancelling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("account", ["north-researcher", "north-admin"])
def test_the_cancellation_hook_kills_only_when_asked_and_allowed(here: Federation, asked: bool, account: str) -> None:
    credentials = here.credentials(account)
    slow = arguments(here, "sleep", arguments={"seconds": 20}, credentials=credentials, organizations=["north"])
    waiting = AnalysisWaiting(wait=False, cancel_remote=asked)
    state = federated_analysis(**slow | {"waiting": waiting}, return_state=True)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
    # What the server stored of a block that was not saved is masked; a deployment stores a reference.
    run.parameters["credentials"] = credentials
    made: Task = state.result().task
    kill_remote_tasks(federated_analysis, run, state)
    with here.client("north-admin") as admin:
        assert admin.task_status(made.id).is_terminal == (asked and account == "north-admin")
        admin.kill_task(made.id)


def test_a_task_that_cannot_be_killed_does_not_keep_the_others_alive(here: Federation) -> None:
    credentials = here.credentials("north-admin")
    slow = arguments(here, "sleep", arguments={"seconds": 20}, credentials=credentials, organizations=["north"])
    waiting = AnalysisWaiting(wait=False, cancel_remote=True)
    state = federated_analysis(**slow | {"waiting": waiting}, return_state=True)
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
    run.parameters["credentials"] = credentials
    first: Task = state.result().task
    another = request("sleep", "north", arguments={"seconds": 20}, name="another")
    second = steps.create_task(credentials, another, token=first.name.rpartition("-")[2])
    here.sandbox.faults.add(Fault(method="POST", path="/kill/task$", status=500, calls=[1]))
    with pytest.raises(BiomedError):
        kill_remote_tasks(federated_analysis, run, state)
    here.sandbox.faults.clear()
    with here.client("north-admin") as admin:
        assert sorted(admin.task_status(task.id).is_terminal for task in (first, second)) == [False, True]
        kill_remote_tasks(federated_analysis, run, state)
        assert all(admin.task_status(task.id).is_terminal for task in (first, second))


def test_a_task_can_be_killed_and_what_was_killed_is_told(here: Federation) -> None:
    @flow
    def start_and_kill() -> Any:
        made = steps.create_task(here.credentials(), request("sleep", "north", arguments={"seconds": 30}))
        return steps.kill_task(here.credentials("north-admin"), made)

    outcome = start_and_kill()
    assert {run.status for run in outcome.runs} == {Status.KILLED}
    assert not outcome.is_success


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_all_problems_of_a_request_at_once(here: Federation) -> None:
    with pytest.raises(PreflightFailed) as refused:
        federated_analysis(
            **arguments(
                here,
                collaboration="encrypted",
                organizations=["north", "north", "nowhere"],
                databases=["unknown", 7],
                arguments={"good": 1, "bad": float("nan")},
                name="x" * 200,
                columns=["age"],
                credentials=here.credentials(key="south"),
            )
        )
    problems = "\n".join(refused.value.problems)
    for part in (
        "name has 200 characters",
        "arguments['bad'] is not JSON",
        "'north' is named twice",
        "'nowhere' is not a member. Known: 'north'",
        "has no 'unknown'. Known: ",
        "databases: 7 is a dataframe",
        "not the one of organization 'north'",
    ):
        assert part in problems
    assert [call for call in here.calls("POST") if "token" not in call] == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"collaboration": "nothing"}, r"no collaboration of name 'nothing'. Known: 'plain' \(id 1\), 'encrypted'"),
        ({"collaboration": 99}, "no collaboration of id 99. Known: 'plain'"),
        ({"study": "nothing"}, "no study of name 'nothing'. Known: 'north-and-south'"),
        ({"organizations": ["west"], "study": "north-and-south"}, "'west' is not a member. Known: 'north'.*'south'"),
        ({"columns": ["height"]}, "has no 'height'. Known: .*age"),
        ({"databases": "other"}, "has no 'other'. Known: .*default"),
        ({"image": " "}, "image is empty"),
        ({"description": "x" * 1025}, "description has 1025 characters"),
    ],
)
def test_what_is_unknown_lists_what_is_known(here: Federation, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PreflightFailed, match=text):
        federated_analysis(**arguments(here, **changes))


def test_databases_in_a_wrong_form_are_refused_with_the_field_named(here: Federation) -> None:
    with pytest.raises(ValidationError, match=r"databases\[0\] is \{'query'"):
        TaskRequest(collaboration="plain", image=CLINICAL, method="echo", databases=[{"query": "SELECT"}])
    with pytest.raises(ConfigurationError, match=r"databases.*databases\[0\] is .*query.*Nothing was sent"):
        federated_analysis(**arguments(here) | {"databases": [{"query": "SELECT"}]})
    with pytest.raises(ValidationError):
        Vantage6Credentials(url="no url")


@pytest.mark.slow
def test_a_server_that_is_gone_for_a_while_is_survived(here: Federation) -> None:
    made = federated_analysis(**arguments(here, "sleep", arguments={"seconds": 2}, wait=False)).task
    here.sandbox.faults.add(Fault(path=f"/task/{made.id}", drop="before", times=9))
    assert len(federated_analysis(**arguments(here), task_id=made.id).results) == 3


@pytest.mark.slow
def test_a_server_that_stays_gone_ends_the_wait_with_the_way_back(here: Federation) -> None:
    made = federated_analysis(**arguments(here, "sleep", arguments={"seconds": 12}, wait=False)).task
    here.sandbox.faults.add(Fault(path=r"/task/\d+/status", status=503))

    @flow
    def waiting() -> None:
        steps.wait_for_results(here.credentials(), made, refresh_time=0.05, error_budget=1)

    with pytest.raises(PollingFailed, match=rf"Nothing was stopped remotely. .*task_id={made.id} takes it up again"):
        waiting()
    here.sandbox.faults.clear()
    assert len(federated_analysis(**arguments(here), task_id=made.id).results) == 3


def test_a_deadline_names_who_is_waited_for(here: Federation) -> None:
    with pytest.raises(DeadlineExceeded, match=r"waits for north \(active, node north-plain\)") as late:
        federated_analysis(
            **arguments(here, "sleep", arguments={"seconds": 20}, organizations=["north"], timeout_seconds=1.5)
        )
    assert "task_id=" in str(late.value)


@pytest.mark.slow
def test_what_is_there_at_the_deadline_is_given_and_the_rest_fetched_later(here: Federation) -> None:
    west = here.organization("west")
    slow = arguments(
        here, "sleep", arguments={"seconds": 15, "organizations": [west]}, timeout_seconds=6, follow_logs=False
    )
    analysis = federated_analysis(**slow, outputs=FederatedOutputs(partial=True))
    assert {one.organization: one.missing for one in analysis.results} == {"north": False, "south": False, "west": True}
    (warning,) = analysis.warnings
    assert "west has no result yet" in warning and f"task_id={analysis.task.id}" in warning
    later = federated_analysis(**arguments(here, "sleep"), task_id=analysis.task.id)
    assert later["west"].value == 15.0 and not later.warnings


# -- secrets ------------------------------------------------------------------------------------------------------


def test_no_secret_leaves_the_process(
    here: Federation, caplog: pytest.LogCaptureFixture, printed: list[logging.LogRecord]
) -> None:
    caplog.set_level(logging.DEBUG)
    password = here.facts["users"]["north-researcher"]["password"]
    pem = here.key("north").pem.decode()
    credentials = here.credentials(private_key_path=None, private_key=SecretStr(pem))
    states = [
        federated_analysis(**arguments(here, collaboration="encrypted", credentials=credentials), return_state=True),
        federated_analysis(
            **arguments(here, "crash", collaboration="encrypted", credentials=credentials), return_state=True
        ),
    ]
    assert states[0].is_completed() and states[1].is_failed()
    with get_client(sync_client=True) as client:
        texts = [caplog.text, repr(credentials), str(credentials.model_dump()), repr(states)]
        texts += [record.getMessage() + str(record.exc_info) for record in printed]
        for state in states:
            run = client.read_flow_run(state.state_details.flow_run_id)
            texts.append(run.model_dump_json())
            logs = LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
            texts += [entry.message for entry in client.read_logs(logs, limit=200)]
            artifacts = client.read_artifacts(
                artifact_filter=ArtifactFilter.model_validate({"flow_run_id": {"any_": [run.id]}})
            )
            texts += [artifact.model_dump_json() for artifact in artifacts]
            assert artifacts
    with here.client() as client6:
        _ = client6.me
        tokens = client6._authenticator.access_token()
    body = [line for line in pem.splitlines() if "KEY" not in line]
    for secret in (password, tokens, body[0], body[-1]):
        assert not [text for text in texts if secret in text]


# -- generation 5 -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_is_prepared_once_and_computed_on_again(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    parameters: dict[str, Any] = {
        "credentials": here.credentials(),
        "collaboration": "encrypted",
        "session_name": "adults",
        "dataframes": [
            DataframeSpec(
                name="adults-over-25",
                extraction=Function(image=CLINICAL, method="read_csv"),
                preprocessing=[
                    Function(image=CLINICAL, method="keep_above", arguments={"column": "age", "minimum": 20}),
                    Function(image=CLINICAL, method="keep_above", arguments={"column": "age", "minimum": 25}),
                ],
            )
        ],
        "image": CLINICAL,
        "method": "partial_summary",
        "arguments": {"columns": ["age"]},
        "details": SessionDetails(columns=("age",)),
    }
    first = federated_session(**parameters)
    assert {one.organization for one in first.results} == set(HOSPITALS)
    for one in first.results:
        assert isinstance(one.value, dict) and one.value["age"]["min"] >= 25
    here.sandbox.journal.clear()
    second = federated_session(**parameters)
    assert [one.value for one in second.results] == [one.value for one in first.results]
    made = [call for call in here.calls("POST") if "token" not in call]
    assert made == ["POST /hq/task"]
    with pytest.raises(NameConflict, match="step 1 has method 'keep_above', not 'read_csv'; step 2 is keep_above"):
        changed = parameters["dataframes"][0].model_copy(
            update={"preprocessing": [Function(image=CLINICAL, method="read_csv")]}
        )
        federated_session(**parameters | {"dataframes": [changed]})


def test_a_central_function_on_a_dataframe(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    analysis = federated_session(
        credentials=here.credentials(),
        collaboration="plain",
        session_name="central",
        dataframes=[DataframeSpec(name="for-central", extraction=Function(image=CLINICAL, method="read_csv"))],
        image=CLINICAL,
        method="central_average",
        arguments={"column": "bmi"},
        details=SessionDetails(central=True, compute_at=["north"]),
    )
    (result,) = analysis.results
    tables = [np.genfromtxt(files["default"], delimiter=",", names=True) for files in here.sandbox.cohorts.values()]
    assert isinstance(result.value, dict)
    assert result.value["average"] == pytest.approx(np.concatenate([table["bmi"] for table in tables]).mean())


# -- provisioning -------------------------------------------------------------------------------------------------


def specifications(generation: int) -> list[OrganizationSpec]:
    return [
        OrganizationSpec(
            name=name,
            country="FR",
            domain=f"{name.lower()}.example",
            # The password of a person is temporary on generation 5: the first login, in a browser, changes it.
            users=[UserSpec(username=f"{name.lower()}-scientist", service_account=generation == 5)],
            databases=[NodeDatabase(label="default", uri=f"/data/{name}.csv")],
        )
        for name in ("Alpha", "Beta")
    ]


@pytest.mark.slow
@every_generation
def test_a_federation_is_set_up_once(generation: int, tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    with federation(generation) as here:
        credentials = here.credentials("root", key=None)
        made = provision_collaboration(credentials, "alpha-beta", specifications(generation), folder)
        assert made.collaboration.encrypted
        assert {one.name for one in made.collaboration.organizations} == {"Alpha", "Beta"}
        assert len(made.nodes) == len(made.users) == 2
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        assert set(files) == {"server.yaml"} | {
            f"{name}/{file}"
            for name in ("Alpha", "Beta")
            for file in (f"privkey_{name}.pem", "alpha-beta.yaml", f"users/{name.lower()}-scientist.yaml")
        }
        for path in files.values():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.parent == folder or stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        _check_configuration(here, yaml.safe_load(files["Alpha/alpha-beta.yaml"].read_text()), folder)
        for name in ("Alpha", "Beta"):
            key = PrivateKey.from_file(folder / name / f"privkey_{name}.pem")
            (public,) = [one.public_key for one in made.collaboration.organizations if one.name == name]
            assert key.matches(public)
            login = yaml.safe_load(files[f"{name}/users/{name.lower()}-scientist.yaml"].read_text())
            user = Vantage6Credentials(url=here.facts["url"], auth_url=here.facts.get("auth_url"), **login)
            with user.get_client() as client:
                assert client.me.organization_id in {one.id for one in made.organizations}

        before = {name: path.read_bytes() for name, path in files.items()}
        here.sandbox.journal.clear()
        again = provision_collaboration(credentials, "alpha-beta", specifications(generation), folder)
        assert again == made.model_copy(update={"users": again.users, "nodes": again.nodes})
        assert [call for call in here.calls() if not call.startswith("GET") and "token" not in call] == []
        assert {name: path.read_bytes() for name, path in files.items()} == before
        secret = list(yaml.safe_load(before["Alpha/users/alpha-scientist.yaml"]).values())[1]
        assert secret not in made.model_dump_json() + repr(made)


def _check_configuration(here: Federation, configuration: dict[str, Any], folder: Path) -> None:
    """What a node of this generation needs, and whether the server takes the key."""
    key_file = str(folder / "Alpha" / "privkey_Alpha.pem")
    port = int(here.sandbox.url.rsplit(":", 1)[1])
    if here.generation == 5:
        node = configuration["node"]
        assert node["encryption"] == {"enabled": True, "private_key": key_file}
        assert node["hq"] == {"url": "http://127.0.0.1", "port": port, "path": "/hq"}
        assert node["databases"]["fileBased"][0]["uri"] == "/data/Alpha.csv"
        stored = {one.name: one.api_key for one in here.sandbox.registry.nodes}
        assert stored[node["name"]] == node["apiKey"]
        return
    node = configuration["application"] if here.generation == 3 else configuration
    assert node["encryption"] == {"enabled": True, "private_key": key_file}
    assert (node["server_url"], node["port"], node["api_path"]) == ("http://127.0.0.1", port, "/api")
    assert "/data/Alpha.csv" in json.dumps(node["databases"])
    assert node["api_key"] in {one.api_key for one in here.sandbox.registry.nodes}


def test_existing_keys_are_never_replaced(tmp_path: Path) -> None:
    with federation(4) as here:
        credentials = here.credentials("root", key=None)
        folder = tmp_path / "f"
        spec = [OrganizationSpec(name="north")]
        public = {one.name: one.public_key for one in here.sandbox.registry.organizations}
        made = provision_collaboration(credentials, "another", spec, folder)
        assert [one.name for one in made.organizations] == ["north"]
        assert {one.name: one.public_key for one in here.sandbox.registry.organizations} == public
        assert not list(folder.rglob("*.pem"))
        other = PrivateKey.generate(2048).pem
        (folder / "north" / "privkey_north.pem").write_bytes(other)
        with pytest.raises(KeyMismatch, match="Neither was"):
            provision_collaboration(credentials, "another", spec, folder)
        assert (folder / "north" / "privkey_north.pem").read_bytes() == other


def test_a_node_whose_key_was_lost_in_a_crash_gets_a_new_one_and_no_other_does(tmp_path: Path) -> None:
    with federation(4) as here:
        credentials = here.credentials("root", key=None)
        folder = tmp_path / "f"
        spec = [OrganizationSpec(name="north")]
        provision_collaboration(credentials, "another", spec, folder)
        configuration = folder / "north" / "another.yaml"
        keys = {node.name: node.api_key for node in here.sandbox.registry.nodes}
        configuration.unlink()
        provision_collaboration(credentials, "another", spec, folder)
        assert not configuration.exists(), "a node that may be running somewhere keeps its key"
        assert {node.name: node.api_key for node in here.sandbox.registry.nodes} == keys
        # A process killed between the registration and the writing of the file leaves this mark.
        configuration.with_suffix(".registering").touch()
        provision_collaboration(credentials, "another", spec, folder)
        key = yaml.safe_load(configuration.read_text())["api_key"]
        assert key in {node.api_key for node in here.sandbox.registry.nodes} and key not in keys.values()


@pytest.mark.slow
def test_what_cannot_be_set_up_is_refused(tmp_path: Path) -> None:
    with federation(4) as here:
        root = here.credentials("root", key=None)
        with pytest.raises(NameConflict, match="is not encrypted"):
            provision_collaboration(root, "plain", [OrganizationSpec(name="north")], tmp_path)
        with pytest.raises(ConfigurationError, match="absolute"):
            provision_collaboration(root, "new", [OrganizationSpec(name="north")], Path("relative"))
        with pytest.raises(ConfigurationError, match="same folder"):
            twins = [OrganizationSpec(name="a b"), OrganizationSpec(name="a/b")]
            provision_collaboration(root, "new", twins, tmp_path)
        with pytest.raises(NotFoundError, match=r"no role 'Wizard'. Known: .*Researcher"):
            wizard = UserSpec(username="wizard", roles=["Wizard"])
            provision_collaboration(root, "new", [OrganizationSpec(name="New", users=[wizard])], tmp_path)


@every_generation
def test_resources_are_listed(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)

    @flow
    def listing(*given: Any) -> Any:
        return steps.list_resources(here.credentials(), *given)

    found = listing("organization", {"collaboration_id": 1})
    assert {one.name for one in found if isinstance(one, Organization)} == set(HOSPITALS)
    nodes = listing("node")
    assert all(isinstance(node, Node) for node in nodes)
    with pytest.raises(ConfigurationError, match="cannot filter by 'nonsense'"):
        listing("node", {"nonsense": 1})
    with pytest.raises(ConfigurationError, match="no filter 'nonsense'"):
        listing("column", {"nonsense": 1})
    with pytest.raises(ConfigurationError, match="limit is 0"):
        listing("column", {"dataframe_id": 1}, (), 0)


def _until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
