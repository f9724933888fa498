"""The journal of a batch: one JSON object a line, each on the disk before it is shown; a torn tail is cut off."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sparkray.errors import BusyError, UnavailableError


class Journal:
    """Rows of one batch by key, kept in a file that only grows.

    A row counts when its line ends in a newline: `add` returns after fsync, so whatever was shown survives a kill, and
    what a kill tore is cut off when the file is opened again. One process at a time may have it open.

    Args:
        path: the file; made if absent.

    Raises:
        BusyError: another process has it open.
        UnavailableError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as failure:
            raise UnavailableError(f"the journal {path} cannot be written: {failure.strerror}.") from failure
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as held:
            self._file.close()
            raise BusyError(
                f"the journal {path} is in use by another run.", hint="Wait for it, or name another --out."
            ) from held
        self.num_torn_bytes = self._repair()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row; a later row of the same key takes its place."""
        line = json.dumps({"key": key, **row}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        view = memoryview(line)
        try:
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError as failure:
            raise UnavailableError(
                f"the journal {self.path} could not be written: {failure.strerror}.",
                hint="Free space and run the same command again: finished answers are kept.",
            ) from failure
        self.rows[key] = dict(row)

    def _repair(self) -> int:
        """Read the rows and cut off what comes after the last whole one; returns the bytes that were cut."""
        self._file.seek(0)
        data = self._file.readall()
        good = end = 0
        for line in data.splitlines(keepends=True):
            end += len(line)
            row = _row(line)
            if row is not None:
                self.rows[row.pop("key")] = row
                good = end
        if good < len(data):
            self._file.truncate(good)
            os.fsync(self._file.fileno())
        return len(data) - good


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None
