"""Decoded images in memory, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["DecodeCache"]


class DecodeCache:
    """Decoded images, shared by all threads and bounded by bytes.

    An image that several threads want at once is decoded by one of them while the others wait. The least recently
    used go first; one that is larger than the bound is kept until the next one comes.

    Args:
        max_bytes: Bound of the decoded size of all images.

    Attributes:
        decoded: Images, or pieces of images, decoded so far.
        decoded_bytes: Their size.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.decoded = 0
        self.decoded_bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Any, tuple[Future[Any], int]] = OrderedDict()
        self._bytes = 0

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
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                own: Future[Any] = Future()
                self._entries[key] = own, 0
        if entry is not None:
            return entry[0].result()
        try:
            image, size = load()
        except BaseException as error:
            with self._lock:
                self._entries.pop(key, None)
            own.set_exception(error)
            raise
        own.set_result(image)
        with self._lock:
            self.decoded += counted
            self.decoded_bytes += size * counted
            if key in self._entries:
                self._entries[key] = own, size
                self._bytes += size
            if self._bytes > self.max_bytes:
                self._shrink(key)
        return image

    def _shrink(self, newest: Any) -> None:
        for old in [old for old in self._entries if old != newest]:
            if self._bytes <= self.max_bytes:
                break
            if self._entries[old][0].done():
                self._bytes -= self._entries.pop(old)[1]
