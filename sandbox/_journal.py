"""The requests that a platform has received."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterator

from pydantic import BaseModel


class Entry(BaseModel):
    """One request in the journal. It never holds headers or bodies, and no secret of a query either.

    Attributes:
        number: 1 for the first request since the journal was emptied.
        time: when it arrived, seconds since the epoch.
        method: HTTP verb.
        path: as sent, still percent-encoded, without the query.
        query: as sent, without the question mark; keys, tokens and passwords are replaced by ***.
        status: of the answer; None while there is none, or when the connection was dropped.
        bytes_in: length of the request body read so far.
        bytes_out: length of the answer body sent so far.
        seconds: from arrival to the end of the answer.
        concurrent: requests in flight when it arrived, itself included.
        fault: name of the fault that was applied, if any.
        note: what the platform remarked about it, if anything.
        answered: status with which the platform itself answered, whatever the client then got; None when
            the platform was never asked, or has not answered yet.
        effect: whether that status says that what was asked was done (below 400).
        held: kept by a fault, to be carried out later.
    """

    number: int
    time: float
    method: str
    path: str
    query: str
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float | None = None
    concurrent: int
    fault: str | None = None
    note: str | None = None
    answered: int | None = None
    effect: bool = False
    held: bool = False

    @property
    def settled(self) -> bool:
        """Whether nothing more comes of it: answered or dropped, and not kept for later."""
        return self.seconds is not None and not self.held


class Journal:
    """The last 100 000 requests a platform has received, in order of arrival. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: deque[Entry] = deque(maxlen=100_000)
        self._count = 0
        self._in_flight = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries())

    def entries(self, method: str | None = None, path: str | None = None) -> list[Entry]:
        """Return copies of the entries, oldest first.

        Args:
            method: only this verb.
            path: only paths (as sent) in which this regular expression is found.
        """
        with self._lock:
            return [
                entry.model_copy()
                for entry in self._entries
                if (method is None or entry.method == method) and (path is None or re.search(path, entry.path))
            ]

    def peak(self, method: str | None = None, path: str | None = None) -> int:
        """Return how many of the matching requests were in flight at once, at most.

        Args:
            method: only this verb.
            path: only paths (as sent) in which this regular expression is found.
        """
        now = time.time()
        steps: list[tuple[float, int]] = []
        for entry in self.entries(method, path):
            end = now if entry.seconds is None else entry.time + entry.seconds
            steps += [(entry.time, 1), (end, -1)]
        # An end sorts before a beginning at the same instant: these two did not overlap.
        running = highest = 0
        for _, step in sorted(steps):
            running += step
            highest = max(highest, running)
        return highest

    def settle(self, timeout_seconds: float) -> bool:
        """Wait until nothing more comes of any request: none in flight, none kept by a fault.

        Args:
            timeout_seconds: for so long at most.

        Returns:
            Whether that came about.
        """
        deadline = time.monotonic() + timeout_seconds
        while not all(entry.settled for entry in self.entries()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def clear(self) -> None:
        """Forget all entries; numbers begin at 1 again."""
        with self._lock:
            self._entries.clear()
            self._count = 0

    def _begin(self, method: str, path: str, query: str) -> Entry:
        with self._lock:
            self._in_flight += 1
            self._count += 1
            entry = Entry(
                number=self._count,
                time=time.time(),
                method=method,
                path=path,
                query=query,
                concurrent=self._in_flight,
            )
            self._entries.append(entry)
            return entry

    def _end(self, entry: Entry) -> None:
        with self._lock:
            if entry.seconds is None:
                self._in_flight -= 1
                entry.seconds = max(0.0, time.time() - entry.time)
