"""Decode with llama.cpp in this process, through the C functions that llama-cpp-python exposes.

Rows enter as a sequence state. `llama_state_seq_set_data` replaces a sequence and wipes it where it fails, so each
batch of rows is set into a scratch sequence, copied behind the rows that are there, and removed from the scratch.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.handoff import DecodeConfig
from sparkray.errors import BusyError, InternalError, MissingExtraError, NotFoundError, UnavailableError
from sparkray.handoff.engine import check_append
from sparkray.handoff.gguf_identity import read_gguf_identity
from sparkray.handoff.gguf_weights import prepare_gguf
from sparkray.handoff.llama_layout import ParsedState, RowAdapter, build_state, parse_state, read_layer
from sparkray.handoff.rows import Floats, KvRows, to_float32
from sparkray.models.embedded import gguf_path
from sparkray.models.prepare import prepare_model

_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}
_BATCH_TOKENS = 512
# Name of the shipped file as it is, quantised; `embedded` is the same model in the type that `dtype` names.
SHIPPED = "embedded-gguf"


class LlamaCppEngine:
    """A model and one context, whose unified cache all sequences share."""

    def __init__(self, config: DecodeConfig) -> None:
        if find_spec("llama_cpp") is None:
            raise MissingExtraError.for_module("llama_cpp", "llamacpp")
        path = _find_file(config)
        self.identity, pairs_adjacent = read_gguf_identity(path, config.lineage)
        self.context_tokens = config.context_tokens
        self._lib = _load_library()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), _model_parameters(self._lib))
        if not self._model:
            raise UnavailableError(f"llama.cpp could not load {path}.", hint="Its log says why: LLAMA_LOG=1 shows it.")
        self._context = self._open_context(config)
        self._vocabulary = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))
        # Two more than conversations: the canary runs beside them.
        self._scratch = config.max_sequences + 2
        self._free = list(range(self._scratch))
        self._template = self._read_template()
        self._adapter = RowAdapter.create(
            pairs_adjacent=pairs_adjacent,
            head_dim=self.identity.key_dim,
            key_type=config.kv_type,
            value_type=config.kv_type,
            turned=os.environ.get("LLAMA_ATTN_ROT_DISABLE") != "1",
        )

    def open_sequence(self) -> LlamaCppSequence:
        if not self._free:
            raise BusyError(f"all {self._scratch} sequences of llama.cpp's context are taken.")
        return LlamaCppSequence(self, self._free.pop())

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def decode(self, token_ids: list[int], position: int, sequence: int) -> Floats:
        """Compute rows of these tokens from `position` on; logits after the last one."""
        for begin in range(0, len(token_ids), _BATCH_TOKENS):
            tokens = token_ids[begin : begin + _BATCH_TOKENS]
            batch = self._lib.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = position + begin + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = int(index == len(tokens) - 1)
            code = self._lib.llama_decode(self._context, batch)
            self._lib.llama_batch_free(batch)
            if code:
                raise InternalError(
                    f"llama.cpp refused {len(tokens)} tokens at position {position + begin} (code {code})."
                )
        logits = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), shape=(self._vocabulary,))
        return np.array(logits, np.float32)

    def append(self, rows: KvRows, sequence: int) -> None:
        """Put rows behind those of a sequence."""
        adapted = [
            self._adapter.to_context(to_float32(keys, rows.dtype), to_float32(values, rows.dtype))
            for keys, values in zip(rows.keys_L, rows.values_L, strict=True)
        ]
        data = build_state(self._template.form, [k for k, _ in adapted], [v for _, v in adapted], rows.start)
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        taken = self._lib.llama_state_seq_set_data(self._context, buffer, len(data), self._scratch)
        if taken != len(data):
            raise InternalError(f"llama.cpp took {taken} of {len(data)} bytes of a sequence state.")
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_cp(memory, self._scratch, sequence, -1, -1)
        self._lib.llama_memory_seq_rm(memory, self._scratch, -1, -1)

    def export(self, sequence: int, start: int, stop: int) -> KvRows:
        """Rows of a sequence in canonical form."""
        state = self._state(sequence)
        order = np.argsort(state.positions)[start:stop]
        layers = []
        for layer in range(state.form.num_layers):
            keys, values = read_layer(state, layer)
            layers.append(self._adapter.to_canonical(keys[order], values[order], self.identity.num_kv_heads))
        return KvRows(start, "float32", tuple(k for k, _ in layers), tuple(v for _, v in layers))

    def remove(self, sequence: int, start: int) -> None:
        """Forget a sequence's rows from `start` on."""
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, start, -1)

    def release(self, sequence: int) -> None:
        """Forget a sequence; its number can be used again."""
        self.remove(sequence, -1)
        self._free.append(sequence)

    def last_position(self, sequence: int) -> int:
        """Highest position of a sequence; -1 where it is empty."""
        return int(self._lib.llama_memory_seq_pos_max(self._lib.llama_get_memory(self._context), sequence))

    def _open_context(self, config: DecodeConfig) -> Any:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = config.context_tokens * config.max_sequences
        parameters.n_batch = parameters.n_ubatch = _BATCH_TOKENS
        parameters.n_seq_max = config.max_sequences + 3
        parameters.kv_unified = True
        parameters.type_k = parameters.type_v = _TYPES[config.kv_type]
        # A quantised value cache needs flash attention; without it sums run in float32 and agree with vLLM's best.
        parameters.flash_attn_type = int(config.kv_type in ("q8_0", "q4_0"))
        if config.num_threads:
            parameters.n_threads = parameters.n_threads_batch = config.num_threads
        context = self._lib.llama_init_from_model(self._model, parameters)
        if not context:
            raise UnavailableError(
                f"llama.cpp could not open a context of {parameters.n_ctx} tokens with a {config.kv_type} cache."
            )
        return context

    def _read_template(self) -> ParsedState:
        self.decode([0, 0], 0, self._scratch)
        template = parse_state(bytes(self._raw_state(self._scratch)))
        self.remove(self._scratch, -1)
        return template

    def _state(self, sequence: int) -> ParsedState:
        return parse_state(bytes(self._raw_state(sequence)))

    def _raw_state(self, sequence: int) -> memoryview:
        size = self._lib.llama_state_seq_get_size(self._context, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = self._lib.llama_state_seq_get_data(self._context, buffer, size, sequence)
        return memoryview(buffer)[:written]


class LlamaCppSequence:
    """A numbered sequence of the context."""

    def __init__(self, engine: LlamaCppEngine, number: int) -> None:
        self._engine = engine
        self._number = number

    @property
    def num_rows(self) -> int:
        return self._engine.last_position(self._number) + 1

    def import_rows(self, rows: KvRows) -> None:
        check_append(self.num_rows, rows)
        self._engine.append(rows, self._number)

    def forward(self, token_ids: list[int]) -> Floats:
        return self._engine.decode(token_ids, self.num_rows, self._number)

    def export_rows(self, start: int, stop: int) -> KvRows:
        return self._engine.export(self._number, start, stop)

    def truncate(self, num_rows: int) -> None:
        self._engine.remove(self._number, num_rows)

    def close(self) -> None:
        self._engine.release(self._number)


def _find_file(config: DecodeConfig) -> Path:
    if config.model == SHIPPED:
        return gguf_path()
    path = Path(config.model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NotFoundError(f"{path} does not exist, and a GGUF file is expected.", param="model")
        return path
    return prepare_gguf(prepare_model(config.model), config.dtype)


def _load_library() -> Any:
    import llama_cpp.llama_cpp as lib

    if os.environ.get("LLAMA_LOG") != "1":
        lib.llama_log_set(_silent(), None)
    lib.llama_backend_init()
    return lib


@cache
def _silent() -> Any:
    """A log callback that says nothing; cached for the life of the process, since C holds its address."""
    import llama_cpp.llama_cpp as lib

    return lib.llama_log_callback(lambda level, text, data: None)


def _model_parameters(lib: Any) -> Any:
    parameters = lib.llama_model_default_params()
    # Everything on the GPU where there is one; a build without one ignores it.
    parameters.n_gpu_layers = 999
    return parameters
