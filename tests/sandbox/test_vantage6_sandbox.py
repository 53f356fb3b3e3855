"""The vantage6 sandbox against exchanges recorded from real servers, and by itself."""

import base64
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import requests

from harness.vantage6_account import Account, Json, until
from prefect_biomed.sandbox import Fault, Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL, Algorithm, Job, Vantage6Sandbox, algorithms
from prefect_biomed.sandbox.vantage6._encryption import Undecipherable, seal
from prefect_biomed.sandbox.vantage6._platform import one_time_code

VECTORS = Path(__file__).parents[1] / "vectors" / "vantage6"


class User(Account):
    """A user of a sandbox in this process."""

    def __init__(self, sandbox: Vantage6Sandbox, username: str = "north-researcher") -> None:
        self.sandbox = sandbox
        super().__init__(sandbox.ready(), username)


def serve(generation: int, **switches: Any) -> Iterator[Vantage6Sandbox]:
    options = {"generation": generation, "key_bits": 2048, **switches}
    with Sandbox("vantage6", vantage6=options) as sandbox:
        assert isinstance(sandbox.vantage6, Vantage6Sandbox)
        yield sandbox.vantage6


@pytest.fixture
def four() -> Iterator[Vantage6Sandbox]:
    yield from serve(4)


@pytest.fixture(scope="module", params=[3, 4, 5])
def shared(request: pytest.FixtureRequest) -> Iterator[User]:
    for sandbox in serve(request.param):
        yield User(sandbox)


# -- recorded exchanges ----------------------------------------------------------------------------


class Recording:
    """Plays a recording to a sandbox and tells where the answers differ.

    Ids, links and keys of all objects must agree, as must every status and error to the letter.
    Moments and tokens need only be of the same kind, and so does what follows from the recorded
    server's own users, texts and tables.
    """

    renamed: ClassVar = {"harness-plain": "plain", "harness-encrypted": "encrypted", "harness-study": "north-and-south"}
    own: ClassVar = {"public_key", "lastname", "log", "access_token", "refresh_token", "keycloak_id"}
    own |= {"keycloak_client_id", "address1", "zipcode"}
    moment = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?")
    # Whose token a request carried when it was not that of the first hospital's researcher.
    callers: ClassVar = {
        "task: viewer denied": "north-viewer",
        "kill collab admin": "north-admin",
        "kill node tasks": "north-admin",
        "robot me": "north-robot",
    }

    def __init__(self, sandbox: Vantage6Sandbox, file: str) -> None:
        self.sandbox = sandbox
        lines = (VECTORS / file).read_text(encoding="utf-8").splitlines()
        self.exchanges: list[Json] = [json.loads(line) for line in lines]
        self.accounts: dict[str, User] = {}

    def account(self, username: str) -> User:
        if username not in self.accounts:
            self.accounts[username] = User(self.sandbox, username)
        return self.accounts[username]

    def play(self, exchange: Json) -> list[str]:
        title = exchange["title"]
        self.settle(title)
        account = self.account(self.callers.get(title, "north-researcher"))
        access, refresh = (account.tokens.get(f"{kind}_token") for kind in ("access", "refresh"))
        token = {
            "no auth header": None,
            "no auth": None,
            "garbage token": "garbage",
            "garbage": "a.b.c",
            "bad signature": f"{access[:-6]}AAAAAA" if access else None,
            "refresh ok": refresh,
            "use refresh token as access": refresh,
        }.get(title, access)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        body = exchange["request_json"]
        more: Json = {} if body is None else {"json": {**body}}
        if body and "password" in body:
            more["json"]["password"] = body["password"].replace("Harness", "Sandbox")
        answer = requests.request(
            exchange["method"], account.facts["url"] + exchange["path"], headers=headers, timeout=30, **more
        )
        got = answer.json() if "json" in answer.headers["content-type"] else answer.text
        found = [f"status {exchange['status']}, not {answer.status_code}"] * (exchange["status"] != answer.status_code)
        found += [
            f"header {name}: {value!r}, not {answer.headers.get(name)!r}"
            for name, value in exchange["headers"].items()
            if answer.headers.get(name) != value and (value != "<jwt>" or name not in answer.headers)
        ]
        return found + list(self.differences(exchange["body"], got, ""))

    def settle(self, title: str) -> None:
        """Let the nodes finish what was asked for, as the recording did but for one request."""
        if title not in ("task on df not ready", "task: input missing", "kill researcher", "kill collab admin"):
            registry = self.sandbox.registry
            until(lambda: all(r.finished for r in registry.runs))

    def differences(self, recorded: Any, got: Any, place: str) -> Iterator[str]:
        key = place.rpartition(".")[2]
        if isinstance(recorded, dict) and isinstance(got, dict):
            if recorded.keys() != got.keys():
                yield f"{place}: keys {sorted(recorded.keys() ^ got.keys())} are in one only"
            for name in recorded.keys() & got.keys():
                yield from self.differences(recorded[name], got[name], f"{place}.{name}")
        elif isinstance(recorded, list) and isinstance(got, list):
            # Of these the real servers do not define the order.
            if key in ("methods", "rules", "roles", "orgs_in_collabs", "config", "columns"):
                order = lambda entry: json.dumps(entry, sort_keys=True)  # noqa: E731  # used twice, here
                recorded, got = sorted(recorded, key=order), sorted(got, key=order)
            if key in ("config", "columns"):
                recorded, got = [recorded[0].keys()] if recorded else [], [got[0].keys()] if got else []
            if len(recorded) != len(got):
                yield f"{place}: {len(recorded)} entries, not {len(got)}"
            for number, (one, other) in enumerate(zip(recorded, got, strict=False)):
                yield from self.differences(one, other, f"{place}.{number}" if isinstance(one, list) else place)
        elif isinstance(recorded, str) and isinstance(got, str):
            if key in self.own or (self.moment.fullmatch(recorded) and self.moment.fullmatch(got)):
                return
            if key in ("description", "result") or ".config" in place or ".columns" in place:
                return
            # The servers invent names for sessions without one.
            if re.fullmatch("[a-z]+_[a-z]+", recorded) and re.fullmatch("[a-z]+_[a-z]+", got):
                return
            for old, new in self.renamed.items():
                recorded = recorded.replace(old, new)
            # A set is printed in no particular order.
            if sorted(recorded) != sorted(got):
                yield f"{place}: {recorded!r}, not {got!r}"
        elif type(recorded) is not type(got) or recorded != got:
            yield f"{place}: {recorded!r}, not {got!r}"


