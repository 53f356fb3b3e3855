"""What vantage6 talks about: frozen records with the platform's names, the same for all generations.

A server answers with links to related objects (``{"id": 2, "link": …}``); here they become ids:
``organization`` is read into ``organization_id``. Names that changed between generations are read into the newest
one: a *result* of generation 3 is a `Run`, its ``run_id`` is ``job_id``, its ``initiator`` is ``init_org_id``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    model_validator,
)

from prefect_biomed.clients.rest import OpenEnum
from prefect_biomed.clients.texts import logger_of

__all__ = [
    "Action",
    "AlgorithmStore",
    "ArgumentsFile",
    "Collaboration",
    "Column",
    "Database",
    "DatabaseInput",
    "Databases",
    "Dataframe",
    "DataframeDescription",
    "DataframeSpec",
    "DataframeStep",
    "EncodedResult",
    "Function",
    "Node",
    "NodeStatus",
    "Organization",
    "Record",
    "Result",
    "Role",
    "Rule",
    "Run",
    "RunFailure",
    "RunWithArguments",
    "Session",
    "SessionScope",
    "Status",
    "Study",
    "Task",
    "TaskOutcome",
    "TaskRequest",
    "User",
    "Version",
    "normalise_databases",
]

logger = logger_of(__name__)


def _in_utc(time: datetime) -> datetime:
    """Servers send UTC without saying so."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Time = Annotated[datetime, AfterValidator(_in_utc)]


class Status(str, OpenEnum):
    """State of a run, and of a task as the sum of its runs. An unknown one counts as not terminal."""

    AWAITING = "awaiting"
    PENDING = "pending"
    INITIALIZING = "initializing"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    START_FAILED = "start failed"
    NO_DOCKER_IMAGE = "non-existing Docker image"
    CRASHED = "crashed"
    KILLED = "killed by user"
    NOT_ALLOWED = "not allowed"
    UNKNOWN_ERROR = "unknown error"
    DATAFRAME_NOT_FOUND = "dataframe not found"
    DEPENDENCY_FAILED = "depended on failed task"
    UNEXPECTED_OUTPUT = "unexpected output"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing will happen any more."""
        return self is Status.COMPLETED or self.is_failure

    @property
    def is_success(self) -> bool:
        """Whether it ended well."""
        return self is Status.COMPLETED

    @property
    def is_failure(self) -> bool:
        """Whether it ended otherwise."""
        return self in _FAILURES


_FAILURES = frozenset(
    {
        Status.FAILED,
        Status.START_FAILED,
        Status.NO_DOCKER_IMAGE,
        Status.CRASHED,
        Status.KILLED,
        Status.NOT_ALLOWED,
        Status.UNKNOWN_ERROR,
        Status.DATAFRAME_NOT_FOUND,
        Status.DEPENDENCY_FAILED,
        Status.UNEXPECTED_OUTPUT,
    }
)


class NodeStatus(str, OpenEnum):
    """Whether a node is connected; a dead one may count as online for about two minutes."""

    ONLINE = "online"
    OFFLINE = "offline"


class SessionScope(str, OpenEnum):
    """Who may use a session (generation 5)."""

    OWN = "own"
    ORGANIZATION = "organization"
    COLLABORATION = "collaboration"


class Action(str, OpenEnum):
    """What a task does (generation 5)."""

    FEDERATED_COMPUTE = "federated_compute"
    CENTRAL_COMPUTE = "central_compute"
    DATA_EXTRACTION = "data_extraction"
    PREPROCESSING = "preprocessing"
    POSTPROCESSING = "postprocessing"


class Version(BaseModel):
    """Version of a server.

    Attributes:
        text: As the server gives it.
        major: 3, 4 or 5: which of the three protocols it speaks.
        minor: Which features of that protocol it has.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    major: int
    minor: int


