"""Routes of v5 about sessions and their dataframes."""

from __future__ import annotations

import secrets
from typing import Any

from marshmallow import Schema, ValidationError

from prefect_biomed.sandbox.vantage6._http import NODE, USER, USER_NODE, Answer, Call, Routes
from prefect_biomed.sandbox.vantage6._records import Dataframe, Session, Task
from prefect_biomed.sandbox.vantage6._refusals import Refusal, denied
from prefect_biomed.sandbox.vantage6._work import check_task_5, post_task_5

routes = Routes()
_FIVE = (5,)
_SCOPES = {"own": "own", "organization": "org", "collaboration": "col"}
_FIRST = ("amazed", "bold", "calm", "eager", "gifted", "keen", "quiet", "vivid")
_SECOND = ("bayes", "curie", "euler", "fisher", "gauss", "noether", "pearson", "turing")


def _name(taken: set[str]) -> str:
    while True:
        name = f"{secrets.choice(_FIRST)}_{secrets.choice(_SECOND)}"
        if name not in taken:
            return name
        taken, name = taken | {name}, f"{name}{secrets.randbelow(1000)}"
        if name not in taken:
            return name


def _visible(call: Call, session: Session) -> bool:
    caller = call.caller
    if caller.may("session", "view", "glo"):
        return True
    shared = caller.may("session", "view", "col") or session.scope == "collaboration"
    if shared and session.collaboration in caller.collaborations:
        return True
    ours = caller.may("session", "view", "org") or session.scope == "organization"
    if ours and session.owner.organization is caller.organization:
        return True
    return session.owner is caller.user


def _may(call: Call, operation: str, session: Session) -> bool:
    """Return whether the caller may change or delete a session of this scope."""
    caller = call.caller
    if operation == "delete" and caller.may("session", "delete", "glo"):
        return True
    if caller.may("session", operation, "col") and session.collaboration in caller.collaborations:
        return True
    if (
        caller.may("session", operation, "org")
        and session.owner.organization is caller.organization
        and session.scope in ("own", "organization")
    ):
        return True
    own = session.owner is caller.user and session.scope == "own"
    return own and caller.may("session", operation, "own")


def _session(call: Call, operation: str, identifier: int, message: str) -> Session:
    record = call.registry.sessions.get(identifier)
    if record is None:
        raise Refusal(404, message)
    allowed = _visible(call, record) if operation == "view" else _may(call, operation, record)
    if not allowed:
        denied()
    return record


def _dataframe(call: Call, operation: str) -> Dataframe:
    record = call.registry.dataframes.get(call.id)
    if record is None:
        raise Refusal(404, f"Dataframe with id={call.id} not found")
    allowed = (_visible if operation == "view" else lambda c, s: _may(c, operation, s))(call, record.session)
    if not allowed:
        denied()
    return record


@routes.add("GET", "/session", USER_NODE, _FIVE)
def list_sessions(call: Call) -> Answer:
    found: list[Session] = call.like(call.registry.sessions, "name")
    if (wanted := call.arg("user_id")) is not None:
        found = [s for s in found if str(s.owner.id) == wanted]
    if (wanted := call.arg("collaboration_id")) is not None:
        found = [s for s in found if str(s.collaboration.id) == wanted]
    if (wanted := call.arg("scope")) is not None:
        found = [s for s in found if s.scope == wanted.lower()]
    found = [s for s in found if _visible(call, s)]
    return call.page(found, call.view.session, name="Session", columns=Session)


