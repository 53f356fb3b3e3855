"""What tasks and dataframes share: checks before anything is sent, payloads, and sending once."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from prefect_biomed.clients.errors import (
    BiomedError,
    ConnectionFailed,
    LaunchInDoubt,
    NetworkError,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import sleep
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.encryption import PublicKey
from prefect_biomed.clients.vantage6.errors import InvalidKey, KeyMismatch, ServerFault
from prefect_biomed.clients.vantage6.models import Collaboration, Node, Organization, Record
from prefect_biomed.clients.vantage6.payloads import encode_call

__all__ = [
    "OfflineNodes",
    "check_keys",
    "check_label",
    "check_nodes",
    "choose_organizations",
    "encode_arguments",
    "problems_of_arguments",
    "send_once",
]

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

OfflineNodes = Literal["warn", "wait", "fail"]
"""What to do when a node is offline: create the task anyway, wait for the node first, or refuse."""


def problems_of_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Find arguments that are not JSON.

    Args:
        arguments: Keyword arguments of an algorithm's function.

    Returns:
        One sentence for each problem.
    """
    problems = []
    for name, value in arguments.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            problems.append(f"arguments[{name!r}] is not JSON: {error}.")
    return problems


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
    for organization in organizations:
        node = nodes.get(organization.id)
        if node is None and sees_all:
            having = ", ".join(sorted(one.name for one in nodes.values()))
            problems.append(f"Organization {organization.name!r} has no node in the collaboration. Nodes: {having}.")
        elif node is None:
            warnings.append(f"This account cannot see the node of {organization.name!r}, nor whether it is online.")
        elif not node.is_online:
            text = f"Node {node.name!r} of organization {organization.name!r} is offline"
            if offline_nodes == "fail":
                problems.append(f"{text}.")
            else:
                warnings.append(f"{text}; its run starts when it comes back.")


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
    """
    own = next((one for one in collaboration.organizations if one.id == client.organization_id), None)
    try:
        client.check_key(own)
    except (KeyMismatch, InvalidKey) as error:
        problems.append(str(error))
    for organization in organizations:
        try:
            PublicKey.from_text(organization.public_key)
        except InvalidKey as error:
            problems.append(
                f"Organization {organization.name!r} cannot be written to: {error} Its node uploads a key at its start."
            )


def encode_arguments(
    client: Vantage6Client,
    collaboration: Collaboration,
    organizations: Sequence[Organization],
    method: str,
    arguments: Mapping[str, Any],
    *,
    central: bool = False,
) -> list[dict[str, Any]]:
    """Write the payload of each organization, each encrypted for its reader only.

    With a blob store the payload is uploaded, once for each organization, and its name is sent.

    Args:
        client: The account.
        collaboration: Whether to encrypt.
        organizations: The readers.
        method: Function to call.
        arguments: Its keyword arguments.
        central: Whether the function coordinates others.

    Returns:
        The value of ``organizations`` in a request.

    Raises:
        ConfigurationError: An argument is not JSON.
        PlatformError: The blob store refused a payload.
    """
    call = encode_call(client.version.major, method, arguments, central=central)
    field = "arguments" if client.version.major == 5 else "input"
    blobs = client.has_blob_store
    payloads = []
    for organization in organizations:
        key = PublicKey.from_text(organization.public_key) if collaboration.encrypted else None
        if blobs:
            payload = client.upload_blob(key.encrypt_blob(call) if key else base64.b64encode(call))
        else:
            payload = key.encrypt(call) if key else base64.b64encode(call).decode()
        payloads.append({"id": organization.id, field: payload})
    return payloads


def send_once(
    send: Callable[[], R],
    find: Callable[[], R | None],
    *,
    what: str,
    doubt_seconds: float,
) -> R:
    """Send something that must not exist twice, and settle a doubt by looking. Nothing is sent a second time here.

    Args:
        send: Sends it.
        find: Looks for it.
        what: What it is, for messages.
        doubt_seconds: How long to look when the answer was lost.

    Returns:
        What was made or found.

    Raises:
        LaunchInDoubt: The answer was lost and looking did not find it.
        PlatformError: It was refused.
    """
    try:
        return send()
    except ConnectionFailed:
        raise
    except (NetworkError, ServerUnavailable, UnexpectedResponse, ServerFault) as doubt:
        logger.warning("The answer about %s is lost, looking for it: %s", what, doubt)
        return _look_for(find, doubt, what, doubt_seconds)


def _look_for(find: Callable[[], R | None], doubt: BiomedError, what: str, seconds: float) -> R:
    deadline = time.monotonic() + seconds
    pause, looked = 0.5, False
    while True:
        try:
            found = find()
            looked = True
        except BiomedError as error:
            if not is_transient(error):
                raise
            logger.warning("Look for %s failed: %s", what, error)
        else:
            if found is not None:
                logger.info("Found %s with id %d", what, found.id)
                return found
        # An internal error is an answer: what it refused does not appear later.
        if looked and isinstance(doubt, ServerFault):
            raise doubt
        if time.monotonic() >= deadline:
            raise LaunchInDoubt(
                f"It is not known whether {what} was made ({doubt}). It did not appear within {seconds:.0f} s. "
                "Run this again: it looks for the name before it sends."
            ) from doubt
        sleep(min(pause, max(0.05, deadline - time.monotonic())))
        pause = min(2 * pause, 10.0)
