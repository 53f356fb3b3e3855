"""The sandbox and the real servers answer alike: the same requests to both, answers compared.

Numbers, moments and keys differ, so objects are compared by their keys and kinds of values, and every message to the
letter but for the numbers in it.
"""

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from harness.vantage6_account import Account, until
from harness.vantage6_servers import ENVIRONMENTS, RealServer, server_3, server_4, server_5
from prefect_biomed.sandbox import Sandbox

pytestmark = [pytest.mark.conformance, pytest.mark.timeout(600)]

Json = dict[str, Any]
# What differs for good reasons: random names, texts of roles and rules, logs, results, what a node reports.
_OWN = {"description", "public_key", "log", "lastname", "firstname", "email", "config", "otp_secret", "api_key"}
_OWN |= {"access_token", "refresh_token", "client_secret", "keycloak_id", "keycloak_client_id", "dataframe_name"}


class Conversation:
    """What one server answered, request by request."""

    def __init__(self, facts: Json) -> None:
        self.facts = facts
        self.generation = int(facts["generation"])
        self.answers: dict[str, tuple[int, Json, Any]] = {}
        self._accounts: dict[str, Account] = {}

    def account(self, username: str) -> Account:
        if username not in self._accounts:
            self._accounts[username] = Account(self.facts, username)
        return self._accounts[username]

    def ask(
        self,
        label: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        username: str | None = "north-researcher",
        token: str | None = None,
        **more: Any,
    ) -> Any:
        """Send a request and keep the answer under its label; return its body."""
        if username and token is None:
            token = self.account(username).tokens["access_token"]
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        if body is not None:
            more["json"] = body
        answer = requests.request(method, self.facts["url"] + path, headers=headers, timeout=60, **more)
        kind = answer.headers.get("content-type", "")
        content = answer.json() if "json" in kind else answer.text
        interesting = {
            "content-type": kind.split(";")[0],
            "link": re.sub(r"\d+", "#", answer.headers.get("link", "")),
            "total-count": "total-count" in answer.headers,
            "jwt-token": "jwt-token" in answer.headers,
        }
        assert label not in self.answers, label
        self.answers[label] = (answer.status_code, interesting, content)
        return content


def converse(talk: Conversation) -> None:
    """Ask a server everything that a client asks it, and what it must not ask."""
    ask, generation, facts = talk.ask, talk.generation, talk.facts
    plain, encrypted = (facts["collaborations"][kind]["id"] for kind in ("plain", "encrypted"))
    north, south, west = (facts["organizations"][name]["id"] for name in ("north", "south", "west"))
    me = facts["users"]["north-researcher"]["id"]
    stamp = str(time.time_ns())
    _log_ins(talk, me)
    _lists(talk, plain, north, me)
    _records(talk, plain, north, me)
    talk.account("north-researcher")
    _tasks(talk, plain, encrypted, north, west)
    _administration(talk, plain, north, south, stamp)
    if generation == 5:
        _sessions(talk, plain, north, stamp)
    ask("version", "GET", "/version", username=None)
    ask("health", "GET", "/health", username=None)
    ask("no such route", "GET", "/nosuch")
    ask("no such method", "DELETE", "/task")


