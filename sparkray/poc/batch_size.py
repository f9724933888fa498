"""The network's two batch size formulas, to be had by name; by itself the engine measures (see `tuning`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparkray.config.poc import FormulaName, ModelParams
from sparkray.errors import UnavailableError
from sparkray.poc.devices import memory_bytes

MEMORY_SHARE = 0.9
V1_BIAS_MB = 6500.0
V1_COEFF_MB = 30.5
_MIB = 1024**2


def formula_batch_size(name: FormulaName, params: ModelParams, devices: Sequence[torch.device]) -> int:
    """The formula of that name for a group's devices, none of which holds weights yet.

    Raises:
        UnavailableError: the first device has not enough memory for one nonce.
    """
    memory = [memory_bytes(device) for device in devices]
    if name == "v1":
        return batch_size_v1(memory[0][1] / _MIB)
    return batch_size_v2([free / _MIB for free, _ in memory], params)


def batch_size_v1(total_mb: float) -> int:
    """Formula for the V1 preset from the total memory of a group's first device, in MB.

    Raises:
        UnavailableError: the device has not enough memory for one nonce.
    """
    usable = total_mb * MEMORY_SHARE
    if usable < V1_BIAS_MB + V1_COEFF_MB:
        raise UnavailableError(
            f"the device has {total_mb:g} MB, and the V1 formula needs {V1_BIAS_MB + V1_COEFF_MB:g} MB"
            f" in {MEMORY_SHARE:.0%} of it."
        )
    return math.floor((usable - V1_BIAS_MB) / V1_COEFF_MB)


def batch_size_v2(free_mb: Sequence[float], params: ModelParams) -> int:
    """Formula for the V2 preset from the free memory of each device of a group, in MB; at least 1."""
    # The formula counts matrices alone: no norm gains, and the output head but not the embedding.
    matrices = 4 * params.dim**2 + 3 * params.dim * params.ffn_hidden
    weights = 2 * (params.n_layers * matrices + params.vocab_size * params.dim) / len(free_mb)
    positions = params.seq_len * params.dim * 2
    scores = params.n_heads * params.seq_len**2 * 2
    # The first term stands for a KV cache that this model does not have; it is part of the formula.
    item = 2 * params.n_layers * positions + 8 * positions + scores
    usable = min(free * _MIB * MEMORY_SHARE * 0.90 - weights for free in free_mb)
    return max(1, math.floor(usable / item))
