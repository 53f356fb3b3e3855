"""What happens on the platform when a flow run is cancelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import update_wrapper
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import ParameterTypeError
from prefect.flows import FlowStateHook, load_flow_from_entrypoint
from prefect.logging.loggers import LoggingAdapter, flow_run_logger
from prefect.states import Cancelled, Cancelling

from prefect_biomed.blocks._keys import for_a_deployed_run
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, ServerUnavailable
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.tasks.policies import intent_token, token_of_flow_run

__all__ = [
    "AFTER_CRASH",
    "NEVER_BEGAN",
    "carry_out",
    "end_planned",
    "ending_remote_jobs",
    "heeding_cancellation",
    "left_alone",
    "was_cancelled",
]

P = ParamSpec("P")
R = TypeVar("R")

_PATIENT = PollSettings(
    interval_seconds=2.0, growth=1.5, max_interval_seconds=15.0, deadline_seconds=300.0, error_budget=1000
)

AFTER_CRASH = "Scheduled again after a crash."
NEVER_BEGAN = "Scheduled again: it never began."
"""Messages of the states in which automations of ours schedule a run again; nobody has asked for that."""


def ending_remote_jobs(
    kind: str, end: Callable[[Mapping[str, Any], str, LoggingAdapter], Sequence[str]], *, named_by: str
) -> FlowStateHook[..., Any]:
    """Make the hook that ends what a cancelled flow run has launched, when `cancel_remote` of its `waiting` is true.

    The hook may run in a new process, so what was launched is found again by the token of the intent. Safe to repeat.
    A worker runs it once and then calls the run *Cancelled* whatever came of it, so there it waits up to five minutes
    for a platform, or a Prefect server, that is away.

    Args:
        kind: Kind of the intent, as the flow gives it to `intent_token`.
        end: Gets the parameters of the flow run, the token and the logger of the flow run; ends what carries the token
            and returns what it has ended.
        named_by: The parameter of the flow by which a user names the intent.

    Returns:
        The hook, for `on_cancellation` of the flow.
    """

    def end_now(flow: Flow[..., Any], flow_run: FlowRun) -> None:
        # The process of a worker is none that the engine has started for this run.
        with for_a_deployed_run() if flow_run.deployment_id else nullcontext():
            parameters = flow.validate_parameters(flow_run.parameters)
        waiting = parameters.get("waiting")
        if waiting is None or not waiting.cancel_remote:
            return
        token = token_of_flow_run(flow_run.id, kind, explicit=parameters.get(named_by))
        logger = flow_run_logger(flow_run, flow)
        ended = end(parameters, token, logger)
        logger.info("Ended on the platform: %s", ", ".join(ended) or "nothing")

    def end_remote_jobs(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
        if FlowRunContext.get() is not None:
            # Who calls it in a flow tries again by itself.
            end_now(flow, flow_run)
            return
        for _ in poll(
            lambda: _as_transient(lambda: end_now(flow, flow_run)),
            _PATIENT,
            done=lambda _: True,
            what=f"The jobs that {flow_run.name} has left",
            take_up_again="They go on: `prefect-biomed running` lists them, `prefect-biomed kill` ends them.",
        ):
            pass

    _ENDINGS[end_remote_jobs] = lambda parameters, logger: end(
        parameters, intent_token(kind, explicit=parameters.get(named_by)), logger
    )
    return end_remote_jobs


def _as_transient(do: Callable[[], None]) -> None:
    """Do something, and take what keeps Prefect from answering for a server that is away for the moment."""
    try:
        do()
    except (BiomedError, ParameterTypeError, TypeError, ValueError):
        raise
    except Exception as error:
        raise ServerUnavailable(f"The Prefect server could not be asked: {type(error).__name__}.") from error


_ENDINGS: dict[FlowStateHook[..., Any], Callable[[Mapping[str, Any], LoggingAdapter], Sequence[str]]] = {}
"""What ends the jobs of an intent, by the hook that does it for a cancelled run."""


def end_planned(flow: Flow[..., Any], parameters: Mapping[str, Any], logger: LoggingAdapter) -> list[str]:
    """End what runs of a flow with a key have launched, as their cancellation does it. Safe to repeat.

    Args:
        flow: The flow.
        parameters: Its parameters, validated and with their defaults, as they were given to the runs.
        logger: Told of what could not be ended.

    Returns:
        What was ended.

    Raises:
        ConfigurationError: The flow launches nothing that has a token, or no key is known: call this in `planned_run`.
        BiomedError: The platform could not be asked.
    """
    endings = [_ENDINGS[hook] for hook in flow.on_cancellation_hooks or () if hook in _ENDINGS]
    if not endings:
        raise ConfigurationError(f"{flow.name} launches nothing by itself that a key could name.")
    return [one for ending in endings for one in ending(parameters, logger)]


def left_alone(tag: str, seconds: float) -> list[FlowRun]:
    """List runs that somebody has cancelled and that nobody ends: their worker and their process are gone.

    Args:
        tag: Tag of the runs.
        seconds: How long a run has been in the state `Cancelling`. A worker that is alive ends it within a minute.

    Returns:
        The runs, all of them whatever their number.
    """
    cancelling = FlowRunFilter(
        state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Cancelling"])), tags=FlowRunFilterTags(all_=[tag])
    )
    found: list[FlowRun] = []
    with get_client(sync_client=True) as client:
        while page := client.read_flow_runs(flow_run_filter=cancelling, offset=len(found)):
            found += page
    since = datetime.now(UTC) - timedelta(seconds=seconds)
    return [run for run in found if run.state is not None and run.state.timestamp <= since]


def was_cancelled(run_id: UUID) -> bool:
    """Tell whether somebody has cancelled a run, and nobody has asked for it again since.

    The process of a run outlives its worker until it next writes a line; then it ends, and the engine puts *Crashed* in
    the place of *Cancelling* and of *Cancelled*. Automations schedule crashed runs again, without knowing of it.

    Args:
        run_id: The flow run.
    """
    with get_client(sync_client=True) as client:
        states = sorted(client.read_flow_run_states(run_id), key=lambda state: state.timestamp)
    cancelled = False
    for state in states:
        if state.type in {StateType.CANCELLING, StateType.CANCELLED}:
            cancelled = True
        elif state.type is StateType.SCHEDULED and state.message not in {AFTER_CRASH, NEVER_BEGAN}:
            cancelled = False
    return cancelled


def heeding_cancellation(function: Callable[P, R]) -> Callable[P, R]:
    """Make the function of a flow that ends what a cancelled run has left in place of beginning it again.

    A run that fails because what it waited for was ended by its cancellation is *Cancelled*, not *Failed*.

    Args:
        function: The function of the flow.

    Returns:
        The function to run. Outside runs of deployments, which nobody schedules again, it does the same as before.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return heeding(lambda: function(*args, **kwargs))

    heeding = _heeding
    # The engine looks up annotations where the function was written.
    placed = FunctionType(run.__code__, function.__globals__, function.__name__, None, run.__closure__)
    return update_wrapper(placed, function)


