"""Which classes a configuration may name: it comes from elsewhere, and what it names is run."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["ENTRY_POINTS", "VARIABLE", "check_allowed"]

ENTRY_POINTS = "prefect_biomed.boss_plugins"
"""Group of entry points by which an installed package offers its classes."""

VARIABLE = "PREFECT_BIOMED_BOSS_PLUGINS"
"""Environment variable of a worker: modules or classes that configurations may name, separated by commas."""


def check_allowed(dotted_path: str) -> None:
    """Refuse a class that nobody on this machine has allowed, before anything is imported.

    Allowed are classes of an installed package that offers them as an entry point, and those below the modules that the
    worker's environment names.

    Args:
        dotted_path: Package, module and class.

    Raises:
        ConfigurationError: It is not allowed. The error tells the line to add.
    """
    offered = {entry.value.replace(":", ".") for entry in entry_points(group=ENTRY_POINTS)}
    listed = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if dotted_path in offered or any(f"{dotted_path}.".startswith(f"{name}.") for name in listed):
        return
    module = dotted_path.rpartition(".")[0]
    line = ",".join([*listed, module])
    raise ConfigurationError(
        f"The configuration names the class {dotted_path}, which is not allowed on this machine; nothing was imported. "
        f"If you trust it, add this line to the environment of the worker: {VARIABLE}={line}"
    )
