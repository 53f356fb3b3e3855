"""One user of a vantage6 server, by bare HTTP: the sandbox's or a real one, of any generation."""

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from prefect_biomed.sandbox.vantage6 import CLINICAL
from prefect_biomed.sandbox.vantage6._encryption import KeyPair, seal

Json = dict[str, Any]
OPEN_STATES = {"pending", "initializing", "active"}
HOSPITALS = ("north", "south", "west")


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something to come true."""
    deadline, pause = time.monotonic() + seconds, 0.02
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(pause)
        # A real server has something else to do.
        pause = min(pause * 1.3, 0.3)


class Account:
    """A user who is logged in.

    Args:
        facts: what the ready line of the sandbox says; the harness of the real servers says the same.
        username: one of the users there.
    """

    def __init__(self, facts: Json, username: str = "north-researcher") -> None:
        self.facts = facts
        self.generation = int(facts["generation"])
        self.username = username
        self._frames: dict[tuple[str, str], Json] = {}
        self.tokens = self.log_in()

    def log_in(self) -> Json:
        """Return the tokens, or what the server says in place of them."""
        robot = self.facts.get("service_account", {})
        if self.username == robot.get("username"):
            form = {"grant_type": "client_credentials", "client_id": robot["client_id"]}
            return self.token(client_secret=robot["client_secret"], **form)
        password = self.facts["users"][self.username]["password"]
        if self.generation == 5:
            form = {"grant_type": "password", "client_id": self.facts["client"], "username": self.username}
            return self.token(password=password, **form)
        body = {"username": self.username, "password": password}
        return dict(requests.post(f"{self.facts['url']}/token/user", json=body, timeout=10).json())

    def token(self, **form: str) -> Json:
        """Ask Keycloak for tokens."""
        path = f"/realms/{self.facts['realm']}/protocol/openid-connect/token"
        return dict(requests.post(self.facts["auth_url"] + path, data=form, timeout=10).json())

    def ask(self, method: str, path: str, **more: Any) -> requests.Response:
        """Send a request with the access token."""
        headers = {"Authorization": f"Bearer {self.tokens['access_token']}", **more.pop("headers", {})}
        return requests.request(method, self.facts["url"] + path, headers=headers, timeout=30, **more)

    def get(self, path: str, **query: Any) -> Any:
        """Return the body of a GET that succeeds."""
        answer = self.ask("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Json, status: int = 201) -> Any:
        """Return the body of a POST that succeeds."""
        answer = self.ask("POST", path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def items(self, path: str, **query: Any) -> list[Json]:
        """Return the entries of a list, at most 100."""
        found = self.get(path, **query) if self.generation == 3 else self.get(path, per_page=100, **query)["data"]
        return list(found)

    # -- tasks -----------------------------------------------------------------------------------------

    @property
    def input_key(self) -> str:
        """What the generation calls the input of an organization."""
        return "arguments" if self.generation == 5 else "input"

    def payload(self, method: str, arguments: Json) -> bytes:
        """Return the plain input for a method."""
        if self.generation == 5:
            return json.dumps(arguments).encode()
        asked: Json = {"method": method, "kwargs": arguments}
        if self.generation == 4:
            return json.dumps(asked).encode()
        asked |= {"master": method.startswith("central"), "output_format": "json"}
        return b"json." + json.dumps(asked).encode()

    def organizations(
        self, method: str, arguments: Json, names: tuple[str, ...], collaboration: str = "plain"
    ) -> list[Json]:
        """Return the organizations of a task with the input of each, encrypted where that is wanted."""
        plain = self.payload(method, arguments)
        entries = []
        for name in names:
            identifier = self.facts["organizations"][name]["id"]
            text = base64.b64encode(plain).decode()
            if self.facts["collaborations"][collaboration]["encrypted"]:
                text = seal(plain, self.get(f"/organization/{identifier}")["public_key"])
            entries.append({"id": identifier, self.input_key: text})
        return entries

    def body(
        self,
        method: str,
        names: tuple[str, ...] = HOSPITALS,
        arguments: Json | None = None,
        collaboration: str = "plain",
        image: str = CLINICAL,
        database: str = "default",
    ) -> Json:
        """Return the body of a POST of a task; of v5 with a dataframe of the database, made when needed."""
        body: Json = {
            "name": method,
            "image": image,
            "collaboration_id": self.facts["collaborations"][collaboration]["id"],
            "organizations": self.organizations(method, arguments or {}, names, collaboration),
        }
        if self.generation == 3:
            return {**body, "database": database}
        if self.generation == 4:
            return {**body, "databases": [{"label": database}]}
        frame = self.dataframe(collaboration, database)
        return {
            **body,
            "method": method,
            "action": "central_compute" if method.startswith("central") else "federated_compute",
            "session_id": frame["session"]["id"],
            "databases": [[{"type": "dataframe", "dataframe_id": frame["id"]}]],
        }

    def create(self, method: str, *names: str, **options: Any) -> Json:
        """Create a task at organizations, all three when none is named, with keyword arguments of the method."""
        own = {k: options.pop(k) for k in ("collaboration", "image", "database") if k in options}
        return dict(self.post("/task", self.body(method, names or HOSPITALS, options, **own)))

    def session(self, collaboration: str = "plain", name: str | None = None) -> Json:
        """Create a session (v5)."""
        identifier = self.facts["collaborations"][collaboration]["id"]
        return dict(self.post("/session", {"name": name, "collaboration_id": identifier, "scope": "organization"}))

    def dataframe(self, collaboration: str = "plain", label: str = "default") -> Json:
        """Return a dataframe with all of a database at all three hospitals, made once (v5)."""
        key = (collaboration, label)
        if key not in self._frames:
            session = self.session(collaboration)
            step = {
                "image": CLINICAL,
                "method": "read_csv",
                "organizations": self.organizations("read_csv", {}, HOSPITALS, collaboration),
            }
            frame = self.post(f"/session/{session['id']}/dataframe", {"label": label, "task": step})
            self.wait(frame["last_session_task"]["id"])
            self._frames[key] = self.get(f"/session/dataframe/{frame['id']}")
            assert self._frames[key]["ready"], self.runs(frame["last_session_task"]["id"])
        return self._frames[key]

    def runs(self, task: int) -> list[Json]:
        """Return the runs of a task, oldest first."""
        path = "/result" if self.generation == 3 else "/run"
        return sorted(self.items(path, task_id=task), key=lambda run: int(run["id"]))

    def wait(self, task: int, seconds: float = 60.0) -> str:
        """Wait until all runs have ended and return the state of the task."""
        until(lambda: not OPEN_STATES & {run["status"] for run in self.runs(task)}, seconds)
        return str(self.get(f"/task/{task}")["status"])

    def outputs(self, task: int) -> list[Any]:
        """Return what the runs of a task put out, oldest first, decrypted with the key of the own organization."""
        own = self.facts["users"].get(self.username, {"organization": "north"})["organization"]
        key = KeyPair.from_pem(Path(self.facts["organizations"][own]["private_key"]).read_bytes())
        found = []
        for result in sorted(self.items("/result", task_id=task), key=lambda r: int(r["id"])):
            text = result["result"]
            plain = key.open(text.encode()) if "$" in text else base64.b64decode(text)
            found.append(json.loads(plain.removeprefix(b"json.")))
        return found

    def compute(self, method: str, *names: str, **options: Any) -> list[Any]:
        """Create a task, wait for it, and return what its runs put out."""
        task = self.create(method, *names, **options)["id"]
        assert self.wait(task) == "completed", self.runs(task)
        return self.outputs(task)
