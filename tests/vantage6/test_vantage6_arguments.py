"""Arguments of any size: from memory or files to one encrypted payload for each organization."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from harness.federation import FAST, HOSPITALS, Federation, federation, token, wait
from prefect_biomed.clients.errors import ConfigurationError, PreflightFailed
from prefect_biomed.clients.vantage6 import Organization, PrivateKey, fetch_results, launch
from prefect_biomed.clients.vantage6.arguments import written_call
from prefect_biomed.clients.vantage6.encryption import decode_base64, encode_base64_stream
from prefect_biomed.clients.vantage6.models import ArgumentsFile
from prefect_biomed.sandbox import Fault

every_generation = pytest.mark.parametrize("generation", [3, 4, 5])
WEIGHTS = [round(number / 7, 6) for number in range(100_000)]


def content(
    generation: int, arguments: dict[str, Any], files: ArgumentsFile | None = None, *, central: bool = False
) -> Any:
    """The call of a function as the algorithm reads it."""
    with written_call(generation, "train", arguments, files, central=central) as call:
        text = b"".join(call.pieces())
    return json.loads(text.removeprefix(b"json.") if generation == 3 else text)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A JSON file of 900 kB with two arguments."""
    path = tmp_path / "weights.json"
    path.write_text("\ufeff \n" + json.dumps({"weights": WEIGHTS, "name": "größe"}, ensure_ascii=False, indent=1))
    return path


@every_generation
@pytest.mark.parametrize("around", [{}, {"rate": 0.5}])
def test_a_file_of_arguments_is_the_same_call_as_the_arguments(
    generation: int, around: dict[str, Any], weights: Path
) -> None:
    given = around | {"weights": WEIGHTS, "name": "größe"}
    assert content(generation, around, weights, central=True) == content(generation, given, central=True)


def test_single_arguments_come_from_files_of_their_own(tmp_path: Path, weights: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(bytes(range(256)) * 30_000)
    files: ArgumentsFile = {"model": model, "state": str(weights)}
    found = content(5, {"rate": 1}, files)
    assert found.keys() == {"rate", "model", "state"} and found["state"]["weights"] == WEIGHTS
    assert base64.b64decode(found["model"]) == model.read_bytes()


def test_files_may_be_in_shared_storage(weights: Path) -> None:
    with fsspec.open("memory://models/weights.json", "wb") as file:
        file.write(weights.read_bytes())
    assert content(5, {}, "memory://models/weights.json")["weights"] == WEIGHTS
    with pytest.raises(ConfigurationError, match="cannot be read") as refused:
        content(5, {}, "memory://models/none.json?signature=secret")
    assert "memory://models/none.json" in str(refused.value) and "signature" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "no JSON object"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1', "is not JSON"),
        ('{"rate": 1}', "has rate, and so has arguments"),
        ("", "is not JSON"),
    ],
)
def test_a_file_that_holds_no_arguments_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ConfigurationError, match=f"wrong.json.*{said}"):
        content(4, {"rate": 2}, tmp_path / "wrong.json")


