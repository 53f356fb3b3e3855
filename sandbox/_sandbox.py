"""The platforms, served on loopback ports."""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import uvicorn
from pydantic import TypeAdapter

from prefect_biomed.sandbox._core import Platform
from prefect_biomed.sandbox._faults import Fault
from prefect_biomed.sandbox._gate import Gate
from prefect_biomed.sandbox._state import Keeper, Saved

if TYPE_CHECKING:
    from prefect_biomed.sandbox.vip import VipSandbox

# Looked up by name when asked for, so that one platform needs nothing of what another needs.
PLATFORMS = {
    "vip": ("prefect_biomed.sandbox.vip", "VipSandbox"),
    "vantage6": ("prefect_biomed.sandbox.vantage6", "Vantage6Sandbox"),
    "boss": ("prefect_biomed.sandbox.boss", "BossSandbox"),
}
_STARTED_WITHIN_SECONDS = 30.0
# Requests in work when it ends have so long.
_GRACE_SECONDS = 1.0
# How often uvicorn renews what it keeps, such as the date it answers with.
_TICK_SECONDS = 0.1


class Sandbox:
    """Serves platforms on loopback ports while the context is open.

    Args:
        *platforms: `vip`, `vantage6`, `boss`; none means all.
        seed: ids, keys and noise are derived from it: same seed, same ones.
        latency_ms: added to each request of each platform, in milliseconds.
        faults: by platform name, a list of `Fault` (or what makes one); or a JSON file of that.
        state: a file to which the ready line is written atomically and which is removed at the
            end, so that other processes find the sandbox.
        state_dir: a folder in which all state is kept, so that a later sandbox with this folder goes on from
            there, at the same ports, also when this one was killed. Made when it is not there. Only the
            death of the process is survived, not that of the machine. It holds pickles: use none that
            somebody else has written. Without it everything is removed at the end.
        port: 0 takes free ports, or those kept in `state_dir`; otherwise the first platform gets this
            one, the next the one after it, and so on.
        vip: switches of the platform of that name.
        vantage6: switches of the platform of that name.
        boss: switches of the platform of that name.

    Raises:
        ValueError: an unknown platform or switch, a fault that makes no sense, a `state_dir` that was made
            with another seed, by another version, or with another value of a switch that cannot be changed.
        OSError: a port that is taken, a state file that cannot be written, a `state_dir` that another
            sandbox uses.
    """

    def __init__(
        self,
        *platforms: str,
        seed: int = 0,
        latency_ms: float = 0.0,
        faults: Mapping[str, Sequence[Fault | Mapping[str, Any]]] | Path | str | None = None,
        state: Path | str | None = None,
        state_dir: Path | str | None = None,
        port: int = 0,
        vip: Mapping[str, Any] | None = None,
        vantage6: Mapping[str, Any] | None = None,
        boss: Mapping[str, Any] | None = None,
    ) -> None:
        names = list(dict.fromkeys(platforms or PLATFORMS))
        switches = {"vip": vip, "vantage6": vantage6, "boss": boss}
        plan = _read_faults(faults)
        for given in [*names, *plan, *(key for key, value in switches.items() if value)]:
            if given not in PLATFORMS:
                raise ValueError(f"no platform {given!r}: there are {', '.join(PLATFORMS)}")
            if given not in names:
                raise ValueError(f"switches or faults for {given!r}, which is not served")
        self._folder = _Folder(None if state_dir is None else Path(state_dir))
        self._state = None if state is None else Path(state)
        self._first_port = port
        self._platforms: dict[str, Platform] = {}
        self._servers: list[_Server] = []
        try:
            for name in names:
                own = {"latency_ms": latency_ms} if latency_ms else {}
                self._platforms[name] = self._folder.platform(name, seed, {**own, **(switches[name] or {})})
                self._platforms[name].faults.add(*plan.get(name, []))
        except BaseException:
            self._folder.close()
            raise

    @property
    def vip(self) -> VipSandbox:
        """The Virtual Imaging Platform."""
        return cast("VipSandbox", self._platform("vip"))

    @property
    def vantage6(self) -> Platform:
        """vantage6."""
        return self._platform("vantage6")

    @property
    def boss(self) -> Platform:
        """The Boss."""
        return self._platform("boss")

    def _platform(self, name: str) -> Platform:
        if name not in self._platforms:
            raise AttributeError(f"this sandbox does not serve {name}")
        return self._platforms[name]

    def ready(self) -> dict[str, Any]:
        """Return process id and facts of every platform: the content of the ready line."""
        facts = {name: platform.ready() for name, platform in self._platforms.items()}
        return {"pid": os.getpid(), **facts}

    def start(self) -> Self:
        """Serve, and return once every platform answers."""
        try:
            for offset, platform in enumerate(self._platforms.values()):
                port = self._first_port + offset if self._first_port else self._folder.port(platform.name)
                server = _Server(platform, port, self._folder.file(platform.name))
                self._servers.append(server)
                server.start()
            if self._state is not None:
                _write_atomically(self._state, json.dumps(self.ready()) + "\n")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End serving, and remove the state file and, without `state_dir`, all that was stored. Safe to repeat."""
        if self._state is not None and self._servers:
            self._state.unlink(missing_ok=True)
        while self._servers:
            self._servers.pop().stop()
        self._folder.close()

    def restart(self, name: str, *, down_seconds: float = 0.0) -> None:
        """Take a platform down and bring it back, and return once it answers again: see `outage`.

        Args:
            name: of the platform.
            down_seconds: how long it refuses connections, besides the fraction of a second that going down takes.

        Raises:
            AttributeError: the sandbox does not serve it.
            OSError: something else took its port meanwhile.
        """
        with self.outage(name):
            time.sleep(down_seconds)

    @contextmanager
    def outage(self, name: str) -> Iterator[None]:
        """Keep the server of a platform down while the context is open; then it is at the same URL in the same state.

        Connections are cut, requests in work or held by a fault are not carried out unless that had begun; new
        connections are refused. What does not live in the server goes on: executions of VIP and their transfers and
        deletions, nodes of vantage6, lambdas and queues of the Boss. Journal, faults and switches stay.

        Args:
            name: of the platform.

        Raises:
            AttributeError: the sandbox does not serve it.
            OSError: something else took its port meanwhile.
        """
        platform = self._platform(name)
        server = next(server for server in self._servers if server.platform is platform)
        server.go_down()
        try:
            yield
        finally:
            server.come_back()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _read_faults(
    faults: Mapping[str, Sequence[Fault | Mapping[str, Any]]] | Path | str | None,
) -> dict[str, list[Fault]]:
    if isinstance(faults, Path | str):
        faults = json.loads(Path(faults).read_text(encoding="utf-8"))
    return TypeAdapter(dict[str, list[Fault]]).validate_python(faults or {})


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


class _Folder:
    """Where the platforms keep their files, and their state when it is to be kept.

    Args:
        path: where it is kept; None for a folder that is removed at the end.
    """

    def __init__(self, path: Path | None) -> None:
        self._temporary = None
        if path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="prefect-biomed-sandbox-")
            path = Path(self._temporary.name)
        self._path = path.resolve()
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._saved: dict[str, Saved] = {}
        self._lock = (self._path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OSError(f"another sandbox uses {self._path}: stop it, or take another folder") from error

    def file(self, name: str) -> Path | None:
        """Return where the state of a platform is kept, if it is."""
        return None if self._temporary else self._path / f"{name}.state"

    def port(self, name: str) -> int:
        """Return the port on which a platform was served, 0 when it was not."""
        return self._saved[name].port if name in self._saved else 0

    def platform(self, name: str, seed: int, switches: Mapping[str, Any]) -> Platform:
        """Make a platform, in the state in which an earlier process left it."""
        module, class_name = PLATFORMS[name]
        try:
            kind: type[Platform] = getattr(importlib.import_module(module), class_name)
        except ModuleNotFoundError as error:
            missing, _, _ = (error.name or "a package").partition(".")
            raise ModuleNotFoundError(
                f"the sandbox of {name} needs {missing}: pip install 'prefect-biomed[sandbox]'", name=missing
            ) from error
        path = self.file(name)
        saved = None if path is None else Saved.read(path)
        directory = self._path / name
        if saved is None:
            # What is there without a state was never served.
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            return kind(seed=seed, directory=directory, **switches)
        if saved.seed != seed:
            raise ValueError(f"{self._path} was made with seed {saved.seed}, not {seed}")
        for switch, value in switches.items():
            field = kind.switches_type.model_fields.get(switch)
            before = saved.switches.get(switch)
            if field is not None and field.frozen and before != value:
                raise ValueError(f"{self._path} was made with {name}.{switch}={before}, not {value}")
        platform = kind(seed=seed, directory=directory, **{**saved.switches, **switches})
        saved.give_to(platform)
        self._saved[name] = saved
        return platform

    def close(self) -> None:
        """Let others use it, or remove it. Safe to repeat."""
        self._lock.close()
        if self._temporary:
            self._temporary.cleanup()


class _Uvicorn(uvicorn.Server):
    """Is told of its end, for which uvicorn looks every tenth of a second, and can end as a killed process does."""

    at_once = False

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = asyncio.Event()
        self._turns: asyncio.AbstractEventLoop | None = None

    def end(self) -> None:
        """Make it end; for other threads."""
        self.should_exit = True
        if self._turns is not None:
            with suppress(RuntimeError):  # Ended by itself.
                self._turns.call_soon_threadsafe(self._told.set)

    async def main_loop(self) -> None:
        self._turns = asyncio.get_running_loop()
        tick = 0
        while not await self.on_tick(tick):
            tick += 1
            with suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _TICK_SECONDS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.server_state
        for server in self.servers:
            server.close()
        for connection in list(state.connections):
            if self.at_once:
                connection.transport.abort()
            else:
                connection.shutdown()
        # They learn of it in the next turn of the loop; before, they would answer 500.
        await asyncio.sleep(0)
        if self.at_once:
            for task in list(state.tasks):
                task.cancel()
        deadline = time.monotonic() + _GRACE_SECONDS
        while (state.connections or state.tasks) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        for task in list(state.tasks):
            task.cancel()


class _Server:
    """One platform on one loopback port, in a thread of its own."""

    def __init__(self, platform: Platform, port: int, file: Path | None) -> None:
        self.platform = platform
        self._started = False
        self._file = file
        self._keeper: Keeper | None = None
        self._listen(port)

    def _listen(self, port: int) -> None:
        self._socket = socket.create_server(("127.0.0.1", port), backlog=512)
        # Inherited by each connection. asyncio sets it only on sockets that name their protocol; without it each answer
        # waits 40 ms for an acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._address: tuple[str, int] = self._socket.getsockname()
        if self._file is not None:
            self._keeper = Keeper(self.platform, self._file, self._address[1])
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                Gate(self.platform, self._keeper),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                # Longer than any client polls: a kept connection must not die under its request.
                timeout_keep_alive=120,
            )
        )
        self._thread = threading.Thread(
            target=self._uvicorn.run,
            kwargs={"sockets": [self._socket]},
            name=f"sandbox-{self.platform.name}",
            daemon=True,
        )

    def start(self) -> None:
        self._serve()
        host, port = self._address
        self._started = True
        self.platform.start(f"http://{host}:{port}")
        if self._keeper is not None:
            self._keeper.write()

    def _serve(self) -> None:
        self._thread.start()
        deadline = time.monotonic() + _STARTED_WITHIN_SECONDS
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the sandbox of {self.platform.name} did not start")
            time.sleep(0.005)

    def go_down(self) -> None:
        self.platform.went_down()
        self._uvicorn.at_once = True
        self._end()

    def come_back(self) -> None:
        self._listen(self._address[1])
        self._serve()
        self.platform.came_back()

    def stop(self) -> None:
        self._end()
        if self._started:
            # Before what runs is ended: a later process goes on with it.
            if self._keeper is not None:
                self._keeper.write()
            self.platform.stop()

    def _end(self) -> None:
        self._uvicorn.end()
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()
