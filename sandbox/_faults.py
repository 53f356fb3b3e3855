"""What goes wrong with chosen requests."""

from __future__ import annotations

import re
import threading
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Fault(BaseModel):
    """Something that goes wrong with chosen requests.

    Without `status`, `drop` and `truncate_bytes` the platform answers as usual, `delay_seconds`
    late and with `headers` added. What is given of all this is done together.

    Attributes:
        name: shown in the journal; made from the effect when not given.
        method: only requests with this verb; None is every verb.
        path: regular expression, searched for in the decoded path.
        query: regular expression, searched for in the decoded query.
        calls: which of the matching requests, counted from 1; None is every one.
        skip: matching requests that are let through first; `calls` counts after them.
        times: at most this many are hit.
        status: HTTP status of an answer given instead of the platform's.
        body: text of that answer.
        content_type: of that answer.
        headers: added to the answer, replacing those of the same name.
        after_effect: the platform does what was asked before `delay_seconds` and before its answer is
            sent or replaced by `status`. Without it, a `status` means that the platform never sees the
            request.
        delay_seconds: wait this long before going on. A client that leaves meanwhile, before the
            effect, takes its request back: the platform never sees it.
        hold_seconds: keep the whole request this long, as a queue before the platform does, and have it
            carried out then in any case, also when the client has gone. With `drop="before"`, or
            `status` without `after_effect`, the client is dropped or answered meanwhile; otherwise it
            waits. Not carried out is what had not arrived whole when its client left, and what is kept
            when the platform goes down.
        drop: close the connection without an answer, `before` or `after` the platform did what
            was asked.
        truncate_bytes: send only this many bytes of the body that Content-Length announces, then
            close the connection.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    method: str | None = None
    path: str = ""
    query: str = ""
    calls: list[int] | None = None
    skip: int = Field(default=0, ge=0)
    times: int | None = Field(default=None, ge=1)
    status: int | None = Field(default=None, ge=200, le=599)
    body: str = ""
    content_type: str = "text/html; charset=utf-8"
    headers: dict[str, str] = Field(default_factory=dict)
    after_effect: bool = False
    delay_seconds: float = Field(default=0.0, ge=0.0)
    hold_seconds: float = Field(default=0.0, ge=0.0)
    drop: Literal["before", "after"] | None = None
    truncate_bytes: int | None = Field(default=None, ge=0)

    def model_post_init(self, context: object) -> None:
        """Refuse expressions that do not compile now rather than at the first request."""
        for field in ("path", "query"):
            try:
                re.compile(getattr(self, field))
            except re.error as error:
                raise ValueError(f"{field} is not a regular expression: {error}") from error

    @property
    def label(self) -> str:
        """The name, or a short description of the effect."""
        effects = {
            f"status {self.status}": self.status is not None,
            f"drop {self.drop}": self.drop is not None,
            f"truncate to {self.truncate_bytes}": self.truncate_bytes is not None,
            f"delay {self.delay_seconds:g} s": self.delay_seconds > 0,
            f"hold {self.hold_seconds:g} s": self.hold_seconds > 0,
        }
        return self.name or ", ".join(text for text, given in effects.items() if given) or "headers"

    @property
    def instead(self) -> bool:
        """Whether the client is answered or dropped without the platform."""
        return self.drop == "before" or (self.drop is None and self.status is not None and not self.after_effect)

    @property
    def late(self) -> bool:
        """Whether the effect comes first, then the delay, then what the client gets."""
        return not self.instead and (self.after_effect or self.drop == "after")

    def _matches(self, method: str, path: str, query: str) -> bool:
        return (
            (self.method is None or self.method.upper() == method)
            and re.search(self.path, path) is not None
            and re.search(self.query, query) is not None
        )


class FaultPlan:
    """The faults of a platform, with how often each matched and hit. Safe from any thread.

    Every fault counts the requests it matches; the first one due, in the order added, is applied.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._matched: list[int] = []
        self._hit: list[int] = []

    def __len__(self) -> int:
        with self._lock:
            return len(self._faults)

    def add(self, *faults: Fault) -> None:
        """Add faults at the end of the plan."""
        with self._lock:
            self._faults += faults
            self._matched += [0] * len(faults)
            self._hit += [0] * len(faults)

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._faults, self._matched, self._hit = [], [], []

    def describe(self) -> list[dict[str, Any]]:
        """Return each fault with `matched` and `hit`, its counts of requests."""
        with self._lock:
            return [
                {**fault.model_dump(), "matched": matched, "hit": hit}
                for fault, matched, hit in zip(self._faults, self._matched, self._hit, strict=True)
            ]

    def _due(self, method: str, path: str, query: str) -> Fault | None:
        due: int | None = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                if not fault._matches(method, path, query):
                    continue
                self._matched[index] += 1
                call = self._matched[index] - fault.skip
                if (
                    due is None
                    and call >= 1
                    and (fault.calls is None or call in fault.calls)
                    and (fault.times is None or self._hit[index] < fault.times)
                ):
                    self._hit[index] += 1
                    due = index
            return None if due is None else self._faults[due]
