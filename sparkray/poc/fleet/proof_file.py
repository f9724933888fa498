"""The outbox into a file instead of to a receiver: a line a body, each once, whatever ends the process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from sparkray.poc.fleet.ledger import Ledger

_NOTE = "proof file"
_ROWS_AT_ONCE = 1000


class ProofFile:
    """Appends what is due in a ledger.

    The ledger forgets bodies and notes the file's length in one transaction. What was written behind that length by a
    process that ended before it could say so is cut off when the file is opened again, and written anew.
    """

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._ledger = ledger
        self._file = path.open("ab")
        length = self._file.tell()
        noted = ledger.recall(_NOTE)
        if noted is not None and noted["num_bytes"] < length:
            length = noted["num_bytes"]
            self._file.truncate(length)
        # Of an empty file too: without a note nothing would be cut off.
        ledger.remember(_NOTE, {"num_bytes": length})

    def drain(self) -> int:
        """Write everything that is due; how many lines."""
        num_lines = 0
        while deliveries := self._ledger.due(time.time(), _ROWS_AT_ONCE):
            self._file.writelines(f"{delivery.body}\n".encode() for delivery in deliveries)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._ledger.hand_over(deliveries, _NOTE, {"num_bytes": self._file.tell()})
            num_lines += len(deliveries)
        return num_lines

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
