"""From what the user typed to what the platform understands, with all problems found before anything is sent."""

from __future__ import annotations

import logging
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
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
from prefect_biomed.clients.vip.client import VipClient
from prefect_biomed.clients.vip.girder import girder_path
from prefect_biomed.clients.vip.girder_sessions import check_outputs, check_vip_key, girder_of
from prefect_biomed.clients.vip.models import (
    InputValue,
    Parameter,
    ParameterType,
    Pipeline,
    Scalar,
    VipSession,
)
from prefect_biomed.clients.vip.profiles import VIP, Profile
from prefect_biomed.clients.vip.remote_files import list_folder_or_nothing

__all__ = ["LocalFile", "Preflight", "preflight", "stored_name"]

logger = logging.getLogger(__name__)

_ALLOWED = re.compile(r"[0-9A-Za-z.,\-+@/_(): \[\]?&=]")
_STORAGE = re.compile(r"^[A-Za-z][0-9A-Za-z_-]*:[^/\\]")
_LIST_SEPARATOR = "@@"
_RESULTS_DIRECTORY = "results-directory"


@dataclass(frozen=True)
class LocalFile:
    """A file to upload.

    Attributes:
        path: The local file.
        name: Path relative to the input folder as it is stored on the platform.
        local_name: The same as it is here.
        size: Bytes.
        mtime_ns: Modification time in nanoseconds.
    """

    path: Path
    name: str
    local_name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Preflight:
    """What a session will send, all checks passed.

    Attributes:
        files: Files to upload.
        folders: Folders they lie in, relative to the input folder, parents first.
        input_values: Values by parameter key, files as paths on the platform or as `<storage>:<file id>`.
        jobs: Number of jobs one run will have.
        girder_paths: Those of the values that name files on Girder, by path.
    """

    files: tuple[LocalFile, ...]
    folders: tuple[str, ...]
    input_values: dict[str, InputValue]
    jobs: int
    girder_paths: dict[str, InputValue] = field(default_factory=dict)

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


def stored_name(name: str, profile: Profile = VIP) -> str:
    """Tell what a file or folder is called once VIP has stored it.

    Args:
        name: One path component.
        profile: The ways of the platform; not all rename.

    Returns:
        The name trimmed, with `_` for spaces and without what is not ASCII.
    """
    if not profile.renames_files:
        return name
    name = name.strip().replace(" ", "_")
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


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
    problems: list[str] = []
    files: tuple[LocalFile, ...] = ()
    folders: tuple[str, ...] = ()
    if session.input_dir is not None and not inputs_uploaded:
        files, folders = _scan(session.input_dir, include, exclude, client.profile, problems)
    values: dict[str, InputValue] = {}
    named: dict[str, InputValue] = {}
    jobs = 0
    uses_girder = session.girder_output_dir is not None
    if uses_girder:
        problems += check_outputs(client, session)
    if session.pipeline_id is not None:
        try:
            pipeline = client.pipeline(session.pipeline_id)
        except AuthenticationError:
            raise
        except (PlatformError, PermissionDeniedError) as error:
            if error.transient:
                raise
            problems.append(str(error))
        else:
            check = _Settings(client, session, pipeline, files, folders, inputs_uploaded, problems)
            values = check.resolve()
            jobs = check.jobs(max_jobs)
            named = check.girder_paths
            uses_girder = uses_girder or check.uses_girder
    if uses_girder:
        problems += check_vip_key(client)
    if problems:
        raise PreflightFailed(f"Session {session.session_name!r}", problems)
    return Preflight(files, folders, values, jobs, named)


