"""Routes about who there is: users, organizations, roles, rules."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from marshmallow import ValidationError

from prefect_biomed.sandbox.vantage6._bodies import DEFAULT_ROLES, check_password
from prefect_biomed.sandbox.vantage6._http import ANYONE, USER, Answer, Call, Routes
from prefect_biomed.sandbox.vantage6._records import Organization, R, Role, Rule, Table, User
from prefect_biomed.sandbox.vantage6._refusals import Refusal, ServerFlaw, denied

routes = Routes()


# -- organizations -----------------------------------------------------------------------------------


@routes.add("GET", "/organization", ANYONE)
def list_organizations(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    found = call.like(registry.organizations, "name")
    if (country := call.arg("country")) is not None:
        found = [o for o in found if o.country == country]
    if (wanted := call.integer("collaboration_id")) is not None:
        if not caller.for_collaboration("organization", "view", wanted):
            denied("You lack the permission to get all organizations in your collaboration!")
        collaboration = registry.collaborations.get(wanted)
        found = [o for o in found if collaboration and o in collaboration.organizations]
    if (wanted := call.integer("study_id")) is not None:
        study = registry.studies.get(wanted)
        assert study is not None, "the real server does not check either"
        if not caller.for_collaboration("organization", "view", study.collaboration):
            denied("You lack the permission to get all organizations in a study!")
        found = [o for o in found if o in study.organizations]
    if ids := call.request.query_params.getlist("ids"):
        found = [o for o in found if str(o.id) in ids]
    if not caller.may("organization", "view", "glo"):
        if caller.may("organization", "view", "col"):
            partners = [o for c in registry.collaborations_of(caller.organization) for o in c.organizations]
            found = [o for o in found if o in partners or o is caller.organization]
        elif caller.may("organization", "view", "org"):
            found = [o for o in found if o is caller.organization]
        else:
            denied()
    return call.page(found, call.view.organization, name="Organization", columns=Organization)


@routes.add("POST", "/organization", USER)
def create_organization(call: Call) -> Answer:
    if not call.caller.may("organization", "create", "glo"):
        denied("You lack the permissions to do that!")
    data = call.body(call.server.schemas["organization"])
    name = data.get("name")
    if call.registry.organizations.where(name=name):
        raise Refusal(400, f"Organization with name '{name}' already exists!")
    record = Organization(
        name=name,
        address1=data.get("address1", ""),
        address2=data.get("address2", "" if call.generation == 5 else None),
        zipcode=data.get("zipcode", ""),
        country=data.get("country", ""),
        domain=data.get("domain", ""),
        public_key=_key(data.get("public_key", "")),
    )
    return call.view.organization(call.registry.organizations.add(record)), 201


def _key(value: str) -> str:
    # What is no base64 breaks the real server; it stores the bytes and writes them anew.
    try:
        return base64.b64encode(base64.b64decode(value)).decode()
    except binascii.Error as error:
        raise ValueError("public_key is no base64") from error


@routes.add("GET", "/organization/{id:int}", ANYONE)
def get_organization(call: Call) -> Answer:
    record = call.registry.organizations.get(call.id)
    if record is None:
        raise Refusal(404, f"Organization id={call.id} not found!")
    caller = call.caller
    if not caller.for_organization("organization", "view", record):
        denied("You do not have permission to do that!")
    return call.view.organization(record)


@routes.add("PATCH", "/organization/{id:int}", ("user", "node"))
def change_organization(call: Call) -> Answer:
    data = call.body(call.server.schemas["organization"], partial=True)
    record = call.registry.organizations.get(call.id)
    if record is None:
        raise Refusal(404, f"Organization with id={call.id} not found")
    if not call.caller.for_organization("organization", "edit", record):
        denied()
    name = data.get("name")
    if name:
        if name != record.name and call.registry.organizations.where(name=name):
            raise Refusal(400, f"Organization with name '{name}' already exists!")
        record.name = name
    if data.get("public_key") is not None:
        if call.caller.organization is not record and call.generation > 3:
            denied("Only members of an organization can update its public key!")
        record.public_key = _key(data["public_key"])
    for field in ("address1", "address2", "zipcode", "country", "domain"):
        if data.get(field) is not None:
            setattr(record, field, data[field])
    return call.view.organization(record)


@routes.add("DELETE", "/organization/{id:int}", USER, (4, 5))
def delete_organization(call: Call) -> Answer:
    registry = call.registry
    if not call.caller.may("organization", "delete", "glo"):
        denied()
    record = registry.organizations.get(call.id)
    if record is None:
        raise Refusal(404, f"Organization with id={call.id} not found")
    if call.caller.organization is record:
        raise Refusal(400, "You cannot delete your own organization!")
    runs = registry.runs.where(organization=record)
    tasks = registry.tasks.where(init_org=record)
    nodes = registry.nodes.where(organization=record)
    users = registry.users.where(organization=record)
    roles = registry.roles.where(organization=record)
    if (runs or tasks or nodes or users or roles) and not call.arg("delete_dependents"):
        raise Refusal(
            400,
            f"Organization has dependents: {len(runs)} runs, {len(tasks)} tasks, {len(nodes)} "
            f"nodes, {len(users)} users, and {len(roles)} roles. Please specify "
            "'delete_dependents=true' to delete them.",
        )
    for run in runs:
        registry.runs.remove(run)
    for task in tasks:
        registry.delete_task(task)
    for node in nodes:
        registry.nodes.remove(node)
    for user in users:
        registry.users.remove(user)
    for role in roles:
        registry.roles.remove(role)
    for group in (*registry.studies, *registry.collaborations):
        if record in group.organizations:
            group.organizations.remove(record)
    registry.organizations.remove(record)
    return {"msg": f"Organization id={call.id} was removed from the database"}


# -- users -------------------------------------------------------------------------------------------


@routes.add("GET", "/user", USER)
def list_users(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    names = ["username"] if call.generation == 5 else ["username", "firstname", "lastname", "email"]
    found: list[User] = call.like(registry.users, *names)
    if (wanted := call.arg("organization_id")) is not None:
        if not caller.for_organization("user", "view", wanted):
            denied(f"You lack the permission view users from the organization with id {wanted}!")
        found = [u for u in found if str(u.organization.id) == wanted]
    if (wanted := call.arg("role_id")) is not None:
        role = registry.roles.get(wanted)
        if role is None:
            raise Refusal(400, f"Role with id={wanted} does not exist!")
        # In v5 the question itself fails for a role of no organization.
        if not caller.for_organization("user", "view", role.organization) and role.organization:
            denied(
                "You lack the permission view users from the organization that role with "
                f"id={role.organization.id} belongs to!"
            )
        found = [u for u in found if role in u.roles]
    if (wanted := call.arg("rule_id")) is not None:
        rule = registry.rules.get(wanted)
        if rule is None:
            raise Refusal(400, f"Rule with id={wanted} does not exist!")
        found = [u for u in found if rule in u.rules]
    if (wanted := call.arg("collaboration_id")) is not None:
        if not caller.for_collaboration("user", "view", wanted):
            denied(f"You lack the permission view all users from collaboration {wanted}!")
        collaboration = registry.collaborations.get(wanted)
        members = collaboration.organizations if collaboration else []
        found = [u for u in found if u.organization in members]
    found = seen(call, found)
    if not caller.may("user", "view", "glo"):
        if caller.may("user", "view", "col"):
            found = [u for u in found if u.organization in caller.organizations]
        elif caller.may("user", "view", "org"):
            found = [u for u in found if u.organization is caller.organization]
        elif caller.user is None or call.arg("username") != caller.user.username:
            denied()
    return call.page(found, call.view.user, name="User", columns=User)


def seen(call: Call, found: list[Any]) -> list[Any]:
    """Keep the users or nodes that were seen when the query parameters say."""
    if (till := call.arg("last_seen_till")) is not None:
        found = [m for m in found if m.last_seen and m.last_seen.isoformat() <= till]
    if (since := call.arg("last_seen_from")) is not None:
        found = [m for m in found if m.last_seen and m.last_seen.isoformat() >= since]
    return found


@routes.add("GET", "/user/me", USER, (5,))
def get_own_user(call: Call) -> Answer:
    assert call.caller.user is not None
    return _write(call, call.caller.user)


@routes.add("GET", "/user/{id:int}", USER)
def get_user(call: Call) -> Answer:
    record = call.registry.users.get(call.id)
    if record is None:
        raise Refusal(404, f"user id={call.id} is not found")
    if record is not call.caller.user and not call.caller.for_organization("user", "view", record.organization):
        denied()
    return _write(call, record)


def _write(call: Call, record: User) -> dict[str, Any]:
    if call.arg("include_permissions") and call.generation > 3:
        return call.view.user_with_permissions(record)
    return call.view.user(record)


@routes.add("POST", "/user", USER, tells="inside")
def create_user(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    data = call.body(call.server.schemas["user"])
    if registry.users.where(username=data["username"]):
        raise Refusal(400, "username already exists.")
    if call.generation < 5 and registry.users.where(email=data["email"]):
        raise Refusal(400, "email already exists.")
    service = call.generation == 5 and data["is_service_account"]
    if call.generation == 5 and bool(data.get("password")) == service:
        missing = "Password is required if the user has to be created in Keycloak"
        raise ServerFlaw("Password should not be provided if the user is a service account" if service else missing)
    organization = caller.organization
    if data.get("organization_id"):
        wanted = registry.organizations.get(data["organization_id"])
        if wanted is None and caller.may("user", "create", "glo"):
            raise Refusal(404, "Organization does not exist.")
        if wanted is None:
            denied()
        organization = wanted
    if not caller.for_organization("user", "create", organization):
        denied()
    roles = [role for i in data.get("roles") or [] if (role := registry.roles.get(i))]
    rules = [rule for i in data.get("rules") or [] if (rule := registry.rules.get(i))]
    _own_rules(call, [*rules, *(rule for role in roles for rule in role.rules)])
    for role in roles:
        if role.organization and role.organization is not organization:
            denied("You can't assign that role as the role belongs to a different organization than the user.")
    if call.generation == 3:
        try:
            check_password(data["password"])
        except ValidationError as error:
            raise Refusal(400, str(error.messages[0])) from error
    record = User(
        organization=organization,
        username=data["username"],
        firstname=data.get("firstname"),
        lastname=data.get("lastname"),
        email=data.get("email"),
        roles=roles,
        rules=rules,
        password=data.get("password", ""),
    )
    extra: dict[str, Any] = {}
    if call.generation == 5:
        record.is_service_account = service
        realm = call.server.realm
        if service:
            account = realm.add_client(f"{record.username}-user-client", "user")
            record.keycloak_id, record.keycloak_client_id = account.subject, account.id
            extra["client_secret"] = account.secret
        else:
            record.keycloak_id = realm.add_user(record.username, record.password, temporary=True).subject
    registry.users.add(record)
    return {**call.view.user(record), **extra}, 201


def _own_rules(call: Call, rules: list[Rule]) -> None:
    if (missing := call.caller.first_missing(rules)) is not None:
        scope, operation = missing.scope.lower(), missing.operation.lower()
        if call.generation == 3:
            scope, operation = f"Scope.{missing.scope}", f"Operation.{missing.operation}"
        denied(f"You don't have the rule ({missing.name}, {scope}, {operation})")


@routes.add("PATCH", "/user/{id:int}", USER, tells="inside")
def change_user(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    record = registry.users.get(call.id)
    if record is None:
        raise Refusal(404, f"user id={call.id} not found")
    schema = call.server.schemas["user edit" if call.generation == 5 else "user"]
    data = call.body(schema, partial=True)
    if data.get("password"):
        raise Refusal(400, "You cannot change your password here!")
    own = call.generation < 5 and record is caller.user and caller.may("user", "edit", "own")
    if not own and not caller.for_organization("user", "edit", record.organization):
        denied()
    if (name := data.get("username")) is not None and name != record.username:
        if registry.users.where(username=name):
            raise Refusal(400, "User with that username already exists")
        if record is not caller.user:
            raise Refusal(400, "You cannot change the username of another user")
        record.username = name
    if (email := data.get("email")) is not None and email != record.email:
        if registry.users.where(email=email):
            raise Refusal(400, "User with that email already exists.")
        record.email = email
    for field in ("firstname", "lastname"):
        if data.get(field) is not None:
            setattr(record, field, data[field])
    _change_permissions(call, record, data)
    return call.view.user(record)


def _change_permissions(call: Call, record: User, data: dict[str, Any]) -> None:
    if "roles" in data:
        roles = [_found(call.registry.roles, "Role", identifier) for identifier in data["roles"]]
        if record is call.caller.user:
            denied("You can't changes your own roles!")
        _own_rules(call, [rule for role in (*roles, *record.roles) for rule in role.rules])
        record.roles = roles
    if "rules" in data:
        rules = [_found(call.registry.rules, "Rule", identifier) for identifier in data["rules"]]
        if record is call.caller.user:
            denied("You can't changes your own rules!")
        _own_rules(call, [*rules, *record.rules])
        record.rules = rules


def _found(table: Table[R], what: str, identifier: int) -> R:
    record = table.get(identifier)
    if record is None:
        raise Refusal(404, f"{what}={identifier} can not be found!")
    return record


@routes.add("DELETE", "/user/{id:int}", USER)
def delete_user(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    record = registry.users.get(call.id)
    if record is None:
        raise Refusal(404, f"user id={call.id} not found")
    own = record is caller.user and caller.may("user", "delete", "own")
    if not own and not caller.for_organization("user", "delete", record.organization):
        denied()
    tasks = registry.tasks.where(init_user=record)
    if tasks and not wants_dependents(call):
        raise Refusal(
            400,
            f"User has created {len(tasks)} tasks. Please delete those first, or set the "
            "`delete_dependents` parameter to true to delete them automatically together with "
            "this user.",
        )
    for task in tasks:
        registry.delete_task(task)
    registry.users.remove(record)
    if call.generation == 5:
        call.server.realm.remove(record.keycloak_id)
    return {"msg": f"user id={call.id} is removed from the database"}


def wants_dependents(call: Call) -> bool:
    """Return whether to delete dependents; only v5 reads false as false, and only here."""
    value = call.arg("delete_dependents")
    if call.generation == 5 and value is not None:
        return value.lower() in {"t", "true", "1", "y", "yes", "on"}
    return bool(value)


# -- roles and rules -----------------------------------------------------------------------------------


@routes.add("GET", "/role", USER, tells="inside")
def list_roles(call: Call) -> Answer:
    caller, registry = call.caller, call.registry
    assert caller.user is not None
    found: list[Role] = call.like(registry.roles, "name", "description")
    root = bool(call.arg("include_root"))
    if ids := call.request.query_params.getlist("organization_id"):
        for identifier in ids:
            if not caller.for_organization("role", "view", identifier):
                denied(f"You lack the permission to view roles from organization {identifier}!")
        found = [r for r in found if (str(r.organization.id) in ids if r.organization else root)]
    if (wanted := call.arg("collaboration_id")) is not None:
        if not caller.for_collaboration("role", "view", wanted):
            denied(f"You lack the permission to view roles from collaboration {wanted}!")
        collaboration = registry.collaborations.get(wanted)
        members = collaboration.organizations if collaboration else []
        found = [r for r in found if (r.organization in members if r.organization else root)]
    if (wanted := call.arg("rule_id")) is not None:
        rule = registry.rules.get(wanted)
        if rule is None:
            raise Refusal(404, f"Rule with id={wanted} not found.")
        found = [r for r in found if rule in r.rules]
    if (wanted := call.arg("user_id")) is not None:
        user = registry.users.get(wanted)
        if user is None:
            raise Refusal(400, f"User with id={wanted} does not exist!")
        if user is not caller.user and not caller.for_organization("role", "view", user.organization):
            denied(f"You lack the permission to view roles from the organization that user id={user.id} belongs to!")
        found = [r for r in found if r in user.roles]
    if not caller.may("role", "view", "glo"):
        visible = []
        if caller.may("role", "view", "col"):
            visible = caller.organizations
        elif caller.may("role", "view", "org"):
            visible = [caller.organization]
        found = [
            r
            for r in found
            if r in caller.user.roles or (visible and (r.organization is None or r.organization in visible))
        ]
    return call.page(found, call.view.role, name="Role", columns=Role)


def _role(call: Call) -> Role:
    record = call.registry.roles.get(call.id)
    if record is None:
        raise Refusal(404, f"Role with id={call.id} not found.")
    return record


def _rules(call: Call, ids: list[int]) -> list[Rule]:
    found = []
    for identifier in ids:
        rule = call.registry.rules.get(identifier)
        if rule is None:
            raise Refusal(404, f"Rule with id {identifier} not found")
        found.append(rule)
    _own_rules(call, found)
    return found


def _role_body(call: Call, *, partial: bool = False) -> dict[str, Any]:
    try:
        return call.body(call.server.schemas["role"], partial=partial)
    except Refusal as refusal:
        # This route alone puts the faults into `msg`.
        if "errors" in refusal.body:
            raise Refusal(400, refusal.body["errors"]) from refusal
        raise


@routes.add("GET", "/role/{id:int}", USER, tells="inside")
def get_role(call: Call) -> Answer:
    record, caller = _role(call), call.caller
    assert caller.user is not None
    default = record.name in DEFAULT_ROLES and caller.may_at_least("role", "view", "org")
    if (
        not caller.for_organization("role", "view", record.organization)
        and not default
        and record not in caller.user.roles
    ):
        denied("You do not have permission to view this role.")
    return call.view.role(record)


@routes.add("POST", "/role", USER, tells="inside")
def create_role(call: Call) -> Answer:
    data = _role_body(call)
    rules = _rules(call, data["rules"])
    identifier = data.get("organization_id", call.caller.organization.id)
    organization = call.registry.organizations.get(identifier)
    if organization is None:
        raise Refusal(404, f'Organization "{identifier}" does not exist!')
    _may_change_roles(call, "create", organization)
    record = Role(
        name=data["name"],
        description=data.get("description"),
        rules=rules,
        organization=organization,
    )
    return call.view.role(call.registry.roles.add(record)), 201


def _may_change_roles(call: Call, operation: str, organization: Organization | None) -> None:
    if not call.caller.for_organization("role", operation, organization):
        identifier = organization.id if organization else None
        denied(f"You lack the permission to {operation} roles for organization {identifier}!")


@routes.add("PATCH", "/role/{id:int}", USER, tells="inside")
def change_role(call: Call) -> Answer:
    data = _role_body(call, partial=True)
    if "organization_id" in data:
        raise Refusal(400, "Cannot change role's organization")
    record = _own_role(call, "edit")
    if "rules" in data:
        record.rules = _rules(call, data["rules"])
    record.name = data.get("name", record.name)
    record.description = data.get("description", record.description)
    return call.view.role(record)


def _own_role(call: Call, operation: str) -> Role:
    record = _role(call)
    if record.is_default_role:
        raise Refusal(
            400,
            f"Role {record.name} is a default role and cannot be edited or deleted.",
        )
    _may_change_roles(call, operation, record.organization)
    return record


@routes.add("DELETE", "/role/{id:int}", USER, tells="inside")
def delete_role(call: Call) -> Answer:
    record = _own_role(call, "delete")
    users = [user for user in call.registry.users if record in user.roles]
    if users and not call.arg("delete_dependents"):
        raise Refusal(400, f"Role {record.name} is assigned to users and cannot be deleted.")
    for user in users:
        user.roles.remove(record)
    call.registry.roles.remove(record)
    return {"msg": "Role removed from the database."}


@routes.add("POST", "/role/{id:int}/rule/{rule:int}", USER, (3, 4))
def add_rule(call: Call) -> Answer:
    record, rule = _role_and_rule(call)
    record.rules.append(rule)
    if call.generation == 3:
        # It forgets to take the list out of what its library made.
        return {}, 201
    return [call.view.rule(each) for each in record.rules], 201


@routes.add("DELETE", "/role/{id:int}/rule/{rule:int}", USER, (3, 4))
def remove_rule(call: Call) -> Answer:
    record, rule = _role_and_rule(call)
    if rule not in record.rules:
        if call.generation == 3:
            raise Refusal(404, f"Rule id={rule.id} not found in Role={record.id}!")
        raise Refusal(404, f"Rule with id={rule.id} is not part of role with id={record.id}")
    if call.generation == 3:
        # Nor does it store what it has done.
        return {}
    record.rules.remove(rule)
    return [call.view.rule(each) for each in record.rules]


def _role_and_rule(call: Call) -> tuple[Role, Rule]:
    record = _role(call)
    (rule,) = _rules(call, [call.request.path_params["rule"]])
    _may_change_roles(call, "edit", record.organization)
    return record, rule


@routes.add("GET", "/rule", USER)
def list_rules(call: Call) -> Answer:
    registry = call.registry
    found: list[Rule] = list(registry.rules)
    for field in ("name", "operation", "scope"):
        if (wanted := call.arg(field)) is not None:
            found = [r for r in found if getattr(r, field).lower() == wanted.lower()]
    if (wanted := call.arg("role_id")) is not None:
        role = registry.roles.get(wanted)
        if role is None:
            raise Refusal(400, f"Role with id={wanted} does not exist!")
        found = [r for r in found if r in role.rules]
    user = None
    if (wanted := call.arg("user_id")) is not None:
        user = registry.users.get(wanted)
        if user is None:
            raise Refusal(400, f"User with id={wanted} does not exist!")
    elif call.generation == 5 and call.arg("current_user"):
        user = call.caller.user
    if user is not None:
        granted = {*user.rules, *(rule for role in user.roles for rule in role.rules)}
        found = [r for r in found if r in granted]
    paginate = call.arg("no_pagination") != "1"
    return call.page(found, call.view.rule, name="Rule", columns=Rule, paginate=paginate)


@routes.add("GET", "/rule/{id:int}", USER)
def get_rule(call: Call) -> Answer:
    record = call.registry.rules.get(call.id)
    if record is None:
        raise Refusal(404, f"Rule id={call.id} not found!")
    return call.view.rule(record)


# -- passwords -----------------------------------------------------------------------------------------


@routes.add("PATCH", "/password/change", USER, (3, 4))
def change_password(call: Call) -> Answer:
    data = call.body(call.server.schemas["change password"])
    user = call.caller.user
    assert user is not None
    old, new = data["current_password"], data["new_password"]
    try:
        call.server.check_login(user.username, old)
    except Refusal:
        if call.generation == 3:
            denied("Your current password is not correct!")
        raise
    if old == new:
        raise Refusal(400, "New password is the same as current password!")
    _set_password(user, new)
    return {"msg": "The password has been changed successfully!"}


def _set_password(user: User, password: str) -> None:
    try:
        check_password(password)
    except ValidationError as error:
        raise Refusal(400, str(error.messages[0])) from error
    user.password = password


@routes.add("POST", "/recover/lost", generations=(3, 4))
def lost_password(call: Call) -> Answer:
    data = call.body(call.server.schemas["lost password"])
    for user in call.registry.users:
        if data.get("username") == user.username or data.get("email") == user.email:
            call.server.mail(user, call.server.reset_token(user))
    return {"msg": "If the username or email is in our database you will soon receive an email."}


@routes.add("POST", "/recover/reset", generations=(3, 4))
def reset_password(call: Call) -> Answer:
    data = call.body(call.server.schemas["reset password"])
    user = call.server.user_of_reset_token(data["reset_token"])
    user.failed_logins = 0
    _set_password(user, data["password"])
    return {"msg": "The password has successfully been reset!"}


@routes.add("POST", "/recover/2fa/lost", generations=(3, 4))
def lost_second_factor(call: Call) -> Answer:
    data = call.body(call.server.schemas["recover second factor"])
    user = call.server.check_login(data["username"], data["password"])
    call.server.mail(user, call.server.reset_token(user))
    return {"msg": "You should have received an email that will allow you to reset your 2FA."}


@routes.add("POST", "/recover/2fa/reset", generations=(3, 4))
def reset_second_factor(call: Call) -> Answer:
    data = call.body(call.server.schemas["reset second factor"])
    return call.server.enrol(call.server.user_of_reset_token(data["reset_token"]))


@routes.add("POST", "/recover/node", USER)
def reset_api_key(call: Call) -> Answer:
    identifier = call.body(call.server.schemas["id"])["id"]
    node = call.registry.nodes.get(identifier)
    if node is None:
        raise Refusal(404, f"Node id={identifier} is not found!")
    if not call.caller.for_organization("node", "edit", node.organization):
        denied()
    node.api_key = call.server.new_api_key(node)
    return {"api_key": node.api_key}
