"""Names by which runs of flows and tasks are told apart in the engine's lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

__all__ = ["flow_run_named", "task_run_named"]

_MAX_CHARACTERS = 120
_MAX_NAMED = 3


def flow_run_named(*about: str) -> Callable[[], str]:
    """Make the `flow_run_name` of a flow: the values of its parameters that say what a run is about.

    Args:
        *about: Names of parameters. With a dot the name of an attribute of its value: `session.session_name`.

    Returns:
        A function for `@flow(flow_run_name=…)`. It leaves out what was not given, and names a run of which nothing was
        given like its flow.
    """

    def name() -> str:
        return _joined(flow_run.parameters, about) or flow_run.flow_name

    return name


def task_run_named(title: str, *about: str) -> Callable[..., str]:
    """Make the `task_run_name` of a task: what it does, and to what.

    Args:
        title: What the task does.
        *about: As for `flow_run_named`.

    Returns:
        A function for `@task(task_run_name=…)`.
    """

    def name(parameters: Mapping[str, Any]) -> str:
        said = _joined(parameters, about)
        return f"{title}: {said}" if said else title

    return name


def _joined(values: Mapping[str, Any], paths: tuple[str, ...]) -> str:
    said = [_said(path, _value(values, path)) for path in paths]
    text = ", ".join(dict.fromkeys(word for word in said if word))
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def _value(values: Mapping[str, Any], path: str) -> object:
    first, *attributes = path.split(".")
    value: object = values.get(first)
    for attribute in attributes:
        value = getattr(value, attribute, None)
    return value


def _said(path: str, value: object) -> str:
    """The value in a few words; empty when there are none for it."""
    if isinstance(value, int):
        return f"{path.removesuffix('_id')} {value}"
    if isinstance(value, str | Path):
        return " ".join(str(value.name if isinstance(value, Path) else value).split())
    if isinstance(value, Sequence):
        words = [word for item in value if (word := _said(path, item))]
        return " and ".join(words if len(words) <= _MAX_NAMED else [*words[:_MAX_NAMED], f"{len(words)} in all"])
    names = (getattr(value, name, None) for name in ("session_name", "pipeline_id", "channel_path", "name"))
    return next((str(name) for name in names if name), "")
