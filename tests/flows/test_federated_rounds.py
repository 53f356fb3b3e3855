"""Rounds of federated learning against the sandbox: beside the pooled fit, killed in the middle, with late nodes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.settings import PREFECT_API_URL

from harness.federation import CLINICAL, HOSPITALS, Federation
from prefect_biomed.clients.errors import DeadlineExceeded
from prefect_biomed.clients.vantage6 import RoundUpdate, TooFewAnswers
from prefect_biomed.flows.vantage6 import LearnedModel, federated_rounds
from prefect_biomed.tasks.policies import key_tag

pytestmark = pytest.mark.usefixtures("prefect_api")

every_generation = pytest.mark.parametrize(
    "generation", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)]
)
OUTCOME, THRESHOLD, PREDICTORS = "progression", 140.0, ["age", "bmi", "bp"]


def patients(here: Federation) -> tuple[Any, Any]:
    """The pooled rows: predictors, and whether the disease has progressed."""
    rows: list[dict[str, str]] = []
    for hospital in HOSPITALS:
        with here.sandbox.cohorts[hospital]["default"].open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    x = np.array([[float(row[name]) for name in PREDICTORS] for row in rows])
    return x, np.array([float(row[OUTCOME]) > THRESHOLD for row in rows], float)


def pooled_fit(x: Any, y: Any) -> Any:
    """Maximum likelihood of the pooled rows, by Newton's method."""
    design = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    beta = np.zeros(design.shape[1])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-design @ beta))
        hessian = design.T @ (design * (chance * (1 - chance))[:, None])
        beta += np.linalg.solve(hessian, design.T @ (y - chance))
    return beta


def learning(here: Federation, folder: Path, rounds: int, **changes: Any) -> dict[str, Any]:
    """Parameters of `federated_rounds` for a logistic regression."""
    x, _ = patients(here)
    found: dict[str, Any] = {
        "credentials": here.credentials(),
        "collaboration": "encrypted",
        "image": CLINICAL,
        "method": "partial_logistic_train",
        "rounds": rounds,
        "state": {"coefficients": [0.0] * (1 + len(PREDICTORS))},
        "arguments": {
            "outcome": OUTCOME,
            "threshold": THRESHOLD,
            "predictors": PREDICTORS,
            "means": x.mean(0).tolist(),
            "scales": x.std(0).tolist(),
            "learning_rate": 5.0,
        },
        "databases": "default",
        "outputs": {"output_dir": folder},
        "waiting": {"refresh_time": 0.1, "round_timeout_seconds": 120},
    }
    if here.generation == 5:
        with here.client() as client:
            data = here.data(client, "encrypted")
        found |= {"databases": data["databases"], "details": {"session": data["session"]}}
    return found | changes


def echoed(here: Federation, folder: Path, rounds: int, **changes: Any) -> dict[str, Any]:
    """Parameters of rounds in which nothing is computed."""
    plain = {"collaboration": "plain", "method": "echo", "arguments": {}, "state": {"w": 1.0}, "aggregation": add_one}
    return learning(here, folder, rounds, **plain | changes)


def add_one(state: Mapping[str, Any], answers: Mapping[str, Any], **settings: Any) -> RoundUpdate:
    assert all(answer["w"] == state["w"] for answer in answers.values()), "each round sends the state of the last"
    return RoundUpdate(state={"w": state["w"] + 1}, metrics={"w": state["w"], "answers": len(answers)}, **settings)


