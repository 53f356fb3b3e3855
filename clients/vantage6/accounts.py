"""Accounts: making users, and the passwords and second factors of generations 3 and 4.

Passwords and secrets that are made up go into files that only their owner can read, and nowhere else.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from prefect_biomed.clients.errors import (
    AuthenticationError,
    ConfigurationError,
    NotFoundError,
    PermissionDeniedError,
)
from prefect_biomed.clients.files import on_disk
from prefect_biomed.clients.rest import Answered
from prefect_biomed.clients.vantage6.answers import Said
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.errors import NameConflict
from prefect_biomed.clients.vantage6.federation_folder import as_yaml, is_written, organization_folder, write_secret
from prefect_biomed.clients.vantage6.models import Organization, Role, User

__all__ = [
    "UserSpec",
    "change_password",
    "make_user",
    "recover_mfa",
    "recover_password",
    "reset_mfa",
    "reset_password",
]

_PASSWORD_LENGTH = 24
_SPECIAL = "!#%+-_=.:"

T = TypeVar("T")


class _Enrollment(Answered):
    qr_uri: SecretStr


class UserSpec(BaseModel):
    """A user to be made. A password is made up and written to a file.

    Attributes:
        username: Starts with a letter; letters, digits, dots, hyphens and underscores.
        roles: Names of roles.
        firstname: Not used by generation 5.
        lastname: Not used by generation 5.
        email: Not used by generation 5.
        service_account: Whether it is one for programs, with a secret in place of a password (generation 5).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    username: str = Field(min_length=3, max_length=128, pattern=r"^[A-Za-z][A-Za-z0-9._-]+$")
    roles: list[str] = Field(default_factory=lambda: ["Researcher"])
    firstname: str = ""
    lastname: str = ""
    email: str = ""
    service_account: bool = False


def make_user(client: Vantage6Client, spec: UserSpec, organization: Organization, folder: Path) -> User:
    """Make a user, or take the one of this name. Safe to repeat.

    The password is written to ``users/<username>.yaml`` before the user is made; the secret of a service account,
    which the server shows once, right after.

    Args:
        client: An account that may make users in the organization.
        spec: The user.
        organization: Its organization.
        folder: Folder of the federation.

    Returns:
        The user, without secrets.

    Raises:
        NameConflict: The user is in another organization, or a service account whose secret is not in the folder.
        NotFoundError: There is no role of a name; the message lists those there are.
        PermissionDeniedError: The account may not make users.
    """
    path = organization_folder(folder, organization.name) / "users" / f"{spec.username}.yaml"
    found = next((one for one in client.records(User, username=spec.username) if one.username == spec.username), None)
    if found is not None:
        if found.organization_id != organization.id:
            raise NameConflict(f"User {spec.username!r} exists in another organization than {organization.name!r}.")
        if spec.service_account and not is_written(path):
            raise NameConflict(
                f"Service account {spec.username!r} exists, but its secret, which the server shows once, is not in "
                f"{path}. Put it there, or delete the account and run this again."
            )
        return _without_secrets(found)
    fields: dict[str, Any] = {
        "username": spec.username,
        "organization_id": organization.id,
        "roles": _role_ids(client, spec.roles, organization.id),
        "rules": [],
    }
    if client.version.major == 5:
        fields["is_service_account"] = spec.service_account
    elif spec.service_account:
        raise ConfigurationError(f"{spec.username!r}: vantage6 {client.version.text} has no service accounts.")
    else:
        fields |= {
            "firstname": spec.firstname or spec.username,
            "lastname": spec.lastname or organization.name,
            "email": spec.email or f"{spec.username}@{organization.domain or 'example.org'}",
        }
    if spec.service_account:
        made = client.create(User, **fields)
        secret = made.client_secret.get_secret_value() if made.client_secret else ""
        write_secret(path, as_yaml({"service_account": spec.username, "client_secret": secret}))
    else:
        password = _stored_password(path) or _new_password()
        write_secret(path, as_yaml({"username": spec.username, "password": password}))
        made = client.create(User, **fields, password=password)
    return _without_secrets(made)


def _role_ids(client: Vantage6Client, names: Sequence[str], organization_id: int) -> list[int]:
    roles = [
        role for role in client.records(Role) if role.organization_id in (None, organization_id) or role.is_default_role
    ]
    by_name = {role.name: role.id for role in roles}
    if missing := [name for name in names if name not in by_name]:
        raise NotFoundError(
            f"There is no role {', '.join(map(repr, missing))}. Known: {', '.join(sorted(by_name))}.", url=client.url
        )
    return [by_name[name] for name in names]


