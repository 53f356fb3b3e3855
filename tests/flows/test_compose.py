"""What `deployments/compose.yaml` does, step by step without a container engine, on PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from harness.laboratory import wait_until
from harness.postgresql import PASSWORD, free_port, postgresql
from prefect_biomed.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.endurance, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
VARIABLES = {"POSTGRES_PASSWORD": PASSWORD, "PREFECT_AUTH": "operator:swordfish", "DATA_DIR": "/data"}


@pytest.fixture(scope="module")
def database() -> Iterator[int]:
    """Port of PostgreSQL."""
    with postgresql() as port:
        yield port


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
            "credentials": {"api_key": "env:VIP_API_KEY", "url": facts["url"]},
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
