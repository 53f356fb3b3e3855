"""How servers of vantage6 behave, from the login to the results, and what the client makes of it."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import logging
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from harness.federation import CLINICAL, FAST, HOSPITALS, Federation, federation, token, wait
from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    DeadlineExceeded,
    NotFoundError,
    PermissionDeniedError,
    PreflightFailed,
)
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6 import (
    CancelNotPermitted,
    Collaboration,
    KeyMismatch,
    MfaEnrollmentRequired,
    MfaRequired,
    NameConflict,
    Node,
    Organization,
    PrivateKey,
    RequestRefused,
    ResultExpired,
    Session,
    SessionScope,
    Status,
    Task,
    TaskGone,
    TaskRequest,
    UnsafeFormat,
    User,
    Vantage6Client,
    Version,
    check_key,
    connect,
    fetch_results,
    launch,
    make_dataframe,
    make_session,
    outcome_of,
    task_failed,
    wait_for_dataframe,
    watch,
)
from prefect_biomed.clients.vantage6.client import nodes_of
from prefect_biomed.clients.vantage6.preflight import check_nodes
from prefect_biomed.sandbox import Fault

every_generation = pytest.mark.parametrize("generation", [3, 4, 5])


def values(client: Vantage6Client, task: Task, folder: Path) -> dict[str, Any]:
    return {result.organization: result.value for result in fetch_results(client, task.id, output_dir=folder)}


def everywhere(value: Any) -> dict[str, Any]:
    """The same value of each organization."""
    return {name: copy.copy(value) for name in HOSPITALS}


def bodies(here: Federation) -> list[dict[str, Any]]:
    """What was sent to create tasks, as the server keeps it."""
    return [{"input": run.input, "organization": run.organization.name} for run in here.sandbox.registry.runs]


# -- encryption on demand ---------------------------------------------------------------------------------------------


@every_generation
def test_nothing_leaves_in_the_clear_because_the_server_says_so(
    federations: Callable[[int], Federation], generation: int
) -> None:
    here = federations(generation)
    with here.client() as client:
        fields = here.data(client, "plain") if generation == 5 else {}
    before = here.tasks_created()
    for demanded in (None, "required"):
        with here.client(encryption=demanded) as client:
            request = here.request("echo", arguments={"note": "canary"}, **fields)
            with pytest.raises(PreflightFailed, match=r'not encrypted.*encryption="as the collaboration says"'):
                launch(client, request, token())
    assert here.tasks_created() == before
    # Without a key nobody expects it, unless it is demanded.
    with here.client(key=None, encryption=None) as client:
        launch(client, here.request("echo", **fields), token())
    with here.client(key=None, encryption="required") as client, pytest.raises(PreflightFailed, match="in the clear"):
        launch(client, here.request("echo", **fields), token())


def test_no_dataframe_is_extracted_in_the_clear(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    with here.client(encryption=None) as client:
        session = make_session(client, "plain", f"s-{token()}")
        with pytest.raises(PreflightFailed, match="in the clear"):
            make_dataframe(client, session.id, f"f-{token()}", label="default", image=CLINICAL, method="read_csv")


# -- finding and logging in ------------------------------------------------------------------------------------------


def test_a_wrong_path_names_the_paths_tried(here: Federation) -> None:
    with pytest.raises(ConfigurationError) as refused:
        connect(here.sandbox.url + "/wrong", username="u", password=SecretStr("p"))
    for path in ("/wrong/version", "/wrong/api/version", "/wrong/hq/version"):
        assert path in str(refused.value)


@every_generation
def test_the_generation_is_found_without_login(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    for url in (here.sandbox.url, here.facts["url"]):
        with here.client(url=url) as client:
            assert client.version.major == generation
            assert client.url == here.facts["url"]
    assert here.calls("POST") == []


@pytest.mark.parametrize("generation", [3, 4])
@pytest.mark.parametrize("who", ["wrong password", "unknown user", "blocked account"])
def test_a_refused_login_is_tried_once(generation: int, who: str) -> None:
    with federation(generation) as here:
        name = "nobody" if who == "unknown user" else "north-researcher"
        secret = SecretStr("wrong")
        if who == "blocked account":
            for number in range(6):
                with here.client(password=SecretStr(f"wrong{number}")) as client, pytest.raises(AuthenticationError):
                    _ = client.me
            secret = SecretStr("Sandbox-1!")
        here.sandbox.journal.clear()
        for _ in range(3):
            with here.client(username=name, password=secret) as client:
                with pytest.raises(AuthenticationError, match="Failed to login"):
                    client.records(Organization)
                with pytest.raises(AuthenticationError):
                    _ = client.me
        assert len(here.sandbox.journal.entries("POST", "token/user")) == 1


def test_enrolment_carries_the_secret_in_the_exception_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with federation(4, {"two_factor": True}) as here, here.client() as client:
        with pytest.raises(MfaEnrollmentRequired) as refused:
            _ = client.me
        uri = refused.value.otpauth_uri
        assert uri.startswith("otpauth://totp/")
        secret = uri.split("secret=")[1].split("&")[0]
        for text in (str(refused.value), repr(refused.value), caplog.text):
            assert secret not in text


def _enrolled(here: Federation) -> str:
    """Set up the second factor of north-researcher and give its secret."""
    with here.client() as client, pytest.raises(MfaEnrollmentRequired) as refused:
        _ = client.me
    return refused.value.otpauth_uri.split("secret=")[1].split("&")[0]


def test_a_code_goes_over_the_wire_as_text() -> None:
    from prefect_biomed.clients.vantage6.authentication import SecondFactor

    with federation(4, {"two_factor": True}) as here:
        secret = _enrolled(here)
        code = SecondFactor(SecretStr(secret)).now()
        assert code is not None
        # The server refuses a number; see the body schema of the recorded exchanges.
        with here.credentials().get_client(mfa_code=int(code)) as client:
            assert client.me.username == "north-researcher"
        with here.client(totp_secret=SecretStr(secret)) as client:
            assert client.me.username == "north-researcher"


def test_a_missing_code_is_said_to_be_missing() -> None:
    with federation(4, {"two_factor": True}) as here:
        _enrolled(here)
        with here.client() as client, pytest.raises(MfaRequired, match="second factor"):
            _ = client.me
        with here.credentials().get_client(mfa_code="000000") as client, pytest.raises(MfaRequired, match="wrong"):
            _ = client.me


@pytest.mark.parametrize("generation", [4, 5])
def test_eight_threads_refresh_once_for_each_expiry(generation: int) -> None:
    life, lasting = 3.0, 7.0
    with federation(generation, {"access_seconds": life}) as here, here.client() as client:
        _ = client.me
        here.sandbox.journal.clear()
        end = time.monotonic() + lasting

        def poll() -> int:
            looks = 0
            while time.monotonic() < end:
                client.records(Organization)
                looks += 1
                time.sleep(0.02)
            return looks

        with ThreadPoolExecutor(8) as pool:
            looks = sum(pool.map(lambda _: poll(), range(8)))
        renewals = len(here.sandbox.journal.entries("POST", "token"))
        assert looks > 100
        assert 2 <= renewals <= lasting / (0.8 * (life - 1.0)) + 1
        assert {entry.status for entry in here.sandbox.journal.entries("GET", "organization")} == {200}


def test_an_expired_refresh_token_means_one_login() -> None:
    with federation(4, {"access_seconds": 0.5, "refresh_seconds": 0.6}) as here, here.client() as client:
        _ = client.me
        time.sleep(1.5)
        here.sandbox.journal.clear()
        assert client.records(Organization)
        assert [entry.path for entry in here.sandbox.journal.entries("POST")] == [
            "/api/token/refresh",
            "/api/token/user",
        ]
        # When even the password is no longer good, that is said, and nothing goes round in circles.
        user = next(user for user in here.sandbox.registry.users if user.username == "north-researcher")
        here.sandbox.registry.users.remove(user)
        time.sleep(1.5)
        with pytest.raises(AuthenticationError):
            client.records(Organization)


@every_generation
def test_a_lack_of_permission_is_no_expired_token(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        _ = client.me
        here.sandbox.journal.clear()
        with pytest.raises(PermissionDeniedError, match="lack the permission"):
            client.create(Organization, name="mine")
    assert [entry.status for entry in here.sandbox.journal.entries()] == [401]


def test_an_unknown_signature_means_one_login() -> None:
    with federation(4) as here, here.client() as client:
        _ = client.me
        here.sandbox.switches.signing_key = 7
        here.sandbox.journal.clear()
        assert client.records(Organization)
        assert [(entry.path, entry.status) for entry in here.sandbox.journal.entries()] == [
            ("/api/organization", 422),
            ("/api/token/user", 200),
            ("/api/organization", 200),
        ]
        here.sandbox.faults.add(
            Fault(path="/api/organization", status=422, body='{"msg": "Bad"}', content_type="application/json")
        )
        here.sandbox.journal.clear()
        with pytest.raises(AuthenticationError, match="even a new token"):
            client.records(Organization)
        assert len(here.sandbox.journal.entries("POST", "token/user")) == 1


# -- lists -----------------------------------------------------------------------------------------------------------


@every_generation
@pytest.mark.parametrize("page_size", [7, 100])
def test_lists_are_complete(generation: int, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_biomed.clients.vantage6.client._PAGE_SIZE", page_size)
    with federation(generation, {"organizations": 23}) as here, here.client() as client:
        found = client.records(Organization, collaboration_id=1)
        assert len({organization.id for organization in found}) == len(found) == 23
        pages = here.sandbox.journal.entries("GET", "organization$")
        assert len(pages) == (1 if generation == 3 else -(-23 // page_size))
        assert len(client.records(Organization, collaboration_id=1, limit=5)) == 5


@every_generation
def test_lists_are_reduced_to_fields(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        ids = {name: here.organization(name) for name in HOSPITALS}
        found = client.records(Organization, collaboration=1, fields=["id", "name"])
        assert sorted(found, key=lambda row: str(row["name"])) == [{"id": ids[one], "name": one} for one in HOSPITALS]
        (node,) = client.records(Node, name="north-plain", fields=["organization", "status"])
        assert node == {"organization": ids["north"], "status": "online"}
        (user,) = client.records(User, username="north-researcher", fields=["username", "otp_secret"])
        assert user["username"] == "north-researcher" and user["otp_secret"] in (None, "**********")
        if generation > 3:
            (plain,) = client.records(Collaboration, name="plain", fields=["organizations"])
            members = plain["organizations"]
            assert isinstance(members, list) and len(members) == len(HOSPITALS)
        with pytest.raises(ConfigurationError, match=r"a node has no 'colour'\. Known: .*collaboration_id"):
            client.records(Node, fields=["colour"])
        for limit in (0, -1):
            with pytest.raises(ConfigurationError, match=f"limit is {limit}; leave it out"):
                client.records(Node, limit=limit)
        with pytest.raises(ConfigurationError, match="is asked for none"):
            client.records(Node, fields=[])


def test_pages_keep_repeated_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_biomed.clients.vantage6.client._PAGE_SIZE", 1)
    with federation(4) as here, here.client() as client:
        tasks = [here.launch(client, "echo", "north") for _ in range(3)]
        here.sandbox.journal.clear()
        found = client.records(Task, include=["results", "runs"])
        assert {task.id for task in found} == {task.id for task in tasks}
        pages = here.sandbox.journal.entries("GET", "/api/task$")
        assert len(pages) == 3
        assert all("include=results&include=runs" in page.query for page in pages)
        (detailed,) = [client.get(Task, tasks[0].id, include=["results", "runs"])]
        assert len(detailed.runs) == 1


# -- encryption ------------------------------------------------------------------------------------------------------


def test_inputs_are_plain_or_encrypted_for_each_reader(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        before = len(bodies(here))
        plain = here.launch(client, "echo", arguments={"a": 1})
        for sent in bodies(here)[before:]:
            assert json.loads(base64.b64decode(sent["input"])) == {"method": "echo", "kwargs": {"a": 1}}
        before = len(bodies(here))
        encrypted = here.launch(client, "echo", collaboration="encrypted", arguments={"a": 2})
        sent_parts = {sent["organization"]: sent["input"].split("$") for sent in bodies(here)[before:]}
        assert set(sent_parts) == set(HOSPITALS)
        assert all(len(parts) == 3 for parts in sent_parts.values())
        assert len({parts[0] for parts in sent_parts.values()}) == len({parts[1] for parts in sent_parts.values()}) == 3
        for name, parts in sent_parts.items():
            call = here.key(name).decrypt("$".join(parts))
            assert json.loads(call) == {"method": "echo", "kwargs": {"a": 2}}
        for task, value in [(plain, {"a": 1}), (encrypted, {"a": 2})]:
            wait(client, task)
            assert values(client, task, tmp_path) == everywhere(value)


def test_an_encrypted_collaboration_without_key_is_refused_before_any_request_that_changes(
    here: Federation,
) -> None:
    with here.client(key=None) as client:
        _ = client.me
        here.sandbox.journal.clear()
        with pytest.raises(PreflightFailed, match="private key"):
            here.launch(client, "echo", collaboration="encrypted")
    assert here.calls("POST") == []


def test_two_organizations_in_one_process_use_their_own_keys(here: Federation, tmp_path: Path) -> None:
    keys = {one.name: one.public_key for one in here.sandbox.registry.organizations}
    with here.client() as north, here.client("south-researcher", key="south") as south:
        tasks = [here.launch(client, "echo", collaboration="encrypted", arguments={"n": n})
                 for n, client in enumerate([north, south])]  # fmt: skip
        for n, client in enumerate([north, south]):
            wait(client, tasks[n])
            assert values(client, tasks[n], tmp_path) == everywhere({"n": n})
    assert {one.name: one.public_key for one in here.sandbox.registry.organizations} == keys
    assert here.calls("PATCH") == []


@pytest.mark.parametrize("key", ["south", "new"])
def test_a_key_that_is_not_the_organizations_is_refused_and_not_uploaded(
    here: Federation, key: str, tmp_path: Path
) -> None:
    if key == "new":
        path = tmp_path / "new.pem"
        path.write_bytes(PrivateKey.generate(2048).pem)
    else:
        path = here.key_file(key)
    with here.client(private_key_path=path) as client:
        with pytest.raises(KeyMismatch, match="not the one of organization 'north'"):
            check_key(client)
        with pytest.raises(PreflightFailed, match="not the one of organization 'north'"):
            here.launch(client, "echo", collaboration="encrypted")
    assert here.calls("PATCH") == []
    assert [call for call in here.calls("POST") if "token" not in call] == []


@pytest.mark.parametrize("text", [None, "", "no key at all", "c291dGg="])
def test_a_member_whose_public_key_cannot_be_read_is_named_before_anything_is_sent(
    here: Federation, text: str | None
) -> None:
    (south,) = [one for one in here.sandbox.registry.organizations if one.name == "south"]
    key, south.public_key = south.public_key, text
    try:
        with here.client() as client, pytest.raises(PreflightFailed, match="'south' cannot be written to"):
            here.launch(client, "echo", collaboration="encrypted")
    finally:
        south.public_key = key
    assert [call for call in here.calls("POST") if "token" not in call] == []


def test_every_vector_is_read() -> None:
    """The vectors have a file of their own; here it is made sure that none is left out."""
    text = (Path(__file__).parent / "test_vantage6_encryption.py").read_text()
    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "vantage6" / "encryption.json").read_text())
    assert 'ENCRYPTION["vectors"]' in text and 'ENCRYPTION["must_fail"]' in text
    assert len(vectors["vectors"]) == 10 and len(vectors["must_fail"]) == 4


def test_a_result_that_looks_like_base64_stays_as_it_is(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        for collaboration in ("plain", "encrypted"):
            task = here.launch(client, "echo", "north", collaboration=collaboration, arguments={"x": "aGVsbG8="})
            wait(client, task)
            assert values(client, task, tmp_path) == {"north": {"x": "aGVsbG8="}}


@pytest.mark.parametrize("generation", [3, 4])
@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_a_pickle_is_refused_and_not_opened(
    federations: Callable[[int], Federation], generation: int, collaboration: str, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    here = federations(generation)
    content = base64.b64encode(pickle.dumps(Canary())).decode()
    with here.client() as client:
        task = here.launch(client, "raw", "north", collaboration=collaboration, arguments={"content": content})
        wait(client, task)
        with pytest.raises(UnsafeFormat, match="pickle"):
            fetch_results(client, task.id, output_dir=tmp_path)
        (result,) = fetch_results(client, task.id, output_dir=tmp_path, partial=True)
        assert result.value is None and "pickle" in (result.unavailable or "")
    assert not canary.exists()


def test_generation_3_is_asked_for_json(federations: Callable[[int], Federation], tmp_path: Path) -> None:
    here = federations(3)
    with here.client() as client:
        task = here.launch(client, "central_average", "north", arguments={"column": "age"})
        call = base64.b64decode(here.sandbox.registry.runs.where(task=_task(here, task))[0].input or "")
        assert call.startswith(b"json.")
        assert json.loads(call[5:]) == {
            "master": True,
            "method": "central_average",
            "args": [],
            "kwargs": {"column": "age"},
            "output_format": "json",
        }
        wait(client, task)
        assert set(values(client, task, tmp_path)) == {"north"}


def _task(here: Federation, task: Task) -> Any:
    return here.sandbox.registry.tasks.get(task.id)


# -- creating --------------------------------------------------------------------------------------------------------


@every_generation
def test_a_lost_answer_makes_no_second_task(generation: int) -> None:
    with federation(generation) as here, here.client() as client:
        fields = here.data(client, "plain") if generation == 5 else {}
        created = here.tasks_created()
        here.sandbox.faults.add(Fault(method="POST", path="/task$", drop="after", times=1))
        name = token()
        first = launch(client, here.request("echo", **fields), name)
        again = launch(client, here.request("echo", **fields), name)
        assert first.id == again.id
        assert here.tasks_created() == created + 1
        assert len(here.sandbox.journal.entries("POST", "/task$")) == 1


@pytest.mark.parametrize("name", ["123", " 7 ", "x" * 200])
def test_illegal_names_are_refused_before_anything_is_sent(here: Federation, name: str) -> None:
    with here.client() as client, pytest.raises(PreflightFailed, match=r"name (is|has)"):
        here.launch(client, "echo", name=name)
    assert [call for call in here.calls("POST") if "token" not in call] == []


@pytest.mark.parametrize("again", ["north", 2, "2"])
def test_an_organization_named_twice_is_refused(here: Federation, again: str | int) -> None:
    request = here.request("echo").model_copy(update={"organizations": ["north", again]})
    with here.client() as client, pytest.raises(PreflightFailed, match="'north' is named twice"):
        launch(client, request, token())


# -- waiting ---------------------------------------------------------------------------------------------------------


@every_generation
def test_the_end_is_seen_within_one_interval(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        task = here.launch(client, "sleep", "north", arguments={"seconds": 4})
        look = wait(client, task, PollSettings(interval_seconds=0.5, growth=1.015, max_interval_seconds=30))
        noticed = time.time()
        (run,) = look.states[0].runs
        assert run.finished_at is not None and look.states[0].task.status is Status.COMPLETED
        assert noticed - run.finished_at.timestamp() < 1.0


@every_generation
def test_a_crash_names_its_organization_and_leaves_the_other_results(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client() as client:
        task = here.launch(
            client, "crash", arguments={"organizations": [here.organization("south")], "after_seconds": 0.3}
        )
        outcome = outcome_of(client, wait(client, task).states[0])
        (failure,) = outcome.failures
        assert (failure.organization, failure.node, failure.status) == ("south", "south-plain", Status.CRASHED)
        assert "ZeroDivisionError" in failure.log
        error = task_failed(outcome)
        for part in ("south", "south-plain", "crashed", "ZeroDivisionError", "2 of 3 organizations have a result"):
            assert part in str(error)
        results = fetch_results(client, task.id, output_dir=tmp_path, partial=True)
        assert {one.organization: one.unavailable is None for one in results} == {
            "north": True,
            "south": False,
            "west": True,
        }


@every_generation
def test_the_cause_in_a_subtask_comes_first(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        task = here.launch(client, "central_crash", "north", arguments={"crashing": [here.organization("west")]})
        outcome = outcome_of(client, wait(client, task).states[0])
        cause = outcome.failures[0]
        assert (cause.organization, cause.in_subtask) == ("west", True)
        assert "ZeroDivisionError" in cause.log
        assert outcome.failures[-1].organization == "north" and not outcome.failures[-1].in_subtask
        text = str(task_failed(outcome))
        assert text.index("west") < text.index("north")


@pytest.mark.parametrize("generation", [4, 5])
def test_partial_results_wait_for_every_run(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    here.sandbox.add_image("mixed:1", {"mixed": _crash_or_sleep})
    with here.client() as client:
        task = here.launch(
            client, "mixed", "north", "south", image="mixed:1", arguments={"crashing": here.organization("north")}
        )
        looks = [look.states[0] for look in watch(client, [task.id], FAST)]
        failed_early = [state for state in looks if state.task.status.is_failure and not state.finished]
        assert failed_early, "the task was never failed while a run went on"
        results = fetch_results(client, task.id, output_dir=tmp_path, partial=True)
        assert {one.organization: one.value for one in results} == {"north": None, "south": "slept"}


def _crash_or_sleep(job: Any, crashing: int) -> str:
    if job.organization_id == crashing:
        job.sleep(0.5)
        raise RuntimeError("as asked")
    job.sleep(2)
    return "slept"


def test_an_offline_node_is_warned_of_waited_for_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with federation(4, {"offline": ["west-plain"]}) as here, here.client() as client:
        _until(lambda: here.sandbox.registry.nodes.where(name="west-plain")[0].status != "online")
        nodes = nodes_of(client, 1)
        many = [Organization(id=number, name=f"o{number}") for number in range(60)]
        silent = {one.id: nodes[here.organization("west")] for one in many}
        problems: list[str] = []
        warnings: list[str] = []
        check_nodes(client, many, silent, "warn", problems, warnings)
        assert problems == [] and len(warnings) == 1 and "Nodes 'west-plain' of organization 'o0', " in warnings[0]
        assert "and 50 more are offline; their runs start when they come back" in warnings[0]
        with pytest.raises(PreflightFailed, match="'west-plain' of organization 'west' is offline"):
            launch(client, here.request("echo"), token(), offline_nodes="fail")
        soon = PollSettings(interval_seconds=0.2, deadline_seconds=0.5)
        with pytest.raises(DeadlineExceeded, match="west"):
            launch(client, here.request("echo"), token(), offline_nodes="wait", waiting=soon)
        assert here.tasks_created() == 0
        task = launch(client, here.request("echo"), token(), offline_nodes="warn")
        assert "is offline; its run starts when it comes back" in caplog.text
        with pytest.raises(DeadlineExceeded, match=r"waits for west \(pending") as late:
            wait(client, task, PollSettings(interval_seconds=0.2, deadline_seconds=2))
        assert f"task_id={task.id}" in str(late.value)
        here.sandbox.switches.offline = []
        assert wait(client, task).states[0].task.status is Status.COMPLETED


def test_a_run_that_never_started_is_said_not_to_have_run() -> None:
    with federation(4, {"offline": ["west-plain"]}) as here, here.client() as client:
        task = here.launch(client, "crash", arguments={"organizations": [here.organization("south")]})
        outcome = outcome_of(client, wait(client, task).states[0])
        by_name = {failure.organization: failure for failure in outcome.failures}
        assert by_name["south"].status is Status.CRASHED and not by_name["south"].not_run
        assert by_name["west"].not_run
        assert "west (node west-plain): not run" in str(task_failed(outcome))
        assert outcome.failures[0].organization == "south"


@every_generation
def test_a_researcher_may_not_kill_and_an_administrator_may(
    federations: Callable[[int], Federation], generation: int
) -> None:
    here = federations(generation)
    with here.client() as client, here.client("north-admin") as admin:
        task = here.launch(client, "sleep", arguments={"seconds": 30})
        _until(lambda: client.task_status(task.id) is Status.ACTIVE or generation == 5)
        with pytest.raises(CancelNotPermitted, match="goes on"):
            client.kill_task(task.id)
        assert not client.task_status(task.id).is_terminal
        assert admin.kill_task(task.id)
        look = wait(client, task)
        assert {run.status for run in look.states[0].runs} == {Status.KILLED}
        assert not admin.kill_task(task.id), "there was nothing left to kill"


# -- results ---------------------------------------------------------------------------------------------------------


def test_expired_and_empty_results_are_told_apart(here: Federation, tmp_path: Path) -> None:
    with here.client() as client:
        task = here.launch(client, "echo", "north", arguments={"a": 1})
        wait(client, task)
        here.sandbox.clean_up(task.id)
        with pytest.raises(ResultExpired, match="clean-up"):
            fetch_results(client, task.id, output_dir=tmp_path)


def test_the_output_of_an_extraction_is_none(federations: Callable[[int], Federation], tmp_path: Path) -> None:
    here = federations(5)
    with here.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        frame = make_dataframe(client, session.id, f"f-{token()}", label="default", image=CLINICAL, method="read_csv")
        wait_for_dataframe(client, frame.id, FAST)
        assert frame.last_session_task is not None
        assert values(client, frame.last_session_task, tmp_path) == everywhere(None)


@every_generation
def test_results_are_read_after_the_end_only(
    federations: Callable[[int], Federation], generation: int, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client() as client:
        for _ in range(5):
            task = here.launch(client, "echo", arguments={"a": 1})
            wait(client, task, PollSettings(interval_seconds=0.01, deadline_seconds=30))
            assert values(client, task, tmp_path) == everywhere({"a": 1})


@every_generation
def test_a_deleted_task_ends_the_wait_at_once(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        for others in (0, 1):
            tasks = [here.launch(client, "sleep", "north", arguments={"seconds": 20}) for _ in range(others + 1)]
            began = time.monotonic()
            with pytest.raises(TaskGone, match=f"Task {tasks[0].id} does not exist"):
                for look in watch(client, [task.id for task in tasks], FAST):
                    assert not look.finished
                    if len(look.states) == others + 1:
                        _delete_quietly(client, tasks[0].id)
            assert time.monotonic() - began < 10
            for task in tasks[1:]:
                client.delete(Task, task.id)


def _delete_quietly(client: Vantage6Client, task_id: int) -> None:
    with contextlib.suppress(NotFoundError):
        client.delete(Task, task_id)


@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
@pytest.mark.parametrize("generation", [4, 5])
def test_a_blob_store_is_used_when_there_is_one(generation: int, collaboration: str, tmp_path: Path) -> None:
    with federation(generation, {"blob_store": True}) as here, here.client() as client:
        assert client.has_blob_store
        task = here.launch(client, "payload", collaboration=collaboration, arguments={"size": 3_000_000})
        uploads = here.sandbox.journal.entries("POST", "blobstream")
        wait(client, task)
        results = fetch_results(client, task.id, output_dir=tmp_path, spill_bytes=1_000_000)
        assert all(len(json.loads((one.path or tmp_path).read_text())["padding"]) > 2_900_000 for one in results)
        assert len(here.sandbox.journal.entries("GET", "blobstream/[0-9a-f]")) == 3
        if generation == 4:
            assert len(uploads) == 3
            assert all("-" in (run.input or "") for run in here.sandbox.registry.runs)


def test_without_a_blob_store_everything_is_inline(here: Federation) -> None:
    with here.client() as client:
        assert not client.has_blob_store
    here.sandbox.faults.add(Fault(path="blobstream/status", status=404, body="<html>not found</html>"))
    with here.client() as client:
        assert not client.has_blob_store


def test_a_service_account_works_without_a_browser(tmp_path: Path) -> None:
    with federation(5) as here, here.client() as client:
        assert client.me.is_service_account and client.organization_id == here.organization("north")
        for collaboration in ("plain", "encrypted"):
            task = here.launch(client, "partial_average", collaboration=collaboration, arguments={"column": "age"})
            wait(client, task)
            counts = {name: value["count"] > 100 for name, value in values(client, task, tmp_path).items()}
            assert counts == everywhere(True)


def test_a_wait_outlives_many_short_tokens() -> None:
    with federation(5, {"access_seconds": 1.0}) as here, here.client() as client:
        task = here.launch(client, "sleep", "north", arguments={"seconds": 6})
        here.sandbox.journal.clear()
        assert wait(client, task).states[0].task.status is Status.COMPLETED
        assert len(here.sandbox.journal.entries("POST", "token")) >= 5


def test_sessions_and_dataframes_are_reused_when_they_match(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    session_name, frame_name = f"s-{token()}", f"f-{token()}"
    with here.client() as client:
        session = make_session(client, "plain", session_name, scope=SessionScope.ORGANIZATION)
        assert make_session(client, "plain", session_name, scope=SessionScope.ORGANIZATION) == session
        with pytest.raises(NameConflict, match="scope 'organization'"):
            make_session(client, "plain", session_name, scope=SessionScope.OWN)
        settings = {"label": "default", "image": CLINICAL, "method": "read_csv"}
        frame = make_dataframe(client, session.id, frame_name, **settings)
        assert make_dataframe(client, session.id, frame_name, **settings).id == frame.id
        with pytest.raises(NameConflict, match="method 'read_csv', not 'keep_above'"):
            make_dataframe(client, session.id, frame_name, **settings | {"method": "keep_above"})
        other = make_session(client, "plain", f"s-{token()}")
        with pytest.raises(NameConflict, match="is taken"):
            make_dataframe(client, other.id, frame_name, **settings)
        wait_for_dataframe(client, frame.id, FAST)


def test_a_computation_waits_until_its_dataframe_is_ready(
    federations: Callable[[int], Federation], tmp_path: Path
) -> None:
    here = federations(5)
    with here.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        frame = make_dataframe(client, session.id, f"f-{token()}", label="default", image=CLINICAL, method="read_csv")
        request = here.request("partial_average", arguments={"column": "age"}, session=session.id, databases=frame.name)
        task = launch(client, request, token(), waiting=FAST)
        wait(client, task)
        assert set(values(client, task, tmp_path)) == set(HOSPITALS)
        # One that exists at one organization only never gets ready for the others.
        small = make_dataframe(
            client,
            session.id,
            f"f-{token()}",
            label="default",
            image=CLINICAL,
            method="read_csv",
            organizations=["north"],
        )
        wait_for_dataframe(client, small.id, FAST)
        with pytest.raises(PreflightFailed, match="not there for south, west"):
            launch(client, request.model_copy(update={"databases": _frames(small.name)}), token())


def _frames(name: str) -> Any:
    return TaskRequest(collaboration=1, image="i", method="m", databases=name).databases


@every_generation
@pytest.mark.parametrize("form", ["text", "mapping", "list"])
def test_databases_are_brought_into_the_words_of_the_server(
    federations: Callable[[int], Federation], generation: int, form: str
) -> None:
    here = federations(generation)
    with here.client() as client:
        fields = here.data(client, "plain") if generation == 5 else {}
        name = fields.get("databases", "default")
        key = "dataframe" if generation == 5 else "label"
        given = {"text": name, "mapping": {key: name}, "list": [name]}[form]
        task = here.launch(client, "echo", "north", **fields | {"databases": given})
        record = _task(here, task).databases[0]
        if generation == 5:
            assert record["dataframe_id"] is not None or record["type"] == "dataframe"
        else:
            assert record["label"] == "default"


def test_an_older_server_is_asked_for_the_task_itself(here: Federation) -> None:
    with here.client() as client:
        task = here.launch(client, "sleep", "north", arguments={"seconds": 1})
        client.version = Version(text="4.10.2", major=4, minor=10)
        here.sandbox.journal.clear()
        wait(client, task)
        assert here.calls("GET", f"/task/{task.id}/status") == []
        assert len(here.calls("GET", f"/task/{task.id}$")) >= 2


@every_generation
def test_tasks_are_never_filtered_by_status(federations: Callable[[int], Federation], generation: int) -> None:
    here = federations(generation)
    with here.client() as client:
        with pytest.raises(ConfigurationError, match="cannot filter by 'status'"):
            client.records(Task, status="completed")
        tasks = [here.launch(client, "echo", "north") for _ in range(2)]
        for _ in watch(client, [task.id for task in tasks], FAST):
            pass
    assert not any("status=" in call for call in here.calls())


def test_nothing_is_deleted_along_unless_asked_for() -> None:
    with federation(4) as here, here.client("root", key=None) as root:
        with pytest.raises(RequestRefused):
            root.delete(Collaboration, 1)
        (entry,) = here.sandbox.journal.entries("DELETE")
        assert entry.query == ""
        assert root.get(Collaboration, 1).name == "plain"
        root.delete(Collaboration, 1, delete_dependents=True)
        assert here.sandbox.journal.entries("DELETE")[-1].query == "delete_dependents=true"
        with pytest.raises(NotFoundError):
            root.get(Collaboration, 1)


def test_a_session_with_content_is_not_deleted_along(federations: Callable[[int], Federation]) -> None:
    here = federations(5)
    with here.client() as client:
        session = make_session(client, "plain", f"s-{token()}")
        make_dataframe(client, session.id, f"f-{token()}", label="default", image=CLINICAL, method="read_csv")
        with pytest.raises(RequestRefused, match="contains tasks and dataframes"):
            client.delete(Session, session.id)
        assert client.get(Session, session.id)


def test_the_secret_of_a_second_factor_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with federation(4, {"two_factor": True}) as here:
        secret = _enrolled(here)
        with here.client(totp_secret=SecretStr(secret)) as client:
            (user,) = client.records(User, username="north-researcher")
            assert user.otp_secret is not None and user.otp_secret.get_secret_value() == secret
            credentials = here.credentials(totp_secret=SecretStr(secret))
            for text in (repr(user), str(user.model_dump()), user.model_dump_json(), repr(client), caplog.text):
                assert secret not in text
            assert secret not in repr(credentials) + credentials.model_dump_json()


def _until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
