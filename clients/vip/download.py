"""Fetching the outputs of a session: eight at a time, whole or not at all, never outside their folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from pydantic import BaseModel, ConfigDict, Field

from prefect_biomed.clients.archives import ArchiveLimits, is_archive, sweep, unpack
from prefect_biomed.clients.crates import METADATA, WORKFLOW
from prefect_biomed.clients.errors import (
    ConfigurationError,
    LedgerError,
    NetworkError,
    UnexpectedResponse,
    UnsafeContent,
    is_transient,
)
from prefect_biomed.clients.files import PartialFile, on_disk, safe_join
from prefect_biomed.clients.polling import tries
from prefect_biomed.clients.rest import walk
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.transfer import transfer_all
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import StillRunning
from prefect_biomed.clients.vip.girder import file_id, local_names
from prefect_biomed.clients.vip.girder_sessions import girder_of, output_entries
from prefect_biomed.clients.vip.models import PathEntry, VipSession, Workflow, WorkflowStatus, is_on_girder
from prefect_biomed.clients.vip.session_file import FILE_NAME, LOCKS, SessionFile
from prefect_biomed.clients.vip.session_record import SessionRecord

__all__ = ["DownloadSummary", "Output", "download", "fetch_file", "local_outputs", "not_here"]

logger = logger_of(__name__)

# The platform gives up fetching from the grid after 45 s but goes on behind it, so a later try is answered fast.
RETRY_SECONDS = (1.0, 3.0, 10.0, 30.0, 60.0)
_CONTENT_SUFFIX = ".content"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """One output on its way to the local folder.

    Attributes:
        path: Path on the platform.
        local: Where it goes.
        size: Bytes, where the platform told.
    """

    path: str
    local: Path
    size: int | None


class DownloadSummary(BaseModel):
    """What a download did.

    Attributes:
        files: Every local file of the wanted workflows, by workflow; those inside unpacked archives too.
        fetched: Number of outputs fetched.
        skipped: Number of outputs that were here already.
        gone: Outputs the platform has deleted.
        packed: Why an archive stayed as it is, by its local path.
    """

    model_config = ConfigDict(frozen=True)

    files: dict[str, tuple[Path, ...]]
    fetched: int
    skipped: int
    gone: tuple[str, ...]
    packed: dict[str, str] = Field(default_factory=dict)


def download(
    client: VipClient,
    session: VipSession,
    *,
    workflow_ids: Sequence[str] | None = None,
    get_status: Sequence[str] | None = None,
    unzip: bool | None = None,
    keep_archives: bool | None = None,
    limits: ArchiveLimits | None = None,
    retry_seconds: Sequence[float] = RETRY_SECONDS,
    progress: Progress | None = None,
) -> DownloadSummary:
    """Fetch the outputs of the workflows that ended with one of the wanted statuses.

    Safe to repeat, also after a kill: a file under its final name is complete, and complete files are not fetched
    twice. Two processes on one session take turns. Outputs on Girder stay there, unless the session wants them here
    too; then they are fetched from Girder, also when the session is finished.

    Args:
        client: The account; its `parallelism` is the number of transfers at once.
        session: The session.
        workflow_ids: The executions; all of the session when None. One that the record lacks is asked for by itself.
        get_status: Statuses whose outputs are wanted; those of the session's options when None.
        unzip: Whether archives, recognised by content, are replaced by a folder of the same name; as the session's
            options say when None.
        keep_archives: Whether archives stay, beside a folder with `.content` at the end of the name; as the session's
            options say when None.
        limits: Bounds on an archive.
        retry_seconds: Pauses between the tries of one output.
        progress: Told the number of outputs done and in all.

    Returns:
        What was done, with all local files.

    Raises:
        TransferFailed: Some outputs could not be fetched; the others are here. An archive that cannot be unpacked is no
            failure: it stays as it is, and the result says why.
        ConfigurationError: `Removed` is among the wanted statuses.
        LedgerError: The session has no executions; or nothing is written down of it, and not all are listed.
        StillRunning: One that was asked for has not ended.
        NotFoundError: The platform does not know one that was asked for, or says so in its own way.
        UnsafeContent: Names that the platform gave to outputs would leave the folder, or take the place of the
            session's own files. The other outputs are here.
        AuthenticationError: The key was refused. What is here stays.
    """
    options = session.options
    statuses = options.get_status if get_status is None else get_status
    if WorkflowStatus.REMOVED in statuses:
        raise ConfigurationError("get_status has 'Removed', whose outputs exist no more. Leave it out.")
    file = SessionFile(session, client)
    with file.exclusive("download"):
        chosen = _choose(session, _brought_up_to_date(client, file, workflow_ids), workflow_ids, statuses)
        plan = _locate(client, session, file, chosen)
        missing = [output for output in plan.due if not _is_here(output)]
        _fetch(client, session, missing, len(plan.due), retry_seconds, progress)
        for folder in {output.local.parent for output in missing}:
            PartialFile.sweep(folder)
        packed: dict[str, str] = {}
        if options.unzip if unzip is None else unzip:
            keep = options.keep_archives if keep_archives is None else keep_archives
            packed = _unpack_all(session, plan.due, keep, limits)
        with file.edit() as record:
            record.ledger.downloaded = sorted({*record.ledger.downloaded, *plan.complete})
    if plan.refused:
        raise UnsafeContent(" ".join(str(error) for error in plan.refused.values()))
    done = {*chosen.here, *plan.complete}
    return DownloadSummary(
        files={identifier: _files(group) for identifier, group in plan.outputs.items() if group or identifier in done},
        fetched=len(missing),
        skipped=len(plan.due) - len(missing),
        gone=plan.gone,
        packed=packed,
    )


@dataclass(frozen=True)
class _Chosen:
    """The workflows whose outputs are wanted, by where those are.

    Attributes:
        on_platform: Those the platform can describe.
        on_girder: Those removed from the platform, whose outputs are still on Girder.
        here: Those whose outputs were fetched and are here, whether they are still on the platform or not.
        gone: Those removed from the platform of whose outputs some are not here.
        known: Outputs by workflow, as the session file has them.
    """

    on_platform: tuple[str, ...]
    on_girder: tuple[str, ...]
    here: tuple[str, ...]
    gone: tuple[str, ...]
    known: dict[str, list[dict[str, Any]]]


@dataclass
class _Plan:
    """Where each output goes.

    Attributes:
        outputs: Outputs by workflow.
        by_place: The outputs that have to be here afterwards, by local path.
        complete: Workflows whose outputs are all here afterwards.
        gone: Outputs the platform has deleted.
        refused: Why outputs have no place here, by path.
    """

    outputs: dict[str, list[Output]] = field(default_factory=dict)
    by_place: dict[Path, Output] = field(default_factory=dict)
    complete: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    refused: dict[str, UnsafeContent] = field(default_factory=dict)

    @property
    def due(self) -> list[Output]:
        """The outputs that have to be here afterwards."""
        return list(self.by_place.values())


def _brought_up_to_date(client: VipClient, file: SessionFile, workflow_ids: Sequence[str] | None) -> SessionRecord:
    """The record, after the platform was asked for each execution of which it does not know that it has ended."""
    record = file.read()
    if workflow_ids is None and not record.workflows:
        raise LedgerError(f"Session {file.session.session_name!r} has no executions to download. Launch it first.")
    if workflow_ids is None and not file.exists and len(record.workflows) < file.session.nb_runs:
        raise LedgerError(
            f"Of the {file.session.nb_runs} runs of session {file.session.session_name!r} the platform lists "
            f"{len(record.workflows)}, and nothing is written down here. Download them by workflow_ids, or where the "
            "session's record is."
        )
    wanted = record.workflows if workflow_ids is None else workflow_ids
    seen = [client.workflow(identifier) for identifier in wanted if not _has_ended(record, identifier)]
    if seen:
        with file.edit() as record:
            for workflow in seen:
                record.note_workflow(workflow)
    running = [workflow.identifier for workflow in seen if not workflow.status.is_terminal]
    if workflow_ids is not None and running:
        raise StillRunning(
            f"{', '.join(running)} of session {file.session.session_name!r} have not ended, so their outputs are not "
            "complete. Wait for them.",
            running,
        )
    return record


def _has_ended(record: SessionRecord, workflow_id: str) -> bool:
    known = record.workflows.get(workflow_id)
    return known is not None and WorkflowStatus(known.status).is_terminal


def _choose(
    session: VipSession, record: SessionRecord, workflow_ids: Sequence[str] | None, get_status: Sequence[str]
) -> _Chosen:
    places: dict[str, list[str]] = {"on_platform": [], "on_girder": [], "here": [], "gone": []}
    known: dict[str, list[dict[str, Any]]] = {}
    for identifier in dict.fromkeys(record.workflows if workflow_ids is None else workflow_ids):
        run = record.workflows[identifier]
        outputs = [output for output in run.outputs if not output.get("isDirectory")]
        known[identifier] = outputs
        is_removed = run.status == WorkflowStatus.REMOVED
        if is_removed and session.girder_download and any(is_on_girder(str(output["path"])) for output in outputs):
            places["on_girder"].append(identifier)
        elif not is_removed and run.status not in get_status:
            continue
        elif identifier in record.ledger.downloaded and not not_here(session, identifier, outputs):
            places["here"].append(identifier)
        else:
            places["gone" if is_removed else "on_platform"].append(identifier)
    return _Chosen(known=known, **{name: tuple(identifiers) for name, identifiers in places.items()})


def not_here(session: VipSession, workflow_id: str, outputs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Name those outputs of a run that are not in the local folder, or with another size.

    Args:
        session: The session.
        workflow_id: The run.
        outputs: Its output files, as the session file has them.

    Returns:
        Their paths on the platform. The folder of an unpacked archive counts as the archive.
    """
    here = {output.path for output in local_outputs(session, workflow_id, outputs) if _is_here(output)}
    return tuple(path for output in outputs if (path := str(output["path"])) not in here)


