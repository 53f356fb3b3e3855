"""Credentials of the Boss."""

from __future__ import annotations

from typing import ClassVar, Literal

from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, HttpUrl, SecretStr

from prefect_biomed.blocks._keys import Keys
from prefect_biomed.blocks._saved import with_saved_secrets
from prefect_biomed.clients.boss import BossClient
from prefect_biomed.clients.http import Timeouts

__all__ = ["BossCredentials"]


class BossCredentials(Keys, CredentialsBlock):
    """An account on a Boss server.

    Attributes:
        host: Host name of the server, with a port where needed.
        token: API token, or where it is: `env:NAME`, `file:PATH`. When empty: `token.json`, then
            `~/.intern/intern.cfg`, then `INTERN_TOKEN`, where it runs. A run of a deployment reads what its worker's
            configuration allows; an empty field is `env:INTERN_TOKEN` there.
        protocol: `https`, or `http` for a test server.
        verify_tls: Whether TLS certificates are verified.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read.
        aws_region: Region of the server's queues and buckets.
        aws_endpoint_url: Where SQS and S3 are asked instead of AWS.

    Example:
        Load saved credentials and list the ingest jobs:

        ```python
        from prefect_biomed.blocks import BossCredentials

        credentials = BossCredentials.load("BLOCK_NAME")
        with credentials.get_client() as client:
            print(client.list_jobs())
        ```
    """

    # An error about one field must not repeat what was typed into it.

    _block_type_name: ClassVar[str] = "Boss Credentials"
    _block_type_slug: ClassVar[str] = "boss-credentials"
    _logo_url: ClassVar[HttpUrl] = HttpUrl("https://bossdb.org/images/logos/bossdb-logo.png")
    _documentation_url: ClassVar[HttpUrl] = HttpUrl("https://docs.theboss.io/docs")
    _description: ClassVar[str] = "An account on a Boss server, such as BossDB."

    # Required, because Prefect takes a reference to a block for a block of which no field is required.
    host: str = Field(
        title="Host",
        description="Host name of the server, such as api.bossdb.io, with a port where needed.",
        pattern=r"^[A-Za-z0-9.\-]+(:\d+)?$",
    )
    token: SecretStr | None = Field(
        default=None,
        title="API token",
        description="The token; when empty it is looked for in token.json, ~/.intern/intern.cfg and INTERN_TOKEN.",
    )
    protocol: Literal["https", "http"] = Field(
        default="https", title="Protocol", description="Take http for a test server only."
    )
    verify_tls: bool = Field(
        default=True, title="Verify TLS", description="Turn this off for a test server with its own certificate only."
    )
    connect_seconds: float = Field(
        default=10.0, gt=0, title="Connect timeout", description="Seconds to wait for a connection."
    )
    read_seconds: float = Field(
        default=90.0, ge=1, title="Read timeout", description="Seconds to wait for an answer of the server."
    )
    aws_region: str = Field(
        default="us-east-1", title="AWS region", description="Region of the server's queues and buckets."
    )
    aws_endpoint_url: str | None = Field(
        default=None,
        title="AWS endpoint",
        description="Where SQS and S3 are asked instead of AWS; for test servers.",
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$",
    )

    def get_client(self) -> BossClient:
        """Make a client of the account. Nothing is sent to the Boss yet.

        Secrets of a saved block are read again, so that a token can be replaced during a run.

        Returns:
            A client; use it as a context manager.

        Raises:
            ConfigurationError: No token was found, or what the block names may not be read here.
        """
        now = with_saved_secrets(self)
        return BossClient(
            now.host,
            now._token(),
            protocol=now.protocol,
            verify_tls=now.verify_tls,
            timeouts=Timeouts(now.connect_seconds, now.read_seconds),
            aws_region=now.aws_region,
            aws_endpoint_url=now.aws_endpoint_url,
            aws_verify_tls=now.verify_tls,
        )

    def _token(self) -> SecretStr | None:
        if self._is_deployed and self.token is None:
            # Who starts a run chooses the host, and so who would get the token of the machine.
            return self.model_copy(update={"token": SecretStr("env:INTERN_TOKEN")}).secret("token")
        return self.secret("token")
