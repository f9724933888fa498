"""The MXFP4 quantiser: E2M1 codes with one E8M0 scale per 32 values (OCP Microscaling Formats 1.0, section 6.3)."""

from __future__ import annotations

import torch

from sparkray.errors import InputError

BLOCK = 32
_LARGEST_EXPONENT = 2  # 6.0, E2M1's largest value, is 1.5 * 2**2
_SCALE_BIAS = 127
# Halfway points between neighbouring magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_ROWS_AT_ONCE = 1 << 16


def quantise_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise along the last dimension.

    The scale is 2**(floor(log2(largest magnitude)) - 2), values round to the nearest code with ties to the even one,
    and what is above the largest code saturates.

    Args:
        weight: floating [..., K], with K a multiple of 32.

    Returns:
        codes uint8 [..., K / 32, 16], two a byte with the first value in the low nibble, and exponents
        uint8 [..., K / 32], biased by 127.

    Raises:
        InputError: K is no multiple of 32, or the weight holds NaN or infinity.
    """
    if weight.shape[-1] % BLOCK:
        raise InputError(f"MXFP4 takes rows of a multiple of {BLOCK} values, and {weight.shape[-1]} were given.")
    rows_NB = weight.reshape(-1, BLOCK)
    codes_N = torch.empty(len(rows_NB), BLOCK // 2, dtype=torch.uint8)
    scales_N = torch.empty(len(rows_NB), dtype=torch.uint8)
    for start in range(0, len(rows_NB), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        codes_N[part], scales_N[part] = _quantise_rows(rows_NB[part].float())
    blocks = weight.shape[-1] // BLOCK
    return codes_N.reshape(*weight.shape[:-1], blocks, BLOCK // 2), scales_N.reshape(*weight.shape[:-1], blocks)


def _quantise_rows(values_NB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest_N = values_NB.abs().amax(-1)
    if not bool(torch.isfinite(largest_N).all()):
        raise InputError("the weight holds NaN or infinity, which MXFP4 cannot.")
    # frexp is exact where log2 may round up to the next power: x = m * 2**e with m in [0.5, 1).
    exponent_N = torch.frexp(largest_N).exponent.int() - 1 - _LARGEST_EXPONENT
    exponent_N = torch.where(largest_N == 0, 0, exponent_N).clamp(-_SCALE_BIAS, _SCALE_BIAS)
    scaled_NB = torch.ldexp(values_NB, -exponent_N.unsqueeze(-1))
    magnitude_NB = scaled_NB.abs()
    midpoints = torch.tensor(_MIDPOINTS)
    below_NB = torch.bucketize(magnitude_NB, midpoints)  # ties stay at the lower code
    above_NB = torch.bucketize(magnitude_NB, midpoints, right=True)  # ties go to the upper code
    code_NB = torch.where(below_NB % 2 == 0, below_NB, above_NB)
    code_NB = (code_NB + 8 * torch.signbit(scaled_NB)).to(torch.uint8)
    packed = code_NB[:, 0::2] | (code_NB[:, 1::2] << 4)
    return packed, (exponent_N + _SCALE_BIAS).to(torch.uint8)