def local_outputs(session: VipSession, workflow_id: str, outputs: Sequence[Mapping[str, Any]]) -> list[Output]:
    """Tell where the outputs of a run are here, or would be.

    Args:
        session: The session.
        workflow_id: The run.
        outputs: Its output files, as the session file has them.

    Returns:
        Those outputs whose names may have a place here. An archive may have become a folder.
    """
    places, _ = _places(session, workflow_id, [str(output["path"]) for output in outputs])
    return [Output(path, places[path], one.get("size")) for one in outputs if (path := str(one["path"])) in places]


def _locate(client: VipClient, session: VipSession, file: SessionFile, chosen: _Chosen) -> _Plan:
    plan = _Plan()
    for identifier in (*chosen.here, *chosen.gone):
        known = local_outputs(session, identifier, chosen.known[identifier])
        plan.outputs[identifier] = [output for output in known if _is_here(output)]
        plan.by_place |= {output.local: output for output in plan.outputs[identifier]}
        plan.gone += not_here(session, identifier, chosen.known[identifier])
    for identifier in (*chosen.on_platform, *chosen.on_girder):
        workflow = (
            Workflow(identifier=identifier, outputs=tuple(str(one["path"]) for one in chosen.known[identifier]))
            if identifier in chosen.on_girder
            else client.workflow(identifier)
        )
        if not session.girder_download and any(is_on_girder(path) for path in workflow.outputs):
            logger.info("%d outputs of %s are kept on Girder", len(workflow.outputs), identifier)
            continue
        entries = _entries(client, workflow)
        entries += _unlisted(client, workflow, file.read().workflows[identifier].outputs, entries)
        with file.edit() as record:
            record.note_outputs(identifier, entries)
        wanted = [entry for entry in entries if entry.exists and not entry.is_directory]
        places, refused = _places(session, identifier, [entry.path for entry in wanted])
        plan.refused |= refused
        gone = tuple(entry.path for entry in entries if not entry.exists)
        plan.gone += gone
        plan.outputs[identifier] = outputs = [
            Output(entry.path, places[entry.path], entry.size) for entry in wanted if entry.path in places
        ]
        if shared := [output.path for output in outputs if output.local in plan.by_place]:
            logger.warning("%s shares outputs with another run, which replaced them: %s", identifier, shared)
        plan.by_place |= {output.local: output for output in outputs}
        if not refused and not gone:
            plan.complete += (identifier,)
    return plan


