"""The one error tree of the package.

Every error says what happened, to which object, and what to do next. `is_transient` is the only place that decides
whether trying again later can help; task retries, polling and transfers all ask it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from prefect_biomed.clients.texts import lines

__all__ = [
    "AuthenticationError",
    "BiomedError",
    "CapacityError",
    "ConfigurationError",
    "ConnectionFailed",
    "DeadlineExceeded",
    "HeldElsewhere",
    "JobFailed",
    "LaunchInDoubt",
    "LedgerError",
    "LocalStorageError",
    "NetworkError",
    "NotFoundError",
    "PermissionDeniedError",
    "PlatformError",
    "PollingFailed",
    "PreflightFailed",
    "RequestTimedOut",
    "ServerUnavailable",
    "SourceUnreadable",
    "StorageFull",
    "TransferFailed",
    "UnexpectedResponse",
    "UnsafeContent",
    "invalid_fields",
    "is_transient",
]


class BiomedError(Exception):
    """Base of every error this package raises.

    Each can be made of its message alone: that is how Prefect restores the error of a run that failed elsewhere.
    """

    transient = False

    def __init__(self, message: object = "") -> None:
        # Much of it may be the words of a server.
        super().__init__(str(lines(message)))


class ConfigurationError(BiomedError):
    """A setting on our side is wrong; nothing was sent."""


class NetworkError(BiomedError):
    """No answer came back. For anything but a read it is unknown whether the request took effect."""

    transient = True


class ConnectionFailed(NetworkError):
    """The connection could not be made, so nothing was sent."""


class RequestTimedOut(NetworkError):
    """The server accepted the connection but did not answer in time."""


class PlatformError(BiomedError):
    """The platform answered with an error.

    Attributes:
        status: HTTP status of the answer.
        code: The platform's own error code, or None where it gave none.
        url: The URL asked, without its query.
        spoken: Whether the answer had the shape in which the platform itself tells of errors. A proxy, a cache or a
            server that breaks down answers too, but not for the platform.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: int | None = None,
        url: str = "",
        spoken: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.url = url
        self.spoken = spoken


class AuthenticationError(PlatformError):
    """The credentials were refused. Never retried: a wrong password must not lock an account."""


class PermissionDeniedError(PlatformError):
    """The credentials are good but do not allow this."""


class NotFoundError(PlatformError):
    """The object does not exist, or is hidden from this user."""


class CapacityError(PlatformError):
    """The platform or the user has reached a limit of running jobs; waiting helps."""

    transient = True


class ServerUnavailable(PlatformError):
    """The server, or a proxy before it, is out of order for the moment (HTTP 429, 502, 503, 504)."""

    transient = True


class StorageFull(PlatformError):
    """The platform takes no more files: its disk or the user's quota is full. The same for every file."""


class UnexpectedResponse(PlatformError):
    """The answer is not what this platform speaks: an HTML page, a redirect elsewhere, a shape unknown."""


class PreflightFailed(BiomedError):
    """The checks made before anything is sent found problems.

    Attributes:
        problems: One sentence for each problem found.
    """

    def __init__(self, subject: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        if not problems:
            super().__init__(subject)
            return
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{subject}: {count} found, nothing was sent.\n{lines}")


class JobFailed(BiomedError):
    """A remote job ended without success."""


class DeadlineExceeded(BiomedError):
    """We stopped waiting. The message says what goes on remotely and how to take it up again."""


class PollingFailed(BiomedError):
    """Too many looks in a row went wrong. What we waited for goes on remotely."""


class LaunchInDoubt(BiomedError):
    """A launch may or may not have taken effect and looking for it did not settle the question."""

    transient = True


class LedgerError(BiomedError):
    """A session file, ledger or intent on disk is damaged, of a later version, or belongs to something else.

    It was left untouched.
    """


class HeldElsewhere(LedgerError):
    """Another process or machine works on the same thing; it can be tried again when that one has ended."""

    transient = True


class LocalStorageError(BiomedError):
    """The local disk did not take or give a file: it is full, read-only, or the name is too long for it."""


class SourceUnreadable(BiomedError):
    """A local file that was to be sent is missing, damaged, or not of the kind that fits. It was not sent."""


class UnsafeContent(BiomedError):
    """A name or an archive from a server would leave its folder or exceed its limits. It was refused."""


class TransferFailed(BiomedError):
    """Some files could not be transferred; the others were.

    Attributes:
        failures: The error of each file that failed, by its name.
    """

    def __init__(self, subject: str, failures: dict[str, BiomedError] | None = None, total: int = 0) -> None:
        self.failures = failures or {}
        if not failures:
            super().__init__(subject)
            return
        shown = [f"  - {name}: {error}" for name, error in list(failures.items())[:20]]
        if len(failures) > len(shown):
            shown.append(f"  - … and {len(failures) - len(shown)} more")
        super().__init__(
            f"{subject}: {len(failures)} of {total} files failed, the others are complete. "
            "Run it again: complete files are not sent twice.\n" + "\n".join(shown)
        )

    @property
    def transient(self) -> bool:  # type: ignore[override]  # depends on the failures, not on the class
        """Whether another try can help with every failure."""
        return bool(self.failures) and all(is_transient(error) for error in self.failures.values())


def invalid_fields(error: ValidationError, *, whole: str = "value", most: int = 10) -> str:
    """Say in one line what a model has found wrong, without the values: one of them may be a secret.

    Args:
        error: What the model raised.
        whole: What to call that which was read, where no field of it is at fault.
        most: Number of problems after which they are cut off.

    Returns:
        Each field with what is wrong with it.
    """
    problems = error.errors(include_input=False, include_url=False, include_context=False)
    told = [f"{'.'.join(map(str, problem['loc'])) or whole}: {problem['msg']}" for problem in problems[:most]]
    return "; ".join([*told, f"and {len(problems) - most} more"] if len(problems) > most else told)


def is_transient(error: BaseException) -> bool:
    """Tell whether trying again later can help.

    Args:
        error: Any exception.

    Returns:
        True for network failures, overloaded servers and reached capacities; False for everything that will be the
        same next time, and for every exception that is not ours.
    """
    return isinstance(error, BiomedError) and error.transient
