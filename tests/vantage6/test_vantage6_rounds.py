"""What happens between two rounds of learning: averages, checkpoints, and the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6 import (
    AVERAGING,
    Checkpoints,
    Result,
    Round,
    RoundUpdate,
    Stopping,
    TooFewAnswers,
    aggregated,
    aggregation_of,
    answers_of,
    federated_averaging,
)

STATE = {"bias": 0.0, "layers": {"first": [[1.0, 2.0], [3.0, 4.0]]}}


def ended(number: int, **metrics: float) -> Round:
    return Round(number=number, task_id=number, organizations=("north",), metrics=metrics)


def test_averages_are_weighted_by_the_number_of_records() -> None:
    answers = {
        "north": {"bias": 4.0, "layers": {"first": [[1, 2], [3, 8]]}, "count": 300, "loss": 0.5, "note": "a"},
        "south": {"bias": 0.0, "layers": {"first": [[1, 2], [3, 4]]}, "count": 100, "loss": 0.1, "only": 3},
    }
    update = federated_averaging(STATE, answers)
    assert update.state == {"bias": 3.0, "layers": {"first": [[1.0, 2.0], [3.0, 7.0]]}}
    assert update.metrics == {"change": 3.0, "loss": pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"bias": 1.0, "layers": {"first": [[1, 2], [3, 4]]}}, "south does not tell its number of records"),
        ({"bias": 1.0, "layers": {"first": [[1, 2], [3]]}, "count": 1}, "'layers' of south has another shape"),
        ({"bias": None, "layers": {"first": [[1, 2], [3, 4]]}, "count": 1}, "'bias' of south has another shape"),
        ({"count": 1}, "'bias' of south"),
        (b"PAR1", "south does not tell"),
        ({"bias": 1.0, "count": True}, "south does not tell"),
    ],
)
def test_an_answer_that_cannot_be_averaged_names_its_organization(answer: Any, said: str) -> None:
    good = {"bias": 1.0, "layers": {"first": [[1, 2], [3, 4]]}, "count": 1}
    with pytest.raises(ConfigurationError, match=said):
        federated_averaging(STATE, {"north": good, "south": answer})


def test_no_records_at_all_are_no_average() -> None:
    with pytest.raises(ConfigurationError, match="any records"):
        federated_averaging({"bias": 0.0}, {"north": {"bias": 1.0, "count": 0}})


def test_an_aggregation_is_a_function_or_where_it_is_imported_from() -> None:
    assert aggregation_of(AVERAGING) is federated_averaging
    assert aggregation_of(federated_averaging) is federated_averaging
    for wrong in ("federated_averaging", "no.such:thing", f"{AVERAGING}_of", "math:pi", ":f", "json:"):
        with pytest.raises(ConfigurationError, match=wrong):
            aggregation_of(wrong)
    update = aggregated(lambda state, answers, by=0: {"a": state["a"] + by}, {"a": 1}, {}, {"by": 2})
    assert update == RoundUpdate(state={"a": 3})
    with pytest.raises(ConfigurationError, match="returns list"):
        aggregated(lambda state, answers: [1], {}, {}, {})


def test_a_round_needs_all_answers_or_so_many() -> None:
    north = Result(run_id=1, task_id=1, organization_id=1, organization="north", value={"a": 1}, format="json")
    late = Result(run_id=2, task_id=1, organization_id=2, organization="south", unavailable="it is active")
    assert answers_of([north, late], 1) == ({"north": {"a": 1}}, {"south": "it is active"})
    for least in (None, 2):
        with pytest.raises(TooFewAnswers, match=r"1 organizations have answered, 2 are needed\. south: it is active"):
            answers_of([north, late], least)
    with pytest.raises(TooFewAnswers, match="nobody was asked"):
        answers_of([], None)


@pytest.mark.parametrize(
    ("rule", "values", "due"),
    [
        (Stopping(), [1.0, 1.0, 1.0], False),
        (Stopping(metric="loss", below=0.5), [1.0, 0.5], False),
        (Stopping(metric="loss", below=0.5), [1.0, 0.4], True),
        (Stopping(metric="loss", patience=2), [1.0, 0.9, 0.95], False),
        (Stopping(metric="loss", patience=2), [1.0, 0.9, 0.95, 0.91], True),
        (Stopping(metric="loss", patience=2, min_delta=0.2), [1.0, 0.9, 0.85], True),
        (Stopping(metric="loss", patience=2), [math.nan, math.nan], True),
    ],
)
def test_rounds_stop_early(rule: Stopping, values: list[float], due: bool) -> None:
    assert rule.is_due([ended(number, loss=value) for number, value in enumerate(values, start=1)]) is due


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"no metric 'loss'\. Known: change"):
        Stopping(metric="loss", below=1).is_due([ended(1, change=1.0)])
    assert Stopping().is_due([Round(number=1, task_id=1, organizations=(), converged=True)])


def test_checkpoints_are_taken_up_and_belong_to_one_request(tmp_path: Path) -> None:
    first = Checkpoints(tmp_path, {"method": "train"}, {"w": [0.0]})
    first.add(ended(1, loss=math.inf), {"w": [1.0]})
    again = Checkpoints(tmp_path, {"method": "train"}, {"w": [0.0]})
    assert again.rounds == first.rounds and again.state() == {"w": [1.0]}
    assert json.loads(again.state_file(0).read_text()) == {"w": [0.0]}
    with pytest.raises(ConfigurationError, match="other method"):
        Checkpoints(tmp_path, {"method": "test"}, {"w": [0.0]})


def test_a_state_without_its_record_is_made_again(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {}, {"w": 0})
    kept.state_file(1).write_text('{"w": 7}')
    again = Checkpoints(tmp_path, {}, {"w": 0})
    assert again.rounds == [] and again.state() == {"w": 0}
    again.add(ended(1), {"w": 1})
    assert Checkpoints(tmp_path, {}, {"w": 0}).state() == {"w": 1}


def test_a_state_that_has_diverged_is_not_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, {}, {"w": 0})
    with pytest.raises(ConfigurationError, match="state after round 1 is not JSON"):
        kept.add(ended(1), {"w": math.nan})
    assert Checkpoints(tmp_path, {}, {"w": 0}).rounds == []
