"""Connecting to a server: where its API is, which generation it speaks, and how to log in there."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from prefect_biomed.clients.errors import ConfigurationError, PlatformError, is_transient
from prefect_biomed.clients.http import HttpSession, Timeouts
from prefect_biomed.clients.rest import Answered
from prefect_biomed.clients.vantage6.answers import Vantage6Rest
from prefect_biomed.clients.vantage6.authentication import (
    DeviceLogin,
    KeycloakPasswordLogin,
    Login,
    PasswordLogin,
    SecondFactor,
    ServiceAccountLogin,
)
from prefect_biomed.clients.vantage6.client import Encryption, Vantage6Client
from prefect_biomed.clients.vantage6.encryption import PrivateKey
from prefect_biomed.clients.vantage6.models import Version

__all__ = ["connect", "forget_connections", "reconnect"]

# In this order, because the first is the default of generations 3 and 4 and the second that of 5.
_API_PATHS = ("/api", "/hq", "")


# So long a process goes on with what a server has told of itself and of an account.
_FRESH_SECONDS = 600.0
_connected: dict[bytes, tuple[float, Vantage6Client]] = {}
_connecting = threading.Lock()


class _VersionAnswer(Answered):
    version: str


def reconnect(url: str, **settings: Any) -> Vantage6Client:
    """Make a client as `connect` does, and go on with the log-in of an earlier one of this process.

    For ten minutes the generation of the server is not asked again, nor who the account is, and the account does not
    log in again. A log-in that has ended meanwhile is renewed as ever. With another URL, account, secret or key, and
    with what a person has to give for each log-in, nothing is shared. Safe to repeat, and to use by many threads.

    Args:
        url: As for `connect`.
        **settings: As for `connect`.

    Returns:
        A client.

    Raises:
        BiomedError: As for `connect`.
    """
    if settings.get("mfa_code") is not None or settings.get("device_prompt") is not None:
        return connect(url, **settings)
    digest = _digest(url, settings)
    with _connecting:
        for other, (since, _) in list(_connected.items()):
            if time.monotonic() - since > _FRESH_SECONDS:
                del _connected[other]
        known = _connected.get(digest)
    if known is None:
        known = time.monotonic(), connect(url, **settings)
        with _connecting:
            known = _connected.setdefault(digest, known)
    return known[1].again()


def forget_connections() -> None:
    """Let `reconnect` begin anew, as when another server has come to the same address."""
    with _connecting:
        _connected.clear()


def _digest(url: str, settings: Mapping[str, Any]) -> bytes:
    """Name settings without keeping them: equal ones are equal in all, secrets and keys included."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, SecretStr):
            plain[name] = value.get_secret_value()
        elif isinstance(value, PrivateKey):
            plain[name] = value.public_key.fingerprint
        else:
            plain[name] = value
    return hashlib.sha256(json.dumps([url, plain], sort_keys=True).encode()).digest()


