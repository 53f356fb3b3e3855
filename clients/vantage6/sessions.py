"""Sessions and dataframes of generation 5: made once, reused by name when they are what was asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from prefect_biomed.clients.errors import ConfigurationError, NotFoundError, PreflightFailed
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6.checks import (
    check_keys,
    check_label,
    check_nodes,
    choose_organizations,
    encode_arguments,
    problems_of_arguments,
    send_once,
)
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.errors import NameConflict, RequestRefused
from prefect_biomed.clients.vantage6.models import (
    Collaboration,
    Dataframe,
    Organization,
    Record,
    Session,
    SessionScope,
    Task,
)
from prefect_biomed.clients.vantage6.watch import DEFAULT_POLLING, outcome_of, task_failed, watch

__all__ = ["add_preprocessing", "make_dataframe", "make_session", "wait_for_dataframe"]

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

_DATAFRAME_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DOUBT_SECONDS = 60.0
_STEPS = frozenset({"data_extraction", "preprocessing"})


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
    _only_5(client)
    if not name.strip() or name.isdecimal() or len(name) > 128:
        raise ConfigurationError(f"name is {name!r}; a session needs 1 to 128 characters that are not all digits.")
    owner = client.collaboration(collaboration)
    study_id = client.study(study, owner.id).id if study is not None else None

    def find() -> Session | None:
        found = client.list(Session, name=name, collaboration_id=owner.id)
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
    _only_5(client)
    problems = problems_of_arguments(arguments or {})
    if not _DATAFRAME_NAME.fullmatch(name):
        problems.append(f"name is {name!r}; letters, digits, hyphens and underscores are allowed.")
    collaboration, chosen = _readers(client, session_id, organizations, problems)
    nodes = nodes_of(client, collaboration.id)
    warnings: list[str] = []
    check_nodes(client, chosen, nodes, "warn", problems, warnings)
    for organization in chosen:
        check_label(label, organization, nodes.get(organization.id), (), problems)
    if problems:
        raise PreflightFailed(f"Dataframe {name!r}", problems)
    for warning in warnings:
        logger.warning("%s", warning)

    def find() -> Dataframe | None:
        return next((frame for frame in client.list(Dataframe, session_id=session_id) if frame.name == name), None)

    found = find()
    if found is not None:
        logger.info("Dataframe %s is there already with id %d", name, found.id)
        _compare(client, found, label, image, method, chosen)
        return found
    task = _session_task(client, collaboration, chosen, image, method, arguments or {}, store)
    return _made(
        lambda: client.create(Dataframe, session_id=session_id, label=label, name=name, task=task),
        find,
        f"dataframe {name!r}",
    )


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
    _only_5(client)
    frame = client.get(Dataframe, dataframe_id)
    if frame.session_id is None:
        raise NotFoundError(f"Dataframe {frame.name!r} tells no session.", url=client.url)
    problems = problems_of_arguments(arguments or {})
    collaboration, chosen = _readers(client, frame.session_id, organizations, problems)
    if problems:
        raise PreflightFailed(f"Step {step} of dataframe {frame.name!r}", problems)

    def find() -> Task | None:
        steps = _steps(client, dataframe_id)[1:]
        return steps[step - 1] if len(steps) >= step else None

    found = find()
    if found is None:
        done = len(_steps(client, dataframe_id)) - 1
        if step != done + 1:
            raise ConfigurationError(
                f"step is {step}, but dataframe {frame.name!r} has had {done} steps; the next is {done + 1}."
            )
        task = _session_task(client, collaboration, chosen, image, method, arguments or {}, store)

        def send() -> Task:
            changed = client.preprocess(dataframe_id, task)
            if changed.last_session_task is None:
                raise NotFoundError(f"The server tells no task for step {step} of {frame.name!r}.", url=client.url)
            return changed.last_session_task

        return send_once(send, find, what=f"step {step} of {frame.name!r}", doubt_seconds=_DOUBT_SECONDS)
    if (_image(found.image), found.method) != (_image(image), method):
        raise NameConflict(
            f"Step {step} of dataframe {frame.name!r} is {found.method!r} of {found.image}, not {method!r} of {image}. "
            "Make another dataframe for other steps."
        )
    return found


def wait_for_dataframe(
    client: Vantage6Client, dataframe_id: int, settings: PollSettings = DEFAULT_POLLING
) -> Dataframe:
    """Wait until the last step of a dataframe has ended. Safe to repeat.

    Args:
        client: The account.
        dataframe_id: The dataframe.
        settings: Interval, deadline and error budget.

    Returns:
        The dataframe, ready, with its columns.

    Raises:
        TaskFailed: The step failed; the message says where and why.
        DeadlineExceeded: It has not ended; it goes on.
    """
    frame = client.get(Dataframe, dataframe_id)
    if frame.last_session_task is not None:
        for look in watch(client, [frame.last_session_task.id], settings):
            if look.finished:
                outcome = outcome_of(client, look.states[0])
                if not outcome.is_success:
                    raise task_failed(outcome)
        frame = client.get(Dataframe, dataframe_id)
    return frame


def _only_5(client: Vantage6Client) -> None:
    if client.version.major != 5:
        raise ConfigurationError(f"Sessions and dataframes need generation 5; {client.url} is {client.version.text}.")


def _readers(
    client: Vantage6Client, session_id: int, wanted: Sequence[str | int] | None, problems: list[str]
) -> tuple[Collaboration, tuple[Organization, ...]]:
    """Find the organizations of a session that will get something, and make sure that they can be written to."""
    session = client.get(Session, session_id)
    collaboration = client.collaboration(session.collaboration_id or 0)
    members: Sequence[Organization] = collaboration.organizations
    if session.study_id is not None:
        members = client.study(session.study_id, collaboration.id).organizations
    chosen = choose_organizations(wanted, members, problems)
    if collaboration.encrypted:
        check_keys(client, collaboration, chosen, problems)
    return collaboration, chosen


def _session_task(
    client: Vantage6Client,
    collaboration: Collaboration,
    organizations: Sequence[Organization],
    image: str,
    method: str,
    arguments: Mapping[str, Any],
    store: int | None,
) -> dict[str, Any]:
    payloads = encode_arguments(client, collaboration, organizations, method, arguments)
    task: dict[str, Any] = {"image": image, "method": method, "organizations": payloads}
    return task | {"store_id": store} if store is not None else task


def _steps(client: Vantage6Client, dataframe_id: int) -> list[Task]:
    """The tasks that made a dataframe, in their order: the extraction first."""
    tasks = client.list(Task, dataframe_id=dataframe_id)
    return sorted((task for task in tasks if task.action in _STEPS), key=lambda task: task.id)


def _compare(
    client: Vantage6Client,
    frame: Dataframe,
    label: str,
    image: str,
    method: str,
    organizations: Sequence[Organization],
) -> None:
    differences = []
    if frame.db_label != label:
        differences.append(f"database {frame.db_label!r}, not {label!r}")
    if steps := _steps(client, frame.id):
        extraction = steps[0]
        if _image(extraction.image) != _image(image):
            differences.append(f"image {extraction.image!r}, not {image!r}")
        if extraction.method != method:
            differences.append(f"method {extraction.method!r}, not {method!r}")
        having = {run.organization_id for run in client.runs(extraction.id)}
        if lacking := [one.name for one in organizations if one.id not in having]:
            differences.append(f"nothing of {', '.join(lacking)}")
    if differences:
        raise NameConflict(
            f"Dataframe {frame.name!r} (id {frame.id}) exists with {'; '.join(differences)}. Choose another name, or "
            "delete it."
        )


def _image(image: str) -> str:
    """A store adds the digest of an image to its name."""
    return image.partition("@")[0]


def _made(send: Callable[[], R], find: Callable[[], R | None], what: str) -> R:
    """Send something whose name is unique; when the name is taken meanwhile, take what has it."""
    try:
        return send_once(send, find, what=what, doubt_seconds=_DOUBT_SECONDS)
    except RequestRefused as error:
        if "already exists" not in str(error):
            raise
        found = find()
        if found is None:
            raise NameConflict(
                f"The name of {what} is taken by one that this account does not see. Choose another name."
            ) from error
        return found
