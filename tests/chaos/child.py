"""The process of a user: it does the work of one platform, tells which steps are finished, and how it ended."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import struct
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chaos.journeys import WORK
from prefect_biomed.clients.errors import BiomedError

# <linux/capability.h>: writing what modes forbid, which root may, and the layout of sets of capabilities.
_CAP_DAC_OVERRIDE = 1
_LAYOUT = 0x20080522


def attempt(platform: str, order: dict[str, Any], finished: dict[str, Any], log: Path, wire: Connection) -> None:
    """Do the work once.

    Args:
        platform: Where.
        order: As `Journey.order`, with the disk that this process has.
        finished: What steps that must happen once have given to earlier processes; Prefect remembers that of tasks.
        log: Gets what is logged and printed.
        wire: Is told finished steps and the end: `result`, `error` for an error of ours, `crash` for any other.
    """
    _write_to(log)
    _limit(order["disk"])

    def step(name: str, do: Callable[[], Any]) -> Any:
        if name not in finished:
            finished[name] = do()
            wire.send(("step", name, finished[name]))
        return finished[name]

    try:
        result = WORK[platform](order, step)
    except BiomedError as error:
        logging.getLogger(__name__).error("%s", error, exc_info=error)
        wire.send(("error", type(error).__name__, str(error)))
    except BaseException:
        wire.send(("crash", "", traceback.format_exc()))
    else:
        wire.send(("result", "", result))


def _write_to(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "a", buffering=1)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)


def _limit(disk: str) -> None:
    if disk == "full":
        # What is written first is a few hundred bytes long; the log is beyond that after a while, and goes on without.
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        logging.raiseExceptions = False
    if disk == "read-only" and os.geteuid() == 0:
        _obey_modes()


def _obey_modes() -> None:
    """Take from root what lets it write to a read-only folder, and leave it what lets it read.

    Another user could not read an interpreter below root's home, from which modules are imported at any time.
    """
    system = ctypes.CDLL(None, use_errno=True)
    header, sets = struct.pack("Ii", _LAYOUT, 0), ctypes.create_string_buffer(24)
    asked = system.capget(header, sets)
    effective, *others = struct.unpack("6I", sets.raw)
    limited = struct.pack("6I", effective & ~(1 << _CAP_DAC_OVERRIDE), *others)
    if asked or system.capset(header, limited):
        raise OSError(ctypes.get_errno(), "root cannot be kept from writing")
