"""Fetching results: joined with the names of organizations, decrypted, and never larger than memory allows.

What a result is, is told by its first bytes: JSON is decoded, all else is handed on as it is.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from prefect_biomed.clients.files import atomic_write
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6._long_json import LongText
from prefect_biomed.clients.vantage6.client import Vantage6Client
from prefect_biomed.clients.vantage6.encryption import decode_base64_stream
from prefect_biomed.clients.vantage6.errors import (
    DecryptionFailed,
    ForeignResult,
    InvalidKey,
    ResultEmpty,
    ResultExpired,
    ResultMissing,
    ResultNotReadable,
    ResultUnavailable,
)
from prefect_biomed.clients.vantage6.models import Action, EncodedResult, Organization, Result, Run, Task, TaskOutcome
from prefect_biomed.clients.vantage6.monitoring import organization_names
from prefect_biomed.clients.vantage6.payloads import START_BYTES, decode_json, is_whole_json, recognise

__all__ = ["SPILL_BYTES", "fetch_results", "load_result"]

logger = logger_of(__name__)

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
    output_dir: Path | str,
    partial: bool = False,
    spill_bytes: int = SPILL_BYTES,
    asked: Sequence[int] = (),
    ended: TaskOutcome | None = None,
) -> list[Result]:
    """Fetch the results of a task, one for each organization. Safe to repeat.

    Four requests for up to a hundred organizations, one more for each result that is kept in a blob store. Two less
    where the end of the task is given, and one less where the names of the organizations were read before.

    Args:
        client: The account.
        task_id: A task that has ended.
        output_dir: Folder for results that are too large for memory.
        partial: Whether a run without result is reported in its `Result` rather than raised.
        spill_bytes: Results above this size are written to ``task-<id>-run-<id>`` with the extension of their format.
        asked: Ids of the organizations that were asked, such as `Task.asked`. One of which no run is listed, because it
            has left or the account may not see it, is missing too; without them nothing tells that it was asked.
        ended: The task and its runs, as they were seen. Those of a task that had not ended then are read again.

    Returns:
        The results in the order of the runs, then those of organizations without a run.

    Raises:
        ResultUnavailable: A run has no result, has not ended, or its result was cut short; the class says which.
        UnsafeFormat: A result is a pickle.
        ForeignResult: The task was created by another organization, whose key alone reads the results.
        DecryptionFailed: The private key is missing or another one, or a result is damaged.
        TaskGone: The task was deleted.
    """
    if ended is None or ended.task.id != task_id or not (ended.task.status.is_terminal and ended.is_finished):
        task, listed = client.task(task_id), client.runs(task_id)
    else:
        task, listed = ended.task, list(ended.runs)
    runs = {run.id: run for run in listed}
    names = organization_names(client, task.collaboration_id, [*asked, *(run.organization_id for run in listed)])
    results: dict[int, Result] = {}
    for record, texts in client.pages(EncodedResult, task_id=task_id):
        # A result has the id of its run; in generation 3 it is the run.
        run = runs.get(record.id)
        if run is None:
            continue
        path = Path(output_dir) / f"task-{task_id}-run-{run.id}"
        base = _nothing_yet(task_id, run.organization_id, names, run.id)
        try:
            results[run.id] = _read(client, task, run, texts.get("result", record.result), base, path, spill_bytes)
        except (ResultUnavailable, DecryptionFailed) as error:
            if not partial:
                raise
            logger.warning("%s", error)
            missing = isinstance(error, ResultMissing)
            results[run.id] = base.model_copy(update={"unavailable": str(error), "missing": missing})
    for run in runs.values():
        if run.id not in results:
            base = _nothing_yet(task_id, run.organization_id, names, run.id)
            said = f"The server lists no result of run {run.id} of {base.organization}, which is {run.status.value}."
            results[run.id] = _missing(base, said, partial=partial)
    ran = {run.organization_id for run in runs.values()}
    absent = [_nothing_yet(task_id, one, names) for one in asked if one not in ran]
    return [results[run_id] for run_id in sorted(results)] + [
        _missing(base, f"{base.organization} was asked, and the server lists no run of it.", partial=partial)
        for base in absent
    ]


def _nothing_yet(
    task_id: int, organization_id: int | None, names: Mapping[int | None, str], run_id: int | None = None
) -> Result:
    name = names.get(organization_id, f"organization {organization_id}")
    return Result(run_id=run_id, task_id=task_id, organization_id=organization_id, organization=name)


def _missing(base: Result, said: str, *, partial: bool) -> Result:
    """Name a result that is not listed; raise when all are needed."""
    lost = ResultMissing(said)
    if not partial:
        raise lost
    logger.warning("%s", lost)
    return base.model_copy(update={"unavailable": said, "missing": True})


def load_result(result: Result) -> JsonValue | bytes:
    """Give an output whatever its format and wherever it is. Reads the file of one that was too large for memory.

    Args:
        result: The result.

    Returns:
        The decoded JSON, or the bytes of what is not JSON.

    Raises:
        ResultUnavailable: There is no output; the message says why.
        ResultNotReadable: The file is not JSON although it begins and ends so.
        OSError: The file cannot be read any more.
    """
    if result.unavailable is not None:
        raise ResultUnavailable(f"{result.organization} has no result of task {result.task_id}: {result.unavailable}")
    if result.path is None:
        return result.value if result.content is None else result.content
    content = result.path.read_bytes()
    # Before formats were told, only JSON was written.
    return decode_json(content, run_id=result.run_id) if result.format in ("json", None) else content


def _read(
    client: Vantage6Client,
    task: Task,
    run: Run,
    content: str | LongText | None,
    base: Result,
    path: Path,
    spill_bytes: int,
) -> Result:
    # What a run has left that failed, or has not ended, is no result of it.
    if not content or not run.status.is_success:
        return _nothing(run, base, has_content=content is not None)
    with _chunks(client, content) as encoded:
        head, _, chunks = _peek(encoded, _HEAD_BYTES)
        encrypted = b"$" in head
        if encrypted:
            decoded = _decrypted(client, task, run, chunks, binary=_is_blob(content))
        else:
            decoded = decode_base64_stream(chunks)
        try:
            output = _Output(client.version.major, decoded, run.id)
            if not output.start:
                return _nothing(run, base, has_content=True)
            if output.format == "bin" and encrypted:
                _check_reader(client, run)
            return base.model_copy(update=output.collect(path, spill_bytes))
        except ResultNotReadable as error:
            if not encrypted:
                raise
            raise DecryptionFailed(
                f"The result of run {run.id} of {base.organization} does not decrypt to what it begins with: it was "
                "cut short or damaged, or the private key is not the one it was encrypted for."
            ) from error


def _nothing(run: Run, base: Result, *, has_content: bool) -> Result:
    """Say why there is no result; for steps that keep their output at the nodes there is no why."""
    about = f"Run {run.id} of {base.organization}"
    if run.cleanup_at is not None:
        raise ResultExpired(
            f"{about}: the server's clean-up deleted the result at {run.cleanup_at:%Y-%m-%d %H:%M} UTC."
        )
    if not run.is_finished:
        raise ResultMissing(f"{about} is {run.status.value}. Wait for the task first: wait_for_results.")
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


def _peek(chunks: Iterator[bytes], size: int) -> tuple[bytes, bool, Iterator[bytes]]:
    """Look at the beginning: give it, whether it is all, and everything from the start again."""
    head = bytearray()
    while len(head) <= size:
        chunk = next(chunks, None)
        if chunk is None:
            return bytes(head), True, iter([bytes(head)])
        head += chunk
    return bytes(head[:size]), False, chain([bytes(head)], chunks)


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


def _check_reader(client: Vantage6Client, run: Run) -> None:
    """Tell unknown bytes from what another key makes of a message, of which nothing else tells."""
    own = client.get(Organization, client.organization_id)
    try:
        is_reader = client.private_key is not None and client.private_key.matches(own.public_key)
    except InvalidKey:
        is_reader = False
    if not is_reader:
        raise DecryptionFailed(
            f"The result of run {run.id} decrypts to bytes of no known format, and the private key given is not the "
            f"one that the server knows of {own.name!r}. Give the key for which it was encrypted."
        )


class _Output:
    """A decrypted output, of which only the beginning has been read.

    Args:
        major: Generation of the server.
        chunks: The output.
        run_id: The run, for messages.

    Attributes:
        start: Its first bytes.
        format: What it is, as `recognise` tells it.
    """

    def __init__(self, major: int, chunks: Iterator[bytes], run_id: int) -> None:
        self.start, complete, self._chunks = _peek(chunks, START_BYTES)
        self.format, skipped = recognise(major, self.start, complete=complete, run_id=run_id)
        self.start = self.start[skipped:]
        self._run_id = run_id
        if skipped:
            self._chunks = chain([next(self._chunks)[skipped:]], self._chunks)

    def collect(self, path: Path, spill_bytes: int) -> dict[str, object]:
        """Read it to the end; tell the fields of a result.

        Args:
            path: File for what is too large for memory, without extension.
            spill_bytes: What may be kept in memory.
        """
        kept = bytearray()
        for chunk in self._chunks:
            kept += chunk
            if len(kept) > spill_bytes:
                target = path.with_name(f"{path.name}.{self.format}")
                size = self._write(target, chain([bytes(kept)], self._chunks))
                return {"format": self.format, "path": target, "size_bytes": size}
        content = bytes(kept)
        found: dict[str, object] = {"format": self.format, "size_bytes": len(content)}
        if self.format == "json":
            return found | {"value": decode_json(content, run_id=self._run_id)}
        return found | {"content": content}

    def _write(self, path: Path, chunks: Iterable[bytes]) -> int:
        # JSON is UTF-8; what a wrong key makes of a message is not.
        check = codecs.getincrementaldecoder("utf-8" if self.format == "json" else "latin-1")()
        size, end = 0, b""
        try:
            with atomic_write(path) as file:
                for chunk in chunks:
                    check.decode(chunk)
                    size += file.write(chunk)
                    end = (end + chunk[-_HEAD_BYTES:])[-_HEAD_BYTES:]
                check.decode(b"", final=True)
                if self.format == "json" and not is_whole_json(self.start, end):
                    raise ValueError("it does not end as JSON does")
        except ValueError:
            raise ResultNotReadable(
                f"The result of run {self._run_id} ({size} bytes) begins as JSON and does not end so: it was cut short "
                "or damaged.",
                content=self.start,
                size_bytes=size,
            ) from None
        logger.info("The result of run %d has %d bytes and is in %s", self._run_id, size, path)
        return size
