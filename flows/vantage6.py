"""Flows of vantage6."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from prefect.logging.loggers import LoggingAdapter
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic.json_schema import SkipJsonSchema

from prefect_biomed.blocks.vantage6 import Vantage6Credentials
from prefect_biomed.clients.errors import BiomedError, ConfigurationError, DeadlineExceeded, invalid_fields
from prefect_biomed.clients.texts import inline, inline_code
from prefect_biomed.clients.vantage6 import (
    AVERAGING,
    Aggregation,
    ArgumentsFile,
    CancelNotPermitted,
    Checkpoints,
    Collaboration,
    DatabaseInput,
    DataframeSpec,
    Function,
    Node,
    Organization,
    OrganizationSpec,
    Orientation,
    Result,
    Round,
    RunFailure,
    Session,
    Stopping,
    Task,
    TaskRequest,
    User,
    aggregated,
    aggregation_of,
    answers_of,
    frame_of,
    load_result,
    organization_folder,
    write_server_configuration,
)
from prefect_biomed.flows._checked import checked_flow
from prefect_biomed.flows.cancellation import ending_remote_jobs
from prefect_biomed.flows.parameters import RefreshTime
from prefect_biomed.flows.vantage6_parameters import (
    AnalysisWaiting,
    FederatedOutputs,
    FederatedWaiting,
    Learning,
    RoundsOutputs,
    RoundsWaiting,
    SessionDetails,
    TaskDetails,
)
from prefect_biomed.tasks import vantage6 as steps
from prefect_biomed.tasks._reporting import artifact_key, markdown, run_logger
from prefect_biomed.tasks.policies import intent_token, lasting_folder
from prefect_biomed.tasks.rounds import report_rounds
from prefect_biomed.tasks.run_names import flow_run_named

if TYPE_CHECKING:
    import pandas

__all__ = [
    "ANALYSIS",
    "Analysis",
    "DataframeSpec",
    "Federation",
    "Function",
    "LearnedModel",
    "collect_results",
    "federated_analysis",
    "federated_rounds",
    "federated_session",
    "kill_remote_rounds",
    "kill_remote_tasks",
    "provision_collaboration",
    "request_of",
]

Arguments = dict[str, Any]
Keys = Annotated[list[str | int], Field(min_length=1)]
ANALYSIS = "vantage6-analysis"
"""Kind of the intents of analyses, of which their tokens are made."""
_ROUNDS = "vantage6-rounds"


class Analysis(BaseModel):
    """What an analysis gave.

    ``analysis["north"]`` is the result of one organization, by its name or id.

    Attributes:
        task: The task that computed it.
        results: One for each organization; those without a value say why.
        failures: What went wrong where; empty unless partial results were accepted.
        warnings: What may make the results other than they seem: organizations whose results are missing, and subtasks
            that failed although the task itself ended well.
    """

    # What the outermost model says holds for all in it.
    model_config = ConfigDict(
        frozen=True, ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64"
    )

    task: Task
    results: tuple[Result, ...]
    failures: tuple[RunFailure, ...] = ()
    warnings: tuple[str, ...] = ()

    def __getitem__(self, organization: str | int) -> Result:
        """Give the result of one organization.

        Args:
            organization: Its exact name, or its id.

        Raises:
            KeyError: It is not among those that were asked; the message lists them.
        """
        for result in self.results:
            if organization in (result.organization, result.organization_id):
                return result
        known = ", ".join(f"{one.organization!r} (id {one.organization_id})" for one in self.results) or "none"
        raise KeyError(f"No result of organization {organization!r} in task {self.task.id}. Known: {known}.")

    @property
    def value(self) -> JsonValue | bytes:
        """The output of a task of one organization, as of a central one: decoded JSON, or bytes. Reads its file.

        Raises:
            ConfigurationError: There are results of several organizations, or of none.
            ResultUnavailable: There is no output; the message says why.
        """
        if len(self.results) != 1:
            raise ConfigurationError(
                f"Task {self.task.id} has {len(self.results)} results, so it has no single value: take results, "
                "analysis['<organization>'] or to_frame()."
            )
        return load_result(self.results[0])

    def to_frame(self, *, orient: Orientation | None = None) -> pandas.DataFrame:
        """Put the results into one table of pandas; arguments, rows and errors as for `frame_of`."""
        return frame_of(self.results, orient=orient)


class LearnedModel(BaseModel):
    """What rounds of learning gave.

    Attributes:
        state: The state after the last round.
        rounds: Each round: who answered, metrics, time.
        folder: Folder with the states.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    state: Arguments = Field(repr=False)
    rounds: tuple[Round, ...]
    folder: Path


