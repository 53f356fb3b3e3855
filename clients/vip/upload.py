"""Sending the inputs of a session: eight at a time, nothing twice, nothing half."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from prefect_biomed.clients.transfer import digest, transfer_all
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.files import delete_and_wait, list_folder_or_nothing, put_and_verify
from prefect_biomed.clients.vip.inputs import LocalFile, Preflight
from prefect_biomed.clients.vip.models import VipSession
from prefect_biomed.clients.vip.session_file import SessionFile, UploadedFile

__all__ = ["UploadSummary", "upload"]

logger = logging.getLogger(__name__)

_SAVE_EVERY_SECONDS = 5.0
_DELETE_SECONDS = 300.0

Progress = Callable[[int, int], None]
"""Called with the bytes transferred so far and the bytes in all."""


class UploadSummary(BaseModel):
    """What an upload did.

    Attributes:
        sent: Number of files sent.
        skipped: Number of files that were there already.
        replaced: How many of those sent took the place of an older version.
        bytes_sent: Bytes sent.
    """

    model_config = ConfigDict(frozen=True)

    sent: int
    skipped: int
    replaced: int
    bytes_sent: int


def upload(
    client: VipClient,
    session: VipSession,
    plan: Preflight,
    *,
    update_files: bool = True,
    settle_seconds: float = 90.0,
    progress: Progress | None = None,
) -> UploadSummary:
    """Bring the files of a session to the platform.

    Safe to repeat, also after a kill: one listing for each folder is compared with the local files and with the record
    of what was sent, and only what is missing or differs is sent.

    Args:
        client: The account; its `parallelism` is the number of transfers at once.
        session: The session.
        plan: What the pre-flight found.
        update_files: False trusts that the inputs are complete when their folder exists.
        settle_seconds: How long a file may take to appear after a failed answer.
        progress: Told the bytes done and in all.

    Returns:
        What was done.

    Raises:
        TransferFailed: Some files could not be sent; the others were.
        AuthenticationError: The key was refused. What was sent is recorded.
    """
    file = SessionFile(session, client)
    with file.edit() as record:
        record.pipeline_id = session.pipeline_id
        record.input_settings = {**session.input_settings, **plan.settings}
        sent_before = dict(record.ledger.uploads)
    if not update_files and client.exists(session.vip_input_dir):
        return UploadSummary(sent=0, skipped=len(plan.files), replaced=0, bytes_sent=0)

    client.make_folder(session.vip_input_dir)
    there = {".": list_folder_or_nothing(client, session.vip_input_dir)}
    for folder in plan.folders:
        parent, name = PurePosixPath(folder).parent.as_posix(), PurePosixPath(folder).name
        path = f"{session.vip_input_dir}/{folder}"
        if name in there[parent]:
            there[folder] = list_folder_or_nothing(client, path)
        else:
            client.make_folder(path)
            there[folder] = {}

    done: dict[str, UploadedFile] = {}
    missing: list[LocalFile] = []
    outdated: set[str] = set()
    for item in plan.files:
        position = PurePosixPath(item.name)
        sizes = there[position.parent.as_posix()]
        if position.name not in sizes:
            missing.append(item)
        elif (known := _unchanged(item, sizes[position.name], sent_before.get(item.name))) is not None:
            done[item.name] = known
        else:
            missing.append(item)
            outdated.add(item.name)

    total = sum(item.size for item in missing)
    saved_at = time.monotonic()
    bytes_sent = 0

    def send(item: LocalFile) -> UploadedFile:
        path = f"{session.vip_input_dir}/{item.name}"
        if item.name in outdated:
            delete_and_wait(client, path, timeout_seconds=_DELETE_SECONDS)
        # Taken before the file is sent: one that changes meanwhile differs from its record and is sent again.
        record = UploadedFile(size=item.size, mtime_ns=item.mtime_ns, sha256=digest(item.path))
        put_and_verify(client, item.path, path, settle_seconds=settle_seconds)
        return record

    def note(item: LocalFile, sent: UploadedFile) -> None:
        nonlocal saved_at, bytes_sent
        done[item.name] = sent
        bytes_sent += item.size
        if progress:
            progress(bytes_sent, total)
        if time.monotonic() - saved_at > _SAVE_EVERY_SECONDS:
            save()

    def save() -> None:
        nonlocal saved_at
        with file.edit() as record:
            record.ledger.uploads.update(done)
        saved_at = time.monotonic()

    logger.info("%d files to send (%d bytes), %d are there already", len(missing), total, len(done))
    skipped = len(done)
    try:
        transfer_all(
            missing,
            send,
            name=lambda item: item.local_name,
            subject=f"Upload to {session.vip_input_dir}",
            parallelism=client.parallelism,
            on_done=note,
        )
    finally:
        save()
    return UploadSummary(sent=len(missing), skipped=skipped, replaced=len(outdated), bytes_sent=total)


def _unchanged(item: LocalFile, size_there: int | None, sent: UploadedFile | None) -> UploadedFile | None:
    """What is on the platform when it is this very file, else None.

    A file of the right size that we have no record of was sent before a kill, or by vip-client: it counts as complete.
    """
    if size_there != item.size:
        return None
    if sent is not None and (sent.size, sent.mtime_ns) == (item.size, item.mtime_ns):
        return sent
    now = UploadedFile(size=item.size, mtime_ns=item.mtime_ns, sha256=digest(item.path))
    return now if sent is None or sent.sha256 == now.sha256 else None
