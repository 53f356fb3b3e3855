"""What VIP and other CARMIN platforms speak of, as frozen models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from prefect_biomed.clients.errors import ConfigurationError, invalid_fields
from prefect_biomed.clients.rest import Answered, OpenEnum
from prefect_biomed.clients.vip.profiles import CARMIN, VIP, Profile
from prefect_biomed.clients.vip.values import as_written, is_text, named_values

__all__ = [
    "TOKEN",
    "Descriptor",
    "InputSettings",
    "InputValue",
    "Job",
    "JobStatus",
    "Parameter",
    "ParameterType",
    "PathEntry",
    "Pipeline",
    "Platform",
    "Scalar",
    "SessionOptions",
    "SessionResult",
    "VipSession",
    "Workflow",
    "WorkflowStatus",
    "is_on_girder",
    "without_tokens",
]


def without_tokens(text: str) -> str:
    """Take the tokens of Girder out of addresses and headers in a text that VIP gave.

    Args:
        text: An address, or a log with addresses in it.

    Returns:
        The text with everything else as it was.
    """
    text = _TOKEN_AT_END.sub("", _TOKEN_BEFORE_MORE.sub("", text))
    return _TOKEN_HEADER.sub(r"\1***", text)


def is_on_girder(path: str) -> bool:
    """Tell whether the path of an output is the address of a file on Girder.

    Args:
        path: As VIP gives it.

    Returns:
        True for `girder:/…`.
    """
    return path.startswith("girder:")


def _told(value: Any) -> Any:
    return without_tokens(value) if isinstance(value, str) else value


def _or(default: object) -> WrapValidator:
    """For fields that are not needed: one of another shape counts as not told."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return default

    return WrapValidator(validate)


_Text = Annotated[str, _or("")]
_TextOrNone = Annotated[str | None, _or(None)]


Scalar = str | bool | int | float
InputValue = Annotated[Scalar | list[Scalar | None] | None, BeforeValidator(as_written)]
"""One value of `input_settings`; a list means parallel jobs."""
InputSettings = Annotated[dict[str, InputValue], BeforeValidator(named_values)]
"""Values by parameter, as a mapping or as a JSON text."""

TOKEN = r"^[0-9a-z]{4,32}$"
"""What the token of an intent looks like."""

# Portals before mid-2025 spell "no default" in words.
_NO_DEFAULT = frozenset({"$input.getDefaultValue()", "No_value_provided"})
# VIP hands out addresses of files on Girder with a token in it that works for months.
_TOKEN = r"token(?:=|%3D)[^&;%\s\"'<>]*"
_TOKEN_BEFORE_MORE = re.compile(rf"(?<=[?&;]){_TOKEN}(?:&amp;|&)", re.IGNORECASE)
_TOKEN_AT_END = re.compile(rf"(?:&amp;|%26|[?&;]){_TOKEN}", re.IGNORECASE)
_TOKEN_HEADER = re.compile(r"(girder-token[\"']?\s*[:=]\s*[\"']?)[^\s\"']+", re.IGNORECASE)
# A date in seconds stays below this until the year 5138; one in milliseconds is above it since 1973.
_MILLISECONDS_FROM = 100_000_000_000


class WorkflowStatus(OpenEnum, StrEnum):
    """Status of an execution as the platform names it, and `Removed`, which vip-client adds.

    One that is unknown here is kept; it is not terminal.
    """

    INITIALIZING = "Initializing"
    INITIALIZATION_FAILED = "InitializationFailed"
    READY = "Ready"
    RUNNING = "Running"
    FINISHED = "Finished"
    EXECUTION_FAILED = "ExecutionFailed"
    KILLED = "Killed"
    UNKNOWN = "Unknown"
    REMOVED = "Removed"

    @property
    def is_terminal(self) -> bool:
        """Whether the status will not change any more."""
        return self in _TERMINAL

    @property
    def is_success(self) -> bool:
        """Whether at least one job succeeded; look at the jobs for the others."""
        return self is WorkflowStatus.FINISHED


