"""Logging in to vantage6, and staying logged in.

Generations 3 and 4 log in with a password (and a second factor) and get an access token of hours; generation 5 asks
Keycloak and gets one of minutes. An `Authenticator` keeps the token, renews it before it ends, and lets only one of
many threads do so. A refusal is remembered for a while, because five of them block an account.
"""

from __future__ import annotations

import base64
import hashlib
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlencode

import requests
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from pydantic import Field, SecretStr, ValidationError

from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    PermissionDeniedError,
    PlatformError,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import UNAVAILABLE, HttpSession
from prefect_biomed.clients.polling import PollSettings, poll
from prefect_biomed.clients.rest import Answered, Refusal, RestClient
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6.answers import Vantage6Rest
from prefect_biomed.clients.vantage6.errors import MfaEnrollmentRequired, MfaRequired, RequestRefused

__all__ = [
    "Authenticator",
    "Claims",
    "DeviceLogin",
    "KeycloakPasswordLogin",
    "Login",
    "PasswordLogin",
    "SecondFactor",
    "ServiceAccountLogin",
    "Tokens",
]

logger = logger_of(__name__)

T = TypeVar("T")

# A token is renewed when this part of its life is over.
_RENEW_AFTER = 0.8
# The server forgets failed logins after this time.
_REFUSAL_SECONDS = 15 * 60
# So often it is looked whether it is time to ask for the confirmation of a device code.
_TICK_SECONDS = 1.0
# By so much a client waits longer when Keycloak asks it to slow down (RFC 8628).
_SLOWER_SECONDS = 5.0


class Claims(Answered):
    """What an access token says of itself.

    Attributes:
        exp: When it ends, in seconds since 1970 by the server's clock.
        iat: When it was issued.
        nbf: From when it is good.
        sub: The account: a number before generation 5.
        identity: The same in old servers of generation 3.
    """

    exp: float | None = Field(None, ge=0)
    iat: float | None = Field(None, ge=0)
    nbf: float | None = Field(None, ge=0)
    sub: int | str | None = None
    identity: int | str | None = None


