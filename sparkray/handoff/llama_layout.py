"""Rows into and out of llama.cpp's sequence state.

llama.cpp writes a sequence as: header words, the positions, then for each layer the key rows and for each layer the
value rows (transposed where flash attention is off). Versions differ in the header, so nothing of it is written from
memory: a state that the receiving context wrote itself is the template, and a state that is not understood to its
last byte is refused.

Two things differ from the canonical rows. GGUF files of the llama family rotate neighbouring channels (2i, 2i + 1),
so their keys are permuted. A quantised cache holds rows that were turned by a Hadamard matrix, which spreads
outliers: keys by the largest power of two that divides a head, values by 64.

Shapes: T tokens, H key/value heads, D width of a head.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.rows import Floats, from_float32, to_float32

# ggml's numbers of types, and the name in each case.
GGML_TYPES = {0: "f32", 1: "f16", 30: "bf16", 8: "q8_0", 2: "q4_0"}
_PLAIN: dict[str, Any] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_VALUE_TURN = 64


@dataclass(frozen=True, slots=True)
class StateForm:
    """What a state of one context looks like, apart from its rows.

    Attributes:
        prefix: words before the number of streams.
        values_transposed: whether values lie channel by channel.
        key_types: ggml type and bytes of a row, for each layer.
        value_types: ggml type, and bytes of a row or of an element where transposed, for each layer.
        value_width: channels of a value row, where transposed.
    """

    prefix: bytes
    values_transposed: bool
    key_types: tuple[tuple[int, int], ...]
    value_types: tuple[tuple[int, int], ...]
    value_width: int

    @property
    def num_layers(self) -> int:
        return len(self.key_types)


@dataclass(frozen=True, slots=True)
class ParsedState:
    """A state taken apart: its form, the positions, and where each layer's bytes lie."""

    form: StateForm
    positions: tuple[int, ...]
    keys_L: tuple[memoryview, ...]
    values_L: tuple[memoryview, ...]


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.offset = 0

    def words(self, form: str) -> tuple[int, ...]:
        layout = struct.Struct("<" + form)
        found = layout.unpack(self.take(layout.size))
        return tuple(int(word) for word in found)

    def take(self, size: int) -> memoryview:
        if size > len(self._data) - self.offset:
            raise ProtocolError(
                Reason.UNSUPPORTED, f"a llama.cpp state ends at byte {len(self._data)}, inside a field."
            )
        piece = self._data[self.offset : self.offset + size]
        self.offset += size
        return piece

    @property
    def is_at_end(self) -> bool:
        return self.offset == len(self._data)


def parse_state(data: bytes, prefix_bytes: int = 8) -> ParsedState:
    """Take a state apart.

    Args:
        data: what `llama_state_seq_get_data` wrote.
        prefix_bytes: length of the words before the number of streams: 8 since libllama 0.5, 0 before.

    Raises:
        ProtocolError: several streams, types that are not known, or bytes left over: another version's form.
    """
    cursor = _Cursor(data)
    prefix = bytes(cursor.take(prefix_bytes))
    streams, count = cursor.words("II")
    if streams != 1:
        raise ProtocolError(
            Reason.UNSUPPORTED, f"the state has {streams} streams; one is read. Open the context with a unified cache."
        )
    positions = []
    for _ in range(count):
        position, num_sequences = cursor.words("iI")
        cursor.take(4 * num_sequences)
        positions.append(position)
    transposed, num_layers = cursor.words("II")
    if num_layers > 4096:
        raise ProtocolError(Reason.UNSUPPORTED, f"a state of {num_layers} layers was found, which is another form.")
    key_types, keys, value_types, values = [], [], [], []
    for _ in range(num_layers):
        kind, row_bytes = cursor.words("iQ")
        key_types.append((kind, row_bytes))
        keys.append(cursor.take(row_bytes * count))
    width = 0
    for _ in range(num_layers):
        if transposed:
            kind, size, width = cursor.words("iII")
            values.append(cursor.take(size * width * count))
        else:
            kind, size = cursor.words("iQ")
            values.append(cursor.take(size * count))
        value_types.append((kind, size))
    unknown = {kind for kind, _ in (*key_types, *value_types)} - GGML_TYPES.keys()
    if unknown or not cursor.is_at_end or transposed > 1:
        raise ProtocolError(
            Reason.UNSUPPORTED,
            f"a llama.cpp state of {len(data)} bytes was read to byte {cursor.offset} with types {sorted(unknown)} not"
            " known: this build writes another form.",
        )
    form = StateForm(prefix, bool(transposed), tuple(key_types), tuple(value_types), width)
    return ParsedState(form, tuple(positions), tuple(keys), tuple(values))


def build_state(form: StateForm, keys_L: list[Floats], values_L: list[Floats], start: int) -> bytes:
    """A state with rows from position `start` on, of the form that the receiving context writes.

    Args:
        keys_L: for each layer (T, H D) as the context keeps them: permuted and turned already.
        values_L: the same for values.
    """
    count = int(keys_L[0].shape[0])
    cells = np.zeros((count, 3), "<i4")
    cells[:, 0] = np.arange(start, start + count)
    cells[:, 1] = 1
    pieces = [form.prefix, struct.pack("<II", 1, count), cells.tobytes()]
    pieces.append(struct.pack("<II", form.values_transposed, form.num_layers))
    for (kind, row_bytes), keys in zip(form.key_types, keys_L, strict=True):
        pieces += [struct.pack("<iQ", kind, row_bytes), _sized(_encode(keys, kind), row_bytes * count)]
    for (kind, size), values in zip(form.value_types, values_L, strict=True):
        if form.values_transposed:
            body = _sized(_encode(np.ascontiguousarray(values.T), kind), size * form.value_width * count)
            pieces += [struct.pack("<iII", kind, size, form.value_width), body]
        else:
            pieces += [struct.pack("<iQ", kind, size), _sized(_encode(values, kind), size * count)]
    return b"".join(pieces)