def _average(job: Job, column_name: str = "age") -> Json:
    return algorithms.partial_average(job, column_name)


def _central_average(job: Job, column_name: str) -> Json:
    return {"parts": job.everywhere("partial_average", {"column_name": column_name})}


def _fail(job: Job, organizations: list[int] | None = None) -> Json:
    if organizations is None or job.organization_id in organizations:
        raise RuntimeError("as asked")
    return {}


def _read_csv(job: Job) -> algorithms.Table:
    job.sleep(0.5)
    return algorithms.read_csv(job)


def _keep_above(job: Job, column_name: str, minimum: float) -> algorithms.Table:
    return algorithms.keep_above(job, column_name, minimum)


def test_the_sandbox_answers_what_a_real_server_4_answered(four: Vantage6Sandbox) -> None:
    four.add_image("harness/average:builtin", {"echo": lambda job, **kwargs: {"args": [], "kwargs": kwargs}})
    recording = Recording(four, "wire_v4_15_2.jsonl")
    differing = {e["title"]: found for e in recording.exchanges if (found := recording.play(e))}
    assert len(recording.exchanges) == 87
    assert differing == {}


def test_the_sandbox_answers_what_a_real_server_5_answered() -> None:
    for sandbox in serve(5):
        methods = {
            "partial_average": _average,
            "central_average": _central_average,
            "fail": _fail,
            "sleep": algorithms.sleep,
            "read_csv": Algorithm(_read_csv, "data_extraction"),
            "keep_above": Algorithm(_keep_above, "preprocessing"),
        }
        sandbox.add_image("harness/average:builtin", methods)
        recording = Recording(sandbox, "wire_v5_0_3.jsonl")
        differing = {e["title"]: found for e in recording.exchanges if (found := recording.play(e))}
        assert len(recording.exchanges) == 63
        assert differing == {}


# -- computing -------------------------------------------------------------------------------------


def pooled(sandbox: Vantage6Sandbox, label: str = "default") -> dict[str, Any]:
    """Put the files of all hospitals together again, with nothing but numpy."""
    tables = [np.genfromtxt(files[label], delimiter=",", names=True) for files in sandbox.cohorts.values()]
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0].dtype.names}


def test_the_hospitals_hold_all_patients_and_differ(shared: User) -> None:
    everybody = pooled(shared.sandbox)
    assert len(everybody["bmi"]) == 442 and len(pooled(shared.sandbox, "breast_cancer")["malignant"]) == 569
    parts = shared.compute("partial_average", column="age")
    means = [part["sum"] / part["count"] for part in parts]
    assert max(means) - min(means) > 10
    assert sum(part["sum"] for part in parts) == pytest.approx(everybody["age"].sum())


@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_a_central_algorithm_computes_through_subtasks(shared: User, collaboration: str) -> None:
    task = shared.create("central_average", "north", collaboration=collaboration, column="bmi")
    assert shared.wait(task["id"]) == "completed"
    (output,) = shared.outputs(task["id"])
    assert output == {"average": pytest.approx(pooled(shared.sandbox)["bmi"].mean()), "count": 442}
    job = {"run_id": task["run_id"]} if shared.generation == 3 else {"job_id": task["job_id"]}
    subtask, itself = shared.items("/task", **job)
    assert (itself["id"], subtask["parent"]["id"]) == (task["id"], task["id"])
    assert len(shared.runs(subtask["id"])) == 3


