"""How many bytes a checkpoint has after a cut, from its headers alone, and how many a forward pass needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparkray.errors import InputError
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.layout import Layout, layer_of


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """Tensor bytes, split by what a cut changes: `total = fixed + num_experts * per_expert`.

    Attributes:
        fixed_bytes: tensors that stay as they are.
        per_expert_bytes: one expert of every sparse layer, with its router rows.
        num_experts: experts of a layer before the cut.
    """

    fixed_bytes: int
    per_expert_bytes: int
    num_experts: int

    def bytes_with(self, num_experts: int) -> int:
        """Tensor bytes with `num_experts` experts a layer."""
        return self.fixed_bytes + num_experts * self.per_expert_bytes

    def experts_within(self, target_bytes: float) -> int:
        """The most experts that keep the checkpoint at or under `target_bytes`; may be zero or less."""
        if self.per_expert_bytes == 0:
            raise InputError("the checkpoint has no bytes in experts.")
        return min(self.num_experts, math.floor((target_bytes - self.fixed_bytes) / self.per_expert_bytes))


def checkpoint_size(checkpoint: Checkpoint, layout: Layout) -> CheckpointSize:
    """Size of a checkpoint as a function of the number of experts."""
    expert_bytes = sum(
        tensor.num_bytes for name, tensor in checkpoint.tensors.items() if layout.roles[name].role != "other"
    )
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    return CheckpointSize(total - expert_bytes, expert_bytes // layout.num_experts, layout.num_experts)


def dense_bytes(checkpoint: Checkpoint, itemsize: int) -> tuple[int, int]:
    """(whole model, largest layer with embeddings) in bytes once every weight is dense with `itemsize` bytes."""
    outside, layers = dense_layer_bytes(checkpoint, itemsize)
    return outside + sum(layers.values()), outside + max(layers.values(), default=0)


def dense_layer_bytes(checkpoint: Checkpoint, itemsize: int) -> tuple[int, dict[tuple[str, int], int]]:
    """(bytes outside of the layers, (stack, layer number) -> bytes) with every weight dense."""
    layers: dict[tuple[str, int], int] = {}
    outside = 0
    for name, tensor in checkpoint.tensors.items():
        codes = 2 if name.endswith(("_blocks", "_packed")) or tensor.dtype == "F4" else 1
        size = math.prod(tensor.shape) * codes * itemsize
        place = layer_of(name)
        if place is None:
            outside += size
        else:
            layers[place[:2]] = layers.get(place[:2], 0) + size
    return outside, layers
