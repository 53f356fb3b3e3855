"""The REST interface of the Boss: ingest jobs, the resources they write to, cutouts."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Literal, Self
from urllib.parse import quote

from pydantic import SecretStr, TypeAdapter, ValidationError

from prefect_biomed.clients.boss.answers import (
    ChannelAnswer,
    CompletionAnswer,
    DownsampleAnswer,
    ErrorAnswer,
    ExperimentAnswer,
    FrameAnswer,
    FrameworkErrorAnswer,
    JobAnswer,
    JobListAnswer,
    JoinAnswer,
    NameAnswer,
    NamesAnswer,
    StatusAnswer,
)
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.cutouts import Cutout, unpack
from prefect_biomed.clients.boss.errors import NotYetComplete, refuse_over
from prefect_biomed.clients.boss.models import Channel, IngestJob, IngestType, JobCounts, JobStatus, JoinedJob
from prefect_biomed.clients.boss.tokens import find_token
from prefect_biomed.clients.errors import (
    AuthenticationError,
    JobFailed,
    NotFoundError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import HttpSession, Timeouts
from prefect_biomed.clients.rest import Refusal, RestClient, read_body
from prefect_biomed.clients.texts import logger_of

__all__ = ["BossClient"]

logger = logger_of(__name__)

Range = tuple[int, int]

# Of an error of the Boss's own, of which nobody knows what it has left behind.
_SYSTEM_ERROR = 9001
_CANCELLED = 2004
_EXISTS = 1003
_KINDS = ("collection", "experiment", "channel")
_NO_CONTENT = 204
# How long a proxy, or the server's own queue, may hold a request after its client is gone.
_HELD_SECONDS = 60.0
_SPOKEN: TypeAdapter[ErrorAnswer | FrameworkErrorAnswer | CompletionAnswer] = TypeAdapter(
    ErrorAnswer | FrameworkErrorAnswer | CompletionAnswer
)


class BossClient(RestClient):
    """Client of one Boss server.

    Reads are repeated for short outages; no other request is.

    Args:
        host: Host name, with a port where needed.
        token: API token; `find_token` finds it.
        protocol: `https` or `http`.
        verify_tls: False accepts any certificate.
        timeouts: Seconds to wait for the server.
        aws_region: Region of queues and buckets.
        aws_endpoint_url: Where SQS and S3 are asked instead of AWS.
        aws_verify_tls: False accepts any certificate of these.
        settle_seconds: Longest time after which a request of ours may still take effect although its answer was lost;
            a minute more than the read timeout when None.

    Attributes:
        settle_seconds: As given.
    """

    # The Boss answers so while a part of it is busy; its own client tries a hundred times.
    _unavailable: ClassVar[frozenset[int]] = RestClient._unavailable | {500}
    _by_status: ClassVar[dict[int, tuple[type[PlatformError], str]]] = RestClient._by_status | {
        401: (AuthenticationError, "The Boss refused the token. Check the token of the block."),
        404: (NotFoundError, ""),
    }

    def __init__(
        self,
        host: str = "api.bossdb.io",
        token: SecretStr | str | None = None,
        *,
        protocol: Literal["https", "http"] = "https",
        verify_tls: bool = True,
        timeouts: Timeouts | None = None,
        aws_region: str = "us-east-1",
        aws_endpoint_url: str | None = None,
        aws_verify_tls: bool = True,
        settle_seconds: float | None = None,
    ) -> None:
        secret = find_token(token)
        self._remake: dict[str, Any] = {
            "host": host,
            "protocol": protocol,
            "verify_tls": verify_tls,
            "aws_region": aws_region,
            "aws_endpoint_url": aws_endpoint_url,
            "aws_verify_tls": aws_verify_tls,
            "settle_seconds": settle_seconds,
        }
        self._secret = secret
        self._timeouts = timeouts or Timeouts()
        self.host = host
        self.aws_region = aws_region
        self.aws_endpoint_url = aws_endpoint_url
        self.aws_verify_tls = aws_verify_tls
        self.settle_seconds = self._timeouts.read_seconds + _HELD_SECONDS if settle_seconds is None else settle_seconds
        super().__init__(
            HttpSession(
                f"{protocol}://{host}/latest",
                auth_headers=lambda: {
                    "Authorization": f"Token {secret.get_secret_value()}",
                    "Accept": "application/json",
                },
                timeouts=self._timeouts,
                verify_tls=verify_tls,
            )
        )

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def arguments(self) -> dict[str, Any]:
        """What another process needs to make the same client; holds the token in clear, so hand it over a pipe."""
        seconds = {
            "connect_seconds": self._timeouts.connect_seconds,
            "read_seconds": self._timeouts.read_seconds,
            "total_seconds": self._timeouts.total_seconds,
        }
        return self._remake | {"token": self._secret.get_secret_value(), "timeouts": seconds}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """Make a client of what `arguments` returned."""
        return cls(**{**arguments, "timeouts": Timeouts(**arguments["timeouts"])})

    # -- jobs ----------------------------------------------------------------------------------------------------

    def create(self, config: IngestConfig) -> IngestJob:
        """Make an ingest job. Never repeated here: see `create_once` for a reply that was lost.

        Endpoint: `POST /ingest/`.

        Args:
            config: The configuration; it is sent, and kept by the server, whole.

        Returns:
            The job, PREPARING.

        Raises:
            NotFoundError: There is no such channel; `preflight` names the nearest ones.
            PlatformError: The server refused the configuration, or failed. After a failure of its own it may keep a
                half-made job: the message says so.
            NetworkError: No answer; the job may have been made.
        """
        try:
            answer = self.ask(JobAnswer, "POST", "/ingest/", json_body=config.body(), about=config.channel_path)
        except NotFoundError as error:
            # The server says "Channel None not found" whatever the name was.
            said = f"There is no channel {config.channel_path}. create_resources makes it; preflight names the nearest."
            raise _said_anew(error, said) from None
        except PlatformError as error:
            if error.code != _SYSTEM_ERROR:
                raise
            said = f"{error} The server may keep a half-made job: look with list_jobs and cancel it."
            raise _said_anew(error, said) from None
        return answer.job(self.host)

    def list_jobs(self) -> list[IngestJob]:
        """List the user's jobs that were not deleted. Endpoint: `GET /ingest/`."""
        answer = self.ask(JobListAnswer, "GET", "/ingest/", about="ingest jobs")
        return [job.job(self.host) for job in answer.ingest_jobs]

    def counts(self, job_id: int) -> JobCounts:
        """Ask how far a job is. Endpoint: `GET /ingest/{id}/status`.

        Raises:
            NotFoundError: There is no such job, or it was cancelled.
            PermissionDeniedError: It belongs to somebody else.
        """
        answer = self.ask(StatusAnswer, "GET", f"/ingest/{job_id}/status", about=f"ingest job {job_id}")
        return JobCounts(
            id=job_id,
            status=answer.status,
            tile_count=answer.total_message_count,
            visible=answer.current_message_count,
        )

    def join(self, job_id: int) -> JoinedJob | None:
        """Ask for the queues and a new pair of keys of a job. Endpoint: `GET /ingest/{id}`.

        This is the only request that lets a prepared job become UPLOADING. Each call makes new keys, which takes the
        server up to ten seconds to make known everywhere: join once per process and share them.

        Args:
            job_id: Number of the job.

        Returns:
            The answer; None while the job is being prepared, or when the server had no keys at hand.

        Raises:
            JobFailed: The job is over, or can never be prepared.
            NotFoundError: There is no such job, or it was cancelled.
            PermissionDeniedError: It belongs to somebody else.
            ServerUnavailable: The server cannot say now.
        """
        try:
            answer = self.ask(JoinAnswer, "GET", f"/ingest/{job_id}", about=f"ingest job {job_id}")
        except PlatformError as error:
            if error.code != _SYSTEM_ERROR:
                raise
            # A job that is over answers so, and so does a busy server: the status tells which.
            if "generating ingest job messages" in str(error):
                raise JobFailed(
                    f"Ingest job {job_id}: the server could not fill its queue and never will. Cancel it and create "
                    "another."
                ) from error
            refuse_over(job_id, self.counts(job_id).status)
            said = f"Ingest job {job_id} cannot be joined now: {error}"
            raise _said_anew(error, said, ServerUnavailable) from error
        job = answer.ingest_job.job(self.host)
        refuse_over(job_id, job.status)
        return None if job.status == JobStatus.PREPARING else _joined(job, answer)

    def has_queue(self, job_id: int) -> bool:
        """Tell whether a job has an upload queue. Endpoint: `GET /ingest/{id}`, which is a join.

        A job has none at the very moment when it is made, when making it failed half-way, and when it is over.

        Args:
            job_id: Number of the job.
        """
        answer = self.ask(JoinAnswer, "GET", f"/ingest/{job_id}", about=f"ingest job {job_id}")
        return answer.ingest_job.upload_queue is not None

    def request_completion(self, job_id: int) -> float | None:
        """Tell the server that all of a job is uploaded. Endpoint: `POST /ingest/{id}/complete`.

        Safe to repeat. See `complete` of this package for the whole of it.

        Args:
            job_id: Number of the job.

        Returns:
            Seconds after which the server wants to be asked again; None when the job is complete.

        Raises:
            PlatformError: The server refuses; with code 1006 because messages wait in the upload queue, or because the
                job was never begun or is over.
        """
        about = f"completion of ingest job {job_id}"
        try:
            with self.opened("POST", f"/ingest/{job_id}/complete", about=about) as response:
                if response.status_code == _NO_CONTENT:
                    return None
                answer = read_body(CompletionAnswer, self._http.read_text(response), response, about=about)
        except NotYetComplete as error:
            logger.info("Ingest job %d: %s", job_id, error)
            return error.wait_seconds
        return answer.wait_secs or 0.0

    def cancel(self, job_id: int) -> str:
        """Cancel a job: its queues and keys go away, what was ingested stays. Endpoint: `DELETE /ingest/{id}`.

        Safe to repeat: a job that is over already is left alone.

        Args:
            job_id: Number of the job.

        Returns:
            What happened, in words.

        Raises:
            NotFoundError: There never was such a job.
            PermissionDeniedError: It belongs to somebody else.
        """
        try:
            status = self.counts(job_id).status
        except NotFoundError as error:
            if error.code == _CANCELLED:
                return f"Ingest job {job_id} was cancelled before."
            raise
        if status == JobStatus.COMPLETE:
            return f"Ingest job {job_id} is complete; there is nothing to cancel."
        try:
            with self.opened("DELETE", f"/ingest/{job_id}", about=f"ingest job {job_id}") as response:
                if response.status_code != _NO_CONTENT:
                    raise UnexpectedResponse(
                        f"Ingest job {job_id}: the answer to its cancellation is not of the Boss "
                        f"(HTTP {response.status_code}). Ask for its state, then cancel it again.",
                        status=response.status_code,
                    )
        except PlatformError as error:
            if error.code != _SYSTEM_ERROR:
                raise
            try:
                now = self.counts(job_id).status
            except NotFoundError:
                now = JobStatus.DELETED
            if not now.is_terminal:
                raise
            return f"Ingest job {job_id} ended as {now.name} before it could be cancelled."
        return f"Ingest job {job_id} was cancelled; what had been ingested stays."

    # -- resources -----------------------------------------------------------------------------------------------

    def channel(self, collection: str, experiment: str, channel: str) -> Channel:
        """Look up a channel, its experiment and its coordinate frame.

        Endpoints: `GET /collection/{c}/experiment/{e}/channel/{ch}/`, its parents, `GET /coord/{frame}/`.

        Raises:
            NotFoundError: One of them does not exist; the message names it.
        """
        about = self.ask(ExperimentAnswer, "GET", _resource(collection, experiment), about=f"experiment {experiment}")
        leaf = self.ask(ChannelAnswer, "GET", _resource(collection, experiment, channel), about=f"channel {channel}")
        frame = self.frame(about.coord_frame)
        return Channel(
            path=f"{collection}/{experiment}/{channel}",
            datatype=leaf.datatype,
            type=leaf.type,
            base_resolution=leaf.base_resolution,
            bounds={
                "x": (frame.x_start, frame.x_stop),
                "y": (frame.y_start, frame.y_stop),
                "z": (frame.z_start, frame.z_stop),
            },
            time_samples=about.num_time_samples,
        )

    def frame(self, name: str) -> FrameAnswer:
        """Look up a coordinate frame. Endpoint: `GET /coord/{frame}/`.

        Raises:
            NotFoundError: There is none.
        """
        return self.ask(FrameAnswer, "GET", _frame(name), about=f"coordinate frame {name}")

    def exists(self, *names: str) -> bool:
        """Tell whether there is a collection, an experiment in it, or a channel in that, by their names.

        Endpoint: `GET /collection/{c}/experiment/{e}/channel/{ch}/`, or its parents.
        """
        return self._is_there(_resource(*names))

    def children(self, *names: str) -> list[str]:
        """List the collections, the experiments of a collection, or the channels of an experiment.

        Endpoint: `GET /collection/`, `GET /collection/{c}/`, `GET /collection/{c}/experiment/{e}/`.
        """
        path = _resource(*names) if names else "/collection/"
        return self.ask(NamesAnswer, "GET", path, about=" ".join(names) or "collections").names

    def make(self, *names: str, about: Mapping[str, Any]) -> bool:
        """Make a collection, an experiment or a channel unless it is there.

        Endpoint: `POST` to its address. Safe to repeat: what exists is left as it is.

        Args:
            *names: Names of the collection, and of the experiment and the channel in it.
            about: The fields that describe it.

        Returns:
            Whether it was made.

        Raises:
            PermissionDeniedError: The role `resource-manager` is missing.
        """
        return self._make(_resource(*names), f"{_KINDS[len(names) - 1]} {names[-1]}", about)

    def make_frame(self, name: str, about: Mapping[str, Any]) -> bool:
        """Make a coordinate frame unless it is there; as `make`."""
        return self._make(_frame(name), f"coordinate frame {name}", about)

    def cutout(
        self, channel_path: str, resolution: int, x: Range, y: Range, z: Range, t: int = 0, *, fresh: bool = False
    ) -> Cutout:
        """Read pixels back. Endpoint: `GET /cutout/…` as `application/npygz`.

        Args:
            channel_path: `collection/experiment/channel`.
            resolution: Level to read.
            x: Half-open range in voxels; `y` and `z` likewise.
            y: See `x`.
            z: See `x`.
            t: Sample.
            fresh: Whether to read what is stored, past the cache of the service.

        Returns:
            The block; zero where nothing was ingested.

        Raises:
            UnexpectedResponse: The answer is no such block.
            BiomedError: As for `counts`.
        """
        path = _cutout(channel_path, resolution, x, y, z, (t, t + 1))
        headers, params = {"Accept": "application/npygz"}, {"no-cache": "true"} if fresh else None
        with self.opened("GET", path, headers=headers, params=params, about=channel_path) as response:
            packed = b"".join(self._http.chunks(response))
        shape = (z[1] - z[0], y[1] - y[0], x[1] - x[0])
        return unpack(packed, shape)

    def write_cutout(
        self, channel_path: str, resolution: int, x: Range, y: Range, z: Range, frame: bytes, t: int = 0
    ) -> None:
        """Write a block of pixels. Never repeated here, though the same values in the same place do no harm.

        The Boss writes what is not zero and leaves the rest as it is. Endpoint: `POST /cutout/…` as
        `application/blosc`, as intern does.

        Args:
            channel_path: `collection/experiment/channel`.
            resolution: Level to write.
            x: Half-open range in voxels; `y` and `z` likewise.
            y: See `x`.
            z: See `x`.
            frame: A blosc frame of the values in the order z, y, x, of the dtype of the channel.
            t: Sample.

        Raises:
            PlatformError: The server refused the block, or failed.
            NetworkError: No answer; the block may have been written.
        """
        path = _cutout(channel_path, resolution, x, y, z, *([(t, t + 1)] if t else []))
        self.tell("POST", path, body=frame, headers={"Content-Type": "application/blosc"}, about=channel_path)

    def downsampling(self, channel_path: str) -> tuple[str, int]:
        """Ask whether the lower resolutions of a channel are made. Endpoint: `GET /downsample/…`.

        Args:
            channel_path: `collection/experiment/channel`.

        Returns:
            State (`NOT_DOWNSAMPLED`, `IN_PROGRESS`, `DOWNSAMPLED`, `FAILED`, or another), and how many resolutions
            there are to be.
        """
        answer = self.ask(DownsampleAnswer, "GET", _downsample(channel_path), about=channel_path)
        return answer.status.upper(), answer.num_hierarchy_levels

    def start_downsampling(self, channel_path: str) -> None:
        """Ask for the lower resolutions of a channel. Never repeated here. Endpoint: `POST /downsample/…`.

        Args:
            channel_path: `collection/experiment/channel`.

        Raises:
            PlatformError: The server refused: they are made, or being made; or it failed.
            NetworkError: No answer; it may have begun.
        """
        self.tell("POST", _downsample(channel_path), about=channel_path)

    # -- inside --------------------------------------------------------------------------------------------------

    def _refusal(self, status: int, body: Any) -> Refusal | None:
        """Read an error of the Boss, of the framework under it, or a completion that goes on."""
        try:
            said = _SPOKEN.validate_python(body)
        except ValidationError:
            return None
        if isinstance(said, ErrorAnswer):
            # Of AWS, whose limits the Boss has reached.
            kind = ServerUnavailable if "Rate exceeded" in said.message else None
            return Refusal(said.message, said.code, kind)
        if isinstance(said, FrameworkErrorAnswer):
            return Refusal(said.detail)
        # No error at all, so that it is not one in the Boss's words either.
        waits = {"wait_seconds": said.wait_secs or 0.0, "spoken": False}
        return Refusal(str(said.info or "completion goes on"), kind=NotYetComplete, details=waits)

    def _is_there(self, path: str) -> bool:
        try:
            self.ask(NameAnswer, "GET", path)
        except NotFoundError:
            return False
        return True

    def _make(self, path: str, what: str, about: Mapping[str, Any]) -> bool:
        if self._is_there(path):
            return False
        try:
            self.ask(NameAnswer, "POST", path, json_body=dict(about), about=what)
        except PlatformError as error:
            if error.code == _EXISTS and self._is_there(path):
                return False  # made by somebody else meanwhile
            raise
        return True


