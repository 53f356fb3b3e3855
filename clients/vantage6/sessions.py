"""Sessions and dataframes of generation 5: who has them, and waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.errors import DataframeStuck
from prefect_biomed.clients.vantage6.models import Collaboration, Dataframe, Organization, Session
from prefect_biomed.clients.vantage6.monitoring import DEFAULT_POLLING, outcome_of, task_failed, watch
from prefect_biomed.clients.vantage6.preflight import check_encryption, choose_organizations, stuck

__all__ = ["only_generation_5", "readers_of", "wait_for_dataframe"]


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
        DataframeStuck: The step went well, and the server refuses to use the dataframe.
        DeadlineExceeded: It has not ended; it goes on.
    """
    frame = client.get(Dataframe, dataframe_id)
    if frame.last_session_task is not None:
        *_, last = watch(client, [frame.last_session_task.id], settings)
        outcome = outcome_of(client, last.states[0])
        if not outcome.is_success:
            raise task_failed(outcome)
        frame = client.get(Dataframe, dataframe_id)
        done = {run.organization_id for run in outcome.runs if run.status.is_success}
        if done.difference(frame.organizations_ready):
            raise DataframeStuck(f"T{stuck(frame, outcome.task)[1:]}")
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
    check_encryption(client, collaboration, chosen, problems)
    return collaboration, chosen
