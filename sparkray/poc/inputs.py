"""What a nonce is: its input to the model, its permutation of the logits, and the target that all nonces share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparkray.config.poc import ModelParams
from sparkray.poc.seeds import INPUT_ROUNDS, PERMUTATION_ROUNDS, TARGET_ROUNDS, generator


def draw_input(block_hash: str, public_key: str, nonce: int, params: ModelParams) -> npt.NDArray[np.float64]:
    """The input of one nonce, (seq_len, dim), standard normal, not yet rounded."""
    rng = generator(f"{block_hash}_{public_key}_nonce{nonce}", INPUT_ROUNDS)
    return rng.standard_normal((params.seq_len, params.dim))


def draw_permutation(block_hash: str, public_key: str, nonce: int, vocab_size: int) -> npt.NDArray[np.int64]:
    """The order in which the logits of one nonce are read."""
    # The separator before the number is there for permutations and missing for inputs; both are consensus.
    return generator(f"{block_hash}_{public_key}_nonce_{nonce}_permutations", PERMUTATION_ROUNDS).permutation(
        vocab_size
    )


def draw_target(block_hash: str, vocab_size: int) -> npt.NDArray[np.float64]:
    """The unit vector that logits are measured against; the same for every key."""
    # Drawn and normed as one row of a matrix: numpy sums a row's squares in another order than a vector's.
    row = generator(f"{block_hash}_target", TARGET_ROUNDS).standard_normal((1, vocab_size))
    unit: npt.NDArray[np.float64] = row / np.linalg.norm(row, axis=1, keepdims=True)
    return unit.reshape(-1)