class Federation(BaseModel):
    """A federation that was set up.

    Attributes:
        collaboration: The collaboration.
        organizations: Its organizations.
        nodes: Their nodes.
        users: Their users.
        configuration_dir: Folder with the private keys, node configurations and passwords.
    """

    model_config = ConfigDict(frozen=True)

    collaboration: Collaboration
    organizations: tuple[Organization, ...]
    nodes: tuple[Node, ...]
    users: tuple[User, ...]
    configuration_dir: Path


def _kill_tasks(parameters: Mapping[str, Any], token: str, logger: LoggingAdapter) -> list[str]:
    credentials: Vantage6Credentials = parameters["credentials"]
    killed: list[str] = []
    problems: list[BiomedError] = []
    with credentials.get_client() as client:
        for task in client.records(Task, name=f"%-{token}"):
            if not task.name.endswith(f"-{token}") or task.status.is_terminal:
                continue
            try:
                client.kill_task(task.id)
                killed.append(f"task {task.id}")
            except CancelNotPermitted as error:
                logger.error("%s", error)
            except BiomedError as error:  # the others are killed all the same
                logger.error("Task %d could not be killed: %s", task.id, error)
                problems.append(error)
    if problems:
        raise problems[0]
    return killed


kill_remote_tasks = ending_remote_jobs(ANALYSIS, _kill_tasks, named_by="idempotency_key")


@checked_flow(
    name="federated-analysis",
    flow_run_name=flow_run_named("details.name", "collaboration", "method"),
    on_cancellation=[kill_remote_tasks],
)
def federated_analysis(
    credentials: Vantage6Credentials,
    collaboration: str | int,
    image: str,
    method: str,
    organizations: Keys | None = None,
    arguments: Arguments | None = None,
    databases: DatabaseInput = None,
    refresh_time: RefreshTime = 0.5,
    details: TaskDetails | None = None,
    outputs: FederatedOutputs | None = None,
    waiting: AnalysisWaiting | None = None,
    task_id: int | None = None,
    idempotency_key: str | None = None,
    arguments_file: ArgumentsFile | None = None,
) -> Analysis:
    """Run a function at organizations of a collaboration: create the task, wait, fetch the results.

    A retry of the same flow run takes up where it stopped and creates nothing twice; a new flow run, or a second call
    in the same parent flow, is a new analysis.

    Args:
        credentials: The account.
        collaboration: Exact name or id.
        image: Docker image of the algorithm.
        method: Function to call.
        organizations: Exact names or ids; all of the collaboration, or of the study, when empty.
        arguments: Keyword arguments of the function.
        databases: What it reads: a label of the nodes' databases, or on generation 5 the name or id of a dataframe; a
            list of these, one for each parameter of the function.
        refresh_time: Seconds between the first looks at the task; it grows with the time waited.
        details: How the task is named, what it belongs to, and what its function needs.
        outputs: Which results are enough, and where large ones go; those of all organizations when empty.
        waiting: Whether and how to wait for nodes and for results, and whether a cancellation kills the task; to the
            end, and it does not, when empty.
        task_id: A task that exists: nothing is created, it is waited for and its results are fetched.
        idempotency_key: Tells this analysis apart where Prefect cannot: in a flow that is called from inside a task.
        arguments_file: Further arguments, too large for the engine, which takes 512 KiB: path or URL of shared storage
            of a JSON file with an object of arguments; or a mapping from names of arguments to files, where a file
            named `.json` is the argument itself, and any other becomes a base64 text.

    Returns:
        The task, its results and its failures.

    Raises:
        ConfigurationError: The parameters are larger than the engine takes; `arguments_file` helps.
        PreflightFailed: All problems found before anything was sent.
        TaskFailed: Runs ended without success; organization, node, status and log of each, causes first.
        DeadlineExceeded: Not all runs have ended in time; `task_id` takes the task up again. With `partial` only when
            there is no result at all.
        ResultUnavailable: A result is empty, expired, cut short, a pickle, or encrypted for others.
    """
    details, waiting = details or TaskDetails(), waiting or AnalysisWaiting()
    if task_id is not None:
        known = steps.Told(flow="federated-analysis", parameters={"task_id": task_id})
        return collect_results(credentials, task_id, refresh_time, outputs, waiting, known)
    request = request_of(
        collaboration=collaboration,
        image=image,
        method=method,
        organizations=organizations,
        arguments=arguments or {},
        arguments_file=arguments_file,
        databases=databases,
        **details.model_dump(),
    )
    task = _create(credentials, request, waiting, intent_token(ANALYSIS, explicit=idempotency_key))
    if not waiting.wait:
        return Analysis(task=task, results=())
    return collect_results(credentials, task, refresh_time, outputs, waiting, _told(request))


