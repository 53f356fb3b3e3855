"""What users may write, and what goes over the wire: databases, filters, second factors."""

from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6 import (
    RESOURCES,
    Dataframe,
    Organization,
    Record,
    Resource,
    Task,
    TaskRequest,
    Version,
    resource_named,
    resource_of,
)
from prefect_biomed.clients.vantage6.authentication import SecondFactor, Tokens, claims_of

V3 = Version(text="3.11.1", major=3, minor=11)
V4 = Version(text="4.15.2", major=4, minor=15)
V5 = Version(text="5.0.3", major=5, minor=0)


def databases(given: Any) -> list[list[dict[str, Any]]]:
    request = TaskRequest(collaboration=1, image="i", method="m", databases=given)
    return [[database.model_dump(exclude_none=True) for database in group] for group in request.databases]


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        (None, []),
        ("default", [[{"label": "default"}]]),
        ({"label": "default", "query": "SELECT 1"}, [[{"label": "default", "query": "SELECT 1"}]]),
        (["one", {"label": "two"}], [[{"label": "one"}], [{"label": "two"}]]),
        (7, [[{"dataframe": 7}]]),
        ({"type": "dataframe", "dataframe_id": 7}, [[{"dataframe": 7}]]),
        ({"dataframe": "mine"}, [[{"dataframe": "mine"}]]),
        (
            [[{"type": "dataframe", "dataframe_id": 1}, 2], 3],
            [[{"dataframe": 1}, {"dataframe": 2}], [{"dataframe": 3}]],
        ),
        (Dataframe(id=9, name="nine"), [[{"dataframe": 9}]]),
    ],
)
def test_databases_have_one_form(given: Any, groups: list[Any]) -> None:
    assert databases(given) == groups


@pytest.mark.parametrize("given", ["", 1.5, True, {}, {"query": "q"}, [["a", 1.5]], [None], {"label": "a", "typo": 1}])
def test_databases_in_another_form_are_refused_with_the_field_named(given: Any) -> None:
    with pytest.raises(ValidationError, match="databases"):
        databases(given)


def test_every_resource_is_in_the_table() -> None:
    assert {resource.name for resource in RESOURCES} == {
        "user",
        "organization",
        "collaboration",
        "study",
        "node",
        "role",
        "rule",
        "task",
        "run",
        "result",
        "algorithmstore",
        "session",
        "dataframe",
    }
    for resource in RESOURCES:
        assert resource_named(resource.name) is resource_of(resource.model) is resource


def test_a_word_that_is_no_resource_lists_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"no resource 'organisation'.*organization"):
        resource_named("organisation")


@pytest.mark.parametrize("version", [V3, V4, V5], ids=str)
def test_filters_that_servers_fail_on_are_never_sent(version: Version) -> None:
    tasks = resource_of(Task)
    for name in ("status", "run_id", "port"):
        with pytest.raises(ConfigurationError, match=f"cannot filter by '{name}'"):
            tasks.query(version, {name: "completed"})


def test_filters_are_in_the_words_of_the_generation() -> None:
    tasks = resource_of(Task)
    assert tasks.query(V3, {"job_id": 1, "init_org_id": 2, "parent_id": None}) == {"run_id": 1, "initiator_id": 2}
    assert tasks.query(V4, {"job_id": 1, "init_org_id": 2, "is_user_created": True}) == {
        "job_id": 1,
        "init_org_id": 2,
        "is_user_created": 1,
    }
    with pytest.raises(ConfigurationError, match="session_id"):
        tasks.query(V4, {"session_id": 1})
    assert tasks.query(V5, {"session_id": 1}) == {"session_id": 1}


