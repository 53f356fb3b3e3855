"""Creating a task exactly once, with everything checked before it is sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from prefect_biomed.clients.errors import (
    ConfigurationError,
    NotFoundError,
    PreflightFailed,
)
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.clients.vantage6.checks import (
    OfflineNodes,
    check_keys,
    check_label,
    check_nodes,
    choose_organizations,
    encode_arguments,
    problems_of_arguments,
    send_once,
)
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.models import Collaboration, Dataframe, Node, Organization, Task

__all__ = [
    "Database",
    "DatabaseInput",
    "Databases",
    "Plan",
    "TaskRequest",
    "launch",
    "normalise_databases",
    "plan_task",
    "task_name",
]

logger = logging.getLogger(__name__)

_MAX_NAME = 128
_MAX_DESCRIPTION = 1024


class Database(BaseModel):
    """What a function reads: a database of the nodes, or on generation 5 a dataframe of the session.

    Attributes:
        label: Label of the database in the nodes' configuration (generations 3 and 4).
        dataframe: Id or name of a dataframe (generation 5).
        query: Query for databases that take one (generation 4).
        sheet_name: Sheet of a spreadsheet (generation 4).
        preprocessing: Steps applied at the node before the function (generation 4).
        arguments: Further arguments for reading it (4.15).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    label: str | None = None
    dataframe: int | str | None = Field(None, alias="dataframe_id")
    query: str | None = None
    sheet_name: str | None = None
    preprocessing: list[dict[str, JsonValue]] | None = None
    arguments: dict[str, JsonValue] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_the_type(cls, given: Any) -> Any:
        """The official client of generation 5 writes the type of the only thing there is."""
        if isinstance(given, dict) and given.get("type") == "dataframe":
            return {name: value for name, value in given.items() if name != "type"}
        return given

    def __str__(self) -> str:
        return repr(self.label if self.label is not None else self.dataframe)


def normalise_databases(given: Any) -> Any:
    """Bring the accepted forms of `databases` into one: a list of groups, one group for each parameter.

    Args:
        given: None, a label or the name or id of a dataframe, a mapping with one of both, a `Dataframe`, a list of
            these, or a list of lists of them where one parameter takes several.

    Returns:
        Lists of mappings for `Database`.

    Raises:
        ValueError: The form is another one; the message names the place.
    """
    if given is None:
        return []
    groups = given if isinstance(given, list | tuple) else [given]
    return [
        [_one_database(database, f"databases[{place}]") for database in _as_group(group)]
        for place, group in enumerate(groups)
    ]


def _as_group(group: Any) -> Sequence[Any]:
    return group if isinstance(group, list | tuple) else [group]


def _one_database(given: Any, place: str) -> Any:
    match given:
        case Database():
            return given
        case Dataframe():
            return {"dataframe": given.id}
        # Which of both a text names depends on the generation of the server.
        case str() if given:
            return {"label": given}
        case bool():
            pass
        case int():
            return {"dataframe": given}
        case dict() if any(given.get(name) for name in ("label", "dataframe", "dataframe_id")):
            return given
    raise ValueError(
        f"{place} is {given!r}. Give a label, the name or id of a dataframe, or a mapping with 'label' or 'dataframe'."
    )


DatabaseInput = str | int | Database | list[str | int | Database | list[str | int | Database]] | None
"""How `databases` is written in a form: text, number or mapping; lists and groups of them."""

Databases = Annotated[list[list[Database]], BeforeValidator(normalise_databases)]
"""What a task reads, in any of the forms that `normalise_databases` takes."""


