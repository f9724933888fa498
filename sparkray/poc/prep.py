"""Inputs and permutations made ahead, by a bounded ring of batches that threads fill.

numpy draws without the interpreter's lock, so threads are enough. A slot is filled once, computed from once and
then filled again: nothing is prepared twice and nothing is allocated while nonces flow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import torch

from sparkray.config.poc import ModelParams
from sparkray.poc.inputs import draw_input, draw_permutation

PREP_TIMEOUT_SECONDS = 600.0


@dataclass(slots=True)
class Slot:
    """Room for one batch.

    Attributes:
        inputs_BSD: float16, pinned where a GPU will read it.
        orders_BV: int32 permutations.
        nonces: what the first rows hold; later rows are left over from earlier batches.
    """

    inputs_BSD: torch.Tensor
    orders_BV: torch.Tensor
    nonces: tuple[int, ...] = ()
    pending: list[Future[None]] = field(default_factory=list)

    @classmethod
    def allocate(cls, params: ModelParams, batch_size: int, *, pinned: bool) -> Self:
        return cls(
            torch.zeros(batch_size, params.seq_len, params.dim, dtype=torch.float16, pin_memory=pinned),
            # Rows that were never filled must still be permutations: a fixed batch shape reads them too.
            _identity_orders(batch_size, params.vocab_size, pinned=pinned),
        )

    def fill_row(self, row: int, block_hash: str, public_key: str, params: ModelParams) -> None:
        """Draw the input and permutation of the nonce in `row`."""
        nonce = self.nonces[row]
        values = draw_input(block_hash, public_key, nonce, params).astype(np.float32)
        self.inputs_BSD[row].numpy()[:] = values.astype(np.float16)
        self.orders_BV[row].numpy()[:] = draw_permutation(block_hash, public_key, nonce, params.vocab_size)


class PrepRing:
    """Gives filled slots in the order of `batches`; at most `depth` batches exist at any time.

    Args:
        batches: nonces of each batch, at most `batch_size` of them; may be endless.
        depth: slots in the ring.
        num_threads: threads that draw.
    """

    def __init__(
        self,
        block_hash: str,
        public_key: str,
        params: ModelParams,
        batches: Iterator[Sequence[int]],
        *,
        batch_size: int,
        depth: int,
        num_threads: int,
        pinned: bool,
    ) -> None:
        self._seeds = (block_hash, public_key)
        self._params = params
        self._batches = batches
        self._num_threads = num_threads
        self._free = [Slot.allocate(params, batch_size, pinned=pinned) for _ in range(depth)]
        self._filling: deque[Slot] = deque()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="poc-prep")

    def __enter__(self) -> Self:
        self._refill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def take(self) -> Slot | None:
        """The next filled slot, or None after the last batch; give it back with `release`."""
        if not self._filling:
            return None
        slot = self._filling.popleft()
        for future in slot.pending:
            future.result(timeout=PREP_TIMEOUT_SECONDS)
        return slot

    def release(self, slot: Slot) -> None:
        """Say that nobody reads `slot` any more."""
        self._free.append(slot)
        self._refill()

    def _refill(self) -> None:
        while self._free:
            batch = next(self._batches, None)
            if batch is None:
                return
            slot = self._free.pop()
            slot.nonces = tuple(batch)
            rows = range(len(slot.nonces))
            shares = [rows[start :: self._num_threads] for start in range(min(self._num_threads, len(rows)))]
            slot.pending = [self._threads.submit(self._fill, slot, share) for share in shares]
            self._filling.append(slot)

    def _fill(self, slot: Slot, rows: range) -> None:
        for row in rows:
            slot.fill_row(row, *self._seeds, self._params)


def _identity_orders(batch_size: int, vocab_size: int, *, pinned: bool) -> torch.Tensor:
    orders = torch.arange(vocab_size, dtype=torch.int32).repeat(batch_size, 1)
    return orders.pin_memory() if pinned else orders
