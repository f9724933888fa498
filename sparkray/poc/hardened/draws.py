"""What the hardened mode draws: int8 weights, inputs and target, each from a seed of its own.

Bytes are taken raw from PCG64, whose stream numpy guarantees; a tensor is drawn without the ones before it, so
starting is as parallel as the machine. There is no pool: every weight is distinct, and none may be left out of
memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparkray.config.poc import ModelParams
from sparkray.poc.seeds import INPUT_ROUNDS, TARGET_ROUNDS, WEIGHT_ROUNDS, generator
from sparkray.poc.weights import parameter_shapes

Int8Array = npt.NDArray[np.int8]


def weight_shapes(params: ModelParams) -> dict[str, tuple[int, ...]]:
    """The matrices of the hardened model: no gains, no embedding."""
    return {
        name: shape
        for name, shape in parameter_shapes(params).items()
        if len(shape) == 2 and name != "tok_embeddings.weight"
    }


def draw_weight(block_hash: str, name: str, shape: tuple[int, ...]) -> Int8Array:
    """One matrix."""
    return _bytes(f"{block_hash}_{name}_int8", WEIGHT_ROUNDS, shape)


def draw_hardened_input(block_hash: str, public_key: str, nonce: int, params: ModelParams) -> Int8Array:
    """The input of one nonce, (seq_len, dim)."""
    return _bytes(f"{block_hash}_{public_key}_nonce_{nonce}_int8", INPUT_ROUNDS, (params.seq_len, params.dim))


def draw_hardened_target(block_hash: str, vocab_size: int) -> Int8Array:
    """The target, (vocab_size,)."""
    return _bytes(f"{block_hash}_target_int8", TARGET_ROUNDS, (vocab_size,))


def _bytes(text: str, num_rounds: int, shape: tuple[int, ...]) -> Int8Array:
    count = int(np.prod(shape))
    raw = np.asarray(generator(text, num_rounds).bit_generator.random_raw(-(-count // 8)))
    drawn = raw.astype("<u8", copy=False).view(np.int8)[:count]
    # A symmetric range: -128 would be the one value without its opposite.
    return np.maximum(drawn, -127).reshape(shape)