class Record(BaseModel):
    """Base of everything the server keeps under an id.

    Attributes:
        id: Number of the object on its server.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    #: The server's word for the object, as in its URLs.
    resource: ClassVar[str]
    #: Fields that decide something here, so that an odd value of theirs is an error.
    decisive: ClassVar[frozenset[str]] = frozenset()

    id: int

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, record: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Read an answer; do without fields in a shape unknown here, as long as nothing depends on them."""
        if not isinstance(record, dict):
            return validate(record)
        flat = cls._flattened(record)
        try:
            return validate(flat)
        except ValidationError as error:
            odd = {str(one["loc"][0]) if one["loc"] else "" for one in error.errors(include_input=False)}
            if not odd <= flat.keys() - cls.decisive - {"id"}:
                raise
            logger.warning("A %s with %s in a shape unknown here; left out", cls.resource, ", ".join(sorted(odd)))
            return validate({name: value for name, value in flat.items() if name not in odd})

    @classmethod
    def _flattened(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Turn ``x: {id, link}`` into ``x_id`` and drop links to lists."""
        flat: dict[str, Any] = {}
        for name, value in record.items():
            if _is_link(value):
                flat[f"{name}_id"] = value["id"]
            elif value is not None and not _is_link_to_list(name, value):
                flat[name] = value
        return flat


def _is_link(value: Any) -> bool:
    return isinstance(value, dict) and "id" in value and "link" in value


def _is_link_to_list(name: str, value: Any) -> bool:
    """Generation 3 lists links; later ones give the path of the list, unless they were asked to include the list."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_link, value))
    return isinstance(value, str) and name in {"organizations", "runs", "columns"}


class Organization(Record):
    """Owner of users, of one key pair and of one node in each of its collaborations."""

    resource: ClassVar[str] = "organization"
    decisive: ClassVar[frozenset[str]] = frozenset(["name", "public_key"])

    name: str = ""
    domain: str = ""
    address1: str = ""
    address2: str = ""
    zipcode: str = ""
    country: str = ""
    public_key: str = Field("", repr=False)


class Collaboration(Record):
    """Organizations that agreed to compute together.

    Attributes:
        encrypted: Whether every input and result is encrypted for its reader.
        organizations: Its members, where the server was asked to include them.
        session_restrict_to_same_image: Whether all tasks of a session must use one image (generation 5).
    """

    resource: ClassVar[str] = "collaboration"
    decisive: ClassVar[frozenset[str]] = frozenset(["encrypted", "name", "organizations"])

    name: str = ""
    encrypted: bool
    organizations: tuple[Organization, ...] = ()
    session_restrict_to_same_image: bool = False


class Study(Record):
    """Some of the organizations of a collaboration (4.3 and later)."""

    resource: ClassVar[str] = "study"
    decisive: ClassVar[frozenset[str]] = frozenset(["collaboration_id", "name", "organizations"])

    name: str = ""
    collaboration_id: int | None = None
    organizations: tuple[Organization, ...] = ()


class User(Record):
    """A person or a service account of an organization.

    Attributes:
        otp_secret: Secret of the second factor, which servers of generation 4 hand to everyone who may see the user.
        client_secret: Secret of a new service account; the server shows it once (generation 5).
    """

    resource: ClassVar[str] = "user"
    decisive: ClassVar[frozenset[str]] = frozenset(["client_secret", "organization_id", "username"])

    username: str = ""
    firstname: str = ""
    lastname: str = ""
    email: str = ""
    organization_id: int | None = None
    is_service_account: bool = False
    last_seen: Time | None = None
    otp_secret: SecretStr | None = None
    client_secret: SecretStr | None = None


class Role(Record):
    """A named set of rules."""

    resource: ClassVar[str] = "role"
    decisive: ClassVar[frozenset[str]] = frozenset(["is_default_role", "name", "organization_id"])

    name: str = ""
    description: str = ""
    organization_id: int | None = None
    is_default_role: bool = False


class Rule(Record):
    """One permission: an operation on a resource within a scope."""

    resource: ClassVar[str] = "rule"

    name: str = ""
    operation: str = ""
    scope: str = ""
    description: str = ""


class Node(Record):
    """The computer of one organization in one collaboration.

    Attributes:
        status: None when it was never connected.
        config: What an online node tells about itself, empty when it tells nothing. Keys are ``encryption``,
            ``allowed_algorithms``, ``database_labels``, ``db_type_<label>``, ``columns_<label>`` and more.
        api_key: Secret with which the node logs in; the server shows it once, when the node is registered.
    """

    resource: ClassVar[str] = "node"
    decisive: ClassVar[frozenset[str]] = frozenset(["api_key", "collaboration_id", "name", "organization_id", "status"])

    name: str = ""
    status: NodeStatus | None = None
    organization_id: int | None = None
    collaboration_id: int | None = None
    last_seen: Time | None = None
    config: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    api_key: SecretStr | None = None

    @classmethod
    def _flattened(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The server gives a list with one entry for each value."""
        if not isinstance(record.get("config"), list):
            return super()._flattened(record)
        config: dict[str, list[str]] = {}
        for entry in record["config"]:
            match entry:
                case {"key": str(key), "value": str(value)}:
                    config.setdefault(key, []).append(value)
        return super()._flattened(record | {"config": config})

    @property
    def is_online(self) -> bool:
        """Whether the server believes it to be connected."""
        return self.status is NodeStatus.ONLINE

    @property
    def database_labels(self) -> tuple[str, ...]:
        """Labels of its databases, empty when the node does not share them."""
        return self.config.get("database_labels", ())

    def columns(self, label: str) -> tuple[str, ...]:
        """Columns of a database, empty when the node does not share them.

        Args:
            label: Label of the database.
        """
        return self.config.get(f"columns_{label}", ())


class Run(Record):
    """The execution of a task by one organization. Generation 3 calls it a result.

    Attributes:
        node_name: Name of the node that executes it.
        log: What the algorithm has printed so far; grows while the run is active on 4.11 and later.
        cleanup_at: When the server has deleted the result to save space.
    """

    resource: ClassVar[str] = "run"
    decisive: ClassVar[frozenset[str]] = frozenset(["finished_at", "organization_id", "status"])

    status: Status
    task_id: int | None = None
    organization_id: int | None = None
    node_id: int | None = None
    node_name: str = ""
    started_at: Time | None = None
    finished_at: Time | None = None
    cleanup_at: Time | None = None
    log: str = Field("", repr=False)
    action: Action | None = None

    @classmethod
    def _flattened(cls, record: dict[str, Any]) -> dict[str, Any]:
        node, task = record.get("node"), record.get("task")
        flat = dict(record)
        if isinstance(node, dict) and "name" in node:
            flat |= {"node_id": node.get("id"), "node_name": node["name"]}
        if isinstance(task, dict):
            flat["task_id"] = task.get("id")
        elif isinstance(task, int):
            flat["task_id"] = task
        return super()._flattened(flat)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended; an unknown status counts as ended once it has an end time."""
        return self.finished_at is not None or self.status.is_terminal


class RunWithArguments(Run):
    """A run with what its function was given, as it travels: base64, encrypted text, or the name of a blob.

    Attributes:
        arguments: Empty when there are none, None when the server does not tell (generation 5).
    """

    decisive: ClassVar[frozenset[str]] = Run.decisive | {"arguments"}

    arguments: str | None = Field(None, repr=False)

    @classmethod
    def _flattened(cls, record: dict[str, Any]) -> dict[str, Any]:
        given = {"arguments": record["arguments"] or ""} if "arguments" in record else {}
        return super()._flattened(record | given)


class EncodedResult(Record):
    """The output of one run as it travels: base64, encrypted text, or the name of a blob.

    Attributes:
        result: None until the run has ended well.
        blob_storage_used: Whether ``result`` names a blob. Generation 5 leaves this false even then.
    """

    resource: ClassVar[str] = "result"
    decisive: ClassVar[frozenset[str]] = frozenset(["result"])

    result: str | None = Field(None, repr=False)
    run_id: int | None = None
    task_id: int | None = None
    cleanup_at: Time | None = None
    blob_storage_used: bool = False
    action: Action | None = None


class Task(Record):
    """One request to execute one function of one image at some organizations.

    Attributes:
        job_id: Common to a task and all its subtasks.
        parent_id: For a subtask, the task that made it.
        init_org_id: The organization that asked; only its key reads the results.
        method: Function called; the server knows it in generation 5 only.
        action: ``federated_compute``, ``central_compute``, ``data_extraction`` or ``preprocessing`` (generation 5).
        databases: What the task reads, as the server gives it.
        runs: Its runs, where the server was asked to include them.
        asked: Ids of the organizations that were asked, of a task that this machine has made; no server tells them, so
            they are not known of others.
    """

    resource: ClassVar[str] = "task"
    decisive: ClassVar[frozenset[str]] = frozenset(
        ["action", "collaboration_id", "image", "init_org_id", "initiator", "initiator_id", "method", "name", "status"]
    )

    name: str = ""
    description: str = ""
    image: str = ""
    status: Status
    job_id: int | None = None
    parent_id: int | None = None
    collaboration_id: int | None = None
    study_id: int | None = None
    session_id: int | None = None
    algorithm_store_id: int | None = None
    init_org_id: int | None = Field(None, validation_alias=AliasChoices("init_org_id", "initiator_id", "initiator"))
    init_user_id: int | None = Field(None, validation_alias=AliasChoices("init_user_id", "init_user"))
    method: str | None = None
    action: Action | None = None
    databases: tuple[JsonValue, ...] = ()
    depends_on: tuple[int, ...] = ()
    created_at: Time | None = None
    finished_at: Time | None = None
    runs: tuple[Run, ...] = ()
    asked: tuple[int, ...] = ()

    @classmethod
    def _flattened(cls, record: dict[str, Any]) -> dict[str, Any]:
        if "complete" not in record:
            return super()._flattened(record)
        # Generation 3. A task that tells no status counts as going on.
        label = record.get("database")
        older = {
            "job_id": record.get("run_id"),
            "databases": [{"label": label}] if label else [],
            "status": record.get("status") or Status.PENDING.value,
        }
        return super()._flattened(record | older)


class Column(BaseModel):
    """A column of a dataframe at one node (generation 5), or of a database (generation 4)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    #: The server's word for it.
    resource: ClassVar[str] = "column"

    name: str
    dtype: str = ""
    node_id: int | None = None


class Session(Record):
    """A place at the nodes where dataframes are kept between tasks (generation 5)."""

    resource: ClassVar[str] = "session"
    decisive: ClassVar[frozenset[str]] = frozenset(["collaboration_id", "name", "scope", "study_id"])

    name: str = ""
    scope: SessionScope = SessionScope.OWN
    ready: bool = False
    image: str | None = None
    owner_id: int | None = None
    collaboration_id: int | None = None
    study_id: int | None = None
    created_at: Time | None = None
    last_used_at: Time | None = None


class Dataframe(Record):
    """Data extracted from a database of each node, ready for computation (generation 5).

    Attributes:
        db_label: Database it was extracted from.
        ready: Whether every organization has it.
        organizations_ready: Ids of those that have it.
        last_session_task: The last task that made or changed it; the dataframe is ready when that one has ended well.
    """

    resource: ClassVar[str] = "dataframe"
    decisive: ClassVar[frozenset[str]] = frozenset(
        ["db_label", "last_session_task", "name", "organizations_ready", "session_id"]
    )

    name: str = ""
    db_label: str = ""
    ready: bool = False
    organizations_ready: tuple[int, ...] = ()
    columns: tuple[Column, ...] = ()
    session_id: int | None = None
    last_session_task: Task | None = None


class DataframeStep(BaseModel):
    """One task that made or changed a dataframe.

    Attributes:
        number: 0 for the extraction, then 1 for the first function that changes it, and so on.
        task_id: The task.
        image: Docker image of the function.
        method: The function.
        arguments: Its keyword arguments, None when they cannot be read.
        arguments_hidden: Why they cannot be read.
        status: How it ended, or what it does.
        organizations: Where it is executed.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    task_id: int
    image: str
    method: str
    arguments: dict[str, JsonValue] | None = Field(None, repr=False)
    arguments_hidden: str | None = None
    status: Status
    organizations: tuple[str, ...] = ()


class DataframeDescription(BaseModel):
    """How a dataframe came about.

    Attributes:
        dataframe: The dataframe.
        steps: Its extraction and what changed it after that, in their order.
    """

    model_config = ConfigDict(frozen=True)

    dataframe: Dataframe
    steps: tuple[DataframeStep, ...]


class AlgorithmStore(Record):
    """A service that lists reviewed algorithms (4.3 and later)."""

    resource: ClassVar[str] = "algorithmstore"

    name: str = ""
    url: str = ""


class RunFailure(BaseModel):
    """What went wrong at one organization.

    Attributes:
        task_id: The task, or the subtask of it, whose run failed.
        run_id: The run.
        organization: Name of the organization, or its id when the name is hidden.
        node: Name of the node.
        status: How the run ended.
        log: Last lines of the algorithm's log.
        in_subtask: Whether the run belongs to a subtask of the task asked for.
        not_run: Whether the run never started because another run of the task failed first.
        left_open: Whether the server has no end of the run, so that its node takes it up again when it starts.
    """

    model_config = ConfigDict(frozen=True)

    task_id: int
    run_id: int
    organization: str
    node: str
    status: Status
    log: str = Field("", repr=False)
    in_subtask: bool = False
    not_run: bool = False
    left_open: bool = False

    def __str__(self) -> str:
        if self.not_run:
            return f"{self.organization} (node {self.node}): not run, because another run of the task failed"
        where = f" in subtask {self.task_id}" if self.in_subtask else ""
        lines = "".join(f"\n      {line}" for line in self.log.splitlines())
        again = (
            f"; the server has no end of run {self.run_id}, so the node takes it up again when it restarts (vantage6 "
            f"#2371): should it then end well, get_results(credentials, {self.task_id}) fetches what it gives"
            if self.left_open
            else ""
        )
        return f"{self.organization} (node {self.node}): {self.status.value}{where}{again}{lines}"


class TaskOutcome(BaseModel):
    """A task that has ended.

    Attributes:
        task: The task.
        runs: Its runs, with the last lines of their logs.
        failures: What went wrong where, the root cause first; empty when all went well.
        tolerated: What went wrong in subtasks although the task itself ended well.
    """

    model_config = ConfigDict(frozen=True)

    task: Task
    runs: tuple[Run, ...]
    failures: tuple[RunFailure, ...] = ()
    tolerated: tuple[RunFailure, ...] = ()

    @property
    def is_success(self) -> bool:
        """Whether every run ended well."""
        return not self.failures and self.task.status.is_success

    @property
    def is_failure(self) -> bool:
        """Whether a run ended otherwise; others may go on."""
        return bool(self.failures) or self.task.status.is_failure

    @property
    def is_finished(self) -> bool:
        """Whether every run has ended."""
        return bool(self.runs) and all(run.is_finished for run in self.runs)


class Result(BaseModel):
    """The output of one organization, decrypted, and decoded when it is JSON.

    Infinities and what is no number survive storing and loading, and so do bytes.

    Attributes:
        run_id: The run that made it; None when the server lists no run of the organization.
        task_id: Its task.
        organization_id: The organization that computed it.
        organization: Its name.
        format: What it is, by the usual extension of its files: ``json``, ``csv``, ``parquet``, ``png`` and so on,
            ``txt`` for another text, ``bin`` for what is not known; None when there is no output.
        value: The decoded JSON; None when it is something else or was written to a file, or when there is none.
        content: What is not JSON, as it came; None when it was written to a file, or when there is none.
        path: File that holds the output, when it was too large to be kept in memory.
        size_bytes: Size of the output in bytes.
        unavailable: Why there is no output, None when there is one.
        missing: Whether the output may still come: the run has not ended, or the server does not list it. A later call
            with the task's id fetches it.
    """

    model_config = ConfigDict(
        frozen=True, ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64"
    )

    run_id: int | None
    task_id: int
    organization_id: int | None
    organization: str
    format: str | None = None
    value: JsonValue = Field(None, repr=False)
    content: bytes | None = Field(None, repr=False)
    path: Path | None = None
    size_bytes: int = 0
    unavailable: str | None = None
    missing: bool = False


def names_of(records: Sequence[Organization | Collaboration | Node | Study]) -> str:
    """List objects for an error message.

    Args:
        records: Objects with a name.
    """
    return ", ".join(f"{record.name!r} (id {record.id})" for record in records) or "none"


class Database(BaseModel):
    """What a function reads: a database of the nodes, or on generation 5 a dataframe of the session.

    Attributes:
        label: Label of the database in the nodes' configuration (generations 3 and 4).
        dataframe: Id or name of a dataframe (generation 5).
        query: Query for databases that take one (generation 4).
        sheet_name: Sheet of a spreadsheet (generation 4).
        preprocessing: Steps applied at the node before the function (generation 4).
        arguments: Further arguments for reading it (4.15).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    label: str | None = None
    dataframe: int | str | None = Field(None, alias="dataframe_id")
    query: str | None = None
    sheet_name: str | None = None
    preprocessing: list[dict[str, JsonValue]] | None = None
    arguments: dict[str, JsonValue] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_the_type(cls, given: Any) -> Any:
        """The official client of generation 5 writes the type of the only thing there is."""
        if isinstance(given, dict) and given.get("type") == "dataframe":
            return {name: value for name, value in given.items() if name != "type"}
        return given

    def __str__(self) -> str:
        return repr(self.label if self.label is not None else self.dataframe)


def normalise_databases(given: Any) -> Any:
    """Bring the accepted forms of `databases` into one: a list of groups, one group for each parameter.

    Args:
        given: None, a label or the name or id of a dataframe, a mapping with one of both, a `Dataframe`, a list of
            these, or a list of lists of them where one parameter takes several.

    Returns:
        Lists of mappings for `Database`.

    Raises:
        ValueError: The form is another one; the message names the place.
    """
    if given is None:
        return []
    groups = given if isinstance(given, list | tuple) else [given]
    return [
        [_one_database(database, f"databases[{place}]") for database in _as_group(group)]
        for place, group in enumerate(groups)
    ]


def _as_group(group: Any) -> Sequence[Any]:
    return group if isinstance(group, list | tuple) else [group]


def _one_database(given: Any, place: str) -> Any:
    match given:
        case Database() if given.label or given.dataframe is not None:
            return given
        case Dataframe():
            return {"dataframe": given.id}
        # Which of both a text names depends on the generation of the server.
        case str() if given:
            return {"label": given}
        case bool():
            pass
        case int():
            return {"dataframe": given}
        case dict() if any(given.get(name) for name in ("label", "dataframe", "dataframe_id")):
            return given
    raise ValueError(
        f"{place} is {given!r}. Give a label, the name or id of a dataframe, or a mapping with 'label' or 'dataframe'."
    )


DatabaseInput = str | int | Database | list[str | int | Database | list[str | int | Database]] | None
"""How `databases` is written in a form: text, number or mapping; lists and groups of them."""

Databases = Annotated[list[list[Database]], BeforeValidator(normalise_databases)]
"""What a task reads, in any of the forms that `normalise_databases` takes."""


ArgumentsFile = str | Path | dict[str, str | Path]
"""Keyword arguments in files, by path or by the URL of shared storage: a JSON file with an object of them; or a mapping
from names to files, where a file named ``.json`` is the argument itself, and any other becomes a base64 text."""


class TaskRequest(BaseModel):
    """One function of one image, to be executed at some organizations.

    Attributes:
        collaboration: Exact name or id.
        image: Docker image of the algorithm.
        method: Function to call.
        organizations: Exact names or ids; all of the collaboration, or of the study, when None.
        arguments: Keyword arguments of the function.
        arguments_file: Further keyword arguments of any size, in files.
        databases: What it reads.
        name: Name of the task; the method when empty. A token is appended.
        description: At most 1024 characters.
        study: Exact name or id of a study.
        store: Id of the algorithm store that vouches for the image.
        session: Id of the session (generation 5).
        central: Whether the function coordinates others. When None, what the algorithm store tells; without a `store`
            it does not.
        columns: Columns it needs; checked against those that nodes share.
        depends_on: Tasks that must have ended well before (generation 5).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    collaboration: str | int
    image: str
    method: str
    organizations: list[str | int] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    arguments_file: ArgumentsFile | None = None
    databases: Databases = Field(default_factory=list)
    name: str = ""
    description: str = ""
    study: str | int | None = None
    store: int | None = None
    session: int | None = None
    central: bool | None = None
    columns: list[str] = Field(default_factory=list)
    depends_on: list[int] = Field(default_factory=list)


class Function(BaseModel):
    """A function of an algorithm.

    Attributes:
        image: Docker image of the algorithm.
        method: Function to call.
        arguments: Its keyword arguments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    method: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class DataframeSpec(BaseModel):
    """A dataframe to be extracted at the nodes, and what is done to it.

    Attributes:
        name: Letters, digits, hyphens and underscores; unique on the whole server.
        label: Label of the database in the nodes' configuration.
        extraction: Function that reads the database.
        preprocessing: Functions that change the dataframe, in this order.
        replace: Whether a dataframe of this name that is not just this one is deleted and made anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    label: str = "default"
    extraction: Function
    preprocessing: list[Function] = Field(default_factory=list)
    replace: bool = False
