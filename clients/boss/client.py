"""The REST interface of the Boss: ingest jobs, the resources they write to, cutouts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote

import requests
from pydantic import SecretStr, ValidationError

from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.cutouts import Cutout, unpack
from prefect_biomed.clients.boss.errors import refuse_over
from prefect_biomed.clients.boss.models import Channel, IngestJob, JobCounts, JobStatus, JoinedJob
from prefect_biomed.clients.boss.tokens import find_token
from prefect_biomed.clients.errors import (
    AuthenticationError,
    JobFailed,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import HttpSession, Timeouts

__all__ = ["BossClient"]

logger = logging.getLogger(__name__)

Range = tuple[int, int]

_KINDS = ("collection", "experiment", "channel")
_TRANSIENT_STATUS = frozenset({429, 502, 503, 504})


class BossClient:
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
    """

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
    ) -> None:
        secret = find_token(token)
        self._remake: dict[str, Any] = {
            "host": host,
            "protocol": protocol,
            "verify_tls": verify_tls,
            "aws_region": aws_region,
            "aws_endpoint_url": aws_endpoint_url,
            "aws_verify_tls": aws_verify_tls,
        }
        self._secret = secret
        self._timeouts = timeouts or Timeouts()
        self.host = host
        self.aws_region = aws_region
        self.aws_endpoint_url = aws_endpoint_url
        self.aws_verify_tls = aws_verify_tls
        self._http = HttpSession(
            f"{protocol}://{host}/latest",
            auth_headers=lambda: {
                "Authorization": f"Token {secret.get_secret_value()}",
                "Accept": "application/json",
            },
            timeouts=self._timeouts,
            verify_tls=verify_tls,
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
            body = self._ask("POST", "/ingest/", json_body=config.body())
        except NotFoundError as error:
            # The server says "Channel None not found" whatever the name was.
            raise NotFoundError(
                f"There is no channel {config.channel_path}. create_resources makes it; preflight names the nearest.",
                status=error.status,
                code=error.code,
                url=error.url,
            ) from None
        except PlatformError as error:
            if error.code == 9001:
                raise PlatformError(
                    f"{error} The server may keep a half-made job: look with list_jobs and cancel it.",
                    status=error.status,
                    code=error.code,
                    url=error.url,
                ) from None
            raise
        return self._job(body)

    def list_jobs(self) -> list[IngestJob]:
        """List the user's jobs that were not deleted. Endpoint: `GET /ingest/`."""
        body = self._ask("GET", "/ingest/")
        return [self._job(item) for item in _field(body, "ingest_jobs", list, "/ingest/")]

    def counts(self, job_id: int) -> JobCounts:
        """Ask how far a job is. Endpoint: `GET /ingest/{id}/status`.

        Raises:
            NotFoundError: There is no such job, or it was cancelled.
            PermissionDeniedError: It belongs to somebody else.
        """
        body = self._ask("GET", f"/ingest/{job_id}/status", what=f"ingest job {job_id}")
        return JobCounts(
            id=job_id,
            status=JobStatus(_field(body, "status", int, "/status")),
            tile_count=_field(body, "total_message_count", int, "/status"),
            visible=_field(body, "current_message_count", int, "/status"),
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
            body = self._ask("GET", f"/ingest/{job_id}", what=f"ingest job {job_id}")
        except PlatformError as error:
            if error.code != 9001:
                raise
            # A job that is over answers so, and so does a busy server: the status tells which.
            if "generating ingest job messages" in str(error):
                raise JobFailed(
                    f"Ingest job {job_id}: the server could not fill its queue and never will. Cancel it and create "
                    "another."
                ) from error
            refuse_over(job_id, self.counts(job_id).status)
            raise ServerUnavailable(
                f"Ingest job {job_id} cannot be joined now: {error}", status=error.status, code=9001, url=error.url
            ) from error
        about = _field(body, "ingest_job", dict, "/ingest/{id}")
        job = self._job(about)
        refuse_over(job_id, job.status)
        if job.status == JobStatus.PREPARING or not body.get("credentials"):
            return None
        return _joined(job, body)

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
        response, body = self._http.json("POST", f"/ingest/{job_id}/complete")
        body = body if isinstance(body, dict) else {}
        if response.status_code == 204:
            return None
        if response.status_code in (200, 202, 400) and ("wait_secs" in body or "job_status" in body):
            logger.info("Ingest job %d: completion goes on (%s)", job_id, body.get("info") or body.get("job_status"))
            return float(body.get("wait_secs") or 0.0)
        _raise_for_error(response, body, f"ingest job {job_id}")
        raise UnexpectedResponse(f"Completion of ingest job {job_id}: HTTP {response.status_code}.")

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
            if error.code == 2004:
                return f"Ingest job {job_id} was cancelled before."
            raise
        if status == JobStatus.COMPLETE:
            return f"Ingest job {job_id} is complete; there is nothing to cancel."
        try:
            self._ask("DELETE", f"/ingest/{job_id}", what=f"ingest job {job_id}")
        except PlatformError as error:
            if error.code != 9001:
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
        about = self._ask("GET", _resource(collection, experiment), what=f"experiment {experiment}")
        leaf = self._ask("GET", _resource(collection, experiment, channel), what=f"channel {channel}")
        frame = self._ask("GET", f"/coord/{quote(str(about.get('coord_frame')), safe='')}/", what="coordinate frame")
        try:
            return Channel(
                path=f"{collection}/{experiment}/{channel}",
                datatype=leaf["datatype"],
                type=leaf["type"],
                base_resolution=leaf.get("base_resolution", 0),
                bounds={
                    "x": (frame["x_start"], frame["x_stop"]),
                    "y": (frame["y_start"], frame["y_stop"]),
                    "z": (frame["z_start"], frame["z_stop"]),
                },
                time_samples=about.get("num_time_samples", 1),
            )
        except (KeyError, ValidationError):
            raise UnexpectedResponse(f"The description of channel {channel} lacks what was expected.") from None

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
        return [str(name) for name in _field(self._ask("GET", path), f"{_KINDS[len(names)]}s", list, path)]

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
        return self._make(f"/coord/{quote(name, safe='')}/", f"coordinate frame {name}", about)

    def cutout(self, channel_path: str, resolution: int, x: Range, y: Range, z: Range, t: int = 0) -> Cutout:
        """Read pixels back. Endpoint: `GET /cutout/…` as `application/npygz`.

        Args:
            channel_path: `collection/experiment/channel`.
            resolution: Level to read.
            x: Half-open range in voxels; `y` and `z` likewise.
            y: See `x`.
            z: See `x`.
            t: Sample.

        Returns:
            The block; zero where nothing was ingested.

        Raises:
            UnexpectedResponse: The answer is no such block.
            BiomedError: As for `counts`.
        """
        names = "/".join(quote(name, safe="") for name in channel_path.split("/"))
        spans = "/".join(f"{low}:{high}" for low, high in (x, y, z, (t, t + 1)))
        path = f"/cutout/{names}/{resolution}/{spans}/"
        with self._http.open("GET", path, headers={"Accept": "application/npygz"}) as response:
            if response.status_code != 200:
                _raise_for_error(response, _json_or_none(self._http.read_text(response)), channel_path)
            packed = b"".join(self._http.chunks(response))
        shape = (z[1] - z[0], y[1] - y[0], x[1] - x[0])
        return unpack(packed, shape)

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, *, what: str = "the request", **request: Any) -> Any:
        response, body = self._http.json(method, path, **request)
        if not 200 <= response.status_code < 300:
            _raise_for_error(response, body, what)
        return body

    def _is_there(self, path: str) -> bool:
        try:
            self._ask("GET", path)
        except NotFoundError:
            return False
        return True

    def _make(self, path: str, what: str, about: Mapping[str, Any]) -> bool:
        if self._is_there(path):
            return False
        self._ask("POST", path, json_body=dict(about), what=what)
        return True

    def _job(self, body: Any) -> IngestJob:
        try:
            return IngestJob(
                id=body["id"],
                collection=body["collection"],
                experiment=body["experiment"],
                channel=body["channel"],
                status=JobStatus(int(body["status"])),
                ingest_type="volumetric" if body.get("ingest_type") else "tile",
                tile_count=body.get("tile_count") or 0,
                created_on=body.get("created_on"),
                host=self.host,
            )
        except (KeyError, TypeError, ValueError):
            raise UnexpectedResponse("The server described an ingest job in an unknown way.") from None


def _resource(*names: str) -> str:
    """Address of a collection, of an experiment in it, or of a channel in that."""
    return "".join(f"/{kind}/{quote(name, safe='')}" for kind, name in zip(_KINDS, names, strict=False)) + "/"


def _raise_for_error(response: requests.Response, body: Any, what: str) -> None:
    """Raise the error that the Boss's answer stands for."""
    status, url = response.status_code, response.url.split("?", 1)[0]
    body = body if isinstance(body, dict) else {}
    code = body.get("code") if isinstance(body.get("code"), int) else None
    text = str(body.get("message") or body.get("detail") or f"HTTP {status}")[:500]
    about: dict[str, Any] = {"status": status, "code": code, "url": url}
    if status == 401:
        raise AuthenticationError(f"The Boss refused the token: {text} Check the token of the block.", **about)
    if status == 403:
        raise PermissionDeniedError(f"{what}: {text} (code {code}).", **about)
    if status == 404:
        raise NotFoundError(f"{what}: {text} (code {code}).", **about)
    if status in _TRANSIENT_STATUS or "Rate exceeded" in text:
        raise ServerUnavailable(f"{what}: the server is out of order for the moment: {text}", **about)
    if status >= 400:
        raise PlatformError(f"{what}: the Boss answered: {text} (HTTP {status}, code {code}).", **about)
    raise UnexpectedResponse(f"{what}: HTTP {status} was not expected.", **about)


def _joined(job: IngestJob, body: dict[str, Any]) -> JoinedJob:
    about, keys = body["ingest_job"], body["credentials"]
    resource = _field(body, "resource", dict, "/ingest/{id}")
    settings = {key: body.get(key, {}) for key in ("KVIO_SETTINGS", "STATEIO_CONFIG", "OBJECTIO_CONFIG")}
    queues = {"upload_queue": about.get("upload_queue"), "ingest_queue": about.get("ingest_queue")}
    bucket = "ingest_bucket_name" if job.ingest_type == "volumetric" else "tile_bucket_name"
    try:
        return JoinedJob(
            job=job,
            access_key=keys["access_key"],
            secret_key=keys["secret_key"],
            session_token=keys.get("security_token"),
            upload_queue=about["upload_queue"],
            tile_index_queue=about.get("tile_index_queue"),
            bucket=body[bucket],
            parameters=queues | settings | {"resource": resource},
            lookup_key=resource["lookup_key"],
            datatype=resource["channel"]["datatype"],
            base_resolution=resource["channel"].get("base_resolution", 0),
        )
    except (KeyError, TypeError, ValidationError):
        raise UnexpectedResponse(f"Ingest job {job.id}: the answer to the join lacks what an upload needs.") from None


def _field(body: Any, name: str, kind: type, path: str) -> Any:
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, kind):
        raise UnexpectedResponse(f"The answer of {path} has no {name}.")
    return value


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
