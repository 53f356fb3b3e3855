"""Moving files: a bounded pool, downloads that appear whole or not at all, names that stay in their folder."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar
from uuid import uuid4

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    PermissionDeniedError,
    TransferFailed,
    UnsafeContent,
)

__all__ = ["atomic_write", "digest", "safe_join", "transfer_all"]

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

_WINDOWS_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_MAX_NAME_BYTES = 255


def safe_join(folder: Path, name: str) -> Path:
    """Join a name that came from a server to a local folder.

    Args:
        folder: The folder that must not be left.
        name: A relative POSIX path.

    Returns:
        A path below the folder. Characters that Windows forbids are replaced there by `-`.

    Raises:
        UnsafeContent: The name is empty, absolute, has `..`, a NUL or a component no file system can hold, or leads
            out of the folder through a link that already exists.
    """
    parts = PurePosixPath(name).parts
    unsafe = not parts or name.startswith("/") or ".." in parts or "\x00" in name or not _storable(parts)
    if sys.platform == "win32":
        parts = tuple(_WINDOWS_FORBIDDEN.sub("-", part) for part in parts)
    target = folder.joinpath(*parts)
    if unsafe or not target.resolve().is_relative_to(folder.resolve()):
        raise UnsafeContent(f"The server gave the name {name[:200]!r}, which would leave {folder}. Refused.")
    return target


@contextmanager
def atomic_write(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Write a file that appears under its name only when it is complete and on disk.

    Args:
        path: Final name; its folder is made when missing.
        mode: Permission bits of the file, less the umask; those of any new file when None.

    Yields:
        A binary file to write to. When the block raises, it is removed and an older file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid4().hex}.part")
    # Opened this way because asking for the umask would mean to change it for a moment, in all threads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o666 if mode is None else mode)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path: File to read, in pieces.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def transfer_all(
    items: Sequence[Item],
    transfer: Callable[[Item], Outcome],
    *,
    name: Callable[[Item], str],
    subject: str,
    parallelism: int,
    on_done: Callable[[Item, Outcome], None] | None = None,
) -> list[Outcome]:
    """Transfer many files at once; one that fails does not stop the others.

    Args:
        items: What to transfer.
        transfer: Transfers one item, in a worker thread, with its own retries.
        name: The name of an item in an error.
        subject: What this is about, for the error.
        parallelism: Number of transfers at the same time.
        on_done: Called in the calling thread after each success, so that it may write a ledger without a lock.

    Returns:
        The outcomes, in the order of the items.

    Raises:
        TransferFailed: Some items failed; all others were transferred.
        AuthenticationError: The key was refused; nothing further was begun.
        PermissionDeniedError: The same for a lack of rights.
    """
    outcomes: dict[int, Outcome] = {}
    failures: dict[str, BiomedError] = {}
    waiting: Iterable[int] = iter(range(len(items)))
    with ThreadPoolExecutor(max_workers=parallelism) as pool:
        running: dict[Future[Outcome], int] = {}
        try:
            while True:
                for index in waiting:
                    running[pool.submit(transfer, items[index])] = index
                    if len(running) >= 2 * parallelism:
                        break
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    try:
                        outcomes[index] = future.result()
                    except (AuthenticationError, PermissionDeniedError):
                        raise
                    except BiomedError as error:
                        failures[name(items[index])] = error
                    else:
                        if on_done:
                            on_done(items[index], outcomes[index])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failures:
        raise TransferFailed(subject, failures, len(items))
    return [outcomes[index] for index in range(len(items))]


def _storable(parts: Sequence[str]) -> bool:
    """Whether a file system can hold these names; JSON can spell half a surrogate pair, which none can."""
    try:
        return all(len(part.encode()) <= _MAX_NAME_BYTES for part in parts)
    except UnicodeEncodeError:
        return False
