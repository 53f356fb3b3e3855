"""Bundles of public executions, as VIP makes them and as they are published on Zenodo.

The portal writes `summary.json`, the inputs of each execution in `<workflow>.json`, and what boutiques wrote of each
job in `<invocation>/<invocation>.sh.provenance.json`: names and MD5s of inputs and outputs. VIP's uploader adds
descriptor and outputs and packs folders into archives. Files are found by what they are, because layouts differ between
releases.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from prefect_biomed.clients.archives import is_archive, unpack
from prefect_biomed.clients.errors import ConfigurationError, UnsafeContent
from prefect_biomed.clients.files import digest

__all__ = ["Bundle", "PublishedExecution", "open_bundle"]

PROVENANCE = ".sh.provenance.json"
SUMMARY = "summary.json"
_MAX_BYTES = 64 * 1024 * 1024

Shape = TypeVar("Shape", bound=BaseModel)


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Provider(_Read):
    """Where the inputs of an execution were.

    Attributes:
        vip_url: The portal it ran on.
        storage_type: `LOCAL` for the storage of the portal, `GIRDER`.
        storage_url: Address of the Girder.
        storage_id: Identifier of the Girder on the portal; what the names of inputs on it begin with.
    """

    vip_url: str = Field("", validation_alias=AliasChoices("vip_url", "vip"))
    storage_type: str = Field("LOCAL", validation_alias=AliasChoices("storage_type", "type"))
    storage_url: str | None = Field(None, validation_alias=AliasChoices("storage_url", "url"))
    storage_id: str | None = Field(None, validation_alias=AliasChoices("storage_id", "id"))


class _WorkflowInputs(_Read):
    provider: Provider
    inputs: dict[str, Annotated[tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]]


class _DescribedInput(_Read):
    id: str
    name: str = ""
    type: str = ""


class _Descriptor(_Read):
    name: str
    version: str = Field(alias="tool-version")
    command: str = Field(alias="command-line")
    inputs: tuple[_DescribedInput, ...]


class _File(_Read):
    name: str = Field(alias="file-name")
    md5: str | None = Field(None, validation_alias=AliasChoices("md5sum", "hash"))
    not_found: bool = False
    files: tuple[_File, ...] | None = None


class _Named(_Read):
    name: str = ""


class _Output(_Read):
    exit_code: int | None = Field(None, alias="exit-code")
    files: dict[str, _File] = Field(default_factory=dict, alias="output-files")


class _Provenance(_Read):
    summary: _Named = _Named()
    invocation: dict[str, JsonValue] = Field(default_factory=dict, alias="public-invocation")
    output: _Output = Field(alias="public-output")


class _Workflow(_Read):
    identifier: str = Field(alias="workflowId")
    descriptor: str | None = Field(None, alias="boutique_descriptor")
    provenances: tuple[str, ...] = Field((), alias="provenances_files")
    outputs: dict[str, JsonValue] = Field(default_factory=dict, alias="invocation_outputs")

    @property
    def invocations(self) -> set[str]:
        """Its jobs."""
        return {PurePosixPath(path).name.removesuffix(PROVENANCE) for path in self.provenances} | set(self.outputs)


class _Metadata(_Read):
    title: str = ""


class _Summary(_Read):
    metadata: _Metadata = _Metadata()
    workflows: tuple[_Workflow, ...]


class PublishedExecution(BaseModel):
    """One execution of a bundle.

    Attributes:
        workflow_id: Its identifier on the portal.
        pipeline_id: What ran, `Application/version`, as its descriptor says.
        provider: Where its inputs were.
        inputs: Its values by parameter, as the portal wrote them.
        file_inputs: The parameters that name files.
        input_digests: MD5s of its input files by parameter and name, as its jobs saw them; several when jobs saw
            different files.
        outputs: Its output files by name, with the MD5 that was written down; None where none was.
        places: The output files that the bundle holds, by name.
        invocations: Its jobs of which there is a provenance.
        failed: Those of them that ended with another exit code than 0.
        descriptor: Its Boutiques descriptor.
    """

    model_config = ConfigDict(frozen=True)

    workflow_id: str
    pipeline_id: str
    provider: Provider
    inputs: dict[str, tuple[str, ...]]
    file_inputs: frozenset[str]
    input_digests: dict[str, dict[str, frozenset[str]]]
    outputs: dict[str, str | None]
    places: dict[str, Path]
    invocations: tuple[str, ...]
    failed: tuple[str, ...] = ()
    descriptor: dict[str, JsonValue]

    @property
    def contradictions(self) -> dict[str, str]:
        """Published files that are not those of which the provenance tells, by name, with what is wrong."""
        found = {}
        for name, place in self.places.items():
            told = self.outputs.get(name)
            if told is not None and (seen := digest(place, "md5")) != told:
                found[name] = f"the published file has the MD5 {seen}, its provenance says {told}"
        return found


class Bundle(BaseModel):
    """A bundle of public executions.

    Attributes:
        folder: Where it is, unpacked.
        title: Its title.
        identity: Ten letters that name its content, without the output files: the same for every copy.
        executions: The executions.
    """

    model_config = ConfigDict(frozen=True)

    folder: Path
    title: str = ""
    identity: str
    executions: tuple[PublishedExecution, ...]


def open_bundle(path: Path, workspace: Path) -> Bundle:
    """Read a bundle of public executions. Nothing in it is trusted: no name leads out of it.

    Args:
        path: Its folder, or an archive of it.
        workspace: A folder for what is unpacked, which has to stay as long as the bundle is used. Safe to repeat.

    Returns:
        The bundle.

    Raises:
        ConfigurationError: It is none, or something that is needed is not in it; the message says what.
        UnsafeContent: An archive in it is damaged or hostile, or a name in it would lead out of it.
    """
    if not path.exists():
        raise ConfigurationError(f"There is no bundle {path}.")
    folder = path if path.is_dir() else _unpacked(path, workspace)
    summaries = _named(folder, SUMMARY)
    folder = summaries[0].parent if summaries else folder
    roots = [folder, *(_unpacked(one, workspace) for one in _archives(folder))]
    files = [file for root in roots for file in _files(root)]
    summary = _read(_Summary, summaries[0]) if summaries else None
    provenances = _provenances(files)
    # An output may look like anything.
    others = [file for file in files if not set(provenances) & set(file.parts)]
    inputs = {file.stem: _read(_WorkflowInputs, file) for file in others if _is(file, {"provider", "inputs"})}
    if not inputs or not provenances:
        lacking = "inputs of an execution (<workflow>.json)" if not inputs else f"provenance (*{PROVENANCE})"
        raise ConfigurationError(f"{path} is no bundle of public executions: there is no {lacking} in it.")
    descriptors = [file for file in others if _is(file, {"tool-version", "command-line", "inputs"})]
    executions = tuple(
        _execution(one, inputs[one.identifier], provenances, descriptors, files)
        for one in _workflows(path, summary, inputs, provenances)
    )
    content = sorted(digest(file) for file in {*provenances.values(), *(f for f in others if f.stem in inputs)})
    return Bundle(
        folder=folder,
        title=summary.metadata.title if summary else "",
        identity=hashlib.sha256("".join(content).encode()).hexdigest()[:10],
        executions=executions,
    )


def _provenances(files: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        if file.name.endswith(PROVENANCE):
            known = found.setdefault(file.name.removesuffix(PROVENANCE), file)
            if digest(known) != digest(file):
                raise ConfigurationError(f"{known} and {file} are provenances of one job and differ. Remove one.")
    return found


def _workflows(
    path: Path, summary: _Summary | None, inputs: Mapping[str, Any], provenances: Mapping[str, Path]
) -> list[_Workflow]:
    """The executions, with their jobs; without a summary there can be only one."""
    if summary is None:
        if len(inputs) > 1:
            raise ConfigurationError(
                f"{path} has {len(inputs)} executions and no {SUMMARY}, so nothing tells which jobs are whose."
            )
        (identifier,) = inputs
        return [_Workflow(workflowId=identifier, provenances_files=tuple(provenances))]
    lacking = [one.identifier for one in summary.workflows if one.identifier not in inputs]
    if lacking:
        raise ConfigurationError(f"{path} lacks the inputs of {', '.join(lacking)} (<workflow>.json).")
    for one in summary.workflows:
        if absent := sorted(one.invocations - set(provenances)):
            raise ConfigurationError(f"{path} lacks the provenance of {', '.join(absent)}, of {one.identifier}.")
        if not one.invocations:
            raise ConfigurationError(f"{path} names no job of {one.identifier}.")
    return list(summary.workflows)


def _execution(
    workflow: _Workflow,
    given: _WorkflowInputs,
    provenances: Mapping[str, Path],
    descriptors: Iterable[Path],
    files: Iterable[Path],
) -> PublishedExecution:
    place = _descriptor_of(workflow, list(descriptors))
    descriptor = _read(_Descriptor, place)
    invocations = tuple(sorted(workflow.invocations))
    records = {name: _read(_Provenance, provenances[name]) for name in invocations}
    for name, record in records.items():
        if record.summary.name not in {"", descriptor.name}:
            raise ConfigurationError(
                f"{name} is a job of {record.summary.name}, the descriptor is {descriptor.name}'s."
            )
    outputs: dict[str, str | None] = {}
    for record in records.values():
        for file in record.output.files.values():
            outputs |= dict(_told(file))
    file_inputs = {
        key for one in descriptor.inputs if one.type == "File" for key in (one.id, one.name) if key in given.inputs
    }
    return PublishedExecution(
        workflow_id=workflow.identifier,
        pipeline_id=f"{descriptor.name}/{descriptor.version}",
        provider=given.provider,
        inputs=given.inputs,
        file_inputs=frozenset(file_inputs),
        input_digests=_input_digests(records.values()),
        outputs=outputs,
        places=_published(invocations, outputs, files),
        invocations=invocations,
        failed=tuple(name for name, record in records.items() if record.output.exit_code not in {0, None}),
        descriptor=json.loads(place.read_bytes()),
    )


def _descriptor_of(workflow: _Workflow, descriptors: list[Path]) -> Path:
    wanted = PurePosixPath(workflow.descriptor or "").name
    for candidates in (
        [file for file in descriptors if workflow.identifier in file.parts[-3:]],
        [file for file in descriptors if file.name == wanted],
        descriptors,
    ):
        if candidates and len({digest(file) for file in candidates}) == 1:
            return candidates[0]
    what = "no Boutiques descriptor" if not descriptors else "several Boutiques descriptors"
    raise ConfigurationError(f"There is {what} for {workflow.identifier}, so it is not known what ran.")


def _input_digests(records: Iterable[_Provenance]) -> dict[str, dict[str, frozenset[str]]]:
    found: dict[str, dict[str, frozenset[str]]] = {}
    for record in records:
        for parameter, value in record.invocation.items():
            for file in _files_in(value):
                known = found.setdefault(parameter, {})
                known[file.name] = known.get(file.name, frozenset()) | ({file.md5} if file.md5 else set())
    return found


def _files_in(value: JsonValue) -> Iterator[_File]:
    """The files of an input value: one, a list of them, or none."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict) and "file-name" in one:
            file = _File.model_validate(one)
            yield file
            yield from file.files or ()