def _fetch(
    client: VipClient,
    session: VipSession,
    missing: Sequence[Output],
    total: int,
    retry_seconds: Sequence[float],
    progress: Progress | None,
) -> None:
    done = total - len(missing)

    def note(*_: object) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    transfer_all(
        missing,
        lambda output: fetch_file(client, output, retry_seconds=retry_seconds),
        name=lambda output: output.path,
        subject=f"Download to {session.output_dir}",
        parallelism=client.parallelism,
        on_done=note,
    )


def _unpack_all(
    session: VipSession, outputs: Sequence[Output], keep: bool, limits: ArchiveLimits | None
) -> dict[str, str]:
    """Unpack what can be; return why the others cannot, by their paths."""
    for folder in {output.local.parent for output in outputs}:
        sweep(folder)
    packed: dict[str, str] = {}

    def note(output: Output, reason: str | None) -> None:
        if reason is not None:
            packed[str(output.local)] = reason

    transfer_all(
        [output for output in outputs if output.local.is_file()],
        lambda output: _unpack(output.local, keep, limits),
        name=lambda output: str(output.local),
        subject=f"Unpacking in {session.output_dir}",
        parallelism=os.cpu_count() or 1,
        on_done=note,
    )
    return packed


def fetch_file(client: VipClient, output: Output, *, retry_seconds: Sequence[float] = RETRY_SECONDS) -> None:
    """Fetch one output, taking up a broken transfer where it broke when the platform can.

    The file appears under its name when it is complete and on disk. Safe to repeat.

    Args:
        client: The account.
        output: What to fetch and where to.
        retry_seconds: Pauses between tries.

    Raises:
        PlatformError: The platform does not give the file, after the last try.
        NetworkError: The transfer broke, after the last try.
        UnexpectedResponse: The file is larger than the platform transfers, or has another size than it told.
        LocalStorageError: The disk does not take it.
    """
    limit = client.platform.max_size_direct_transfer
    if is_on_girder(output.path):
        limit = None
    if client.profile.limits_downloads and limit is not None and output.size is not None and output.size > limit:
        raise UnexpectedResponse(
            f"{output.path} has {output.size} bytes, the platform transfers at most {limit}. Fetch it from the portal."
        )
    partial = PartialFile(output.local)
    tries(
        lambda: _fetch_into(client, output, partial),
        retry_seconds,
        what=f"Download of {output.path}",
        again=lambda error: is_transient(error) or type(error) is UnexpectedResponse,
    )
    partial.complete()


