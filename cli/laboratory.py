"""A small laboratory on this machine: the platforms' sandbox, a Prefect server and a process worker.

Everything it writes is in one folder; the user's own Prefect settings are not touched.
"""

from __future__ import annotations

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
from functools import partial
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import nibabel
import psutil
import requests
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.files import atomic_write, home

WORK_POOL = "biomed"
FIRST = {
    "vip": "vip-session/vip-session",
    "vantage6": "federated-analysis/federated-analysis",
    "boss": "boss-ingest/boss-ingest",
}
"""The deployment to begin with, by platform."""
_BLOCKS = "lab"
_START_SECONDS = 120.0


class Laboratory:
    """Starts and stops the processes of the laboratory.

    Args:
        home: Folder for databases, logs and results. What it holds is removed at the start.
        platforms: Platforms to emulate.
        folder: Where all processes and commands run; the current folder when None.
        **settings: Further environment variables of the server, the worker and all commands.
    """

    def __init__(
        self,
        home: Path,
        platforms: Sequence[str] = ("vip",),
        folder: Path | None = None,
        **settings: str,
    ) -> None:
        self.home = home
        self.platforms = platforms
        self.folder = folder or Path.cwd()
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
        """Start the sandbox, the server, and a worker; deploy all flows.

        Raises:
            ConfigurationError: The folder holds something, and not what a laboratory has left there.
        """
        if self.home.exists() and any(self.home.iterdir()) and not (self.home / "logs" / "sandbox.log").is_file():
            raise ConfigurationError(
                f"{self.home} is no folder of a laboratory, and what it holds would be removed. Name another one."
            )
        shutil.rmtree(self.home, ignore_errors=True)
        (self.home / "logs").mkdir(parents=True)
        state = self.state
        self._spawn("sandbox", sys.executable, "-m", "prefect_biomed.sandbox", *self.platforms, "--state", str(state))
        self.start_server()
        self._wait_for("sandbox", state.is_file)
        self.sandbox = json.loads(state.read_text())
        self.run("prefect", "work-pool", "create", WORK_POOL, "--type", "process")
        self.run("prefect", "--no-prompt", "deploy", "--prefect-file", str(self._deployments()), "--all")
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
            _end(process.pid, partial(_is_alive, process))

    def detach(self) -> None:
        """Leave everything running; `status` and `down` find it by the file that is written here."""
        processes = {name: psutil.Process(process.pid) for name, process in self._processes.items()}
        with atomic_write(_record(self.home)) as file:
            file.write(json.dumps({name: (one.pid, one.create_time()) for name, one in processes.items()}).encode())

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
            command, cwd=self.folder, env=self.environment | changes, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    @staticmethod
    def _deployments() -> Path:
        return Path(str(resources.files("prefect_biomed.deployments").joinpath("prefect.yaml")))

    def _spawn(self, name: str, *command: str) -> None:
        with (self.home / "logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True
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


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def _end(pid: int, alive: Callable[[], bool]) -> None:
    """Ask a process and what it started to end; make it end when it does not."""
    for request, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, request)
        deadline = time.monotonic() + patience
        while alive() and time.monotonic() < deadline:
            time.sleep(0.1)


def default_home() -> Path:
    """Tell where the laboratory of `prefect-biomed up` lives: `lab` in the folder of this package's records."""
    return home() / "lab"


def up(place: Path, platforms: Sequence[str]) -> Laboratory:
    """Start a laboratory that outlives this process, with blocks, sample data and deployments that run as they are.

    Args:
        place: Its folder.
        platforms: Platforms to emulate.

    Returns:
        The laboratory.

    Raises:
        ConfigurationError: One is running there already, or a part of it did not start; with its log.
    """
    if running := status(place):
        raise ConfigurationError(
            f"A laboratory is running in {place} ({', '.join(running)}). End it with `prefect-biomed down`."
        )
    laboratory = Laboratory(place, platforms, folder=Path.home())
    try:
        laboratory.start()
        save_blocks(laboratory, _BLOCKS)
        _set_parameters(laboratory, _samples(laboratory))
    except BaseException as error:
        laboratory.stop()
        if isinstance(error, RuntimeError):
            raise ConfigurationError(str(error)) from error
        raise
    laboratory.detach()
    return laboratory


def down(place: Path) -> list[str]:
    """End the laboratory of a folder, and nothing else.

    Args:
        place: Its folder.

    Returns:
        Names of the processes that were ended; none when nothing was running.
    """
    ended = status(place)
    for process in ended.values():
        _end(process.pid, process.is_running)
    _record(place).unlink(missing_ok=True)
    return list(ended)


def status(place: Path) -> dict[str, psutil.Process]:
    """List the processes of the laboratory of a folder that are alive.

    Args:
        place: Its folder.

    Returns:
        Each process by its name.
    """
    record = _record(place)
    if not record.is_file():
        return {}
    alive = {}
    for name, (pid, started) in json.loads(record.read_text()).items():
        # Another process may have the number by now.
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                alive[name] = process
    return alive


def _record(place: Path) -> Path:
    return place / "processes.json"