def test_encrypted_results_can_be_read_by_the_initiator_alone(shared: User) -> None:
    task = shared.create("partial_average", collaboration="encrypted", column="bmi")["id"]
    shared.wait(task)
    runs = shared.runs(task)
    assert len({run[shared.input_key].split("$")[0] for run in runs}) == 3
    texts = [result["result"] for result in shared.items("/result", task_id=task)]
    assert all(text.count("$") == 2 for text in texts)
    assert [set(each) for each in shared.outputs(task)] == [{"sum", "count"}] * 3
    read = shared.sandbox.keys["north"].open(texts[0].encode())
    # One in some two hundred wrong keys opens to 32 random bytes; the content is then random too.
    with contextlib.suppress(Undecipherable):
        assert shared.sandbox.keys["west"].open(texts[0].encode()) != read


def test_input_encrypted_for_another_organization_crashes_at_the_node(shared: User) -> None:
    plain = shared.payload("echo", {})
    west = shared.sandbox.keys["west"].public
    body = shared.body("echo", ("north",), collaboration="encrypted")
    body["organizations"] = [{"id": 2, shared.input_key: seal(plain, west)}]
    task = shared.post("/task", body)["id"]
    shared.wait(task)
    (run,) = shared.runs(task)
    # A wrong key mostly gives a key of a wrong length, and now and then one that gives no JSON.
    assert run["status"] == "crashed" and re.search("Undecipherable|UnicodeDecodeError|JSONDecodeError", run["log"])


def test_federated_linear_regression_equals_the_pooled_fit(shared: User) -> None:
    predictors = ["age", "sex", "bmi", "bp", "ltg"]
    (fit,) = shared.compute(
        "central_linear_regression",
        "north",
        collaboration="encrypted",
        outcome="progression",
        predictors=predictors,
    )
    table = pooled(shared.sandbox)
    design = np.column_stack([np.ones(442), *(table[name] for name in predictors)])
    beta, residual, *_ = np.linalg.lstsq(design, table["progression"], rcond=None)
    assert list(fit["coefficients"].values()) == pytest.approx(beta.tolist(), rel=1e-8)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * residual[0] / (442 - 6))
    assert list(fit["standard_errors"].values()) == pytest.approx(errors.tolist(), rel=1e-8)
    total = ((table["progression"] - table["progression"].mean()) ** 2).sum()
    assert fit["r_squared"] == pytest.approx(1 - residual[0] / total)


def test_federated_logistic_regression_maximizes_the_pooled_likelihood(shared: User) -> None:
    predictors = ["mean_texture", "mean_smoothness", "mean_radius"]
    (fit,) = shared.compute(
        "central_logistic_regression",
        "north",
        database="breast_cancer",
        outcome="malignant",
        predictors=predictors,
    )
    table = pooled(shared.sandbox, "breast_cancer")
    design = np.column_stack([np.ones(569), *(table[name] for name in predictors)])
    beta = np.array(list(fit["coefficients"].values()))
    chance = 1 / (1 + np.exp(-design @ beta))
    scale = np.abs(design).sum(axis=0)
    assert fit["converged"] and np.abs(design.T @ (table["malignant"] - chance) / scale).max() < 1e-9
    # Larger tumours are malignant more often.
    assert fit["coefficients"]["mean_radius"] > 0.5


def test_a_crash_leaves_a_traceback_and_the_other_results(shared: User) -> None:
    task = shared.create("crash", organizations=[3])["id"]
    assert shared.wait(task) == ("crashed" if shared.generation == 4 else "failed")
    north, south, west = shared.runs(task)
    assert [run["status"] for run in (north, south, west)] == ["completed", "crashed", "completed"]
    assert "ZeroDivisionError: integer division or modulo by zero" in south["log"]
    results = {r["id"]: r["result"] for r in shared.items("/result", task_id=task)}
    assert results[south["id"]] == "" and json.loads(base64.b64decode(results[north["id"]])[-15:]) == {"quotient": 1}


def test_a_container_that_starts_after_a_failure_gets_no_token(shared: User) -> None:
    shared.sandbox.switches.startup_seconds = {"west-plain": 1.0}
    try:
        task = shared.create("crash", organizations=[2])["id"]
        shared.wait(task)
    finally:
        shared.sandbox.switches.startup_seconds = {}
    north, _, west = shared.runs(task)
    assert north["status"] == "crashed"
    if shared.generation == 5:
        # It asks for no token where no subtasks are to be made.
        assert west["status"] == "completed"
        return
    assert west["status"] == "failed"
    # The node reports no end, so that this run looks unfinished for ever.
    assert west["log"] == "Could not obtain algorithm container token" and west["finished_at"] is None


def test_a_crash_below_a_central_algorithm_shows_in_its_log(shared: User) -> None:
    task = shared.create("central_crash", "north", crashing=[4])["id"]
    shared.wait(task)
    (run,) = shared.runs(task)
    assert run["status"] == "crashed" and "crashed at organization 4" in run["log"]


def test_unknown_images_and_methods_fail_as_nodes_report_it(shared: User) -> None:
    task = shared.create("echo", "north", image="nobody/nothing:1")["id"]
    shared.wait(task)
    assert [run["status"] for run in shared.runs(task)] == ["non-existing Docker image"]
    task = shared.create("no_such_method", "north")["id"]
    shared.wait(task)
    assert "no method 'no_such_method'" in shared.runs(task)[0]["log"]


