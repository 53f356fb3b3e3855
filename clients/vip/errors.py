"""Errors of VIP and other CARMIN platforms, and what their error codes stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import requests

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    HeldElsewhere,
    JobFailed,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    StorageFull,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import UNAVAILABLE
from prefect_biomed.clients.rest import Refusal
from prefect_biomed.clients.vip.models import Workflow, without_tokens

__all__ = [
    "DELETED",
    "NO_REASON",
    "GenericVipError",
    "ListUnavailable",
    "NotFetched",
    "SessionLocked",
    "StillNeeded",
    "StillRunning",
    "WorkflowFailed",
    "read_refusal",
]


class GenericVipError(PlatformError):
    """VIP's error 8000, which stands for nearly everything. Look at the state before acting on it."""

    transient = True


class WorkflowFailed(JobFailed):
    """Executions ended without success, or with failed jobs where none was allowed.

    Attributes:
        workflows: The executions that failed.
    """

    def __init__(self, message: str, workflows: Sequence[Workflow] = ()) -> None:
        super().__init__(message)
        self.workflows = tuple(workflows)


class SessionLocked(HeldElsewhere):
    """Another process works on the same session; it can be tried again when that one has ended."""


class ListUnavailable(UnexpectedResponse):
    """The platform cannot list its executions; each can still be asked for by its identifier."""


class StillRunning(BiomedError):
    """Executions may still write outputs, so the session can be neither fetched nor finished. Nothing was removed.

    Attributes:
        workflow_ids: The executions that run.
    """

    def __init__(self, message: str, workflow_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.workflow_ids = tuple(workflow_ids)


class NotFetched(BiomedError):
    """The session cannot be removed because it holds outputs that were wanted and not fetched. Nothing was removed.

    Attributes:
        workflow_ids: The executions that made them, as far as they are known.
    """

    def __init__(self, message: str, workflow_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.workflow_ids = tuple(workflow_ids)


class StillNeeded(BiomedError):
    """A session cannot be removed: other sessions, or runs to be launched, use its inputs. Nothing was removed."""


DELETED = 8015
"""VIP's error code for an execution whose record was deleted, which it allows only after the end."""
NO_REASON = 8000
"""VIP's error code for nearly everything."""
# With these the status says more than VIP's generic code.
_SPEAKING = frozenset({requests.codes.unauthorized, requests.codes.forbidden, requests.codes.not_found})
_NEW_KEY = "Put a valid API key into the credentials; nothing is lost, run it again then."
_ELSEWHERE = "The path or object is outside what this account may use."
_JOIN = "It belongs to a group you are not in. Join the group on the portal: your account, Join group."
_KINDS: dict[int, tuple[type[PlatformError], str]] = {
    **dict.fromkeys((8002, 8003, 8004, 20, 25, 30), (AuthenticationError, _NEW_KEY)),
    **dict.fromkeys((8007, DELETED, 56, 105), (NotFoundError, "Check the name.")),
    **dict.fromkeys((8013, 45, 50), (PermissionDeniedError, _ELSEWHERE)),
    8008: (PermissionDeniedError, _JOIN),
    **dict.fromkeys((2000, 2001), (CapacityError, "Too many executions are running.")),
}
"""By error code, of VIP and of CARMIN-server; the code counts more than the status: 401 can mean a missing file."""
_FULL = re.compile(r"\bquota\b|\bno space left\b|\bdisk (is )?full\b", re.IGNORECASE)


def read_refusal(status: int, body: Any) -> Refusal | None:
    """Read an error as VIP and other CARMIN platforms tell it. The code decides; the message is for people.

    Args:
        status: HTTP status of the answer.
        body: The decoded body.

    Returns:
        What it says; None when it has no error code.
    """
    code = body.get("errorCode") if isinstance(body, dict) else None
    if not isinstance(code, int):
        return None
    said = without_tokens(str(body.get("errorMessage") or ""))
    kind, advice = _KINDS.get(code, (None, ""))
    if kind is None and code != NO_REASON and _FULL.search(said):
        # No platform has a code for it.
        kind, advice = (
            StorageFull,
            "Make room on the platform, or ask its administrators for more; then run this again.",
        )
    if status in UNAVAILABLE:
        # Later counts more than why.
        kind, advice = None, ""
    elif code == NO_REASON and status not in _SPEAKING:
        kind, advice = GenericVipError, "VIP gives no reason."
    return Refusal(said, code, kind, advice)
