"""`session_data.json`: the session as vip-client writes it, and beside it the ledger of what we did.

vip-client 0.1.10 reads our files and keeps the key `prefect_biomed` when it saves; we read its files and keep every key
we do not know.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from prefect_biomed.clients.errors import HeldElsewhere, LedgerError
from prefect_biomed.clients.files import atomic_write, exclusive, on_disk
from prefect_biomed.clients.polling import Uptime
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import SessionLocked
from prefect_biomed.clients.vip.models import (
    InputValue,
    PathEntry,
    VipSession,
    Workflow,
    WorkflowStatus,
    without_tokens,
)
from prefect_biomed.clients.vip.remote_files import delete_and_wait, put_and_verify

__all__ = ["LaunchRecord", "SessionFile", "SessionRecord", "UploadedFile", "WorkflowRecord", "open_session"]

logger = logging.getLogger(__name__)

FILE_NAME = "session_data.json"
VERSION = 1
"""Version of the layout of our part of a session file."""
VIP_HOME = "/vip/Home/API"
LOCKS = ".locks"
_ON_ITS_WAY = f".{FILE_NAME}.vip"
_MAX_BYTES = 64 * 1024 * 1024
_DELETE_SECONDS = 60.0
_ADOPTED = "adopted"


class UploadedFile(BaseModel):
    """A local file as it was when it was sent.

    Attributes:
        size: Bytes.
        mtime_ns: Modification time in nanoseconds.
        sha256: Digest of the content.
    """

    size: int
    mtime_ns: int
    sha256: str


class LaunchRecord(BaseModel):
    """The intent to launch one repetition, written before the request.

    Attributes:
        intended: When it was written.
        uptime: The same moment by the machine's uptime.
        since: Since when other machines may have sent a launch; None for none.
        results_location: Folder of its results, on the platform or on Girder as `<storage>:<folder id>`.
        girder_inputs: Values of the parameters that name files on Girder, as sent. Kept with the first launch; the
            others send the same, although a folder may have changed since.
        workflow_id: The execution; None until the platform has answered.
        started_by: What launched it, for instance a flow run; to trace it back.
    """

    intended: AwareDatetime
    uptime: Uptime | None = None
    since: AwareDatetime | None = None
    results_location: str
    girder_inputs: dict[str, InputValue] = Field(default_factory=dict)
    workflow_id: str | None = None
    started_by: str | None = None


class Ledger(BaseModel):
    """What vip-client does not record.

    Attributes:
        version: Version of this layout.
        token: Token of the intent that made the session.
        nb_runs: Number of runs the session is to have.
        begun: Names of executions whose launch was begun, whatever came of it.
        launches: Intents of which a request may have been sent, by execution name. One that was refused is none.
        uploads: Files sent, by path relative to the input folder.
        downloaded: Workflows whose outputs are all here.
        girder_output_dir: See `VipSession`.
        girder_metadata: See `VipSession`.
        girder_download: See `VipSession`.
        resume: What waits to be resumed when all executions have ended, for instance a flow run.
    """

    model_config = ConfigDict(extra="allow")

    version: int = VERSION
    token: str
    nb_runs: int = 1
    begun: list[str] = Field(default_factory=list)
    launches: dict[str, LaunchRecord] = Field(default_factory=dict)
    uploads: dict[str, UploadedFile] = Field(default_factory=dict)
    downloaded: list[str] = Field(default_factory=list)
    girder_output_dir: str | None = None
    girder_metadata: dict[str, JsonValue] = Field(default_factory=dict)
    girder_download: bool = False
    resume: str | None = None

    def note_girder(self, session: VipSession) -> None:
        """Write down what a session wants of Girder.

        Args:
            session: The session.
        """
        self.girder_output_dir = session.girder_output_dir
        self.girder_metadata = session.girder_metadata
        self.girder_download = session.girder_download


def _without_tokens(outputs: Any) -> Any:
    if not isinstance(outputs, list):
        return outputs
    return [
        output | {"path": without_tokens(output["path"])}
        if isinstance(output, dict) and isinstance(output.get("path"), str)
        else output
        for output in outputs
    ]


class WorkflowRecord(BaseModel):
    """One workflow as vip-client records it.

    Attributes:
        status: Status at the last look.
        start: Local time, `YYYY/MM/DD HH:MM:SS`.
        outputs: Its outputs: `path`, and `isDirectory`, `size`, `exists` when known.
    """

    model_config = ConfigDict(extra="allow")

    status: str
    start: str
    outputs: Annotated[list[dict[str, Any]], BeforeValidator(_without_tokens)] = Field(default_factory=list)


class SessionRecord(BaseModel):
    """The content of `session_data.json`; the keys are vip-client's but for the last.

    One of a later version of the package is refused with `LedgerError`: it may hold what must not be lost.
    """

    model_config = ConfigDict(extra="allow")

    session_name: str
    pipeline_id: str | None
    local_input_dir: str | None = None
    local_output_dir: str | None = None
    vip_input_dir: str | None = None
    vip_output_dir: str
    input_settings: dict[str, InputValue] | None
    workflows: dict[str, WorkflowRecord]
    prefect_biomed: Ledger | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_later_version(cls, content: Any) -> Any:
        ours = content.get("prefect_biomed") if isinstance(content, dict) else None
        version = ours.get("version") if isinstance(ours, dict) else None
        if isinstance(version, int) and version > VERSION:
            raise LedgerError(
                f"The record of session {content.get('session_name')!r} was written by a later version of "
                "prefect-biomed. Update the package on this machine. The record was left as it is."
            )
        return content

    @classmethod
    def of(cls, session: VipSession) -> SessionRecord:
        """Make the record of a session to which nothing has happened yet.

        Args:
            session: The session.

        Returns:
            A record without workflows.
        """
        ledger = Ledger(token=session.token, nb_runs=session.nb_runs)
        ledger.note_girder(session)
        return cls(
            session_name=session.session_name,
            pipeline_id=session.pipeline_id,
            local_input_dir=str(session.input_dir) if session.input_dir else None,
            local_output_dir=str(session.output_dir),
            vip_input_dir=session.vip_input_dir,
            vip_output_dir=session.vip_output_dir,
            input_settings=dict(session.input_settings),
            workflows={},
            prefect_biomed=ledger,
        )

    @property
    def ledger(self) -> Ledger:
        """Our part; made when vip-client began the session, with a token of its own."""
        if self.prefect_biomed is None:
            self.prefect_biomed = Ledger(token=_ADOPTED)
        return self.prefect_biomed

    @property
    def is_adopted(self) -> bool:
        """Whether vip-client began the session."""
        return self.ledger.token == _ADOPTED

    def note_workflow(self, workflow: Workflow) -> None:
        """Write down how a workflow was at the last look.

        Args:
            workflow: What the platform told. Sizes of outputs that are known already are kept.
        """
        old = self.workflows.get(workflow.identifier)
        if old is not None and old.status == WorkflowStatus.REMOVED:
            return
        started = workflow.start_date or datetime.now().astimezone()
        known = {output["path"]: output for output in old.outputs} if old else {}
        record = WorkflowRecord(
            status=workflow.status.value,
            start=started.astimezone().strftime("%Y/%m/%d %H:%M:%S"),
            outputs=[known.get(path, {"path": path}) for path in workflow.outputs] or list(known.values()),
        )
        self.workflows[workflow.identifier] = old.model_copy(update=dict(record)) if old else record

    def note_outputs(self, workflow_id: str, outputs: list[PathEntry]) -> None:
        """Write down the outputs of a workflow with their sizes.

        Args:
            workflow_id: The workflow.
            outputs: What `GET /executions/{id}/results` gave.
        """
        self.workflows[workflow_id].outputs = [
            entry.model_dump(by_alias=True, include={"path", "is_directory", "size", "exists"}) for entry in outputs
        ]

    def workflow_ids(self, *statuses: str) -> list[str]:
        """List the workflows of the session.

        Args:
            *statuses: Only those with one of these statuses; all but `Removed` when none is given.

        Returns:
            Identifiers, oldest first.
        """
        wanted = set(statuses)
        return [
            identifier
            for identifier, record in self.workflows.items()
            if (record.status in wanted if wanted else record.status != WorkflowStatus.REMOVED)
        ]


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
        self._on_its_way = session.output_dir / _ON_ITS_WAY
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
        match self.session.backup:
            case "local":
                text = _read_local(self.path)
            case "vip":
                text = self._read_vip()
            case _:
                return self._from_platform()
        if text is None:
            return SessionRecord.of(self.session)
        return self._belonging(parse(text, self._where))

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
    def _where(self) -> str:
        return self._vip_path if self.session.backup == "vip" else str(self.path)

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

    def _belonging(self, record: SessionRecord) -> SessionRecord:
        if record.session_name != self.session.session_name:
            raise LedgerError(
                f"{self._where} belongs to session {record.session_name!r}, not to {self.session.session_name!r}. "
                "Choose another output_dir, or that session_name. The file was left as it is."
            )
        return record

    def _write(self, record: SessionRecord) -> None:
        content = json.dumps(record.model_dump(mode="json", exclude_none=False), indent=4).encode()
        match self.session.backup:
            case "local":
                with atomic_write(self.path, mode=0o600) as file:
                    file.write(content)
            case "vip":
                self._write_vip(content)

    def _read_vip(self) -> bytes | None:
        client = self._needed_client()
        if not client.exists(self._vip_path):
            # A write that was broken off has deleted the old file, and what it was to put there is still here.
            return _read_local(self._on_its_way)
        return client.read_file(self._vip_path, max_bytes=_MAX_BYTES)

    def _write_vip(self, content: bytes) -> None:
        client = self._needed_client()
        with atomic_write(self._on_its_way, mode=0o600) as file:
            file.write(content)
        client.make_folder(self.session.vip_output_dir)
        if client.exists(self._vip_path):
            delete_and_wait(client, self._vip_path, timeout_seconds=_DELETE_SECONDS)
        put_and_verify(client, self._on_its_way, self._vip_path)
        with on_disk(self.session.output_dir):
            self._on_its_way.unlink()

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


def parse(text: bytes, where: str) -> SessionRecord:
    """Decode a session file.

    Args:
        text: Its content.
        where: Where it came from, for messages.

    Returns:
        The record.

    Raises:
        LedgerError: It is not JSON, lacks what vip-client writes, or is of a later version of the package.
    """
    try:
        return SessionRecord.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(where, error) from None
    except LedgerError as error:
        raise LedgerError(f"{where}: {error}") from None


def _read_local(path: Path) -> bytes | None:
    """The content of a file; None when there is none."""
    with on_disk(path.parent):
        try:
            path.lstat()
        except FileNotFoundError:
            return None
        # A link that leads nowhere, to a disk that is not there, is no sign that nothing was written.
        return path.read_bytes()


def _damaged(where: str, error: ValidationError) -> LedgerError:
    problems = "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
        for problem in error.errors(include_input=False, include_url=False)[:5]
    )
    return LedgerError(
        f"{where} is damaged or not a session file ({problems}). It was left as it is. "
        "Restore it, or move it away to begin anew; executions are found again by their names."
    )


def open_session(
    output_dir: Path, *, session_name: str | None = None, client: VipClient | None = None, vip_home: str = VIP_HOME
) -> VipSession:
    """Make the session out of its session file alone.

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
    path = output_dir / FILE_NAME
    where, text, backup = str(path), _read_local(path), "local"
    if text is None and client is not None and session_name is not None:
        where, backup = f"{vip_home}/{session_name}/OUTPUTS/{FILE_NAME}", "vip"
        there = client.exists(where)
        text = client.read_file(where, max_bytes=_MAX_BYTES) if there else _read_local(output_dir / _ON_ITS_WAY)
    if text is None:
        raise LedgerError(f"There is no {path}. Give the folder that holds the session's {FILE_NAME}.")
    record = parse(text, where)
    if session_name not in (None, record.session_name):
        raise LedgerError(f"{where} belongs to session {record.session_name!r}, not to {session_name!r}.")
    try:
        return VipSession.model_validate(
            {
                "session_name": record.session_name,
                "pipeline_id": record.pipeline_id,
                "input_settings": record.input_settings or {},
                "input_dir": record.local_input_dir,
                "output_dir": output_dir,
                "vip_input_dir": record.vip_input_dir or f"{PurePosixPath(record.vip_output_dir).parent}/INPUTS",
                "vip_output_dir": record.vip_output_dir,
                "nb_runs": record.ledger.nb_runs,
                "token": record.ledger.token,
                "backup": backup,
                "girder_output_dir": record.ledger.girder_output_dir,
                "girder_metadata": record.ledger.girder_metadata,
                "girder_download": record.ledger.girder_download,
            }
        )
    except ValidationError as error:
        raise _damaged(where, error) from None
