"""Credentials of buckets and web servers."""

from __future__ import annotations

from typing import ClassVar

from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, HttpUrl, SecretStr, ValidationError

from prefect_biomed.blocks._keys import Keys
from prefect_biomed.blocks._saved import with_saved_secrets
from prefect_biomed.clients.boss.storage import StorageOptions
from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["StorageCredentials"]


class StorageCredentials(Keys, CredentialsBlock):
    """Keys of a bucket of S3 or GCS, or of a web server, in which sources or volumes lie.

    Without keys those of the machine are used, or nobody's. Each secret is the secret itself, or where it is:
    `env:NAME`, `file:PATH`.

    Attributes:
        location: Where they belong; they are used for what lies there, and for nothing else.
        anonymous: Nobody's keys are used, as public buckets want it.
        endpoint_url: Address of a server like S3.
        region: Region of S3.
        access_key_id: Key of S3.
        secret_access_key: Its secret.
        session_token: For keys that end.
        service_account: JSON of a service account of Google, such as `file:PATH`.
        authorization: Header of that name, such as `Bearer …`, for `http` and `https`.

    Example:
        ```python
        from prefect_biomed.blocks import StorageCredentials

        StorageCredentials(location="s3://public-data", anonymous=True).save("public-data")
        ```
    """

    # An error about one field must not repeat what was typed into it.

    _block_type_name: ClassVar[str] = "Storage Credentials"
    _block_type_slug: ClassVar[str] = "storage-credentials"
    _logo_url: ClassVar[HttpUrl] = HttpUrl("https://bossdb.org/images/logos/bossdb-logo.png")
    _description: ClassVar[str] = "Keys of a bucket of S3 or GCS, or of a web server, for sources and volumes."

    location: str = Field(
        title="Location",
        description="Where the keys belong: s3://bucket, gs://bucket/folder, https://host/folder.",
        pattern=r"^(s3|gs|https?)://[^/@?#\s]+(/[^@?#\s]*)?$",
    )
    anonymous: bool = Field(default=False, title="Anonymous", description="Use nobody's keys, for public data.")
    endpoint_url: str | None = Field(
        default=None,
        title="Endpoint of S3",
        description="Address of a server like S3; Amazon's when empty.",
        pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$",
    )
    region: str | None = Field(default=None, title="Region of S3", description="Such as us-east-1.")
    access_key_id: SecretStr | None = Field(default=None, title="Access key ID", description="Key of S3.")
    secret_access_key: SecretStr | None = Field(default=None, title="Secret access key", description="Its secret.")
    session_token: SecretStr | None = Field(default=None, title="Session token", description="For keys that end.")
    service_account: SecretStr | None = Field(
        default=None, title="Service account of Google", description="Its JSON, or file:PATH, for gs://."
    )
    authorization: SecretStr | None = Field(
        default=None, title="Authorization", description="Header of that name, for http:// and https://."
    )

    def get_client(self) -> StorageOptions:
        """Make what sources and volumes are opened with. Nothing is sent yet.

        Secrets of a saved block are read again, so that a key can be replaced during a run.

        Returns:
            Keys and address.

        Raises:
            ConfigurationError: What the block names is not there, may not be read here, or is of no use for its place.
        """
        now = with_saved_secrets(self)
        secrets = ("access_key_id", "secret_access_key", "session_token", "service_account", "authorization")
        try:
            return StorageOptions(
                location=now.location,
                anonymous=now.anonymous,
                endpoint_url=now.endpoint_url,
                region=now.region,
                **{name: now.secret(name) for name in secrets},
            )
        except ValidationError as error:  # it shows no values
            raise ConfigurationError(
                f"The storage credentials of {now.location}: {error.errors()[0]['msg']}."
            ) from None