OFFICIAL_FILTERS = {
    "organization": {"collaboration": "collaboration_id", "study": "study_id", "country": "country"},
    "collaboration": {"organization": "organization_id", "algorithm_store": "algorithm_store_id"},
    "study": {"organization": "organization_id", "collaboration": "collaboration_id"},
    "node": {"organization": "organization_id", "collaboration": "collaboration_id", "study": "study_id"},
    "user": {
        "organization": "organization_id",
        "role": "role_id",
        "rule": "rule_id",
        "last_seen_from": "last_seen_from",
    },
    "role": {"organization": "organization_id", "rule": "rule_id", "user": "user_id", "include_root": "include_root"},
    "rule": {"role": "role_id", "operation": "operation"},
    "task": {
        "initiating_org": "init_org_id",
        "initiating_user": "init_user_id",
        "collaboration": "collaboration_id",
        "study": "study_id",
        "store": "store_id",
        "parent": "parent_id",
        "job": "job_id",
        "session": "session_id",
        "dataframe": "dataframe_id",
        "user_created": "is_user_created",
    },
    "run": {"task": "task_id", "organization": "organization_id", "node": "node_id", "state": "state"},
    "session": {"user": "user_id", "collaboration": "collaboration_id", "scope": "scope"},
    "dataframe": {"session": "session_id"},
    "algorithmstore": {"collaboration": "collaboration_id", "url": "url"},
}


def test_filters_may_be_named_as_in_the_official_client() -> None:
    for name, filters in OFFICIAL_FILTERS.items():
        assert resource_named(name).filters_named(dict.fromkeys(filters, 7)) == dict.fromkeys(filters.values(), 7), name
    node = resource_named("node")
    assert node.filters_named({"is_online": True, "name": None}) == {"status": "online"}
    assert node.filters_named({"is_online": False}) == {"status": "offline"}
    with pytest.raises(ConfigurationError, match="'collaboration_id' is given twice"):
        node.filters_named({"collaboration": 1, "collaboration_id": 2})


@pytest.mark.parametrize(
    ("name", "verb", "version", "text"),
    [
        ("session", "list", V4, "5.0 and later"),
        ("study", "list", V3, "4.3 and later"),
        ("study", "list", Version(text="4.2.0", major=4, minor=2), "4.3 and later"),
        ("organization", "delete", V3, "not delete"),
        ("rule", "create", V4, "list, get, not create"),
    ],
)
def test_what_a_server_does_not_offer_is_refused(name: str, verb: str, version: Version, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        resource_named(name).check_verb(verb, version)


def test_what_is_no_resource_is_refused() -> None:
    class Unknown(Record):
        resource = "unknown"

    with pytest.raises(ConfigurationError, match="Unknown"):
        resource_of(Unknown)
    assert isinstance(resource_of(Organization), Resource)


@pytest.mark.parametrize("secret", ["GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ", "gezd gnbv gy3t qojq gezd gnbv gy3t qojq"])
def test_codes_are_those_of_the_standard(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The vectors of RFC 6238, appendix B, cut to six digits.
    for moment, code in [(59, "287082"), (1111111109, "081804"), (20000000000, "353130")]:
        monkeypatch.setattr("time.time", lambda moment=moment: float(moment))
        assert SecondFactor(SecretStr(secret)).now() == code


def test_a_code_is_a_text_of_six_digits() -> None:
    assert SecondFactor(code=123456).now() == "123456"
    assert SecondFactor(code=1234).now() == "001234"
    assert SecondFactor().now() is None
    assert SecondFactor(code="1").needs_a_person and not SecondFactor().needs_a_person


def test_a_secret_that_is_no_base32_is_refused_without_quoting_it() -> None:
    with pytest.raises(ConfigurationError, match="base32") as refused:
        SecondFactor(SecretStr("canary!"))
    assert "canary" not in str(refused.value)


def test_tokens_hide_themselves() -> None:
    tokens = Tokens(access="canary", refresh="canary", life_seconds=10)
    assert "canary" not in repr(tokens)
    assert not tokens.is_due
    assert Tokens(access="a", life_seconds=0).is_due


def test_claims_of_what_is_no_token() -> None:
    from prefect_biomed.clients.errors import UnexpectedResponse

    for text in ("", "abc", "a.b.c", "a.bm90IGpzb24.c"):
        with pytest.raises(UnexpectedResponse):
            claims_of(text)
