"""Credentials of the Virtual Imaging Platform."""

from __future__ import annotations

from typing import ClassVar

from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, HttpUrl, PrivateAttr, SecretStr

from prefect_biomed.blocks._keys import Keys
from prefect_biomed.blocks._saved import with_saved_secrets
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import GirderStorage, VipClient

__all__ = ["VipCredentials"]


class VipCredentials(Keys, CredentialsBlock):
    """An account on VIP or another CARMIN platform.

    Attributes:
        api_key: The API key, the path of a file that holds it, or the name of an environment variable that holds it,
            also as `file:PATH` and `env:NAME`. A run of a deployment reads what its worker's configuration allows.
        url: Address of the portal.
        verify_tls: Whether TLS certificates are verified.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read.
        parallelism: Number of transfers at once.
        girder_api_key: API key of the Girder that VIP knows as an external storage, given in the same ways; empty when
            Girder is not used.
        girder_url: Address of that Girder.
        girder_storage_id: Identifier of that Girder on VIP.

    Example:
        Load saved credentials and list the pipelines:

        ```python
        from prefect_biomed.blocks import VipCredentials

        credentials = VipCredentials.load("BLOCK_NAME")
        with credentials.get_client() as client:
            print(client.pipelines())
        ```
    """

    # An error about one field must not repeat what was typed into it.

    # As in vip-client, the key may be the path of a file or the name of a variable as it is.
    _official_names: frozenset[str] = PrivateAttr(default=frozenset({"VIP_API_KEY", "GIRDER_API_KEY"}))

    _block_type_name: ClassVar[str] = "VIP Credentials"
    _block_type_slug: ClassVar[str] = "vip-credentials"
    _logo_url: ClassVar[HttpUrl] = HttpUrl("https://vip.creatis.insa-lyon.fr/images/core/vip-logo.png")
    _documentation_url: ClassVar[HttpUrl] = HttpUrl("https://vip.creatis.insa-lyon.fr/documentation/account.html")
    _description: ClassVar[str] = "An account on the Virtual Imaging Platform or another CARMIN platform."

    # Without one required field Prefect cannot tell a reference to a saved block from a block written out.
    api_key: SecretStr = Field(
        title="API key",
        description="The key, the path of a file that holds it, or the name of an environment variable that holds it, "
        "such as VIP_API_KEY.",
    )
    url: str = Field(
        default="https://vip.creatis.insa-lyon.fr",
        title="URL",
        description="Address of the portal, without /rest.",
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$",
    )
    verify_tls: bool = Field(
        default=True, title="Verify TLS", description="Turn this off for a test server with its own certificate only."
    )
    connect_seconds: float = Field(
        default=10.0, gt=0, title="Connect timeout", description="Seconds to wait for a connection."
    )
    read_seconds: float = Field(
        default=90.0, ge=1, title="Read timeout", description="Seconds to wait for an answer; VIP blocks up to 50."
    )
    parallelism: int = Field(
        default=8, ge=1, le=10, title="Parallel transfers", description="Number of transfers at once; VIP bears ten."
    )

    girder_api_key: SecretStr | None = Field(
        default=None,
        title="Girder API key",
        description="To use files on Girder: the key, the path of a file that holds it, or the name of an environment "
        "variable that holds it.",
    )
    girder_url: str = Field(
        default="https://pilot-warehouse.creatis.insa-lyon.fr",
        title="Girder URL",
        description="Address of the Girder, with or without /api/v1.",
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$",
    )
    girder_storage_id: str = Field(
        default="pilotGirder",
        title="Girder on VIP",
        description="Identifier under which VIP knows this Girder as an external storage.",
        pattern=r"^[A-Za-z][0-9A-Za-z_-]*$",
    )

    def get_client(self) -> VipClient:
        """Make a client of the account, and of the account on Girder when there is a key for it.

        Nothing is sent to the platforms yet. Secrets of a saved block are read again, so that a key can be replaced
        during a run.

        Returns:
            A client; use it as a context manager. It reads a key from a file or the environment anew for each request.
        """
        now = with_saved_secrets(self)
        return VipClient(
            now.url,
            lambda: now._key("api_key"),
            verify_tls=now.verify_tls,
            connect_seconds=now.connect_seconds,
            read_seconds=now.read_seconds,
            parallelism=now.parallelism,
            girder=now._girder(),
        )

    def _key(self, field: str) -> str:
        key = self.secret(field)
        if key is None:
            raise ConfigurationError(f"The API key is empty. Give the block's field {field}.")
        return key.get_secret_value()

    def _girder(self) -> GirderStorage | None:
        if self.girder_api_key is None or not self.girder_api_key.get_secret_value():
            return None
        return GirderStorage(
            self.girder_url,
            lambda: self._key("girder_api_key"),
            storage_id=self.girder_storage_id,
            verify_tls=self.verify_tls,
            connect_seconds=self.connect_seconds,
            read_seconds=self.read_seconds,
            parallelism=self.parallelism,
        )