_TERMINAL = frozenset(
    {
        WorkflowStatus.INITIALIZATION_FAILED,
        WorkflowStatus.FINISHED,
        WorkflowStatus.EXECUTION_FAILED,
        WorkflowStatus.KILLED,
        WorkflowStatus.REMOVED,
    }
)


class JobStatus(OpenEnum, StrEnum):
    """Status of one job of a workflow."""

    SUCCESSFULLY_SUBMITTED = "SUCCESSFULLY_SUBMITTED"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    ERROR = "ERROR"
    ERROR_HELD = "ERROR_HELD"
    STALLED = "STALLED"
    STALLED_HELD = "STALLED_HELD"
    CANCELLED = "CANCELLED"
    DELETED = "DELETED"
    KILL = "KILL"
    RESCHEDULE = "RESCHEDULE"
    REPLICATE = "REPLICATE"

    @property
    def is_terminal(self) -> bool:
        """Whether the status will not change without an operator of the platform."""
        return self.is_success or self.is_failure

    @property
    def is_success(self) -> bool:
        """Whether the job gave its outputs."""
        return self is JobStatus.COMPLETED

    @property
    def is_failure(self) -> bool:
        """Whether the job failed, was cancelled, or is held in error."""
        return self.value.startswith(("ERROR", "STALLED", "CANCELLED", "DELETED", "KILL"))


class _Model(Answered):
    model_config = ConfigDict(populate_by_name=True, alias_generator=to_camel)


def _platform_path(value: Any) -> str:
    """Paths of outputs are paths on VIP, addresses with a token on Girder, and URLs elsewhere.

    CARMIN-server encodes nothing in its URLs.
    """
    if not isinstance(value, str):
        raise ValueError("a path must be a text")
    if is_on_girder(value):
        return without_tokens(value)
    return "/" + value.partition("://")[2].partition("/path/")[2] if "://" in value else value


class Platform(_Model):
    """What `GET /platform` tells.

    Attributes:
        platform_name: Name of the platform.
        max_size_direct_transfer: Largest file that can be downloaded, in bytes; None when not told.
        default_limit_list_executions: How many executions one list may hold.
        unsupported_methods: Names of CARMIN methods the platform lacks.
        supported_api_version: Version of CARMIN.
    """

    platform_name: _Text = ""
    max_size_direct_transfer: Annotated[int | None, _or(None)] = None
    default_limit_list_executions: Annotated[int, _or(500)] = 500
    unsupported_methods: tuple[str, ...] = ()
    supported_api_version: _Text = Field(
        "", validation_alias=AliasChoices("supportedAPIVersion", "supported_api_version")
    )

    @property
    def profile(self) -> Profile:
        """`VIP` where an execution starts by itself, `CARMIN` where it must be played."""
        return VIP if "playExecution" in self.unsupported_methods else CARMIN


class ParameterType(OpenEnum, StrEnum):
    """Type of a pipeline parameter. `List` is a list of anything, files included."""

    FILE = "File"
    STRING = "String"
    BOOLEAN = "Boolean"
    INT64 = "Int64"
    DOUBLE = "Double"
    LIST = "List"


