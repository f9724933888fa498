"""Which codec a transfer uses, from rates that were measured.

The transfer hides behind prefill where bytes appear no faster than they leave: R bytes-per-token <= B, whatever the
length of the prompt. The codec that changes least and still hides wins; K4/V4 is taken only where it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sparkray.config.handoff import CodecName
from sparkray.handoff.codecs import lossless
from sparkray.handoff.codecs.table import encode_rows
from sparkray.handoff.rows import KvGeometry, from_float32

# A link is not planned fuller than this: rates vary, and what queues up is exposed at the end.
FILL = 0.8
# From the least change to the most that is taken without being asked for.
_ORDER: tuple[CodecName, ...] = ("raw", "lossless", "int8")


@dataclass(frozen=True, slots=True)
class CodecRates:
    """What is known when a transfer begins.

    Attributes:
        prefill_tokens_per_second: of the prefill side.
        link_bytes_per_second: payload bytes that the link takes.
        size_share: coded size over plain size, by codec.
        encode_bytes_per_second: plain bytes that one core codes a second, by codec.
    """

    prefill_tokens_per_second: float
    link_bytes_per_second: float
    size_share: Mapping[str, float] = field(default_factory=dict)
    encode_bytes_per_second: Mapping[str, float] = field(default_factory=dict)


def choose_codec(geometry: KvGeometry, rates: CodecRates, accepted: tuple[CodecName, ...]) -> CodecName:
    """The first codec of raw, lossless, int8 whose bytes leave as fast as they appear; else the fastest of them.

    Args:
        accepted: what both sides can write and read. A single name is an order, not a choice.
    """
    if len(accepted) == 1:
        return accepted[0]
    made = rates.prefill_tokens_per_second * geometry.row_bytes
    candidates = [codec for codec in _ORDER if codec in accepted and writes(codec, geometry)]
    carried = {codec: _carried(codec, rates) for codec in candidates}
    for codec in candidates:
        if made <= FILL * carried[codec]:
            return codec
    return max(candidates, key=lambda codec: carried[codec])


def writes(codec: CodecName, geometry: KvGeometry) -> bool:
    """Whether the codec has a form for rows of this type."""
    return codec != "lossless" or geometry.dtype in lossless.DTYPES


def measure_codecs(
    geometry: KvGeometry, num_rows: int = 64, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Size shares and coding rates on this core, from normal numbers with a few large channels."""
    draw = np.random.default_rng(seed)
    shape = (num_rows, geometry.num_kv_heads, geometry.key_dim)
    keys = draw.standard_normal(shape, np.float32)
    keys[..., :: max(1, geometry.key_dim // 4)] *= 8
    values = draw.standard_normal((*shape[:2], geometry.value_dim), np.float32)
    stored = from_float32(keys, geometry.dtype), from_float32(values, geometry.dtype)
    plain = stored[0].nbytes + stored[1].nbytes
    shares: dict[str, float] = {}
    speeds: dict[str, float] = {}
    for codec in _ORDER:
        if not writes(codec, geometry):
            continue
        begin = time.perf_counter()
        pieces = encode_rows(codec, geometry, 0, 0, *stored)
        speeds[codec] = plain / max(time.perf_counter() - begin, 1e-9)
        shares[codec] = sum(memoryview(piece).nbytes for piece in pieces) / plain
    return shares, speeds


def _carried(codec: CodecName, rates: CodecRates) -> float:
    """Plain bytes a second that get across in this codec."""
    link = rates.link_bytes_per_second / rates.size_share.get(codec, 1.0)
    return link if codec == "raw" else min(link, rates.encode_bytes_per_second.get(codec, link))
