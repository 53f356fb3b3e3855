"""Uploading: from the queue of what is left to pixels in the Boss, fast, and without losing or doubling a tile.

One thread receives messages in batches, a pool of threads reads and puts tiles, one thread sends index messages and one
deletes what is finished, both in batches of ten. A message that is not finished stays in the queue and comes back when
its lease ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from prefect_biomed.clients.boss._aws import JobQueues
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.errors import QueueGone
from prefect_biomed.clients.boss.indexing import Deleting, Indexing
from prefect_biomed.clients.boss.ledger import Ledger, TileState, open_ledger
from prefect_biomed.clients.boss.messages import Messages
from prefect_biomed.clients.boss.models import (
    IngestJob,
    JobStatus,
    JoinedJob,
    UploadProgress,
    UploadReport,
    UploadSettings,
)
from prefect_biomed.clients.boss.monitoring import wait_until_ready
from prefect_biomed.clients.boss.putting import ChunkPutting, Pieces, Putting, TilePutting
from prefect_biomed.clients.boss.receiving import Receiving
from prefect_biomed.clients.boss.sources import ChunkSource, TileSource, open_source
from prefect_biomed.clients.boss.tally import Course, Setbacks, Tally
from prefect_biomed.clients.errors import BiomedError, JobFailed, NotFoundError, PreflightFailed
from prefect_biomed.clients.texts import logger_of

__all__ = ["Uploader"]

logger = logger_of(__name__)


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
        retries_kept: Whether to try again what earlier uploads put aside; one process of an upload does.

    Raises:
        PreflightFailed: The configuration is that of another job.
        ConfigurationError: A plugin cannot be loaded, or the channel cannot hold the tiles.
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
        retries_kept: bool = True,
    ) -> None:
        settings = settings or UploadSettings()
        joined = joined or wait_until_ready(client, job_id)
        job = joined.job
        _check(job, config)
        self._client = client
        self._job_id = job.id
        self._grace_seconds = settings.grace_seconds
        self._on_progress = on_progress
        self._external_stop = stop or threading.Event()
        self._is_owner = is_owner
        self._retries_kept = retries_kept
        self._ledger = open_ledger(client, job.id, job.tile_count, ledger_folder)
        source = open_source(config, joined.datatype, settings)
        self._queues = JobQueues(client, joined, connections=settings.threads + 2, key_seconds=settings.key_seconds)
        self._tally = Tally(job.id, job.tile_count)
        self._course = Course(settings.grace_seconds)
        messages = Messages(config, joined)
        self._line = _assembled(messages, source, settings, self._queues, self._ledger, self._tally, self._course)

    def run(self) -> UploadReport:
        """Upload.

        Returns:
            What was done. Tiles that failed under the policy `fail` are in it; nothing is raised for them.

        Raises:
            QueueGone: The job was completed or cancelled meanwhile.
            ConfigurationError: `aws_region` is not that of the bucket.
            AuthenticationError: Token or keys are refused for good.
            LedgerError: The ledger is damaged.
            LocalStorageError: The ledger cannot be written, for instance because the disk is full.
            BiomedError: The server or AWS is out of order for longer than retries can bridge.
        """
        begun = time.monotonic()
        if self._is_owner:
            self._ledger.forget_failed()
        before = self._ledger.count(TileState.FINISHED)
        line, course = self._line, self._course
        threads = {
            "index": self._thread("index", line.indexing.run),
            "delete": self._thread("delete", line.deleting.run),
            "receive": self._thread("receive", lambda: line.receiving.run(retry_quarantined=self._retries_kept)),
        }
        try:
            while threads["receive"].is_alive():
                threads["receive"].join(1.0)
                self._show_progress()
                if self._external_stop.is_set():
                    course.end("stopped on request")
        except BaseException:
            course.end("interrupted", at_once=True)
            raise
        finally:
            self._shut_down(threads)
        self._show_progress()
        if isinstance(course.error, JobFailed | NotFoundError):
            self._explain_end(course.error)
        elif course.error is not None:
            raise course.error
        return self._tally.report(
            self._ledger, course, before=before, joins=self._queues.joins, seconds=time.monotonic() - begun
        )

    def close(self) -> None:
        """Close connections and ledger."""
        self._queues.close()
        self._ledger.close()

    def _thread(self, name: str, loop: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                loop()
            except BaseException as error:
                self._course.fail(error)

        thread = threading.Thread(target=guarded, name=f"boss-{name}", daemon=True)
        thread.start()
        return thread

    def _show_progress(self) -> None:
        self._tally.write_down(self._ledger, self._queues.joins)
        if self._on_progress:
            self._on_progress(self._tally.progress(self._ledger))

    def _shut_down(self, threads: Mapping[str, threading.Thread]) -> None:
        """Let what is in flight finish: receiver and pool first, then what they feed."""
        deadline = time.monotonic() + self._grace_seconds
        threads["receive"].join(max(0.0, deadline - time.monotonic()))
        for name, step in (("index", self._line.indexing), ("delete", self._line.deleting)):
            step.end()
            threads[name].join(max(0.0, deadline - time.monotonic()))
        self._line.pieces.give_back()
        if any(thread.is_alive() for thread in threads.values()):
            logger.warning("The grace period is over; what is still in flight comes back when its lease ends")

    def _explain_end(self, error: BiomedError) -> None:
        """The queue or the keys went away: find out whether somebody completed the job, or cancelled it."""
        try:
            status = self._client.counts(self._job_id).status
        except NotFoundError:
            status = JobStatus.DELETED
        if status not in (JobStatus.COMPLETE, JobStatus.COMPLETING):
            raise QueueGone(f"Ingest job {self._job_id} is {status.name}: somebody ended it.") from error
        self._course.reason = f"the job is {status.name}: another client completed it"
        self._course.is_exhausted = True


class _Line(NamedTuple):
    """What a message passes through: receiving, the pool's work, indexing, deleting."""

    receiving: Receiving
    pieces: Pieces
    indexing: Indexing
    deleting: Deleting