class Parameter(_Model):
    """One parameter of a pipeline.

    Attributes:
        name: Name of the parameter.
        type: Its type.
        is_optional: Whether it may be left out without a default.
        is_returned_value: Whether it is an output.
        default_value: Its default, or None.
        description: Text for users; may hold HTML.
        id: Key of the parameter in `inputValues` where the platform keys by it instead of the name.
        list_of_files: For a `List`, whether its elements are files; None where the platform does not tell.
    """

    name: str
    type: ParameterType = ParameterType.STRING
    is_optional: bool = False
    is_returned_value: bool = False
    default_value: Annotated[
        str | bool | int | float | list[Any] | None,
        BeforeValidator(lambda value: None if value in ("", *_NO_DEFAULT) else value),
    ] = None
    description: _TextOrNone = None
    id: str | None = None
    list_of_files: bool | None = None

    @property
    def is_required(self) -> bool:
        """Whether a launch without a value for it is refused."""
        return not self.is_optional and not self.is_returned_value and self.default_value is None

    @property
    def is_file(self) -> bool:
        """Whether all its values are files."""
        return self.type is ParameterType.FILE or (self.type is ParameterType.LIST and self.list_of_files is True)

    @property
    def may_be_file(self) -> bool:
        """Whether a value can be a file or another thing: a list the platform tells nothing of."""
        return self.type is ParameterType.LIST and self.list_of_files is None

    @property
    def key(self) -> str:
        """Key of the parameter in a launch request."""
        return self.id or self.name


class Pipeline(_Model):
    """A pipeline of the platform.

    Attributes:
        identifier: What a launch names, `Application/version` on VIP.
        name: Name of the application.
        version: Its version.
        description: Text for users; may hold HTML.
        can_execute: Whether this user may launch it.
        parameters: Its parameters; empty in lists of VIP.
        dot_parameters: Parameters whose lists are combined element by element; all others are combined every with
            every. Empty where the platform does not tell.
        counted_parameters: Parameters for which a number N stands for the list 0 … N-1. Empty where the platform does
            not tell.
        described_outputs: Names of the outputs that every successful run has, as its descriptor tells.
        undescribed: Why it is not known what its descriptor tells; None when it is, and in lists.
    """

    identifier: str
    name: _Text = ""
    version: _Text = ""
    description: _TextOrNone = None
    can_execute: Annotated[bool, _or(True)] = True
    parameters: tuple[Parameter, ...] = ()
    dot_parameters: frozenset[str] = frozenset()
    counted_parameters: frozenset[str] = frozenset()
    described_outputs: frozenset[str] = frozenset()
    undescribed: str | None = None

    @property
    def required_outputs(self) -> frozenset[str]:
        """Names of the outputs that every successful run has; empty where the platform does not tell."""
        among = (parameter for parameter in self.parameters if parameter.is_returned_value)
        return frozenset(parameter.key for parameter in among if not parameter.is_optional) or self.described_outputs

    @property
    def told_outputs(self) -> tuple[str, ...] | None:
        """The required outputs in order, for the record; None when their being none is not known."""
        known = tuple(sorted(self.required_outputs))
        return None if self.undescribed is not None and not known else known

    @property
    def inputs(self) -> tuple[Parameter, ...]:
        """The parameters that are not outputs."""
        return tuple(parameter for parameter in self.parameters if not parameter.is_returned_value)

    def described_by(self, descriptor: Descriptor) -> Pipeline:
        """Add what only the Boutiques descriptor tells of lists.

        Args:
            descriptor: The descriptor of this pipeline.

        Returns:
            The pipeline with it.
        """
        described = {key: entry for entry in descriptor.inputs for key in (entry.id, entry.name) if key}

        def keys(ids: frozenset[str]) -> frozenset[str]:
            return ids | {name for item in ids if item in described and (name := described[item].name)}

        return self.model_copy(
            update={
                "dot_parameters": keys(descriptor.dot),
                "counted_parameters": keys(descriptor.counted),
                "described_outputs": descriptor.required_outputs,
                "parameters": tuple(
                    parameter.model_copy(update={"list_of_files": entry.type == "File"})
                    if (entry := described.get(parameter.id or parameter.name)) and entry.is_list
                    else parameter
                    for parameter in self.parameters
                ),
            }
        )


class _Input(Answered):
    id: str | None = None
    name: str | None = None
    type: _Text = ""
    is_list: Annotated[bool, _or(False)] = Field(False, validation_alias="list")


class _OutputFile(Answered):
    id: str
    optional: Annotated[bool, _or(True)] = False


