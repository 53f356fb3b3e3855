"""The one table of everything that can be listed, read, made, changed and deleted on a vantage6 server.

The verbs of the client take a record type and look it up here, so that a new kind of object is one more entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6.models import (
    AlgorithmStore,
    Collaboration,
    Column,
    Dataframe,
    EncodedResult,
    Node,
    Organization,
    Record,
    Role,
    Rule,
    Run,
    Session,
    Study,
    Task,
    User,
    Version,
)

__all__ = ["RESOURCES", "Resource", "resource_named", "resource_of", "rows_of"]

# Generations that know a filter or a verb: the first and the last.
_ALL, _OLD, _NEW, _V3, _V4, _V5 = (3, 5), (3, 4), (4, 5), (3, 3), (4, 4), (5, 5)

# Filters whose name in the official client is not that of the server less ``_id``.
_OFFICIAL_NAMES = {
    "initiating_org": "init_org_id",
    "initiating_user": "init_user_id",
    "initiator": "init_org_id",
    "is_online": "status",
    "user_created": "is_user_created",
}

Span = tuple[int, int]


@dataclass(frozen=True)
class Resource:
    """How one kind of object is reached over the REST interface.

    Attributes:
        model: What an answer is read into.
        path: Path of one object below the API's root, without its id.
        list_path: Path of the list where it differs; may name an owner in braces.
        since: First version that knows the resource.
        verbs: Verbs the server offers, each with the generations that do. A filter or verb that is not in the table is
            refused here, because real servers answer some of them with HTTP 500.
        filters: Query parameters of the list.
        members: Objects that can be put into this one and taken out: their type, and the path below the object.
        cascades: Whether deleting may take dependent objects along.
        renamed: Filters whose name differs in generation 3.
        path_v3: Path in generation 3 where it differs.
    """

    model: type[Record]
    path: str
    list_path: str = ""
    since: tuple[int, int] = (3, 0)
    verbs: Mapping[str, Span] = field(default_factory=dict)
    filters: Mapping[str, Span] = field(default_factory=dict)
    members: Mapping[type[Record], str] = field(default_factory=dict)
    cascades: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    path_v3: str = ""

    @property
    def name(self) -> str:
        """The server's word for it."""
        return self.model.resource

    def check_verb(self, verb: str, version: Version) -> None:
        """Refuse what the server does not offer.

        Args:
            verb: ``list``, ``get``, ``create``, ``update`` or ``delete``.
            version: Version of the server.

        Raises:
            ConfigurationError: The server has no such resource, or not this verb for it.
        """
        if (version.major, version.minor) < self.since:
            since = ".".join(map(str, self.since))
            raise ConfigurationError(f"{self.name}: vantage6 {version.text} has none of these; {since} and later have.")
        first, last = self.verbs.get(verb, (0, 0))
        if not first <= version.major <= last:
            offered = ", ".join(name for name, (low, high) in self.verbs.items() if low <= version.major <= high)
            raise ConfigurationError(f"{self.name}: vantage6 {version.text} offers {offered}, not {verb}.")

    def item_path(self, version: Version, object_id: int) -> str:
        """Path of one object.

        Args:
            version: Version of the server.
            object_id: Its id.
        """
        return f"{self._path(version)}/{object_id}"

    def collection_path(self, version: Version, owner: Mapping[str, Any]) -> str:
        """Path of the list.

        Args:
            version: Version of the server.
            owner: Ids that the path names, taken out of the filters or of the body.
        """
        return self.list_path.format(**owner) if self.list_path else self._path(version)

    @property
    def owner_fields(self) -> tuple[str, ...]:
        """Names in braces in the path of the list."""
        return ("session_id",) if "{session_id}" in self.list_path else ()

    def filters_named(self, filters: Mapping[str, Any]) -> dict[str, Any]:
        """Take filters by the names of the official client, too: ``collaboration`` is ``collaboration_id``.

        Args:
            filters: By name; those that are None are left out.

        Returns:
            The filters by the names of the table.

        Raises:
            ConfigurationError: One is given by both names.
        """
        named: dict[str, Any] = {}
        for name, value in filters.items():
            if value is None:
                continue
            known = self._known_filter(name)
            if known in named:
                raise ConfigurationError(f"{self.name}: {known!r} is given twice, also by another name.")
            if name == "is_online":
                value = "online" if value else "offline"
            named[known] = value
        return named

    def _known_filter(self, name: str) -> str:
        known = {*self.filters, *self.owner_fields}
        candidates = (name, f"{name}_id", _OFFICIAL_NAMES.get(name, name))
        return next((one for one in candidates if one in known), name)

    def query(self, version: Version, filters: Mapping[str, Any]) -> dict[str, Any]:
        """Check filters and put them into the server's words.

        Args:
            version: Version of the server.
            filters: By name; those that are None are left out.

        Returns:
            The query parameters.

        Raises:
            ConfigurationError: The server does not know a filter, or is known to fail on it.
        """
        known = {name for name, (low, high) in self.filters.items() if low <= version.major <= high}
        query: dict[str, Any] = {}
        for name, value in filters.items():
            if value is None:
                continue
            if name not in known:
                raise ConfigurationError(
                    f"{self.name}: vantage6 {version.text} cannot filter by {name!r}. "
                    f"It knows: {', '.join(sorted(known)) or 'no filter'}."
                )
            wire_name = self.renamed.get(name, name) if version.major == 3 else name
            query[wire_name] = int(value) if isinstance(value, bool) else value
        return query

    def _path(self, version: Version) -> str:
        return self.path_v3 if version.major == 3 and self.path_v3 else self.path


def _verbs(names: str, span: Span = _ALL, **exceptions: Span) -> dict[str, Span]:
    return dict.fromkeys(names.split(), span) | exceptions


