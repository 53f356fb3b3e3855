"""A small laboratory on this machine: the platforms' sandbox, a Prefect server and a process worker.

    make up      # start it and leave it running; prints how to use it
    make down    # stop it

Everything it writes is in `.demo/` beside this repository's files; the user's own Prefect settings are not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"
WORK_POOL = "biomed"
_START_SECONDS = 120.0


class Laboratory:
    """Starts and stops the processes of the laboratory.

    Args:
        home: Folder for databases, logs and results.
        platforms: Platforms to emulate.
        **settings: Further environment variables of the server, the worker and all commands.
    """

    def __init__(
        self,
        home: Path = HOME,
        platforms: Sequence[str] = ("vip",),
        **settings: str,
    ) -> None:
        self.home = home
        self.platforms = platforms
        self.sandbox: dict[str, Any] = {}
        self.port = _free_port()
        self.environment = os.environ | {
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "prefect_biomed",
            "PREFECT_BIOMED_HOME": str(home / "ledgers"),
            # Ten seconds by default, which is longer than most runs here take.
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            **settings,
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def state(self) -> Path:
        """File that tells of the platforms, as the sandbox writes it."""
        return self.home / "sandbox.json"

    @property
    def api_url(self) -> str:
        """Address of the Prefect API."""
        return self.environment["PREFECT_API_URL"]

    def __enter__(self) -> Self:
        """Start everything."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self.stop()

    def start(self) -> None:
        """Start the sandbox, the server, and a worker; deploy all flows."""
        shutil.rmtree(self.home, ignore_errors=True)
        (self.home / "logs").mkdir(parents=True)
        state = self.state
        self._spawn("sandbox", sys.executable, "-m", "prefect_biomed.sandbox", *self.platforms, "--state", str(state))
        self.start_server()
        self._wait_for("sandbox", state.is_file)
        self.sandbox = json.loads(state.read_text())
        self.run("prefect", "work-pool", "create", WORK_POOL, "--type", "process")
        self.run("prefect", "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
        self.start_worker()

    def start_server(self) -> None:
        """Start the Prefect server, with the database it had before if there is one, and wait until it answers."""
        self._spawn("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self._wait_for("server", lambda: requests.get(f"{self.api_url}/health", timeout=5).ok)

    def start_worker(self, name: str = "worker") -> None:
        """Start a process worker.

        Args:
            name: Name of the worker.
        """
        # Without --limit: a worker of Prefect 3.8 with a limit dies when a run that was retried or resumed comes back
        # before it has noticed that the run's process has ended.
        self._spawn(name, "prefect", "worker", "start", "--pool", WORK_POOL, "--name", name)

    def stop(self) -> None:
        """Stop all processes and what they started."""
        while self._processes:
            _, process = self._processes.popitem()
            _end(process.pid, gone=lambda process=process: process.poll() is not None)

    def detach(self) -> None:
        """Leave everything running; `down` finds it by the file that is written here."""
        (self.home / "processes.json").write_text(json.dumps({n: p.pid for n, p in self._processes.items()}))

    def kill(self, name: str) -> None:
        """Kill a process and what it started, as a power cut would.

        Args:
            name: `sandbox`, `server`, or the name of a worker.
        """
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, *command: str, **changes: str) -> str:
        """Run a command in the laboratory's environment.

        Args:
            *command: The command and its arguments.
            **changes: Further environment variables.

        Returns:
            What it printed.

        Raises:
            RuntimeError: It failed; with what it printed.
        """
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment | changes, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def _spawn(self, name: str, *command: str) -> None:
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._processes[name].poll() is not None:
                break
            try:
                if ready():
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        log = (self.home / "logs" / f"{name}.log").read_text()[-3000:]
        raise RuntimeError(f"The {name} did not start:\n{log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end(pid: int, *, gone: Callable[[], bool]) -> None:
    """Ask a process and what it started to end; make it end when it does not."""
    for request, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, request)
        deadline = time.monotonic() + patience
        while not gone() and time.monotonic() < deadline:
            time.sleep(0.1)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def main() -> None:
    """Start or stop the laboratory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["up", "down"])
    if parser.parse_args().command == "down":
        record = HOME / "processes.json"
        if not record.is_file():
            print("Nothing is running.")
            return
        for pid in json.loads(record.read_text()).values():
            _end(pid, gone=lambda pid=pid: _is_gone(pid))
        record.unlink()
        print("Stopped.")
        return
    laboratory = Laboratory(platforms=("vip", "vantage6", "boss"))
    laboratory.start()
    laboratory.detach()
    print(f"Prefect: {laboratory.api_url.removesuffix('/api')}")
    print(json.dumps(laboratory.sandbox, indent=2))
    print(f"export PREFECT_API_URL={laboratory.api_url}")


if __name__ == "__main__":
    main()
