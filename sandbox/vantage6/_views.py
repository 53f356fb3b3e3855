"""How records are written, in the dialect of each generation."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from json import dumps
from typing import Any

from prefect_biomed.sandbox.vantage6._records import (
    AlgorithmStore,
    Collaboration,
    Dataframe,
    Node,
    Organization,
    Record,
    Registry,
    Role,
    Rule,
    Run,
    Session,
    Study,
    Task,
    User,
)

Json = dict[str, Any]
_METHODS_3 = {"organization": ["GET", "PATCH"], "rule": ["GET"]}
_METHODS = {"task": ["GET", "DELETE"], "run": ["GET", "PATCH"], "result": ["GET", "PATCH"]}


class View:
    """Writes records as JSON.

    Args:
        registry: the tables, for what belongs to a record.
        prefix: API path that links begin with.
    """

    def __init__(self, registry: Registry, prefix: str) -> None:
        self._registry = registry
        self._generation = registry.generation
        self._prefix = prefix

    # -- links -------------------------------------------------------------------------------------

    def _one(self, resource: str, record: Record | None) -> Json | None:
        if record is None:
            return None
        methods = _METHODS.get(resource, ["GET", "DELETE", "PATCH"])
        if self._generation == 3 and resource in _METHODS_3:
            methods = _METHODS_3[resource]
        return {"id": record.id, "link": f"{self._prefix}/{resource}/{record.id}", "methods": methods}

    def _many(
        self, resource: str, by: str, record: Record, records: Iterable[Record] = ()
    ) -> str | list[Json | None] | None:
        """Link to a filtered list; v3 writes out the list, or null when there is nothing."""
        if self._generation > 3:
            return f"{self._prefix}/{resource}?{by}={record.id}"
        return [self._one(resource, each) for each in records] or None

    def _time(self, moment: datetime | None) -> str | None:
        # v3 says that its times are UTC, whatever the clock of the server shows.
        offset = "+00:00" if self._generation == 3 else ""
        return f"{moment.isoformat()}{offset}" if moment else None

    # -- people ------------------------------------------------------------------------------------

    def organization(self, record: Organization) -> Json:
        """Write an organization."""
        registry = self._registry
        links: Json = {
            "collaborations": self._many(
                "collaboration", "organization_id", record, registry.collaborations_of(record)
            ),
            "nodes": self._many("node", "organization_id", record, registry.nodes.where(organization=record)),
            "users": self._many("user", "organization_id", record, registry.users.where(organization=record)),
        }
        if self._generation == 3:
            runs = registry.runs.where(organization=record)
            links["results"] = self._many("result", "", record, runs)
            links["roles"] = [role.id for role in registry.roles.where(organization=record)]
        else:
            links["tasks"] = self._many("task", "init_org_id", record)
            links["runs"] = self._many("run", "organization_id", record)
            links["studies"] = self._many("study", "organization_id", record)
        return {
            **links,
            "public_key": record.public_key,
            "id": record.id,
            "name": record.name,
            "domain": record.domain,
            "address1": record.address1,
            "address2": record.address2,
            "zipcode": record.zipcode,
            "country": record.country,
        }

    def user(self, record: User) -> Json:
        """Write a user; v4 shows the second-factor secret of everybody."""
        common: Json = {
            "roles": self._many("role", "user_id", record, record.roles),
            "rules": self._many("rule", "user_id", record, record.rules),
            "organization": self._one("organization", record.organization),
            "id": record.id,
            "type": "user",
            "last_seen": self._time(record.last_seen),
            "status": record.status,
            "username": record.username,
        }
        if self._generation == 5:
            return {
                **common,
                "keycloak_id": record.keycloak_id,
                "keycloak_client_id": record.keycloak_client_id,
                "is_service_account": record.is_service_account,
            }
        extra: Json = {
            "ip": record.ip,
            "firstname": record.firstname,
            "lastname": record.lastname,
            "email": record.email,
            "otp_secret": record.otp_secret,
        }
        if self._generation == 3:
            tasks = self._registry.tasks.where(init_user=record)
            return {**common, **extra, "created_tasks": [task.id for task in tasks]}
        return {
            **common,
            **extra,
            "last_email_failed_login_sent": None,
            "last_email_recover_password_sent": None,
        }

    def user_with_permissions(self, record: User) -> Json:
        """Write a user with the ids of what it may do."""
        rules = {rule.id for rule in record.rules} | {rule.id for role in record.roles for rule in role.rules}
        partners = {
            organization.id
            for collaboration in self._registry.collaborations_of(record.organization)
            for organization in collaboration.organizations
        }
        permissions = {
            "roles": [role.id for role in record.roles],
            "rules": sorted(rules),
            "orgs_in_collabs": sorted(partners),
        }
        return {**self.user(record), "permissions": permissions}

    def role(self, record: Role) -> Json:
        """Write a role."""
        users = [user for user in self._registry.users if record in user.roles]
        written = {
            "rules": self._many("rule", "role_id", record, record.rules),
            "users": self._many("user", "role_id", record, users),
            "organization": self._one("organization", record.organization),
            "id": record.id,
            "name": record.name,
            "description": record.description,
        }
        if self._generation > 3:
            written["is_default_role"] = record.is_default_role
        return written

    def rule(self, record: Rule) -> Json:
        """Write a rule."""
        users = [user for user in self._registry.users if record in user.rules]
        five = self._generation == 5
        return {
            "scope": record.scope.lower() if five else record.scope,
            "operation": record.operation.lower() if five else record.operation,
            "users": self._many("user", "rule_id", record, users),
            "id": record.id,
            "name": record.name,
            "description": record.description,
        }

    # -- places ------------------------------------------------------------------------------------

    def collaboration(self, record: Collaboration) -> Json:
        """Write a collaboration."""
        registry = self._registry
        written: Json = {
            "organizations": self._many("organization", "collaboration_id", record, record.organizations),
            "nodes": self._many("node", "collaboration_id", record, registry.nodes.where(collaboration=record)),
            "tasks": self._many("task", "collaboration_id", record, registry.tasks.where(collaboration=record)),
            "id": record.id,
            "name": record.name,
            "encrypted": record.encrypted,
        }
        if self._generation > 3:
            written["algorithm_stores"] = self._many("algorithmstore", "collaboration_id", record)
            written["studies"] = self._many("study", "collaboration_id", record)
        if self._generation == 5:
            written["session_restrict_to_same_image"] = record.session_restrict_to_same_image
        return written

    def collaboration_with_organizations(self, record: Collaboration) -> Json:
        """Write a collaboration with its organizations in full."""
        organizations = [self.organization(each) for each in record.organizations]
        return {**self.collaboration(record), "organizations": organizations}

    def study(self, record: Study) -> Json:
        """Write a study."""
        return {
            "collaboration": self._one("collaboration", record.collaboration),
            "organizations": self._many("organization", "study_id", record),
            "tasks": self._many("task", "study_id", record),
            "id": record.id,
            "name": record.name,
        }

    def study_with_organizations(self, record: Study) -> Json:
        """Write a study with its organizations in full."""
        organizations = [self.organization(each) for each in record.organizations]
        return {**self.study(record), "organizations": organizations}

    def store(self, record: AlgorithmStore) -> Json:
        """Write an algorithm store."""
        collaborations = None
        if record.collaboration is not None:
            collaborations = self._many("collaboration", "algorithm_store_id", record)
        written = {
            "collaborations": collaborations,
            "id": record.id,
            "name": record.name,
            "url": record.url,
        }
        if self._generation == 5:
            written["api_path"] = record.api_path
        return written

    def node(self, record: Node) -> Json:
        """Write a node without its key."""
        written: Json = {
            "organization": self._one("organization", record.organization),
            "collaboration": self._one("collaboration", record.collaboration),
            "config": [{"key": key, "value": value} for key, value in record.config],
            "id": record.id,
            "type": "node",
            "last_seen": self._time(record.last_seen),
            "status": record.status,
            "name": record.name,
        }
        return {**written, **self._node_account(record)}

    def _node_account(self, record: Node) -> Json:
        if self._generation == 5:
            return {
                "keycloak_id": record.keycloak_id,
                "keycloak_client_id": record.keycloak_client_id,
            }
        return {"ip": record.ip}

    def _node_of_run(self, run: Run) -> Json | None:
        node = self._registry.node_of(run.organization, run.task.collaboration)
        if node is None:
            return {}
        short: Json = {"id": node.id, "status": node.status, "name": node.name}
        if self._generation == 3:
            short["config"] = []
        return {**short, **self._node_account(node)}

    # -- work --------------------------------------------------------------------------------------

    def task(self, record: Task) -> Json:
        """Write a task."""
        if self._generation == 3:
            return self._task_3(record)
        registry = self._registry
        written: Json = {
            "status": registry.task_status(record),
            "finished_at": self._time(registry.task_finished_at(record)),
            "collaboration": self._one("collaboration", record.collaboration),
            "runs": self._many("run", "task_id", record),
            "results": self._many("result", "task_id", record),
            "parent": self._one("task", record.parent),
            "children": self._many("task", "parent_id", record),
            "init_org": self._one("organization", record.init_org),
            "init_user": self._one("user", record.init_user),
            "databases": self._databases(record),
            "study": self._one("study", record.study),
            "algorithm_store": self._one("algorithmstore", record.store),
            "id": record.id,
            "name": record.name,
            "description": record.description,
            "image": record.image,
            "job_id": record.job_id,
            "created_at": self._time(record.created_at),
        }
        if self._generation == 5:
            runs = registry.runs_of(record)
            written |= {
                "action": runs[-1].action if runs else None,
                "depends_on": [earlier.id for earlier in record.depends_on],
                "required_by": [later.id for later in registry.dependents_of(record)],
                "session": self._one("session", record.session),
                "dataframe": self._dataframe_of_task(record),
                "method": record.method,
            }
        return written

    @staticmethod
    def _dataframe_of_task(record: Task) -> Json | None:
        if record.dataframe is None:
            return None
        frame = record.dataframe
        return {"name": frame.name, "db_label": frame.db_label, "id": frame.id}

    def _databases(self, record: Task) -> list[Json]:
        if self._generation == 5:
            return [
                {
                    "label": entry.get("label"),
                    "type": entry["type"],
                    "dataframe_id": entry.get("dataframe_id"),
                    "dataframe_name": self._dataframe_name(entry.get("dataframe_id")),
                    "position": entry["position"],
                }
                for entry in record.databases
            ]
        return [
            {
                "label": entry["label"],
                "parameters": dumps(
                    {key: value for key, value in entry.items() if key != "label"},
                    separators=(",", ":"),
                ),
            }
            for entry in record.databases
        ]

    def _dataframe_name(self, identifier: int | None) -> str | None:
        frame = self._registry.dataframes.get(identifier)
        return frame.name if frame else None

    def _task_3(self, record: Task) -> Json:
        registry = self._registry
        runs = registry.runs_of(record)
        return {
            "status": registry.task_status(record),
            "complete": all(run.finished_at for run in runs),
            "finished_at": self._time(registry.task_finished_at(record)),
            "collaboration": self._one("collaboration", record.collaboration),
            "results": self._many("result", "", record, runs),
            "parent": self._one("task", record.parent),
            "children": self._many("task", "", record, registry.children_of(record)),
            "initiator": record.init_org.id,
            "init_user": record.init_user.id if record.init_user else None,
            "database": record.databases[0]["label"] if record.databases else "",
            "id": record.id,
            "name": record.name,
            "description": record.description,
            "image": record.image,
            "run_id": record.job_id,
            "created_at": self._time(record.created_at),
        }

    def task_including(self, record: Task, *, runs: bool, results: bool) -> Json:
        """Write a task with its runs and results in full, as `include` asks."""
        written = self.task(record)
        own = self._registry.runs_of(record)
        if self._generation == 3:
            if results:
                written["results"] = [{k: v for k, v in self.run_in_task_3(run).items() if k != "task"} for run in own]
            return written
        if runs:
            written["runs"] = [self.run(run) for run in own]
        if results:
            written["results"] = [self.result(run) for run in own]
        return written

    def run(self, record: Run) -> Json:
        """Write a run, without its output except in v3, which has no other record of it."""
        written: Json = {
            "organization": self._one("organization", record.organization),
            "task": self._one("task", record.task),
            "node": self._node_of_run(record),
            "id": record.id,
            "assigned_at": self._time(record.assigned_at),
            "started_at": self._time(record.started_at),
            "finished_at": self._time(record.finished_at),
            "status": record.status,
            "log": record.log,
        }
        if self._generation == 3:
            return {**written, "ports": [], "input": record.input, "result": record.result}
        written["results"] = self._one("result", record)
        written["cleanup_at"] = self._time(record.cleanup_at)
        written["blob_storage_used"] = record.blob_storage_used
        if self._generation == 5:
            return {**written, "arguments": record.input, "action": record.action}
        return {**written, "ports": [], "input": record.input}

    def run_in_task_3(self, record: Run) -> Json:
        """Write a result of v3 as it appears below its task."""
        return {**self.run(record), "task": record.task.id, "organization": record.organization.id}

    def run_with_task(self, record: Run) -> Json:
        """Write a run with its task in full."""
        task = self.task(record.task)
        task.pop("results" if self._generation == 3 else "runs")
        return {**self.run(record), "task": task}

    def result(self, record: Run) -> Json:
        """Write what a run put out."""
        written: Json = {
            "run": self._one("run", record),
            "task": self._one("task", record.task),
            "id": record.id,
            "result": record.result,
            "cleanup_at": self._time(record.cleanup_at),
            "blob_storage_used": record.blob_storage_used,
        }
        if self._generation == 5:
            written["action"] = record.action
        return written

    # -- sessions ----------------------------------------------------------------------------------

    def session(self, record: Session) -> Json:
        """Write a session."""
        frames = self._registry.dataframes.where(session=record)
        return {
            "owner": self._one("user", record.owner),
            "collaboration": self._one("collaboration", record.collaboration),
            "tasks": self._many("task", "session_id", record),
            "study": self._one("study", record.study),
            "scope": record.scope,
            "dataframes": f"{self._prefix}/session/{record.id}/dataframe",
            "ready": any(self._registry.dataframe_ready(frame) for frame in frames),
            "name": record.name,
            "created_at": self._time(record.created_at),
            "last_used_at": self._time(record.last_used_at),
            "image": record.image,
            "id": record.id,
        }

    def dataframe(self, record: Dataframe) -> Json:
        """Write a dataframe with its columns and its last step."""
        last = record.last_session_task
        return {
            "session": self._one("session", record.session),
            "tasks": self._many("task", "dataframe_id", record),
            "last_session_task": self.task(last) if last else None,
            "columns": [{"node_id": node.id, "name": name, "dtype": dtype} for node, name, dtype in record.columns],
            "ready": self._registry.dataframe_ready(record),
            "organizations_ready": self._registry.organizations_ready(record),
            "name": record.name,
            "db_label": record.db_label,
            "id": record.id,
        }
