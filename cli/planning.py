"""What a flow would do on the platforms, without doing it: `prefect-biomed plan`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect import Flow
from prefect.logging.loggers import PrefectLogAdapter, get_logger

from prefect_biomed.cli.running import find_flow, prepared
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.flows.cancellation import end_planned
from prefect_biomed.flows.plans import Plan
from prefect_biomed.tasks.policies import planned_run

__all__ = ["kill_by_key", "plan_flow", "planned_flows", "unplanned_flows"]

_FLOWS = "prefect_biomed.flows"
_READING = f"{_FLOWS}.operation_plans.plan_reading"

_PLANNERS = {
    "boss-cancel-ingest": f"{_FLOWS}.boss_plans.plan_cancel",
    "boss-ingest": f"{_FLOWS}.boss_plans.plan_ingest",
    "boss-join-ingest": f"{_FLOWS}.boss_plans.plan_join",
    "boss-verify": f"{_FLOWS}.boss_plans.plan_verify",
    "compare-folders": _READING,
    "federated-analysis": f"{_FLOWS}.vantage6_plans.plan_analysis",
    "federated-session": f"{_FLOWS}.vantage6_plans.plan_session",
    "remove-leftovers": f"{_FLOWS}.operation_plans.plan_removal",
    "repeatability-experiment": f"{_FLOWS}.experiment_plans.plan_experiment",
    "research-pipeline": f"{_FLOWS}.experiment_plans.plan_research",
    "vip-collect": f"{_FLOWS}.vip_plans.plan_collect",
    "vip-kill": f"{_FLOWS}.vip_plans.plan_kill",
    "vip-publish": _READING,
    "vip-replay": f"{_FLOWS}.experiment_plans.plan_replay",
    "vip-resume": f"{_FLOWS}.vip_plans.plan_resume",
    "vip-session": f"{_FLOWS}.vip_plans.plan_session",
    "vip-shared-inputs": f"{_FLOWS}.vip_plans.plan_shared_inputs",
    "vip-show-pipeline": _READING,
    "what-is-running": _READING,
}

_DEPENDS = "what it does next depends on what it has done"
_NOT_PLANNED = {
    "boss-init": "it shows its own proposal, and asks nothing of the Boss, with make turned off",
    "end-cancelled": _DEPENDS,
    "federated-rounds": _DEPENDS,
    "provision-collaboration": _DEPENDS,
    "boss-downsample": _DEPENDS,
    "boss-write-cutouts": _DEPENDS,
    "publish-volume": _DEPENDS,
}


def planned_flows() -> list[str]:
    """List the flows that can be planned; of the others it is known only while they run what they do.

    Returns:
        Names of flows.
    """
    return sorted(_PLANNERS)


def plan_flow(
    name: str, parameters: Mapping[str, Any], *, key: str | None = None, credentials: Sequence[str] = ()
) -> Plan:
    """Tell what `run_flow` would do on the platforms. Nothing is sent but questions and log-ins.

    Args:
        name: Name of the flow.
        parameters: As for `run_flow`.
        key: As for `run_flow`. Without one each run is something new, and so is each launch of the plan.
        credentials: As for `run_flow`.

    Returns:
        What would be done now, when all that is launched succeeds.

    Raises:
        ConfigurationError: There is no such flow or parameter, or it cannot be planned.
        BiomedError: What the flow would raise before it changes anything.
        ValidationError: A parameter does not fit.
        ParameterTypeError: The same, in Prefect's words.
    """
    flow = find_flow(name)
    if name not in _PLANNERS:
        raise ConfigurationError(
            f"{name} cannot be planned: {_NOT_PLANNED.get(name, _DEPENDS)}. Can be planned: "
            f"{', '.join(planned_flows())}."
        )
    given = _given(flow, parameters, credentials)
    module, _, function = _PLANNERS[name].rpartition(".")
    planner: Callable[..., Plan] = getattr(importlib.import_module(module), function)
    with planned_run(f"{name}/{key}" if key else None):
        return planner(**given)


def kill_by_key(name: str, parameters: Mapping[str, Any], *, key: str, credentials: Sequence[str] = ()) -> list[str]:
    """End what runs of a flow with a key have launched. Safe to repeat: what has ended is left alone.

    Args:
        name: Name of the flow.
        parameters: As the runs had them.
        key: Key of the runs.
        credentials: As for `run_flow`.

    Returns:
        What was ended.

    Raises:
        ConfigurationError: There is no such flow or parameter, or the flow launches nothing that a key could name.
        BiomedError: The platform could not be asked, or something could not be ended.
        ValidationError: A parameter does not fit.
        ParameterTypeError: The same, in Prefect's words.
    """
    flow = find_flow(name)
    given = _given(flow, parameters, credentials)
    with planned_run(f"{name}/{key}"):
        return end_planned(flow, given, PrefectLogAdapter(get_logger("prefect_biomed.kill"), {}))


def _given(flow: Flow[..., Any], parameters: Mapping[str, Any], credentials: Sequence[str]) -> dict[str, Any]:
    """Parameters of a flow, validated, with its defaults."""
    defaults = {
        one.name: one.default
        for one in inspect.signature(flow.fn).parameters.values()
        if one.default is not inspect.Parameter.empty
    }
    return defaults | flow.validate_parameters(prepared(flow, parameters, credentials))


def unplanned_flows() -> dict[str, str]:
    """List the flows that cannot be planned.

    Returns:
        Why, by the name of the flow.
    """
    return dict(_NOT_PLANNED)
