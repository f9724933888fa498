"""The hardened transformer: one function from int8 states to int8 states.

A block mixes positions by causal attention, then passes each through a gated feed-forward whose output replaces
the state: there is no path around it. All gains are 1.

Shapes: B nonces, S positions, D dim, H heads, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from sparkray.config.poc import ModelParams
from sparkray.errors import InputError
from sparkray.poc.hardened import tables
from sparkray.poc.hardened.draws import draw_weight, weight_shapes
from sparkray.poc.hardened.integers import (
    MAX_EXACT_FLOAT32,
    MAX_FAN_IN,
    STATE_RMS,
    exact_bmm,
    matmul,
    normalise,
    requantise,
    shift_for,
    shift_right,
)

# Attention counts twice against the state it is added to, so that it cannot be left out either.
ATTENTION_WEIGHT = 2
# Scores are spread over about three doublings of the softmax weight.
SCORE_SPREAD = 3
PROBABILITY_MAX = 127
_MIXED_SHIFT = 6
_GATED_SHIFT = 5
_WIDE_BITS = 3

ObserveState = Callable[[int, torch.Tensor], None]


class HardenedTransformer:
    """The forward pass for one block hash.

    Args:
        device: where to compute; every device gives the same bits.
        layers: the blocks whose weights are drawn; None draws all. A verifier of one block draws that one alone.

    Raises:
        InputError: a width whose exact sums do not fit the integers.
    """

    def __init__(
        self, block_hash: str, params: ModelParams, device: torch.device, layers: Sequence[int] | None = None
    ) -> None:
        widest = max(params.dim, params.ffn_hidden)
        if widest > MAX_FAN_IN or params.head_dim > MAX_EXACT_FLOAT32:
            raise InputError(
                f"the hardened mode sums exactly up to a width of {MAX_FAN_IN} and heads of {MAX_EXACT_FLOAT32}, and"
                f" {widest} and {params.head_dim} were given."
            )
        self.params = params
        self.device = device
        wanted = None if layers is None else {f"layers.{layer}" for layer in layers}
        self._weights = {
            name: _load(draw_weight(block_hash, name, shape), device)
            for name, shape in weight_shapes(params).items()
            if wanted is None or ".".join(name.split(".")[:2]) in wanted
        }
        self._silu = tables.silu_table().to(device)
        self._exp2 = tables.exp2_table().to(device)
        cos_SP, sin_SP = tables.rope_tables(params.seq_len, params.head_dim, params.rope_theta)
        self._cos_SP, self._sin_SP = cos_SP.to(device), sin_SP.to(device)

    @torch.inference_mode()
    def last_logits(
        self, inputs_BSD: torch.Tensor, layers: Sequence[int] | None = None, observe: ObserveState | None = None
    ) -> torch.Tensor:
        """Logits of the last position, (B, V) int32.

        Args:
            inputs_BSD: int8.
            layers: the blocks to run, in order; None runs all.
            observe: called with (index, state) before the first block and after each one.
        """
        chosen = range(self.params.n_layers) if layers is None else layers
        state_BSD = normalise(inputs_BSD.to(self.device))
        if observe is not None:
            observe(0, state_BSD)
        for position, layer in enumerate(chosen):
            state_BSD = self.block(state_BSD, layer, last_only=position == len(chosen) - 1)
            if observe is not None:
                observe(position + 1, state_BSD)
        return self._product(state_BSD[:, -1], "output.weight")[:, : self.params.vocab_size]

    @torch.inference_mode()
    def block(self, state_BSD: torch.Tensor, layer: int, *, last_only: bool) -> torch.Tensor:
        """One block; with `last_only` the new state of the last position alone, (B, 1, D)."""
        mixed = self.attention(state_BSD, layer, last_only=last_only)
        kept = state_BSD[:, -1:] if last_only else state_BSD
        return self.feed_forward(normalise(kept.to(torch.int32) + ATTENTION_WEIGHT * mixed), layer)

    def attention(self, state_BSD: torch.Tensor, layer: int, *, last_only: bool) -> torch.Tensor:
        """Causal attention, int32 of the state's size."""
        p, prefix = self.params, f"layers.{layer}.attention"
        asking = state_BSD[:, -1:] if last_only else state_BSD
        first = p.seq_len - asking.shape[1]
        queries = self._rotate(self._heads(asking, f"{prefix}.wq.weight", p.n_heads), first)
        keys = self._rotate(self._heads(state_BSD, f"{prefix}.wk.weight", p.n_kv_heads), 0)
        values = self._heads(state_BSD, f"{prefix}.wv.weight", p.n_kv_heads)
        repeat = p.n_heads // p.n_kv_heads
        keys, values = (part.repeat_interleave(repeat, dim=1) for part in (keys, values))
        scores_BHSS = exact_bmm(queries, keys.transpose(2, 3))
        mixed_BHSD = exact_bmm(self._softmax(scores_BHSS, first), values)
        mixed = requantise(mixed_BHSD, _MIXED_SHIFT).transpose(1, 2).flatten(2)
        return shift_right(self._product(mixed, f"{prefix}.wo.weight"), shift_for(p.dim))

    def feed_forward(self, state_BSD: torch.Tensor, layer: int) -> torch.Tensor:
        """The gated feed-forward; its output is the new state."""
        p, prefix = self.params, f"layers.{layer}.feed_forward"
        gate = requantise(self._product(state_BSD, f"{prefix}.w1.weight"), shift_for(p.dim))
        up = requantise(self._product(state_BSD, f"{prefix}.w3.weight"), shift_for(p.dim))
        opened = self._silu[gate.int() + 128].to(torch.int16) * up
        product = self._product(requantise(opened, _GATED_SHIFT), f"{prefix}.w2.weight")
        # A few bits more than a state has, for the norm to round once.
        return normalise(shift_right(product, shift_for(p.ffn_hidden, _WIDE_BITS)).clamp_(-4095, 4095))

    def _product(self, rows_XK: torch.Tensor, name: str) -> torch.Tensor:
        flat = matmul(rows_XK.reshape(-1, rows_XK.shape[-1]), self._weights[name])
        return flat.view(*rows_XK.shape[:-1], -1)

    def _heads(self, state_BSD: torch.Tensor, name: str, num_heads: int) -> torch.Tensor:
        projected = requantise(self._product(state_BSD, name), shift_for(self.params.dim))
        return projected.view(*state_BSD.shape[:2], num_heads, self.params.head_dim).transpose(1, 2)

    def _rotate(self, heads_BHSD: torch.Tensor, first: int) -> torch.Tensor:
        pairs = heads_BHSD.to(torch.int32).reshape(*heads_BHSD.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        cos, sin = self._cos_SP[first:], self._sin_SP[first:]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return requantise(turned, tables.ROPE_BITS).flatten(-2)

    def _softmax(self, scores_BHSS: torch.Tensor, first: int) -> torch.Tensor:
        """Shares of 127, by a table of powers of two; later positions get none."""
        num_asking, num_keys = scores_BHSS.shape[-2:]
        allowed = torch.arange(num_keys, device=self.device) <= torch.arange(
            first, first + num_asking, device=self.device
        ).unsqueeze(1)
        top = scores_BHSS.masked_fill(~allowed, torch.iinfo(torch.int32).min).amax(-1, keepdim=True)
        steps = (top - scores_BHSS).clamp_min(0) >> _score_shift(self.params.head_dim)
        weights = self._exp2[steps % tables.EXP2_STEPS] >> (steps // tables.EXP2_STEPS).clamp_max(31)
        weights = (weights * allowed).long()
        total = weights.sum(-1, keepdim=True)
        return torch.div(2 * PROBABILITY_MAX * weights + total, 2 * total, rounding_mode="floor")


def _score_shift(head_dim: int) -> int:
    spread = STATE_RMS * STATE_RMS * math.isqrt(head_dim << 8) >> 4
    return max(0, (spread // (SCORE_SPREAD * tables.EXP2_STEPS)).bit_length() - 1)


def _load(weight: object, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(weight).to(device)
    missing = -tensor.shape[0] % 8
    # Only rows are padded: their products are cut off again, or never read.
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing)).contiguous() if missing else tensor