@checked_flow(
    name="federated-session",
    flow_run_name=flow_run_named("collaboration", "session_name", "method"),
    on_cancellation=[kill_remote_tasks],
)
def federated_session(
    credentials: Vantage6Credentials,
    collaboration: str | int,
    session_name: str,
    dataframes: Annotated[list[DataframeSpec], Field(min_length=1)],
    image: str,
    method: str,
    arguments: Arguments | None = None,
    organizations: Keys | None = None,
    databases: DatabaseInput = None,
    details: SessionDetails | None = None,
    outputs: FederatedOutputs | None = None,
    waiting: FederatedWaiting | None = None,
    idempotency_key: str | None = None,
    arguments_file: ArgumentsFile | None = None,
) -> Analysis:
    """Extract dataframes at the nodes, change them, and compute on them (generation 5).

    Sessions, dataframes and steps that exist under their names are reused when they are what is asked for, so a second
    run of the same settings only computes.

    Args:
        credentials: The account.
        collaboration: Exact name or id.
        session_name: Name of the session, unique in the collaboration.
        dataframes: The dataframes.
        image: Docker image of the computation.
        method: Its function.
        arguments: Its keyword arguments.
        organizations: Where to extract; all of the collaboration or study when empty.
        databases: Names of dataframes for the function's parameters; all of `dataframes` in order when empty.
        details: How session and computation are named and shared, where to compute, and what the function needs.
        outputs: Which results are enough, and where large ones go; those of all organizations when empty.
        waiting: How to wait for nodes and for each step, and whether a cancellation kills the computation; to the end,
            and it does not, when empty.
        idempotency_key: Tells this computation apart where Prefect cannot.
        arguments_file: Further arguments of the computation, too large for the engine; as for `federated_analysis`.

    Returns:
        The computation's task, its results and its failures.

    Raises:
        NameConflict: A session, dataframe or step of this name is another one.
        PreflightFailed: All problems found before a step was sent.
        TaskFailed: A step failed; organization, node, status and log of each failure.
        DeadlineExceeded: A step has not ended in time; it goes on.
    """
    details, waiting = details or SessionDetails(), waiting or FederatedWaiting()
    token = intent_token(ANALYSIS, explicit=idempotency_key)
    session = steps.create_session(credentials, collaboration, session_name, details.scope, details.study)
    for spec in dataframes:
        _prepare(credentials, session, spec, organizations, details.store, waiting)
    request = request_of(
        collaboration=collaboration,
        image=image,
        method=method,
        organizations=details.compute_at or organizations,
        arguments=arguments or {},
        arguments_file=arguments_file,
        databases=databases if databases is not None else [spec.name for spec in dataframes],
        session=session.id,
        **details.model_dump(exclude={"scope", "compute_at"}),
    )
    task = _create(credentials, request, waiting, token)
    return collect_results(credentials, task, 0.5, outputs, waiting, _told(request))


kill_remote_rounds = ending_remote_jobs(_ROUNDS, _kill_tasks, named_by="idempotency_key")


