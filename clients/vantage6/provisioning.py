"""Setting up a federation: organizations with key pairs, users, a collaboration, nodes and their configuration files.

Everything is looked for by its name first, so that a second time changes nothing; keys, API keys and passwords that
exist are never replaced. Secrets go into files that only their owner can read, and nowhere else.
"""

from __future__ import annotations

import logging
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.clients.errors import ConfigurationError, NotFoundError, PermissionDeniedError
from prefect_biomed.clients.transfer import atomic_write
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.encryption import PrivateKey
from prefect_biomed.clients.vantage6.errors import KeyMismatch, NameConflict
from prefect_biomed.clients.vantage6.models import Collaboration, Node, Organization, Role, User

__all__ = [
    "NodeDatabase",
    "OrganizationSpec",
    "UserSpec",
    "make_collaboration",
    "make_node",
    "make_organization",
    "make_user",
    "organization_folder",
]

logger = logging.getLogger(__name__)

_SECRET_MODE = 0o600
_FOLDER_MODE = 0o700
_PASSWORD_LENGTH = 24
_SPECIAL = "!#%+-_=.:"


class NodeDatabase(BaseModel):
    """A database in the configuration of a node.

    Attributes:
        label: What tasks call it.
        uri: Path or connection string, as the node sees it.
        type: Kind of the database.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str = "default"
    uri: str
    type: Literal["csv", "parquet", "sql", "excel", "sparql", "omop", "folder", "other"] = "csv"


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


class OrganizationSpec(BaseModel):
    """An organization to be made, with its users and the databases of its node.

    Attributes:
        name: Unique on the server.
        domain: Internet domain.
        country: Country.
        address1: First line of the address.
        address2: Second line of the address.
        zipcode: Postal code.
        users: Its users.
        databases: What its node serves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=128)
    domain: str = ""
    country: str = ""
    address1: str = ""
    address2: str = ""
    zipcode: str = ""
    users: list[UserSpec] = Field(default_factory=list)
    databases: list[NodeDatabase] = Field(default_factory=list)


