"""Logging in to vantage6, and staying logged in.

Generations 3 and 4 log in with a password (and a second factor) and get an access token of hours; generation 5 asks
Keycloak and gets one of minutes. An `Authenticator` keeps the token, renews it before it ends, and lets only one of
many threads do so. A refusal is remembered for a while, because five of them block an account.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlencode

from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from pydantic import SecretStr

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    ConfigurationError,
    DeadlineExceeded,
    ServerUnavailable,
    UnexpectedResponse,
)
from prefect_biomed.clients.http import HttpSession
from prefect_biomed.clients.polling import sleep
from prefect_biomed.clients.vantage6.errors import MfaEnrollmentRequired, MfaRequired

__all__ = [
    "Authenticator",
    "DeviceLogin",
    "KeycloakPasswordLogin",
    "Login",
    "PasswordLogin",
    "SecondFactor",
    "ServiceAccountLogin",
    "Tokens",
]

logger = logging.getLogger(__name__)

# A token is renewed when this part of its life is over.
_RENEW_AFTER = 0.8
# The server forgets failed logins after this time.
_REFUSAL_SECONDS = 15 * 60
_REFUSED_HTTP = frozenset({400, 401, 403})


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
        begin = claims.get("iat", claims.get("nbf", time.time()))
        # Both times are the server's, so its clock may differ from ours.
        life = float(claims["exp"]) - float(begin) if "exp" in claims else math.inf
        # They are cut to whole seconds, so the token may end up to a second earlier.
        life = max(life - 1.0, life / 2.0)
        return cls(access=access, refresh=refresh, life_seconds=life)

    @property
    def is_due(self) -> bool:
        """Whether it is time to renew."""
        return time.monotonic() - self.received >= _RENEW_AFTER * self.life_seconds


def claims_of(token: str) -> dict[str, Any]:
    """Read the claims of a JSON web token without checking its signature.

    Args:
        token: Three base64url parts joined by dots.

    Raises:
        UnexpectedResponse: The server gave something else.
    """
    try:
        part = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (IndexError, ValueError):
        raise UnexpectedResponse("The server gave an access token that is no JSON web token.") from None
    return claims if isinstance(claims, dict) else {}


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
        response, answer = self._session.json("POST", "/token/user", json_body=body, authenticate=False)
        status, url = response.status_code, self._session.base_url
        message = str(answer.get("msg", "")) if isinstance(answer, dict) else ""
        if status in _REFUSED_HTTP and "two-factor" in message:
            raise MfaRequired(f"{self.identity}: the code of the second factor is wrong.", status=status, url=url)
        if status in _REFUSED_HTTP:
            raise AuthenticationError(
                f"{self.identity}: the server refuses the login ({message or status}): wrong password, unknown user, "
                "or an account blocked after five failures. It is not tried again.",
                status=status,
                url=url,
            )
        if status in {500, 502, 503, 504, 429}:
            raise ServerUnavailable(f"{url}: the server cannot log anybody in (HTTP {status}).", status=status, url=url)
        # Status 200 does not mean that one is logged in.
        if not isinstance(answer, dict) or "access_token" not in answer:
            raise self._not_logged_in(answer, message, status)
        return Tokens.from_jwt(answer["access_token"], answer.get("refresh_token"))

    def _not_logged_in(self, answer: Any, message: str, status: int) -> BiomedError:
        url = self._session.base_url
        if isinstance(answer, dict) and "qr_uri" in answer:
            return MfaEnrollmentRequired(
                f"{self.identity}: the server asks this account to set up a second factor and has just stored a secret "
                "for it, so the next login needs a code. The secret is in `otpauth_uri` of this error: put it into an "
                "authenticator app and into the block.",
                otpauth_uri=str(answer["qr_uri"]),
                status=status,
                url=url,
            )
        if "two-factor" in message:
            return MfaRequired(
                f"{self.identity}: this account has a second factor. Give its secret in the block, or a code.",
                status=status,
                url=url,
            )
        return UnexpectedResponse(f"{url}: the login gave no token ({message or status}).", status=status, url=url)

    def refresh(self, tokens: Tokens) -> Tokens | None:
        """Buy a new pair with the refresh token."""
        if tokens.refresh is None:
            return None
        response, answer = self._session.json(
            "POST",
            "/token/refresh",
            headers={"Authorization": f"Bearer {tokens.refresh}"},
            authenticate=False,
        )
        if response.status_code in {401, 422}:
            return None
        return _tokens_or_fault(self._session, response.status_code, answer)


class _KeycloakLogin(Login):
    """What all logins of generation 5 share.

    Args:
        realm: The realm's URL, ``{auth_url}/realms/{realm}``.
    """

    client_id: str

    def __init__(self, realm: HttpSession) -> None:
        self._realm = realm

    def _post(self, path: str, form: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        response, answer = self._realm.json(
            "POST",
            path,
            body=urlencode(form).encode(),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            authenticate=False,
        )
        status = response.status_code
        if status in {429, 500, 502, 503, 504}:
            url = self._realm.base_url
            raise ServerUnavailable(f"{url}: Keycloak is out of order (HTTP {status}).", status=status, url=url)
        return status, answer if isinstance(answer, dict) else {}

    def _token(self, form: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        return self._post("/protocol/openid-connect/token", form)

    def _refused(self, status: int, answer: Mapping[str, Any], advice: str) -> AuthenticationError:
        reason = answer.get("error_description") or answer.get("error") or f"HTTP {status}"
        return AuthenticationError(
            f"{self.identity}: Keycloak refuses the login ({reason}). {advice}", status=status, url=self._realm.base_url
        )

    def refresh(self, tokens: Tokens) -> Tokens | None:
        """Buy a new pair with the refresh token."""
        if tokens.refresh is None:
            return None
        form = {"grant_type": "refresh_token", "refresh_token": tokens.refresh, "client_id": self.client_id}
        status, answer = self._token(form)
        if status in _REFUSED_HTTP:
            return None
        return _tokens_or_fault(self._realm, status, answer)


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
        status, answer = self._token(form)
        if status in _REFUSED_HTTP:
            raise self._refused(status, answer, "Check the name and the secret of the service account.")
        return _tokens_or_fault(self._realm, status, answer)


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
        status, answer = self._token(form)
        if status in _REFUSED_HTTP:
            raise self._refused(
                status,
                answer,
                "Realms usually allow passwords in a browser only: use a service account, or device code.",
            )
        return _tokens_or_fault(self._realm, status, answer)


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
        """
        path = "/protocol/openid-connect/auth/device"
        status, device = self._post(path, {"client_id": self.client_id, "scope": "openid"})
        if status != 200 or "device_code" not in device:
            raise self._refused(status, device, "The realm may not allow device codes.")
        self._prompt(
            str(device.get("verification_uri_complete") or device.get("verification_uri", "")),
            str(device.get("user_code", "")),
        )
        interval = float(device.get("interval", 5))
        end = time.monotonic() + float(device.get("expires_in", 600))
        form = {
            "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
            "device_code": str(device["device_code"]),
            "client_id": self.client_id,
        }
        while time.monotonic() < end:
            sleep(interval)
            status, answer = self._token(form)
            if status == 200:
                return _tokens_or_fault(self._realm, status, answer)
            if answer.get("error") == "slow_down":
                interval += 5
            elif answer.get("error") == "expired_token":
                break
            elif answer.get("error") != "authorization_pending":
                raise self._refused(status, answer, "Start again.")
        raise DeadlineExceeded(f"{self.identity}: nobody confirmed the code in time. Start again.")


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


def _tokens_or_fault(session: HttpSession, status: int, answer: Any) -> Tokens:
    if isinstance(answer, dict) and isinstance(answer.get("access_token"), str):
        if "expires_in" in answer:
            return Tokens(answer["access_token"], answer.get("refresh_token"), float(answer["expires_in"]))
        return Tokens.from_jwt(answer["access_token"], answer.get("refresh_token"))
    url = session.base_url
    if status >= 500 or status == 429:
        raise ServerUnavailable(f"{url}: no token for the moment (HTTP {status}).", status=status, url=url)
    raise UnexpectedResponse(f"{url}: no token in the answer (HTTP {status}).", status=status, url=url)
