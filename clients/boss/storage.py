"""How buckets and web servers are opened that hold sources or volumes: whose keys, and at which address.

Keys come from here or from the machine, never from a configuration, which the server stores and others read. S3 and GCS
are read with obstore, what TensorStore opens with TensorStore, everything else with fsspec.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, SecretStr, field_validator, model_validator

from prefect_biomed.clients.errors import ConfigurationError

if TYPE_CHECKING:
    from zarr.storage import ObjectStore

__all__ = ["StorageOptions", "bucket_store", "driver_options", "filesystem", "key_value_store"]

_BUCKETS = ("s3", "gs")
_SCHEMES = (*_BUCKETS, "http", "https")
_GOOGLE = "https://storage.googleapis.com"
_GOOGLE_ADDRESS = "TENSORSTORE_GCS_HTTP_URL"
_S3_KEYS = ("access_key_id", "secret_access_key")
# What is of use where; the rest is refused rather than left aside.
_OF_USE: dict[str, tuple[str, ...]] = {
    "s3": ("endpoint_url", "region", *_S3_KEYS, "session_token"),
    "gs": ("endpoint_url", "service_account"),
    "http": ("authorization",),
    "https": ("authorization",),
}


class StorageOptions(BaseModel):
    """Keys of one place, and how it is reached.

    Attributes:
        location: Where they belong: `s3://bucket`, `gs://bucket/folder`, `https://host/folder`. They are used for what
            lies there, and for nothing else.
        anonymous: Nobody's keys are used, not even those of the machine.
        endpoint_url: Address of a server like S3, or like GCS; that of Amazon or Google when None.
        region: Region of S3.
        access_key_id: Key of S3.
        secret_access_key: Its secret.
        session_token: For keys that end.
        service_account: JSON of a service account of Google.
        authorization: Header of that name, for `http` and `https`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    location: str
    anonymous: bool = False
    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None
    service_account: SecretStr | None = None
    authorization: SecretStr | None = None

    @field_validator("location")
    @classmethod
    def _is_a_place(cls, location: str) -> str:
        scheme, _, rest = location.partition("://")
        if scheme not in _SCHEMES or not rest.strip("/"):
            raise ValueError("a location begins with s3://bucket, gs://bucket, http://host or https://host")
        if "@" in rest or "?" in rest or "#" in rest:
            raise ValueError("a location has no user and no query, which might be a secret")
        return location.rstrip("/")

    @model_validator(mode="after")
    def _is_of_use(self) -> Self:
        scheme = self.location.partition("://")[0]
        given = {name for name, value in self if value and name not in ("location", "anonymous")}
        if useless := sorted(given.difference(_OF_USE[scheme])):
            taken = ", ".join(_OF_USE[scheme])
            raise ValueError(f"{', '.join(useless)}: of no use for {scheme}://, which takes {taken}")
        if given.intersection((*_S3_KEYS, "session_token")) and not given.issuperset(_S3_KEYS):
            raise ValueError("a key of S3 is given in part: access_key_id and secret_access_key belong together")
        return self

    @classmethod
    def of(cls, url: str, parameters: Mapping[str, Any]) -> StorageOptions:
        """Tell how a source is opened.

        Args:
            url: Where it is.
            parameters: Of its plugin. `storage` are options given apart from the configuration; where they are given,
                `storage_options` of the configuration (`anon`, `endpoint_url`, `region`) are not looked at, so that
                whoever writes it cannot send a key elsewhere.

        Raises:
            ConfigurationError: The options are for another place, or are none of those for buckets.
        """
        storage = parameters.get("storage")
        if isinstance(storage, StorageOptions):
            storage.check(url)
            return storage
        options: Mapping[str, Any] = parameters.get("storage_options") or {}
        given = {**options, **(options.get("client_kwargs") or {})}
        given.pop("client_kwargs", None)
        given["region"] = given.pop("region_name", None) or given.get("region")
        unknown = sorted(given.keys() - {"anon", "endpoint_url", "region"})
        if unknown:
            raise ConfigurationError(
                f"storage_options of {url}: {', '.join(unknown)} is none of anon, endpoint_url, region."
            )
        endpoint, region = given.get("endpoint_url"), given["region"]
        scheme = url.partition("://")[0]
        told = {"endpoint_url": endpoint, "region": region}
        if useless := [name for name, value in told.items() if value and name not in _OF_USE.get(scheme, ())]:
            raise ConfigurationError(f"{url}: {' and '.join(useless)} is of no use for {scheme}://. Leave it out.")
        return cls.model_construct(
            location=url, anonymous=bool(given.get("anon")), endpoint_url=endpoint, region=region
        )

    def check(self, url: str) -> None:
        """Check that something lies where the keys belong.

        Args:
            url: Where it is.

        Raises:
            ConfigurationError: It lies elsewhere.
        """
        if not f"{url.rstrip('/')}/".startswith(f"{self.location}/") or ".." in url.split("/"):
            raise ConfigurationError(
                f"The storage credentials are those of {self.location}, and {url} does not lie there; nothing was "
                "sent. Give the credentials of that place, or none."
            )

    def as_order(self) -> dict[str, Any]:
        """Everything, keys in clear, for the standard input of a process."""
        return {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in self}

    def tensorstore_credentials(self) -> dict[str, str]:
        """The part of a specification of S3 that says whose keys are used."""
        if self.anonymous:
            return {"type": "anonymous"}
        if self.access_key_id is None or self.secret_access_key is None:
            return {}
        lines = [
            "[default]",
            f"aws_access_key_id={self.access_key_id.get_secret_value()}",
            f"aws_secret_access_key={self.secret_access_key.get_secret_value()}",
        ]
        if self.session_token:
            lines.append(f"aws_session_token={self.session_token.get_secret_value()}")
        path = _file_in_memory("\n".join(lines) + "\n")
        return {"type": "profile", "profile": "default", "config_file": path, "credentials_file": path}

    def obstore_arguments(self, scheme: str) -> dict[str, Any]:
        """Arguments of a store of obstore.

        Args:
            scheme: `s3` or `gs`.
        """
        config: dict[str, Any] = {"skip_signature": True} if self.anonymous else {}
        if scheme == "gs":
            if self.service_account and not self.anonymous:
                config["service_account_key"] = self.service_account.get_secret_value()
            if not self.endpoint_url:
                return {"config": config}
            config["base_url"] = self.endpoint_url.rstrip("/")
            return {"config": config, "client_options": {"allow_http": self.endpoint_url.startswith("http://")}}
        if not self.anonymous:
            for name in ("access_key_id", "secret_access_key", "session_token"):
                secret: SecretStr | None = getattr(self, name)
                if secret:
                    config[name] = secret.get_secret_value()
        if self.region:
            config["region"] = self.region
        if not self.endpoint_url:
            return {"config": config}
        config = {"region": "us-east-1", "endpoint": self.endpoint_url} | config
        return {"config": config, "client_options": {"allow_http": self.endpoint_url.startswith("http://")}}


