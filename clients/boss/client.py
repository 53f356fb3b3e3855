"""The REST interface of the Boss: ingest jobs, the resources they write to, cutouts."""

from __future__ import annotations

import ast
import configparser
import difflib
import json
import logging
import math
import os
import zlib
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import quote

import requests
from pydantic import SecretStr, ValidationError

from prefect_biomed.clients.boss import images
from prefect_biomed.clients.boss.config import IngestConfig
from prefect_biomed.clients.boss.models import Channel, Completion, IngestJob, JobCounts, JobStatus, JoinedJob
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    JobFailed,
    LaunchInDoubt,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    PreflightFailed,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import HttpSession, Timeouts
from prefect_biomed.clients.polling import PollSettings, poll, sleep

__all__ = ["BossClient", "Cutout", "find_token"]

logger = logging.getLogger(__name__)

Range = tuple[int, int]

_TRANSIENT_STATUS = frozenset({429, 502, 503, 504})
_MAX_CUTOUT_BYTES = 512 * 1024 * 1024


def find_token(explicit: SecretStr | str | None = None) -> SecretStr:
    """Find the API token where Boss users keep it.

    Args:
        explicit: Used when given. Otherwise: the environment variable `INTERN_TOKEN`, then `token.json` in the
            working directory (`{"token": …}`), then `~/.intern/intern.cfg` (section `Default` or `Project Service`).

    Returns:
        The token.

    Raises:
        ConfigurationError: There is none, or a file cannot be read.
    """
    if explicit:
        return explicit if isinstance(explicit, SecretStr) else SecretStr(explicit)
    if token := os.environ.get("INTERN_TOKEN"):
        return SecretStr(token)
    file = Path("token.json")
    if file.exists():
        try:
            return SecretStr(str(json.loads(file.read_text(encoding="utf-8"))["token"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{file.resolve()} is not a file with a Boss token.") from None
    settings = configparser.ConfigParser(interpolation=None)
    path = Path("~/.intern/intern.cfg").expanduser()
    try:
        settings.read(path)
    except configparser.Error:
        raise ConfigurationError(f"{path} is not a configuration file of intern.") from None
    for section in ("Default", "Project Service"):
        if token := settings.get(section, "token", fallback=""):
            return SecretStr(token)
    raise ConfigurationError(
        "No Boss token was found. Give it to the block, or set INTERN_TOKEN, or write token.json or "
        "~/.intern/intern.cfg. The management console of the Boss shows it under your name."
    )


class Cutout(NamedTuple):
    """A block of pixels read back.

    Attributes:
        shape: (z, y, x).
        datatype: dtype of the values, little endian.
        content: The values in C order.
    """

    shape: tuple[int, int, int]
    datatype: str
    content: bytes


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
        """Make an ingest job. Never repeated here: see `find_created` for a reply that was lost.

        Endpoint: `POST /ingest/`.

        Args:
            config: The configuration; it is sent, and kept by the server, whole.

        Returns:
            The job, PREPARING.

        Raises:
            NotFoundError: There is no such channel; the message names it and the nearest ones.
            PlatformError: The server refused the configuration, or failed. After a failure of its own it may keep a
                half-made job: the message says so.
            NetworkError: No answer; the job may have been made.
        """
        try:
            body = self._ask("POST", "/ingest/", json_body=config.body())
        except NotFoundError as error:
            # The server says "Channel None not found" whatever the name was.
            reason = self._missing_resource(config)
            raise NotFoundError(reason or str(error), status=error.status, code=error.code, url=error.url) from None
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

    def find_created(
        self,
        config: IngestConfig,
        *,
        known: Collection[int] = (),
        claimed: Collection[int] = (),
        not_before: datetime | None = None,
    ) -> IngestJob | None:
        """Look for a job that an earlier, unanswered `create` has made.

        The Boss has no names for jobs, so the job is known by its channel, type and number of tiles, and by not
        having been there before.

        Args:
            config: What was posted.
            known: Jobs that were there before the post.
            claimed: Jobs that are known to belong to others of our intents.
            not_before: Jobs made before this moment are not meant, by the server's clock.

        Returns:
            The job; None when there is none.

        Raises:
            LaunchInDoubt: Several could be meant.
        """
        kind = config.ingest_job.ingest_type
        names = (config.database.collection, config.database.experiment, config.database.channel)
        found = []
        for job in self.list_jobs():
            if job.id in known or job.id in claimed or job.status.is_terminal:
                continue
            if (job.collection, job.experiment, job.channel) != names or job.ingest_type != kind:
                continue
            if not_before and job.created_on and job.created_on < not_before:
                continue
            counts = self.counts(job.id)
            if counts.tile_count == config.tile_count:
                found.append(job.model_copy(update={"tile_count": counts.tile_count, "status": counts.status}))
        if len(found) > 1:
            numbers = ", ".join(str(job.id) for job in found)
            raise LaunchInDoubt(
                f"Jobs {numbers} on {config.channel_path} could each be the one that was just made. Cancel those that "
                "are not wanted, or give job_id."
            )
        return found[0] if found else None

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
            self._refuse_over(job_id, self.counts(job_id).status)
            raise ServerUnavailable(
                f"Ingest job {job_id} cannot be joined now: {error}", status=error.status, code=9001, url=error.url
            ) from error
        about = _field(body, "ingest_job", dict, "/ingest/{id}")
        job = self._job(about)
        self._refuse_over(job_id, job.status)
        keys = body.get("credentials")
        if job.status == JobStatus.PREPARING or not keys:
            return None
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
            raise UnexpectedResponse(
                f"Ingest job {job_id}: the answer to the join lacks what an upload needs."
            ) from None

    def wait_until_ready(self, job_id: int, settings: PollSettings | None = None) -> JoinedJob:
        """Wait until a job can be worked on.

        Args:
            job_id: Number of the job.
            settings: Interval and deadline; every 1 to 15 s for up to an hour by default.

        Returns:
            Queues and keys.

        Raises:
            JobFailed: The job is over.
            DeadlineExceeded: Still not ready.
            BiomedError: As for `join`.
        """
        self._refuse_over(job_id, self.counts(job_id).status)
        looks = poll(
            lambda: self.join(job_id),
            settings or PollSettings(1, 1.5, 15, deadline_seconds=3600),
            what=f"Ingest job {job_id}",
            take_up_again=f"Join job {job_id} later.",
        )
        for joined in looks:
            if joined is not None:
                return joined
        raise AssertionError("a poll ends only by an error")

    def complete(self, job_id: int, settings: PollSettings | None = None) -> Completion:
        """Complete a job: tell the server that all is uploaded, wait for its queues and for its verification.

        Endpoints: `POST /ingest/{id}/complete` until the server verifies, then `GET /ingest/{id}/status`. Safe to
        repeat at any time. Make sure first that nothing is in flight.

        Args:
            job_id: Number of the job.
            settings: Interval of the looks, beside what the server asks for, and deadline for all; 1 to 15 s and six
                hours by default.

        Returns:
            `COMPLETE`, or `RESUME` when tiles are missing and wait in the upload queue.

        Raises:
            JobFailed: The job was cancelled, failed, or was never begun.
            DeadlineExceeded: Not finished in time; the server goes on.
            BiomedError: As for `counts`.
        """
        settings = settings or PollSettings(1, 1.2, 15, deadline_seconds=6 * 3600, error_budget=20)
        looks = poll(
            lambda: self._complete_once(job_id),
            settings,
            what=f"Completion of ingest job {job_id}",
            take_up_again=f"Complete job {job_id} again later.",
        )
        for outcome in looks:
            if isinstance(outcome, Completion):
                return outcome
            sleep(outcome)  # the server says how long
        raise AssertionError("a poll ends only by an error")

    def _complete_once(self, job_id: int) -> Completion | float:
        """One step: how it ended, or how many seconds the server wants us to wait."""
        counts = self.counts(job_id)
        if counts.status == JobStatus.COMPLETE:
            return Completion(job_id=job_id, outcome="COMPLETE", status=counts.status)
        if counts.status == JobStatus.COMPLETING:
            return 0.0
        if counts.status in (JobStatus.DELETED, JobStatus.FAILED, JobStatus.PREPARING):
            raise JobFailed(f"Ingest job {job_id} is {counts.status.name} and cannot be completed.")
        response, body = self._http.json("POST", f"/ingest/{job_id}/complete")
        body = body if isinstance(body, dict) else {}
        if response.status_code == 204:
            return Completion(job_id=job_id, outcome="COMPLETE", status=JobStatus.COMPLETE)
        if response.status_code in (200, 202, 400) and ("wait_secs" in body or "job_status" in body):
            logger.info("Ingest job %d: completion goes on (%s)", job_id, body.get("info") or body.get("job_status"))
            return max(0.0, min(float(body.get("wait_secs") or 0.0), 900.0))
        if response.status_code == 400 and body.get("code") == 1006:
            after = self.counts(job_id)
            if after.status in (JobStatus.UPLOADING, JobStatus.WAIT_ON_QUEUES):
                missing = max(after.visible, 1)
                return Completion(job_id=job_id, outcome="RESUME", status=after.status, missing=missing)
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
        parent = f"/collection/{quote(collection, safe='')}/experiment/{quote(experiment, safe='')}"
        about = self._ask("GET", parent + "/", what=f"experiment {experiment}")
        leaf = self._ask("GET", f"{parent}/channel/{quote(channel, safe='')}/", what=f"channel {channel}")
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

    def create_resources(
        self,
        config: IngestConfig,
        *,
        datatype: str,
        kind: Literal["image", "annotation"] = "image",
        voxel_size: tuple[float, float, float] = (1.0, 1.0, 1.0),
        voxel_unit: str = "nanometers",
        bounds: Mapping[Literal["x", "y", "z"], Range] | None = None,
        time_samples: int | None = None,
    ) -> list[str]:
        """Make collection, coordinate frame, experiment and channel of a configuration where they are missing.

        Endpoints: `POST` to the address of each. Safe to repeat: what exists is left as it is.

        Args:
            config: Names them, and gives the default bounds.
            datatype: dtype of the channel.
            kind: Type of the channel.
            voxel_size: Size of a voxel in x, y, z.
            voxel_unit: Unit of these.
            bounds: Half-open ranges of the coordinate frame; the extent of the job, from 0, by default.
            time_samples: Samples of the experiment; those of the extent by default.

        Returns:
            What was made, as `kind name`.

        Raises:
            PermissionDeniedError: The role `resource-manager` is missing.
            PlatformError: The server refused one.
        """
        names, extent = config.database, config.ingest_job.extent
        ranges: Mapping[Literal["x", "y", "z"], Range] = bounds or {
            "x": (0, extent.x[1]),
            "y": (0, extent.y[1]),
            "z": (0, extent.z[1]),
        }
        frame_name = f"{names.experiment}-frame"
        frame: dict[str, Any] = {"voxel_unit": voxel_unit, "description": ""}
        axes: tuple[Literal["x", "y", "z"], ...] = ("x", "y", "z")
        for axis, size in zip(axes, voxel_size, strict=True):
            low, high = ranges[axis]
            frame |= {f"{axis}_start": low, f"{axis}_stop": high, f"{axis}_voxel_size": size}
        experiment = {
            "coord_frame": frame_name,
            "num_hierarchy_levels": 1,
            "hierarchy_method": "anisotropic",
            "num_time_samples": time_samples or extent.t[1],
            "description": "",
        }
        collection_url = f"/collection/{quote(names.collection, safe='')}"
        experiment_url = f"{collection_url}/experiment/{quote(names.experiment, safe='')}"
        channel_url = f"{experiment_url}/channel/{quote(names.channel, safe='')}"
        channel = {"type": kind, "datatype": datatype, "description": ""}
        steps: list[tuple[str, str, dict[str, Any]]] = [
            (f"collection {names.collection}", collection_url, {"description": ""}),
            (f"coordinate frame {frame_name}", f"/coord/{quote(frame_name, safe='')}", frame),
            (f"experiment {names.experiment}", experiment_url, experiment),
            (f"channel {names.channel}", channel_url, channel),
        ]
        made = []
        for what, path, body in steps:
            if what.startswith("coordinate frame") and self._exists(experiment_url + "/"):
                continue  # an experiment that exists has its own frame
            if not self._exists(path + "/"):
                self._ask("POST", path + "/", json_body=body, what=what)
                made.append(what)
        return made

    def preflight(self, config: IngestConfig) -> Channel:
        """Compare a configuration with what the server has.

        Args:
            config: To be posted.

        Returns:
            The channel that it writes to.

        Raises:
            PreflightFailed: With one sentence for each problem.
        """
        names, extent = config.database, config.ingest_job.extent
        missing = self._missing_resource(config)
        if missing:
            raise PreflightFailed(f"Ingest into {config.channel_path}", [missing])
        channel = self.channel(names.collection, names.experiment, names.channel)
        found = []
        for axis, (low, high) in (("x", extent.x), ("y", extent.y), ("z", extent.z)):
            start, stop = channel.bounds[axis]
            if low < start or high > stop:
                found.append(
                    f"extent.{axis} [{low}, {high}) leaves the coordinate frame [{start}, {stop}); what lies outside "
                    "could never be read."
                )
        if extent.t[1] > channel.time_samples:
            found.append(
                f"extent.t ends at {extent.t[1]}, but the experiment has {channel.time_samples} time samples; the "
                "others could never be read."
            )
        reason = None if config.volumetric else images.check_datatype(channel.datatype)
        if reason:
            found.append(reason[0].upper() + reason[1:] + ".")
        if found:
            raise PreflightFailed(f"Ingest into {config.channel_path}", found)
        if config.client.backend.host != self.host:
            logger.warning(
                "The configuration was written for %s; requests go to %s, the host of the credentials",
                config.client.backend.host,
                self.host,
            )
        if channel.base_resolution != config.ingest_job.resolution:
            logger.warning(
                "The configuration says resolution %d; the Boss writes to the channel's base resolution %d",
                config.ingest_job.resolution,
                channel.base_resolution,
            )
        for note in config.warnings:
            logger.warning("%s", note)
        return channel

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
        return _unpack(packed, shape)

    # -- inside --------------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, *, what: str = "the request", **request: Any) -> Any:
        response, body = self._http.json(method, path, **request)
        if not 200 <= response.status_code < 300:
            _raise_for_error(response, body, what)
        return body

    def _exists(self, path: str) -> bool:
        try:
            self._ask("GET", path)
        except NotFoundError:
            return False
        return True

    def _missing_resource(self, config: IngestConfig) -> str | None:
        names = config.database
        collection = f"/collection/{quote(names.collection, safe='')}"
        experiment = f"{collection}/experiment/{quote(names.experiment, safe='')}"
        steps = (
            ("collection", names.collection, "/collection/", "collections", collection + "/"),
            ("experiment", names.experiment, collection + "/", "experiments", experiment + "/"),
            (
                "channel",
                names.channel,
                experiment + "/",
                "channels",
                f"{experiment}/channel/{quote(names.channel, safe='')}/",
            ),
        )
        for kind, name, parent, field, path in steps:
            if not self._exists(path):
                return f"There is no {kind} {name!r}{self._nearest(parent, field, name)}"
        return None

    def _nearest(self, parent: str, field: str, name: str) -> str:
        try:
            there = [str(item) for item in self._ask("GET", parent).get(field, [])]
        except BiomedError:
            return "."
        near = difflib.get_close_matches(name, there, n=3, cutoff=0.4) or sorted(there)[:5]
        return f". The nearest are: {', '.join(near)}." if near else " and no other either. create_resources makes it."

    def _refuse_over(self, job_id: int, status: JobStatus) -> None:
        if status == JobStatus.COMPLETE:
            raise JobFailed(f"Ingest job {job_id} is complete: there is nothing left to upload.")
        if status.is_terminal:
            raise JobFailed(f"Ingest job {job_id} is {status.name}. Create another one.")

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


def _unpack(packed: bytes, shape: tuple[int, int, int]) -> Cutout:
    """Read a gzipped NumPy file without NumPy. The format is that of `numpy.lib.format`, version 1."""
    try:
        content = zlib.decompressobj(wbits=31).decompress(packed, _MAX_CUTOUT_BYTES)
        if content[:6] != b"\x93NUMPY":
            raise ValueError("no NumPy file")
        length, start = (int.from_bytes(content[8:10], "little"), 10)
        if content[6] > 1:
            length, start = (int.from_bytes(content[8:12], "little"), 12)
        header = ast.literal_eval(content[start : start + length].decode("latin-1"))
        descr, values = str(header["descr"]), content[start + length :]
        size = int(descr[2:])
        fits = math.prod(header["shape"]) == math.prod(shape) and math.prod(shape) * size == len(values)
        if descr[0] not in "<|" or descr[1] != "u" or header["fortran_order"] or not fits:
            raise ValueError(f"{descr} of shape {header['shape']}")
    except (ValueError, KeyError, TypeError, IndexError, SyntaxError, zlib.error) as error:
        raise UnexpectedResponse(f"The Boss's cutout cannot be read ({error}).") from None
    return Cutout(shape, f"uint{8 * size}", values)
