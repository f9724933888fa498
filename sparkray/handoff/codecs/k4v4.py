"""Half a byte a number: keys share scale and offset by channel over 32 tokens, values by token over up to 64 channels.

Keys have outliers that stay in their channel, values do not (KIVI, Liu et al. 2024). The answer's distribution moves
by 2e-3 to 1e-2 nats a token, so this codec is used only where a configuration names it.
"""

from __future__ import annotations

import numpy as np

from sparkray.handoff.codecs.int8 import group_of
from sparkray.handoff.rows import Array, Floats

TOKENS = 32
_LEVELS = 15


def key_bytes(num_rows: int, num_heads: int, width: int) -> int:
    """Size of `encode_keys`' result."""
    blocks = -(-num_rows // TOKENS)
    return 4 * blocks * num_heads * width + _packed(blocks * TOKENS * num_heads * width)


def value_bytes(num_rows: int, num_heads: int, width: int) -> int:
    """Size of `encode_values`' result."""
    return 4 * num_rows * num_heads * (width // group_of(width)) + _packed(num_rows * num_heads * width)


def encode_keys(keys_THD: Floats) -> bytes:
    """Offsets and scales as float16 (blocks, 1, H, D), then numbers; the last block is filled with its last row."""
    tokens, heads, width = keys_THD.shape
    missing = -tokens % TOKENS
    filled = np.concatenate([keys_THD, np.repeat(keys_THD[-1:], missing, axis=0)]) if missing else keys_THD
    return _encode(filled.reshape(-1, TOKENS, heads, width), axis=1)


def decode_keys(body: memoryview, num_rows: int, num_heads: int, width: int) -> Floats:
    """Undo `encode_keys`; the body has exactly `key_bytes` bytes."""
    blocks = -(-num_rows // TOKENS)
    numbers = _decode(body, (blocks, TOKENS, num_heads, width), (blocks, 1, num_heads, width))
    return numbers.reshape(-1, num_heads, width)[:num_rows]


def encode_values(values_THD: Floats) -> bytes:
    """Offsets and scales as float16 (T, H, D / group, 1), then numbers."""
    tokens, heads, width = values_THD.shape
    return _encode(values_THD.reshape(tokens, heads, -1, group_of(width)), axis=3)


def decode_values(body: memoryview, num_rows: int, num_heads: int, width: int) -> Floats:
    """Undo `encode_values`; the body has exactly `value_bytes` bytes."""
    groups = width // group_of(width)
    numbers = _decode(body, (num_rows, num_heads, groups, width // groups), (num_rows, num_heads, groups, 1))
    return numbers.reshape(num_rows, num_heads, width)


def _encode(numbers: Floats, axis: int) -> bytes:
    lowest = numbers.min(axis=axis, keepdims=True).astype("<f2")
    # Scale and offset as they will be read, so that rounding them does not push numbers off the grid.
    spread = numbers.max(axis=axis, keepdims=True) - lowest.astype(np.float32)
    scales = (spread / _LEVELS).astype("<f2")
    divisor = np.where(scales == 0, 1, scales).astype(np.float32)
    levels = np.clip(np.rint((numbers - lowest.astype(np.float32)) / divisor), 0, _LEVELS).astype(np.uint8).ravel()
    if levels.size % 2:
        levels = np.append(levels, np.uint8(0))
    packed: Array = levels[::2] | (levels[1::2] << 4)
    return b"".join((lowest.tobytes(), scales.tobytes(), packed.tobytes()))


def _decode(body: memoryview, shape: tuple[int, ...], parameters: tuple[int, ...]) -> Floats:
    size = 2 * int(np.prod(parameters))
    lowest = np.frombuffer(body[:size], "<f2").astype(np.float32).reshape(parameters)
    scales = np.frombuffer(body[size : 2 * size], "<f2").astype(np.float32).reshape(parameters)
    packed = np.frombuffer(body[2 * size :], np.uint8)
    levels: Array = np.empty(2 * packed.size, np.uint8)
    levels[::2] = packed & 15
    levels[1::2] = packed >> 4
    numbers = levels[: int(np.prod(shape))].reshape(shape)
    return (numbers * scales + lowest).astype(np.float32)


def _packed(count: int) -> int:
    return -(-count // 2)
