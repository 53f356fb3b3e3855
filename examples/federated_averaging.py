"""Federated averaging: a logistic regression in twenty rounds, encrypted, beside the fit of the pooled rows.

    python -m examples.federated_averaging

Each hospital takes one step along the gradient of its own patients; the averages of what they send, weighted by their
numbers of patients, are the state of the next round. It runs against the sandbox. Pooling the rows, which is done here
to compare, is just what a federation is there to avoid.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.flows.vantage6 import LearnedModel, federated_analysis, federated_rounds
from prefect_biomed.flows.vantage6_parameters import RoundsOutputs
from prefect_biomed.sandbox import Sandbox

IMAGE = "prefect-biomed/clinical:1.0"
OUTCOME = "progression"
THRESHOLD = 140.0
PREDICTORS = ["age", "bmi", "bp"]
ROUNDS = 20


def federated(facts: dict[str, Any], folder: Path) -> LearnedModel:
    """Learn where the rows are.

    Args:
        facts: What the sandbox tells of its vantage6.
        folder: For the states of the rounds.

    Returns:
        The rounds and their last state: coefficients of standardised predictors.
    """
    credentials = Vantage6Credentials(
        url=facts["url"],
        username="north-researcher",
        password=SecretStr(facts["users"]["north-researcher"]["password"]),
        private_key_path=Path(facts["organizations"]["north"]["private_key"]),
    )
    moments = federated_analysis(
        credentials, "encrypted", IMAGE, "partial_moments", arguments={"columns": PREDICTORS}, databases="default"
    )
    values: list[Any] = [result.value for result in moments.results]
    count = sum(value["count"] for value in values)
    means = np.sum([value["sums"] for value in values], axis=0) / count
    scales = np.sqrt(np.sum([value["squares"] for value in values], axis=0) / count - means**2)
    return federated_rounds(
        credentials,
        "encrypted",
        IMAGE,
        "partial_logistic_train",
        rounds=ROUNDS,
        state={"coefficients": [0.0] * (1 + len(PREDICTORS))},
        arguments={
            "outcome": OUTCOME,
            "threshold": THRESHOLD,
            "predictors": PREDICTORS,
            "means": means.tolist(),
            "scales": scales.tolist(),
            "learning_rate": 5.0,
        },
        databases="default",
        outputs=RoundsOutputs(output_dir=folder),
    )


def pooled(facts: dict[str, Any]) -> list[float]:
    """Fit all rows in one place, by Newton's method.

    Args:
        facts: What the sandbox tells of its vantage6.

    Returns:
        Coefficients of standardised predictors, the intercept first.
    """
    rows: list[dict[str, str]] = []
    for labels in facts["tables"].values():
        with Path(labels["default"]).open(newline="") as file:
            rows += csv.DictReader(file)
    x = np.array([[float(row[name]) for name in PREDICTORS] for row in rows])
    y = np.array([float(row[OUTCOME]) > THRESHOLD for row in rows], float)
    design = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)])
    beta = np.zeros(design.shape[1])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-design @ beta))
        hessian = design.T @ (design * (chance * (1 - chance))[:, None])
        beta += np.linalg.solve(hessian, design.T @ (y - chance))
    fit: list[float] = beta.tolist()
    return fit


def show(facts: dict[str, Any], folder: Path) -> None:
    """Print both fits and refuse to call them equal when they are not.

    Args:
        facts: What the sandbox tells of its vantage6.
        folder: For the states of the rounds.

    Raises:
        RuntimeError: The fits differ.
    """
    learnt, theirs = federated(facts, folder), pooled(facts)
    ours = learnt.state["coefficients"]
    title = f"vantage6: {OUTCOME} > {THRESHOLD:g} on {PREDICTORS}, {len(learnt.rounds)} rounds"
    table = Table("coefficient", "federated averaging, encrypted", "pooled", title=title)
    for name, value, other in zip(["intercept", *PREDICTORS], ours, theirs, strict=True):
        table.add_row(name, f"{value:.8f}", f"{other:.8f}")
    Console().print(table)
    parts = urlsplit(facts["url"])
    with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}/_sandbox/journal") as answer:
        requests = len(json.load(answer))
    seconds = sum(one.seconds for one in learnt.rounds) / len(learnt.rounds)
    Console().print(f"{requests / len(learnt.rounds):.1f} requests and {seconds:.1f} s for each round")
    if not np.allclose(ours, theirs, atol=1e-6):
        raise RuntimeError("The federated fit is not the pooled fit.")


def main() -> None:
    """Use the sandbox that is named on the command line by its state file, or one of our own."""
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            show(json.loads(Path(sys.argv[1]).read_text())["vantage6"], Path(folder))
            return
        with Sandbox("vantage6") as sandbox:
            show(sandbox.ready()["vantage6"], Path(folder))


if __name__ == "__main__":
    main()
