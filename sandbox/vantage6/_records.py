"""What a vantage6 server keeps in its tables, for all generations at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

# A run of one organization, as v3 to v5 name its states.
OPEN_RUN_STATES = frozenset({"pending", "initializing", "active"})
RUN_STATES = (
    "pending",
    "initializing",
    "active",
    "completed",
    "failed",
    "start failed",
    "non-existing Docker image",
    "crashed",
    "killed by user",
    "not allowed",
    "unknown error",
)
RUN_STATES_5 = (*RUN_STATES, "dataframe not found", "depended on failed task", "unexpected output")
ACTIONS = (
    "data_extraction",
    "preprocessing",
    "federated_compute",
    "central_compute",
    "postprocessing",
)
COMPUTE_ACTIONS = frozenset({"federated_compute", "central_compute"})


def now() -> datetime:
    """Return the present in UTC, without an offset, as the servers write it."""
    return datetime.now(UTC).replace(tzinfo=None)


@dataclass(eq=False, kw_only=True)
class Record:
    """A row: it gets its id when it is added to its table."""

    id: int = 0


@dataclass(eq=False, kw_only=True)
class Organization(Record):
    """Owns users and one key pair; `public_key` is base64 of a PEM text."""

    name: str | None = None
    domain: str | None = None
    address1: str | None = None
    address2: str | None = None
    zipcode: str | None = None
    country: str | None = None
    public_key: str = ""


@dataclass(eq=False, kw_only=True)
class Rule(Record):
    """Permission for one operation on one kind of resource within a scope."""

    name: str
    operation: str
    scope: str
    description: str


@dataclass(eq=False, kw_only=True)
class Role(Record):
    """A named set of rules; default roles belong to no organization."""

    name: str
    description: str | None = None
    rules: list[Rule] = field(default_factory=list)
    organization: Organization | None = None
    is_default_role: bool = False


@dataclass(eq=False, kw_only=True)
class Collaboration(Record):
    """Organizations that work together."""

    name: str
    encrypted: bool
    organizations: list[Organization] = field(default_factory=list)
    session_restrict_to_same_image: bool = False


@dataclass(eq=False, kw_only=True)
class Study(Record):
    """Some organizations of one collaboration."""

    name: str
    collaboration: Collaboration
    organizations: list[Organization] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class AlgorithmStore(Record):
    """Where algorithms are looked up; of all collaborations when it names none."""

    name: str
    url: str
    api_path: str | None = None
    collaboration: Collaboration | None = None


@dataclass(eq=False, kw_only=True)
class Authenticatable(Record):
    """Who can log in. Users and nodes share one sequence of ids."""

    organization: Organization
    last_seen: datetime | None = None
    status: str | None = None
    ip: str | None = None
    keycloak_id: str | None = None
    keycloak_client_id: str | None = None


@dataclass(eq=False, kw_only=True)
class User(Authenticatable):
    """A person, or in v5 a service account."""

    username: str
    password: str = field(default="", repr=False)
    firstname: str | None = None
    lastname: str | None = None
    email: str | None = None
    roles: list[Role] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    otp_secret: str | None = field(default=None, repr=False)
    failed_logins: int = 0
    last_failed_login: datetime | None = None
    is_service_account: bool = False


@dataclass(eq=False, kw_only=True)
class Node(Authenticatable):
    """The party that computes for one organization in one collaboration."""

    name: str
    collaboration: Collaboration
    api_key: str = field(default="", repr=False)
    config: list[tuple[str, str]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Session(Record):
    """v5: a workspace that holds dataframes."""

    name: str
    owner: User
    collaboration: Collaboration
    scope: str
    created_at: datetime
    last_used_at: datetime
    study: Study | None = None
    image: str | None = None


@dataclass(eq=False, kw_only=True)
class Dataframe(Record):
    """v5: a table extracted at every node; `columns` are (node, name, dtype)."""

    name: str
    session: Session
    db_label: str
    last_session_task: Task | None = None
    columns: list[tuple[Node, str, str]] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Task(Record):
    """One request for one image to several organizations."""

    name: str
    description: str
    image: str
    collaboration: Collaboration
    init_org: Organization
    created_at: datetime
    job_id: int = 0
    init_user: User | None = None
    parent: Task | None = None
    study: Study | None = None
    store: AlgorithmStore | None = None
    databases: list[dict[str, Any]] = field(default_factory=list)
    method: str | None = None
    session: Session | None = None
    dataframe: Dataframe | None = None
    depends_on: list[Task] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Run(Record):
    """A task at one organization. v3 calls it a result."""

    task: Task
    organization: Organization
    assigned_at: datetime
    input: str | None = field(default=None, repr=False)
    result: str | None = field(default=None, repr=False)
    started_at: datetime | None = None
    finished_at: datetime | None = None
    status: str = "pending"
    log: str | None = None
    action: str | None = None
    cleanup_at: datetime | None = None
    blob_storage_used: bool = False

    @property
    def finished(self) -> bool:
        """Whether its state is final."""
        return self.status not in OPEN_RUN_STATES

    @property
    def failed(self) -> bool:
        """Whether it ended badly."""
        return self.finished and self.status != "completed"


R = TypeVar("R", bound=Record)


class Table(Generic[R]):
    """Records by id, in the order they were added.

    Args:
        sequence: gives the next id; shared by tables whose ids do not overlap.
    """

    def __init__(self, sequence: Callable[[], int] | None = None) -> None:
        self._records: dict[int, R] = {}
        self._sequence = sequence or Counter()

    def __iter__(self) -> Iterator[R]:
        return iter(list(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: R) -> R:
        """Give the record its id and keep it."""
        record.id = self._sequence()
        self._records[record.id] = record
        return record

    def get(self, identifier: int | str | None) -> R | None:
        """Return the record with this id; None when there is none or it is no number."""
        try:
            return self._records.get(int(identifier))  # type: ignore[arg-type]  # None: see below
        except (TypeError, ValueError):
            return None

    def remove(self, record: Record) -> None:
        """Forget the record; its id is not given again."""
        self._records.pop(record.id, None)

    def where(self, **values: object) -> list[R]:
        """Return the records whose fields are all equal to these values."""
        return [r for r in self if all(getattr(r, name) == value for name, value in values.items())]


class Counter:
    """Gives 1, 2, 3 and so on."""

    def __init__(self) -> None:
        self._last = 0

    def __call__(self) -> int:
        """Return the next number."""
        self._last += 1
        return self._last


Listener = Callable[[str, dict[str, Any]], None]


class Registry:
    """The tables of one server, and its event channel to the nodes.

    Whoever reads or writes holds `lock`.

    Args:
        generation: 3, 4 or 5; decides how the status of a task follows from its runs.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.lock = threading.RLock()
        # The servers take the time of their start as the default of some columns.
        self.started_at = now()
        self.organizations: Table[Organization] = Table()
        members = Counter()
        self.users: Table[User] = Table(members)
        self.nodes: Table[Node] = Table(members)
        self.rules: Table[Rule] = Table()
        self.roles: Table[Role] = Table()
        self.collaborations: Table[Collaboration] = Table()
        self.studies: Table[Study] = Table()
        self.stores: Table[AlgorithmStore] = Table()
        self.tasks: Table[Task] = Table()
        self.runs: Table[Run] = Table()
        self.sessions: Table[Session] = Table()
        self.dataframes: Table[Dataframe] = Table()
        # Known faults of servers, which a switch brings about.
        self.stuck_dataframes = False
        self.failed_is_ready = False
        self._listeners: dict[int, Listener] = {}

    @property
    def tables(self) -> dict[str, Table[Any]]:
        """All tables, by name."""
        return {name: table for name, table in vars(self).items() if isinstance(table, Table)}

    def restore(self, tables: dict[str, Table[Any]]) -> None:
        """Take the tables of an earlier process."""
        for name, table in tables.items():
            setattr(self, name, table)

    # -- who belongs to what -------------------------------------------------------------------

    def collaborations_of(self, organization: Organization) -> list[Collaboration]:
        """Return the collaborations an organization takes part in."""
        return [c for c in self.collaborations if organization in c.organizations]

    def node_of(self, organization: Organization, collaboration: Collaboration) -> Node | None:
        """Return the node of an organization in a collaboration."""
        found = self.nodes.where(organization=organization, collaboration=collaboration)
        return found[0] if found else None

    def runs_of(self, task: Task) -> list[Run]:
        """Return the runs of a task, oldest first."""
        return self.runs.where(task=task)

    def children_of(self, task: Task) -> list[Task]:
        """Return the subtasks of a task."""
        return self.tasks.where(parent=task)

    # -- states ----------------------------------------------------------------------------------

    def task_status(self, task: Task) -> str:
        """Return the state of a task, which each generation derives differently."""
        runs = self.runs_of(task)
        failed = {run.status for run in runs if run.failed}
        if self.generation == 5:
            if failed:
                return "failed"
            return "completed" if all(run.finished for run in runs) else "awaiting"
        if failed:
            return failed.pop() if self.generation == 4 and len(failed) == 1 else "failed"
        states = {run.status for run in runs}
        for state in ("active", "initializing", "pending"):
            if state in states:
                return state
        return "completed"

    def task_finished(self, task: Task) -> bool:
        """Return whether the state of a task is final, though some of its runs may go on."""
        return self.task_status(task) not in {*OPEN_RUN_STATES, "awaiting"}

    def task_finished_at(self, task: Task) -> datetime | None:
        """Return when a task was completed; None when it is not, or when it failed (v4, v5)."""
        runs = self.runs_of(task)
        ends = [run.finished_at for run in runs if run.finished_at]
        if self.generation == 3:
            # In v3 a failure counts as well.
            return max(ends) if ends and len(ends) == len(runs) else None
        return max(ends) if ends and self.task_status(task) == "completed" else None

    def is_open(self, run: Run) -> bool:
        """Return whether a node may take up a run: unfinished, and what it waits for is done."""
        if run.finished_at is not None:
            return False
        return all(other.finished_at is not None for earlier in run.task.depends_on for other in self.runs_of(earlier))

    def dataframe_ready(self, dataframe: Dataframe) -> bool:
        """Return whether the last step on a dataframe succeeded everywhere."""
        task = dataframe.last_session_task
        runs = self.runs_of(task) if task else []
        return bool(runs) and len(self.organizations_ready(dataframe)) == len(runs)

    def organizations_ready(self, dataframe: Dataframe) -> list[int]:
        """Return the ids of the organizations where the last step succeeded."""
        task = dataframe.last_session_task
        runs = self.runs_of(task) if task else []
        if self.stuck_dataframes and any(run.action == "preprocessing" for run in runs):
            return []
        return [
            run.organization.id for run in runs if run.status == "completed" or (self.failed_is_ready and run.failed)
        ]

    def dependents_of(self, task: Task) -> list[Task]:
        """Return the tasks that wait for this one."""
        return [other for other in self.tasks if task in other.depends_on]

    # -- what follows from a change ----------------------------------------------------------------

    def fail_siblings(self, run: Run) -> None:
        """Mark what did not start yet as failed after a run failed (4.14 and later)."""
        for sibling in self.runs_of(run.task):
            if sibling is run or sibling.started_at or sibling.finished_at:
                continue
            sibling.status = "failed"
            sibling.finished_at = now()
            sibling.log = sibling.log or (
                f"Marked as failed because sibling run id={run.id} failed with status '{run.status}'."
            )

    def fail_dependents(self, run: Run) -> None:
        """Mark the tasks that wait for the task of a failed run (v5)."""
        waiting, seen = self.dependents_of(run.task), set[int]()
        while waiting:
            task = waiting.pop()
            if task.id in seen:
                continue
            seen.add(task.id)
            for other in self.runs_of(task):
                other.status = "depended on failed task"
                other.finished_at = run.finished_at
            # Further steps on a dataframe fail too; what computes on it is left as it is.
            waiting += [
                later
                for later in self.dependents_of(task)
                if not any(r.action in COMPUTE_ACTIONS for r in self.runs_of(later))
            ]

    def kill(self, task: Task) -> None:
        """Mark what is unfinished of a task and its subtasks as killed, and tell the nodes."""
        tasks = (task, *self.children_of(task))
        three = self.generation == 3
        # v3 kills what has finished, too.
        killed = [run for each in tasks for run in self.runs_of(each) if three or not run.finished]
        kill_list = [
            {
                "task_id": run.task.id,
                "result_id" if three else "run_id": run.id,
                "organization_id": run.organization.id,
            }
            for run in killed
        ]
        if three:
            # It tells the nodes of as many runs as there are tasks; the others compute on in vain.
            kill_list = kill_list[: len(tasks)]
        self.emit("kill_containers", {"kill_list": kill_list, "collaboration_id": task.collaboration.id})
        for run in killed:
            run.status = "killed by user"
            run.finished_at = now()

    def delete_task(self, task: Task) -> None:
        """Remove a task with its subtasks and all their runs."""
        for child in self.children_of(task):
            self.delete_task(child)
        for run in self.runs_of(task):
            self.runs.remove(run)
        self.tasks.remove(task)

    def delete_session(self, session: Session) -> None:
        """Remove a session with its dataframes and tasks."""
        for frame in self.dataframes.where(session=session):
            self.dataframes.remove(frame)
        for task in self.tasks.where(session=session):
            self.delete_task(task)
        self.sessions.remove(session)

    # -- events ------------------------------------------------------------------------------------

    def listen(self, node: Node, listener: Listener) -> None:
        """Hand the events of its collaboration to a node."""
        self._listeners[node.id] = listener

    def unlisten(self, node: Node) -> None:
        """End what `listen` began."""
        self._listeners.pop(node.id, None)

    def emit(self, event: str, payload: dict[str, Any]) -> None:
        """Send an event to the nodes that listen; they look themselves whether it is theirs."""
        for listener in list(self._listeners.values()):
            listener(event, payload)
