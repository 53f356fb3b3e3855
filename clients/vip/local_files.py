"""The files of an input folder: which are sent, what they are called on the platform, and which are ours and stay."""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from prefect_biomed.clients.crates import METADATA, WORKFLOW, files_of_crate
from prefect_biomed.clients.vip.profiles import VIP, Profile
from prefect_biomed.clients.vip.session_file import FILE_NAME, LOCKS
from prefect_biomed.clients.vip.values import is_text

__all__ = ["InputFolder", "LocalFile", "stored_name"]

# What the platform trims; it does so before it drops what is not ASCII.
_TRIMMED = "".join(map(chr, range(ord(" ") + 1)))
_LONGEST_NAME = 255
# No address can carry a line break everywhere, and no list of files shows the others.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_RUN_FOLDER = re.compile(r"r\d{3,}-[0-9a-z]{4,32}")
_MAX_SESSION_FILE_BYTES = 64 * 1024 * 1024


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


def stored_name(name: str, profile: Profile = VIP) -> str:
    """Tell under which name a file or folder is sent, and then stored.

    VIP renames what it stores, and may rename the renamed name again. The name given here is one that it leaves alone.

    Args:
        name: One path component.
        profile: The ways of the platform; not all rename.

    Returns:
        The name trimmed, with `_` for spaces and for what VIP would make a `/` of, and without what is not ASCII.
        Never `.` or `..`; empty when nothing is left of it.
    """
    if not profile.renames_files:
        return name
    renamed, before = _renamed(name), name
    while renamed != before:
        renamed, before = _renamed(renamed), renamed
    renamed = renamed.replace("/", "_")
    return renamed.replace(".", "_") if renamed in {".", ".."} else renamed


def _renamed(name: str) -> str:
    """What VIP makes of a name in one go."""
    decomposed = unicodedata.normalize("NFKD", name.strip(_TRIMMED).replace(" ", "_"))
    return decomposed.encode("ascii", "ignore").decode()


def _stored_path(local_name: str, profile: Profile) -> str:
    return "/".join(stored_name(part, profile) for part in PurePosixPath(local_name).parts)