def _scan(
    folder: Path, include: Sequence[str], exclude: Sequence[str], profile: Profile, problems: list[str]
) -> tuple[tuple[LocalFile, ...], tuple[str, ...]]:
    if not folder.is_dir():
        problems.append(f"The input folder {folder} does not exist.")
        return (), ()
    files: list[LocalFile] = []
    owner: dict[str, str] = {}
    folders: set[str] = set()
    for root, subfolders, names in os.walk(folder, followlinks=True, onerror=lambda e: problems.append(_unreadable(e))):
        subfolders[:] = [
            name for name in sorted(subfolders) if not _leads_back(Path(root, name), folder, exclude, problems)
        ]
        for name in sorted(names):
            path = Path(root, name)
            local_name = path.relative_to(folder).as_posix()
            if not _selected(local_name, include, exclude):
                continue
            stored = "/".join(stored_name(part, profile) for part in PurePosixPath(local_name).parts)
            if any(not part for part in stored.split("/")):
                problems.append(f"{local_name!r} has no character the platform can store. Rename it.")
                continue
            if stored in owner:
                problems.append(f"{owner[stored]!r} and {local_name!r} would both be stored as {stored!r}. Rename one.")
                continue
            owner[stored] = local_name
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    # Opening a pipe would wait for its other end for ever.
                    problems.append(f"{local_name!r} is neither a file nor a folder. Exclude it.")
                    continue
                with path.open("rb"):
                    pass
            except OSError as error:
                problems.append(_unreadable(error))
                continue
            if status.st_size == 0 and not profile.stores_empty_files:
                problems.append(f"{local_name!r} is empty; VIP cannot store empty files. Exclude it or fill it.")
                continue
            files.append(LocalFile(path, stored, local_name, status.st_size, status.st_mtime_ns))
            folders.update(parent.as_posix() for parent in PurePosixPath(stored).parents if parent.name)
    problems.extend(
        f"{owner[stored]!r} and a folder would both be stored as {stored!r}. Rename one."
        for stored in sorted(folders & owner.keys())
    )
    if not files and not problems:
        filtered = " that the include and exclude patterns let through" if include or exclude else ""
        problems.append(f"The input folder {folder} holds no file{filtered}.")
    return tuple(files), tuple(sorted(folders))


def _leads_back(path: Path, folder: Path, exclude: Sequence[str], problems: list[str]) -> bool:
    """Whether a folder is a link to one it lies in, which would never end; a problem unless it is excluded."""
    if not path.is_symlink() or not path.parent.resolve().is_relative_to(path.resolve()):
        return False
    name = path.relative_to(folder).as_posix()
    if _selected(name, (), exclude):
        problems.append(f"{name!r} is a link to a folder it lies in. Exclude it.")
    return True


def _unreadable(error: OSError) -> str:
    return f"{error.filename} cannot be read: {error.strerror}."


def _selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) or PurePosixPath(name).match(pattern) for pattern in patterns)

    return (not include or matches(include)) and not matches(exclude)


