"""Setting up a federation: organizations with key pairs, a collaboration, nodes and their configuration files.

Everything is looked for by its name first, so that a second time changes nothing; keys and API keys that exist are
never replaced. Secrets go into files that only their owner can read, and nowhere else.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from prefect_biomed.clients.errors import ConfigurationError, NotFoundError, PermissionDeniedError
from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6.accounts import UserSpec
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.configuration_files import (
    NodeDatabase,
    node_configuration,
    server_configuration,
)
from prefect_biomed.clients.vantage6.encryption import PrivateKey
from prefect_biomed.clients.vantage6.errors import KeyMismatch, NameConflict
from prefect_biomed.clients.vantage6.federation_folder import (
    as_yaml,
    is_written,
    node_configuration_path,
    private_key_path,
    remove,
    write_secret,
)
from prefect_biomed.clients.vantage6.models import Collaboration, Node, Organization

__all__ = [
    "OrganizationSpec",
    "make_collaboration",
    "make_node",
    "make_organization",
    "write_server_configuration",
]

logger = logger_of(__name__)


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
    found = next((one for one in client.records(Organization, name=spec.name) if one.name == spec.name), None)
    path = private_key_path(folder, spec.name)
    key = PrivateKey.from_file(path) if is_written(path) else None
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
        write_secret(path, key.pem)
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
    found = next((one for one in client.records(Collaboration, name=name) if one.name == name), None)
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
    if node is not None and is_written(path):
        remove(mark)
        return node
    if node is not None and not is_written(mark):
        logger.warning(
            "Node %s is registered, but its configuration is not in %s. Its key was left as it is; "
            "recover_node_key gives a new one.",
            node.name,
            path,
        )
        return node
    write_secret(mark, b"")
    node, key = _with_new_key(client, collaboration, organization, node)
    configuration = node_configuration(
        client.url,
        client.version.major,
        node.name,
        key.get_secret_value(),
        private_key=private_key_path(folder, organization.name).absolute() if collaboration.encrypted else None,
        databases=databases,
        auth_url=auth_url,
        realm=realm,
    )
    write_secret(path, as_yaml(configuration))
    remove(mark)
    return node.model_copy(update={"api_key": None})


def write_server_configuration(
    client: Vantage6Client, folder: Path, *, auth_url: str | None = None, realm: str = "vantage6"
) -> Path:
    """Write ``server.yaml``: what a server of this generation at this address is started with. Safe to repeat.

    Its secrets are made up, so it is the beginning of another server's configuration, not a copy of the running one's.
    A file that is there stays as it is.

    Args:
        client: The account; only its server counts.
        folder: Folder of the federation.
        auth_url: Keycloak, for generation 5.
        realm: Its realm.

    Returns:
        The file, of mode 0600.

    Raises:
        LocalStorageError: It cannot be written.
    """
    path = folder / "server.yaml"
    if not is_written(path):
        configuration = server_configuration(
            client.url,
            client.version.major,
            lambda: secrets.token_urlsafe(32),
            folder / "server",
            auth_url=auth_url,
            realm=realm,
        )
        # The folder itself is the user's, so its mode stays.
        with atomic_write(path, mode=0o600) as file:
            file.write(as_yaml(configuration))
    return path


def _with_new_key(
    client: Vantage6Client, collaboration: Collaboration, organization: Organization, node: Node | None
) -> tuple[Node, SecretStr]:
    """Register a node, or give a registered one another key."""
    if node is not None:
        return node, client.recover_node_key(node.id)
    # Generation 5 makes an account of the name, so it has no blanks.
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{organization.name}-{collaboration.name}")[:120]
    made = client.create(Node, name=name, organization_id=organization.id, collaboration_id=collaboration.id)
    if made.api_key is None:
        raise NotFoundError(f"The server gave no API key for node {made.name!r}.", url=client.url)
    return made, made.api_key
