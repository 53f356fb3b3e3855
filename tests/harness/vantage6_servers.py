"""The real vantage6 servers on loopback, without Docker, seeded and with nodes that compute.

`server_3`, `server_4` and `server_5` are context managers. Each starts the published server in a
process of its own, in an environment made for it, over SQLite, and fills it over its REST API with
what the sandbox is seeded with: three hospitals, their users, a plain and an encrypted
collaboration, a study. The nodes are those of the sandbox; they use the server's REST API and events
as the real node does. `facts` has the keys of the sandbox's ready line, so that whatever works with
one works with the other.
"""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import requests
import uvicorn
from fastapi import FastAPI

from harness.vantage6_events import PollingChannel
from prefect_biomed.sandbox.vantage6 import _keycloak
from prefect_biomed.sandbox.vantage6._cohorts import split
from prefect_biomed.sandbox.vantage6._encryption import KeyPair
from prefect_biomed.sandbox.vantage6._http import build
from prefect_biomed.sandbox.vantage6._keycloak import PUBLIC_CLIENT, Realm
from prefect_biomed.sandbox.vantage6._records import Registry
from prefect_biomed.sandbox.vantage6.algorithms import Image, clinical
from prefect_biomed.sandbox.vantage6.nodes import ComputeNode, NodeSettings

__all__ = ["ENVIRONMENTS", "RealServer", "server_3", "server_4", "server_5"]

Json = dict[str, Any]
PASSWORD = "Harness-1!"
HOSPITALS = ("north", "south", "west")
PROCESSES = Path(__file__).parent / "vantage6_processes"
_STARTS_WITHIN_SECONDS = 120
_ADMIN = "root"

# name, requirements and interpreter of the environment of each generation, for `official_environment`
ENVIRONMENTS: dict[int, tuple[str, Sequence[str], str]] = {
    3: (
        "vantage6-server-3",
        [
            "vantage6-server==3.11.1",
            "vantage6-client==3.11.1",
            "setuptools>=78,<81",
            # Later ones hand a reason to handlers of disconnection, which that server's does not take.
            "flask-socketio<5.5",
            "python-socketio<5.12",
        ],
        "3.10",
    ),
    4: (
        "vantage6-server-4",
        [
            *(f"{name}==4.15.2" for name in ("vantage6", "vantage6-common", "vantage6-backend-common")),
            *(f"{name}==4.15.2" for name in ("vantage6-server", "vantage6-client", "vantage6-node")),
            "vantage6-algorithm-tools==4.15.2",
            "websocket-client",
            "gevent-websocket",
        ],
        "3.10",
    ),
    5: (
        "vantage6-hq-5",
        [
            *(f"{name}==5.0.3" for name in ("vantage6", "vantage6-common", "vantage6-backend-common")),
            *(f"{name}==5.0.3" for name in ("vantage6-hq", "vantage6-client")),
        ],
        "3.13",
    ),
}


@dataclass
class RealServer:
    """A running server.

    Attributes:
        generation: 3, 4 or 5.
        facts: as `Vantage6Sandbox.ready` says it: URL, users, organizations, collaborations, nodes.
        nodes: by name; `start()` and `stop()` of one take it online and offline.
        keys: key pair of each organization.
        cohorts: CSV file of each database label, by organization.
        images: the algorithms the nodes have; may be added to.
        log: file with what the server printed.
        keycloak: of v5; `access_seconds` of it is the life of the tokens given out from now on.
    """

    generation: int
    facts: Json
    nodes: dict[str, ComputeNode]
    keys: dict[str, KeyPair]
    cohorts: dict[str, dict[str, Path]]
    images: dict[str, Image]
    log: Path
    keycloak: "Keycloak | None" = None

    def ready(self) -> Json:
        """Return the facts."""
        return self.facts


@contextmanager
def server_3(interpreter: Path, folder: Path, **options: Any) -> Iterator[RealServer]:
    """Run vantage6-server 3.11.1; see `server_4`."""
    with _served(3, interpreter, folder, **options) as server:
        yield server


@contextmanager
def server_4(interpreter: Path, folder: Path, **options: Any) -> Iterator[RealServer]:
    """Run vantage6-server 4.15.2.

    Args:
        interpreter: of the environment `ENVIRONMENTS[4]`.
        folder: empty, for database, logs, keys and cohorts.
        **options: `access_seconds`, `refresh_seconds`: life of tokens, in place of the server's own;
            `key_bits`: of the organizations' keys; `settings`: added to the server's configuration.
    """
    with _served(4, interpreter, folder, **options) as server:
        yield server


@contextmanager
def server_5(interpreter: Path, folder: Path, **options: Any) -> Iterator[RealServer]:
    """Run vantage6-hq 5.0.3 beside the sandbox's Keycloak; see `server_4`."""
    with _served(5, interpreter, folder, **options) as server:
        yield server