def _log_ins(talk: Conversation, me: int) -> None:
    ask = talk.ask
    for label, path in (("one user", f"/user/{me}"), ("tasks", "/task"), ("organizations", "/organization")):
        ask(f"{label} without token", "GET", path, username=None)
        for number, token in enumerate(("", "abc", "a.b.c")):
            ask(f"{label} with broken token {number}", "GET", path, username=None, token=token)
    ask("password log-in", "POST", "/token/user", {"username": "nobody", "password": "x"}, username=None)
    if talk.generation == 5:
        ask("me", "GET", "/user/me")
        ask("me with permissions", "GET", "/user/me?include_permissions=1")
        ask("node route as user", "GET", "/node/me")
        ask("service account", "GET", "/user/me", username="north-robot")
        return
    tokens = talk.account("north-researcher").tokens
    ask("log-in", "POST", "/token/user", _login(talk, "west-researcher"), username=None)
    ask("log-in as number", "POST", "/token/user", {"username": 1, "password": "x"}, username=None)
    ask("refresh", "POST", "/token/refresh", username=None, token=tokens["refresh_token"])
    ask("refresh with access token", "POST", "/token/refresh")
    ask("access with refresh token", "GET", "/task", token=tokens["refresh_token"])
    ask("node log-in without a key", "POST", "/token/node", {}, username=None)
    if talk.generation == 4:
        ask("log-in without body", "POST", "/token/user", username=None)
        ask("node log-in with no uuid", "POST", "/token/node", {"api_key": "x"}, username=None)
        ask("validate", "POST", "/token/user/validate")
    unknown = {"api_key": "00000000-0000-4000-8000-000000000000"}
    ask("node log-in with unknown key", "POST", "/token/node", unknown, username=None)
    node = ask(
        "node log-in", "POST", "/token/node", {"api_key": talk.facts["nodes"]["north-plain"]["api_key"]}, username=None
    )
    ask("user route as node", "GET", "/user", token=node["access_token"])
    ask("own node", "GET", f"/node/{node['node_url'].split('/')[-1]}", token=node["access_token"])


def _login(talk: Conversation, username: str) -> Json:
    return {"username": username, "password": talk.facts["users"][username]["password"]}


def _lists(talk: Conversation, plain: int, north: int, me: int) -> None:
    ask, generation = talk.ask, talk.generation
    paths = {
        "organizations": "/organization",
        "a page of organizations": "/organization?page=1&per_page=2",
        "a page beyond": "/organization?page=9&per_page=2",
        "metadata": "/organization?include=metadata",
        "collaborations": "/collaboration",
        "collaborations with organizations": "/collaboration?include=organizations",
        "encrypted collaborations": "/collaboration?encrypted=1",
        "nodes": "/node",
        "nodes online": "/node?status=online",
        "roles": "/role?per_page=3&page=1",
        "rules": "/rule?per_page=3&page=1",
        "users": "/user",
        "users of the own organization": f"/user?organization_id={north}",
        "tasks": "/task",
        "results of no task": "/result?task_id=99999",
    }
    if generation > 3:
        paths |= {
            "page 0": "/organization?page=0",
            "no page": "/organization?page=abc",
            "sorted": "/organization?sort=-name",
            "sorted by nothing": "/organization?sort=nothing",
            "organizations of a collaboration": f"/organization?collaboration_id={plain}",
            "nodes of a collaboration": f"/node?collaboration_id={plain}&per_page=100",
            "studies": "/study",
            "stores": "/algorithmstore",
            "blob store": "/blobstream/status",
            "runs of no task": "/run?task_id=99999",
            "tasks by status": "/task?status=completed",
            "tasks by run": "/task?run_id=1",
            "tasks of a user": f"/task?init_user_id={me}",
            "tasks of no user": "/task?init_user_id=99999",
            "tasks of no job": "/task?job_id=99999",
            "tasks of no store": "/task?store_id=99999",
            "rules without pages": "/rule?no_pagination=1",
            "users of another organization": f"/user?organization_id={north + 1}",
        }
    if generation == 5:
        paths |= {"sessions": "/session", "own rules": "/rule?current_user=1"}
    for label, path in paths.items():
        ask(f"list {label}", "GET", path)


def _records(talk: Conversation, plain: int, north: int, me: int) -> None:
    node = talk.facts["nodes"]["north-plain"]["id"]
    kinds = {"user": me, "organization": north, "collaboration": plain, "node": node, "role": 5, "rule": 1}
    if talk.generation > 3:
        kinds |= {"study": 1}
    for kind, identifier in kinds.items():
        talk.ask(f"one {kind}", "GET", f"/{kind}/{identifier}")
        talk.ask(f"no such {kind}", "GET", f"/{kind}/99999")
    missing = ["task", "result", *(["run", "algorithmstore"] if talk.generation > 3 else [])]
    missing += ["session", "session/dataframe"] if talk.generation == 5 else []
    for kind in missing:
        talk.ask(f"no such {kind}", "GET", f"/{kind}/99999")
    if talk.generation > 3:
        talk.ask("no such status", "GET", "/task/99999/status")
        talk.ask("collaboration with organizations", "GET", f"/collaboration/{plain}?include=organizations")


