"""The flows of this package against the real vantage6 servers: 3.11.1, 4.15.2 and 5.0.3, plain and encrypted."""

from __future__ import annotations

import base64
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from prefect import flow
from pydantic import SecretStr

from harness.dataframe_chains import CHANGES, chain, summary
from harness.vantage6_account import Account, until
from harness.vantage6_events import PollingChannel
from harness.vantage6_servers import ENVIRONMENTS, RealServer, server_4
from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.clients.errors import DeadlineExceeded, NotFoundError, PreflightFailed
from prefect_biomed.clients.vantage6 import (
    CancelNotPermitted,
    Collaboration,
    Dataframe,
    ForeignResult,
    NameConflict,
    Organization,
    OrganizationSpec,
    Role,
    Rule,
    Run,
    Session,
    Status,
    Task,
    TaskFailed,
    UnsafeFormat,
    UserSpec,
    Vantage6Client,
    description_of,
)
from prefect_biomed.flows.vantage6 import (
    Analysis,
    DataframeSpec,
    Function,
    federated_analysis,
    federated_rounds,
    federated_session,
    provision_collaboration,
)
from prefect_biomed.flows.vantage6_parameters import AnalysisWaiting, FederatedOutputs, TaskDetails
from prefect_biomed.sandbox.vantage6 import CLINICAL
from prefect_biomed.sandbox.vantage6._encryption import KeyPair
from prefect_biomed.sandbox.vantage6.nodes import ComputeNode, NodeSettings
from prefect_biomed.tasks import vantage6 as steps

pytestmark = [pytest.mark.conformance, pytest.mark.usefixtures("prefect_api"), pytest.mark.timeout(600)]

COLLABORATIONS = pytest.mark.parametrize("collaboration", ["plain", "encrypted"])


def credentials_of(server: RealServer, username: str = "north-researcher", **more: Any) -> Vantage6Credentials:
    """Return the block of a user of the harness, with the key of its organization."""
    user = server.facts["users"].get(username, {"organization": "north"})
    key = server.facts["organizations"].get(user["organization"])
    fields: dict[str, Any] = {"url": server.facts["url"].rsplit("/", 1)[0], "auth_url": server.facts.get("auth_url")}
    fields["encryption"] = "as the collaboration says"
    if key is not None:
        fields["private_key_path"] = Path(key["private_key"])
    if "password" in user:
        fields |= {"username": username, "password": SecretStr(user["password"])}
    return Vantage6Credentials(**{**fields, **more})


class Laboratory:
    """Our flows on one server; on v5 every computation reads a dataframe of its collaboration."""

    def __init__(self, server: RealServer, credentials: Vantage6Credentials | None = None) -> None:
        self.server = server
        self.credentials = credentials or credentials_of(server)
        self.account = Account(server.facts)

    def analyse(self, method: str, collaboration: str = "plain", **options: Any) -> Analysis:
        groups = {"details": TaskDetails, "outputs": FederatedOutputs, "waiting": AnalysisWaiting}
        sorted_into: dict[str, dict[str, Any]] = {
            group: {name: options.pop(name) for name in model.model_fields if name in options}
            for group, model in groups.items()
        }
        options = {"credentials": self.credentials, "method": method, "image": CLINICAL, **options, **sorted_into}
        if self.server.generation == 5:
            frame = self.account.dataframe(collaboration)
            options["databases"] = frame["name"]
            sorted_into["details"]["session"] = frame["session"]["id"]
        else:
            options["databases"] = "default"
        return federated_analysis(collaboration=collaboration, **options)

    def column(self, name: str) -> dict[str, np.ndarray]:
        """Return a column of each hospital's file."""
        return {
            hospital: np.genfromtxt(files["default"], delimiter=",", names=True)[name]
            for hospital, files in self.server.cohorts.items()
        }


@pytest.fixture
def lab(real_vantage6: RealServer) -> Laboratory:
    return Laboratory(real_vantage6)


@pytest.fixture(params=[4, 5])
def modern(request: pytest.FixtureRequest) -> Laboratory:
    """The servers of today."""
    return Laboratory(request.getfixturevalue(f"real_vantage6_{request.param}"))


@flow(name="one-step")
def alone(step: Callable[..., Any], *arguments: Any) -> Any:
    """Run one of our tasks, which wants a flow around it."""
    return step(*arguments)