def _resource(*names: str) -> str:
    """Address of a collection, of an experiment in it, or of a channel in that."""
    return "".join(f"/{kind}/{quote(name, safe='')}" for kind, name in zip(_KINDS, names, strict=False)) + "/"


def _channel(service: str, channel_path: str) -> str:
    """Where a service is asked about a channel."""
    return f"/{service}/{'/'.join(quote(name, safe='') for name in channel_path.split('/'))}/"


def _downsample(channel_path: str) -> str:
    return _channel("downsample", channel_path)


def _cutout(channel_path: str, resolution: int, *ranges: Range) -> str:
    spans = "/".join(f"{low}:{high}" for low, high in ranges)
    return f"{_channel('cutout', channel_path)}{resolution}/{spans}/"


def _frame(name: str) -> str:
    return f"/coord/{quote(name, safe='')}/"


def _said_anew(error: PlatformError, said: str, kind: type[PlatformError] | None = None) -> PlatformError:
    """Make the same error in other words."""
    about: dict[str, Any] = {"status": error.status, "code": error.code, "url": error.url, "spoken": error.spoken}
    return (kind or type(error))(said, **about)


def _joined(job: IngestJob, answer: JoinAnswer) -> JoinedJob | None:
    """Read what an upload needs; None when the server had no keys at hand."""
    keys, queues, resource = answer.credentials, answer.ingest_job, answer.resource
    if keys is None:
        return None
    is_tiled = job.ingest_type != IngestType.VOLUMETRIC
    bucket = answer.tile_bucket_name if is_tiled else answer.ingest_bucket_name
    incomplete = is_tiled and queues.tile_index_queue is None
    if resource is None or bucket is None or queues.upload_queue is None or incomplete:
        raise UnexpectedResponse(f"Ingest job {job.id}: the answer to the join lacks what an upload needs.")
    return JoinedJob(
        job=job,
        access_key=keys.access_key,
        secret_key=keys.secret_key,
        session_token=keys.security_token,
        upload_queue=queues.upload_queue,
        tile_index_queue=queues.tile_index_queue,
        bucket=bucket,
        parameters=answer.parameters,
        lookup_key=resource.lookup_key,
        datatype=resource.channel.datatype,
        base_resolution=resource.channel.base_resolution,
    )
