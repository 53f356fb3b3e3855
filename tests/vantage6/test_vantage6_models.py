"""Records of vantage6, read from recorded answers of real servers."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from prefect_biomed.clients.vantage6.models import (
    Collaboration,
    Dataframe,
    EncodedResult,
    Node,
    NodeStatus,
    Organization,
    Result,
    Run,
    RunFailure,
    Session,
    SessionScope,
    Status,
    Study,
    Task,
    User,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "vantage6"


def recorded(name: str) -> dict[str, Any]:
    exchanges = map(json.loads, (VECTORS / f"wire_{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return {exchange["title"]: exchange["body"] for exchange in exchanges}


V4 = recorded("v4_15_2")
V5 = recorded("v5_0_3")


def test_task_of_generation_4() -> None:
    task = Task.model_validate(V4["task get include results,runs"])
    assert (task.id, task.name, task.status) == (1, "probe", Status.COMPLETED)
    assert (task.job_id, task.collaboration_id, task.init_org_id, task.init_user_id, task.parent_id) == (
        1,
        1,
        2,
        2,
        None,
    )
    assert task.created_at is not None and task.created_at.tzinfo is UTC
    (run,) = task.runs
    assert (run.organization_id, run.node_id, run.node_name, run.task_id) == (2, 8, "north-plain", 1)
    assert run.log == "info > wrapper for harness (builtin)\n"


def test_task_without_included_runs() -> None:
    task = Task.model_validate(V4["task get"])
    assert task.runs == ()
    assert task.databases == ({"label": "default", "parameters": "{}"},)


def test_task_of_generation_5() -> None:
    task = Task.model_validate(V5["task create"])
    assert task.status is Status.AWAITING
    assert (task.method, task.action, task.session_id) == ("partial_average", "federated_compute", 1)


def test_task_of_generation_3() -> None:
    link = {"id": 7, "link": "/api/x/7", "methods": ["GET"]}
    task = Task.model_validate(
        {
            "id": 5,
            "name": "t",
            "image": "i",
            "database": "default",
            "run_id": 9,
            "initiator": 2,
            "init_user": 3,
            "complete": False,
            "collaboration": link,
            "parent": link,
            "children": None,
            "results": [link],
        }
    )
    assert (task.job_id, task.init_org_id, task.init_user_id, task.collaboration_id, task.parent_id) == (9, 2, 3, 7, 7)
    assert task.databases == ({"label": "default"},)


def test_runs_and_results() -> None:
    assert Run.model_validate(V4["run list include task"]["data"][0]).task_id == 1
    result = EncodedResult.model_validate(V4["result one"])
    assert (result.run_id, result.task_id, result.result) == (1, 1, "eyJhcmdzIjogW10sICJrd2FyZ3MiOiB7ImEiOiAxfX0=")
    assert "eyJ" not in repr(result)
    assert EncodedResult.model_validate(V5["extraction results"]["data"][0]).action == "data_extraction"


def test_collaborations_and_organizations() -> None:
    plain = Collaboration.model_validate(V4["collaboration list"]["data"][0])
    assert (plain.name, plain.encrypted, plain.organizations) == ("harness-plain", False, ())
    members = Collaboration.model_validate(V4["collaboration list include organizations"]["data"][0]).organizations
    assert len(members) == 3
    assert all(isinstance(member, Organization) and member.public_key for member in members)
    assert members[0].public_key not in repr(members)
    assert Study.model_validate(V4["study one"]).collaboration_id == 1


@pytest.mark.parametrize("answer", [V4["node list"]["data"][0], V5["nodes"]["data"][0]])
def test_nodes_tell_their_configuration(answer: dict[str, Any]) -> None:
    node = Node.model_validate(answer)
    assert node.status is NodeStatus.ONLINE and node.is_online
    assert node.collaboration_id == 1 and node.organization_id == 2
    assert "default" in node.database_labels
    assert node.config["db_type_default"] == ("csv",)
    assert node.columns("unknown") == ()


def test_a_node_never_seen_has_no_status() -> None:
    node = Node.model_validate({"id": 1, "name": "n", "status": None, "config": []})
    assert node.status is None and not node.is_online


def test_sessions_and_dataframes() -> None:
    session = Session.model_validate(V5["session get"])
    assert (session.name, session.scope, session.ready, session.collaboration_id) == (
        "s1",
        SessionScope.ORGANIZATION,
        True,
        1,
    )
    frame = Dataframe.model_validate(V5["dataframe get"])
    assert frame.session_id == 1 and frame.last_session_task is not None
    assert frame.last_session_task.status.is_success
    assert {column.name for column in frame.columns} >= {"age", "weight"}


def test_secrets_are_hidden() -> None:
    user = User.model_validate({"id": 1, "username": "u", "otp_secret": "canary", "client_secret": "canary"})
    node = Node.model_validate({"id": 1, "name": "n", "api_key": "canary"})
    for record in (user, node):
        assert "canary" not in repr(record) + str(record) + record.model_dump_json() + str(record.model_dump())
    assert node.api_key is not None and node.api_key.get_secret_value() == "canary"


@pytest.mark.parametrize("status", list(Status))
def test_every_status_knows_whether_it_is_the_end(status: Status) -> None:
    going_on = {"awaiting", "pending", "initializing", "active"}
    assert status.is_terminal == (status.value not in going_on)
    assert status.is_success == (status.value == "completed")
    assert status.is_failure == (status.is_terminal and not status.is_success)


def test_an_unknown_status_is_kept_logged_and_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    run = Run.model_validate({"id": 1, "status": "hibernating"})
    assert run.status == "hibernating"
    assert not run.status.is_terminal and not run.is_finished
    assert "hibernating" in caplog.text
    assert Run.model_validate_json(run.model_dump_json()) == run
    ended = Run.model_validate({"id": 1, "status": "hibernating", "finished_at": "2026-11-21T05:48:52"})
    assert ended.is_finished


def test_records_survive_json() -> None:
    records = [
        Task.model_validate(V4["task get include results,runs"]),
        Task.model_validate(V5["task create"]),
        Dataframe.model_validate(V5["dataframe get"]),
        Node.model_validate(V4["node list"]["data"][0]),
        Collaboration.model_validate(V4["collaboration list include organizations"]["data"][0]),
        Result(run_id=1, task_id=1, organization_id=2, organization="north", value={"a": [1, 2.5, None]}, size_bytes=3),
        RunFailure(task_id=1, run_id=2, organization="north", node="n", status=Status.CRASHED, log="x"),
    ]
    for record in records:
        assert TypeAdapter(type(record)).validate_json(record.model_dump_json()) == record


def test_times_without_zone_are_utc() -> None:
    assert Run.model_validate(V4["run one"]).finished_at == datetime(2026, 11, 21, 5, 48, 52, 629243, tzinfo=UTC)


def test_a_failure_reads_well() -> None:
    failure = RunFailure(
        task_id=4, run_id=2, organization="north", node="n", status=Status.CRASHED, log="a\nb", in_subtask=True
    )
    assert str(failure) == "north (node n): crashed in subtask 4\n      a\n      b"
    assert "not run" in str(failure.model_copy(update={"not_run": True}))