@dataclass(frozen=True)
class Tokens:
    """What a login gives.

    Attributes:
        access: Sent with each request.
        refresh: Buys the next pair; None for a service account.
        life_seconds: How long the access token is good.
        received: When it came, on this machine's monotonic clock, so that a wrong wall clock does no harm.
    """

    access: str = field(repr=False)
    refresh: str | None = field(default=None, repr=False)
    life_seconds: float = 0.0
    received: float = field(default_factory=time.monotonic)

    @classmethod
    def from_jwt(cls, access: str, refresh: str | None) -> Tokens:
        """Read the life of an access token from its own claims.

        Args:
            access: A JSON web token. Its signature is the server's affair.
            refresh: The refresh token.
        """
        claims = claims_of(access)
        life = math.inf
        if claims.exp is not None:
            # Both times are the server's, so its clock may differ from ours.
            life = claims.exp - (claims.iat or claims.nbf or time.time())
        # They are cut to whole seconds, so the token may end up to a second earlier.
        life = max(life - 1.0, life / 2.0)
        return cls(access=access, refresh=refresh, life_seconds=life)

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew."""
        return time.monotonic() - self.received >= _RENEW_AFTER * self.life_seconds


def claims_of(token: str) -> Claims:
    """Read the claims of a JSON web token without checking its signature.

    Args:
        token: Three base64url parts joined by dots.

    Raises:
        UnexpectedResponse: The server gave something else.
    """
    try:
        part = token.split(".")[1]
        return Claims.model_validate_json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError, ValidationError):
        raise UnexpectedResponse("The server gave an access token that is no JSON web token.") from None


class _TokenAnswer(Answered):
    """What a login gives on the wire."""

    access_token: str = Field(repr=False)
    refresh_token: str | None = Field(None, repr=False)
    expires_in: float | None = Field(None, ge=0)

    @property
    def tokens(self) -> Tokens:
        """The tokens with their life."""
        if self.expires_in is not None:
            return Tokens(self.access_token, self.refresh_token, self.expires_in)
        return Tokens.from_jwt(self.access_token, self.refresh_token)


class _LoginAnswer(Answered):
    """What a login of generations 3 and 4 gives. Status 200 does not mean that one is logged in."""

    access_token: str | None = Field(None, repr=False)
    refresh_token: str | None = Field(None, repr=False)
    qr_uri: str | None = Field(None, repr=False)
    msg: str = ""


class SecondFactor:
    """Codes of six digits that change every 30 s (RFC 6238).

    Args:
        secret: Base32 secret from which codes are computed.
        code: One code, good for one login.

    Raises:
        ConfigurationError: The secret is not base32.
    """

    def __init__(self, secret: SecretStr | None = None, code: str | int | None = None) -> None:
        self._totp = _totp(secret) if secret else None
        # The server refuses a number, and a number loses its leading zeros.
        self._code = f"{code:06d}" if isinstance(code, int) else code

    @property
    def needs_a_person(self) -> bool:
        """Whether the next login needs a code that nobody can compute."""
        return self._totp is None and self._code is not None

    def now(self) -> str | None:
        """Give the code to send now, None where there is no second factor."""
        return self._totp.generate(int(time.time())).decode() if self._totp else self._code


class Login(ABC):
    """One way to get tokens."""

    _secret = SecretStr("")
    _second_factor = SecondFactor()

    @abstractmethod
    def log_in(self) -> Tokens:
        """Get a first pair of tokens.

        Raises:
            AuthenticationError: Refused.
        """

    @abstractmethod
    def refresh(self, tokens: Tokens) -> Tokens | None:
        """Buy a new pair with the refresh token.

        Args:
            tokens: The pair so far.

        Returns:
            The new pair, None when the refresh token is no longer good.
        """

    @property
    def can_log_in_again(self) -> bool:
        """Whether a second login works without a person: not with a code that is used up."""
        return not self._second_factor.needs_a_person

    @property
    @abstractmethod
    def identity(self) -> str:
        """The account, for messages and to tell logins apart."""

    def fingerprint(self) -> bytes:
        """Digest of account and secret, to remember a refusal without keeping the secret."""
        return hashlib.sha256(f"{self.identity}\0{self._secret.get_secret_value()}".encode()).digest()


class PasswordLogin(Login):
    """Password of generations 3 and 4.

    Args:
        session: The server's API, sending no credentials.
        username: Name of the user.
        password: Password of the user.
        second_factor: Where codes come from.
    """

    def __init__(
        self,
        session: HttpSession,
        *,
        username: str,
        password: SecretStr,
        second_factor: SecondFactor | None = None,
    ) -> None:
        self._session = session
        self._username = username
        self._secret = password
        self._second_factor = second_factor or SecondFactor()

    @property
    def identity(self) -> str:
        """The account."""
        return f"{self._username} at {self._session.base_url}"

    def log_in(self) -> Tokens:
        """Get a first pair of tokens.

        Raises:
            AuthenticationError: Wrong password, unknown user or blocked account; the server does not say which.
            MfaRequired: The account has a second factor, and the code is missing or wrong.
            MfaEnrollmentRequired: The server wants the account to set up a second factor.
        """
        body = {"username": self._username, "password": self._secret.get_secret_value()}
        if code := self._second_factor.now():
            body["mfa_code"] = code
        try:
            answer = self._ask(_LoginAnswer, "/token/user", json_body=body)
        except MfaRequired as error:
            raise MfaRequired(
                f"{self.identity}: the code of the second factor is wrong.", status=error.status, url=error.url
            ) from None
        except (AuthenticationError, PermissionDeniedError, RequestRefused) as error:
            raise AuthenticationError(
                f"{error} The server refuses the login: wrong password, unknown user, or an account blocked after five "
                "failures. It is not tried again.",
                status=error.status,
                url=error.url,
            ) from None
        if answer.access_token is None:
            raise self._not_logged_in(answer)
        return Tokens.from_jwt(answer.access_token, answer.refresh_token)

    def _ask(self, shape: type[T], path: str, **request: Any) -> T:
        return Vantage6Rest(self._session).ask(shape, "POST", path, about=self.identity, authenticate=False, **request)

    def _not_logged_in(self, answer: _LoginAnswer) -> PlatformError:
        url = self._session.base_url
        if answer.qr_uri is not None:
            return MfaEnrollmentRequired(
                f"{self.identity}: the server asks this account to set up a second factor and has just stored a secret "
                "for it, so the next login needs a code. The secret is in `otpauth_uri` of this error: put it into an "
                "authenticator app and into the block.",
                otpauth_uri=answer.qr_uri,
                url=url,
            )
        if "two-factor" in answer.msg:
            return MfaRequired(
                f"{self.identity}: this account has a second factor. Give its secret in the block, or a code.", url=url
            )
        return UnexpectedResponse(f"{url}: the login gave no token ({answer.msg or 'no reason given'}).", url=url)

    def refresh(self, tokens: Tokens) -> Tokens | None:
        """Buy a new pair with the refresh token."""
        if tokens.refresh is None:
            return None
        headers = {"Authorization": f"Bearer {tokens.refresh}"}
        try:
            return self._ask(_TokenAnswer, "/token/refresh", headers=headers).tokens
        except PlatformError as error:
            if error.spoken and error.status in {requests.codes.unauthorized, requests.codes.unprocessable_entity}:
                return None
            raise


class _KeycloakRefused(AuthenticationError):
    """Keycloak says no.

    Attributes:
        reason: Its word for why.
    """

    def __init__(self, message: str, *, reason: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.reason = reason


class _Keycloak(RestClient):
    """Keycloak's interface for logging in."""

    _unavailable = UNAVAILABLE | {requests.codes.internal_server_error}

    def _refusal(self, status: int, body: Any) -> Refusal | None:
        if not isinstance(body, dict) or not isinstance(body.get("error"), str):
            return None
        said = body.get("error_description")
        text = said if isinstance(said, str) else body["error"]
        if status in self._unavailable:
            return Refusal(text)
        return Refusal(text, kind=_KeycloakRefused, details={"reason": body["error"]})


