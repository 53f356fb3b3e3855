"""Queues and buckets of one joined job, and the keys for them, shared by all threads of a process."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import boto3
import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from botocore.httpsession import URLLib3Session
from botocore.parsers import ResponseParserError, create_parser
from botocore.utils import get_environ_proxies
from pydantic import ValidationError

from prefect_biomed.clients.boss.answers import BatchAnswer, CountsAnswer, MessagesAnswer
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.errors import QueueGone
from prefect_biomed.clients.boss.models import JoinedJob
from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    ConnectionFailed,
    NetworkError,
    PermissionDeniedError,
    PlatformError,
    RequestTimedOut,
    ServerUnavailable,
    is_transient,
)
from prefect_biomed.clients.http import UNAVAILABLE, USER_AGENT
from prefect_biomed.clients.polling import sleep
from prefect_biomed.clients.rest import Answered

__all__ = ["BATCH", "JobQueues", "Pauses", "UploadMessage", "batches"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A", bound=Answered)

BATCH = 10
_BATCH_BYTES = 240 * 1024
_EXPIRED = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "RequestExpired",
        "UnrecognizedClientException",
    }
)
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "SignatureDoesNotMatch", "InvalidSignatureException"})
_GONE = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"})
_BUSY = frozenset(
    {
        "InternalError",
        "InternalFailure",
        "OverLimit",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottlingException",
        "Throttling",
    }
)
_ELSEWHERE = frozenset({"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"})
_FAILED = 500
_SPREADING_SECONDS = 20.0
_DENIAL_PAUSE_SECONDS = 60.0
_GIVE_UP_SECONDS = 120.0
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_OUTAGE_SECONDS = 120.0


@dataclass(frozen=True)
class UploadMessage:
    """A message of the upload queue, leased to us.

    Attributes:
        id: SQS's name for it; the same for each delivery.
        handle: Receipt handle, needed to delete it.
        body: JSON text.
        receives: How often it was delivered, as far as SQS knows.
        leased_at: When it was asked for, on the monotonic clock.
        lease_seconds: For how long nobody else gets it.
    """

    id: str
    handle: str
    body: str
    receives: int
    leased_at: float
    lease_seconds: float

    @property
    def left_seconds(self) -> float:
        """Seconds until somebody else may get it."""
        return self.leased_at + self.lease_seconds - time.monotonic()


class _SharedKeys(Credentials):  # type: ignore[misc]  # botocore has no types
    """Credentials that boto reads anew for each signature, so that a renewal needs no new clients."""

    def replace(self, joined: JoinedJob) -> None:
        token = joined.session_token.get_secret_value() if joined.session_token else None
        self._frozen = ReadOnlyCredentials(
            joined.access_key.get_secret_value(), joined.secret_key.get_secret_value(), token
        )

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        return self._frozen


class JobQueues:
    """What an ingest key may do: receive and delete upload messages, send index messages, put objects.

    Keys live about an hour. They are renewed by one thread for all, on age or when AWS refuses them, by joining the job
    again.

    Args:
        client: Client of the Boss.
        joined: Answer of the first join.
        connections: Requests at the same time.
        key_seconds: Keys are renewed at this age.
    """

    def __init__(self, client: BossClient, joined: JoinedJob, *, connections: int, key_seconds: float = 3300.0) -> None:
        self.joins = 1
        self._client = client
        self._joined = joined
        self._key_seconds = key_seconds
        self._lock = threading.Lock()
        self._generation = 0
        self._issued_at = time.monotonic()
        self._has_worked = False
        self._refused_since: float | None = None
        self._denied_at = -_DENIAL_PAUSE_SECONDS
        self._keys = _SharedKeys("-", "-")
        self._keys.replace(joined)
        session = botocore.session.Session()
        session._credentials = self._keys
        boto = boto3.Session(botocore_session=session, region_name=client.aws_region)
        settings = Config(
            retries={"total_max_attempts": 1},  # repeated here, where the lease is known
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            parameter_validation=False,
            user_agent=USER_AGENT,  # that of boto3 costs a tenth of each request
            tcp_keepalive=True,
        )
        aws = {"config": settings, "endpoint_url": client.aws_endpoint_url, "verify": client.aws_verify_tls}
        self._sqs = boto.client("sqs", **aws)
        s3 = boto.client("s3", **aws)
        # In the path, as boto3 itself does for names with dots, which those of the Boss have.
        self._bucket_url = f"{s3.meta.endpoint_url}/{joined.bucket}/"
        s3.close()
        self._bucket = URLLib3Session(
            verify=client.aws_verify_tls,
            proxies=get_environ_proxies(self._bucket_url),
            timeout=(_CONNECT_SECONDS, _READ_SECONDS),
            max_pool_connections=connections,
            socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)],
        )

    @property
    def joined(self) -> JoinedJob:
        """The latest answer to a join."""
        return self._joined

    def close(self) -> None:
        """Close all connections."""
        self._sqs.close()
        self._bucket.close()

    def renew_if_old(self) -> None:
        """Renew the keys when they are near the end of their life."""
        if time.monotonic() - self._issued_at > self._key_seconds:
            self._renew(self._generation, "age")

    def receive(self, lease_seconds: float, wait_seconds: int) -> list[UploadMessage]:
        """Lease up to ten messages; an outage of some minutes is bridged.

        Args:
            lease_seconds: For how long; it cannot be prolonged, because the keys do not allow it.
            wait_seconds: How long SQS waits for a first message.

        Raises:
            QueueGone: The job is over.
            BiomedError: SQS does not answer, or refuses.
        """
        return _persist(lambda: self._receive(int(lease_seconds), wait_seconds), time.monotonic() + _OUTAGE_SECONDS)

    def _receive(self, lease_seconds: int, wait_seconds: int) -> list[UploadMessage]:
        begun = time.monotonic()
        answer = self._ask(
            MessagesAnswer,
            lambda: self._sqs.receive_message(
                QueueUrl=self._joined.upload_queue,
                MaxNumberOfMessages=BATCH,
                VisibilityTimeout=lease_seconds,
                WaitTimeSeconds=wait_seconds,
                MessageSystemAttributeNames=["ApproximateReceiveCount"],
            ),
        )
        return [
            UploadMessage(
                id=item.id,
                handle=item.handle,
                body=item.body,
                receives=item.attributes.receives,
                leased_at=begun,  # at the earliest
                lease_seconds=lease_seconds,
            )
            for item in answer.messages or ()
        ]

    def counts(self) -> tuple[int, int]:
        """How many messages are visible and how many are leased to anybody; both are approximate.

        An outage of some minutes is bridged.
        """
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        answer = _persist(
            lambda: self._ask(
                CountsAnswer,
                lambda: self._sqs.get_queue_attributes(QueueUrl=self._joined.upload_queue, AttributeNames=names),
            ),
            time.monotonic() + _OUTAGE_SECONDS,
        )
        return answer.attributes.visible, answer.attributes.leased

    def send_index(self, bodies: Sequence[str]) -> list[int]:
        """Send index messages, as many as fit into one request.

        Args:
            bodies: Up to ten messages.

        Returns:
            Positions of those that were not accepted and have to be sent again.
        """
        entries = [{"Id": str(position), "MessageBody": body} for position, body in enumerate(bodies)]
        answer = self._ask(
            BatchAnswer, lambda: self._sqs.send_message_batch(QueueUrl=self._joined.tile_index_queue, Entries=entries)
        )
        accepted = {item.position for item in answer.successful}
        return [position for position in range(len(bodies)) if position not in accepted]

    def delete(self, handles: Sequence[str], until: float) -> dict[int, bool]:
        """Delete upload messages, again and again until a moment when AWS is busy.

        Args:
            handles: Up to ten receipt handles.
            until: When to give up, on the monotonic clock.

        Returns:
            Positions of those that failed, with whether trying again can help.
        """
        entries = [{"Id": str(position), "ReceiptHandle": handle} for position, handle in enumerate(handles)]
        answer = _persist(
            lambda: self._ask(
                BatchAnswer,
                lambda: self._sqs.delete_message_batch(QueueUrl=self._joined.upload_queue, Entries=entries),
            ),
            until,
        )
        gone = {item.position for item in answer.successful}
        hopeless = {item.position for item in answer.failed if item.is_our_fault}
        return {position: position not in hopeless for position in range(len(handles)) if position not in gone}

    def put(self, key: str, content: bytes, metadata: dict[str, str], until: float) -> None:
        """Put one object, again and again until a moment when AWS is busy.

        Args:
            key: Object key.
            content: Its bytes.
            metadata: User metadata; the whole of it must not exceed 2 KB.
            until: When to give up, on the monotonic clock.

        Raises:
            ConfigurationError: The bucket is in another region.
            PlatformError: AWS refuses the object.
            BiomedError: AWS did not answer in time.
        """
        _persist(lambda: self._call(lambda: self._put(key, content, metadata)), until)

    def _put(self, key: str, content: bytes, metadata: dict[str, str]) -> None:
        """Sign and send one object; `put_object` of boto3 does the same in more than twice the CPU time."""
        headers = {"x-amz-acl": "private", "x-amz-storage-class": "STANDARD"}
        headers |= {f"x-amz-meta-{name}": value for name, value in metadata.items()}
        request = AWSRequest("PUT", self._bucket_url + quote(key), headers, content)
        S3SigV4Auth(self._keys.get_frozen_credentials(), "s3", self._client.aws_region).add_auth(request)
        response = self._bucket.send(request.prepare())
        if response.status_code != 200:
            answer = {"status_code": response.status_code, "headers": response.headers, "body": response.content}
            raise ClientError(create_parser("rest-xml").parse(answer, None), "PutObject")
        if "ETag" not in response.headers:
            raise NetworkError("PutObject: what answered is not S3. Check what lies between.")

    def _ask(self, shape: type[A], request: Callable[[], Any]) -> A:
        """Make one request and read its answer as a model; absence of what was asked for proves nothing."""
        answer = self._call(lambda: _parsed(request))
        try:
            return shape.model_validate(answer)
        except ValidationError:
            raise NetworkError("AWS answered in another shape than asked for. Check what lies between.") from None

    def _call(self, request: Callable[[], Any]) -> Any:
        """Make one request; when the keys are refused, renew them and make it again."""
        while True:
            generation = self._generation
            try:
                answer = request()
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                if code in _EXPIRED or code in _DENIED:
                    self._refused(generation, code, error)
                    continue
                raise _converted(error, code) from None
            except (EndpointConnectionError, ConnectTimeoutError) as error:
                raise ConnectionFailed(f"No connection to AWS ({type(error).__name__}).") from None
            except ReadTimeoutError:
                raise RequestTimedOut("AWS did not answer in time.") from None
            except BotoCoreError as error:
                raise NetworkError(f"The connection to AWS broke ({type(error).__name__}).") from None
            if generation == self._generation:
                self._has_worked, self._refused_since = True, None
            return answer

    def _refused(self, generation: int, code: str, error: ClientError) -> None:
        now = time.monotonic()
        with self._lock:
            if generation != self._generation:
                return
            since = self._refused_since = self._refused_since or now
            has_worked = self._has_worked
            if code in _DENIED and has_worked:
                if now - self._denied_at < _DENIAL_PAUSE_SECONDS:
                    # Renewed lately, and others get through: it is this object, not the keys.
                    raise PermissionDeniedError(f"AWS denies {error.operation_name} ({code}).", status=403)
                self._denied_at = now
        if now - since > _GIVE_UP_SECONDS:
            raise AuthenticationError(
                f"AWS has refused the keys of the job for {_GIVE_UP_SECONDS:.0f} s ({code}), also new ones. Check the "
                "region and the clock of this machine.",
                status=403,
            )
        if not has_worked and now - self._issued_at < _SPREADING_SECONDS:
            sleep(random.uniform(0.2, 1.0))  # new keys take some seconds to be known everywhere
            return
        self._renew(generation, code)

    def _renew(self, generation: int, reason: str) -> None:
        with self._lock:
            if generation != self._generation:
                return
            logger.info("Renewing the keys of ingest job %d (%s)", self._joined.job.id, reason)
            deadline = time.monotonic() + _GIVE_UP_SECONDS
            joined: JoinedJob | None = None
            while joined is None:
                joined = _persist(lambda: self._client.join(self._joined.job.id), deadline)
                self.joins += 1
                if joined is None:
                    if time.monotonic() > deadline:
                        raise ServerUnavailable(f"Ingest job {self._joined.job.id}: the Boss has no keys at hand.")
                    sleep(1.0)  # all threads of the pool wait for these keys
            self._keys.replace(joined)
            self._joined = joined
            self._issued_at = time.monotonic()
            self._has_worked, self._refused_since = False, None
            self._generation += 1


class Pauses:
    """Growing pauses of one thread of an upload's pool, which may wait only as long as it holds a lease.

    Args:
        until: When they end, on the monotonic clock.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._seconds = 0.1

    def take(self) -> bool:
        """Pause; returns False at once when the end would pass meanwhile."""
        if time.monotonic() + self._seconds > self._until:
            return False
        sleep(random.uniform(0.5, 1.0) * self._seconds)
        self._seconds = min(2 * self._seconds, 5.0)
        return True


