"""What request bodies must look like, by generation.

The real servers check with marshmallow too, so the texts of ordinary faults are the same without
being written down here. v3 checks nothing.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from prefect_biomed.sandbox.vantage6._records import ACTIONS, RUN_STATES, RUN_STATES_5

_SHORT, _LONG, _NAME = 64, 1024, 128
DEFAULT_ROLES = (
    "Root",
    "container",
    "node",
    "Viewer",
    "Researcher",
    "Organization Admin",
    "Collaboration Admin",
)


def _name(value: str) -> None:
    if not value:
        raise ValidationError("Name cannot be empty")
    if value.isnumeric():
        raise ValidationError("Name cannot a number")
    if len(value) > _NAME:
        raise ValidationError(f"Name cannot be longer than {_NAME} characters")


def _username(value: str) -> None:
    _name(value)
    if not re.match(r"[a-zA-Z][a-zA-Z0-9._-]+$", value):
        raise ValidationError(
            f"Username {value} is invalid. Only letters, numbers, hyphens and underscores are "
            "allowed, and it should start with a letter."
        )


def check_password(value: str) -> None:
    """Refuse a weak password in the words of the server.

    Raises:
        ValidationError: naming the first rule that is broken.
    """
    rules: list[tuple[Callable[[str], object], str]] = [
        (
            lambda v: len(v) >= 8,
            "Password too short: use at least 8 characters with mixed lowercase, uppercase, "
            "numbers and special characters",
        ),
        (lambda v: len(v) <= 128, "Password too long: use at most 128 characters"),
        (lambda v: re.search("[0-9]", v), "Password should contain at least one number"),
        (lambda v: re.search("[A-Z]", v), "Password should contain at least one uppercase letter"),
        (lambda v: re.search("[a-z]", v), "Password should contain at least one lowercase letter"),
        (lambda v: not v.isalnum(), "Password should contain at least one special character"),
    ]
    for kept, message in rules:
        if not kept(value):
            raise ValidationError(message)


def _organization_ids(value: list[int]) -> None:
    if any(identifier <= 0 for identifier in value):
        raise ValidationError("Organization ids must be greater than 0")
    if len(set(value)) != len(value):
        raise ValidationError("Organization ids must be unique")
    if not value:
        raise ValidationError("At least one organization id is required")


def _organizations(value: list[dict[str, Any]]) -> None:
    if not value:
        raise ValidationError("At least one organization is required")
    if any("id" not in organization for organization in value):
        raise ValidationError("Organization id is required for each organization")


def _databases_4(value: list[dict[str, Any]] | None) -> None:
    allowed = {"label", "query", "sheet_name", "preprocessing", "arguments"}
    for database in value or []:
        if "label" not in database:
            raise ValidationError("Database label is required for each database")
        steps = database.get("preprocessing", [])
        if not isinstance(steps, list):
            raise ValidationError("Database preprocessing must be a list of dictionaries")
        for step in steps:
            if "function" not in step:
                raise ValidationError(f"Database preprocessing {step} is missing a 'function'")
        if not isinstance(database.get("arguments", {}), dict):
            raise ValidationError("Database arguments must be a dict")
        if not allowed.issuperset(database):
            raise ValidationError(f"Database {database} contains unknown keys. Allowed keys are {allowed}.")


def _databases_5(value: list[list[dict[str, Any]]] | None) -> None:
    for database in (database for group in value or [] for database in group):
        if "type" not in database:
            raise ValidationError("Each database must have a 'type' key")
        kind = database["type"]
        wanted = "dataframe_id" if kind == "dataframe" else "label"
        if not database.get(wanted):
            raise ValidationError(f"Database of type '{kind}' must have a '{wanted}' key")
        allowed = {"label", "type", "dataframe_id"}
        if not allowed.issuperset(database):
            raise ValidationError(f"Database {database} contains unknown keys. Allowed keys are {allowed}.")


def _uuid(value: str) -> None:
    try:
        uuid.UUID(value)
    except ValueError as error:
        raise ValidationError("API key is not a valid UUID") from error


def _scope(value: str) -> None:
    allowed = {"own", "organization", "collaboration"}
    if value not in allowed:
        raise ValidationError(f"Session scope '{value}' is not valid. Allowed values are: {allowed}.")


def _dataframe_name(value: str) -> None:
    if not re.match(r"[a-zA-Z0-9-_]+$", value):
        raise ValidationError("Dataframe name must contain only letters, numbers, hyphens and underscores")


def _no_default_role(value: str) -> None:
    if value in DEFAULT_ROLES:
        raise ValidationError("Role name cannot be one of the default roles")


def _id(*, required: bool = False, nullable: bool = False) -> fields.Integer:
    return fields.Integer(required=required, allow_none=nullable, validate=validate.Range(min=1))


def _text(limit: int | None = None, *, required: bool = False) -> fields.String:
    return fields.String(required=required, validate=validate.Length(max=limit) if limit else None)


class _Lost(Schema):
    email = fields.Email()
    username = _text(_NAME)

    @validates_schema
    def _either(self, data: dict[str, Any], **_: object) -> None:
        if not {"email", "username"} & set(data):
            raise ValidationError("Email or username is required")


class _CollaborationOrStudy(Schema):
    @validates_schema
    def _either(self, data: dict[str, Any], **_: object) -> None:
        if not {"collaboration_id", "study_id"} & set(data):
            raise ValidationError("Collaboration_id or study_id is required")


def _ids() -> fields.List[Any]:
    return fields.List(_id())


def _session_task() -> fields.Nested:
    return fields.Nested(
        Schema.from_dict(
            {
                "image": _text(required=True),
                "store_id": _id(),
                "method": _text(required=True),
                "organizations": fields.List(fields.Dict(), required=True, validate=_organizations),
            }
        ),
        required=True,
    )


Fields = dict[str, Any]


def schemas(generation: int) -> dict[str, Schema]:
    """Return the schemas of a generation by the name of what the body is about."""
    groups = (_of_login(), _of_people(generation), _of_places(generation), _of_work(generation))
    made = {what: Schema.from_dict(entries)() for group in groups for what, entries in group.items()}
    made["lost password"] = _Lost()
    made["task"] = _CollaborationOrStudy.from_dict(_task(generation))()
    return made


def _of_login() -> dict[str, Fields]:
    login = {
        "username": fields.String(required=True, validate=validate.Length(min=1, max=_NAME)),
        "password": fields.String(required=True, validate=validate.Length(min=1, max=_NAME)),
    }
    return {
        "login": {**login, "mfa_code": _text(10)},
        "recover second factor": login,
        "node login": {"api_key": fields.String(required=True, validate=_uuid)},
        "container login": {
            "task_id": _id(required=True),
            "image": fields.String(required=True, validate=validate.Length(min=1)),
        },
        "change password": {
            "current_password": _text(_NAME, required=True),
            "new_password": fields.String(required=True, validate=check_password),
        },
        "reset password": {
            "reset_token": _text(_LONG, required=True),
            "password": fields.String(required=True, validate=check_password),
        },
        "reset second factor": {"reset_token": _text(_LONG, required=True)},
    }


def _of_people(generation: int) -> dict[str, Fields]:
    four = generation < 5
    user: dict[str, Any] = {
        "username": fields.String(required=True, validate=[validate.Length(min=3, max=_NAME), _username]),
        "password": fields.String(required=four, validate=check_password),
        "organization_id": _id(),
        "roles": _ids(),
        "rules": _ids(),
    }
    if four:
        user |= {
            "email": fields.Email(required=True),
            "firstname": _text(_SHORT),
            "lastname": _text(_SHORT),
        }
    else:
        user["is_service_account"] = fields.Boolean(load_default=False)
    return {
        "user": user,
        "user edit": {"roles": _ids(), "rules": _ids()},
        "role": {
            "name": fields.String(required=True, validate=_no_default_role),
            "description": _text(_LONG),
            "rules": fields.List(_id(), required=True),
            "organization_id": _id(),
        },
    }


def _of_places(generation: int) -> dict[str, Fields]:
    name = {"name": fields.String(required=True, validate=_name)}
    collaboration: dict[str, Any] = {
        **name,
        "organization_ids": fields.List(fields.Integer(), required=True, validate=_organization_ids),
        "encrypted": fields.Boolean(required=True),
    }
    store: dict[str, Any] = {
        "name": _text(required=True),
        "algorithm_store_url": fields.Url(required=True, require_tld=False),
        "collaboration_id": _id(),
    }
    node: dict[str, Any] = {
        "name": fields.String(validate=_name),
        "collaboration_id": _id(required=True),
        "organization_id": _id(),
    }
    if generation < 5:
        store |= {"server_url": fields.Url(require_tld=False), "force": fields.Boolean()}
        node |= {"ip": fields.String(), "clear_ip": fields.Boolean()}
    else:
        store["api_path"] = fields.String(load_default="/api")
        collaboration["session_restrict_to_same_image"] = fields.Boolean(load_default=False)
    return {
        "id": {"id": _id(required=True)},
        "organization": {
            **name,
            **{key: _text(_SHORT) for key in ("address1", "address2", "zipcode", "country")},
            "domain": _text(_SHORT),
            "public_key": fields.String(),
        },
        "collaboration": collaboration,
        "study": {
            **name,
            "collaboration_id": _id(required=True),
            "organization_ids": fields.List(fields.Integer(), required=True, validate=_organization_ids),
        },
        "node": node,
        "store": store,
    }


def _task(generation: int) -> Fields:
    task: dict[str, Any] = {
        "name": fields.String(validate=_name),
        "description": _text(_LONG),
        "image": fields.String(required=True, validate=validate.Length(min=1)),
        "collaboration_id": _id(),
        "study_id": _id(),
        "store_id": _id(),
        "organizations": fields.List(fields.Dict(), required=True, validate=_organizations),
    }
    if generation < 5:
        task |= {
            "server_url": fields.Url(require_tld=False),
            "databases": fields.List(fields.Dict(), allow_none=True, validate=_databases_4),
        }
    else:
        task |= {
            "method": _text(required=True),
            "depends_on_ids": fields.List(_id(), load_default=[]),
            "databases": fields.List(fields.List(fields.Dict()), allow_none=True, validate=_databases_5),
            "session_id": _id(required=True),
            "dataframe_id": _id(),
            "action": fields.String(validate=validate.OneOf(ACTIONS)),
        }
    return task


def _of_work(generation: int) -> dict[str, Fields]:
    return {
        "run": {
            "started_at": fields.DateTime(),
            "finished_at": fields.DateTime(),
            "log": fields.String(),
            "result": fields.String(),
            "status": fields.String(validate=validate.OneOf(RUN_STATES if generation < 5 else RUN_STATES_5)),
        },
        "column": {
            "db_label": _text(required=True),
            "collaboration_id": _id(required=True),
            "organizations": fields.List(fields.Dict(), required=True, validate=_organizations),
            "sheet_name": fields.String(),
            "query": fields.String(),
        },
        "session": {
            "name": fields.String(allow_none=True),
            "collaboration_id": _id(required=True),
            "study_id": _id(nullable=True),
            "scope": fields.String(required=True, validate=_scope),
        },
        "dataframe": {
            "label": _text(required=True),
            "name": fields.String(validate=_dataframe_name),
            "task": _session_task(),
        },
        "preprocessing": {"dataframe_id": _id(required=True), "task": _session_task()},
        "dataframe column": {"name": _text(required=True), "dtype": _text(required=True)},
    }
