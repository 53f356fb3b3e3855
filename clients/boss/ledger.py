"""What this machine has done for a job, in a SQLite file.

The queue knows what is left; only we know what was done. The ledger lets a process that takes over after a crash tell
a repeated delivery from a tile that the server asks for again, and makes the counts of a report exact.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

from prefect_biomed.clients.boss.client import BossClient
from prefect_biomed.clients.boss.models import Made
from prefect_biomed.clients.errors import BiomedError, HeldElsewhere, LedgerError, LocalStorageError
from prefect_biomed.clients.files import home, private
from prefect_biomed.clients.polling import Uptime, now, passed, uptime

__all__ = ["Ledger", "LedgerEntry", "Quarantined", "TileState", "Totals", "default_folder", "open_ledger"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tiles (
    tile TEXT PRIMARY KEY, chunk TEXT NOT NULL, message TEXT NOT NULL, state INTEGER NOT NULL, done_at REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tiles_of_chunk ON tiles (chunk, state);
CREATE TABLE IF NOT EXISTS failed (tile TEXT PRIMARY KEY, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (
    message TEXT PRIMARY KEY, tile TEXT, body TEXT NOT NULL, reason TEXT NOT NULL, poison INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS quarantine_of_tile ON quarantine (tile);
CREATE TABLE IF NOT EXISTS blank (tile TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS padded (tile TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unanswered (
    request TEXT NOT NULL, chunk TEXT NOT NULL, since TEXT NOT NULL, is_lost INTEGER NOT NULL,
    PRIMARY KEY (request, chunk)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, begun REAL NOT NULL, ended REAL NOT NULL, counts TEXT NOT NULL);
"""
_FORMAT = 2
# What a ledger of an earlier format lacks.
_MIGRATIONS = {"1": "ALTER TABLE tiles ADD COLUMN done_at REAL"}
# A request of a live process is answered or given up by then; that of a process that was killed never is.
_ON_ITS_WAY_SECONDS = 5.0
_STORAGE = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY})


class TileState(IntEnum):
    """How far a tile has come; each state is written before the next request is sent."""

    INDEXING = 1
    """It is in the bucket. Its index message may or may not have been sent."""
    INDEXED = 2
    """Its index message was accepted."""
    FINISHED = 3
    """Its upload message was deleted as well."""
    SKIPPED = 4
    """It was left out on purpose."""


class LedgerEntry(NamedTuple):
    """What the ledger knows of a tile.

    Attributes:
        state: How far it has come.
        message: The message that was worked on.
        done_at: When the Boss was told of it, by the clock of AWS, in seconds since 1970; None where that is not known.
    """

    state: TileState
    message: str
    done_at: float | None = None


class Totals(NamedTuple):
    """What all runs of this machine did for a job.

    Attributes:
        counts: Sums of the counts of their reports.
        seconds: Time in which at least one was at work.
    """

    counts: dict[str, int]
    seconds: float


class Quarantined(NamedTuple):
    """A message that was taken off the queue and kept."""

    message: str
    tile: str | None
    body: str
    reason: str
    poison: bool


def default_folder() -> Path:
    """Where ledgers are kept: `PREFECT_BIOMED_HOME`, or `~/.prefect-biomed`, and `boss` below it."""
    return home("boss")