class _DeviceAnswer(Answered):
    """What a person needs to confirm a login in a browser."""

    device_code: str = Field(repr=False)
    user_code: str = ""
    verification_uri: str = ""
    verification_uri_complete: str | None = None
    interval: float = Field(5.0, ge=0, le=3600)
    expires_in: float = Field(600.0, ge=0, le=86400)


class _KeycloakLogin(Login):
    """What all logins of generation 5 share.

    Args:
        realm: The realm's URL, ``{auth_url}/realms/{realm}``.
    """

    client_id: str

    def __init__(self, realm: HttpSession) -> None:
        self._realm = realm

    def _ask(self, shape: type[T], path: str, form: Mapping[str, str]) -> T:
        return _Keycloak(self._realm).ask(
            shape,
            "POST",
            f"/protocol/openid-connect{path}",
            about=self.identity,
            body=urlencode(form).encode(),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            authenticate=False,
        )

    def _first_tokens(self, form: Mapping[str, str], advice: str) -> Tokens:
        try:
            return self._ask(_TokenAnswer, "/token", form).tokens
        except _KeycloakRefused as refusal:
            raise self._refused(refusal, advice) from None

    def _refused(self, refusal: _KeycloakRefused, advice: str) -> AuthenticationError:
        return AuthenticationError(
            f"{refusal} Keycloak refuses the login. {advice}", status=refusal.status, url=refusal.url
        )

    def refresh(self, tokens: Tokens) -> Tokens | None:
        """Buy a new pair with the refresh token."""
        if tokens.refresh is None:
            return None
        form = {"grant_type": "refresh_token", "refresh_token": tokens.refresh, "client_id": self.client_id}
        try:
            return self._ask(_TokenAnswer, "/token", form).tokens
        except _KeycloakRefused:
            return None


