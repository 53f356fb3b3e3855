"""Provenance as an RO-Crate: what was run, with what, where and when, and what came of it.

The crate is of the profile Provenance Run Crate 0.5 (https://w3id.org/ro/wfrun/provenance). Its folder is that of the
results, which stay where they are: `ro-crate-metadata.json`, `ro-crate-workflow.json` and a README where there is none
are all that is added to it. Written again from the same record it has the same bytes.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, unquote

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.files import atomic_write, digest, on_disk, safe_join

__all__ = [
    "METADATA",
    "WORKFLOW",
    "CrateDifference",
    "Execution",
    "Provenance",
    "Source",
    "check_crate",
    "files_of_crate",
    "names_of_runs",
    "write_crate",
]

METADATA = "ro-crate-metadata.json"
WORKFLOW = "ro-crate-workflow.json"
_MAX_BYTES = 64 * 2**20
_LISTED_AS = "https://w3id.org/workflowhub/workflow-ro-crate/1.0"
_PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    _LISTED_AS: "Workflow RO-Crate",
}
# Written out, because a reader without a network cannot fetch a context.
_TERMS = {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}
_ENGINE = "https://www.prefect.io/"
_WORKFLOW_PROFILE = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
_README = "README.md"
_MARK = "`prefect-biomed crate --check` proves the files against it"
_MAX_README_BYTES = 4096


class Source(BaseModel):
    """A file that went in, which is not in the folder of the crate.

    Attributes:
        address: Where it was on the platform, as an address of its own scheme (`vip://host/path`).
        name: Its name.
        sha256: Digest of the content as it was sent; None where that is not known.
        size: Bytes; None where that is not known.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    name: str
    sha256: str | None = None
    size: int | None = None


class Execution(BaseModel):
    """One run of the program on the platform.

    Attributes:
        address: Its address on the platform.
        name: Its name there.
        error: Why it does not count as success; None for one that does.
        began: When it began.
        ended: When it was seen to have ended; None where nobody has written it down.
        settings: Values of its parameters.
        inputs: Files that went in.
        outputs: Files that came out of it, relative to the folder of the crate.
    """

    model_config = ConfigDict(frozen=True)

    address: str
    name: str
    error: str | None
    began: AwareDatetime
    ended: AwareDatetime | None
    settings: Mapping[str, JsonValue] = Field(default_factory=dict)
    inputs: tuple[Source, ...] = ()
    outputs: tuple[str, ...] = ()


class Provenance(BaseModel):
    """How a set of results came about.

    Attributes:
        name: Name of the whole, as that of a session.
        flow: The flow that drove it, such as `vip-session`.
        parameters: The parameters that were given to it, as `prefect-biomed run <flow> -f` takes them.
        platform: Name of the platform.
        platform_url: Its address.
        program: What ran there: pipeline with version, or image.
        program_version: Its version.
        program_address: Its address on the platform.
        executions: Its runs.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    flow: str
    parameters: Mapping[str, JsonValue]
    platform: str
    platform_url: str
    program: str
    program_version: str
    program_address: str
    executions: tuple[Execution, ...]


class CrateDifference(BaseModel):
    """A file that is not what its crate says.

    Attributes:
        path: The file, relative to the folder of the crate.
        what: `missing`, or `changed` when size or digest differ.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    what: Literal["missing", "changed"]


def write_crate(folder: Path, provenance: Provenance, *, licence: str = "") -> Path:
    """Write the provenance of results beside them.

    Safe to repeat: the same record gives the same bytes, and the file appears whole.

    Args:
        folder: Folder of the results; it becomes the root of the crate.
        provenance: How they came about.
        licence: Address of the licence of the results; a remark that none was given when empty.

    Returns:
        The file `ro-crate-metadata.json`.

    Raises:
        LedgerError: A result is not in the folder, or there is no run to tell of.
        LocalStorageError: The folder cannot be written.
    """
    if not provenance.executions:
        raise LedgerError(f"{provenance.name} has no execution that has ended yet: there is nothing to tell of.")
    with on_disk(folder):
        with atomic_write(folder / WORKFLOW) as file:
            file.write(_as_bytes(dict(provenance.parameters)))
        if not (folder / _README).exists():
            with atomic_write(folder / _README) as file:
                file.write(_readme(provenance).encode())
        described = _Crate(folder, provenance, licence).describe()
        with atomic_write(folder / METADATA) as file:
            file.write(_as_bytes(described))
    return folder / METADATA


