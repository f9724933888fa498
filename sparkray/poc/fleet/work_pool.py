"""Chunks of nonces to compute again, shared by all groups: whoever is free takes the next one.

A group holds a few chunks, so that it never waits for the controller. When none is left, a free group takes one
that another group holds but has probably not begun; whichever answers first counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import count

from sparkray.errors import BusyError
from sparkray.poc.fleet.messages import CheckChunk

CHUNKS_HELD = 2


@dataclass(slots=True)
class WorkPool:
    """Who computes which chunk.

    Attributes:
        max_chunks: chunks that are not done, at most.
    """

    max_chunks: int
    _numbers: count[int] = field(default_factory=count)
    _open: dict[int, CheckChunk] = field(default_factory=dict)
    _queue: deque[int] = field(default_factory=deque)
    _held: dict[int, list[int]] = field(default_factory=dict)

    @property
    def num_open(self) -> int:
        """Chunks that are not done."""
        return len(self._open)

    def put(self, public_key: str, nonces: tuple[int, ...], chunk_size: int) -> None:
        """Cut nonces into chunks and queue them.

        Raises:
            BusyError: more than `max_chunks` would be open; nothing was queued.
        """
        pieces = [nonces[start : start + chunk_size] for start in range(0, len(nonces), chunk_size)]
        if len(self._open) + len(pieces) > self.max_chunks:
            raise BusyError(
                f"{len(self._open)} chunks wait to be validated, {len(pieces)} more were given, and {self.max_chunks}"
                " are allowed.",
                hint="Send the batch again later.",
            )
        for piece in pieces:
            chunk = CheckChunk(next(self._numbers), public_key, piece)
            self._open[chunk.chunk_id] = chunk
            self._queue.append(chunk.chunk_id)

    def take(self, group_id: int) -> tuple[CheckChunk, ...]:
        """Chunks for a group to add to those it holds, perhaps none."""
        held = self._held.setdefault(group_id, [])
        taken = []
        while len(held) < CHUNKS_HELD and (chunk_id := self._next(group_id)) is not None:
            held.append(chunk_id)
            taken.append(self._open[chunk_id])
        return tuple(taken)

    def done(self, group_id: int, chunk_id: int) -> CheckChunk | None:
        """A group computed a chunk; None where another one did before."""
        for held in self._held.values():
            if chunk_id in held:
                held.remove(chunk_id)
        return self._open.pop(chunk_id, None)

    def lost(self, group_id: int) -> None:
        """A group is gone; what it held and nobody else holds is the next to be taken."""
        orphans = [chunk_id for chunk_id in self._held.pop(group_id, []) if not self._is_held(chunk_id)]
        self._queue.extendleft(reversed(orphans))

    def _next(self, group_id: int) -> int | None:
        if self._queue:
            return self._queue.popleft()
        if self._held[group_id]:
            return None
        # Idle: the last chunk of whoever holds most, if that one has another to go on with.
        victim = max(self._held.values(), key=len)
        return victim[-1] if len(victim) > 1 and victim[-1] not in self._held[group_id] else None

    def _is_held(self, chunk_id: int) -> bool:
        return any(chunk_id in held for held in self._held.values())
