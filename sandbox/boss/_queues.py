"""A small in-memory SQS: standard queues with visibility, batches and receipt handles.

Documented behaviour followed: Amazon SQS Developer Guide, "Visibility timeout" and "Standard
queues". Every operation costs O(log n), so that a hundred thousand messages are no burden.
"""

from __future__ import annotations

import base64
import heapq
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass

DEFAULT_VISIBILITY_SECONDS = 120.0
_HANDLE_BYTES = 300  # real receipt handles are about 400 characters once encoded


@dataclass(slots=True)
class Message:
    """One message of a queue, with what ReceiveMessage tells about it."""

    id: str
    body: str
    sent: float
    receives: int = 0
    first_received: float = 0.0


class ReceiptHandleIsInvalid(ValueError):
    """The receipt handle was not made by this queue."""


class Queue:
    """A standard queue: at least once, approximately in order.

    Args:
        name: Last part of the queue's URL.
        visibility_seconds: Lease of a received message when the receiver names none.

    Attributes:
        lock: Nothing changes while it is held.
    """

    def __init__(self, name: str, visibility_seconds: float = DEFAULT_VISIBILITY_SECONDS) -> None:
        self.name = name
        self.visibility_seconds = visibility_seconds
        self.lock = threading.Lock()
        self._serial = 0
        self._messages: dict[str, Message] = {}
        self._visible: deque[str] = deque()
        self._leased: dict[str, float] = {}
        self._expiries: list[tuple[float, int, str]] = []

    def send(self, body: str) -> Message:
        """Put one message at the end of the queue."""
        message = Message(str(uuid.uuid4()), body, time.time())
        with self.lock:
            self._messages[message.id] = message
            self._visible.append(message.id)
        return message

    def receive(self, count: int, visibility_seconds: float | None = None) -> list[Message]:
        """Lease up to `count` visible messages; never waits."""
        lease = self.visibility_seconds if visibility_seconds is None else visibility_seconds
        received: list[Message] = []
        with self.lock:
            now = time.time()
            self._expire(now)
            while self._visible and len(received) < count:
                message = self._messages.get(self._visible.popleft())
                if message is None:
                    continue  # deleted through an older handle while visible again
                message.receives += 1
                if message.receives == 1:
                    message.first_received = time.time()
                self._leased[message.id] = now + lease
                self._serial += 1
                heapq.heappush(self._expiries, (now + lease, self._serial, message.id))
                received.append(message)
        return received

    @staticmethod
    def handle(message: Message) -> str:
        """The receipt handle of the message's latest receive, about 400 characters long."""
        text = f"{message.id}:{message.receives}:".encode()
        return base64.b64encode(text.ljust(_HANDLE_BYTES, b"\0")).decode()

    def delete(self, handle: str) -> bool:
        """Delete the message behind a receipt handle.

        Returns:
            True when a message went away; False when it was gone already or the handle is stale,
            which SQS reports as success too.

        Raises:
            ReceiptHandleIsInvalid: The handle cannot be read.
        """
        identity, number = _parsed(handle)
        with self.lock:
            message = self._messages.get(identity)
            if message is None or message.receives != number:
                return False
            del self._messages[identity]
            self._leased.pop(identity, None)
            return True

    def give_back(self, handle: str) -> bool:
        """Make a leased message visible at once; False when the handle is stale or the message is gone.

        Raises:
            ReceiptHandleIsInvalid: The handle cannot be read.
        """
        identity, number = _parsed(handle)
        with self.lock:
            message = self._messages.get(identity)
            if message is None or message.receives != number or self._leased.pop(identity, None) is None:
                return False
            self._visible.append(identity)
            return True

    def clear(self) -> None:
        """Forget all messages."""
        with self.lock:
            self._messages.clear()
            self._visible.clear()
            self._leased.clear()

    def counts(self) -> tuple[int, int]:
        """How many messages are visible and how many are leased."""
        with self.lock:
            self._expire(time.time())
            leased = len(self._leased)
            return len(self._messages) - leased, leased

    def bodies(self) -> list[str]:
        """The bodies of all messages, visible or leased."""
        with self.lock:
            return [message.body for message in self._messages.values()]

    def expire_leases(self) -> None:
        """Make every leased message visible again at once, as if its lease had run out."""
        with self.lock:
            for identity in self._leased:
                self._leased[identity] = 0.0
                self._serial += 1
                self._expiries.append((0.0, self._serial, identity))
            heapq.heapify(self._expiries)
            self._expire(time.time())

    def _expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, _, identity = heapq.heappop(self._expiries)
            until = self._leased.get(identity)
            if until is not None and until <= now:
                del self._leased[identity]
                self._visible.append(identity)


def _parsed(handle: str) -> tuple[str, int]:
    try:
        identity, receives, _ = base64.b64decode(handle, validate=True).decode().split(":")
        return identity, int(receives)
    except (ValueError, UnicodeDecodeError) as error:
        raise ReceiptHandleIsInvalid(handle[:20]) from error