class ServiceAccountLogin(_KeycloakLogin):
    """Service account of generation 5: no browser, no refresh token.

    Args:
        realm: The realm's URL, ``{auth_url}/realms/{realm}``.
        account: Name of the service account's user, or its Keycloak client ``<name>-user-client``.
        secret: The ``client_secret`` that creating the account gave.
    """

    def __init__(self, realm: HttpSession, *, account: str, secret: SecretStr) -> None:
        super().__init__(realm)
        self.client_id = account if account.endswith("-user-client") else f"{account}-user-client"
        self._secret = secret

    @property
    def identity(self) -> str:
        """The account."""
        return f"{self.client_id} at {self._realm.base_url}"

    def log_in(self) -> Tokens:
        """Get a token.

        Raises:
            AuthenticationError: The account or the secret is wrong.
        """
        form = {
            "grant_type": "client_credentials",
            "client_id": self.client_id,
            "client_secret": self._secret.get_secret_value(),
        }
        return self._first_tokens(form, "Check the name and the secret of the service account.")


class KeycloakPasswordLogin(_KeycloakLogin):
    """Password of generation 5, where the realm allows it for its public client.

    Args:
        realm: The realm's URL, ``{auth_url}/realms/{realm}``.
        username: Name of the user.
        password: Password of the user.
        client_id: The realm's public client.
        second_factor: Where codes come from.
    """

    def __init__(
        self,
        realm: HttpSession,
        *,
        username: str,
        password: SecretStr,
        client_id: str = "public_client",
        second_factor: SecondFactor | None = None,
    ) -> None:
        super().__init__(realm)
        self.client_id = client_id
        self._username = username
        self._secret = password
        self._second_factor = second_factor or SecondFactor()

    @property
    def identity(self) -> str:
        """The account."""
        return f"{self._username} at {self._realm.base_url}"

    def log_in(self) -> Tokens:
        """Get a first pair of tokens.

        Raises:
            AuthenticationError: Refused, or the realm does not allow passwords outside of a browser.
        """
        form = {
            "grant_type": "password",
            "client_id": self.client_id,
            "username": self._username,
            "password": self._secret.get_secret_value(),
            "scope": "openid",
        }
        if code := self._second_factor.now():
            form["totp"] = code
        return self._first_tokens(
            form, "Realms usually allow passwords in a browser only: use a service account, or device code."
        )


class DeviceLogin(_KeycloakLogin):
    """Device code of generation 5: a person confirms in a browser, on any machine.

    Args:
        realm: The realm's URL, ``{auth_url}/realms/{realm}``.
        prompt: Shows the person the page to open and the code to enter there.
        client_id: The realm's public client.
    """

    def __init__(
        self, realm: HttpSession, *, prompt: Callable[[str, str], None], client_id: str = "public_client"
    ) -> None:
        super().__init__(realm)
        self.client_id = client_id
        self._prompt = prompt

    @property
    def identity(self) -> str:
        """The realm; who confirms is known afterwards."""
        return f"device at {self._realm.base_url}"

    @property
    def can_log_in_again(self) -> bool:
        """Never: it takes a person."""
        return False

    def log_in(self) -> Tokens:
        """Get a first pair of tokens; waits for the person.

        Raises:
            AuthenticationError: The person refused, or the realm does not allow device codes.
            DeadlineExceeded: The person did not confirm in time.
            PollingFailed: Keycloak could not be asked for long.
        """
        try:
            device = self._ask(_DeviceAnswer, "/auth/device", {"client_id": self.client_id, "scope": "openid"})
        except _KeycloakRefused as refusal:
            raise self._refused(refusal, "The realm may not allow device codes.") from None
        self._prompt(device.verification_uri_complete or device.verification_uri, device.user_code)
        look = self._confirmation(device)
        settings = PollSettings(_TICK_SECONDS, deadline_seconds=device.expires_in)
        return next(
            filter(
                None,
                poll(
                    look,
                    settings,
                    done=lambda tokens: tokens is not None,
                    what=self.identity,
                    take_up_again="Start again.",
                    at_deadline=lambda: "Nobody confirmed the code.",
                ),
            )
        )

    def _confirmation(self, device: _DeviceAnswer) -> Callable[[], Tokens | None]:
        """Make a look at whether the person has confirmed, which asks as often as Keycloak allows."""
        interval = device.interval
        due = time.monotonic() + interval
        form = {
            "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
            "device_code": device.device_code,
            "client_id": self.client_id,
        }

        def look() -> Tokens | None:
            nonlocal interval, due
            if time.monotonic() < due:
                return None
            try:
                return self._ask(_TokenAnswer, "/token", form).tokens
            except _KeycloakRefused as refusal:
                if refusal.reason == "slow_down":
                    interval += _SLOWER_SECONDS
                elif refusal.reason != "authorization_pending":
                    raise self._refused(refusal, "Start again.") from None
            due = time.monotonic() + interval
            return None

        return look


