"""What version 0.1 has begun, this version ends: the package is replaced in the middle of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.serializers import JSONSerializer

from chaos.kills import ON_VIP, RUNS, Kill, connected, session_of, take_up_again, wind, work, write_inputs
from harness.federation import Federation, federations, token
from harness.ingest_lab import Lab, lab, make_lab, volume
from prefect_biomed.clients.boss import IngestConfig, IngestJob, create_once
from prefect_biomed.clients.vantage6 import launch
from prefect_biomed.clients.vip import SessionFile
from prefect_biomed.sandbox import Sandbox

__all__ = ["federations", "lab", "make_lab"]

FILES = Path(__file__).parents[1] / "vectors" / "files_0_1"
KIND = ON_VIP[0]
# Mappings whose keys are names, not fields.
NAMES = {"intents", "launches", "uploads", "ended", "expected", "given", "input_settings", "workflows"}


class Killed(BaseException):
    """Stands for the end of a process."""


def end() -> None:
    raise Killed


def as_first_version(content: Any, example: Any, name: str = "") -> Any:
    """Leave out what version 0.1 did not write.

    Args:
        content: What this version has written.
        example: The same kind of record as 0.1 wrote it.
        name: The field that holds it.
    """
    if not isinstance(content, dict) or not isinstance(example, dict):
        return content
    if name in NAMES:
        one = next(iter(example.values()), None)
        return {key: as_first_version(value, one) for key, value in content.items()}
    return {key: as_first_version(value, example[key], key) for key, value in content.items() if key in example}


def rewrite(file: Path, example: str) -> None:
    """Give a record the form of version 0.1."""
    old = as_first_version(json.loads(file.read_text()), json.loads((FILES / example).read_text()))
    file.write_text(json.dumps(old))


@pytest.mark.parametrize("part", [0.15, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_session_that_the_first_version_has_begun_is_ended_by_this_one(
    part: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Sandbox("vip", vip={"delete_seconds": 0}) as sandbox:
        facts = sandbox.vip.ready()

        def begin(name: str, kill: Kill | None) -> list[str]:
            write_inputs(tmp_path / name)
            with connected(facts) as client, monkeypatch.context() as patch:
                passed = wind(kill, end, patch.setattr)
                try:
                    work(client, session_of(name, tmp_path / name, KIND), lambda _, do: do())
                except Killed:
                    return passed
                assert kill is None
                return passed

        moments = len(begin("whole", None))
        moment = round(part * moments)
        begin("upgraded", Kill(moment, after=True))
        record = SessionFile(session_of("upgraded", tmp_path / "upgraded", KIND)).path
        new = record.read_text()
        rewrite(record, "session_data.json")
        assert record.read_text() != new
        with connected(facts) as client:
            files = take_up_again(client, "upgraded", tmp_path / "upgraded" / "out", KIND)
        assert len(files) == RUNS * len(KIND.contents)
        launched = [one for one in sandbox.vip.journal.entries("POST", "/executions") if one.status == 200]
        assert len(launched) == 2 * RUNS


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "in doubt"])
def test_a_task_that_the_first_version_has_begun_is_taken_by_this_one(
    federations: Callable[[int], Federation], answered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, name = federations(4), token()
    request = here.request("echo", arguments={"x": 1})
    before = here.tasks_created()
    with here.client() as client, monkeypatch.context() as patch:
        if not answered:
            send = client.create_task
            patch.setattr(client, "create_task", lambda body: (send(body), end()))
            with pytest.raises(Killed):
                launch(client, request, name, folder=tmp_path)
        else:
            launch(client, request, name, folder=tmp_path)
    (record,) = tmp_path.glob("*.json")
    rewrite(record, "abcdefghij.json")
    with here.client() as client:
        task = launch(client, request, name, folder=tmp_path)
    assert name in task.name and here.tasks_created() == before + 1


@pytest.mark.parametrize("answered", [True, False], ids=["answered", "in doubt"])
def test_an_ingest_that_the_first_version_has_begun_is_taken_by_this_one(
    lab: Lab, answered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.write_stack(volume((16, 512, 512)))
    config = IngestConfig.load(lab.config())

    def create() -> IngestJob:
        return create_once(lab.client, config, "klmnopqrst", settle_seconds=5.0, folder=tmp_path)

    with monkeypatch.context() as patch:
        if not answered:
            send = lab.client.create
            patch.setattr(lab.client, "create", lambda config: (send(config), end()))
            with pytest.raises(Killed):
                create()
        else:
            create()
    rewrite(tmp_path / "klmnopqrst.json", "klmnopqrst.json")
    assert create().id == 1
    assert list(lab.boss.service.jobs) == [1]


def test_what_the_first_version_has_finished_is_not_done_again() -> None:
    """Prefect keeps the results of what is done once, and gives them to the version that goes on."""
    lines = (FILES / "results.jsonl").read_text().splitlines()
    kinds = set()
    for line in lines:
        kept = json.loads(line)
        result = JSONSerializer().loads(line.encode())
        kinds.add(type(result).__name__)
        assert type(result).__name__ == kept["__class__"].rpartition(".")[2]
        assert kept["data"].items() <= result.model_dump(mode="json").items()
    assert kinds == {"IngestJob", "Task", "Session", "Organization", "UploadSummary", "VipSession", "Workflow"}