def read_layer(state: ParsedState, layer: int) -> tuple[Floats, Floats]:
    """Keys and values of one layer, (T, H D) float32, as the context keeps them."""
    count = len(state.positions)
    keys = _decode(state.keys_L[layer], state.form.key_types[layer][0], count)
    if state.form.values_transposed:
        values = _decode(state.values_L[layer], state.form.value_types[layer][0], state.form.value_width)
        return keys, np.ascontiguousarray(values.T)
    return keys, _decode(state.values_L[layer], state.form.value_types[layer][0], count)


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """Between canonical rows and those that a context keeps.

    Attributes:
        pairs_adjacent: whether the architecture's rotary pairs are neighbours (GGUF's llama family).
        key_turn: size of the Hadamard matrix on keys; 1: none.
        value_turn: size of the one on values.
    """

    pairs_adjacent: bool
    key_turn: int = 1
    value_turn: int = 1

    @classmethod
    def create(cls, *, pairs_adjacent: bool, head_dim: int, key_type: str, value_type: str, turned: bool) -> RowAdapter:
        """The adapter of a context; `turned` says whether this build turns quantised caches."""
        key_turn = head_dim & -head_dim if turned and key_type not in _PLAIN else 1
        value_turn = _VALUE_TURN if turned and value_type not in _PLAIN else 1
        return cls(pairs_adjacent, key_turn, value_turn)

    def to_context(self, keys_THD: Floats, values_THD: Floats) -> tuple[Floats, Floats]:
        """Canonical rows as (T, H D) of the context."""
        keys = halves_to_pairs(keys_THD) if self.pairs_adjacent else keys_THD
        return turn(_flat(keys), self.key_turn), turn(_flat(values_THD), self.value_turn)

    def to_canonical(self, keys: Floats, values: Floats, num_heads: int) -> tuple[Floats, Floats]:
        """Undo `to_context`; a Hadamard matrix of this scale is its own inverse."""
        keys_THD = turn(keys, self.key_turn).reshape(len(keys), num_heads, -1)
        values_THD = turn(values, self.value_turn).reshape(len(values), num_heads, -1)
        return (pairs_to_halves(keys_THD) if self.pairs_adjacent else keys_THD), values_THD


def halves_to_pairs(keys_THD: Floats) -> Floats:
    """Channels (i, i + D/2) become neighbours (2i, 2i + 1)."""
    T, H, D = keys_THD.shape
    return np.ascontiguousarray(keys_THD.reshape(T, H, 2, D // 2).swapaxes(2, 3)).reshape(T, H, D)


def pairs_to_halves(keys_THD: Floats) -> Floats:
    """Undo `halves_to_pairs`."""
    T, H, D = keys_THD.shape
    return np.ascontiguousarray(keys_THD.reshape(T, H, D // 2, 2).swapaxes(2, 3)).reshape(T, H, D)


def turn(rows: Floats, size: int) -> Floats:
    """Multiply each run of `size` channels by the orthonormal Hadamard matrix."""
    if size == 1:
        return rows
    turned: Floats = rows.reshape(len(rows), -1, size) @ _hadamard(size)
    return turned.reshape(rows.shape)


def session_file(state: bytes, token_ids: list[int], prefix_bytes: int = 8) -> bytes:
    """The state as llama.cpp's session file of one sequence (`llama-server`'s slots), for machines without a link."""
    header = struct.pack("<III", 0x67677371, 3, len(token_ids))
    return header + np.asarray(token_ids, "<i4").tobytes() + state[prefix_bytes:]


@lru_cache(maxsize=16)
def _hadamard(size: int) -> Floats:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Floats = (matrix / np.sqrt(size)).astype(np.float32)
    return scaled


def _encode(rows: Floats, kind: int) -> bytes:
    name = GGML_TYPES[kind]
    if name in _PLAIN:
        return from_float32(rows, _PLAIN[name]).tobytes()
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return bytes(quantize(np.ascontiguousarray(rows, np.float32), GGMLQuantizationType(kind)).tobytes())


def _decode(body: memoryview, kind: int, count: int) -> Floats:
    name = GGML_TYPES[kind]
    if name in _PLAIN:
        storage = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[name]
        return to_float32(np.frombuffer(body, storage), _PLAIN[name]).reshape(count, -1)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows: Floats = dequantize(np.frombuffer(body, np.uint8).reshape(count, -1), GGMLQuantizationType(kind))
    return rows


def _flat(rows_THD: Floats) -> Floats:
    return np.ascontiguousarray(rows_THD).reshape(len(rows_THD), -1)


def _sized(body: bytes, expected: int) -> bytes:
    if len(body) != expected:
        raise ProtocolError(
            Reason.GEOMETRY, f"rows take {len(body)} bytes in llama.cpp's type, and its context expects {expected}."
        )
    return body
