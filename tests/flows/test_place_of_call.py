"""Equal calls in one flow are intents of their own; the same call made again by a retry is the same one."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import pytest
from prefect import flow, tags, task

from prefect_biomed.tasks.policies import ONCE, PlaceOfCall, circumstances, intent_token, key_tag, token_of_call

pytestmark = pytest.mark.usefixtures("prefect_api")

made: list[str] = []


@task(**ONCE | {"cache_policy": ONCE["cache_policy"] + PlaceOfCall(), "retries": 0})
def create(credentials: str, what: str) -> str:
    token = token_of_call(what)
    made.append(token)
    return token


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    made.clear()


def test_equal_calls_are_two_and_a_retry_makes_no_third() -> None:
    attempts = Counter[str]()
    seen: list[list[str]] = []

    @flow(retries=1, retry_delay_seconds=0)
    def rounds() -> None:
        attempts["rounds"] += 1
        seen.append([create("me", "same") for _ in range(2)])
        if attempts["rounds"] == 1:
            raise RuntimeError("after both")

    rounds()
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 2
    assert sorted(made) == sorted(seen[0]), "the retry took both from the cache"


def test_another_call_between_does_not_change_who_is_who() -> None:
    attempts = Counter[str]()
    seen: list[str] = []

    @flow(retries=1, retry_delay_seconds=0)
    def branches() -> None:
        attempts["branches"] += 1
        if attempts["branches"] == 2:
            create("me", "only the second time")
        seen.append(create("me", "same"))
        if attempts["branches"] == 1:
            raise RuntimeError("again")

    branches()
    assert seen[0] == seen[1]
    assert len(made) == 2


@pytest.mark.slow
def test_equal_calls_two_levels_deep_survive_a_retry_of_the_root() -> None:
    attempts = Counter[str]()
    seen: list[list[str]] = []

    @flow
    def inner() -> list[str]:
        return [create("me", "same"), create("me", "same")]

    @flow
    def middle() -> list[str]:
        tokens = [*inner(), *inner()]
        attempts["middle"] += 1
        seen.append(tokens)
        if attempts["middle"] == 1:
            raise RuntimeError("lost")
        return tokens

    @flow(retries=1, retry_delay_seconds=0)
    def root() -> list[str]:
        return middle()

    assert len(set(root())) == 4
    assert seen[0] == seen[1]
    assert len(made) == 4


@task(**ONCE | {"retries": 0})
def effect(credentials: str, what: str) -> str:
    made.append(what)
    return what


def test_retry_of_the_root_takes_what_was_finished_from_the_cache() -> None:
    attempts = Counter[str]()

    @flow
    def child() -> str:
        result = effect(f"key {attempts['root']}", "launched")
        if attempts["root"] == 1:
            raise RuntimeError("lost after the launch")
        return result

    @flow(retries=1, retry_delay_seconds=0)
    def root() -> str:
        attempts["root"] += 1
        return child()

    assert root() == "launched"
    assert made == ["launched"], "also in a child run that Prefect made anew, and with other credentials"


def test_submitted_calls_are_counted_too() -> None:
    @flow
    def together() -> list[str]:
        return [future.result() for future in [create.submit("me", "same") for _ in range(3)]]

    assert len(set(together())) == 3


def test_retry_of_a_task_keeps_its_number() -> None:
    tries: list[str] = []

    @task(retries=1, retry_delay_seconds=0, cache_policy=PlaceOfCall(), persist_result=True)
    def flaky(what: str) -> str:
        tries.append(token_of_call(what))
        if len(tries) == 1:
            raise RuntimeError("once")
        return tries[-1]

    @flow
    def work() -> tuple[str, str]:
        return flaky("same"), flaky("same")

    first, second = work()
    assert first != second
    assert tries == [first, first, second]


def test_outside_a_flow_every_call_is_new() -> None:
    assert create("me", "same") != create("me", "same")


@pytest.mark.slow
def test_flow_runs_of_one_key_are_one_intent_and_know_of_each_other() -> None:
    told: list[datetime | None] = []

    @task
    def tell() -> None:
        told.append(circumstances("test", "job").attempted_since)

    @flow
    def child() -> str:
        return intent_token("kind")

    @flow
    def work() -> tuple[str, str]:
        tell()
        return intent_token("kind"), child()

    def keyed(key: str) -> tuple[str, str]:
        with tags(key_tag(key)):
            return work()

    first, again, other = keyed("sample-1"), keyed("sample-1"), keyed("sample-2")
    assert first == again
    assert not set(first) & set(other)
    assert told[0] is None
    assert told[1] is not None
    assert told[2] is None