@contextmanager
def _served(
    generation: int,
    interpreter: Path,
    folder: Path,
    *,
    access_seconds: float | None = None,
    refresh_seconds: float | None = None,
    key_bits: int = 4096,
    settings: Json | None = None,
) -> Iterator[RealServer]:
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    root = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        environment: dict[str, str] = {}
        keycloak = None
        if generation == 5:
            keycloak = stack.enter_context(_keycloak_served(access_seconds or 300.0, refresh_seconds or 1800.0))
            environment = {
                # With a slash at the end the server does not find the realm.
                "KEYCLOAK_URL": keycloak.realm.url,
                "KEYCLOAK_REALM": keycloak.realm.name,
                "KEYCLOAK_ADMIN_USERNAME": _ADMIN,
                "KEYCLOAK_ADMIN_PASSWORD": PASSWORD,
                "KEYCLOAK_ADMIN_CLIENT": "backend-admin-client",
                "KEYCLOAK_ADMIN_CLIENT_SECRET": keycloak.admin_secret,
            }
        options = {"port": port, "directory": str(folder), "settings": settings or {}}
        options |= {"access_seconds": access_seconds, "refresh_seconds": refresh_seconds}
        log = folder / "output.txt"
        stack.enter_context(_process(interpreter, PROCESSES / f"server_{generation}.py", options, environment, log))
        prefix = "/hq" if generation == 5 else "/api"
        _wait_until_it_answers(f"{root}{prefix}/version", log)
        server = _Seed(generation, root, prefix, folder, key_bits, keycloak).server(log)
        stack.callback(lambda: [node.close() for node in server.nodes.values()])
        for node in server.nodes.values():
            node.start()
        yield server


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _process(
    interpreter: Path, script: Path, options: Json, environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    home = log.parent / "home"
    home.mkdir(exist_ok=True)
    # The package keeps logs below the user's own folders.
    places = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "DATA", "CACHE", "STATE")}
    whole = {"PATH": os.environ["PATH"], "HOME": str(home), **places, **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(interpreter), str(script), json.dumps(options)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=whole,
            cwd=log.parent,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_answers(url: str, log: Path) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN_SECONDS
    while time.monotonic() < deadline:
        try:
            if requests.get(url, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer; the server said:\n{log.read_text(errors='replace')[-3000:]}")


# -- Keycloak --------------------------------------------------------------------------------------


class Keycloak:
    """The sandbox's Keycloak beside a real server.

    Args:
        access_seconds: life of access tokens; the server forgives ten seconds more.
        refresh_seconds: life of refresh tokens.
    """

    def __init__(self, access_seconds: float, refresh_seconds: float) -> None:
        self.access_seconds = access_seconds
        self.refresh_seconds = refresh_seconds
        self.realm = Realm("vantage6", lambda: self.access_seconds, lambda: self.refresh_seconds)
        self.realm.add_user(_ADMIN, PASSWORD)
        self.admin_secret = self.realm.add_client("backend-admin-client", "user").secret
        # The routes want its lock.
        self.registry = Registry(5)


@contextmanager
def _keycloak_served(access_seconds: float, refresh_seconds: float) -> Iterator[Keycloak]:
    keycloak = Keycloak(access_seconds, refresh_seconds)
    realm = keycloak.realm
    app = FastAPI(openapi_url=None)
    build(keycloak, app, "", [_keycloak.routes])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        realm.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield keycloak
        finally:
            server.should_exit = True
            thread.join()


# -- seed ------------------------------------------------------------------------------------------


class _Seed:
    """Fills an empty server over REST, as its first administrator."""

    def __init__(
        self, generation: int, root: str, prefix: str, folder: Path, key_bits: int, keycloak: Keycloak | None
    ) -> None:
        self._generation = generation
        self._root = root
        self._url = root + prefix
        self._folder = folder
        self._keycloak = keycloak
        self._keys = {name: KeyPair.generate(key_bits) for name in HOSPITALS}
        self._token = self._log_in()

    def _log_in(self) -> str:
        if self._keycloak is not None:
            form = {"grant_type": "password", "client_id": PUBLIC_CLIENT, "username": _ADMIN, "password": PASSWORD}
            tokens, _ = self._keycloak.realm.grant(form)
            return str(tokens["access_token"])
        body = {"username": "root", "password": "root"}
        return str(requests.post(f"{self._url}/token/user", json=body, timeout=30).json()["access_token"])

    def _ask(self, method: str, path: str, body: Json | None = None) -> Any:
        for _ in range(2):
            headers = {"Authorization": f"Bearer {self._token}"}
            answer = requests.request(method, self._url + path, json=body, headers=headers, timeout=60)
            if answer.status_code != 401:
                break
            # Where tokens are made to live for seconds only.
            self._token = self._log_in()
        assert answer.status_code in (200, 201), f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def server(self, log: Path) -> RealServer:
        """Create everything and return the server, its nodes not yet started."""
        organizations = {name: self._organization(name) for name in HOSPITALS}
        roles = self._roles()
        people = {f"{name}-researcher": (name, "Researcher") for name in HOSPITALS}
        people |= {"north-admin": ("north", "Collaboration Admin"), "north-viewer": ("north", "Viewer")}
        people |= {"south-steward": ("south", "Organization Admin")}
        users = {_ADMIN: {"id": 1, "password": PASSWORD, "organization": "root", "roles": ["Root"]}}
        for username, (organization, role) in people.items():
            record = self._user(username, organizations[organization]["id"], roles[role])
            users[username] = {
                "id": record["id"],
                "password": PASSWORD,
                "organization": organization,
                "roles": [role],
            }
        facts: Json = {
            "url": self._url,
            "generation": self._generation,
            "version": requests.get(f"{self._url}/version", timeout=10).json()["version"],
            "users": users,
            "organizations": organizations,
            "collaborations": {},
            "nodes": {},
            "images": {clinical.name: sorted(clinical.algorithms)},
        }
        if self._generation < 5:
            users[_ADMIN]["password"] = "root"
        cohorts = split(self._folder / "cohorts", HOSPITALS)
        facts["databases"] = sorted({label for files in cohorts.values() for label in files})
        images = {clinical.name: clinical}
        nodes: dict[str, ComputeNode] = {}
        for kind in ("plain", "encrypted"):
            ids = [organization["id"] for organization in organizations.values()]
            body = {"name": kind, "organization_ids": ids, "encrypted": kind == "encrypted"}
            place = self._ask("POST", "/collaboration", body)
            facts["collaborations"][kind] = {"id": place["id"], "encrypted": kind == "encrypted"}
            for name in HOSPITALS:
                node = f"{name}-{kind}"
                body = {"name": node, "collaboration_id": place["id"], "organization_id": organizations[name]["id"]}
                record = self._ask("POST", "/node", body)
                facts["nodes"][node] = {"id": record["id"], "api_key": record["api_key"]}
                nodes[node] = self._node(node, record["api_key"], cohorts[name], images, self._keys[name])
        if self._generation > 3:
            ids = [organizations[name]["id"] for name in ("north", "south")]
            place_id = facts["collaborations"]["plain"]["id"]
            self._ask(
                "POST",
                "/study",
                {"name": "north-and-south", "collaboration_id": place_id, "organization_ids": ids},
            )
        if self._keycloak is not None:
            facts |= {"auth_url": self._keycloak.realm.url, "realm": self._keycloak.realm.name}
            facts |= {"client": PUBLIC_CLIENT}
            robot = {
                "username": "north-robot",
                "is_service_account": True,
                "organization_id": organizations["north"]["id"],
                "roles": [roles["Researcher"]],
            }
            facts["service_account"] = {
                "username": "north-robot",
                "client_id": "north-robot-user-client",
                "client_secret": self._ask("POST", "/user", robot)["client_secret"],
            }
        return RealServer(self._generation, facts, nodes, self._keys, cohorts, images, log, self._keycloak)

    def _organization(self, name: str) -> Json:
        body = {
            "name": name,
            "address1": "Street 1",
            "address2": "",
            "zipcode": "1000AA",
            "country": "NL",
            "domain": f"{name}.example",
            "public_key": self._keys[name].public,
        }
        record = self._ask("POST", "/organization", body)
        path = self._folder / "keys" / f"{name}.pem"
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(self._keys[name].pem)
        return {"id": record["id"], "private_key": str(path)}

    def _roles(self) -> dict[str, int]:
        listed = self._ask("GET", "/role?per_page=100")
        return {role["name"]: role["id"] for role in (listed if self._generation == 3 else listed["data"])}

    def _user(self, username: str, organization: int, role: int) -> Json:
        body: Json = {"username": username, "password": PASSWORD, "organization_id": organization, "roles": [role]}
        if self._generation < 5:
            body |= {"firstname": username, "lastname": "Harness", "email": f"{username}@hospital.example"}
        # v3 wants it though it may be empty.
        body |= {"rules": []}
        record: Json = self._ask("POST", "/user", body)
        if self._keycloak is not None:
            # As if the user had logged in once in a browser and chosen the password anew.
            self._keycloak.realm.settle(username)
        return record

    def _node(
        self, name: str, api_key: str, databases: dict[str, Path], images: dict[str, Image], keys: KeyPair
    ) -> ComputeNode:
        settings = NodeSettings(api_key=api_key, databases=databases, images=images, keys=keys)
        if self._keycloak is not None:
            realm = self._keycloak.realm
            settings.client_id = f"{name}-node-client"
            settings.token_url = f"{realm.url}/realms/{realm.name}/protocol/openid-connect/token"
        http = httpx.Client(base_url=self._url, timeout=60)
        folder = self._folder / "sessions" / name
        return ComputeNode(self._generation, http, PollingChannel(self._root), settings, folder, poll_seconds=15.0)
