"""Memory for payloads, used again once nothing points into it.

Fresh memory costs a page fault for each 4 KiB and is zeroed first, which together takes longer than reading the bytes
from the socket. Rows point into a payload for as long as another layer lacks them or an engine reads them, so what is
free is known only from the references that are left.
"""

from __future__ import annotations

import sys

# Payloads that are kept at most; further ones are made and dropped as they come.
_MAX_BYTES = 64 << 20
# Small ones come from the allocator's own lists, without page faults.
_MIN_BYTES = 64 << 10
# The list's own, and the argument of the function that counts.
_IDLE_REFERENCES = 2


class PayloadPool:
    """Buffers of one connection; not for several threads."""

    def __init__(self) -> None:
        self._buffers: list[bytearray] = []
        self._num_bytes = 0

    def take(self, num_bytes: int) -> bytearray:
        """A buffer of exactly this size; its content is whatever it held before."""
        buffers = self._buffers
        for index in range(len(buffers)):
            if len(buffers[index]) == num_bytes and sys.getrefcount(buffers[index]) == _IDLE_REFERENCES:
                # To the end: the one that was used longest ago stands first and is looked at first.
                buffers.append(buffers.pop(index))
                return buffers[-1]
        made = bytearray(num_bytes)
        if num_bytes >= _MIN_BYTES:
            while buffers and self._num_bytes + num_bytes > _MAX_BYTES:
                self._num_bytes -= len(buffers.pop(0))
            if self._num_bytes + num_bytes <= _MAX_BYTES:
                buffers.append(made)
                self._num_bytes += num_bytes
        return made
