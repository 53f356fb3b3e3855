"""The Boss behind its two doors (REST and AWS): jobs, keys, lambdas and completion."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.sandbox._core import Switches
from prefect_biomed.sandbox.boss import _config
from prefect_biomed.sandbox.boss._jobs import (
    Entry,
    Job,
    Status,
    StoredObject,
    now_text,
    unmorton,
)
from prefect_biomed.sandbox.boss._queues import Queue
from prefect_biomed.sandbox.boss._resources import BossProblem, Resources
from prefect_biomed.sandbox.boss._volumes import (
    Array,
    Blobs,
    Cuboid,
    Range,
    TileChunk,
    TileRef,
    Volumes,
    image_header,
    unblosc,
)

TILE_BUCKET = "tiles.sandbox.boss"
INGEST_BUCKET = "ingest.sandbox.boss"
ACCOUNT = "000000000000"
_RETRIES_BEFORE_DEAD_LETTER = 3
_KEPT = ("resources", "jobs", "keys", "queues", "_later", "_fault_calls")

_log = logging.getLogger(__name__)


class AwsFault(BaseModel):
    """A planned misbehaviour of SQS or S3, counted per operation.

    SQS has one path for all operations, so that the path pattern of the common fault plan cannot
    tell them apart; this can.
    """

    model_config = ConfigDict(extra="forbid")

    operation: str = Field(description="Such as `PutObject` or `SendMessageBatch`.")
    skip: int = Field(default=0, ge=0, description="Calls that go well first.")
    times: int | None = Field(default=1, description="Calls that fail; None for all.")
    code: str = Field(default="", description="Error code answered, such as `SlowDown`.")
    status: int = Field(default=503, description="HTTP status that goes with `code`.")
    entries: list[int] = Field(default=[], description="In a batch: positions that fail while the others go well.")
    key: str = Field(default="", description="For S3: part of the object key that it applies to.")


class IngestFault(BaseModel):
    """Pixels that the lambdas spoil without a word, as they have been seen to do."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["black", "lost", "clipped"] = Field(
        description="`black`: the whole chunk of the slice; `lost`: this tile is black; `clipped`: its values "
        "above 255 (above 127 in 8 bits) become that.",
    )
    x: int = Field(default=0, ge=0, description="Column of the tile.")
    y: int = Field(default=0, ge=0, description="Row of the tile.")
    z: int = Field(default=0, ge=0, description="Slice.")
    t: int = Field(default=0, ge=0, description="Sample.")


class BossSwitches(Switches):
    """How the emulated Boss behaves; can be changed at run time."""

    prepare_seconds: float = Field(default=0.2, description="Time that filling the queue takes.")
    unready_joins: int = Field(default=0, description="Joins answered PREPARING at least.")
    null_credentials_joins: int = Field(default=0, description="Joins answered without keys.")
    fail_population: bool = Field(default=False, description="Filling the queue fails for good.")
    quiet_seconds: float = Field(default=2.0, description="180 in production.")
    completing_seconds: float = Field(default=0.3, description="Time that verification takes.")
    downsampling_seconds: float = Field(default=0.3, description="Time that lower resolutions take; none are made.")
    visibility_seconds: float = Field(default=120.0, description="Default lease of a message.")
    key_seconds: float = Field(default=3600.0, description="Life of an issued key pair.")
    key_generation: int = Field(default=0, ge=0, description="Raising it invalidates all keys issued so far.")
    key_delay_seconds: float = Field(default=0.0, description="Time until a new key is known.")
    index_delay_seconds: float = Field(default=0.0, description="Delay of the index lambda.")
    hold_ingest: bool = Field(default=False, description="The ingest lambda does not run.")
    keys_may_give_back: bool = Field(default=False, description="Keys allow ChangeMessageVisibility; theirs do not.")
    clock_ahead_seconds: float = Field(default=0.0, description="By so much the clock of AWS is ahead of the client's.")
    long_settings: int = Field(default=0, description="Characters of padding in join settings.")
    ingest_faults: list[IngestFault] = Field(default=[], description="Tile jobs: pixels that are spoilt on the way.")
    aws_faults: list[AwsFault] = Field(default=[], description="Planned faults of SQS and S3.")


@dataclass
class Key:
    """An issued AWS key pair."""

    access: str
    secret: str
    job: Job
    valid_from: float
    valid_until: float
    generation: int


