"""Rules, default roles, and what a caller may do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prefect_biomed.sandbox.vantage6._records import (
    Collaboration,
    Node,
    Organization,
    Record,
    Registry,
    Role,
    Rule,
    User,
)
from prefect_biomed.sandbox.vantage6._refusals import ServerFlaw

_SCOPES = {"own": "OWN", "org": "ORGANIZATION", "col": "COLLABORATION", "glo": "GLOBAL"}

# In the order in which the servers register them, so that ids agree: resource, then each
# operation with its scopes.
_RULES = {
    3: """
        node          view glo org | edit glo org | create glo org | delete glo org
        collaboration view glo org | edit glo | create glo | delete glo
        organization  view glo org col | edit glo org | create glo
        task          view glo org | create glo org | delete glo org
        result        view glo org
        user          view glo org | create glo org | edit glo org own | delete glo org own
        role          view glo org | create glo org | edit glo org | delete glo org
        port          view glo org
        event         view org col glo | create org col glo
    """,
    4: """
        node          view glo col org | edit glo col org | create glo col org | delete glo col org
        collaboration view glo org | edit glo col | create glo | delete glo col
        organization  view glo org col | edit glo org col | create glo | delete glo
        task          view glo col org own | create glo col | delete glo col org own
        run           view glo col org own
        user          view glo col org | create glo col org | edit glo col org own
        user          delete glo col org own
        role          view glo col org | create glo col org | edit glo col org | delete glo col org
        port          view glo org
        event         receive org col glo | send org col glo
        study         view glo org col | edit glo col org | create glo col | delete glo col org
    """,
}
_RULES[5] = """
        node          view glo col org | edit glo col org | create glo col org | delete glo col org
        collaboration view glo org | edit glo col | create glo | delete glo col
        organization  view glo org col | edit glo org col | create glo | delete glo
        task          view glo col org own | create glo col | delete glo col org own
        run           view glo col org own
        user          view glo col org | create glo col org | edit glo col org
        user          delete glo col org own
        role          view glo col org | create glo col org | edit glo col org | delete glo col org
        event         receive org col glo | send org col glo
        study         view glo org col | edit glo col org | create glo col | delete glo col org
        session       view glo col org | create own org col | edit own org col | delete own org col glo
    """

_VIEWER = {
    3: """user edit own, user delete own, user view org, organization view org col,
          collaboration view org, role view org, node view org, task view org, result view org,
          port view org, event view org""",
    4: """user edit own, user delete own, user view org, organization view org col,
          collaboration view org, role view org, node view org col, task view col, run view col,
          port view org, event receive org col, study view org""",
}
_VIEWER[5] = """user delete own, user view org, organization view org col, collaboration view org,
          role view org, node view org col, task view col, run view col, event receive org col,
          study view org, session view org col"""
_RESEARCHER = {3: "task create org, task delete org", 4: "task create col, task delete org"}
_RESEARCHER[5] = """task create col, task delete org, session create own org, session edit own org,
          session delete own org"""
_ORGANIZATION_ADMIN = {
    3: """user create org, user edit org, user delete org, organization edit org,
          role create org, role edit org, role delete org, node create org, node edit org,
          event create org""",
    4: """user create org, user edit org, user delete org, organization edit org,
          role create org, role edit org, role delete org, node create org, node edit org,
          event send org""",
}
_ORGANIZATION_ADMIN[5] = _ORGANIZATION_ADMIN[4]
_COLLABORATION_ADMIN = {
    3: """user view glo, user create glo, user edit glo, organization view glo,
          organization edit glo, collaboration view glo, collaboration edit glo, role view glo,
          node create glo, node view glo, node delete glo, event view col, event create col""",
    4: """user view col, user create col, user edit col, organization view glo,
          organization edit col, collaboration edit col, role view col, node create col,
          node delete col, event send col, study view col, study create col, study edit col,
          study delete col""",
}
_COLLABORATION_ADMIN[5] = """user view col, user create col, user edit col, organization view glo,
          organization edit col, collaboration edit col, role view col, node create col,
          node delete col, event send col, study view col, study create col, study edit col,
          study delete col, session create col, session edit col, session delete col"""
_CONTAINER = {
    3: """node view org, collaboration view org, organization view org col, task view org,
          result view org, port view org""",
    4: """node view org, collaboration view org, organization view org col, task view col,
          run view col, port view org, study view org""",
}
_CONTAINER[5] = """node view org, collaboration view org, organization view org col, task view col,
          run view col, study view org"""
_NODE = {3: "node edit org, organization edit org", 4: "node edit org, organization edit org"}
_NODE[5] = f"{_NODE[4]}, session view col"


def seed_rules(registry: Registry) -> None:
    """Fill the tables of rules and default roles of a generation."""
    generation = registry.generation
    for line in _RULES[generation].strip().splitlines():
        resource, text = line.split(None, 1)
        for part in text.split("|"):
            operation, *scopes = part.split()
            for scope in scopes:
                registry.rules.add(
                    Rule(
                        name=resource,
                        operation=operation.upper(),
                        scope=_SCOPES[scope],
                        description=f"{operation} {resource}: {_SCOPES[scope].lower()}",
                    )
                )

    def role(name: str, *texts: str, rules: Iterable[Rule] | None = None) -> None:
        registry.roles.add(
            Role(
                name=name,
                description=f"{name} role",
                rules=list(rules) if rules else _select(registry, ", ".join(texts)),
                is_default_role=True,
            )
        )

    viewer, researcher = _VIEWER[generation], _RESEARCHER[generation]
    admin = _ORGANIZATION_ADMIN[generation]
    role("Root", rules=registry.rules)
    role("container", _CONTAINER[generation])
    role("node", _CONTAINER[generation], _NODE[generation])
    role("Viewer", viewer)
    role("Researcher", viewer, researcher)
    # From 4.14 an organization's administrator no longer creates tasks.
    role("Organization Admin", viewer, *([researcher] if generation == 3 else []), admin)
    role("Collaboration Admin", viewer, admin, researcher, _COLLABORATION_ADMIN[generation])


def _select(registry: Registry, text: str) -> list[Rule]:
    rules: list[Rule] = []
    for entry in text.split(","):
        resource, operation, *scopes = entry.split()
        for scope in scopes:
            found = registry.rules.where(name=resource, operation=operation.upper(), scope=_SCOPES[scope])
            rules += [rule for rule in found if rule not in rules]
    return rules


@dataclass(frozen=True)
class Caller:
    """Who sent a request, and what that one may do.

    Attributes:
        registry: the tables.
        kind: `user`, `node` or `container`.
        user: set when it is a user.
        node: set when it is a node.
        claims: what is in the token of a container.
    """

    registry: Registry
    kind: str
    user: User | None = None
    node: Node | None = None
    claims: dict[str, Any] | None = None

    @property
    def organization(self) -> Organization:
        """The organization it belongs to."""
        member = self.user or self.node
        if member is not None:
            return member.organization
        assert self.claims is not None
        organization = self.registry.organizations.get(self.claims["organization_id"])
        assert organization is not None
        return organization

    @property
    def collaborations(self) -> list[Collaboration]:
        """The collaborations of its organization; of a container the one it computes in."""
        if self.claims is None:
            return self.registry.collaborations_of(self.organization)
        found = self.registry.collaborations.get(self.claims["collaboration_id"])
        return [found] if found else []

    @property
    def organizations(self) -> list[Organization]:
        """Its organization and all it collaborates with."""
        found = [o for c in self.collaborations for o in c.organizations]
        return list(dict.fromkeys([self.organization, *found]))

    @property
    def rules(self) -> set[tuple[str, str, str]]:
        """What it may do, as (resource, operation, scope)."""
        if self.user is not None:
            rules = [*self.user.rules, *(rule for role in self.user.roles for rule in role.rules)]
        else:
            rules = self.registry.roles.where(name=self.kind)[0].rules
        return {(rule.name, rule.operation, rule.scope) for rule in rules}

    def may(self, resource: str, operation: str, *scopes: str) -> bool:
        """Return whether it has the operation in one of these scopes (own, org, col, glo)."""
        rules = self.rules
        return any((resource, operation.upper(), _SCOPES[s]) in rules for s in scopes)

    def may_at_least(self, resource: str, operation: str, scope: str) -> bool:
        """Return whether it has the operation in this scope or a wider one."""
        order = list(_SCOPES)
        return self.may(resource, operation, *order[order.index(scope) :])

    def for_organization(self, resource: str, operation: str, organization: Organization | int | str | None) -> bool:
        """Return whether it may do this to what belongs to an organization."""
        if organization is None and self.registry.generation == 5:
            raise ServerFlaw("int() argument must be a string, a bytes-like object or a real number, not 'NoneType'")
        wanted = _id(organization)
        if self.may(resource, operation, "glo"):
            return True
        if self.may(resource, operation, "org") and wanted == self.organization.id:
            return True
        return self.may(resource, operation, "col") and wanted in {
            o.id for c in self.registry.collaborations_of(self.organization) for o in c.organizations
        }

    def for_collaboration(self, resource: str, operation: str, collaboration: Collaboration | int | str | None) -> bool:
        """Return whether it may do this to what belongs to a collaboration."""
        if self.may(resource, operation, "glo"):
            return True
        # v3 knows no scope between the organization and all.
        scope = "org" if self.registry.generation == 3 else "col"
        return self.may(resource, operation, scope) and _id(collaboration) in {c.id for c in self.collaborations}

    def for_both(
        self,
        resource: str,
        operation: str,
        organization: Organization,
        collaboration: Collaboration,
    ) -> bool:
        """Return whether it may do this to what an organization has in a collaboration."""
        if self.may(resource, operation, "org") and organization is self.organization:
            return True
        return self.for_collaboration(resource, operation, collaboration)

    def first_missing(self, rules: Iterable[Rule]) -> Rule | None:
        """Return the first of these rules that it has neither as it is nor in a wider scope."""
        names = {scope: short for short, scope in _SCOPES.items()}
        for rule in rules:
            if not self.may_at_least(rule.name, rule.operation, names[rule.scope]):
                return rule
        return None


def _id(record: Record | int | str | None) -> int | None:
    if isinstance(record, Record):
        return record.id
    try:
        return int(record) if record is not None else None
    except ValueError:
        return None