@checked_flow(
    name="federated-rounds",
    flow_run_name=flow_run_named("details.name", "collaboration", "method"),
    on_cancellation=[kill_remote_rounds],
)
def federated_rounds(
    credentials: Vantage6Credentials,
    collaboration: str | int,
    image: str,
    method: str,
    rounds: Annotated[int, Field(ge=1, le=9999)],
    state: Arguments,
    aggregation: str | SkipJsonSchema[Aggregation] = AVERAGING,
    organizations: Keys | None = None,
    arguments: Arguments | None = None,
    databases: DatabaseInput = None,
    details: TaskDetails | None = None,
    learning: Learning | None = None,
    outputs: RoundsOutputs | None = None,
    waiting: RoundsWaiting | None = None,
    idempotency_key: str | None = None,
) -> LearnedModel:
    """Learn in rounds: a function at the organizations answers to a state, an aggregation makes the next one of it.

    The state after each round is kept, so a run that is retried goes on in its round: no task is made twice, and
    no round is aggregated twice. Another flow run, or a second call in the same parent flow, is a run of its own.

    Args:
        credentials: The account.
        collaboration: Exact name or id.
        image: Docker image of the algorithm.
        method: Function to call in each round; the state is among its keyword arguments.
        rounds: So many rounds at most.
        state: The state before the first round, by the names of the function's arguments.
        aggregation: Function, or where it is imported from, `package.module:function`; it gets the state, the answers
            by organization, and `aggregation_arguments`, and returns the next state or a `RoundUpdate`. Averages
            weighted by number of records when empty.
        organizations: Exact names or ids; all of the collaboration, or of the study, when empty.
        arguments: Further keyword arguments of the function, the same in each round.
        databases: What it reads, as for `federated_analysis`.
        details: How the tasks are named, what they belong to, and what the function needs.
        learning: Arguments of the aggregation, and when to stop early; after the last round when empty.
        outputs: Where the states are kept.
        waiting: How to wait for nodes and for each round, and how many answers are enough; for all when empty.
        idempotency_key: Tells these rounds apart where Prefect cannot: in a flow that is called from inside a task.

    Returns:
        The last state and the rounds.

    Raises:
        TooFewAnswers: A round has fewer answers than needed; who is missing, and why.
        DeadlineExceeded: A round or all of them have not ended in time; a retry goes on.
        ConfigurationError: The aggregation cannot be imported, or does not fit the answers.
        PreflightFailed: All problems found before the task of a round was sent.
        TaskFailed: Runs of a round ended without success, and all answers are needed.
    """
    details, learning, waiting = details or TaskDetails(), learning or Learning(), waiting or RoundsWaiting()
    aggregate, token = aggregation_of(aggregation), intent_token(_ROUNDS, explicit=idempotency_key)
    request = request_of(
        collaboration=collaboration,
        image=image,
        method=method,
        organizations=organizations,
        arguments=arguments or {},
        databases=databases,
        **details.model_dump(),
    )
    folder = (outputs.output_dir if outputs else None) or lasting_folder() / "vantage6_rounds"
    kept = Checkpoints(folder.expanduser().absolute() / token, request.model_dump(mode="json"), state)
    begun, stopping = time.monotonic(), Stopping(**learning.model_dump(exclude={"aggregation_arguments"}))
    while len(kept.rounds) < rounds and not stopping.is_due(kept.rounds):
        _check_time(begun, waiting.timeout_seconds, len(kept.rounds))
        _learn(credentials, request, kept, aggregate, learning.aggregation_arguments, waiting, token)
    return LearnedModel(state=kept.state(), rounds=tuple(kept.rounds), folder=kept.folder)