def _tasks(talk: Conversation, plain: int, encrypted: int, north: int, west: int) -> None:
    ask, account, generation = talk.ask, talk.account("north-researcher"), talk.generation
    good = account.body("echo", ("north",), {"a": 1})
    entry = good["organizations"][0]
    cases: dict[str, Json] = {
        "no such collaboration": {**good, "collaboration_id": 99999},
        "organization outside": {**good, "organizations": [{**entry, "id": 1}]},
        "organization twice": {**good, "organizations": [entry, entry]},
    }
    if generation > 3:
        unreadable = base64.b64encode(bytes(range(200, 255))).decode()
        cases |= {
            "numeric name": {**good, "name": "123"},
            "empty name": {**good, "name": ""},
            "long name": {**good, "name": "x" * 200},
            "long description": {**good, "description": "x" * 2000},
            "no image": {k: v for k, v in good.items() if k != "image"},
            "empty image": {**good, "image": ""},
            "no organizations": {**good, "organizations": []},
            "organizations without id": {**good, "organizations": [{}]},
            "organizations as text": {**good, "organizations": "north"},
            "neither collaboration nor study": {k: v for k, v in good.items() if k != "collaboration_id"},
            "unknown field": {**good, "colour": "red"},
            "unknown store": {**good, "store_id": 99999},
            "unknown study": {**good, "study_id": 99999},
            "outside the study": {**good, "study_id": 1, "organizations": [{**entry, "id": west}]},
            "unreadable input": {**good, "organizations": [{**entry, account.input_key: unreadable}]},
            "collaboration as text": {**good, "collaboration_id": "plain"},
        }
        if generation == 4:
            cases |= {
                "readable input, encrypted": {**good, "collaboration_id": encrypted},
                "no input": {**good, "organizations": [{"id": north}]},
                "databases as text": {**good, "databases": "default"},
                "database without label": {**good, "databases": [{}]},
                "database with a query that is a list": {**good, "databases": [{"label": "default", "query": []}]},
                "preprocessing without function": {
                    **good,
                    "databases": [{"label": "default", "preprocessing": [{}]}],
                },
            }
        else:
            cases |= {
                "no method": {k: v for k, v in good.items() if k != "method"},
                "no action": {k: v for k, v in good.items() if k != "action"},
                "extraction": {**good, "action": "data_extraction"},
                "preprocessing": {**good, "action": "preprocessing"},
                "unknown action": {**good, "action": "dance"},
                "no session": {k: v for k, v in good.items() if k != "session_id"},
                "no such session": {**good, "session_id": 99999},
                "no such dataframe": {**good, "databases": [[{"type": "dataframe", "dataframe_id": 99999}]]},
                "flat databases": {**good, "databases": [{"type": "dataframe", "dataframe_id": 1}]},
                "database without type": {**good, "databases": [[{"dataframe_id": 1}]]},
                "database of an unknown type": {**good, "databases": [[{"type": "table"}]]},
                "dataframe without id": {**good, "databases": [[{"type": "dataframe"}]]},
                "depends on nothing": {**good, "depends_on_ids": [99999]},
            }
    for label, body in cases.items():
        ask(f"task: {label}", "POST", "/task", body)
    ask("task: no JSON", "POST", "/task", data=b"x")
    ask("task: viewer", "POST", "/task", good, username="north-viewer")
    ask("task: steward", "POST", "/task", {**good, "organizations": [entry]}, username="south-steward")

    task = ask("new task", "POST", "/task", good)["id"]
    account.wait(task)
    _work(talk, "completed", task)
    crash = ask("new crashing task", "POST", "/task", account.body("crash", ("north",)))["id"]
    account.wait(crash)
    _work(talk, "crashed", crash)
    central = ask("new central task", "POST", "/task", account.body("central_average", ("north",), {"column": "bmi"}))[
        "id"
    ]
    account.wait(central)
    _work(talk, "central", central)
    (subtask,) = account.items("/task", parent_id=central)
    _work(talk, "subtask", subtask["id"])
    ask("list some tasks", "GET", "/task")
    ask("list a page of some tasks", "GET", "/task?page=2&per_page=1")
    ask("list organizations that have worked", "GET", "/organization")
    ask("list collaborations that have worked", "GET", "/collaboration")
    ask("a user who has worked", "GET", f"/user/{talk.facts['users']['north-researcher']['id']}")
    if generation > 3:
        run = account.runs(task)[0]["id"]
        ask("list tasks of a run", "GET", f"/task?run_id={run}")
        ask("list runs of a user", "GET", f"/run?task_id={task}&state=completed")
    sleeping = account.create("sleep", "north", seconds=60)["id"]
    until(lambda: account.runs(sleeping)[0]["status"] == "active")
    _work(talk, "active", sleeping)
    ask("kill as researcher", "POST", "/kill/task", {"id": sleeping})
    ask("kill", "POST", "/kill/task", {"id": sleeping}, username="north-admin")
    _work(talk, "killed", sleeping)
    ask("kill again", "POST", "/kill/task", {"id": sleeping}, username="north-admin")
    ask("kill nothing", "POST", "/kill/task", {"id": 99999}, username="north-admin")
    if generation > 3:
        ask("kill with text", "POST", "/kill/task", {"id": "x"}, username="north-admin")
        ask("kill without id", "POST", "/kill/task", {}, username="north-admin")
    ask("kill tasks of no node", "POST", "/kill/node/tasks", {"id": 99999}, username="north-admin")
    ask("report as user", "PATCH", f"/{'result' if generation == 3 else 'run'}/1", {"status": "failed"})
    ask("delete as another", "DELETE", f"/task/{crash}", username="west-researcher")
    ask("delete", "DELETE", f"/task/{crash}")
    ask("deleted", "GET", f"/task/{crash}")
    ask("delete nothing", "DELETE", "/task/99999")


