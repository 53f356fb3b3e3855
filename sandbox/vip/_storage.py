"""The files of VIP: a tree per user and group, slow transfers, deletions that take effect later."""

from __future__ import annotations

import asyncio
import mimetypes
import os
import posixpath
import shutil
import threading
import time
import unicodedata
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect_biomed.sandbox.vip._model import ApiError, User, VipSwitches, refused

ROOT = "/vip"
_GROUP_SUFFIX = " (group)"
_DIRECTORY_TYPE = "text/directory"
_DELETE_WORKERS = 5


def stored_name(name: str) -> str:
    """Return the name VIP stores a file under: trimmed, spaces to underscores, everything but ASCII dropped."""
    decomposed = unicodedata.normalize("NFKD", name.strip().replace(" ", "_"))
    return decomposed.encode("ascii", "ignore").decode()


class _Grid:
    """An event loop in a thread of its own: what it does goes on while the portal is down."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-vip-storage", daemon=True)

    def begin(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """Have something done, whether or not somebody waits for it."""
        if self._thread.ident is None:
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """Give up what is being done."""
        if self._thread.ident is not None:
            self.begin(self._cancel()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    @staticmethod
    async def _cancel() -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _done_within(work: Future[None], seconds: float) -> bool:
    # Looked at rather than awaited: the portal may go down before it is done.
    deadline = time.monotonic() + seconds
    while not work.done() and time.monotonic() < deadline:
        await asyncio.sleep(0.002)
    return work.done()


class Storage:
    """The storage of the platform, a service beside the portal: what was accepted goes on while the portal is down.

    Args:
        directory: where everything is kept.
        switches: of the sandbox.
    """

    def __init__(self, directory: Path, switches: VipSwitches) -> None:
        self._switches = switches
        self._homes = directory / "users"
        self._groups = directory / "groups"
        self._spool = directory / "spool"
        self._cache = directory / "cache"
        shutil.rmtree(self._cache, ignore_errors=True)
        for folder in (self._spool, self._cache):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._last_number = 0
        self._arriving: dict[Path, Path] = {}
        self._leaving: list[Path] = []
        self._active_transfers = 0
        self._active_deletes = 0
        self._grid = _Grid()
        self._fetched: dict[tuple[str, int, int], tuple[Future[None], Path]] = {}

    def stop(self) -> None:
        """Give up what is under way."""
        self._grid.stop()

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give what a new process needs to go on, and change nothing of it meanwhile."""
        with self._lock:
            yield {"last_number": self._last_number, "arriving": self._arriving, "leaving": self._leaving}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `frozen` gave; what had not arrived whole is lost."""
        self._last_number, self._arriving, self._leaving = state["last_number"], state["arriving"], state["leaving"]
        for spooled in set(self._spool.iterdir()) - set(self._arriving):
            spooled.unlink()

    def resume(self) -> None:
        """Take up the transfers and deletions that a process before this one had accepted."""
        with self._lock:
            arriving, leaving = dict(self._arriving), list(self._leaving)
        for spooled, target in arriving.items():
            self._grid.begin(self._try_again(spooled, target))
        for place in leaving:
            self._grid.begin(self._delete(place))

    def _number(self) -> int:
        with self._lock:
            self._last_number += 1
            return self._last_number

    def add_user(self, user: User) -> None:
        """Make the folders of a user and of the groups of that user."""
        for folder in ("Home", "Trash"):
            (self._homes / user.name / folder).mkdir(parents=True, exist_ok=True)
        for group in user.groups:
            self._group(group).mkdir(parents=True, exist_ok=True)

    def _group(self, group: str) -> Path:
        return self._groups / group.replace(" ", "_")

    # Paths

    def locate(self, user: User, path: str, *, write: bool = False) -> Path | None:
        """Return where a platform path is kept; None for the virtual root.

        Args:
            user: who asks.
            path: absolute platform path; `..` is resolved first.
            write: to make, change or delete it.

        Raises:
            ApiError: 8013 when the user may not.
        """
        if "\x00" in path:
            raise refused("a NUL in the path")
        parts = posixpath.normpath("/" + path.strip("/")).split("/")[1:]
        denied = ApiError(8013, f"You may not access the path {path}.")
        if parts[0] != ROOT[1:] or (write and len(parts) < 3):
            raise denied
        if len(parts) == 1:
            return None
        top, *rest = parts[1:]
        if top in ("Home", "Trash"):
            return self._homes.joinpath(user.name, top, *rest)
        group = top.removesuffix(_GROUP_SUFFIX)
        if group == top or group not in user.groups or (write and user.beginner):
            raise denied
        return self._group(group).joinpath(*rest)

    def may_be_input(self, user: User, path: str) -> bool:
        """Tell whether a launch accepts a path as an input; only homes and groups of others are refused."""
        parts = path.split("/")
        if parts[:3] == ["", ROOT[1:], "Users"]:
            return parts[3:4] == [user.name]
        if parts[:2] == ["", ROOT[1:]] and parts[2:] and parts[2].endswith(_GROUP_SUFFIX):
            return parts[2].removesuffix(_GROUP_SUFFIX) in user.groups
        return True

    # What the API tells about paths

    def exists(self, user: User, path: str) -> bool:
        """Tell whether a path exists."""
        place = self.locate(user, path)
        return place is None or self._present(place)

    def properties(self, user: User, path: str) -> dict[str, Any]:
        """Return the path object; of a missing path, too."""
        place = self.locate(user, path)
        if place is None:
            return _properties(path, size=2 + len(user.groups), directory=True)
        if not self._present(place):
            return _properties(path, exists=False)
        status = place.stat()
        if place.is_dir():
            return _properties(path, size=sum(1 for _ in place.iterdir()), directory=True, date=int(status.st_mtime))
        return _properties(path, size=status.st_size)

    def listing(self, user: User, path: str) -> list[dict[str, Any]]:
        """Return the path objects of what is in a directory, not recursively."""
        place = self.locate(user, path)
        if place is None:
            names = ["Home", "Trash", *(group + _GROUP_SUFFIX for group in user.groups)]
            return [_properties(f"{ROOT}/{name}", directory=True) for name in names]
        if not self._present(place) or not place.is_dir():
            raise refused("a list of what is not a directory")
        with os.scandir(place) as entries:
            return [
                _properties(f"{path}/{entry.name}", size=0, directory=True)
                if entry.is_dir()
                else _properties(f"{path}/{entry.name}", size=entry.stat().st_size)
                for entry in sorted(entries, key=lambda entry: entry.name)
            ]

    @staticmethod
    def _present(place: Path) -> bool:
        try:
            return place.exists()
        except OSError as error:
            raise refused(f"the storage says: {error.strerror}") from error

    # Transfers

    async def upload(self, user: User, path: str, body: AsyncIterator[bytes]) -> str:
        """Store a body as a file, or make a directory when it is empty.

        Args:
            user: who asks.
            path: where to; the last part is rewritten.
            body: streamed to disk.

        Returns:
            A remark for the journal.

        Raises:
            ApiError: 8013, or 8000 for all that goes wrong, also when the file arrives later.
        """
        place = self.locate(user, path, write=True)
        assert place is not None  # the root cannot be written
        name = stored_name(place.name) if self._switches.rewrite_names else place.name
        target = place.with_name(name) if name else None
        parent_present = self._present(place.parent) and place.parent.is_dir()
        spooled = self._spool / str(self._number())
        size = 0
        try:
            with spooled.open("wb") as stream:
                async for chunk in body:
                    size += len(chunk)
                    stream.write(chunk)
        except BaseException:
            spooled.unlink()
            raise
        if not parent_present or target is None:
            spooled.unlink()
            raise refused("no parent directory" if target is not None else "nothing left of the name")
        if not size:
            spooled.unlink()
            return self._make_directory(target)
        await self._store(spooled, target)
        return f"stored as {target.name}"

    async def store_content(self, user: User, path: str, content: bytes) -> None:
        """Store bytes as a file, an empty one too.

        Raises:
            ApiError: as `upload`.
        """
        place = self.locate(user, path, write=True)
        assert place is not None  # the root cannot be written
        name = stored_name(place.name) if self._switches.rewrite_names else place.name
        if not name or not place.parent.is_dir():
            raise refused("no parent directory")
        spooled = self._spool / str(self._number())
        spooled.write_bytes(content)
        await self._store(spooled, place.with_name(name))

    def _make_directory(self, target: Path) -> str:
        try:
            target.mkdir(exist_ok=not self._switches.mkdir_existing_fails)
        except OSError as error:
            raise refused(f"no directory made: {error.strerror}") from error
        return f"directory {target.name}"

    async def _store(self, spooled: Path, target: Path) -> None:
        with self._lock:
            self._arriving[spooled] = target
        if self._switches.reschedule_uploads > 0:
            self._switches.reschedule_uploads -= 1
            self._grid.begin(self._try_again(spooled, target))
            raise refused("the storage rescheduled the transfer")
        transfer = self._grid.begin(self._transfer(spooled, target))
        if not await _done_within(transfer, self._switches.transfer_limit_seconds):
            raise refused("the transfer takes too long and goes on")
        transfer.result()

    async def _transfer(self, spooled: Path, target: Path) -> None:
        await self._in_slot(self._switches.transfer_seconds)
        if not self._place(spooled, target):
            self._grid.begin(self._try_again(spooled, target))
            raise refused("the file exists, or its directory is gone")

    async def _in_slot(self, seconds: float) -> None:
        while self._active_transfers >= self._switches.transfer_slots:
            await asyncio.sleep(0.005)
        self._active_transfers += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._active_transfers -= 1

    async def _try_again(self, spooled: Path, target: Path) -> None:
        for _ in range(self._switches.storage_retries):
            await asyncio.sleep(self._switches.reschedule_seconds)
            if self._place(spooled, target):
                return
        self._forget(spooled)

    def _place(self, spooled: Path, target: Path) -> bool:
        """Give an upload its name unless something has that name; a link does both in one step."""
        try:
            os.link(spooled, target)
        except OSError:
            return False
        self._forget(spooled)
        # The link keeps the time of the upload's first byte; the storage knows only when it was complete.
        os.utime(target, (time.time(), time.time()))
        return True

    def _forget(self, spooled: Path) -> None:
        with self._lock:
            self._arriving.pop(spooled, None)
        spooled.unlink(missing_ok=True)

    async def fetch(self, user: User, path: str) -> Path:
        """Return a copy of a file, whose content may be sent.

        Raises:
            ApiError: 8013, or 8000 when it is no file, is too large, or takes too long; then it goes on, and asking
                later succeeds.
        """
        place = self.locate(user, path)
        if place is None or not self._present(place) or not place.is_file():
            raise refused("only files have content")
        try:
            status = place.stat()
        except OSError as error:
            raise refused("the file is gone") from error
        if status.st_size > self._switches.max_direct_transfer_bytes:
            raise refused("the file is too large for a direct transfer")
        key = (str(place), status.st_mtime_ns, status.st_size)
        if key not in self._fetched:
            # What was fetched can be sent though it is deleted or replaced meanwhile.
            copy = self._cache / str(self._number())
            try:
                os.link(place, copy)
            except OSError as error:
                raise refused("the file is gone") from error
            self._fetched[key] = (self._grid.begin(self._in_slot(self._switches.download_seconds)), copy)
        fetch, copy = self._fetched[key]
        if not await _done_within(fetch, self._switches.transfer_limit_seconds):
            raise refused("the fetch takes too long and goes on")
        return copy

    # Deletion

    def delete(self, user: User, path: str) -> None:
        """Queue the deletion of a file or directory.

        Raises:
            ApiError: 8013, or 8000 when there is nothing of that name.
        """
        place = self.locate(user, path, write=True)
        assert place is not None  # the root cannot be written
        if not self._present(place):
            raise refused("nothing to delete")
        if self._switches.lose_deletes > 0:
            self._switches.lose_deletes -= 1
            return
        if self._switches.delete_seconds == 0:
            _remove(place)
            return
        with self._lock:
            self._leaving.append(place)
        self._grid.begin(self._delete(place))

    async def _delete(self, place: Path) -> None:
        while self._active_deletes >= _DELETE_WORKERS:
            await asyncio.sleep(0.005)
        self._active_deletes += 1
        try:
            await asyncio.sleep(self._switches.delete_seconds)
            await asyncio.to_thread(_remove, place)
            with self._lock:
                self._leaving.remove(place)
        finally:
            self._active_deletes -= 1

    # What the jobs do, in threads of their own

    def input_file(self, user: User, path: str) -> Path | None:
        """Return the file or directory an input names; None when there is none."""
        try:
            place = self.locate(user, path)
        except ApiError:
            return None
        return place if place is not None and self._present(place) else None

    def add_result(self, user: User, path: str, source: Path) -> bool:
        """Copy a result to a platform path, making directories; tell whether that worked."""
        try:
            place = self.locate(user, path, write=True)
            assert place is not None  # the root cannot be written
            place.parent.mkdir(parents=True, exist_ok=True)
        except (ApiError, OSError):
            return False
        if place.exists() and self._switches.result_collision == "fail":
            return False
        part = self._spool / f"result-{self._number()}"
        try:
            shutil.copyfile(source, part)
            part.replace(place)
        except OSError:
            part.unlink(missing_ok=True)
            return False
        return True


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _properties(
    path: str, *, exists: bool = True, size: int | None = None, directory: bool = False, date: int | None = None
) -> dict[str, Any]:
    mime = _DIRECTORY_TYPE if directory else mimetypes.guess_type(path)[0] or "application/octet-stream"
    return {
        "path": path,
        "lastModificationDate": date,
        "isDirectory": directory if exists else None,
        "exists": exists,
        "size": size,
        "executionId": None,
        "mimeType": mime if exists else None,
    }
