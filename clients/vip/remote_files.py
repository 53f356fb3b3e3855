"""Single files on the platform: sent until they are surely there, deleted until they are surely gone."""

from __future__ import annotations

import operator
from pathlib import Path, PurePosixPath

import requests

from prefect_biomed.clients.errors import (
    AuthenticationError,
    NetworkError,
    NotFoundError,
    PermissionDeniedError,
    PlatformError,
    StorageFull,
    is_transient,
)
from prefect_biomed.clients.polling import PollSettings, looks, poll
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.carmin import compare_digest
from prefect_biomed.clients.vip.client import VipClient

__all__ = ["delete_and_wait", "is_there", "list_folder_or_nothing", "put_and_verify"]

logger = logger_of(__name__)


def list_folder_or_nothing(client: VipClient, path: str) -> dict[str, int | None]:
    """List a folder that may not exist.

    Args:
        client: The account.
        path: Absolute path on the platform.

    Returns:
        Size in bytes by name; None for folders. Empty when there is no such folder.
    """
    try:
        entries = client.list_folder(path)
    except (NotFoundError, PlatformError) as error:
        if isinstance(error, AuthenticationError | PermissionDeniedError) or client.exists(path):
            raise
        return {}
    return {entry.name: None if entry.is_directory else entry.size for entry in entries}


def is_there(client: VipClient, path: str) -> bool:
    """Tell whether there is something at a path, where more depends on it than one answer carries.

    Args:
        client: The account.
        path: Absolute path on the platform.

    Returns:
        False when the platform says so, and its folder does not list it either.
    """
    position = PurePosixPath(path)
    return client.exists(path) or position.name in list_folder_or_nothing(client, str(position.parent))


def delete_and_wait(client: VipClient, path: str, *, timeout_seconds: float) -> None:
    """Delete a file or folder and wait until it is gone; VIP deletes later than it answers. Safe to repeat.

    Args:
        client: The account.
        path: Absolute path on the platform.
        timeout_seconds: How long to wait.

    Raises:
        DeadlineExceeded: It is still there, or nobody can tell. The deletion may still happen.
    """
    client.delete(path)
    settings = PollSettings(0.25, 2.0, 10.0, timeout_seconds)
    for _ in poll(
        lambda: is_there(client, path),
        settings,
        done=operator.not_,
        what=f"The deletion of {path}",
        take_up_again="Run this again later; what is gone is not deleted twice.",
        at_deadline=lambda: "It was accepted and may still happen.",
    ):
        pass


def put_and_verify(
    client: VipClient, local: Path, path: str, *, settle_seconds: float = 90.0, attempts: int = 4
) -> None:
    """Send a file until the platform shows it with the right size.

    An upload that VIP calls failed may still arrive, because it goes on behind the answer. So after any doubt the
    platform is looked at until the size matches or `settle_seconds` are over; only then what is there is deleted and
    the file sent again. A refusal leaves no doubt: the same file would be refused again. Safe to repeat.

    Args:
        client: The account.
        local: File to send; on VIP not empty.
        path: Absolute path on the platform; its folder exists and nothing is there, or something to be replaced.
        settle_seconds: How long a file may take to appear after a failed answer.
        attempts: How often to send it at most.

    Raises:
        PlatformError: The file was refused.
        StorageFull: The platform takes no more files.
        BiomedError: The last failure, after the last attempt; or what is there cannot be looked at.
        UnexpectedResponse: The file that arrived is not the one that was sent.
    """
    size = local.stat().st_size
    if size == 0:
        # An empty body would make a folder.
        client.put_file_encoded(local, path)
        return
    for attempt in range(1, attempts + 1):
        try:
            client.put_file(local, path)
        except (NetworkError, PlatformError) as error:
            if isinstance(error, PlatformError) and _refuses(error):
                raise
            logger.warning("Upload of %s, attempt %d of %d, in doubt: %s", path, attempt, attempts, error)
            if _settles(client, path, size, settle_seconds):
                break
            if attempt == attempts:
                raise
            if client.exists(path):
                delete_and_wait(client, path, timeout_seconds=settle_seconds)
        else:
            if client.profile.stores_raw_bodies or _settles(client, path, size, 0):
                break
            # This platform stores raw bodies as text and drops what is not.
            logger.warning("%s came back changed; sending it as base64", path)
            client.put_file_encoded(local, path)
            break
    if not client.profile.stores_raw_bodies:
        compare_digest(local, path, client.md5)


def _refuses(error: PlatformError) -> bool:
    """Whether an answer to an upload says no, and would say so again."""
    if isinstance(error, AuthenticationError | PermissionDeniedError | StorageFull):
        return True
    if error.status == requests.codes.request_entity_too_large:
        # Whoever says it, a proxy too, has read no more of the file than its length.
        return True
    return error.spoken and error.status is not None and error.status < 500 and not is_transient(error)


def _settles(client: VipClient, path: str, size: int, seconds: float) -> bool:
    """Whether the platform shows a file of this size within some time."""

    def look() -> bool | None:
        entry = client.entry(path)
        return True if entry.exists and entry.size == size else None

    return looks(look, seconds=seconds, what=path, interval_seconds=1.0) is not None