def _work(talk: Conversation, state: str, task: int) -> None:
    """Look at a task in every way there is."""
    ask, generation = talk.ask, talk.generation
    ask(f"{state} task", "GET", f"/task/{task}")
    ask(f"{state} task with results", "GET", f"/task/{task}?include=results")
    ask(f"{state} results", "GET", f"/result?task_id={task}")
    if generation == 3:
        ask(f"{state} results below the task", "GET", f"/task/{task}/result")
        ask(f"{state} results with task", "GET", f"/result?task_id={task}&include=task")
        ask(f"{state} result", "GET", f"/result/{talk.answers[f'{state} results'][2][0]['id']}")
        return
    ask(f"{state} status", "GET", f"/task/{task}/status")
    ask(f"{state} task with all", "GET", f"/task/{task}?include=runs,results")
    runs = ask(f"{state} runs", "GET", f"/run?task_id={task}")["data"]
    ask(f"{state} runs with task", "GET", f"/run?task_id={task}&include=task")
    ask(f"{state} run", "GET", f"/run/{runs[0]['id']}")
    ask(f"{state} result", "GET", f"/result/{runs[0]['id']}")
    ask(f"{state} open runs", "GET", f"/run?task_id={task}&state=open")
    ask(f"{state} results for another", "GET", f"/result?task_id={task}", username="west-researcher")


