"""Distances of a few nonces, the plain way: one batch, no workers, no graph. The checker and the tests use it.

Sequential weights are drawn while the forward pass asks for them and dropped block by block, so even a model of
many GB needs the memory of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from sparkray.config.poc import ModelParams, WeightsConfig
from sparkray.poc.device_weights import load_weights
from sparkray.poc.distance import distances
from sparkray.poc.inputs import draw_input, draw_permutation, draw_target
from sparkray.poc.model import ReadWeight, Transformer
from sparkray.poc.seeds import to_float16
from sparkray.poc.weights import Float16Array, draw_sequential

CPU = torch.device("cpu")


def replay(
    block_hash: str,
    public_key: str,
    nonces: Sequence[int],
    params: ModelParams,
    weights: WeightsConfig,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> npt.NDArray[np.float64]:
    """Distances of `nonces` on the CPU.

    Args:
        layers: the blocks to run; None runs all, an empty sequence is the zero-layer shortcut.
        dtype: float32, or float16 for the network's own rounding.
    """
    if weights.pool_fraction is None:
        read: ReadWeight = StreamedWeights(draw_sequential(block_hash, params))
    else:
        read = load_weights(block_hash, params, weights, CPU, dtype)
    inputs = np.stack([to_float16(draw_input(block_hash, public_key, nonce, params)) for nonce in nonces])
    orders = np.stack([draw_permutation(block_hash, public_key, nonce, params.vocab_size) for nonce in nonces])
    logits_BV = Transformer(params, read, CPU, dtype).last_logits(torch.from_numpy(inputs), layers)
    target_V = torch.from_numpy(draw_target(block_hash, params.vocab_size))
    result: npt.NDArray[np.float64] = distances(logits_BV, torch.from_numpy(orders), target_V).numpy()
    return result


class StreamedWeights:
    """Reads parameters from a draw in its own order, keeping one block at a time."""

    def __init__(self, draws: Iterator[tuple[str, Float16Array]]) -> None:
        self._draws = draws
        self._block: dict[str, torch.Tensor] = {}
        self._prefix = ""

    def __call__(self, name: str) -> torch.Tensor:
        while name not in self._block:
            drawn, values = next(self._draws)
            prefix = ".".join(drawn.split(".")[:2])
            if prefix != self._prefix:
                self._block, self._prefix = {}, prefix
            self._block[drawn] = torch.from_numpy(values)
        return self._block[name]
