"""Integer arithmetic on tensors: exact on every device, whatever the order of its sums."""

from __future__ import annotations

import math

import torch

INT8_MAX = 127
STATE_RMS = 32
# Root mean square of a byte drawn uniformly from -127 ... 127, in sixteenths.
_WEIGHT_RMS_16 = 1177
# int8 x int8 sums stay below 2^31 up to this width.
MAX_FAN_IN = (2**31 - 1) // (INT8_MAX * INT8_MAX)
# ... and below 2^24, where float32 still counts exactly, up to this one.
MAX_EXACT_FLOAT32 = 2**24 // (INT8_MAX * INT8_MAX)
_MIN_CUDA_ROWS = 32


def matmul(rows_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """`rows @ weight.T` of int8 matrices as int32, exactly.

    CUDA's kernel wants more than 16 rows and widths that are multiples of 8: rows are padded here, the weight's
    rows where it is loaded.
    """
    count = rows_MK.shape[0]
    if rows_MK.device.type == "cuda" and count < _MIN_CUDA_ROWS:
        rows_MK = torch.nn.functional.pad(rows_MK, (0, 0, 0, _MIN_CUDA_ROWS - count))
    return torch._int_mm(rows_MK.contiguous(), weight_NK.t())[:count]


def shift_for(fan_in: int, gain_bits: int = 0) -> int:
    """The shift that brings a product of a state and a weight back to the state's size, times 2^gain_bits.

    A sum of `fan_in` products has the size rms(weight) * sqrt(fan_in) relative to the state.
    """
    growth = _WEIGHT_RMS_16 * math.isqrt(fan_in << 8) >> 8
    # The nearest power of two: compared with sqrt(2) times the one below.
    low = growth.bit_length() - 1
    return max(1, low + (growth * growth > 2 << 2 * low) - gain_bits)


def shift_right(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Divide by 2^bits, halves rounded up."""
    return values + (1 << bits - 1) >> bits


def requantise(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Divide by 2^bits and saturate to int8."""
    return shift_right(values, bits).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def isqrt(values: torch.Tensor) -> torch.Tensor:
    """Integer square root of int64 values from 0 to 2^52.

    IEEE 754 rounds the square root of a float64 correctly on every device; the two comparisons settle the last unit.
    """
    root = values.double().sqrt().long()
    root = root - (root * root > values).long()
    return root + ((root + 1) * (root + 1) <= values).long()


def normalise(values_XD: torch.Tensor) -> torch.Tensor:
    """Scale each row to a root mean square of 32, (..., D) int8; |values| below 2^13, gain 1."""
    wide = values_XD.long()
    root = isqrt((wide * wide).sum(-1, keepdim=True) << 4).clamp_min(1)
    target = STATE_RMS * math.isqrt(values_XD.shape[-1] << 16)
    # target is in units of 2^-8, root of 2^-2: 18 further bits make a quotient of 24 fractional bits.
    scale = torch.div(torch.tensor(target, device=root.device) << 18, root, rounding_mode="floor")
    return requantise(wide * scale, 24)


def exact_bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched product of small integers as int32, through float32, where every partial sum is below 2^24."""
    return torch.matmul(left.float(), right.float()).to(torch.int32)