def _administration(talk: Conversation, plain: int, north: int, south: int, stamp: str) -> None:
    generation = talk.generation

    def root(label: str, method: str, path: str, body: Any = None) -> Any:
        return talk.ask(label, method, path, body, username="root")

    name = f"o{stamp}"
    organization = {"name": name, "domain": "d", "address1": "a", "address2": "", "zipcode": "z", "country": "c"}
    ids = [root("new organization", "POST", "/organization", organization)["id"]]
    if generation > 3:
        root("organization again", "POST", "/organization", organization)
        root("organization without name", "POST", "/organization", {})
        root("organization with number", "POST", "/organization", {"name": "12"})
        root("organization with a broken key", "POST", "/organization", {"name": f"k{stamp}", "public_key": "%"})
    talk.ask("organization as researcher", "POST", "/organization", organization)
    root("changed organization", "PATCH", f"/organization/{ids[0]}", {"country": "NL"})
    key = {"public_key": "aGVsbG8="}
    talk.ask("key as researcher", "PATCH", f"/organization/{north}", key)
    if generation > 3:
        root("key of others", "PATCH", f"/organization/{north}", key)
        root("change to null", "PATCH", f"/organization/{ids[0]}", {"country": None})

    collaboration = {"name": f"c{stamp}", "organization_ids": [north, ids[0]], "encrypted": False}
    made = root("new collaboration", "POST", "/collaboration", collaboration)["id"]
    if generation > 3:
        root("collaboration again", "POST", "/collaboration", collaboration)
        wrong = {**collaboration, "organization_ids": [1, 1], "encrypted": "perhaps"}
        root("collaboration with faults", "POST", "/collaboration", wrong)
    talk.ask("collaboration as researcher", "POST", "/collaboration", {**collaboration, "name": f"r{stamp}"})
    root("new member", "POST", f"/collaboration/{made}/organization", {"id": south})
    root("changed collaboration", "PATCH", f"/collaboration/{made}", {"name": f"n{stamp}"})

    node = {"name": f"node{stamp}", "collaboration_id": made, "organization_id": ids[0]}
    node_id = root("new node", "POST", "/node", node)["id"]
    root("node again", "POST", "/node", node)
    root("node outside", "POST", "/node", {**node, "organization_id": 1})
    root("node nowhere", "POST", "/node", {**node, "collaboration_id": 99999})
    talk.ask("node as researcher", "POST", "/node", node)
    root("new key", "POST", "/recover/node", {"id": node_id})
    root("changed node", "PATCH", f"/node/{node_id}", {"name": f"other{stamp}"})

    user = {"username": f"u{stamp}", "password": "Harness-1!", "organization_id": ids[0], "roles": [5], "rules": []}
    if generation < 5:
        user |= {"firstname": "a", "lastname": "b", "email": f"u{stamp}@example.org"}
    user_id = root("new user", "POST", "/user", user)["id"]
    root("user again", "POST", "/user", user)
    if generation > 3:
        root("user with weak password", "POST", "/user", {**user, "username": f"w{stamp}", "password": "weak"})
        root("user without name", "POST", "/user", {})
        root("user with an odd name", "POST", "/user", {**user, "username": "1 x"})
    talk.ask("user as researcher", "POST", "/user", {**user, "username": f"r{stamp}", "email": f"r{stamp}@example.org"})
    if generation == 5:
        root(
            "new service account", "POST", "/user", {"username": f"s{stamp}", "is_service_account": True, "roles": [5]}
        )
        root(
            "service account with password",
            "POST",
            "/user",
            {**user, "username": f"t{stamp}", "is_service_account": True},
        )
    root("changed roles", "PATCH", f"/user/{user_id}", {"roles": [4]})
    root("unknown role", "PATCH", f"/user/{user_id}", {"roles": [99999]})
    root("own roles", "PATCH", "/user/1", {"roles": [4]})

    role = {"name": f"role{stamp}", "description": "d", "rules": [1, 2]}
    role_id = root("new role", "POST", "/role", role)["id"]
    talk.ask("role as researcher", "POST", "/role", role)
    root("new rule of a role", "POST", f"/role/{role_id}/rule/3")
    root("rules of a role", "GET", f"/rule?role_id={role_id}&per_page=100")
    root("rule taken out of a role", "DELETE", f"/role/{role_id}/rule/3")
    root("rules left in a role", "GET", f"/rule?role_id={role_id}&per_page=100")
    root("rule taken out that is not in", "DELETE", f"/role/{role_id}/rule/9")
    root("rules of a role changed", "PATCH", f"/role/{role_id}", {"rules": [2]})
    root("rules of a changed role", "GET", f"/rule?role_id={role_id}&per_page=100")
    root("changed role", "PATCH", f"/role/{role_id}", {"name": f"renamed{stamp}"})
    if generation > 3:
        root("role without rules", "POST", "/role", {"name": "x"})
        root("role with a default name", "POST", "/role", {**role, "name": "Root"})
        root("changed default role", "PATCH", "/role/5", {"name": "x"})
    root("deleted role", "DELETE", f"/role/{role_id}")
    if generation > 3:
        study = {"name": f"study{stamp}", "collaboration_id": made, "organization_ids": [north]}
        study_id = root("new study", "POST", "/study", study)["id"]
        root("study again", "POST", "/study", study)
        root("study outside", "POST", "/study", {**study, "name": f"x{stamp}", "organization_ids": [1]})
        root("new member of a study", "POST", f"/study/{study_id}/organization", {"id": south})
        root("collaboration with dependents", "DELETE", f"/collaboration/{made}")
        root("deleted study", "DELETE", f"/study/{study_id}")
        store = {"name": "s", "algorithm_store_url": "http://localhost:9/x", "collaboration_id": plain}
        talk.ask("store as researcher", "POST", "/algorithmstore", store)
        root("store without name", "POST", "/algorithmstore", {})
    root("deleted user", "DELETE", f"/user/{user_id}")
    root("deleted node", "DELETE", f"/node/{node_id}")
    root("deleted collaboration", "DELETE", f"/collaboration/{made}")
    if generation > 3:
        root("own organization deleted", "DELETE", "/organization/1")
        root("deleted organization", "DELETE", f"/organization/{ids[0]}")
    if generation < 5:
        wrong = {"current_password": "wrong", "new_password": "Renewed-1!"}
        talk.ask("password changed with a wrong one", "PATCH", "/password/change", wrong, username="west-researcher")
        talk.ask("lost password", "POST", "/recover/lost", {"username": "nobody"}, username=None)
    if generation == 4:
        talk.ask("lost password of nobody", "POST", "/recover/lost", {}, username=None)
        talk.ask(
            "reset password", "POST", "/recover/reset", {"reset_token": "x", "password": "Renewed-1!"}, username=None
        )
        extra = {"username": "a", "password": "b", "email": "c"}
        talk.ask("lost second factor with too much", "POST", "/recover/2fa/lost", extra, username=None)