@checked_flow(name="provision-collaboration", flow_run_name=flow_run_named("collaboration"))
def provision_collaboration(
    credentials: Vantage6Credentials,
    collaboration: str,
    organizations: Annotated[list[OrganizationSpec], Field(min_length=1)],
    configuration_dir: Path,
    encrypted: bool = True,
) -> Federation:
    """Set up a collaboration: organizations with key pairs, users, the collaboration, nodes and their configurations.

    Run again, it adds what is missing and changes nothing else: keys, API keys and passwords that exist are kept.

    Args:
        credentials: An account that may make all of these.
        collaboration: Name of the collaboration.
        organizations: Its organizations, with their users and the databases of their nodes.
        configuration_dir: Folder that gets a sub-folder for each organization with its private key, the configuration
            of its node, and the passwords of its users, all in files of mode 0600; and `server.yaml`, with which a
            server of this generation is started. An absolute path.
        encrypted: Whether inputs and results are encrypted.

    Returns:
        What there is now. Secrets are in the files only.

    Raises:
        KeyMismatch: The server has another public key than the folder. Neither was changed.
        NameConflict: Something of this name exists and is not what was asked for.
        PermissionDeniedError: The role does not allow it.
    """
    folder = configuration_dir.expanduser()
    if not folder.is_absolute():
        raise ConfigurationError(f"configuration_dir is {configuration_dir}; secrets need an absolute path.")
    folders = [organization_folder(folder, spec.name) for spec in organizations]
    if len(set(folders)) < len(folders):
        raise ConfigurationError("Two organizations have names that make the same folder. Name them apart.")
    made = [steps.create_organization(credentials, spec, folder, encrypted) for spec in organizations]
    owner = steps.create_collaboration(credentials, collaboration, made, encrypted)
    nodes = [
        steps.register_node(credentials, owner, organization, folder, spec.databases)
        for spec, organization in zip(organizations, made, strict=True)
    ]
    users = [
        steps.create_user(credentials, user, organization, folder)
        for spec, organization in zip(organizations, made, strict=True)
        for user in spec.users
    ]
    with credentials.get_client() as client:
        write_server_configuration(client, folder, auth_url=credentials.auth_url, realm=credentials.realm)
    federation = Federation(
        collaboration=owner,
        organizations=tuple(made),
        nodes=tuple(nodes),
        users=tuple(users),
        configuration_dir=folder,
    )
    markdown(artifact_key("vantage6-collaboration", owner.id), _inventory(federation), f"Collaboration {owner.name}")
    return federation


def _learn(
    credentials: Vantage6Credentials,
    request: TaskRequest,
    kept: Checkpoints,
    aggregate: Aggregation,
    settings: Arguments,
    waiting: RoundsWaiting,
    token: str,
) -> None:
    """Do one round and keep what it gives."""
    began, number = time.monotonic(), len(kept.rounds) + 1
    base = request.name or request.method
    asked = request.model_copy(update={"name": f"{base}-{number}", "arguments_file": str(kept.state_file(number - 1))})
    task = _create(credentials, asked, waiting, token)
    some = waiting.min_organizations is not None
    ended = None
    try:
        (ended,) = steps.wait_for_results(
            credentials,
            task,
            partial=some,
            timeout_seconds=waiting.round_timeout_seconds,
            refresh_time=waiting.refresh_time,
            follow_logs=waiting.follow_logs,
        )
    except DeadlineExceeded:
        if not some:
            raise
    results = steps.get_results(credentials, task, partial=some, output_dir=kept.folder / "results", ended=ended)
    answers, missing = answers_of(results, waiting.min_organizations)
    if missing:
        _end_late_runs(credentials, task)
    update = aggregated(aggregate, kept.state(), answers, settings)
    learned = Round(
        number=number,
        task_id=task.id,
        organizations=tuple(answers),
        missing=missing,
        metrics=update.metrics,
        converged=update.converged,
        seconds=time.monotonic() - began,
    )
    kept.add(learned, update.state)
    report_rounds(token, kept.rounds)


def _check_time(begun: float, timeout_seconds: float | None, done: int) -> None:
    if timeout_seconds is not None and time.monotonic() - begun > timeout_seconds:
        raise DeadlineExceeded(f"{done} rounds have ended in {timeout_seconds:g} s. A retry of this flow run goes on.")


def _end_late_runs(credentials: Vantage6Credentials, task: Task) -> None:
    """Free the nodes of those that the round has not waited for, for the next one."""
    with credentials.get_client() as client:
        try:
            client.kill_task(task.id)
        except CancelNotPermitted as error:
            run_logger().warning("Late runs of task %d go on beside the next round: %s", task.id, error)


def request_of(**fields: Any) -> TaskRequest:
    """Make a request of parameters of flows.

    Args:
        **fields: As for `TaskRequest`.

    Returns:
        The request.

    Raises:
        ConfigurationError: They do not fit; nothing was sent.
    """
    try:
        return TaskRequest(**fields)
    except ValidationError as error:
        raise ConfigurationError(f"Task {fields['method']!r}: {invalid_fields(error)}. Nothing was sent.") from None