def _heeding(body: Callable[[], R]) -> R:
    context = FlowRunContext.get()
    own, flow = (context.flow_run, context.flow) if context else (None, None)
    if flow is None or own is None or own.deployment_id is None or own.parent_task_run_id is not None:
        return body()
    if own.run_count > 1 and was_cancelled(own.id):
        for hook in flow.on_cancellation_hooks:
            hook(flow, own, Cancelling())
        return cast(R, Cancelled(message="It was cancelled before its process died."))
    try:
        return body()
    except BiomedError as error:
        if not _is_known_to_be_cancelled(own.id):
            raise
        return cast(R, Cancelled(message=f"It was cancelled. {error}"))


def _is_known_to_be_cancelled(run_id: UUID) -> bool:
    try:
        return was_cancelled(run_id)
    except Exception:  # whatever keeps the engine from answering: the failure itself is what has to be told then
        return False


def carry_out(run: FlowRun) -> None:
    """Do what the process of a cancelled run would have done: end its remote jobs when it is to, then end the run.

    Safe to repeat: what has ended on the platform is left alone. When the platform cannot be asked, the run stays
    `Cancelling`.

    Args:
        run: A run of a deployment, in the state `Cancelling`.

    Raises:
        ConfigurationError: The run is of no deployment, so its flow cannot be loaded.
        BiomedError: The platform could not be asked.
    """
    with get_client(sync_client=True) as client:
        entrypoint = client.read_deployment(run.deployment_id).entrypoint if run.deployment_id else None
        if entrypoint is None or run.state is None:
            raise ConfigurationError(
                f"The flow run {run.name} ({run.id}) is of no deployment that names its flow. End what it has left on "
                "the platforms by hand; `what-is-running` lists it."
            )
        flow: Flow[..., Any] = load_flow_from_entrypoint(entrypoint)
        for hook in flow.on_cancellation_hooks or ():
            hook(flow, run, run.state)
        ended: State[Any] = Cancelled(
            message="Its worker and its process were gone. Its log tells what was ended on the platform."
        )
        client.set_flow_run_state(run.id, ended, force=True)