def _sessions(talk: Conversation, plain: int, north: int, stamp: str) -> None:
    ask, account = talk.ask, talk.account("north-researcher")
    body = {"name": f"s{stamp}", "collaboration_id": plain, "scope": "organization"}
    session = ask("new session", "POST", "/session", body)["id"]
    for label, change in {
        "again": {},
        "of the collaboration": {"name": f"t{stamp}", "scope": "collaboration"},
        "of all": {"name": f"t{stamp}", "scope": "global"},
        "nowhere": {"name": f"t{stamp}", "collaboration_id": 99999},
        "in no study": {"name": f"t{stamp}", "study_id": 99999},
        "of nobody": {"name": f"t{stamp}", "colour": "red"},
    }.items():
        ask(f"session {label}", "POST", "/session", {**body, **change})
    ask("changed session", "PATCH", f"/session/{session}", {"name": f"r{stamp}"})
    step = {"image": "prefect-biomed/clinical:1.0", "method": "read_csv", "organizations": [{"id": north}]}
    path = f"/session/{session}/dataframe"
    frame_body = {"label": "default", "name": f"f{stamp}", "task": step}
    frame = ask("new dataframe", "POST", path, frame_body)
    for label, change in {
        "again": {},
        "with an odd name": {"name": "a b"},
        "of an unknown label": {"name": f"g{stamp}", "label": "nolabel"},
        "without task": {"name": f"g{stamp}", "task": {}},
        "without organizations": {"name": f"g{stamp}", "task": {**step, "organizations": []}},
    }.items():
        ask(f"dataframe {label}", "POST", path, {**frame_body, **change})
    ask("dataframe nowhere", "POST", "/session/99999/dataframe", frame_body)
    account.wait(frame["last_session_task"]["id"])
    identifier = frame["id"]
    ask("ready dataframe", "GET", f"/session/dataframe/{identifier}")
    ask("dataframes", "GET", path)
    ask("ready session", "GET", f"/session/{session}")
    ask("session for another", "GET", f"/session/{session}", username="west-researcher")
    _work(talk, "extraction", frame["last_session_task"]["id"])
    arguments = base64.b64encode(json.dumps({"column": "bmi", "minimum": 25}).encode()).decode()
    change = {**step, "method": "keep_above", "organizations": [{"id": north, "arguments": arguments}]}
    changed = ask(
        "preprocessing",
        "POST",
        f"/session/dataframe/{identifier}/preprocess",
        {"dataframe_id": identifier, "task": change},
    )
    account.wait(changed["last_session_task"]["id"])
    _work(talk, "preprocessing", changed["last_session_task"]["id"])
    ask("preprocessing of nothing", "POST", "/session/dataframe/99999/preprocess", {"dataframe_id": 1, "task": change})
    ask(
        "preprocessing without task",
        "POST",
        f"/session/dataframe/{identifier}/preprocess",
        {"dataframe_id": identifier},
    )
    ask("delete the last step", "DELETE", f"/task/{changed['last_session_task']['id']}")
    ask("session with dependents", "DELETE", f"/session/{session}")
    ask("deleted dataframe", "DELETE", f"/session/dataframe/{identifier}")
    ask("deleted session", "DELETE", f"/session/{session}?delete_dependents=True")


