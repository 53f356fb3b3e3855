"""The folder of a federation: a sub-folder for each organization, with secrets that only their owner can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefect_biomed.clients.files import atomic_write, on_disk

__all__ = [
    "as_yaml",
    "is_written",
    "node_configuration_path",
    "organization_folder",
    "private_key_path",
    "remove",
    "write_secret",
]

_SECRET_MODE = 0o600
_FOLDER_MODE = 0o700


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


def is_written(path: Path) -> bool:
    """Tell whether a file is there.

    Args:
        path: The file.

    Raises:
        LocalStorageError: The folder cannot be read.
    """
    with on_disk(path.parent):
        return path.is_file()


def remove(path: Path) -> None:
    """Remove a file that is no longer needed; one that is gone already is fine.

    Args:
        path: The file.

    Raises:
        LocalStorageError: It cannot be removed.
    """
    with on_disk(path.parent):
        path.unlink(missing_ok=True)


def as_yaml(content: Mapping[str, Any]) -> bytes:
    """Write what a person or a node will read as YAML.

    Args:
        content: Keys in the order in which they are written.
    """
    return yaml.safe_dump(dict(content), sort_keys=False).encode()


def write_secret(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 in a folder of mode 0700; both are made when missing.

    Args:
        path: The file; it appears when it is complete.
        content: What only its owner may read.

    Raises:
        LocalStorageError: The disk does not take it.
    """
    with on_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(_FOLDER_MODE)
    with atomic_write(path, mode=_SECRET_MODE) as file:
        file.write(content)
