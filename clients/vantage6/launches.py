"""Creating tasks, sessions and dataframes exactly once, with everything checked before anything is sent."""

from __future__ import annotations

import base64
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    ConnectionFailed,
    LaunchInDoubt,
    NetworkError,
    NotFoundError,
    PreflightFailed,
    ServerUnavailable,
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings, sleep
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.encryption import PublicKey
from prefect_biomed.clients.vantage6.errors import NameConflict, RequestRefused, ServerFault
from prefect_biomed.clients.vantage6.models import (
    Collaboration,
    Dataframe,
    Organization,
    Record,
    Session,
    SessionScope,
    Task,
    TaskRequest,
)
from prefect_biomed.clients.vantage6.payloads import encode_call
from prefect_biomed.clients.vantage6.preflight import (
    MAX_NAME,
    OfflineNodes,
    Plan,
    check_label,
    check_nodes,
    collaboration_of,
    plan_task,
    problems_of_arguments,
    task_name,
    wait_until_ready,
)
from prefect_biomed.clients.vantage6.sessions import (
    check_dataframe,
    only_generation_5,
    readers_of,
    same_image,
    steps_of,
)

__all__ = ["add_preprocessing", "launch", "make_dataframe", "make_session"]

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

_DATAFRAME_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DOUBT_SECONDS = 60.0


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
    collaboration = collaboration_of(client, request, token)
    name = task_name(request, token)
    found = client.find_task(name, collaboration.id) if len(name) <= MAX_NAME else None
    if found is not None:
        logger.info("Task %s is there already with id %d", name, found.id)
        return found
    plan = plan_task(client, request, token, collaboration, offline_nodes=offline_nodes)
    wait_until_ready(client, plan, waiting, wait_for_nodes=offline_nodes == "wait")
    body = _body(client, plan)
    return _send_once(
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
        "organizations": _encoded_arguments(
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


def make_session(
    client: Vantage6Client,
    collaboration: str | int,
    name: str,
    *,
    scope: SessionScope = SessionScope.OWN,
    study: str | int | None = None,
) -> Session:
    """Make a session, or take the one of this name (``POST session``). Safe to repeat: the name is what counts.

    Args:
        client: The account.
        collaboration: Exact name or id.
        name: Unique in the collaboration.
        scope: Who may use it.
        study: Exact name or id of a study.

    Returns:
        The session.

    Raises:
        NameConflict: A session of this name has another scope or study, or is hidden from this account.
        PermissionDeniedError: The role does not allow this scope.
        ConfigurationError: The server is of an older generation, or the name is one that it refuses.
    """
    only_generation_5(client)
    if not name.strip() or name.isdecimal() or len(name) > 128:
        raise ConfigurationError(f"name is {name!r}; a session needs 1 to 128 characters that are not all digits.")
    owner = client.collaboration(collaboration)
    study_id = client.study(study, owner.id).id if study is not None else None

    def find() -> Session | None:
        found = client.records(Session, name=name, collaboration_id=owner.id)
        return next((session for session in found if session.name == name), None)

    existing = find()
    if existing is None:
        body = {"name": name, "collaboration_id": owner.id, "study_id": study_id, "scope": scope.value}
        existing = _made(lambda: client.create(Session, **body), find, f"session {name!r}")
    else:
        logger.info("Session %s is there already with id %d", name, existing.id)
    if (existing.scope, existing.study_id) != (scope, study_id):
        raise NameConflict(
            f"Session {name!r} (id {existing.id}) exists with scope {existing.scope.value!r} and study "
            f"{existing.study_id}, not {scope.value!r} and {study_id}. Choose another name, or these settings."
        )
    return existing


def make_dataframe(
    client: Vantage6Client,
    session_id: int,
    name: str,
    *,
    label: str,
    image: str,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
) -> Dataframe:
    """Extract a dataframe at the nodes, or take the one of this name (``POST session/{id}/dataframe``).

    Safe to repeat: names are unique on the whole server. The dataframe is not ready yet; wait for it. Of a dataframe
    that exists, label, image, method and organizations are compared; its arguments cannot be read again.

    Args:
        client: The account.
        session_id: The session.
        name: Letters, digits, hyphens and underscores; unique on the whole server.
        label: Label of the database in the nodes' configuration.
        image: Docker image of the extraction.
        method: Its function.
        arguments: Keyword arguments of the function.
        organizations: Exact names or ids; all of the collaboration when None.
        store: Id of the algorithm store that vouches for the image.

    Returns:
        The dataframe, new or found.

    Raises:
        PreflightFailed: The request cannot work; nothing was sent. All problems are listed.
        NameConflict: A dataframe of this name is another one.
        PlatformError: The server refused it.
    """
    only_generation_5(client)
    problems = problems_of_arguments(arguments or {})
    if not _DATAFRAME_NAME.fullmatch(name):
        problems.append(f"name is {name!r}; letters, digits, hyphens and underscores are allowed.")
    collaboration, chosen = readers_of(client, session_id, organizations, problems)
    _check_extraction(client, name, label, collaboration, chosen, problems)

    def find() -> Dataframe | None:
        return next((frame for frame in client.records(Dataframe, session_id=session_id) if frame.name == name), None)

    found = find()
    if found is not None:
        logger.info("Dataframe %s is there already with id %d", name, found.id)
        check_dataframe(client, found, label, image, method, chosen)
        return found
    task = _session_task(client, collaboration, chosen, image, method, arguments or {}, store)
    return _made(
        lambda: client.create(Dataframe, session_id=session_id, label=label, name=name, task=task),
        find,
        f"dataframe {name!r}",
    )


def _check_extraction(
    client: Vantage6Client,
    name: str,
    label: str,
    collaboration: Collaboration,
    organizations: Sequence[Organization],
    problems: list[str],
) -> None:
    """Make sure that the nodes can extract a dataframe, and raise all problems."""
    nodes = nodes_of(client, collaboration.id)
    warnings: list[str] = []
    check_nodes(client, organizations, nodes, "warn", problems, warnings)
    for organization in organizations:
        check_label(label, organization, nodes.get(organization.id), (), problems)
    if problems:
        raise PreflightFailed(f"Dataframe {name!r}", problems)
    for warning in warnings:
        logger.warning("%s", warning)


def add_preprocessing(
    client: Vantage6Client,
    dataframe_id: int,
    step: int,
    *,
    image: str,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
) -> Task:
    """Change a dataframe at the nodes (``POST session/dataframe/{id}/preprocess``), once for each step number.

    Safe to repeat: the server gives these tasks no name of ours, so the number of the step is what counts. Of a step
    that is there, image and method are compared.

    Args:
        client: The account.
        dataframe_id: The dataframe.
        step: Number of the step in the life of the dataframe, from 1.
        image: Docker image of the step.
        method: Its function.
        arguments: Keyword arguments of the function.
        organizations: Exact names or ids; all of the collaboration when None.
        store: Id of the algorithm store that vouches for the image.

    Returns:
        The task of the step. It runs after earlier steps and after computations that use the dataframe.

    Raises:
        NameConflict: The step of this number is another one.
        PreflightFailed: The request cannot work; nothing was sent.
        PlatformError: The server refused it.
    """
    only_generation_5(client)
    frame = client.get(Dataframe, dataframe_id)
    if frame.session_id is None:
        raise NotFoundError(f"Dataframe {frame.name!r} tells no session.", url=client.url)
    problems = problems_of_arguments(arguments or {})
    collaboration, chosen = readers_of(client, frame.session_id, organizations, problems)
    if problems:
        raise PreflightFailed(f"Step {step} of dataframe {frame.name!r}", problems)

    found = _step(client, dataframe_id, step)
    if found is None:
        task = _session_task(client, collaboration, chosen, image, method, arguments or {}, store)
        return _send_step(client, frame, step, task)
    if not same_image(found.image, image) or found.method != method:
        raise NameConflict(
            f"Step {step} of dataframe {frame.name!r} is {found.method!r} of {found.image}, not {method!r} of {image}. "
            "Make another dataframe for other steps."
        )
    return found


def _step(client: Vantage6Client, dataframe_id: int, step: int) -> Task | None:
    steps = steps_of(client, dataframe_id)[1:]
    return steps[step - 1] if len(steps) >= step else None


def _send_step(client: Vantage6Client, frame: Dataframe, step: int, task: Mapping[str, Any]) -> Task:
    done = len(steps_of(client, frame.id)) - 1
    if step != done + 1:
        raise ConfigurationError(
            f"step is {step}, but dataframe {frame.name!r} has had {done} steps; the next is {done + 1}."
        )

    def send() -> Task:
        changed = client.preprocess(frame.id, task)
        if changed.last_session_task is None:
            raise NotFoundError(f"The server tells no task for step {step} of {frame.name!r}.", url=client.url)
        return changed.last_session_task

    return _send_once(
        send,
        lambda: _step(client, frame.id, step),
        what=f"step {step} of {frame.name!r}",
        doubt_seconds=_DOUBT_SECONDS,
    )


def _session_task(
    client: Vantage6Client,
    collaboration: Collaboration,
    organizations: Sequence[Organization],
    image: str,
    method: str,
    arguments: Mapping[str, Any],
    store: int | None,
) -> dict[str, Any]:
    payloads = _encoded_arguments(client, collaboration, organizations, method, arguments)
    task: dict[str, Any] = {"image": image, "method": method, "organizations": payloads}
    return task | {"store_id": store} if store is not None else task


def _encoded_arguments(
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


def _send_once(
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


def _made(send: Callable[[], R], find: Callable[[], R | None], what: str) -> R:
    """Send something whose name is unique; when the name is taken meanwhile, take what has it."""
    try:
        return _send_once(send, find, what=what, doubt_seconds=_DOUBT_SECONDS)
    except RequestRefused as error:
        if "already exists" not in str(error):
            raise
        found = find()
        if found is None:
            raise NameConflict(
                f"The name of {what} is taken by one that this account does not see. Choose another name."
            ) from error
        return found
