"""Secrets that a block names in place of holding them: a variable of the environment, or a file.

A person who writes `api_key="key.txt"` in a script has that file. Who can only start runs of a deployment, or save
blocks, has not: on a worker that others use as well, each variable and each file could be sent to any host that way. So
there a block may name what the worker's own configuration allows, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, TypeVar

from prefect.blocks.core import Block
from pydantic import PrivateAttr, SecretStr

from prefect_biomed.blocks._fields import KnownFields
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["FOLDERS", "VARIABLES", "Keys", "for_a_deployed_run", "in_deployed_run", "typed_keys"]

VARIABLES = "PREFECT_BIOMED_KEY_VARIABLES"
"""Environment variable of a worker: names of variables that blocks may name, separated by commas."""

FOLDERS = "PREFECT_BIOMED_KEY_FOLDERS"
"""Environment variable of a worker: folders of files that blocks may name, separated as in `PATH`."""

_MAX_CHARACTERS = 100_000
_DEPLOYED: ContextVar[bool] = ContextVar("deployed", default=False)

B = TypeVar("B", bound=Block)


def in_deployed_run() -> bool:
    """Tell whether what is made here is made for a run of a deployment."""
    # Set by the engine in the process that it starts for such a run.
    return _DEPLOYED.get() or "PREFECT__FLOW_RUN_ID" in os.environ


@contextmanager
def for_a_deployed_run() -> Iterator[None]:
    """Make blocks as in a run of a deployment, in a process of a worker that serves several of them."""
    token = _DEPLOYED.set(True)
    try:
        yield
    finally:
        _DEPLOYED.reset(token)


class _Named(NamedTuple):
    """What a secret names."""

    variable: str | None = None
    file: Path | None = None


class Keys(KnownFields):
    """What all credentials blocks share: their secrets may name where the secret is.

    `env:NAME` stands for a variable of the environment, `file:PATH` for the content of a file, both where the flow
    runs.
    """

    _official_names: frozenset[str] = PrivateAttr(default=frozenset())
    """Variables of the official client, where that takes names and paths without `env:` and `file:`."""
    # Where the block was made decides, also when a task runner carries it to another machine.
    _is_deployed: bool = PrivateAttr(default_factory=in_deployed_run)

    def secret(self, field: str) -> SecretStr | None:
        """Look up the secret of a field.

        Args:
            field: Name of the field.

        Returns:
            The secret, without white space around it; None when the field is empty.

        Raises:
            ConfigurationError: What the field names is not there or empty, or it may not be read in a run of a
                deployment.
        """
        given: SecretStr | None = getattr(self, field)
        if given is None or not given.get_secret_value():
            return None
        named = self._named_by(given.get_secret_value())
        found = given.get_secret_value() if named is None else self._read(named, field)
        if not found.strip():
            raise ConfigurationError(f"The key is empty. Look at what the block's field {field} names.")
        return SecretStr(found.strip())

    def readable(self, file: Path, field: str) -> Path:
        """Check that a file may be read for this block.

        Args:
            file: The file.
            field: The field that names it.

        Returns:
            The file.

        Raises:
            ConfigurationError: It may not be read in a run of a deployment.
        """
        path = file.expanduser()
        folders = [Path(one).expanduser() for one in os.environ.get(FOLDERS, "").split(os.pathsep) if one]
        if not self._is_deployed or any(path.resolve().is_relative_to(folder.resolve()) for folder in folders):
            return path
        line = os.pathsep.join([*map(str, folders), str(path.parent)])
        raise _refused(field, f"the file {path}", f"{FOLDERS}={line}")

    def _named_by(self, text: str) -> _Named | None:
        kind, _, name = text.strip().partition(":")
        if kind == "env" and name:
            return _Named(variable=name)
        if kind == "file" and name:
            return _Named(file=Path(name))
        if not self._official_names:
            return None
        if _is_file(text):
            return _Named(file=Path(text))
        return _Named(variable=text) if text in self._official_names or text in os.environ else None

    def _read(self, named: _Named, field: str) -> str:
        if named.file is not None:
            path = self.readable(named.file, field)
            try:
                with path.open(encoding="utf-8") as file:
                    return file.read(_MAX_CHARACTERS)
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is no text"
                raise ConfigurationError(
                    f"The file {path} that the block's field {field} names cannot be read: {why}."
                ) from None
        name = named.variable or ""
        allowed = [one.strip() for one in os.environ.get(VARIABLES, "").split(",") if one.strip()]
        if self._is_deployed and name not in allowed:
            line = ",".join([*allowed, name])
            raise _refused(field, f"the environment variable {name}", f"{VARIABLES}={line}")
        if name not in os.environ:
            raise ConfigurationError(
                f"The environment variable {name} is not set where this runs. Set it, or put the secret into the "
                f"block's field {field}."
            )
        return os.environ[name]


def _refused(field: str, what: str, line: str) -> ConfigurationError:
    return ConfigurationError(
        f"The block's field {field} names {what}, which runs of deployments may not read here; nothing was read. Save "
        "the secret itself in the block, which the engine keeps encrypted; or, if everybody who may start runs on this "
        f"worker may use it, add this line to the environment of the worker: {line}"
    )


def typed_keys(block: Block) -> list[str]:
    """Find the fields of a block that hold a secret, and do not only name where it is.

    Args:
        block: The block.

    Returns:
        Names of the fields.
    """
    if not isinstance(block, Keys):
        return []
    secrets = ((name, getattr(block, name)) for name in type(block).model_fields)
    return [
        name
        for name, value in secrets
        if isinstance(value, SecretStr)
        and value.get_secret_value()
        and block._named_by(value.get_secret_value()) is None
    ]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False
