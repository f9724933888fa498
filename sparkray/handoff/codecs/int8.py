"""One byte a number: each group of up to 64 channels of a token and head shares a scale.

A scale is the group's largest magnitude over 127, rounded up to bfloat16, so that no number leaves the range. At the
same size this keeps the answer's distribution 20 to 50 times closer than unscaled 8-bit floats do. All-zero groups
have scale 0.
"""

from __future__ import annotations

import numpy as np

from sparkray.handoff.rows import Array, Floats

GROUP = 64


def group_of(width: int) -> int:
    """Channels that share a scale: 64 where that divides the width, else the whole width."""
    return GROUP if width % GROUP == 0 else width


def encoded_bytes(num_rows: int, num_heads: int, width: int) -> int:
    """Size of `encode`'s result."""
    return num_rows * num_heads * (width + 2 * (width // group_of(width)))


def encode(rows_THD: Floats) -> bytes:
    """Scales as bfloat16 (T, H, D / group), then numbers as int8 (T, H, D)."""
    tokens, heads, width = rows_THD.shape
    grouped = np.ascontiguousarray(rows_THD).reshape(tokens, heads, -1, group_of(width))
    scales = _bfloat16_up(np.abs(grouped).max(axis=3) / np.float32(127))
    divisor = np.where(scales == 0, np.float32(1), scales)[..., None]
    numbers: Array = np.rint(grouped / divisor).astype(np.int8)
    halves: Array = (scales.view(np.uint32) >> 16).astype("<u2")
    return halves.tobytes() + numbers.tobytes()


def decode(body: memoryview, num_rows: int, num_heads: int, width: int) -> Floats:
    """Undo `encode`; the body has exactly `encoded_bytes` bytes."""
    groups = width // group_of(width)
    size = 2 * num_rows * num_heads * groups
    bits = np.frombuffer(body[:size], "<u2").astype(np.uint32) << 16
    scales = bits.view(np.float32).reshape(num_rows, num_heads, groups, 1)
    numbers: Array = np.frombuffer(body[size:], np.int8).reshape(num_rows, num_heads, groups, -1)
    return (numbers * scales).astype(np.float32).reshape(num_rows, num_heads, width)


def _bfloat16_up(numbers: Floats) -> Floats:
    """Non-negative numbers rounded up to bfloat16, as float32."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)
