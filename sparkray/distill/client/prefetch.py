"""Batches with their scores, asked for ahead of the loop that trains on them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sparkray.distill.client.client import ScoredSequence, TeacherClient


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Sequences of token ids and their scores, in the same order."""

    sequences: list[list[int]]
    scored: list[ScoredSequence]


class Prefetcher:
    """Iterates over batches; at most `depth` sequences are asked for ahead, in their order.

    An error belongs to the batch it happened in, and is raised when that batch is due. `idle_seconds` is the time that
    the loop spent waiting here, `total_seconds` the time since it began.

    Args:
        client: answers.
        batches: sequences of token ids.
        depth: sequences ahead of the loop; 0 asks for a batch only when it is due.
    """

    def __init__(self, client: TeacherClient, batches: Iterable[Sequence[Sequence[int]]], depth: int) -> None:
        self._client = client
        self._batches = iter(batches)
        self._depth = depth
        self.idle_seconds = 0.0
        self.total_seconds = 0.0

    def __iter__(self) -> Iterator[ScoredBatch]:
        begun = time.monotonic()
        waiting: deque[list[tuple[list[int], Future[ScoredSequence]]]] = deque()
        num_waiting = 0
        while True:
            while num_waiting <= self._depth or not waiting:
                batch = next(self._batches, None)
                if batch is None:
                    break
                waiting.append([(list(tokens), self._client.submit(tokens)) for tokens in batch])
                num_waiting += len(batch)
            if not waiting:
                break
            due = waiting.popleft()
            num_waiting -= len(due)
            asked = time.monotonic()
            scored = [future.result() for _, future in due]
            self.idle_seconds += time.monotonic() - asked
            yield ScoredBatch([tokens for tokens, _ in due], scored)
            self.total_seconds = time.monotonic() - begun

    @property
    def idle_share(self) -> float:
        """Share of the loop's time that it waited."""
        return self.idle_seconds / self.total_seconds if self.total_seconds else 0.0