@pytest.mark.parametrize("text", ["{}", " {\n} "])
@pytest.mark.parametrize("around", [{}, {"rate": 1}])
def test_an_empty_object_adds_nothing(text: str, around: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(text)
    assert content(5, around, tmp_path / "empty.json") == around


def test_what_is_wrong_with_files_is_told_with_all_else(here: Federation, tmp_path: Path) -> None:
    files = {"weights": tmp_path / "none.bin", "rate": tmp_path / "none.json"}
    request = here.request("echo", "nowhere", arguments={"rate": 1}, arguments_file=files)
    with here.client() as client, pytest.raises(PreflightFailed) as refused:
        launch(client, request, token(), folder=tmp_path / "intents")
    for part in ("none.bin", "none.json", "'rate' is in arguments, too", "'nowhere' is not a member"):
        assert part in str(refused.value)


@pytest.mark.parametrize("sizes", [[0], [1, 1, 1], [2, 5, 3_000_001], [4_000_000, 1]])
def test_pieces_of_any_size_make_one_message(sizes: list[int]) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    key = PrivateKey.generate(2048)
    assert key.decrypt(b"".join(key.public_key.encrypt_text_stream(pieces)).decode()) == b"".join(pieces)
    assert decode_base64(b"".join(encode_base64_stream(pieces)).decode()) == b"".join(pieces)


@every_generation
@pytest.mark.parametrize("collaboration", ["plain", "encrypted"])
def test_large_arguments_arrive(
    federations: Callable[[int], Federation], generation: int, collaboration: str, weights: Path, tmp_path: Path
) -> None:
    here = federations(generation)
    with here.client() as client:
        task = here.launch(client, "echo", collaboration=collaboration, arguments={"rate": 1}, arguments_file=weights)
        wait(client, task)
        results = fetch_results(client, task.id, output_dir=tmp_path)
    assert [one.organization for one in results] == list(HOSPITALS)
    assert all(one.value == {"rate": 1, "weights": WEIGHTS, "name": "größe"} for one in results)


@pytest.mark.parametrize("generation", [4, 5])
def test_large_arguments_go_through_a_blob_store_once_for_each_organization(
    generation: int, weights: Path, tmp_path: Path
) -> None:
    with federation(generation, {"blob_store": True}) as here, here.client() as client:
        data = here.data(client, "encrypted") if generation == 5 else {}
        here.sandbox.journal.clear()
        task = here.launch(client, "echo", collaboration="encrypted", arguments_file=weights, **data)
        (sent,) = here.sandbox.journal.entries("POST", "/task$")
        assert sent.bytes_in < 2000
        wait(client, task)
        results = fetch_results(client, task.id, output_dir=tmp_path)
        assert all(one.value == {"weights": WEIGHTS, "name": "größe"} for one in results)
        uploads = [one for one in here.sandbox.journal.entries("POST", "/blobstream$") if one.bytes_in > 900_000]
        assert len(uploads) == len(HOSPITALS)


def test_a_body_is_sent_whole_again_with_a_new_token(here: Federation, weights: Path, tmp_path: Path) -> None:
    expired = Fault(method="POST", path="/task$", times=1, status=401, body='{"msg": "Token has expired"}')
    here.sandbox.faults.add(expired)
    try:
        with here.client() as client:
            task = here.launch(client, "echo", "north", collaboration="encrypted", arguments_file=weights)
            wait(client, task)
            (result,) = fetch_results(client, task.id, output_dir=tmp_path)
    finally:
        here.sandbox.faults.clear()
    assert result.value == {"weights": WEIGHTS, "name": "größe"}


def test_the_watch_does_not_read_large_arguments_again_and_again(
    here: Federation, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_biomed.clients.vantage6.monitoring._RUNS_EVERY_SECONDS", 0.2)
    here.sandbox.add_image("tests/slow:1", {"slow": lambda job, **given: job.sleep(3.0)})
    with here.client() as client:
        for path, reads in ((weights, 2), (None, 5)):
            task = here.launch(client, "slow", image="tests/slow:1", arguments_file=path)
            here.sandbox.journal.clear()
            began = time.monotonic()
            wait(client, task, FAST)
            listed = here.sandbox.journal.entries("GET", "/run$")
            if path is None:
                assert len(listed) >= reads, "what small tasks print is followed"
            else:
                # One in which its size was seen, and the one at the end.
                assert len(listed) <= reads and time.monotonic() - began > 2.5


def test_a_body_in_a_file_is_the_one_in_memory(here: Federation) -> None:
    with here.client() as client, written_call(4, "echo", {"a": 1}) as call:
        members = client.records(Organization)[:2]
        with call.write_body(client, {"name": "n"}, members, encrypted=False) as body:
            body.seek(0)
            written = json.loads(body.read())
        whole = call.payloads(client, members, encrypted=False, mark=lambda _: None)
        assert written == {"name": "n", "organizations": whole}
