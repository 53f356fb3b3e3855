"""Calls and results of vantage6 in the form of each generation: JSON is read, all else is recognised."""

import base64
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.errors import ConfigurationError, UnsafeContent
from prefect_biomed.clients.vantage6.arguments import written_call
from prefect_biomed.clients.vantage6.errors import ResultNotReadable, ResultUnavailable, UnsafeFormat
from prefect_biomed.clients.vantage6.payloads import START_BYTES, decode_json, recognise

VECTORS = Path(__file__).parents[1] / "vectors" / "vantage6"
PAYLOADS: dict[str, Any] = {
    payload["name"]: payload for payload in json.loads((VECTORS / "v3_payloads.json").read_text())["payloads"]
}


def encode_call(major: int, method: str, arguments: dict[str, Any], *, central: bool) -> bytes:
    with written_call(major, method, arguments, central=central) as call:
        return b"".join(call.pieces())


def content(name: str) -> bytes:
    return base64.b64decode(PAYLOADS[name]["payload_base64"])


def read(major: int, output: bytes, run_id: int = 1) -> Any:
    """The format and, decoded when it is JSON, the output."""
    name, skipped = recognise(major, output[:START_BYTES], complete=len(output) <= START_BYTES, run_id=run_id)
    return name, decode_json(output[skipped:], run_id=run_id) if name == "json" else output[skipped:]


def repr_of(value: object) -> str:
    return repr(value)[:20]


def test_all_vectors_are_here() -> None:
    assert len(PAYLOADS) == 7


def test_a_call_of_generation_3_asks_for_json() -> None:
    call = encode_call(3, "master", {"column_name": "age"}, central=True)
    assert call.startswith(b"json.")
    theirs = PAYLOADS["json input"]["value"]
    assert json.loads(call[5:]) == theirs | {"args": []}


def test_calls_of_generations_4_and_5() -> None:
    assert json.loads(encode_call(4, "mean", {"column": "age"}, central=False)) == {
        "method": "mean",
        "kwargs": {"column": "age"},
    }
    assert json.loads(encode_call(5, "mean", {"column": "age"}, central=False)) == {"column": "age"}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", float("nan"), {"deep": [Path("x")]}, {1: "a", "1": "b"}])
def test_an_argument_that_is_no_json_is_named(value: object) -> None:
    with pytest.raises(ConfigurationError, match="'wrong'"):
        encode_call(4, "mean", {"fine": 1, "wrong": value}, central=False)


@pytest.mark.parametrize("name", ["json result", "json result upper case prefix"])
def test_json_of_generation_3(name: str) -> None:
    assert read(3, content(name)) == ("json", PAYLOADS[name]["value"])


@pytest.mark.parametrize("name", ["LEGACY pickle (no prefix)", "pickle with prefix"])
def test_pickles_of_generation_3_are_refused(name: str) -> None:
    with pytest.raises(UnsafeFormat, match="pickle"):
        read(3, content(name))


def test_json_without_prefix_is_read_by_generation_3() -> None:
    assert read(3, content("no prefix, plain json")) == ("json", {"average": 53.25})


def test_another_prefix_belongs_to_the_output() -> None:
    assert read(3, content("unknown format"))[1] == content("unknown format")


@pytest.mark.parametrize("major", [3, 4, 5])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("prefix", [b"", b"pickle.", b"json."])
def test_a_canary_in_a_pickle_does_not_run(major: int, protocol: int, prefix: bytes, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    loaded = pickle.dumps(Canary(), protocol)
    if prefix and major > 3:
        # Only generation 3 has prefixes; with one, the bytes are no pickle.
        assert read(major, prefix + loaded)[1] == prefix + loaded
    else:
        with pytest.raises(ResultUnavailable):
            read(major, prefix + loaded)
    assert not canary.exists()
    # The canary is alive: whoever unpickles it makes the folder.
    pickle.loads(loaded)
    assert canary.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value", [{"a": 1}, [1, 2], (1, 2.5), "a text", {"deep": [1] * 50_000}, [0.5] * 50_000, Path("x")], ids=repr_of
)
def test_pickles_of_all_protocols_are_refused(protocol: int, value: object) -> None:
    with pytest.raises(UnsafeFormat, match="pickle"):
        read(4, pickle.dumps(value, protocol))


@pytest.mark.parametrize("cut", [b'{"cut": ', b"[1, 2", b'{"a": {"b": "text'])
def test_json_that_was_cut_short_is_said_and_handed_back(cut: bytes) -> None:
    with pytest.raises(ResultNotReadable) as refused:
        read(4, cut, run_id=7)
    assert (refused.value.content, refused.value.size_bytes) == (cut, len(cut))
    assert "run 7" in str(refused.value)


KINDS: list[tuple[bytes, str]] = [
    (b"age,group\n30,a\n31,b\n", "csv"),
    (b'"age","group, or ward"\n30,"a"\n', "csv"),
    ("\ufeffage;Größe\n30;1,80\n".encode(), "csv"),
    (b"age\tgroup\n30\ta\n", "tsv"),
    (b'{"a": 1}\n{"a": 2}\n', "jsonl"),
    (b"plain words", "txt"),
    (b"Dear all,\nthe count is 3, regards, North\n", "txt"),
    (b"{'single': 1}", "txt"),
    (b"[section]\nkey = 1\n", "txt"),
    (b"30\n31\n", "txt"),
    (b"count\nnorth\nquery\n", "txt"),
    (b"hello.", "txt"),
    (b"PAR1" + bytes(100), "parquet"),
    (b"ARROW1\0\0" + bytes(100), "arrow"),
    (b"\x89PNG\r\n\x1a\n" + bytes(100), "png"),
    ((2).to_bytes(8, "little") + b"{}", "safetensors"),
    (bytes(128) + b"DICM" + bytes(10), "dcm"),
    (b"\xff\xfe\x00", "bin"),
    (b"\x80\x81\x82", "bin"),
]


@pytest.mark.parametrize("major", [3, 4, 5])
@pytest.mark.parametrize(("output", "kind"), KINDS, ids=[f"{kind}-{place}" for place, (_, kind) in enumerate(KINDS)])
def test_what_is_no_json_is_recognised_and_handed_on(output: bytes, kind: str, major: int) -> None:
    assert read(major, output) == (kind, output)


@pytest.mark.parametrize(
    "output",
    [
        b'{"numbers": [' + b"0.123456789, " * 20_000 + b"1]}",
        b"[" + b"NaN, -Infinity, " * 20_000 + b"Infinity]",
        b'"' + b"text of a table " * 20_000 + b'"',
        b"1" * 4000,
        b'\xef\xbb\xbf{"with": "a mark"}',
        b" \n[true]",
        b"null",
        b"NaN",
    ],
    ids=lambda output: output[:12].decode("latin-1"),
)
def test_json_is_json_whatever_its_size(output: bytes) -> None:
    assert read(4, output)[0] == "json"


def test_tables_are_tables_whatever_their_size() -> None:
    for rows in (2, 20_000):
        assert read(5, b"age,group\n" + b"30,a\n" * rows)[0] == "csv"
        assert read(5, b'{"age": 30}\n' * rows)[0] == "jsonl"


def test_a_refused_pickle_is_unsafe_content() -> None:
    assert issubclass(UnsafeFormat, UnsafeContent)
