"""Keys and values of some tokens, in the form that no engine owns.

The canonical form: one (T, H, D) array a layer for keys and one for values, keys already rotated, rotary pairs in
halves as transformers has them (i with i + D/2), in float32, float16 or bfloat16. numpy has no bfloat16: such arrays
are uint16 with the upper halves of float32 values.

Shapes: T tokens, L layers, H key/value heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkray.config.handoff import KvDtypeName
from sparkray.errors import InputError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Shape of a model's keys and values, equal in every layer."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: KvDtypeName

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return storage_of(self.dtype).itemsize

    @property
    def layer_row_bytes(self) -> int:
        """Bytes of one token in one layer, keys and values."""
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.num_layers * self.layer_row_bytes


@dataclass(frozen=True, slots=True)
class KvRows:
    """Rows `start .. start + count` of every layer.

    Attributes:
        start: position of the first row.
        dtype: what the arrays hold.
        keys_L: a (T, H, D) array for each layer.
        values_L: the same for values.
    """

    start: int
    dtype: KvDtypeName
    keys_L: tuple[Array, ...]
    values_L: tuple[Array, ...]

    @property
    def count(self) -> int:
        return int(self.keys_L[0].shape[0])

    def head(self, count: int) -> KvRows:
        """The first `count` rows."""
        return KvRows(
            self.start, self.dtype, tuple(keys[:count] for keys in self.keys_L), tuple(v[:count] for v in self.values_L)
        )


def storage_of(dtype: KvDtypeName) -> np.dtype[Any]:
    """The numpy type that holds numbers of `dtype`."""
    return _STORAGE[dtype]


def to_float32(array: Array, dtype: KvDtypeName) -> Floats:
    """Numbers of a canonical array as float32; exact for all three types."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(array: Floats, dtype: KvDtypeName) -> Array:
    """Float32 numbers in the storage of `dtype`, rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        return array.astype(storage_of(dtype))
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A NaN whose mantissa would round away stays a NaN.
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2")


def convert(array: Array, given: KvDtypeName, wanted: KvDtypeName) -> Array:
    """The array in another of the three types."""
    return array if given == wanted else from_float32(to_float32(array, given), wanted)


def concatenate(parts: list[KvRows]) -> KvRows:
    """Neighbouring rows as one.

    Raises:
        InputError: a gap, an overlap, or other types.
    """
    first = parts[0]
    position = first.start
    for part in parts:
        if part.start != position or part.dtype != first.dtype:
            raise InputError(f"rows from {part.start} in {part.dtype} do not follow row {position} in {first.dtype}.")
        position += part.count
    layers = range(len(first.keys_L))
    return KvRows(
        first.start,
        first.dtype,
        tuple(np.concatenate([part.keys_L[layer] for part in parts]) for layer in layers),
        tuple(np.concatenate([part.values_L[layer] for part in parts]) for layer in layers),
    )
