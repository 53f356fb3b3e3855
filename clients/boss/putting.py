"""From a source to the bucket: tiles and chunks read and put, and what happens when a source is bad."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

from prefect_biomed.clients.boss._aws import JobQueues, UploadMessage
from prefect_biomed.clients.boss._keys import PoisonMessage
from prefect_biomed.clients.boss.errors import ChunkFailed, QueueGone
from prefect_biomed.clients.boss.ledger import Ledger, TileState
from prefect_biomed.clients.boss.messages import Messages, Work
from prefect_biomed.clients.boss.models import UploadSettings
from prefect_biomed.clients.boss.sources import ChunkSource, Piece, TileSource
from prefect_biomed.clients.boss.tally import Course, Setbacks, Tally
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    JobFailed,
    NotFoundError,
    SourceUnreadable,
    is_transient,
)
from prefect_biomed.clients.texts import logger_of

__all__ = ["ChunkPutting", "Pieces", "Putting", "TilePutting"]

logger = logger_of(__name__)

# Of a message that was kept in the ledger and is in no queue any more.
_KEPT_LEASE_SECONDS = 3600.0
_RECENT = 200
_MOST_CHUNKS = 4
_LONGEST_CHUNK_LEASE_SECONDS = 600.0

Content: TypeAlias = Any  # encoded bytes of a tile, or the array of a chunk


class Putting(Protocol):
    """How the pieces of one kind of job come into the bucket."""

    @property
    def source(self) -> TileSource | ChunkSource:
        """Where they come from."""

    @property
    def workers(self) -> int:
        """Pieces at the same time."""

    @property
    def most(self) -> int:
        """Messages in hand beyond which no more are received."""

    @property
    def shortest_lease(self) -> float:
        """Seconds of the shortest lease."""

    def read(self, item: Work) -> Piece:
        """Read a piece.

        Raises:
            SourceUnreadable: Its source is missing, damaged, or of a kind that does not fit.
        """

    def blank(self) -> Content:
        """Make a piece of the fill value."""

    def put(self, item: Work, content: Content) -> None:
        """Put a piece.

        Raises:
            BiomedError: It is not in, or not all of it.
        """


class TilePutting:
    """Tiles: one object each."""

    def __init__(
        self, source: TileSource, queues: JobQueues, messages: Messages, tally: Tally, settings: UploadSettings
    ) -> None:
        self.source = source
        self.workers = settings.threads
        self.most = 2 * settings.threads
        self.shortest_lease = settings.min_lease_seconds
        self._queues = queues
        self._messages = messages
        self._tally = tally

    def read(self, item: Work) -> Piece:
        """Read a tile; see `Putting`."""
        return self.source.piece(item.position, item.path)

    def blank(self) -> bytes:
        """Make a tile of the fill value."""
        return self.source.blank()

    def put(self, item: Work, content: Content) -> None:
        """Put a tile; see `Putting`."""
        self._queues.put(item.body["tile_key"], content, self._messages.tile_metadata(item), _until(item))
        self._tally.count(put=1, put_bytes=len(content))


class ChunkPutting:
    """Chunks of a volumetric job: many objects each, of which every one has to be in."""

    def __init__(
        self, source: ChunkSource, queues: JobQueues, messages: Messages, tally: Tally, settings: UploadSettings
    ) -> None:
        self.source = source
        fitting = settings.chunk_bytes // max(1, 2 * source.chunk_bytes)
        self.workers = self.most = max(1, min(_MOST_CHUNKS, fitting))
        shortest = settings.min_lease_seconds
        self.shortest_lease = max(shortest, min(_LONGEST_CHUNK_LEASE_SECONDS, 5 * shortest))
        self._threads = settings.threads
        self._queues = queues
        self._messages = messages
        self._tally = tally

    def read(self, item: Work) -> Piece:
        """Read a chunk; see `Putting`."""
        return self.source.piece(item.position, item.path)

    def blank(self) -> Content:
        """Make a chunk of the fill value."""
        return self.source.blank()

    def put(self, item: Work, content: Content) -> None:
        """Put all cuboids of a chunk at once; see `Putting`."""
        metadata, until = self._messages.cuboid_metadata(item), _until(item)

        def put(cuboid: dict[str, Any]) -> BiomedError | None:
            try:
                packed = self.source.cuboid(content, int(cuboid["x"]), int(cuboid["y"]), int(cuboid["z"]))
                self._queues.put(str(cuboid["key"]), packed, metadata, until)
            except BiomedError as error:
                return error
            self._tally.count(put=1, put_bytes=len(packed))
            return None

        cuboids = item.body["cuboids"]
        with ThreadPoolExecutor(min(len(cuboids), self._threads), thread_name_prefix="boss-cuboid") as pool:
            outcomes = list(pool.map(put, cuboids))
        bad = [(cuboid, error) for cuboid, error in zip(cuboids, outcomes, strict=True) if error]
        if not bad:
            return
        first = bad[0][1]
        places = ", ".join(f"({cuboid['x']}, {cuboid['y']}, {cuboid['z']})" for cuboid, _ in bad[:10])
        message = f"{len(bad)} of {len(cuboids)} cuboids of chunk {item.position} are not in, at {places}: {first}"
        if isinstance(first, AuthenticationError | ConfigurationError):
            raise first
        if is_transient(first) or isinstance(first, QueueGone):
            raise type(first)(message)
        raise ChunkFailed(message)


class Pieces:
    """One message after the other from its source to the bucket; used by all threads of the pool.

    Args:
        putting: How pieces are read and put.
        queues: The queues of the job.
        ledger: The ledger of the job.
        settings: How to upload.
        setbacks: Told of what could not be sent.
        tally: Of this upload.
        course: Of this upload.
        forward: Takes what is in the bucket.
    """

    def __init__(
        self,
        putting: Putting,
        queues: JobQueues,
        ledger: Ledger,
        settings: UploadSettings,
        *,
        setbacks: Setbacks,
        tally: Tally,
        course: Course,
        forward: Callable[[Work], None],
    ) -> None:
        self.putting = putting
        self._queues = queues
        self._ledger = ledger
        self._policy = settings.on_bad_source
        self._setbacks = setbacks
        self._tally = tally
        self._course = course
        self._forward = forward
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._not_begun: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._put_aside: set[str] = set()

    @property
    def slow_seconds(self) -> float:
        """How long slow ones of the latest pieces took; 0 before the first."""
        recent = sorted(self._durations)
        return recent[int(0.95 * (len(recent) - 1))] if recent else 0.0

    def work(self, item: Work) -> None:
        """Read and put one piece; runs in the pool, so that nothing may be raised."""
        begun = time.monotonic()
        try:
            if not self._course.may_begin:
                self.leave(item)
            elif item.message.left_seconds < 0.25 * item.message.lease_seconds:
                self._tally.count(abandoned=1)
                self._course.let_go(item.tile)
            elif self._brought(item):
                self._durations.append(time.monotonic() - begun)
        except (AuthenticationError, ConfigurationError, JobFailed, NotFoundError) as error:
            self._course.let_go(item.tile)
            self._course.fail(error)
        except BiomedError as error:
            self._setbacks.troubled(item.tile, error)
        except BaseException as error:
            self._course.let_go(item.tile)
            self._course.fail(error)

    def leave(self, item: Work) -> None:
        """Have done with a piece that was not begun; `give_back` lets others have it at once."""
        self._tally.count(abandoned=1)
        self._not_begun.put(item.message.handle)
        self._course.let_go(item.tile)

    def give_back(self) -> None:
        """Let others have at once what was received and not begun. Where that is not allowed, its lease has to end."""
        handles = []
        while not self._not_begun.empty():
            handles.append(self._not_begun.get())
        self._queues.give_back([handle for handle in handles if handle])

    def bad_source(self, item: Work, error: SourceUnreadable) -> None:
        """Apply the policy to a source that is missing, damaged or of the wrong kind."""
        logger.warning("%s: %s", item.tile, error)
        try:
            if self._policy == "fail":
                self._setbacks.give_up(item.tile, str(error))
            elif self._policy == "blank":
                self._ledger.note_made(item.tile, "blank")
                self.putting.put(item, self.putting.blank())
                self._tally.name("blank", item.tile)
                self._forward(item)
            elif self._policy == "skip":
                self._ledger.mark([item.row], TileState.SKIPPED)
                self._tally.name("skipped", item.tile)
                self._take_off(item.message)
                self._course.let_go(item.tile)
            else:
                self.quarantine(item.message, item.tile, str(error), poison=False)
                self._course.let_go(item.tile)
        except BiomedError as problem:
            self._setbacks.troubled(item.tile, problem)

    def quarantine(self, message: UploadMessage, tile: str | None, reason: str, *, poison: bool) -> None:
        """Keep a message in the ledger, then take it off the queue.

        Args:
            message: The message.
            tile: Its tile; None when even that cannot be told.
            reason: Why.
            poison: Whether it can never be worked on.
        """
        name = tile or f"message {message.id}"
        logger.warning("%s is quarantined: %s", name, reason)
        self._put_aside.add(name)
        self._ledger.quarantine(message.id, tile, message.body, reason, poison=poison)
        self._tally.name("quarantined", f"{name}: {reason}")
        self._take_off(message)

    def retry_quarantined(self, messages: Messages) -> None:
        """Try again what an earlier upload put aside; its messages are gone, all else is as usual.

        To be called when the queue is empty: what the Boss has asked for again is in the queue, and done from there.
        """
        for kept in self._ledger.quarantined():
            if kept.poison or kept.tile in self._put_aside or not self._course.may_begin:
                continue
            message = UploadMessage(kept.message, "", kept.body, 0, None, time.monotonic(), _KEPT_LEASE_SECONDS)
            try:
                item = messages.read(message)
                item.entry = self._ledger.entries([item.tile]).get(item.tile)
                item.path = self.putting.source.path(item.position)
                if not item.is_done:
                    self._put_source(item)
            except (PoisonMessage, SourceUnreadable) as error:
                self._tally.name("quarantined", f"{kept.tile}: {error}")
                continue
            self._course.hold(item.tile)
            self._forward(item)

    def _take_off(self, message: UploadMessage) -> None:
        self._queues.delete([message.handle], message.leased_at + message.lease_seconds)

    def _brought(self, item: Work) -> bool:
        try:
            self._put_source(item)
        except SourceUnreadable as error:
            self.bad_source(item, error)
            return False
        self._forward(item)
        return True

    def _put_source(self, item: Work) -> None:
        content, made = self.putting.read(item)
        if made != "whole":  # noted before: a kill from here on leaves a tile that is named, never one that is believed
            self._ledger.note_made(item.tile, made)
        self.putting.put(item, content)
        if made != "whole":
            self._tally.name(made, item.tile)
        elif item.was_patched:
            self._ledger.note_made(item.tile, made)


def _until(item: Work) -> float:
    """Until when a piece may be put, on the monotonic clock: what follows needs the rest of the lease."""
    return item.message.leased_at + 0.75 * item.message.lease_seconds
