"""Calls and results of vantage6: JSON only, in the form of each generation."""

import base64
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from prefect_biomed.clients.errors import ConfigurationError, UnsafeContent
from prefect_biomed.clients.vantage6.errors import ResultNotReadable, ResultUnavailable, UnsafeFormat
from prefect_biomed.clients.vantage6.payloads import encode_call, read_result

VECTORS = Path(__file__).parents[1] / "vectors" / "vantage6"
PAYLOADS: dict[str, Any] = {
    payload["name"]: payload for payload in json.loads((VECTORS / "v3_payloads.json").read_text())["payloads"]
}


def content(name: str) -> bytes:
    return base64.b64decode(PAYLOADS[name]["payload_base64"])


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


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", float("nan"), {"deep": [Path("x")]}])
def test_an_argument_that_is_no_json_is_named(value: object) -> None:
    with pytest.raises(ConfigurationError, match="'wrong'"):
        encode_call(4, "mean", {"fine": 1, "wrong": value}, central=False)


@pytest.mark.parametrize("name", ["json result", "json result upper case prefix"])
def test_json_of_generation_3(name: str) -> None:
    assert read_result(3, content(name), run_id=1) == PAYLOADS[name]["value"]


@pytest.mark.parametrize("name", ["LEGACY pickle (no prefix)", "pickle with prefix"])
def test_pickles_of_generation_3_are_refused(name: str) -> None:
    with pytest.raises(UnsafeFormat, match="pickle"):
        read_result(3, content(name), run_id=1)


def test_json_without_prefix_is_read_by_generation_3() -> None:
    assert read_result(3, content("no prefix, plain json"), run_id=1) == {"average": 53.25}


def test_another_format_is_refused() -> None:
    with pytest.raises(ResultNotReadable, match="'csv'"):
        read_result(3, content("unknown format"), run_id=1)


@pytest.mark.parametrize("major", [3, 4, 5])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("prefix", [b"", b"pickle.", b"json."])
def test_a_canary_in_a_pickle_does_not_run(major: int, protocol: int, prefix: bytes, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Canary:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    loaded = pickle.dumps(Canary(), protocol)
    with pytest.raises(ResultUnavailable):
        read_result(major, prefix + loaded, run_id=1)
    assert not canary.exists()
    # The canary is alive: whoever unpickles it makes the folder.
    pickle.loads(loaded)
    assert canary.exists()


@pytest.mark.parametrize("wrong", [b"", b"plain words", b"\xff\xfe\x00", b"{'single': 1}", b'{"cut": '])
def test_what_is_no_json_is_handed_back_in_the_error(wrong: bytes) -> None:
    with pytest.raises(ResultNotReadable) as refused:
        read_result(4, wrong, run_id=7)
    assert refused.value.content == wrong
    assert refused.value.size_bytes == len(wrong)
    assert "run 7" in str(refused.value)


def test_a_refused_pickle_is_unsafe_content() -> None:
    assert issubclass(UnsafeFormat, UnsafeContent)
