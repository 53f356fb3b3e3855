"""What a Boss ingest is made of: jobs, their states, joins, reports."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from prefect_biomed.clients.boss.pictures import MAX_PIXELS, Conversion
from prefect_biomed.clients.boss.proofs import Verification
from prefect_biomed.clients.rest import OpenEnum

__all__ = [
    "Channel",
    "Completion",
    "IngestJob",
    "IngestType",
    "JobCounts",
    "JobStatus",
    "JoinedJob",
    "Made",
    "UploadProgress",
    "UploadReport",
    "UploadSettings",
]


Made: TypeAlias = Literal["whole", "padded", "blank"]
"""How much of a tile or chunk its source gave: all; less than lies within the extent; nothing."""


class JobStatus(int, OpenEnum):
    """State of an ingest job.

    A number that the Boss may invent later is kept and is not terminal.
    """

    PREPARING = 0
    UPLOADING = 1
    COMPLETE = 2
    DELETED = 3
    FAILED = 4
    COMPLETING = 5
    WAIT_ON_QUEUES = 6

    @property
    def is_terminal(self) -> bool:
        """Whether the job will not change any more."""
        return self in (JobStatus.COMPLETE, JobStatus.DELETED, JobStatus.FAILED)

    @property
    def is_success(self) -> bool:
        """Whether everything that was indexed is in the Boss."""
        return self == JobStatus.COMPLETE


class IngestType(str, OpenEnum):
    """Kind of an ingest job. One that the Boss may invent later is kept."""

    TILE = "tile"
    VOLUMETRIC = "volumetric"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class IngestJob(_Frozen):
    """An ingest job as the Boss lists it.

    Attributes:
        id: Number of the job; all further calls need it.
        collection: Name of the collection.
        experiment: Name of the experiment.
        channel: Name of the channel that is written to.
        status: State when it was asked.
        ingest_type: Whether it takes tiles or chunks.
        tile_count: Number of tiles (chunks of a volumetric job); 0 where the list does not tell it.
        created_on: When the job was made, by the server's clock; None where it is not told.
        host: Server that it lives on.
    """

    id: int
    collection: str
    experiment: str
    channel: str
    status: JobStatus
    ingest_type: IngestType = IngestType.TILE
    tile_count: int = 0
    created_on: datetime | None = None
    host: str = ""


class JobCounts(_Frozen):
    """How far a job is, as `/status` tells it.

    Attributes:
        id: Number of the job.
        status: Its state.
        tile_count: Messages that it began with.
        visible: Messages waiting in the upload queue; those leased by a client are not counted, and the number is
            approximate.
    """

    id: int
    status: JobStatus
    tile_count: int
    visible: int


class Channel(_Frozen):
    """What is known of the channel that is written to.

    Attributes:
        path: `collection/experiment/channel`.
        datatype: `uint8`, `uint16`, `uint32` or `uint64`.
        type: `image` or `annotation`.
        base_resolution: The level that an ingest writes to, whatever the configuration says.
        bounds: Half-open ranges of the coordinate frame in voxels, by axis.
        time_samples: Number of time samples of the experiment.
    """

    path: str
    datatype: str
    type: str = "image"
    base_resolution: int = 0
    bounds: dict[str, tuple[int, int]]
    time_samples: int = 1


class JoinedJob(_Frozen):
    """The answer to a join that found a job ready: where to work and with which keys.

    Attributes:
        job: The job.
        access_key: Id of the AWS key, good for about an hour.
        secret_key: Its secret.
        session_token: Session token; None for the keys that the Boss issues today.
        upload_queue: URL of the queue of what is left to do.
        tile_index_queue: URL of the queue that finished tiles are told to; None for volumetric jobs.
        bucket: Where to put tiles or cuboids.
        parameters: What the lambdas want to get back with every tile.
        lookup_key: Numbers of collection, experiment and channel, joined by `&`.
        datatype: dtype of the channel.
        base_resolution: Level that is written to.
    """

    job: IngestJob
    access_key: SecretStr
    secret_key: SecretStr
    session_token: SecretStr | None = None
    upload_queue: str
    tile_index_queue: str | None
    bucket: str
    parameters: dict[str, Any] = Field(repr=False)
    lookup_key: str
    datatype: str
    base_resolution: int


class Completion(_Frozen):
    """How an attempt to complete a job ended.

    Attributes:
        job_id: Number of the job.
        outcome: `COMPLETE`, or `RESUME` when the Boss wants more tiles.
        status: State of the job.
        missing: Messages waiting in the upload queue when the outcome is `RESUME`.
    """

    job_id: int
    outcome: Literal["COMPLETE", "RESUME"]
    status: JobStatus
    missing: int = 0


class UploadSettings(BaseModel):
    """How to upload, and what to do with sources that are missing or damaged."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    threads: int = Field(default=16, ge=1, le=128, title="Objects at once")
    """Objects put at the same time."""
    on_bad_source: Literal["fail", "blank", "skip", "quarantine"] = Field(default="fail", title="With a bad source")
    """What to do with a tile whose source is missing, damaged or does not fit: `fail` leaves its message in the queue,
    so that the job cannot complete; `blank` uploads the fill value; `skip` takes it off the queue (the Boss completes a
    job only when all sixteen slices of a chunk are skipped together); `quarantine` takes it off the queue and keeps it,
    to be tried again by the next upload of this machine."""
    colour: Literal["error", "convert"] = Field(default="error", title="With images in colour")
    """`convert` stands for the conversions `grey` and `scale`."""
    convert: frozenset[Conversion] = Field(default=frozenset(), title="Conversions that are allowed")
    """What may be done to sources that do not fit the channel; without it they are refused, and values never change.
    `grey`: colour, palette and black and white become one value (ITU-R 601 luma; 0 and 255); `scale`: of values that
    are too deep the upper bits are kept; `clip`: values outside become the nearest that fits; `shift`: half the range
    is added to signed values, which keeps their order; `first_page`: the first of several pages is taken; `stored`:
    images that are to be turned before they are shown are taken as they are stored; `pad`: what a source lacks of its
    part of the extent is filled up."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, title="Most pixels of one source image")
    """Images whose header speaks of more are bad sources: damaged, or made to exhaust the memory."""
    fill: int = Field(default=0, ge=0, title="Fill value")
    """Value of pixels that the source does not have."""
    encoding: Literal["png", "tiff"] = Field(default="png", title="Format of tiles")
    """Format of tiles that must be encoded anew: `png` is smaller, `tiff` faster."""
    cache_bytes: int = Field(default=512 * 1024 * 1024, ge=0, title="Cache of source images (bytes)")
    """Bound of decoded source images in memory, those that are being decoded included."""
    cache_disk_bytes: int = Field(default=32 * 1024**3, ge=0, title="Cache of source images on disk (bytes)")
    """Bound of decoded source images that were not used up before they had to leave the memory; they lie in a nameless
    file in the folder of ledgers. Beyond it, and with 0, they are decoded again."""
    chunk_bytes: int = Field(default=1024 * 1024 * 1024, ge=1, title="Memory for chunks (bytes)")
    """Bound of chunks of a volumetric job in memory."""
    max_tiles: int | None = Field(default=None, ge=1, title="Stop after so many tiles")
    """Stop after about so many tiles."""
    max_seconds: float | None = Field(default=None, gt=0, title="Length of one slice (s)")
    """Seconds after which no more is received; what is in flight is finished. A flow goes on with the next slice; its
    slices are 900 s long when empty."""
    grace_seconds: float = Field(default=60.0, ge=0, title="Grace for what is in flight (s)")
    """How long a stop waits for what is in flight."""
    straggler_seconds: float = Field(default=1000.0, ge=0, title="Patience with other machines (s)")
    """How long to wait for messages that others hold, when there are no more."""
    min_lease_seconds: float = Field(default=120.0, ge=1, title="Shortest lease (s)")
    """Shortest lease that is asked for. Boss waits 180 s for leases before it completes a job."""
    max_lease_seconds: float = Field(default=900.0, ge=1, le=43200, title="Longest lease (s)")
    """Longest lease that is asked for."""
    attempts: int = Field(default=3, ge=1, title="Attempts at one message")
    """Times that one message may fail for reasons that should pass, before it counts as failed."""
    key_seconds: float = Field(default=3300.0, gt=0, title="Renew keys after (s)")
    """Age at which AWS keys are renewed."""


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


class UploadReport(_Frozen):
    """What an upload did, counted exactly.

    "Tile" stands for a chunk where the job is volumetric.

    Attributes:
        job_id: Number of the job.
        tile_count: Tiles that the job has.
        received: Messages received, repeated deliveries included.
        put: Tiles (for a volumetric job: cuboids) that were PUT, repeated ones included.
        put_bytes: Bytes of these.
        indexed: Index messages sent.
        deleted: Distinct tiles finished by this run.
        deleted_before: Distinct tiles that earlier runs finished, as the ledger of this machine knows.
        requeued: Tiles that were finished and that the Boss asked for again; done again, and not counted as deleted.
        duplicates: Messages of tiles that were finished already; only deleted again.
        abandoned: Messages received and not worked on: their lease was near its end, or the upload was.
        blank: Tiles filled because their source was missing or damaged.
        padded: Tiles of which the source lacked a part that lies within the extent, and that part was filled.
        skipped: Tiles left out for the same reason.
        quarantined: Messages that cannot be right, or whose source is missing or damaged, taken off the queue and kept.
        failed: Tiles that could not be read, by name, with the reason; their messages stay in the queue.
        holes: Tiles that are not in the Boss although the job counts as finished, as far as was found out.
        unaccounted: Tiles that neither this run nor the ledger of this machine finished: other clients' work, or lost.
        by_others: Those of them that are in the Boss; known of a job that is complete.
        verified: Tiles of which every voxel was compared with the source after the job was complete.
        verification: What a look at the pixels of a complete job says; None without one.
        joins: Times that keys were asked for.
        seconds: Duration.
        exhausted: Whether the queue was found empty at the end.
        stopped: Why the upload ended before the queue was empty; empty otherwise.
        warnings: What a person should know.
    """

    job_id: int
    tile_count: int
    received: int = 0
    put: int = 0
    put_bytes: int = 0
    indexed: int = 0
    deleted: int = 0
    deleted_before: int = 0
    requeued: int = 0
    duplicates: int = 0
    abandoned: int = 0
    blank: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    failed: dict[str, str] = {}
    holes: tuple[str, ...] = ()
    unaccounted: int = 0
    by_others: int = 0
    verified: int = 0
    verification: Verification | None = None
    joins: int = 0
    seconds: float = 0.0
    exhausted: bool = False
    stopped: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def delivered(self) -> int:
        """Distinct tiles of which this machine has sent the source, and not the fill value."""
        return max(0, self.deleted + self.deleted_before - len(self.blank))

    @property
    def unverified(self) -> int:
        """Tiles that were to arrive and were not compared in whole."""
        left_out = len(self.skipped) + len(self.quarantined) + len(self.failed)
        return max(0, self.tile_count - self.verified - left_out - len(self.holes))

    @property
    def tiles_per_second(self) -> float:
        """Rate of this run."""
        return self.deleted / self.seconds if self.seconds > 0 else 0.0

    @property
    def balanced(self) -> bool:
        """Whether every tile was finished by this machine and none is missing."""
        return self.unaccounted == 0 and not (self.holes or self.failed or self.skipped or self.quarantined)

    def summary(self) -> str:
        """One paragraph for a log or an artifact."""
        parts = [f"Ingest job {self.job_id}: {self.deleted} of {self.tile_count} tiles finished"]
        if self.seconds:
            rate = f"{self.tiles_per_second:.1f}/s, {self.put_bytes / 1e6:.1f} MB"
            parts[0] += f" in {self.seconds:.1f} s ({rate})"
        if self.deleted_before:
            parts.append(f"{self.deleted_before} by earlier runs")
        if self.by_others:
            parts.append(f"{self.by_others} by other clients")
        elif self.unaccounted and self.exhausted and not self.verification:
            parts.append(f"{self.unaccounted} by other clients or lost")
        named = ("blank", "padded", "skipped", "quarantined", "failed", "holes")
        lists = {name: len(getattr(self, name)) for name in named}
        counts = {"asked for again": self.requeued, "duplicates": self.duplicates, "abandoned": self.abandoned, **lists}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        if self.verification:
            parts.append(f"{self.verified} verified, {self.unverified} not")
        return ", ".join(parts) + "." + (f" {self.verification.summary()}" if self.verification else "")
