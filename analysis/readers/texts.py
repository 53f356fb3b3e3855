"""Texts: JSON, YAML, matrices of numbers, and lines of words with numbers in them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import yaml

from prefect_biomed.analysis.comparators import Content
from prefect_biomed.analysis.readers.source import Parts, Source, Unreadable, json_of, measures_of, text_of, walk

__all__ = ["json_lines", "json_tree", "text", "yaml_tree"]

_MATRIX = re.compile(r"[\s\d.+\-eEnNaAiIfF,;]*")
_COMMENT = re.compile(r"\s*(?:#|%|//)")


def _required(source: Source) -> str:
    text = text_of(source)
    if text is None:
        raise Unreadable("it is no text")
    return text


def json_tree(source: Source) -> Content:
    """Read JSON: texts and numbers by path; the order of keys does not count."""
    parts = Parts(source.volatile)
    walk(parts, json_of(_required(source)))
    return parts.content("JSON")


def json_lines(source: Source) -> Content:
    """Read one JSON value on each line."""
    parts = Parts(source.volatile)
    for number, line in enumerate(_required(source).splitlines()):
        if line.strip():
            walk(parts, json_of(line), f"$[{number}]", "$[*]")
    return parts.content("JSON")


# Of C where it is there: ten times faster, and just as safe.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def yaml_tree(source: Source) -> Content:
    """Read YAML: like JSON; no tag makes an object, and aliases may not unfold to millions of parts."""
    parts = Parts(source.volatile)
    documents = list(yaml.load_all(_required(source), Loader=_Loader))
    for number, document in enumerate(documents):
        walk(parts, document, f"${number}" if len(documents) > 1 else "$")
    return parts.content("YAML")


def text(source: Source) -> Content | None:
    """Read a text: numbers apart from words, line by line; a matrix of numbers as that.

    Returns:
        None when it is no text.
    """
    content = text_of(source)
    if content is None:
        return None
    lines = content.splitlines()
    parts = Parts(source.volatile)
    if (matrix := _matrix([line for line in lines if line.strip() and not _COMMENT.match(line)])) is not None:
        parts.measures |= measures_of("values", matrix.reshape(-1), matrix.shape, point="row, column")
        lines = [line if _COMMENT.match(line) else "" for line in lines]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            parts.text(f"line {number}", line, "numbers")
    return parts.content("text")


def _matrix(lines: list[str]) -> Any:
    """Rows of as many numbers each, or None."""
    if not lines or not all(_MATRIX.fullmatch(line) for line in lines[:1000]):
        return None
    rows = [re.split(r"[\s,;]+", line.strip(" \t,;")) for line in lines]
    width = len(rows[0])
    if width * len(rows) < 2 or any(len(row) != width for row in rows):
        return None
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError:
        return None
    # Whole numbers that floats cannot hold, and days or seconds that stand alone, are words rather than a matrix.
    return values if np.nanmax(np.abs(values), initial=0.0) < 1e15 else None
