"""The cache: reads that write nothing, writes in batches, one connection a process, one lock for its threads."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sparkray.config.distill import CacheConfig
from sparkray.distill.cache.payload import pack_scores, unpack_scores
from sparkray.distill.cache.schema import VERSION, file_version, migrate
from sparkray.distill.scores import TokenScores
from sparkray.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class CachedScores:
    """A row of the cache.

    Attributes:
        scores: no longer than what was asked for.
        stale: its age is past the time to live.
    """

    scores: TokenScores
    stale: bool


class ScoreCache:
    """Scores by key. A row keeps the longest head that was ever written for its key, and answers shorter ones too.

    Closing, or leaving the `with` block, writes what is pending; a process that is killed loses at most the rows that
    were not yet written, and never a written one.

    Raises (on opening and in every call):
        UnavailableError: the file cannot be opened, is no SQLite file, is damaged, or is of a later version.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.num_damaged_rows = 0
        self._lock = threading.RLock()
        self._pending: dict[bytes, tuple[TokenScores, float, str]] = {}
        self._process_id = os.getpid()
        with self._answering():
            self._connection = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(
        self, key: bytes, *, top_logprobs: int, min_top_logprobs: int | None = None, allow_stale: bool = False
    ) -> CachedScores | None:
        """The row of a key, if it answers.

        Args:
            key: of `score_key`.
            top_logprobs: entries wanted; a longer row is cut to it.
            min_top_logprobs: entries with which a shorter row answers too; `top_logprobs` when None.
            allow_stale: a row past its time to live answers too.
        """
        needed = top_logprobs if min_top_logprobs is None else min_top_logprobs
        with self._lock, self._answering():
            pending = self._pending.get(key)
            if pending is not None:
                scores, created_at = pending[0], pending[1]
            else:
                found = self._connection_here().execute(
                    "SELECT payload, created_at FROM teacher_scores WHERE key = ?", (key,)
                )
                row = found.fetchone()
                if row is None:
                    return None
                unpacked = unpack_scores(row[0])
                if unpacked is None:
                    self.num_damaged_rows += 1
                    return None
                scores, created_at = unpacked, row[1]
        stale = time.time() - created_at > self.config.ttl_seconds
        if scores.top_logprobs < needed or (stale and not allow_stale):
            return None
        return CachedScores(scores.narrowed(top_logprobs), stale)

    def put(self, key: bytes, scores: TokenScores, identity: str = "") -> None:
        """Keep scores; they are written with the batch. Does nothing on a read-only cache."""
        if self.config.read_only:
            return
        with self._lock:
            self._pending[key] = (scores, time.time(), identity)
            if len(self._pending) >= self.config.write_batch_rows:
                self.flush()

    def flush(self) -> None:
        """Write what is pending, and drop the oldest rows above the limit, in one transaction."""
        with self._lock, self._answering():
            connection = self._connection_here()
            if not self._pending:
                return
            fresh_after = time.time() - self.config.ttl_seconds
            rows = [
                (key, scores.top_logprobs, pack_scores(scores), created_at, identity)
                for key, (scores, created_at, identity) in self._pending.items()
            ]
            connection.execute("BEGIN IMMEDIATE")
            try:
                # A longer head that is still fresh is worth more than a shorter new one.
                connection.executemany(
                    "INSERT INTO teacher_scores (key, top_logprobs, payload, created_at, identity)"
                    " VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET top_logprobs = excluded.top_logprobs,"
                    " payload = excluded.payload, created_at = excluded.created_at, identity = excluded.identity"
                    " WHERE excluded.top_logprobs >= teacher_scores.top_logprobs"
                    f" OR teacher_scores.created_at < {fresh_after!r}",
                    rows,
                )
                connection.execute(
                    "DELETE FROM teacher_scores WHERE key IN (SELECT key FROM teacher_scores ORDER BY created_at"
                    " LIMIT max(0, (SELECT count(*) FROM teacher_scores) - ?))",
                    (self.config.max_rows,),
                )
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
            self._pending.clear()

    def sweep(self) -> int:
        """Delete rows past their time to live; returns how many."""
        with self._lock, self._answering():
            cursor = self._connection_here().execute(
                "DELETE FROM teacher_scores WHERE created_at < ?", (time.time() - self.config.ttl_seconds,)
            )
            return cursor.rowcount

    def __len__(self) -> int:
        with self._lock, self._answering():
            row = self._connection_here().execute("SELECT count(*) FROM teacher_scores").fetchone()
            return int(row[0])

    def close(self) -> None:
        """Write what is pending and close the file."""
        with self._lock:
            self.flush()
            self._connection.close()

    def _connection_here(self) -> sqlite3.Connection:
        # SQLite's connections do not survive a fork; what the parent had pending is the parent's to write.
        if os.getpid() != self._process_id:
            self._process_id = os.getpid()
            self._pending.clear()
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        path, read_only = self.config.path.absolute(), self.config.read_only
        if read_only and not path.is_file():
            raise UnavailableError(
                f"the cache {path} is to be read only, and there is none.",
                hint="Fill it once without --kd-cache-ro, or give the path of one (--set cache.path=...).",
                param="cache.path",
            )
        if not read_only:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as failure:
                raise UnavailableError(
                    f"the cache's folder {path.parent} cannot be made: {failure.strerror}.", param="cache.path"
                ) from failure
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode={'ro' if read_only else 'rwc'}",
            uri=True,
            timeout=self.config.busy_timeout_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        if read_only:
            if file_version(connection) < VERSION:
                raise UnavailableError(
                    f"the cache {path} is of an older version, and read only it cannot be brought to this one.",
                    hint="Open it once without --kd-cache-ro.",
                    param="cache.path",
                )
            return connection
        connection.execute("PRAGMA journal_mode = WAL")
        # With WAL this loses no consistency at a power cut, and no written row at a kill.
        connection.execute("PRAGMA synchronous = NORMAL")
        migrate(connection)
        return connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as failure:
            raise UnavailableError(
                f"the cache {self.config.path} cannot be used: {failure}.",
                hint="Move the file away; it is made again from the teacher's answers.",
                param="cache.path",
            ) from failure
