"""One batch through the model and to distances, on a CPU or on a CUDA device.

A step is submitted and its result read later, so that a GPU computes one batch while the next one is copied.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from sparkray.poc.distance import distances
from sparkray.poc.model import Forward
from sparkray.poc.prep import Slot

Float64Array = npt.NDArray[np.float64]
NUM_BUFFERS = 2
_WARMUP_STEPS = 3


class Pending(Protocol):
    """A submitted batch."""

    def wait_copied(self) -> None:
        """Return once the slot may be filled again."""

    def result(self) -> Float64Array:
        """Distances of the slot's nonces, (num_nonces,)."""


class Step(Protocol):
    """Computes batches."""

    def submit(self, slot: Slot) -> Pending: ...


class CpuStep:
    """Computes at once, and only the rows that hold nonces."""

    def __init__(self, model: Forward, target_V: torch.Tensor) -> None:
        self._model = model
        self._target_V = target_V

    def submit(self, slot: Slot) -> Pending:
        count = len(slot.nonces)
        logits_BV = self._model.last_logits(slot.inputs_BSD[:count])
        return _Done(distances(logits_BV, slot.orders_BV[:count], self._target_V).numpy())


class _Done:
    def __init__(self, values: Float64Array) -> None:
        self._values = values

    def wait_copied(self) -> None:
        """Nothing was copied."""

    def result(self) -> Float64Array:
        return self._values


class CudaStep:
    """Copies on one stream and replays a captured graph on another; every batch has the same shape.

    Two buffers alternate: while one is computed from, the other is copied into. Only one float64 a nonce returns.

    Args:
        graphs: capture CUDA graphs; without them the kernels are launched one by one.
    """

    def __init__(self, model: Forward, target_V: torch.Tensor, batch_size: int, *, graphs: bool = True) -> None:
        self._model = model
        self._target_V = target_V.to(model.device)
        self._copies = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._compute = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        self._buffers = [self._make_buffer(batch_size, graphs=graphs) for _ in range(NUM_BUFFERS)]
        self._next = 0

    def submit(self, slot: Slot) -> Pending:
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % NUM_BUFFERS
        with torch.cuda.stream(self._copies):
            # The graph that last read this buffer must be done before it is written again.
            self._copies.wait_event(buffer.computed)
            buffer.inputs_BSD.copy_(slot.inputs_BSD, non_blocking=True)
            buffer.orders_BV.copy_(slot.orders_BV, non_blocking=True)
            buffer.copied.record(self._copies)
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(buffer.copied)
            if buffer.graph is None:
                buffer.distances_B.copy_(self._forward(buffer))
            else:
                buffer.graph.replay()
            buffer.results_B.copy_(buffer.distances_B, non_blocking=True)
            buffer.computed.record(self._compute)
        return _InFlight(buffer, len(slot.nonces))

    def _forward(self, buffer: _Buffer) -> torch.Tensor:
        return distances(self._model.last_logits(buffer.inputs_BSD), buffer.orders_BV, self._target_V)

    def _make_buffer(self, batch_size: int, *, graphs: bool) -> _Buffer:
        buffer = _Buffer(self._model, batch_size)
        if not graphs:
            return buffer
        self._compute.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(self._compute):
            for _ in range(_WARMUP_STEPS):
                self._forward(buffer)
        self._compute.synchronize()
        buffer.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(buffer.graph, stream=self._compute):
            buffer.distances_B.copy_(self._forward(buffer))
        return buffer


class _Buffer:
    """Fixed addresses on the device for one batch in flight."""

    def __init__(self, model: Forward, batch_size: int) -> None:
        params, device = model.params, model.device
        self.inputs_BSD = torch.zeros(batch_size, params.seq_len, params.dim, dtype=torch.float16, device=device)
        self.orders_BV = torch.arange(params.vocab_size, dtype=torch.int32, device=device).repeat(batch_size, 1)
        self.distances_B = torch.zeros(batch_size, dtype=torch.float64, device=device)
        self.results_B = torch.zeros(batch_size, dtype=torch.float64, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None


class _InFlight:
    def __init__(self, buffer: _Buffer, count: int) -> None:
        self._buffer = buffer
        self._count = count

    def wait_copied(self) -> None:
        self._buffer.copied.synchronize()

    def result(self) -> Float64Array:
        self._buffer.computed.synchronize()
        # Copied out: the buffer's next batch overwrites it.
        values: Float64Array = self._buffer.results_B[: self._count].numpy().copy()
        return values
