"""From what the user typed to what the platform understands, with all problems found before anything is sent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path, PurePosixPath

from prefect_biomed.clients.errors import (
    AuthenticationError,
    BiomedError,
    PermissionDeniedError,
    PlatformError,
    PreflightFailed,
    is_transient,
)
from prefect_biomed.clients.texts import logger_of
from prefect_biomed.clients.vip.bids import PREFIX
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.errors import GenericVipError
from prefect_biomed.clients.vip.girder import girder_path
from prefect_biomed.clients.vip.girder_sessions import check_outputs, check_vip_key, girder_of
from prefect_biomed.clients.vip.local_files import InputFolder, LocalFile, stored_name
from prefect_biomed.clients.vip.models import (
    InputValue,
    Parameter,
    ParameterType,
    Pipeline,
    Scalar,
    VipSession,
)
from prefect_biomed.clients.vip.remote_files import list_folder_or_nothing
from prefect_biomed.clients.vip.values import INT64, as_written, from_json, shown

__all__ = ["LocalFile", "Preflight", "preflight", "stored_name"]

logger = logger_of(__name__)

_ALLOWED = re.compile(r"[0-9A-Za-z.,\-+@/_(): \[\]?&=]")
_STORAGE = re.compile(r"^[A-Za-z][0-9A-Za-z_-]*:[^/\\]")
_LIST_SEPARATOR = "@@"
_DIGITS = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_RESULTS_DIRECTORY = "results-directory"


@dataclass(frozen=True)
class Preflight:
    """What a session will send, all checks passed.

    Attributes:
        files: Files to upload.
        folders: Folders they lie in, relative to the input folder, parents first.
        input_values: Values by parameter key, files as paths on the platform or as `<storage>:<file id>`.
        jobs: Number of jobs one run will have.
        girder_paths: Those of the values that name files on Girder, by path.
        left_out: What lies in the input folder and is not sent, because it belongs to sessions.
        include: Patterns of the files to upload that it was made with.
        exclude: Patterns of files not to upload that it was made with.
        required_outputs: Names of the outputs that every successful run has; None when that cannot be told.
        undescribed: What cannot be promised because the descriptor of the pipeline cannot be read; None for nothing.
        without_record: What cannot be promised because the session file is not kept beside the outputs; None for
            nothing.
    """

    files: tuple[LocalFile, ...]
    folders: tuple[str, ...]
    input_values: dict[str, InputValue]
    jobs: int
    girder_paths: dict[str, InputValue] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    required_outputs: tuple[str, ...] | None = ()
    undescribed: str | None = None
    without_record: str | None = None

    @property
    def renamed(self) -> dict[str, str]:
        """What the files are called on the platform that have other names here, by these."""
        return {file.local_name: file.name for file in self.files if file.name != file.local_name}

    @property
    def girder_inputs(self) -> dict[str, InputValue]:
        """Those of the values that name files on Girder, as sent."""
        return {name: self.input_values[name] for name in self.girder_paths}

    @property
    def settings(self) -> dict[str, InputValue]:
        """What the session file records: values as sent, but files on Girder by path, as vip-client does."""
        return self.input_values | self.girder_paths

    @property
    def bytes(self) -> int:
        """Sum of the sizes of the files."""
        return sum(file.size for file in self.files)


def preflight(
    client: VipClient,
    session: VipSession,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_jobs: int = 1000,
    inputs_uploaded: bool = False,
) -> Preflight:
    """Check everything that can be checked before the first byte is sent. Only reads; safe to repeat.

    Args:
        client: The account.
        session: The session.
        include: Patterns of files to upload, relative to the input folder; all when empty.
        exclude: Patterns of files not to upload.
        max_jobs: The platform's limit of jobs in one workflow.
        inputs_uploaded: Whether the inputs must be on the platform already; the input folder is then not looked at.

    Returns:
        What will be sent.

    Raises:
        PreflightFailed: With all problems at once.
        AuthenticationError: The key was refused.
    """
    folder: InputFolder | None = None
    if session.input_dir is not None and not inputs_uploaded:
        folder = InputFolder(session.input_dir, session.output_dir, client.profile, include, exclude)
    problems = folder.problems if folder else []
    if not inputs_uploaded:
        problems += _check_home(client, session)
    values: dict[str, InputValue] = {}
    named: dict[str, InputValue] = {}
    outputs: tuple[str, ...] | None = ()
    undescribed: str | None = None
    jobs = 0
    empty_folders: set[str] = set()
    uses_girder = session.girder_output_dir is not None
    if uses_girder:
        problems += check_outputs(client, session)
    if session.pipeline_id is not None:
        pipeline = _pipeline(client, session.pipeline_id, problems)
        if pipeline is not None:
            check = _Settings(client, session, pipeline, folder, problems)
            values = check.resolve()
            jobs = check.jobs(max_jobs)
            named = check.girder_paths
            empty_folders = check.empty_folders
            outputs = pipeline.told_outputs
            undescribed = _undescribed(client, pipeline)
            uses_girder = uses_girder or check.uses_girder
    if uses_girder:
        problems += check_vip_key(client)
    if problems:
        raise PreflightFailed(f"Session {session.session_name!r}", problems)
    files, left_out = (folder.files, folder.left_out) if folder else ((), ())
    folders = sorted({*(folder.folders if folder else ()), *empty_folders})
    return Preflight(
        tuple(files),
        tuple(folders),
        values,
        jobs,
        named,
        tuple(left_out),
        tuple(include),
        tuple(exclude),
        outputs,
        undescribed,
        _without_record(session),
    )


def _pipeline(client: VipClient, identifier: str, problems: list[str]) -> Pipeline | None:
    """The pipeline that was asked for, and no other; None when there is a problem with it."""
    if not identifier.strip():
        problems.append(f"pipeline_id is {identifier!r}. Give the pipeline to run, as vip_show_pipeline lists it.")
        return None
    try:
        pipeline = client.pipeline(identifier)
    except AuthenticationError:
        raise
    except (PlatformError, PermissionDeniedError) as error:
        if error.transient:
            raise
        problems.append(str(error))
        return None
    if pipeline.identifier != identifier:
        problems.append(f"pipeline_id is {identifier!r}, which the platform calls {pipeline.identifier!r}. Write that.")
        return None
    return pipeline


def _undescribed(client: VipClient, pipeline: Pipeline) -> str | None:
    """Say what needs a descriptor that cannot be read."""
    if pipeline.undescribed is None:
        return None
    lost = []
    if client.profile.makes_jobs_of_lists:
        lost.append("lists are taken to be combined every with every, and a number to be one value")
    if pipeline.told_outputs is None:
        lost.append("a run that ends without an output is not told from one that has all")
    if not lost:
        return None
    return (
        f"The Boutiques descriptor of {pipeline.identifier} cannot be read ({pipeline.undescribed}). So "
        f"{'; and '.join(lost)}. Look at the pipeline on the portal, or ask the platform's support."
    )


def _without_record(session: VipSession) -> str | None:
    """Say what needs a record that there will not be."""
    match session.backup:
        case "local":
            return None
        case "vip":
            return (
                "The session file is kept on the platform and goes with the outputs. Once the session is finished, "
                f"only who has {session.output_dir} can tell which files it fetched."
            )
        case _:
            return (
                f"No session file is kept. Only who has {session.output_dir}, with what is hidden in it, can resume "
                "the session or remove it from the platform."
            )


def _check_home(client: VipClient, session: VipSession) -> list[str]:
    """Find out whether the account may use the folder that holds the folders of sessions."""
    home = str(PurePosixPath(session.vip_dir).parent)
    try:
        client.exists(home)
    except AuthenticationError:
        raise
    except PlatformError as error:
        if is_transient(error) and not isinstance(error, GenericVipError):
            raise
        return [f"The account may not use vip_home {home}: {error} Give another folder on the platform."]
    return []


@dataclass
class _Settings:
    """The checks of `input_settings` against one pipeline."""

    client: VipClient
    session: VipSession
    pipeline: Pipeline
    folder: InputFolder | None
    problems: list[str]
    empty_folders: set[str] = field(default_factory=set)
    _remote_folders: dict[str, dict[str, int | None]] = field(default_factory=dict)
    _values: dict[str, InputValue] = field(default_factory=dict)
    girder_paths: dict[str, InputValue] = field(default_factory=dict)
    uses_girder: bool = False

    @cached_property
    def _stored_names(self) -> frozenset[str]:
        """What will be on the platform below the input folder when the upload is done."""
        if self.folder is None:
            return frozenset()
        return frozenset((*(file.name for file in self.folder.files), *self.folder.folders))

    @cached_property
    def _folder_now(self) -> InputFolder | None:
        """The input folder as it is after the upload, to find out what a value names in it."""
        folder = self.session.input_dir
        if folder is None or not folder.is_dir():
            return None
        return InputFolder(folder, self.session.output_dir, self.client.profile)

    def resolve(self) -> dict[str, InputValue]:
        parameters = {parameter.key: parameter for parameter in self.pipeline.inputs}
        # Nothing, for a parameter that may be left out, is the same as leaving it out.
        settings = {
            name: value
            for name, value in self.session.input_settings.items()
            if value is not None or name not in parameters or parameters[name].is_required
        }
        if _RESULTS_DIRECTORY in settings:
            self.problems.append(f"{_RESULTS_DIRECTORY!r} is set for each run; take it out of input_settings.")
        missing = [p.key for p in parameters.values() if p.is_required and p.key not in settings]
        for name in missing:
            self.problems.append(f"{name!r} is missing: {_expected(parameters[name])}.")
        for name in sorted(settings.keys() - parameters.keys() - {_RESULTS_DIRECTORY}):
            known = ", ".join(sorted(parameters)) or "none"
            self.problems.append(f"{self.pipeline.identifier} has no parameter {name!r}. It has: {known}.")
        for name, parameter in parameters.items():
            if name not in settings:
                continue
            try:
                given = self._read_as_list(parameter, settings[name])
            except ValueError as error:
                self.problems.append(f"{name!r}: {error}.")
            else:
                self._values[name] = self._resolve(parameter, given)
        return self._values

    def _read_as_list(self, parameter: Parameter, value: InputValue) -> InputValue:
        """Read a list that was given as JSON text, as forms do; what takes a text gets the text."""
        if parameter.type is ParameterType.STRING or not isinstance(value, str) or not value.strip().startswith("["):
            return value
        if self._local(value) is not None:
            return value
        try:
            elements = from_json(value)
        except json.JSONDecodeError:
            return value
        written: list[Scalar | None] = as_written(elements)
        return written

    def jobs(self, limit: int) -> int:
        """Count the jobs: lists are combined every with every, zipped ones element by element."""
        if not self.client.profile.makes_jobs_of_lists:
            return 1
        lengths = {name: length for name in self._values if (length := self._length(name)) != 1}
        if self.pipeline.undescribed is not None and len(lengths) > 1:
            told = ", ".join(f"{name} has {length}" for name, length in sorted(lengths.items()))
            self.problems.append(
                f"It is not known how many jobs these lists make, every value with every other or element by element: "
                f"{told}. The Boutiques descriptor of {self.pipeline.identifier} would tell and cannot be read "
                f"({self.pipeline.undescribed}). Try again later, or give one list and launch the rest by itself."
            )
        zipped = {name: lengths.get(name, 1) for name in self.pipeline.dot_parameters if name in self._values}
        if len(set(zipped.values())) > 1:
            told = ", ".join(f"{name} has {length}" for name, length in sorted(zipped.items()))
            self.problems.append(f"These lists are combined element by element and need equal lengths: {told}.")
        crossed = [length for name, length in lengths.items() if name not in zipped]
        jobs = math.prod(crossed) * max(zipped.values(), default=1)
        if jobs > limit:
            told = ", ".join(f"{name} has {length}" for name, length in sorted(lengths.items()))
            self.problems.append(f"The settings make {jobs} jobs, the limit is {limit}: {told}. Split the lists.")
        return jobs

    def _length(self, name: str) -> int:
        """Number of values; VIP reads some numbers N as 0 … N-1."""
        value = self._values[name]
        elements: Iterable[Scalar | None] = value if isinstance(value, list) else [value]
        if name not in self.pipeline.counted_parameters or value is None or value == []:
            return len(list(elements))
        try:
            (number,) = (int(str(element)) for element in elements)
        except ValueError:
            number = 0
        if number < 1:
            self.problems.append(
                f"{name!r} is {value!r}: expected is one whole number above 0, of which VIP makes a list."
            )
        return max(number, 1)

    def _resolve(self, parameter: Parameter, value: InputValue) -> InputValue:
        if not self.client.profile.makes_jobs_of_lists:
            # Elsewhere than on VIP a list is one value of one job.
            if parameter.type is ParameterType.LIST and not isinstance(value, list):
                value = [value]
            elif parameter.type is not ParameterType.LIST and isinstance(value, list):
                self.problems.append(
                    f"{parameter.key!r} is a list: {_expected(parameter)}. Only VIP makes parallel jobs of lists; "
                    "launch the values one by one."
                )
                return None
        if not isinstance(value, list):
            return self._value(parameter, value)
        if not value:
            self.problems.append(f"{parameter.key!r} is an empty list.")
        resolved: list[Scalar | None] = []
        for item in value:
            found = self._value(parameter, item)
            resolved += found if isinstance(found, list) else [] if found is None else [found]
        if len(resolved) > 1 and self.client.profile.takes_text:
            self.problems += [
                f"{parameter.key!r} has {shown(one)} in a list: VIP takes an '@' at an end for a part of its own "
                f"separator {_LIST_SEPARATOR}. Launch this value by itself."
                for one in resolved
                if isinstance(one, str) and one[:1] + one[-1:] != one[:1].strip("@") + one[-1:].strip("@")
            ]
        return resolved

    def _value(self, parameter: Parameter, value: Scalar | None) -> InputValue:
        if (parameter.is_file or parameter.may_be_file) and not self._is_here(value):
            # Where no storage is mounted, there may be a folder of this name.
            explicit = self.client.profile.mounts_storages or str(value).startswith("girder:")
            if explicit and (path := girder_path(value)) is not None:
                return self._on_girder(parameter.key, path)
            if self.client.girder and str(value).startswith(f"{self.client.girder.storage_id}:"):
                self.uses_girder = True
        return self._scalar(parameter, value)

    def _on_girder(self, name: str, path: str) -> InputValue:
        given = self.session.input_settings[name]
        self.girder_paths[name] = (
            [girder_path(item) or item for item in given] if isinstance(given, list) else girder_path(given)
        )
        try:
            girder = girder_of(self.client)
            self.uses_girder = True
            found = girder.input_files(path)
        except BiomedError as error:
            if is_transient(error):
                raise
            self.problems.append(f"{name!r}: {path}: {error}")
            return None
        return girder.location(found) if isinstance(found, str) else [girder.location(one) for one in found]

    def _scalar(self, parameter: Parameter, value: Scalar | None) -> Scalar | None:
        name = parameter.key
        if value is None or (isinstance(value, str) and not value.strip()):
            self.problems.append(f"{name!r} has no value ({value!r}): {_expected(parameter)}, or leave it out.")
            return None
        if not isinstance(value, str) and (_is_beyond(value) or not math.isfinite(value)):
            self._refuse(parameter, value)
            return None
        if parameter.is_file or (parameter.may_be_file and isinstance(value, str) and self._written_as_path(value)):
            if not isinstance(value, str):
                self._refuse(parameter, value)
                return None
            if parameter.type is ParameterType.LIST and not self.client.profile.makes_jobs_of_lists:
                self.problems.append(f"{name!r} lists files, which only VIP understands. Launch them one by one.")
                return None
            resolved: Scalar | None = self._file(name, value)
        else:
            resolved = self._typed(parameter, value)
        if isinstance(resolved, str) and self.client.profile.takes_text:
            self._check_text(name, value, resolved)
        return resolved

    def _check_text(self, name: str, value: Scalar, sent: str) -> None:
        """Find what VIP would refuse, or change without a word."""
        if wrong := sorted(set(_ALLOWED.sub("", sent))):
            self.problems.append(
                f"{name!r} has characters VIP refuses in {value!r}: {' '.join(map(repr, wrong))}. "
                "Allowed are letters, digits, space and . , - + @ / _ ( ) : [ ] ? & ="
            )
        elif _LIST_SEPARATOR in sent:
            self.problems.append(
                f"{name!r} is {shown(value)}: VIP makes two values of what has {_LIST_SEPARATOR} in it. Give a list, "
                "or another name to a file."
            )
        elif sent != sent.strip():
            self.problems.append(f"{name!r} is {shown(value)}: VIP drops spaces at the ends. Take them away.")

    def _typed(self, parameter: Parameter, value: Scalar) -> Scalar | None:
        takes_text = self.client.profile.takes_text
        try:
            match parameter.type:
                case ParameterType.BOOLEAN:
                    truth = {"true": True, "false": False}[str(value).lower()]
                    # VIP takes text, others insist on JSON's own types.
                    return str(truth).lower() if takes_text else truth
                case ParameterType.INT64:
                    return _whole_number(value)
                case ParameterType.DOUBLE:
                    return _number(value, takes_text=takes_text)
                case ParameterType.STRING if not takes_text:
                    return str(value).lower() if isinstance(value, bool) else str(value)
                case _:
                    return value
        except (ValueError, KeyError):
            self._refuse(parameter, value)
            return None

    def _refuse(self, parameter: Parameter, value: Scalar) -> None:
        what = f"{parameter.key!r} is {shown(value)}: {_expected(parameter)}"
        self.problems.append(f"{what}, not of type {type(value).__name__}.")

    # -- values that are paths -----------------------------------------------------------------------------------------

    def _written_as_path(self, value: str) -> bool:
        """Only what is written as a path is one; a word that happens to name a file stays a word."""
        if value.startswith(("/", "./")) or _STORAGE.match(value):
            return True
        return "/" in value and self._local(value) is not None

    def _file(self, name: str, value: str) -> str | None:
        # What is here wins over anything that the value may mean elsewhere.
        if (local := self._local(value)) is not None:
            return self.session.vip_input_dir if local == "." else f"{self.session.vip_input_dir}/{local}"
        if value.startswith(PREFIX):
            self.problems.append(
                f"{name!r} is {value!r}, which was not answered. Give it by itself or as an element of a list, not in "
                "a JSON text; without a flow, `with_bids_files` answers it."
            )
            return None
        if _STORAGE.match(value):
            return value
        if not value.startswith(self.client.profile.files_root):
            self.problems.append(f"{name!r}: {self._lost(value)}")
            return None
        uploaded = value.removeprefix(self.session.vip_input_dir + "/")
        on_its_way = uploaded in self._stored_names or (self.folder and value == self.session.vip_input_dir)
        if not on_its_way and not self._on_platform(value):
            was_input = self.folder is None and self.session.input_dir is not None and uploaded != value
            told = self._lost(value) if was_input else f"{value} does not exist on the platform."
            self.problems.append(f"{name!r}: {told}")
            return None
        return value

    def _lost(self, value: str) -> str:
        """Say where a file was looked for in vain."""
        session = self.session
        if session.input_dir is None:
            return f"there is no input_dir in which the file {value!r} could be. Give one, or a path on the platform."
        if self.folder is not None:
            return f"the file {value!r} is not in the input folder {session.input_dir}."
        return (
            f"the file {value!r} is not on the platform, in {session.vip_input_dir}. It was removed since the upload, "
            f"or was not to be sent. vip_session with session_name={session.session_name!r} sends what is missing."
        )

    def _is_here(self, value: Scalar | None) -> bool:
        """Whether a value that looks like the name of something elsewhere is a file of the input folder."""
        return isinstance(value, str) and ":" in value and self._local(value) is not None

    def _local(self, value: str) -> str | None:
        """The stored name of what a value names in the input folder, `.` for the folder itself."""
        if self.folder is not None:
            found = self.folder.find(value)
            if found is not None and found not in {".", *self._stored_names}:
                # VIP can have a folder with nothing in it, but nobody would make it.
                self.empty_folders.update(_with_parents(found))
            return found
        if self.session.input_dir is None:
            return None
        for stored in self._lexical(value, self.session.input_dir):
            if self._is_uploaded(stored):
                return stored
        found = self._folder_now.find(value) if self._folder_now else None
        return found if found is not None and self._is_uploaded(found) else None

    def _is_uploaded(self, stored: str) -> bool:
        return self._on_platform(str(PurePosixPath(self.session.vip_input_dir, stored)))

    def _lexical(self, value: str, folder: Path) -> Iterator[str]:
        """What a value may be called, going by its words alone, when its file is here no more."""
        if value.startswith("girder:/"):
            return
        for candidate in (folder / value, Path(value).absolute()):
            if candidate.is_relative_to(folder.absolute()) and ".." not in candidate.parts:
                parts = candidate.relative_to(folder.absolute()).parts
                yield "/".join(stored_name(part, self.client.profile) for part in parts) or "."

    def _on_platform(self, path: str) -> bool:
        folder, _, name = path.rstrip("/").rpartition("/")
        if folder not in self._remote_folders:
            self._remote_folders[folder] = list_folder_or_nothing(self.client, folder)
        return name in self._remote_folders[folder]


def _expected(parameter: Parameter) -> str:
    words = {
        ParameterType.FILE: "a file in the input folder or on the platform",
        ParameterType.BOOLEAN: "true or false",
        ParameterType.INT64: "a whole number of at most 64 bits",
        ParameterType.DOUBLE: "a number",
        ParameterType.LIST: "a list",
    }
    return f"expected is {words.get(parameter.type, 'a text')}"


def _is_beyond(value: float) -> bool:
    return isinstance(value, int) and value not in INT64


def _whole_number(value: Scalar) -> int:
    """Read a whole number, in digits and not in all the ways that Python knows."""
    if isinstance(value, str):
        if not _DIGITS.fullmatch(value.strip()):
            raise ValueError
        value = int(value)
    if isinstance(value, bool) or value != int(value) or _is_beyond(int(value)):
        raise ValueError
    return int(value)


def _number(value: Scalar, *, takes_text: bool) -> int | float | str:
    if isinstance(value, bool):
        raise ValueError
    if not isinstance(value, str):
        return value
    text = value.strip()
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError
    if _DIGITS.fullmatch(text) and not _is_beyond(int(text)):
        return int(text)
    if Decimal(repr(float(text))) == Decimal(text):
        return float(text)
    if not takes_text:
        raise ValueError
    return text


def _with_parents(path: str) -> list[str]:
    return [path, *(parent.as_posix() for parent in PurePosixPath(path).parents if parent.name)]
