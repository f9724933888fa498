"""Which devices compute one nonce together.

Greedy, as on the network: from the first device on, the smallest of 1, 2, 4 or 8 neighbours whose memory suffices
form a group; a device from which none does is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkray.config.poc import V1, ModelParams, WeightsConfig
from sparkray.errors import UnavailableError

GROUP_SIZES = (1, 2, 4, 8)
_CONTEXT_GIB = 1.0
_MIN_BATCH = 32
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class GpuGroup:
    """Devices that compute together; the first one holds inputs and results.

    Attributes:
        device_ids: CUDA indices; empty for the CPU.
    """

    device_ids: tuple[int, ...]

    @property
    def primary_device(self) -> str:
        """The first device's name for torch."""
        return f"cuda:{self.device_ids[0]}" if self.device_ids else "cpu"


def create_gpu_groups(vram_gb: Sequence[float], min_vram_gb: float) -> tuple[GpuGroup, ...]:
    """Group devices 0, 1, ... by their memory; no device at all gives the one CPU group."""
    if not vram_gb:
        return (GpuGroup(()),)
    groups: list[GpuGroup] = []
    head = 0
    while head < len(vram_gb):
        size = _group_size(vram_gb[head:], min_vram_gb)
        if size:
            groups.append(GpuGroup(tuple(range(head, head + size))))
        head += size or 1
    return tuple(groups)


def network_min_group_vram(params: ModelParams) -> float:
    """The network's own table, in GB: 10 for V1, 38 for everything else."""
    return 10.0 if params == V1 else 38.0


def get_min_group_vram(params: ModelParams, weights: WeightsConfig, batch_size: int = _MIN_BATCH) -> float:
    """Memory that our engine needs for `batch_size` nonces, in GiB.

    Weights (eight shifted pools, or all of them where drawn sequentially), the widest activations of a block in
    float16 and float32, logits and inputs, and the device's own context.
    """
    if weights.pool_fraction is None:
        weight_bytes = 2.0 * params.num_params
    else:
        weight_bytes = min(8 * weights.pool_fraction, 1 + weights.pool_fraction) * 2.0 * params.num_params
    positions = batch_size * params.seq_len
    per_position = 2 * (2 * params.ffn_hidden) + 4 * (6 * params.dim)
    activation_bytes = positions * per_position + batch_size * params.vocab_size * 16
    return (weight_bytes + activation_bytes) / _GIB + _CONTEXT_GIB


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a scheduler sets aside for one group.

    Attributes:
        num_gpus: 0 for the CPU.
        num_cpus: logical ones.
    """

    num_gpus: int
    num_cpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """As a bundle of resources, which always lies on one node."""
        return {"CPU": self.num_cpus, **({"GPU": float(self.num_gpus)} if self.num_gpus else {})}


def gpu_shapes(memory_gib: Sequence[Sequence[float]], needed_gib: float, num_cpus: float) -> list[GroupShape]:
    """The groups that the GPUs of several nodes make.

    Args:
        memory_gib: of every GPU, node by node.

    Raises:
        UnavailableError: they make none.
    """
    shapes = [
        GroupShape(len(group.device_ids), num_cpus)
        for node in memory_gib
        if node
        for group in create_gpu_groups(node, needed_gib)
    ]
    if not shapes:
        raise UnavailableError(
            f"this model needs {needed_gib:.1f} GiB in 1, 2, 4 or 8 GPUs of one node, and the nodes have"
            f" {[list(node) for node in memory_gib]}.",
            hint="Choose a smaller model, or device=cpu.",
        )
    return shapes


def _group_size(vram_gb: Sequence[float], min_vram_gb: float) -> int:
    for size in GROUP_SIZES:
        if size <= len(vram_gb) and sum(vram_gb[:size]) >= min_vram_gb:
            return size
    return 0
