"""The rotary table. Its cosines and sines are rounded to float16, and that rounding is consensus."""

from __future__ import annotations

import math

import torch

from sparkray.config.poc import ModelParams

SCALE_FACTOR = 8.0
LOW_FREQ_FACTOR = 1.0
HIGH_FREQ_FACTOR = 4.0
OLD_CONTEXT = 8192


def rope_frequencies(params: ModelParams) -> torch.Tensor:
    """Angular frequency of each channel pair, (head_dim / 2), float32 on the CPU."""
    # Made on the CPU whatever the default device: scaling by Llama 3.1's rule reads single values, which a
    # meta tensor does not have.
    exponents = torch.arange(0, params.head_dim, 2, device="cpu").float() / params.head_dim
    frequencies = 1.0 / (params.rope_theta**exponents)
    return _scale(frequencies) if params.use_scaled_rope else frequencies


def rope_table(params: ModelParams) -> torch.Tensor:
    """Cosine + i sine of every position and channel pair, (seq_len, head_dim / 2) complex64.

    Both parts are float32 values that float16 can hold.
    """
    angles = torch.outer(torch.arange(params.seq_len, device="cpu").float(), rope_frequencies(params))
    return torch.complex(angles.cos().half().float(), angles.sin().half().float())


def rotate(heads_BSHD: torch.Tensor, table_SP: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels (2i, 2i + 1) by the table's angles, in float32; the dtype is kept."""
    # One complex product instead of four real ones and a copy that interleaves them again.
    pairs = torch.view_as_complex(heads_BSHD.float().view(*heads_BSHD.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * table_SP[None, :, None, :])
    return turned.flatten(-2).to(heads_BSHD.dtype)


def _scale(frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by the factor, short ones kept, those between blended."""
    long_wave, short_wave = OLD_CONTEXT / LOW_FREQ_FACTOR, OLD_CONTEXT / HIGH_FREQ_FACTOR
    scaled = []
    for frequency in frequencies.tolist():
        wave = 2 * math.pi / frequency
        if wave < short_wave:
            scaled.append(frequency)
        elif wave > long_wave:
            scaled.append(frequency / SCALE_FACTOR)
        else:
            smooth = (OLD_CONTEXT / wave - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
            scaled.append((1 - smooth) * frequency / SCALE_FACTOR + smooth * frequency)
    return torch.tensor(scaled, dtype=frequencies.dtype)
