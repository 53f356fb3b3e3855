"""JSON answers with strings too long for memory."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from prefect_biomed.clients.errors import UnexpectedResponse
from prefect_biomed.clients.vantage6._long_json import LongText, read_json

MEMORY = 16 * 1024


def in_chunks(content: bytes, size: int) -> Iterator[bytes]:
    return (content[at : at + size] for at in range(0, len(content), size))


def read(content: bytes, size: int = 1000, memory: int = MEMORY) -> Any:
    """The document with its long strings put back."""
    with read_json(in_chunks(content, size), memory_bytes=memory, max_bytes=10**9, what="it") as document:
        return put_back(document)


def put_back(value: Any) -> Any:
    if isinstance(value, LongText):
        return json.loads(b'"' + b"".join(value.chunks()) + b'"')
    if isinstance(value, list):
        return [put_back(one) for one in value]
    return {name: put_back(one) for name, one in value.items()} if isinstance(value, dict) else value


def test_a_small_document_is_read_as_usual() -> None:
    assert read(b'{"a": [1, "\\u00e9", null]}') == {"a": [1, "é", None]}
    assert read(b"") is None


def test_only_long_strings_are_set_aside() -> None:
    document = {"data": [{"id": 1, "result": "A" * 50_000, "log": "short"}, {"id": 2, "result": None}]}
    content = json.dumps(document).encode()
    with read_json([content], memory_bytes=MEMORY, max_bytes=10**9, what="it") as read_back:
        first, second = read_back["data"]
        assert isinstance(first["result"], LongText) and first["result"].length == 50_000
        assert b"".join(first["result"].chunks()) == b"A" * 50_000
        assert first["log"] == "short" and second == {"id": 2, "result": None}


@pytest.mark.parametrize("seed", range(20))
def test_every_document_comes_back_as_it_was(seed: int) -> None:
    chance = random.Random(seed)
    letters = ['"', "\\", "\n", "é", "😀", "/", "a", "$", "\x00", " "]

    def text(length: int) -> str:
        return "".join(chance.choices(letters, k=length))

    document = [
        {text(3): text(chance.choice([0, 1, 50, 3000])), "n": chance.random(), "list": [text(2000)] * 3}
        for _ in range(20)
    ]
    for ascii_only in (True, False):
        content = json.dumps(document, ensure_ascii=ascii_only).encode()
        assert read(content, size=chance.choice([1, 7, 4096])) == document


@pytest.mark.parametrize("broken", [b"<html>", b'{"a": ', b'{"a": "' + b"x" * 50_000, b"nonsense" * 10_000])
def test_what_is_no_json_is_refused(broken: bytes) -> None:
    with pytest.raises(UnexpectedResponse, match="not JSON"):
        read(broken)


def test_a_document_above_the_limit_is_refused() -> None:
    with (
        pytest.raises(UnexpectedResponse, match="larger than 100 bytes"),
        read_json([b'"' + b"x" * 200 + b'"'], memory_bytes=MEMORY, max_bytes=100, what="it"),
    ):
        pass


def test_an_error_of_the_reader_is_not_taken_for_a_wrong_document() -> None:
    with pytest.raises(ValueError, match="mine"), read_json([b"1"], memory_bytes=9, max_bytes=9, what="it"):
        raise ValueError("mine")


def test_memory_stays_small() -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"data": [{"id": 1, "result": "'
        for _ in range(40):
            yield b"A" * 1024**2
        yield b'"}]}'

    tracemalloc.start()
    with read_json(chunks(), memory_bytes=2 * 1024**2, max_bytes=10**9, what="it") as document:
        total = sum(len(chunk) for chunk in document["data"][0]["result"].chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 40 * 1024**2
    assert peak < 10 * 1024**2
