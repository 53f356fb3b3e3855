"""Flows whose parameters may be too large for the engine, and which say so before it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.settings import get_current_settings

from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["bounded_flow"]

P = ParamSpec("P")
R = TypeVar("R")


class _BoundedFlow(Flow[P, R]):
    """A flow that measures its parameters before they are sent to the engine."""

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Convert parameters as `Flow` does it.

        Raises:
            ConfigurationError: They are larger than the engine takes; nothing was sent.
        """
        serialized = super().serialize_parameters(parameters)
        sizes = {name: len(json.dumps(value, separators=(",", ":")).encode()) for name, value in serialized.items()}
        limit = get_current_settings().server.api.max_parameter_size
        if 0 < limit < sum(sizes.values()):
            largest = max(sizes, key=lambda name: sizes[name])
            raise ConfigurationError(
                f"The parameters of {self.name} have {sum(sizes.values())} bytes, {largest} alone {sizes[largest]}; "
                f"the engine takes {limit}. Put large arguments into a file and give its path, or its URL on shared "
                "storage, as arguments_file; or call the tasks, such as create_task, in a flow of your own. Nothing "
                "was sent."
            )
        return serialized


def bounded_flow(**settings: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a flow as `@flow` does it, which refuses parameters that the engine would refuse.

    Args:
        **settings: As for `Flow`.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[P, R]) -> Flow[P, R]:
        return _BoundedFlow(function, **settings)

    return decorate
