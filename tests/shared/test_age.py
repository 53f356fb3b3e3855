"""Files of version 0.1 are read; a file of a later version is told apart from a damaged one."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from prefect_biomed.analysis.experiment import _JUDGEMENTS, Experiment, _JudgementRecord
from prefect_biomed.clients.boss.ledger import Ledger, TileState
from prefect_biomed.clients.errors import LedgerError
from prefect_biomed.clients.once import IntentFolder
from prefect_biomed.clients.vip.session_file import open_intents
from prefect_biomed.clients.vip.session_record import parse

FILES = Path(__file__).parents[1] / "vectors" / "files_0_1"

Read = Callable[[Path], object]


def _session(folder: Path) -> object:
    record = parse((folder / "session_data.json").read_bytes(), "x")
    (session,) = open_intents(folder)
    return record.workflow_ids(), session.session_name, session.pipeline_id, session.token


def _intents(folder: Path) -> object:
    store = IntentFolder(folder)
    known, doubtful = store.read("abcdefghij"), store.read("klmnopqrst")
    return known and known.id, doubtful and doubtful.is_in_doubt, doubtful and doubtful.asked["tile_count"]


def _ledger(folder: Path) -> object:
    with Ledger(folder, {"host": "h", "job": 1}) as ledger:
        return ledger.count(TileState.FINISHED)


def _experiment(folder: Path) -> object:
    return len(Experiment(folder).records()), {run.pipeline for run in Experiment(folder).records()}


def _judgements(folder: Path) -> object:
    return [line.series for line in Experiment(folder)._read(_JUDGEMENTS, _JudgementRecord)]


KINDS: dict[str, tuple[str, Read, object]] = {
    "session file": ("session_data.json", _session, (["workflow-ed82rl"], "session", "EveryType/1.0", "t0k3n")),
    "intents": ("abcdefghij.json", _intents, ("17", True, 64)),
    "ledger": ("*.sqlite", _ledger, 1),
    "experiment": ("experiment.jsonl", _experiment, (12, {"Strip/1.0"})),
    "judgements": ("judgements.jsonl", _judgements, ["series-2"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Path(shutil.copytree(FILES, tmp_path / "files"))
    with Ledger(made, {"host": "h", "job": 1}) as ledger:
        path = ledger.path
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript((made / "ledger.sql").read_text())
    connection.close()
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_first_version_are_read(folder: Path, kind: str) -> None:
    _, read, expected = KINDS[kind]
    assert read(folder) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_version_is_told_apart_from_damage(folder: Path, kind: str) -> None:
    pattern, read, _ = KINDS[kind]
    (path,) = folder.glob(pattern)
    whole = path.read_bytes()
    if path.suffix == ".sqlite":
        connection = sqlite3.connect(path)
        connection.execute("UPDATE about SET value = '99' WHERE name = 'format'")
        connection.commit()
        connection.close()
    else:
        first, *rest = whole.splitlines(keepends=True) if path.suffix == ".jsonl" else [whole]
        content = json.loads(first)
        content.get("prefect_biomed", content)["version"] = 99
        path.write_bytes(json.dumps(content | {"new": {"of": "later"}}).encode() + b"\n" + b"".join(rest))
    later = path.read_bytes()
    with pytest.raises(LedgerError, match=r"later version of prefect-biomed\. Update the\s+package"):
        read(folder)
    assert path.read_bytes() == later
    path.write_bytes(whole[:40] + b"\xff\x00 damage \n" + whole[90:])
    with pytest.raises(LedgerError, match=r"damaged"):
        read(folder)
    assert b"damage" in path.read_bytes()
