"""Routes about work: tasks, runs, results, kills, blobs, columns."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.responses import FileResponse

from prefect_biomed.sandbox.vantage6._http import ANYONE, NODE, USER, Answer, Call, Routes
from prefect_biomed.sandbox.vantage6._permissions import Caller
from prefect_biomed.sandbox.vantage6._records import (
    ACTIONS,
    COMPUTE_ACTIONS,
    AlgorithmStore,
    Collaboration,
    Dataframe,
    Node,
    Organization,
    Run,
    Session,
    Study,
    Task,
    now,
)
from prefect_biomed.sandbox.vantage6._refusals import Refusal, ServerFlaw, denied

routes = Routes()

_NO_BLOBS = "The large result store is not set to blob storage, result streaming is not available."


# -- tasks ---------------------------------------------------------------------------------------------


def _may_see(caller: Caller, task: Task) -> bool:
    if caller.for_both("task", "view", task.init_org, task.collaboration):
        return True
    own = caller.user is not None and caller.user is task.init_user
    return own and caller.may("task", "view", "own")


@routes.add("GET", "/task", ANYONE)
def list_tasks(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    found: list[Task] = list(registry.tasks)
    if not caller.may("task", "view", "glo"):
        if caller.may("task", "view", "col") or call.generation == 3:
            mine = registry.collaborations_of(caller.organization)
            found = [t for t in found if t.collaboration in mine]
        elif caller.may("task", "view", "org"):
            found = [t for t in found if t.init_org is caller.organization]
        elif caller.may("task", "view", "own"):
            found = [t for t in found if t.init_user is caller.user]
        else:
            denied()
    found = _filter_tasks_3(call, found) if call.generation == 3 else _filter_tasks(call, found)
    write = partial(call.view.task_including, runs=call.includes("runs"), results=call.includes("results"))
    return call.page(found, write, name="Task", columns=Task, newest_first=True)


def _filter_tasks_3(call: Call, found: list[Task]) -> list[Task]:
    fields: dict[str, Callable[[Task], int | None]] = {
        "initiator_id": lambda t: t.init_org.id,
        "init_user_id": lambda t: t.init_user.id if t.init_user else None,
        "collaboration_id": lambda t: t.collaboration.id,
        "parent_id": lambda t: t.parent.id if t.parent else None,
        "run_id": lambda t: t.job_id,
    }
    for name, value in fields.items():
        if (wanted := call.arg(name)) is not None:
            found = [t for t in found if str(value(t)) == wanted]
    if call.arg("status") is not None:
        raise ServerFlaw
    if (wanted := call.arg("result_id")) is not None:
        run = call.registry.runs.get(wanted)
        found = [t for t in found if run is not None and t is run.task]
    return call.like(found, "name", "image", "description")


def _filter_tasks(call: Call, found: list[Task]) -> list[Task]:
    caller = call.caller
    if (wanted := call.integer("collaboration_id")) is not None:
        if not caller.for_collaboration("task", "view", wanted):
            denied(f"You lack the permission to view tasks from collaboration {wanted}!")
        found = [t for t in found if t.collaboration.id == wanted]
    if (wanted := call.integer("init_org_id")) is not None:
        if not caller.for_organization("task", "view", wanted):
            denied(f"You lack the permission to view tasks from organization id={wanted}!")
        found = [t for t in found if t.init_org.id == wanted]
    found = _filter_tasks_by_origin(call, found)
    found = call.like(found, "name", "image", "description")
    return _filter_tasks_by_content(call, found)


def _filter_tasks_by_origin(call: Call, found: list[Task]) -> list[Task]:
    caller, registry = call.caller, call.registry
    if (wanted := call.integer("init_user_id")) is not None:
        user = registry.users.get(wanted)
        if user is None:
            raise Refusal(400, f"User id={wanted} does not exist!")
        if user is not caller.user and not caller.for_organization("task", "view", user.organization):
            denied(f"You lack the permission to view tasks from user id={wanted}!")
        found = [t for t in found if t.init_user is user]
    if (wanted := call.integer("study_id")) is not None:
        study = registry.studies.get(wanted)
        if study is None:
            raise Refusal(400, f"Study id={wanted} does not exist!")
        if not caller.for_collaboration("task", "view", study.collaboration):
            denied(
                f"You lack the permission to view tasks from collaboration "
                f"id={study.collaboration.id} that the study with id={study.id} belongs to!"
            )
        found = [t for t in found if t.study is study]
    if (wanted := call.integer("parent_id")) is not None:
        parent = registry.tasks.get(wanted)
        if parent is None:
            raise Refusal(400, f"Parent task id={wanted} does not exist!")
        if not caller.for_collaboration("task", "view", parent.collaboration):
            denied(
                "You lack the permission to view tasks from the collaboration that the task with "
                f"parent_id={parent.collaboration.id} belongs to!"
            )
        found = [t for t in found if t.parent is parent]
    if (wanted := call.integer("job_id")) is not None:
        job = registry.tasks.where(job_id=wanted)
        if not job:
            raise Refusal(400, f"Job id={wanted} does not exist!")
        if not caller.for_collaboration("task", "view", job[0].collaboration):
            denied(
                "You lack the permission to view tasks from the collaboration that the task with "
                f"job_id={job[0].collaboration.id} belongs to!"
            )
        found = [t for t in found if t.job_id == wanted]
    return found


def _filter_tasks_by_content(call: Call, found: list[Task]) -> list[Task]:
    registry = call.registry
    # These two break the query of the real servers, whatever they are given.
    if call.arg("status") is not None:
        raise ServerFlaw
    if (wanted := call.integer("run_id")) is not None:
        if registry.runs.get(wanted) is None:
            raise Refusal(400, f"Run id={wanted} does not exist!")
        raise ServerFlaw
    if (wanted := call.integer("store_id")) is not None:
        store = registry.stores.get(wanted)
        if store is None:
            raise Refusal(400, f"Algorithm store id={wanted} does not exist!")
        found = [t for t in found if t.store is store]
    if (label := call.arg("database")) is not None:
        found = [t for t in found if label in {entry.get("label") for entry in t.databases}]
    if call.generation == 5:
        for name in ("session", "dataframe"):
            if (wanted := call.integer(f"{name}_id")) is not None:
                found = [t for t in found if (of := getattr(t, name)) and of.id == wanted]
    return _filter_tasks_by_maker(call, found)


def _filter_tasks_by_maker(call: Call, found: list[Task]) -> list[Task]:
    text = call.arg("is_user_created")
    if text is None:
        return found
    try:
        from_user = int(text) != 0
    except ValueError as error:
        raise Refusal(
            400,
            f"Invalid value for 'is_user_created' provided: '{text}'. Should be an integer.",
        ) from error
    return [t for t in found if (t.parent is None) == from_user]


@routes.add("GET", "/task/{id:int}", ANYONE)
def get_task(call: Call) -> Answer:
    record = call.registry.tasks.get(call.id)
    if record is None:
        raise Refusal(404, f"task id={call.id} is not found")
    if not _may_see(call.caller, record):
        denied()
    return call.view.task_including(record, runs=call.includes("runs"), results=call.includes("results"))


@routes.add("GET", "/task/{id:int}/status", ("user", "container"), (4, 5))
def get_task_status(call: Call) -> Answer:
    record = call.registry.tasks.get(call.id)
    if record is None:
        raise Refusal(404, f"Task id={call.id} not found")
    if not _may_see(call.caller, record):
        denied()
    return {"status": call.registry.task_status(record)}


@routes.add("GET", "/task/{id:int}/result", ("user", "container"), (3,))
def list_results_of_task(call: Call) -> Answer:
    record = call.registry.tasks.get(call.id)
    if record is None:
        raise Refusal(404, f"Task id={call.id} not found")
    if not _may_see(call.caller, record):
        denied()
    runs = call.registry.runs_of(record)
    return call.page(runs, call.view.run_in_task_3, name="Result", columns=Run)


@routes.add("DELETE", "/task/{id:int}", USER, tells="inside")
def delete_task(call: Call) -> Answer:
    registry, caller = call.registry, call.caller
    record = registry.tasks.get(call.id)
    if record is None:
        word = "task" if call.generation == 3 else "Task"
        raise Refusal(404, f"{word} id={call.id} not found")
    own = record.init_user is caller.user and caller.may("task", "delete", "own")
    if not own and not caller.for_both("task", "delete", record.init_org, record.collaboration):
        denied()
    frame = record.dataframe
    if frame is not None and frame.last_session_task is record:
        if registry.dataframe_ready(frame):
            raise Refusal(
                403,
                "You cannot delete the last session task for a dataframe that is ready: by doing "
                "so, it would no longer be possible to see how the dataframe was constructed.",
            )
        steps = [t for t in registry.tasks.where(dataframe=frame) if t is not record]
        if steps and registry.stuck_dataframes:
            # What the database says to it.
            raise ServerFlaw("FOREIGN KEY constraint failed")
        if not steps:
            raise Refusal(
                400,
                "Cannot delete the last session task for a dataframe that has less than 2 session "
                "initialization tasks. Please delete the dataframe instead.",
            )
        frame.last_session_task = steps[-1]
    if not registry.task_finished(record):
        registry.kill(record)
    registry.delete_task(record)
    if call.generation == 3:
        return {"msg": f"task id={call.id} and its result successfully deleted"}
    return {"msg": f"task id={call.id} and its algorithm run data have been successfully deleted"}


@routes.add("POST", "/task", ("user", "container"))
def create_task(call: Call) -> Answer:
    if call.generation == 5:
        return post_task_5(call, _read_task_5(call), check_permission=True), 201
    try:
        call.json()
    except Exception as error:
        # Nothing but JSON, and no type of content in particular, is asked for here.
        if call.generation == 4:
            raise Refusal(400, "Request body is incorrect") from error
        raise
    data = call.body(call.server.schemas["task"])
    collaboration, study = _collaboration_and_study(call, data)
    wanted = [entry.get("id") for entry in data["organizations"]]
    organizations = _organizations_asked(call, wanted, collaboration, study)
    init_org = _initiator(call, collaboration, status=401)
    image = data.get("image", "")
    if call.caller.user is not None and not call.caller.for_collaboration("task", "create", collaboration):
        denied()
    if call.caller.claims is not None and not _container_may(call, image, collaboration):
        denied("Container-token is not valid")
    image, store = _image(call, data.get("store_id"), image, collaboration)
    if call.generation == 4:
        _check_inputs(call, [entry.get("input") for entry in data["organizations"]], collaboration)
    if call.generation == 3:
        label = data.get("database", "")
        databases = [{"label": label}] if label else []
    else:
        databases = [dict(entry) for entry in data.get("databases") or []]
    task = Task(
        name=data.get("name", ""),
        description=data.get("description", ""),
        image=image,
        collaboration=collaboration,
        study=study,
        init_org=init_org,
        store=store,
        databases=databases,
        created_at=now(),
    )
    inputs = [entry.get("input") for entry in data["organizations"]]
    _store_task(call, task, organizations, inputs, action=None)
    return call.view.task(task), 201


def _collaboration_and_study(call: Call, data: dict[str, Any]) -> tuple[Collaboration, Study | None]:
    registry = call.registry
    identifier, study_id = data.get("collaboration_id"), data.get("study_id")
    collaboration = registry.collaborations.get(identifier)
    if collaboration is None and (identifier or not study_id):
        raise Refusal(404, f"Collaboration id={identifier} not found!")
    if not study_id or call.generation == 3:
        assert collaboration is not None
        return collaboration, None
    study = registry.studies.get(study_id)
    if study is None:
        raise Refusal(404, f"Study id={study_id} not found")
    if collaboration is not None and study.collaboration is not collaboration:
        raise Refusal(
            400,
            f"The study_id '{study.id}' does not belong to the collaboration_id '{identifier}' that is given.",
        )
    return study.collaboration, study


def _organizations_asked(
    call: Call, wanted: list[Any], collaboration: Collaboration, study: Study | None
) -> list[Organization]:
    """Return the organizations of a new task, each with a node that takes its tasks."""
    for group, name in ((collaboration, "the collaboration"), (study, "the specified study")):
        if group and not {o.id for o in group.organizations}.issuperset(wanted):
            raise Refusal(400, f"At least one of the supplied organizations in not within {name}.")
    nodes = [n for n in call.registry.nodes if n.collaboration is collaboration and n.organization.id in wanted]
    # Asked for twice, an organization makes the count differ and none is missing.
    if len(nodes) < len(wanted):
        present = {n.organization.id for n in nodes}
        missing = ", ".join(str(i) for i in wanted if i not in present)
        raise Refusal(
            400,
            "Cannot create this task because there are no nodes registered for the following "
            f"organization(s): {missing}.",
        )
    if call.caller.user is not None and any(_turns_away(call, n) for n in nodes):
        raise Refusal(
            400,
            "Cannot create this task because one of the nodes that you are trying to send this "
            "task to does not allow you to create tasks.",
        )
    found = [call.registry.organizations.get(i) for i in wanted]
    return [o for o in found if o is not None]


def _turns_away(call: Call, node: Node) -> bool:
    user = call.caller.user
    assert user is not None
    allowed = {
        "allowed_users": {str(user.id)},
        "allowed_orgs": {str(user.organization.id), str(user.organization.name)},
    }
    limits = [(key, value) for key, value in node.config if key in allowed]
    return bool(limits) and not any(value in allowed[key] for key, value in limits)


def _initiator(call: Call, collaboration: Collaboration, status: int) -> Organization:
    organization = call.caller.organization
    if organization not in collaboration.organizations:
        raise Refusal(status, "You can only create tasks for collaborations you are participating in!")
    return organization


def _container_may(call: Call, image: str, collaboration: Collaboration) -> bool:
    claims = call.caller.claims
    assert claims is not None
    parent = call.registry.tasks.get(claims["task_id"])
    same_image = call.generation == 5 or image.endswith(claims["image"])
    return (
        same_image
        and claims["collaboration_id"] == collaboration.id
        and parent is not None
        and not call.registry.task_finished(parent)
    )


def _image(
    call: Call, store_id: int | None, image: str, collaboration: Collaboration
) -> tuple[str, AlgorithmStore | None]:
    """Return the image to record, with its digest when a store knows it."""
    if call.caller.claims is not None:
        parent = call.registry.tasks.get(call.caller.claims["task_id"])
        assert parent is not None
        return parent.image, parent.store
    if not store_id:
        return image, None
    store = call.registry.stores.get(store_id)
    if store is None:
        raise Refusal(400, f"Algorithm store id={store_id} not found!")
    if store.collaboration not in (None, collaboration):
        raise Refusal(
            403,
            "The algorithm store is not part of the collaboration to which the task is posted.",
        )
    digest = call.server.digest(image)
    if digest is None:
        raise Refusal(400, "Algorithm not found in store!")
    return f"{image}@{digest}", store


def _check_inputs(call: Call, inputs: list[Any], collaboration: Collaboration) -> None:
    """Refuse input that is readable where it must not be, or the other way round."""
    five = call.generation == 5
    word, owner = ("function arguments", "function arguments") if five else ("input", "input")
    for value in inputs:
        if call.server.blobs is not None:
            _check_blob(value, word)
            continue
        if five and value is None:
            continue
        if not isinstance(value, str):
            raise ServerFlaw
        readable = True
        try:
            base64.b64decode(value).decode("utf-8")
        except UnicodeDecodeError:
            readable = False
        if collaboration.encrypted and readable:
            raise Refusal(
                400,
                f"Your collaboration requires encryption, but {_subject(word)} not encrypted! "
                f"Please encrypt your {owner} before sending it.",
            )
        if not collaboration.encrypted and not readable:
            message = (
                f"Your task's {word} cannot be parsed. Your {word} should be a base64 encoded "
                "JSON string. Note that if you are using the user interface or Python client, "
                f"this should be done for you. Also, make sure not to encrypt your {word}, as "
                "your collaboration is set to not use encryption."
            )
            # The last half sentence comes twice in v5.
            twice = "as your collaboration is set to not use encryption."
            raise Refusal(400, message + (twice if five else ""))


def _subject(word: str) -> str:
    return f"{word} are" if word.endswith("s") else f"{word} is"


def _check_blob(value: Any, word: str) -> None:
    try:
        uuid.UUID(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise Refusal(
            400,
            f"Your task's {word} cannot be parsed. Note that if you are using the user interface "
            "or Python client, this should be done for you.",
        ) from error


def _store_task(
    call: Call,
    task: Task,
    organizations: list[Organization],
    inputs: list[Any],
    action: str | None,
) -> None:
    registry, caller = call.registry, call.caller
    if caller.claims is not None:
        parent = registry.tasks.get(caller.claims["task_id"])
        assert parent is not None
        task.parent, task.job_id, task.init_user = parent, parent.job_id, parent.init_user
    else:
        task.job_id = max((t.job_id for t in registry.tasks), default=0) + 1
        task.init_user = caller.user
    registry.tasks.add(task)
    for organization, value in zip(organizations, inputs, strict=True):
        if isinstance(value, dict):
            value = json.dumps(value)
        registry.runs.add(
            Run(
                task=task,
                organization=organization,
                assigned_at=registry.started_at,
                input=value,
                action=action,
                # v5 forgets to note it.
                blob_storage_used=call.server.blobs is not None and call.generation == 4,
            )
        )
    parent_id = task.parent.id if task.parent else None
    event = "new_task_update" if call.generation == 5 else "new_task"
    payload = {"id": task.id, "parent_id": parent_id, "collaboration_id": task.collaboration.id}
    registry.emit(event, payload)


# -- tasks of v5 ---------------------------------------------------------------------------------------


def _read_task_5(call: Call) -> dict[str, Any]:
    try:
        body = call.json()
    except Exception:  # no JSON is taken for nothing
        body = None
    return check_task_5(call, body)


def check_task_5(call: Call, body: Any) -> dict[str, Any]:
    """Return a task body as v5 reads it; here alone the faults are inside `msg`."""
    schema = call.server.schemas["task"]
    errors = schema.validate(body)
    if errors:
        raise Refusal(400, "Request body is incorrect: " + json.dumps(errors))
    loaded: dict[str, Any] = schema.load(body)
    return loaded


def post_task_5(
    call: Call,
    data: dict[str, Any],
    *,
    check_permission: bool,
    action: str | None = None,
) -> dict[str, Any]:
    """Create a task in v5.

    Args:
        call: the request that asks for it.
        data: its checked body.
        check_permission: whether the caller needs the right to create tasks; a step of a session
            asks for the right to change the session instead.
        action: set for steps of a session.

    Returns:
        The task as it is written.
    """
    registry, caller = call.registry, call.caller
    collaboration, study = _collaboration_and_study(call, data)
    if caller.user and check_permission and not caller.for_collaboration("task", "create", collaboration):
        denied()
    if caller.claims is not None and not _container_may(call, data["image"], collaboration):
        denied("Container-token is not valid")
    session = registry.sessions.get(data["session_id"])
    if session is None:
        raise Refusal(404, f"Session id={data['session_id']} not found!")
    wanted = [entry.get("id") for entry in data["organizations"]]
    organizations = _organizations_asked(call, wanted, collaboration, study)
    init_org = _initiator(call, collaboration, status=403)
    image, store = _image(call, data.get("store_id"), data["image"], collaboration)
    _check_image_of_session(collaboration, session, image)
    if action is None:
        action = _compute_action(call, data, store)
    groups = data.get("databases")
    groups = [[]] if groups is None else groups
    depends_on = _dependencies(call, data, groups, action, session, wanted, collaboration)
    inputs = [entry.get("arguments") for entry in data["organizations"]]
    _check_inputs(call, inputs, collaboration)
    task = Task(
        name=data.get("name", ""),
        description=data.get("description", ""),
        image=image,
        method=data["method"],
        collaboration=collaboration,
        study=study,
        init_org=init_org,
        store=store,
        session=session,
        dataframe=registry.dataframes.get(data.get("dataframe_id")),
        depends_on=depends_on,
        databases=[{**entry, "position": position} for position, group in enumerate(groups) for entry in group],
        created_at=now(),
    )
    _store_task(call, task, organizations, inputs, action)
    return call.view.task(task)


def _check_image_of_session(collaboration: Collaboration, session: Session, image: str) -> None:
    if collaboration.session_restrict_to_same_image and session.image != image:
        raise Refusal(
            400,
            f"The session is restricted to the single image '{session.image}'. You cannot create "
            f"a task with image '{image}'.",
        )


def _compute_action(call: Call, data: dict[str, Any], store: AlgorithmStore | None) -> str:
    known = call.server.action(data["image"], data["method"]) if store else None
    given: str | None = data.get("action")
    if given and known and given != known:
        raise Refusal(400, f"Action {given} does not match the action type in the algorithm store: {known}")
    action = given or known
    if action is None:
        raise Refusal(
            400,
            f"No action type provided. Please provide an action that is one of: {list(ACTIONS)}",
        )
    if action not in COMPUTE_ACTIONS:
        message = f"A {action} task cannot be created in this endpoint."
        step = {"data_extraction": "dataframe extraction", "preprocessing": "preprocessing"}
        if action in step:
            message += f" Please use the dataframe endpoint to create a {step[action]} task."
        raise Refusal(400, message)
    return action


def _dependencies(
    call: Call,
    data: dict[str, Any],
    groups: list[list[dict[str, Any]]],
    action: str,
    session: Session,
    wanted: list[int],
    collaboration: Collaboration,
) -> list[Task]:
    registry = call.registry
    earlier: list[Task] = []
    for entry in (entry for group in groups for entry in group):
        frame: Dataframe | None = None
        if entry["type"] == "dataframe":
            frame = registry.dataframes.get(entry["dataframe_id"])
            if frame is None:
                raise Refusal(404, f"Dataframe '{entry.get('label')}' not found!")
        if action == "data_extraction":
            _check_label(call, entry.get("label"), wanted, collaboration)
            continue
        assert frame is not None, "the real server does not check either"
        missing = sorted(set(wanted) - set(registry.organizations_ready(frame)))
        if missing:
            raise Refusal(
                400,
                "The dataframe you selected is not present for the following organizations: "
                f"{', '.join(map(str, missing))}. Cannot create a task if the dataframe is not "
                "present for all requested organizations.",
            )
    for identifier in data.get("depends_on_ids") or []:
        task = registry.tasks.get(identifier)
        if task is None:
            raise Refusal(404, f"Task with id={identifier} not found!")
        if task.session is not session:
            raise Refusal(400, "The task you are trying to depend on is not part of the same session.")
        earlier.append(task)
    return list(dict.fromkeys(earlier))


def _check_label(call: Call, label: str | None, wanted: list[int], collaboration: Collaboration) -> None:
    for identifier in wanted:
        organization = call.registry.organizations.get(identifier)
        assert organization is not None
        node = call.registry.node_of(organization, collaboration)
        # A node that is offline or keeps its configuration to itself is not asked.
        if node is None or not node.config:
            continue
        if label not in {value for key, value in node.config if key == "database_labels"}:
            raise Refusal(
                400,
                f"The database label '{label}' does not exist for organization {identifier}.",
            )


# -- runs and results ----------------------------------------------------------------------------------


def _runs(call: Call) -> list[Run]:
    resource = "result" if call.generation == 3 else "run"
    found = _runs_by_place(call, resource)
    if call.arg("port") is not None:
        raise ServerFlaw
    found = _runs_by_time(call, found)
    found = _runs_by_state(call, found)
    if call.generation > 3 and (wanted := call.arg("collaboration_id")) is not None:
        if not call.caller.for_collaboration(resource, "view", wanted):
            denied(f"You lack the permission to view runs for collaboration id={wanted}!")
        found = [r for r in found if str(r.task.collaboration.id) == wanted]
    return _runs_in_sight(call, resource, found)


def _runs_by_place(call: Call, resource: str) -> list[Run]:
    caller, registry = call.caller, call.registry
    strict = call.generation > 3
    found: list[Run] = list(registry.runs)
    if (wanted := call.arg("organization_id")) is not None:
        if strict and not caller.for_organization(resource, "view", wanted):
            denied(f"You lack the permission to view runs for organization id={wanted}!")
        found = [r for r in found if str(r.organization.id) == wanted]
    if (wanted := call.arg("task_id")) is not None:
        task = registry.tasks.get(wanted)
        if strict:
            if task is None:
                raise Refusal(400, f"Task id={wanted} does not exist!")
            own = task.init_user is caller.user and caller.may(resource, "view", "own")
            if not own and not caller.for_both(resource, "view", task.init_org, task.collaboration):
                denied(f"You lack the permission to view runs for task id={wanted}!")
        found = [r for r in found if r.task is task]
    if wanted := call.arg("node_id"):
        node = registry.nodes.get(wanted)
        if strict and node is None:
            raise Refusal(400, f"Node id={wanted} does not exist!")
        if strict and not caller.for_collaboration(resource, "view", node.collaboration):  # type: ignore[union-attr]  # checked above
            denied(f"You lack the permission to view runs for node id={wanted}!")
        found = [
            r
            for r in found
            if node is not None and r.organization is node.organization and r.task.collaboration is node.collaboration
        ]
    return found


def _runs_by_time(call: Call, found: list[Run]) -> list[Run]:
    for name in ("assigned", "started", "finished"):
        if (till := call.arg(f"{name}_till")) is not None:
            found = [r for r in found if _before(getattr(r, f"{name}_at"), till)]
        # Whatever it says, this compares with the time of assignment.
        if (since := call.arg(f"{name}_from")) is not None:
            found = [r for r in found if r.assigned_at.isoformat(" ") >= since]
    return found


def _runs_by_state(call: Call, found: list[Run]) -> list[Run]:
    is_open, state = call.registry.is_open, call.arg("state")
    if state == "open" and call.generation < 5:
        return [r for r in found if r.finished_at is None]
    if state == "open":
        # v5 asks whether the task has an unfinished run that waits for nothing.
        opened = {r.task.id for r in found if is_open(r)}
        return [r for r in found if r.task.id in opened]
    if call.generation == 5 and state == "waiting":
        return [r for r in found if r.finished_at is None and not is_open(r)]
    if call.generation == 5 and state == "finished":
        return [r for r in found if r.finished_at is not None]
    return found


def _runs_in_sight(call: Call, resource: str, found: list[Run]) -> list[Run]:
    caller = call.caller
    if caller.may(resource, "view", "glo"):
        return found
    if caller.may(resource, "view", "col") or call.generation == 3:
        mine = call.registry.collaborations_of(caller.organization)
        return [r for r in found if r.task.collaboration in mine]
    if caller.may(resource, "view", "org"):
        return [r for r in found if r.organization is caller.organization]
    if not caller.may(resource, "view", "own"):
        denied()
    return [r for r in found if r.task.init_user is caller.user]


def _before(moment: datetime | None, till: str) -> bool:
    return moment is not None and moment.isoformat(" ") <= till


@routes.add("GET", "/run", ANYONE, (4, 5))
@routes.add("GET", "/result", ANYONE, (3,))
def list_runs(call: Call) -> Answer:
    write = call.view.run_with_task if call.includes("task") else call.view.run
    return call.page(_runs(call), write, name="Run", columns=Run, newest_first=True)


@routes.add("GET", "/result", ANYONE, (4, 5))
def list_results(call: Call) -> Answer:
    return call.page(_runs(call), call.view.result, name="Run", columns=Run, newest_first=True)


def _run(call: Call) -> Run:
    word = "Result" if call.generation == 3 else "Run"
    record = call.registry.runs.get(call.id)
    if record is None:
        raise Refusal(404, f"{word} id={call.id} not found!")
    caller, task = call.caller, record.task
    resource = "result" if call.generation == 3 else "run"
    own = task.init_user is caller.user and caller.may(resource, "view", "own")
    if not own and not caller.for_both(resource, "view", task.init_org, task.collaboration):
        denied()
    return record


@routes.add("GET", "/run/{id:int}", ANYONE, (4, 5))
@routes.add("GET", "/result/{id:int}", ANYONE, (3,))
def get_run(call: Call) -> Answer:
    write = call.view.run_with_task if call.arg("include") == "task" else call.view.run
    return write(_run(call))


@routes.add("GET", "/result/{id:int}", ANYONE, (4, 5))
def get_result(call: Call) -> Answer:
    return call.view.result(_run(call))


@routes.add("PATCH", "/run/{id:int}", NODE, (4, 5))
@routes.add("PATCH", "/result/{id:int}", NODE, (3,))
def change_run(call: Call) -> Answer:
    registry = call.registry
    word = "Result" if call.generation == 3 else "Run"
    record = registry.runs.get(call.id)
    if record is None:
        raise Refusal(404, f"{word} id={call.id} not found!")
    data = call.body(call.server.schemas["run"], partial=True)
    thing = "result" if call.generation == 3 else "algorithm run"
    if record.organization is not call.caller.organization:
        denied(f"This is not your {thing} to PATCH!")
    if record.finished_at is not None:
        if call.generation == 5 and record.status == "killed by user":
            if set(data) != {"log"}:
                raise Refusal(400, "Only the log can be updated for a killed run!")
            record.log = data["log"]
            return call.view.run(record)
        raise Refusal(400, f"Cannot update an already finished {thing}!")
    record.started_at = _moment(data.get("started_at")) or record.started_at
    # What is not in the body is emptied, not kept.
    record.finished_at = _moment(data.get("finished_at"))
    record.result = data.get("result")
    record.log = data.get("log")
    record.status = data.get("status", record.status)
    if record.failed and call.server.switches.failures_stay_open:
        record.finished_at = None
    if record.failed and call.generation > 3:
        registry.fail_siblings(record)
        if call.generation == 5:
            registry.fail_dependents(record)
    call.server.run_changed(record)
    return call.view.run(record)


def _moment(value: str | datetime | None) -> datetime | None:
    if value is None:
        return None
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


# -- kill ----------------------------------------------------------------------------------------------


@routes.add("POST", "/kill/task", USER)
def kill_task(call: Call) -> Answer:
    registry, caller = call.registry, call.caller
    identifier = call.body(call.server.schemas["id"]).get("id")
    record = registry.tasks.get(identifier)
    if record is None:
        raise Refusal(404, f"Task id={identifier} not found")
    if registry.task_finished(record):
        raise Refusal(
            400,
            f"Task {identifier} already finished with status '{registry.task_status(record)}', so cannot kill it!",
        )
    send, scope = ("create", "org") if call.generation == 3 else ("send", "col")
    if not caller.may("event", send, "glo") and not (
        caller.may("event", send, scope) and caller.organization in record.collaboration.organizations
    ):
        denied()
    registry.kill(record)
    return {"msg": f"Nodes have been instructed to kill any containers running for task {identifier}."}


@routes.add("POST", "/kill/node/tasks", USER)
def kill_node_tasks(call: Call) -> Answer:
    registry, caller = call.registry, call.caller
    identifier = call.body(call.server.schemas["id"]).get("id")
    node = registry.nodes.get(identifier)
    if node is None:
        raise Refusal(404, f"Node id={identifier} not found")
    if node.status != "online":
        raise Refusal(400, f"Node {identifier} is not online so cannot kill its tasks!")
    if call.generation == 4:
        # It asks for a permission that the tables do not have.
        raise ServerFlaw
    send = "create" if call.generation == 3 else "send"
    if not caller.may("event", send, "glo", "col") and not (
        caller.may("event", send, "org") and caller.organization is node.organization
    ):
        denied()
    registry.emit("kill_containers", {"node_id": node.id, "collaboration_id": node.collaboration.id})
    return {"msg": f"Node {node.id} has been instructed to kill all containers running on it."}


# -- blobs ---------------------------------------------------------------------------------------------


@routes.add("GET", "/blobstream/status", ANYONE, (4, 5))
def get_blob_status(call: Call) -> Answer:
    return {"blob_store_enabled": call.server.blobs is not None}


@routes.add("GET", "/blobstream/{name}", ANYONE, (4, 5))
def get_blob(call: Call) -> Answer:
    name = call.request.path_params["name"]
    found = [r for r in call.registry.runs if name in (r.input, r.result)]
    if not found:
        raise Refusal(404, f"No run found with input or result id={name}")
    task = found[0].task
    if not call.caller.for_both("run", "view", task.init_org, task.collaboration):
        denied()
    if call.server.blobs is None:
        raise Refusal(501, _NO_BLOBS)
    path = call.server.blobs / name
    if not path.is_file():
        raise Refusal(500, "Error streaming result!")
    return FileResponse(path, media_type="application/octet-stream", filename=f"result_{name}.bin")


@routes.add("POST", "/blobstream", ANYONE, (4, 5))
def upload_blob(call: Call) -> Answer:
    if call.server.blobs is None:
        raise Refusal(501, _NO_BLOBS)
    caller = call.caller
    if caller.user is not None and not caller.may("task", "create", "col", "glo"):
        denied(
            "You do not have permission to upload blobs. This requires permission to create tasks which you don't have."
        )
    if caller.claims is not None:
        parent = call.registry.tasks.get(caller.claims["task_id"])
        if parent is None or call.registry.task_finished(parent):
            raise Refusal(403, "Cannot upload blob for a sub-task of a completed task.")
    name = str(uuid.uuid4())
    (call.server.blobs / name).write_bytes(call.content)
    return {"uuid": name}, 201


# -- columns -------------------------------------------------------------------------------------------


@routes.add("POST", "/column", USER, (4,))
def get_columns(call: Call) -> Answer:
    data = call.body(call.server.schemas["column"])
    collaboration = call.registry.collaborations.get(data["collaboration_id"])
    if collaboration is None:
        raise Refusal(404, f"Collaboration id={data['collaboration_id']} not found!")
    key = f"columns_{data['db_label']}"
    wanted = {entry["id"] for entry in data["organizations"]}
    for node in call.registry.nodes.where(collaboration=collaboration):
        columns = [value for name, value in node.config if name == key]
        if node.organization.id in wanted and columns:
            return {"columns": columns}
    # The real server then makes a task of it, in an image that the sandbox does not have.
    raise ServerFlaw


# -- tokens of containers ------------------------------------------------------------------------------


@routes.add("POST", "/token/container", NODE)
def create_container_token(call: Call) -> Answer:
    registry = call.registry
    data = call.body(call.server.schemas["container login"])
    node = call.caller.node
    assert node is not None
    task = registry.tasks.get(data.get("task_id"))
    five = call.generation == 5
    if task is None:
        word = "Master" if call.generation == 3 else "Parent"
        raise Refusal(400, f"{word} task does not exist!")
    runs = registry.runs_of(task)
    if five and runs[-1].action != "central_compute":
        denied("Task is not a central compute task")
    if not five and data.get("image") != task.image:
        denied("Image and task do no match")
    if node.collaboration is not task.collaboration:
        denied("You are not within the collaboration")
    if five and task.collaboration.session_restrict_to_same_image and data["image"] != task.image:
        denied(
            "This collaboration only allows a single image per session. You cannot create a task "
            "with a different image."
        )
    if registry.task_finished(task):
        raise Refusal(400, "Task is already finished!")
    claims: dict[str, Any] = {
        "vantage6_client_type" if five else "client_type": "container",
        "node_id": node.id,
        "organization_id": node.organization.id,
        "collaboration_id": node.collaboration.id,
        "task_id": task.id,
        "image": data["image"],
    }
    if call.generation == 3:
        claims["database"] = task.databases[0]["label"] if task.databases else ""
    else:
        claims["study_id"] = task.study.id if task.study else None
        claims["store_id"] = task.store.id if task.store else None
        claims["databases"] = _claimed_databases(task) if five else task.databases
    if five:
        assert task.session is not None
        claims["session_id"] = task.session.id
    return {"container_token": call.server.container_token(claims)}


def _claimed_databases(task: Task) -> list[list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for entry in task.databases:
        written = {key: entry.get(key) for key in ("label", "type", "dataframe_id")}
        groups.setdefault(entry["position"], []).append(written)
    return [groups[position] for position in sorted(groups)]
