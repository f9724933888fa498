"""The forward pass against a plain float64 one that is written here, and against recorded distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparkray.config.poc import TINY, ModelParams, WeightsConfig
from sparkray.poc.inputs import draw_input, draw_permutation, draw_target
from sparkray.poc.replay import replay
from sparkray.poc.seeds import to_float16
from sparkray.poc.weights import draw_pool, draw_sequential, parameter_shapes, pool_layout

POOL = WeightsConfig()
SEQUENTIAL = WeightsConfig(name="sequential", pool_fraction=None)
GROUPED = ModelParams(
    dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, ffn_dim_multiplier=2.0, multiple_of=32,
    rope_theta=100.0, seq_len=9,
)  # fmt: skip


def plain_distance(params: ModelParams, weights: dict[str, np.ndarray], block_hash: str, key: str, nonce: int) -> float:
    """All positions, loops over heads, the definition of the distance: float64 throughout."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    half = params.head_dim // 2
    frequencies = [params.rope_theta ** (-2 * i / params.head_dim) for i in range(half)]
    if params.use_scaled_rope:
        frequencies = [scaled(f) for f in frequencies]
    angles = np.arange(params.seq_len)[:, None] * np.array(frequencies)
    cos, sin = np.cos(angles).astype(np.float16).astype(float), np.sin(angles).astype(np.float16).astype(float)

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + params.norm_eps) * gain

    def turn(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        out[:, 0::2] = x[:, 0::2] * cos - x[:, 1::2] * sin
        out[:, 1::2] = x[:, 0::2] * sin + x[:, 1::2] * cos
        return out

    h = to_float16(draw_input(block_hash, key, nonce, params)).astype(np.float64)
    for layer in range(params.n_layers):
        p = f"layers.{layer}."
        x = norm(h, w[p + "attention_norm.weight"])
        q, k, v = (x @ w[f"{p}attention.w{part}.weight"].T for part in "qkv")
        mixed = np.zeros((params.seq_len, params.dim))
        for head in range(params.n_heads):
            kv = head // (params.n_heads // params.n_kv_heads)
            own, shared = (slice(i * params.head_dim, (i + 1) * params.head_dim) for i in (head, kv))
            scores = turn(q[:, own]) @ turn(k[:, shared]).T / math.sqrt(params.head_dim)
            scores[np.triu_indices(params.seq_len, 1)] = -np.inf
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, own] = chances / chances.sum(-1, keepdims=True) @ v[:, shared]
        h = h + mixed @ w[p + "attention.wo.weight"].T
        x = norm(h, w[p + "ffn_norm.weight"])
        gate = x @ w[p + "feed_forward.w1.weight"].T
        h = (
            h
            + (gate / (1 + np.exp(-gate)) * (x @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
        )
    logits = (norm(h, w["norm.weight"]) @ w["output.weight"].T)[-1]
    ordered = logits[draw_permutation(block_hash, key, nonce, params.vocab_size)]
    return float(np.linalg.norm(ordered / np.linalg.norm(ordered) - draw_target(block_hash, params.vocab_size)))


def scaled(frequency: float) -> float:
    wave = 2 * math.pi / frequency
    if wave < 2048:
        return frequency
    if wave > 8192:
        return frequency / 8
    share = (8192 / wave - 1) / 3
    return (1 - share) * frequency / 8 + share * frequency


def pool_weights(params: ModelParams, block_hash: str) -> dict[str, np.ndarray]:
    pool, shapes = draw_pool(block_hash, params, 0.05), parameter_shapes(params)
    layout = pool_layout(block_hash, params, 0.05)
    return {name: where.values(pool).reshape(shapes[name]) for name, where in layout.items()}


@pytest.mark.parametrize(
    "params",
    [
        GROUPED,
        GROUPED.model_copy(update={"n_kv_heads": 6, "seq_len": 1}),
        GROUPED.model_copy(update={"use_scaled_rope": True, "rope_theta": 500_000.0, "seq_len": 17}),
    ],
    ids=["grouped", "one position", "scaled"],
)
def test_forward_pass_is_the_plain_one(params: ModelParams) -> None:
    plain = [plain_distance(params, pool_weights(params, "0x1"), "0x1", "key", nonce) for nonce in range(3)]
    np.testing.assert_allclose(replay("0x1", "key", range(3), params, POOL), plain, atol=2e-7)


def test_sequential_weights_are_another_consensus() -> None:
    drawn = dict(draw_sequential("0x1", GROUPED))
    plain = [plain_distance(GROUPED, drawn, "0x1", "key", nonce) for nonce in range(3)]
    np.testing.assert_allclose(replay("0x1", "key", range(3), GROUPED, SEQUENTIAL), plain, atol=2e-7)
    assert np.abs(replay("0x1", "key", range(3), GROUPED, POOL) - plain).max() > 1e-2


def test_recorded_distances_of_the_original() -> None:
    exact = [1.3361886737993247, 1.3367805205761811, 1.5161985196373327]
    np.testing.assert_allclose(replay("0x00", "0x00", range(3), TINY, POOL), exact, atol=1e-7)
    half = [1.3361173673860398, 1.336778678754751, 1.5162109103369317]
    np.testing.assert_allclose(replay("0x00", "0x00", range(3), TINY, POOL, dtype=torch.float16), half, atol=1e-5)
    scaled_rope = TINY.model_copy(update={"n_layers": 2, "multiple_of": 256, "use_scaled_rope": True})
    recorded = [1.4674116867159843, 1.3916103357230598, 1.3831680728910276, 1.467380599146776]
    np.testing.assert_allclose(replay("test", "test", range(4), scaled_rope, POOL), recorded, atol=1e-6)


def test_any_batch_gives_the_same_distances() -> None:
    together = replay("0x2", "key", range(5), GROUPED, POOL)
    alone = np.concatenate([replay("0x2", "key", [nonce], GROUPED, POOL) for nonce in range(5)])
    np.testing.assert_allclose(together, alone, atol=1e-7)