def files_of_crate(folder: Path) -> frozenset[str]:
    """Name the files that `write_crate` has put into a folder, or would replace in it.

    Args:
        folder: Folder of a crate.

    Returns:
        Their names; that of the README only when it is ours.

    Raises:
        LocalStorageError: The folder cannot be read.
    """
    readme = folder / _README
    with on_disk(folder):
        is_ours = readme.is_file() and _MARK.encode() in readme.read_bytes()[:_MAX_README_BYTES]
    return frozenset({METADATA, WORKFLOW, *([_README] if is_ours else [])})


def check_crate(folder: Path) -> tuple[CrateDifference, ...]:
    """Prove the files of a crate against the sizes and digests that it has of them.

    Args:
        folder: Folder of the crate.

    Returns:
        Files that are missing or have changed, by name; empty when all are as they were.

    Raises:
        LedgerError: There is no crate, it is damaged, or it has no digest to prove a file by.
    """
    path = folder / METADATA
    graph = [entity for entity in _graph(path) if "File" in _types(entity)]
    here = [entity for entity in graph if ":" not in str(entity.get("@id", ":"))]
    if without := [str(entity["@id"]) for entity in here if not isinstance(entity.get("sha256"), str)]:
        raise LedgerError(f"{path} has no digest of {', '.join(sorted(without)[:5])}: nothing proves these files.")
    found = (_difference(folder, entity) for entity in sorted(here, key=lambda entity: str(entity["@id"])))
    return tuple(difference for difference in found if difference is not None)


def names_of_runs(folder: Path) -> set[str]:
    """Tell which runs a crate is about.

    Args:
        folder: Folder of the crate.

    Returns:
        Their addresses; none when there is no crate.

    Raises:
        LedgerError: The crate is damaged.
    """
    path = folder / METADATA
    graph = _graph(path) if path.is_file() else []
    return {str(entity["@id"]) for entity in graph if "CreateAction" in _types(entity)}


