"""Where Boss users keep their API token."""

from __future__ import annotations

import configparser
import json
import os
from pathlib import Path

from pydantic import SecretStr

from prefect_biomed.clients.errors import ConfigurationError

__all__ = ["find_token"]


def find_token(explicit: SecretStr | str | None = None) -> SecretStr:
    """Find the API token where Boss users keep it.

    Args:
        explicit: Used when given. Otherwise: `token.json` in the working directory (`{"token": …}`), then
            `~/.intern/intern.cfg` (section `Default` or `Project Service`), then the environment variable
            `INTERN_TOKEN`. boss-ingest documents this order.

    Returns:
        The token.

    Raises:
        ConfigurationError: There is none, or a file cannot be read.
    """
    if explicit:
        return explicit if isinstance(explicit, SecretStr) else SecretStr(explicit)
    file = Path("token.json")
    if file.exists():
        try:
            return SecretStr(str(json.loads(file.read_text(encoding="utf-8"))["token"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ConfigurationError(f"{file.resolve()} is not a file with a Boss token.") from None
    settings = configparser.ConfigParser(interpolation=None)
    path = Path("~/.intern/intern.cfg").expanduser()
    try:
        settings.read(path)
    except (configparser.Error, OSError, ValueError):
        raise ConfigurationError(f"{path} is not a configuration file of intern.") from None
    for section in ("Default", "Project Service"):
        if token := settings.get(section, "token", fallback=""):
            return SecretStr(token)
    if told := os.environ.get("INTERN_TOKEN"):
        return SecretStr(told)
    raise ConfigurationError(
        "No Boss token was found. Give it to the block, or write token.json or ~/.intern/intern.cfg, or set "
        "INTERN_TOKEN. The management console of the Boss shows it under your name."
    )
