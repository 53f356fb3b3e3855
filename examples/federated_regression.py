"""A federated linear regression, encrypted end to end, beside the fit of the pooled rows.

    python -m examples.federated_regression

It runs against the sandbox, whose nodes hold the patients of three hospitals. Pooling the rows, which is done here to
compare, is just what a federation is there to avoid.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.flows.vantage6 import federated_analysis
from prefect_biomed.flows.vantage6_parameters import TaskDetails
from prefect_biomed.sandbox import Sandbox

OUTCOME = "progression"
PREDICTORS = ["age", "bmi", "bp"]


def federated(facts: dict[str, Any]) -> dict[str, float]:
    """Fit where the rows are.

    Args:
        facts: What the sandbox tells of its vantage6.

    Returns:
        Coefficients by name.
    """
    credentials = Vantage6Credentials(
        url=facts["url"],
        username="north-researcher",
        password=SecretStr(facts["users"]["north-researcher"]["password"]),
        private_key_path=Path(facts["organizations"]["north"]["private_key"]),
    )
    analysis = federated_analysis(
        credentials,
        collaboration="encrypted",
        image="prefect-biomed/clinical:1.0",
        method="central_linear_regression",
        arguments={"outcome": OUTCOME, "predictors": PREDICTORS},
        organizations=["north"],
        databases="default",
        details=TaskDetails(central=True),
    )
    (result,) = analysis.results
    return dict(result.value["coefficients"])


def pooled(facts: dict[str, Any]) -> dict[str, float]:
    """Fit all rows in one place.

    Args:
        facts: What the sandbox tells of its vantage6.

    Returns:
        Coefficients by name.
    """
    rows: list[dict[str, str]] = []
    for labels in facts["tables"].values():
        with Path(labels["default"]).open(newline="") as file:
            rows += csv.DictReader(file)
    design = np.array([[1.0, *(float(row[name]) for name in PREDICTORS)] for row in rows])
    outcome = np.array([float(row[OUTCOME]) for row in rows])
    fit, *_ = np.linalg.lstsq(design, outcome, rcond=None)
    return dict(zip(["intercept", *PREDICTORS], fit.tolist(), strict=True))


def show(facts: dict[str, Any]) -> None:
    """Print both fits and refuse to call them equal when they are not.

    Args:
        facts: What the sandbox tells of its vantage6.

    Raises:
        RuntimeError: The fits differ.
    """
    ours, theirs = federated(facts), pooled(facts)
    table = Table("coefficient", "federated, encrypted", "pooled", title=f"vantage6: {OUTCOME} on {PREDICTORS}")
    for name, value in ours.items():
        table.add_row(name, f"{value:.6f}", f"{theirs[name]:.6f}")
    Console().print(table)
    if not all(np.isclose(value, theirs[name], rtol=1e-6) for name, value in ours.items()):
        raise RuntimeError("The federated fit is not the pooled fit.")


def main() -> None:
    """Use the sandbox that is named on the command line by its state file, or one of our own."""
    if len(sys.argv) > 1:
        show(json.loads(Path(sys.argv[1]).read_text())["vantage6"])
        return
    with Sandbox("vantage6") as sandbox:
        show(sandbox.ready()["vantage6"])


if __name__ == "__main__":
    main()
