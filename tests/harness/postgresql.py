"""A PostgreSQL server of its own on loopback, for tests of what the database decides."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.events.worker import EventsWorker
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

from harness.laboratory import wait_until

PASSWORD = "sesame"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgresql() -> Iterator[int]:
    """A server with the user, the password and the database of `compose.yaml`. Yields its port.

    The test is skipped where PostgreSQL is not installed.
    """
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed on this machine")
    # Its server refuses to run as root, and its folder must be reachable for the other user.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    home = Path(tempfile.mkdtemp(prefix="biomed-postgresql-"))
    if as_user:
        shutil.chown(home, "postgres")
    port = free_port()
    (home / "password").write_text(PASSWORD)
    (home / "password").chmod(0o644)
    initdb = [str(programs / "initdb"), "-D", str(home / "data"), "-U", "prefect", "-A", "scram-sha-256"]
    subprocess.run([*as_user, *initdb, f"--pwfile={home / 'password'}"], check=True, capture_output=True)
    server = subprocess.Popen(
        [*as_user, str(programs / "postgres"), "-D", str(home / "data"), "-p", str(port), "-h", "127.0.0.1", "-k", ""],
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-U", "prefect"]
        wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 60, "PostgreSQL")
        created = subprocess.run(
            [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect"],
            env=os.environ | {"PGPASSWORD": PASSWORD},
            capture_output=True,
            text=True,
        )
        assert created.returncode == 0, created.stderr
        yield port
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(home)


@contextmanager
def prefect_api_on_postgresql() -> Iterator[int]:
    """A Prefect API of its own on PostgreSQL, for flows of this process. Yields the port of the database.

    The test is skipped where PostgreSQL is not installed.
    """
    with postgresql() as port:
        url = f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/prefect"
        server = SubprocessASGIServer(port=free_port())
        with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: url}):
            server.start(timeout=300)
            try:
                with temporary_settings({PREFECT_API_URL: server.api_url}):
                    # What sends events of this process may still be bound to the API of another test.
                    EventsWorker.drain_all()
                    yield port
                    EventsWorker.drain_all()
            finally:
                server.stop()


def dump(port: int) -> str:
    """Everything that the database holds, as text.

    Args:
        port: Of the server.
    """
    programs = _programs()
    assert programs is not None
    command = [str(programs / "pg_dump"), "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "--inserts", "prefect"]
    return subprocess.run(
        command, env=os.environ | {"PGPASSWORD": PASSWORD}, capture_output=True, text=True, check=True
    ).stdout


def _programs() -> Path | None:
    """Where the programs of PostgreSQL are; Debian does not put them on the path."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found = installed[-1] if installed else shutil.which("postgres")
    return Path(found).resolve().parent if found else None