def _graph(path: Path) -> list[dict[str, Any]]:
    """The entities of a crate."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
        graph = [(entity, _types(entity)) for entity in content["@graph"]]
    except FileNotFoundError:
        raise LedgerError(
            f"There is no {path}: `prefect-biomed crate {path.parent}` writes one for a session."
        ) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise LedgerError(f"{path} cannot be read as an RO-Crate ({type(error).__name__}).") from None
    return [entity for entity, _ in graph]


def _readme(provenance: Provenance) -> str:
    return (
        f"# {provenance.name}\n\nResults of {provenance.program} on {provenance.platform}. How they came about is in "
        f"`{METADATA}`; {_MARK}, and `prefect-biomed run {provenance.flow} -f {WORKFLOW}` runs the same "
        "once more.\n"
    )


def _difference(folder: Path, entity: Mapping[str, Any]) -> CrateDifference | None:
    name = unquote(str(entity["@id"]))
    path = safe_join(folder, name)
    if not path.is_file():
        return CrateDifference(path=name, what="missing")
    is_same = str(path.stat().st_size) == str(entity.get("contentSize")) and digest(path) == entity["sha256"]
    return None if is_same else CrateDifference(path=name, what="changed")


def _types(entity: Any) -> list[str]:
    kinds = entity["@type"]
    return kinds if isinstance(kinds, list) else [kinds]


def _as_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


class _Crate:
    """The entities of a crate, and how they are tied together."""

    def __init__(self, folder: Path, provenance: Provenance, licence: str) -> None:
        self._folder = folder
        self._told = provenance
        # With its templates it takes as long to import as the client of a platform, and few runs write a crate.
        from rocrate.rocrate import ROCrate

        self._crate = ROCrate(version="1.1")
        self._licence = licence
        self._files: dict[str, Any] = {}
        self._ended = max(execution.ended or execution.began for execution in provenance.executions)

    def describe(self) -> Any:
        """Make `ro-crate-metadata.json`."""
        platform = self._add(
            self._told.platform_url, "Organization", {"name": self._told.platform, "url": self._told.platform_url}
        )
        program = self._add(
            self._told.program_address,
            "SoftwareApplication",
            {
                "name": self._told.program,
                "softwareVersion": self._told.program_version,
                "url": self._told.program_address,
            },
        )
        step = self._add("#step", "HowToStep", {"name": f"Run {self._told.program}", "position": "1"})
        step["workExample"] = program
        workflow = self._workflow(program, step)
        actions = [
            self._execution(number, execution, program, platform) for number, execution in enumerate(self._runs(), 1)
        ]
        outputs = _unique(result for action in actions for result in _listed(action.get("result")))
        whole = self._add(
            "#run",
            "CreateAction",
            {
                "name": f"{self._told.flow} {self._told.name}",
                "description": f"{len(actions)} runs of {self._told.program} on {self._told.platform}",
                "instrument": workflow,
                "agent": platform,
                "object": _unique(given for action in actions for given in _listed(action.get("object"))),
                "result": outputs,
                "startTime": _time(min(execution.began for execution in self._told.executions)),
                "endTime": _time(self._ended),
                **_end([f"{one.name}: {one.error}" for one in self._runs() if one.error]),
            },
        )
        self._add(
            "#organization",
            "OrganizeAction",
            {
                "name": f"Run of {self._told.flow} by Prefect",
                "instrument": self._crate.dereference(_ENGINE),
                "agent": platform,
                "object": [self._control(number, action, step) for number, action in enumerate(actions, 1)],
                "result": whole,
                "startTime": whole["startTime"],
                "endTime": whole["endTime"],
            },
        )
        self._root([whole, *actions], platform)
        return self._sorted(self._crate.metadata.generate())

    def _runs(self) -> list[Execution]:
        return sorted(self._told.executions, key=lambda execution: (execution.began, execution.address))

    def _add(self, identifier: str, kind: str, properties: Mapping[str, Any]) -> Any:
        entity = self._crate.add_jsonld({"@id": identifier, "@type": kind})
        for name, value in properties.items():
            # The profile asks for a value where there is one, and for no empty list.
            if value != []:
                entity[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
        return entity

    def _file(self, place: str, kind: str | list[str] = "File", **properties: Any) -> Any:
        path = safe_join(self._folder, place)
        if not path.is_file():
            raise LedgerError(f"{path} is not there, so no crate can tell of it. Fetch it again.")
        known = {
            "name": PurePosixPath(place).name,
            "contentSize": str(path.stat().st_size),
            "sha256": digest(path),
            "encodingFormat": mimetypes.guess_type(place)[0] or "application/octet-stream",
        }
        if place not in self._files:
            self._files[place] = self._crate.add_file(
                dest_path=place, properties={"@type": kind, **known, **properties}
            )
        return self._files[place]

    def _workflow(self, program: Any, step: Any) -> Any:
        about = {"name": "Prefect", "softwareVersion": version("prefect"), "url": _ENGINE}
        language = self._add("#prefect-flow", "ComputerLanguage", {"name": "Prefect", "url": _ENGINE})
        language["identifier"] = self._add(_ENGINE, "SoftwareApplication", about)
        ours = version("prefect-biomed")
        described = self._file(
            WORKFLOW,
            ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"],
            name=f"{self._told.flow} {self._told.name}",
            description=f"Parameters of the flow {self._told.flow} of prefect-biomed {ours}",
            version=ours,
            url=WORKFLOW,
            programmingLanguage=language,
            softwareRequirements=f"prefect-biomed {ours}",
            hasPart=program,
            step=step,
            conformsTo=self._add(
                _WORKFLOW_PROFILE, "CreativeWork", {"name": "ComputationalWorkflow", "version": "1.0"}
            ),
        )
        self._crate.root_dataset["mainEntity"] = described
        return described

    def _execution(self, number: int, execution: Execution, program: Any, platform: Any) -> Any:
        given: list[Any] = [
            self._add(
                f"#run-{number}-{quote(name, safe='')}",
                "PropertyValue",
                {"name": name, "value": value if isinstance(value, str) else json.dumps(value, sort_keys=True)},
            )
            for name, value in sorted(execution.settings.items())
        ]
        given += [self._source(source) for source in execution.inputs]
        return self._add(
            execution.address,
            "CreateAction",
            {
                "name": execution.name,
                "description": f"Execution {execution.name} on {self._told.platform}",
                "instrument": program,
                "agent": platform,
                "object": given,
                "result": [self._file(name) for name in sorted(execution.outputs)],
                "startTime": _time(execution.began),
                "endTime": _time(execution.ended) if execution.ended else [],
                **_end([execution.error] if execution.error else []),
            },
        )

    def _source(self, source: Source) -> Any:
        # Not a data entity: what is gone from the platform, or behind its login, is no part of the crate.
        known: dict[str, Any] = {"name": source.name, "identifier": source.address}
        if source.sha256 is not None:
            known["sha256"] = source.sha256
        if source.size is not None:
            known["contentSize"] = str(source.size)
        identifier = f"#input-{quote(source.address, safe='')}"
        return self._crate.dereference(identifier) or self._add(identifier, "CreativeWork", known)

    def _control(self, number: int, action: Any, step: Any) -> Any:
        return self._add(
            f"#control-{number}",
            "ControlAction",
            {
                "name": f"Launch of {action['name']}",
                "instrument": step,
                "object": action,
                "startTime": action["startTime"],
                "endTime": action.get("endTime", []),
            },
        )

    def _root(self, actions: list[Any], platform: Any) -> None:
        profiles = [
            self._add(address, "CreativeWork", {"name": name, "version": address.rsplit("/", 1)[1]})
            for address, name in _PROFILES.items()
        ]
        licence = self._licence or "#licence"
        about = {"name": self._licence or "None given", "description": "Ask those who made the results."}
        root = self._crate.root_dataset
        root["name"] = self._told.name
        root["description"] = f"Results of {self._told.program} on {self._told.platform}, and how they came about"
        root["datePublished"] = _time(self._ended)
        root["license"] = self._add(licence, "CreativeWork", about)
        root["conformsTo"] = profiles
        root["mentions"] = actions
        root["author"] = root["publisher"] = platform
        if (self._folder / _README).is_file():
            self._file(_README, about=root, encodingFormat="text/markdown")
        self._crate.metadata["conformsTo"] = [
            {"@id": address} for address in ("https://w3id.org/ro/crate/1.1", _LISTED_AS)
        ]
        self._crate.metadata.extra_terms.update(_TERMS)

    def _sorted(self, described: Any) -> Any:
        described["@graph"].sort(key=lambda entity: (entity["@id"] != METADATA, entity["@id"] != "./", entity["@id"]))
        return described


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _unique(entities: Iterable[Any]) -> list[Any]:
    return list({entity.id: entity for entity in entities}.values())


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _end(errors: list[str]) -> dict[str, str]:
    """How an action has ended."""
    status = f"http://schema.org/{'Failed' if errors else 'Completed'}ActionStatus"
    return {"actionStatus": status, **({"error": "; ".join(errors)} if errors else {})}