def _samples(laboratory: Laboratory) -> dict[str, dict[str, Any]]:
    """Write sample data; parameters by which deployments run on it, by the name of the deployment."""
    inputs = laboratory.home / "data"
    inputs.mkdir()
    found: dict[str, dict[str, Any]] = {}
    if "vip" in laboratory.sandbox:
        volume = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
        shutil.copy(volume, inputs)
        images = {
            "credentials": block("vip", _BLOCKS),
            "input_settings": {"t1": volume.name},
            "input_dir": str(inputs),
            "refresh_time": 1,
        }
        found[FIRST["vip"]] = images | {"pipeline_id": "GreyMatter/1.0"}
        found["repeatability-experiment/repeatability-weekly"] = images | {
            "pipelines": ["SkullStripNoisy/1.0"],
            "experiment_dir": str(laboratory.home / "experiment"),
            "repetitions": 5,
        }
    if "vantage6" in laboratory.sandbox:
        found[FIRST["vantage6"]] = {
            "credentials": block("vantage6", _BLOCKS),
            "collaboration": "encrypted",
            "image": "prefect-biomed/clinical:1.0",
            "method": "central_average",
            "arguments": {"column": "age"},
            "organizations": ["north"],
            "databases": "default",
            "details": {"central": True},
        }
    if "boss" in laboratory.sandbox:
        slices, shape = inputs / "slices", (4, 512, 512)
        slices.mkdir()
        for z in range(shape[0]):
            Image.effect_noise(shape[1:], 60 + z).save(slices / f"slice_{z:03d}.png")
        config = slice_stack(laboratory.sandbox["boss"]["host"], slices, shape, "uint8")
        found[FIRST["boss"]] = {"credentials": block("boss", _BLOCKS), "config": config}
    return found


def _set_parameters(laboratory: Laboratory, parameters: dict[str, dict[str, Any]]) -> None:
    with SyncPrefectClient(laboratory.api_url) as client:
        for name, values in parameters.items():
            found = client.read_deployment_by_name(name)
            client.update_deployment(found.id, DeploymentUpdate(parameters=values))


def save_blocks(laboratory: Laboratory, name: str) -> None:
    """Save a credentials block for each platform of a laboratory, from environment variables.

    Args:
        laboratory: The laboratory.
        name: Name of the blocks.
    """
    facts = laboratory.sandbox
    variables: dict[str, str] = {}
    if "vip" in facts:
        variables |= {"VIP_URL": facts["vip"]["url"], "VIP_API_KEY": facts["vip"]["api_key"]}
    if "vantage6" in facts:
        variables |= {
            "VANTAGE6_URL": facts["vantage6"]["url"],
            "VANTAGE6_USERNAME": "north-researcher",
            "VANTAGE6_PASSWORD": facts["vantage6"]["users"]["north-researcher"]["password"],
            "VANTAGE6_ENCRYPTION": "as the collaboration says",
            "VANTAGE6_PRIVATE_KEY": Path(facts["vantage6"]["organizations"]["north"]["private_key"]).read_text(),
        }
    if "boss" in facts:
        variables |= {
            "BOSS_HOST": facts["boss"]["host"],
            "BOSS_PROTOCOL": facts["boss"]["protocol"],
            "BOSS_TOKEN": facts["boss"]["tokens"]["alice"],
            "BOSS_AWS_ENDPOINT_URL": facts["boss"]["aws_endpoint_url"],
        }
    fields = {f"PREFECT_BIOMED_{name}": value for name, value in variables.items()}
    laboratory.run(sys.executable, "-m", "prefect_biomed.deployments.setup", "--name", name, **fields)


def block(platform: str, name: str) -> dict[str, Any]:
    """Refer to a saved credentials block, as the user interface does.

    Args:
        platform: Name of the platform.
        name: Name of the block.

    Returns:
        What stands for the block in parameters.
    """
    return {"$ref": {"block_document_slug": f"{platform}-credentials/{name}"}}


def slice_stack(host: str, folder: Path, shape: tuple[int, int, int], channel: str) -> dict[str, Any]:
    """Write the ingest configuration of a folder of slices for the Boss of the sandbox, as boss-ingest takes it.

    Args:
        host: Server.
        folder: Holds `slice_000.png` and so on.
        shape: Number of slices, pixels of a slice in y and in x.
        channel: Channel of the experiment `sandbox/stack`; its name is its dtype.

    Returns:
        The configuration.
    """
    depth, height, width = shape
    params = {
        "root_dir": str(folder),
        "base_filename": "slice_<p:3>",
        "extension": "png",
        "filesystem": "local",
        "bucket": "",
    }
    plugin = "ingestclient.plugins.stack.ZindexStack"
    return {
        "schema": {"name": "boss-v0.1-schema", "validator": "BossValidatorV01"},
        "client": {
            "backend": {"name": "boss", "class": "BossBackend", "host": host, "protocol": "http"},
            "path_processor": {"class": f"{plugin}PathProcessor", "params": params},
            "tile_processor": {"class": f"{plugin}TileProcessor", "params": params},
        },
        "database": {"collection": "sandbox", "experiment": "stack", "channel": channel},
        "ingest_job": {
            "resolution": 0,
            "extent": {"x": [0, width], "y": [0, height], "z": [0, depth], "t": [0, 1]},
            "tile_size": {"x": width, "y": height, "z": 1, "t": 1},
        },
    }
