"""Sessions and dataframes of generation 5: who has them, what made them, and waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.errors import NameConflict
from prefect_biomed.clients.vantage6.models import Action, Collaboration, Dataframe, Organization, Session, Task
from prefect_biomed.clients.vantage6.monitoring import DEFAULT_POLLING, outcome_of, task_failed, watch
from prefect_biomed.clients.vantage6.preflight import check_keys, choose_organizations

__all__ = [
    "check_dataframe",
    "only_generation_5",
    "readers_of",
    "same_image",
    "steps_of",
    "wait_for_dataframe",
]

_STEPS = frozenset({Action.DATA_EXTRACTION, Action.PREPROCESSING})


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


def only_generation_5(client: Vantage6Client) -> None:
    """Refuse servers without sessions.

    Args:
        client: The account.

    Raises:
        ConfigurationError: The server is of an older generation.
    """
    if client.version.major != 5:
        raise ConfigurationError(f"Sessions and dataframes need generation 5; {client.url} is {client.version.text}.")


def readers_of(
    client: Vantage6Client, session_id: int, wanted: Sequence[str | int] | None, problems: list[str]
) -> tuple[Collaboration, tuple[Organization, ...]]:
    """Find the organizations of a session that will get something, and make sure that they can be written to.

    Args:
        client: The account.
        session_id: The session.
        wanted: Exact names or ids; all of the session's collaboration or study when None.
        problems: Gets a sentence for each problem.

    Returns:
        The collaboration, and the organizations in the order asked for.
    """
    session = client.get(Session, session_id)
    collaboration = client.collaboration(session.collaboration_id or 0)
    members: Sequence[Organization] = collaboration.organizations
    if session.study_id is not None:
        members = client.study(session.study_id, collaboration.id).organizations
    chosen = choose_organizations(wanted, members, problems)
    if collaboration.encrypted:
        check_keys(client, collaboration, chosen, problems)
    return collaboration, chosen


def steps_of(client: Vantage6Client, dataframe_id: int) -> list[Task]:
    """List the tasks that made a dataframe, in their order: the extraction first.

    Args:
        client: The account.
        dataframe_id: The dataframe.
    """
    tasks = client.records(Task, dataframe_id=dataframe_id)
    return sorted((task for task in tasks if task.action in _STEPS), key=lambda task: task.id)


def check_dataframe(
    client: Vantage6Client,
    frame: Dataframe,
    label: str,
    image: str,
    method: str,
    organizations: Sequence[Organization],
) -> None:
    """Make sure that a dataframe is what was asked for; its arguments cannot be read again.

    Args:
        client: The account.
        frame: The dataframe.
        label: Label of the database it should come from.
        image: Docker image of the extraction.
        method: Its function.
        organizations: Those that should have it.

    Raises:
        NameConflict: It is another one.
    """
    differences = []
    if frame.db_label != label:
        differences.append(f"database {frame.db_label!r}, not {label!r}")
    if steps := steps_of(client, frame.id):
        extraction = steps[0]
        if not same_image(extraction.image, image):
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


def same_image(one: str, other: str) -> bool:
    """Compare images by name; a store adds their digest to it.

    Args:
        one: A Docker image.
        other: Another.
    """
    return one.partition("@")[0] == other.partition("@")[0]