def _fetch_into(client: VipClient, output: Output, partial: PartialFile) -> None:
    start = partial.size
    if output.size is None or start >= output.size:
        start = 0
    if is_on_girder(output.path):
        opened = girder_of(client).open_file(file_id(output.path), start=start)
    else:
        opened = client.open_file(output.path, start=start)
    with opened as (response, chunks):
        resumed = response.status_code == requests.codes.partial_content and response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {start}-")
        announced = response.headers.get("Content-Length", "")
        expected = (start if resumed else 0) + int(announced) if announced.isdecimal() else output.size
        with partial.writing(append=resumed) as file:
            for chunk in chunks:
                file.write(chunk)
                if expected is not None and file.tell() > expected:
                    break
            received = file.tell()
    if expected is not None and received < expected:
        raise NetworkError(f"{output.path}: {received} of {expected} bytes came.")
    if received != (output.size if output.size is not None else expected or received):
        partial.discard()
        raise UnexpectedResponse(f"{output.path}: {received} bytes came, the platform told {output.size}.")


def _entries(client: VipClient, workflow: Workflow) -> list[PathEntry]:
    """The output files with sizes; folders among them are walked, because their content cannot be asked for."""
    if not workflow.outputs and client.profile.describes_ended_executions:
        return []
    if any(is_on_girder(path) for path in workflow.outputs):
        # VIP refuses to list the results of such an execution.
        return output_entries(client, [path for path in workflow.outputs if is_on_girder(path)])
    found: list[PathEntry] = []
    for entry in client.results(workflow.identifier):
        if ":" in entry.path.split("/", 1)[0]:
            logger.info("%s is kept outside the platform and not downloaded", entry.path)
        elif entry.is_directory and entry.exists:
            found += _walk(client, entry.path)
        else:
            found.append(entry)
    return found


