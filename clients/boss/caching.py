"""Decoded images, kept within bounds of memory and disk until all of them was used."""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from prefect_biomed.clients.texts import logger_of

__all__ = ["DecodeCache", "Window"]

logger = logger_of(__name__)

Array: TypeAlias = npt.NDArray[Any]
Window: TypeAlias = tuple[slice, slice]
"""Rows and columns."""

# What is left of a disk for others.
_SPARED_BYTES = 2 * 1024**3


@dataclass(eq=False)
class _Entry:
    """One image, or a piece of one, that is decoded or about to be.

    Attributes:
        loaded: Set with the value when it is decoded.
        size: Bytes that it takes of the memory; 0 while it has none.
        unread: Values that nobody has taken yet; None where that is not counted.
        readers: Threads that take a part of it now.
        on_disk: Where it is, when it is not in memory any more.
    """

    loaded: Future[Any] = field(default_factory=Future)
    size: int = 0
    unread: int | None = None
    readers: int = 0
    on_disk: _Extent | None = None


class DecodeCache:
    """Decoded images, shared by all threads.

    An image that several threads want at once is decoded by one of them while the others wait. What is being decoded
    counts, too: an image that does not fit beside others is decoded when these are done. The least recently used leave
    the memory first; of those that are not used up yet, the rest is found on the disk. One that is larger than the
    bound is kept until the next one comes.

    Args:
        max_bytes: Bound of the decoded size of all images in memory.
        disk_bytes: Bound of those on the disk; beyond it, and without it, they are decoded again.
        folder: Where on the disk; in a file without a name, which is gone with the process, however that ends.

    Attributes:
        decoded: Images, or pieces of images, decoded so far.
        decoded_bytes: Their size.
    """

    def __init__(self, max_bytes: int, disk_bytes: int = 0, folder: Path | None = None) -> None:
        self.max_bytes = max_bytes
        self.decoded = 0
        self.decoded_bytes = 0
        self._changed = threading.Condition()
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._bytes = 0
        self._coming = 0
        self._disk = _Disk(folder, disk_bytes) if folder and disk_bytes else None

    def get(self, key: Any, load: Callable[[], tuple[Any, int]], *, counted: bool = True) -> Any:
        """Return what `load` makes, from memory when it was made before.

        Args:
            key: Identity of the image.
            load: Makes the image; returns it with its size in bytes.
            counted: Whether it is pixels, which `decoded` counts, and not a header.

        Returns:
            The image. It is shared: do not change it.

        Raises:
            BaseException: Whatever `load` raises; the next caller tries again.
        """
        entry, is_new = self._entered(key)
        if is_new:
            self._load(key, entry, load, coming=0, counted=counted)
        return entry.loaded.result()

    def part(
        self, key: Any, shape: tuple[int, ...], itemsize: int, decode: Callable[[], Array], where: Window
    ) -> Array:
        """Return a part of what `decode` makes, which is kept until each of its values was taken once.

        Args:
            key: Identity of the image.
            shape: What it will have: rows, columns, and channels where there are some.
            itemsize: Bytes of one value.
            decode: Makes the image.
            where: Rows and columns that are wanted.

        Returns:
            The part. It may be shared: do not change it.

        Raises:
            BaseException: Whatever `decode` raises; the next caller tries again.
        """
        entry, is_new = self._entered(key, reads=True)
        try:
            if is_new:

                def load() -> tuple[Array, int]:
                    array = decode()
                    entry.unread = array.shape[0] * array.shape[1]
                    return array, array.nbytes

                self._load(key, entry, load, coming=math.prod(shape) * itemsize, counted=True)
            value = entry.loaded.result()
            on_disk = entry.on_disk
            part: Array = value[where] if on_disk is None else on_disk.read(where)
        except BaseException:
            self._leave(key, entry, 0)
            raise
        self._leave(key, entry, part.shape[0] * part.shape[1])
        return part

    def _entered(self, key: Any, *, reads: bool = False) -> tuple[_Entry, bool]:
        with self._changed:
            entry = self._entries.get(key)
            is_new = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry()
            self._entries.move_to_end(key)
            entry.readers += reads
        return entry, is_new

    def _load(
        self, key: Any, entry: _Entry, load: Callable[[], tuple[Any, int]], *, coming: int, counted: bool
    ) -> None:
        with self._changed:
            while coming and self._coming and self._coming + coming > self.max_bytes:
                self._changed.wait()
            self._coming += coming
            self._shrink(key)
        try:
            image, size = load()
        except BaseException as error:
            with self._changed:
                self._entries.pop(key, None)
                self._coming -= coming
                self._changed.notify_all()
            entry.loaded.set_exception(error)
            raise
        with self._changed:
            self._coming -= coming
            self.decoded += counted
            self.decoded_bytes += size * counted
            entry.size = size
            self._bytes += size
            entry.loaded.set_result(image)
            self._shrink(key)
            self._changed.notify_all()

    def _leave(self, key: Any, entry: _Entry, taken: int) -> None:
        """Note that a part was taken; what is used up goes."""
        with self._changed:
            entry.readers -= 1
            if entry.unread is None:
                return
            entry.unread -= taken
            if entry.unread <= 0 and not entry.readers:
                self._remove(key, entry)

    def _remove(self, key: Any, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]
        self._bytes -= entry.size
        entry.size = 0
        if entry.on_disk is not None and self._disk is not None:
            self._disk.free(entry.on_disk)
            entry.on_disk = None

    def _shrink(self, newest: Any) -> None:
        """Take the least recently used out of the memory until what is there, and what is coming, fits."""
        for key, entry in list(self._entries.items()):
            if self._bytes + self._coming <= self.max_bytes:
                break
            if key == newest or not entry.size:
                continue
            kept = self._disk.keep(entry.loaded.result()) if self._disk and entry.unread is not None else None
            if kept is None:
                self._remove(key, entry)
                continue
            entry.on_disk = kept
            entry.loaded = Future()
            entry.loaded.set_result(None)
            self._bytes -= entry.size
            entry.size = 0


