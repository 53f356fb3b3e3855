"""Values of `input_settings`: what people write, in Python, in a table or in a form, as the values JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any

__all__ = ["INT64", "as_written", "from_json", "is_text", "named_values", "shown"]

INT64 = range(-(2**63), 2**63)
"""The whole numbers that platforms know."""

_ACCEPTED = "expected is a text, a number, true or false, a path, a date, or a list of these"
_LONGEST_SHOWN = 100


def shown(value: object) -> str:
    """Show a value in an error: in one line, and not in all its length.

    Args:
        value: Any value.

    Returns:
        The value as Python writes it.
    """
    text = " ".join(repr(value).split("\n"))
    return text[:_LONGEST_SHOWN] + ("…" if len(text) > _LONGEST_SHOWN else "")


def as_written(value: Any) -> Any:
    """Turn a value into one that JSON has, without changing what it says.

    Numbers of numpy and pandas become Python's, dates their ISO form, members of enumerations their values. Paths are
    written so that they stay recognisable as paths: absolute, or starting with `./`. Arrays, columns of tables, tuples
    and ranges become lists.

    Args:
        value: What was written.

    Returns:
        A text, a number, a truth value, None, or a list of these.

    Raises:
        ValueError: It is of another kind, says nothing, or would become another number; the message says where.
    """
    if isinstance(value, memoryview):
        value = value.tobytes()
    if hasattr(value, "to_numpy") and hasattr(value, "__len__"):
        value = value.to_numpy()
    if isinstance(value, list | tuple | range) or len(getattr(value, "shape", ())) > 0:
        return [_element(element, index) for index, element in enumerate(value)]
    return _single(value)


def named_values(settings: object) -> Any:
    """Turn all of `input_settings`; a text is read as JSON, which is how forms may give it.

    Args:
        settings: Values by parameter.

    Returns:
        The values by parameter as `as_written` gives them.

    Raises:
        ValueError: Some cannot be turned; one line with the name, the value, its type and what is accepted.
    """
    if isinstance(settings, str | bytes):
        try:
            settings = from_json(settings)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is a text that is no JSON ({error}); expected are values by parameter") from None
    if not isinstance(settings, Mapping):
        return settings
    values: dict[Any, Any] = {}
    problems: list[str] = []
    for name, value in settings.items():
        try:
            values[name] = as_written(value)
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return values


def _typed(value: object) -> str:
    return f"{shown(value)} of type {type(value).__name__}"


def is_text(text: str) -> bool:
    """Tell whether a text is one that files and requests can carry.

    Args:
        text: Any text; names of files may hold bytes that are none, which Python keeps as halves of characters.

    Returns:
        False when there is no Unicode for it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _element(element: object, index: int) -> Any:
    try:
        if isinstance(element, list | tuple | range) or len(getattr(element, "shape", ())) > 0:
            raise ValueError(f"{shown(element)} is a list in a list; {_ACCEPTED}")
        return _single(element)
    except ValueError as error:
        raise ValueError(f"element {index}: {error}") from None


def _single(value: object) -> Any:
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind is not None and not getattr(value, "mask", False):
        value = _of_numpy(value, kind)
    match value:
        case Enum():
            return as_written(value.value)
        case None | bool():
            return value
        case str() if is_text(value):
            return str(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Decimal():
            return _of_decimal(value)
        case str() | PurePath() if not is_text(str(value)):
            raise ValueError(f"{_typed(value)} has bytes in it that are no text; {_ACCEPTED}")
        case PurePath():
            return value.as_posix() if value.is_absolute() else f"./{value.as_posix()}"
        case datetime() | date() | time() if value == value:
            return value.isoformat()
        case _:
            raise ValueError(f"{_typed(value)} is no value; {_ACCEPTED}")


def _of_numpy(value: Any, kind: str) -> Any:
    """Turn a number of numpy; `item()` would make nanoseconds of dates, and 0.10000000149 of a short 0.1."""
    match kind:
        case "M" if str(value) != "NaT":
            return str(value)
        case "f":
            return _exact(float(str(value)), Decimal(str(value)), value)
        case "b" | "i" | "u" | "U" | "O":
            return value.item()
        case _:
            raise ValueError(f"{_typed(value)} is no value; {_ACCEPTED}")


def _of_decimal(value: Decimal) -> int | float:
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and 0 <= exponent < len(str(INT64.stop)):
        return int(value)
    return _exact(float(value), value, value)


def _exact(number: float, written: Decimal, value: object) -> float:
    if math.isfinite(number) and Decimal(repr(number)) != written:
        raise ValueError(f"{_typed(value)} has more digits than a number can carry; expected is at most 17, or a text")
    return number


def from_json(text: str | bytes) -> Any:
    """Read JSON, without changing what its numbers say.

    Args:
        text: The text.

    Returns:
        What it holds; a number with more digits than a float can carry as a `Decimal`, which `as_written` refuses.

    Raises:
        ValueError: It is no JSON (`JSONDecodeError`), or has a name twice.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_float=_number_of_json)


def _number_of_json(text: str) -> float | Decimal:
    number = float(text)
    return number if not math.isfinite(number) or Decimal(repr(number)) == Decimal(text) else Decimal(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(map(repr, twice))} is there twice; expected is one value for each parameter")
    return values