def organization_folder(folder: Path, organization: str) -> Path:
    """Tell where the files of an organization go.

    Args:
        folder: Folder of the federation.
        organization: Name of the organization.

    Returns:
        A sub-folder whose name has letters, digits, dots, hyphens and underscores only.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", organization).strip("-.") or "organization"
    return folder / name


def make_organization(client: Vantage6Client, spec: OrganizationSpec, folder: Path, *, encrypted: bool) -> Organization:
    """Make an organization with a key pair, or take the one of this name. Safe to repeat.

    A key pair of 4096 bits is made only when neither the server nor the folder has a key. The private key is written to
    ``privkey_<organization>.pem`` before the public one is sent, so that no public key is ever without its private one.

    Args:
        client: An account that may edit organizations.
        spec: The organization.
        folder: Folder of the federation.
        encrypted: Whether it needs a key pair.

    Returns:
        The organization.

    Raises:
        KeyMismatch: The server knows another public key than the one in the folder. Nothing is overwritten.
        PermissionDeniedError: The account may not make organizations.
    """
    if spec.name.strip().isdecimal():
        raise ConfigurationError(f"name is {spec.name!r}; vantage6 refuses names of digits only.")
    found = next((one for one in client.list(Organization, name=spec.name) if one.name == spec.name), None)
    path = private_key_path(folder, spec.name)
    key = PrivateKey.from_file(path) if path.is_file() else None
    if found is not None and found.public_key:
        if key is not None and not key.matches(found.public_key):
            raise KeyMismatch(
                f"The server has another public key of {spec.name!r} than the private key in {path}. Neither was "
                "changed: nodes and members use the server's. Put its private key there, or move the file away."
            )
        if key is None and encrypted:
            logger.warning("The private key of %s is not in %s; its node needs it", spec.name, path.parent)
        return found
    if encrypted and key is None:
        key = PrivateKey.generate()
        _write_secret(path, key.pem)
    public_key = key.public_key.text if key else None
    if found is None:
        fields = spec.model_dump(exclude={"users", "databases"})
        return client.create(Organization, **fields, public_key=public_key)
    if public_key is not None:
        try:
            return client.update(Organization, found.id, public_key=public_key)
        except PermissionDeniedError:
            logger.warning("Only members of %s may upload its public key; its node does so at its start", spec.name)
    return found


def make_collaboration(
    client: Vantage6Client, name: str, organization_ids: Sequence[int], *, encrypted: bool
) -> Collaboration:
    """Make a collaboration, or take the one of this name and add who is missing. Safe to repeat.

    Args:
        client: An account that may edit collaborations.
        name: Unique on the server.
        organization_ids: Its members. Others that are members already stay.
        encrypted: Whether inputs and results are encrypted.

    Returns:
        The collaboration with its members.

    Raises:
        NameConflict: The one of this name is not encrypted, or is, unlike asked for.
        PermissionDeniedError: The account may not make collaborations.
    """
    if not name.strip() or name.isdecimal() or len(name) > 128:
        raise ConfigurationError(f"name is {name!r}; a collaboration needs 1 to 128 characters, not all digits.")
    found = next((one for one in client.list(Collaboration, name=name) if one.name == name), None)
    if found is None:
        ids = list(organization_ids)
        # Generation 3 knows numbers, later ones know true and false.
        flag: bool | int = int(encrypted) if client.version.major == 3 else encrypted
        made = client.create(Collaboration, name=name, organization_ids=ids, encrypted=flag)
        return client.collaboration(made.id)
    if found.encrypted != encrypted:
        raise NameConflict(
            f"Collaboration {name!r} (id {found.id}) exists and is {'' if found.encrypted else 'not '}encrypted. "
            "It was left as it is; choose another name, or the same setting."
        )
    members = {member.id for member in client.collaboration(found.id).organizations}
    for organization_id in organization_ids:
        if organization_id not in members:
            client.add_member(Collaboration, found.id, Organization, organization_id)
    return client.collaboration(found.id)


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
    found = next((one for one in client.list(User, username=spec.username) if one.username == spec.username), None)
    if found is not None:
        if found.organization_id != organization.id:
            raise NameConflict(f"User {spec.username!r} exists in another organization than {organization.name!r}.")
        if spec.service_account and not path.is_file():
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
        _write_secret(path, _yaml({"service_account": spec.username, "client_secret": secret}))
    else:
        password = _stored_password(path) or _new_password()
        _write_secret(path, _yaml({"username": spec.username, "password": password}))
        made = client.create(User, **fields, password=password)
    return _without_secrets(made)


def make_node(
    client: Vantage6Client,
    collaboration: Collaboration,
    organization: Organization,
    folder: Path,
    *,
    databases: Sequence[NodeDatabase] = (),
    auth_url: str | None = None,
    realm: str = "vantage6",
) -> Node:
    """Register the node of an organization, and write its configuration file. Safe to repeat.

    The file ``<collaboration>.yaml`` holds the API key, which the server shows once. When a process is killed between
    the registration and the writing of the file, the next run notices by the mark it left, and asks for a new key.

    Args:
        client: An account that may register nodes.
        collaboration: The collaboration.
        organization: The organization.
        folder: Folder of the federation.
        databases: What the node serves.
        auth_url: Keycloak, for generation 5.
        realm: Its realm.

    Returns:
        The node, without its key.

    Raises:
        PermissionDeniedError: The account may not register nodes.
    """
    path = node_configuration_path(folder, organization.name, collaboration.name)
    mark = path.with_suffix(".registering")
    node = nodes_of(client, collaboration.id).get(organization.id)
    if node is not None and path.is_file():
        mark.unlink(missing_ok=True)
        return node
    if node is not None and not mark.is_file():
        logger.warning(
            "Node %s is registered, but its configuration is not in %s. Its key was left as it is; "
            "recover_node_key gives a new one.",
            node.name,
            path,
        )
        return node
    _write_secret(mark, b"")
    if node is None:
        # Generation 5 makes an account of the name, so it has no blanks.
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{organization.name}-{collaboration.name}")[:120]
        node = client.create(Node, name=name, organization_id=organization.id, collaboration_id=collaboration.id)
        key = node.api_key
    else:
        key = client.recover_node_key(node.id)
    if key is None:
        raise NotFoundError(f"The server gave no API key for node {node.name!r}.", url=client.url)
    encryption: dict[str, Any] = {"enabled": collaboration.encrypted, "private_key": None}
    if collaboration.encrypted:
        encryption["private_key"] = str(private_key_path(folder, organization.name).absolute())
    configuration = _node_configuration(
        client, node.name, key.get_secret_value(), encryption, databases, auth_url=auth_url, realm=realm
    )
    _write_secret(path, _yaml(configuration))
    mark.unlink()
    return node.model_copy(update={"api_key": None})


def private_key_path(folder: Path, organization: str) -> Path:
    """Tell where the private key of an organization is kept.

    Args:
        folder: Folder of the federation.
        organization: Name of the organization.
    """
    own = organization_folder(folder, organization)
    return own / f"privkey_{own.name}.pem"


def node_configuration_path(folder: Path, organization: str, collaboration: str) -> Path:
    """Tell where the configuration of a node is kept.

    Args:
        folder: Folder of the federation.
        organization: Name of the organization.
        collaboration: Name of the collaboration.
    """
    return organization_folder(folder, organization) / f"{organization_folder(folder, collaboration).name}.yaml"


def _node_configuration(
    client: Vantage6Client,
    name: str,
    api_key: str,
    encryption: Mapping[str, Any],
    databases: Sequence[NodeDatabase],
    *,
    auth_url: str | None,
    realm: str,
) -> dict[str, Any]:
    """Write what ``v6 node`` of the server's generation reads."""
    parts = urlsplit(client.url)
    server = f"{parts.scheme}://{parts.hostname}"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if client.version.major == 5:
        files = [
            {"name": one.label, "uri": one.uri, "type": one.type, "volumePath": str(Path(one.uri).parent)}
            for one in databases
        ]
        return {
            "node": {
                "name": name,
                "apiKey": api_key,
                "keycloak": {"url": auth_url, "realm": realm},
                "hq": {"url": server, "port": port, "path": parts.path},
                "encryption": {key: value for key, value in encryption.items() if value is not None},
                "databases": {"fileBased": files},
            }
        }
    common = {
        "api_key": api_key,
        "server_url": server,
        "port": port,
        "api_path": parts.path,
        "encryption": dict(encryption),
        "task_dir": f"tasks-{name}",
        "logging": {"level": "INFO", "file": "node.log", "use_console": True, "backup_count": 5, "max_size": 1024},
    }
    if client.version.major == 3:
        files_by_label = {one.label: one.uri for one in databases}
        return {"application": common | {"databases": files_by_label}, "environments": {}}
    return common | {"databases": [one.model_dump() for one in databases]}


def _role_ids(client: Vantage6Client, names: Sequence[str], organization_id: int) -> list[int]:
    roles = [
        role for role in client.list(Role) if role.organization_id in (None, organization_id) or role.is_default_role
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
    if not path.is_file():
        return None
    stored = yaml.safe_load(path.read_text())
    return str(stored["password"]) if isinstance(stored, dict) and stored.get("password") else None


def _yaml(content: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(content), sort_keys=False).encode()


def _write_secret(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(_FOLDER_MODE)
    with atomic_write(path, mode=_SECRET_MODE) as file:
        file.write(content)