@COLLABORATIONS
def test_a_partial_function_at_three_organizations(lab: Laboratory, collaboration: str) -> None:
    analysis = lab.analyse("partial_average", collaboration, arguments={"column": "bmi"})
    assert analysis.task.status is Status.COMPLETED and not analysis.failures
    expected = {name: {"sum": pytest.approx(v.sum()), "count": len(v)} for name, v in lab.column("bmi").items()}
    assert {result.organization: result.value for result in analysis.results} == expected


@COLLABORATIONS
def test_a_central_function_with_subtasks(lab: Laboratory, collaboration: str) -> None:
    analysis = lab.analyse(
        "central_linear_regression",
        collaboration,
        organizations=["north"],
        central=True,
        arguments={"outcome": "progression", "predictors": ["bmi", "bp"]},
    )
    (result,) = analysis.results
    names = ("progression", "bmi", "bp")
    outcome, *predictors = (np.concatenate(list(lab.column(name).values())) for name in names)
    design = np.column_stack([np.ones(len(outcome)), *predictors])
    pooled, *_ = np.linalg.lstsq(design, outcome, rcond=None)
    assert isinstance(result.value, dict)
    assert list(result.value["coefficients"].values()) == pytest.approx(pooled.tolist(), rel=1e-8)
    with lab.credentials.get_client() as client:
        (subtask,) = client.records(Task, parent_id=analysis.task.id)
        assert len(client.records(Run, task_id=subtask.id)) == 3


def test_a_crash_in_one_organization(lab: Laboratory) -> None:
    south = lab.server.facts["organizations"]["south"]["id"]
    with pytest.raises(TaskFailed) as caught:
        lab.analyse("crash", arguments={"organizations": [south]})
    (failure,) = caught.value.failures
    assert (failure.organization, failure.node, failure.status) == ("south", "south-plain", Status.CRASHED)
    assert "ZeroDivisionError" in failure.log and "ZeroDivisionError" in str(caught.value)
    analysis = lab.analyse("crash", arguments={"organizations": [south]}, partial=True)
    values = {result.organization: result.value for result in analysis.results}
    assert values == {"north": {"quotient": 1}, "west": {"quotient": 1}, "south": None}
    assert [failure.organization for failure in analysis.failures] == ["south"]


def test_a_crash_below_a_central_function_is_found(modern: Laboratory) -> None:
    west = modern.server.facts["organizations"]["west"]["id"]
    with pytest.raises(TaskFailed) as caught:
        modern.analyse("central_crash", organizations=["north"], central=True, arguments={"crashing": [west]})
    cause = caught.value.failures[0]
    assert cause.in_subtask and cause.organization == "west" and "ZeroDivisionError" in cause.log


def test_an_offline_node(modern: Laboratory) -> None:
    node = modern.server.nodes["west-plain"]
    modern.account.dataframe() if modern.server.generation == 5 else None
    root = Account(modern.server.facts, "root")
    identifier = modern.server.facts["nodes"]["west-plain"]["id"]
    node.stop()
    try:
        until(lambda: root.get(f"/node/{identifier}")["status"] == "offline")
        with pytest.raises(PreflightFailed, match="west"):
            modern.analyse("partial_average", arguments={"column": "bmi"}, offline_nodes="fail")
        with pytest.raises(DeadlineExceeded, match="west") as caught:
            modern.analyse("partial_average", arguments={"column": "bmi"}, name="waits", timeout_seconds=4)
        assert "task_id" in str(caught.value)
    finally:
        node.start()
    with modern.credentials.get_client() as client:
        (task,) = client.records(Task, name="waits-%")
    analysis = modern.analyse("partial_average", task_id=task.id)
    assert analysis.task.id == task.id and len(analysis.results) == 3 and not analysis.failures


def test_kill(modern: Laboratory) -> None:
    options: dict[str, Any] = {"arguments": {"seconds": 120}, "timeout_seconds": 3, "name": "long"}
    with pytest.raises(DeadlineExceeded):
        modern.analyse("sleep", **options)
    with modern.credentials.get_client() as client:
        task = client.records(Task, name="long-%")[0]
    with pytest.raises(CancelNotPermitted):
        alone(steps.kill_task, modern.credentials, task)
    outcome = alone(steps.kill_task, credentials_of(modern.server, "north-admin"), task)
    assert {run.status for run in outcome.runs} == {Status.KILLED}
    until(lambda: not any(node._runs for node in modern.server.nodes.values()))


