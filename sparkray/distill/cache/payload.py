"""Scores as bytes: a header, the arrays, a checksum over both. float32 stays float32, so a cached loss is the same.

Layout, little endian: magic `SKD1`, rows, entries, draws (u32 each), temperature (f64), then head ids (i32), head
log-probabilities (f32), token log-probabilities (f32), draws (i32), entropy (f32), then CRC-32 (u32).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from sparkray.distill.scores import TokenScores

_MAGIC = b"SKD1"
_HEADER = struct.Struct("<4sIIId")
_CHECKSUM = struct.Struct("<I")


def pack_scores(scores: TokenScores) -> bytes:
    """Scores as bytes."""
    shape = (scores.num_rows, scores.top_logprobs, scores.tail_ids_LM.shape[1])
    body = b"".join(
        [
            _HEADER.pack(_MAGIC, *shape, scores.temperature),
            scores.head_ids_LK.astype("<i4").tobytes(),
            scores.head_logprobs_LK.astype("<f4").tobytes(),
            scores.token_logprobs_L.astype("<f4").tobytes(),
            scores.tail_ids_LM.astype("<i4").tobytes(),
            scores.entropy_L.astype("<f4").tobytes(),
        ]
    )
    return body + _CHECKSUM.pack(zlib.crc32(body))


def unpack_scores(data: bytes) -> TokenScores | None:
    """The scores, or None where the bytes are damaged."""
    if len(data) < _HEADER.size + _CHECKSUM.size:
        return None
    body, (checksum,) = data[: -_CHECKSUM.size], _CHECKSUM.unpack(data[-_CHECKSUM.size :])
    magic, rows, entries, draws, temperature = _HEADER.unpack_from(body)
    sizes = [rows * entries, rows * entries, rows, rows * draws, rows]
    if magic != _MAGIC or zlib.crc32(body) != checksum or len(body) != _HEADER.size + 4 * sum(sizes):
        return None
    offsets = np.cumsum([_HEADER.size, *(4 * size for size in sizes)])
    kinds = ("<i4", "<f4", "<f4", "<i4", "<f4")
    head_ids, head_logprobs, token_logprobs, tail_ids, entropy = (
        np.frombuffer(body, kind, size, offset) for kind, size, offset in zip(kinds, sizes, offsets[:-1], strict=True)
    )
    return TokenScores(
        head_ids.reshape(rows, entries),
        head_logprobs.reshape(rows, entries),
        token_logprobs,
        tail_ids.reshape(rows, draws),
        entropy,
        temperature,
    )
