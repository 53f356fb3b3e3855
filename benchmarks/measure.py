"""What the benchmarks of all platforms share: a sandbox and a measured program, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PROLOGUE = """
import json, os, resource, sys, threading, time

def _resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def _watch():
    global _peak
    while not _done.wait(0.005):
        _peak = max(_peak, _resident())

def measured(work):
    global _done, _peak
    _done, _peak = threading.Event(), _resident()
    idle, watcher = _peak, threading.Thread(target=_watch, daemon=True)
    watcher.start()
    began, cpu = time.monotonic(), time.process_time()
    result = work()
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    _done.set()
    watcher.join()
    figures = {"seconds": seconds, "cpu": cpu, "peak_mib": (_peak - idle) / 2**20, "result": result}
    print("FIGURES " + json.dumps(figures), flush=True)

arguments = json.loads(sys.argv[1])
"""


@contextmanager
def laboratory() -> Iterator[Path]:
    """Give a folder for a benchmark, in which all that the package keeps is kept too, and remove it.

    Yields:
        The folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        before = os.environ.get("PREFECT_BIOMED_HOME")
        os.environ["PREFECT_BIOMED_HOME"] = str(Path(temporary) / "home")
        try:
            yield Path(temporary)
        finally:
            del os.environ["PREFECT_BIOMED_HOME"]
            if before is not None:
                os.environ["PREFECT_BIOMED_HOME"] = before


@contextmanager
def sandbox(*arguments: str) -> Iterator[dict[str, Any]]:
    """Serve the sandbox in a process of its own.

    Args:
        *arguments: As for `python -m prefect_biomed.sandbox`.

    Yields:
        Its ready line.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect_biomed.sandbox", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()


def measure(interpreter: Path | str, program: str, cwd: Path, **arguments: Any) -> dict[str, Any]:
    """Run a program that calls `measured(work)` once, and return its figures.

    Args:
        interpreter: The python to run it with.
        program: Its text; `arguments` is a dictionary in it.
        cwd: Folder to run in.
        **arguments: What it needs to know.

    Returns:
        Seconds, CPU seconds, MiB of memory above the idle process, and the result of the work.
    """
    done = subprocess.run(
        [str(interpreter), "-c", _PROLOGUE + textwrap.dedent(program), json.dumps(arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise RuntimeError(f"The measured program failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(lines[0].removeprefix("FIGURES "))
    return figures
