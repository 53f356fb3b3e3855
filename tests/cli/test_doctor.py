"""`prefect-biomed doctor`: each broken set-up is told, with what mends it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import requests
from httpx import ConnectError
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from harness.shell import typed
from prefect_biomed.cli import doctor
from prefect_biomed.cli.doctor import Finding, Level
from prefect_biomed.clients.errors import AuthenticationError

API = "http://prefect.example/api"


def absent(*_: Any) -> Any:
    raise ObjectNotFound(http_exc=Exception())


class Server:
    """A Prefect server as far as it is looked at; its scheduler makes runs or is dead."""

    def __init__(self, **answers: Any) -> None:
        self.left: list[UUID] = []
        self.__dict__ |= {
            "read_work_pool": lambda name: SimpleNamespace(is_paused=False),
            "read_workers_for_work_pool": lambda name: [],
            "read_block_documents_by_type": lambda slug: [],
            "read_block_document_by_name": absent,
            "read_flow_runs": lambda **_: [],
        } | answers

    def create_flow_from_name(self, name: str) -> UUID:
        self.left.append(uuid4())
        return self.left[0]

    def create_deployment(self, flow_id: UUID, name: str, schedules: Any) -> None:
        self.left.append(uuid4())

    def read_deployments(self, **_: Any) -> list[Any]:
        return [SimpleNamespace(id=one) for one in self.left[1:]]

    def delete_deployment(self, one: UUID) -> None:
        self.left.remove(one)

    def delete_flow(self, one: UUID) -> None:
        self.left.remove(one)

    def as_client(self) -> SyncPrefectClient:
        client: Any = self
        return client


def answers(date: datetime, status: int = 200) -> Callable[[str], Any]:
    return lambda url: SimpleNamespace(
        ok=status < 400, status_code=status, headers={"Date": format_datetime(date, usegmt=True)}
    )


def refused(url: str) -> Any:
    raise requests.ConnectionError


def wrong() -> None:
    raise ValueError("hunter2")


def denied() -> None:
    raise AuthenticationError("the key was refused")


def checks(tmp_path: Path) -> dict[str, tuple[list[Finding], str]]:
    """What each broken set-up is told, and the next step that mends it."""
    now = datetime.now(UTC)
    old = {"prefect": "3.8.8", "sqlalchemy": "2.1.9", "fastapi": "0.149.0", "requests": "2.32.0"}
    dead = Server()
    return {
        "a dependency is missing": (
            doctor.check_versions(["requests>=2.32", "boto3>=1.35"], old.get),
            "pip install --upgrade prefect-biomed",
        ),
        "an extra is missing": (
            doctor.check_versions(["requests", 'scipy>=1.13; extra == "analysis"'], old.get),
            "pip install 'prefect-biomed[analysis]'",
        ),
        "versions that do not work together": (doctor.check_versions([], old.get), "pip install 'prefect>=3.9.1'"),
        "no address": (doctor.check_server(None, refused), "prefect config set PREFECT_API_URL"),
        "the server is down": (doctor.check_server(API, refused), "prefect server start"),
        "the server refuses": (doctor.check_server(API, answers(now, 401)), "PREFECT_API_KEY"),
        "the clock is wrong": (doctor.check_server(API, answers(now - timedelta(hours=1))), "NTP"),
        "the scheduler is dead": (
            [doctor.check_scheduler(dead.as_client(), seconds=6, sleep=lambda _: None)],
            "prefect server services start",
        ),
        "no work pool": (
            doctor.check_workers(Server(read_work_pool=absent).as_client(), "biomed"),
            "prefect-biomed deploy --pool biomed",
        ),
        "the work pool is paused": (
            doctor.check_workers(
                Server(read_work_pool=lambda name: SimpleNamespace(is_paused=True)).as_client(), "biomed"
            ),
            "prefect work-pool resume biomed",
        ),
        "no worker is alive": (
            doctor.check_workers(
                Server(
                    read_workers_for_work_pool=lambda name: [SimpleNamespace(name="w", status=WorkerStatus.OFFLINE)]
                ).as_client(),
                "biomed",
            ),
            "prefect worker start --pool biomed",
        ),
        "no credentials": (
            doctor.check_blocks(Server().as_client(), ["vip-credentials"])[0],
            "prefect-biomed deploy --block",
        ),
        "the key is refused": ([doctor.check_account("vip-credentials/lab", denied)], "block vip-credentials/lab"),
        "a saved block is wrong": ([doctor.check_account("vip-credentials/lab", wrong)], "Save the block"),
        "the disk is full": (doctor.check_disk([tmp_path / "new"], free=lambda path: 2**20), "Make room"),
        "results go nowhere": (
            [doctor.check_storage(Server().as_client(), "s3-bucket/gone")],
            "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK",
        ),
    }


def test_each_broken_set_up_is_told_what_mends_it(tmp_path: Path) -> None:
    for what, (findings, step) in checks(tmp_path).items():
        amiss = [one for one in findings if one.level is not Level.FINE]
        assert any(step in one.next_step for one in amiss), f"{what}: {findings}"
        assert all(one.next_step for one in amiss), what
        assert "hunter2" not in repr(findings), what


def test_a_sound_set_up_is_told_nothing(tmp_path: Path) -> None:
    sound = Server(
        read_flow_runs=lambda **_: [SimpleNamespace(id="run")],
        delete_flow_run=lambda run: None,
        read_workers_for_work_pool=lambda name: [SimpleNamespace(name="w", status=WorkerStatus.ONLINE)],
        read_block_document_by_name=lambda name, slug: None,
    )
    new = {"prefect": "3.9.1", "sqlalchemy": "2.1.9", "fastapi": "0.150.0", "scipy": "1.14"}
    findings = [
        *doctor.check_versions(["prefect>=3.9.1", 'scipy>=1.13; extra == "analysis"'], new.get),
        *doctor.check_server(API, answers(datetime.now(UTC))),
        doctor.check_scheduler(sound.as_client(), sleep=lambda _: None),
        *doctor.check_workers(sound.as_client(), "biomed"),
        doctor.check_storage(sound.as_client(), "s3-bucket/there"),
        doctor.check_account("vip-credentials/lab", lambda: None),
        *doctor.check_disk([tmp_path / "new"], free=lambda path: 2**40),
    ]
    assert [one for one in findings if one.level is not Level.FINE] == []
    assert not list(tmp_path.iterdir())


def test_the_probe_is_removed_whether_it_fires_or_not() -> None:
    dead = Server()
    finding = doctor.check_scheduler(dead.as_client(), seconds=6, sleep=lambda _: None)
    assert finding.level is Level.BROKEN
    assert dead.left == []


def test_something_broken_has_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [doctor.fine("disk", "5 GiB free"), doctor.broken("worker", "none", "prefect worker start")]
    monkeypatch.setattr(doctor, "examine", lambda **_: found)
    status, said = typed("prefect-biomed", "doctor")
    assert (status, "prefect worker start" in said) == (1, True)
    status, said = typed("prefect-biomed", "doctor", "--json")
    assert (status, [one["level"] for one in json.loads(said)]) == (1, ["fine", "broken"])


class RefusesAll(BaseHTTPRequestHandler):
    """A server that says that it is there, and refuses everything else."""

    def do_GET(self) -> None:
        status = 200 if self.path.endswith("/health") else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"true" if status == 200 else b'{"detail": "Unauthorized"}')

    def do_POST(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


def test_a_server_that_refuses_us_is_a_finding() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusesAll) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
            findings = doctor.examine(probe_seconds=1)
        server.shutdown()
    refused = [one for one in findings if one.seen == "the server answered 401"]
    assert refused and all(one.level is Level.BROKEN and "PREFECT_API_AUTH_STRING" in one.next_step for one in refused)


def test_a_server_that_goes_away_meanwhile_is_a_finding() -> None:
    def gone() -> list[Finding]:
        raise ConnectError("all connection attempts failed")

    (found,) = doctor.asked("blocks", gone)
    assert found.level is Level.BROKEN and "could not be asked" in found.seen
