"""Carrying a step's numbers from the device into the trace arena, without making a GPU wait.

On a CPU they are there already. On a GPU the copy to the host is queued behind the kernels that make the numbers, and
a thread writes them when it has arrived: a step later than the tokens at the earliest, in their order.

A step is packed into one tensor, [B rows, P columns]: position, committed, restarted, keep, then the F numbers of a
recorded token.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from queue import Queue
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparkray.metis.arena import IntArray, TraceArena

_MAX_STEPS_IN_FLIGHT = 64
_NUM_LEADING = 4


class Publisher(Protocol):
    """Where a step's numbers go."""

    def publish(self, slots_B: IntArray, generations_B: IntArray, step_BP: Tensor) -> None: ...


def pack_step(
    positions_B: Tensor, committed_B: Tensor, restarted_B: Tensor, keep_B: Tensor, tokens_BF: Tensor
) -> Tensor:
    """One step as one float64 tensor, which holds positions exactly."""
    leading_BL = torch.stack((positions_B, committed_B, restarted_B, keep_B), dim=1)
    return torch.cat((leading_BL.double(), tokens_BF.double()), dim=1)


class DirectPublisher:
    """Writes at once; for logits on the CPU."""

    def __init__(self, arena: TraceArena) -> None:
        self._arena = arena

    def publish(self, slots_B: IntArray, generations_B: IntArray, step_BP: Tensor) -> None:
        _write(self._arena, slots_B, generations_B, step_BP)


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    slots_B: IntArray
    generations_B: IntArray
    step_BP: Tensor
    arrived: torch.Event


class DeferredPublisher:
    """Writes when the copy from the device has arrived, in a thread that ends with the process."""

    def __init__(self, arena: TraceArena, device: torch.device) -> None:
        self._arena = arena
        self._device = device
        self._steps: Queue[_StepInFlight] = Queue(_MAX_STEPS_IN_FLIGHT)
        threading.Thread(target=self._run, name="metis-publisher", daemon=True).start()

    def publish(self, slots_B: IntArray, generations_B: IntArray, step_BP: Tensor) -> None:
        host_BP = torch.empty(step_BP.shape, dtype=step_BP.dtype, pin_memory=True)
        host_BP.copy_(step_BP, non_blocking=True)
        arrived = torch.Event(self._device)
        arrived.record()
        self._steps.put(_StepInFlight(slots_B.copy(), generations_B.copy(), host_BP, arrived))

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            step.arrived.synchronize()
            _write(self._arena, step.slots_B, step.generations_B, step.step_BP)


def create_publisher(arena: TraceArena, device: torch.device) -> Publisher:
    """The publisher for logits on `device`."""
    return DirectPublisher(arena) if device.type == "cpu" else DeferredPublisher(arena, device)


def _write(arena: TraceArena, slots_B: IntArray, generations_B: IntArray, step_BP: Tensor) -> None:
    step = step_BP.numpy()
    kept_B = step[:, 3] > 0
    step = step[kept_B]
    arena.write(
        slots_B[kept_B],
        generations_B[kept_B],
        step[:, 0].astype(np.int64),
        step[:, _NUM_LEADING:].astype(np.float32),
        committed_B=step[:, 1].astype(np.int64),
        restarted_B=step[:, 2] > 0,
    )
