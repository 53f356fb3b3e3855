"""Values of `input_settings` that name files of a BIDS dataset by what their names say: `bids:suffix=T1w,session=01`.

The input folder is the dataset (https://bids-specification.readthedocs.io). A value becomes the list of the matching
files, in the order of their names, before the session is begun (`session_file.with_bids_files`): what is recorded, sent
and launched is that list, so that a dataset that grows later changes nothing of a session that was begun.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from prefect_biomed.clients.errors import PreflightFailed

if TYPE_CHECKING:
    import pyarrow

__all__ = ["PREFIX", "answers", "by_subject", "questions"]

PREFIX = "bids:"
"""What a value begins with that is a question to the dataset."""

_ASKED = "What is asked of a BIDS dataset"
_DESCRIPTION = "dataset_description.json"
_SUBJECT = re.compile(r"sub-([0-9A-Za-z+]+)_")


def questions(settings: Mapping[str, Any], input_dir: Path | None) -> dict[str, Any]:
    """Tell which values ask the dataset.

    Args:
        settings: Values by parameter, as `named_values` gives them.
        input_dir: The dataset.

    Returns:
        Those that do, alone or as an element of a list. The name of a file that is there asks for nothing, whatever it
        begins with.
    """
    return {name: value for name, value in settings.items() if any(_asks(one, input_dir) for one in _elements(value))}


def answers(asked: Mapping[str, Any], input_dir: Path | None) -> dict[str, Any]:
    """Find the files that values ask for.

    Args:
        asked: As `questions` gives them.
        input_dir: The dataset.

    Returns:
        A list of paths relative to `input_dir` for each value, with the other elements as they are.

    Raises:
        PreflightFailed: No dataset, no such entity, or no file that matches; with all problems at once.
    """
    problems: list[str] = []
    found: dict[str, Any] = {}
    try:
        dataset = _Dataset(input_dir)
    except ValueError as error:
        raise PreflightFailed(_ASKED, [f"{name!r}: {error}" for name in asked]) from None
    for name, value in asked.items():
        files: list[Any] = []
        for one in _elements(value):
            try:
                files += dataset.files(one.removeprefix(PREFIX)) if _asks(one, input_dir) else [one]
            except ValueError as error:
                problems.append(f"{name!r} is {one!r}: {error}")
        found[name] = files
    if problems:
        raise PreflightFailed(_ASKED, problems)
    return found


def by_subject(settings: Mapping[str, Any]) -> list[str]:
    """Tell for each subject which files a session uses.

    Args:
        settings: Values by parameter.

    Returns:
        A line for each subject and parameter with files that are named as BIDS has it; none without such files.
    """
    lines = []
    for parameter, value in settings.items():
        files: dict[str, list[str]] = {}
        for one in _elements(value):
            name = PurePosixPath(one).name if isinstance(one, str) else ""
            if subject := _SUBJECT.match(name):
                files.setdefault(f"sub-{subject[1]}", []).append(name)
        lines += [f"{subject}  {parameter}: {', '.join(names)}" for subject, names in files.items()]
    return sorted(lines)


def _elements(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _asks(value: object, input_dir: Path | None) -> bool:
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return False
    return input_dir is None or not (input_dir / value).exists()


class _Dataset:
    """A dataset, looked through once.

    Raises:
        ValueError: The folder is none, or what reads it is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise ValueError("there is no input_dir. Give the folder of the BIDS dataset.")
        if not (folder / _DESCRIPTION).is_file():
            raise ValueError(f"{folder} is no BIDS dataset: it has no {_DESCRIPTION}. Give the dataset as input_dir.")
        try:
            from bids2table import get_arrow_schema, index_dataset
        except ImportError:
            raise ValueError(
                "values that begin with 'bids:' need the extra 'bids': pip install 'prefect-biomed[bids]', where this "
                "runs."
            ) from None
        self._folder = folder
        self._columns = _columns(get_arrow_schema())
        self._rows: list[dict[str, Any]] = index_dataset(folder).to_pylist()

    def files(self, question: str) -> list[str]:
        """Find the files that match a question such as `suffix=T1w,session=01`."""
        wanted = self._wanted(question)
        found = sorted(
            row["path"] for row in self._rows if all(_is(row, name, label) for name, label in wanted.items())
        )
        if not found:
            raise ValueError(f"no file of {self._folder} matches. {self._there(wanted)}")
        return found

    def _wanted(self, question: str) -> dict[str, str]:
        wanted: dict[str, str] = {}
        for part in question.split(","):
            name, equals, label = (text.strip() for text in part.partition("="))
            if not (name and equals and label):
                raise ValueError(f"{part!r} is no entity with its label. Write it as bids:suffix=T1w,session=01.")
            if name not in self._columns:
                raise ValueError(f"BIDS has no entity {name!r}. It has: {', '.join(sorted(self._columns))}.")
            if self._columns[name] in wanted:
                raise ValueError(f"{name!r} is there twice. Give one value for each, or two values in a list.")
            wanted[self._columns[name]] = label
        return wanted

    def _there(self, wanted: Mapping[str, str]) -> str:
        """Say which labels there are of what was asked for."""
        told = []
        for name in wanted:
            labels = sorted({str(row[name]) for row in self._rows if row[name] is not None})
            told.append(f"{name}: {', '.join(labels[:20]) or 'none'}")
        return f"Its {len(self._rows)} files have {'; '.join(told)}."


def _columns(schema: pyarrow.Schema) -> dict[str, str]:
    """Columns of the index by the names of entities, short as in file names and long as in the specification."""
    columns: dict[str, str] = {}
    for field in schema:
        about = field.metadata or {}
        if entity := about.get(b"entity"):
            columns |= {field.name: field.name, entity.decode(): field.name}
    return columns


def _is(row: Mapping[str, Any], name: str, label: str) -> bool:
    """Compare a label; numbers of BIDS may have zeros before them, and `sub-01` may be written for 01."""
    value = row[name]
    if isinstance(value, int):
        return label.isdecimal() and int(label) == value
    return value is not None and label.removeprefix(f"{name}-") == value
