"""What every reader is given, and what it fills: one file of one run, and the parts that it says."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from prefect_biomed.analysis.comparators import Content, Measure, decompressed, without_packing
from prefect_biomed.analysis.volatile import FieldKind, Volatile

__all__ = [
    "MAX_TEXT_BYTES",
    "MAX_WHOLE_DIGITS",
    "Parts",
    "Source",
    "Unreadable",
    "check_expansion",
    "inflated_size",
    "json_of",
    "library",
    "measures_of",
    "refuse_entities",
    "text_of",
    "walk",
]

MAX_TEXT_BYTES = 64 * 1024**2
_MAX_PARTS = 4_000_000
# Deflate packs at most 1032 to 1, so what claims to be more was made to fill the memory.
_MAX_EXPANSION = 1100
_SLACK_BYTES = 64 * 1024**2
_SPILL_BYTES = 1 << 20
_COPY_BYTES = 1 << 20
MAX_WHOLE_DIGITS = 15
"""Whole numbers with more digits lose some as floats, so they stay words."""
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?:nan|NaN|NAN|inf|Inf|INF)\b)(?![\d.]*\d)"
    r"(?=[A-Za-zµ°%]{0,3}(?:[\^]?[23])?(?:[^\w]|$))"
)
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


class Unreadable(ValueError):
    """A file is not what it seems to be, or is too large to be read as that."""


@dataclass(frozen=True)
class Source:
    """One file of one run.

    Attributes:
        path: The decompressed file, or the folder of a Zarr store; it stays while its content is used.
        name: Its logical name in small letters, without the suffix of a compression.
        head: Its first bytes.
        origin: The file as it came, whose neighbours may belong to it.
        workspace: Folder for what has to be unpacked; removed with the content.
        volatile: What is not a change.
    """

    path: Path
    name: str
    head: bytes
    origin: Path
    workspace: Path
    volatile: Volatile
    _numbers: Iterator[int] = field(default_factory=itertools.count, compare=False)

    def named(self, *suffixes: str) -> bool:
        """Tell whether the name ends so.

        Args:
            suffixes: Ends of names in small letters.

        Returns:
            Whether it has one of them.
        """
        return self.name.endswith(suffixes)

    def scratch(self) -> Path:
        """Name a new file in the workspace.

        Returns:
            A path where nothing is yet.
        """
        return self.workspace / f"{self.path.name}-{next(self._numbers)}"

    def beside(self, suffix: str, other: str) -> Path | None:
        """Find the file that belongs to this one, such as the header beside the voxels.

        Args:
            suffix: The end of this file's name.
            other: The end of the other's name.

        Returns:
            It, decompressed; None when it is not there or leads out of the folder.
        """
        bare = without_packing(self.origin.name.lower())
        return self.neighbour(bare.removesuffix(suffix) + other)

    def neighbour(self, name: str) -> Path | None:
        """Find a file in the same folder.

        Args:
            name: Its name, in any case and perhaps compressed.

        Returns:
            It, decompressed; None when it is not there or leads out of the folder.
        """
        folder = self.origin.parent.resolve()
        for path in sorted(self.origin.parent.iterdir()):
            if without_packing(path.name.lower()) == name.lower() and path.is_file():
                return decompressed(path, self.scratch()) if path.resolve().parent == folder else None
        return None

    def behind(self, end: int) -> dict[str, str]:
        """Take what a file holds behind the end of what its format knows.

        Args:
            end: The end, in bytes.

        Returns:
            Its digest; nothing when the file ends there.
        """
        if self.path.stat().st_size <= end:
            return {}
        with self.path.open("rb") as file:
            file.seek(end)
            return {"bytes behind the end": hashlib.file_digest(file, "sha256").hexdigest()}

    def spilled(self, values: NDArray[Any]) -> NDArray[Any]:
        """Move an array out of the memory when it is large.

        Args:
            values: Of any shape; flattened in the order in which it lies.

        Returns:
            The same values in one dimension.
        """
        flat = values.reshape(-1, order="F" if values.flags.f_contiguous and not values.flags.c_contiguous else "C")
        if flat.nbytes < _SPILL_BYTES or flat.dtype.hasobject:
            return flat
        target = self.allocated(flat.size, flat.dtype)
        target[:] = flat
        return target

    def allocated(self, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make room on disk for an array.

        Args:
            size: Number of elements.
            dtype: Their type.

        Returns:
            The array, to be filled.
        """
        check_expansion(size * dtype.itemsize, self)
        if not size:
            return np.empty(0, dtype)
        return np.memmap(self.scratch(), dtype, "w+", shape=(size,))