def bucket_store(url: str, parameters: Mapping[str, Any]) -> ObjectStore[Any]:
    """Make the store of a folder in a bucket, for Zarr.

    Args:
        url: `s3://bucket/folder` or `gs://bucket/folder`.
        parameters: As for `StorageOptions.of`.

    Raises:
        ConfigurationError: obstore is not installed, or the options are wrong.
    """
    from zarr.storage import ObjectStore

    try:
        from obstore.store import GCSStore, S3Store
    except ImportError:
        raise _missing(url) from None
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    arguments = StorageOptions.of(url, parameters).obstore_arguments(scheme)
    kind: Any = GCSStore if scheme == "gs" else S3Store
    return ObjectStore(kind(bucket, prefix=prefix or None, **arguments), read_only=True)


def filesystem(url: str, parameters: Mapping[str, Any]) -> tuple[Any, str]:
    """Open a file system of fsspec.

    Args:
        url: A URL, or a path on the local disk.
        parameters: As for `StorageOptions.of`.

    Returns:
        The file system, and the path in it.

    Raises:
        ConfigurationError: obstore is not installed, or the options are wrong.
    """
    import fsspec

    scheme, has_scheme, rest = url.partition("://")
    if scheme in _BUCKETS and has_scheme:
        try:
            from obstore.fsspec import FsspecStore
        except ImportError:
            raise _missing(url) from None
        options = StorageOptions.of(url, parameters)
        kind: Any = FsspecStore
        return kind(scheme, **options.obstore_arguments(scheme)), rest
    found: tuple[Any, str] = fsspec.core.url_to_fs(url, **driver_options(url, parameters))
    return found


