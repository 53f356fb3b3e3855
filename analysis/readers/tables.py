"""Tables: CSV, TSV, Parquet, FreeSurfer's statistics. Rows with names are found by them, whatever their order."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prefect_biomed.analysis.comparators import Content, Measure
from prefect_biomed.analysis.readers.source import (
    MAX_TEXT_BYTES,
    MAX_WHOLE_DIGITS,
    Parts,
    Source,
    Unreadable,
    library,
    measures_of,
    text_of,
    walk,
)
from prefect_biomed.analysis.volatile import FieldKind

__all__ = ["fits_statistics", "fits_table", "parquet", "statistics", "table"]

_NO_NUMBER = frozenset({"", "na", "n/a", "nan", "null", "none"})
_KEY = re.compile(
    r"(?:participant|subject|session|run|scan|sample|patient|image|file|region|structure|label|roi|parcel"
    r"|network|metabolite|vertex|node|seg|index)?_?(?:id|name|key|label)|participant|subject|sub|session|ses|run|region|structure"
    r"|label|roi|index|struct_?name|seg_?id|hemi(?:sphere)?|name|metabolite|measure:.*"
)
_SNAKE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9:]+")
_FRACTION = re.compile(r"[+-]?\d*,\d+(?:[eE][+-]?\d+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?")
_THOUSANDS_BY_POINTS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+")
_MAX_ROWS_OF_WORDS = 2_000_000


def _number(cell: str) -> float | None:
    """Read a cell as a number; empty cells and those that say so are not a number but belong to a column of numbers.

    Whole numbers of more digits than a double has are names.
    """
    if cell.strip().lower() in _NO_NUMBER:
        return math.nan
    digits = cell.strip().lstrip("+-0")
    if digits.isdigit() and len(digits) > MAX_WHOLE_DIGITS:
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _numbers(cells: Sequence[str]) -> tuple[list[float | None], bool]:
    """Read a column as numbers.

    Whether a comma is that of a fraction or of thousands is told by all cells of the column: `0,5` and `1,234,567` tell
    it, and `1,234` among others of its kind does not.

    Returns:
        The number in each cell, None where there is none; and whether there are numbers with commas of which nothing
        tells what they are. Then there is no number in any cell.
    """
    found = [_number(cell) for cell in cells]
    commas = [cell.strip() for cell in cells if "," in cell]
    if not commas or not all(map(_has_comma, commas)):
        return found, False
    may_be_fractions = all(map(_FRACTION.fullmatch, commas))
    may_be_thousands = all(map(_THOUSANDS.fullmatch, commas))
    points = [cell.strip() for cell in cells if "." in cell and "," not in cell]
    if may_be_fractions and not may_be_thousands and not points:
        return [_number(cell.replace(",", ".")) for cell in cells], False
    if may_be_thousands and not (may_be_fractions and all(map(_THOUSANDS_BY_POINTS.fullmatch, points))):
        return [_number(cell.replace(",", "")) for cell in cells], False
    return [None] * len(cells), True


def _has_comma(cell: str) -> bool:
    """Whether a cell is a number with commas of either kind."""
    return bool(_FRACTION.fullmatch(cell) or _THOUSANDS.fullmatch(cell))


def fits_table(source: Source) -> bool:
    """Tell whether a file is a table: by its name, or by tabs that are as many in each line.

    Args:
        source: The file.

    Returns:
        Whether it is.
    """
    if source.named(".csv", ".tsv"):
        return bool(source.head.strip())
    lines = source.head.decode("latin-1").splitlines()[:20]
    whole = lines if len(source.head) < 2048 else lines[:-1]
    counts = {line.count("\t") for line in whole if line.strip()}
    return (
        len(whole) > 1 and len(counts) == 1 and counts.pop() > 0 and not source.named(".json", ".xml", ".svg", ".html")
    )


def table(source: Source) -> Content:
    """Read CSV or TSV: columns by name, cells of words, columns of numbers."""
    text = text_of(source)
    if text is None or not text.strip():
        raise Unreadable("it is no text")
    first = text.split("\n", 1)[0]
    delimiter = "\t" if not source.named(".csv") else max(",;\t", key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    width = max(map(len, rows))
    rows = [row + [""] * (width - len(row)) for row in rows]
    first_cells = [cell.strip() for cell in rows[0] if cell.strip()]
    has_header = not any(_has_comma(cell) or _number(cell) is not None for cell in first_cells)
    columns = [cell.strip() or str(number) for number, cell in enumerate(rows[0], start=1)] if has_header else []
    columns = columns or [str(number) for number in range(1, width + 1)]
    parts = Parts(source.volatile)
    rows_to_parts(parts, columns, rows[1:] if has_header else rows)
    return parts.content("table")


def rows_to_parts(parts: Parts, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Collect what a table says.

    Args:
        parts: What is filled.
        columns: Names of the columns.
        rows: Cells, as many in each row as there are columns.
    """
    columns = [f"{title} ({i + 1})" if columns.count(title) > 1 else title for i, title in enumerate(columns)]
    cells = [[row[position] for row in rows] for position in range(len(columns))]
    read = [_numbers(column) for column in cells]
    numbers, is_either = [column for column, _ in read], [either for _, either in read]
    is_number = [
        all(n is not None for n in column) and not all(math.isnan(n or 0.0) for n in column) for column in numbers
    ]
    titles, keys = _names_of_rows(parts, columns, cells, list(map(operator.or_, is_number, is_either)))
    order = list(range(len(rows)))
    if keys:
        order = sorted(order, key=lambda index: titles[index])
        titles = [titles[index] for index in order]
    parts.facts["columns"] = ", ".join(sorted(columns))
    parts.facts["rows"] = ", ".join(titles) if keys and len(titles) <= 2000 else str(len(rows))
    for position, column in enumerate(columns):
        title = f"column {column}"
        if parts.volatile.field(column) is FieldKind.VOLATILE and position not in keys:
            continue
        if is_number[position]:
            values = np.array([numbers[position][index] for index in order], dtype=np.float64)
            if values.size and all(math.isnan(v) or parts.volatile.is_epoch(column, v) for v in values.tolist()):
                continue
            names = tuple(titles) if keys else None
            parts.measures[title] = Measure(title, values, values.shape, place=_row_of(titles, column), keys=names)
        elif len(rows) > _MAX_ROWS_OF_WORDS:
            raise Unreadable(f"it has more than {_MAX_ROWS_OF_WORDS} rows of words")
        elif is_either[position]:
            for row, index in zip(titles, order, strict=True):
                label = f"row {row}, column {column}, with commas of fractions or of thousands"
                parts.word(label, cells[position][index], column)
        else:
            for row, index in zip(titles, order, strict=True):
                parts.text(f"row {row}, column {column}", cells[position][index], f"numbers in {title}", column)