class Authenticator:
    """Keeps the tokens of one client fresh, for all of its threads.

    Args:
        login: How to log in.
    """

    # When and why a server refused a login, by its digest, so that no parallel task makes it two refusals.
    _refusals: ClassVar[dict[bytes, tuple[float, str]]] = {}
    _one_by_one: ClassVar[defaultdict[bytes, threading.Lock]] = defaultdict(threading.Lock)

    def __init__(self, login: Login) -> None:
        self._login = login
        self._lock = threading.Lock()
        self._tokens: Tokens | None = None

    def __repr__(self) -> str:
        return f"Authenticator({self._login.identity})"

    @property
    def identity(self) -> str:
        """The account, for messages."""
        return self._login.identity

    def headers(self) -> dict[str, str]:
        """Give the headers of a request, with a token that is good for a while.

        Raises:
            AuthenticationError: The server refuses the credentials.
        """
        return {"Authorization": f"Bearer {self.access_token()}"}

    def access_token(self) -> str:
        """Give an access token that is good for a while; logs in or renews when needed."""
        with self._lock:
            if self._tokens is None:
                self._tokens = self._log_in()
            elif self._tokens.is_due:
                self._tokens = self._renewed(self._tokens)
            return self._tokens.access

    def renew(self, stale: str) -> None:
        """Get another token, because the server no longer takes this one.

        Args:
            stale: The token that was refused. When another thread has replaced it already, nothing is done.

        Raises:
            AuthenticationError: The server refuses the credentials.
        """
        with self._lock:
            if self._tokens is not None and self._tokens.access == stale:
                self._tokens = self._renewed(self._tokens)

    def log_in_again(self, stale: str) -> None:
        """Log in anew, because the server does not know this token: it was restarted with another secret.

        Args:
            stale: The token that was refused. When another thread has replaced it already, nothing is done.

        Raises:
            AuthenticationError: The server refuses the credentials.
        """
        with self._lock:
            if self._tokens is not None and self._tokens.access == stale:
                self._tokens = self._second_log_in()

    def _renewed(self, tokens: Tokens) -> Tokens:
        return self._login.refresh(tokens) or self._second_log_in()

    def _second_log_in(self) -> Tokens:
        if not self._login.can_log_in_again:
            raise AuthenticationError(
                f"{self.identity}: the login has ended, and a new one needs a person. Log in again; what runs remotely "
                "goes on."
            )
        return self._log_in()

    def _log_in(self) -> Tokens:
        fingerprint = self._login.fingerprint()
        with self._one_by_one[fingerprint]:
            since, reason = self._refusals.get(fingerprint, (-math.inf, ""))
            if time.monotonic() - since < _REFUSAL_SECONDS:
                raise AuthenticationError(reason)
            try:
                return self._login.log_in()
            except (MfaRequired, MfaEnrollmentRequired):
                # Another code may be right.
                raise
            except AuthenticationError as refusal:
                self._refusals[fingerprint] = (time.monotonic(), str(refusal))
                raise


def _totp(secret: SecretStr) -> TOTP:
    text = secret.get_secret_value().replace(" ", "").upper()
    try:
        key = base64.b32decode(text + "=" * (-len(text) % 8))
        return TOTP(key, 6, SHA1(), 30, enforce_key_length=False)  # what RFC 6238 and the server use
    except ValueError:
        raise ConfigurationError("The secret of the second factor is not base32 text.") from None
