"""State of a platform that outlives its process: one file, replaced atomically before each answer."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from prefect_biomed.sandbox._core import Platform

# Of the file and of everything in it: raised when a class whose objects are kept changes.
_FORMAT = 1
_LOCKS = {type(threading.Lock()): threading.Lock, type(threading.RLock()): threading.RLock}


def _event(happened: bool) -> threading.Event:
    event = threading.Event()
    if happened:
        event.set()
    return event


class _Pickler(pickle.Pickler):
    """Writes constants by name, paths below a folder relative to it, and locks without their state."""

    def __init__(self, file: BytesIO, folder: Path, constants: Mapping[str, object]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._folder = folder
        self._names = {id(constant): name for name, constant in constants.items()}

    def persistent_id(self, obj: object) -> tuple[str, str] | None:
        if isinstance(obj, Path) and obj.is_relative_to(self._folder):
            return "path", str(obj.relative_to(self._folder))
        name = self._names.get(id(obj))
        return None if name is None else ("constant", name)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, threading.Event):
            return _event, (obj.is_set(),)
        if type(obj) in _LOCKS:
            return _LOCKS[type(obj)], ()
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, folder: Path, constants: Mapping[str, object]) -> None:
        super().__init__(file)
        self._folder = folder
        self._constants = constants

    def persistent_load(self, pid: tuple[str, str]) -> object:
        kind, name = pid
        return self._folder / name if kind == "path" else self._constants[name]


class Saved:
    """What an earlier process left of a platform.

    Attributes:
        seed: that it was made with.
        port: on which it was served.
        switches: as they were.
    """

    def __init__(self, seed: int, port: int, switches: dict[str, Any], content: bytes) -> None:
        self.seed = seed
        self.port = port
        self.switches = switches
        self._content = content

    @classmethod
    def read(cls, path: Path) -> Saved | None:
        """Read a file; None when there is none yet.

        Raises:
            ValueError: it was written by another version of the sandbox, or is no such file.
        """
        try:
            written = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            number, *fields = pickle.loads(written)
            if number == _FORMAT:
                return cls(*fields)
        except Exception as error:  # whatever unpickling stumbles over
            raise ValueError(f"{path} holds no state of a sandbox: take another folder") from error
        raise ValueError(f"{path} was written by another version of the sandbox: take another folder")

    def give_to(self, platform: Platform) -> None:
        """Put a new platform, which does not serve yet, into the state that was saved."""
        content = BytesIO(self._content)
        platform.restore(_Unpickler(content, platform.directory, platform.constants()).load())


class Keeper:
    """Writes the state of a platform when it has changed.

    Args:
        platform: the platform.
        path: of the file.
        port: on which it is served.
    """

    def __init__(self, platform: Platform, path: Path, port: int) -> None:
        self._platform = platform
        self._path = path
        self._port = port
        self._lock = threading.Lock()
        self._written = b""
        self._asked = 0
        self._done = 0
        self._turn = asyncio.Lock()

    async def keep(self) -> None:
        """Return once what has happened so far is in the file; those who wait at once share a write."""
        self._asked += 1
        mine = self._asked
        async with self._turn:
            await asyncio.sleep(0)
            if self._done < mine:
                covered = self._asked
                self.write()
                self._done = covered

    def write(self) -> None:
        """Write the state as it is now, unless the file holds it already."""
        platform, buffer = self._platform, BytesIO()
        with self._lock:
            with platform.frozen() as state:
                _Pickler(buffer, platform.directory, platform.constants()).dump(state)
            switches = platform.switches.model_dump()
            whole = pickle.dumps((_FORMAT, platform.seed, self._port, switches, buffer.getvalue()))
            if whole != self._written:
                part = self._path.with_suffix(f".{os.getpid()}.part")
                part.write_bytes(whole)
                part.replace(self._path)
                self._written = whole
