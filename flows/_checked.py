"""What is checked of the parameters of every flow before the engine sees them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

from prefect import Flow
from prefect.blocks.core import Block
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.settings import get_current_settings
from pydantic import ValidationError

from prefect_biomed.blocks._keys import in_deployed_run, typed_keys
from prefect_biomed.clients.diagnosis import diagnose
from prefect_biomed.clients.errors import ConfigurationError, invalid_fields
from prefect_biomed.flows.cancellation import heeding_cancellation
from prefect_biomed.tasks._reporting import event

__all__ = ["INLINE_KEYS", "checked_flow"]

P = ParamSpec("P")
R = TypeVar("R")

INLINE_KEYS = "PREFECT_BIOMED_INLINE_KEYS"
"""Environment variable of a worker: `allowed` runs deployments with keys in their parameters all the same."""

_SMALLER = {
    "arguments": "Put large arguments into a file and give its path, or its URL on shared storage, as arguments_file; "
    "or call the tasks, such as create_task, in a flow of your own.",
    "config": "Put the configuration into a file and give its path.",
    "input_settings": "Give a folder on Girder in place of the list of its files, or divide the values among several "
    "sessions that share their inputs, with inputs_of of upload.",
    "runs": "Divide the runs among several sessions that share their inputs, with inputs_of of upload.",
}


_NEEDS: dict[Callable[..., Any], Callable[[], None]] = {}
"""What looks whether a flow function has here what it needs."""


class _CheckedFlow(Flow[P, R]):
    """A flow whose parameters hold no key in clear in the engine's database, and are not too large for it."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Cast parameters as `Flow` does it, which would log all of them when one is wrong: keys, too.

        Raises:
            ConfigurationError: Credentials are wrong; or this is a run of a deployment, and they hold a key; or what
                the flow needs is not installed.
        """
        if self.fn in _NEEDS:
            _NEEDS[self.fn]()
        accounts = {name: self._account(name, parameters[name]) for name in self._blocks if name in parameters}
        return super().validate_parameters(parameters | accounts)

    def _account(self, name: str, given: Any) -> Any:
        if given is None or isinstance(given, Block) or (isinstance(given, dict) and "$ref" in given):
            return given
        kind = self._blocks[name]
        try:
            block = kind.model_validate(given)
        except ValidationError as error:
            said = invalid_fields(error, whole=name)
            raise ConfigurationError(f"The parameter {name} of {self.name} is no {kind.__name__}: {said}.") from None
        # Only what the engine has given to this process itself was in its database.
        begins_here = in_deployed_run() and FlowRunContext.get() is None
        if begins_here and os.environ.get(INLINE_KEYS) != "allowed":
            self._refuse_keys(name, block)
        return block

    def _refuse_keys(self, name: str, block: Block) -> None:
        fields = typed_keys(block)
        if not fields:
            return
        slug = type(block).get_block_type_slug()
        variable = f"PREFECT_BIOMED_{slug.removesuffix('-credentials')}_{fields[0]}".upper()
        raise ConfigurationError(
            f"The parameter {name} of this run holds a secret ({', '.join(fields)}), which the engine keeps readable "
            f"for everybody who may see the run; nothing was done. Save a block: {variable}=… python "
            f"deployments/setup.py --name lab. Give it as {name}: "
            f'{{"$ref": {{"block_document_slug": "{slug}/lab"}}}}. Then delete this run, take the secret out of the '
            "default parameters of the deployment and of its schedules, and replace it on the platform: it has been "
            f"seen. {INLINE_KEYS}=allowed in the environment of the worker allows it all the same."
        )

    @cached_property
    def _blocks(self) -> dict[str, type[Block]]:
        """The parameters that are credentials."""
        kinds = {
            name: [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Block)]
            for name, hint in get_type_hints(self.fn).items()
        }
        return {name: found[0] for name, found in kinds.items() if found and name != "return"}

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
                f"the engine takes {limit}. {_SMALLER.get(largest, 'Divide it among several runs.')} Nothing was sent."
            )
        return serialized


def _tell_why(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Emit `biomed.flow.failed` with the category of the failure, for automations and lists."""
    error = state.result(raise_on_failure=False)
    why = diagnose(error if isinstance(error, BaseException) else str(state.message))
    event("biomed.flow.failed", f"prefect.flow-run.{flow_run.id}", flow_run.name, flow=flow.name, **why.as_labels())


def checked_flow(*, needs: Callable[[], None] | None = None, **settings: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a flow as `@flow` does it, of which the parameters are checked.

    A run of a deployment with a key in its parameters is refused, and so are parameters that the engine would refuse. A
    run that fails emits the event `biomed.flow.failed` with the category of its failure. A run that was cancelled does
    not go on after a crash, see `heeding_cancellation`.

    Args:
        needs: Raises when something that the flow needs is not installed here. It is called before a run begins.
        **settings: As for `Flow`.

    Returns:
        A decorator.
    """
    hooks = [*settings.pop("on_failure", ()), _tell_why]

    def decorate(function: Callable[P, R]) -> Flow[P, R]:
        flow = _CheckedFlow(function, on_failure=hooks, **settings)
        # Afterwards, because the engine looks in which file the function is.
        flow.fn = heeding_cancellation(function)
        if needs is not None:
            _NEEDS[flow.fn] = needs
        return flow

    return decorate
