"""What must survive a crash, in one SQLite file: how far every group is, and what has still to be sent.

A part's valid nonces enter the outbox in the transaction that moves its group's cursor, so a nonce is either
recorded and on its way, or it will be computed again: none is lost and none goes out twice.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkray.errors import UnavailableError
from sparkray.poc.fleet.messages import GeneratedPart, Run
from sparkray.poc.proofs import ProofBatch

_BUSY_TIMEOUT_SECONDS = 10.0
_KEPT_SENT = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS cursors (
    series TEXT NOT NULL, group_id INTEGER NOT NULL, num_groups INTEGER NOT NULL, cursor INTEGER NOT NULL,
    PRIMARY KEY (series, group_id, num_groups)
);
CREATE TABLE IF NOT EXISTS outbox (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, url TEXT NOT NULL, body TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0,
    last_error TEXT
);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS outbox_due ON outbox (sent, due);
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One callback that is not confirmed.

    Attributes:
        key: the same at every attempt; a receiver that saw it has the body already.
        attempts: how often it was tried.
    """

    sequence: int
    key: str
    url: str
    body: str
    attempts: int


class Ledger:
    """The file; all methods may be called from any thread.

    Args:
        path: created where it is missing; its folder exists.

    Raises:
        UnavailableError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            # Autocommit, so that every BEGIN below is ours and a transaction is exactly what it looks like.
            self._db = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as failure:
            raise UnavailableError(f"the ledger {path} cannot be opened: {failure}.") from failure

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def limit_pages(self, num_pages: int) -> None:
        """Let the file grow to this many pages of 4 KiB at most; beyond it is answered like a full disk."""
        with self._lock:
            self._db.execute(f"PRAGMA max_page_count = {int(num_pages)}")

    def cursors(self, series: str, num_groups: int) -> tuple[int, ...]:
        """Where each of `num_groups` groups goes on.

        Where the series was shared by another number of groups before, all start behind the last nonce of theirs:
        some nonces stay uncomputed, none is computed twice.
        """
        rows = self._read("SELECT group_id, num_groups, cursor FROM cursors WHERE series = ?", series)
        return resume_cursors(rows, num_groups)

    def commit(self, run: Run, num_groups: int, parts: Sequence[GeneratedPart]) -> dict[int, int]:
        """Record parts and put their valid nonces into the outbox, all or nothing; the new cursor by group.

        A part that does not start at its group's cursor is an echo of a lost worker and is left out.

        Raises:
            UnavailableError: nothing was recorded: the disk is full, or the file is locked.
        """
        starts = self.cursors(run.series, num_groups)
        fresh = [part for part in parts if part.start == starts[part.group_id] and part.stop > part.start]
        nonces = tuple(nonce for part in fresh for nonce in part.nonces)
        dist = tuple(distance for part in fresh for distance in part.dist)
        batch = ProofBatch(run.public_key, run.block_hash, run.block_height, nonces, dist, run.node_id)
        cursors = [(run.series, part.group_id, num_groups, part.stop) for part in fresh]
        # The cursors of all groups after this commit name it: the same nonces always get the same key.
        after = {part.group_id: part.stop for part in fresh}
        name = "-".join(str(after.get(group, start)) for group, start in enumerate(starts))
        with _Transaction(self._db, self._lock) as db:
            db.executemany("INSERT OR REPLACE INTO cursors VALUES (?, ?, ?, ?)", cursors)
            if nonces:
                key = hashlib.sha256(f"generated_{run.series}_{num_groups}_{name}".encode()).hexdigest()
                _enqueue(db, key, f"{run.url}/generated", batch.to_wire())
        return after

    def enqueue(self, key: str, url: str, body: Mapping[str, Any]) -> None:
        """Put one callback into the outbox; one with the same key is not put in again.

        Raises:
            UnavailableError: it was not recorded: the disk is full, or the file is locked.
        """
        with _Transaction(self._db, self._lock) as db:
            _enqueue(db, key, url, body)

    def remember(self, name: str, body: Mapping[str, Any]) -> None:
        """Write a note down, over an earlier one of that name.

        Raises:
            UnavailableError: it was not written.
        """
        with _Transaction(self._db, self._lock) as db:
            _remember(db, name, body)

    def recall(self, name: str) -> dict[str, Any] | None:
        """The note of that name."""
        rows = self._read("SELECT body FROM notes WHERE name = ?", name)
        return dict(json.loads(rows[0][0])) if rows else None

    def due(self, now: float, limit: int, except_urls: Sequence[str] = ()) -> list[Delivery]:
        """Callbacks to try now, the oldest first; none to the addresses of `except_urls`."""
        marks = ", ".join("?" * len(except_urls))
        rows = self._read(
            "SELECT sequence, key, url, body, attempts FROM outbox WHERE sent = 0 AND due <= ?"
            f" AND url NOT IN ({marks}) ORDER BY sequence LIMIT ?",
            now,
            *except_urls,
            limit,
        )
        return [Delivery(*row) for row in rows]

    def mark_sent(self, delivery: Delivery) -> None:
        """The receiver has it; a bounded number of sent keys is kept."""
        with _Transaction(self._db, self._lock) as db:
            db.execute("UPDATE outbox SET sent = 1, body = '' WHERE sequence = ?", (delivery.sequence,))
            db.execute("DELETE FROM outbox WHERE sent = 1 AND sequence <= ?", (delivery.sequence - _KEPT_SENT,))

    def hand_over(self, deliveries: Sequence[Delivery], name: str, body: Mapping[str, Any]) -> None:
        """The receiver has all of them; and a note of how far it is, in the same transaction."""
        with _Transaction(self._db, self._lock) as db:
            db.executemany("DELETE FROM outbox WHERE sequence = ?", [(each.sequence,) for each in deliveries])
            _remember(db, name, body)

    def mark_failed(self, delivery: Delivery, due: float, error: str) -> None:
        """Try again at `due`."""
        with _Transaction(self._db, self._lock) as db:
            db.execute(
                "UPDATE outbox SET attempts = attempts + 1, due = ?, last_error = ? WHERE sequence = ?",
                (due, error[:500], delivery.sequence),
            )

    def attempts(self) -> int:
        """Attempts so far of the callbacks that are not confirmed."""
        return int(self._read("SELECT TOTAL(attempts) FROM outbox WHERE sent = 0")[0][0])

    def num_unsent(self) -> int:
        """Callbacks that are not confirmed."""
        return int(self._read("SELECT COUNT(*) FROM outbox WHERE sent = 0")[0][0])

    def _read(self, query: str, *values: object) -> list[Any]:
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except sqlite3.Error as failure:
            raise UnavailableError(f"the ledger {self._path} cannot be read: {failure}.") from failure


class _Transaction:
    """All or nothing, with SQLite's failures as ours."""

    def __init__(self, db: sqlite3.Connection, lock: threading.Lock) -> None:
        self._db = db
        self._lock = lock

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as failure:
            self._lock.release()
            raise UnavailableError(f"the ledger cannot be written: {failure}.") from failure
        return self._db

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is None:
                self._db.execute("COMMIT")
        except sqlite3.Error as failure:
            error = failure
            raise UnavailableError(f"the ledger cannot be written: {failure}.") from failure
        finally:
            if error is not None and self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._lock.release()
        if isinstance(error, sqlite3.Error):
            raise UnavailableError(f"the ledger cannot be written: {error}.") from error