class TaskRequest(BaseModel):
    """One function of one image, to be executed at some organizations.

    Attributes:
        collaboration: Exact name or id.
        image: Docker image of the algorithm.
        method: Function to call.
        organizations: Exact names or ids; all of the collaboration, or of the study, when None.
        arguments: Keyword arguments of the function.
        databases: What it reads.
        name: Name of the task; the method when empty. A token is appended.
        description: At most 1024 characters.
        study: Exact name or id of a study.
        store: Id of the algorithm store that vouches for the image.
        session: Id of the session (generation 5).
        central: Whether the function coordinates others.
        columns: Columns it needs; checked against those that nodes share.
        depends_on: Tasks that must have ended well before (generation 5).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    collaboration: str | int
    image: str
    method: str
    organizations: list[str | int] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    databases: Databases = Field(default_factory=list)
    name: str = ""
    description: str = ""
    study: str | int | None = None
    store: int | None = None
    session: int | None = None
    central: bool = False
    columns: list[str] = Field(default_factory=list)
    depends_on: list[int] = Field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A task that has passed all checks.

    Attributes:
        request: What was asked for.
        name: Full name with the token.
        collaboration: With its members.
        organizations: Those that will execute it, in the order asked for.
        study_id: The study, None without.
        nodes: Nodes of the collaboration that the account sees, by their organization.
        databases: In the words of the server's generation.
        dataframes_awaited: Ids of dataframes that are being made; the server refuses to compute on them before.
        warnings: What does not stop the task but may.
    """

    request: TaskRequest
    name: str
    collaboration: Collaboration
    organizations: tuple[Organization, ...]
    study_id: int | None
    nodes: Mapping[int, Node]
    databases: JsonValue
    dataframes_awaited: frozenset[int]
    warnings: tuple[str, ...]


def task_name(request: TaskRequest, token: str) -> str:
    """Name a task so that it can be found again.

    Args:
        request: What is asked for.
        token: The same on every retry of this intent, different for every new one.
    """
    return f"{request.name or request.method}-{token}"


def plan_task(
    client: Vantage6Client,
    request: TaskRequest,
    token: str,
    *,
    offline_nodes: OfflineNodes = "warn",
    collaboration: Collaboration | None = None,
) -> Plan:
    """Check everything that can be checked before a task is sent. Only reads; safe to repeat.

    Args:
        client: The account.
        request: What is asked for.
        token: Token of the intent.
        offline_nodes: ``fail`` counts an offline node as a problem, otherwise it is a warning.
        collaboration: The collaboration, when it has been read already.

    Returns:
        The plan.

    Raises:
        PreflightFailed: With all problems at once.
        KeyMismatch: The collaboration is encrypted and the private key is missing or not the organization's.
        PlatformError: The server cannot be asked.
    """
    problems = _problems_of(request, token)
    warnings: list[str] = []
    try:
        collaboration = collaboration or client.collaboration(request.collaboration)
    except NotFoundError as error:
        raise PreflightFailed(f"Task {request.method!r}", [*problems, str(error)]) from error
    members = collaboration.organizations
    study_id = None
    if request.study is not None:
        try:
            study = client.study(request.study, collaboration.id)
            study_id, members = study.id, study.organizations
        except (NotFoundError, ConfigurationError) as error:
            problems.append(str(error))
    organizations = choose_organizations(request.organizations, members, problems)
    nodes = nodes_of(client, collaboration.id)
    check_nodes(client, organizations, nodes, offline_nodes, problems, warnings)
    if client.organization_id not in {member.id for member in collaboration.organizations}:
        problems.append(f"Your organization is not a member of collaboration {collaboration.name!r}.")
    waiting: set[int] = set()
    databases = _databases_on_the_wire(client, request, organizations, nodes, problems, waiting)
    if collaboration.encrypted:
        check_keys(client, collaboration, organizations, problems)
    if problems:
        raise PreflightFailed(f"Task {request.method!r}", problems)
    return Plan(
        request=request,
        name=task_name(request, token),
        collaboration=collaboration,
        organizations=organizations,
        study_id=study_id,
        nodes=nodes,
        databases=databases,
        dataframes_awaited=frozenset(waiting),
        warnings=tuple(warnings),
    )


