"""What is inside a run's result: whatever an algorithm answers with.

Generation 3 puts a format's name before JSON and pickles (``json.{…}``); nothing else says what a result is, so it is
recognised by its first bytes, in the same way whatever its size. Python pickles, the default of generation 3, are
refused: reading one can run code.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import pickletools
import re

from pydantic import JsonValue

from prefect_biomed.clients.vantage6.errors import ResultNotReadable, UnsafeFormat

__all__ = ["START_BYTES", "decode_json", "is_whole_json", "recognise"]

START_BYTES = 65536
"""So much of a result tells what it is."""

_PREFIX = re.compile(rb"(json|pickle)\.", re.IGNORECASE)
# A pickle of protocol 2 or later begins with PROTO and its number. Older ones begin with a container, a text or the
# name of a class, and what puts it into the memo.
_PICKLE = re.compile(
    rb"\x80[\x02-\x0f]|\([dl]p\d+\n|\([IF][-+.\de]+\n|[\]}]q\x00|X.{3}\x00|V[^\n]*\np0\n"
    rb"|c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n(p\d+\n|q\x00)",
    re.DOTALL,
)
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"PAR1", "parquet"),
    (0, b"ARROW1\0\0", "arrow"),
    (0, b"FEA1", "feather"),
    (0, b"\xff\xff\xff\xff", "arrows"),
    (0, b"\x89PNG\r\n\x1a\n", "png"),
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"%PDF-", "pdf"),
    (0, b"\x93NUMPY", "npy"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"\x1f\x8b", "gz"),
    (0, b"\x28\xb5\x2f\xfd", "zst"),
    (0, b"\x89HDF\r\n\x1a\n", "h5"),
    (0, b"SQLite format 3\0", "sqlite"),
    (128, b"DICM", "dcm"),
    (344, b"n+1\0", "nii"),
)
_DELIMITERS = {",": "csv", ";": "csv", "\t": "tsv"}
_ROWS_COMPARED = 20
# Minus infinity.
_LONGEST_WORD = 10
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_CLOSING = {b"{": b"}", b"[": b"]", b'"': b'"'}


def recognise(major: int, start: bytes, *, complete: bool, run_id: int) -> tuple[str, int]:
    """Tell from its first bytes what an output is.

    Args:
        major: Generation of the server, 3, 4 or 5.
        start: The output, or its first `START_BYTES`.
        complete: Whether this is all of it.
        run_id: The run, for messages.

    Returns:
        The format by the usual extension of its files: ``json``, ``csv``, ``parquet``, ``png`` and so on, ``txt`` for
        another text, ``bin`` for what is not known. And how many bytes of a prefix come before it.

    Raises:
        UnsafeFormat: The output is a pickle. It was not read.
    """
    prefix = _PREFIX.match(start) if major == 3 else None
    skipped = prefix.end() if prefix else 0
    content = start[skipped:]
    if (prefix and prefix[1].lower() == b"pickle") or _is_pickle(content, complete):
        raise UnsafeFormat(
            f"The result of run {run_id} is a Python pickle, which could run code on this machine. It was not read. "
            "Ask for JSON: the task's input needs output_format 'json', and the algorithm must honour it."
        )
    if prefix:
        return "json", skipped
    for place, magic, name in _MAGIC:
        if content.startswith(magic, place):
            return name, 0
    if content[8:9] == b"{" and 2 <= int.from_bytes(content[:8], "little") < 100 * 1024**2:
        return "safetensors", 0
    text = _text_of(content, complete)
    return ("bin" if text is None else _kind_of_text(text, complete)), 0


def _is_pickle(content: bytes, complete: bool) -> bool:
    if _PICKLE.match(content):
        return True
    if not complete or not content.endswith(b"."):
        return False
    try:
        # Follows the instructions without carrying them out.
        pickletools.dis(content, out=io.StringIO())
    except Exception:
        # It stumbles over what is no pickle in many ways.
        return False
    return True


def _text_of(content: bytes, complete: bool) -> str | None:
    try:
        # What is cut off may end within a letter.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=complete)
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) else text


def _kind_of_text(text: str, complete: bool) -> str:
    stripped = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(stripped)
    except RecursionError:
        return "json"
    except json.JSONDecodeError as error:
        in_text = error.msg.startswith("Unterminated string")
        cut_off = in_text or error.pos >= len(stripped.rstrip()) - (1 if complete else _LONGEST_WORD)
        if (stripped[:1] in ("{", "[") and cut_off) or (in_text and not complete):
            return "json"
    else:
        rest = stripped[end:]
        # Where only the beginning is here, a number that ends with it may go on.
        if not rest.strip() and (complete or not isinstance(value, int | float)):
            return "json"
        if isinstance(value, dict | list) and rest.lstrip(" ").startswith(("\n", "\r\n")):
            return "jsonl"
    return _kind_of_table(text, complete) or "txt"


def _kind_of_table(text: str, complete: bool) -> str | None:
    lines = text.splitlines(keepends=True)[: _ROWS_COMPARED + 1]
    if not complete and len(lines) <= _ROWS_COMPARED:
        lines = lines[:-1]
    for delimiter, name in _DELIMITERS.items():
        try:
            rows = [row for row in csv.reader(lines[:_ROWS_COMPARED], delimiter=delimiter) if row]
        except csv.Error:
            continue
        named = bool(rows) and all(cell and cell == cell.strip() for cell in rows[0][1:])
        if len(rows) > 1 and len(rows[0]) > 1 and named and all(len(row) == len(rows[0]) for row in rows):
            return name
    return None


def is_whole_json(start: bytes, end: bytes) -> bool:
    """Tell whether an output that begins as JSON also ends as JSON does, where it is too large to be read.

    Args:
        start: Its first bytes.
        end: Its last bytes.
    """
    first, last = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1], end.rstrip()[-1:]
    return last == _CLOSING.get(first, last)


def decode_json(text: bytes, *, run_id: int | None) -> JsonValue:
    """Decode an output that `recognise` takes for JSON.

    Args:
        text: The output without prefix.
        run_id: The run, for messages.

    Raises:
        ResultNotReadable: It begins as JSON and is not: it was cut short or damaged.
    """
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        raise ResultNotReadable(
            f"The result of run {run_id} ({len(text)} bytes) begins as JSON and does not go on so: it was cut short or "
            "damaged, perhaps by the algorithm that wrote it.",
            content=text,
            size_bytes=len(text),
        ) from None
    return value