@every_generation
def test_rounds_of_averaging_come_near_the_pooled_fit(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    before = here.tasks_created()
    learnt = federated_rounds(**learning(here, tmp_path, 3))
    x, y = patients(here)
    errors = [
        abs(np.array(json.loads(path.read_text())["coefficients"]) - pooled_fit(x, y)).max()
        for path in sorted(learnt.folder.glob("state-*.json"))
    ]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.2 * errors[0]
    assert here.tasks_created() - before <= 3 + (1 if generation == 5 else 0)
    assert [one.number for one in learnt.rounds] == [1, 2, 3]
    assert learnt.rounds[2].metrics["loss"] < learnt.rounds[0].metrics["loss"]
    assert all(sorted(one.organizations) == sorted(HOSPITALS) for one in learnt.rounds)


@pytest.mark.slow
def test_rounds_stop_early_and_leave_a_table_and_a_plot(here: Federation, tmp_path: Path) -> None:
    learnt = federated_rounds(
        **echoed(here, tmp_path, 9, aggregation=add_one, learning={"metric": "answers", "patience": 1})
    )
    assert learnt.state == {"w": 3.0} and len(learnt.rounds) == 2
    token = learnt.folder.name
    with get_client(sync_client=True) as client:
        keys = {"any_": [f"vantage6-rounds-{token}", f"vantage6-metrics-{token}"]}
        kept = client.read_artifacts(artifact_filter=ArtifactFilter.model_validate({"key": keys}))
    assert Counter(artifact.type for artifact in kept) == {"table": 2, "image": 2}
    converged = federated_rounds(
        **echoed(here, tmp_path, 9, learning={"aggregation_arguments": {"converged": True}}, organizations=["north"])
    )
    assert len(converged.rounds) == 1 and converged.rounds[0].converged


@pytest.mark.slow
def test_a_retry_goes_on_in_its_round_and_makes_no_task_twice(here: Federation, tmp_path: Path) -> None:
    before, attempts, asked = here.tasks_created(), Counter[str](), []

    def fails_once(state: Mapping[str, Any], answers: Mapping[str, Any]) -> RoundUpdate:
        asked.append(state["w"])
        attempts[str(state["w"])] += 1
        if state["w"] == 2.0 and attempts["2.0"] == 1:
            raise RuntimeError("no memory left")
        return add_one(state, answers)

    @flow(retries=1, retry_delay_seconds=0)
    def twice() -> list[Any]:
        return [
            federated_rounds(**echoed(here, tmp_path, 2, aggregation=fails_once, organizations=["north"])) for _ in "ab"
        ]

    first, second = twice()
    assert first.folder != second.folder, "two equal calls are two runs"
    assert first.state == second.state == {"w": 3.0}
    assert here.tasks_created() - before == 4
    assert asked == [1.0, 2.0, 2.0, 1.0, 2.0]


@pytest.mark.slow
def test_rounds_called_from_a_task_are_told_apart_by_their_key(here: Federation, tmp_path: Path) -> None:
    @task
    def calls_a_flow(key: str) -> LearnedModel:
        return federated_rounds(**echoed(here, tmp_path, 1, organizations=["north"]), idempotency_key=key)

    @flow
    def outer() -> list[LearnedModel]:
        return [calls_a_flow(key) for key in ("mine", "mine", "another")]

    before = here.tasks_created()
    first, again, other = outer()
    assert first.folder == again.folder != other.folder
    assert here.tasks_created() - before == 2


@pytest.mark.slow
def test_late_nodes_are_not_waited_for_when_enough_have_answered(here: Federation, tmp_path: Path) -> None:
    north = here.organization("north")
    slow: dict[str, Any] = {
        "method": "answer_of_some",
        "arguments": {"organizations": [north]},
        "state": {"seconds": 300.0},
        "aggregation": lambda state, answers: state,
        "credentials": here.credentials("north-admin"),
    }
    waiting = {"refresh_time": 0.1, "round_timeout_seconds": 3.0}
    learnt = federated_rounds(**echoed(here, tmp_path, 2, **slow, waiting=waiting | {"min_organizations": 1}))
    assert [one.organizations for one in learnt.rounds] == [("north",), ("north",)]
    assert all(one.missing.keys() == {"south", "west"} for one in learnt.rounds)
    with here.client() as client:
        assert all(client.task(one.task_id).status.is_terminal for one in learnt.rounds), "late runs are ended"
    with pytest.raises(TooFewAnswers, match="1 organizations have answered, 2 are needed"):
        federated_rounds(**echoed(here, tmp_path, 1, **slow, waiting=waiting | {"min_organizations": 2}))
    with pytest.raises(DeadlineExceeded):
        federated_rounds(**echoed(here, tmp_path, 1, **slow, waiting=waiting))


KILLED = """
import json, os, signal, sys
from pathlib import Path
from prefect import tags
from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.clients.vantage6 import federated_averaging
from prefect_biomed.flows.vantage6 import federated_rounds
from prefect_biomed.tasks.policies import key_tag

given = json.loads(sys.argv[1])
given["credentials"] = Vantage6Credentials(**given["credentials"])

def aggregation(state, answers):
    if given_kill and len(list(Path(given["outputs"]["output_dir"]).glob("*/state-*.json"))) == given_kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return federated_averaging(state, answers)

given_kill = given.pop("kill")
with tags(*given.pop("tags")):
    print(json.dumps(federated_rounds(aggregation=aggregation, **given).model_dump(mode="json")))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_in_round_seven_goes_on_there(here: Federation, tmp_path: Path) -> None:
    given = learning(here, tmp_path / "rounds", 20)
    facts = here.facts["users"]["north-researcher"]
    given["credentials"] = {
        "url": here.facts["url"],
        "username": "north-researcher",
        "password": facts["password"],
        "private_key_path": str(here.key_file("north")),
    }
    given["outputs"] = {"output_dir": str(tmp_path / "rounds")}
    given["tags"] = [key_tag(str(time.time_ns()))]
    before = here.tasks_created()

    def run(kill: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, json.dumps(given | {"kill": kill})]
        same_engine = os.environ | {"PREFECT_API_URL": str(PREFECT_API_URL.value())}
        return subprocess.run(command, capture_output=True, text=True, timeout=500, env=same_engine, check=False)

    assert run(7).returncode == -signal.SIGKILL
    assert here.tasks_created() - before == 7
    done = run(0)
    assert done.returncode == 0, done.stderr[-3000:]
    learnt = json.loads(done.stdout.splitlines()[-1])
    assert [one["number"] for one in learnt["rounds"]] == list(range(1, 21))
    assert here.tasks_created() - before == 20
    assert np.allclose(learnt["state"]["coefficients"], pooled_fit(*patients(here)), atol=1e-6)
