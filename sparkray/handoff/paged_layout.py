"""Rows out of vLLM's paged cache.

vLLM shows a layer's cache as (blocks, H, N, 2 D): N tokens a block, keys and values of a token together. The CUDA
backends mean that literally: the first D of a token are its keys. The CPU backend uses the same bytes as a plane of
keys and, after it, a plane of values; its vector kernels keep the key plane transposed, channel by channel.

Shapes: B blocks, H key/value heads, N tokens of a block, D width of a head, T tokens.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from sparkray.handoff.errors import ProtocolError, Reason


class PageLayout(StrEnum):
    """How the bytes of a page are to be read."""

    TOKEN_PAIRS = "token_pairs"
    PLANES = "planes"
    PLANES_KEYS_TRANSPOSED = "planes_keys_transposed"


def check_page(cache_BHNC: torch.Tensor) -> None:
    """Refuse a cache of another form than this file reads.

    Raises:
        ProtocolError: not four-dimensional, or an odd last dimension.
    """
    if cache_BHNC.dim() != 4 or cache_BHNC.shape[3] % 2:
        raise ProtocolError(
            Reason.UNSUPPORTED,
            f"the engine's cache has shape {tuple(cache_BHNC.shape)}, and (blocks, heads, tokens, 2 x width) is read.",
        )


def read_rows(
    cache_BHNC: torch.Tensor, layout: PageLayout, block_ids: list[int], start: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens `start .. start + count`, each (T, H, D), contiguous, on the cache's device.

    Args:
        cache_BHNC: one layer's cache.
        block_ids: the request's blocks from its first token on.
        start: position of the first token.
        count: tokens; the blocks reach that far.
    """
    _, H, N, C = cache_BHNC.shape
    D = C // 2
    first, last = start // N, -(-(start + count) // N)
    chosen = torch.tensor(block_ids[first:last], device=cache_BHNC.device)
    pages_BHNC = cache_BHNC[chosen]
    B = last - first
    if layout is PageLayout.TOKEN_PAIRS:
        keys_BHND, values_BHND = pages_BHNC[..., :D], pages_BHNC[..., D:]
    else:
        planes = pages_BHNC.reshape(B, H, 2 * N, D)
        keys_BHND, values_BHND = planes[:, :, :N], planes[:, :, N:]
        if layout is PageLayout.PLANES_KEYS_TRANSPOSED:
            keys_BHND = keys_BHND.reshape(B, H, D, N).transpose(2, 3)
    offset = start - first * N

    def rows(part_BHND: torch.Tensor) -> torch.Tensor:
        return part_BHND.permute(0, 2, 1, 3).reshape(B * N, H, D)[offset : offset + count].contiguous()

    return rows(keys_BHND), rows(values_BHND)
