"""Tables of the hardened mode, made by decimal arithmetic: exact rounding, the same on every platform.

A libm's cosine or exponential may differ in its last bit between machines; `decimal` rounds correctly everywhere.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext

import torch

ACTIVATION_SCALE = 16
EXP2_STEPS = 32
EXP2_BITS = 15
ROPE_BITS = 14
_DIGITS = 50


def silu_table() -> torch.Tensor:
    """SiLU of v / 16 in sixteenths for v = -128 ... 127, (256,) int8."""
    with localcontext() as context:
        context.prec = _DIGITS
        values = []
        for step in range(-128, 128):
            x = Decimal(step) / ACTIVATION_SCALE
            values.append(_round(ACTIVATION_SCALE * x / (1 + (-x).exp())))
    return torch.tensor(values, dtype=torch.int8)


def exp2_table() -> torch.Tensor:
    """2^(-i/32) in units of 2^-15 for i = 0 ... 31, (32,) int32."""
    with localcontext() as context:
        context.prec = _DIGITS
        step = Decimal(2).ln() / EXP2_STEPS
        values = [_round((-step * index).exp() * 2**EXP2_BITS) for index in range(EXP2_STEPS)]
    return torch.tensor(values, dtype=torch.int32)


def rope_tables(seq_len: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines in units of 2^-14, each (seq_len, head_dim / 2) int32."""
    cosines, sines = [], []
    with localcontext() as context:
        context.prec = _DIGITS
        base = Decimal(theta).ln()
        steps = [_cos_sin((-base * (2 * pair) / head_dim).exp()) for pair in range(head_dim // 2)]
        # Position after position by the addition theorem; 50 digits leave 45 after any sequence.
        turn = [(Decimal(1), Decimal(0))] * len(steps)
        for _ in range(seq_len):
            cosines.append([_round(cos * 2**ROPE_BITS) for cos, _ in turn])
            sines.append([_round(sin * 2**ROPE_BITS) for _, sin in turn])
            turn = [(c * dc - s * ds, s * dc + c * ds) for (c, s), (dc, ds) in zip(turn, steps, strict=True)]
    return torch.tensor(cosines, dtype=torch.int32), torch.tensor(sines, dtype=torch.int32)


def _cos_sin(angle: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series of an angle of 0 to 1."""
    cos, sin, term, power = Decimal(0), Decimal(0), Decimal(1), 0
    while abs(term) > Decimal(10) ** -_DIGITS:
        sign = -1 if power % 4 >= 2 else 1
        if power % 2:
            sin += sign * term
        else:
            cos += sign * term
        power += 1
        term = term * angle / power
    return cos, sin


def _round(value: Decimal) -> int:
    return int(value.to_integral_value(rounding=ROUND_HALF_EVEN))