def _unlisted(
    client: VipClient, workflow: Workflow, noted: Sequence[Mapping[str, Any]], listed: Sequence[PathEntry]
) -> list[PathEntry]:
    """Outputs that the platform has told of, now or before, and does not list; each is asked for by its path."""
    told = [*workflow.outputs, *(str(one["path"]) for one in noted if not one.get("isDirectory"))]
    seen = {entry.path for entry in listed}
    missing = [path for path in dict.fromkeys(told) if path not in seen and ":" not in path.split("/", 1)[0]]
    return [entry for entry in map(client.entry, missing) if not (entry.exists and entry.is_directory)]


def _walk(client: VipClient, folder: str) -> list[PathEntry]:
    entries = walk(
        folder, client.list_folder, folder=lambda entry: entry.path if entry.is_directory else None, what=folder
    )
    return [entry for entry in entries if not entry.is_directory]


def _places(
    session: VipSession, workflow_id: str, paths: Sequence[str]
) -> tuple[dict[str, Path], dict[str, UnsafeContent]]:
    """Where outputs go, and why some names that the platform gave may go nowhere; by path."""
    on_girder = local_names(path for path in paths if is_on_girder(path))
    places: dict[str, Path] = {}
    refused: dict[str, UnsafeContent] = {}
    owners: dict[Path, str] = {}
    for path in paths:
        try:
            place = (
                _join(session, f"{workflow_id}/{on_girder[path]}")
                if path in on_girder
                else _local_path(session, workflow_id, path)
            )
        except UnsafeContent as error:
            refused[path] = error
            continue
        if (owner := owners.setdefault(place, path)) == path:
            places[path] = place
        else:
            refused[path] = UnsafeContent(
                f"The output {path[:200]!r} would take the place of {owner[:200]!r}. Refused."
            )
    return places, refused


def _local_path(session: VipSession, workflow_id: str, path: str) -> Path:
    position = PurePosixPath(path)
    if position.is_relative_to(session.vip_output_dir):
        return _join(session, position.relative_to(session.vip_output_dir).as_posix())
    if ".." in position.parts:
        raise UnsafeContent(f"The platform gave the output path {path[:200]!r}. Refused.")
    # Not where we asked for it: keep what tells it from other outputs, of this workflow and of others.
    parts = position.parts[1:]
    below = parts[parts.index(workflow_id) + 1 :] if workflow_id in parts else parts
    return _join(session, "/".join((workflow_id, *below)))


def _join(session: VipSession, name: str) -> Path:
    """Join a name that the platform gave to the output folder; the session's own files are not for it."""
    place = safe_join(session.output_dir, name)
    # Some file systems take capitals for small letters.
    top = place.relative_to(session.output_dir).parts[0].casefold()
    if (
        top in {FILE_NAME, LOCKS, f".{FILE_NAME}.vip", METADATA, WORKFLOW}
        or top.startswith(".unpack-")
        or top.endswith(".part")
    ):
        raise UnsafeContent(f"The output {name[:200]!r} would take the place of the session's own files. Refused.")
    return place


def _is_here(output: Output) -> bool:
    """A folder of the same name is the unpacked archive, which appears only when it is complete."""
    if output.local.is_dir():
        return True
    return output.local.is_file() and (output.size is None or output.local.stat().st_size == output.size)


def _unpack(path: Path, keep: bool, limits: ArchiveLimits | None) -> str | None:
    """Unpack a file when it is an archive; return why it cannot be unpacked, else None."""
    with on_disk(path.parent):
        if not is_archive(path):
            return None
        folder = path.with_name(path.name + _CONTENT_SUFFIX) if keep else path
        if not folder.is_dir():
            try:
                unpack(path, folder, limits)
            except UnsafeContent as error:
                return str(error)
    return None


def _files(outputs: Sequence[Output]) -> tuple[Path, ...]:
    found: set[Path] = set()
    for output in outputs:
        for path in (output.local, output.local.with_name(output.local.name + _CONTENT_SUFFIX)):
            if path.is_dir():
                found.update(file for file in path.rglob("*") if file.is_file())
            elif path.is_file():
                found.add(path)
    return tuple(sorted(found))
