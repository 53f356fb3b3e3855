"""SQS (JSON protocol) and S3 (PutObject, path style) as far as an ingest key may use them.

The policy of the keys that a join issues is enforced: receive, delete and attributes on the
upload queue, send on the index queue, PutObject on one bucket. All else is denied, above all
ChangeMessageVisibility (unless a switch allows it) and every way of reading an object back.
Requests signed more than a quarter of an hour off are refused.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote
from xml.sax.saxutils import escape

from prefect_biomed.sandbox.boss._jobs import Job
from prefect_biomed.sandbox.boss._queues import Message, Queue, ReceiptHandleIsInvalid
from prefect_biomed.sandbox.boss._service import (
    INGEST_BUCKET,
    TILE_BUCKET,
    AwsProblem,
    Key,
    Service,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_TARGET = "AmazonSQS."
_SIGNED = "%Y%m%dT%H%M%SZ"
_SKEW = timedelta(minutes=15)
_METADATA_BYTES = 2048
_MESSAGE_BYTES = 256 * 1024
_POLL_SECONDS = 0.01
_CREDENTIAL = re.compile(r"Credential=([^/,]+)/")
_ALLOWED = {
    "ReceiveMessage": "upload",
    "DeleteMessage": "upload",
    "DeleteMessageBatch": "upload",
    "GetQueueAttributes": "upload",
    "SendMessage": "index",
    "SendMessageBatch": "index",
}
_QUERY_CODES = {
    "QueueDoesNotExist": "AWS.SimpleQueueService.NonExistentQueue",
    "TooManyEntriesInBatchRequest": "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
    "EmptyBatchRequest": "AWS.SimpleQueueService.EmptyBatchRequest",
    "BatchEntryIdsNotDistinct": "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
}


class AwsApp:
    """ASGI application that answers both services.

    Args:
        service: State of the emulated Boss.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {key.decode(): value.decode("latin-1") for key, value in scope["headers"]}
        body = await _body(receive)
        if headers.get("x-amz-target", "").startswith(_TARGET):
            await self._answer_sqs(headers, body, send)
        else:
            await self._answer_s3(scope, headers, body, send)

    def _key(self, headers: dict[str, str], unknown: str) -> Key:
        self._check_clock(headers, is_s3=unknown == "InvalidAccessKeyId")
        found = _CREDENTIAL.search(headers.get("authorization", ""))
        key = self._service.valid_key(found.group(1)) if found else None
        if key is None:
            raise AwsProblem(403, unknown, "The access key is not known.")
        return key

    def _check_clock(self, headers: dict[str, str], *, is_s3: bool) -> None:
        try:
            signed = datetime.strptime(headers.get("x-amz-date", ""), _SIGNED).replace(tzinfo=UTC)
        except ValueError:
            return
        now = datetime.now(UTC) + timedelta(seconds=self._service.switches.clock_ahead_seconds)
        if abs(now - signed) <= _SKEW:
            return
        if is_s3:
            text = "The difference between the request time and the current time is too large."
            raise AwsProblem(403, "RequestTimeTooSkewed", text)
        text = f"Signature expired: {signed:{_SIGNED}} is now earlier than {now - _SKEW:{_SIGNED}}"
        if signed > now:
            text = f"Signature not yet current: {signed:{_SIGNED}} is still later than {now + _SKEW:{_SIGNED}}"
        raise AwsProblem(403, "InvalidSignatureException", text)

    # -- SQS ---------------------------------------------------------------------------------

    async def _answer_sqs(self, headers: dict[str, str], body: bytes, send: Send) -> None:
        operation = headers["x-amz-target"].removeprefix(_TARGET)
        extra: list[tuple[bytes, bytes]] = []
        try:
            answer = await self._sqs(operation, headers, body)
            status = 200
        except AwsProblem as problem:
            status = problem.status
            answer = {"__type": f"com.amazonaws.sqs#{problem.code}", "message": problem.message}
            code = _QUERY_CODES.get(problem.code, problem.code)
            extra = [(b"x-amzn-query-error", f"{code};Sender".encode())]
        content = json.dumps(answer).encode()
        await _send(send, status, b"application/x-amz-json-1.0", content, extra)

    async def _sqs(self, operation: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        key = self._key(headers, "InvalidClientTokenId")
        arguments = json.loads(body)
        queue, job = self._queue(key, operation, str(arguments.get("QueueUrl", "")))
        fault = self._service.planned_fault(operation)
        if fault and fault.code:
            raise AwsProblem(fault.status, fault.code, "planned by the sandbox")
        failing = set(fault.entries) if fault else set()
        if operation == "ReceiveMessage":
            return await self._receive(queue, job, arguments)
        if operation == "GetQueueAttributes":
            visible, leased = queue.counts()
            counts = {
                "ApproximateNumberOfMessages": str(visible),
                "ApproximateNumberOfMessagesNotVisible": str(leased),
            }
            return {"Attributes": counts}
        if operation == "DeleteMessage":
            self._delete(queue, job, arguments["ReceiptHandle"])
            return {}
        if operation == "SendMessage":
            return _sent(queue.send(arguments["MessageBody"]))
        return self._batch(operation, queue, job, arguments["Entries"], failing)

    def _queue(self, key: Key, operation: str, url: str) -> tuple[Queue, Job]:
        name = url.rsplit("/", 1)[-1]
        found = self._service.queues.get(name)
        if found is None:
            raise AwsProblem(400, "QueueDoesNotExist", "The specified queue does not exist.")
        queue, job, kind = found
        allowed = _ALLOWED.get(operation)
        if operation == "ChangeMessageVisibilityBatch" and self._service.switches.keys_may_give_back:
            allowed = "upload"
        if job is not key.job or allowed != kind:
            key.job.observed.denied[operation] += 1
            text = f"User ingest{key.job.id} is not authorized to perform: sqs:{operation}"
            raise AwsProblem(403, "AccessDenied", text)
        return queue, job

    async def _receive(self, queue: Queue, job: Job, arguments: dict[str, Any]) -> dict[str, Any]:
        count = int(arguments.get("MaxNumberOfMessages", 1))
        if not 1 <= count <= 10:
            text = "MaxNumberOfMessages must be between 1 and 10."
            raise AwsProblem(400, "ReadCountOutOfRange", text)
        lease = arguments.get("VisibilityTimeout")
        until = time.monotonic() + float(arguments.get("WaitTimeSeconds", 0))
        seconds = None if lease is None else float(lease)
        while True:
            messages = queue.receive(count, seconds)
            if messages or time.monotonic() >= until:
                break
            await asyncio.sleep(_POLL_SECONDS)
        if messages:
            used = queue.visibility_seconds if seconds is None else seconds
            job.observed.longest_lease = max(job.observed.longest_lease, used)
        return {"Messages": [_described(message) for message in messages]} if messages else {}

    @staticmethod
    def _delete(queue: Queue, job: Job, handle: str) -> None:
        try:
            if queue.delete(handle):
                job.observed.deleted += 1
        except ReceiptHandleIsInvalid as error:
            text = "The input receipt handle is invalid."
            raise AwsProblem(400, "ReceiptHandleIsInvalid", text) from error

    @staticmethod
    def _give_back(queue: Queue, handle: str) -> None:
        try:
            queue.give_back(handle)
        except ReceiptHandleIsInvalid as error:
            text = "The input receipt handle is invalid."
            raise AwsProblem(400, "ReceiptHandleIsInvalid", text) from error

    def _batch(
        self,
        operation: str,
        queue: Queue,
        job: Job,
        entries: list[dict[str, Any]],
        failing: set[int],
    ) -> dict[str, Any]:
        if not entries:
            raise AwsProblem(400, "EmptyBatchRequest", "There are no entries.")
        if len(entries) > 10:
            text = "Maximum number of entries per request are 10."
            raise AwsProblem(400, "TooManyEntriesInBatchRequest", text)
        if len({entry["Id"] for entry in entries}) != len(entries):
            raise AwsProblem(400, "BatchEntryIdsNotDistinct", "Two entries have one Id.")
        if sum(len(entry.get("MessageBody", "")) for entry in entries) > _MESSAGE_BYTES:
            raise AwsProblem(400, "BatchRequestTooLong", "The batch is longer than 256 KiB.")
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for position, entry in enumerate(entries):
            if position in failing:
                fault = {"Code": "InternalError", "Message": "planned", "SenderFault": False}
                bad.append({"Id": entry["Id"], **fault})
            elif operation == "SendMessageBatch":
                good.append({"Id": entry["Id"], **_sent(queue.send(entry["MessageBody"]))})
            else:
                try:
                    if operation == "DeleteMessageBatch":
                        self._delete(queue, job, entry["ReceiptHandle"])
                    else:
                        self._give_back(queue, entry["ReceiptHandle"])
                    good.append({"Id": entry["Id"]})
                except AwsProblem as problem:
                    fault = {"Code": problem.code, "Message": problem.message, "SenderFault": True}
                    bad.append({"Id": entry["Id"], **fault})
        return {"Successful": good, "Failed": bad} if bad else {"Successful": good}

    # -- S3 ----------------------------------------------------------------------------------

    async def _answer_s3(self, scope: Scope, headers: dict[str, str], body: bytes, send: Send) -> None:
        raw = scope.get("raw_path", b"") or scope["path"].encode()
        bucket, _, key = unquote(raw.decode("ascii").lstrip("/")).partition("/")
        try:
            etag = self._put(scope["method"], bucket, key, headers, body)
        except AwsProblem as problem:
            content = (
                '<?xml version="1.0" encoding="UTF-8"?>\n'
                f"<Error><Code>{escape(problem.code)}</Code>"
                f"<Message>{escape(problem.message)}</Message></Error>"
            ).encode()
            await _send(send, problem.status, b"application/xml", content, [])
            return
        await _send(send, 200, b"application/xml", b"", [(b"etag", f'"{etag}"'.encode())])

    def _put(self, method: str, bucket: str, key: str, headers: dict[str, str], body: bytes) -> str:
        issued = self._key(headers, "InvalidAccessKeyId")
        job = issued.job
        wanted = INGEST_BUCKET if job.volumetric else TILE_BUCKET
        if method != "PUT" or bucket != wanted or not key:
            job.observed.denied[f"s3:{method}"] += 1
            raise AwsProblem(403, "AccessDenied", "Access Denied")
        fault = self._service.planned_fault("PutObject", key)
        if fault:
            raise AwsProblem(fault.status, fault.code or "SlowDown", "planned by the sandbox")
        prefix = "x-amz-meta-"
        metadata = {name.removeprefix(prefix): value for name, value in headers.items() if name.startswith(prefix)}
        if sum(len(name) + len(value) for name, value in metadata.items()) > _METADATA_BYTES:
            text = "Your metadata headers exceed the maximum allowed metadata size"
            raise AwsProblem(400, "MetadataTooLarge", text)
        content = _checked(headers, body)
        self._service.store(job, key, content, metadata)
        return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _checked(headers: dict[str, str], body: bytes) -> bytes:
    """The object's bytes, after the checks that S3 makes of what the client declared."""
    declared = headers.get("x-amz-content-sha256", "")
    if declared.startswith("STREAMING-"):
        body = _unchunked(body)
    elif len(declared) == 64 and hashlib.sha256(body).hexdigest() != declared:
        text = "The provided SHA256 does not match what was computed."
        raise AwsProblem(400, "XAmzContentSHA256Mismatch", text)
    crc = headers.get("x-amz-checksum-crc32")
    if crc and int.from_bytes(base64.b64decode(crc), "big") != zlib.crc32(body):
        raise AwsProblem(400, "BadDigest", "The CRC32 you specified did not match.")
    digest = headers.get("content-md5")
    computed = hashlib.md5(body, usedforsecurity=False).digest() if digest else b""
    if digest and base64.b64decode(digest) != computed:
        raise AwsProblem(400, "BadDigest", "The Content-MD5 you specified did not match.")
    return body


def _unchunked(body: bytes) -> bytes:
    """Undo `aws-chunked`: hexadecimal length and options, CRLF, content, CRLF, to length 0."""
    parts: list[bytes] = []
    position = 0
    while True:
        end = body.index(b"\r\n", position)
        length = int(body[position:end].split(b";", 1)[0], 16)
        if length == 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + length])
        position = end + 2 + length + 2


def _described(message: Message) -> dict[str, Any]:
    return {
        "MessageId": message.id,
        "ReceiptHandle": Queue.handle(message),
        "MD5OfBody": hashlib.md5(message.body.encode(), usedforsecurity=False).hexdigest(),
        "Body": message.body,
        "Attributes": {
            "ApproximateReceiveCount": str(message.receives),
            "SentTimestamp": str(int(message.sent * 1000)),
            "ApproximateFirstReceiveTimestamp": str(int(message.first_received * 1000)),
        },
    }


def _sent(message: Message) -> dict[str, Any]:
    digest = hashlib.md5(message.body.encode(), usedforsecurity=False).hexdigest()
    return {"MessageId": message.id, "MD5OfMessageBody": digest}


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send(send: Send, status: int, kind: bytes, content: bytes, extra: list[tuple[bytes, bytes]]) -> None:
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(content)).encode()),
        (b"x-amzn-requestid", str(uuid.uuid4()).encode()),
        *extra,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
