"""The plain way to compute nonces, as the network's worker does it: the baseline of `poc_rate.py`.

float16 modules, attention scores written out, logits of every position, inputs made inside the loop, and every
batch prepared twice because the prefetched one is thrown away.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sparkray.config.poc import ModelParams
from sparkray.poc.inputs import draw_input, draw_permutation, draw_target
from sparkray.poc.rope import rope_table
from sparkray.poc.seeds import to_float16
from sparkray.poc.weights import draw_pool, parameter_shapes, pool_layout


class Norm(nn.Module):
    """RMS norm in float32, gain in float16."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = x.float()
        return (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal attention with its scores in full."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.params = params
        self.wq = nn.Linear(params.dim, params.dim, bias=False)
        self.wk = nn.Linear(params.dim, params.kv_dim, bias=False)
        self.wv = nn.Linear(params.dim, params.kv_dim, bias=False)
        self.wo = nn.Linear(params.dim, params.dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        p = self.params
        q, k, v = (
            linear(x).view(*x.shape[:2], -1, p.head_dim).transpose(1, 2) for linear in (self.wq, self.wk, self.wv)
        )
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        k, v = (part.repeat_interleave(p.n_heads // p.n_kv_heads, dim=1) for part in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(p.head_dim) + mask
        mixed = torch.softmax(scores.float(), dim=-1).to(q.dtype) @ v
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.w1 = nn.Linear(params.dim, params.ffn_hidden, bias=False)
        self.w2 = nn.Linear(params.ffn_hidden, params.dim, bias=False)
        self.w3 = nn.Linear(params.dim, params.ffn_hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = FeedForward(params)
        self.attention_norm = Norm(params.dim, params.norm_eps)
        self.ffn_norm = Norm(params.dim, params.norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class PlainModel(nn.Module):
    """The whole model; logits of every position."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.params = params
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(Block(params) for _ in range(params.n_layers))
        self.norm = Norm(params.dim, params.norm_eps)
        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = rope_table(self.params)
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, table.real, table.imag, mask)
        return self.output(self.norm(x)).float()


class PlainWorker:
    """Generates as the worker does: prepare, compute, prepare the same batch again."""

    def __init__(self, block_hash: str, public_key: str, params: ModelParams, pool_fraction: float) -> None:
        self.seeds = (block_hash, public_key)
        self.params = params
        self.model = PlainModel(params).half()
        pool, shapes = draw_pool(block_hash, params, pool_fraction), parameter_shapes(params)
        layout = pool_layout(block_hash, params, pool_fraction)
        values = {name: torch.from_numpy(layout[name].values(pool).reshape(shapes[name])) for name in layout}
        self.model.load_state_dict(values)
        self.target = draw_target(block_hash, params.vocab_size)

    @torch.inference_mode()
    def distances(self, nonces: list[int], batch_size: int) -> np.ndarray:
        """Distances of `nonces`, float64."""
        found = []
        for start in range(0, len(nonces), batch_size):
            batch = nonces[start : start + batch_size]
            self._prepare(batch)  # the prefetched batch that is never used
            inputs, orders = self._prepare(batch)
            logits = self.model(inputs)[:, -1].numpy()
            ordered = np.take_along_axis(logits, orders, axis=1)
            unit = ordered / np.linalg.norm(ordered, axis=1, keepdims=True)
            found.append(np.linalg.norm(unit - self.target, axis=1))
        return np.concatenate(found)

    def _prepare(self, batch: list[int]) -> tuple[torch.Tensor, np.ndarray]:
        inputs = np.stack([to_float16(draw_input(*self.seeds, nonce, self.params)) for nonce in batch])
        orders = np.stack([draw_permutation(*self.seeds, nonce, self.params.vocab_size) for nonce in batch])
        return torch.from_numpy(inputs), orders


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs in float32."""
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)
