"""The algorithms that the nodes of the sandbox run, and what an algorithm gets to see.

`CLINICAL` is the image the sandbox offers. `Vantage6Sandbox.add_image` adds further ones: a name
and functions that take a `Job` and keyword arguments.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

__all__ = ["CLINICAL", "Algorithm", "Image", "Job", "Killed", "SubtaskFailed", "read_table"]

Array = NDArray[Any]
Table = dict[str, Array]
CLINICAL = "prefect-biomed/clinical:1.0"


class Killed(Exception):
    """Somebody asked for the end of this job."""


class SubtaskFailed(Exception):
    """A subtask that a central algorithm needs did not complete everywhere."""


class Job:
    """What an algorithm has while it runs.

    Attributes:
        tables: the columns of each database or dataframe of the task, in the order asked for.
        organization_id: where it runs.
        task_id: of its task.
    """

    def __init__(
        self,
        tables: list[Table],
        *,
        organization_id: int,
        task_id: int,
        write: Callable[[str], None] = lambda line: None,
        subtask: Callable[[str, Mapping[str, Any], list[int] | None], list[Any]] | None = None,
        killed: threading.Event | None = None,
    ) -> None:
        self.tables = tables
        self.organization_id = organization_id
        self.task_id = task_id
        self._write = write
        self._subtask = subtask
        self._killed = killed or threading.Event()

    @property
    def table(self) -> Table:
        """The only table; the first when there are several."""
        if not self.tables:
            raise ValueError("this algorithm needs a database, and the task names none")
        return self.tables[0]

    def column(self, name: str) -> Array:
        """Return a column of the table.

        Raises:
            KeyError: naming the columns there are.
        """
        if name not in self.table:
            raise KeyError(f"no column {name!r}: there are {', '.join(self.table)}")
        return self.table[name]

    def log(self, line: str) -> None:
        """Write a line that can be read while the job runs."""
        self._write(line)

    def sleep(self, seconds: float) -> None:
        """Wait.

        Raises:
            Killed: somebody asked for the end meanwhile.
        """
        if self._killed.wait(seconds):
            raise Killed

    def everywhere(
        self, method: str, arguments: Mapping[str, Any], organizations: list[int] | None = None
    ) -> list[Any]:
        """Run a method as a subtask and return what the organizations put out.

        Args:
            method: of the same image.
            arguments: of the method.
            organizations: ids; all that the task may use when not given.

        Raises:
            SubtaskFailed: it did not complete at one of them.
            Killed: somebody asked for the end meanwhile.
        """
        if self._subtask is None:
            raise SubtaskFailed("only a central algorithm may start subtasks")
        return self._subtask(method, arguments, organizations)


@dataclass(frozen=True)
class Algorithm:
    """One function of an image.

    Attributes:
        function: takes a `Job` and keyword arguments, returns JSON, or bytes to go out as they are.
        action: what v5 calls this kind of step.
    """

    function: Callable[..., Any]
    action: str = "federated_compute"


@dataclass(frozen=True)
class Image:
    """Functions under the name of a container image."""

    name: str
    algorithms: Mapping[str, Algorithm] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, functions: Mapping[str, Callable[..., Any] | Algorithm]) -> Image:
        """Make an image of functions; names that begin with `central` are central algorithms."""

        def wrap(method: str, function: Callable[..., Any] | Algorithm) -> Algorithm:
            if isinstance(function, Algorithm):
                return function
            central = method.startswith("central")
            return Algorithm(function, "central_compute" if central else "federated_compute")

        return cls(name, {method: wrap(method, each) for method, each in functions.items()})


def read_table(path: Path) -> Table:
    """Read a CSV file with a header; columns of numbers become arrays of numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    columns: Table = {}
    for place, name in enumerate(header):
        values = np.array([row[place] for row in rows])
        try:
            columns[name] = values.astype(float)
        except ValueError:
            columns[name] = values
    return columns


# -- averages ------------------------------------------------------------------------------------------


def partial_average(job: Job, column: str) -> dict[str, float]:
    """Sum and count of a column."""
    values = job.column(column)
    job.log(f"info > sum of {column} over {len(values)} rows")
    return {"sum": float(values.sum()), "count": len(values)}