def _filters(**spans: str) -> dict[str, Span]:
    by_name = {"all": _ALL, "old": _OLD, "new": _NEW, "v3": _V3, "v4": _V4, "v5": _V5}
    return {name: by_name[span] for span, names in spans.items() for name in names.split()}


_EVERYTHING = _verbs("list get create update delete")

RESOURCES: tuple[Resource, ...] = (
    Resource(
        User,
        "user",
        verbs=_EVERYTHING,
        filters=_filters(
            all="username organization_id role_id rule_id last_seen_from last_seen_till",
            old="firstname lastname email",
            new="collaboration_id",
        ),
        cascades=True,
    ),
    Resource(
        Organization,
        "organization",
        verbs=_verbs("list get create update", delete=_NEW),
        filters=_filters(all="name country collaboration_id", new="study_id ids"),
        cascades=True,
    ),
    Resource(
        Collaboration,
        "collaboration",
        verbs=_EVERYTHING,
        filters=_filters(all="name encrypted organization_id", new="algorithm_store_id"),
        members={Organization: "organization", Node: "node"},
        cascades=True,
    ),
    Resource(
        Study,
        "study",
        since=(4, 3),
        verbs=_verbs("list get create update delete", _NEW),
        filters=_filters(new="name organization_id collaboration_id"),
        members={Organization: "organization"},
        cascades=True,
    ),
    Resource(
        Node,
        "node",
        verbs=_EVERYTHING,
        filters=_filters(
            all="name status organization_id collaboration_id last_seen_from last_seen_till",
            old="ip",
            new="study_id",
            v5="session_id",
        ),
        cascades=True,
    ),
    Resource(
        Role,
        "role",
        verbs=_EVERYTHING,
        filters=_filters(all="name description organization_id rule_id user_id include_root", new="collaboration_id"),
        members={Rule: "rule"},
        cascades=True,
    ),
    Resource(
        Rule,
        "rule",
        verbs=_verbs("list get"),
        filters=_filters(all="name operation scope role_id", new="user_id", v5="current_user"),
    ),
    Resource(
        # Every server answers a filter by status with HTTP 500, so it is not offered.
        Task,
        "task",
        verbs=_verbs("list get create delete"),
        filters=_filters(
            all="name image description database collaboration_id parent_id job_id init_org_id init_user_id",
            new="study_id store_id is_user_created",
            v5="session_id dataframe_id",
        ),
        renamed={"job_id": "run_id", "init_org_id": "initiator_id"},
    ),
    Resource(
        # The filters by start and end look at another column, so they are not offered.
        Run,
        "run",
        path_v3="result",
        verbs=_verbs("list get"),
        filters=_filters(all="task_id organization_id node_id state", new="collaboration_id"),
    ),
    Resource(
        EncodedResult,
        "result",
        verbs=_verbs("list get"),
        filters=_filters(all="task_id organization_id node_id state", new="collaboration_id"),
    ),
    Resource(
        AlgorithmStore,
        "algorithmstore",
        since=(4, 3),
        verbs=_verbs("list get create update delete", _NEW),
        filters=_filters(new="name url collaboration_id"),
    ),
    Resource(
        Session,
        "session",
        since=(5, 0),
        verbs=_verbs("list get create update delete", _V5),
        filters=_filters(v5="name user_id collaboration_id scope"),
        cascades=True,
    ),
    Resource(
        Dataframe,
        "session/dataframe",
        list_path="session/{session_id}/dataframe",
        since=(5, 0),
        verbs=_verbs("list get create delete", _V5),
    ),
)

_BY_MODEL: dict[type[Record], Resource] = {resource.model: resource for resource in RESOURCES}


def resource_of(model: type[Record]) -> Resource:
    """Find the entry of a record type.

    Args:
        model: For instance `Organization`. One that reads more fields of the same object counts as that.

    Raises:
        ConfigurationError: The type is not one that a server keeps.
    """
    for kind in model.__mro__:
        if kind in _BY_MODEL:
            return _BY_MODEL[kind]
    raise ConfigurationError(f"{model.__name__} is not kept by a vantage6 server.")


def rows_of(
    kind: type[Record] | type[Column], objects: Iterable[Record | Column], fields: Sequence[str]
) -> list[dict[str, JsonValue]]:
    """Reduce objects to some of their attributes, as plain JSON. Secrets stay hidden.

    Args:
        kind: What they are.
        objects: All of this kind.
        fields: Names of attributes; ``organization`` does for ``organization_id``.

    Returns:
        A mapping with the names as given for each object.

    Raises:
        ConfigurationError: There is no such attribute, or none was asked for; the message lists those there are.
    """
    known = kind.model_fields
    attributes = {name: name if name in known else f"{name}_id" for name in fields}
    unknown = [repr(name) for name, attribute in attributes.items() if attribute not in known]
    if unknown or not attributes:
        asked = f"has no {', '.join(unknown)}" if unknown else "is asked for none"
        raise ConfigurationError(f"fields: a {kind.resource} {asked}. Known: {', '.join(sorted(known))}.")
    values = (one.model_dump(mode="json", include=set(attributes.values())) for one in objects)
    return [{name: row[attribute] for name, attribute in attributes.items()} for row in values]


def resource_named(name: str) -> Resource:
    """Find an entry by the server's word.

    Args:
        name: For instance ``organization``.

    Raises:
        ConfigurationError: There is no such word; the message lists those there are.
    """
    for resource in RESOURCES:
        if resource.name == name:
            return resource
    raise ConfigurationError(f"There is no resource {name!r}. Known: {', '.join(_names(RESOURCES))}.")


def _names(resources: Iterable[Resource]) -> list[str]:
    return [resource.name for resource in resources]