def test_added_images_run(shared: User) -> None:
    shared.sandbox.add_image("me/mine:1", {"rows": lambda job: len(job.column("age"))})
    assert shared.compute("rows", image="me/mine:1") == [147, 147, 148]


def test_log_lines_appear_while_a_run_is_active(shared: User) -> None:
    task = shared.create("sleep", "north", seconds=30)["id"]
    until(lambda: shared.runs(task)[0]["status"] == "active")
    if shared.generation > 3:
        until(lambda: "30 s left" in (shared.runs(task)[0]["log"] or ""))
    (run,) = shared.runs(task)
    assert run["status"] == "active" and run["started_at"] and not run["finished_at"]
    User(shared.sandbox, "north-admin").ask("POST", "/kill/task", json={"id": task})


def test_kill_is_for_administrators_and_ends_the_computation(shared: User) -> None:
    task = shared.create("central_sleep", "north", seconds=600)["id"]
    until(lambda: len(shared.items("/task", parent_id=task)) == 1)
    denied = shared.ask("POST", "/kill/task", json={"id": task})
    assert (denied.status_code, denied.json()["msg"]) == (401, "You lack the permission to do that!")
    killed = User(shared.sandbox, "north-admin").ask("POST", "/kill/task", json={"id": task})
    assert killed.status_code == 200
    (subtask,) = shared.items("/task", parent_id=task)
    runs = shared.runs(task) + shared.runs(subtask["id"])
    assert {run["status"] for run in runs} == {"killed by user"} and len(runs) == 4
    # v3 tells the nodes of as many runs as there are tasks.
    left = 2 if shared.generation == 3 else 0
    until(lambda: sum(len(node._runs) for node in shared.sandbox.nodes.values()) == left)
    again = User(shared.sandbox, "north-admin").ask("POST", "/kill/task", json={"id": task})
    assert again.status_code == 400


def test_a_run_waits_for_its_node_to_come_online(shared: User) -> None:
    # A researcher of v3 sees the nodes of the own organization only.
    root = User(shared.sandbox, "root")
    shared.sandbox.switches.offline = ["west-plain"]
    try:
        (node,) = root.items("/node", name="west-plain")
        assert (node["status"], node["config"]) == ("offline", [])
        task = shared.create("partial_average", column="bmi")["id"]
        until(lambda: [r["status"] for r in shared.runs(task)] == ["completed", "completed", "pending"])
    finally:
        shared.sandbox.switches.offline = []
    assert shared.wait(task) == "completed"
    (node,) = root.items("/node", name="west-plain")
    assert node["status"] == "online" and {"key": "database_labels", "value": "default"} in node["config"]


def test_a_failure_takes_the_run_of_an_offline_node_with_it(four: Vantage6Sandbox) -> None:
    account = User(four)
    four.switches.offline = ["west-plain"]
    task = account.create("crash", organizations=[2], after_seconds=0.2)["id"]
    assert account.wait(task) == "failed"
    north, _, west = account.runs(task)
    assert west["status"] == "failed" and f"sibling run id={north['id']} failed with status 'crashed'" in west["log"]


@pytest.mark.parametrize("generation", [3, 4])
def test_nodes_log_in_again_when_the_server_signs_with_another_key(generation: int) -> None:
    for sandbox in serve(generation):
        account = User(sandbox)
        running = account.create("sleep", "north", seconds=1)["id"]
        until(lambda account=account, task=running: account.runs(task)[0]["status"] == "active")
        sandbox.switches.signing_key = 1
        account = User(sandbox)
        assert account.wait(running, 15) == "completed"
        task = account.create("partial_average", column="bmi")["id"]
        assert account.wait(task, 15) == "completed"


def test_an_algorithm_whose_token_the_server_no_longer_knows_crashes(four: Vantage6Sandbox) -> None:
    task = (account := User(four)).create("central_sleep", "north", seconds=1)["id"]
    until(lambda: len(account.items("/task", parent_id=task)) == 1)
    four.switches.signing_key = 1
    account = User(four)
    assert account.wait(task, 15) == "crashed"
    assert "Refused" in account.runs(task)[0]["log"]


@pytest.mark.parametrize("generation", [3, 4, 5])
def test_nodes_connect_again_after_a_restart_and_end_what_they_had_begun(generation: int) -> None:
    with Sandbox("vantage6", vantage6={"generation": generation, "key_bits": 2048}) as sandbox:
        here = sandbox.vantage6
        assert isinstance(here, Vantage6Sandbox)
        here.switches.offline = ["west-encrypted"]
        account, root = User(here), User(here, "root")
        # One that ends while the server is down, whose report is lost, and one that ends afterwards.
        brief = account.create("sleep", "north", seconds=1)["id"]
        long = account.create("sleep", "south", seconds=3)["id"]
        until(lambda: {account.runs(task)[0]["status"] for task in (brief, long)} == {"active"})
        with sandbox.outage("vantage6"):
            with pytest.raises(requests.ConnectionError):
                account.ask("GET", "/version")
            assert "online" not in {node.status for node in here.registry.nodes}
            time.sleep(1.5)
        assert {node["status"] for node in root.items("/node")} == {"online", "offline"}
        assert [account.wait(task, 15) for task in (brief, long)] == ["completed", "completed"]
        assert account.compute("partial_average", column="bmi")


