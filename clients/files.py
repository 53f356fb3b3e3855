"""Files on the local disk: names that stay in their folder, files that appear whole, locks between processes.

Everything the package writes goes through here, so that a killed process, a full disk or a planted link does the same
harmless thing everywhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Literal
from uuid import uuid4

from filelock import FileLock, Timeout

from prefect_biomed.clients.errors import HeldElsewhere, LocalStorageError, UnsafeContent

if sys.platform != "win32":
    import fcntl

__all__ = [
    "PartialFile",
    "atomic_write",
    "digest",
    "exclusive",
    "home",
    "is_later_version",
    "on_disk",
    "private",
    "safe_join",
]

_WINDOWS_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
_MAX_NAME_BYTES = 255
_PARTIAL = ".kept.part"
_PART = re.compile(r"\.[0-9a-f]{32}\.part")


def home(*parts: str) -> Path:
    """Tell where the package keeps what it has to remember on this machine.

    Args:
        parts: Folders below it.

    Returns:
        `PREFECT_BIOMED_HOME`, or `~/.prefect-biomed`, with the parts joined. It may not exist yet.
    """
    return Path(os.environ.get("PREFECT_BIOMED_HOME") or Path.home() / ".prefect-biomed").joinpath(*parts)


def safe_join(folder: Path, name: str) -> Path:
    """Join a name that came from a server to a local folder.

    Args:
        folder: The folder that must not be left.
        name: A relative POSIX path.

    Returns:
        A path below the folder. Characters that Windows forbids are replaced there by `-`; names of devices get a `_`.

    Raises:
        UnsafeContent: The name is empty, absolute, has `..`, a NUL or a component no file system can hold, or leads
            out of the folder through a link that already exists.
    """
    parts = PurePosixPath(name).parts
    unsafe = not parts or name.startswith("/") or ".." in parts or "\x00" in name or not _storable(parts)
    if sys.platform == "win32":
        parts = tuple(_for_windows(part) for part in parts)
    target = folder.joinpath(*parts)
    if unsafe or not target.resolve().is_relative_to(folder.resolve()):
        raise UnsafeContent(f"The server gave the name {name[:200]!r}, which would leave {folder}. Refused.")
    return target


def _for_windows(name: str) -> str:
    """A name that Windows takes for a file, and as it is: it drops dots and spaces at the end."""
    name = _WINDOWS_FORBIDDEN.sub("-", name)
    if name.rstrip(". ") != name:
        name += "_"
    return f"_{name}" if _WINDOWS_DEVICE.fullmatch(name) else name


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of a folder into an error of ours.

    Args:
        folder: Where files are written or read; named in the error.

    Raises:
        LocalStorageError: The block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise LocalStorageError(
            f"{folder}: {error.strerror or error}. Make room or choose another folder, then run this again: what is "
            "complete stays."
        ) from error


@contextmanager
def atomic_write(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is complete and on disk.

    A link of that name is replaced, never followed. What a killed process has left half-written in the folder is
    removed when this process first writes there.

    Args:
        path: Final name; its folder is made when missing.
        mode: Permission bits of the file, less the umask; those of any new file when None.

    Yields:
        A binary file to write to. When the block raises, it is removed and an older file stays as it was.

    Raises:
        LocalStorageError: The disk is full or read-only, or the name is too long for it.
    """
    with on_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _SWEPT.sweep(path.parent)
        temporary, file = _begin_part(path.parent, 0o666 if mode is None else mode)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


