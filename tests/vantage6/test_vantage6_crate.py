"""The provenance that an analysis leaves beside its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.federation import Federation, wait
from prefect_biomed.clients.crates import METADATA, check_crate
from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.vantage6 import Task, Vantage6Client, fetch_results, outcome_of, write_analysis_crate


def written(client: Vantage6Client, task: Task, folder: Path) -> bytes:
    """The crate of a task."""
    outcome = outcome_of(client, wait(client, task).states[0])
    results = fetch_results(client, task.id, output_dir=folder, partial=True)
    parameters = {"method": "partial_average", "arguments": {"column": "age"}}
    told = write_analysis_crate(folder, client.url, outcome, results, flow="federated-analysis", parameters=parameters)
    return told.read_bytes()


def test_each_organization_is_told_with_its_result_and_the_same_once_more(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        task = here.launch(client, "partial_average", arguments={"column": "age"})
        told = written(client, task, tmp_path)
        assert written(client, task, tmp_path) == told
        entities = json.loads(told)["@graph"]
        runs = [one for one in entities if "/run/" in one["@id"]]
        assert len(runs) == len(list(tmp_path.glob("task-*-run-*.json"))) >= 2
        assert all(run["startTime"] <= run["endTime"] and run["result"] for run in runs)
        assert check_crate(tmp_path) == ()
        next(tmp_path.glob("task-*-run-*.json")).write_text("{}")
        assert [one.what for one in check_crate(tmp_path)] == ["changed"]
        other = here.launch(client, "partial_average", "north", arguments={"column": "age"})
        with pytest.raises(LedgerError, match="an output_dir of its own"):
            written(client, other, tmp_path)
        assert (tmp_path / METADATA).read_bytes() == told


def test_an_organization_whose_run_has_failed_is_told_as_that(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        task = here.launch(client, "crash", arguments={"crashing": ["north"]})
        entities = json.loads(written(client, task, tmp_path))["@graph"]
    runs = [one for one in entities if "/run/" in one["@id"]]
    assert {run["actionStatus"].rpartition("/")[2] for run in runs} >= {"FailedActionStatus"}
    assert all(run["error"] for run in runs if run["actionStatus"].endswith("FailedActionStatus"))
