"""What the threads of one upload know of each other: whether it goes on, what is in hand, what was done."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter, deque

from prefect_biomed.clients.boss.errors import ChunkFailed
from prefect_biomed.clients.boss.ledger import Ledger, TileState
from prefect_biomed.clients.boss.models import UploadProgress, UploadReport
from prefect_biomed.clients.errors import BiomedError
from prefect_biomed.clients.texts import logger_of

__all__ = ["Course", "Setbacks", "Tally"]

logger = logger_of(__name__)

_NAMED_LIMIT = 1000
_RATE_SECONDS = 30.0
_COUNTS = ("received", "put", "put_bytes", "indexed", "deleted", "requeued", "duplicates", "abandoned")


class Course:
    """Whether an upload goes on, and which tiles are in hand.

    Args:
        grace_seconds: For how long after its end what was received is still begun.

    Attributes:
        reason: Why it ended before the queue was empty; empty otherwise.
        error: What broke it.
        is_exhausted: Whether the queue was found empty.
    """

    def __init__(self, grace_seconds: float = 0.0) -> None:
        self.reason = ""
        self.error: BaseException | None = None
        self.is_exhausted = False
        self._grace_seconds = grace_seconds
        self._begins_until = math.inf
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._in_hand: set[str] = set()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be received."""
        return self._over.is_set()

    @property
    def may_begin(self) -> bool:
        """Whether what was received is still to be begun."""
        return time.monotonic() < self._begins_until

    @property
    def in_hand(self) -> int:
        """Tiles that were received and are not dealt with."""
        return len(self._in_hand)

    def end(self, reason: str, *, at_once: bool = False) -> None:
        """Receive nothing more; the first reason is kept.

        Args:
            reason: Why.
            at_once: Whether what was received, but not begun, is left alone, too.
        """
        now = time.monotonic()
        if not self._over.is_set():
            self.reason = self.reason or reason
            self._begins_until = now + self._grace_seconds
            self._over.set()
        if at_once:
            self._begins_until = min(self._begins_until, now)
        with self._changed:
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End it because of an error; the first one is kept."""
        self.error = self.error or error
        self.end(f"failed: {error}", at_once=True)

    def holds(self, tile: str) -> bool:
        """Whether a tile is in hand."""
        return tile in self._in_hand

    def hold(self, tile: str) -> None:
        """Take a tile in hand."""
        with self._changed:
            self._in_hand.add(tile)

    def let_go(self, *tiles: str) -> None:
        """Have done with tiles, for good or until they come back."""
        with self._changed:
            self._in_hand.difference_update(tiles)
            self._changed.notify_all()

    def has_room(self, most: int, seconds: float = 1.0) -> bool:
        """Wait until no more than so many tiles are in hand.

        Args:
            most: That many.
            seconds: How long to wait.

        Returns:
            False when there are more after that time, or when the upload is over meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.in_hand <= most or self.is_over, timeout=seconds)
            return self.in_hand <= most

    def await_change(self, seconds: float) -> None:
        """Wait until a tile is dealt with, or for so long."""
        with self._changed:
            self._changed.wait(seconds)

    def pause(self, seconds: float) -> None:
        """Wait for so long, or until the upload is over."""
        self._over.wait(seconds)


