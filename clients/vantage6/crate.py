"""The provenance of an analysis as an RO-Crate in the folder of its results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from pydantic import JsonValue

from prefect_biomed.clients.crates import METADATA, Execution, Provenance, Source, names_of_runs, write_crate
from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.files import atomic_write, on_disk
from prefect_biomed.clients.vantage6.models import Result, Run, Task, TaskOutcome

__all__ = ["write_analysis_crate"]


def write_analysis_crate(
    folder: Path,
    url: str,
    outcome: TaskOutcome,
    results: Sequence[Result],
    *,
    flow: str,
    parameters: Mapping[str, JsonValue],
    version: str = "",
) -> Path:
    """Write the results of an analysis into files, and how they came about beside them.

    Safe to repeat: the same task and results give the same bytes.

    Args:
        folder: Folder of the results of this analysis alone.
        url: Address of the server.
        outcome: The task that has ended, with its runs.
        results: Its results.
        flow: The flow that ran it.
        parameters: What was given to that flow, without credentials.
        version: Version of the server.

    Returns:
        `ro-crate-metadata.json`.

    Raises:
        LedgerError: The folder has the crate of something else, or no run of the task tells when it began.
        LocalStorageError: The folder cannot be written.
    """
    task = outcome.task
    runs = {run.id: run for run in outcome.runs}
    addresses = {run: f"{url}/run/{run}" for run in runs}
    if (others := names_of_runs(folder)) and not others & set(addresses.values()):
        raise LedgerError(
            f"{folder / METADATA} tells of something else than task {task.id}, and was left as it is. Give each "
            "analysis an output_dir of its own."
        )
    with on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        executions = [
            _execution(folder, url, task, run, began, result, parameters)
            for result in results
            if result.run_id is not None and (run := runs.get(result.run_id)) is not None
            if (began := run.started_at or task.created_at) is not None
        ]
    provenance = Provenance(
        name=task.name or f"task {task.id}",
        flow=flow,
        parameters=dict(parameters),
        platform=f"vantage6 {version}".strip(),
        platform_url=url,
        program=task.image,
        program_version=task.image.rpartition(":")[2] if ":" in task.image else "not given",
        program_address=f"{url}/task/{task.id}",
        executions=tuple(executions),
    )
    return write_crate(folder, provenance)


def _execution(
    folder: Path,
    url: str,
    task: Task,
    run: Run,
    began: datetime,
    result: Result,
    parameters: Mapping[str, JsonValue],
) -> Execution:
    ended = run.finished_at or task.finished_at
    return Execution(
        address=f"{url}/run/{run.id}",
        name=f"{task.name} at {result.organization}",
        error=result.unavailable or (None if run.status.is_success else f"ended as {run.status.value}"),
        began=began,
        ended=ended,
        settings={
            "organization": result.organization,
            "method": task.method or parameters.get("method") or "",
            "task": task.id,
            **{name: parameters[name] for name in ("arguments", "collaboration") if name in parameters},
        },
        inputs=tuple(_inputs(url, task, result)),
        outputs=tuple(_written(folder, result)),
    )


def _inputs(url: str, task: Task, result: Result) -> Iterator[Source]:
    """The databases of a node. They never leave it, so nothing here tells their digests."""
    for database in task.databases:
        label = database.get("label") if isinstance(database, dict) else database
        if isinstance(label, str):
            place = f"{quote(result.organization)}/{quote(label)}"
            yield Source(address=f"vantage6://{urlsplit(url).netloc}/{place}", name=f"{label} of {result.organization}")


def _written(folder: Path, result: Result) -> Iterator[str]:
    """Name the file of a result; one that was kept in memory is written."""
    if result.unavailable is not None:
        return
    name = f"task-{result.task_id}-run-{result.run_id}.{result.format or 'bin'}"
    if result.path is not None:
        if result.path.parent == folder:
            yield result.path.name
        return
    with atomic_write(folder / name) as file:
        file.write(result.content if result.content is not None else _json(result.value))
    yield name


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
