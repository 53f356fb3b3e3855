"""Errors of VIP and other CARMIN platforms, and the table from the platform's error codes to the error tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import requests

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    CapacityError,
    JobFailed,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.vip.models import Workflow, without_tokens

__all__ = ["GenericVipError", "SessionLocked", "StillNeeded", "StillRunning", "WorkflowFailed", "raise_for"]

_BAD_KEY = frozenset({8002, 8003, 8004, 20, 25, 30})
_NOT_FOUND = frozenset({8007, 8015, 56, 105})
_NOT_ALLOWED = frozenset({8008, 8013, 45, 50})
_CAPACITY = frozenset({2000, 2001})


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


class SessionLocked(LedgerError):
    """Another process works on the same session; it can be tried again when that one has ended."""

    transient = True


class StillRunning(BiomedError):
    """The session cannot be finished because executions may still write outputs. Nothing was removed.

    Attributes:
        workflow_ids: The executions that run.
    """

    def __init__(self, message: str, workflow_ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.workflow_ids = tuple(workflow_ids)


class StillNeeded(BiomedError):
    """A session cannot be removed because other sessions use its inputs. Nothing was removed."""


def raise_for(response: requests.Response, body: Any, *, about: str = "") -> NoReturn:
    """Raise the typed error of an answer. VIP's clients decide on the code; the message is for people."""
    status, url = response.status_code, response.url.split("?", 1)[0]
    code = body.get("errorCode") if isinstance(body, dict) else None
    said = without_tokens(str(body.get("errorMessage", "")))[:500] if isinstance(body, dict) else ""
    subject = f"{about}: " if about else ""
    detail = f"{said} (HTTP {status}, code {code})" if code is not None else f"HTTP {status}"

    def error(kind: type[PlatformError], advice: str) -> BiomedError:
        return kind(f"{subject}{detail}. {advice}".strip(), status=status, code=code, url=url)

    if code in _NOT_FOUND:
        raise error(NotFoundError, "Check the name.")
    if code == 8008:
        raise error(
            PermissionDeniedError,
            "It belongs to a group you are not in. Join the group on the portal: your account, Join group.",
        )
    if code in _NOT_ALLOWED:
        raise error(PermissionDeniedError, "The path or object is outside what this account may use.")
    if code in _BAD_KEY or status == requests.codes.unauthorized:
        raise error(
            AuthenticationError, "Put a valid API key into the credentials; nothing is lost, run it again then."
        )
    if code in _CAPACITY:
        raise error(CapacityError, "Too many executions are running.")
    if status == requests.codes.not_found:
        raise error(NotFoundError, f"{url} is not there.")
    if status == requests.codes.forbidden:
        raise error(PermissionDeniedError, "The account lacks the role for this.")
    if status in {429, 502, 503, 504}:
        raise error(ServerUnavailable, "The server is out of order for the moment.")
    if code == 8000:
        raise error(GenericVipError, "VIP gives no reason.")
    if response.ok or status < 400:
        raise UnexpectedResponse(f"{subject}{url} answered HTTP {status}, which says nothing.", status=status, url=url)
    raise error(PlatformError, "")
