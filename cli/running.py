"""Flows run from the shell, by people and by other workflow engines."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from prefect import Flow, tags
from prefect.blocks.abstract import CredentialsBlock
from prefect.client.schemas.objects import State
from prefect.exceptions import ParameterTypeError
from pydantic import BaseModel, TypeAdapter, ValidationError

from prefect_biomed.clients.errors import BiomedError, ConfigurationError, PreflightFailed, invalid_fields, is_transient
from prefect_biomed.deployments.setup import PREFIX, credentials_types, fields_from
from prefect_biomed.tasks.policies import key_tag

__all__ = ["Outcome", "find_flow", "flow_names", "read_parameters", "run_flow"]

FAILED, REFUSED, TRY_AGAIN = 1, 2, 75
"""Exit codes: the work failed; nothing was begun, because something that was given is wrong; what went wrong may pass,
and the same command goes on where this one has stopped (`EX_TEMPFAIL`)."""


class Outcome(BaseModel):
    """How a flow run ended.

    Attributes:
        flow: Name of the flow.
        state: Name of the final state, such as `Completed`.
        message: What the state says, or the error; for people.
        exit_code: 0 for success; see `FAILED`, `REFUSED` and `TRY_AGAIN`.
        result: What the flow returned, in JSON.
        files: Local files in the result.
    """

    flow: str
    state: str
    message: str = ""
    exit_code: int = 0
    result: Any = None
    files: list[str] = []


def flow_names() -> dict[str, str]:
    """List the flows that can be run: those that are deployed.

    Returns:
        Dotted path of each flow function, by the name of the flow.
    """
    text = resources.files("prefect_biomed.deployments").joinpath("prefect.yaml").read_text()
    found = {deployment["entrypoint"] for deployment in yaml.safe_load(text)["deployments"]}
    return {path.rpartition(".")[2].replace("_", "-"): path for path in sorted(found)}


def find_flow(name: str) -> Flow[..., Any]:
    """Load a flow by its name.

    Args:
        name: Such as `vip-session`.

    Returns:
        The flow.

    Raises:
        ConfigurationError: There is no such flow; the message lists those that there are.
    """
    known = flow_names()
    if name not in known:
        raise ConfigurationError(f"There is no flow {name}. There are {', '.join(known)}.")
    module, _, function = known[name].rpartition(".")
    found: Flow[..., Any] = getattr(importlib.import_module(module), function)
    return found


def read_parameters(file: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    """Read the parameters of a flow run.

    Args:
        file: YAML or JSON file that holds one mapping; None for no file.
        settings: Further ones, each `name=value` or `group.name=value` with the value in YAML. They go before the file.

    Returns:
        The parameters.

    Raises:
        ConfigurationError: The file cannot be read, or a setting is none.
    """
    parameters: dict[str, Any] = {}
    if file is not None:
        try:
            content = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigurationError(f"{file} cannot be read: {error}") from error
        if content is not None and not isinstance(content, dict):
            raise ConfigurationError(f"{file} has to hold a mapping of parameters to values.")
        parameters = content or {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigurationError(f"{setting} is no setting. Write name=value, or group.name=value.")
        _put(parameters, path.split("."), _value(setting, text))
    return parameters


def _value(setting: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"The value of {setting} cannot be read: {error}") from error


def _put(parameters: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *groups, name = path
    for group in groups:
        inner = parameters.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigurationError(f"{group} is {inner!r}, so it has no {name}.")
        parameters = inner
    parameters[name] = value


def run_flow(
    name: str, parameters: Mapping[str, Any], *, key: str | None = None, credentials: Sequence[str] = ()
) -> Outcome:
    """Run a flow in this process, with a Prefect server or without.

    Safe to repeat with the same key, also after a kill: what was launched is adopted.

    Args:
        name: Name of the flow.
        parameters: Its parameters. Relative paths are those of the current folder.
        key: Identity of the intent. Another run of this flow with this key is a repetition, one with another key
            something new; without a key each run is something new, unless its parameters name a session.
        credentials: Saved blocks, as `vip-credentials/lab`. Others are read from the environment:
            `PREFECT_BIOMED_VIP_API_KEY` and the like.

    Returns:
        How it ended; errors too.
    """
    try:
        flow = find_flow(name)
        given = prepared(flow, parameters, credentials)
        flow.validate_parameters(given)
    except (BiomedError, ValidationError, ParameterTypeError) as error:
        return Outcome(flow=name, state="Refused", message=said(error), exit_code=REFUSED)
    # With the flow's name, because a rule for each step of a pipeline takes one key, that of the sample.
    with tags(key_tag(f"{name}/{key}")) if key else nullcontext():
        called: Any = flow  # by its type a flow returns what its function does, never a state
        state: State[Any] = called(**given, return_state=True)
    if not state.is_final():
        waits = "It has not ended. Run this again with the same key."
        return Outcome(flow=name, state=str(state.name), message=waits, exit_code=TRY_AGAIN)
    result = state.result(raise_on_failure=False)
    if isinstance(result, BaseException):
        return Outcome(flow=name, state=str(state.name), message=said(result), exit_code=exit_code(result))
    shown = TypeAdapter(Any).dump_python(result, mode="json", fallback=str)
    files = sorted(set(_paths(result)))
    return Outcome(flow=name, state=str(state.name), message=state.message or "", result=shown, files=files)


def prepared(flow: Flow[..., Any], parameters: Mapping[str, Any], credentials: Sequence[str]) -> dict[str, Any]:
    """Check names of parameters, and put credentials among them.

    Args:
        flow: The flow.
        parameters: As for `run_flow`.
        credentials: As for `run_flow`.

    Returns:
        What the flow is called with; not validated.

    Raises:
        ConfigurationError: There is no such parameter, or there are no credentials.
    """
    if unknown := sorted(set(parameters) - set(flow.parameters.properties)):
        raise ConfigurationError(
            f"{flow.name} has no {', '.join(unknown)}. It has {', '.join(flow.parameters.properties)}."
        )
    return _with_credentials(flow, parameters, credentials)


def exit_code(error: BaseException) -> int:
    """Put an error into an exit code: `REFUSED`, `TRY_AGAIN` or `FAILED`."""
    if isinstance(error, ConfigurationError | PreflightFailed):
        return REFUSED
    return TRY_AGAIN if is_transient(error) else FAILED


def said(error: BaseException) -> str:
    """Say an error in words, without values that may be secrets."""
    if isinstance(error, ValidationError):
        return invalid_fields(error)
    return str(error) or type(error).__name__


def _paths(value: object) -> list[str]:
    if isinstance(value, Path):
        return [str(value)] if value.is_file() else []
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return [path for item in value for path in _paths(item)]
    return []


def _with_credentials(flow: Flow[..., Any], parameters: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """The parameters with blocks in place of their names, and with those that the environment describes."""
    given = dict(parameters)
    by_slug = dict(block.rpartition("/")[::2] for block in named)
    for name, kind in _credentials_of(flow).items():
        value = given.get(name, by_slug.get(kind.get_block_type_slug()))
        if isinstance(value, str):
            given[name] = _load(kind, value)
        elif isinstance(value, Mapping):
            given[name] = kind.model_validate(value)
        elif value is None and (block := _from_environment(kind)):
            given[name] = block
        elif value is None and inspect.signature(flow.fn).parameters[name].default is inspect.Parameter.empty:
            slug = kind.get_block_type_slug()
            raise ConfigurationError(
                f"There are no credentials. Name a saved block with --credentials {slug}/NAME, or set the variables "
                f"{PREFIX}_{_platform(kind).upper()}_…, one for each field of the block."
            )
    return given


def _credentials_of(flow: Flow[..., Any]) -> dict[str, type[CredentialsBlock]]:
    kinds = {}
    for name, hint in get_type_hints(flow.fn).items():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and issubclass(kind, CredentialsBlock):
                kinds[name] = kind
    return kinds


def _platform(kind: type[CredentialsBlock]) -> str:
    return next(platform for platform, block in credentials_types().items() if block is kind)


def _from_environment(kind: type[CredentialsBlock]) -> CredentialsBlock | None:
    fields = fields_from(os.environ, _platform(kind), kind)
    return kind.model_validate(fields) if fields else None


def _load(kind: type[CredentialsBlock], name: str) -> CredentialsBlock:
    slug = kind.get_block_type_slug()
    load: Any = kind.load  # its type is that of the asynchronous twin
    try:
        block: CredentialsBlock = load(name.removeprefix(f"{slug}/"), _sync=True)
    except ValueError as error:
        raise ConfigurationError(
            f"There is no saved block {slug}/{name.removeprefix(f'{slug}/')}. `prefect block ls` lists those there are."
        ) from error
    return block


def as_json(value: object) -> str:
    """Write something for machines.

    Args:
        value: Anything, models and paths too.

    Returns:
        JSON, indented.
    """
    return json.dumps(TypeAdapter(Any).dump_python(value, mode="json", fallback=str), indent=2)