@dataclass
class _Settings:
    """The checks of `input_settings` against one pipeline."""

    client: VipClient
    session: VipSession
    pipeline: Pipeline
    files: tuple[LocalFile, ...]
    folders: tuple[str, ...]
    inputs_uploaded: bool
    problems: list[str]
    _remote_folders: dict[str, dict[str, int | None]] = field(default_factory=dict)
    _values: dict[str, InputValue] = field(default_factory=dict)
    girder_paths: dict[str, InputValue] = field(default_factory=dict)
    uses_girder: bool = False

    @cached_property
    def _local_names(self) -> frozenset[str]:
        return frozenset(file.local_name for file in self.files)

    @cached_property
    def _stored_names(self) -> frozenset[str]:
        return frozenset((*(file.name for file in self.files), *self.folders))

    def resolve(self) -> dict[str, InputValue]:
        parameters = {parameter.key: parameter for parameter in self.pipeline.inputs}
        settings = self.session.input_settings
        if _RESULTS_DIRECTORY in settings:
            self.problems.append(f"{_RESULTS_DIRECTORY!r} is set for each run; take it out of input_settings.")
        missing = [p.key for p in parameters.values() if p.is_required and p.key not in settings]
        for name in missing:
            self.problems.append(f"{name!r} is missing: {_expected(parameters[name])}.")
        for name in sorted(settings.keys() - parameters.keys() - {_RESULTS_DIRECTORY}):
            known = ", ".join(sorted(parameters)) or "none"
            self.problems.append(f"{self.pipeline.identifier} has no parameter {name!r}. It has: {known}.")
        for name, parameter in parameters.items():
            if name in settings:
                self._values[name] = self._resolve(parameter, settings[name])
        return self._values

    def jobs(self, limit: int) -> int:
        """Count the jobs: lists are combined every with every, zipped ones element by element."""
        if not self.client.profile.makes_jobs_of_lists:
            return 1
        lengths = {name: length for name in self._values if (length := self._length(name)) != 1}
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
        """Number of values: VIP reads `a@@b` as a list of two, and some numbers N as 0 … N-1."""
        value = self._values[name]
        elements: Iterable[Scalar | None] = value if isinstance(value, list) else [value]
        if name not in self.pipeline.counted_parameters or value is None or value == []:
            return sum(str(element).count(_LIST_SEPARATOR) + 1 for element in elements)
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
        return resolved

    def _value(self, parameter: Parameter, value: Scalar | None) -> InputValue:
        if parameter.is_file or parameter.may_be_file:
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
        if parameter.is_file or (parameter.may_be_file and isinstance(value, str) and self._written_as_path(value)):
            if not isinstance(value, str):
                self.problems.append(f"{name!r} is {value!r}: {_expected(parameter)}.")
                return None
            if parameter.type is ParameterType.LIST and not self.client.profile.makes_jobs_of_lists:
                self.problems.append(f"{name!r} lists files, which only VIP understands. Launch them one by one.")
                return None
            resolved: Scalar | None = self._file(name, value)
        else:
            resolved = self._typed(parameter, value)
        if not self.client.profile.takes_text:
            return resolved
        if isinstance(resolved, str) and (wrong := sorted(set(_ALLOWED.sub("", resolved)))):
            self.problems.append(
                f"{name!r} has characters VIP refuses in {value!r}: {' '.join(map(repr, wrong))}. "
                "Allowed are letters, digits, space and . , - + @ / _ ( ) : [ ] ? & ="
            )
        return resolved

    def _typed(self, parameter: Parameter, value: Scalar) -> Scalar | None:
        try:
            match parameter.type:
                case ParameterType.BOOLEAN:
                    truth = {"true": True, "false": False}[str(value).lower()]
                    # VIP takes text, others insist on JSON's own types.
                    return str(truth).lower() if self.client.profile.takes_text else truth
                case ParameterType.INT64:
                    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                        raise ValueError
                    return int(value)
                case ParameterType.DOUBLE:
                    if isinstance(value, bool) or not math.isfinite(float(value)):
                        raise ValueError
                    return value if isinstance(value, int) else float(value)
                case ParameterType.STRING if not self.client.profile.takes_text:
                    return str(value).lower() if isinstance(value, bool) else str(value)
                case _:
                    return value
        except (ValueError, KeyError):
            self.problems.append(f"{parameter.key!r} is {value!r}: {_expected(parameter)}.")
            return None

    def _written_as_path(self, value: str) -> bool:
        """Only what is written as a path is one; a word that happens to name a file stays a word."""
        if value.startswith(("/", "./")) or _STORAGE.match(value):
            return True
        return "/" in value and self._local(value) is not None

    def _file(self, name: str, value: str) -> str | None:
        if _STORAGE.match(value):
            return value
        if (local := self._local(value)) is not None:
            return f"{self.session.vip_input_dir}/{local}"
        if not value.startswith(self.client.profile.files_root):
            self.problems.append(f"{name!r}: the file {value!r} is not in the input folder {self.session.input_dir}.")
            return None
        uploaded = value.removeprefix(self.session.vip_input_dir + "/")
        on_its_way = not self.inputs_uploaded and uploaded in self._stored_names
        if not on_its_way and not self._on_platform(value):
            self.problems.append(f"{name!r}: {value} does not exist on the platform.")
            return None
        return value

    def _local(self, value: str) -> str | None:
        """The stored name of a local file, named relative to the input folder, absolutely, or from here."""
        if self.session.input_dir is None:
            return None
        for candidate in (self.session.input_dir / value, Path(value)):
            try:
                relative = Path(os.path.normpath(candidate.absolute())).relative_to(
                    Path(os.path.normpath(self.session.input_dir.absolute()))
                )
            except ValueError:
                continue
            stored = "/".join(stored_name(part, self.client.profile) for part in relative.parts)
            if relative.as_posix() in self._local_names or stored in self.folders:
                return stored
            if self.inputs_uploaded and self._on_platform(f"{self.session.vip_input_dir}/{stored}"):
                return stored
        return None

    def _on_platform(self, path: str) -> bool:
        folder, _, name = path.rstrip("/").rpartition("/")
        if folder not in self._remote_folders:
            self._remote_folders[folder] = list_folder_or_nothing(self.client, folder)
        return name in self._remote_folders[folder]


def _expected(parameter: Parameter) -> str:
    words = {
        ParameterType.FILE: "a file in the input folder or on the platform",
        ParameterType.BOOLEAN: "true or false",
        ParameterType.INT64: "a whole number",
        ParameterType.DOUBLE: "a number",
        ParameterType.LIST: "a list",
    }
    return f"expected is {words.get(parameter.type, 'a text')}"