def test_the_log_shows_what_algorithms_print_while_they_run(modern: Laboratory) -> None:
    seen: list[tuple[float, str]] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((time.monotonic(), record.getMessage()))

    logger, reader = logging.getLogger("prefect.task_runs"), Reader()
    level = logger.level
    logger.addHandler(reader)
    logger.setLevel(logging.INFO)
    try:
        modern.analyse("sleep", organizations=["west"], arguments={"seconds": 15})
        end = time.monotonic()
    finally:
        logger.removeHandler(reader)
        logger.setLevel(level)
    lines = [(moment, text) for moment, text in seen if "s left" in text]
    assert len(lines) == 15 and all("west-plain" in text for _, text in lines)
    assert end - lines[0][0] > 5, "the first line came only at the end"


def test_a_key_of_another_organization_is_refused_before_anything_is_sent(modern: Laboratory) -> None:
    west = Path(modern.server.facts["organizations"]["west"]["private_key"])
    lab = Laboratory(modern.server, credentials_of(modern.server, private_key_path=west))
    before = len(modern.account.items("/task", name="foreign-%"))
    with pytest.raises(PreflightFailed):
        lab.analyse("echo", "encrypted", name="foreign")
    assert len(modern.account.items("/task", name="foreign-%")) == before


def test_an_outsider_cannot_read_encrypted_results(modern: Laboratory) -> None:
    analysis = modern.analyse("partial_average", "encrypted", arguments={"column": "bmi"})
    west = credentials_of(modern.server, "west-researcher")
    with pytest.raises(ForeignResult):
        alone(steps.get_results, west, analysis.task)


# -- token expiry ------------------------------------------------------------------------------------


def test_a_token_expires_during_a_wait_on_4(official_environment: Any, tmp_path: Path) -> None:
    interpreter = official_environment(*ENVIRONMENTS[4])
    with server_4(interpreter, tmp_path, access_seconds=3, refresh_seconds=5, key_bits=2048) as server:
        lab = Laboratory(server)
        old = lab.account.tokens["access_token"]
        analysis = lab.analyse("sleep", organizations=["north"], arguments={"seconds": 9})
        assert [result.value for result in analysis.results] == [9.0]
        headers = {"Authorization": f"Bearer {old}"}
        answer = httpx.get(f"{server.facts['url']}/task", headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"msg": "Token has expired"})


@pytest.mark.parametrize("username", ["north-researcher", "north-robot"])
def test_a_token_expires_during_a_wait_on_5(real_vantage6_5: RealServer, username: str) -> None:
    assert real_vantage6_5.keycloak is not None
    lab = Laboratory(real_vantage6_5, robot(real_vantage6_5) if username == "north-robot" else None)
    lab.account.dataframe()
    real_vantage6_5.keycloak.access_seconds = 2
    try:
        old = Account(real_vantage6_5.facts).tokens["access_token"]
        # The server forgives ten seconds.
        analysis = lab.analyse("sleep", organizations=["north"], arguments={"seconds": 16})
        headers = {"Authorization": f"Bearer {old}"}
        answer = httpx.get(f"{real_vantage6_5.facts['url']}/user/me", headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"msg": "Token has expired"})
        # Where containers may ask, too, the real server answers something else.
        answer = httpx.get(f"{real_vantage6_5.facts['url']}/task", headers=headers)
        assert (answer.status_code, answer.json()) == (500, {"msg": "An unexpected error occurred!"})
    finally:
        real_vantage6_5.keycloak.access_seconds = 300
    assert [result.value for result in analysis.results] == [16.0]


# -- generation 5 ------------------------------------------------------------------------------------


def robot(server: RealServer) -> Vantage6Credentials:
    account = server.facts["service_account"]
    return credentials_of(
        server,
        account["username"],
        service_account=account["username"],
        client_secret=SecretStr(account["client_secret"]),
    )