class Descriptor(Answered):
    """What the Boutiques descriptor of a pipeline tells of its inputs beyond the CARMIN description.

    Attributes:
        inputs: Its inputs.
        dot: Identifiers of inputs whose lists are combined element by element.
        counted: Identifiers of inputs for which a number N stands for the list 0 … N-1.
        outputs: Its outputs.
    """

    inputs: tuple[_Input, ...]
    outputs: Annotated[tuple[_OutputFile, ...], BeforeValidator(lambda value: value or ())] = Field(
        (), validation_alias="output-files"
    )
    dot: Annotated[frozenset[str], BeforeValidator(lambda value: value or ())] = Field(
        frozenset(), validation_alias=AliasPath("custom", "vip:dot")
    )
    counted: Annotated[frozenset[str], BeforeValidator(lambda value: value or ())] = Field(
        frozenset(), validation_alias=AliasPath("custom", "vip:intIteratorInputs")
    )

    @property
    def required_outputs(self) -> frozenset[str]:
        """Identifiers of the outputs that every successful run has."""
        return frozenset(output.id for output in self.outputs if not output.optional)


class Job(_Model):
    """One job of a workflow.

    Attributes:
        id: Number of the job within its workflow.
        status: Latest status.
        exit_code: Exit code of the tool or of the transfer that failed; None while there is none.
        exit_message: The platform's words for it.
    """

    id: str
    status: JobStatus
    exit_code: Annotated[int | None, _or(None)] = None
    exit_message: Annotated[str | None, BeforeValidator(_told), _or(None)] = None


class PathEntry(_Model):
    """A file or folder on the platform.

    Attributes:
        path: Absolute path.
        is_directory: Whether it is a folder; False when it does not exist.
        exists: Whether it exists.
        size: Bytes of a file; number of children or 0 for a folder.
        execution_id: The workflow that made it, where the platform tells.
    """

    path: Annotated[str, BeforeValidator(_platform_path)] = Field(validation_alias=AliasChoices("path", "platformPath"))
    is_directory: Annotated[bool, BeforeValidator(lambda value: value or False)] = False
    exists: bool = True
    size: int | None = None
    execution_id: _TextOrNone = None

    @property
    def name(self) -> str:
        """Last component of the path."""
        return PurePosixPath(self.path).name


def _when(value: Any) -> datetime | None:
    if not isinstance(value, (int, float)):
        return datetime.fromisoformat(value) if isinstance(value, str) else value
    try:
        return datetime.fromtimestamp(value / 1000 if value >= _MILLISECONDS_FROM else value, tz=UTC)
    except (OverflowError, OSError) as error:
        raise ValueError("no date") from error


def _returned(answer: Any) -> tuple[str, ...]:
    """Paths of outputs, which come as a list, or by the name of the output."""
    lists = answer.values() if isinstance(answer, Mapping) else [answer]
    paths: list[str] = []
    for entry in lists:
        if not isinstance(entry, str | list | None):
            raise ValueError("outputs must be paths")
        paths += [_platform_path(path) for path in ([entry] if isinstance(entry, str) else entry or [])]
    return tuple(dict.fromkeys(paths))


def _by_number(jobs: Any) -> Any:
    """Jobs come by their number."""
    if not isinstance(jobs, Mapping):
        return jobs or ()
    if not all(isinstance(job, Mapping) for job in jobs.values()):
        raise ValueError("jobs must be objects")
    return tuple({**job, "id": number} for number, job in jobs.items())