def central_average(job: Job, column: str, organizations: list[int] | None = None) -> dict[str, float]:
    """Mean of a column over all organizations."""
    parts = job.everywhere("partial_average", {"column": column}, organizations)
    count = sum(part["count"] for part in parts)
    return {"average": sum(part["sum"] for part in parts) / count, "count": count}


def partial_summary(job: Job, columns: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Count, mean, standard deviation, minimum and maximum of numeric columns."""
    chosen = columns or [name for name, values in job.table.items() if values.dtype.kind == "f"]
    return {
        name: {
            "count": len(values := job.column(name)),
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)),
            "min": float(values.min()),
            "max": float(values.max()),
        }
        for name in chosen
    }


# -- regressions ---------------------------------------------------------------------------------------


def _design(job: Job, predictors: Iterable[str]) -> Array:
    columns = [job.column(name) for name in predictors]
    return np.column_stack([np.ones(len(columns[0])), *columns])


def partial_linear_regression(job: Job, outcome: str, predictors: list[str]) -> dict[str, Any]:
    """Cross products of a linear model: all that least squares needs to know of the rows."""
    x, y = _design(job, predictors), job.column(outcome)
    job.log(f"info > cross products of {len(y)} rows")
    return {
        "xx": (x.T @ x).tolist(),
        "xy": (x.T @ y).tolist(),
        "yy": float(y @ y),
        "sum": float(y.sum()),
        "count": len(y),
    }


def central_linear_regression(
    job: Job, outcome: str, predictors: list[str], organizations: list[int] | None = None
) -> dict[str, Any]:
    """Least squares over all organizations; equal to the fit of the pooled rows."""
    parts = job.everywhere("partial_linear_regression", {"outcome": outcome, "predictors": predictors}, organizations)
    xx = np.sum([part["xx"] for part in parts], axis=0)
    xy = np.sum([part["xy"] for part in parts], axis=0)
    yy, total, count = (sum(part[key] for part in parts) for key in ("yy", "sum", "count"))
    # Columns of different size make the plain cross products badly conditioned.
    scale = 1 / np.sqrt(np.diag(xx))
    inverse = np.linalg.inv(xx * np.outer(scale, scale)) * np.outer(scale, scale)
    beta = inverse @ xy
    residual = float(yy - beta @ xy)
    errors = np.sqrt(np.diag(inverse) * residual / (count - len(beta)))
    names = ["intercept", *predictors]
    return {
        "coefficients": dict(zip(names, beta.tolist(), strict=True)),
        "standard_errors": dict(zip(names, errors.tolist(), strict=True)),
        "r_squared": 1 - residual / (yy - total**2 / count),
        "count": count,
    }


def partial_logistic_step(
    job: Job,
    outcome: str,
    predictors: list[str],
    coefficients: list[float],
    means: list[float],
    scales: list[float],
) -> dict[str, Any]:
    """Gradient and Hessian of the log likelihood of a logistic model at given coefficients."""
    x, y = _design(job, predictors), job.column(outcome)
    x[:, 1:] = (x[:, 1:] - np.array(means)) / np.array(scales)
    odds = x @ np.array(coefficients)
    chance = 1 / (1 + np.exp(-odds))
    weight = chance * (1 - chance)
    likelihood = float(np.sum(y * odds - np.logaddexp(0, odds)))
    return {
        "gradient": (x.T @ (y - chance)).tolist(),
        "hessian": (x.T @ (x * weight[:, None])).tolist(),
        "likelihood": likelihood,
        "count": len(y),
    }


def partial_logistic_train(
    job: Job,
    outcome: str,
    predictors: list[str],
    coefficients: list[float],
    means: list[float],
    scales: list[float],
    threshold: float | None = None,
    learning_rate: float = 1.0,
    steps: int = 1,
) -> dict[str, Any]:
    """Improve coefficients of a logistic model by steps along the mean gradient of the rows that are here.

    With a threshold, the outcome is whether the column is above it.
    """
    x, y = _design(job, predictors), job.column(outcome)
    if threshold is not None:
        y = (y > threshold).astype(float)
    x[:, 1:] = (x[:, 1:] - np.array(means)) / np.array(scales)
    beta = np.array(coefficients, float)
    odds = x @ beta
    loss = float(np.mean(np.logaddexp(0, odds) - y * odds))
    for _ in range(steps):
        beta += learning_rate * x.T @ (y - 1 / (1 + np.exp(-x @ beta))) / len(y)
    job.log(f"info > {len(y)} rows, loss {loss:.6f}")
    return {"coefficients": beta.tolist(), "count": len(y), "loss": loss}


def partial_moments(job: Job, columns: list[str]) -> dict[str, Any]:
    """Count, sums and sums of squares of columns."""
    values = [job.column(name) for name in columns]
    return {
        "count": len(values[0]),
        "sums": [float(v.sum()) for v in values],
        "squares": [float(v @ v) for v in values],
    }


def central_logistic_regression(
    job: Job,
    outcome: str,
    predictors: list[str],
    organizations: list[int] | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 25,
) -> dict[str, Any]:
    """Maximum likelihood by Newton's method, one subtask per step."""
    moments = job.everywhere("partial_moments", {"columns": predictors}, organizations)
    count = sum(part["count"] for part in moments)
    means = np.sum([part["sums"] for part in moments], axis=0) / count
    scales = np.sqrt(np.sum([part["squares"] for part in moments], axis=0) / count - means**2)
    beta = np.zeros(len(predictors) + 1)
    likelihood, converged, iteration = 0.0, False, 0
    while not converged and iteration < max_iterations:
        iteration += 1
        parts = job.everywhere(
            "partial_logistic_step",
            {
                "outcome": outcome,
                "predictors": predictors,
                "coefficients": beta.tolist(),
                "means": means.tolist(),
                "scales": scales.tolist(),
            },
            organizations,
        )
        likelihood = sum(part["likelihood"] for part in parts)
        hessian = np.sum([part["hessian"] for part in parts], axis=0)
        step = np.linalg.solve(hessian, np.sum([part["gradient"] for part in parts], axis=0))
        beta = beta + step
        job.log(f"info > step {iteration}: log likelihood {likelihood:.6f}")
        converged = bool(np.max(np.abs(step)) < tolerance)
    slopes = beta[1:] / scales
    fitted = [float(beta[0] - slopes @ means), *slopes.tolist()]
    return {
        "coefficients": dict(zip(["intercept", *predictors], fitted, strict=True)),
        "log_likelihood": likelihood,
        "iterations": iteration,
        "converged": converged,
        "count": count,
    }


# -- to try things -------------------------------------------------------------------------------------


def echo(job: Job, /, **arguments: Any) -> dict[str, Any]:
    """Return the arguments."""
    return arguments


def sleep(job: Job, seconds: float = 1.0, organizations: list[int] | None = None) -> float:
    """Wait, and say so every second; only at the given organizations, when some are given."""
    if organizations is not None and job.organization_id not in organizations:
        return 0.0
    left = float(seconds)
    while left > 0:
        job.log(f"info > {left:g} s left")
        job.sleep(min(left, 1.0))
        left -= 1.0
    return float(seconds)


def crash(job: Job, organizations: list[int] | None = None, after_seconds: float = 0.5) -> dict[str, int]:
    """Raise an error; only at the given organizations, when some are given.

    At once, it would often be quicker than the other nodes, whose runs then fail with it.
    """
    job.log("info > about to divide")
    job.sleep(after_seconds)
    broken = organizations is None or job.organization_id in organizations
    return {"quotient": 1 // (0 if broken else 1)}


def central_crash(job: Job, organizations: list[int] | None = None, crashing: list[int] | None = None) -> list[Any]:
    """Start a subtask that crashes at some of the organizations."""
    return job.everywhere("crash", {"organizations": crashing}, organizations)


def central_sleep(job: Job, seconds: float = 1.0, organizations: list[int] | None = None) -> list[Any]:
    """Start a subtask that waits."""
    return job.everywhere("sleep", {"seconds": seconds}, organizations)


def raw(job: Job, content: str) -> bytes:
    """Put out the given bytes (base64) as they are: no JSON, a pickle, anything."""
    return base64.b64decode(content)


def payload(job: Job, size: int) -> dict[str, Any]:
    """Put out a JSON document of about `size` bytes."""
    return {"organization": job.organization_id, "padding": "x" * max(0, size - 40)}


def sleep_with(job: Job, seconds: float = 1.0, **weights: Any) -> dict[str, int]:
    """Wait, and say how long the texts were that came with the call."""
    job.sleep(seconds)
    return {name: len(value) for name, value in weights.items()}


def undefined(job: Job) -> dict[str, float]:
    """Put out what is no number, and infinities, as the statistics of no rows are."""
    return {"mean": math.nan, "largest": math.inf, "smallest": -math.inf, "count": 0}


def table(job: Job, kind: str = "csv", columns: list[str] | None = None) -> bytes:
    """Put out the rows of the table as a file: `csv`, `jsonl`, or with pandas and pyarrow `parquet` or `arrow`."""
    chosen = {name: job.column(name).tolist() for name in columns or job.table}
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(chosen)
        writer.writerows(zip(*chosen.values(), strict=True))
        return text.getvalue().encode()
    if kind == "jsonl":
        rows = zip(*chosen.values(), strict=True)
        return "".join(json.dumps(dict(zip(chosen, row, strict=True))) + "\n" for row in rows).encode()
    import pandas

    frame, file = pandas.DataFrame(chosen), io.BytesIO()
    {"parquet": frame.to_parquet, "arrow": frame.to_feather}[kind](file)
    return file.getvalue()


def plot(job: Job, column: str, bins: int = 20) -> bytes:
    """Put out a histogram of a column as a PNG."""
    counts, _ = np.histogram(job.column(column), bins)
    heights = np.rint(100 * counts / max(1, counts.max())).astype(int)
    pixels = np.where(np.arange(100, 0, -1)[:, None] <= np.repeat(heights, 8), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(job: Job, size: int, start: str = "", repeat: bool = False) -> bytes:
    """Put out `size` bytes that begin with the given ones (base64), and go on with them again or at random."""
    begin = base64.b64decode(start)
    if repeat:
        return (begin * (1 + size // len(begin)))[:size]
    return begin + np.random.default_rng(size).bytes(max(0, size - len(begin)))


def answer_of_some(job: Job, organizations: list[int], seconds: float = 3600.0) -> dict[str, int]:
    """Answer at once at the given organizations, and at the others after a long time only."""
    if job.organization_id not in organizations:
        job.sleep(seconds)
    return {"organization": job.organization_id}


# -- steps of a v5 session ---------------------------------------------------------------------------------


def read_csv(job: Job, columns: list[str] | None = None) -> Table:
    """Extract a dataframe: all columns, or the given ones."""
    return {name: job.column(name) for name in columns or job.table}


def keep_above(job: Job, column: str, minimum: float) -> Table:
    """Keep the rows in which a column is at least `minimum`."""
    kept = job.column(column) >= minimum
    job.log(f"info > {int(kept.sum())} of {len(kept)} rows kept")
    return {name: values[kept] for name, values in job.table.items()}


def scale(job: Job, column: str, factor: float) -> Table:
    """Multiply a column, as a change of its unit does."""
    return {**job.table, column: job.column(column) * factor}


clinical = Image.of(
    CLINICAL,
    {
        "partial_average": partial_average,
        "central_average": central_average,
        "partial_summary": partial_summary,
        "partial_linear_regression": partial_linear_regression,
        "central_linear_regression": central_linear_regression,
        "partial_moments": partial_moments,
        "partial_logistic_step": partial_logistic_step,
        "partial_logistic_train": partial_logistic_train,
        "central_logistic_regression": central_logistic_regression,
        "echo": echo,
        "sleep": sleep,
        "crash": crash,
        "central_crash": central_crash,
        "central_sleep": central_sleep,
        "raw": raw,
        "payload": payload,
        "sleep_with": sleep_with,
        "undefined": undefined,
        "table": table,
        "plot": plot,
        "noise": noise,
        "answer_of_some": answer_of_some,
        "read_csv": Algorithm(read_csv, "data_extraction"),
        "keep_above": Algorithm(keep_above, "preprocessing"),
        "scale": Algorithm(scale, "preprocessing"),
    },
)