@COLLABORATIONS
def test_a_service_account_makes_session_dataframe_and_computation(
    real_vantage6_5: RealServer, collaboration: str
) -> None:
    frame = f"robot-{collaboration}"
    spec = DataframeSpec(
        name=frame,
        extraction=Function(image=CLINICAL, method="read_csv"),
        preprocessing=[Function(image=CLINICAL, method="keep_above", arguments={"column": "bmi", "minimum": 25})],
    )

    def analyse() -> Analysis:
        return federated_session(
            credentials=robot(real_vantage6_5),
            collaboration=collaboration,
            session_name=f"robot-{collaboration}",
            dataframes=[spec],
            image=CLINICAL,
            method="partial_average",
            arguments={"column": "bmi"},
        )

    lab = Laboratory(real_vantage6_5)
    expected = {name: int((values >= 25).sum()) for name, values in lab.column("bmi").items()}
    first = analyse()
    assert {result.organization: result.value["count"] for result in first.results} == expected  # type: ignore[index,call-overload]  # JSON
    with robot(real_vantage6_5).get_client() as client:
        before = [task.id for task in client.records(Task)]
        second = analyse()
        # Session, dataframe and step are there; only the computation is new.
        assert {task.id for task in client.records(Task)} - set(before) == {second.task.id}


@COLLABORATIONS
@pytest.mark.parametrize("change", CHANGES)
def test_another_dataframe_of_the_same_name_is_a_conflict_or_replaced(
    real_vantage6_5: RealServer, collaboration: str, change: str
) -> None:
    first = chain(f"{change.replace(' ', '-')}-{collaboration}")
    changed, says = CHANGES[change]

    def analyse(spec: DataframeSpec) -> dict[str, dict[str, dict[str, float]]]:
        analysis = federated_session(
            credentials=robot(real_vantage6_5),
            collaboration=collaboration,
            session_name=f"chains-{collaboration}",
            dataframes=[spec],
            image=CLINICAL,
            method="partial_summary",
        )
        found: dict[str, Any] = {one.organization: one.value for one in analysis.results}
        return {
            organization: {name: {part: column[part] for part in ("count", "mean")} for name, column in value.items()}
            for organization, value in found.items()
        }

    def expected(spec: DataframeSpec) -> dict[str, Any]:
        return {name: summary(files["default"], spec) for name, files in real_vantage6_5.cohorts.items()}

    assert analyse(first) == expected(first)
    with pytest.raises(NameConflict, match=says):
        analyse(changed(first))
    assert analyse(first) == expected(first)
    replacing = changed(first).model_copy(update={"replace": True})
    assert analyse(replacing) == expected(replacing)
    with robot(real_vantage6_5).get_client() as client:
        (frame,) = (one for one in _frames(client, f"chains-{collaboration}") if one.name == first.name)
        steps = description_of(client, frame.id).steps
        asked_for = [replacing.extraction, *replacing.preprocessing]
        assert [(one.method, one.arguments) for one in steps] == [(one.method, one.arguments) for one in asked_for]


def _frames(client: Vantage6Client, session_name: str) -> list[Dataframe]:
    (session,) = client.records(Session, name=session_name)
    return client.records(Dataframe, session_id=session.id)


# -- provisioning ------------------------------------------------------------------------------------


def test_a_provisioned_collaboration_computes(modern: Laboratory, tmp_path: Path) -> None:
    server = modern.server
    root = credentials_of(server, "root")
    names = [f"{hospital}-of-{server.generation}" for hospital in ("lyon", "delft")]
    specs = [
        OrganizationSpec(name=name, users=[UserSpec(username=f"{name}-analyst", roles=["Researcher"])])
        for name in names
    ]

    def provision() -> Any:
        return provision_collaboration(
            credentials=root,
            collaboration=f"joint-{server.generation}",
            organizations=specs,
            configuration_dir=tmp_path,
        )

    made = provision()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files and all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    again = provision()
    assert again == made and {path: path.read_bytes() for path in files} == files

    nodes = [provisioned_node(server, tmp_path, name, made.collaboration) for name in names]
    try:
        for node in nodes:
            node.start()
            assert node.encrypted
        with root.get_client() as client:
            keys = {o.name: o.public_key for o in client.records(Organization) if o.name in names}
            assert len(set(keys.values())) == 2 and all(keys.values())
    finally:
        for node in nodes:
            node.close()


def provisioned_node(server: RealServer, folder: Path, name: str, collaboration: Collaboration) -> ComputeNode:
    """Return a node that knows nothing but what the files of a provisioned organization say."""
    place = next(path for path in folder.iterdir() if path.name.startswith(name))
    files = {path.name: path for path in place.rglob("*") if path.is_file()}
    configuration = yaml.safe_load(files[f"{collaboration.name}.yaml"].read_text())
    key = next(path for file, path in files.items() if file.endswith(".pem"))
    api_key = configuration.get("api_key") or configuration["node"]["apiKey"]
    settings = NodeSettings(api_key=api_key, databases={}, images={}, keys=KeyPair.from_pem(key.read_bytes()))
    if server.keycloak is not None:
        realm = server.keycloak.realm
        settings.token_url = f"{realm.url}/realms/{realm.name}/protocol/openid-connect/token"
        settings.client_id = next(client.name for client in realm.clients if client.secret == api_key)
    root = server.facts["url"].rsplit("/", 1)[0]
    http = httpx.Client(base_url=server.facts["url"], timeout=60)
    return ComputeNode(server.generation, http, PollingChannel(root), settings, place / "sessions", poll_seconds=15)


