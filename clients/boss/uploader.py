"""Uploading: from the queue of what is left to pixels in the Boss, fast, and without losing or doubling a tile.

One thread receives messages in batches, a pool of threads reads and puts tiles, one thread sends index messages and one
deletes what is finished, both in batches of ten. Everything that a crash could make ambiguous is written to the ledger
before it is sent. A message that is not finished stays in the queue and comes back when its lease ends.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.clients.boss import _keys, images
from prefect_biomed.clients.boss._aws import JobQueues, QueueGone, UploadMessage, batches, persist
from prefect_biomed.clients.boss._keys import PoisonMessage, Position
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.images import TileFormat
from prefect_biomed.clients.boss.ledger import Ledger, LedgerEntry, TileState, default_folder
from prefect_biomed.clients.boss.models import JobStatus, JoinedJob, UploadReport
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource
from prefect_biomed.clients.errors import (
    BiomedError,
    ConfigurationError,
    ConnectionFailed,
    JobFailed,
    NetworkError,
    NotFoundError,
    PreflightFailed,
    SourceUnreadable,
    is_transient,
)

__all__ = ["UploadProgress", "UploadSettings", "Uploader", "open_ledger"]

logger = logging.getLogger(__name__)

_METADATA_BYTES = 2048
_COLLECT_SECONDS = 0.03
_WAIT_SECONDS = 1
_COUNT_EVERY_SECONDS = 5.0
_RECENT = 200
_NAMED_LIMIT = 1000
_KEPT_LEASE_SECONDS = 3600.0
_OUTAGE_SECONDS = 120.0
_LOOK_AGAIN_SECONDS = 0.2


class UploadSettings(BaseModel):
    """How to upload.

    Attributes:
        threads: Objects put at the same time.
        on_bad_source: What to do with a tile whose source is missing, damaged or does not fit: `fail` leaves its
            message in the queue, so that the job cannot complete; `blank` uploads the fill value; `skip` takes it off
            the queue (the Boss completes a job only when all sixteen slices of a chunk are skipped together);
            `quarantine` takes it off the queue and keeps it, to be tried again by the next upload of this machine.
        colour: What to do with colour, palette, bilevel and too deep images: `error`, or `convert` to grey.
        fill: Value of pixels that the source does not have.
        encoding: Format of tiles that must be encoded anew: `png` is smaller, `tiff` faster.
        cache_bytes: Bound of decoded source images in memory.
        chunk_bytes: Bound of chunks of a volumetric job in memory.
        max_tiles: Stop after about so many tiles.
        max_seconds: Stop receiving after this time; what is in flight is finished.
        grace_seconds: How long a stop waits for what is in flight.
        straggler_seconds: How long to wait for messages that others hold, when there are no more.
        min_lease_seconds: Shortest lease that is asked for. Boss waits 180 s for leases before it completes a job.
        max_lease_seconds: Longest lease that is asked for.
        attempts: Times that one message may fail for reasons that should pass, before it counts as failed.
        key_seconds: Age at which AWS keys are renewed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(default=16, ge=1, le=128)
    on_bad_source: Literal["fail", "blank", "skip", "quarantine"] = "fail"
    colour: Literal["error", "convert"] = "error"
    fill: int = Field(default=0, ge=0)
    encoding: Literal["png", "tiff"] = "png"
    cache_bytes: int = Field(default=512 * 1024 * 1024, ge=0)
    chunk_bytes: int = Field(default=1024 * 1024 * 1024, ge=1)
    max_tiles: int | None = Field(default=None, ge=1)
    max_seconds: float | None = Field(default=None, gt=0)
    grace_seconds: float = Field(default=60.0, ge=0)
    straggler_seconds: float = Field(default=1000.0, ge=0)
    min_lease_seconds: float = Field(default=120.0, ge=1)
    max_lease_seconds: float = Field(default=900.0, ge=1, le=43200)
    attempts: int = Field(default=3, ge=1)
    key_seconds: float = Field(default=3300.0, gt=0)


class UploadProgress(NamedTuple):
    """How far an upload is.

    Attributes:
        finished: Tiles finished by this machine, earlier runs included.
        total: Tiles of the job.
        remaining: Messages in the queue, visible or leased, as SQS last told.
        tiles_per_second: Rate of the last half minute.
        eta_seconds: `remaining` at that rate; None while the rate is unknown.
        put_bytes: Bytes put by this run.
        failed: Tiles that failed.
    """

    finished: int
    total: int
    remaining: int
    tiles_per_second: float
    eta_seconds: float | None
    put_bytes: int
    failed: int


