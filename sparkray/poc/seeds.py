"""From a text to random numbers: a SHA-256 chain feeds PCG64.

The chain and both generators are consensus: `words` hashes "TEXT_0", "TEXT_1", ... and `generator` gives those
words to numpy's SeedSequence, so a text and a number of rounds fix every later draw bit for bit.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

WEIGHT_ROUNDS = 4
INPUT_ROUNDS = 4
PERMUTATION_ROUNDS = 1
TARGET_ROUNDS = 1


def words(text: str, num_rounds: int) -> npt.NDArray[np.uint32]:
    """The chain's digests as `8 * num_rounds` little-endian 32-bit words."""
    digests = b"".join(hashlib.sha256(f"{text}_{index}".encode()).digest() for index in range(num_rounds))
    return np.frombuffer(digests, dtype="<u4").astype(np.uint32, copy=False)


def generator(text: str, num_rounds: int) -> np.random.Generator:
    """PCG64 seeded by the chain of `text`."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words(text, num_rounds))))


def name_hash(block_hash: str, name: str) -> int:
    """The 32-bit number that places parameter `name` in the pool: the first 8 hex digits of a SHA-256."""
    return int(hashlib.sha256(f"{block_hash}_{name}".encode()).hexdigest()[:8], 16)


def to_float16(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
    """Rounded twice, to float32 and then to float16; one direct rounding differs in rare elements."""
    return values.astype(np.float32).astype(np.float16)
