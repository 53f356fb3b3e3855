"""The vantage6 branches of the package's error tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    JobFailed,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    UnsafeContent,
)

if TYPE_CHECKING:
    from prefect_biomed.clients.vantage6.models import RunFailure

__all__ = [
    "CancelNotPermitted",
    "DataframeStuck",
    "DecryptionFailed",
    "ForeignResult",
    "InvalidKey",
    "KeyChanged",
    "KeyMismatch",
    "MfaEnrollmentRequired",
    "MfaRequired",
    "NameConflict",
    "RequestRefused",
    "ResultEmpty",
    "ResultExpired",
    "ResultMissing",
    "ResultNotReadable",
    "ResultUnavailable",
    "ServerFault",
    "TaskFailed",
    "TaskGone",
    "TooFewAnswers",
    "UnsafeFormat",
]


class MfaRequired(AuthenticationError):
    """The account has a second factor and no code was given, or the code was wrong."""


class MfaEnrollmentRequired(AuthenticationError):
    """The server asks this account to set up a second factor, and has just stored a secret for it.

    Attributes:
        otpauth_uri: What the QR code of an authenticator app encodes. A secret: it is in no message and no `repr`.
    """

    def __init__(self, message: str, *, otpauth_uri: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.otpauth_uri = otpauth_uri


class RequestRefused(PlatformError):
    """The server found the request itself wrong (HTTP 400).

    Attributes:
        errors: The server's complaints by field, where it gave them.
    """

    def __init__(self, message: str, *, errors: Mapping[str, Any] | None = None, **details: Any) -> None:
        super().__init__(message, **details)
        self.errors = dict(errors or {})


class ServerFault(PlatformError):
    """The server failed (HTTP 500). vantage6 also answers so to some wrong requests, so it is not tried again."""


class NameConflict(ConfigurationError):
    """An object of this name exists and is not what was asked for."""


class DataframeStuck(JobFailed):
    """The last step of a dataframe went well, and the server still refuses to use it."""


class TaskGone(NotFoundError):
    """The task was deleted, or is hidden from this user."""


class CancelNotPermitted(PermissionDeniedError):
    """The role does not allow to kill tasks; the task goes on."""


class InvalidKey(ConfigurationError):
    """A key is missing, or is no RSA key that vantage6 could have made."""


class KeyMismatch(ConfigurationError):
    """The private key given is not the one of the organization; nothing was sent."""


class KeyChanged(KeyMismatch):
    """The server gives another public key of an organization than before, and nobody has confirmed it."""


class DecryptionFailed(BiomedError):
    """A message cannot be read: it was encrypted for another key, is damaged, or is not encrypted at all."""


class ResultUnavailable(BiomedError):
    """A run has no result that could be read. The class and the message say why."""


class ResultEmpty(ResultUnavailable):
    """The run ended without a result: it failed, was killed or was never allowed."""


class ResultMissing(ResultUnavailable):
    """The result may still come: the run has not ended, or the server does not list what it gave."""


class ResultExpired(ResultUnavailable):
    """The server's clean-up has removed the result."""


class ForeignResult(ResultUnavailable):
    """The result is encrypted for the organization that asked for it, which is not the user's."""


class ResultNotReadable(ResultUnavailable):
    """The result begins as JSON and is not: it was cut short or damaged.

    Attributes:
        content: The first bytes of what came, at most 64 kB.
        size_bytes: Its whole size in bytes.
    """

    def __init__(self, message: str, *, content: bytes = b"", size_bytes: int = 0) -> None:
        super().__init__(message)
        self.content = content[:65536]
        self.size_bytes = size_bytes


class TooFewAnswers(ResultUnavailable):
    """So few organizations have answered in a round that it cannot be aggregated."""


class UnsafeFormat(UnsafeContent, ResultUnavailable):
    """The result is a Python pickle, which could run code when read. It was not read."""


class TaskFailed(JobFailed):
    """At least one run of a task ended without success.

    Attributes:
        task_id: The task; None where only the message was handed on.
        failures: What went wrong where, the root cause first.
    """

    def __init__(self, message: str, *, task_id: int | None = None, failures: Sequence[RunFailure] = ()) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.failures = tuple(failures)
