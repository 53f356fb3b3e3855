"""What follows a tile that is in the bucket: the Boss is told of it, then its upload message is deleted.

Each step has one thread and works in batches of ten, as many as SQS takes at once. Everything that a crash could make
ambiguous is written to the ledger before it is sent.
"""

from __future__ import annotations

import queue
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prefect_biomed.clients.boss._aws import BATCH, JobQueues, Pauses, batches
from prefect_biomed.clients.boss.ledger import Ledger, LedgerEntry, TileState
from prefect_biomed.clients.boss.messages import Messages, Work
from prefect_biomed.clients.boss.tally import Course, Setbacks, Tally
from prefect_biomed.clients.errors import BiomedError, ConnectionFailed, JobFailed, PlatformError, is_transient

__all__ = ["Deleting", "Indexing"]

_COLLECT_SECONDS = 0.03
_FAILED = 500


class _Step(ABC):
    """A thread that deals with batches of what others give it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()

    def take(self, item: Work) -> None:
        """Take a tile over."""
        self._waiting.put(item)

    def end(self) -> None:
        """Let `run` return when all that was taken is dealt with."""
        self._waiting.put(None)

    def run(self) -> None:
        """Deal with batches until `end`."""
        for batch in self._batches():
            self.deal_with(batch)

    @abstractmethod
    def deal_with(self, batch: list[Work]) -> None:
        """Deal with up to ten tiles."""

    def _batches(self) -> Iterator[list[Work]]:
        """Yield batches of up to ten; a batch waits a moment to fill."""
        ended = False
        while not ended:
            item = self._waiting.get()
            batch: list[Work] = []
            deadline = time.monotonic() + _COLLECT_SECONDS
            while item is not None:
                batch.append(item)
                left = deadline - time.monotonic()
                if len(batch) == BATCH:
                    break
                try:
                    item = self._waiting.get(timeout=left) if left > 0 else self._waiting.get_nowait()
                except queue.Empty:
                    break
            ended = item is None
            if batch:
                yield batch


class Indexing(_Step):
    """Tells the Boss of tiles that are in the bucket.

    The intent is written down first. After a crash in between nobody knows whether the message was sent; sending it
    again is harmless while the chunk is incomplete, but makes the Boss ask for a finished chunk again. For that reason
    a chunk is not finished before index messages of it whose answer was lost can no longer arrive: its tiles are let
    go, and come back when their leases end.

    Args:
        queues: The queues of the job.
        ledger: The ledger of the job.
        messages: Writes the index messages.
        setbacks: Told of what could not be sent.
        tally: Of this upload.
        course: Of this upload.
        forward: Takes what is indexed.
    """

    def __init__(
        self,
        queues: JobQueues,
        ledger: Ledger,
        messages: Messages,
        *,
        setbacks: Setbacks,
        tally: Tally,
        course: Course,
        forward: Callable[[Work], None],
    ) -> None:
        super().__init__()
        self._queues = queues
        self._ledger = ledger
        self._messages = messages
        self._setbacks = setbacks
        self._tally = tally
        self._course = course
        self._forward = forward

    def deal_with(self, batch: list[Work]) -> None:
        """Send the index messages of a batch."""
        to_send: list[Work] = []
        entries = self._ledger.entries([item.tile for item in batch])
        for item in batch:
            if item.message.left_seconds <= 0:
                self._tally.count(abandoned=1)  # somebody else has it by now
                self._course.let_go(item.tile)
            elif self._was_indexed_meanwhile(item, entries.get(item.tile)) or self._is_surely_indexed(item):
                self._tally.count(duplicates=1)
                self._forward(item)
            else:
                to_send.append(item)
        to_send = self._without_those_that_wait(to_send, entries)
        self._ledger.mark([item.row for item in to_send], TileState.INDEXING)
        bodies = [self._messages.index_body(item) for item in to_send]
        for positions in batches(bodies):
            self._send([to_send[position] for position in positions], [bodies[position] for position in positions])

    def _send(self, items: list[Work], bodies: list[str]) -> None:
        """Send messages until all are accepted, or their leases end."""
        pauses = Pauses(min(item.message.leased_at + item.message.lease_seconds for item in items))
        while True:
            begun = self._queues.time()
            refused, error = self._send_once(items, bodies)
            sent = [item for position, item in enumerate(items) if position not in refused]
            if error is not None:
                refused = [position for position in refused if not self._has_to_wait(items[position])]
            self._tally.count(indexed=len(sent))
            self._ledger.mark([item.row for item in sent], TileState.INDEXED, begun)
            for item in sent:
                self._forward(item)
            items, bodies = [items[position] for position in refused], [bodies[position] for position in refused]
            if not items:
                return
            if not pauses.take():
                for item in items:
                    self._setbacks.troubled(
                        item.tile, error or BiomedError("The index queue does not accept the message.")
                    )
                return

    def _send_once(self, items: list[Work], bodies: list[str]) -> tuple[list[int], BiomedError | None]:
        """Send messages once; returns the positions of those that have to be sent again, and the error if any."""
        request = uuid.uuid4().hex
        self._ledger.ask(request, [item.chunk for item in items])
        try:
            refused = sorted(self._queues.send_index(bodies))
        except BiomedError as error:
            if _surely_not_sent(error):
                self._ledger.answered(request)
                if not is_transient(error):
                    raise
                return list(range(len(items))), error
            self._ledger.lost(request)
            if not is_transient(error):
                raise
            # It may have arrived. What could belong to a finished chunk must not be sent twice.
            return [position for position, item in enumerate(items) if not self._is_settled(item)], error
        self._ledger.answered(request)
        return refused, None

    def _without_those_that_wait(self, items: list[Work], entries: Mapping[str, LedgerEntry]) -> list[Work]:
        """Let go of what could finish a chunk of which other messages are in doubt."""
        uncounted = Counter(
            item.chunk for item in items if item.tile not in entries or entries[item.tile].state == TileState.SKIPPED
        )
        return [item for item in items if not self._has_to_wait(item, uncounted[item.chunk])]

    def _has_to_wait(self, item: Work, uncounted: int = 0) -> bool:
        """Whether a tile was let go because its chunk must not be finished yet."""
        if self._ledger.doubtful_seconds(self._queues.settle_seconds, item.chunk) <= 0:
            return False
        sure, doubtful = self._ledger.chunk_counts(item.chunk)
        if sure + doubtful + uncounted < _tiles_of(item.chunk):
            return False
        self._tally.count(abandoned=1)
        self._course.let_go(item.tile)
        return True

    def _was_indexed_meanwhile(self, item: Work, entry: LedgerEntry | None) -> bool:
        """Whether another process of this machine has had another message of the same tile since ours came."""
        before, item.entry = item.entry, entry
        if entry != before and item.is_done:
            return True
        item.entry = before
        return False

    def _is_surely_indexed(self, item: Work) -> bool:
        """Whether an index message that is in doubt must not be sent again.

        It is sent again while the chunk cannot be finished. When all tiles of the chunk were sent or are in doubt, the
        completion finds out what is missing and queues it again, provided that one tile of the chunk arrived for sure.
        """
        entry = item.entry
        return entry is not None and entry.state == TileState.INDEXING and item.is_known and self._is_settled(item)

    def _is_settled(self, item: Work) -> bool:
        sure, doubtful = self._ledger.chunk_counts(item.chunk)
        return sure >= 1 and sure + doubtful >= _tiles_of(item.chunk)


class Deleting(_Step):
    """Deletes the upload messages of tiles that the Boss knows of, and writes down that they are finished.

    Args:
        queues: The queues of the job.
        ledger: The ledger of the job.
        tally: Of this upload.
        course: Of this upload.
    """

    def __init__(self, queues: JobQueues, ledger: Ledger, *, tally: Tally, course: Course) -> None:
        super().__init__()
        self._queues = queues
        self._ledger = ledger
        self._tally = tally
        self._course = course

    def deal_with(self, batch: list[Work]) -> None:
        """Delete the messages of a batch."""
        until = max(item.message.leased_at + item.message.lease_seconds for item in batch)
        pauses, waiting = Pauses(until), batch
        while waiting:
            try:
                refused = self._delete(waiting, until)
            except JobFailed:
                refused = {}  # somebody completed or cancelled the job; there is nothing left to delete
            self.finish([item for position, item in enumerate(waiting) if position not in refused])
            # A handle that SQS calls invalid cannot be mended: the message comes back and is known as a duplicate.
            self._course.let_go(*(waiting[position].tile for position, can_help in refused.items() if not can_help))
            waiting = [waiting[position] for position, can_help in refused.items() if can_help]
            if waiting and not pauses.take():
                self._course.let_go(*(item.tile for item in waiting))
                return

    def finish(self, items: Sequence[Work]) -> None:
        """Write down that tiles are finished."""
        if not items:
            return
        known = self._ledger.entries([item.tile for item in items])
        done_at = self._queues.time()
        told = [item.row for item in items if item.tile in known]
        self._ledger.mark(told, TileState.FINISHED)
        # Nobody is told of chunks: they are done when they are in.
        self._ledger.mark([item.row for item in items if item.tile not in known], TileState.FINISHED, done_at)
        for item in items:
            state = known[item.tile].state if item.tile in known else None
            if item.is_requeued:
                self._tally.count(requeued=1)
            elif state != TileState.FINISHED:
                self._tally.count(deleted=1)
        self._tally.finished(len(items))
        self._course.let_go(*(item.tile for item in items))

    def _delete(self, items: Sequence[Work], until: float) -> dict[int, bool]:
        """Delete up to ten messages; returns the positions of those that failed. Kept messages are gone already."""
        queued = [position for position, item in enumerate(items) if item.message.handle]
        if not queued:
            return {}
        failed = self._queues.delete([items[position].message.handle for position in queued], until)
        return {queued[position]: can_help for position, can_help in failed.items()}


def _tiles_of(chunk: str) -> int:
    return int(chunk.split("&")[1])


def _surely_not_sent(error: BiomedError) -> bool:
    """Whether a request has had no effect and never will: it was not connected, or refused in so many words."""
    if isinstance(error, PlatformError):
        return error.status is not None and error.status < _FAILED
    return isinstance(error, ConnectionFailed)
