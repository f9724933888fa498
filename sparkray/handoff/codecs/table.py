"""One layer's rows to bytes and back, for each codec by name; sizes are checked before anything is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparkray.config.handoff import CodecName
from sparkray.handoff.codecs import int8, k4v4, lossless
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.messages import KvPart, as_bytes
from sparkray.handoff.rows import Array, KvGeometry, from_float32, storage_of, to_float32
from sparkray.handoff.wire import Buffer


def encode_rows(
    codec: CodecName, geometry: KvGeometry, layer: int, start: int, keys: Array, values: Array
) -> list[Buffer]:
    """Payload of one KV frame, in pieces: header, keys, values.

    Args:
        keys: (T, H, Dk) in the geometry's type, C-contiguous; `raw` hands their memory on without a copy.
        values: (T, H, Dv).
    """
    count = int(keys.shape[0])
    part = KvPart(layer, start, count, codec, geometry.dtype, count * geometry.layer_row_bytes)
    header = part.encode()
    if codec == "raw":
        return [header, as_bytes(keys.data), as_bytes(values.data)]
    if codec == "lossless":
        return [header, lossless.encode(keys, geometry.dtype), lossless.encode(values, geometry.dtype)]
    wide_keys, wide_values = to_float32(keys, geometry.dtype), to_float32(values, geometry.dtype)
    if codec == "int8":
        return [header, int8.encode(wide_keys), int8.encode(wide_values)]
    return [header, k4v4.encode_keys(wide_keys), k4v4.encode_values(wide_values)]


def decode_rows(part: KvPart, body: memoryview, geometry: KvGeometry) -> tuple[Array, Array]:
    """Keys (T, H, Dk) and values (T, H, Dv) in the geometry's type; `raw` gives views into `body`.

    Raises:
        ProtocolError: the frame does not agree with the geometry, or its body has another size.
    """
    if part.layer >= geometry.num_layers or part.count < 1 or part.dtype != geometry.dtype:
        raise ProtocolError(
            Reason.GEOMETRY,
            f"a frame holds {part.count} rows of layer {part.layer} in {part.dtype}; the transfer has"
            f" {geometry.num_layers} layers in {geometry.dtype}.",
        )
    if part.raw_bytes != part.count * geometry.layer_row_bytes:
        raise ProtocolError(
            Reason.GEOMETRY,
            f"{part.count} rows of {geometry.layer_row_bytes} bytes are not the {part.raw_bytes} bytes announced.",
        )
    rows, heads = part.count, geometry.num_kv_heads
    keys_shape, values_shape = (rows, heads, geometry.key_dim), (rows, heads, geometry.value_dim)
    storage = storage_of(geometry.dtype)
    if part.codec == "lossless":
        if geometry.dtype not in lossless.DTYPES:
            raise ProtocolError(Reason.UNSUPPORTED, f"codec 'lossless' does not write {geometry.dtype}.")
        keys, used = lossless.decode(body, rows * heads * geometry.key_dim, geometry.dtype)
        values, rest = lossless.decode(body[used:], rows * heads * geometry.value_dim, geometry.dtype)
        _check_size(part, len(body), used + rest)
        return keys.reshape(keys_shape), values.reshape(values_shape)
    if part.codec == "raw":
        size = rows * heads * geometry.key_dim * geometry.itemsize
        _check_size(part, len(body), part.raw_bytes)
        return _view(body[:size], storage, keys_shape), _view(body[size:], storage, values_shape)
    if part.codec == "int8":
        size = int8.encoded_bytes(*keys_shape)
        _check_size(part, len(body), size + int8.encoded_bytes(*values_shape))
        decoded = int8.decode(body[:size], *keys_shape), int8.decode(body[size:], *values_shape)
    else:
        size = k4v4.key_bytes(*keys_shape)
        _check_size(part, len(body), size + k4v4.value_bytes(*values_shape))
        decoded = k4v4.decode_keys(body[:size], *keys_shape), k4v4.decode_values(body[size:], *values_shape)
    return from_float32(decoded[0], geometry.dtype), from_float32(decoded[1], geometry.dtype)


def _view(body: memoryview, storage: np.dtype[Any], shape: tuple[int, int, int]) -> Array:
    return np.frombuffer(body, storage).reshape(shape)


def _check_size(part: KvPart, given: int, expected: int) -> None:
    if given != expected:
        raise ProtocolError(
            Reason.MALFORMED,
            f"{part.count} rows of layer {part.layer} in codec {part.codec} take {expected} bytes, and {given} came.",
        )
