"""Credentials of vantage6."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Self

from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, HttpUrl, SecretStr, model_validator

from prefect_biomed.blocks._keys import Keys
from prefect_biomed.blocks._saved import with_saved_secrets
from prefect_biomed.clients.vantage6 import Encryption, PrivateKey, Vantage6Client, reconnect

__all__ = ["Vantage6Credentials"]


class Vantage6Credentials(Keys, CredentialsBlock):
    """An account on a vantage6 server of generation 3, 4 or 5, and the private key of its organization.

    A secret may name where it is: `env:NAME`, `file:PATH`. A run of a deployment reads what its worker's configuration
    allows.

    Attributes:
        url: Address of the server.
        api_path: Path of its API; found out when empty.
        username: User of generations 3 and 4, or of generation 5 where its realm allows passwords.
        password: Password of the user.
        totp_secret: Base32 secret of the second factor.
        service_account: Service account of generation 5.
        client_secret: Secret of the service account.
        auth_url: Address of Keycloak, for generation 5.
        realm: Realm of Keycloak.
        private_key: Private key of the organization as PEM text.
        private_key_path: File that holds the private key, in place of the text.
        encryption: `required` sends nothing to a collaboration of which the server says that it is not encrypted,
            `as the collaboration says` sends in the clear then. Required when empty and there is a private key.
        known_keys: Fingerprints of the public keys of organizations, by name or id. Others become known when they are
            first written to from a machine; a key that has changed is refused until it is confirmed here.
        verify_tls: Whether TLS certificates are verified.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read.

    Example:
        Load saved credentials and list the collaborations:

        ```python
        from prefect_biomed.blocks import Vantage6Credentials
        from prefect_biomed.clients.vantage6 import Collaboration

        credentials = Vantage6Credentials.load("BLOCK_NAME")
        with credentials.get_client() as client:
            print(client.records(Collaboration))
        ```
    """

    # An error about one field must not repeat what was typed into it.

    _block_type_name: ClassVar[str] = "vantage6 Credentials"
    _block_type_slug: ClassVar[str] = "vantage6-credentials"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://github.com/vantage6.png")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://docs.vantage6.ai/")
    _description: ClassVar[str] = "An account on a vantage6 server and the private key of its organization."

    url: str = Field(
        title="URL",
        description="Address of the server, such as https://cotopaxi.vantage6.ai.",
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$",
    )
    api_path: str | None = Field(
        default=None, title="API path", description="Path of the API, such as /api or /hq; found out when empty."
    )
    username: str | None = Field(default=None, title="User name", description="Name of the user.")
    password: SecretStr | None = Field(default=None, title="Password", description="Password of the user.")
    totp_secret: SecretStr | None = Field(
        default=None,
        title="Second factor",
        description="Base32 secret of the second factor, from which codes are computed.",
    )
    service_account: str | None = Field(
        default=None, title="Service account", description="Name of a service account, for vantage6 5."
    )
    client_secret: SecretStr | None = Field(
        default=None, title="Client secret", description="Secret of the service account."
    )
    auth_url: str | None = Field(
        default=None,
        title="Authentication URL",
        description="Address of Keycloak, for vantage6 5.",
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$",
    )
    realm: str = Field(default="vantage6", title="Realm", description="Realm of Keycloak.")
    private_key: SecretStr | None = Field(
        default=None,
        title="Private key",
        description="Private key of the organization as PEM text, for encrypted collaborations.",
    )
    private_key_path: Path | None = Field(
        default=None,
        title="Private key file",
        description="File that holds the private key where the flow runs, in place of the text.",
    )
    encryption: Encryption | None = Field(
        default=None,
        title="Encryption",
        description="Whether arguments may leave in the clear where the server says that a collaboration is not "
        "encrypted; when empty they may not if there is a private key.",
    )
    known_keys: dict[str, Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]] = Field(
        default_factory=dict,
        title="Known public keys",
        description="Fingerprints of the public keys of organizations, by name or id, such as SHA256:…; confirms a key "
        "that has changed.",
    )
    verify_tls: bool = Field(
        default=True, title="Verify TLS", description="Turn this off for a test server with its own certificate only."
    )
    connect_seconds: float = Field(
        default=10.0, gt=0, title="Connect timeout", description="Seconds to wait for a connection."
    )
    read_seconds: float = Field(default=90.0, ge=1, title="Read timeout", description="Seconds to wait for an answer.")

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.private_key is not None and self.private_key_path is not None:
            raise ValueError("give private_key or private_key_path, not both")
        return self

    def get_client(
        self, *, mfa_code: str | int | None = None, device_prompt: Callable[[str, str], None] | None = None
    ) -> Vantage6Client:
        """Find out the generation of the server and make a client for it. Logs in with its first request.

        Secrets of a saved block are read again, so that passwords and keys can be replaced during a run. While they
        are the same, a process goes on with its log-in.

        Args:
            mfa_code: A code of the second factor, for a single login.
            device_prompt: Shows a person a page to open and a code to enter there, to log in to generation 5 without a
                secret in the block.

        Returns:
            A client; use it as a context manager.

        Raises:
            ConfigurationError: No vantage6 server answers at the URL, the fields do not fit its generation, or what
                they name may not be read here.
            InvalidKey: The private key cannot be read.
            NetworkError: The server cannot be reached.
        """
        now = with_saved_secrets(self)
        return reconnect(
            now.url,
            api_path=now.api_path,
            username=now.username,
            password=now.secret("password"),
            totp_secret=now.secret("totp_secret"),
            mfa_code=mfa_code,
            service_account=now.service_account,
            client_secret=now.secret("client_secret"),
            auth_url=now.auth_url,
            realm=now.realm,
            device_prompt=device_prompt,
            private_key=now._read_private_key(),
            encryption=now.encryption,
            known_keys=now.known_keys,
            verify_tls=now.verify_tls,
            connect_seconds=now.connect_seconds,
            read_seconds=now.read_seconds,
        )

    def _read_private_key(self) -> PrivateKey | None:
        if self.private_key_path is not None:
            return PrivateKey.from_file(self.readable(self.private_key_path, "private_key_path"))
        pem = self.secret("private_key")
        return PrivateKey.from_pem(pem.get_secret_value()) if pem is not None else None
