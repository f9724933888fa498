"""Rows of one request on the prefill side: what the engine has computed, for the sender to read when bytes may leave.

Nothing is copied while the engine computes. Rows stay in the engine's blocks, which are kept until the transfer ends,
so a slow peer slows its own request and no other. Where the engine takes blocks away (preemption), rows count as not
there until they are computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition

from sparkray.errors import WaitTimeoutError
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.rows import Array
from sparkray.handoff.sender import RowSlice

# Reads a slice from the given blocks.
Reader = Callable[[RowSlice, list[int]], tuple[Array, Array]]


class RowStream:
    """The feed of one request. The engine's thread adds, the sender's thread reads.

    Args:
        num_layers: layers of the model.
        start: first row that the peer lacks.
        num_rows: rows that it needs in all.
        read: copies rows out of blocks.
    """

    def __init__(self, num_layers: int, start: int, num_rows: int, read: Reader) -> None:
        self._num_rows = num_rows
        self._read = read
        self._slices: list[RowSlice] = []
        # For each layer: rows that slices cover, and rows that the blocks hold now.
        self._covered_L = [start] * num_layers
        self._present_L = [0] * num_layers
        self._blocks: list[int] = []
        self._changed = Condition()
        self._cancelled = ""
        self.began_at = time.monotonic()
        self.computed_at = 0.0

    def set_blocks(self, block_ids: list[int]) -> None:
        """The request's blocks from its first token on, as of this step."""
        with self._changed:
            self._blocks = block_ids

    def add_rows(self, layer: int, end: int) -> None:
        """Rows up to `end` of a layer are in the blocks."""
        with self._changed:
            self._present_L[layer] = max(self._present_L[layer], end)
            first, last = self._covered_L[layer], min(end, self._num_rows)
            if last > first:
                self._slices.append(RowSlice(layer, first, last - first))
                self._covered_L[layer] = last
            if min(self._covered_L) == self._num_rows and not self.computed_at:
                self.computed_at = time.monotonic()
            self._changed.notify_all()

    def lose_blocks(self) -> None:
        """The engine takes the blocks away; returns when no read is under way."""
        with self._changed:
            self._present_L = [0] * len(self._present_L)

    def cancel(self, message: str) -> None:
        """The request ended early; the sender tells the peer so."""
        with self._changed:
            self._cancelled = message
            self._changed.notify_all()

    def slice(self, index: int, timeout_seconds: float) -> RowSlice | None:
        """See `sender.RowFeed`."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not self._is_there(index):
                if index >= len(self._slices) and min(self._covered_L) >= self._num_rows:
                    return None
                self._wait(deadline)
            return self._slices[index]

    def read(self, piece: RowSlice) -> tuple[Array, Array]:
        """See `sender.RowFeed`. Waits where a preemption came between."""
        deadline = time.monotonic() + _READ_TIMEOUT_SECONDS
        with self._changed:
            while self._present_L[piece.layer] < piece.start + piece.count:
                self._wait(deadline)
            return self._read(piece, self._blocks)

    def _is_there(self, index: int) -> bool:
        if index >= len(self._slices):
            return False
        piece = self._slices[index]
        return self._present_L[piece.layer] >= piece.start + piece.count

    def _wait(self, deadline: float) -> None:
        if self._cancelled:
            raise ProtocolError(Reason.CANCELLED, self._cancelled)
        left = deadline - time.monotonic()
        if left <= 0 or not self._changed.wait(left):
            raise WaitTimeoutError("the prefill side computed no further rows within the transfer's time limit.")


# A preempted request that is not taken up again within this time is given up.
_READ_TIMEOUT_SECONDS = 300.0