def test_members_are_put_in_and_taken_out(real_vantage6: RealServer) -> None:
    north, south = (real_vantage6.facts["organizations"][name]["id"] for name in ("north", "south"))
    with credentials_of(real_vantage6, "root").get_client() as root:
        flag = 0 if real_vantage6.generation == 3 else False
        place = root.create(Collaboration, name="members", organization_ids=[north], encrypted=flag)
        root.add_member(Collaboration, place.id, Organization, south)
        assert {one.name for one in root.collaboration(place.id).organizations} == {"north", "south"}
        root.remove_member(Collaboration, place.id, Organization, south)
        assert {one.name for one in root.collaboration(place.id).organizations} == {"north"}
        role = root.create(Role, name="members", description="d", rules=[1], organization_id=north)
        root.add_member(Role, role.id, Rule, 2)
        assert {rule.id for rule in root.records(Rule, role_id=role.id)} == {1, 2}
        root.remove_member(Role, role.id, Rule, 1)
        assert {rule.id for rule in root.records(Rule, role_id=role.id)} == {2}
        with pytest.raises(NotFoundError):
            root.remove_member(Role, role.id, Rule, 1)
        root.delete(Role, role.id)
        root.delete(Collaboration, place.id)


# -- generation 3 ------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file that a pickle would make, and that pickle."""
    touched = tmp_path / "unpickled"

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (touched,))

    yield touched, base64.b64encode(pickle.dumps(Canary())).decode()


def test_a_pickle_from_3_is_not_opened(real_vantage6_3: RealServer, canary: tuple[Path, str]) -> None:
    touched, content = canary
    lab = Laboratory(real_vantage6_3)
    with pytest.raises(UnsafeFormat):
        lab.analyse("raw", organizations=["north"], arguments={"content": content})
    assert not touched.exists()


def test_three_rounds_of_averaging(modern: Laboratory, tmp_path: Path) -> None:
    """The state that comes out is that of three steps along the gradient of the pooled rows."""
    predictors, threshold, rate = ["age", "bmi", "bp"], 140.0, 5.0
    x = np.column_stack([np.concatenate(list(modern.column(name).values())) for name in predictors])
    y = np.concatenate(list(modern.column("progression").values())) > threshold
    read: dict[str, Any] = {"databases": "default"}
    if modern.server.generation == 5:
        frame = modern.account.dataframe("encrypted")
        read = {"databases": frame["name"], "details": {"session": frame["session"]["id"]}}
    learnt = federated_rounds(
        modern.credentials,
        "encrypted",
        CLINICAL,
        "partial_logistic_train",
        rounds=3,
        state={"coefficients": [0.0] * 4},
        arguments={
            "outcome": "progression",
            "threshold": threshold,
            "predictors": predictors,
            "means": x.mean(0).tolist(),
            "scales": x.std(0).tolist(),
            "learning_rate": rate,
        },
        outputs={"output_dir": tmp_path},
        **read,
    )
    design, beta = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)]), np.zeros(4)
    for _ in range(3):
        beta += rate * design.T @ (y - 1 / (1 + np.exp(-design @ beta))) / len(y)
    assert np.allclose(learnt.state["coefficients"], beta, atol=1e-9)
    assert len({one.task_id for one in learnt.rounds}) == 3


def test_two_waits_at_once_do_each_other_no_harm(modern: Laboratory) -> None:
    with modern.credentials.get_client() as client:
        me = client.me
    task = modern.account.create("sleep", "north", seconds=3)["id"]
    outcomes: list[Any] = []

    def wait() -> None:
        outcomes.extend(alone(steps.wait_for_results, modern.credentials, task))

    threads = [threading.Thread(target=wait) for _ in range(2)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert me.username == "north-researcher"
    assert [outcome.task.id for outcome in outcomes] == [task, task] and time.monotonic() - begin < 60
