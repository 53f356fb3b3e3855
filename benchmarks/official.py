"""Environments of their own for the official clients, so that they run as published, unmodified."""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

CACHE = Path(__file__).parents[1] / ".cache" / "environments"
# What each environment held when it last worked, by its name and the version of Python. Remove a file to resolve anew.
LOCKS = Path(__file__).parent / "environments"
_INSTALLED_WITHIN_SECONDS = 900


class MissingInterpreter(Exception):
    """A python version that an official client needs is not on this machine."""


def official_environment(name: str, requirements: Sequence[str], python: str | None = None) -> Path:
    """Make an environment, or find it made.

    Its packages are those of its lock. An environment without one takes the newest that its requirements allow, and
    leaves a lock to be committed: what is published later cannot break it then.

    Args:
        name: For the folder.
        requirements: As pip takes them.
        python: A version such as "3.10", when the one that runs this will not do.

    Returns:
        Its interpreter.

    Raises:
        MissingInterpreter: That version is not on this machine.
    """
    base = sys.executable if python is None else _interpreter(python)
    version = subprocess.run([base, "-V"], capture_output=True, text=True, check=True).stdout
    lock = LOCKS / f"{name}-{'.'.join(version.split()[1].split('.')[:2])}.txt"
    locked = lock.read_text() if lock.exists() else ""
    digest = hashlib.sha256("\n".join([version, *requirements, locked]).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    interpreter = folder / "bin" / "python"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}-{digest}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _install(base, folder, interpreter, [*requirements, *(("-c", str(lock)) if locked else ())])
            if not locked:
                LOCKS.mkdir(exist_ok=True)
                lock.write_text(_packages(interpreter))
            (folder / "complete").touch()
    return interpreter


def _interpreter(version: str) -> str:
    # What is first on the path may be a stand-in of pyenv for a version that is not chosen.
    for folder in os.get_exec_path():
        found = Path(folder) / f"python{version}"
        if found.is_file() and _output(str(found), "-V"):
            return str(found)
    if prefix := _output("pyenv", "prefix", version):
        return str(Path(prefix) / "bin" / "python")
    if found_by_uv := _output("uv", "python", "find", version):
        return found_by_uv
    raise MissingInterpreter(
        f"python {version} is not on this machine: put a python{version} on the path, or get one with "
        f"`uv python install {version}` or `pyenv install {version}`"
    )


def _output(*command: str) -> str:
    """Return what a command prints; nothing when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _install(base: str, folder: Path, interpreter: Path, requirements: Sequence[str]) -> None:
    if shutil.which("uv"):
        _run("uv", "venv", "--quiet", "--python", base, str(folder))
        _run("uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", str(interpreter), *requirements)
        return
    if base == sys.executable:
        venv.create(folder, with_pip=True)
    else:
        _run(base, "-m", "venv", str(folder))
    _run(str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)


def _packages(interpreter: Path) -> str:
    program = (
        "from importlib.metadata import distributions as d; print(*sorted({f'{p.name}=={p.version}' for p in d()}))"
    )
    listed = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True).stdout
    return "\n".join([*listed.split(), ""])


def _run(*command: str) -> None:
    # The environment of the test run must not leak into the one that is made.
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=_INSTALLED_WITHIN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