class Workflow(_Model):
    """One execution of a pipeline.

    Attributes:
        identifier: Identifier the platform gave.
        name: Execution name; ours carry the session, the run and the token of the intent.
        pipeline_identifier: Pipeline that runs.
        status: Latest status.
        start_date: When it started, in UTC.
        end_date: When it ended; VIP never tells.
        outputs: Paths of the returned files, or their addresses on Girder without the token; may grow while it runs.
        output_names: Names of the outputs that have files; empty where the platform does not tell.
        jobs: Its jobs; empty in lists, and always on platforms that do not tell.
    """

    identifier: str
    name: str = ""
    pipeline_identifier: _Text = ""
    status: WorkflowStatus = WorkflowStatus.UNKNOWN
    start_date: Annotated[datetime | None, BeforeValidator(_when), _or(None)] = None
    end_date: Annotated[datetime | None, BeforeValidator(_when), _or(None)] = None
    outputs: tuple[Annotated[str, BeforeValidator(_platform_path)], ...] = ()
    output_names: frozenset[str] = frozenset()
    jobs: Annotated[tuple[Job, ...], BeforeValidator(_by_number)] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_answer(cls, answer: Any) -> Any:
        if not isinstance(answer, Mapping) or "returnedFiles" not in answer:
            return answer
        returned = answer["returnedFiles"]
        names = [name for name, files in returned.items() if files] if isinstance(returned, Mapping) else []
        return {**answer, "outputs": _returned(returned), "output_names": names}

    @property
    def failed_jobs(self) -> tuple[Job, ...]:
        """The jobs that failed."""
        return tuple(job for job in self.jobs if job.status.is_failure)

    @property
    def open_jobs(self) -> tuple[Job, ...]:
        """The jobs of which it is not known how they have ended."""
        return tuple(job for job in self.jobs if not job.status.is_terminal)


class SessionOptions(BaseModel):
    """What decides whether a session has succeeded, what is fetched of it, and what is removed from the platform.

    Attributes:
        get_status: Statuses whose outputs are fetched and that count as success.
        strict: Whether a run of which some jobs failed counts as failed.
        accept_incomplete: Whether a run counts as success although it lacks outputs that the pipeline always has.
        unzip: Whether archives are replaced by a folder of the same name with their content.
        keep_archives: Whether archives stay, beside a folder `<name>.content`.
        finish: Whether the session is removed from the platform at the end.
        keep_input: Whether the inputs stay all the same.
        keep_output: Whether the outputs stay all the same.
        delete_records: Whether the platform's records of executions go with the outputs.
    """

    model_config = ConfigDict(frozen=True)

    get_status: tuple[str, ...] = ("Finished",)
    strict: bool = False
    accept_incomplete: bool = False
    unzip: bool = True
    keep_archives: bool = False
    finish: bool = True
    keep_input: bool = False
    keep_output: bool = False
    delete_records: bool = False


# Inputs, outputs and the folder above are removed at the end; `/`, a home and a session come before.
_LEAST_PARTS = 4


def _below_a_home(path: str) -> str:
    parts = PurePosixPath(path).parts
    is_whole = len(parts) >= _LEAST_PARTS and parts[0] == "/" and not {".", ".."} & set(path.split("/"))
    if not is_whole or not path.isprintable():
        raise ValueError(f"{path!r} is not the whole path of a folder of a session, as /vip/Home/API/name/OUTPUTS is")
    return path


def _named_in_text(folder: Path | None) -> Path | None:
    if folder is not None and not is_text(str(folder)):
        raise ValueError(f"{str(folder)!r} has bytes in it that are no text, which no record can carry; rename it")
    return folder


