"""What `deployments/compose.yaml` does, step by step without a container engine, on PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from laboratory import wait_until

from prefect_biomed.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.endurance, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
VARIABLES = {"POSTGRES_PASSWORD": "sesame", "PREFECT_AUTH": "operator:swordfish", "DATA_DIR": "/data"}


def binaries() -> Path | None:
    """Where the programs of PostgreSQL are; Debian does not put them on the path."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found = installed[-1] if installed else shutil.which("postgres")
    return Path(found).resolve().parent if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def database() -> Iterator[int]:
    """PostgreSQL on loopback, with the user and the database of the file. Returns its port."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed on this machine")
    # Its server refuses to run as root, and its folder must be reachable for the other user.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    home = Path(tempfile.mkdtemp(prefix="biomed-postgresql-"))
    if as_user:
        shutil.chown(home, "postgres")
    port = free_port()
    (home / "password").write_text(VARIABLES["POSTGRES_PASSWORD"])
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
            env=os.environ | {"PGPASSWORD": VARIABLES["POSTGRES_PASSWORD"]},
            capture_output=True,
            text=True,
        )
        assert created.returncode == 0, created.stderr
        yield port
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(home)


class Composed:
    """The services of the file, with hosts, ports and folders of this machine.

    Args:
        home: Folder that stands for the volumes.
        database: Port of PostgreSQL.
        variables: Variables that the file needs.
    """

    def __init__(self, home: Path, database: int, variables: dict[str, str]) -> None:
        self.home = home
        self.port = free_port()
        text = (ROOT / "deployments" / "compose.yaml").read_text()
        for name, value in variables.items():
            text = re.sub(r"\$\{" + name + r"(:[-?][^}]*)?\}", value, text)
        assert "${" not in text, "a variable of the file is not set"
        for theirs, ours in (
            ("database:5432", f"127.0.0.1:{database}"),
            ("server:4200", f"127.0.0.1:{self.port}"),
            ("127.0.0.1:4200", f"127.0.0.1:{self.port}"),
            ('"4200"', f'"{self.port}"'),
            ("0.0.0.0", "127.0.0.1"),
            ("/var/lib/", f"{home}/"),
        ):
            assert theirs in text, theirs
            text = text.replace(theirs, ours)
        self.services: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]

    def environment(self, service: str) -> dict[str, str]:
        """What the image and the file set."""
        (self.home / "prefect" / service).mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VIP_"))}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(self.home / "prefect" / service),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            **self.services[service]["environment"],
        }

    def command(self, service: str) -> list[str]:
        """Its command."""
        return [str(word) for word in self.services[service]["command"]]

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Start it in the background."""
        with (self.home / f"{service}.log").open("wb") as log:
            return subprocess.Popen(
                self.command(service), cwd=ROOT, env=self.environment(service), stdout=log, stderr=log
            )

    def run(self, service: str, command: list[str] | None = None) -> str:
        """Run it, or another command in its place, to its end."""
        done = subprocess.run(
            command or self.command(service),
            cwd=ROOT,
            env=self.environment(service),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def test_the_services_work_together(database: int, vip: Sandbox, input_dir: Path, tmp_path: Path) -> None:
    facts = vip.vip.ready()
    composed = Composed(tmp_path, database, VARIABLES | {"VIP_API_KEY": facts["api_key"]})
    server = composed.start("server")
    worker = None
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{composed.port}/api/health"), 300, "the server")
        composed.run("server", composed.services["server"]["healthcheck"]["test"][1:])
        url = f"http://127.0.0.1:{composed.port}/api/deployments/filter"
        assert requests.post(url, json={}, timeout=10).status_code == 401
        assert requests.post(url, json={}, timeout=10, auth=("operator", "swordfish")).json() == []
        for what in ("installed", "updated"):
            printed = composed.run("setup")
            assert "vip-credentials/default saved with api_key" in printed
            assert printed.count(f"{what}: ") >= 3
        assert "vip-session" in {
            d["name"] for d in requests.post(url, json={}, timeout=10, auth=("operator", "swordfish")).json()
        }
        worker = composed.start("worker")
        parameters = {
            "credentials": {"api_key": "VIP_API_KEY", "url": facts["url"]},
            "pipeline_id": "GreyMatter/1.0",
            "input_settings": {"t1": "anatomical.nii"},
            "input_dir": str(input_dir),
            "output_dir": str(tmp_path / "out"),
            "refresh_time": 1,
        }
        run = ["prefect", "deployment", "run", "vip-session/vip-session", "--params", json.dumps(parameters), "--watch"]
        composed.run("setup", run)
    finally:
        for process in (worker, server):
            if process is not None:
                process.terminate()
                process.wait(60)
    assert len(list((tmp_path / "out").rglob("measures.csv"))) == 1
    assert list((tmp_path / "prefect-biomed" / "results").iterdir()), "no result was shared"
    assert not list(tmp_path.rglob("prefect.db")), "the server used SQLite"
    assert facts["api_key"] not in (tmp_path / "worker.log").read_text()