@dataclass
class _Work:
    """A message on its way through the upload."""

    message: UploadMessage
    tile: str
    chunk: str
    position: Position
    body: dict[str, Any]
    entry: LedgerEntry | None = None
    path: str = ""

    @property
    def is_requeued(self) -> bool:
        """Whether the Boss asks again for a tile that was finished."""
        entry = self.entry
        return entry is not None and entry.state == TileState.FINISHED and entry.message != self.message.id


class Uploader:
    """Works on one job until its queue is empty, or told to stop.

    Several may work on one job, in other processes and on other machines; official clients too.

    Args:
        client: Client of the Boss.
        config: Configuration that the job was made with.
        job_id: Number of the job.
        settings: How to upload.
        joined: An answer to a join that was made already; otherwise it joins.
        ledger_folder: Where ledgers are kept; `default_folder` by default.
        on_progress: Called about every second in the thread that called `run`.
        stop: Set it to end the upload politely.
        is_owner: False for one of several processes of one upload, of which the parent keeps house.
    """

    def __init__(
        self,
        client: BossClient,
        config: IngestConfig,
        job_id: int,
        settings: UploadSettings | None = None,
        *,
        joined: JoinedJob | None = None,
        ledger_folder: Path | None = None,
        on_progress: Callable[[UploadProgress], None] | None = None,
        stop: threading.Event | None = None,
        is_owner: bool = True,
    ) -> None:
        self._settings = settings or UploadSettings()
        self._client = client
        self._config = config
        self._on_progress = on_progress
        self._external_stop = stop or threading.Event()
        self._is_owner = is_owner
        self._joined = joined or client.wait_until_ready(job_id)
        self._check_job()
        self._ledger = open_ledger(client, self._joined.job.id, self._joined.job.tile_count, ledger_folder)
        self._source = self._open_source()
        self._queues = JobQueues(
            client, self._joined, connections=self._settings.threads + 2, key_seconds=self._settings.key_seconds
        )
        self._parameters = json.dumps(self._joined.parameters, separators=(",", ":"))
        self._stop = threading.Event()
        self._reason = ""
        self._fatal: BaseException | None = None
        self._changed = threading.Condition()
        self._in_hand = 0
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {"blank": [], "skipped": [], "quarantined": []}
        self._attempts: Counter[str] = Counter()
        self._failed: dict[str, str] = {}
        self._durations: deque[float] = deque(maxlen=_RECENT)
        self._finish_times: deque[tuple[float, int]] = deque()
        self._to_index: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._to_delete: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._remaining = self._joined.job.tile_count
        self._exhausted = False

    # -- the whole -----------------------------------------------------------------------------------------------

    def run(self) -> UploadReport:
        """Upload.

        Returns:
            What was done. Tiles that failed under the policy `fail` are in it; nothing is raised for them.

        Raises:
            QueueGone: The job was completed or cancelled meanwhile.
            ConfigurationError: `aws_region` is not that of the bucket.
            AuthenticationError: Token or keys are refused for good.
            LedgerError: The ledger cannot be written.
            BiomedError: The server or AWS is out of order for longer than retries can bridge.
        """
        begun = time.monotonic()
        if self._is_owner:
            self._ledger.forget_failed()
        before = self._ledger.count(TileState.FINISHED)
        workers = self._settings.threads if isinstance(self._source, TileSource) else self._chunk_workers()
        threads = [
            threading.Thread(target=self._guarded, args=(loop, pool_size), name=f"boss-{name}", daemon=True)
            for name, loop, pool_size in (
                ("index", self._index_loop, 0),
                ("delete", self._delete_loop, 0),
                ("receive", self._receive_loop, workers),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            while threads[2].is_alive():
                threads[2].join(1.0)
                if self._on_progress:
                    self._on_progress(self._progress())
                if self._external_stop.is_set():
                    self._end("stopped on request")
        except BaseException:
            self._end("interrupted")
            raise
        finally:
            self._shut_down(threads)
        if self._on_progress:
            self._on_progress(self._progress())
        if isinstance(self._fatal, JobFailed | NotFoundError):
            self._explain_end(self._fatal)
        elif self._fatal is not None:
            raise self._fatal
        return self._report(before, time.monotonic() - begun)

    def _explain_end(self, error: BiomedError) -> None:
        """The queue or the keys went away: find out whether somebody completed the job, or cancelled it."""
        try:
            status = self._client.counts(self._joined.job.id).status
        except NotFoundError:
            status = JobStatus.DELETED
        if status not in (JobStatus.COMPLETE, JobStatus.COMPLETING):
            raise QueueGone(f"Ingest job {self._joined.job.id} is {status.name}: somebody ended it.") from error
        self._reason, self._exhausted = f"the job is {status.name}: another client completed it", True

    def close(self) -> None:
        """Close connections and ledger."""
        self._queues.close()
        self._ledger.close()

    def _shut_down(self, threads: Sequence[threading.Thread]) -> None:
        """Let what is in flight finish: receiver and pool first, then what they feed."""
        deadline = time.monotonic() + self._settings.grace_seconds
        threads[2].join(max(0.0, deadline - time.monotonic()))
        self._to_index.put(None)
        threads[0].join(max(0.0, deadline - time.monotonic()))
        self._to_delete.put(None)
        threads[1].join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            logger.warning("The grace period is over; what is still in flight comes back when its lease ends")

    def _guarded(self, loop: Callable[..., None], pool_size: int) -> None:
        try:
            loop(pool_size) if pool_size else loop()
        except BaseException as error:
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify_all()
        self._end(f"failed: {error}")

    def _end(self, reason: str) -> None:
        if not self._stop.is_set():
            self._reason = self._reason or reason
            self._stop.set()
        with self._changed:
            self._changed.notify_all()

    # -- receiving -----------------------------------------------------------------------------------------------

    def _receive_loop(self, workers: int) -> None:
        settings = self._settings
        deadline = math.inf if settings.max_seconds is None else time.monotonic() + settings.max_seconds
        most = 2 * workers if isinstance(self._source, TileSource) else workers
        received = 0
        counted_at = 0.0
        quiet_since: float | None = None
        empty_looks = 0
        with ThreadPoolExecutor(workers, thread_name_prefix="boss-put") as pool:
            self._retry_quarantined()
            while not self._stop.is_set():
                if time.monotonic() > deadline:
                    self._end(f"max_seconds ({settings.max_seconds:g})")
                    break
                if settings.max_tiles is not None and received >= settings.max_tiles:
                    self._end(f"max_tiles ({settings.max_tiles})")
                    break
                with self._changed:
                    self._changed.wait_for(lambda: self._in_hand <= most or self._stop.is_set(), timeout=1.0)
                    if self._in_hand > most:
                        continue
                    idle = self._in_hand == 0
                self._queues.renew_if_old()
                if time.monotonic() - counted_at > _COUNT_EVERY_SECONDS:
                    self._remaining = sum(persist(self._queues.counts, time.monotonic() + _OUTAGE_SECONDS))
                    counted_at = time.monotonic()
                messages = self._receive(_WAIT_SECONDS if idle and quiet_since else 0)
                fresh = self._accept(messages, pool)
                received += fresh
                if fresh:
                    quiet_since, empty_looks = None, 0
                    continue
                if not idle:
                    with self._changed:
                        self._changed.wait(0.05)
                    continue
                visible, leased = persist(self._queues.counts, time.monotonic() + _OUTAGE_SECONDS)
                self._remaining, counted_at = visible + leased, time.monotonic()
                if visible == 0 and leased <= len(self._ledger.failed()):
                    # The counts are approximate; two looks are not proof, but the completion looks again.
                    empty_looks += 1
                    self._stop.wait(_LOOK_AGAIN_SECONDS)
                    if empty_looks >= 2:
                        self._exhausted = True
                        break
                    continue
                empty_looks = 0
                quiet_since = quiet_since or time.monotonic()
                if time.monotonic() - quiet_since > settings.straggler_seconds:
                    self._end(f"{leased} messages are held by others")
                    break
                self._stop.wait(_LOOK_AGAIN_SECONDS)

    def _receive(self, wait_seconds: int) -> list[UploadMessage]:
        until = time.monotonic() + _OUTAGE_SECONDS
        received: list[UploadMessage] = persist(lambda: self._queues.receive(self._lease(), wait_seconds), until)
        return received

    def _lease(self) -> float:
        """Long enough for all that is in hand at the present pace; it cannot be prolonged later."""
        settings = self._settings
        shortest = settings.min_lease_seconds
        if isinstance(self._source, ChunkSource):
            shortest = max(shortest, min(600.0, 5 * shortest))
        if not self._durations:
            return min(shortest, settings.max_lease_seconds)
        recent = sorted(self._durations)
        slow = recent[int(0.95 * (len(recent) - 1))]
        needed = 30.0 + 3 * slow * (1 + self._in_hand / settings.threads) if slow > 1 else shortest
        return min(max(needed, shortest), settings.max_lease_seconds)

    def _accept(self, messages: Sequence[UploadMessage], pool: ThreadPoolExecutor) -> int:
        """Check a batch and hand it to the pool, grouped by source; returns how many were worth it."""
        if not messages:
            return 0
        self._count(received=len(messages))
        work: list[_Work] = []
        ready: list[_Work] = []
        fresh = 0
        for message in messages:
            try:
                work.append(self._parse(message))
            except PoisonMessage as error:
                fresh += 1
                self._quarantine(message, None, f"{error}", poison=True)
        entries = self._ledger.entries([item.tile for item in work])
        for item in work:
            item.entry = entries.get(item.tile)
            if item.tile in self._failed:
                continue  # left in the queue, under the policy `fail`
            fresh += 1
            self._hold(+1)
            if item.entry and item.entry.message == item.message.id and item.entry.state >= TileState.INDEXED:
                self._count(duplicates=1)
                self._to_delete.put(item)
                continue
            try:
                item.path = self._source.path(item.position)
            except SourceUnreadable as error:
                self._bad_source(item, error)
                continue
            except BaseException:
                self._hold(-1)
                raise
            ready.append(item)
        for item in sorted(ready, key=lambda item: item.path):
            pool.submit(self._work, item)
        return fresh

    def _parse(self, message: UploadMessage) -> _Work:
        """Read and verify a message.

        Raises:
            PoisonMessage: It cannot be right.
        """
        joined = self._joined
        try:
            body = json.loads(message.body)
        except ValueError:
            raise PoisonMessage("it is not JSON") from None
        if not isinstance(body, dict):
            raise PoisonMessage("it is not a JSON object")
        key, resolution = joined.lookup_key, joined.base_resolution
        chunk = _keys.parse_chunk(body.get("chunk_key"), key, resolution)
        if isinstance(self._source, ChunkSource):
            cuboids = body.get("cuboids")
            if not isinstance(cuboids, list) or not cuboids:
                raise PoisonMessage("it lists no cuboids")
            self._check_cuboids(cuboids, chunk.position)
            position, tile = chunk.position, str(chunk.position)
        else:
            position = _keys.parse_tile(body.get("tile_key"), key, resolution)
            same = (position.x, position.y, position.t) == (chunk.position.x, chunk.position.y, chunk.position.t)
            if not same or position.z // _keys.CUBOID_Z != chunk.position.z or not 1 <= chunk.tiles <= 16:
                raise PoisonMessage("tile and chunk do not belong together")
            if "job_id" in body and str(body["job_id"]) != str(joined.job.id):
                raise PoisonMessage(f"it belongs to job {body['job_id']}")
            tile = str(position)
        if not self._inside(position):
            raise PoisonMessage(f"{position} lies outside the extent of the job")
        return _Work(message, tile, body["chunk_key"], position, body)

    def _check_cuboids(self, cuboids: list[Any], chunk: Position) -> None:
        size = self._config.piece_size
        steps = {"x": _keys.CUBOID_X, "y": _keys.CUBOID_Y, "z": _keys.CUBOID_Z}
        for cuboid in cuboids:
            try:
                offset = {axis: int(cuboid[axis]) for axis in ("x", "y", "z")}
                where = _keys.parse_cuboid(cuboid["key"], self._joined.lookup_key, self._joined.base_resolution)
            except (KeyError, TypeError, ValueError) as error:
                raise PoisonMessage(f"a cuboid is wrong: {error}") from None
            origin = {"x": chunk.x * size["x"], "y": chunk.y * size["y"], "z": chunk.z * size["z"]}
            expected = tuple((origin[axis] + offset[axis]) // steps[axis] for axis in ("x", "y", "z"))
            if (where.x, where.y, where.z) != expected or any(offset[axis] % steps[axis] for axis in steps):
                raise PoisonMessage("the key of a cuboid does not fit its place")

    def _inside(self, position: Position) -> bool:
        size, extent = self._config.piece_size, self._config.ingest_job.extent
        depth = size["z"] if self._config.volumetric else 1
        return (
            extent.x[0] // size["x"] <= position.x < -(-extent.x[1] // size["x"])
            and extent.y[0] // size["y"] <= position.y < -(-extent.y[1] // size["y"])
            and extent.z[0] // depth <= position.z < -(-extent.z[1] // depth)
            and extent.t[0] <= position.t < extent.t[1]
        )

    # -- one tile ------------------------------------------------------------------------------------------------

    def _work(self, item: _Work) -> None:
        """Read and put one tile; runs in the pool."""
        begun = time.monotonic()
        try:
            if self._stop.is_set():
                self._let_go()
                return
            if item.message.left_seconds < 0.25 * item.message.lease_seconds:
                self._count(abandoned=1)
                self._let_go()
                return
            try:
                if isinstance(self._source, TileSource):
                    self._put_tile(item, self._source.read(item.position, item.path))
                else:
                    self._put_chunk(item, self._source.read(item.position, item.path))
            except SourceUnreadable as error:
                self._bad_source(item, error)
                return
            self._forward(item)
            self._durations.append(time.monotonic() - begun)
        except (ConfigurationError, JobFailed, NotFoundError) as error:
            self._let_go()
            self._fail_all(error)
        except BiomedError as error:
            self._troubled(item, error)
        except BaseException as error:
            self._let_go()
            self._fail_all(error)

    def _forward(self, item: _Work) -> None:
        (self._to_index if isinstance(self._source, TileSource) else self._to_delete).put(item)

    def _put_tile(self, item: _Work, content: bytes) -> None:
        until = item.message.leased_at + 0.75 * item.message.lease_seconds
        metadata = {"message_id": item.message.id, "receipt_handle": item.message.handle}
        for text in (self._index_body(item, full=True), self._index_body(item, full=False)):
            full = metadata | {"metadata": text}
            if sum(len(name) + len(value) for name, value in full.items()) <= _METADATA_BYTES:
                break
        self._queues.put(item.body["tile_key"], content, full, until)
        self._count(put=1, put_bytes=len(content))

    def _index_body(self, item: _Work, *, full: bool) -> str:
        """What the lambdas are told of a tile, as compact JSON; without `parameters` where room is scarce."""
        size = self._config.piece_size
        parameters = f'"parameters":{self._parameters},' if full else ""
        return (
            f'{{"chunk_key":{json.dumps(item.chunk)},"tile_key":{json.dumps(item.body["tile_key"])},'
            f'"ingest_job":{self._joined.job.id},{parameters}"x_size":{size["x"]},"y_size":{size["y"]}}}'
        )

    def _put_chunk(self, item: _Work, chunk: Any) -> None:
        """Put all cuboids of a chunk at once; the message may be deleted only when every one is in."""
        assert isinstance(self._source, ChunkSource)
        source = self._source
        until = item.message.leased_at + 0.75 * item.message.lease_seconds
        text = (
            f'{{"ingest_job":{self._joined.job.id},"chunk_key":{json.dumps(item.chunk)},'
            f'"parameters":{self._parameters}}}'
        )
        if len("metadata") + len(text) > _METADATA_BYTES:
            text = f'{{"ingest_job":{self._joined.job.id},"chunk_key":{json.dumps(item.chunk)}}}'

        def put(cuboid: dict[str, Any]) -> BiomedError | None:
            try:
                content = source.cuboid(chunk, int(cuboid["x"]), int(cuboid["y"]), int(cuboid["z"]))
                self._queues.put(str(cuboid["key"]), content, {"metadata": text}, until)
            except BiomedError as error:
                return error
            self._count(put=1, put_bytes=len(content))
            return None

        cuboids = item.body["cuboids"]
        with ThreadPoolExecutor(min(len(cuboids), self._settings.threads), thread_name_prefix="boss-cuboid") as pool:
            outcomes = list(pool.map(put, cuboids))
        bad = [(cuboid, error) for cuboid, error in zip(cuboids, outcomes, strict=True) if error]
        if bad:
            places = ", ".join(f"({cuboid['x']}, {cuboid['y']}, {cuboid['z']})" for cuboid, _ in bad[:10])
            kind = type(bad[0][1])
            message = (
                f"{len(bad)} of {len(cuboids)} cuboids of chunk {item.position} are not in, at {places}: {bad[0][1]}"
            )
            if is_transient(bad[0][1]) or isinstance(bad[0][1], QueueGone):
                raise kind(message)
            raise _ChunkFailed(message)

    def _chunk_workers(self) -> int:
        assert isinstance(self._source, ChunkSource)
        return max(1, min(4, self._settings.chunk_bytes // max(1, 2 * self._source.chunk_bytes)))

    def _troubled(self, item: _Work, error: BiomedError) -> None:
        """A tile could not be sent: leave its message to come back, a limited number of times."""
        self._attempts[item.tile] += 1
        logger.warning("%s could not be sent: %s", item.tile, error)
        if self._attempts[item.tile] >= self._settings.attempts or isinstance(error, _ChunkFailed):
            self._give_up(item, str(error))
        else:
            self._count(abandoned=1)
        self._let_go()

    def _give_up(self, item: _Work, reason: str) -> None:
        self._failed[item.tile] = reason
        self._ledger.fail(item.tile, reason)

    def _bad_source(self, item: _Work, error: SourceUnreadable) -> None:
        """Apply the policy to a source that is missing, damaged or of the wrong kind."""
        policy = self._settings.on_bad_source
        logger.warning("%s: %s", item.tile, error)
        try:
            if policy == "fail":
                self._give_up(item, str(error))
                self._let_go()
            elif policy == "blank":
                if isinstance(self._source, TileSource):
                    self._put_tile(item, self._source.blank())
                else:
                    self._put_chunk(item, self._source.blank())
                self._name("blank", item.tile)
                self._forward(item)
            elif policy == "skip":
                self._ledger.mark([(item.tile, item.chunk, item.message.id)], TileState.SKIPPED)
                self._name("skipped", item.tile)
                self._delete_now(item.message)
                self._let_go()
            else:
                self._quarantine(item.message, item.tile, str(error), poison=False)
                self._let_go()
        except BiomedError as problem:
            self._troubled(item, problem)

    def _quarantine(self, message: UploadMessage, tile: str | None, reason: str, *, poison: bool) -> None:
        """Keep a message in the ledger, then take it off the queue."""
        name = tile or f"message {message.id}"
        logger.warning("%s is quarantined: %s", name, reason)
        self._ledger.quarantine(message.id, tile, message.body, reason, poison=poison)
        self._name("quarantined", f"{name}: {reason}")
        self._delete_now(message)

    def _delete_now(self, message: UploadMessage) -> None:
        persist(lambda: self._queues.delete([message.handle]), message.leased_at + message.lease_seconds)

    def _retry_quarantined(self) -> None:
        """Try again what an earlier upload put aside; its messages are gone, all else is as usual."""
        if not self._is_owner:
            return
        for kept in self._ledger.quarantined():
            if kept.poison:
                continue
            message = UploadMessage(kept.message, "", kept.body, 0, time.monotonic(), _KEPT_LEASE_SECONDS)
            try:
                item = self._parse(message)
                item.path = self._source.path(item.position)
                if isinstance(self._source, TileSource):
                    self._put_tile(item, self._source.read(item.position, item.path))
                else:
                    self._put_chunk(item, self._source.read(item.position, item.path))
            except (PoisonMessage, SourceUnreadable) as error:
                self._name("quarantined", f"{kept.tile}: {error}")
                continue
            self._hold(+1)
            self._forward(item)

    # -- index and delete ----------------------------------------------------------------------------------------

    def _index_loop(self) -> None:
        for batch in _collected(self._to_index):
            self._index(batch)

    def _index(self, batch: list[_Work]) -> None:
        """Tell the Boss of tiles that are in the bucket.

        The intent is written down first. After a crash in between nobody knows whether the message was sent; sending it
        again is harmless while the chunk is incomplete, but makes the Boss ask for a finished chunk again.
        """
        to_send: list[_Work] = []
        for item in batch:
            if item.message.left_seconds <= 0:
                self._count(abandoned=1)  # somebody else has it by now
                self._let_go()
            elif self._is_surely_indexed(item):
                self._count(duplicates=1)
                self._to_delete.put(item)
            else:
                to_send.append(item)
        if not to_send:
            return
        self._mark(to_send, TileState.INDEXING)
        bodies = [self._index_body(item, full=True) for item in to_send]
        for positions in batches(bodies):
            self._send_index(
                [to_send[position] for position in positions], [bodies[position] for position in positions]
            )

    def _send_index(self, items: list[_Work], bodies: list[str]) -> None:
        """Send one batch until all of it is accepted, or its leases end."""
        until = min(item.message.leased_at + item.message.lease_seconds for item in items)
        pause = 0.1
        while items:
            error: BiomedError | None = None
            try:
                refused = set(self._queues.send_index(bodies))
            except BiomedError as problem:
                if not is_transient(problem):
                    raise
                error, refused = problem, set(range(len(items)))
            sent = [item for position, item in enumerate(items) if position not in refused]
            if isinstance(error, NetworkError) and not isinstance(error, ConnectionFailed):
                # No answer: it may have arrived. What could belong to a finished chunk must not be sent twice.
                sent = [item for item in items if self._is_settled(item)]
            self._count(indexed=len(sent))
            self._mark(sent, TileState.INDEXED)
            for item in sent:
                self._to_delete.put(item)
            left = [(item, body) for item, body in zip(items, bodies, strict=True) if item not in sent]
            items, bodies = [item for item, _ in left], [body for _, body in left]
            if items and time.monotonic() + pause > until:
                for item in items:
                    self._troubled(item, error or BiomedError("The index queue does not accept the message."))
                return
            if items:
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _is_surely_indexed(self, item: _Work) -> bool:
        """Whether an index message that is in doubt must not be sent again.

        It is sent again while the chunk cannot be finished. When all tiles of the chunk were sent or are in doubt, the
        completion finds out what is missing and queues it again, provided that one tile of the chunk arrived for sure.
        """
        entry = item.entry
        if entry is None or entry.message != item.message.id or entry.state != TileState.INDEXING:
            return False
        return self._is_settled(item)

    def _is_settled(self, item: _Work) -> bool:
        tiles = int(item.chunk.split("&")[1])
        sure, doubtful = self._ledger.chunk_counts(item.chunk)
        return sure >= 1 and sure + doubtful >= tiles

    def _delete_loop(self) -> None:
        for batch in _collected(self._to_delete):
            self._delete(batch)

    def _delete(self, batch: list[_Work]) -> None:
        waiting = batch
        until = max(item.message.leased_at + item.message.lease_seconds for item in batch)
        pause = 0.1
        while waiting:
            try:
                refused = self._delete_once(waiting, until)
            except JobFailed:
                refused = {}  # somebody completed or cancelled the job; there is nothing left to delete
            done = [item for position, item in enumerate(waiting) if position not in refused]
            # A handle that SQS calls invalid cannot be mended: the message comes back and is known as a duplicate.
            hopeless = [item for position, item in enumerate(waiting) if refused.get(position) is False]
            self._finished(done)
            for _ in hopeless:
                self._let_go()
            waiting = [item for position, item in enumerate(waiting) if refused.get(position)]
            if waiting and time.monotonic() + pause > until:
                for _ in waiting:
                    self._let_go()
                return
            if waiting:
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _delete_once(self, items: Sequence[_Work], until: float) -> dict[int, bool]:
        """Delete up to ten messages; returns the positions of those that failed. Kept messages are gone already."""
        queued = [position for position, item in enumerate(items) if item.message.handle]
        if not queued:
            return {}
        failed = persist(lambda: self._queues.delete([items[position].message.handle for position in queued]), until)
        return {queued[position]: can_help for position, can_help in failed.items()}

    def _finished(self, items: Sequence[_Work]) -> None:
        if not items:
            return
        known = self._ledger.entries([item.tile for item in items])
        self._mark(items, TileState.FINISHED)
        for item in items:
            if item.message.lease_seconds == _KEPT_LEASE_SECONDS:
                self._ledger.release(item.message.id)
            state = known[item.tile].state if item.tile in known else None
            if item.is_requeued:
                self._count(requeued=1)
            elif state != TileState.FINISHED:
                self._count(deleted=1)
        with self._changed:
            self._finish_times.append((time.monotonic(), len(items)))
            self._in_hand -= len(items)
            self._changed.notify_all()

    def _mark(self, items: Sequence[_Work], state: TileState) -> None:
        if items:
            self._ledger.mark([(item.tile, item.chunk, item.message.id) for item in items], state)

    # -- keeping count -------------------------------------------------------------------------------------------

    def _hold(self, change: int) -> None:
        with self._changed:
            self._in_hand += change
            self._changed.notify_all()

    def _let_go(self) -> None:
        self._hold(-1)

    def _count(self, **changes: int) -> None:
        with self._changed:
            self._counts.update(changes)

    def _name(self, kind: str, name: str) -> None:
        with self._changed:
            if len(self._names[kind]) < _NAMED_LIMIT:
                self._names[kind].append(name)
            self._counts[kind] += 1

    def _progress(self) -> UploadProgress:
        now = time.monotonic()
        with self._changed:
            while self._finish_times and self._finish_times[0][0] < now - 30:
                self._finish_times.popleft()
            recent = list(self._finish_times)
            put_bytes = self._counts["put_bytes"]
        span = now - recent[0][0] if recent else 0.0
        rate = sum(count for _, count in recent) / span if span > 0.5 else 0.0
        return UploadProgress(
            finished=self._ledger.count(TileState.FINISHED),
            total=self._joined.job.tile_count,
            remaining=self._remaining,
            tiles_per_second=rate,
            eta_seconds=self._remaining / rate if rate else None,
            put_bytes=put_bytes,
            failed=len(self._failed),
        )

    def _report(self, before: int, seconds: float) -> UploadReport:
        counts, total = self._counts, self._joined.job.tile_count
        # When the queue is empty, tiles that a killed run had indexed were deleted by it, only not written down.
        settled = self._ledger.count(TileState.INDEXED) if self._exhausted else 0
        finished = self._ledger.count(TileState.FINISHED) + settled
        left_out = self._ledger.count(TileState.SKIPPED)
        failed = self._ledger.failed()
        quarantined = [kept for kept in self._ledger.quarantined() if not kept.poison]
        accounted = finished + left_out + len(failed) + len(quarantined)
        return UploadReport(
            job_id=self._joined.job.id,
            tile_count=total,
            received=counts["received"],
            put=counts["put"],
            put_bytes=counts["put_bytes"],
            indexed=counts["indexed"],
            deleted=counts["deleted"],
            deleted_before=before + settled,
            requeued=counts["requeued"],
            duplicates=counts["duplicates"],
            abandoned=counts["abandoned"],
            blank=tuple(self._names["blank"]),
            skipped=tuple(self._names["skipped"]),
            quarantined=tuple(self._names["quarantined"]),
            failed=failed,
            unaccounted=max(0, total - accounted),
            joins=self._queues.joins,
            seconds=seconds,
            exhausted=self._exhausted,
            stopped=self._reason,
        )

    # -- beginning -----------------------------------------------------------------------------------------------

    def _check_job(self) -> None:
        """Refuse to work on a job with another job's configuration.

        Raises:
            PreflightFailed: They do not fit each other.
        """
        job, config = self._joined.job, self._config
        found = []
        if f"{job.collection}/{job.experiment}/{job.channel}" != config.channel_path:
            found.append(
                f"The job writes to {job.collection}/{job.experiment}/{job.channel}, not {config.channel_path}."
            )
        if job.ingest_type != config.ingest_job.ingest_type:
            found.append(f"The job is {job.ingest_type}, the configuration {config.ingest_job.ingest_type}.")
        elif job.tile_count != config.tile_count:
            found.append(f"The job has {job.tile_count} tiles, the configuration {config.tile_count}.")
        if found:
            raise PreflightFailed(f"Ingest job {job.id}", found)

    def _open_source(self) -> TileSource | ChunkSource:
        datatype, settings = self._joined.datatype, self._settings
        if self._config.volumetric:
            return ChunkSource(self._config, datatype, settings.fill)
        reason = images.check_datatype(datatype)
        if reason:
            raise ConfigurationError(f"Ingest job {self._joined.job.id}: {reason}.")
        if settings.fill >= 2 ** (8 * {"uint8": 1, "uint16": 2, "uint32": 4}[datatype]):
            raise ConfigurationError(f"The fill value {settings.fill} does not fit a {datatype} channel.")
        size = self._config.piece_size
        tile = TileFormat(size["x"], size["y"], datatype, settings.colour, settings.fill, settings.encoding)
        return TileSource(self._config, tile, settings.cache_bytes)


class _ChunkFailed(BiomedError):
    """Cuboids of a chunk were refused for good."""


def open_ledger(client: BossClient, job_id: int, tile_count: int, folder: Path | None = None) -> Ledger:
    """Open the ledger of a job on this machine.

    Args:
        client: Client of the Boss; asked when the job was made, which tells it from one of the same number elsewhere.
        job_id: Number of the job.
        tile_count: Its number of tiles.
        folder: Folder of ledgers; `default_folder` by default.

    Raises:
        LedgerError: It is damaged.
    """
    made = next((item.created_on for item in client.list_jobs() if item.id == job_id), None)
    identity: dict[str, str | int] = {
        "host": client.host,
        "job": job_id,
        "created": made.isoformat() if made else "",
        "tiles": tile_count,
    }
    return Ledger(folder or default_folder(), identity)


def _collected(source: queue.SimpleQueue[_Work | None]) -> Any:
    """Yield batches of up to ten; a batch waits a moment to fill. Ends at None."""
    ended = False
    while not ended:
        item = source.get()
        batch: list[_Work] = []
        deadline = time.monotonic() + _COLLECT_SECONDS
        while item is not None:
            batch.append(item)
            left = deadline - time.monotonic()
            if len(batch) == 10:
                break
            try:
                item = source.get(timeout=max(left, 0.0)) if left > 0 else source.get_nowait()
            except queue.Empty:
                break
        ended = item is None
        if batch:
            yield batch