def _without_secrets(user: User) -> User:
    return user.model_copy(update={"otp_secret": None, "client_secret": None})


def _new_password() -> str:
    """Make a password that meets the servers' rule: upper and lower case, digit, special character."""
    letters = string.ascii_letters + string.digits + _SPECIAL
    kinds = [string.ascii_lowercase, string.ascii_uppercase, string.digits, _SPECIAL]
    while True:
        password = "".join(secrets.choice(letters) for _ in range(_PASSWORD_LENGTH))
        if all(set(password) & set(kind) for kind in kinds):
            return password


def _stored_password(path: Path) -> str | None:
    """A password written before a user could be made is used again."""
    with on_disk(path.parent):
        if not path.is_file():
            return None
        text = path.read_bytes()
    try:
        stored = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        stored = None
    if isinstance(stored, dict) and isinstance(stored.get("password"), str) and stored["password"]:
        return str(stored["password"])
    raise ConfigurationError(f"{path} has no password that could be read. Put it right, or move the file away.")


def change_password(client: Vantage6Client, current: SecretStr, new: SecretStr) -> None:
    """Change the account's password (``PATCH password/change``; generation 5 does so in Keycloak).

    Args:
        client: The account.
        current: The password so far. A wrong one counts as a failed login.
        new: 8 to 128 characters with upper and lower case, a digit and a special character.

    Raises:
        AuthenticationError: The current password is wrong.
        RequestRefused: The new one breaks a rule.
    """
    _only_before_5(client, "Passwords")
    body = {"current_password": current.get_secret_value(), "new_password": new.get_secret_value()}
    try:
        client.tell("PATCH", "/password/change", json_body=body, about="the password")
    except PermissionDeniedError as error:
        raise AuthenticationError(str(error), status=error.status, url=error.url) from None


def recover_password(client: Vantage6Client, *, username: str | None = None, email: str | None = None) -> str:
    """Ask for a mail with a token that resets the password (``POST recover/lost``).

    Args:
        client: The account.
        username: The account, or
        email: its address.

    Returns:
        What the server says, the same for known and unknown accounts.
    """
    _only_before_5(client, "Passwords")
    body = {"username": username} if username is not None else {"email": email}
    return _without_login(client, Said, "/recover/lost", body).msg


def reset_password(client: Vantage6Client, token: SecretStr, new: SecretStr) -> None:
    """Set a new password with the token of the mail (``POST recover/reset``).

    Args:
        client: The account.
        token: From the mail.
        new: The new password.

    Raises:
        RequestRefused: The token is old, or the password breaks a rule.
    """
    _only_before_5(client, "Passwords")
    body = {"reset_token": token.get_secret_value(), "password": new.get_secret_value()}
    _without_login(client, Said, "/recover/reset", body)


def recover_mfa(client: Vantage6Client, username: str, password: SecretStr) -> str:
    """Ask for a mail with a token that resets the second factor (``POST recover/2fa/lost``).

    Args:
        client: The account.
        username: The account.
        password: Its password.

    Returns:
        What the server says.
    """
    _only_before_5(client, "Second factors")
    body = {"username": username, "password": password.get_secret_value()}
    return _without_login(client, Said, "/recover/2fa/lost", body).msg


def reset_mfa(client: Vantage6Client, token: SecretStr) -> SecretStr:
    """Set up a new second factor with the token of the mail (``POST recover/2fa/reset``).

    Args:
        client: The account.
        token: From the mail.

    Returns:
        The otpauth URI for an authenticator app.
    """
    _only_before_5(client, "Second factors")
    body = {"reset_token": token.get_secret_value()}
    return _without_login(client, _Enrollment, "/recover/2fa/reset", body).qr_uri


def _only_before_5(client: Vantage6Client, what: str) -> None:
    if client.version.major == 5:
        raise ConfigurationError(f"{what} of vantage6 {client.version.text} are kept by Keycloak; change them there.")


def _without_login(client: Vantage6Client, shape: type[T], path: str, body: Mapping[str, str | None]) -> T:
    return client.ask(shape, "POST", path, json_body=body, about=path, authenticate=False)