@routes.add("POST", "/session", USER, _FIVE)
def create_session(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    data = call.body(call.server.schemas["session"])
    scope = data["scope"]
    if not caller.may_at_least("session", "create", _SCOPES[scope]):
        denied(f"You lack the permission to create a session for the {scope.upper()} scope!")
    collaboration = registry.collaborations.get(data["collaboration_id"])
    if collaboration is None:
        raise Refusal(404, "Collaboration not found")
    if collaboration not in caller.collaborations:
        denied("You lack the permission to create a session for this collaboration!")
    taken = {s.name for s in registry.sessions.where(collaboration=collaboration)}
    name = data.get("name")
    if name is None:
        name = _name(taken)
    if name in taken:
        raise Refusal(400, "Session with that name already exists within the collaboration!")
    study = None
    if data.get("study_id"):
        study = registry.studies.get(data["study_id"])
        if study is None:
            raise Refusal(404, "Study not found")
        if study.collaboration is not collaboration:
            raise Refusal(400, "Study is not part of the collaboration!")
    assert caller.user is not None
    record = Session(
        name=name,
        owner=caller.user,
        collaboration=collaboration,
        scope=scope,
        study=study,
        created_at=registry.started_at,
        last_used_at=registry.started_at,
    )
    return call.view.session(registry.sessions.add(record)), 201


@routes.add("GET", "/session/{id:int}", USER_NODE, _FIVE)
def get_session(call: Call) -> Answer:
    return call.view.session(_session(call, "view", call.id, f"Session id={call.id} not found!"))


@routes.add("PATCH", "/session/{id:int}", USER, _FIVE)
def change_session(call: Call) -> Answer:
    data = call.body(call.server.schemas["session"], partial=True)
    record = _session(call, "edit", call.id, f"Session with id={call.id} not found")
    name = data.get("name") or record.name
    taken = call.registry.sessions.where(name=name, collaboration=record.collaboration)
    if name != record.name and taken:
        raise Refusal(400, "Session with that name already exists within the collaboration!")
    record.name = name
    if scope := data.get("scope"):
        if not call.caller.may_at_least("session", "edit", _SCOPES[scope]):
            denied(f"You lack the permission to change the scope of the session to {scope.upper()}!")
        record.scope = scope
    return call.view.session(record)


@routes.add("DELETE", "/session/{id:int}", USER, _FIVE)
def delete_session(call: Call) -> Answer:
    registry = call.registry
    record = _session(call, "delete", call.id, f"Session with id={call.id} not found")
    frames = registry.dataframes.where(session=record)
    tasks = registry.tasks.where(session=record)
    if (frames or tasks) and not call.arg("delete_dependents"):
        raise Refusal(
            400,
            "This session contains tasks and dataframes. Please delete them first or set "
            "`delete_dependents` to `true` to delete them together with the session.",
        )
    registry.delete_session(record)
    return {"msg": f"Successfully deleted session id={call.id}"}


@routes.add("GET", "/session/{id:int}/dataframe", USER_NODE, _FIVE)
def list_dataframes(call: Call) -> Answer:
    session = _session(call, "view", call.id, f"Session with id={call.id} not found")
    found = call.registry.dataframes.where(session=session)
    paginate = call.arg("no_pagination") != "1"
    return call.page(found, call.view.dataframe, name="Dataframe", columns=Dataframe, paginate=paginate)


@routes.add("POST", "/session/{id:int}/dataframe", USER, _FIVE, tells="always")
def create_dataframe(call: Call) -> Answer:
    registry = call.registry
    session = _session(call, "edit", call.id, f"Session with id={call.id} not found")
    data = call.body(call.server.schemas["dataframe"])
    step = data["task"]
    if session.collaboration.session_restrict_to_same_image and not session.image:
        session.image = step["image"]
    taken = {frame.name for frame in registry.dataframes}
    name = data.get("name")
    if name in taken:
        raise Refusal(
            400,
            f"Dataframe with name {name} already exists. Duplicate names are not allowed because "
            "they are stored on nodes by that name.",
        )
    label = data["label"]
    frame = registry.dataframes.add(Dataframe(name=name or _name(taken), session=session, db_label=label))
    description = (
        f"Data extraction step for session {session.name} ({session.id}).This session is in the "
        f"{session.collaboration.name} collaboration. Data extraction is done on the {label} "
        f"database, and the dataframe name will be {frame.name}."
    )
    try:
        frame.last_session_task = _step(
            call,
            frame,
            step,
            "data_extraction",
            description,
            databases=[[{"label": label, "type": "source"}]],
            depends_on=[],
        )
    except Exception:
        registry.dataframes.remove(frame)
        raise
    return call.view.dataframe(frame), 201


def _step(
    call: Call,
    frame: Dataframe,
    step: dict[str, Any],
    action: str,
    description: str,
    databases: list[list[dict[str, Any]]],
    depends_on: list[Task],
) -> Task:
    session = frame.session
    body: dict[str, Any] = {
        "collaboration_id": session.collaboration.id,
        "session_id": session.id,
        "name": f"Session initialization ({session.name})",
        "description": description,
        "image": step["image"],
        "method": step["method"],
        "organizations": step["organizations"],
        "databases": databases,
        "depends_on_ids": [task.id for task in depends_on],
        "dataframe_id": frame.id,
    }
    if session.study is not None:
        body["study_id"] = session.study.id
    if step.get("store_id") is not None:
        body["store_id"] = step["store_id"]
    data = check_task_5(call, body)
    written = post_task_5(call, data, check_permission=False, action=action)
    task = call.registry.tasks.get(written["id"])
    assert task is not None
    return task


@routes.add("GET", "/session/dataframe/{id:int}", USER, _FIVE)
def get_dataframe(call: Call) -> Answer:
    return call.view.dataframe(_dataframe(call, "view"))


@routes.add("DELETE", "/session/dataframe/{id:int}", USER, _FIVE)
def delete_dataframe(call: Call) -> Answer:
    record = _dataframe(call, "edit")
    session = record.session
    call.registry.emit(
        "delete_dataframe",
        {
            "df_name": record.name,
            "session_id": session.id,
            "collaboration_id": session.collaboration.id,
        },
    )
    call.registry.dataframes.remove(record)
    for task in call.registry.tasks.where(dataframe=record):
        task.dataframe = None
    return {"msg": f"Successfully deleted dataframe {record.name} from session {session.id}"}


@routes.add("POST", "/session/dataframe/{id:int}/preprocess", USER, _FIVE, tells="always")
def preprocess_dataframe(call: Call) -> Answer:
    record = _dataframe(call, "edit")
    data = call.body(call.server.schemas["preprocessing"])
    session, last = record.session, record.last_session_task
    if last is None:
        raise Refusal(
            500,
            f"Dataframe {record.name} (id={record.id}) in session={session.name} has no last task! "
            "Session is not properly initialized!",
        )
    description = (
        f"Preprocessing step for session {session.name} ({session.id}).This session is in the "
        f"{session.collaboration.name} collaboration. This preprocessing step will modify "
        f"dataframe {record.id} "
    )
    record.last_session_task = _step(
        call,
        record,
        data["task"],
        "preprocessing",
        description,
        databases=[[{"dataframe_id": record.id, "type": "dataframe"}]],
        depends_on=[last],
    )
    return call.view.dataframe(record), 201


@routes.add("POST", "/session/dataframe/{id:int}/column", NODE, _FIVE, tells="always")
def report_columns(call: Call) -> Answer:
    schema: Schema = call.server.schemas["dataframe column"]
    try:
        columns = schema.load(call.json(), many=True)
    except ValidationError as error:
        raise Refusal(400, "Request body is incorrect", errors=error.messages) from error
    record = call.registry.dataframes.get(call.id)
    if record is None:
        raise Refusal(404, f"Dataframe with id={call.id} not found")
    node = call.caller.node
    assert node is not None
    if record.session.collaboration is not node.collaboration:
        denied()
    kept = [entry for entry in record.columns if entry[0] is not node]
    record.columns = [*kept, *((node, c["name"], c["dtype"]) for c in columns)]
    return {"msg": "Columns updated"}, 201