class VipSession(BaseModel):
    """What one session is: names, folders, pipeline and settings. What has happened to it is in its session file.

    Attributes:
        session_name: Name of the session and of its folder on the platform.
        pipeline_id: Pipeline to run.
        input_settings: Values of the pipeline's parameters as the user gave them.
        questions: Those of them that asked a BIDS dataset, as they were written, by parameter; `input_settings` has the
            files, once `with_bids_files` has answered.
        input_dir: Local folder of input files; None when all inputs are on the platform already.
        output_dir: Local folder of the outputs and of `session_data.json`.
        vip_input_dir: Folder of the inputs on the platform.
        vip_output_dir: Folder of the outputs on the platform.
        nb_runs: Number of runs it is to have.
        token: The same for every retry of one intent, different for every new one; part of each execution's name.
        backup: Where the session file is kept.
        girder_output_dir: Folder of the session on Girder, `/collection/…`, in which each run gets a folder for its
            outputs; None when they go to `vip_output_dir`.
        girder_metadata: Metadata for the folder of each run on Girder.
        girder_download: Whether outputs on Girder are wanted in `output_dir` too.
        options: What decides success and removal.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    session_name: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$", max_length=200)]
    pipeline_id: str | None = None
    input_settings: InputSettings = Field(default_factory=dict)
    questions: dict[str, InputValue] = Field(default_factory=dict)
    input_dir: Annotated[Path | None, AfterValidator(_named_in_text)] = None
    output_dir: Annotated[Path, AfterValidator(_named_in_text)]
    vip_input_dir: Annotated[str, AfterValidator(_below_a_home)]
    vip_output_dir: Annotated[str, AfterValidator(_below_a_home)]
    nb_runs: Annotated[int, Field(ge=1, le=1000)] = 1
    token: Annotated[str, Field(pattern=TOKEN)]
    backup: Literal["local", "vip"] | None = "local"
    girder_output_dir: Annotated[str | None, Field(pattern=r"^/(collection|user)/[^/]+(/[^/]+)*$")] = None
    girder_metadata: dict[str, JsonValue] = Field(default_factory=dict)
    girder_download: bool = False
    options: SessionOptions = SessionOptions()

    @classmethod
    def planned(cls, **fields: Any) -> VipSession:
        """Describe a session by values that somebody gave, each of which may be wrong.

        Args:
            **fields: As the attributes.

        Returns:
            The session.

        Raises:
            ConfigurationError: Some values fit no session; the message says which, and what is accepted.
        """
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ConfigurationError(
                f"This makes no session: {invalid_fields(error)}. Give other values. Nothing was sent."
            ) from None

    @property
    def vip_dir(self) -> str:
        """Folder of the session on the platform."""
        return str(PurePosixPath(self.vip_output_dir).parent)

    def workflow_name(self, repetition: int) -> str:
        """Name of the execution of one repetition; the platform can be searched for it.

        Args:
            repetition: Number of the run, from 1.

        Returns:
            `<session>-r<repetition>-<token>`.
        """
        return f"{self.session_name}-r{repetition:03d}-{self.token}"

    def run_dir(self, repetition: int) -> str:
        """Folder on the platform that only this repetition writes to.

        Args:
            repetition: Number of the run, from 1.

        Returns:
            An absolute path below `vip_output_dir`.
        """
        return f"{self.vip_output_dir}/r{repetition:03d}-{self.token}"

    def girder_run_dir(self, repetition: int) -> str:
        """Folder on Girder that only this repetition writes to; its name carries the token of the intent.

        Args:
            repetition: Number of the run, from 1.

        Returns:
            A path below `girder_output_dir`.
        """
        return f"{self.girder_output_dir}/{self.workflow_name(repetition)}"


class SessionResult(BaseModel):
    """What a session has come to.

    Attributes:
        session: The session.
        workflows: Its executions.
        files: Local files by execution; those inside unpacked archives too.
        is_finished: Whether its folders were removed from the platform.
        left_to: Runs that were begun beside these under the same name and still need them; who ends last removes the
            folders.
        packed: Why an archive among the files could not be unpacked, by its path.
        problems: Why executions do not count as success, by execution; empty for a session that succeeded.
    """

    model_config = ConfigDict(frozen=True)

    session: VipSession
    workflows: tuple[Workflow, ...] = ()
    files: dict[str, tuple[Path, ...]] = Field(default_factory=dict)
    is_finished: bool = False
    left_to: tuple[str, ...] = ()
    packed: dict[str, str] = Field(default_factory=dict)
    problems: dict[str, tuple[str, ...]] = Field(default_factory=dict)