class AwsProblem(Exception):
    """An answer with an AWS error code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Service:
    """All state of the emulated Boss.

    Args:
        directory: Where uploaded objects are kept.
        switches: Behaviour.
        seed: Seeds the tokens, so that they are the same in each run with one seed.
    """

    def __init__(self, directory: Path, switches: BossSwitches, seed: int) -> None:
        rng = random.Random(f"boss-{seed}")
        self.switches = switches
        self.users = {f"{rng.getrandbits(160):040x}": name for name in ("alice", "bob", "admin")}
        self.tokens = {name: token for token, name in self.users.items()}
        self.resources = _furnish()
        self.jobs: dict[int, Job] = {}
        self.keys: dict[str, Key] = {}
        self.queues: dict[str, tuple[Queue, Job, str]] = {}
        self.url = ""
        self.lock = threading.RLock()
        self._blobs = Blobs(directory / "objects.bin")
        self._volumes = Volumes(self._blobs, self._black)
        self._fault_calls: dict[int, int] = {}
        self._later: deque[tuple[float, Any, tuple[Any, ...]]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="boss-lambdas", daemon=True)

    def start(self) -> None:
        """Start the lambdas."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the lambdas and close the object store."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._blobs.close()

    @contextmanager
    def frozen(self) -> Iterator[dict[str, Any]]:
        """Give what a new process needs to go on, and change nothing meanwhile."""
        self._blobs.keep_all()
        with ExitStack() as held:
            held.enter_context(self.lock)
            for queue, _, _ in list(self.queues.values()):
                held.enter_context(queue.lock)
            volumes = held.enter_context(self._volumes.frozen())
            yield {name: getattr(self, name) for name in _KEPT} | {"volumes": volumes, "end": self._blobs.end}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `frozen` gave; queues that were being filled are filled anew."""
        for name in _KEPT:
            setattr(self, name, state[name])
        self._volumes.restore(state["volumes"])
        self._blobs.continue_from(state["end"])
        for job in self.jobs.values():
            if job.status == Status.PREPARING and not job.filled and job.upload_queue:
                job.upload_queue.clear()
                self._begin_to_fill(job)

    # -- jobs --------------------------------------------------------------------------------

    def create(self, user: str, config: Any) -> Job:
        """Make a job and begin to fill its upload queue."""
        reason = _config.problem(config)
        if reason:
            raise BossProblem(400, 1004, reason)
        database = config["database"]
        path = (database["collection"], database["experiment"], database["channel"])
        # The real one prints the name of what it did not find, which by then is always None.
        if path[0] not in self.resources.collections:
            raise BossProblem(404, 4000, "Collection None not found")
        if path[:2] not in self.resources.experiments:
            raise BossProblem(404, 4000, "Experiment None not found")
        if path not in self.resources.channels:
            raise BossProblem(404, 4000, "Channel None not found")
        with self.lock:
            number = len(self.jobs) + 1
            job = Job(
                id=number,
                creator=user,
                config=config,
                lookup_key=self.resources.lookup_key(*path),
                resource=self._resource(*path),
                tile_count=0,
            )
            self.jobs[number] = job
        try:
            job.tile_count = _config.tile_count(config["ingest_job"])
        except (ZeroDivisionError, ValueError) as error:
            cause = "division by zero" if isinstance(error, ZeroDivisionError) else str(error)
            text = f"Unable to create the upload and ingest queue.{cause}"
            raise BossProblem(400, 9001, text) from error
        self._open_queues(job)
        self._begin_to_fill(job)
        return job

    def _begin_to_fill(self, job: Job) -> None:
        if not self.switches.fail_population:
            threading.Thread(target=self._fill, args=(job,), daemon=True).start()

    def _open_queues(self, job: Job) -> None:
        seconds = self.switches.visibility_seconds
        names = {"upload": f"sandbox-boss-upload-{job.id}"}
        if not job.volumetric:
            names |= {"ingest": f"sandbox-boss-ingest-{job.id}"}
            names |= {"index": f"sandbox-boss-{job.id}-index"}
        for kind, name in names.items():
            queue = Queue(self.queue_url(name), seconds)
            self.queues[name] = (queue, job, kind)
            setattr(job, f"{kind}_queue", queue)

    def queue_url(self, name: str) -> str:
        """The URL that stands for a queue."""
        return f"{self.url}/{ACCOUNT}/{name}"

    def _fill(self, job: Job) -> None:
        time.sleep(self.switches.prepare_seconds)
        queue = job.upload_queue
        if queue is None:
            return
        for body in job.messages():
            queue.send(body)
        job.filled = True

    def job(self, user: str | None, number: int) -> Job:
        """Look up a job that `user` may touch."""
        job = self.jobs.get(number)
        if job is None:
            raise BossProblem(404, 4004, f"The ingest job with id {number} does not exist")
        if user is None or user not in (job.creator, "admin"):
            raise BossProblem(403, 3003, "Only the creator or admin can manage this ingest job")
        return job

    def join(self, job: Job) -> dict[str, Any]:
        """Answer a join: the one call that moves PREPARING to UPLOADING."""
        with self.lock:
            job.observed.joins += 1
            gone = job.status in (Status.COMPLETE, Status.DELETED)
            if gone and not job.volumetric:
                text = "AWS.SimpleQueueService.NonExistentQueue: the queue does not exist"
                raise BossProblem(400, 9001, f"Error creating the ingest queue url: {text}")
            if job.status == Status.DELETED:
                text = f"The ingest job {job.id} has been deleted"
                raise BossProblem(404, 2004, text)
            if job.status in (Status.COMPLETE, Status.FAILED):
                return {"ingest_job": self.describe(job)}
            if job.status == Status.PREPARING:
                if self.switches.fail_population:
                    text = "Error generating ingest job messages: States.TaskFailed"
                    raise BossProblem(400, 9001, text)
                job.unready_joins += 1
                if job.filled and job.unready_joins > self.switches.unready_joins:
                    job.status = Status.UPLOADING
            credentials = None
            if job.status != Status.PREPARING:
                credentials = self._issue(job)
            padding = "x" * self.switches.long_settings
            return {
                "ingest_job": self.describe(job),
                "credentials": credentials,
                "tile_bucket_name": TILE_BUCKET,
                "ingest_bucket_name": INGEST_BUCKET,
                "KVIO_SETTINGS": {"cache_host": f"cache{padding}", "cache_db": 0},
                "STATEIO_CONFIG": {"cache_state_host": "cache-state", "cache_state_db": 0},
                "OBJECTIO_CONFIG": {"cuboid_bucket": "cuboids", "s3_index_table": "s3index"},
                "resource": job.resource,
                "ingest_lambda": "deprecated",
            }

    def describe(self, job: Job) -> dict[str, Any]:
        """What create and join tell about a job."""
        database = job.config["database"]
        queues = {
            f"{kind}_queue": queue.name if queue else None
            for kind, queue in (("ingest", job.ingest_queue), ("upload", job.upload_queue))
        }
        return {
            "id": job.id,
            "collection": database["collection"],
            "experiment": database["experiment"],
            "channel": database["channel"],
            "status": int(job.status),
            **queues,
            "tile_count": job.tile_count,
            "ingest_type": int(job.volumetric),
            "tile_index_queue": job.index_queue.name if job.index_queue else None,
        }

    def _issue(self, job: Job) -> dict[str, Any] | None:
        if self.switches.null_credentials_joins > 0:
            self.switches.null_credentials_joins -= 1
            return None
        now = time.time()
        start = now + self.switches.key_delay_seconds
        number = len(self.keys) + 1
        end, generation = now + self.switches.key_seconds, self.switches.key_generation
        key = Key(f"AKIASANDBOX{number:09d}", f"secret-{number:033d}", job, start, end, generation)
        self.keys[key.access] = key
        return {"access_key": key.access, "secret_key": key.secret, "security_token": None}

    def valid_key(self, access: str) -> Key | None:
        """The issued key of that name, if AWS knows it now."""
        key, now = self.keys.get(access), time.time()
        if key is None or key.generation < self.switches.key_generation or not key.valid_from <= now < key.valid_until:
            return None
        return key

    def complete(self, job: Job) -> tuple[int, dict[str, Any] | None]:
        """Answer a completion request: status code and body."""
        wait = 180.0 if self.switches.quiet_seconds == 180 else self.switches.quiet_seconds
        with self.lock:
            if job.status == Status.COMPLETE:
                return 204, None
            if job.status == Status.COMPLETING:
                return 202, {"job_status": int(Status.COMPLETING)}
            if job.status not in (Status.UPLOADING, Status.WAIT_ON_QUEUES):
                text = f"Ingest job cannot be completed in state {job.status.name}"
                raise BossProblem(400, 1006, text)
            if job.upload_queue and job.upload_queue.counts()[0]:
                job.status = Status.UPLOADING
                raise BossProblem(400, 1006, "Upload queue is not empty")
            internal = [queue for queue in (job.index_queue, job.ingest_queue) if queue]
            if any(queue.counts()[0] for queue in internal):
                return 400, {"wait_secs": wait, "info": "Internal queues not empty yet"}
            now = time.time()
            if job.status == Status.UPLOADING:
                job.status, job.wait_until = Status.WAIT_ON_QUEUES, now + wait
                return 202, {"job_status": int(job.status), "wait_secs": wait}
            if now < job.wait_until:
                left = job.wait_until - now
                return 400, {"job_status": int(job.status), "wait_secs": left}
            job.status = Status.COMPLETING
            self.call_later(self.switches.completing_seconds, self._verify, job)
            return 202, {"job_status": int(job.status), "wait_secs": 0}

    def _verify(self, job: Job) -> None:
        """The completion activity: look for chunks that began and did not end."""
        with self.lock:
            if job.status != Status.COMPLETING:
                return
            missing = full = 0
            for entry in list(job.entries.values()):
                absent = job.missing_tiles(entry)
                for key in absent:
                    if job.upload_queue:
                        job.upload_queue.send(job.tile_message(entry.chunk_key, key))
                missing += len(absent)
                if not absent:
                    full += 1
                    self.call_later(0.0, self._ingest, job, entry)
            if missing:
                job.status = Status.UPLOADING
            elif full:
                job.status = Status.WAIT_ON_QUEUES
                job.wait_until = time.time() + self.switches.quiet_seconds
            else:
                self._close(job, Status.COMPLETE)
                job.completed_on = now_text()

    def cancel(self, job: Job) -> None:
        """Delete a job's queues and keys; what was ingested stays."""
        with self.lock:
            if job.status in (Status.COMPLETE, Status.DELETED):
                text = "Unable to complete cleanup. The queue does not exist"
                raise BossProblem(400, 9001, text)
            self._close(job, Status.DELETED)

    def _close(self, job: Job, status: Status) -> None:
        job.status = status
        for name in [name for name, (_, owner, _) in self.queues.items() if owner is job]:
            del self.queues[name]
        for access in [access for access, key in self.keys.items() if key.job is job]:
            del self.keys[access]

    def message_counts(self, job: Job) -> tuple[int, int]:
        """All messages that the job began with, and those visible now."""
        if job.status in (Status.COMPLETE, Status.DELETED) or job.upload_queue is None:
            return job.tile_count, 0
        return job.tile_count, job.upload_queue.counts()[0]

    # -- lambdas -----------------------------------------------------------------------------

    def call_later(self, seconds: float, function: Any, *arguments: Any) -> None:
        """Have the lambda thread call something after a while."""
        with self.lock:
            self._later.append((time.time() + seconds, function, arguments))
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(0.02)
            self._wake.clear()
            now = time.time()
            for _ in range(len(self._later)):
                with self.lock:
                    item = self._later.popleft()
                    if item[0] <= now:
                        self._call(item[1], item[2])
                    else:
                        self._later.append(item)
            for job in list(self.jobs.values()):
                if job.index_queue and job.status not in (Status.COMPLETE, Status.DELETED):
                    self._drain_index(job)

    @staticmethod
    def _call(function: Any, arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except Exception:
            _log.exception("a lambda of the Boss sandbox failed")

    def _drain_index(self, job: Job) -> None:
        queue = job.index_queue
        if queue is None or not queue.counts()[0]:
            return
        if self.switches.index_delay_seconds:
            time.sleep(self.switches.index_delay_seconds)
        while messages := queue.receive(10, visibility_seconds=0.2):
            for message in messages:
                if self._index(job, message.body):
                    queue.delete(queue.handle(message))
                elif message.receives >= _RETRIES_BEFORE_DEAD_LETTER:
                    job.dead_letters.append(message.body)
                    queue.delete(queue.handle(message))

    def _index(self, job: Job, body: str) -> bool:
        """The tile-uploaded lambda: note one tile of a chunk; False when the message is bad."""
        try:
            message = json.loads(body)
            int(message["ingest_job"])
            chunk_key, tile_key = message["chunk_key"], message["tile_key"]
            wanted = min(int(chunk_key.split("&")[1]), 16)
            [int(part) for part in chunk_key.split("&")[1:]]
            z = int(tile_key.split("&")[7])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False
        with self.lock:
            job.observed.indexed[tile_key] += 1
            entry = job.entries.get(chunk_key)
            if entry is None:
                if job.ingested_chunks[chunk_key]:
                    job.observed.late_indexed.append(tile_key)
                entry = job.entries[chunk_key] = Entry(chunk_key, wanted)
            entry.tiles[tile_key] = z
            entry.parameters = message.get("parameters")
            if len(entry.tiles) >= entry.wanted and not self.switches.hold_ingest:
                self._ingest(job, entry)
        return True

    def _ingest(self, job: Job, entry: Entry) -> None:
        """The tile-ingest lambda: write one chunk, or leave its entry for the completion."""
        with self.lock:
            parameters = entry.parameters or {}
            settings = ("KVIO_SETTINGS", "STATEIO_CONFIG", "OBJECTIO_CONFIG", "resource")
            if any(key not in parameters for key in settings):
                return
            try:
                resource = parameters["resource"]
                lookup_key, datatype = resource["lookup_key"], resource["channel"]["datatype"]
            except (KeyError, TypeError):
                return
            chunk = self._chunk(job, entry)
            if chunk is None:
                return
            self._volumes.add(lookup_key, datatype, chunk)
            job.entries.pop(entry.chunk_key, None)
            job.ingested_chunks[entry.chunk_key] += 1

    def _chunk(self, job: Job, entry: Entry) -> TileChunk | None:
        numbers = [int(part) for part in entry.chunk_key.split("&")[1:]]
        x, y, z_chunk, t = numbers[5:]
        tiles: list[TileRef] = []
        sizes: set[tuple[int, int]] = set()
        for key, z in sorted(entry.tiles.items(), key=lambda item: item[1]):
            stored = job.objects.get(key)
            if stored is None or not {"message_id", "receipt_handle"} <= set(stored.metadata):
                return None  # the real one drops the chunk; the completion finds its entry
            metadata = _loads(stored.metadata.get("metadata", ""))
            x_size, y_size = int(metadata.get("x_size", 1024)), int(metadata.get("y_size", 1024))
            header = image_header(self._blobs.get(stored.blob))
            if header is None:
                tiles.append(TileRef(key, z, None, x_size, y_size))
                sizes.add((y_size, x_size))
                self._black(key)
            elif header[1] != 2:
                return None
            else:
                tiles.append(TileRef(key, z, stored.blob, x_size, y_size))
                sizes.add(header[0])
        if len(sizes) != 1:
            return None
        for fault in self.switches.ingest_faults:
            if (fault.x, fault.y, fault.z // 16, fault.t) == (x, y, z_chunk, t):
                _spoil(tiles, fault)
        ((width, height),) = sizes
        return TileChunk(x, y, z_chunk, t, width, height, tiles)

    def _black(self, tile_key: str) -> None:
        for job in self.jobs.values():
            if tile_key in job.objects:
                job.errors.append({"tile_key": tile_key, "error": "image cannot be loaded"})

    # -- AWS ---------------------------------------------------------------------------------

    def planned_fault(self, operation: str, key: str = "") -> AwsFault | None:
        """The fault that the plan has for this call, if any."""
        with self.lock:
            for number, fault in enumerate(self.switches.aws_faults):
                if fault.operation != operation or fault.key not in key:
                    continue
                calls = self._fault_calls.get(number, 0) + 1
                self._fault_calls[number] = calls
                last = None if fault.times is None else fault.skip + fault.times
                if calls > fault.skip and (last is None or calls <= last):
                    return fault
        return None

    def forget_fault_calls(self) -> None:
        """Count the calls of each planned fault from nought again."""
        self._fault_calls.clear()

    def store(self, job: Job, key: str, content: bytes, metadata: dict[str, str]) -> None:
        """Keep one uploaded object; a cuboid is ingested at once, as its S3 trigger does."""
        reference = self._blobs.put(content)
        with self.lock:
            now = time.time()
            job.observed.first_put = job.observed.first_put or now
            job.observed.last_put = now
            job.observed.puts[key] += 1
            job.objects[key] = StoredObject(reference, metadata)
            if job.volumetric:
                self._import_cuboid(job, key, metadata, StoredObject(reference, metadata))

    def _import_cuboid(self, job: Job, key: str, metadata: dict[str, str], stored: StoredObject) -> None:
        try:
            int(json.loads(metadata["metadata"])["ingest_job"])
            numbers = [int(part) for part in key.split("&")[1:]]
        except (KeyError, ValueError, TypeError):
            return  # the import lambda fails and nobody learns of it
        x, y, z = unmorton(numbers[5])
        cuboid = Cuboid(x, y, z, numbers[4], stored.blob)
        datatype = str(job.resource["channel"]["datatype"])
        self._volumes.add("&".join(map(str, numbers[:3])), datatype, cuboid)

    # -- reading back ------------------------------------------------------------------------

    def cutout(self, path: tuple[str, str, str], x: Range, y: Range, z: Range, t: Range = (0, 1)) -> Array:
        """A block of a channel as an array of shape (t, z, y, x)."""
        datatype = self.resources.channel(*path)["datatype"]
        return self._volumes.read(self.resources.lookup_key(*path), datatype, x, y, z, t)

    def write_cutout(
        self, user: str, path: tuple[str, str, str], ranges: tuple[Range, Range, Range], t: int, frame: bytes
    ) -> None:
        """Write a block of a channel."""
        datatype = self.resources.channel(*path)["datatype"]
        frame_about = self.resources.frame(self.resources.experiment(*path[:2])["coord_frame"])
        shape = tuple(high - low for low, high in reversed(ranges))
        for axis, (low, high) in zip("xyz", ranges, strict=True):
            if low < frame_about[f"{axis}_start"] or high > frame_about[f"{axis}_stop"]:
                raise BossProblem(400, 1001, f"Incorrect cutout arguments {axis}: {low}:{high}")
        try:
            block = np.frombuffer(unblosc(frame), dtype=datatype).reshape(shape)
        except ValueError as error:
            raise BossProblem(400, 1001, f"Data dimensions in URL do not match POSTed data: {error}") from error
        corner = (ranges[0][0], ranges[1][0], ranges[2][0])
        self._volumes.write(self.resources.lookup_key(*path), datatype, block, corner, t)
        about = self.resources.channel(*path)
        if about["downsample_status"] == "DOWNSAMPLED":
            about["downsample_status"] = "NOT_DOWNSAMPLED"

    def downsample(self, collection: str, experiment: str, channel: str) -> None:
        """Begin to make lower resolutions: the state of the channel says so, and later that they are made."""
        about = self.resources.channel(collection, experiment, channel)
        if about["downsample_status"] == "IN_PROGRESS":
            raise BossProblem(400, 1010, "Channel is currently being downsampled. Invalid Request.")
        if about["downsample_status"] == "DOWNSAMPLED":
            raise BossProblem(400, 1010, "Channel is already downsampled. Invalid Request.")
        about["downsample_status"] = "IN_PROGRESS"
        self.call_later(self.switches.downsampling_seconds, about.update, {"downsample_status": "DOWNSAMPLED"})

    def _resource(self, collection: str, experiment: str, channel: str) -> dict[str, Any]:
        about = self.resources.experiment(collection, experiment)
        frame = self.resources.frame(about["coord_frame"])
        description = self.resources.channel(collection, experiment, channel)
        return {
            "boss_key": f"{collection}&{experiment}&{channel}",
            "lookup_key": self.resources.lookup_key(collection, experiment, channel),
            "channel": {key: description[key] for key in ("type", "datatype", "base_resolution")},
            "experiment": {key: about[key] for key in ("num_hierarchy_levels", "hierarchy_method")},
            "coord_frame": {f"{axis}_voxel_size": frame[f"{axis}_voxel_size"] for axis in "xyz"},
        }


def _spoil(tiles: list[TileRef], fault: IngestFault) -> None:
    for tile in tiles:
        if fault.kind == "black" or (tile.z == fault.z and fault.kind == "lost"):
            tile.blob = None
        elif tile.z == fault.z:
            tile.is_clipped = True


def _loads(text: str) -> dict[str, Any]:
    try:
        loaded = json.loads(text)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _furnish() -> Resources:
    """A collection to begin with: one channel of each datatype."""
    resources = Resources()
    resources.add_collection("alice", "sandbox", "made by the sandbox")
    bounds: dict[str, Any] = {}
    for axis in "xyz":
        bounds |= {f"{axis}_start": 0, f"{axis}_stop": 200_000, f"{axis}_voxel_size": 4.0}
    resources.add_frame("alice", "sandbox-frame", bounds)
    experiment = {"coord_frame": "sandbox-frame", "num_time_samples": 1000}
    resources.add_experiment("alice", "sandbox", "stack", experiment)
    for datatype in ("uint8", "uint16", "uint32"):
        body = {"type": "image", "datatype": datatype}
        resources.add_channel("alice", "sandbox", "stack", datatype, body)
    labels = {"type": "annotation", "datatype": "uint64"}
    resources.add_channel("alice", "sandbox", "stack", "labels", labels)
    return resources
