"""How a server of vantage6 answers: its error shape and what its statuses mean, the same in all generations."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import requests

from prefect_biomed.clients.errors import (
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    UnexpectedResponse,
)
from prefect_biomed.clients.rest import Answered, Refusal, RestClient
from prefect_biomed.clients.vantage6.errors import MfaRequired, RequestRefused, ServerFault

__all__ = ["Said", "Vantage6Rest"]

_REQUEST_INCORRECT = "Request body is incorrect"
_NOT_ALLOWED = "The login is good, but its role does not allow this."
_FAULT = "vantage6 also answers so to some wrong requests."


class Said(Answered):
    """What a server says when it has nothing to give.

    Attributes:
        msg: Its words.
    """

    msg: str = ""


class Vantage6Rest(RestClient):
    """The REST interface of one server, with or without a login.

    Args:
        http: The session to the API.
    """

    _by_status: ClassVar[dict[int, tuple[type[PlatformError], str]]] = {
        400: (RequestRefused, ""),
        401: (PermissionDeniedError, _NOT_ALLOWED),
        403: (PermissionDeniedError, _NOT_ALLOWED),
        404: (NotFoundError, ""),
        500: (ServerFault, _FAULT),
        501: (ServerFault, _FAULT),
    }

    def _refusal(self, status: int, body: Any) -> Refusal | None:
        if not isinstance(body, dict):
            return None
        said, errors = body.get("msg"), body.get("errors")
        if said is None and not errors:
            return self._of_the_framework(status, body.get("message"))
        text = said if isinstance(said, str) else _REQUEST_INCORRECT
        if status == requests.codes.bad_request:
            return _wrong_request(text, errors)
        if "two-factor" in text:
            return Refusal(text, kind=MfaRequired)
        # A lack of permission has the same status as a login that is not good.
        if status == requests.codes.unauthorized and any(
            word in text for word in ("Authorization", "Failed to login", "Token has expired")
        ):
            return Refusal(text, kind=AuthenticationError)
        return Refusal(text)

    def _of_the_framework(self, status: int, message: Any) -> Refusal | None:
        """Read what the web framework says before the server's own code is asked; proxies say it, too."""
        if not isinstance(message, str):
            return None
        if 400 <= status < 500 and status not in self._unavailable:
            return Refusal(message, kind=UnexpectedResponse, details={"spoken": False})
        return Refusal(message)


def _wrong_request(text: str, errors: Any) -> Refusal:
    if text.startswith(f"{_REQUEST_INCORRECT}: "):
        # Task creation in generation 5 puts the complaints into the text.
        try:
            errors = json.loads(text.removeprefix(f"{_REQUEST_INCORRECT}: "))
        except (ValueError, RecursionError):
            errors = None
    elif errors and text == _REQUEST_INCORRECT:
        text = f"{text}: {json.dumps(errors, ensure_ascii=False)}"
    complaints = errors if isinstance(errors, dict) else {}
    kind = MfaRequired if "two-factor" in text else RequestRefused
    return Refusal(text, kind=kind, details={"errors": complaints} if kind is RequestRefused else {})