def _assembled(
    messages: Messages,
    source: TileSource | ChunkSource,
    settings: UploadSettings,
    queues: JobQueues,
    ledger: Ledger,
    tally: Tally,
    course: Course,
) -> _Line:
    setbacks = Setbacks(ledger, tally, course, settings.attempts)
    deleting = Deleting(queues, ledger, tally=tally, course=course)
    indexing = Indexing(queues, ledger, messages, setbacks=setbacks, tally=tally, course=course, forward=deleting.take)
    putting: Putting
    if isinstance(source, TileSource):
        putting, forward = TilePutting(source, queues, messages, tally, settings), indexing.take
    else:
        putting, forward = ChunkPutting(source, queues, messages, tally, settings), deleting.take
    pieces = Pieces(putting, queues, ledger, settings, setbacks=setbacks, tally=tally, course=course, forward=forward)
    receiving = Receiving(
        queues, ledger, messages, pieces, settings, tally=tally, course=course, is_indexed=deleting.take
    )
    return _Line(receiving, pieces, indexing, deleting)


def _check(job: IngestJob, config: IngestConfig) -> None:
    """Refuse to work on a job with another job's configuration.

    Raises:
        PreflightFailed: They do not fit each other.
    """
    found = []
    if f"{job.collection}/{job.experiment}/{job.channel}" != config.channel_path:
        found.append(f"The job writes to {job.collection}/{job.experiment}/{job.channel}, not {config.channel_path}.")
    if job.ingest_type != config.ingest_job.ingest_type:
        found.append(f"The job is {job.ingest_type.value}, the configuration {config.ingest_job.ingest_type}.")
    elif job.tile_count != config.tile_count:
        found.append(f"The job has {job.tile_count} tiles, the configuration {config.tile_count}.")
    if found:
        raise PreflightFailed(f"Ingest job {job.id}", found)
