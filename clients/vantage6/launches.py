"""Creating tasks, sessions and dataframes exactly once, with everything checked before anything is sent.

The protocol is that of `clients.once`. Here is what vantage6 adds: how each kind is found again, checked and written.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pydantic import JsonValue

from prefect_biomed.clients.errors import (
    ConfigurationError,
    LedgerError,
    NotFoundError,
    PreflightFailed,
    UnexpectedResponse,
)
from prefect_biomed.clients.files import home
from prefect_biomed.clients.once import Circumstances, Deed, Foreseen, Intent, IntentFolder, Launch, foresee, once
from prefect_biomed.clients.polling import PollSettings
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vantage6.arguments import problems_of_arguments, written_call
from prefect_biomed.clients.vantage6.client import Vantage6Client, nodes_of
from prefect_biomed.clients.vantage6.dataframes import (
    Chain,
    arguments_mark,
    delete_unused,
    step_differences,
    steps_of,
)
from prefect_biomed.clients.vantage6.errors import NameConflict, RequestRefused, TaskGone
from prefect_biomed.clients.vantage6.models import (
    Action,
    Collaboration,
    Dataframe,
    Function,
    Record,
    Session,
    SessionScope,
    Task,
    TaskRequest,
)
from prefect_biomed.clients.vantage6.preflight import (
    MAX_NAME,
    OfflineNodes,
    Plan,
    check_frame,
    check_label,
    check_nodes,
    collaboration_of,
    plan_task,
    task_name,
    wait_until_ready,
)
from prefect_biomed.clients.vantage6.sessions import only_generation_5, readers_of

__all__ = [
    "add_preprocessing",
    "foresee_dataframe",
    "foresee_session",
    "foresee_task",
    "intents",
    "launch",
    "make_dataframe",
    "make_session",
]

logger = logger_of(__name__)

R = TypeVar("R", bound=Record)

_DATAFRAME_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LOCK_SECONDS = 30.0


def launch(
    client: Vantage6Client,
    request: TaskRequest,
    token: str,
    *,
    offline_nodes: OfflineNodes = "warn",
    waiting: PollSettings | None = None,
    settle_seconds: float | None = None,
    folder: Path | None = None,
    circumstances: Circumstances | None = None,
) -> Task:
    """Create a task, once and never twice (``POST task``).

    The token is in the task's name, by which the collaboration is searched before anything is sent and whenever an
    answer is lost. Safe to repeat, also by two processes at once, and after a kill while the request is still on its
    way: the intent is written down before it is sent, and then looked for until it can no longer take effect.

    After the log-in, for which version, token and account are read, five requests whatever the number of
    organizations, six on generation 5, where dataframes are checked too; plus one for each organization where the
    server keeps payloads in a blob store, and two where an algorithm store tells whether the function is central.
    A repetition of a task that is known takes one.

    Args:
        client: The account.
        request: What is asked for.
        token: The same on every retry of this intent, different for every new one.
        offline_nodes: What to do when a node is offline.
        waiting: How to wait for offline nodes, and for dataframes that are being made.
        settle_seconds: Longest time after which a request may still take effect although its answer was lost; that of
            the client when None.
        folder: Folder of intents; ``vantage6/intents`` in the package's home when None.
        circumstances: What the caller knows of earlier attempts and other machines.

    Returns:
        The task, new or found, with the organizations asked where this machine has sent it.

    Raises:
        PreflightFailed: The request cannot work; nothing was sent. All problems are listed.
        DeadlineExceeded: A node did not come back, or a dataframe was not made in time; nothing was sent.
        LaunchInDoubt: The answer was lost and no task of that name has appeared. Repeating looks again first.
        HeldElsewhere: Another process is at the same task.
        TaskGone: The task was made and somebody has deleted it. It is not made again.
        ServerFault: The server failed, and no task has appeared; the message says what it said.
        PlatformError: The task was refused.
    """
    creation = _TaskCreation(client, request, token, offline_nodes, waiting)
    made = _made(creation, settle_seconds, folder, circumstances)
    return made.model_copy(update={"asked": creation.asked(made.id, folder)})


def foresee_task(
    client: Vantage6Client,
    request: TaskRequest,
    token: str,
    *,
    offline_nodes: OfflineNodes = "warn",
    folder: Path | None = None,
) -> tuple[Foreseen, Plan | None]:
    """Tell what `launch` would do now. It only reads.

    Args:
        client: The account.
        request: What is asked for.
        token: Identity of the intent.
        offline_nodes: As for `launch`.
        folder: As for `launch`.

    Returns:
        Whether the task would be created, or which one is taken; and, when it would be created, who executes it.

    Raises:
        BiomedError: As `launch` raises before it sends anything.
    """
    creation = _TaskCreation(client, request, token, offline_nodes, None)
    seen = _foreseen(creation, folder)
    return seen, creation.plan() if seen.deed in {Deed.LAUNCH, Deed.LOOK_FIRST} else None


def make_session(
    client: Vantage6Client,
    collaboration: str | int,
    name: str,
    *,
    scope: SessionScope = SessionScope.OWN,
    study: str | int | None = None,
    settle_seconds: float | None = None,
    folder: Path | None = None,
    circumstances: Circumstances | None = None,
) -> Session:
    """Make a session, or take the one of this name (``POST session``). Safe to repeat: the name is what counts.

    Args:
        client: The account.
        collaboration: Exact name or id.
        name: Unique in the collaboration.
        scope: Who may use it.
        study: Exact name or id of a study.
        settle_seconds: As for `launch`.
        folder: As for `launch`.
        circumstances: As for `launch`.

    Returns:
        The session.

    Raises:
        NameConflict: A session of this name has another scope or study, or is hidden from this account.
        LaunchInDoubt: The answer was lost and no session of that name has appeared. Repeating looks again first.
        PermissionDeniedError: The role does not allow this scope.
        ConfigurationError: The server is of an older generation, or the name is one that it refuses.
    """
    creation = _session_creation(client, collaboration, name, scope, study)
    made = _made(creation, settle_seconds, folder, circumstances)
    creation.refuse_another(made)
    return made


def foresee_session(
    client: Vantage6Client,
    collaboration: str | int,
    name: str,
    *,
    scope: SessionScope = SessionScope.OWN,
    study: str | int | None = None,
) -> Session | None:
    """Find the session that `make_session` would take. It only reads.

    Args:
        client: The account.
        collaboration: As for `make_session`.
        name: As for `make_session`.
        scope: As for `make_session`.
        study: As for `make_session`.

    Returns:
        The session; None when one would be made.

    Raises:
        NameConflict: As for `make_session`.
        ConfigurationError: As for `make_session`.
    """
    creation = _session_creation(client, collaboration, name, scope, study)
    found = creation.find()
    if not found:
        return None
    creation.refuse_another(found[0])
    return found[0]


def _session_creation(
    client: Vantage6Client, collaboration: str | int, name: str, scope: SessionScope, study: str | int | None
) -> _SessionCreation:
    only_generation_5(client)
    if not name.strip() or name.isdecimal() or len(name) > MAX_NAME:
        raise ConfigurationError(f"name is {name!r}; a session needs 1 to 128 characters that are not all digits.")
    owner = client.collaboration(collaboration)
    study_id = client.study(study, owner.id).id if study is not None else None
    return _SessionCreation(client, owner.id, name, scope, study_id)


def make_dataframe(
    client: Vantage6Client,
    session_id: int,
    name: str,
    *,
    label: str,
    image: str,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    preprocessing: Sequence[Function] = (),
    replace: bool = False,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
    settle_seconds: float | None = None,
    folder: Path | None = None,
    circumstances: Circumstances | None = None,
) -> Dataframe:
    """Extract a dataframe at the nodes, or take the one of this name (``POST session/{id}/dataframe``).

    Safe to repeat: names are unique on the whole server. The dataframe is not ready yet; wait for it.

    A dataframe that exists is taken only when everything that decides its content is the same: database, and of the
    extraction and of each step in their order image, method, arguments and organizations. Encrypted arguments are
    known again by a mark that only the sender's private key makes; those of others cannot be compared and count as
    different. One that lacks steps is taken when this very chain was begun, by an earlier attempt or from this
    machine. One whose extraction or step has failed is deleted and made anew, as is one that is different when
    `replace` is True. Nothing that is still being computed, or computed on, is deleted.

    Args:
        client: The account.
        session_id: The session.
        name: Letters, digits, hyphens and underscores; unique on the whole server.
        label: Label of the database in the nodes' configuration.
        image: Docker image of the extraction.
        method: Its function.
        arguments: Keyword arguments of the function.
        preprocessing: What will change it after the extraction, in this order (`add_preprocessing`). It is compared
            here and made there.
        replace: Whether a dataframe of this name that is different is deleted and made anew.
        organizations: Exact names or ids; all of the collaboration when None.
        store: Id of the algorithm store that vouches for the image.
        settle_seconds: As for `launch`.
        folder: As for `launch`.
        circumstances: As for `launch`.

    Returns:
        The dataframe, new or found.

    Raises:
        PreflightFailed: The request cannot work; nothing was sent. All problems are listed.
        NameConflict: A dataframe of this name is another one, or is to be replaced and in use; the message shows the
            difference and says what to do.
        LaunchInDoubt: The answer was lost and no dataframe of that name has appeared. Repeating looks again first.
        PlatformError: The server refused it.
    """
    extraction = Function(image=image, method=method, arguments=dict(arguments or {}))
    creation, chain = _dataframe_creation(
        client, session_id, name, label, [extraction, *preprocessing], organizations, store
    )
    made = _made(creation, settle_seconds, folder, circumstances)
    again = circumstances is not None and circumstances.attempted_since is not None
    if creation.is_new or _is_as_asked(
        client, made, chain, unfinished=again or creation.has_begun(made.id, folder), replace=replace
    ):
        return made
    return _made(creation, settle_seconds, folder, circumstances)


def foresee_dataframe(
    client: Vantage6Client,
    session_id: int,
    name: str,
    *,
    label: str,
    functions: Sequence[Function],
    replace: bool = False,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
) -> tuple[Foreseen, int, int]:
    """Tell what `make_dataframe` and then `add_preprocessing` would do now. It only reads.

    Args:
        client: The account.
        session_id: The session.
        name: Name of the dataframe.
        label: Label of the database.
        functions: The extraction, and the steps after it.
        replace: As for `make_dataframe`.
        organizations: As for `make_dataframe`.
        store: As for `make_dataframe`.

    Returns:
        Whether the dataframe would be made, or which one is taken; how many of its functions would be sent; and at how
        many organizations each.

    Raises:
        BiomedError: As `make_dataframe` raises before it sends anything.
    """
    creation, chain = _dataframe_creation(client, session_id, name, label, functions, organizations, store)
    at = len(chain.organizations)
    made = next(iter(creation.find()), None)
    if made is None:
        return Foreseen(what=creation.what, deed=Deed.LAUNCH), len(functions), at
    steps = steps_of(client, made.id)
    if _fault_of(client, made, chain, steps, unfinished=creation.has_begun(made.id, None), replace=replace):
        return Foreseen(what=creation.what, deed=Deed.LAUNCH, ends=(str(made.id),)), len(functions), at
    return Foreseen(what=creation.what, deed=Deed.ADOPT, id=str(made.id)), len(functions) - len(steps), at


def _dataframe_creation(
    client: Vantage6Client,
    session_id: int,
    name: str,
    label: str,
    functions: Sequence[Function],
    organizations: Sequence[str | int] | None,
    store: int | None,
) -> tuple[_DataframeCreation, Chain]:
    """The creation of a dataframe, as far as it can be checked, and all that is asked of it."""
    only_generation_5(client)
    first = functions[0]
    step = _SessionTask(client, session_id, first.image, first.method, first.arguments, organizations, store)
    if not _DATAFRAME_NAME.fullmatch(name):
        step.problems.append(f"name is {name!r}; letters, digits, hyphens and underscores are allowed.")
    step.check(f"Dataframe {name!r}")
    chain = Chain(session_id, name, label, functions, step.organizations)
    return _DataframeCreation(client, session_id, name, label, step, chain.plan), chain


def _is_as_asked(client: Vantage6Client, made: Dataframe, chain: Chain, *, unfinished: bool, replace: bool) -> bool:
    """Tell whether a dataframe is what is asked for, and good; delete one that is to be made anew."""
    steps = steps_of(client, made.id)
    why = _fault_of(client, made, chain, steps, unfinished=unfinished, replace=replace)
    if not why:
        return True
    delete_unused(client, made, steps, why)
    logger.warning("Dataframe %r (id %d) was deleted and is made anew: %s", made.name, made.id, why)
    return False


def _fault_of(
    client: Vantage6Client, made: Dataframe, chain: Chain, steps: Sequence[Task], *, unfinished: bool, replace: bool
) -> str:
    """Why a dataframe is to be made anew; empty when it is taken."""
    differences = chain.differences(client, made, steps, unfinished=unfinished)
    failed = next((task for task in steps if task.status.is_failure), None)
    if differences and not replace:
        raise NameConflict(
            f"Dataframe {made.name!r} (id {made.id}) exists and is not what is asked for: {'; '.join(differences)}. "
            "Choose another name, or give replace=True to have it deleted and made anew; delete_dataframe(credentials, "
            f"{made.id}) deletes it."
        )
    return "; ".join(differences) or (f"task {failed.id}, which made it, has failed" if failed else "")


def add_preprocessing(
    client: Vantage6Client,
    dataframe_id: int,
    step: int,
    *,
    image: str,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    organizations: Sequence[str | int] | None = None,
    store: int | None = None,
    settle_seconds: float | None = None,
    folder: Path | None = None,
    circumstances: Circumstances | None = None,
) -> Task:
    """Change a dataframe at the nodes (``POST session/dataframe/{id}/preprocess``), once for each step number.

    Safe to repeat: the server gives these tasks no name of ours, so the number of the step is what counts. Of a step
    that is there, image, method, arguments and organizations are compared, as for `make_dataframe`.

    Args:
        client: The account.
        dataframe_id: The dataframe.
        step: Number of the step in the life of the dataframe, from 1.
        image: Docker image of the step.
        method: Its function.
        arguments: Keyword arguments of the function.
        organizations: Exact names or ids; all of the collaboration when None.
        store: Id of the algorithm store that vouches for the image.
        settle_seconds: As for `launch`.
        folder: As for `launch`.
        circumstances: As for `launch`.

    Returns:
        The task of the step. It runs after earlier steps and after computations that use the dataframe.

    Raises:
        NameConflict: The step of this number is another one.
        PreflightFailed: The request cannot work; nothing was sent.
        LaunchInDoubt: The answer was lost and no step of that number has appeared. Repeating looks again first.
        PlatformError: The server refused it.
    """
    only_generation_5(client)
    frame = client.get(Dataframe, dataframe_id)
    if frame.session_id is None:
        raise NotFoundError(f"Dataframe {frame.name!r} tells no session.", url=client.url)
    task = _SessionTask(client, frame.session_id, image, method, arguments or {}, organizations, store)
    task.check(f"Step {step} of dataframe {frame.name!r}")
    creation = _StepCreation(client, frame, step, task)
    made = _made(creation, settle_seconds, folder, circumstances)
    if not creation.is_new:
        wanted = Function(image=image, method=method, arguments=dict(arguments or {}))
        place = (frame.session_id, frame.name, step)
        if differences := step_differences(client, made, wanted, task.organizations, place):
            raise NameConflict(
                f"Step {step} of dataframe {frame.name!r} is another one: {'; '.join(differences)}. Make a dataframe "
                f"of another name for other steps, or delete this one: delete_dataframe(credentials, {frame.id})."
            )
    return made


class _Gone(NotFoundError):
    """A record tells what was made, and the server that it is not there any more.

    Attributes:
        number: Its id.
    """

    def __init__(self, message: str, *, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


def _gone(what: str, number: int) -> _Gone:
    return _Gone(f"The {what} that was made with id {number} is deleted.", number=number)


class _Creation(ABC, Generic[R]):
    """One object that is to be made once.

    Attributes:
        what: What it is, for messages.
        key: What tells it from everything else on the server.
        is_new: Whether it was sent now.
    """

    what: str
    key: tuple[str | int, ...]

    def __init__(self, client: Vantage6Client) -> None:
        self.client = client
        self.is_new = False

    @abstractmethod
    def find(self) -> Sequence[R]:
        """Look for it; the oldest first."""

    @abstractmethod
    def prepare(self) -> Mapping[str, JsonValue]:
        """Check and write the request; tell what is to be remembered of it."""

    @abstractmethod
    def send(self) -> R:
        """Send the request."""

    @abstractmethod
    def get(self, number: int) -> R:
        """Read what a record tells was made. Databases may give the number of a deleted object to another one."""

    def end(self, other: R) -> None:
        """End another one of the same key. Where names are unique there is none."""


def _made(
    creation: _Creation[R], settle_seconds: float | None, folder: Path | None, circumstances: Circumstances | None
) -> R:
    """Make an object once; when its unique name is taken meanwhile, take what has it."""
    store = intents(folder)
    launch = _as_launch(creation, store, settle_seconds)
    try:
        try:
            return once(launch, store, circumstances)
        except _Gone as gone:
            logger.info("%s It is made anew.", gone)
            _forget(store, launch.token, gone.number)
            return once(launch, store, circumstances)
    except RequestRefused as error:
        if "already exists" not in str(error):
            raise
        creation.is_new = False
        if found := creation.find():
            return found[0]
        raise NameConflict(
            f"The name of {creation.what} is taken by one that this account does not see. Choose another name."
        ) from error


def _foreseen(creation: _Creation[Task], folder: Path | None) -> Foreseen:
    store = intents(folder)
    return foresee(_as_launch(creation, store, None), store, ended=lambda task: task.status.is_terminal)


def _as_launch(creation: _Creation[R], store: IntentFolder, settle_seconds: float | None) -> Launch[R]:
    """Say to the protocol how an object is found, checked and sent."""
    client = creation.client

    def send() -> R:
        creation.is_new = True
        return creation.send()

    return Launch(
        what=creation.what,
        token=_name_of_record(client.url, creation.key),
        settle_seconds=client.settle_seconds if settle_seconds is None else settle_seconds,
        find=lambda _: creation.find(),
        prepare=lambda _: {"server": client.url, "what": creation.what, **creation.prepare()},
        send=send,
        get=lambda identifier: creation.get(_number(identifier, store.folder)),
        identify=lambda one: str(one.id),
        end=creation.end,
    )


def intents(folder: Path | None = None) -> IntentFolder:
    """Open the records of what this machine has launched.

    Args:
        folder: As for `launch`.
    """
    return IntentFolder(folder or home("vantage6", "intents"))


def _remembered(creation: _Creation[R], folder: Path | None) -> Intent | None:
    return intents(folder).read(_name_of_record(creation.client.url, creation.key))


def _forget(store: IntentFolder, token: str, number: int) -> None:
    """Forget an object that was deleted, unless another process has made a new one since."""
    with store.exclusive(token, _LOCK_SECONDS):
        intent = store.read(token)
        if intent is not None and intent.id == str(number):
            store.write(Intent(token=token))


def _name_of_record(url: str, key: Sequence[str | int]) -> str:
    """Make a name that any disk takes, and that differs between servers and kinds."""
    digest = hashlib.sha256(json.dumps([url, *key]).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", str(key[-1]))[:60].strip("-.")
    return f"{key[0]}-{readable}-{digest}"


def _number(identifier: str, folder: Path) -> int:
    if not identifier.isdecimal():
        raise LedgerError(f"A record in {folder} tells the id {identifier!r}, which is no number. Put it right first.")
    return int(identifier)


class _TaskCreation(_Creation[Task]):
    """A task; its name carries the token."""

    def __init__(
        self,
        client: Vantage6Client,
        request: TaskRequest,
        token: str,
        offline_nodes: OfflineNodes,
        waiting: PollSettings | None,
    ) -> None:
        super().__init__(client)
        self._request = request
        self._token = token
        self._offline_nodes: OfflineNodes = offline_nodes
        self._waiting = waiting
        self._body: IO[bytes] | None = None
        self._name = task_name(request, token)
        self.what = f"task {self._name}"
        self.key = ("task", request.collaboration, self._name)

    @cached_property
    def _collaboration(self) -> Collaboration:
        return collaboration_of(self.client, self._request, self._token)

    def find(self) -> Sequence[Task]:
        if len(self._name) > MAX_NAME:
            return []
        return self.client.tasks_named(self._name, self._collaboration.id)

    def plan(self) -> Plan:
        """Check everything that can be checked."""
        return plan_task(
            self.client, self._request, self._token, self._collaboration, offline_nodes=self._offline_nodes
        )

    def prepare(self) -> Mapping[str, JsonValue]:
        plan = self.plan()
        wait_until_ready(self.client, plan, self._waiting, wait_for_nodes=self._offline_nodes == "wait")
        self._body, arguments = _body(self.client, plan)
        return {
            "collaboration": plan.collaboration.id,
            "organizations": [organization.id for organization in plan.organizations],
            "image": self._request.image,
            "method": self._request.method,
            "session": self._request.session,
            "study": plan.study_id,
            "databases": plan.databases,
            "arguments": arguments,
        }

    def send(self) -> Task:
        if self._body is None:
            raise ValueError("a task is prepared before it is sent")
        with self._body as body:
            return self.client.create_task(body)

    def asked(self, number: int, folder: Path | None) -> tuple[int, ...]:
        """Organizations for which this machine has sent the task of an id; none when it has not, or cannot tell."""
        intent = _remembered(self, folder)
        listed = intent.asked.get("organizations") if intent is not None and intent.id == str(number) else None
        return tuple(one for one in listed if isinstance(one, int)) if isinstance(listed, list) else ()

    def get(self, number: int) -> Task:
        task = self.client.task(number)
        if task.name != self._name:
            raise TaskGone(f"Task {number}, made as {self._name}, was deleted. Its results are lost.")
        return task

    def end(self, other: Task) -> None:
        self.client.kill_task(other.id)


class _SessionCreation(_Creation[Session]):
    """A session; its name is unique in the collaboration."""

    def __init__(
        self, client: Vantage6Client, collaboration_id: int, name: str, scope: SessionScope, study_id: int | None
    ) -> None:
        super().__init__(client)
        self._collaboration_id = collaboration_id
        self._name = name
        self._fields = {"collaboration_id": collaboration_id, "study_id": study_id, "scope": scope.value}
        self.what = f"session {name!r}"
        self.key = ("session", collaboration_id, name)

    def find(self) -> Sequence[Session]:
        found = self.client.records(Session, name=self._name, collaboration_id=self._collaboration_id)
        return [session for session in found if session.name == self._name]

    def refuse_another(self, made: Session) -> None:
        """Make sure that a session of this name is what is asked for."""
        scope, study_id = self._fields["scope"], self._fields["study_id"]
        if (made.scope.value, made.study_id) == (scope, study_id):
            return
        raise NameConflict(
            f"Session {self._name!r} (id {made.id}) exists with scope {made.scope.value!r} and study {made.study_id}, "
            f"not {scope!r} and {study_id}. Choose another name, or these settings; or delete it with all that it "
            f"holds: delete_session(credentials, {made.id}, delete_dependents=True)."
        )

    def prepare(self) -> Mapping[str, JsonValue]:
        return dict(self._fields)

    def send(self) -> Session:
        return self.client.create(Session, name=self._name, **self._fields)

    def get(self, number: int) -> Session:
        try:
            session = self.client.get(Session, number)
        except NotFoundError as error:
            raise _gone(self.what, number) from error
        if (session.name, session.collaboration_id) != (self._name, self._collaboration_id):
            raise _gone(self.what, number)
        return session


class _SessionTask:
    """A function that nodes execute to make or change a dataframe.

    Attributes:
        organizations: Those that execute it.
        problems: A sentence for each problem found.
    """

    def __init__(
        self,
        client: Vantage6Client,
        session_id: int,
        image: str,
        method: str,
        arguments: Mapping[str, Any],
        organizations: Sequence[str | int] | None,
        store: int | None,
    ) -> None:
        self.problems = problems_of_arguments(arguments)
        self.collaboration, self.organizations = readers_of(client, session_id, organizations, self.problems)
        self._client = client
        self._image = image
        self._method = method
        self._arguments = arguments
        self._digest: str | None = None
        self._store = store

    def check(self, subject: str) -> None:
        """Raise all problems at once."""
        if self.problems:
            raise PreflightFailed(subject, self.problems)

    def body(self, place: tuple[int, str, int]) -> dict[str, Any]:
        """Write it as requests carry it, for a step of a dataframe."""
        key = self._client.private_key

        def mark(organization_id: int) -> bytes | None:
            return arguments_mark(key, place, organization_id, self._method, self._arguments) if key else None

        encrypted = self.collaboration.encrypted
        with written_call(self._client.version.major, self._method, self._arguments) as call:
            payloads = call.payloads(self._client, self.organizations, encrypted=encrypted, mark=mark)
            self._digest = call.digest
        task: dict[str, Any] = {"image": self._image, "method": self._method, "organizations": payloads}
        return task | {"store_id": self._store} if self._store is not None else task

    def remembered(self) -> dict[str, JsonValue]:
        """What a record holds of it."""
        ids: list[JsonValue] = [organization.id for organization in self.organizations]
        return {"image": self._image, "method": self._method, "organizations": ids, "arguments": self._digest}


class _DataframeCreation(_Creation[Dataframe]):
    """A dataframe; its name is unique on the whole server."""

    def __init__(
        self, client: Vantage6Client, session_id: int, name: str, label: str, task: _SessionTask, plan: str
    ) -> None:
        super().__init__(client)
        self._plan = hashlib.sha256(plan.encode()).hexdigest()
        self._session_id = session_id
        self._name = name
        self._label = label
        self._task = task
        self._body: dict[str, Any] = {}
        self.what = f"dataframe {name!r}"
        self.key = ("dataframe", session_id, name)

    def find(self) -> Sequence[Dataframe]:
        return [
            frame for frame in self.client.records(Dataframe, session_id=self._session_id) if frame.name == self._name
        ]

    def prepare(self) -> Mapping[str, JsonValue]:
        nodes = nodes_of(self.client, self._task.collaboration.id)
        problems: list[str] = []
        warnings: list[str] = []
        check_nodes(self.client, self._task.organizations, nodes, "warn", problems, warnings)
        for organization in self._task.organizations:
            check_label(self._label, organization, nodes.get(organization.id), (), problems)
        if problems:
            raise PreflightFailed(f"Dataframe {self._name!r}", problems)
        for warning in warnings:
            logger.warning("%s", warning)
        self._body = self._task.body((self._session_id, self._name, 0))
        return {"session": self._session_id, "label": self._label, "plan": self._plan, **self._task.remembered()}

    def has_begun(self, number: int, folder: Path | None) -> bool:
        """Whether this machine has made the dataframe of an id to take it through just these steps."""
        intent = _remembered(self, folder)
        return intent is not None and intent.id == str(number) and intent.asked.get("plan") == self._plan

    def send(self) -> Dataframe:
        return self.client.create(
            Dataframe, session_id=self._session_id, label=self._label, name=self._name, task=self._body
        )

    def get(self, number: int) -> Dataframe:
        try:
            frame = self.client.get(Dataframe, number)
        except NotFoundError as error:
            raise _gone(self.what, number) from error
        if (frame.name, frame.session_id) != (self._name, self._session_id):
            raise _gone(self.what, number)
        return frame


class _StepCreation(_Creation[Task]):
    """A step that changes a dataframe; its number is what counts."""

    def __init__(self, client: Vantage6Client, frame: Dataframe, step: int, task: _SessionTask) -> None:
        super().__init__(client)
        self._frame = frame
        self._step = step
        self._task = task
        self._body: dict[str, Any] = {}
        self.what = f"step {step} of {frame.name!r}"
        self.key = ("step", frame.session_id or 0, frame.id, step, frame.name)

    def find(self) -> Sequence[Task]:
        steps = steps_of(self.client, self._frame.id)[1:]
        return steps[self._step - 1 : self._step] if self._step > 0 else []

    def prepare(self) -> Mapping[str, JsonValue]:
        done = len(steps_of(self.client, self._frame.id)) - 1
        if self._step != done + 1:
            raise ConfigurationError(
                f"step is {self._step}, but dataframe {self._frame.name!r} has had {done} steps; the next is "
                f"{done + 1}."
            )
        problems: list[str] = []
        check_frame(self.client, self._frame, self._task.organizations, problems, set())
        if problems:
            raise PreflightFailed(f"Step {self._step} of dataframe {self._frame.name!r}", problems)
        self._body = self._task.body((self._frame.session_id or 0, self._frame.name, self._step))
        return {"dataframe": self._frame.id, "step": self._step, **self._task.remembered()}

    def send(self) -> Task:
        changed = self.client.preprocess(self._frame.id, self._body)
        if changed.last_session_task is None:
            raise UnexpectedResponse(f"The server tells no task for {self.what}.", url=self.client.url)
        return changed.last_session_task

    def get(self, number: int) -> Task:
        for task in steps_of(self.client, self._frame.id)[1:]:
            if task.id == number:
                return task
        raise _gone(self.what, number)


def _body(client: Vantage6Client, plan: Plan) -> tuple[IO[bytes], str]:
    """Write the request, and tell the digest of its arguments."""
    request, major = plan.request, client.version.major
    encrypted = plan.collaboration.encrypted
    with written_call(
        major, request.method, request.arguments, request.arguments_file, central=plan.central is True
    ) as call:
        return call.write_body(client, _fields(plan, major), plan.organizations, encrypted=encrypted), call.digest


def _fields(plan: Plan, major: int) -> dict[str, Any]:
    request = plan.request
    body: dict[str, Any] = {
        "name": plan.name,
        "description": request.description,
        "image": request.image,
        "collaboration_id": plan.collaboration.id,
    }
    if major == 3:
        return body | {"database": plan.databases}
    body["databases"] = plan.databases
    if plan.study_id is not None:
        body["study_id"] = plan.study_id
    if request.store is not None:
        body["store_id"] = request.store
    if major == 5:
        body |= {
            "method": request.method,
            "session_id": request.session,
        }
        # The server finds out itself what we could not: with a store it may be left out.
        if plan.central is not None:
            body["action"] = (Action.CENTRAL_COMPUTE if plan.central else Action.FEDERATED_COMPUTE).value
        if request.depends_on:
            body["depends_on_ids"] = list(request.depends_on)
    return body
