"""The ledger of a job: who may read it, and what is said when it cannot be used."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from prefect_biomed.clients.boss import Ledger
from prefect_biomed.clients.boss.ledger import LedgerEntry, TileState
from prefect_biomed.clients.errors import LedgerError, LocalStorageError

IDENTITY: dict[str, str | int] = {"host": "h", "job": 1}


def made(folder: Path) -> Path:
    with Ledger(folder, IDENTITY) as ledger:
        ledger.mark([("a", "c", "m")], TileState.FINISHED)
        return ledger.path


def change(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def test_a_ledger_is_readable_for_its_owner_only_whatever_it_is_made_of(tmp_path: Path) -> None:
    with Ledger(tmp_path, IDENTITY) as ledger:
        ledger.mark([("a", "c", "m")], TileState.FINISHED)
        files = sorted(path for path in tmp_path.iterdir() if path.name.startswith(ledger.path.name))
        assert len(files) == 3  # with the journal and its index
        assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o600)}


def test_a_ledger_is_read_again(tmp_path: Path) -> None:
    made(tmp_path)
    with Ledger(tmp_path, IDENTITY) as ledger:
        assert ledger.count(TileState.FINISHED) == 1


def test_a_damaged_ledger_is_left_untouched(tmp_path: Path) -> None:
    path = made(tmp_path)
    path.write_bytes(b"no database at all " * 100)
    with pytest.raises(LedgerError, match=r"is damaged.*left as it is"):
        Ledger(tmp_path, IDENTITY)
    assert path.read_bytes() == b"no database at all " * 100


def test_a_ledger_of_a_later_version_asks_for_the_newer_package(tmp_path: Path) -> None:
    path = made(tmp_path)
    change(path, "DROP TABLE quarantine")
    change(path, "UPDATE about SET value = '3' WHERE name = 'format'")
    with pytest.raises(LedgerError, match=r"later version of prefect-biomed\. Update the package"):
        Ledger(tmp_path, IDENTITY)
    with sqlite3.connect(path) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert "quarantine" not in tables


def test_a_ledger_of_the_first_format_is_read_and_goes_on(tmp_path: Path) -> None:
    path = made(tmp_path)
    for statement in (
        "DROP TABLE tiles",
        "CREATE TABLE tiles (tile TEXT PRIMARY KEY, chunk TEXT NOT NULL, message TEXT NOT NULL, "
        "state INTEGER NOT NULL) WITHOUT ROWID",
        "INSERT INTO tiles VALUES ('a', 'c', 'm', 3)",
        "DROP TABLE blank",
        "DROP TABLE runs",
        "UPDATE about SET value = '1' WHERE name = 'format'",
    ):
        change(path, statement)
    for _ in range(2):
        with Ledger(tmp_path, IDENTITY) as ledger:
            assert ledger.entries(["a"]) == {"a": LedgerEntry(TileState.FINISHED, "m", None)}
            ledger.mark([("a", "c", "m")], TileState.FINISHED, 5.0)
            assert ledger.entries(["a"])["a"].done_at == 5.0
            ledger.mark([("a", "c", "m")], TileState.FINISHED)
            assert ledger.entries(["a"])["a"].done_at == 5.0
            assert ledger.totals() == ({}, 0.0)
            change(path, "UPDATE tiles SET done_at = NULL")


def test_time_in_which_two_runs_were_at_work_counts_once(tmp_path: Path) -> None:
    with Ledger(tmp_path, IDENTITY) as ledger:
        ledger.note_run("a", 100.0, 104.0, {"put": 1})
        ledger.note_run("a", 100.0, 110.0, {"put": 4, "put_bytes": 8})
        ledger.note_run("b", 105.0, 107.0, {"put": 2})
        ledger.note_run("c", 108.0, 115.0, {"put": 3})
        ledger.note_run("d", 200.0, 201.0, {"put": 1})
        assert ledger.totals() == ({"put": 10, "put_bytes": 8}, 16.0)


def test_a_tile_is_in_one_place_only(tmp_path: Path) -> None:
    row = ("a", "c", "m")
    with Ledger(tmp_path, IDENTITY) as ledger:
        ledger.mark([row], TileState.FINISHED)
        ledger.note_made("a", "blank")
        ledger.quarantine("m2", "a", "{}", "gone", poison=False)
        ledger.quarantine("m3", "a", "{}", "gone", poison=False)
        assert (ledger.count(TileState.FINISHED), ledger.blank(), len(ledger.quarantined())) == (0, set(), 1)
        ledger.fail("a", "gone")
        ledger.mark([row], TileState.SKIPPED)
        assert (ledger.failed(), ledger.quarantined(), ledger.tiles(TileState.SKIPPED)) == ({}, [], {"a"})
        ledger.mark([row], TileState.FINISHED)
        assert (ledger.tiles(TileState.SKIPPED), ledger.tiles(TileState.FINISHED)) == (set(), {"a"})


def test_a_ledger_of_something_else_is_refused(tmp_path: Path) -> None:
    change(made(tmp_path), "UPDATE about SET value = '{}' WHERE name = 'identity'")
    with pytest.raises(LedgerError, match="belongs to something else"):
        Ledger(tmp_path, IDENTITY)


def test_a_link_in_the_place_of_a_ledger_is_not_followed(tmp_path: Path) -> None:
    path = made(tmp_path / "real")
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / path.name).symlink_to(path)
    with pytest.raises(LocalStorageError, match="planted"):
        Ledger(folder, IDENTITY)


def test_a_folder_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalStorageError, match="file"):
        Ledger(tmp_path / "file", IDENTITY)


def test_a_full_disk_is_a_typed_error_that_names_the_folder(tmp_path: Path) -> None:
    with Ledger(tmp_path, IDENTITY) as ledger:
        ledger._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(LocalStorageError, match=rf"{tmp_path.name}.*full.*Make room"):
            ledger.mark([(f"tile {number}", "chunk" * 50, "m") for number in range(2000)], TileState.INDEXED)
        ledger._connection.execute("PRAGMA max_page_count = 1000000")
        ledger.mark([("a", "c", "m")], TileState.INDEXED)
        assert ledger.count(TileState.INDEXED) == 1