def check_expansion(size: int, source: Source) -> None:
    """Refuse what claims to be much larger than its file can hold.

    Args:
        size: Bytes that are claimed.
        source: The file.

    Raises:
        Unreadable: It is more than a thousandfold.
    """
    held = sum(p.stat().st_size for p in source.path.rglob("*")) if source.path.is_dir() else source.path.stat().st_size
    if size > held * _MAX_EXPANSION + _SLACK_BYTES:
        raise Unreadable(f"it claims {size} bytes of values in a file of {held} bytes")


def inflated_size(pieces: Iterable[bytes], limit: int, wbits: int = zlib.MAX_WBITS) -> int:
    """Count what a deflated stream unpacks to, without keeping it.

    Args:
        pieces: The stream.
        limit: Bytes that it may have.
        wbits: Window bits as zlib knows them.

    Returns:
        Bytes of the unpacked stream.

    Raises:
        Unreadable: They are more than the limit.
    """
    engine, total = zlib.decompressobj(wbits), 0
    for piece in pieces:
        rest = piece
        while rest:
            total += len(engine.decompress(rest, _COPY_BYTES))
            rest = engine.unconsumed_tail
            if total > limit:
                raise Unreadable(f"it unpacks to more than {limit} bytes")
    return total


def library(name: str, package: str) -> Any:
    """Import what only some formats need.

    Args:
        name: The module.
        package: What it is called where it is installed from.

    Returns:
        The module.

    Raises:
        Unreadable: It is not installed; the text says what to do.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unreadable(f"{package} is not installed: pip install 'prefect-biomed[formats]'") from None


def refuse_entities(read: Callable[[int], bytes]) -> None:
    """Refuse XML that defines entities, which can fill the memory or name other files.

    Args:
        read: Gives the next bytes.

    Raises:
        Unreadable: An entity is defined.
        expat.ExpatError: It is no XML.
    """
    parser = expat.ParserCreate()
    begun = False

    def refuse(name: str, *_: object) -> None:
        raise Unreadable(f"it defines the entity {name[:40]!r}")

    def begin(*_: object) -> None:
        nonlocal begun
        begun = True

    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = begin
    while not begun and (piece := read(1 << 14)):
        parser.Parse(piece, False)


def text_of(source: Source) -> str | None:
    """Read a text of whatever encoding.

    Args:
        source: The file.

    Returns:
        The text; None when it holds what texts do not.

    Raises:
        Unreadable: It is a text of more than 64 MiB.
    """
    if _CONTROL.search(source.head) and not source.head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None
    if source.path.stat().st_size > MAX_TEXT_BYTES:
        raise Unreadable(f"it has more than {MAX_TEXT_BYTES} bytes")
    content = source.path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    if _CONTROL.search(content):
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def measures_of(
    name: str,
    flat: NDArray[Any],
    shape: tuple[int, ...],
    order: str = "C",
    slope: float = 1.0,
    intercept: float = 0.0,
    point: str = "element",
    spacing: tuple[float, ...] | None = None,
) -> dict[str, Measure]:
    """Make measures of an array, one for each part of a complex number and for each field of a record.

    Args:
        name: What the numbers are.
        flat: The numbers in one dimension.
        shape: Shape of the whole.
        order: Which axis runs fastest.
        slope: Scaling of the stored values.
        intercept: Added after scaling.
        point: What one point is called.
        spacing: Millimetres from voxel to voxel along the first three axes.

    Returns:
        The measures by name; none where the array holds no numbers.
    """
    if flat.dtype.fields:
        found: dict[str, Measure] = {}
        for key in flat.dtype.names or ():
            inner = flat[key]
            if inner.ndim == 1:
                found |= measures_of(f"{name}, {key}", inner, shape, order, point=point)
            else:
                whole = (*shape, *inner.shape[1:])
                found |= measures_of(f"{name}, {key}", inner.reshape(-1), whole, "C", point=point)
        return found
    if flat.dtype.kind == "c":
        parts = {f"{name}, real": flat.real, f"{name}, imaginary": flat.imag}
    elif flat.dtype.kind in "iufb":
        parts = {name: flat}
    else:
        return {}
    return {
        title: Measure(title, values, shape or (1,), order, slope, intercept, point=point, spacing=spacing)
        for title, values in parts.items()
    }


class Parts:
    """Collects what a file says, piece by piece.

    Args:
        volatile: What is not a change.
    """

    def __init__(self, volatile: Volatile) -> None:
        self.volatile = volatile
        self.facts: dict[str, str] = {}
        self.measures: dict[str, Measure] = {}
        self.digests: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        self.note = ""
        self._numbers: dict[str, tuple[list[str], list[float]]] = {}
        self._count = 0

    def _counted(self) -> None:
        self._count += 1
        if self._count > _MAX_PARTS:
            raise Unreadable(f"it has more than {_MAX_PARTS} parts")

    def word(self, label: str, text: str, path: str = "") -> None:
        """Take a text as it is, numbers included.

        Args:
            label: Its name within the file.
            text: The text.
            path: Name of its field, when that says something about it.
        """
        self._counted()
        kind = self.volatile.field(path) if path else FieldKind.RESULT
        if kind is FieldKind.VOLATILE:
            return
        if kind is FieldKind.ENVIRONMENT:
            self.environment[label] = text
            return
        cleaned = self.volatile.clean(text)
        self.facts[label] = cleaned.text
        if cleaned.versions:
            self.environment[label] = ", ".join(cleaned.versions)

    def text(self, label: str, text: str, kind: str, path: str = "") -> None:
        """Take a text, with the numbers in it apart.

        Args:
            label: Its name within the file.
            text: The text.
            kind: Measure that its numbers belong to.
            path: Name of its field, when that says something about it.
        """
        if _NUMBER.fullmatch(text.strip()) and text.strip().lower().strip("+-") not in ("nan", "inf"):
            whole = text.strip().lstrip("+-").isdigit()
            self.number(label, int(text) if whole else float(text), kind, path)
            return
        self.word(label, text, path)
        if label not in self.facts:
            return

        def taken(match: re.Match[str]) -> str:
            number = match.group()
            if number.lstrip("+-").isdigit() and len(number.lstrip("+-0")) > MAX_WHOLE_DIGITS:
                return number
            self._append(kind, label, float(number))
            return "#"

        self.facts[label] = " ".join(_NUMBER.sub(taken, self.facts[label]).split())

    def number(self, label: str, value: float, kind: str, path: str = "") -> None:
        """Take a number.

        Args:
            label: Its name within the file.
            value: The number.
            kind: Measure that it belongs to.
            path: Name of its field, when that says something about it.
        """
        self._counted()
        field_kind = self.volatile.field(path) if path else FieldKind.RESULT
        if field_kind is FieldKind.VOLATILE or (path and self.volatile.is_epoch(path, value)):
            return
        if field_kind is FieldKind.ENVIRONMENT:
            self.environment[label] = f"{value:.17g}"
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_WHOLE_DIGITS:
            self.facts[label] = str(value)
        else:
            self._append(kind, label, float(value))

    def _append(self, kind: str, label: str, value: float) -> None:
        labels, values = self._numbers.setdefault(kind, ([], []))
        labels.append(label)
        values.append(value)

    def nested(self, prefix: str, content: Content) -> None:
        """Take over what a file within this one says.

        Args:
            prefix: Its name.
            content: What it says.
        """
        self.facts |= {f"{prefix}: {name}": value for name, value in content.facts.items()}
        self.digests |= {f"{prefix}: {name}": value for name, value in content.digests.items()}
        self.environment |= {f"{prefix}: {name}": value for name, value in content.environment.items()}
        self.measures |= {f"{prefix}: {name}": measure for name, measure in content.measures.items()}
        self.note = self.note or content.note

    def content(self, kind: str) -> Content:
        """Say what was collected.

        Args:
            kind: Name of the format.

        Returns:
            The content.
        """
        measures: dict[str, Measure] = dict(self.measures)
        for name, (labels, values) in self._numbers.items():
            array = np.array(values, dtype=np.float64)
            measures[name] = Measure(name, array, array.shape, place=_labelled(labels))
        return Content(kind, self.facts, measures, self.note, self.digests, self.environment)


def _labelled(labels: list[str]) -> Callable[[int], str]:
    return lambda index: labels[index]


def json_of(text: str) -> Any:
    """Read JSON in which each key stands once; of two, a reader would see one.

    Args:
        text: The JSON.

    Returns:
        What it says.

    Raises:
        ValueError: It is no JSON, or an object has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Unreadable("an object has a key twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def walk(parts: Parts, value: Any, path: str = "$", kind: str = "$") -> None:
    """Collect what a tree of mappings and lists says, as JSON, YAML and MATLAB structures are.

    Args:
        parts: What is filled.
        value: The tree.
        path: Where it stands.
        kind: The same with the places in lists left out, which names its numbers.
    """
    if isinstance(value, Mapping):
        if not value:
            parts.word(f"{path} (empty)", "object")
        for key, inner in value.items():
            walk(parts, inner, f"{path}.{key}", f"{kind}.{key}")
    elif isinstance(value, list | tuple):
        parts.word(f"{path} (length)", str(len(value)), path)
        for index, inner in enumerate(value):
            walk(parts, inner, f"{path}[{index}]", f"{kind}[*]")
    elif isinstance(value, bool) or value is None:
        parts.word(path, {True: "true", False: "false", None: "null"}[value], path)
    elif isinstance(value, int | float):
        parts.number(path, value, kind, path)
    elif isinstance(value, str):
        parts.text(path, value, kind, path)
    else:
        parts.word(path, str(value), path)
