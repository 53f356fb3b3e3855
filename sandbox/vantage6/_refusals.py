"""Answers that say no, and those that say that the server is at a loss."""

from __future__ import annotations

from typing import NoReturn


class Refusal(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: goes out as `msg`.
        more: further keys of the body.
    """

    def __init__(self, status: int, message: object, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, object] = {"msg": message, **more}


class TokenRefusal(Refusal):
    """A token that is missing, malformed, forged or too old.

    Args:
        status: HTTP status.
        message: what most routes say.
        technical: what the library says that checks tokens, when it is something else.
    """

    def __init__(self, status: int, message: str, technical: str | None = None) -> None:
        super().__init__(status, message)
        self.technical = technical or message


class ServerFlaw(Exception):
    """Something the real servers stumble over, too; they answer 500."""


def denied(message: str = "You lack the permission to do that!") -> NoReturn:
    """Refuse for lack of permission, which vantage6 answers with 401."""
    raise Refusal(401, message)


class FlaskRefusal(Exception):
    """What the framework of the real server refuses before its own code runs."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