def _create(credentials: Vantage6Credentials, request: TaskRequest, waiting: FederatedWaiting, token: str) -> Task:
    return steps.create_task(
        credentials,
        request,
        offline_nodes=waiting.offline_nodes,
        waiting_seconds=waiting.queue_timeout_seconds,
        token=token,
    )


def _prepare(
    credentials: Vantage6Credentials,
    session: Session,
    spec: DataframeSpec,
    organizations: list[str | int] | None,
    store: int | None,
    waiting: FederatedWaiting,
) -> None:
    """Extract a dataframe and take it through its steps; what is done already is not done again."""

    def wait_for(step: Task | None) -> None:
        if step is not None:
            steps.wait_for_results(
                credentials, step, timeout_seconds=waiting.timeout_seconds, follow_logs=waiting.follow_logs
            )

    frame = steps.create_dataframe(credentials, session, spec, organizations=organizations, store=store)
    wait_for(frame.last_session_task)
    for number, function in enumerate(spec.preprocessing, start=1):
        wait_for(
            steps.preprocess_dataframe(
                credentials, frame, function, step=number, organizations=organizations, store=store
            )
        )


def collect_results(
    credentials: Vantage6Credentials,
    task: Task | int,
    refresh_time: float,
    outputs: FederatedOutputs | None,
    waiting: FederatedWaiting,
    told: steps.Told | None = None,
) -> Analysis:
    """Wait for the end of a task and fetch its results. Safe to repeat.

    Args:
        credentials: The account.
        task: The task.
        refresh_time: Seconds between the first looks at it.
        outputs: Which results are enough, and where large ones go.
        waiting: How long to wait.
        told: What the crate in the folder of `outputs` tells of the flow; no crate is written when None.

    Returns:
        The task, its results and its failures.

    Raises:
        TaskFailed: Runs ended without success.
        DeadlineExceeded: Not all runs have ended in time.
        ResultUnavailable: A result is empty, expired, cut short, a pickle, or encrypted for others.
    """
    outputs = outputs or FederatedOutputs()
    (outcome,) = steps.wait_for_results(
        credentials,
        task,
        partial=outputs.partial,
        timeout_seconds=waiting.timeout_seconds,
        refresh_time=refresh_time,
        follow_logs=waiting.follow_logs,
    )
    results = steps.get_results(
        credentials, task, partial=outputs.partial, output_dir=outputs.output_dir, ended=outcome
    )
    warnings = [f"In a subtask: {failure}" for failure in outcome.tolerated]
    warnings += [
        f"{result.organization} has no result yet; task_id={outcome.task.id} fetches it later: {result.unavailable}"
        for result in results
        if result.missing
    ]
    if told is not None and outputs.output_dir is not None:
        steps.write_crate(credentials, outcome, results, outputs.output_dir, told)
    return Analysis(task=outcome.task, results=tuple(results), failures=outcome.failures, warnings=tuple(warnings))


def _told(request: TaskRequest) -> steps.Told:
    """What was asked for, as parameters of the flow that computes the same once more."""
    asked = request.model_dump(mode="json", exclude_defaults=True)
    details = {name: asked.pop(name) for name in TaskDetails.model_fields if name in asked}
    return steps.Told(flow="federated-analysis", parameters=asked | ({"details": details} if details else {}))


def _inventory(federation: Federation) -> str:
    nodes = {node.organization_id: node for node in federation.nodes}
    rows = [
        f"| {inline(one.name)} | {one.id} | {inline(nodes[one.id].name) if one.id in nodes else ''} "
        f"| {inline(', '.join(user.username for user in federation.users if user.organization_id == one.id))} |"
        for one in federation.organizations
    ]
    kind = "encrypted" if federation.collaboration.encrypted else "not encrypted"
    return "\n".join(
        [
            f"# {inline(federation.collaboration.name)}",
            "",
            f"Collaboration {federation.collaboration.id}, {kind}. Keys, configurations and passwords are in "
            f"{inline_code(federation.configuration_dir)}.",
            "",
            "| organization | id | node | users |",
            "|---|---|---|---|",
            *rows,
        ]
    )