def _told(file: _File, above: str = "") -> Iterator[tuple[str, str | None]]:
    """Name and MD5 of an output, and of all files in one that is a folder."""
    if PurePosixPath(file.name).name != file.name or file.name in {"", ".", ".."} or "\\" in file.name:
        raise UnsafeContent(f"A provenance names the output {file.name[:200]!r}, which is no name of a file. Refused.")
    name = above + file.name
    if file.not_found:
        return
    if file.files is None:
        yield name, file.md5
    for inner in file.files or ():
        yield from _told(inner, f"{name}/")


def _published(invocations: Iterable[str], outputs: Iterable[str], files: Iterable[Path]) -> dict[str, Path]:
    """Where the bundle has the outputs: below the folders of the jobs."""
    places: dict[str, Path] = {}
    wanted, jobs = set(outputs), set(invocations)
    for file in files:
        for position in [number for number, part in enumerate(file.parts) if part in jobs]:
            name = "/".join(file.parts[position + 1 :])
            if name in wanted:
                places[name] = file
    return places


# -- the files of a bundle -------------------------------------------------------------------------------------------


def _unpacked(archive: Path, workspace: Path) -> Path:
    if not is_archive(archive):
        raise ConfigurationError(f"{archive} is neither a folder nor an archive.")
    folder = workspace / digest(archive)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpack(archive, folder)
    return folder


def _archives(folder: Path) -> list[Path]:
    """Packed folders of executions and jobs, which lie at the top; outputs that are archives lie deeper."""
    return sorted(file for file in folder.glob("*") if file.is_file() and is_archive(file))


def _named(folder: Path, name: str) -> list[Path]:
    return sorted((file for file in _files(folder) if file.name == name), key=lambda file: len(file.parts))


def _files(folder: Path) -> list[Path]:
    base = folder.resolve()
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.resolve().is_relative_to(base))


def _is(file: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with certain keys."""
    if file.suffix != ".json" or file.stat().st_size > _MAX_BYTES:
        return False
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and keys <= set(content)


def _read(shape: type[Shape], file: Path) -> Shape:
    if file.stat().st_size > _MAX_BYTES:
        raise UnsafeContent(f"{file} has more than {_MAX_BYTES} bytes. Refused.")
    try:
        return shape.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = Counter(".".join(map(str, one["loc"])) or "the file" for one in error.errors())
        raise ConfigurationError(f"{file} is not what VIP writes: {', '.join(wrong)}.") from None
