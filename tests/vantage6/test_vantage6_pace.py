"""How often a server is asked: about the end of tasks, and about what it has told already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from pydantic import SecretStr

from harness.federation import HOSPITALS, Federation, token, wait
from prefect_biomed.clients.errors import AuthenticationError
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6 import (
    Organization,
    Status,
    Task,
    Vantage6Client,
    fetch_results,
    forget_connections,
    launch,
    outcome_of,
    polling_for,
    watch,
)

JITTER = 1.1


def looks(settings: PollSettings, seconds: float) -> Iterator[tuple[float, float]]:
    """When looks are made, and how long after the one before at most."""
    waited, interval = 0.0, settings.interval_seconds
    while waited < seconds:
        pause = settings.pause(interval, waited)
        interval = settings.after(interval)
        waited += pause
        yield waited, pause * JITTER


def test_the_end_is_noticed_within_two_seconds_or_two_percent() -> None:
    made = list(looks(polling_for(1), 3 * 3600))
    assert all(late <= max(2.0, 0.02 * (waited - late) * JITTER, 0.0) and late <= 30 for waited, late in made)
    assert sum(waited <= 30 for waited, _ in made) <= 20


def test_a_wait_for_500_tasks_asks_once_a_minute() -> None:
    asked: list[str] = []
    tasks = {number: task(number) for number in range(1, 501)}

    class Server:
        def task(self, number: int) -> Task:
            asked.append("task")
            return tasks[number]

        def pages(self, kind: type[Task], *, page_size: int, **filters: int) -> Iterator[tuple[Task, dict[str, str]]]:
            assert filters == {"collaboration_id": 2, "init_user_id": 3}
            for place, one in enumerate(sorted(tasks.values(), key=lambda one: -one.id)):
                if place % page_size == 0:
                    asked.append("list")
                yield one, {}

    at_500 = polling_for(len(tasks))
    seen = watch(cast(Vantage6Client, Server()), list(tasks), PollSettings(interval_seconds=1e-3))
    within_the_hour = sum(waited <= 3600 for waited, _ in looks(at_500, 3600))
    for _ in range(1 + within_the_hour):
        assert len(next(seen).states) == 500
    assert asked == ["task", "list"] + ["list"] * within_the_hour
    assert len(asked) <= 60


def task(number: int) -> Task:
    return Task(id=number, name="mean", status=Status.ACTIVE, collaboration_id=2, init_user_id=3)


def test_a_process_logs_in_once_for_an_account(here: Federation) -> None:
    def logins() -> int:
        return len(here.sandbox.journal.entries("POST", "token/user"))

    for _ in range(3):
        with here.credentials().get_client() as client:
            assert client.me.username == "north-researcher"
            client.records(Organization)
    assert (logins(), len(here.calls("GET", "/version$")), len(here.calls("GET", r"/user/\d+$"))) == (1, 1, 1)
    with here.credentials(password=SecretStr("another")).get_client() as client, pytest.raises(AuthenticationError):
        client.records(Organization)
    assert logins() == 2
    with here.credentials("north-admin").get_client() as client:
        assert client.me.username == "north-admin"
    forget_connections()
    with here.credentials().get_client() as client:
        client.records(Organization)
    assert logins() == 4


def test_what_was_seen_of_the_end_is_not_asked_again(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        made = launch(client, here.request("echo", arguments={"a": 1}), token())
        ended = outcome_of(client, wait(client, made).states[0])
        here.sandbox.journal.clear()
        results = fetch_results(client, made.id, output_dir=tmp_path, ended=ended)
        assert [call.partition("?")[0] for call in here.calls()] == ["GET /api/result"]
        assert [one.organization for one in results] == list(HOSPITALS)
        # Runs that had not ended are looked at again.
        unfinished = ended.runs[0].model_copy(update={"status": Status.ACTIVE, "finished_at": None})
        early = ended.model_copy(update={"runs": (unfinished, *ended.runs[1:])})
        assert [one.value for one in fetch_results(client, made.id, output_dir=tmp_path, ended=early)] == [
            {"a": 1}
        ] * len(HOSPITALS)