def _problems_of(request: TaskRequest, token: str) -> list[str]:
    problems = []
    name = request.name or request.method
    if name.strip().isdecimal():
        problems.append(f"name is {name!r}; vantage6 refuses names of digits only.")
    if len(full := task_name(request, token)) > _MAX_NAME:
        problems.append(f"name has {len(name)} characters, {_MAX_NAME - len(full) + len(name)} are allowed.")
    if len(request.description) > _MAX_DESCRIPTION:
        problems.append(f"description has {len(request.description)} characters, {_MAX_DESCRIPTION} are allowed.")
    if not request.image.strip():
        problems.append("image is empty.")
    if not request.method.strip():
        problems.append("method is empty.")
    return problems + problems_of_arguments(request.arguments)


def _databases_on_the_wire(
    client: Vantage6Client,
    request: TaskRequest,
    organizations: Sequence[Organization],
    nodes: Mapping[int, Node],
    problems: list[str],
    waiting: set[int],
) -> JsonValue:
    if client.version.major == 5:
        return _dataframes_on_the_wire(client, request, organizations, problems, waiting)
    flat = [database for group in request.databases for database in group]
    for database in flat:
        if database.label is None:
            problems.append(
                f"databases: {database} is a dataframe, which vantage6 {client.version.text} does not know."
            )
            continue
        for organization in organizations:
            node = nodes.get(organization.id)
            check_label(database.label, organization, node, request.columns, problems)
    if client.version.major == 3:
        if len(flat) > 1:
            problems.append(f"databases: vantage6 {client.version.text} reads one database for each task.")
        return flat[0].label if flat else "default"
    return [database.model_dump(exclude_none=True, exclude={"dataframe"}) for database in flat] or None


def _dataframes_on_the_wire(
    client: Vantage6Client,
    request: TaskRequest,
    organizations: Sequence[Organization],
    problems: list[str],
    waiting: set[int],
) -> JsonValue:
    if request.session is None:
        problems.append("session is missing; generation 5 computes in a session.")
        return []
    if not request.databases:
        return []
    frames = client.list(Dataframe, session_id=request.session)
    known = ", ".join(f"{frame.name!r} (id {frame.id})" for frame in frames) or "none"
    groups: list[JsonValue] = []
    for group in request.databases:
        entries: list[JsonValue] = []
        for database in group:
            key = database.dataframe if database.dataframe is not None else database.label
            frame = next((one for one in frames if key in (one.id, one.name)), None)
            if frame is None:
                problems.append(f"databases: session {request.session} has no dataframe {key!r}. Known: {known}.")
                continue
            _check_frame(frame, organizations, request.columns, problems, waiting)
            entries.append({"type": "dataframe", "dataframe_id": frame.id})
        groups.append(entries)
    return groups


def _check_frame(
    frame: Dataframe,
    organizations: Sequence[Organization],
    columns: Sequence[str],
    problems: list[str],
    waiting: set[int],
) -> None:
    missing = _not_ready(frame, organizations)
    step = frame.last_session_task
    if missing and step is not None and not step.status.is_terminal:
        waiting.add(frame.id)
    elif missing:
        state = f" Task {step.id}, which makes it, is {step.status.value}." if step else ""
        problems.append(f"databases: {frame.name!r} is not there for {', '.join(missing)}.{state}")
    known = {column.name for column in frame.columns}
    if known and (unknown := [column for column in columns if column not in known]):
        problems.append(
            f"columns: dataframe {frame.name!r} has no {', '.join(map(repr, unknown))}. "
            f"Known: {', '.join(sorted(known))}."
        )


def _not_ready(frame: Dataframe, organizations: Sequence[Organization]) -> list[str]:
    return [one.name for one in organizations if one.id not in frame.organizations_ready]


