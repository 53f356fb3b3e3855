"""What is written down of a session: the content of `session_data.json`.

The keys are those of vip-client 0.1.10, which describe the newest intent of the session. The last one,
`prefect_biomed`, is the ledger of what we intend and did, for all of its intents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

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

from prefect_biomed.clients.errors import LedgerError, invalid_fields
from prefect_biomed.clients.files import is_later_version
from prefect_biomed.clients.once import Origin
from prefect_biomed.clients.polling import Uptime, now
from prefect_biomed.clients.vip.models import (
    TOKEN,
    InputValue,
    PathEntry,
    SessionOptions,
    VipSession,
    Workflow,
    WorkflowStatus,
    without_tokens,
)

__all__ = [
    "EndedRecord",
    "InputsRecord",
    "IntentRecord",
    "LaunchRecord",
    "Ledger",
    "SessionRecord",
    "UploadedFile",
    "WorkflowRecord",
    "damaged",
    "digest_of_inputs",
    "parse",
]

VERSION = 2
"""Version of the layout of our part of a session file."""
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
        origin: How the execution was had; None in files of earlier releases.
    """

    intended: AwareDatetime
    uptime: Uptime | None = None
    since: AwareDatetime | None = None
    results_location: str
    girder_inputs: dict[str, InputValue] = Field(default_factory=dict)
    workflow_id: str | None = None
    started_by: str | None = None
    origin: Origin | None = None