def _names_of_rows(
    parts: Parts, columns: Sequence[str], cells: Sequence[Sequence[str]], holds_numbers: Sequence[bool]
) -> tuple[list[str], list[int]]:
    """Find the fewest columns that together name each row once: those named like keys, then the first of words."""
    count = len(cells[0]) if cells else 0
    by_number = [str(number) for number in range(1, count + 1)]
    named = [i for i, title in enumerate(columns) if _KEY.fullmatch("_".join(_SNAKE.split(title.lower())).strip("_"))]
    words = [i for i in range(len(columns)) if not holds_numbers[i] and i not in named]
    named = [i for i in named if not holds_numbers[i]] + [i for i in named if holds_numbers[i]]
    chosen: list[int] = []
    for position in itertools.chain(named, words):
        chosen.append(position)
        titles = [" ".join(parts.volatile.clean(cells[i][row].strip()).text for i in chosen) for row in range(count)]
        if len(set(titles)) == count:
            return titles, chosen
    return by_number, []


def _row_of(titles: Sequence[str], column: str) -> Callable[[int], str]:
    return lambda index: f"row {titles[index]}, column {column}"


def fits_statistics(source: Source) -> bool:
    """Tell whether a file is a table of FreeSurfer's statistics, such as `aseg.stats`.

    Args:
        source: The file.

    Returns:
        Whether it names the columns of one.
    """
    return source.named(".stats") and source.head.startswith(b"#")


def statistics(source: Source) -> Content:
    """Read `aseg.stats`, `aparc.stats` and the like: measures of the whole, and structures by name."""
    text = text_of(source)
    if text is None:
        raise Unreadable("it is no text")
    parts = Parts(source.volatile)
    columns: list[str] = []
    rows: list[list[str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            words = line.lstrip("# ").split()
            if words[:1] == ["ColHeaders"]:
                columns = words[1:]
            elif words[:1] == ["Measure"]:
                parts.text(f"measure {line[9:].split(',')[1].strip() if ',' in line else number}", line, "measures")
            else:
                parts.text(f"line {number}", line, "numbers in comments")
        elif line.strip():
            rows.append(line.split())
    if rows:
        width = max(map(len, rows))
        columns = columns if len(columns) == width else [str(n) for n in range(1, width + 1)]
        rows_to_parts(parts, columns, [row + [""] * (width - len(row)) for row in rows])
    return parts.content("FreeSurfer statistics")


def parquet(source: Source) -> Content:
    """Read Parquet or Arrow: rows by name like any table, large ones column by column in their order."""
    parts = Parts(source.volatile)
    if source.head.startswith(b"ARROW1"):
        loaded = library("pyarrow.feather", "pyarrow").read_table(source.path)
        metadata = loaded.schema.metadata or {}
    else:
        file = library("pyarrow.parquet", "pyarrow").ParquetFile(source.path)
        groups = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
        if sum(groups) > 16 * MAX_TEXT_BYTES:
            raise Unreadable(f"it unpacks to {sum(groups)} bytes")
        parts.environment["created by"] = str(file.metadata.created_by)
        loaded = file.read()
        metadata = file.schema_arrow.metadata or {}
    for key, value in metadata.items():
        name = key.decode("utf-8", "replace")
        if name == "pandas":
            walk(parts, json.loads(value), "pandas", "pandas")
        elif name != "ARROW:schema":
            parts.text(f"metadata {name}", value.decode("utf-8", "replace"), "metadata", name)
    for field in loaded.schema:
        parts.facts[f"type of {field.name}"] = str(field.type)
    if loaded.nbytes <= MAX_TEXT_BYTES:
        columns = [[_cell(value) for value in column.to_pylist()] for column in loaded.columns]
        rows_to_parts(parts, loaded.column_names, list(zip(*columns, strict=True)))
    else:
        for name, column in zip(loaded.column_names, loaded.columns, strict=True):
            values: Any = column.to_numpy()
            parts.measures |= measures_of(f"column {name}", source.spilled(values), values.shape, point="row")
    return parts.content("Parquet")


def _cell(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
