"""The network's later proof ("PoC v2"): a few rotated coordinates of a served model's last hidden state.

This file holds its pure part: seeds, murmur3 with Box-Muller for normals, the reflection and rotation that a nonce
fixes, the choice of coordinates, and the encoding. All numbers are float32, as on the network; the seeds are
32 bits wide (`seed_of`), or eight of them where the network's stronger generator is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch

_MASK = 0xFFFFFFFF


def seed_of(text: str) -> int:
    """The first 32 bits of a SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def murmur3(count: int, seed: int) -> torch.Tensor:
    """Murmur3 (32 bit) of the keys 0 ... count - 1, (count,) int64."""
    key = torch.arange(count, dtype=torch.int64) * 0xCC9E2D51 & _MASK
    key = _rotate(key, 15) * 0x1B873593 & _MASK
    mixed = (_rotate(seed ^ key, 13) * 5 + 0xE6546B64) & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * factor & _MASK
    return mixed ^ mixed >> 16


def normals(seed: int, count: int) -> torch.Tensor:
    """Standard normals by Box-Muller, (count,) float32: all cosines first, then the sines."""
    num_pairs = (count + 1) // 2
    uniform = murmur3(2 * num_pairs, seed).float() / 2.0**32
    radius = (-2.0 * uniform[:num_pairs].clamp(min=1e-10).log()).sqrt()
    angle = 2.0 * math.pi * uniform[num_pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def draw_hidden_input(
    block_hash: str, public_key: str, nonce: int, dim: int, seq_len: int, *, stronger: bool = False
) -> torch.Tensor:
    """Input embeddings of one nonce, (seq_len, dim) float32.

    Args:
        stronger: use all 256 bits of the hash, an eighth of the values from each 32 of them.
    """
    text, count = f"{block_hash}_{public_key}_nonce{nonce}", seq_len * dim
    if not stronger:
        return normals(seed_of(text), count).view(seq_len, dim)
    digest = hashlib.sha256(text.encode()).digest()
    segment = (count + 7) // 8
    parts = [
        normals(int.from_bytes(digest[4 * index : 4 * index + 4], "big"), max(0, min(segment, count - index * segment)))
        for index in range(8)
    ]
    return torch.cat(parts).view(seq_len, dim)


def unit_vector(text: str, dim: int) -> torch.Tensor:
    """The unit vector that `text` seeds."""
    vector = normals(seed_of(text), dim)
    length: torch.Tensor = vector.norm()
    return vector / length


def artifact_target(block_hash: str, public_key: str, dim: int) -> torch.Tensor:
    """The target direction; keyed by the public key, unlike the older proof's."""
    return unit_vector(f"{block_hash}_{public_key}_target", dim)


def layer_reflection(block_hash: str, layer: int, dim: int) -> torch.Tensor:
    """The unit vector v of the reflection I - 2 v v^T after block `layer`."""
    return unit_vector(f"{block_hash}_layer_{layer}_householder", dim)


def reflect(vector: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Reflect the last axis at the plane across `unit`."""
    return vector - 2 * (vector * unit).sum(-1, keepdim=True) * unit


def pick_coordinates(block_hash: str, public_key: str, nonce: int, dim: int, count: int) -> torch.Tensor:
    """The `count` coordinates with the smallest scores, the smallest first.

    The network takes them in whatever order its top-k returns; a fixed order is the same on every device.
    """
    scores = murmur3(dim, seed_of(f"{block_hash}_{public_key}_nonce_{nonce}_pick_{count}"))
    return scores.argsort(stable=True)[:count]


def haar_rotate(block_hash: str, public_key: str, nonce: int, vector: torch.Tensor) -> torch.Tensor:
    """A nonce's random rotation: one reflection fewer than the vector has coordinates."""
    size = vector.shape[-1]
    for step in range(size - 1):
        text = f"{block_hash}_{public_key}_nonce_{nonce}_haar_hh_{size}_{step}"
        vector = reflect(vector, unit_vector(text, size).to(vector.dtype))
    return vector


def encode_vector(vector: npt.NDArray[np.float32]) -> str:
    """Base64 of little-endian float16."""
    return base64.b64encode(vector.astype("<f2").tobytes()).decode("ascii")


def decode_vector(text: str) -> npt.NDArray[np.float32]:
    """The inverse of `encode_vector`, in float32."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2").astype(np.float32)


def _rotate(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values << bits | values >> 32 - bits) & _MASK
