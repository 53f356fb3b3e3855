"""Routes about where work is done: collaborations, studies, nodes, algorithm stores."""

from __future__ import annotations

from typing import Any

from prefect_biomed.sandbox.vantage6._http import ANYONE, USER, USER_NODE, Answer, Call, Routes
from prefect_biomed.sandbox.vantage6._people import seen, wants_dependents
from prefect_biomed.sandbox.vantage6._records import (
    AlgorithmStore,
    Collaboration,
    Node,
    Organization,
    Study,
)
from prefect_biomed.sandbox.vantage6._refusals import Refusal, denied

routes = Routes()


def _organizations(call: Call, ids: list[int]) -> list[Organization]:
    return [o for i in ids if (o := call.registry.organizations.get(i))]


# -- collaborations ------------------------------------------------------------------------------------


@routes.add("GET", "/collaboration", ("user", "node"))
def list_collaborations(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    found: list[Collaboration] = call.like(registry.collaborations, "name")
    if (encrypted := call.arg("encrypted")) is not None:
        # SQLite compares with the text, and only 0 and 1 are what it has stored.
        found = [c for c in found if str(int(c.encrypted)) == encrypted]
    if (wanted := call.arg("organization_id")) is not None:
        if not caller.may("collaboration", "view", "glo"):
            if wanted != str(caller.organization.id):
                denied("You lack the permission to request collaborations for this organization!")
        else:
            found = [c for c in found if wanted in {str(o.id) for o in c.organizations}]
    if (wanted := call.arg("algorithm_store_id")) is not None:
        store = registry.stores.get(wanted)
        if store is None:
            raise Refusal(404, f"Algorithm store with id={wanted} not found")
        if store.collaboration is not None:
            found = [c for c in found if registry.stores.where(collaboration=c)]
    if not caller.may("collaboration", "view", "glo"):
        if not caller.may("collaboration", "view", "org"):
            denied()
        found = [c for c in found if caller.organization in c.organizations]
    return call.page(found, _writer(call), name="Collaboration", columns=Collaboration)


def _writer(call: Call) -> Any:
    if call.includes("organizations") and call.generation > 3:
        return call.view.collaboration_with_organizations
    return call.view.collaboration


@routes.add("GET", "/collaboration/{id:int}", ANYONE)
def get_collaboration(call: Call) -> Answer:
    record = call.registry.collaborations.get(call.id)
    if record is None:
        words = "Collaboration with" if call.generation == 5 else "collaboration having"
        raise Refusal(404, f"{words} id={call.id} not found")
    caller = call.caller
    if not caller.may("collaboration", "view", "glo") and not (
        caller.may("collaboration", "view", "org") and caller.organization in record.organizations
    ):
        denied()
    return _writer(call)(record)


@routes.add("POST", "/collaboration", USER)
def create_collaboration(call: Call) -> Answer:
    data = call.body(call.server.schemas["collaboration"])
    name = data["name"]
    if call.registry.collaborations.where(name=name):
        raise Refusal(400, f"Collaboration name '{name}' already exists!")
    if not call.caller.may("collaboration", "create", "glo"):
        denied()
    record = Collaboration(
        name=name,
        # The check allows more words for true than the server then understands.
        encrypted=data["encrypted"] == 1,
        organizations=_organizations(call, data["organization_ids"]),
        session_restrict_to_same_image=bool(data.get("session_restrict_to_same_image")),
    )
    return call.view.collaboration(call.registry.collaborations.add(record))


def _editable(call: Call, operation: str = "edit") -> Collaboration:
    record = call.registry.collaborations.get(call.id)
    if record is None:
        raise Refusal(404, f"collaboration having collaboration_id={call.id} can not be found")
    if not call.caller.for_collaboration("collaboration", operation, record):
        denied()
    return record


@routes.add("PATCH", "/collaboration/{id:int}", USER)
def change_collaboration(call: Call) -> Answer:
    record = _editable(call)
    data = call.body(call.server.schemas["collaboration"], partial=True)
    name = data.get("name", record.name)
    if name != record.name and call.registry.collaborations.where(name=name):
        raise Refusal(400, f"Collaboration name '{name}' already exists!")
    record.name = name
    if "organization_ids" in data:
        if not call.caller.may("collaboration", "edit", "glo"):
            denied("You lack the permission to change the organizations of a collaboration!")
        record.organizations = _organizations(call, data["organization_ids"])
    record.encrypted = bool(data.get("encrypted", record.encrypted))
    return call.view.collaboration(record)


@routes.add("DELETE", "/collaboration/{id:int}", USER)
def delete_collaboration(call: Call) -> Answer:
    registry = call.registry
    record = registry.collaborations.get(call.id)
    if record is None:
        raise Refusal(404, f"collaboration id={call.id} is not found")
    if not call.caller.for_collaboration("collaboration", "delete", record):
        denied()
    tasks = registry.tasks.where(collaboration=record)
    nodes = registry.nodes.where(collaboration=record)
    studies = registry.studies.where(collaboration=record)
    sessions = registry.sessions.where(collaboration=record)
    dependents = tasks or nodes or studies or sessions
    if dependents and not call.arg("delete_dependents") and call.generation > 3:
        more = f", {len(sessions)} sessions, and" if call.generation == 5 else " and"
        raise Refusal(
            400,
            f"Collaboration id={call.id} has {len(tasks)} tasks, {len(nodes)} nodes{more} "
            f"{len(studies)} studies. Please delete them separately or set delete_dependents=True",
        )
    for task in tasks:
        registry.delete_task(task)
    for node in nodes:
        registry.nodes.remove(node)
    for study in studies:
        registry.studies.remove(study)
    for session in sessions:
        registry.delete_session(session)
    registry.collaborations.remove(record)
    return {"msg": f"Collaboration id={call.id} successfully deleted"}


@routes.add("GET", "/collaboration/{id:int}/organization", USER_NODE, (3,))
def list_members(call: Call) -> Answer:
    record = call.registry.collaborations.get(call.id)
    if record is None:
        raise Refusal(404, f"collaboration having collaboration_id={call.id} can not be found")
    return [call.view.organization(each) for each in record.organizations]


@routes.add("POST", "/collaboration/{id:int}/organization", USER)
def add_member(call: Call) -> Answer:
    record = _editable(call)
    data = call.body(call.server.schemas["id"])
    organization = call.registry.organizations.get(data["id"])
    if organization is None:
        raise Refusal(404, f"organization with id={call.id} is not found")
    if organization not in record.organizations:
        record.organizations.append(organization)
    return [call.view.organization(each) for each in record.organizations]


@routes.add("DELETE", "/collaboration/{id:int}/organization", USER)
def remove_member(call: Call) -> Answer:
    data = call.body(call.server.schemas["id"])
    record = _editable(call)
    organization = call.registry.organizations.get(data["id"])
    if organization is None:
        raise Refusal(404, f"Organization with id={data['id']} is not found")
    record.organizations.remove(organization)
    return [call.view.organization(each) for each in record.organizations]


@routes.add("POST", "/collaboration/{id:int}/node", USER)
def add_node_to_collaboration(call: Call) -> Answer:
    record = _editable(call)
    data = call.body(call.server.schemas["id"])
    node = call.registry.nodes.get(data["id"])
    if node is None:
        raise Refusal(404, f"node id={data['id']} not found")
    if node.collaboration is record:
        raise Refusal(400, f"node id={data['id']} is already in collaboration id={call.id}")
    if node.organization not in record.organizations:
        raise Refusal(
            400,
            f"Node id={data['id']} belongs to an organization that is not part of collaboration "
            f"id={call.id}. Please add the organization to the collaboration first",
        )
    node.collaboration = record
    return [call.view.node(n) for n in call.registry.nodes.where(collaboration=record)], 201


@routes.add("DELETE", "/collaboration/{id:int}/node", USER)
def remove_node_from_collaboration(call: Call) -> Answer:
    record = _editable(call)
    identifier = call.body(call.server.schemas["id"])["id"]
    node = call.registry.nodes.get(identifier)
    if node is None:
        raise Refusal(404, f"node id={call.id} not found")
    if node.collaboration is not record:
        raise Refusal(400, f"node id={identifier} is not part of collaboration id={call.id}")
    call.registry.nodes.remove(node)
    return {"msg": f"node id={identifier} removed from collaboration id={call.id}"}


# -- studies -------------------------------------------------------------------------------------------


def _may_study(call: Call, operation: str, record: Study) -> bool:
    caller = call.caller
    if caller.may("study", operation, "glo"):
        return True
    if caller.may("study", operation, "col") and record.collaboration in caller.collaborations:
        return True
    return caller.may("study", operation, "org") and caller.organization in record.organizations


@routes.add("GET", "/study", ("user", "node"), (4, 5))
def list_studies(call: Call) -> Answer:
    caller = call.caller
    found: list[Study] = call.like(call.registry.studies, "name")
    if (wanted := call.arg("organization_id")) is not None:
        if caller.may("study", "view", "glo", "col"):
            found = [s for s in found if wanted in {str(o.id) for o in s.organizations}]
        elif wanted != str(caller.organization.id) or not caller.may("study", "view", "org"):
            denied("You lack the permission to request studies for this organization!")
    if (identifier := call.integer("collaboration_id")) is not None:
        mine = identifier in {c.id for c in caller.collaborations}
        if not caller.may("study", "view", "glo") and not mine:
            denied("You lack the permission to request studies for this collaboration!")
        found = [s for s in found if s.collaboration.id == identifier]
    if not caller.may("study", "view", "glo", "col", "org"):
        denied()
    found = [s for s in found if _may_study(call, "view", s)]
    return call.page(found, _study_writer(call), name="Study", columns=Study)


def _study_writer(call: Call) -> Any:
    included = call.includes("organizations")
    return call.view.study_with_organizations if included else call.view.study


def _study(call: Call, operation: str, message: str) -> Study:
    record = call.registry.studies.get(call.id)
    if record is None:
        raise Refusal(404, message)
    if not _may_study(call, operation, record):
        denied()
    return record


@routes.add("GET", "/study/{id:int}", ANYONE, (4, 5))
def get_study(call: Call) -> Answer:
    return _study_writer(call)(_study(call, "view", f"Study with id={call.id} not found"))


@routes.add("POST", "/study", USER, (4, 5))
def create_study(call: Call) -> Answer:
    data = call.body(call.server.schemas["study"])
    if call.registry.studies.where(name=data["name"]):
        raise Refusal(400, f"Study with name '{data['name']}' already exists!")
    if not call.caller.for_collaboration("study", "create", data["collaboration_id"]):
        denied()
    collaboration = call.registry.collaborations.get(data["collaboration_id"])
    assert collaboration is not None, "the real server does not check either"
    record = Study(
        name=data["name"],
        collaboration=collaboration,
        organizations=_members(call, collaboration, data["organization_ids"]),
    )
    return call.view.study_with_organizations(call.registry.studies.add(record)), 201


def _members(call: Call, collaboration: Collaboration, ids: list[int]) -> list[Organization]:
    if not {o.id for o in collaboration.organizations}.issuperset(ids):
        raise Refusal(400, "Not all organizations are part of the collaboration!")
    return _organizations(call, ids)


@routes.add("PATCH", "/study/{id:int}", USER, (4, 5))
def change_study(call: Call) -> Answer:
    record = _study(call, "edit", f"Study with id={call.id} can not be found")
    data = call.body(call.server.schemas["study"], partial=True)
    name = data.get("name", record.name)
    if name != record.name and call.registry.studies.where(name=name):
        raise Refusal(400, f"Study name '{name}' already exists!")
    record.name = name
    if "organization_ids" in data:
        record.organizations = _members(call, record.collaboration, data["organization_ids"])
    return call.view.study_with_organizations(record)


@routes.add("DELETE", "/study/{id:int}", USER, (4, 5))
def delete_study(call: Call) -> Answer:
    record = _study(call, "delete", f"Study with id={call.id} not found")
    tasks = call.registry.tasks.where(study=record)
    if tasks and not call.arg("delete_dependents"):
        raise Refusal(
            400,
            f"Study id={call.id} has {len(tasks)} tasks. Please delete them separately or set delete_dependents=True",
        )
    for task in tasks:
        call.registry.delete_task(task)
    call.registry.studies.remove(record)
    return {"msg": f"Study id={call.id} successfully deleted"}


@routes.add("POST", "/study/{id:int}/organization", USER, (4, 5))
def add_to_study(call: Call) -> Answer:
    record = _study(call, "edit", f"Study with id={call.id} can not be found")
    data = call.body(call.server.schemas["id"])
    organization = call.registry.organizations.get(data["id"])
    if organization is None:
        raise Refusal(404, f"organization with id={call.id} is not found")
    if organization not in record.collaboration.organizations:
        raise Refusal(400, "Organization is not a member of the collaboration!")
    if organization not in record.organizations:
        record.organizations.append(organization)
    return [call.view.organization(each) for each in record.organizations]


@routes.add("DELETE", "/study/{id:int}/organization", USER, (4, 5))
def remove_from_study(call: Call) -> Answer:
    record = _study(call, "edit", f"Study with id={call.id} can not be found")
    data = call.body(call.server.schemas["id"])
    organization = call.registry.organizations.get(data["id"])
    if organization is None:
        raise Refusal(404, f"Organization with id={data['id']} is not found")
    record.organizations.remove(organization)
    return [call.view.organization(each) for each in record.organizations]


# -- nodes ---------------------------------------------------------------------------------------------


@routes.add("GET", "/node", USER_NODE)
def list_nodes(call: Call) -> Answer:
    caller = call.caller
    found = _nodes_asked_for(call)
    if not caller.may("node", "view", "glo"):
        if caller.may("node", "view", "col"):
            found = [n for n in found if n.collaboration in caller.collaborations]
        elif caller.may("node", "view", "org"):
            found = [n for n in found if n.organization is caller.organization]
        else:
            denied()
    return call.page(found, call.view.node, name="Node", columns=Node)


def _whose_nodes(call: Call) -> tuple[int | None, int | None]:
    """Return the ids of the collaboration and the study that are asked for, also by way of a session (v5)."""
    collaboration, study = call.integer("collaboration_id"), call.integer("study_id")
    if call.generation < 5 or (wanted := call.arg("session_id")) is None:
        return collaboration, study
    session = call.registry.sessions.get(wanted)
    if session is None:
        raise Refusal(404, f"Session id={wanted} does not exist")
    if session.study is not None:
        return collaboration, study or session.study.id
    return collaboration or session.collaboration.id, study


def _nodes_asked_for(call: Call) -> list[Node]:
    caller = call.caller
    found: list[Node] = call.like(call.registry.nodes, "name")
    collaboration, study_id = _whose_nodes(call)
    if (wanted := call.arg("organization_id")) is not None:
        if not caller.for_organization("node", "view", wanted):
            denied(f"You lack the permission view nodes from the organization with id {wanted}!")
        found = [n for n in found if str(n.organization.id) == wanted]
    if collaboration is not None:
        if not caller.for_collaboration("node", "view", collaboration):
            denied(f"You lack the permission view nodes from the collaboration with id {collaboration}!")
        found = [n for n in found if n.collaboration.id == collaboration]
    if study_id is not None:
        study = call.registry.studies.get(study_id)
        assert study is not None, "the real server does not check either"
        if not caller.for_collaboration("node", "view", study.collaboration):
            denied(
                f"You lack the permission view nodes from collaboration {study.collaboration.id} "
                f"contains the study with id {study_id}!"
            )
        found = [n for n in found if n.organization in study.organizations and n.collaboration is study.collaboration]
    for field in ("status",) if call.generation == 5 else ("status", "ip"):
        if (wanted := call.arg(field)) is not None:
            found = [n for n in found if getattr(n, field) == wanted]
    return seen(call, found)


@routes.add("GET", "/node/me", ("node",), (5,))
def get_own_node(call: Call) -> Answer:
    assert call.caller.node is not None
    return call.view.node(call.caller.node)


@routes.add("GET", "/node/{id:int}", USER_NODE)
def get_node(call: Call) -> Answer:
    record = call.registry.nodes.get(call.id)
    if record is None:
        raise Refusal(404, f"Node id={call.id} is not found!")
    if not call.caller.for_organization("node", "view", record.organization):
        denied()
    return call.view.node(record)


@routes.add("POST", "/node", USER, tells="inside")
def create_node(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    data = call.body(call.server.schemas["node"])
    collaboration = registry.collaborations.get(data["collaboration_id"])
    if collaboration is None:
        raise Refusal(404, f"collaboration id={data['collaboration_id']} does not exist")
    identifier = data.get("organization_id") or caller.organization.id
    organization = registry.organizations.get(identifier)
    if organization is None:
        raise Refusal(404, f"organization id={identifier} does not exist")
    if not caller.for_organization("node", "create", organization):
        denied()
    if organization not in collaboration.organizations:
        raise Refusal(
            400,
            f"The organization id={organization.id} is not part of collabotation id={collaboration.id}. Add it first!",
        )
    if registry.node_of(organization, collaboration) is not None:
        raise Refusal(
            400,
            f"Organization id={organization.id} already has a node for collaboration id={collaboration.id}",
        )
    plain = f"{organization.name} - {collaboration.name} Node"
    if call.generation == 5:
        plain = f"{organization.name}-{collaboration.name}-node"
    name = data.get("name", plain)
    if call.generation == 5 and " " in name:
        raise Refusal(400, "Node name cannot contain spaces!")
    if registry.nodes.where(name=name):
        raise Refusal(400, f"Node with name '{name}' already exists!")
    record = Node(
        name=name,
        collaboration=collaboration,
        organization=organization,
        status=None if call.generation == 3 else "offline",
    )
    call.server.register_node(record)
    return {**call.view.node(record), "api_key": record.api_key}, 201


@routes.add("PATCH", "/node/{id:int}", USER_NODE)
def change_node(call: Call) -> Answer:
    data = call.body(call.server.schemas["node"], partial=True)
    for field in ("organization_id", "collaboration_id"):
        if field in data:
            subject = field.removesuffix("_id").capitalize()
            raise Refusal(400, f"{subject} id cannot be updated!")
    record = call.registry.nodes.get(call.id)
    if record is None:
        raise Refusal(404, f"Node id={call.id} not found!")
    if not call.caller.for_organization("node", "edit", record.organization):
        denied()
    name = data.get("name", record.name)
    if name != record.name and call.registry.nodes.where(name=name):
        raise Refusal(400, f"Node name '{name}' already exists!")
    record.name = name
    if data.get("ip"):
        record.ip = data["ip"]
    elif data.get("clear_ip"):
        record.ip = None
    return call.view.node(record)


@routes.add("DELETE", "/node/{id:int}", USER, tells="always")
def delete_node(call: Call) -> Answer:
    record = call.registry.nodes.get(call.id)
    if record is None:
        raise Refusal(404, f"Node id={call.id} not found")
    if not call.caller.for_organization("node", "delete", record.organization):
        denied()
    columns = [c for frame in call.registry.dataframes for c in frame.columns if c[0] is record]
    if columns and not wants_dependents(call):
        raise Refusal(
            400,
            f"Node has {len(columns)} columns. Please delete those first, or set the `delete_dependents` parameter to "
            "true to delete them automatically together with this node.",
        )
    for frame in call.registry.dataframes:
        frame.columns = [c for c in frame.columns if c[0] is not record]
    call.server.remove_node(record)
    return {"msg": f"Successfully deleted node id={call.id}"}


# -- algorithm stores ----------------------------------------------------------------------------------


@routes.add("GET", "/algorithmstore", USER, (4, 5))
def list_stores(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    found: list[AlgorithmStore] = call.like(registry.stores, "name", "url")
    if (wanted := call.arg("collaboration_id")) is not None:
        collaboration = registry.collaborations.get(wanted)
        if collaboration is None:
            raise Refusal(404, "Collaboration not found")
        if not caller.may("collaboration", "view", "glo") and not (
            caller.may("collaboration", "view", "org") and caller.organization in collaboration.organizations
        ):
            denied()
        found = [s for s in found if s.collaboration in (None, collaboration)]
    if not caller.may("collaboration", "view", "glo"):
        if not caller.may("collaboration", "view", "org"):
            denied()
        found = [s for s in found if s.collaboration in (None, *caller.collaborations)]
    return call.page(found, call.view.store, name="AlgorithmStore", columns=AlgorithmStore)


@routes.add("POST", "/algorithmstore", USER, (4, 5))
def create_store(call: Call) -> Answer:
    data = call.body(call.server.schemas["store"])
    collaboration = None
    if data.get("collaboration_id"):
        collaboration = call.registry.collaborations.get(data["collaboration_id"])
        if collaboration is None:
            raise Refusal(404, "Collaboration not found")
    if collaboration is None and not call.caller.may("collaboration", "edit", "glo"):
        denied("You lack the permission to add algorithm stores for all collaborations!")
    if not call.caller.for_collaboration("collaboration", "edit", collaboration):
        denied()
    url = data["algorithm_store_url"].rstrip("/")
    if call.generation == 4 and not data.get("force") and _local(url):
        raise Refusal(
            400,
            "Algorithm store url is insecure: localhost services may be run on any computer. "
            "Add it anyway by setting the 'force' flag to true, but only do so for development "
            "servers!",
        )
    if call.registry.stores.where(url=url, collaboration=collaboration):
        raise Refusal(400, "Algorithm store is already registered!")
    if not call.server.knows_store(url):
        raise Refusal(400, "Algorithm store cannot be reached. Make sure that it is online!")
    record = AlgorithmStore(
        name=data["name"],
        url=url,
        api_path=data.get("api_path"),
        collaboration=collaboration,
    )
    return call.view.store(call.registry.stores.add(record)), 201


def _local(url: str) -> bool:
    return any(host in url for host in ("localhost", "127.0.0.1"))


@routes.add("GET", "/algorithmstore/{id:int}", USER_NODE, (4, 5))
def get_store(call: Call) -> Answer:
    record = call.registry.stores.get(call.id)
    if record is None:
        raise Refusal(404, f"Algorithm store id={call.id} not found")
    caller = call.caller
    if not caller.may("collaboration", "view", "glo") and not (
        caller.may("collaboration", "view", "org") and record.collaboration in (None, *caller.collaborations)
    ):
        denied()
    return call.view.store(record)


@routes.add("PATCH", "/algorithmstore/{id:int}", USER, (4, 5))
def change_store(call: Call) -> Answer:
    record = _store(call)
    data = call.body(call.server.schemas["store"], partial=True)
    if "collaboration_id" in data:
        if not call.caller.for_collaboration("collaboration", "edit", data["collaboration_id"]):
            denied()
        record.collaboration = call.registry.collaborations.get(data["collaboration_id"])
    record.name = data.get("name", record.name)
    return call.view.store(record)


@routes.add("DELETE", "/algorithmstore/{id:int}", USER, (4, 5))
def delete_store(call: Call) -> Answer:
    call.registry.stores.remove(_store(call))
    return {"msg": f"Algorithm store id={call.id} successfully deleted"}


def _store(call: Call) -> AlgorithmStore:
    record = call.registry.stores.get(call.id)
    if record is None:
        raise Refusal(404, f"Algorithm store with id={call.id} can not be found")
    if not call.caller.for_collaboration("collaboration", "edit", record.collaboration):
        denied()
    return record
