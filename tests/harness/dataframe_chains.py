"""Chains of steps that make a dataframe, changes of them, and what is to be computed of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefect_biomed.clients.vantage6 import DataframeSpec, Function
from prefect_biomed.sandbox.vantage6 import CLINICAL

__all__ = ["CHANGES", "chain", "summary"]

_KEEP = Function(image=CLINICAL, method="keep_above", arguments={"column": "bmi", "minimum": 24})
_SCALE = Function(image=CLINICAL, method="scale", arguments={"column": "bmi", "factor": 1.5})


def chain(name: str) -> DataframeSpec:
    """An extraction and two steps whose order decides the result."""
    extraction = Function(image=CLINICAL, method="read_csv", arguments={"columns": ["age", "bmi"]})
    return DataframeSpec(name=name, extraction=extraction, preprocessing=[_KEEP, _SCALE])


def _steps(*steps: Function) -> Callable[[DataframeSpec], DataframeSpec]:
    return lambda spec: spec.model_copy(update={"preprocessing": list(steps)})


def _extracting(columns: list[str]) -> Callable[[DataframeSpec], DataframeSpec]:
    return lambda spec: spec.model_copy(
        update={"extraction": spec.extraction.model_copy(update={"arguments": {"columns": columns}})}
    )


CHANGES: Mapping[str, tuple[Callable[[DataframeSpec], DataframeSpec], str]] = {
    "fewer steps": (_steps(_KEEP), "step 2 is .*scale.*, and none is asked for"),
    "no steps": (_steps(), "step 1 is .*keep_above.*step 2 is .*scale"),
    "more steps": (
        _steps(_KEEP, _SCALE, _KEEP.model_copy(update={"arguments": {"column": "age", "minimum": 40}})),
        r"step 3, keep_above\(column=\"age\", minimum=40\), was not made",
    ),
    "a changed step": (
        _steps(_KEEP.model_copy(update={"arguments": {"column": "bmi", "minimum": 30}}), _SCALE),
        "step 1 has .*minimum=24.*minimum=30",
    ),
    "reordered steps": (_steps(_SCALE, _KEEP), "step 1 has .*'keep_above', not 'scale'"),
    "another extraction": (_extracting(["age", "bmi", "bp"]), "the extraction has .*not read_csv"),
}
"""How what is asked for changes, and what the conflict says of it."""


def summary(table: Path, spec: DataframeSpec) -> dict[str, Any]:
    """What `partial_summary` gives of a table that was taken through a chain: number and mean of each column."""
    read = np.genfromtxt(table, delimiter=",", names=True)
    values = {name: read[name] for name in spec.extraction.arguments["columns"]}
    for step in spec.preprocessing:
        column = step.arguments["column"]
        if step.method == "scale":
            values[column] = values[column] * step.arguments["factor"]
        else:
            kept = values[column] >= step.arguments["minimum"]
            values = {name: one[kept] for name, one in values.items()}
    return {name: pytest.approx({"count": len(one), "mean": one.mean()}, rel=1e-9) for name, one in values.items()}