class _Disk:
    """Arrays in one file that has no name.

    Args:
        folder: Where it is.
        max_bytes: It never grows beyond this.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._file: IO[bytes] | None = None
        self._end = 0
        self._used = 0
        self._free: dict[int, list[int]] = {}
        self._is_refused = False

    def keep(self, array: Array) -> _Extent | None:
        """Write an array; None where there is no room for it."""
        length = -(-array.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  # as long as we live
                weakref.finalize(self, self._file.close)
            place = self._place(length)
            if place is None:
                return None
            self._file.seek(place)
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            while content:
                content = content[self._file.write(content) :]
            self._file.truncate(max(self._end, place + length))
        except OSError as error:
            self._refuse(error.strerror or str(error))
            return None
        self._used += 1
        return _Extent(self._file, place, length, array.shape, array.dtype)

    def free(self, extent: _Extent) -> None:
        """Give the room of an array to the next of its size; all of it when there is no other."""
        self._used -= 1
        self._free.setdefault(extent.length, []).append(extent.place)
        if not self._used and self._file is not None:
            self._file.truncate(0)
            self._free.clear()
            self._end = 0

    def _place(self, length: int) -> int | None:
        if self._free.get(length):
            return self._free[length].pop()
        if self._end + length > self._max_bytes:
            self._refuse(f"cache_disk_bytes is {self._max_bytes}")
            return None
        if shutil.disk_usage(self._folder).free < length + _SPARED_BYTES:
            self._refuse("the disk is nearly full")
            return None
        place, self._end = self._end, self._end + length
        return place

    def _refuse(self, reason: str) -> None:
        if not self._is_refused:
            logger.warning("%s: %s; source images are decoded more than once from now on", self._folder, reason)
        self._is_refused = True


@dataclass(frozen=True)
class _Extent:
    """An array in the file."""

    file: IO[bytes]
    place: int
    length: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, where: Window) -> Array:
        """Read a part; only the pages that it lies in are touched, and none of them is held."""
        with mmap.mmap(self.file.fileno(), self.length, access=mmap.ACCESS_READ, offset=self.place) as mapped:
            whole: Array = np.ndarray(self.shape, self.dtype, mapped)
            part = whole[where].copy()
            del whole
        return part