@pytest.mark.parametrize("generation", [3, 4, 5])
def test_tokens_expire_when_asked_to_and_nodes_go_on(generation: int) -> None:
    for sandbox in serve(generation):
        account = User(sandbox)
        if generation == 5:
            account.dataframe()
        sandbox.switches.token_generation += 1
        answer = account.ask("GET", "/user")
        assert (answer.status_code, answer.json()["msg"]) == (401, "Token has expired")
        account.tokens = User(sandbox).tokens
        assert account.ask("GET", "/user").status_code == 200
        task = account.create("partial_average", column="bmi")["id"]
        assert account.wait(task, 15) == "completed"


# -- the API -----------------------------------------------------------------------------------------


def test_lists_come_in_pages_newest_first(shared: User) -> None:
    tasks = [shared.create("echo", "north")["id"] for _ in range(12)]
    assert [t["id"] for t in shared.items("/task")[:12]] == tasks[::-1]
    page = shared.get("/task", page=2, per_page=5, include="metadata")
    assert [t["id"] for t in page["data"]] == tasks[::-1][5:10]
    assert "page=3" in page["links"]["next"] and "page=1" in page["links"]["previous"]
    plain = shared.get("/task")
    assert len(plain) >= 12 if shared.generation == 3 else len(plain["data"]) == 10


def test_names_are_matched_as_sql_like_does(shared: User) -> None:
    shared.create("sleep", "north", seconds=0)
    shared.create("echo", "north")
    assert {t["name"] for t in shared.items("/task", name="SL%p")} == {"sleep"}
    assert {t["name"] for t in shared.items("/task", name="_cho")} == {"echo"}
    assert shared.items("/task", name="cho") == []


def test_a_v3_server_lists_relations_in_full() -> None:
    for sandbox in serve(3):
        account = User(sandbox)
        task = account.create("echo")
        assert [entry["link"] for entry in task["results"]] == ["/api/result/1", "/api/result/2", "/api/result/3"]
        assert (task["complete"], task["children"], task["run_id"]) == (False, None, 1)
        account.wait(task["id"])
        answer = account.get(f"/task/{task['id']}/result")
        assert len(answer) == 3 and set(answer[0]) >= {"input", "result", "log", "status", "node"}
        assert account.ask("GET", f"/task/{task['id']}/status").status_code == 404
        # It looks at no body, so that unknown fields pass and missing ones break it.
        assert account.ask("POST", "/task", json={"x": 1}).status_code == 404


def test_an_old_token_is_refused_and_can_be_refreshed() -> None:
    for sandbox in serve(4, access_seconds=0.3):
        account = User(sandbox)
        assert account.ask("GET", "/organization").status_code == 200
        time.sleep(0.4)
        answer = account.ask("GET", "/organization")
        assert (answer.status_code, answer.json()) == (401, {"msg": "Token has expired"})
        header = {"Authorization": f"Bearer {account.tokens['refresh_token']}"}
        account.tokens = account.ask("POST", "/token/refresh", headers=header).json()
        assert account.ask("GET", "/organization").status_code == 200
        sandbox.switches.signing_key = 2
        answer = account.ask("GET", "/organization")
        assert (answer.status_code, answer.json()) == (422, {"msg": "Signature verification failed"})


def test_five_wrong_passwords_block_an_account(four: Vantage6Sandbox) -> None:
    url = f"{four.ready()['url']}/token/user"
    for password in ["wrong"] * 5 + ["Sandbox-1!"]:
        answer = requests.post(url, json={"username": "north-viewer", "password": password}, timeout=10)
        assert (answer.status_code, answer.json()) == (401, {"msg": "Failed to login"})
    assert "access_token" in User(four, "west-researcher").tokens


