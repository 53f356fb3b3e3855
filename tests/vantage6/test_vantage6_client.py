"""Verbs of the vantage6 client on every kind of object, accounts, and answers that are none of the platform's."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from prefect.serializers import JSONSerializer
from pydantic import SecretStr

from harness.federation import CLINICAL, FAST, HOSPITALS, Federation, federation, token, wait
from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailed,
    LaunchInDoubt,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.vantage6 import (
    AlgorithmStore,
    CancelNotPermitted,
    Collaboration,
    Dataframe,
    DecryptionFailed,
    ForeignResult,
    Node,
    Organization,
    PrivateKey,
    Record,
    RequestRefused,
    Result,
    ResultEmpty,
    ResultNotReadable,
    ResultUnavailable,
    Role,
    Rule,
    Run,
    ServerFault,
    Session,
    Status,
    Study,
    Task,
    User,
    Vantage6Client,
    change_password,
    fetch_results,
    launch,
    load_result,
    make_dataframe,
    make_session,
    recover_mfa,
    recover_password,
    reset_mfa,
    reset_password,
    wait_for_dataframe,
)
from prefect_biomed.sandbox import Fault

every_generation = pytest.mark.parametrize("generation", [3, 4, 5])
PASSWORD = SecretStr("Another-1!")


def fields_of(kind: type[Record], here: Federation, client: Vantage6Client) -> tuple[dict[str, Any], dict[str, Any]]:
    """What makes an object of a kind, and what changes it."""
    name = f"new-{kind.resource}-{token()}"
    north = here.organization("north")
    person = {"firstname": "F", "lastname": "L", "email": f"{name}@example.org"} if here.generation < 5 else {}
    role = next(role.id for role in client.records(Role) if role.name == "Viewer")
    made: dict[type[Record], tuple[dict[str, Any], dict[str, Any]]] = {
        Organization: ({"name": name, "country": "FR"}, {"country": "NL"}),
        User: (
            {
                "username": name,
                "password": PASSWORD.get_secret_value(),
                "organization_id": north,
                "roles": [role],
                "rules": [],
            }
            | person,
            {"roles": [role]} if here.generation == 5 else {"firstname": "G"},
        ),
        Collaboration: (
            {"name": name, "organization_ids": [north], "encrypted": 0 if here.generation == 3 else False},
            {"name": f"{name}-changed"},
        ),
        Study: ({"name": name, "collaboration_id": 1, "organization_ids": [north]}, {"name": f"{name}-changed"}),
        Role: ({"name": name, "description": "d", "rules": [1], "organization_id": north}, {"description": "e"}),
        Session: ({"name": name, "collaboration_id": 1, "study_id": None, "scope": "own"}, {"name": f"{name}-changed"}),
    }
    return made[kind]


@pytest.mark.parametrize(
    "kind", [Organization, User, Collaboration, Study, Role, Session], ids=lambda kind: kind.resource
)
@every_generation
def test_objects_are_made_read_changed_and_deleted(
    federations: Callable[[int], Federation], generation: int, kind: type[Any]
) -> None:
    here = federations(generation)
    account = "north-researcher" if kind is Session else "root"
    with here.client(account, key=None) as client:
        if (kind, generation) in {(Study, 3), (Session, 3), (Session, 4)}:
            with pytest.raises(ConfigurationError, match="and later have"):
                client.records(kind)
            return
        fields, changes = fields_of(kind, here, client) if kind is not Session else _session_fields()
        made = client.create(kind, **fields)
        assert client.get(kind, made.id).id == made.id
        assert made.id in {one.id for one in client.records(kind)}
        changed = client.update(kind, made.id, **changes)
        for name, value in changes.items():
            assert getattr(changed, name, value) == value
        if (kind, generation) == (Organization, 3):
            with pytest.raises(ConfigurationError, match="not delete"):
                client.delete(kind, made.id)
            return
        client.delete(kind, made.id)
        with pytest.raises(NotFoundError):
            client.get(kind, made.id)
        with pytest.raises(NotFoundError):
            client.delete(kind, made.id)


def _session_fields() -> tuple[dict[str, Any], dict[str, Any]]:
    name = f"s-{token()}"
    return {"name": name, "collaboration_id": 1, "scope": "own"}, {"name": f"{name}-changed"}


@every_generation
def test_nodes_are_registered_and_get_new_keys(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client("root", key=None) as root:
        north = here.organization("north")
        flag = 0 if generation == 3 else False
        owner = root.create(Collaboration, name=f"c-{token()}", organization_ids=[north], encrypted=flag)
        node = root.create(Node, name=f"n-{token()}", organization_id=north, collaboration_id=owner.id)
        assert node.api_key is not None and "**" in repr(node)
        new = root.recover_node_key(node.id)
        assert new.get_secret_value() != node.api_key.get_secret_value()
        assert root.get(Node, node.id).api_key is None
        root.delete(Node, node.id)
        root.delete(Collaboration, owner.id)


@pytest.mark.parametrize("generation", [4, 5])
def test_creating_a_task_takes_as_many_requests_as_documented(
    federations: Callable[[int], Federation], generation: int
) -> None:
    here = federations(generation)
    with here.client() as client:
        data = here.data(client, "encrypted") if generation == 5 else {}
        assert client.me.organization_id
    with here.client() as client:
        assert client.me.organization_id
        here.sandbox.journal.clear()
        launch(client, here.request("echo", collaboration="encrypted", **data), token())
        paths = [call.partition("?")[0].partition("/")[2].partition("/")[2] for call in here.calls()]
        here.sandbox.journal.clear()
        launch(client, here.request("echo", collaboration="encrypted", **data), token())
        assert len(here.calls()) == len(paths) - 1
    dataframes = [f"session/{data['session']}/dataframe"] if generation == 5 else []
    assert paths == ["collaboration", "task", "node", *dataframes, "blobstream/status", "task"]


@every_generation
def test_members_are_put_in_and_taken_out(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client("root", key=None) as root:
        north, south = here.organization("north"), here.organization("south")
        flag = 0 if generation == 3 else False
        owner = root.create(Collaboration, name=f"c-{token()}", organization_ids=[north], encrypted=flag)
        root.add_member(Collaboration, owner.id, Organization, south)
        assert {one.name for one in root.collaboration(owner.id).organizations} == {"north", "south"}
        root.remove_member(Collaboration, owner.id, Organization, south)
        assert {one.name for one in root.collaboration(owner.id).organizations} == {"north"}
        role = root.create(Role, name=f"r-{token()}", description="d", rules=[1], organization_id=north)
        root.add_member(Role, role.id, Rule, 2)
        assert {rule.id for rule in root.records(Rule, role_id=role.id)} == {1, 2}
        root.remove_member(Role, role.id, Rule, 1)
        assert {rule.id for rule in root.records(Rule, role_id=role.id)} == {2}
        with pytest.raises(NotFoundError):
            root.remove_member(Role, role.id, Rule, 1)
        with pytest.raises(ConfigurationError, match="no user can be put in"):
            root.add_member(Role, role.id, User, 1)
        root.delete(Role, role.id)
        root.delete(Collaboration, owner.id)


def test_studies_and_stores(here: Federation) -> None:
    with here.client("root", key=None) as root:
        (study,) = root.records(Study, collaboration_id=1, include=["organizations"])
        assert {one.name for one in study.organizations} == {"north", "south"}
        root.add_member(Study, study.id, Organization, here.organization("west"))
        assert len(root.study(study.name, 1).organizations) == 3
        root.remove_member(Study, study.id, Organization, here.organization("west"))
        store = root.create(
            AlgorithmStore,
            name="store",
            algorithm_store_url=here.facts["store_url"],
            server_url=here.facts["url"],
            collaboration_id=1,
            force=True,
        )
        assert [one.id for one in root.records(AlgorithmStore)] == [store.id]
    with here.client() as client:
        task = launch(client, here.request("echo", "north", study=study.name, store=store.id), token())
        assert (task.study_id, task.algorithm_store_id) == (study.id, store.id)
        assert task.image.startswith(f"{CLINICAL}@sha256:")
        wait(client, task)
    with here.client("root", key=None) as root:
        root.delete(AlgorithmStore, store.id)


@every_generation
def test_an_object_unknown_says_so(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        for kind in (Organization, Collaboration, Task, Run):
            with pytest.raises(NotFoundError):
                client.get(kind, 9999)
        if generation == 3:
            assert client.records(Run, task_id=9999) == []
            return
        with pytest.raises(RequestRefused) as refused:
            client.records(Run, task_id=9999)
        assert refused.value.status == 400


def test_columns_are_told(here: Federation, federations: Callable[[int], Federation]) -> None:
    with here.client() as client:
        _until(lambda: bool(client.records(Node, name="north-plain")[0].config))
        told = client.columns(label="default", collaboration_id=1)
        assert {"age", "bmi", "progression"} <= {column.name for column in told}
        assert here.calls("POST", "column") == []
        with pytest.raises(ConfigurationError, match="by label and collaboration_id on generation 4"):
            client.columns(dataframe_id=1)
        here.sandbox.faults.add(Fault(path="/api/node$", status=200, body='{"data": [], "links": {}}'))
        asked = client.columns(label="default", collaboration_id=1, organization_ids=[here.organization("north")])
        assert {column.name for column in asked} >= {"age", "bmi"}
        assert len(here.calls("POST", "column")) == 1
    five = federations(5)
    with five.client() as client:
        data = five.data(client, "plain")
        (frame,) = [
            one for one in client.records(Dataframe, session_id=data["session"]) if one.name == data["databases"]
        ]
        assert {"age", "bmi"} <= {column.name for column in client.columns(dataframe_id=frame.id)}


def test_a_dataframe_is_deleted(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    with here.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        frame = make_dataframe(client, session.id, f"f-{token()}", label="default", image=CLINICAL, method="read_csv")
        assert wait_for_dataframe(client, frame.id, FAST).ready
        client.delete(Dataframe, frame.id)
        assert client.records(Dataframe, session_id=session.id) == []
        with pytest.raises(ConfigurationError, match="give session_id"):
            client.records(Dataframe)


# -- accounts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [3, 4])
def test_a_password_is_changed_and_recovered(generation: int) -> None:
    with federation(generation) as here:
        old = SecretStr(here.facts["users"]["north-researcher"]["password"])
        with here.client() as client:
            with pytest.raises(RequestRefused):
                change_password(client, old, SecretStr("short"))
            with pytest.raises(AuthenticationError):
                change_password(client, SecretStr("Wrong-1!"), PASSWORD)
            change_password(client, old, PASSWORD)
        with here.client(password=PASSWORD) as client:
            assert client.me.username == "north-researcher"
            assert recover_password(client, username="north-researcher") == recover_password(client, username="nobody")
            mailed = SecretStr(here.sandbox.mails[-1][1])
            reset_password(client, mailed, SecretStr("Third-one-3!"))
        with here.client(password=SecretStr("Third-one-3!")) as client:
            assert client.me.username == "north-researcher"


def test_a_second_factor_is_recovered() -> None:
    with federation(4, {"two_factor": True}) as here:
        password = SecretStr(here.facts["users"]["north-researcher"]["password"])
        with here.client() as client:
            assert recover_mfa(client, "north-researcher", password)
            uri = reset_mfa(client, SecretStr(here.sandbox.mails[-1][1]))
            assert uri.get_secret_value().startswith("otpauth://") and "otpauth" not in repr(uri)
        secret = SecretStr(uri.get_secret_value().split("secret=")[1].split("&")[0])
        with here.client(totp_secret=secret) as client:
            assert client.me.username == "north-researcher"


def test_what_keycloak_keeps_is_not_asked_of_the_server(federations: Callable[[int], Federation]) -> None:
    with federations(5).client() as client:
        for ask in (
            lambda: change_password(client, PASSWORD, PASSWORD),
            lambda: recover_password(client, username="u"),
            lambda: reset_password(client, PASSWORD, PASSWORD),
            lambda: recover_mfa(client, "u", PASSWORD),
            lambda: reset_mfa(client, PASSWORD),
        ):
            with pytest.raises(ConfigurationError, match="Keycloak"):
                ask()


def test_a_person_logs_in_with_a_device_code() -> None:
    with federation(5, {"device_interval": 1}) as here:
        shown: list[tuple[str, str]] = []

        def prompt(page: str, code: str) -> None:
            shown.append((page, code))
            form = {"user_code": code, "username": "north-researcher", "password": "Sandbox-1!"}
            threading.Thread(target=lambda: requests.post(page.split("?")[0], data=form, timeout=10)).start()

        fields = {"service_account": None, "client_secret": None, "username": None, "password": None}
        credentials = here.credentials(**fields)
        with pytest.raises(ConfigurationError, match="interactively"):
            credentials.get_client()
        with credentials.get_client(device_prompt=prompt) as client:
            assert client.me.username == "north-researcher"
            assert client.organization_id == here.organization("north")
        assert len(shown) == 1 and shown[0][1] in shown[0][0]


def test_a_password_works_on_generation_5_where_the_realm_allows_it() -> None:
    with federation(5, {"access_seconds": 1.0}) as here:
        with here.client("north-researcher", username="north-researcher", password=SecretStr("Sandbox-1!"),
                         service_account=None, client_secret=None) as client:  # fmt: skip
            assert client.me.username == "north-researcher"
            time.sleep(1.5)
            assert client.records(Organization)
        here.sandbox.switches.direct_access = False
        with (
            here.client(
                username="south-researcher",
                password=SecretStr("Sandbox-1!"),
                service_account=None,
                client_secret=None,
            ) as client,
            pytest.raises(AuthenticationError, match="service account, or device code"),
        ):
            _ = client.me


def test_a_wrong_secret_of_a_service_account_is_tried_once(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    for _ in range(2):
        with here.client(client_secret=SecretStr("wrong")) as client, pytest.raises(AuthenticationError):
            _ = client.me
    assert len(here.sandbox.journal.entries("POST", "token$")) == 1


def test_settings_that_do_not_fit_the_generation_are_said(federations: Callable[[int], Federation]) -> None:
    with pytest.raises(ConfigurationError, match="needs username and password"):
        federations(4).client(username=None, password=None)
    with pytest.raises(ConfigurationError, match="give auth_url"):
        federations(5).client(auth_url=None)


def test_server_that_breaks_down_is_not_taken_for_a_wrong_url(here: Federation) -> None:
    here.sandbox.faults.add(Fault(path="/version$", status=500, body="<h1>Internal Server Error</h1>"))
    with pytest.raises(UnexpectedResponse, match="500"):
        here.client()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (Fault(path="/version$", status=404, body="<h1>Nobody home</h1>"), "HTTP 404"),
        (Fault(path="/version$", status=200, body='{"page": 1}'), "another shape"),
    ],
)
def test_what_was_seen_in_place_of_a_server_is_told(here: Federation, fault: Fault, seen: str) -> None:
    here.sandbox.faults.add(fault)
    with pytest.raises(ConfigurationError, match=f"(?s)No vantage6 server answers at .*{seen}"):
        here.client()


@every_generation
def test_the_server_is_well(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        assert client.health()["database"] is True
    assert here.calls("POST") == []


def test_killing_everything_on_a_node(federations: Callable[[int], Federation]) -> None:
    with federations(4).client("north-admin") as admin, pytest.raises(ServerFault):
        admin.kill_node_tasks(admin.records(Node)[0].id)
    here = federations(5)
    with here.client() as client, here.client("north-admin") as admin:
        task = here.launch(client, "sleep", "north", arguments={"seconds": 30})
        node = next(node for node in client.records(Node) if node.name == "north-plain")
        with pytest.raises(CancelNotPermitted):
            client.kill_node_tasks(node.id)
        _until(lambda: client.runs(task.id)[0].status is Status.ACTIVE)
        admin.kill_node_tasks(node.id)
        assert len(here.calls("POST", "kill/node/tasks")) == 1
        admin.kill_task(task.id)


# -- results ------------------------------------------------------------------------------------------------------


@every_generation
@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_a_large_result_goes_to_a_file(
    federations: Callable[[int], Federation], generation: int, collaboration: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("prefect_biomed.clients.vantage6.client._MEMORY_BYTES", 256 * 1024)
    here = federations(generation)
    with here.client() as client:
        task = here.launch(client, "payload", collaboration=collaboration, arguments={"size": 1_000_000})
        wait(client, task)
        results = fetch_results(client, task.id, output_dir=tmp_path / "out", spill_bytes=100_000)
        small = fetch_results(client, task.id, output_dir=tmp_path / "none", spill_bytes=10_000_000)
    assert [one.organization for one in results] == list(HOSPITALS)
    for one, other in zip(results, small, strict=True):
        assert one.value is None and one.path is not None and one.path.parent == tmp_path / "out"
        assert json.loads(one.path.read_text()) == other.value
        assert one.size_bytes == one.path.stat().st_size == other.size_bytes
    assert not (tmp_path / "none").exists()


OUTPUTS = {
    "bin": bytes(range(128, 256)) * 100,
    "csv": b"age,group\n" + b"30,a\n" * 1000,
    "parquet": b"PAR1" + bytes(range(256)) * 10 + b"PAR1",
    "txt": b"all went well\n" * 100,
}


@every_generation
@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_a_result_that_is_no_json_is_had_as_it_is_whatever_its_size(
    federations: Callable[[int], Federation], generation: int, collaboration: str, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client() as client:
        tasks = {
            kind: here.launch(
                client,
                "raw",
                "north",
                collaboration=collaboration,
                arguments={"content": base64.b64encode(output).decode()},
            )
            for kind, output in OUTPUTS.items()
        }
        for kind, task in tasks.items():
            wait(client, task)
            (small,) = fetch_results(client, task.id, output_dir=tmp_path, spill_bytes=10**6)
            (large,) = fetch_results(client, task.id, output_dir=tmp_path, spill_bytes=10)
            assert (small.format, small.content, small.value, small.path) == (kind, OUTPUTS[kind], None, None)
            assert large.format == kind and large.content is None and large.path is not None
            assert large.path.suffix == f".{kind}" and large.path.read_bytes() == OUTPUTS[kind]
            assert small.size_bytes == large.size_bytes == len(OUTPUTS[kind])
            assert load_result(small) == load_result(large) == OUTPUTS[kind]
            assert Result.model_validate_json(small.model_dump_json()) == small


@pytest.mark.parametrize("spill_bytes", [10, 10**6])
def test_json_that_was_cut_short_is_no_result_whatever_its_size(
    here: Federation, tmp_path: Path, spill_bytes: int
) -> None:
    content = base64.b64encode(b'{"weights": [' + b"0.25, " * 20_000).decode()
    with here.client() as client:
        for collaboration, error in [("plain", ResultNotReadable), ("encrypted", DecryptionFailed)]:
            task = here.launch(client, "raw", "north", collaboration=collaboration, arguments={"content": content})
            wait(client, task)
            with pytest.raises(error):
                fetch_results(client, task.id, output_dir=tmp_path, spill_bytes=spill_bytes)
            (result,) = fetch_results(client, task.id, output_dir=tmp_path, partial=True, spill_bytes=spill_bytes)
            assert result.value is None and result.path is None and result.unavailable
    assert list(tmp_path.iterdir()) == []


def test_unknown_bytes_are_believed_only_with_the_key_of_the_organization(here: Federation, tmp_path: Path) -> None:
    """One wrong key in some hundred passes for the right one; then a message becomes noise."""
    content = base64.b64encode(bytes(range(128, 256))).decode()
    with here.client() as client, here.client("north-admin") as admin:
        task = here.launch(client, "raw", "north", collaboration="encrypted", arguments={"content": content})
        wait(client, task)
        own = client.get(Organization, client.organization_id)
        admin.update(Organization, own.id, public_key=PrivateKey.generate(2048).public_key.text)
        try:
            with pytest.raises(DecryptionFailed, match="no known format"):
                fetch_results(client, task.id, output_dir=tmp_path)
        finally:
            admin.update(Organization, own.id, public_key=own.public_key)


@every_generation
def test_what_is_no_number_survives_fetching_storing_and_loading(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client() as client:
        task = here.launch(client, "undefined", "north", collaboration="encrypted")
        wait(client, task)
        (result,) = fetch_results(client, task.id, output_dir=tmp_path)
    again = Result.model_validate_json(result.model_dump_json())
    by_prefect = JSONSerializer().loads(JSONSerializer().dumps([result]))[0]
    for one in (result, again, by_prefect):
        value: Any = one.value
        assert math.isnan(value["mean"]) and (value["largest"], value["smallest"]) == (math.inf, -math.inf)


def test_a_wrong_key_never_gives_a_result(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        task = here.launch(client, "echo", "north", collaboration="encrypted", arguments={"a": 1})
        wait(client, task)
    wrong = tmp_path / "wrong.pem"
    wrong.write_bytes(PrivateKey.generate(2048).pem)
    for fields, error in [
        ({"private_key_path": wrong}, DecryptionFailed),
        ({"private_key_path": None}, DecryptionFailed),
    ]:
        with here.client(**fields) as client, pytest.raises(error, match="private key"):
            fetch_results(client, task.id, output_dir=tmp_path)
    with here.client("south-researcher", key="south") as south, pytest.raises(ForeignResult, match="created task"):
        fetch_results(south, task.id, output_dir=tmp_path)


def test_results_that_are_not_there_say_why(here: Federation, tmp_path: Path) -> None:
    with here.client() as client, here.client("north-admin") as admin:
        task = here.launch(client, "sleep", "north", arguments={"seconds": 30})
        with pytest.raises(ResultUnavailable, match="Wait for the task first"):
            fetch_results(client, task.id, output_dir=tmp_path)
        admin.kill_task(task.id)
        wait(client, task)
        with pytest.raises(ResultEmpty, match="'killed by user'"):
            fetch_results(client, task.id, output_dir=tmp_path)


# -- answers that are none of the platform's ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 502, "body": "<html>bad gateway</html>"}, ServerUnavailable),
        ({"status": 503, "body": '{"msg": "later"}', "content_type": "application/json"}, ServerUnavailable),
        ({"status": 500, "body": '{"msg": "boom"}', "content_type": "application/json"}, ServerFault),
        ({"status": 404, "body": "<html>nothing</html>"}, UnexpectedResponse),
        ({"status": 200, "body": "<html>a portal</html>"}, UnexpectedResponse),
        ({"status": 200, "body": '{"msg": "no list"}', "content_type": "application/json"}, UnexpectedResponse),
        ({"status": 200, "body": "[1, 2]", "content_type": "application/json"}, UnexpectedResponse),
        ({"status": 302, "headers": {"Location": "http://elsewhere.example/"}}, UnexpectedResponse),
        ({"status": 418, "body": '{"msg": "tea"}', "content_type": "application/json"}, PlatformError),
        ({"drop": "before"}, NetworkError),
        ({"truncate_bytes": 10}, NetworkError),
    ],
    ids=str,
)
def test_strange_answers_have_a_type(here: Federation, fault: dict[str, Any], error: type[Exception]) -> None:
    with here.client() as client:
        _ = client.me
        here.sandbox.faults.add(Fault(path="/api/organization", **fault))
        with pytest.raises(error) as raised:
            client.records(Organization)
        assert type(raised.value) is error


def test_a_short_outage_of_reads_is_survived_and_a_post_is_never_sent_twice(here: Federation) -> None:
    with here.client() as client:
        _ = client.me
        here.sandbox.faults.add(Fault(method="GET", path="/api/organization", status=502, times=2))
        assert client.records(Organization)
        here.sandbox.faults.add(Fault(method="POST", path="/api/task$", drop="before", times=1))
        here.sandbox.journal.clear()
        with pytest.raises(LaunchInDoubt, match="looks before it sends"):
            launch(client, here.request("echo", "north"), token(), settle_seconds=1.0)
        assert len(here.sandbox.journal.entries("POST", "/api/task$")) == 1


def test_an_internal_error_at_the_launch_is_a_refusal_once_nothing_has_appeared(here: Federation) -> None:
    body = '{"msg": "An unexpected error occurred on the server!"}'
    with here.client() as client:
        here.sandbox.faults.add(
            Fault(method="POST", path="/api/task$", status=500, body=body, content_type="application/json")
        )
        with pytest.raises(ServerFault):
            launch(client, here.request("echo", "north"), token(), settle_seconds=5.0)
        here.sandbox.faults.clear()
        here.sandbox.faults.add(
            Fault(
                method="POST",
                path="/api/task$",
                status=500,
                body=body,
                content_type="application/json",
                after_effect=True,
                times=1,
            )
        )
        made = launch(client, here.request("echo", "north"), token(), settle_seconds=5.0)
        assert client.get(Task, made.id).name == made.name


def test_viewers_may_not_create_tasks(here: Federation) -> None:
    with here.client("north-viewer") as viewer, pytest.raises(PermissionDeniedError, match="its role does not allow"):
        here.launch(viewer, "echo", "north")


def test_a_server_that_is_gone(here: Federation) -> None:
    with here.client() as client:
        client._http.base_url = "http://127.0.0.1:9/api"
        with pytest.raises(ConnectionFailed):
            client.records(Organization)


def _until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
