"""Does a model fit: parameters, KV cache and optimizer state against the memory of the nodes, as arithmetic.

Bytes here are counted, not measured. What a framework adds (CUDA context, activations, graphs) is the reason for
`usable_share`: on a GB10 vLLM's own default of 0.92 fails to start, 0.80 to 0.85 is usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

# What a weight takes when stored: 4-bit formats keep scales beside the codes and leave the embedding and the head
# in 16 bits, which for a 72.7B model comes to 41 GB.
STORED_BITS: dict[int, float] = {32: 32.0, 16: 16.0, 8: 8.0, 4: 4.5}
# bf16 weight and gradient, float32 master weight and two moments of AdamW.
FULL_TRAINING_BYTES_PER_PARAM = 16

GB = 10**9
GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        name: for messages.
        num_params: all parameters, of every expert too.
        num_layers, num_kv_heads, head_dim: the KV cache of one token is 2 * layers * heads * dim numbers.
        bits: bits of a weight: 32, 16, 8 or 4.
        kv_bits: bits of a number in the KV cache.
    """

    name: str
    num_params: float
    num_layers: int
    num_kv_heads: int
    head_dim: int
    bits: int = 16
    kv_bits: int = 16

    @property
    def weight_bytes(self) -> float:
        return self.num_params * STORED_BITS[self.bits] / 8

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bits / 8


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """The memory of one node that a model can live in.

    Attributes:
        name: for messages.
        total_bytes: what the device sees.
        available_bytes: what is not taken by others; None means all of it.
        usable_share: share of the total that models and their caches may fill.
    """

    name: str
    total_bytes: float
    available_bytes: float | None = None
    usable_share: float = 0.80

    @property
    def usable_bytes(self) -> float:
        limit = self.total_bytes * self.usable_share
        return limit if self.available_bytes is None else min(limit, self.available_bytes)


# 121.69 GiB are visible to CUDA on a DGX Spark (figure reported by owners of the machine).
DGX_SPARK = NodeMemory("DGX Spark", 121.69 * GIB)

# Layers, KV heads and head sizes as published in the models' configurations (Qwen 2.5 and Qwen 3).
KNOWN_SHAPES: tuple[ModelShape, ...] = (
    ModelShape("7B", 7.6e9, 28, 4, 128),
    ModelShape("14B", 14.8e9, 48, 8, 128),
    ModelShape("30B-A3B", 30.5e9, 48, 4, 128),
    ModelShape("32B", 32.8e9, 64, 8, 128),
    ModelShape("72B", 72.7e9, 80, 8, 128),
)


@dataclass(frozen=True, slots=True)
class Demand:
    """Something that takes memory: on one node, or in equal parts on several.

    Attributes:
        what: for messages.
        total_bytes: all of it.
        num_shards: nodes that share it.
    """

    what: str
    total_bytes: float
    num_shards: int = 1

    @property
    def bytes_per_node(self) -> float:
        return self.total_bytes / self.num_shards


@dataclass(frozen=True, slots=True)
class Fit:
    """The answer: whether it fits, the two numbers that say so, and the sentence with its reasons."""

    fits: bool
    needed_bytes_per_node: float
    usable_bytes_per_node: float
    why: str


def fit(demands: Sequence[Demand], node: NodeMemory) -> Fit:
    """Whether everything in `demands` stands on one node at the same time."""
    needed = sum(demand.bytes_per_node for demand in demands)
    fits = needed <= node.usable_bytes
    parts = " + ".join(
        f"{demand.what} {_gb(demand.bytes_per_node)}"
        + (f" (1/{demand.num_shards} of {_gb(demand.total_bytes)})" if demand.num_shards > 1 else "")
        for demand in demands
    )
    total = f" = {_gb(needed)}" if len(demands) > 1 else ""
    why = (
        f"{parts}{total} a node {'fits' if fits else 'does not fit'} in the {_gb(node.usable_bytes)} usable of "
        f"{_gb(node.total_bytes)} on {node.name}"
    )
    return Fit(fits, needed, node.usable_bytes, why)


def fit_inference(shape: ModelShape, node: NodeMemory, *, num_nodes: int = 1, context_tokens: int = 32_768) -> Fit:
    """Whether a model can be served, tensor-parallel over `num_nodes`.

    Args:
        shape: the model at the bits it is stored in.
        node: one of the equal nodes.
        num_nodes: nodes that hold a part each.
        context_tokens: tokens in the KV cache, of all requests together.
    """
    kv_bytes = shape.kv_bytes_per_token * context_tokens
    # Heads are what tensor parallelism divides: beyond their number each node keeps a copy.
    return fit(
        [
            Demand(f"{shape.name} weights at {shape.bits} bits", shape.weight_bytes, num_nodes),
            Demand(f"KV cache of {context_tokens} tokens", kv_bytes, min(num_nodes, shape.num_kv_heads)),
        ],
        node,
    )


def fit_training(
    shape: ModelShape,
    node: NodeMemory,
    *,
    method: Literal["full", "lora"],
    num_nodes: int = 1,
    beside: Sequence[Demand] = (),
) -> Fit:
    """Whether a model can be trained, fully sharded over `num_nodes`.

    Args:
        shape: the model; for `lora` at the bits of its frozen weights (4 bits is QLoRA).
        node: one of the equal nodes.
        method: "full" keeps AdamW's state of every parameter; "lora" keeps the frozen weights.
        num_nodes: nodes that hold a part each.
        beside: what else stands on each node, such as an inference engine.
    """
    if method == "full":
        own = Demand(f"{shape.name} full AdamW", shape.num_params * FULL_TRAINING_BYTES_PER_PARAM, num_nodes)
    else:
        own = Demand(f"{shape.name} frozen weights at {shape.bits} bits", shape.weight_bytes, num_nodes)
    return fit([own, *beside], node)


def most_bits(shape: ModelShape, node: NodeMemory, *, num_nodes: int = 1, context_tokens: int = 32_768) -> int | None:
    """The most bits a weight, of those that the model has, with which it can be served; None if even 4 do not fit."""
    for bits in sorted(STORED_BITS, reverse=True):
        narrower = replace(shape, bits=bits)
        if (
            bits <= shape.bits
            and fit_inference(narrower, node, num_nodes=num_nodes, context_tokens=context_tokens).fits
        ):
            return bits
    return None


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.1f} GB"