class PartialFile:
    """A file that comes in several tries, and appears under its name only when it is complete and on disk.

    What a broken try has left stays beside it, also when the process dies, so that the next one goes on from there.
    One process at a time, please: the name of what is there is the same for all.

    Args:
        path: Final name; its folder is made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:32]}{_PARTIAL}")

    @property
    def size(self) -> int:
        """Bytes that are there from earlier tries."""
        with on_disk(self._path.parent):
            try:
                status = self._partial.lstat()
            except FileNotFoundError:
                return 0
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                return status.st_size
            # A link that somebody has planted.
            self._partial.unlink()
            return 0

    @contextmanager
    def writing(self, *, append: bool) -> Iterator[IO[bytes]]:
        """Write a part, on disk when the block ends.

        Args:
            append: Whether it comes after what is there; else that is thrown away.

        Yields:
            A binary file to write to.

        Raises:
            LocalStorageError: The disk does not take it. What it took stays for the next try.
        """
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        with on_disk(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self._partial, flags, 0o666), "ab" if append else "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())

    def complete(self) -> None:
        """Give the file its name."""
        with on_disk(self._path.parent):
            self._partial.replace(self._path)

    def discard(self) -> None:
        """Throw away what is there."""
        with on_disk(self._path.parent):
            self._partial.unlink(missing_ok=True)

    @staticmethod
    def sweep(folder: Path) -> None:
        """Remove what is left of files that nobody fetches any more.

        Args:
            folder: A folder in which no process is fetching.
        """
        with on_disk(folder):
            for left in folder.glob(f".*{_PARTIAL}"):
                left.unlink(missing_ok=True)


@contextmanager
def exclusive(lock: Path, *, seconds: float, what: str) -> Iterator[None]:
    """Keep other processes of this machine, and of those that share the disk, from doing the same.

    The lock is the operating system's: it ends with the process that holds it, however that ends.

    Args:
        lock: The lock file; its folder is made when missing. It stays when the lock is given back.
        seconds: How long to wait for another process.
        what: What is kept for oneself, for the error.

    Raises:
        HeldElsewhere: Another process holds it for longer than that.
        LocalStorageError: The lock file cannot be made.
    """
    with on_disk(lock.parent):
        lock.parent.mkdir(parents=True, exist_ok=True)
        holder = FileLock(lock, timeout=seconds, mode=0o600)
        try:
            holder.acquire()
        except Timeout:
            raise HeldElsewhere(
                f"{what} is in the hands of another process for more than {seconds:.0f} s ({lock}). Wait for it, or "
                "stop it, and run this again."
            ) from None
    try:
        yield
    finally:
        holder.release()


def private(path: Path) -> None:
    """Make a file that only its owner can read, for what another library then writes itself.

    A file that is there stays as it is; a link is refused.

    Args:
        path: Its name; its folder is made when missing.

    Raises:
        LocalStorageError: It cannot be made or opened, or is a link.
    """
    with on_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))


def digest(path: Path, algorithm: Literal["sha256", "md5"] = "sha256") -> str:
    """Compute the digest of a file.

    Args:
        path: File to read, in pieces.
        algorithm: MD5 where another program has written down that one; it proves nothing against a forger.

    Returns:
        Hexadecimal digits: 64 of SHA-256, 32 of MD5.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def is_later_version(version: object, known: int) -> bool:
    """Tell whether the version in a record says that a later release has written it.

    Args:
        version: As it stands in the record; whatever counts as a number, also as text.
        known: The version that this release writes.

    Returns:
        False for what is no number, which is damage.
    """
    if not isinstance(version, int | float | str):
        return False
    try:
        return float(version) > known
    except ValueError:
        return False


def _begin_part(folder: Path, mode: int) -> tuple[Path, IO[bytes]]:
    """Open a temporary file that no other process can take for left over."""
    # Opened this way because asking for the umask would mean to change it for a moment, in all threads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = folder / f".{uuid4().hex}.part"
        file = os.fdopen(os.open(temporary, flags, mode), "wb")
        # Another process may have swept it between its birth and its lock.
        if _locked(file) is not False and temporary.exists():
            return temporary, file
        file.close()


class _Folders:
    """Folders in which this process has looked for what dead processes left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[Path] = set()

    def sweep(self, folder: Path) -> None:
        with self._lock:
            if folder in self._known:
                return
            self._known.add(folder)
        for entry in os.scandir(folder):
            if _PART.fullmatch(entry.name):
                _remove_if_left_over(Path(entry.path))


_SWEPT = _Folders()


def _remove_if_left_over(part: Path) -> None:
    # Gone meanwhile, or somebody else's: not ours to remove then.
    with suppress(OSError):
        if sys.platform == "win32":
            part.unlink()  # refused while a process has it open
            return
        handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, "rb") as file:
            if _locked(file):
                part.unlink()


def _locked(file: IO[bytes]) -> bool | None:
    """Mark a file as held by this process until it is closed.

    Returns:
        False when another process holds it; None where the system has no locks, so that nobody can tell.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _storable(parts: Sequence[str]) -> bool:
    """Whether a file system can hold these names; JSON can spell half a surrogate pair, which none can."""
    try:
        return all(len(part.encode()) <= _MAX_NAME_BYTES for part in parts)
    except UnicodeEncodeError:
        return False