def test_the_second_factor_is_enrolled_then_asked_for() -> None:
    for sandbox in serve(4, two_factor=True):
        account = User(sandbox)
        secret = account.tokens["otp_secret"]
        assert account.tokens["qr_uri"].startswith("otpauth://totp/") and secret in account.tokens["qr_uri"]
        assert account.log_in() == {"msg": "Please include your two-factor authentication code"}
        url, body = f"{account.facts['url']}/token/user", {"username": "north-researcher", "password": "Sandbox-1!"}
        code = one_time_code(secret, int(time.time()) // 30)
        assert requests.post(url, json={**body, "mfa_code": int(code)}, timeout=10).status_code == 400
        wrong = requests.post(url, json={**body, "mfa_code": f"{(int(code) + 1) % 10**6:06d}"}, timeout=10)
        assert wrong.status_code == 401
        assert "access_token" in requests.post(url, json={**body, "mfa_code": code}, timeout=10).json()


def test_one_time_codes_are_those_of_the_standard() -> None:
    # RFC 6238, appendix B, for the secret "12345678901234567890".
    secret = base64.b32encode(b"12345678901234567890").decode()
    assert [one_time_code(secret, t // 30) for t in (59, 1111111109, 20000000000)] == ["287082", "081804", "353130"]


def test_a_forgotten_password_is_reset_by_mail(four: Vantage6Sandbox) -> None:
    url = four.ready()["url"]
    requests.post(f"{url}/recover/lost", json={"username": "north-viewer"}, timeout=10)
    ((username, token),) = four.mails
    weak = requests.post(f"{url}/recover/reset", json={"reset_token": token, "password": "short"}, timeout=10)
    assert username == "north-viewer" and weak.status_code == 400
    body = {"reset_token": token, "password": "Renewed-1!"}
    assert requests.post(f"{url}/recover/reset", json=body, timeout=10).status_code == 200
    again = {"username": "north-viewer", "password": "Renewed-1!"}
    assert requests.post(f"{url}/token/user", json=again, timeout=10).status_code == 200


def test_any_word_deletes_dependents(four: Vantage6Sandbox) -> None:
    root = User(four, "root")
    assert root.ask("DELETE", "/collaboration/1").status_code == 400
    assert root.ask("DELETE", "/collaboration/1", params={"delete_dependents": False}).status_code == 200
    assert [c["id"] for c in root.items("/collaboration")] == [2]
    assert {n["collaboration"]["id"] for n in root.items("/node")} == {2}


def test_a_dropped_answer_leaves_one_task(four: Vantage6Sandbox) -> None:
    account = User(four)
    four.faults.add(Fault(method="POST", path="/api/task$", calls=[1], drop="after"))
    with pytest.raises(requests.ConnectionError):
        account.create("echo", "north")
    assert [task["name"] for task in account.items("/task")] == ["echo"]


def test_nodes_are_neither_in_the_journal_nor_hit_by_faults(four: Vantage6Sandbox) -> None:
    account = User(four)
    four.faults.add(Fault(method="PATCH", path="/api/run", status=502))
    assert account.compute("echo", "north") == [{}]
    assert not four.journal.entries(method="PATCH")


@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_the_blob_store_carries_inputs_and_results(collaboration: str) -> None:
    for sandbox in serve(4, blob_store=True):
        account = User(sandbox)
        assert account.get("/blobstream/status") == {"blob_store_enabled": True}
        plain, key = account.payload("echo", {"a": 1}), sandbox.keys["north"].public
        content = base64.b64encode(plain)
        if collaboration == "encrypted":
            *header, body = seal(plain, key).split("$")
            content = "$".join(header).encode() + b"$" + base64.b64decode(body)
        stored = account.ask("POST", "/blobstream", data=content).json()["uuid"]
        task = {"name": "x", "image": CLINICAL, "collaboration_id": 1 + (collaboration == "encrypted")}
        inline = account.ask("POST", "/task", json={**task, "organizations": [{"id": 2, "input": "e30="}]})
        assert inline.status_code == 400
        answer = account.ask("POST", "/task", json={**task, "organizations": [{"id": 2, "input": stored}]})
        assert account.wait(answer.json()["id"]) == "completed"
        (result,) = account.items("/result", task_id=answer.json()["id"])
        assert result["blob_storage_used"] is True
        blob = account.ask("GET", f"/blobstream/{result['result']}").content
        if collaboration == "encrypted":
            blob = base64.b64encode(sandbox.keys["north"].open(blob, blob=True))
        assert json.loads(base64.b64decode(blob)) == {"a": 1}


def test_results_can_be_cleaned_up(four: Vantage6Sandbox) -> None:
    account = User(four)
    task = account.create("echo", "north")["id"]
    account.wait(task)
    four.clean_up(task)
    (result,) = account.items("/result", task_id=task)
    assert result["result"] == "" and result["cleanup_at"]


def test_an_algorithm_store_gives_the_digest(four: Vantage6Sandbox) -> None:
    admin, url = User(four, "north-admin"), four.ready()["store_url"]
    body = {"name": "own", "algorithm_store_url": url, "collaboration_id": 1}
    assert "force" in admin.ask("POST", "/algorithmstore", json=body).json()["msg"]
    store = admin.ask("POST", "/algorithmstore", json={**body, "force": True}).json()
    task = admin.create("echo", "north")
    more = {"name": "x", "image": CLINICAL, "collaboration_id": 1, "store_id": store["id"]}
    more["organizations"] = admin.organizations("echo", {}, ("north",))
    stored = admin.ask("POST", "/task", json=more).json()
    query, login = {"image": CLINICAL}, {"Authorization": f"Bearer {admin.tokens['access_token']}"}
    assert requests.get(f"{url}/algorithm", params=query, timeout=10).status_code == 401
    listed = requests.get(f"{url}/algorithm", params=query, headers=login, timeout=10).json()["data"][0]
    assert (task["image"], stored["image"]) == (CLINICAL, f"{CLINICAL}@{listed['digest']}")
    assert admin.wait(stored["id"]) == "completed"


def test_there_can_be_many_hospitals() -> None:
    for sandbox in serve(4, organizations=25):
        account = User(sandbox)
        account.facts["organizations"] = sandbox.ready()["organizations"]
        names = tuple(account.facts["organizations"])
        task = account.create("partial_average", *names, column="age")["id"]
        assert account.wait(task) == "completed"
        assert account.get("/result", task_id=task)["links"]["last"].endswith("page=3")
        assert sum(part["count"] for part in account.outputs(task)) == 442


def test_a_node_and_its_container_have_rights_of_their_own(four: Vantage6Sandbox) -> None:
    account, url = User(four), four.ready()["url"]
    four.switches.offline = ["north-plain"]
    task = account.create("echo", "north")["id"]
    key = four.ready()["nodes"]["north-plain"]["api_key"]
    login = requests.post(f"{url}/token/node", json={"api_key": key}, timeout=10).json()
    node = {"Authorization": f"Bearer {login['access_token']}"}

    def ask(method: str, path: str, headers: Json, **more: Any) -> requests.Response:
        return requests.request(method, url + path, headers=headers, timeout=10, **more)

    query = {"state": "open", "include": "task", "node_id": login["node_url"].split("/")[-1]}
    (run,) = ask("GET", "/run", node, params=query).json()["data"]
    assert (run["task"]["id"], run["task"]["image"]) == (task, CLINICAL)
    claims = {"task_id": task, "image": CLINICAL}
    container = ask("POST", "/token/container", node, json=claims).json()["container_token"]
    inside = {"Authorization": f"Bearer {container}"}
    assert ask("GET", "/user", inside).status_code == 500
    body: Json = {"name": "s", "collaboration_id": 1, "organizations": [{"id": 3, "input": "e30="}]}
    foreign = ask("POST", "/task", inside, json={**body, "image": "another/image"})
    assert (foreign.status_code, foreign.json()) == (401, {"msg": "Container-token is not valid"})
    subtask = ask("POST", "/task", inside, json={**body, "image": CLINICAL}).json()
    assert subtask["parent"]["id"] == task and subtask["init_user"]["id"] == 2
    # What a report does not mention is emptied.
    ask("PATCH", f"/run/{run['id']}", node, json={"status": "active", "log": "hello"})
    ask("PATCH", f"/run/{run['id']}", node, json={"status": "active"})
    assert account.runs(task)[0]["log"] is None
    ask("PATCH", f"/run/{run['id']}", node, json={"status": "completed", "finished_at": "2026-01-01T00:00:00"})
    late = ask("PATCH", f"/run/{run['id']}", node, json={"log": "late"})
    assert (late.status_code, late.json()["msg"]) == (400, "Cannot update an already finished algorithm run!")


def test_what_is_fixed_cannot_be_switched(four: Vantage6Sandbox) -> None:
    root = four.url
    answer = requests.patch(f"{root}/_sandbox/switches", json={"generation": 5}, timeout=10)
    assert answer.status_code == 422 and four.switches.generation == 4
    with pytest.raises(ValueError, match="frozen"):
        four.switches.generation = 5  # type: ignore[misc]  # that is the test
    changed = requests.patch(f"{root}/_sandbox/switches", json={"offline": ["north-plain"]}, timeout=10)
    assert changed.status_code == 200
    assert not four.nodes["north-plain"].online and four.nodes["south-plain"].online


# -- v5 ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five() -> Iterator[Vantage6Sandbox]:
    yield from serve(5, device_interval=0)


def test_a_session_extracts_preprocesses_and_computes(five: Vantage6Sandbox) -> None:
    account = User(five)
    frame = account.dataframe("encrypted")
    columns = {(c["node_id"], c["name"], c["dtype"]) for c in frame["columns"]}
    assert len(columns) == 33 and {dtype for *_, dtype in columns} == {"double"}
    before = account.compute("partial_average", collaboration="encrypted", column="bmi")
    organizations = account.organizations("", {"column": "bmi", "minimum": 25}, ("north", "south", "west"), "encrypted")
    step = {"image": CLINICAL, "method": "keep_above", "organizations": organizations}
    body = {"dataframe_id": frame["id"], "task": step}
    changed = account.post(f"/session/dataframe/{frame['id']}/preprocess", body)
    assert changed["last_session_task"]["depends_on"] == [frame["last_session_task"]["id"]] and not changed["ready"]
    assert account.wait(changed["last_session_task"]["id"]) == "completed"
    after = account.compute("partial_average", collaboration="encrypted", column="bmi")
    table = pooled(five)
    assert sum(part["count"] for part in before) == 442
    assert sum(part["count"] for part in after) == (table["bmi"] >= 25).sum()


def test_a_failed_extraction_fails_what_depends_on_it(five: Vantage6Sandbox) -> None:
    account = User(five)
    session = account.session()
    five.add_image("slow/one:1", {"read": Algorithm(_slow_failure, "data_extraction"), "clean": algorithms.keep_above})
    organizations = [{"id": 2}]
    step = {"image": "slow/one:1", "method": "read", "organizations": organizations}
    frame = account.post(f"/session/{session['id']}/dataframe", {"label": "default", "task": step})
    body = {"dataframe_id": frame["id"], "task": {**step, "method": "clean"}}
    early = account.ask("POST", f"/session/dataframe/{frame['id']}/preprocess", json=body)
    assert early.status_code == 400 and "not present for the following organizations: 2" in early.text
    assert account.wait(frame["last_session_task"]["id"]) == "failed"
    assert "RuntimeError: no such table" in account.runs(frame["last_session_task"]["id"])[0]["log"]


def _slow_failure(job: Job) -> algorithms.Table:
    job.sleep(0.3)
    raise RuntimeError("no such table")


def test_an_old_token_breaks_routes_that_containers_may_use() -> None:
    for sandbox in serve(5, access_seconds=0.3):
        account = User(sandbox)
        assert account.ask("GET", "/task").status_code == 200
        time.sleep(0.4)
        me, tasks = account.ask("GET", "/user/me"), account.ask("GET", "/task")
        assert (me.status_code, me.json()) == (401, {"msg": "Token has expired"})
        assert (tasks.status_code, tasks.json()) == (500, {"msg": "An unexpected error occurred!"})
        refresh = {"grant_type": "refresh_token", "client_id": "public_client"}
        account.tokens = account.token(refresh_token=account.tokens["refresh_token"], **refresh)
        assert account.ask("GET", "/task").status_code == 200


def test_a_service_account_has_a_secret_and_no_refresh_token(five: Vantage6Sandbox) -> None:
    robot = User(five, "north-robot")
    assert "refresh_token" not in robot.tokens and robot.tokens["refresh_expires_in"] == 0
    assert robot.get("/user/me")["is_service_account"] is True
    root = User(five, "root")
    body = {"username": "south-robot", "is_service_account": True, "organization_id": 3, "roles": [5]}
    secret = root.post("/user", body)["client_secret"]
    form = {"grant_type": "client_credentials", "client_id": "south-robot-user-client"}
    assert "access_token" in root.token(client_secret=secret, **form)
    assert root.token(client_secret="wrong", **form)["error"] == "unauthorized_client"
    (record,) = root.items("/user", username="south-robot")
    assert "client_secret" not in record


def test_a_device_is_logged_in_from_a_browser(five: Vantage6Sandbox) -> None:
    account = User(five)
    root = f"{account.facts['auth_url']}/realms/vantage6"
    configuration = requests.get(f"{root}/.well-known/openid-configuration", timeout=10).json()
    form = {"client_id": "public_client", "scope": "openid"}
    code = requests.post(configuration["device_authorization_endpoint"], data=form, timeout=10).json()
    poll = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "client_id": "public_client"}
    poll["device_code"] = code["device_code"]
    assert account.token(**poll)["error"] == "authorization_pending"
    browser = {"user_code": code["user_code"], "username": "west-researcher", "password": "Sandbox-1!"}
    page = code["verification_uri"]
    assert requests.post(page, data={**browser, "password": "wrong"}, timeout=10).status_code == 401
    assert requests.post(page, data=browser, timeout=10).status_code == 200
    account.tokens = account.token(**poll)
    assert account.get("/user/me")["username"] == "west-researcher"
    assert account.token(**poll)["error"] == "invalid_grant"


def test_keycloak_refuses_as_it_does(five: Vantage6Sandbox) -> None:
    account = User(five)
    password = {"grant_type": "password", "client_id": "public_client", "username": "north-researcher"}
    assert account.token(password="wrong", **password)["error_description"] == "Invalid user credentials"
    refresh = {"grant_type": "refresh_token", "client_id": "public_client"}
    assert account.token(refresh_token="x", **refresh)["error"] == "invalid_grant"
    five.switches.direct_access = False
    assert account.token(password="Sandbox-1!", **password)["error"] == "unauthorized_client"
    five.switches.direct_access = True
    body = {"username": "newcomer", "password": "Renewed-1!", "organization_id": 2, "roles": [5]}
    User(five, "root").post("/user", body)
    first = account.token(**{**password, "username": "newcomer"}, password="Renewed-1!")
    assert first["error_description"] == "Account is not fully set up"


def test_the_command_line_chooses_the_generation() -> None:
    command = [
        sys.executable,
        "-m",
        "prefect_biomed.sandbox",
        "vantage6",
        "--v6",
        "5",
        "--set",
        "vantage6.key_bits=2048",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())["vantage6"]
        assert requests.get(f"{facts['url']}/version", timeout=10).json() == {"version": "5.0.3"}
        process.terminate()
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("generation", [4, 5])
def test_the_same_seed_gives_the_same_secrets(generation: int) -> None:
    def secrets(seed: int) -> Any:
        with Sandbox("vantage6", seed=seed, vantage6={"generation": generation, "key_bits": 2048}) as sandbox:
            facts = sandbox.vantage6.ready()
            return facts["nodes"], facts.get("service_account")

    assert secrets(7) == secrets(7) != secrets(8)
