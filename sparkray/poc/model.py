"""The transformer that a nonce is sent through, as one function of its weights.

Only the last position's logits count, so the last block's queries, output projection and feed-forward, the final
norm and the head are computed for that position alone.

Shapes: B nonces, S positions, D dim, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from sparkray.config.poc import ModelParams
from sparkray.poc.rope import rope_table, rotate

_CACHE_ELEMENTS = 1 << 19

ReadWeight = Callable[[str], torch.Tensor]


class Forward(Protocol):
    """A forward pass, on one device or over several."""

    params: ModelParams
    device: torch.device
    dtype: torch.dtype

    def last_logits(self, inputs_BSD: torch.Tensor) -> torch.Tensor: ...


class Transformer:
    """The forward pass for one set of weights.

    Args:
        params: the model's shape.
        read_weight: gives a parameter by name, shaped, on `device`; it is cast to `dtype` where it differs, so
            float16 storage can serve a float32 computation layer by layer.
        device: where to compute.
        dtype: float16 as on the network (norm, rotation and softmax in float32), or float32.
    """

    def __init__(self, params: ModelParams, read_weight: ReadWeight, device: torch.device, dtype: torch.dtype) -> None:
        self.params = params
        self.device = device
        self.dtype = dtype
        self._read_weight = read_weight
        self._rope_SP = rope_table(params).to(device)

    @torch.inference_mode()
    def last_logits(self, inputs_BSD: torch.Tensor, layers: Sequence[int] | None = None) -> torch.Tensor:
        """Logits of the last position, (B, V) float32.

        Args:
            inputs_BSD: float16-rounded inputs on the device.
            layers: the blocks to run, in order; None runs all. Fewer is the shortcut that a fraud would take.
        """
        chosen = range(self.params.n_layers) if layers is None else layers
        return self.head(self.blocks(inputs_BSD, chosen, with_last=True))

    @torch.inference_mode()
    def blocks(self, hidden_BSD: torch.Tensor, layers: Sequence[int], *, with_last: bool) -> torch.Tensor:
        """The state after some blocks.

        Args:
            with_last: the last of them is the model's last: it gives the last position alone, (B, 1, D).
        """
        hidden_BSD = hidden_BSD.to(self.dtype)
        for position, layer in enumerate(layers):
            hidden_BSD = self._block(hidden_BSD, layer, last_only=with_last and position == len(layers) - 1)
        return hidden_BSD

    @torch.inference_mode()
    def head(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, (B, V) float32."""
        last_BD = self._norm(hidden_BSD[:, -1], "norm.weight")
        return functional.linear(last_BD, self._weight("output.weight")).float()

    def _block(self, hidden_BSD: torch.Tensor, layer: int, *, last_only: bool) -> torch.Tensor:
        prefix = f"layers.{layer}"
        normed_BSD = self._norm(hidden_BSD, f"{prefix}.attention_norm.weight")
        if last_only:
            hidden_BSD = hidden_BSD[:, -1:]
        hidden_BSD = hidden_BSD + self._attention(normed_BSD, f"{prefix}.attention", last_only=last_only)
        normed_BSD = self._norm(hidden_BSD, f"{prefix}.ffn_norm.weight")
        return hidden_BSD + self._feed_forward(normed_BSD, f"{prefix}.feed_forward")

    def _attention(self, normed_BSD: torch.Tensor, prefix: str, *, last_only: bool) -> torch.Tensor:
        p = self.params
        asking_BSD = normed_BSD[:, -1:] if last_only else normed_BSD
        queries = self._heads(asking_BSD, f"{prefix}.wq.weight", p.n_heads)
        keys = self._heads(normed_BSD, f"{prefix}.wk.weight", p.n_kv_heads)
        values = self._heads(normed_BSD, f"{prefix}.wv.weight", p.n_kv_heads)
        first = p.seq_len - asking_BSD.shape[1]
        queries = rotate(queries, self._rope_SP[first:])
        keys = rotate(keys, self._rope_SP)
        mixed_BHSD = functional.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            is_causal=not last_only,
            enable_gqa=p.n_heads != p.n_kv_heads,
        )
        return functional.linear(mixed_BHSD.transpose(1, 2).flatten(2), self._weight(f"{prefix}.wo.weight"))

    def _heads(self, normed_BSD: torch.Tensor, name: str, num_heads: int) -> torch.Tensor:
        projected = functional.linear(normed_BSD, self._weight(name))
        return projected.view(*normed_BSD.shape[:2], num_heads, self.params.head_dim)

    def _feed_forward(self, normed_BSD: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up, down = (self._weight(f"{prefix}.{name}.weight") for name in ("w1", "w3", "w2"))
        rows_XD = normed_BSD.flatten(0, 1)
        # On a CPU the wide middle is made in pieces that stay in its cache; a GPU takes it whole.
        num_rows = len(rows_XD) if self.device.type != "cpu" else max(128, _CACHE_ELEMENTS // self.params.ffn_hidden)
        parts = []
        for part_XD in torch.split(rows_XD, num_rows):
            middle = functional.silu(functional.linear(part_XD, gate), inplace=True)
            middle.mul_(functional.linear(part_XD, up))
            parts.append(functional.linear(middle, down))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.view_as(normed_BSD)

    def _norm(self, hidden_XD: torch.Tensor, name: str) -> torch.Tensor:
        full = hidden_XD.float()
        mean_square = torch.linalg.vecdot(full, full).unsqueeze(-1) / self.params.dim
        return (full * torch.rsqrt(mean_square + self.params.norm_eps)).to(self.dtype).mul_(self._weight(name))

    def _weight(self, name: str) -> torch.Tensor:
        return self._read_weight(name).to(self.dtype)