# -- comparison --------------------------------------------------------------------------------------


def differences(real: Any, ours: Any, place: str = "") -> Iterator[str]:
    """Tell where two answers differ in more than numbers, moments and keys."""
    key = place.rpartition(".")[2]
    if key in _OWN and type(real) is type(ours):
        return
    if isinstance(real, dict) and isinstance(ours, dict):
        for name in sorted(real.keys() ^ ours.keys()):
            yield f"{place}.{name}: only {'the real server' if name in real else 'the sandbox'} has it"
        for name in sorted(real.keys() & ours.keys()):
            yield from differences(real[name], ours[name], f"{place}.{name}")
    elif isinstance(real, list) and isinstance(ours, list):
        if bool(real) != bool(ours):
            yield f"{place}: {len(real)} entries, not {len(ours)}"
        if key == "methods":
            if set(real) != set(ours):
                yield f"{place}: {sorted(real)}, not {sorted(ours)}"
        elif real and ours:
            yield from differences(real[0], ours[0], f"{place}.{0 if isinstance(real[0], list) else key or 'entry'}")
    elif isinstance(real, str) and isinstance(ours, str):
        if key == "result" and bool(real) == bool(ours):
            return
        if _plain(real) != _plain(ours):
            yield f"{place}: {real!r}, not {ours!r}"
    elif isinstance(real, bool) and isinstance(ours, bool):
        if real is not ours:
            yield f"{place}: {real}, not {ours}"
    elif type(real) is not type(ours):
        yield f"{place}: {real!r}, not {ours!r}"


def _plain(text: str) -> str:
    """Return a text without what is of no account, its letters in order, because sets are printed in any order."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+", "<moment>", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uuid>", text)
    # The real servers list organizations and users by other names than the sandbox, and nodes in another order.
    text = re.sub(r"(north|south|west)-(plain|encrypted)", "<node>", text)
    text = re.sub(r"\d+", "#", text)
    return "".join(sorted(text))


@pytest.fixture(params=[3, 4, 5])
def new_server(request: pytest.FixtureRequest, official_environment: Any, tmp_path: Path) -> Iterator[RealServer]:
    """A real server of its own, because lists tell what other tests have done."""
    start = {3: server_3, 4: server_4, 5: server_5}[request.param]
    with start(official_environment(*ENVIRONMENTS[request.param]), tmp_path) as server:
        yield server


def test_the_sandbox_answers_as_the_real_server(new_server: RealServer) -> None:
    real = Conversation(new_server.facts)
    converse(real)
    with Sandbox("vantage6", vantage6={"generation": real.generation, "key_bits": 2048}) as sandbox:
        ours = Conversation(sandbox.vantage6.ready())
        converse(ours)
    assert list(real.answers) == list(ours.answers)
    found = {}
    for label, (status, headers, body) in real.answers.items():
        our_status, our_headers, our_body = ours.answers[label]
        wrong = [f"status {status}, not {our_status}: {body} / {our_body}"] * (status != our_status)
        wrong += [
            f"{name}: {value!r}, not {our_headers[name]!r}"
            for name, value in headers.items()
            if value != our_headers[name]
        ]
        wrong += differences(body, our_body)
        if wrong:
            found[label] = wrong
    assert found == {}, json.dumps(found, indent=1)