class Tally:
    """The counts of one upload.

    Args:
        job_id: Number of the job.
        tile_count: Tiles that it has.

    Attributes:
        failed: Tiles that failed in this run, with reasons.
        remaining: Messages in the queue, visible or leased, as SQS last told.
    """

    def __init__(self, job_id: int, tile_count: int) -> None:
        self.failed: dict[str, str] = {}
        self.remaining = tile_count
        self._job_id = job_id
        self._tile_count = tile_count
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {"blank": [], "padded": [], "skipped": [], "quarantined": []}
        self._run, self._begun = uuid.uuid4().hex, time.time()
        self._finish_times: deque[tuple[float, int]] = deque()

    def count(self, **changes: int) -> None:
        """Add to counts of the report, by their names."""
        with self._lock:
            self._counts.update(changes)

    def name(self, kind: str, name: str) -> None:
        """Add a name to a list of the report, which is bounded.

        Args:
            kind: `blank`, `padded`, `skipped` or `quarantined`.
            name: Of the tile.
        """
        with self._lock:
            if len(self._names[kind]) < _NAMED_LIMIT:
                self._names[kind].append(name)
            self._counts[kind] += 1

    def finished(self, count: int) -> None:
        """Note that tiles were finished, for the rate."""
        with self._lock:
            self._finish_times.append((time.monotonic(), count))

    def write_down(self, ledger: Ledger, joins: int) -> None:
        """Let the ledger know what was done so far, for the report of the whole job.

        Args:
            ledger: The ledger of the job.
            joins: Times that keys were asked for.
        """
        with self._lock:
            counts = {name: self._counts[name] for name in _COUNTS} | {"joins": joins}
        ledger.note_run(self._run, self._begun, time.time(), counts)

    def progress(self, ledger: Ledger) -> UploadProgress:
        """Tell how far the upload is.

        Args:
            ledger: Knows what earlier runs and other processes finished.
        """
        now = time.monotonic()
        with self._lock:
            while self._finish_times and self._finish_times[0][0] < now - _RATE_SECONDS:
                self._finish_times.popleft()
            recent = list(self._finish_times)
            put_bytes = self._counts["put_bytes"]
        span = now - recent[0][0] if recent else 0.0
        rate = sum(count for _, count in recent) / span if span > 0.5 else 0.0
        return UploadProgress(
            finished=ledger.count(TileState.FINISHED),
            total=self._tile_count,
            remaining=self.remaining,
            tiles_per_second=rate,
            eta_seconds=self.remaining / rate if rate else None,
            put_bytes=put_bytes,
            failed=len(self.failed),
        )

    def report(self, ledger: Ledger, course: Course, *, before: int, joins: int, seconds: float) -> UploadReport:
        """Make the report of a run that has ended.

        Args:
            ledger: The ledger of the job.
            course: How it ended.
            before: Tiles that were finished before it.
            joins: Times that keys were asked for.
            seconds: Duration.
        """
        # When the queue is empty, tiles that a killed run had indexed were deleted by it, only not written down.
        settled = ledger.count(TileState.INDEXED) if course.is_exhausted else 0
        finished = ledger.count(TileState.FINISHED) + settled
        left_out = ledger.count(TileState.SKIPPED)
        failed = ledger.failed()
        quarantined = [kept for kept in ledger.quarantined() if not kept.poison]
        accounted = finished + left_out + len(failed) + len(quarantined)
        return UploadReport(
            job_id=self._job_id,
            tile_count=self._tile_count,
            **{name: self._counts[name] for name in _COUNTS},
            **{kind: tuple(tiles) for kind, tiles in self._names.items()},
            deleted_before=before + settled,
            failed=failed,
            unaccounted=max(0, self._tile_count - accounted),
            joins=joins,
            seconds=seconds,
            exhausted=course.is_exhausted,
            stopped=course.reason,
        )


class Setbacks:
    """What happens to tiles that could not be read or sent.

    Args:
        ledger: Keeps those that failed, for all processes of the upload.
        tally: Of this upload.
        course: Of this upload.
        attempts: Times that a message may fail for reasons that should pass.
    """

    def __init__(self, ledger: Ledger, tally: Tally, course: Course, attempts: int) -> None:
        self._ledger = ledger
        self._tally = tally
        self._course = course
        self._attempts = attempts
        self._tried: Counter[str] = Counter()

    def troubled(self, tile: str, error: BiomedError) -> None:
        """Leave the message of a tile that could not be sent to come back, a limited number of times."""
        self._tried[tile] += 1
        logger.warning("%s could not be sent: %s", tile, error)
        if self._tried[tile] >= self._attempts or isinstance(error, ChunkFailed):
            self._note(tile, str(error))
        else:
            self._tally.count(abandoned=1)
        self._course.let_go(tile)

    def give_up(self, tile: str, reason: str) -> None:
        """Leave the message of a tile in the queue for good."""
        self._note(tile, reason)
        self._course.let_go(tile)

    def _note(self, tile: str, reason: str) -> None:
        self._tally.failed[tile] = reason
        self._ledger.fail(tile, reason)