def connect(
    url: str,
    *,
    api_path: str | None = None,
    username: str | None = None,
    password: SecretStr | None = None,
    totp_secret: SecretStr | None = None,
    mfa_code: str | int | None = None,
    service_account: str | None = None,
    client_secret: SecretStr | None = None,
    auth_url: str | None = None,
    realm: str = "vantage6",
    device_prompt: Callable[[str, str], None] | None = None,
    private_key: PrivateKey | None = None,
    verify_tls: bool = True,
    connect_seconds: float = 10.0,
    read_seconds: float = 90.0,
    settle_seconds: float | None = None,
    encryption: Encryption | None = None,
    known_keys: Mapping[str, str] | None = None,
) -> Vantage6Client:
    """Find out which generation a server speaks and make a client for it. Nobody is logged in yet.

    Asks ``GET {api}/version``, which needs no login. Safe to repeat.

    Args:
        url: The server: scheme, host, port, and the API path where that is known.
        api_path: Path of the API, ``""`` for none; when None, the path in the URL and then ``/api``, ``/hq`` and none
            are tried.
        username: User, for a password.
        password: Password of the user.
        totp_secret: Base32 secret of the second factor; codes are computed from it.
        mfa_code: One code of the second factor, good for one login.
        service_account: Service account of generation 5.
        client_secret: Secret of the service account.
        auth_url: Keycloak of generation 5.
        realm: Realm of Keycloak.
        device_prompt: Shows a person the page to open and the code to enter there; used for generation 5 when neither a
            service account nor a password is given.
        private_key: The organization's private key; needed in encrypted collaborations.
        verify_tls: False accepts any certificate.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read.
        settle_seconds: Longest time after which a request of ours may still take effect although its answer was lost;
            a minute more than `read_seconds` when None.
        encryption: ``required`` sends nothing to a collaboration of which the server says that it is not encrypted,
            ``as the collaboration says`` sends in the clear then. Required when None and a private key is given.
        known_keys: Fingerprints of public keys that a person vouches for, by name or id of the organization; they come
            before those that were seen at first use.

    Returns:
        A client that logs in with its first request.

    Raises:
        ConfigurationError: No server was found, its generation is unknown, or the settings do not fit it.
        NetworkError: The server cannot be reached.
        PlatformError: What answers is out of order.
    """
    settings: dict[str, Any] = {"timeouts": Timeouts(connect_seconds, read_seconds), "verify_tls": verify_tls}
    base_url, version = _find_api(url, api_path, settings)
    second_factor = SecondFactor(totp_secret, mfa_code)
    login: Login | None = None
    if version.major < 5:
        if username is not None and password is not None:
            anonymous = HttpSession(base_url, **settings)
            login = PasswordLogin(anonymous, username=username, password=password, second_factor=second_factor)
    elif auth_url is not None:
        keycloak = HttpSession(f"{auth_url.rstrip('/')}/realms/{realm}", **settings)
        if service_account is not None and client_secret is not None:
            login = ServiceAccountLogin(keycloak, account=service_account, secret=client_secret)
        elif username is not None and password is not None:
            login = KeycloakPasswordLogin(keycloak, username=username, password=password, second_factor=second_factor)
        elif device_prompt is not None:
            login = DeviceLogin(keycloak, prompt=device_prompt)
    if login is None:
        raise ConfigurationError(f"{url} is vantage6 {version.text}, {_what_is_missing(version, auth_url)}")
    return Vantage6Client(
        base_url,
        version,
        login,
        private_key=private_key,
        settle_seconds=settle_seconds,
        encryption=encryption,
        known_keys=known_keys,
        **settings,
    )


def _what_is_missing(version: Version, auth_url: str | None) -> str:
    if version.major < 5:
        return "which needs username and password."
    if auth_url is None:
        return "which logs in at Keycloak: give auth_url."
    return "which needs a service account and its secret; or log in interactively."


def _find_api(url: str, api_path: str | None, settings: Mapping[str, Any]) -> tuple[str, Version]:
    url = url.rstrip("/")
    if api_path is not None:
        candidates = [f"{url}/{api_path.strip('/')}".rstrip("/")]
    elif urlsplit(url).path:
        candidates = [url + path for path in ("", *_API_PATHS[:2])]
    else:
        candidates = [url + path for path in _API_PATHS]
    seen: list[str] = []
    for candidate in candidates:
        with HttpSession(candidate, **settings) as session:
            try:
                answer = Vantage6Rest(session).ask(_VersionAnswer, "GET", "/version", authenticate=False)
            except PlatformError as error:
                # A server that breaks down is there: nothing is wrong with the URL.
                if is_transient(error) or (error.status or 0) >= 500:
                    raise
                seen.append(f"  - {error}")
                continue
        return candidate, _read_version(url, answer.version)
    raise ConfigurationError(
        f"No vantage6 server answers at {url}. Check the URL, the API path, and what lies between. Seen:\n"
        + "\n".join(seen)
    )


def _read_version(url: str, text: str) -> Version:
    numbers = [int(number) for number in re.findall(r"\d{1,4}", text, re.ASCII)]
    major, minor = [*numbers, 0, 0][:2]
    if major not in (3, 4, 5):
        raise ConfigurationError(f"{url} is vantage6 {text[:100]}; generations 3, 4 and 5 are supported.")
    return Version(text=text, major=major, minor=minor)
