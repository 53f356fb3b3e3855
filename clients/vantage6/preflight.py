"""Checks before anything is sent: what can be known beforehand is asked, and all problems are told at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from prefect_biomed.clients.errors import ConfigurationError, NotFoundError, PreflightFailed
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6.algorithm_stores import Kind, kind_of
from prefect_biomed.clients.vantage6.arguments import problems_of_arguments, problems_of_files
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.encryption import PrivateKey, PublicKey
from prefect_biomed.clients.vantage6.errors import InvalidKey, KeyMismatch
from prefect_biomed.clients.vantage6.models import Collaboration, Dataframe, Node, Organization, Task, TaskRequest

__all__ = [
    "MAX_NAME",
    "OfflineNodes",
    "Plan",
    "check_encryption",
    "check_frame",
    "check_key",
    "check_keys",
    "check_label",
    "check_nodes",
    "choose_organizations",
    "collaboration_of",
    "plan_task",
    "stuck",
    "task_name",
    "wait_until_ready",
]

logger = logger_of(__name__)

MAX_NAME = 128
"""Longest name of a task in characters."""

_MAX_DESCRIPTION = 1024
_MAX_NAMED = 10
_WAITING = PollSettings(interval_seconds=2.0, growth=1.2, max_interval_seconds=30.0)

OfflineNodes = Literal["warn", "wait", "fail"]
"""What to do when a node is offline: create the task anyway, wait for the node first, or refuse."""


def choose_organizations(
    wanted: Sequence[str | int] | None, members: Sequence[Organization], problems: list[str]
) -> tuple[Organization, ...]:
    """Find organizations by name or id.

    Args:
        wanted: Exact names or ids; all members when None.
        members: Those to choose from.
        problems: Gets a sentence for each one that is unknown or named twice.

    Returns:
        The organizations in the order asked for.
    """
    if wanted is None:
        return tuple(members)
    if not wanted:
        problems.append("organizations is empty; leave it out to ask all of them.")
    by_key: dict[str | int, Organization] = {}
    for one in members:
        by_key |= {one.id: one, str(one.id): one, one.name: one}
    chosen: dict[int, Organization] = {}
    for key in wanted:
        member = by_key.get(key)
        if member is None:
            known = ", ".join(f"{one.name!r} (id {one.id})" for one in members) or "none"
            problems.append(f"organizations: {key!r} is not a member. Known: {known}.")
        elif member.id in chosen:
            problems.append(f"organizations: {member.name!r} is named twice.")
        else:
            chosen[member.id] = member
    return tuple(chosen.values())


def check_nodes(
    client: Vantage6Client,
    organizations: Iterable[Organization],
    nodes: Mapping[int, Node],
    offline_nodes: OfflineNodes,
    problems: list[str],
    warnings: list[str],
) -> None:
    """Make sure that each organization has a node, and see whether it is online.

    Args:
        client: The account.
        organizations: Those that will execute something.
        nodes: Nodes of the collaboration by their organization.
        offline_nodes: ``fail`` counts an offline node as a problem, otherwise it is a warning.
        problems: Gets a sentence for each problem.
        warnings: Gets a sentence for each warning.
    """
    # Roles of generation 3 see the node of their own organization only.
    sees_all = bool(nodes.keys() - {client.organization_id})
    hidden: list[str] = []
    offline: list[str] = []
    for organization in organizations:
        node = nodes.get(organization.id)
        if node is None and sees_all:
            having = ", ".join(sorted(one.name for one in nodes.values()))
            problems.append(f"Organization {organization.name!r} has no node in the collaboration. Nodes: {having}.")
        elif node is None:
            hidden.append(repr(organization.name))
        elif not node.is_online:
            offline.append(f"{node.name!r} of organization {organization.name!r}")
    # One line for all of them: a large collaboration would fill the log.
    if hidden:
        warnings.append(f"This account cannot see the node of {_some(hidden)}, nor whether it is online.")
    if offline and offline_nodes == "fail":
        problems.append(f"{_nodes(offline)} offline.")
    elif len(offline) == 1:
        warnings.append(f"{_nodes(offline)} offline; its run starts when it comes back.")
    elif offline:
        warnings.append(f"{_nodes(offline)} offline; their runs start when they come back.")


def _nodes(names: Sequence[str]) -> str:
    return f"Node {names[0]} is" if len(names) == 1 else f"Nodes {_some(names)} are"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_label(
    label: str, organization: Organization, node: Node | None, columns: Sequence[str], problems: list[str]
) -> None:
    """Make sure that a node has a database and its columns, as far as it tells.

    A node tells its labels and columns only while it is online and willing to share them.

    Args:
        label: Label of the database.
        organization: Owner of the node.
        node: The node.
        columns: Columns needed.
        problems: Gets a sentence for each problem.
    """
    if node is None:
        return
    if node.database_labels and label not in node.database_labels:
        known = ", ".join(node.database_labels)
        problems.append(f"databases: node {node.name!r} of {organization.name!r} has no {label!r}. Known: {known}.")
    shared = node.columns(label)
    if shared and (missing := [column for column in columns if column not in shared]):
        problems.append(
            f"columns: {label!r} of {organization.name!r} has no {', '.join(map(repr, missing))}. "
            f"Known: {', '.join(shared)}."
        )


def check_key(client: Vantage6Client, organization: Organization | None = None) -> PrivateKey:
    """Make sure that the private key is the one of the account's organization.

    Args:
        client: The account.
        organization: The account's organization as the server describes it; read when None.

    Returns:
        The private key.

    Raises:
        KeyMismatch: There is none, it is another one, or the server knows no public key of the organization.
    """
    if client.private_key is None:
        raise KeyMismatch("The collaboration is encrypted: give the organization's private key in the credentials.")
    own = organization or client.get(Organization, client.organization_id)
    if not own.public_key:
        raise KeyMismatch(
            f"Organization {own.name!r} has no public key on the server. Its node uploads one at its first start; "
            "an administrator can do so before."
        )
    if not client.private_key.matches(own.public_key):
        raise KeyMismatch(
            f"The private key given ({client.private_key.public_key.fingerprint}) is not the one of organization "
            f"{own.name!r}. Take the key that its node uses; nothing was sent or uploaded."
        )
    return client.private_key


def check_keys(
    client: Vantage6Client,
    collaboration: Collaboration,
    organizations: Sequence[Organization],
    problems: list[str],
) -> None:
    """Make sure that answers of an encrypted collaboration can be read and its members be written to.

    Args:
        client: The account.
        collaboration: With its members.
        organizations: Those that will get something.
        problems: Gets a sentence for each problem.

    Raises:
        LedgerError: The record of known public keys is damaged.
    """
    own = next((one for one in collaboration.organizations if one.id == client.organization_id), None)
    try:
        check_key(client, own)
    except (KeyMismatch, InvalidKey) as error:
        problems.append(str(error))
    readable = []
    for organization in organizations:
        try:
            PublicKey.from_text(organization.public_key)
        except InvalidKey as error:
            problems.append(
                f"Organization {organization.name!r} cannot be written to: {error} Its node uploads a key at its start."
            )
        else:
            readable.append(organization)
    problems += client.known_keys.problems(readable)


def check_encryption(
    client: Vantage6Client,
    collaboration: Collaboration,
    organizations: Sequence[Organization],
    problems: list[str],
) -> None:
    """Make sure that arguments are encrypted for their readers, where that is required or the collaboration says so.

    Only the server tells whether a collaboration is encrypted, and it would profit from saying no.

    Args:
        client: The account.
        collaboration: With its members.
        organizations: Those that will get something.
        problems: Gets a sentence for each problem.
    """
    if collaboration.encrypted:
        check_keys(client, collaboration, organizations, problems)
    elif client.requires_encryption:
        problems.append(
            f"encryption: the server says that collaboration {collaboration.name!r} is not encrypted, so arguments "
            "would leave in the clear, and the credentials require encryption, which they do by default with a private "
            'key. If it is meant to be so, set encryption="as the collaboration says" in the credentials, or leave the '
            "private key out."
        )


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
        central: Whether the function coordinates others; None when the algorithm store has not told.
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
    central: bool | None
    warnings: tuple[str, ...]


def task_name(request: TaskRequest, token: str) -> str:
    """Name a task so that it can be found again.

    Args:
        request: What is asked for.
        token: The same on every retry of this intent, different for every new one.
    """
    return f"{request.name or request.method}-{token}"


def collaboration_of(client: Vantage6Client, request: TaskRequest, token: str) -> Collaboration:
    """Find the collaboration of a task. Safe to repeat.

    Args:
        client: The account.
        request: What is asked for.
        token: Token of the intent.

    Returns:
        The collaboration with its members.

    Raises:
        PreflightFailed: There is none; what else is wrong with the request is listed too.
    """
    try:
        return client.collaboration(request.collaboration)
    except NotFoundError as error:
        raise PreflightFailed(f"Task {request.method!r}", [*_problems_of(request, token), str(error)]) from error


def plan_task(
    client: Vantage6Client,
    request: TaskRequest,
    token: str,
    collaboration: Collaboration,
    *,
    offline_nodes: OfflineNodes = "warn",
) -> Plan:
    """Check everything that can be checked before a task is sent. Only reads; safe to repeat.

    Args:
        client: The account.
        request: What is asked for.
        token: Token of the intent.
        collaboration: Where it is to be executed, with its members.
        offline_nodes: ``fail`` counts an offline node as a problem, otherwise it is a warning.

    Returns:
        The plan.

    Raises:
        PreflightFailed: With all problems at once.
        KeyMismatch: The collaboration is encrypted and the private key is missing or not the organization's.
        PlatformError: The server cannot be asked.
    """
    problems = _problems_of(request, token)
    warnings: list[str] = []
    study_id, members = _study_and_members(client, request, collaboration, problems)
    organizations = choose_organizations(request.organizations, members, problems)
    central = _is_central(client, request, organizations, problems)
    nodes = nodes_of(client, collaboration.id)
    check_nodes(client, organizations, nodes, offline_nodes, problems, warnings)
    if client.organization_id not in {member.id for member in collaboration.organizations}:
        problems.append(f"Your organization is not a member of collaboration {collaboration.name!r}.")
    waiting: set[int] = set()
    databases = _databases_on_the_wire(client, request, organizations, nodes, problems, waiting)
    check_encryption(client, collaboration, organizations, problems)
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
        central=central,
        warnings=tuple(warnings),
    )


def _is_central(
    client: Vantage6Client, request: TaskRequest, organizations: Sequence[Organization], problems: list[str]
) -> bool | None:
    """Tell whether the function coordinates others, and make sure that such a one runs once; None when unknown."""
    kind = Kind(request.central)
    if request.central is None and (request.store is None or client.version.major == 3):
        kind = Kind(central=False)
    elif request.central is None and request.store is not None:
        try:
            kind = kind_of(client, request.store, request.image, request.method)
        except NotFoundError as error:
            problems.append(f"store: {error}")
    if kind.central and len(organizations) != 1:
        asked = ", ".join(repr(one.name) for one in organizations) or "none"
        problems.append(
            "central: a central function makes the tasks of the others itself, so it runs at one organization; asked "
            f"are {asked}. Give organizations=[...] with one of them, which may be your own."
        )
    elif kind.central is None and kind.unknown_because and len(organizations) > 1:
        problems.append(
            f"central: whether {request.method!r} coordinates others, and may run at one organization only, is not "
            f"known: {kind.unknown_because}. Say central=True or central=False."
        )
    return kind.central


def _study_and_members(
    client: Vantage6Client, request: TaskRequest, collaboration: Collaboration, problems: list[str]
) -> tuple[int | None, Sequence[Organization]]:
    """Tell the study, if any, and whom the task may ask."""
    if request.study is not None:
        try:
            study = client.study(request.study, collaboration.id)
        except (NotFoundError, ConfigurationError) as error:
            problems.append(str(error))
        else:
            return study.id, study.organizations
    return None, collaboration.organizations


def _problems_of(request: TaskRequest, token: str) -> list[str]:
    problems = []
    name = request.name or request.method
    if name.strip().isdecimal():
        problems.append(f"name is {name!r}; vantage6 refuses names of digits only.")
    if len(full := task_name(request, token)) > MAX_NAME:
        problems.append(f"name has {len(name)} characters, {MAX_NAME - len(full) + len(name)} are allowed.")
    if len(request.description) > _MAX_DESCRIPTION:
        problems.append(f"description has {len(request.description)} characters, {_MAX_DESCRIPTION} are allowed.")
    if not request.image.strip():
        problems.append("image is empty.")
    if not request.method.strip():
        problems.append("method is empty.")
    problems += problems_of_arguments(request.arguments)
    return problems + problems_of_files(request.arguments_file, request.arguments)


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
    frames = client.records(Dataframe, session_id=request.session)
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
            check_frame(client, frame, organizations, problems, waiting, request.columns)
            entries.append({"type": "dataframe", "dataframe_id": frame.id})
        groups.append(entries)
    return groups


def check_frame(
    client: Vantage6Client,
    frame: Dataframe,
    organizations: Sequence[Organization],
    problems: list[str],
    waiting: set[int],
    columns: Sequence[str] = (),
) -> None:
    """Tell whether organizations have a dataframe.

    What the server says of itself is not enough: there are some where a dataframe counts as ready whose last step has
    failed (vantage6 #2170), or stays unready after a step that went well (#2233). So the runs of the step are read when
    it has failed or is not ready.

    Args:
        client: The account.
        frame: The dataframe.
        organizations: Those that need it.
        problems: Gets a sentence for each problem.
        waiting: Gets the id of a dataframe that is being made.
        columns: Those that are needed.
    """
    step, ready = frame.last_session_task, set(frame.organizations_ready)
    missing = [one for one in organizations if one.id not in ready]
    if missing and step is not None and not step.status.is_terminal:
        waiting.add(frame.id)
    elif step is None:
        problems += [f"databases: {frame.name!r} is not there for {_named(missing)}."] if missing else ()
    elif missing or step.status.is_failure:
        done = {run.organization_id for run in client.runs(step.id) if run.status.is_success}
        lacking = [one for one in organizations if one.id not in done]
        if lacking:
            problems.append(
                f"databases: {frame.name!r} is not there for {_named(lacking)}. Task {step.id}, which makes it, is "
                f"{step.status.value}. Mend what its log names and make the dataframe again, or leave them out."
            )
        if done.intersection(one.id for one in missing):
            problems.append(f"databases: {stuck(frame, step)}")
    known = {column.name for column in frame.columns}
    if known and (unknown := [column for column in columns if column not in known]):
        problems.append(
            f"columns: dataframe {frame.name!r} has no {', '.join(map(repr, unknown))}. "
            f"Known: {', '.join(sorted(known))}."
        )


def stuck(frame: Dataframe, step: Task) -> str:
    """Say that a dataframe is of no use although its last step went well, and what to do.

    Args:
        frame: The dataframe.
        step: Its last step.
    """
    return (
        f"the server does not count dataframe {frame.name!r} as ready although task {step.id}, its last step, went "
        "well, so it refuses computations on it and further steps. This is a known fault of some servers (vantage6 "
        f"#2233), which neither waiting nor a retry ends: delete_dataframe(credentials, {frame.id}), and make it anew "
        "with the steps inside its extraction, or on a newer server."
    )


def _named(organizations: Sequence[Organization]) -> str:
    return ", ".join(one.name for one in organizations)


def wait_until_ready(
    client: Vantage6Client, plan: Plan, settings: PollSettings | None, *, wait_for_nodes: bool
) -> None:
    """Wait for what a planned task needs: dataframes that are being made, and nodes where that is wished.

    Args:
        client: The account.
        plan: The task. Its warnings are logged.
        settings: Interval, deadline and error budget; patient ones when None.
        wait_for_nodes: Whether to wait for offline nodes too.

    Raises:
        DeadlineExceeded: A node did not come back, or a dataframe was not made in time; nothing was sent.
        PreflightFailed: A dataframe cannot be made.
    """
    for warning in plan.warnings:
        logger.warning("%s", warning)
    if wait_for_nodes:
        _wait_for_nodes(client, plan, settings or _WAITING)
    if plan.dataframes_awaited:
        _wait_for_dataframes(client, plan, settings or _WAITING)


def _wait_for_nodes(client: Vantage6Client, plan: Plan, settings: PollSettings) -> None:
    wanted = {organization.id: organization.name for organization in plan.organizations}

    def offline() -> list[str]:
        nodes = nodes_of(client, plan.collaboration.id)
        return [name for number, name in wanted.items() if number in nodes and not nodes[number].is_online]

    for names in poll(
        offline,
        settings,
        done=lambda names: not names,
        what=f"Nodes of {', '.join(wanted.values())}",
        take_up_again="The task was not created.",
    ):
        if names:
            logger.info("Waiting for the nodes of %s", ", ".join(names))


def _wait_for_dataframes(client: Vantage6Client, plan: Plan, settings: PollSettings) -> None:
    session = plan.request.session

    def unready() -> set[int]:
        problems: list[str] = []
        waiting: set[int] = set()
        for frame in client.records(Dataframe, session_id=session):
            if frame.id in plan.dataframes_awaited:
                check_frame(client, frame, plan.organizations, problems, waiting, plan.request.columns)
        if problems:
            raise PreflightFailed(f"Task {plan.request.method!r}", problems)
        return waiting

    for waiting in poll(
        unready,
        settings,
        done=lambda waiting: not waiting,
        what=f"Dataframes of session {session}",
        take_up_again="No task was created.",
    ):
        logger.debug("Waiting for %d dataframes of session %s", len(waiting), session)
