"""Queues and buckets of one joined job, and the keys for them, shared by all threads of a process."""

from __future__ import annotations

import logging
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache, partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from weakref import WeakSet

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
from botocore.loaders import Loader
from botocore.parsers import ResponseParserError, create_parser
from botocore.utils import get_environ_proxies
from pydantic import ValidationError

from prefect_biomed.clients.boss.answers import BatchAnswer, CountsAnswer, MessagesAnswer
from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.errors import ClockOff, QueueGone
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
    UnexpectedResponse,
    is_transient,
)
from prefect_biomed.clients.http import UNAVAILABLE, USER_AGENT
from prefect_biomed.clients.polling import sleep
from prefect_biomed.clients.rest import Answered
from prefect_biomed.clients.texts import logger_of

__all__ = ["BATCH", "JobQueues", "Pauses", "UploadMessage", "batches"]

logger = logger_of(__name__)

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
# S3 names the clock by its code, SQS in its message only.
_SKEWED = "RequestTimeTooSkewed"
_SKEW_TOLD = re.compile(r"Signature (expired|not yet current)|too skewed", re.IGNORECASE)
_TOLERATED_SKEW_SECONDS = 15 * 60.0
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9.]+")
_ETAG = re.compile(r'"?[0-9a-fA-F]{32}(-\d+)?"?')
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
# Today's names and the old ones, which SQS still gives where an old library asks.
_SQS_HOST = re.compile(
    r"sqs(-fips)?\.[a-z0-9-]+\.(amazonaws\.com(\.cn)?|api\.aws)|([a-z0-9-]+\.)?queue\.amazonaws\.com"
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
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
        sent_at: When it was put into the queue, by the clock of AWS, in seconds since 1970; None where it is not told.
        leased_at: When it was asked for, on the monotonic clock.
        lease_seconds: For how long nobody else gets it.
    """

    id: str
    handle: str
    body: str
    receives: int
    sent_at: float | None
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


class _WithoutKeys(logging.Filter):
    """Takes the keys of jobs out of what botocore logs at the level DEBUG: headers and what is signed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: WeakSet[_SharedKeys] = WeakSet()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        for keys in list(self.known):
            frozen = keys.get_frozen_credentials()
            for secret in filter(None, (frozen.secret_key, frozen.token)):
                said = said.replace(secret, "**********")
        record.msg, record.args = said, None
        return True


_WITHOUT_KEYS = _WithoutKeys()


def _keep_out_of_logs(keys: _SharedKeys) -> None:
    _WITHOUT_KEYS.known.add(keys)
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in {"boto3", "botocore", "urllib3"}:
            logging.getLogger(name).addFilter(_WITHOUT_KEYS)


@cache
def _descriptions() -> Loader:
    """Keep what botocore reads of S3 and SQS for all jobs of a process: it is most of what a client costs."""
    loader: Loader = botocore.session.Session().get_component("data_loader")
    return loader


class JobQueues:
    """What an ingest key may do: receive and delete upload messages, send index messages, put objects.

    Keys live about an hour. They are renewed by one thread for all, on age or when AWS refuses them, by joining the job
    again.

    Args:
        client: Client of the Boss.
        joined: Answer of the first join.
        connections: Requests at the same time.
        key_seconds: Keys are renewed at this age.

    Attributes:
        joins: How often the job was joined.
        settle_seconds: Longest time after which a request may take effect although its answer was lost.
    """

    def __init__(self, client: BossClient, joined: JoinedJob, *, connections: int, key_seconds: float = 3300.0) -> None:
        self.joins = 1
        self.settle_seconds = client.settle_seconds
        self._client = client
        self._joined = joined
        self._key_seconds = key_seconds
        self._lock = threading.Lock()
        self._generation = 0
        self._issued_at = time.monotonic()
        self._worked: set[str] = set()
        self._ever_worked: set[str] = set()
        self._renewed_for = ""
        self._clock = _Clock()
        self._refused_since: dict[str, float] = {}
        self._denied_at = -_DENIAL_PAUSE_SECONDS
        self._keys = _SharedKeys("-", "-")
        self._keys.replace(joined)
        _keep_out_of_logs(self._keys)
        session = botocore.session.Session()
        session.register_component("data_loader", _descriptions())
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
        _check_queues(client, joined)
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

    def time(self) -> float | None:
        """What the clock of AWS shows at the earliest, in seconds since 1970; None before it was seen."""
        return self._clock.time()

    def receive(self, lease_seconds: float, wait_seconds: int, most: int = BATCH) -> list[UploadMessage]:
        """Lease up to ten messages; an outage of some minutes is bridged.

        Args:
            lease_seconds: For how long; it cannot be prolonged, because the keys do not allow it.
            wait_seconds: How long SQS waits for a first message.
            most: So many at the most.

        Raises:
            QueueGone: The job is over.
            BiomedError: SQS does not answer, or refuses.
        """
        until = time.monotonic() + _OUTAGE_SECONDS
        return _persist(lambda: self._receive(int(lease_seconds), wait_seconds, most), until)

    def _receive(self, lease_seconds: int, wait_seconds: int, most: int) -> list[UploadMessage]:
        begun = time.monotonic()
        answer = self._ask(
            MessagesAnswer,
            "ReceiveMessage",
            lambda: self._sqs.receive_message(
                QueueUrl=self._joined.upload_queue,
                MaxNumberOfMessages=most,
                VisibilityTimeout=lease_seconds,
                WaitTimeSeconds=wait_seconds,
                MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
            ),
        )
        return [
            UploadMessage(
                id=item.id,
                handle=item.handle,
                body=item.body,
                receives=item.attributes.receives,
                sent_at=item.attributes.sent_at,
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
                "GetQueueAttributes",
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
            BatchAnswer,
            "SendMessageBatch",
            lambda: self._sqs.send_message_batch(QueueUrl=self._joined.tile_index_queue, Entries=entries),
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
                "DeleteMessageBatch",
                lambda: self._sqs.delete_message_batch(QueueUrl=self._joined.upload_queue, Entries=entries),
            ),
            until,
        )
        gone = {item.position for item in answer.successful}
        hopeless = {item.position for item in answer.failed if item.is_our_fault}
        return {position: position not in hopeless for position in range(len(handles)) if position not in gone}

    def give_back(self, handles: Sequence[str]) -> None:
        """Let others have messages at once. Where the keys do not allow it, their leases have to end first.

        Args:
            handles: Receipt handles.
        """
        url = self._joined.upload_queue
        for start in range(0, len(handles), BATCH):
            entries = [
                {"Id": str(position), "ReceiptHandle": handle, "VisibilityTimeout": 0}
                for position, handle in enumerate(handles[start : start + BATCH])
            ]
            try:
                _parsed(partial(self._sqs.change_message_visibility_batch, QueueUrl=url, Entries=entries))
            except (BotoCoreError, ClientError, BiomedError) as error:
                left = len(handles) - start
                logger.info("%d messages come back only when their leases end (%s)", left, type(error).__name__)
                return

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
        _persist(lambda: self._call("PutObject", lambda: self._put(key, content, metadata)), until)

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
        if not _ETAG.fullmatch(response.headers.get("ETag", "")):
            raise NetworkError("PutObject: what answered is not S3. Check what lies between.")

    def _ask(self, shape: type[A], operation: str, request: Callable[[], Any]) -> A:
        """Make one request and read its answer as a model; absence of what was asked for proves nothing."""
        answer = self._call(operation, lambda: _parsed(request))
        if isinstance(answer, dict):
            self._clock.see(answer)
        try:
            return shape.model_validate(answer)
        except ValidationError:
            raise NetworkError("AWS answered in another shape than asked for. Check what lies between.") from None

    def _call(self, operation: str, request: Callable[[], Any]) -> Any:
        """Make one request; when the keys are refused, renew them and make it again, for a bounded time."""
        while True:
            generation = self._generation
            try:
                answer = request()
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                self._clock.see(error.response)
                if code == _SKEWED or code in _EXPIRED or code in _DENIED:
                    self._clock.check(code, error)
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
                self._worked.add(operation)
                self._ever_worked.add(operation)
                self._refused_since.pop(operation, None)
            return answer

    def _refused(self, generation: int, code: str, error: ClientError) -> None:
        now = time.monotonic()
        # Kept when the keys are renewed, or another operation succeeds: new keys may be refused for ever, too.
        since = self._refused_since.setdefault(error.operation_name, now)
        with self._lock:
            if now - since > _GIVE_UP_SECONDS:
                raise AuthenticationError(
                    f"AWS has refused {error.operation_name} with the keys of the job for {_GIVE_UP_SECONDS:.0f} s "
                    f"({code}), also with new ones. Check `aws_region` of the block; ask the administrators of the "
                    "Boss what these keys may do.",
                    status=403,
                )
            if generation != self._generation:
                return
            if code in _DENIED and error.operation_name in self._ever_worked:
                if now - self._denied_at < _DENIAL_PAUSE_SECONDS:
                    # Renewed lately, and others get through: it is this object, not the keys.
                    raise PermissionDeniedError(f"AWS denies {error.operation_name} ({code}).", status=403)
                self._denied_at = now
        in_vain = error.operation_name == self._renewed_for and error.operation_name not in self._worked
        if (in_vain or not self._worked) and now - self._issued_at < _SPREADING_SECONDS:
            sleep(random.uniform(0.2, 1.0))  # new keys take some seconds to be known everywhere
            return
        self._renewed_for = error.operation_name
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
            self._worked.clear()
            self._generation += 1


class _Clock:
    """The clock of AWS, as its answers tell it, beside that of this machine."""

    def __init__(self) -> None:
        self._ahead: float | None = None
        self._at_least: float | None = None

    def see(self, answer: Mapping[str, Any]) -> None:
        """Compare the clocks. An answer that does not tell the time changes nothing."""
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        try:
            told = parsedate_to_datetime(headers.get("date", "")).timestamp()
        except (AttributeError, TypeError, ValueError, OverflowError):
            return
        self._ahead = told - time.time()
        # Answers tell whole seconds, and take a while to arrive: the latest of them is the nearest.
        beyond = told - time.monotonic()
        self._at_least = beyond if self._at_least is None else max(self._at_least, beyond)

    def time(self) -> float | None:
        """What it shows at the earliest; None before it was seen."""
        return None if self._at_least is None else time.monotonic() + self._at_least

    def check(self, code: str, error: ClientError) -> None:
        """Find out whether AWS refuses a signature because of the clock of this machine.

        Raises:
            ClockOff: It does.
        """
        said = str(error.response.get("Error", {}).get("Message", ""))
        ahead = self._ahead
        is_off = ahead is not None and abs(ahead) > _TOLERATED_SKEW_SECONDS
        if not is_off and code != _SKEWED and not _SKEW_TOLD.search(said):
            return
        amount = ""
        if ahead is not None and is_off:
            amount = f" by {abs(ahead) / 60:.0f} minutes ({'slow' if ahead > 0 else 'fast'})"
        raise ClockOff(
            f"The clock of this machine is wrong{amount}, so that AWS refuses all requests: it takes those signed "
            "within a quarter of an hour of its own time. Set the clock (by NTP), then run this again: what was "
            "uploaded stays."
        )


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
    if not _CODE.fullmatch(code):
        return NetworkError(
            f"{error.operation_name}: what answered (HTTP {status}) is not AWS. Check what lies between.",
        )
    text = f"{error.operation_name}: AWS answered {code} ({error.response.get('Error', {}).get('Message', '')[:200]})."
    if code in _GONE:
        return QueueGone("The queue of the job is gone: it was completed or cancelled.")
    if code in _ELSEWHERE:
        return ConfigurationError(f"{text} The bucket of the job is in another region: set `aws_region` to that one.")
    if code in _BUSY or status in UNAVAILABLE or status == _FAILED:
        return ServerUnavailable(text, status=status)
    return PlatformError(text, status=status)


def _check_queues(client: BossClient, joined: JoinedJob) -> None:
    """Refuse queues that lie elsewhere than the block says: what is sent there is signed with the keys of the job."""
    pinned = client.aws_endpoint_url
    for url in filter(None, (joined.upload_queue, joined.tile_index_queue)):
        host = urlsplit(url).hostname or ""
        if pinned is not None:
            known = urlsplit(pinned).hostname or ""
            right = host == known or host.endswith(f".{known}") or {host, known} <= _LOOPBACK
            expected = f"the host of `aws_endpoint_url`, {pinned}"
        else:
            regions = host.split(".") if host != "queue.amazonaws.com" else ["us-east-1"]
            right = bool(_SQS_HOST.fullmatch(host)) and client.aws_region in regions
            expected = f"SQS in the region {client.aws_region}"
        if not right:
            raise UnexpectedResponse(
                f"Ingest job {joined.job.id}: the Boss names a queue on {host}, which is not {expected}; nothing was "
                "sent there. If that is right, set `aws_region` or `aws_endpoint_url` of the block."
            )
