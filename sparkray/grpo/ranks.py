"""What a training step asks of the other ranks; one rank alone asks itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks(Protocol):
    """The ranks of a step."""

    rank: int
    size: int

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on each."""

    def max(self, values: Tensor) -> Tensor:
        """The maximum over all ranks, on each."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every rank's gradients their sum."""


class OneRank:
    """A step without others."""

    rank = 0
    size = 1

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass


class ProcessGroupRanks:
    """The ranks of torch's default process group.

    Args:
        sharded: whether parameters are sharded by FSDP, which sums gradients by itself (set to do so: `shard`).

    Without FSDP, gradients are summed once a step, in one message, after all micro-batches. DDP sums in the backward
    pass and waits for a rank that has no micro-batch; here such a rank adds zeros.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.sharded = sharded

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def max(self, values: Tensor) -> Tensor:
        largest = values.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.sharded or self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        dist.all_reduce(flat)
        start = 0
        for parameter in parameters:
            assert parameter.grad is not None
            stop = start + parameter.grad.numel()
            parameter.grad.copy_(flat[start:stop].view_as(parameter.grad))
            start = stop