def _persist(call: Callable[[], T], until: float) -> T:
    """Repeat a request, which must be safe to repeat, for transient errors until a moment."""
    pauses = Pauses(until)
    while True:
        try:
            return call()
        except BiomedError as error:
            if not is_transient(error) or not pauses.take():
                raise


def _parsed(request: Callable[[], Any]) -> Any:
    """Make a request of boto3, whose parser stumbles over the words of what is not AWS."""
    try:
        return request()
    except (ResponseParserError, AttributeError, TypeError, RecursionError) as error:
        raise NetworkError(
            f"AWS answered in another language than its own ({type(error).__name__}). Check what lies between."
        ) from None


def batches(bodies: Sequence[str]) -> list[list[int]]:
    """Divide messages into batches that SQS takes: ten of them, 256 KB with some room."""
    result: list[list[int]] = []
    size = 0
    for position, body in enumerate(bodies):
        if not result or len(result[-1]) == BATCH or size + len(body) > _BATCH_BYTES:
            result.append([])
            size = 0
        result[-1].append(position)
        size += len(body)
    return result


def _converted(error: ClientError, code: str) -> BiomedError:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    text = f"{error.operation_name}: AWS answered {code} ({error.response.get('Error', {}).get('Message', '')[:200]})."
    if code in _GONE:
        return QueueGone("The queue of the job is gone: it was completed or cancelled.")
    if code in _ELSEWHERE:
        return ConfigurationError(f"{text} The bucket of the job is in another region: set `aws_region` to that one.")
    if code in _BUSY or status in UNAVAILABLE or status == _FAILED:
        return ServerUnavailable(text, status=status)
    return PlatformError(text, status=status)
