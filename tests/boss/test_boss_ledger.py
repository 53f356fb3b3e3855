"""The ledger of a job: who may read it, and what is said when it cannot be used."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from prefect_biomed.clients.boss import Ledger
from prefect_biomed.clients.boss.ledger import TileState
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
    change(path, "UPDATE about SET value = '2' WHERE name = 'format'")
    with pytest.raises(LedgerError, match=r"later version of prefect-biomed\. Update the package"):
        Ledger(tmp_path, IDENTITY)
    with sqlite3.connect(path) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert "quarantine" not in tables


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
