"""Which devices compute one nonce together.

Greedy, as on the network: from the first device on, the smallest of 1, 2, 4 or 8 neighbours whose memory suffices
form a group; a device from which none does is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparkray.config.poc import V1, ModelParams, WeightsConfig
from sparkray.errors import UnavailableError

GROUP_SIZES = (1, 2, 4, 8)
_CONTEXT_GIB = 1.0
_MIN_BATCH = 32
_GIB = 1024**3

NeededGib = Callable[[int], float]


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
    """Memory that our engine needs for `batch_size` nonces on one device, in GiB; see `device_vram`."""
    return device_vram(params, weights, 1, batch_size)


def device_vram(params: ModelParams, weights: WeightsConfig, num_devices: int, batch_size: int = _MIN_BATCH) -> float:
    """Memory that each of `num_devices` needs which share the blocks, in GiB.

    Its part of the weights (eight shifted pools or one pool and its blocks' slices, whichever is less; what it
    reads where they are drawn sequentially), the widest activations of a block in float16 and float32, logits and
    inputs, and the device's own context.
    """
    share = 1.0 / num_devices
    if weights.pool_fraction is not None:
        share = min(8 * weights.pool_fraction, share + weights.pool_fraction)
    positions = batch_size * params.seq_len
    per_position = 2 * (2 * params.ffn_hidden) + 4 * (6 * params.dim)
    activation_bytes = positions * per_position + batch_size * params.vocab_size * 16
    return (share * 2.0 * params.num_params + activation_bytes) / _GIB + _CONTEXT_GIB


def share_devices(
    vram_gib: Sequence[float], needed_gib: NeededGib, sizes: Sequence[int] = GROUP_SIZES
) -> tuple[GpuGroup, ...]:
    """Our groups of one node's devices: greedy as the network's, but each device must hold its own part.

    Args:
        needed_gib: memory of each device where so many of a group's are on this node.
    """
    groups: list[GpuGroup] = []
    head = 0
    while head < len(vram_gib):
        left = vram_gib[head:]
        size = next((n for n in sizes if n <= len(left) and min(left[:n]) >= needed_gib(n)), 0)
        if size:
            groups.append(GpuGroup(tuple(range(head, head + size))))
        head += size or 1
    return tuple(groups)


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a scheduler sets aside for one group.

    Attributes:
        num_gpus: on each of its nodes; 0 for the CPU.
        num_cpus: logical ones, on each of its nodes.
        num_nodes: nodes that share its blocks.
    """

    num_gpus: int
    num_cpus: float
    num_nodes: int = 1

    @property
    def bundles(self) -> list[dict[str, float]]:
        """As bundles of resources, each of a node of its own."""
        bundle = {"CPU": self.num_cpus, **({"GPU": float(self.num_gpus)} if self.num_gpus else {})}
        return [bundle] * self.num_nodes


def gpu_shapes(
    memory_gib: Sequence[Sequence[float]], needed_gib: NeededGib, num_cpus: float, num_nodes: int = 1
) -> list[GroupShape]:
    """The groups that the GPUs of several nodes make.

    Args:
        memory_gib: of every GPU, node by node.
        needed_gib: memory of each device where so many share the blocks.
        num_nodes: nodes that share a group, neighbours in `memory_gib`; each gives as many GPUs.

    Raises:
        UnavailableError: they make none.
    """
    nodes = [node for node in memory_gib if node]
    shapes: list[GroupShape] = []
    for first in range(0, len(nodes) - num_nodes + 1, num_nodes):
        sizes = _team_sizes(nodes[first : first + num_nodes], needed_gib)
        shapes += [GroupShape(size, num_cpus, num_nodes) for size in sizes]
    if not shapes:
        needs = ", ".join(f"{needed_gib(count * num_nodes):.1f} GiB in {count}" for count in GROUP_SIZES)
        where = "one node" if num_nodes == 1 else f"each of {num_nodes} nodes"
        raise UnavailableError(
            f"this model needs, of each GPU, {needs} GPUs of {where}, and the nodes have"
            f" {[list(node) for node in nodes]} GiB.",
            hint="Choose a smaller model, more num_nodes_per_group, or device=cpu.",
        )
    return shapes


def _team_sizes(team: Sequence[Sequence[float]], needed_gib: NeededGib) -> list[int]:
    """How many GPUs of each node every group of these nodes has."""
    if len(team) == 1:
        return [len(group.device_ids) for group in share_devices(team[0], needed_gib)]
    for size in GROUP_SIZES:
        # Blocks are shared evenly, so all nodes of a group give the same number.
        groups = [share_devices(node, lambda count: needed_gib(count * len(team)), (size,)) for node in team]
        if count := min(map(len, groups)):
            return [size] * count
    return []


def _group_size(vram_gb: Sequence[float], min_vram_gb: float) -> int:
    for size in GROUP_SIZES:
        if size <= len(vram_gb) and sum(vram_gb[:size]) >= min_vram_gb:
            return size
    return 0