def launch(
    client: Vantage6Client,
    request: TaskRequest,
    token: str,
    *,
    offline_nodes: OfflineNodes = "warn",
    waiting: PollSettings | None = None,
    doubt_seconds: float = 60.0,
) -> Task:
    """Create a task, once and never twice.

    The collaboration is searched for a task with the name of this intent; only when there is none, all checks are made
    and the task is sent. When the answer is lost, the name is looked for again. Safe to repeat, also after a kill
    between the request and its answer, and on another machine: the name is what counts.

    After the log-in, for which version, token and account are read, five requests whatever the number of
    organizations, six on generation 5, where dataframes are checked too; plus one for each organization where the
    server keeps payloads in a blob store.

    Args:
        client: The account.
        request: What is asked for.
        token: The same on every retry of this intent, different for every new one.
        offline_nodes: What to do when a node is offline.
        waiting: How to wait for offline nodes, and for dataframes that are being made.
        doubt_seconds: How long to look for a task whose answer was lost.

    Returns:
        The task, new or found.

    Raises:
        PreflightFailed: The request cannot work; nothing was sent. All problems are listed.
        DeadlineExceeded: A node did not come back, or a dataframe was not made in time; nothing was sent.
        LaunchInDoubt: The answer was lost and no task of that name has appeared. Repeating looks again first.
        PlatformError: The task was refused.
    """
    try:
        collaboration = client.collaboration(request.collaboration)
    except NotFoundError as error:
        raise PreflightFailed(f"Task {request.method!r}", [*_problems_of(request, token), str(error)]) from error
    name = task_name(request, token)
    found = client.find_task(name, collaboration.id) if len(name) <= _MAX_NAME else None
    if found is not None:
        logger.info("Task %s is there already with id %d", name, found.id)
        return found
    plan = plan_task(client, request, token, offline_nodes=offline_nodes, collaboration=collaboration)
    for warning in plan.warnings:
        logger.warning("%s", warning)
    settings = waiting or PollSettings(interval_seconds=2.0, growth=1.2, max_interval_seconds=30.0)
    if offline_nodes == "wait":
        _wait_for_nodes(client, plan, settings)
    if plan.dataframes_awaited:
        _wait_for_dataframes(client, plan, settings)
    body = _body(client, plan)
    return send_once(
        lambda: client.create_task(body),
        lambda: client.find_task(name, collaboration.id),
        what=f"task {name}",
        doubt_seconds=doubt_seconds,
    )


def _body(client: Vantage6Client, plan: Plan) -> dict[str, Any]:
    request, major = plan.request, client.version.major
    body: dict[str, Any] = {
        "name": plan.name,
        "description": request.description,
        "image": request.image,
        "collaboration_id": plan.collaboration.id,
        "organizations": encode_arguments(
            client,
            plan.collaboration,
            plan.organizations,
            request.method,
            request.arguments,
            central=request.central,
        ),
    }
    if major == 3:
        return body | {"database": plan.databases}
    body["databases"] = plan.databases
    if plan.study_id is not None:
        body["study_id"] = plan.study_id
    if request.store is not None:
        body["store_id"] = request.store
    if major == 5:
        body |= {
            "method": request.method,
            "session_id": request.session,
            "action": "central_compute" if request.central else "federated_compute",
        }
        if request.depends_on:
            body["depends_on_ids"] = list(request.depends_on)
    return body


def _wait_for_nodes(client: Vantage6Client, plan: Plan, settings: PollSettings) -> None:
    wanted = {organization.id: organization.name for organization in plan.organizations}
    what = f"Nodes of {', '.join(wanted.values())}"
    for nodes in poll(
        lambda: nodes_of(client, plan.collaboration.id), settings, what=what, take_up_again="The task was not created."
    ):
        offline = [name for number, name in wanted.items() if number in nodes and not nodes[number].is_online]
        if not offline:
            return
        logger.info("Waiting for the nodes of %s", ", ".join(offline))


def _wait_for_dataframes(client: Vantage6Client, plan: Plan, settings: PollSettings) -> None:
    session, wanted = plan.request.session, plan.dataframes_awaited
    what = f"Dataframes of session {session}"
    for frames in poll(
        lambda: client.list(Dataframe, session_id=session), settings, what=what, take_up_again="No task was created."
    ):
        problems: list[str] = []
        waiting: set[int] = set()
        for frame in frames:
            if frame.id in wanted:
                _check_frame(frame, plan.organizations, plan.request.columns, problems, waiting)
        if problems:
            raise PreflightFailed(f"Task {plan.request.method!r}", problems)
        if not waiting:
            return