def driver_options(url: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what a driver of fsspec is given for what is in no bucket.

    Args:
        url: A URL, or a path on the local disk.
        parameters: As for `StorageOptions.of`; without `storage`, the driver gets `storage_options` as they are.

    Raises:
        ConfigurationError: The keys are those of another place.
    """
    storage = parameters.get("storage")
    if not isinstance(storage, StorageOptions) or "://" not in url:
        return dict(parameters.get("storage_options") or {})
    storage.check(url)
    secret = None if storage.anonymous else storage.authorization
    return {"client_kwargs": {"headers": {"Authorization": secret.get_secret_value()}}} if secret else {}


def key_value_store(url: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Tell TensorStore where a folder is, and whose keys open it.

    Args:
        url: A URL, or a path on the local disk.
        parameters: As for `StorageOptions.of`.

    Returns:
        Specification of a key-value store.

    Raises:
        ConfigurationError: TensorStore cannot be given these keys, or the options are wrong.
    """
    scheme, has_scheme, rest = url.partition("://")
    if not has_scheme:
        return {"driver": "file", "path": f"{Path(url).absolute()}/"}
    first, _, path = rest.rstrip("/").partition("/")
    folder = f"{path}/" if path else ""
    options = StorageOptions.of(url, parameters) if scheme in _SCHEMES else None
    if options is None:
        raise ConfigurationError(f"{url}: is none of {', '.join(f'{one}://' for one in _SCHEMES)} and no folder.")
    if scheme == "gs":
        if options.service_account:
            raise ConfigurationError(
                f"{url}: TensorStore takes keys of Google from GOOGLE_APPLICATION_CREDENTIALS of the worker only. Set "
                "it there, or give HMAC keys of the bucket with s3:// and the endpoint https://storage.googleapis.com."
            )
        endpoint = options.endpoint_url
        if options.anonymous:  # its driver for GCS takes the keys of the machine whenever there are any
            return {"driver": "http", "base_url": (endpoint or _GOOGLE).rstrip("/"), "path": f"/{first}/{folder}"}
        if endpoint and endpoint != os.environ.get(_GOOGLE_ADDRESS):
            raise ConfigurationError(
                f"{url}: TensorStore takes the address of a server like GCS from {_GOOGLE_ADDRESS} of the worker only. "
                f"Set it to {endpoint} there, or read it as nobody (anonymous)."
            )
        return {"driver": "gcs", "bucket": first, "path": folder}
    if scheme in ("http", "https"):
        secret = None if options.anonymous else options.authorization
        headers = {"headers": [f"Authorization: {secret.get_secret_value()}"]} if secret else {}
        return {"driver": "http", "base_url": f"{scheme}://{first}", "path": f"/{folder}", **headers}
    store: dict[str, Any] = {"driver": "s3", "bucket": first, "path": folder}
    if options.endpoint_url:
        store["endpoint"] = options.endpoint_url
    if options.region or options.endpoint_url:
        store["aws_region"] = options.region or "us-east-1"
    credentials = options.tensorstore_credentials()
    return store | ({"aws_credentials": credentials} if credentials else {})


@cache
def _file_in_memory(text: str) -> str:
    """A file that TensorStore can read keys from; it is on no disk where the system has files in memory."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("keys")
        os.write(descriptor, text.encode())
        return f"/proc/{os.getpid()}/fd/{descriptor}"
    with tempfile.NamedTemporaryFile("w", prefix="biomed-", delete=False) as file:  # readable for its owner alone
        file.write(text)
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return file.name


def _missing(url: str) -> ConfigurationError:
    return ConfigurationError(f"{url} is read with obstore: pip install 'prefect-biomed[volumetric]'.")
