"""The workers of torch's default process group, as the trainer sees them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ProcessGroupWorkers:
    """Gradients are summed once a step, in one message, after all micro-batches.

    A worker whose share of a batch is empty adds zeros.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_gradients(self, model: nn.Module) -> None:
        """Add every gradient over the workers, in place."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):  # type: ignore[no-untyped-call]
            parameter.grad = part.view_as(parameter)

    def sum(self, values: Tensor) -> Tensor:
        """Add values over the workers."""
        total = values.clone()
        dist.all_reduce(total)
        return total
