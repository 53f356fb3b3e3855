"""Credentials of the Virtual Imaging Platform."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr

from prefect_biomed.blocks._saved import with_saved_secrets
from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vip import VipClient

__all__ = ["VipCredentials"]

_MAX_KEY_CHARACTERS = 10_000


class VipCredentials(Block):
    """An account on VIP or another CARMIN platform.

    Attributes:
        api_key: The API key, the path of a file that holds it, or the name of an environment variable that holds it.
        url: Address of the portal.
        verify_tls: Whether TLS certificates are verified.
        connect_seconds: Limit for making a connection.
        read_seconds: Limit for each read.
        parallelism: Number of transfers at once.

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
    model_config = ConfigDict(hide_input_in_errors=True)

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

    def get_client(self) -> VipClient:
        """Make a client of the account. Nothing is sent to the platform yet.

        Secrets of a saved block are read again, so that a key can be replaced during a run.

        Returns:
            A client; use it as a context manager. It reads a key from a file or the environment anew for each request.
        """
        now = with_saved_secrets(self)
        return VipClient(
            now.url,
            now._read_key,
            verify_tls=now.verify_tls,
            connect_seconds=now.connect_seconds,
            read_seconds=now.read_seconds,
            parallelism=now.parallelism,
        )

    def _read_key(self) -> str:
        given = self.api_key.get_secret_value()
        if _names_a_file(given):
            with Path(given).open() as file:
                key = file.read(_MAX_KEY_CHARACTERS)
        elif given in os.environ:
            key = os.environ[given]
        elif given == "VIP_API_KEY":
            raise ConfigurationError(
                "The environment variable VIP_API_KEY is not set where this runs. Set it, or put the key into the "
                "block."
            )
        else:
            key = given
        key = key.strip()
        if not key:
            raise ConfigurationError("The API key is empty. Look at what the block's field api_key names.")
        return key


def _names_a_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False
