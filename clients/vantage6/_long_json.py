"""JSON answers that may hold strings too long for memory: these stay on disk, the rest is read as usual."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from prefect_biomed.clients.errors import UnexpectedResponse

__all__ = ["LongText", "TooLarge", "read_json"]

_CHUNK_BYTES = 1024 * 1024


class TooLarge(UnexpectedResponse):
    """An answer is larger than somebody wants to read."""


class LongText:
    """A string of a JSON document that was left on disk. Good while the document is open.

    Args:
        file: The document.
        start: Position of the first byte after the opening quote.
        length: Number of bytes before the closing quote.
    """

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file = file
        self._start = start
        self.length = length

    def chunks(self) -> Iterator[bytes]:
        """Read the text piece by piece, as it is in the document: escapes are not undone."""
        position, end = self._start, self._start + self.length
        while position < end:
            self._file.seek(position)
            chunk = self._file.read(min(_CHUNK_BYTES, end - position))
            position += len(chunk)
            yield chunk


@contextmanager
def read_json(chunks: Iterable[bytes], *, memory_bytes: int, max_bytes: int, what: str) -> Iterator[Any]:
    """Read a JSON document that arrives in pieces.

    Args:
        chunks: The document.
        memory_bytes: Up to this size it is read as usual. In a larger one, strings longer than a sixteenth of this
            become `LongText`, so that memory stays near this bound.
        max_bytes: A larger document is refused.
        what: What it is, for messages.

    Yields:
        The decoded document; None for an empty one.

    Raises:
        TooLarge: It is.
        UnexpectedResponse: It is not JSON, or large although none of its strings is long.
    """
    with tempfile.SpooledTemporaryFile(max_size=memory_bytes) as file:
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise TooLarge(f"{what} is larger than {max_bytes} bytes. It was not read.")
            file.write(chunk)
        file.seek(0)
        try:
            if size <= memory_bytes:
                document = json.loads(file.read() or b"null")
            else:
                document = _read_large(file, memory_bytes, what)
        except (ValueError, RecursionError) as error:
            raise UnexpectedResponse(f"{what} is not JSON: {type(error).__name__}.") from None
        yield document


def _read_large(file: Any, memory_bytes: int, what: str) -> Any:
    # Nobody who writes the document knows the mark, so no string of it can pass for one.
    mark = f"long-text-{secrets.token_hex(16)}-"
    shortened, spans = _set_long_strings_aside(file, memory_bytes // 16, mark, most_bytes=16 * memory_bytes, what=what)
    texts = {f"{mark}{number}": LongText(file, start, length) for number, (start, length) in enumerate(spans)}
    return _with_long_texts(json.loads(shortened), texts)


def _set_long_strings_aside(
    file: IO[bytes], long_bytes: int, mark: str, *, most_bytes: int, what: str
) -> tuple[bytes, list[tuple[int, int]]]:
    """Copy a document without its long strings, and note where these are."""
    shortened = bytearray()
    spans: list[tuple[int, int]] = []
    offset = 0
    start = -1  # Position of the string we are in, -1 outside of strings.
    kept = bytearray()  # Its beginning, until it turns out to be long.
    escaped = False
    while chunk := file.read(_CHUNK_BYTES):
        at = 0
        quote = backslash = -1  # The next ones from `at` on, found when needed.
        while at < len(chunk):
            if escaped:
                kept += chunk[at : at + 1]
                escaped, at = False, at + 1
            if quote < at:
                quote = _find(chunk, b'"', at)
            if start < 0:
                end = min(quote + 1, len(chunk))
                shortened += chunk[at:end]
                if quote < len(chunk):
                    start, kept = offset + end, bytearray()
                at = end
                continue
            if backslash < at:
                backslash = _find(chunk, b"\\", at)
            end = min(quote, backslash)
            if len(kept) <= long_bytes:
                kept += chunk[at:end]
            at = end + 1
            if end == backslash < len(chunk):
                kept += b"\\"
                escaped = True
            elif end == quote < len(chunk):
                if len(kept) > long_bytes:
                    kept = bytearray(f"{mark}{len(spans)}", "ascii")
                    spans.append((start, offset + end - start))
                shortened += kept + b'"'
                start = -1
        offset += len(chunk)
        if len(shortened) > most_bytes:
            raise UnexpectedResponse(f"{what} is too large for memory, although no text in it is. It was not read.")
    return bytes(shortened), spans


def _find(chunk: bytes, byte: bytes, start: int) -> int:
    found = chunk.find(byte, start)
    return len(chunk) if found < 0 else found


def _with_long_texts(value: Any, texts: Mapping[str, LongText]) -> Any:
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, list):
        return [_with_long_texts(one, texts) for one in value]
    if isinstance(value, dict):
        return {name: _with_long_texts(one, texts) for name, one in value.items()}
    return value