class Ledger:
    """The ledger of one job on one machine. Threads and processes may share it.

    Args:
        folder: Folder of ledgers; made when missing.
        identity: What tells this job from every other: host, number, creation time and so on.

    Raises:
        LedgerError: The file is damaged, of a later version, or belongs to something else. It was left untouched.
        LocalStorageError: It cannot be made or written, for instance because the disk is full.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str | int]) -> None:
        text = json.dumps(dict(identity), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        host = "".join(letter if letter.isalnum() else "-" for letter in str(identity.get("host", "")))[:60]
        self.path = folder / f"{host}-job{identity.get('job', '')}-{digest}.sqlite"
        self._lock = threading.Lock()
        private(self.path)
        try:
            self._connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        except sqlite3.Error as error:
            raise self._error(error) from None
        try:
            found = self._opened(text)
        except BaseException:
            self._connection.close()
            raise
        if found != {"format": str(_FORMAT), "identity": text}:
            self._connection.close()
            raise LedgerError(f"The ledger {self.path} {_reason(found)} It was left as it is.")

    def _opened(self, identity: str) -> dict[str, str]:
        """Make the tables where they are missing; returns what the ledger says of itself."""
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as error:
            raise self._error(error) from None
        with self._transaction() as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            for name, value in (("format", str(_FORMAT)), ("identity", identity)):
                connection.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (name, value))
            found = dict(connection.execute("SELECT name, value FROM about").fetchall())
            if found.get("format") in _MIGRATIONS and found.get("identity") == identity:
                connection.execute(_MIGRATIONS[found["format"]])
                found["format"] = str(_FORMAT)
                connection.execute("UPDATE about SET value = ? WHERE name = 'format'", (found["format"],))
            if found.get("format") == str(_FORMAT):
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
        return found

    def __enter__(self) -> Self:
        """Return the ledger itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise self._error(error) from None
                raise

    def mark(self, tiles: Iterable[tuple[str, str, str]], state: TileState, done_at: float | None = None) -> None:
        """Write the state of tiles.

        A tile that is finished or skipped is not failed, kept or, when skipped, filled any more: each tile is in one
        place.

        Args:
            tiles: Tile, chunk, and the message worked on.
            state: Their new state.
            done_at: When the Boss was told of them, by the clock of AWS; what is known of it stays when None.
        """
        rows = [(*tile, int(state), done_at) for tile in tiles]
        names = [(row[0],) for row in rows]
        if not rows:
            return
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO tiles VALUES (?, ?, ?, ?, ?) ON CONFLICT (tile) DO UPDATE SET chunk = excluded.chunk, "
                "message = excluded.message, state = excluded.state, done_at = coalesce(excluded.done_at, done_at)",
                rows,
            )
            if state in (TileState.FINISHED, TileState.SKIPPED):
                connection.executemany("DELETE FROM failed WHERE tile = ?", names)
                connection.executemany("DELETE FROM quarantine WHERE tile = ?", names)
            if state == TileState.SKIPPED:
                connection.executemany("DELETE FROM blank WHERE tile = ?", names)
                connection.executemany("DELETE FROM padded WHERE tile = ?", names)

    def entries(self, tiles: Sequence[str]) -> dict[str, LedgerEntry]:
        """Read the state of tiles; those that are unknown are left out."""
        if not tiles:
            return {}
        marks = ",".join("?" * len(tiles))
        rows = self._query(f"SELECT tile, state, message, done_at FROM tiles WHERE tile IN ({marks})", tiles)
        return {tile: LedgerEntry(TileState(state), message, done_at) for tile, state, message, done_at in rows}

    def chunk_counts(self, chunk: str) -> tuple[int, int]:
        """How many tiles of a chunk were indexed for sure, and for how many that is in doubt."""
        rows = dict(self._query("SELECT state, COUNT(*) FROM tiles WHERE chunk = ? GROUP BY state", (chunk,)))
        return rows.get(TileState.INDEXED, 0) + rows.get(TileState.FINISHED, 0), rows.get(TileState.INDEXING, 0)

    def ask(self, request: str, chunks: Iterable[str]) -> None:
        """Note that index messages are about to be sent.

        Args:
            request: Name of the request, another one each time.
            chunks: Chunks that it tells of.
        """
        here = uptime()
        since = json.dumps([now().isoformat(), *((here.boot, here.seconds) if here else ())])
        with self._transaction() as connection:
            rows = [(request, chunk, since) for chunk in set(chunks)]
            connection.executemany("INSERT INTO unanswered VALUES (?, ?, ?, 0)", rows)

    def answered(self, request: str) -> None:
        """Note that a request can take effect no more than it has."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM unanswered WHERE request = ?", (request,))

    def lost(self, request: str) -> None:
        """Note that the answer to a request never came: it may still take effect."""
        with self._transaction() as connection:
            connection.execute("UPDATE unanswered SET is_lost = 1 WHERE request = ?", (request,))

    def doubtful_seconds(self, settle_seconds: float, chunk: str | None = None) -> float:
        """Tell for how long index messages whose answer was lost may still arrive.

        Args:
            settle_seconds: Longest time after which a request may take effect.
            chunk: Those that tell of this chunk, without what another process is just sending; all when None.

        Returns:
            Seconds from now; 0 when nothing is in doubt.
        """
        statement = "SELECT since, is_lost FROM unanswered" + ("" if chunk is None else " WHERE chunk = ?")
        longest = 0.0
        for since, is_lost in self._query(statement, () if chunk is None else (chunk,)):
            moment, *by_uptime = json.loads(since)
            age = passed(datetime.fromisoformat(moment), Uptime(*by_uptime) if by_uptime else None)
            if chunk is None or is_lost or age > _ON_ITS_WAY_SECONDS:
                # A clock that was set back makes nothing wait longer than a request of just now.
                longest = max(longest, min(settle_seconds - age, settle_seconds))
        return longest

    def count(self, state: TileState) -> int:
        """How many tiles are in a state."""
        return int(self._query("SELECT COUNT(*) FROM tiles WHERE state = ?", (int(state),))[0][0])

    def tiles(self, state: TileState) -> set[str]:
        """The tiles in a state."""
        return {row[0] for row in self._query("SELECT tile FROM tiles WHERE state = ?", (int(state),))}

    def blank(self, among: Sequence[str] | None = None) -> set[str]:
        """The tiles that were filled because their source was missing or damaged.

        Args:
            among: Only of these; of all when None.
        """
        return self._listed("blank", among)

    def padded(self, among: Sequence[str] | None = None) -> set[str]:
        """The tiles whose source lacked a part of them, which was filled up.

        Args:
            among: Only of these; of all when None.
        """
        return self._listed("padded", among)

    def note_made(self, tile: str, made: Made) -> None:
        """Note whether what is sent of a tile is its source, its source filled up, or the fill value."""
        with self._transaction() as connection:
            for table in ("padded", "blank"):
                statement = f"INSERT OR IGNORE INTO {table} VALUES (?)"
                connection.execute(statement if made == table else f"DELETE FROM {table} WHERE tile = ?", (tile,))

    def note_run(self, run: str, begun: float, ended: float, counts: Mapping[str, int]) -> None:
        """Write down what a run has done so far, so that it counts also when the run is killed.

        Args:
            run: Name of the run.
            begun: When it began, in seconds since 1970.
            ended: When it was last at work.
            counts: Counts of its report.
        """
        with self._transaction() as connection:
            row = (run, begun, ended, json.dumps(dict(counts)))
            connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", row)

    def totals(self) -> Totals:
        """Add up what all runs did; time in which several were at work counts once."""
        counts: Counter[str] = Counter()
        seconds, covered = 0.0, 0.0
        for begun, ended, text in self._query("SELECT begun, ended, counts FROM runs ORDER BY begun", ()):
            counts.update(json.loads(text))
            seconds += max(0.0, ended - max(begun, covered))
            covered = max(covered, ended)
        return Totals(dict(counts), seconds)

    def fail(self, tile: str, reason: str) -> None:
        """Note that a tile could not be read or sent."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO failed VALUES (?, ?)", (tile, reason))

    def failed(self) -> dict[str, str]:
        """The tiles that failed since `forget_failed`, with reasons."""
        return dict(self._query("SELECT tile, reason FROM failed ORDER BY tile", ()))

    def forget_failed(self) -> None:
        """Give failed tiles another chance."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM failed")

    def quarantine(self, message: str, tile: str | None, body: str, reason: str, *, poison: bool) -> None:
        """Keep a message that is taken off the queue; one for each tile, the latest.

        Args:
            message: Its id.
            tile: Its tile; None when even that cannot be told.
            body: Its text.
            reason: Why.
            poison: Whether it can never be worked on.
        """
        with self._transaction() as connection:
            if tile is not None:
                for table in ("quarantine", "tiles", "failed", "blank", "padded"):
                    connection.execute(f"DELETE FROM {table} WHERE tile = ?", (tile,))
            row = (message, tile, body, reason, int(poison))
            connection.execute("INSERT OR REPLACE INTO quarantine VALUES (?, ?, ?, ?, ?)", row)

    def quarantined(self) -> list[Quarantined]:
        """The messages that were kept."""
        rows = self._query("SELECT message, tile, body, reason, poison FROM quarantine ORDER BY message", ())
        return [Quarantined(message, tile, body, reason, bool(poison)) for message, tile, body, reason, poison in rows]

    def _listed(self, table: str, among: Sequence[str] | None) -> set[str]:
        if among is None:
            return {row[0] for row in self._query(f"SELECT tile FROM {table}", ())}
        marks = ",".join("?" * len(among))
        return {row[0] for row in self._query(f"SELECT tile FROM {table} WHERE tile IN ({marks})", among)}

    def _query(self, statement: str, values: Sequence[object]) -> list[Any]:
        with self._lock:
            try:
                return self._connection.execute(statement, tuple(values)).fetchall()
            except sqlite3.Error as error:
                raise self._error(error) from None

    def _error(self, error: sqlite3.Error) -> BiomedError:
        """Make the error of ours that one of SQLite stands for."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of it tells the details
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return HeldElsewhere(f"The ledger {self.path} is written by another process all the time ({error}).")
        if code in _STORAGE:
            return LocalStorageError(
                f"{self.path.parent}: {error}. Make room or choose another folder, then run this again: what is "
                "complete stays."
            )
        return LedgerError(
            f"The ledger {self.path} is damaged ({error}). It was left as it is. Restore it, or move it away: then the "
            "tiles of earlier runs count as those of others."
        )


def _reason(about: Mapping[str, str]) -> str:
    """Why a ledger cannot be used, from what it says of itself."""
    version = about.get("format", "")
    if version.isdecimal() and int(version) > _FORMAT:
        return "was written by a later version of prefect-biomed. Update the package on this machine."
    return "belongs to something else. Move it away or choose another folder."


def open_ledger(client: BossClient, job_id: int, tile_count: int, folder: Path | None = None) -> Ledger:
    """Open the ledger of a job on this machine.

    Args:
        client: Client of the Boss; asked when the job was made, which tells it from one of the same number elsewhere.
        job_id: Number of the job.
        tile_count: Its number of tiles.
        folder: Folder of ledgers; `default_folder` by default.

    Raises:
        LedgerError: It is damaged.
    """
    made = next((item.created_on for item in client.list_jobs() if item.id == job_id), None)
    identity: dict[str, str | int] = {
        "host": client.host,
        "job": job_id,
        "created": made.isoformat() if made else "",
        "tiles": tile_count,
    }
    return Ledger(folder or default_folder(), identity)