class InputFolder:
    """The input folder of a session, looked through once.

    What the package has written itself is not among its files: session files, locks, and the output folders of sessions
    that lie below it.

    Args:
        folder: The input folder.
        output_dir: Where the session puts its outputs.
        profile: The ways of the platform.
        include: Patterns of files to upload, relative to the folder; all when empty.
        exclude: Patterns of files not to upload.

    Attributes:
        problems: What is in the way of an upload, one sentence each.
        files: The files to upload.
        left_out: Folders and files of ours that are not sent, relative to the folder.
    """

    def __init__(
        self,
        folder: Path,
        output_dir: Path,
        profile: Profile,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self.path = folder
        self.problems: list[str] = []
        self.files: list[LocalFile] = []
        self.left_out: list[str] = []
        self._output_dir = output_dir.resolve()
        self._profile = profile
        self._include = include
        self._exclude = exclude
        self._owners: dict[str, str] = {}
        if folder.is_dir():
            self._look_through()
        else:
            self.problems.append(f"The input folder {folder} does not exist.")

    def _look_through(self) -> None:
        walk = os.walk(self.path, followlinks=True, onerror=lambda error: self.problems.append(_unreadable(error)))
        for root, subfolders, names in walk:
            subfolders[:] = [name for name in sorted(subfolders) if self._is_to_be_walked(Path(root, name))]
            for name in sorted(names):
                self._take(Path(root, name))
        if not self.files and not self.problems:
            filtered = " that the include and exclude patterns let through" if self._include or self._exclude else ""
            ours = f" but what belongs to sessions ({', '.join(self.left_out[:5])})" if self.left_out else ""
            self.problems.append(f"The input folder {self.path} holds no file{filtered}{ours}.")

    @cached_property
    def folders(self) -> dict[str, str]:
        """The folders that the files lie in, as they are here, by what they are called on the platform."""
        above: dict[str, str] = {}
        for file in self.files:
            stored, local = PurePosixPath(file.name).parent, PurePosixPath(file.local_name).parent
            while stored.name:
                above[stored.as_posix()] = local.as_posix()
                stored, local = stored.parent, local.parent
        return above

    def find(self, value: str) -> str | None:
        """Find what a value names: relative to the folder, absolutely, or from the current folder; through any links.

        Letters with accents may be one character in the value and two in the name, as on macOS, or the reverse.

        Args:
            value: A path of a file or folder.

        Returns:
            Its stored name relative to the folder, `.` for the folder itself; None when it does not name anything in
            it that exists.
        """
        for candidate in (self.path / value, Path(value)):
            if (found := self._relative(candidate)) is not None:
                return found
        path = PurePosixPath(value)
        relative = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        alike = self._by_look.get(_as_seen(relative.as_posix()), set())
        return next(iter(alike)) if len(alike) == 1 else None

    def is_local(self, value: str) -> bool:
        """Tell whether a value is the path of something that exists here, in the folder or not.

        Args:
            value: A path, relative to the folder or to the current one.
        """
        try:
            return (self.path / value).exists() or Path(value).exists()
        except (OSError, ValueError):
            return False

    def _relative(self, candidate: Path) -> str | None:
        try:
            if not candidate.exists():
                return None
            folder, real = self.path.resolve(), candidate.resolve()
            # What is linked into the folder is in it; what is named by way of `..` is where the links lead.
            for place in [real] if ".." in candidate.parts else [candidate.absolute(), real]:
                for above in (place, *place.parents):
                    if above.resolve() == folder and (name := self._known(place.relative_to(above), place)) is not None:
                        return name
        except (OSError, ValueError):
            return None
        return self._by_real_path.get(real)

    def _known(self, relative: Path, place: Path) -> str | None:
        """The stored name of what is sent, and of folders in which there is nothing to send."""
        local_name = relative.as_posix()
        if local_name == ".":
            return "."
        stored = _stored_path(local_name, self._profile)
        if local_name in self._names or self.folders.get(stored) == local_name:
            return stored
        is_empty = place.is_dir() and not any(place.iterdir())
        return stored if is_empty and self._claim(f"{local_name}/", stored) else None

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(file.local_name for file in self.files)

    @cached_property
    def _by_look(self) -> dict[str, set[str]]:
        """Stored names by what people see of the local ones."""
        found: dict[str, set[str]] = {}
        local_names = [(file.local_name, file.name) for file in self.files]
        for local, stored in (*local_names, *((local, stored) for stored, local in self.folders.items())):
            found.setdefault(_as_seen(local), set()).add(stored)
        return found

    @cached_property
    def _by_real_path(self) -> dict[Path, str]:
        """Stored names by where links lead."""
        folders = {(self.path / local).resolve(): stored for stored, local in self.folders.items()}
        return folders | {file.path.resolve(): file.name for file in reversed(self.files)}

    # -- looking through -----------------------------------------------------------------------------------------------

    def _is_to_be_walked(self, path: Path) -> bool:
        name = path.relative_to(self.path).as_posix()
        if self._is_ours(path):
            self.left_out.append(name)
            return False
        if not path.is_symlink() or not path.parent.resolve().is_relative_to(path.resolve()):
            return True
        # A link to a folder it lies in, which would never end.
        if _selected(name, (), self._exclude):
            self.problems.append(f"{name!r} is a link to a folder it lies in. Exclude it.")
        return False

    def _is_ours(self, folder: Path) -> bool:
        if folder.name == LOCKS or folder.resolve() == self._output_dir:
            return True
        if (folder / LOCKS).is_dir() or _session_file(folder / FILE_NAME) is not None:
            return True
        # Inputs and outputs in one folder: the outputs of earlier runs lie among the inputs.
        is_output = _RUN_FOLDER.fullmatch(folder.name) is not None or folder.name in self._outputs
        return is_output and folder.parent.resolve() == self._output_dir

    @cached_property
    def _outputs(self) -> frozenset[str]:
        """What is in the output folder because of the sessions of its records; empty without a record."""
        places = [self._output_dir / FILE_NAME, self._output_dir / LOCKS / FILE_NAME]
        records = [record for place in places if (record := _session_file(place)) is not None]
        if not records:
            return frozenset()
        return files_of_crate(self._output_dir).union(*map(_names_of_outputs, records))

    def _take(self, path: Path) -> None:
        local_name = path.relative_to(self.path).as_posix()
        if not _selected(local_name, self._include, self._exclude):
            return
        is_beside_outputs = path.parent.resolve() == self._output_dir
        if path.name in {FILE_NAME, f".{FILE_NAME}.vip"} or (is_beside_outputs and path.name in self._outputs):
            self.left_out.append(local_name)
            return
        if is_beside_outputs and path.name in {METADATA, WORKFLOW}:
            self.problems.append(f"{local_name!r} would be replaced by that of the session. Give another output_dir.")
            return
        stored = _stored_path(local_name, self._profile)
        if not self._claim(local_name, stored):
            return
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                # Opening a pipe would wait for its other end for ever.
                self.problems.append(f"{local_name!r} is neither a file nor a folder. Exclude it.")
                return
            with path.open("rb"):
                pass
        except OSError as error:
            self.problems.append(_unreadable(error))
            return
        if status.st_size == 0 and not self._profile.stores_empty_files:
            self.problems.append(f"{local_name!r} is empty; VIP cannot store empty files. Exclude it or fill it.")
            return
        self.files.append(LocalFile(path, stored, local_name, status.st_size, status.st_mtime_ns))

    def _claim(self, local_name: str, stored: str) -> bool:
        """Give a file, and the folders it lies in, their stored names, unless something else has one of them."""
        parts = stored.split("/")
        if not all(parts):
            self.problems.append(f"{local_name!r} has no character the platform can store. Rename it.")
            return False
        if not is_text(stored):
            self.problems.append(f"{local_name!r} has bytes in its name that are no text. Rename it.")
            return False
        if _CONTROL.search(stored):
            self.problems.append(f"{local_name!r} has a control character in its name, or a line break. Rename it.")
            return False
        if any(len(part.encode()) > _LONGEST_NAME for part in parts):
            self.problems.append(f"{local_name!r} would be stored under a name of more than 255 bytes. Rename it.")
            return False
        if not self._claim_one(local_name, stored):
            return False
        names = PurePosixPath(local_name).parts
        folders = range(1, len(names))
        return all(self._claim_one("/".join((*names[:depth], "")), "/".join(parts[:depth])) for depth in folders)

    def _claim_one(self, local_name: str, stored: str) -> bool:
        owner = self._owners.setdefault(stored, local_name)
        if owner == local_name:
            return True
        problem = f"{owner!r} and {local_name!r} would both be stored as {stored!r}. Rename one."
        if problem not in self.problems:
            self.problems.append(problem)
        return False


def _session_file(path: Path) -> dict[str, Any] | None:
    """The content of a session file; None of another file of that name."""
    try:
        if path.stat().st_size > _MAX_SESSION_FILE_BYTES:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"session_name", "workflows"} <= content.keys() else None


def _names_of_outputs(record: dict[str, Any]) -> set[str]:
    """What outputs, and archives among them that were unpacked, are called in the output folder of a session."""
    workflows = record["workflows"] if isinstance(record["workflows"], dict) else {}
    names = set(workflows)
    for run in workflows.values():
        outputs = run.get("outputs") if isinstance(run, dict) else None
        for output in outputs if isinstance(outputs, list) else ():
            path = PurePosixPath(str(output.get("path") if isinstance(output, dict) else ""))
            if path.is_relative_to(str(record.get("vip_output_dir"))):
                top = path.relative_to(str(record["vip_output_dir"])).parts[:1]
                names.update(top, (f"{name}.content" for name in top))
    return names


def _unreadable(error: OSError) -> str:
    return f"{error.filename} cannot be read: {error.strerror}."


def _as_seen(name: str) -> str:
    """One of the spellings of a name that look the same."""
    return unicodedata.normalize("NFC", name)


def _selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    seen = _as_seen(name)

    def matches(patterns: Iterable[str]) -> bool:
        return any(
            fnmatchcase(seen, pattern) or PurePosixPath(seen).match(pattern) for pattern in map(_as_seen, patterns)
        )

    return (not include or matches(include)) and not matches(exclude)
