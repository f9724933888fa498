"""The file's tables, step by step: each migration takes a file from one version to the next.

A table named `kd_cache` may lie in the same file: LatentForge kept its answers there under a key that leaves out the
tokenizer, the engine and the type, so its rows answer nothing here and are left as they are.
"""

from __future__ import annotations

import sqlite3

from sparkray.errors import UnavailableError

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE teacher_scores (
        key BLOB PRIMARY KEY,
        top_logprobs INTEGER NOT NULL,
        payload BLOB NOT NULL,
        created_at REAL NOT NULL
    );
    """,
    # Eviction walks rows by age, and people ask which teacher a file belongs to.
    """
    ALTER TABLE teacher_scores ADD COLUMN identity TEXT NOT NULL DEFAULT '';
    CREATE INDEX teacher_scores_by_age ON teacher_scores (created_at);
    """,
)
VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a file to `VERSION`; two processes may do so at once.

    Raises:
        UnavailableError: the file was written by a later version.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = file_version(connection)
        for step in MIGRATIONS[version:]:
            for statement in step.split(";"):
                if statement.strip():
                    connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def file_version(connection: sqlite3.Connection) -> int:
    """Migrations that the file has seen.

    Raises:
        UnavailableError: more than this version knows.
    """
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > VERSION:
        raise UnavailableError(
            f"the cache is of version {version}, and this sparkray knows up to {VERSION}.",
            hint="Use the sparkray that wrote it, or another file (--set cache.path=...).",
            param="cache.path",
        )
    return version
