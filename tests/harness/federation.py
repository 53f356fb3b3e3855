"""A vantage6 sandbox and accounts on it, for tests of the client, the tasks and the flows."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import SecretStr

from prefect_biomed.blocks import Vantage6Credentials
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.vantage6 import (
    Look,
    PrivateKey,
    SessionScope,
    Task,
    TaskRequest,
    Vantage6Client,
    connect,
    forget_connections,
    launch,
    make_dataframe,
    make_session,
    wait_for_dataframe,
    watch,
)
from prefect_biomed.sandbox import Sandbox
from prefect_biomed.sandbox.vantage6 import CLINICAL, Vantage6Sandbox

FAST = PollSettings(interval_seconds=0.1, growth=1.1, max_interval_seconds=0.5, deadline_seconds=60)
HOSPITALS = ("north", "south", "west")


class Federation:
    """A sandbox of one generation.

    Args:
        sandbox: The sandbox.
    """

    def __init__(self, sandbox: Vantage6Sandbox) -> None:
        self.sandbox = sandbox
        self.facts: dict[str, Any] = sandbox.ready()
        self.generation: int = self.facts["generation"]

    def credentials(
        self, account: str = "north-researcher", *, key: str | None = "north", **changes: Any
    ) -> Vantage6Credentials:
        """Credentials of an account; on generation 5 those of `north-robot` for the usual one."""
        fields: dict[str, Any] = {"url": self.facts["url"], "read_seconds": 30}
        fields["encryption"] = "as the collaboration says"
        if key is not None:
            fields["private_key_path"] = self.key_file(key)
        robot = self.facts.get("service_account")
        if robot and account == "north-researcher" and not {"username", "password"} & changes.keys():
            fields |= {"service_account": robot["username"], "client_secret": SecretStr(robot["client_secret"])}
        else:
            fields |= {"username": account, "password": SecretStr(self.facts["users"][account]["password"])}
        if robot:
            fields |= {"auth_url": self.facts["auth_url"], "realm": self.facts["realm"]}
        return Vantage6Credentials(**fields | changes)

    def client(self, account: str = "north-researcher", *, key: str | None = "north", **changes: Any) -> Vantage6Client:
        """A client of an account, which logs in for itself; a context manager."""
        forget_connections()
        return self.credentials(account, key=key, **changes).get_client()

    def key_file(self, organization: str) -> Path:
        """The private key of an organization."""
        return Path(self.facts["organizations"][organization]["private_key"])

    def key(self, organization: str) -> PrivateKey:
        """The private key of an organization."""
        return PrivateKey.from_file(self.key_file(organization))

    def organization(self, name: str) -> int:
        """Id of an organization."""
        return int(self.facts["organizations"][name]["id"])

    def request(self, method: str, *organizations: str, **fields: Any) -> TaskRequest:
        """A request of the sandbox's algorithms, in the plain collaboration unless told otherwise."""
        arguments = fields.pop("arguments", {})
        settings: dict[str, Any] = {
            "collaboration": "plain",
            "image": CLINICAL,
            "method": method,
            "organizations": list(organizations) or None,
            "arguments": arguments,
            "central": method.startswith("central"),
        }
        if self.generation < 5:
            settings["databases"] = "default"
        return TaskRequest(**settings | fields)

    def launch(self, client: Vantage6Client, method: str, *organizations: str, **fields: Any) -> Task:
        """Create a task of its own."""
        if self.generation == 5 and "session" not in fields:
            fields |= self.data(client, str(fields.get("collaboration", "plain")))
        return launch(client, self.request(method, *organizations, **fields), token())

    def data(self, client: Vantage6Client, collaboration: str) -> dict[str, Any]:
        """A session and a dataframe with all columns (generation 5)."""
        session = make_session(client, collaboration, f"tests-{collaboration}", scope=SessionScope.OWN)
        name = f"all-{collaboration}-{session.owner_id}"
        frame = make_dataframe(client, session.id, name, label="default", image=CLINICAL, method="read_csv")
        wait_for_dataframe(client, frame.id, FAST)
        return {"session": session.id, "databases": name}

    def calls(self, method: str = "", path: str = "") -> list[str]:
        """Requests so far that had an answer below 400, as `VERB path?query`."""
        return [
            f"{entry.method} {entry.path}{'?' if entry.query else ''}{entry.query}"
            for entry in self.sandbox.journal.entries(method or None, path or None)
            if entry.status is not None and entry.status < 400
        ]

    def tasks_created(self) -> int:
        """How many user tasks there are on the server."""
        return sum(task.parent is None for task in self.sandbox.registry.tasks)


def token() -> str:
    """A token of its own."""
    return uuid.uuid4().hex[:10]


def wait(client: Vantage6Client, task: Task, settings: PollSettings = FAST, **options: Any) -> Look:
    """Wait for the end of a task and return the last look."""
    *_, last = watch(client, [task.id], settings, **options)
    return last


@contextmanager
def federation(generation: int, switches: Mapping[str, Any] | None = None) -> Iterator[Federation]:
    """A sandbox with small keys."""
    with Sandbox("vantage6", vantage6={"generation": generation, "key_bits": 2048, **(switches or {})}) as sandbox:
        yield Federation(cast("Vantage6Sandbox", sandbox.vantage6))


@pytest.fixture(scope="module")
def federations() -> Iterator[Callable[[int], Federation]]:
    """One vantage6 sandbox of each generation, for the tests that leave it as it was."""
    opened: dict[int, Federation] = {}
    with ExitStack() as stack:

        def get(generation: int) -> Federation:
            if generation not in opened:
                opened[generation] = stack.enter_context(federation(generation))
            found = opened[generation]
            found.sandbox.faults.clear()
            found.sandbox.journal.clear()
            return found

        yield get


@pytest.fixture
def here(federations: Callable[[int], Federation]) -> Federation:
    """The shared vantage6 sandbox of generation 4."""
    return federations(4)


__all__ = [
    "CLINICAL",
    "FAST",
    "HOSPITALS",
    "Federation",
    "connect",
    "federation",
    "federations",
    "here",
    "token",
    "wait",
]