def resume_cursors(rows: Sequence[tuple[int, int, int]], num_groups: int) -> tuple[int, ...]:
    """Cursors for `num_groups` groups from recorded (group_id, num_groups, cursor).

    Nonces are counted within the node's class: index = group_id + cursor * num_groups.
    """
    own = {group_id: cursor for group_id, groups, cursor in rows if groups == num_groups}
    others = [group_id + (cursor - 1) * groups for group_id, groups, cursor in rows if groups != num_groups and cursor]
    # The first whole round of all groups behind the last index that another partition computed.
    floor = -(-(max(others) + 1) // num_groups) if others else 0
    return tuple(max(own.get(group_id, 0), floor) for group_id in range(num_groups))


def read_cursors(path: Path) -> list[tuple[str, int, int, int]]:
    """All recorded (series, group_id, num_groups, cursor) of a ledger, for whoever wants to compare."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_SECONDS)) as db:
        return db.execute("SELECT series, group_id, num_groups, cursor FROM cursors ORDER BY 1, 3, 2").fetchall()


def _enqueue(db: sqlite3.Connection, key: str, url: str, body: Mapping[str, Any]) -> None:
    db.execute("INSERT OR IGNORE INTO outbox (key, url, body) VALUES (?, ?, ?)", (key, url, json.dumps(dict(body))))


def _remember(db: sqlite3.Connection, name: str, body: Mapping[str, Any]) -> None:
    db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(dict(body))))
