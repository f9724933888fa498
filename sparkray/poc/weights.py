"""Weights from a block hash, in the two ways that networks agreed on. Plain numpy; no device is touched.

`pool`: one draw of a few per cent of all elements; every parameter is a slice of it (or, where it is longer than
the pool, the pool tiled and rotated). `sequential`: one long draw, parameter after parameter. All of them, norm
gains included, are N(0, 0.02), rounded to float32 and then to float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sparkray.config.poc import ModelParams
from sparkray.poc.seeds import WEIGHT_ROUNDS, generator, name_hash, to_float16

WEIGHT_SD = 0.02
MIN_POOL_NUMEL = 50_000
_DRAW_CHUNK = 1 << 22

Float16Array = npt.NDArray[np.float16]


def parameter_shapes(params: ModelParams) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, in the order in which a sequential draw fills them."""
    dim, kv_dim, ffn = params.dim, params.kv_dim, params.ffn_hidden
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (params.vocab_size, dim)}
    for layer in range(params.n_layers):
        prefix = f"layers.{layer}"
        shapes[f"{prefix}.attention.wq.weight"] = (dim, dim)
        shapes[f"{prefix}.attention.wk.weight"] = (kv_dim, dim)
        shapes[f"{prefix}.attention.wv.weight"] = (kv_dim, dim)
        shapes[f"{prefix}.attention.wo.weight"] = (dim, dim)
        shapes[f"{prefix}.feed_forward.w1.weight"] = (ffn, dim)
        shapes[f"{prefix}.feed_forward.w2.weight"] = (dim, ffn)
        shapes[f"{prefix}.feed_forward.w3.weight"] = (ffn, dim)
        shapes[f"{prefix}.attention_norm.weight"] = (dim,)
        shapes[f"{prefix}.ffn_norm.weight"] = (dim,)
    shapes["norm.weight"] = (dim,)
    shapes["output.weight"] = (params.vocab_size, dim)
    return shapes


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one parameter lies in the pool.

    Attributes:
        branch: `slice`: elements `start ... start + numel`; `tile`: the pool repeated to `numel` elements and
            rotated left by `start`.
    """

    branch: Literal["slice", "tile"]
    start: int
    numel: int
    name_hash: int

    def values(self, pool: Float16Array) -> Float16Array:
        """The parameter's elements, flat; a view of the pool for a slice."""
        if self.branch == "slice":
            return pool[self.start : self.start + self.numel]
        return np.roll(np.resize(pool, self.numel), -self.start)


def pool_numel(params: ModelParams, pool_fraction: float) -> int:
    """Elements of the pool."""
    return max(MIN_POOL_NUMEL, int(params.num_params * pool_fraction))


def place(block_hash: str, name: str, numel: int, pool_size: int) -> Placement:
    """Where parameter `name` of `numel` elements lies in a pool of `pool_size` elements."""
    number = name_hash(block_hash, name)
    if numel <= pool_size:
        return Placement("slice", number % (pool_size - numel + 1), numel, number)
    return Placement("tile", number % numel, numel, number)


def pool_layout(block_hash: str, params: ModelParams, pool_fraction: float) -> dict[str, Placement]:
    """The placement of every parameter, in consensus order."""
    size = pool_numel(params, pool_fraction)
    return {
        name: place(block_hash, name, int(np.prod(shape)), size) for name, shape in parameter_shapes(params).items()
    }


def draw_pool(block_hash: str, params: ModelParams, pool_fraction: float) -> Float16Array:
    """The pool, drawn in pieces so that at most 32 MB of float64 exist at once."""
    rng = generator(block_hash, WEIGHT_ROUNDS)
    return _draw(rng, pool_numel(params, pool_fraction))


def draw_sequential(block_hash: str, params: ModelParams) -> Iterator[tuple[str, Float16Array]]:
    """Parameter after parameter of one long draw, shaped; PCG64 has no way to draw them in parallel."""
    rng = generator(block_hash, WEIGHT_ROUNDS)
    for name, shape in parameter_shapes(params).items():
        yield name, _draw(rng, int(np.prod(shape))).reshape(shape)


def _draw(rng: np.random.Generator, numel: int) -> Float16Array:
    values = np.empty(numel, dtype=np.float16)
    for start in range(0, numel, _DRAW_CHUNK):
        stop = min(start + _DRAW_CHUNK, numel)
        values[start:stop] = to_float16(rng.normal(0.0, WEIGHT_SD, stop - start))
    return values
