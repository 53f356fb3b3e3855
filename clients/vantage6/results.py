"""Fetching results: joined with the names of organizations, decrypted, decoded, and never larger than memory allows."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.vantage6._long_json import LongText
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.encryption import decode_base64_stream
from prefect_biomed.clients.vantage6.errors import (
    DecryptionFailed,
    ForeignResult,
    ResultEmpty,
    ResultExpired,
    ResultNotReadable,
    ResultUnavailable,
)
from prefect_biomed.clients.vantage6.models import Action, EncodedResult, Result, Run, Task
from prefect_biomed.clients.vantage6.monitoring import organization_names
from prefect_biomed.clients.vantage6.payloads import check_start, decode_json

__all__ = ["SPILL_BYTES", "fetch_results"]

logger = logging.getLogger(__name__)

SPILL_BYTES = 8 * 1024**2
"""Results above this size are written to a file unless told otherwise."""

_BLOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The two headers of an encrypted message are shorter than this.
_HEAD_BYTES = 4096
_CHUNK_BYTES = 1024 * 1024
# The outputs of these steps stay at the nodes.
_WITHOUT_OUTPUT = frozenset({Action.DATA_EXTRACTION, Action.PREPROCESSING})


def fetch_results(
    client: Vantage6Client,
    task_id: int,
    *,
    output_dir: Path,
    partial: bool = False,
    spill_bytes: int = SPILL_BYTES,
) -> list[Result]:
    """Fetch the results of a task, one for each organization. Safe to repeat.

    Four requests for up to a hundred organizations, one more for each result that is kept in a blob store.

    Args:
        client: The account.
        task_id: A task that has ended.
        output_dir: Folder for results that are too large for memory.
        partial: Whether a run without result is reported in its `Result` rather than raised.
        spill_bytes: Results above this size are written to ``task-<id>-run-<id>.json``.

    Returns:
        The results in the order of the runs.

    Raises:
        ResultUnavailable: A run has no result, has not ended, or its result is not JSON; the class says which.
        UnsafeFormat: A result is a pickle.
        ForeignResult: The task was created by another organization, whose key alone reads the results.
        DecryptionFailed: The private key is missing or another one, or a result is damaged.
        TaskGone: The task was deleted.
    """
    task = client.task(task_id)
    runs = {run.id: run for run in client.runs(task_id)}
    names = organization_names(client, task.collaboration_id)
    results: dict[int, Result] = {}
    for record, texts in client.pages(EncodedResult, task_id=task_id):
        # A result has the id of its run; in generation 3 it is the run.
        run = runs.get(record.id)
        if run is None:
            continue
        path = output_dir / f"task-{task_id}-run-{run.id}.json"
        base = Result(
            run_id=run.id,
            task_id=task_id,
            organization_id=run.organization_id,
            organization=names.get(run.organization_id, f"organization {run.organization_id}"),
        )
        try:
            results[run.id] = _read(client, task, run, texts.get("result", record.result), base, path, spill_bytes)
        except (ResultUnavailable, DecryptionFailed) as error:
            if not partial:
                raise
            logger.warning("%s", error)
            results[run.id] = base.model_copy(update={"unavailable": str(error)})
    return [results[run_id] for run_id in sorted(results)]


def _read(
    client: Vantage6Client,
    task: Task,
    run: Run,
    content: str | LongText | None,
    base: Result,
    path: Path,
    spill_bytes: int,
) -> Result:
    if not content:
        return _nothing(run, base, has_content=content is not None)
    with _chunks(client, content) as encoded:
        head, chunks = _peek(encoded)
        if b"$" in head:
            decoded = _decrypted(client, task, run, chunks, binary=_is_blob(content))
        else:
            decoded = decode_base64_stream(chunks)
        try:
            kept, size = _collect(client.version.major, decoded, run.id, path, spill_bytes)
            value = None if kept is None else decode_json(kept, run_id=run.id)
        except ResultNotReadable as error:
            if b"$" in head:
                raise DecryptionFailed(
                    f"The result of run {run.id} of {base.organization} does not decrypt to JSON: the private key is "
                    "not the one it was encrypted for, or the algorithm answers with something else."
                ) from error
            raise
    return base.model_copy(update={"value": value, "path": path if kept is None else None, "size_bytes": size})


def _nothing(run: Run, base: Result, *, has_content: bool) -> Result:
    """Say why there is no result; for steps that keep their output at the nodes there is no why."""
    about = f"Run {run.id} of {base.organization}"
    if run.cleanup_at is not None:
        raise ResultExpired(
            f"{about}: the server's clean-up deleted the result at {run.cleanup_at:%Y-%m-%d %H:%M} UTC."
        )
    if not run.is_finished:
        raise ResultUnavailable(f"{about} is {run.status.value}. Wait for the task first: wait_for_results.")
    if not run.status.is_success:
        raise ResultEmpty(f"{about} ended as {run.status.value!r} and has no result.")
    if has_content and run.action in _WITHOUT_OUTPUT:
        return base
    raise ResultEmpty(f"{about} ended well, but its result is empty.")


def _is_blob(content: Any) -> bool:
    """Generation 5 does not say that a result is in the blob store, but base64 has no hyphens."""
    return isinstance(content, str) and _BLOB.fullmatch(content) is not None


@contextmanager
def _chunks(client: Vantage6Client, content: str | LongText) -> Iterator[Iterator[bytes]]:
    if isinstance(content, LongText):
        yield content.chunks()
    elif _is_blob(content):
        with client.download(f"/blobstream/{content}") as chunks:
            yield chunks
    else:
        yield iter([content.encode("ascii", "replace")])


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    head = b""
    while len(head) < _HEAD_BYTES and (chunk := next(chunks, None)) is not None:
        head += chunk
    return head[:_HEAD_BYTES], chain([head], chunks)


def _decrypted(
    client: Vantage6Client, task: Task, run: Run, chunks: Iterable[bytes], *, binary: bool
) -> Iterator[bytes]:
    if task.init_org_id is not None and task.init_org_id != client.organization_id:
        raise ForeignResult(
            f"The result of run {run.id} is encrypted for organization {task.init_org_id}, which created task "
            f"{task.id}. Your organization ({client.organization_id}) cannot read it."
        )
    if client.private_key is None:
        raise DecryptionFailed(
            f"The result of run {run.id} is encrypted: give the organization's private key in the credentials."
        )
    return client.private_key.decrypt_stream(chunks) if binary else client.private_key.decrypt_text_stream(chunks)


def _collect(
    major: int, chunks: Iterator[bytes], run_id: int, path: Path, spill_bytes: int
) -> tuple[bytes | None, int]:
    """Keep a content in memory, or when it is large in a file; then the first part is None."""
    kept = bytearray()
    for chunk in chunks:
        kept += chunk
        if len(kept) > spill_bytes:
            return None, _spill(major, bytes(kept), chunks, run_id, path)
    text = check_start(major, bytes(kept), run_id=run_id)
    return text, len(text)


def _spill(major: int, start: bytes, chunks: Iterator[bytes], run_id: int, path: Path) -> int:
    text = check_start(major, start, run_id=run_id)
    # JSON is UTF-8; what a wrong key makes of a message is not.
    check = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with atomic_write(path) as file:
            for chunk in chain([text], chunks):
                check.decode(chunk)
                size += file.write(chunk)
            check.decode(b"", final=True)
    except UnicodeDecodeError:
        raise ResultNotReadable(
            f"The result of run {run_id} is no text, so it is not JSON.", content=start, size_bytes=size
        ) from None
    logger.info("The result of run %d has %d bytes and is in %s", run_id, size, path)
    return size
