"""`session_data.json`, wherever it is kept: read, changed under a lock, found again.

vip-client 0.1.10 reads our files and keeps the key `prefect_biomed` when it saves; we read its files and keep every key
we do not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from prefect_biomed.clients.errors import HeldElsewhere, LedgerError
from prefect_biomed.clients.files import atomic_write, exclusive, on_disk
from prefect_biomed.clients.vip import bids
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import SessionLocked
from prefect_biomed.clients.vip.models import VipSession
from prefect_biomed.clients.vip.remote_files import delete_and_wait, put_and_verify
from prefect_biomed.clients.vip.session_record import IntentRecord, SessionRecord, damaged, parse

__all__ = ["SessionFile", "open_intents", "open_session", "sessions_below", "with_bids_files"]

FILE_NAME = "session_data.json"
VIP_HOME = "/vip/Home/API"
LOCKS = ".locks"
_ON_ITS_WAY = f".{FILE_NAME}.vip"
_MAX_BYTES = 64 * 1024 * 1024
_DELETE_SECONDS = 60.0


class SessionFile:
    """The session file of one session, wherever it is kept.

    Every change is read, made and written under a lock that other processes respect, and appears whole or not at all.

    Args:
        session: The session it must belong to.
        client: Needed when there is no local file: it is kept on the platform, or nowhere.
        lock_seconds: How long to wait for another process.
    """

    def __init__(self, session: VipSession, client: VipClient | None = None, *, lock_seconds: float = 30.0) -> None:
        self.session = session
        self.path = session.output_dir / FILE_NAME
        self._vip_path = f"{session.vip_output_dir}/{FILE_NAME}"
        self._working = session.output_dir / LOCKS / FILE_NAME
        self._client = client
        self._lock_seconds = lock_seconds

    def read(self) -> SessionRecord:
        """Read the record; one without workflows when there is none yet.

        Returns:
            The record.

        Raises:
            LedgerError: The file is damaged, of a later version of the package, or belongs to another session. It is
                left as it is.
            LocalStorageError: It cannot be read.
        """
        record: SessionRecord | None
        match self.session.backup:
            case "local":
                text = _read_local(self.path)
                record = self._parsed(text, self.path) if text is not None else None
            case "vip":
                record = self._read_vip()
            case _:
                text = _read_local(self._working)
                record = self._parsed(text, self._working) if text is not None else self._from_platform()
        return SessionRecord.of(self.session) if record is None else record

    @contextmanager
    def edit(self) -> Iterator[SessionRecord]:
        """Change the record.

        Yields:
            The record, to be changed in place. It is written when the block ends without an exception.

        Raises:
            SessionLocked: Another process holds the file.
            LedgerError: As for `read`.
        """
        with self._locked(FILE_NAME):
            record = self.read()
            yield record
            record.ledger.revision += 1
            if self._client is not None:
                record.ledger.platform_url = self._client.url
            self._write(record)

    @contextmanager
    def exclusive(self, step: str, seconds: float | None = None) -> Iterator[None]:
        """Keep other processes from doing the same step of this session at the same time.

        Args:
            step: Name of the step.
            seconds: How long to wait for another process; as for the class when None.

        Yields:
            Nothing.

        Raises:
            SessionLocked: Another process does it.
        """
        with self._locked(step, seconds):
            yield

    @property
    def exists(self) -> bool:
        """Whether anything was written down of the session."""
        match self.session.backup:
            case "local":
                return _read_local(self.path) is not None
            case "vip":
                return self._read_vip() is not None
            case _:
                return _read_local(self._working) is not None

    @property
    def _where(self) -> str:
        return {"local": str(self.path), "vip": self._vip_path}.get(self.session.backup or "", str(self._working))

    @contextmanager
    def _locked(self, what: str, seconds: float | None = None) -> Iterator[None]:
        lock = self.session.output_dir / LOCKS / f"{what}.lock"
        patience = self._lock_seconds if seconds is None else seconds
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(lock, seconds=patience, what=what))
            except HeldElsewhere:
                raise SessionLocked(
                    f"{self._where} is locked: another process holds {what!r} of session {self.session.session_name!r} "
                    f"for more than {patience:.0f} s. Wait for it, or stop it, and run this again."
                ) from None
            yield

    def _parsed(self, text: bytes, where: object) -> SessionRecord:
        record = parse(text, str(where))
        if record.session_name != self.session.session_name:
            raise LedgerError(
                f"{where} belongs to session {record.session_name!r}, not to {self.session.session_name!r}. "
                "Choose another output_dir, or that session_name. The file was left as it is."
            )
        return record

    def _write(self, record: SessionRecord) -> None:
        content = json.dumps(record.model_dump(mode="json", exclude_none=False), indent=4).encode()
        if b"\\ud" in content:
            _refuse_halves(content, record.session_name)
        # What is kept on the platform or nowhere has a working copy here: the platform's goes with the outputs.
        path = self.path if self.session.backup == "local" else self._working
        with atomic_write(path, mode=0o600) as file:
            file.write(content)
        if self.session.backup == "vip" and not record.ledger.is_removed:
            self._write_vip()

    def _read_vip(self) -> SessionRecord | None:
        """The newer of the copies here and on the platform; None when there is none."""
        text = _read_local(self._working)
        if text is None:
            text = _read_local(self.session.output_dir / _ON_ITS_WAY)
        here = self._parsed(text, self._working) if text is not None else None
        if here is not None and here.ledger.is_removed:
            return here
        client = self._needed_client()
        if not client.exists(self._vip_path):
            # A write that was broken off has deleted the old file.
            return here
        there = self._parsed(client.read_file(self._vip_path, max_bytes=_MAX_BYTES), self._vip_path)
        return here if here is not None and here.ledger.revision > there.ledger.revision else there

    def _write_vip(self) -> None:
        client = self._needed_client()
        client.make_folder(self.session.vip_output_dir)
        if client.exists(self._vip_path):
            delete_and_wait(client, self._vip_path, timeout_seconds=_DELETE_SECONDS)
        put_and_verify(client, self._working, self._vip_path)

    def _from_platform(self) -> SessionRecord:
        """Without a file the names of the executions tell what the session has launched."""
        record = SessionRecord.of(self.session)
        names = {self.session.workflow_name(number) for number in range(1, self.session.nb_runs + 1)}
        for workflow in reversed(self._needed_client().workflows()):
            if workflow.name in names:
                record.note_workflow(workflow)
        return record

    def _needed_client(self) -> VipClient:
        if self._client is None:
            raise LedgerError("Without a local session file, a client is needed to look at the platform.")
        return self._client


def _refuse_halves(content: bytes, session_name: str) -> None:
    """Refuse halves of characters, which are how Python keeps bytes that are no text: no reader takes them."""
    try:
        json.dumps(json.loads(content), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LedgerError(
            f"The record of session {session_name!r} would hold a text that is no Unicode, and could not be read "
            "again. Look for it among values, metadata and names. Nothing was written."
        ) from None


def _read_local(path: Path) -> bytes | None:
    """The content of a file; None when there is none."""
    with on_disk(path.parent):
        try:
            path.lstat()
        except FileNotFoundError:
            return None
        # A link that leads nowhere, to a disk that is not there, is no sign that nothing was written.
        return path.read_bytes()


def sessions_below(folder: Path) -> list[Path]:
    """Find the sessions of a folder, wherever their session files are kept.

    Args:
        folder: Folder whose sub-folders are those of sessions.

    Returns:
        The folders from which `open_session` can open one, sorted.
    """
    records = [*folder.glob(f"*/{FILE_NAME}"), *folder.glob(f"*/{LOCKS}/{FILE_NAME}")]
    return sorted({folder / path.relative_to(folder).parts[0] for path in records})


def open_session(
    output_dir: Path, *, session_name: str | None = None, client: VipClient | None = None, vip_home: str = VIP_HOME
) -> VipSession:
    """Make the session out of its session file alone, as its newest intent has it.

    Args:
        output_dir: Folder of the outputs and of `session_data.json`.
        session_name: When given, the file must be of this session; needed to find a file on the platform.
        client: When given and there is no local file, the file is looked for on the platform.
        vip_home: Folder on the platform that holds the folders of sessions.

    Returns:
        The session.

    Raises:
        LedgerError: There is no file, it is damaged, or it belongs to another session.
    """
    return open_intents(output_dir, session_name=session_name, client=client, vip_home=vip_home)[-1]


def open_intents(
    output_dir: Path, *, session_name: str | None = None, client: VipClient | None = None, vip_home: str = VIP_HOME
) -> list[VipSession]:
    """Make the session out of its session file alone, once for each intent that the file has.

    Args:
        output_dir: As for `open_session`.
        session_name: As for `open_session`.
        client: As for `open_session`.
        vip_home: As for `open_session`.

    Returns:
        The session with the pipeline, settings and options of each intent; the newest is the last.

    Raises:
        LedgerError: As for `open_session`.
    """
    record, where, backup = _found(output_dir, session_name, client, vip_home)
    if session_name not in (None, record.session_name):
        raise LedgerError(f"{where} belongs to session {record.session_name!r}, not to {session_name!r}.")
    try:
        return [_session_of(record, token, output_dir, backup) for token in record.ledger.intents]
    except ValidationError as error:
        raise damaged(where, error) from None


def with_bids_files(session: VipSession) -> VipSession:
    """Answer the values that ask a BIDS dataset for files. Nothing is sent.

    Safe to repeat: a session that was begun keeps the files that its record has, whatever comes to the dataset.

    Args:
        session: The session; its `input_dir` is the dataset.

    Returns:
        The session with lists of files in the place of such values, and these as its `questions`.

    Raises:
        PreflightFailed: No dataset, no such entity, or no file that matches; with all problems at once.
        LedgerError: The session file in its output folder is damaged.
    """
    questions = bids.questions(session.input_settings, session.input_dir)
    if not questions:
        return session
    begun = _begun_here(session)
    if begun is not None and begun.questions == questions:
        files = {name: begun.given[name] for name in questions}
    else:
        files = bids.answers(questions, session.input_dir)
    settings = {**session.input_settings, **files}
    return session.model_copy(update={"input_settings": settings, "questions": questions})


def _begun_here(session: VipSession) -> IntentRecord | None:
    """The intent of a session that was begun on this machine."""
    for name in (FILE_NAME, f"{LOCKS}/{FILE_NAME}", _ON_ITS_WAY):
        path = session.output_dir / name
        if (text := _read_local(path)) is not None:
            record = parse(text, str(path))
            return record.ledger.intents.get(session.token) if record.session_name == session.session_name else None
    return None


def _found(
    output_dir: Path, session_name: str | None, client: VipClient | None, vip_home: str
) -> tuple[SessionRecord, str, str | None]:
    """The record of a session, where it was found, and where it is kept."""
    path = output_dir / FILE_NAME
    if (text := _read_local(path)) is not None:
        return parse(text, str(path)), str(path), "local"
    for working in (output_dir / LOCKS / FILE_NAME, output_dir / _ON_ITS_WAY):
        if (text := _read_local(working)) is not None:
            record = parse(text, str(working))
            return record, str(working), "vip" if working.name == _ON_ITS_WAY else record.ledger.backup
    where = f"{vip_home}/{session_name}/OUTPUTS/{FILE_NAME}"
    if client is not None and session_name is not None and client.exists(where):
        return parse(client.read_file(where, max_bytes=_MAX_BYTES), where), where, "vip"
    raise LedgerError(f"There is no {path}. Give the folder that holds the session's {FILE_NAME}.")


def _session_of(record: SessionRecord, token: str, output_dir: Path, backup: str | None) -> VipSession:
    intent = record.ledger.intents[token]
    sent = intent.given if intent.input_settings is None else intent.input_settings
    return VipSession.model_validate(
        {
            "session_name": record.session_name,
            "pipeline_id": intent.pipeline_id,
            "input_settings": sent,
            "questions": intent.questions,
            "input_dir": intent.local_input_dir,
            "output_dir": output_dir,
            "vip_input_dir": intent.vip_input_dir or f"{PurePosixPath(record.vip_output_dir).parent}/INPUTS",
            "vip_output_dir": record.vip_output_dir,
            "nb_runs": intent.nb_runs,
            "token": token,
            "backup": backup,
            "girder_output_dir": intent.girder_output_dir,
            "girder_metadata": intent.girder_metadata,
            "girder_download": intent.girder_download,
            "options": intent.options,
        }
    )
