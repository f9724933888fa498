"""Weights on a device: pool views where they lie in the pool, whole tensors only where they cannot.

A slice of the pool may start at any element, and matrix kernels on CUDA want 16-byte aligned pointers. There the
pool is kept eight times, each copy shifted by one element, so that every slice starts aligned in one of them:
eight pools of 5 % are 40 % of the model, and no byte is copied while nonces are computed.
"""

from __future__ import annotations

import numpy as np
import torch

from sparkray.config.poc import ModelParams, WeightsConfig
from sparkray.poc.model import ReadWeight
from sparkray.poc.weights import Placement, draw_pool, draw_sequential, parameter_shapes, pool_layout

_ALIGNED_ELEMENTS = 8


def load_weights(
    block_hash: str,
    params: ModelParams,
    weights: WeightsConfig,
    device: torch.device,
    dtype: torch.dtype,
    names: frozenset[str] | None = None,
) -> ReadWeight:
    """Draw the weights of `block_hash` and give a reader of them by parameter name.

    Args:
        device: where they shall lie.
        dtype: float16, or float32 for values that are float16 all the same.
        names: the parameters that will be read; None means all.
    """
    if weights.pool_fraction is None:
        return _whole(block_hash, params, device, names)
    pool = torch.from_numpy(draw_pool(block_hash, params, weights.pool_fraction))
    layout = {
        name: place
        for name, place in pool_layout(block_hash, params, weights.pool_fraction).items()
        if _is_read(name, names)
    }
    return _pooled(pool.to(device, dtype), layout, parameter_shapes(params))


def _pooled(pool: torch.Tensor, layout: dict[str, Placement], shapes: dict[str, tuple[int, ...]]) -> ReadWeight:
    wants_alignment = pool.device.type == "cuda"
    # A pool of more than a seventh or so of the model is cheaper to keep once beside one aligned copy of each slice.
    total = sum(place.numel for place in layout.values())
    copy_slices = wants_alignment and _ALIGNED_ELEMENTS * pool.numel() > total + pool.numel()
    num_copies = _ALIGNED_ELEMENTS if wants_alignment and not copy_slices else 1
    copies = [pool, *(pool[shift:].clone() for shift in range(1, num_copies))]
    tensors: dict[str, torch.Tensor] = {}
    for name, place in layout.items():
        if place.branch == "slice":
            shift = place.start % num_copies
            flat = copies[shift][place.start - shift :][: place.numel]
            flat = flat.clone() if copy_slices else flat
        else:
            flat = torch.from_numpy(place.values(pool.cpu().half().numpy())).to(pool)
        tensors[name] = flat.view(shapes[name])
    return tensors.__getitem__


def _is_read(name: str, names: frozenset[str] | None) -> bool:
    # The embedding is drawn by the protocol and used by nobody.
    return name != "tok_embeddings.weight" and (names is None or name in names)


def _whole(block_hash: str, params: ModelParams, device: torch.device, names: frozenset[str] | None) -> ReadWeight:
    # Kept in float16 even where the computation is float32: twice the memory would buy nothing but the cast.
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(values)).to(device)
        for name, values in draw_sequential(block_hash, params)
        if _is_read(name, names)
    }
    return tensors.__getitem__