class InputsRecord(BaseModel):
    """The inputs of one intent, written before the first of them is sent.

    Attributes:
        include: Patterns of the files to send; all when empty.
        exclude: Patterns of files not to send.
        expected: Sizes of the files by path below the input folder. Empty where nobody could tell what they are, and in
            files of earlier releases once all were there.
        is_complete: Whether all are on the platform; None when nobody has written it down.
        proven: When the platform was last seen to have them all; None when nobody has looked.
        digest: SHA-256 over names and digests of all files, once they are complete.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    expected: dict[str, int] = Field(default_factory=dict)
    is_complete: bool | None = None
    proven: AwareDatetime | None = None
    digest: str | None = None


class IntentRecord(BaseModel):
    """What one launch of the session is to be, written before anything is sent for it.

    Attributes:
        begun_at: When it was written; None for one of an earlier release.
        pipeline_id: Pipeline to run; None for a session that only holds inputs.
        given: Values of its parameters as the user gave them, with the files of a BIDS dataset that he asked for.
        questions: See `VipSession`.
        input_settings: The same as they are sent; None until the pre-flight.
        nb_runs: Number of runs.
        local_input_dir: Folder of the inputs here.
        vip_input_dir: Folder of the inputs on the platform; that of another session when they are borrowed.
        inputs: Which inputs, and whether they are on the platform.
        required_outputs: Names of the outputs that every successful run has; None until the pre-flight.
        options: What decides success and removal.
        girder_output_dir: See `VipSession`.
        girder_metadata: See `VipSession`.
        girder_download: See `VipSession`.
    """

    model_config = ConfigDict(extra="allow")

    begun_at: AwareDatetime | None = None
    pipeline_id: str | None = None
    given: dict[str, InputValue] = Field(default_factory=dict)
    questions: dict[str, InputValue] = Field(default_factory=dict)
    input_settings: dict[str, InputValue] | None = None
    nb_runs: int = 1
    local_input_dir: str | None = None
    vip_input_dir: str | None = None
    inputs: InputsRecord = Field(default_factory=InputsRecord)
    required_outputs: tuple[str, ...] | None = None
    options: SessionOptions = SessionOptions()
    girder_output_dir: str | None = None
    girder_metadata: dict[str, JsonValue] = Field(default_factory=dict)
    girder_download: bool = False

    @classmethod
    def of(cls, session: VipSession) -> IntentRecord:
        """Make the record of an intent of which nothing has been sent.

        Args:
            session: The session as it is to run.

        Returns:
            The record.
        """
        return cls(
            pipeline_id=session.pipeline_id,
            given=session.input_settings,
            questions=session.questions,
            nb_runs=session.nb_runs,
            local_input_dir=str(session.input_dir) if session.input_dir else None,
            vip_input_dir=session.vip_input_dir,
            options=session.options,
            girder_output_dir=session.girder_output_dir,
            girder_metadata=session.girder_metadata,
            girder_download=session.girder_download,
        )

    def runs_the_same(self, session: VipSession) -> bool:
        """Tell whether a session runs the same pipeline with the same settings.

        Args:
            session: The session; its settings may be as given or as sent.

        Returns:
            True when it does.
        """
        asked = _as_json(session.input_settings)
        known = [_as_json(settings) for settings in (self.given, self.input_settings) if settings is not None]
        return self.pipeline_id == session.pipeline_id and asked in known

    def update(self, session: VipSession, sent: Mapping[str, InputValue] | None = None) -> None:
        """Take over how a session is to run from now on. Its options and what is known of the inputs stay.

        Args:
            session: The session.
            sent: Its settings as they are sent, once the pre-flight has been made.
        """
        same = self.runs_the_same(session)
        fresh = IntentRecord.of(session)
        for name in fresh.model_fields_set - {"options"} - ({"given"} if same else set()):
            setattr(self, name, getattr(fresh, name))
        if sent is not None:
            self.input_settings = dict(sent)
        elif not same:
            self.input_settings = None


def _as_json(settings: Mapping[str, InputValue]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


class EndedRecord(BaseModel):
    """How an execution has ended, which the platform may not tell any more once it is removed.

    Attributes:
        status: Its last status.
        jobs: Number of its jobs, where the platform tells.
        failed_jobs: How many of them failed.
        open_jobs: Of how many of them nobody knows how they ended.
        outputs: Number of its outputs.
        output_names: Names of the outputs that have files, where the platform tells.
        seen: When it was first seen to have ended; None in files of earlier releases.
    """

    status: str
    jobs: int = 0
    failed_jobs: int = 0
    open_jobs: int = 0
    outputs: int = 0
    output_names: tuple[str, ...] = ()
    seen: AwareDatetime | None = None


class Ledger(BaseModel):
    """What vip-client does not record.

    Attributes:
        version: Version of this layout.
        backup: Where the session file is kept.
        revision: Counts the changes, so that of two copies the newer is known.
        intents: What was intended, by token; the newest is the last.
        begun: Names of executions whose launch was begun, whatever came of it.
        launches: Intents of which a request may have been sent, by execution name. One that was refused is none.
        uploads: Files sent, by path relative to the input folder.
        ended: How executions have ended, by identifier.
        downloaded: Workflows whose wanted outputs were all here, written before anything is removed.
        is_removed: Whether the removal of the outputs from the platform was begun.
        removing: Workflows of which alone that was begun, because others of the session went on.
        resume: What waits to be resumed when all executions have ended, for instance a flow run.
        platform_url: Address of the platform, as it was last talked to.
    """

    model_config = ConfigDict(extra="allow")

    version: int = VERSION
    backup: Literal["local", "vip"] | None = "local"
    revision: int = 0
    intents: dict[Annotated[str, Field(pattern=TOKEN)], IntentRecord] = Field(min_length=1)
    begun: list[str] = Field(default_factory=list)
    launches: dict[str, LaunchRecord] = Field(default_factory=dict)
    uploads: dict[str, UploadedFile] = Field(default_factory=dict)
    ended: dict[str, EndedRecord] = Field(default_factory=dict)
    downloaded: list[str] = Field(default_factory=list)
    is_removed: bool = False
    removing: list[str] = Field(default_factory=list)
    resume: str | None = None
    platform_url: str | None = None

    @property
    def newest(self) -> str:
        """Token of the newest intent."""
        return list(self.intents)[-1]

    def is_given_up(self, workflow_id: str) -> bool:
        """Tell whether the outputs of a workflow, once fetched, may be gone from the platform.

        Args:
            workflow_id: The workflow.

        Returns:
            True when their removal was begun after they had been fetched.
        """
        return workflow_id in self.downloaded and (self.is_removed or workflow_id in self.removing)

    def launched(self, token: str) -> dict[str, LaunchRecord]:
        """Those of the launches that belong to an intent.

        Args:
            token: The intent.

        Returns:
            Launches by execution name.
        """
        return {name: launch for name, launch in self.launches.items() if name.endswith(f"-{token}")}


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
    def _read_versions(cls, content: Any) -> Any:
        ours = content.get("prefect_biomed") if isinstance(content, dict) else None
        if not isinstance(ours, dict):
            return content
        if is_later_version(ours.get("version"), VERSION):
            raise LedgerError(
                f"The record of session {content.get('session_name')!r} was written by a later version of "
                "prefect-biomed. Update the package on this machine. The record was left as it is."
            )
        if ours.get("version") == 1:
            return {**content, "prefect_biomed": _with_intents(content, ours)}
        return content

    @classmethod
    def of(cls, session: VipSession) -> SessionRecord:
        """Make the record of a session to which nothing has happened yet.

        Args:
            session: The session.

        Returns:
            A record without workflows.
        """
        return cls(
            session_name=session.session_name,
            pipeline_id=session.pipeline_id,
            local_input_dir=str(session.input_dir) if session.input_dir else None,
            local_output_dir=str(session.output_dir),
            vip_input_dir=session.vip_input_dir,
            vip_output_dir=session.vip_output_dir,
            input_settings=dict(session.input_settings),
            workflows={},
            prefect_biomed=Ledger(backup=session.backup, intents={session.token: IntentRecord.of(session)}),
        )

    @property
    def ledger(self) -> Ledger:
        """Our part; made when vip-client began the session, with an intent for what it has done."""
        if self.prefect_biomed is None:
            theirs = IntentRecord(
                pipeline_id=self.pipeline_id,
                given=self.input_settings or {},
                input_settings=self.input_settings,
                local_input_dir=self.local_input_dir,
                vip_input_dir=self.vip_input_dir,
            )
            self.prefect_biomed = Ledger(intents={_ADOPTED: theirs})
        return self.prefect_biomed

    def is_adopted(self, token: str) -> bool:
        """Tell whether vip-client has launched what an intent is about, whoever began it, so that nothing is missing.

        Args:
            token: The intent.

        Returns:
            True when it has executions of which no launch of ours tells.
        """
        return bool(self.workflows_of(token)) and not self.ledger.launched(token)

    def workflows_of(self, token: str) -> list[str]:
        """List the executions of one intent.

        Args:
            token: The intent.

        Returns:
            Identifiers, oldest first. Those of which no launch tells belong to vip-client, or to the only intent.
        """
        ledger = self.ledger
        owner = {
            launch.workflow_id: self.token_of(name) for name, launch in ledger.launches.items() if launch.workflow_id
        }
        others = _ADOPTED if _ADOPTED in ledger.intents else next(iter(ledger.intents))
        return [identifier for identifier in self.workflows if owner.get(identifier, others) == token]

    @staticmethod
    def token_of(name: str) -> str:
        """Tell to which intent an execution belongs by its name.

        Args:
            name: `<session>-r<repetition>-<token>`.

        Returns:
            The token.
        """
        return name.rpartition("-")[2]

    def adopt(self, found: Sequence[Workflow]) -> None:
        """Write down executions that were found by their names, of which the launch is not known to have come about.

        Args:
            found: The executions, oldest first; of several with one name the oldest is taken for the run.
        """
        for workflow in found:
            launch = self.ledger.launches.get(workflow.name)
            if launch is not None and launch.workflow_id is None:
                launch.workflow_id = workflow.identifier
            self.note_workflow(workflow)

    @property
    def over(self) -> frozenset[str]:
        """The executions that somebody has seen to have ended."""
        return frozenset((*self.ledger.ended, *self.workflow_ids(WorkflowStatus.REMOVED)))

    def open_runs(self, token: str) -> list[str]:
        """List the executions of one intent whose outputs were not removed from the platform.

        Args:
            token: The intent.

        Returns:
            Identifiers, oldest first.
        """
        still = self.workflow_ids()
        return [identifier for identifier in self.workflows_of(token) if identifier in still]

    def repetitions_to_launch(self, session: VipSession, *, is_newest: bool) -> list[int]:
        """List the runs of an intent that are to be launched, or looked for, when it is taken up again.

        Args:
            session: The session, as one of its intents has it.
            is_newest: Whether it is the newest intent; what was refused of an older one is left alone.

        Returns:
            Numbers of the runs that are not known to have ended; none of a session that only holds inputs.
        """
        if session.pipeline_id is None:
            return []
        over = self.over
        wanted = []
        for repetition in range(1, session.nb_runs + 1):
            name = session.workflow_name(repetition)
            launch = self.ledger.launches.get(name)
            was_refused = launch is None and name in self.ledger.begun
            if (is_newest or not was_refused) and (launch is None or launch.workflow_id not in over):
                wanted.append(repetition)
        return wanted

    def left_alone(self, session: VipSession) -> list[str]:
        """Name the runs of an intent that were refused, and so are not launched once something else was begun.

        Args:
            session: The session, as one of its older intents has it.

        Returns:
            Names of executions.
        """
        names = map(session.workflow_name, range(1, session.nb_runs + 1))
        return [name for name in names if name in self.ledger.begun and name not in self.ledger.launches]

    def not_launched(self, session: VipSession, *, is_newest: bool) -> list[str]:
        """Name the runs of an intent that were not launched, as far as anybody has written down.

        Args:
            session: The session, as one of its intents has it.
            is_newest: As for `repetitions_to_launch`.

        Returns:
            Names of executions; none of what vip-client has launched.
        """
        if self.is_adopted(session.token):
            return []
        names = map(session.workflow_name, self.repetitions_to_launch(session, is_newest=is_newest))
        launches = self.ledger.launches
        return [name for name in names if name not in launches or launches[name].workflow_id is None]

    def intent_of(self, workflow_id: str) -> str:
        """Tell to which intent an execution belongs.

        Args:
            workflow_id: The execution.

        Returns:
            Its token.
        """
        tokens = [token for token in self.ledger.intents if workflow_id in self.workflows_of(token)]
        return tokens[0] if tokens else self.ledger.newest

    def refuse_another(self, session: VipSession) -> None:
        """Make sure that a token does not stand for two experiments.

        Args:
            session: The session that is to be launched.

        Raises:
            LedgerError: Something else was launched under its token.
        """
        known = self.ledger.intents.get(session.token)
        launched = self.ledger.launched(session.token)
        if known is None or known.runs_the_same(session) or not launched:
            return
        raise LedgerError(
            f"Session {session.session_name!r} has launched {known.pipeline_id} with other settings under the token "
            f"{session.token!r} ({', '.join(launched)}). Take another token, or another session_name; what was "
            "launched stays as it is."
        )

    def refuse_incomplete_inputs(self, session: VipSession) -> None:
        """Make sure that a launch does not compute on a part of the inputs.

        Args:
            session: The session that is to be launched.

        Raises:
            LedgerError: Its upload was begun and has not come to its end.
        """
        intent = self.ledger.intents.get(session.token)
        if intent is not None and intent.inputs.is_complete is False:
            raise LedgerError(
                f"The upload of the inputs of session {session.session_name!r} has not come to its end. Upload them "
                "again, or run vip_resume, which sends what is missing."
            )

    def note_intent(self, session: VipSession, sent: Mapping[str, InputValue] | None = None) -> IntentRecord:
        """Write down what is intended, beside what was intended under this name before.

        Args:
            session: The session.
            sent: Its settings as they are sent, once the pre-flight has been made.

        Returns:
            The record of the intent, to be changed in place.

        Raises:
            LedgerError: As for `refuse_another`.
        """
        self.refuse_another(session)
        ledger = self.ledger
        ledger.backup = session.backup
        if session.token not in ledger.intents:
            ledger.intents[session.token] = IntentRecord.of(session)
            ledger.is_removed = False
        intent = ledger.intents[session.token]
        intent.begun_at = intent.begun_at or now()
        intent.update(session, sent)
        if session.token == ledger.newest:
            self.pipeline_id = intent.pipeline_id
            self.input_settings = intent.given if intent.input_settings is None else intent.input_settings
            self.local_input_dir = intent.local_input_dir
            self.vip_input_dir = intent.vip_input_dir
        return intent

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
        if workflow.status.is_terminal and workflow.status != WorkflowStatus.REMOVED:
            self._note_end(workflow)

    def _note_end(self, workflow: Workflow) -> None:
        known = self.ledger.ended.get(workflow.identifier)
        # Lists tell neither jobs nor outputs.
        if known is None or known.status != workflow.status or workflow.jobs or workflow.outputs:
            self.ledger.ended[workflow.identifier] = EndedRecord(
                status=workflow.status.value,
                jobs=len(workflow.jobs),
                failed_jobs=len(workflow.failed_jobs),
                open_jobs=len(workflow.open_jobs),
                outputs=len(workflow.outputs),
                output_names=tuple(sorted(workflow.output_names)),
                seen=known.seen if known and known.status == workflow.status else datetime.now().astimezone(),
            )

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
        raise damaged(where, error) from None
    except LedgerError as error:
        raise LedgerError(f"{where}: {error}") from None


def damaged(where: str, error: ValidationError) -> LedgerError:
    """Say what is wrong with a session file.

    Args:
        where: Where it is.
        error: What the models found.

    Returns:
        The error to be raised.
    """
    problems = invalid_fields(error, whole="file", most=5)
    return LedgerError(
        f"{where} is damaged or not a session file ({problems}). It was left as it is. "
        "Restore it, or move it away to begin anew; executions are found again by their names."
    )


def _with_intents(content: Mapping[str, Any], ledger: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger of a file of version 1, which had one intent, spread over the file."""
    moved = ("token", "nb_runs", "girder_output_dir", "girder_metadata", "girder_download")
    settings = content.get("input_settings")
    intent = {
        **{name: ledger[name] for name in moved[1:] if name in ledger},
        "pipeline_id": content.get("pipeline_id"),
        "given": settings or {},
        "input_settings": settings,
        "local_input_dir": content.get("local_input_dir"),
        "vip_input_dir": content.get("vip_input_dir"),
        # Nothing was launched before all inputs had arrived.
        "inputs": {"is_complete": True if ledger.get("launches") or content.get("workflows") else None},
    }
    kept = {name: value for name, value in ledger.items() if name not in moved}
    return {**kept, "version": VERSION, "intents": {ledger.get("token"): intent}}


def digest_of_inputs(names: Mapping[str, int], sent: Mapping[str, UploadedFile]) -> str | None:
    """Digest the inputs of an intent.

    Args:
        names: The files, by path below the input folder.
        sent: What is known of files that were sent.

    Returns:
        SHA-256 over names and digests in the order of the names; None when the content of one is not known.
    """
    if not names or not names.keys() <= sent.keys():
        return None
    lines = "".join(f"{sent[name].sha256}  {name}\n" for name in sorted(names))
    return hashlib.sha256(lines.encode()).hexdigest()
