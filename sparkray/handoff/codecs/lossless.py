"""Bit for bit in 12 instead of 16 bits (bfloat16), or 28 instead of 32 (float32).

The eight exponent bits of keys and values carry under three bits of information: fifteen exponents cover more than
99.9 % of the numbers. Each number is written as a nibble that names one of the fifteen, with 15 for "another", and
its remaining bits; the others' exponents follow one by one. (SplitZip, arXiv 2605.01708, goes the same way.)

    16 bytes    the fifteen exponents, and zero
    4 bytes     how many others there are
    (n+1)/2     nibbles, the even index low
    n x 1|3     sign and mantissa
    others      their exponents, in order
"""

from __future__ import annotations

import struct

import numpy as np

from sparkray.config.handoff import KvDtypeName
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.rows import Array

NAMED = 15
_HEADER = struct.Struct("<16sI")
DTYPES: tuple[KvDtypeName, ...] = ("bfloat16", "float32")


def encode(rows: Array, dtype: KvDtypeName) -> bytes:
    """The array's numbers in order; `dtype` is one of `DTYPES`."""
    exponents, rest = _split(rows.ravel(), dtype)
    named = np.argsort(np.bincount(exponents, minlength=256), kind="stable")[::-1][:NAMED].astype(np.uint8)
    code_of = np.full(256, NAMED, np.uint8)
    code_of[named] = np.arange(NAMED, dtype=np.uint8)
    codes = code_of[exponents]
    others = exponents[codes == NAMED]
    if codes.size % 2:
        codes = np.append(codes, np.uint8(0))
    nibbles = codes[::2] | (codes[1::2] << 4)
    return b"".join((_HEADER.pack(named.tobytes(), others.size), nibbles.tobytes(), rest.tobytes(), others.tobytes()))


def decode(body: memoryview, count: int, dtype: KvDtypeName) -> tuple[Array, int]:
    """The first `count` numbers, flat, and how many bytes of `body` they took.

    Raises:
        ProtocolError: the body ends early, or its parts do not agree.
    """
    rest_bytes = 1 if dtype == "bfloat16" else 3
    nibble_bytes = -(-count // 2)
    fixed = _HEADER.size + nibble_bytes + rest_bytes * count
    if len(body) < fixed:
        raise ProtocolError(Reason.MALFORMED, f"a lossless body of {len(body)} bytes is too short for {count} numbers.")
    named, num_others = _HEADER.unpack_from(body)
    packed = np.frombuffer(body[_HEADER.size : _HEADER.size + nibble_bytes], np.uint8)
    codes: Array = np.empty(2 * nibble_bytes, np.uint8)
    codes[::2] = packed & 15
    codes[1::2] = packed >> 4
    codes = codes[:count]
    is_other = codes == NAMED
    if num_others != int(is_other.sum()) or len(body) < fixed + num_others:
        raise ProtocolError(Reason.MALFORMED, f"a lossless body announces {num_others} exponents that do not fit it.")
    exponents = np.frombuffer(named, np.uint8)[codes]
    exponents[is_other] = np.frombuffer(body[fixed : fixed + num_others], np.uint8)
    rest = np.frombuffer(body[_HEADER.size + nibble_bytes : fixed], np.uint8).reshape(count, rest_bytes)
    return _join(exponents, rest, dtype), fixed + num_others


def _split(numbers: Array, dtype: KvDtypeName) -> tuple[Array, Array]:
    """Exponent byte, and the other bits as bytes with the sign on top."""
    if dtype == "bfloat16":
        bits = numbers.view("<u2")
        return (bits >> 7).astype(np.uint8), ((bits & 0x7F) | ((bits >> 8) & 0x80)).astype(np.uint8)
    bits = np.ascontiguousarray(numbers).view("<u4")
    rest = (bits & 0x7FFFFF) | ((bits >> 8) & 0x800000)
    return (bits >> 23).astype(np.uint8), np.ascontiguousarray(rest).view(np.uint8).reshape(-1, 4)[:, :3]


def _join(exponents: Array, rest: Array, dtype: KvDtypeName) -> Array:
    if dtype == "bfloat16":
        byte = rest[:, 0].astype(np.uint16)
        return ((byte & 0x7F) | (exponents.astype(np.uint16) << 7) | ((byte & 0x80) << 8)).astype("<u2")
    low = rest[:, 0].astype(np.uint32) | rest[:, 1].astype(np.uint32) << 8 | rest[:, 2].astype(np.uint32) << 16
    bits = (low & 0x7FFFFF) | (exponents.astype(np.uint32) << 23) | ((low & 0x800000) << 8)
    return bits.view("<f4")
