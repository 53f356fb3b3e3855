"""Receiving upload messages, as many as can be worked on, until the queue is empty."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from prefect_biomed.clients.boss._aws import BATCH, JobQueues, UploadMessage
from prefect_biomed.clients.boss._keys import PoisonMessage
from prefect_biomed.clients.boss.ledger import Ledger
from prefect_biomed.clients.boss.messages import Messages, Work
from prefect_biomed.clients.boss.models import UploadSettings
from prefect_biomed.clients.boss.putting import Pieces
from prefect_biomed.clients.boss.tally import Course, Tally
from prefect_biomed.clients.errors import SourceUnreadable

__all__ = ["Receiving"]

_WAIT_SECONDS = 1
_COUNT_EVERY_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.2


class Receiving:
    """Receives messages and hands them to a pool of threads.

    Args:
        queues: The queues of the job.
        ledger: The ledger of the job.
        messages: Reads the messages.
        pieces: What the pool does with each.
        settings: How to upload.
        tally: Of this upload.
        course: Of this upload.
        is_indexed: Takes tiles that the Boss knows of already.
    """

    def __init__(
        self,
        queues: JobQueues,
        ledger: Ledger,
        messages: Messages,
        pieces: Pieces,
        settings: UploadSettings,
        *,
        tally: Tally,
        course: Course,
        is_indexed: Callable[[Work], None],
    ) -> None:
        self._queues = queues
        self._ledger = ledger
        self._messages = messages
        self._pieces = pieces
        self._settings = settings
        self._tally = tally
        self._course = course
        self._is_indexed = is_indexed
        self._received = 0
        self._counted_at = 0.0
        self._quiet_since: float | None = None
        self._empty_looks = 0
        self._twins: list[UploadMessage] = []
        self._looks_at_kept = False

    def run(self, *, retry_quarantined: bool) -> None:
        """Receive until the queue is empty, a limit is reached, or the upload is over.

        Args:
            retry_quarantined: Whether to try what earlier uploads put aside, when the queue is empty.
        """
        self._looks_at_kept = retry_quarantined
        putting, course = self._pieces.putting, self._course
        limit = self._settings.max_seconds
        deadline = math.inf if limit is None else time.monotonic() + limit
        with ThreadPoolExecutor(putting.workers, thread_name_prefix="boss-put") as pool:
            while not course.is_over and not self._is_at_limit(deadline):
                if not course.has_room(putting.most):
                    continue
                is_idle = course.in_hand == 0
                self._queues.renew_if_old()
                if time.monotonic() - self._counted_at > _COUNT_EVERY_SECONDS:
                    self._count()
                fresh = self._accept(self._separate_twins(), pool) + self._accept(self._receive(is_idle=is_idle), pool)
                if fresh:
                    self._received += fresh
                    self._quiet_since, self._empty_looks = None, 0
                elif not is_idle:
                    course.await_change(0.05)
                elif self._is_exhausted():
                    return

    def _is_at_limit(self, deadline: float) -> bool:
        settings = self._settings
        if time.monotonic() > deadline:
            self._course.end(f"max_seconds ({settings.max_seconds:g})")
        elif settings.max_tiles is not None and self._received >= settings.max_tiles:
            self._course.end(f"max_tiles ({settings.max_tiles})")
        return self._course.is_over

    def _is_exhausted(self) -> bool:
        """Whether the queue is empty; gives up where others hold what is left for too long."""
        visible, leased = self._count()
        if visible == 0 and leased <= len(self._ledger.failed()):
            # The counts are approximate; two looks are not proof, but the completion looks again.
            self._empty_looks += 1
            self._course.pause(_LOOK_AGAIN_SECONDS)
            if self._empty_looks < 2:
                return False
            if self._looks_at_kept:
                self._looks_at_kept = False
                self._pieces.retry_quarantined(self._messages)
                return False
            self._course.is_exhausted = True
            return True
        self._empty_looks = 0
        self._quiet_since = self._quiet_since or time.monotonic()
        if time.monotonic() - self._quiet_since > self._settings.straggler_seconds:
            self._course.end(f"{leased} messages are held by others")
        self._course.pause(_LOOK_AGAIN_SECONDS)
        return False

    def _count(self) -> tuple[int, int]:
        visible, leased = self._queues.counts()
        self._tally.remaining, self._counted_at = visible + leased, time.monotonic()
        return visible, leased

    def _receive(self, *, is_idle: bool) -> list[UploadMessage]:
        limit = self._settings.max_tiles
        most = BATCH if limit is None else min(BATCH, limit - self._received)
        messages = self._queues.receive(self._lease(), _WAIT_SECONDS if is_idle and self._quiet_since else 0, most)
        self._tally.count(received=len(messages))
        return messages

    def _separate_twins(self) -> list[UploadMessage]:
        """Take out the messages whose tile came by another message, and is not in hand any more."""
        due = [message for message in self._twins if not self._course.holds(self._messages.read(message).tile)]
        self._twins = [message for message in self._twins if message not in due]
        return [message for message in due if message.left_seconds > 0]

    def _lease(self) -> float:
        """Long enough for all that is in hand at the present pace; it cannot be prolonged later."""
        settings, shortest, slow = self._settings, self._pieces.putting.shortest_lease, self._pieces.slow_seconds
        needed = 30.0 + 3 * slow * (1 + self._course.in_hand / settings.threads) if slow > 1 else shortest
        return min(max(needed, shortest), settings.max_lease_seconds)

    def _accept(self, messages: Sequence[UploadMessage], pool: ThreadPoolExecutor) -> int:
        """Check a batch and hand it to the pool, grouped by source; returns how many were worth it."""
        work: list[Work] = []
        fresh = 0
        for message in messages:
            try:
                work.append(self._messages.read(message))
            except PoisonMessage as error:
                fresh += 1
                self._pieces.quarantine(message, None, f"{error}", poison=True)
        names = [item.tile for item in work]
        entries, patched = self._ledger.entries(names), self._ledger.blank(names) | self._ledger.padded(names)
        ready: list[Work] = []
        for item in work:
            item.entry, item.was_patched = entries.get(item.tile), item.tile in patched
            if item.tile in self._tally.failed:
                continue  # left in the queue, under the policy `fail`
            fresh += 1
            if self._course.holds(item.tile):
                self._twins.append(item.message)
                continue
            self._course.hold(item.tile)
            if item.is_done:
                self._tally.count(duplicates=1)
                self._is_indexed(item)
            elif self._has_path(item):
                ready.append(item)
        for item in sorted(ready, key=lambda item: item.path):
            pool.submit(self._pieces.work, item)
        return fresh

    def _has_path(self, item: Work) -> bool:
        try:
            item.path = self._pieces.putting.source.path(item.position)
        except SourceUnreadable as error:
            self._pieces.bad_source(item, error)
            return False
        except BaseException:
            self._course.let_go(item.tile)
            raise
        return True
