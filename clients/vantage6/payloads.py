"""What is inside a task's input and a run's result: the call of a function, and JSON.

Generation 3 puts the format's name before the content (``json.{…}``), generations 4 and 5 always send JSON. Python
pickles, the default of generation 3, are recognised by their format and refused: reading one can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from prefect_biomed.clients.errors import ConfigurationError
from prefect_biomed.clients.vantage6.errors import ResultNotReadable, UnsafeFormat

__all__ = ["check_start", "decode_json", "encode_call", "read_result"]

_PREFIX = re.compile(rb"([A-Za-z0-9_-]{1,10})\.")
# A pickle of protocol 2 or later begins with PROTO and its number and ends with STOP. Older ones are text that is
# never JSON, so they are refused as unreadable.
_PICKLE = re.compile(rb"\x80[\x02-\x0f]")


def encode_call(major: int, method: str, arguments: Mapping[str, Any], *, central: bool) -> bytes:
    """Write the call of an algorithm's function as a task carries it, before encryption.

    Args:
        major: Generation of the server, 3, 4 or 5.
        method: Name of the function. Generation 5 sends it outside of this.
        arguments: Keyword arguments of the function.
        central: Whether the function coordinates others (generation 3 calls it master).

    Returns:
        The JSON text in UTF-8, with the prefix that generation 3 needs.

    Raises:
        ConfigurationError: An argument is not JSON; the message names it.
    """
    for name, value in arguments.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"Argument {name!r} of {method!r} is not JSON: {error}.") from None
    call: dict[str, Any] = dict(arguments)
    if major == 3:
        # Without an output format the algorithm would answer with a pickle.
        call = {"master": central, "method": method, "args": [], "kwargs": call, "output_format": "json"}
    elif major == 4:
        call = {"method": method, "kwargs": call}
    text = json.dumps(call, allow_nan=False).encode()
    return b"json." + text if major == 3 else text


def read_result(major: int, content: bytes, *, run_id: int) -> JsonValue:
    """Read the output of a run after decryption.

    Args:
        major: Generation of the server, 3, 4 or 5.
        content: The decrypted bytes.
        run_id: The run, for messages.

    Returns:
        The decoded JSON.

    Raises:
        UnsafeFormat: The output is a pickle. It was not read.
        ResultNotReadable: The output is not JSON: the algorithm wrote something else, or the private key is wrong.
    """
    return decode_json(check_start(major, content, run_id=run_id), run_id=run_id)


def decode_json(text: bytes, *, run_id: int) -> JsonValue:
    """Decode an output that has passed `check_start` as a whole.

    Args:
        text: The output without prefix.
        run_id: The run, for messages.

    Raises:
        ResultNotReadable: It is not JSON.
    """
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        raise ResultNotReadable(
            f"The result of run {run_id} ({len(text)} bytes) is not JSON. Either the algorithm answers with something "
            "else, or the private key is not the one of the organization that asked.",
            content=text,
            size_bytes=len(text),
        ) from None
    return value


def check_start(major: int, start: bytes, *, run_id: int) -> bytes:
    """Check from its first bytes that an output claims to be JSON.

    Args:
        major: Generation of the server, 3, 4 or 5.
        start: The output, or the first part of it.
        run_id: The run, for messages.

    Returns:
        The same without the prefix of generation 3.

    Raises:
        UnsafeFormat: The output is a pickle. It was not read.
        ResultNotReadable: The output says that it is something else.
    """
    text = start
    if major == 3 and (prefix := _PREFIX.match(start)):
        format_name = prefix.group(1).lower()
        text = start[prefix.end() :]
        if format_name == b"pickle":
            raise _pickled(run_id)
        if format_name != b"json":
            raise ResultNotReadable(
                f"Run {run_id} answers in the format {format_name.decode()!r}, which is not JSON.",
                content=start,
                size_bytes=len(start),
            )
    if _PICKLE.match(text):
        raise _pickled(run_id)
    return text


def _pickled(run_id: int) -> UnsafeFormat:
    return UnsafeFormat(
        f"The result of run {run_id} is a Python pickle, which could run code on this machine. It was not read. "
        "Ask for JSON: the task's input needs output_format 'json', and the algorithm must honour it."
    )
