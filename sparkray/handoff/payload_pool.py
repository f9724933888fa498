"""Memory for payloads, used again once nothing points into it.

Fresh memory costs a page fault for each 4 KiB and is zeroed first, which together takes longer than reading the bytes
from the socket. Rows point into a payload for as long as another layer lacks them or an engine reads them, so what is
free is known only from the references that are left. Connections are short, so one pool serves all of a process.
"""

from __future__ import annotations

import sys
import threading

# Payloads that are kept at most; further ones are made and dropped as they come.
_MAX_BYTES = 64 << 20
# Small ones come from the allocator's own lists, without page faults.
_MIN_BYTES = 64 << 10
# The list's own, and the argument of the function that counts.
_IDLE_REFERENCES = 2


class PayloadPool:
    """Buffers that threads may share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffers: list[bytearray] = []
        self._num_bytes = 0

    def take(self, num_bytes: int) -> bytearray:
        """A buffer of exactly this size; its content is whatever it held before."""
        if num_bytes < _MIN_BYTES:
            return bytearray(num_bytes)
        with self._lock:
            return self._reuse(num_bytes) or self._make(num_bytes)

    def _reuse(self, num_bytes: int) -> bytearray | None:
        buffers = self._buffers
        for index in range(len(buffers)):
            if len(buffers[index]) == num_bytes and sys.getrefcount(buffers[index]) == _IDLE_REFERENCES:
                # To the end: the one that was used longest ago stands first and is looked at first.
                buffers.append(buffers.pop(index))
                return buffers[-1]
        return None

    def _make(self, num_bytes: int) -> bytearray:
        made = bytearray(num_bytes)
        while self._buffers and self._num_bytes + num_bytes > _MAX_BYTES:
            self._num_bytes -= len(self._buffers.pop(0))
        if self._num_bytes + num_bytes <= _MAX_BYTES:
            self._buffers.append(made)
            self._num_bytes += num_bytes
        return made


SHARED_POOL = PayloadPool()
"""What all connections of this process take their payloads from."""
