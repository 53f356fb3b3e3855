"""What a file says, apart from how it is packed: its facts (text) and its measures (numbers), format by format.

A new format is one function that returns a `Content`, or None when the file is not of its kind, in `_READERS`.
Nothing here runs code from a file: NumPy files are read without pickles, archives are unpacked by `clients.archives`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from prefect_biomed.analysis.models import Rules
from prefect_biomed.clients.errors import UnsafeContent

__all__ = ["BLOCK", "Content", "Measure", "content_digest", "decompressed", "open_content"]

BLOCK = 1 << 18
"""Points that are held in memory at once, per run."""

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_COPY_BYTES = 1 << 20
_MAX_UNPACKED = 64 * 1024**3
_MAX_TEXT_BYTES = 64 * 1024**2
_MAX_PIXELS = 256 * 1024**2
# Whole numbers above this lose digits as floats, so they are compared as text.
_EXACT_IN_FLOAT = 2**53
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.])")
_TIME = re.compile(
    r"\b\d{4}[-/]\d{2}[-/]\d{2}(?:[T _]\d{2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?)?(?:Z|\s?[+-]\d{2}:?\d{2})?\b"
    r"|\b(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? )?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) +\d{1,2}"
    r"(?: \d{2}:\d{2}:\d{2})?(?: [A-Z]{3,4})?(?: \d{4})?\b"
    r"|\b\d{2}:\d{2}:\d{2}(?:[.,]\d+)?\b"
)


@dataclass(frozen=True)
class Measure:
    """Numbers that belong together: the voxels of an image, a column of a table.

    Attributes:
        name: Name within the file.
        values: One-dimensional; a memory map where the file allows.
        shape: Shape of the whole.
        order: Which axis runs fastest in `values`: the first (`F`) or the last (`C`).
        slope: Scaling of the stored values.
        intercept: Added after scaling.
        place: Says in words where a point is; its index is spelt out when None.
        point: What one point is called.
    """

    name: str
    values: NDArray[Any]
    shape: tuple[int, ...]
    order: str = "C"
    slope: float = 1.0
    intercept: float = 0.0
    place: Callable[[int], str] | None = None
    point: str = "value"

    @property
    def size(self) -> int:
        """Number of points."""
        return int(self.values.size)

    @property
    def is_integral(self) -> bool:
        """Whether the file stores unscaled whole numbers, as label maps do."""
        return self.values.dtype.kind in "iub" and self.slope == 1.0 and self.intercept == 0.0

    def read(self, start: int, stop: int) -> NDArray[np.float64]:
        """Read points.

        Args:
            start: First point.
            stop: Point after the last.

        Returns:
            Their values.
        """
        block: NDArray[np.float64] = np.asarray(self.values[start:stop], dtype=np.float64)
        if self.slope != 1.0 or self.intercept != 0.0:
            block = block * self.slope + self.intercept
        return block

    def volume(self) -> NDArray[Any]:
        """Return the values in their shape, unscaled."""
        return self.values.reshape(self.shape, order="F" if self.order == "F" else "C")

    def where(self, index: int) -> str:
        """Say where a point is.

        Args:
            index: Its number.

        Returns:
            For instance `voxel (12, 30, 4)`.
        """
        if self.place is not None:
            return self.place(index)
        position = np.unravel_index(index, self.shape, order="F" if self.order == "F" else "C")
        return f"{self.point} ({', '.join(str(int(axis)) for axis in position)})"


@dataclass(frozen=True)
class Content:
    """What a file says.

    Attributes:
        kind: Name of the format.
        facts: Everything that is no number, as text by field.
        measures: Numbers by name.
        note: What stood in the way of a closer look.
        digests: SHA-256 of what cannot be looked into, by name of the part. Where it varies it is not judged.
    """

    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)
    note: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, str]:
        """Facts and digests: all that is either equal or not."""
        return self.facts | self.digests

    def without_ignored(self, rules: Rules) -> Content:
        """Leave out the fields that the rules ignore.

        Args:
            rules: The rules.

        Returns:
            The rest.
        """
        return Content(
            self.kind,
            {name: value for name, value in self.facts.items() if not rules.ignores_field(name)},
            {name: measure for name, measure in self.measures.items() if not rules.ignores_field(name)},
            self.note,
            {name: value for name, value in self.digests.items() if not rules.ignores_field(name)},
        )


def _opener(path: Path) -> Callable[[Path], Any] | None:
    with path.open("rb") as file:
        magic = file.read(6)
    return next((make for start, make in _OPENERS.items() if magic.startswith(start)), None)


def _pieces(path: Path) -> Iterator[bytes]:
    """Yield the decompressed content; damaged streams raise UnsafeContent."""
    opener = _opener(path)
    total = 0
    try:
        with opener(path) if opener else path.open("rb") as stream:
            while piece := stream.read(_COPY_BYTES):
                total += len(piece)
                if opener and total > _MAX_UNPACKED:
                    raise UnsafeContent(f"{path.name} decompresses to more than {_MAX_UNPACKED} bytes.")
                yield piece
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UnsafeContent(f"{path.name} is damaged: {error}") from None


def content_digest(path: Path) -> str:
    """Compute the SHA-256 of the decompressed content, so that time stamps in gzip headers do not count.

    Args:
        path: A file, compressed with gzip, bzip2, xz or not at all.

    Returns:
        64 hexadecimal digits; those of the raw bytes when the compressed stream is damaged.
    """
    digest = hashlib.sha256()
    try:
        for piece in _pieces(path):
            digest.update(piece)
    except (UnsafeContent, OSError):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return digest.hexdigest()


def decompressed(path: Path, target: Path) -> Path:
    """Write the decompressed content to a file, unless it is not compressed.

    Args:
        path: The file.
        target: Where to write; used only for compressed files.

    Returns:
        `target`, or `path` when there was nothing to do.

    Raises:
        UnsafeContent: The stream is damaged or larger than 64 GiB.
    """
    if _opener(path) is None:
        return path
    with target.open("wb") as file:
        for piece in _pieces(path):
            file.write(piece)
    return target


def open_content(path: Path, name: str) -> Content:
    """Read what a file says. Large arrays stay on disk as memory maps.

    Args:
        path: The decompressed file; it must stay while the content is used.
        name: Its logical name, whose suffix may decide.

    Returns:
        The content. What no format fits has only a digest.
    """
    bare = name.lower()
    for suffix in (".gz", ".bz2", ".xz"):
        bare = bare.removesuffix(suffix)
    with path.open("rb") as file:
        head = file.read(1024)
    note = ""
    for reader in _READERS:
        try:
            content = reader(path, bare, head)
        except _NOT_READABLE as error:
            note = f"{reader.__name__.removeprefix('_')} could not be read, so only digests were compared: {error}"
            break
        if content is not None:
            return content
    return Content("binary", digests={"content": content_digest(path)}, note=note)


# Every library has its own way to say that a file is not what it seems to be.
_NOT_READABLE = (
    ValueError,
    KeyError,
    OSError,
    EOFError,
    OverflowError,
    RecursionError,
    SyntaxError,
    csv.Error,
    nibabel.spatialimages.HeaderDataError,
    nibabel.filebasedimages.ImageFileError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def _nifti(path: Path, name: str, head: bytes) -> Content | None:
    header_types = {b"n+1\x00": nibabel.Nifti1Header, b"n+2\x00": nibabel.Nifti2Header}
    header_type: Any = header_types.get(head[344:348]) or header_types.get(head[4:8])
    if header_type is None:
        return None
    with path.open("rb") as file:
        header = header_type.from_fileobj(file)
    facts = {f"header {key}": str(value.tolist()) for key, value in header.items()}
    for number, extension in enumerate(header.extensions):
        facts[f"header extension {number}"] = hashlib.sha256(bytes(extension.get_content())).hexdigest()
    stored: NDArray[Any] = np.memmap(
        path, header.get_data_dtype(), "r", header.get_data_offset(), header.get_data_shape(), "F"
    )
    if stored.dtype.fields or stored.dtype.kind not in "iufbc":
        return Content("NIfTI", facts, digests={"voxels": content_digest(path)})
    slope, intercept = (float(value) if value is not None else None for value in header.get_slope_inter())
    flat = stored.reshape(-1, order="F")
    parts = {"voxels": flat} if flat.dtype.kind != "c" else {"voxels, real": flat.real, "voxels, imaginary": flat.imag}
    return Content(
        "NIfTI",
        facts,
        {
            name: Measure(name, values, stored.shape, "F", slope or 1.0, intercept or 0.0, point="voxel")
            for name, values in parts.items()
        },
    )


def _numpy(path: Path, name: str, head: bytes) -> Content | None:
    if not head.startswith(b"\x93NUMPY"):
        return None
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    facts = {"shape": str(array.shape), "type": str(array.dtype)}
    if array.dtype.fields or array.dtype.kind not in "iufbc":
        return Content("NumPy", facts, digests={"values": content_digest(path)})
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    flat = array.reshape(-1, order="F" if order == "F" else "C")
    parts = {"values": flat} if flat.dtype.kind != "c" else {"values, real": flat.real, "values, imaginary": flat.imag}
    return Content(
        "NumPy",
        facts,
        {name: Measure(name, values, array.shape or (1,), order, point="element") for name, values in parts.items()},
    )


def _image(path: Path, name: str, head: bytes) -> Content | None:
    if not head.startswith((b"\x89PNG\r\n", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            facts = {"format": str(image.format), "mode": image.mode, "size": f"{image.width} x {image.height}"}
            frames = int(getattr(image, "n_frames", 1))
            facts["pages"] = str(frames)
            if image.width * image.height * frames > _MAX_PIXELS:
                raise ValueError(f"more than {_MAX_PIXELS} pixels")
            measures = {}
            for number, page in enumerate(ImageSequence.Iterator(image), start=1):
                pixels = np.asarray(page.convert("RGBA") if page.mode == "P" else page)
                title = "pixels" if frames == 1 else f"pixels of page {number}"
                measures[title] = Measure(title, pixels.reshape(-1), pixels.shape, point="pixel (row, column)")
    return Content("image", facts, measures)


def _text_of(path: Path) -> str | None:
    if path.stat().st_size > _MAX_TEXT_BYTES:
        return None
    content = path.read_bytes()
    if b"\x00" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _number(cell: str) -> float | None:
    """Read a cell as a number; empty cells and those that say so are not a number but belong to a column of numbers."""
    if cell.strip().lower() in ("", "na", "n/a", "nan", "null", "none"):
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _table(path: Path, name: str, head: bytes) -> Content | None:
    if not name.endswith((".csv", ".tsv")):
        return None
    text = _text_of(path)
    if text is None or not text.strip():
        return None
    first = text.split("\n", 1)[0]
    delimiter = "\t" if name.endswith(".tsv") else max(",;\t", key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    has_header = not any(cell.strip() and _number(cell) is not None for cell in rows[0])
    columns = [cell.strip() or str(number) for number, cell in enumerate(rows[0], start=1)] if has_header else []
    columns = columns or [str(number) for number in range(1, width + 1)]
    columns = [f"{title} ({i + 1})" if columns.count(title) > 1 else title for i, title in enumerate(columns)]
    body = rows[1:] if has_header else rows
    labels = [row[0] for row in body]
    is_named = len(set(labels)) == len(labels) and any(_number(label) is None for label in labels)
    titles = labels if is_named else [str(number) for number in range(1, len(body) + 1)]
    facts = {"columns": ", ".join(columns), "rows": str(len(body))}
    measures: dict[str, Measure] = {}
    for position, column in enumerate(columns):
        cells = [row[position] for row in body]
        numbers = [_number(cell) for cell in cells]
        title = f"column {column}"
        if all(number is not None for number in numbers) and not all(math.isnan(n or 0.0) for n in numbers):
            values = np.array(numbers, dtype=np.float64)
            measures[title] = Measure(title, values, values.shape, place=_row_of(titles, column))
        else:
            facts |= {f"row {row}, column {column}": cell for row, cell in zip(titles, cells, strict=True)}
    return Content("table", facts, measures)


def _row_of(titles: list[str], column: str) -> Callable[[int], str]:
    return lambda index: f"row {titles[index]}, column {column}"


def _json(path: Path, name: str, head: bytes) -> Content | None:
    if not name.endswith(".json"):
        return None
    text = _text_of(path)
    if text is None:
        return None
    facts: dict[str, str] = {}
    numbers: dict[str, list[tuple[str, float]]] = {}

    def walk(value: Any, path: str, kind: str) -> None:
        if isinstance(value, dict):
            facts.update({f"{path} (empty)": "object"} if not value else {})
            for key, inner in value.items():
                walk(inner, f"{path}.{key}", f"{kind}.{key}")
        elif isinstance(value, list):
            facts[f"{path} (length)"] = str(len(value))
            for index, inner in enumerate(value):
                walk(inner, f"{path}[{index}]", f"{kind}[*]")
        elif isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _EXACT_IN_FLOAT < math.inf:
            facts[path] = _TIME.sub("<time>", json.dumps(value))
        else:
            numbers.setdefault(kind, []).append((path, float(value)))

    walk(json.loads(text), "$", "$")
    measures = {}
    for kind, found in numbers.items():
        values = np.array([value for _, value in found], dtype=np.float64)
        measures[kind] = Measure(kind, values, values.shape, place=_path_of([path for path, _ in found]))
    return Content("JSON", facts, measures)


def _path_of(paths: list[str]) -> Callable[[int], str]:
    return lambda index: paths[index]


def _text(path: Path, name: str, head: bytes) -> Content | None:
    text = _text_of(path)
    if text is None:
        return None
    facts: dict[str, str] = {}
    numbers: list[float] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        timeless = _TIME.sub("<time>", line)
        found = _NUMBER.findall(timeless)
        numbers += map(float, found)
        lines += [number] * len(found)
        facts[f"line {number}"] = _NUMBER.sub("#", timeless)
    values = np.array(numbers, dtype=np.float64)
    measures = {"numbers": Measure("numbers", values, values.shape, place=lambda i: f"line {lines[i]}")}
    return Content("text", facts, measures if numbers else {})


_READERS: tuple[Callable[[Path, str, bytes], Content | None], ...] = (_nifti, _numpy, _image, _table, _json, _text)
