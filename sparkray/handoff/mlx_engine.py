"""Decode with MLX: runs on a Mac's GPU, and on any Linux CPU for tests.

Rows enter through the cache's own `update_and_fetch`, the call that attention itself makes, so no layout of a cache
is assumed. Keys need no permutation: mlx-lm rotates halves, as transformers does.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.handoff import DecodeConfig, KvDtypeName
from sparkray.errors import MissingExtraError, UnavailableError
from sparkray.handoff.engine import check_append, reconcile_frequencies
from sparkray.handoff.fingerprint import ModelIdentity, check_supported, identity_of_config
from sparkray.handoff.model_files import folder_lineage, folder_tokenizer, folder_weights, read_config
from sparkray.handoff.rope import Frequencies, frequencies_digest, inverse_frequencies
from sparkray.handoff.rows import Array, Floats, KvRows, convert
from sparkray.models.prepare import prepare_model

# Tokens of one forward pass over a prompt: bounds the memory of its activations.
_PREFILL_TOKENS = 512


class MlxEngine:
    """A model in MLX."""

    def __init__(self, config: DecodeConfig) -> None:
        for module in ("mlx", "mlx_lm"):
            if find_spec(module) is None:
                raise MissingExtraError.for_module(module, "mac")
        import mlx.core as mx
        from mlx_lm.utils import load_model

        folder = Path(prepare_model(config.model))
        stated = read_config(folder)
        check_supported(stated)
        self.context_tokens = config.context_tokens
        self.dtype: KvDtypeName = config.dtype
        self._model, _ = load_model(folder, model_config=_for_mlx(stated))
        self._model.set_dtype(getattr(mx, config.dtype))
        mx.eval(self._model.parameters())
        identity = identity_of_config(
            stated,
            tokenizer=folder_tokenizer(folder),
            lineage=config.lineage or folder_lineage(folder),
            weights=folder_weights(folder),
            engine=f"mlx-lm {version('mlx-lm')}",
        )
        measured = _measured_frequencies(self._model, identity.key_dim)
        used = reconcile_frequencies(inverse_frequencies(stated, identity.key_dim), measured)
        self.identity: ModelIdentity = _with_frequencies(identity, used)

    def open_sequence(self) -> MlxSequence:
        return MlxSequence(self._model, self.dtype)

    def close(self) -> None:
        self._model = None


class MlxSequence:
    """One cache for each layer."""

    def __init__(self, model: Any, dtype: KvDtypeName) -> None:
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        self._model = model
        self._dtype = dtype
        self._caches = make_prompt_cache(model)
        other = {type(cache).__name__ for cache in self._caches if type(cache) is not KVCache}
        if other:
            raise UnavailableError(
                f"this model's layers keep {', '.join(sorted(other))}, and plain caches can be filled."
            )

    @property
    def num_rows(self) -> int:
        return int(self._caches[0].offset)

    def import_rows(self, rows: KvRows) -> None:
        import mlx.core as mx

        check_append(self.num_rows, rows)
        for cache, keys, values in zip(self._caches, rows.keys_L, rows.values_L, strict=True):
            cache.update_and_fetch(self._cache_array(keys, rows.dtype), self._cache_array(values, rows.dtype))
        # Evaluated now: the arrays must not point into the receiver's memory after it is given back.
        mx.eval([part for cache in self._caches for part in (cache.keys, cache.values)])

    def forward(self, token_ids: list[int]) -> Floats:
        import mlx.core as mx

        for begin in range(0, len(token_ids), _PREFILL_TOKENS):
            logits = self._model(mx.array([token_ids[begin : begin + _PREFILL_TOKENS]]), cache=self._caches)
            last = logits[0, -1].astype(mx.float32)
            mx.eval(last)
        return np.array(last)

    def export_rows(self, start: int, stop: int) -> KvRows:
        import mlx.core as mx

        def rows(part: Any) -> Array:
            return np.array(part[0, :, start:stop].astype(mx.float32).transpose(1, 0, 2))

        return KvRows(
            start,
            "float32",
            tuple(rows(cache.keys) for cache in self._caches),
            tuple(rows(cache.values) for cache in self._caches),
        )

    def truncate(self, num_rows: int) -> None:
        for cache in self._caches:
            cache.trim(cache.offset - num_rows)

    def close(self) -> None:
        self._caches = []

    def _cache_array(self, rows_THD: Array, dtype: KvDtypeName) -> Any:
        """(1, H, T, D) in the model's type; other types would widen the cache and slow every step."""
        import mlx.core as mx

        array = mx.array(np.ascontiguousarray(convert(rows_THD, dtype, self._dtype)))
        if self._dtype == "bfloat16":
            array = array.view(mx.bfloat16)
        return array.transpose(1, 0, 2)[None]


def _for_mlx(config: dict[str, Any]) -> dict[str, Any]:
    """Keys that mlx-lm reads under older names; without `rope_theta` its llama falls back to 10,000 in silence."""
    added: dict[str, Any] = {}
    parameters = config.get("rope_parameters") or {}
    if "rope_theta" not in config and "rope_theta" in parameters:
        added["rope_theta"] = parameters["rope_theta"]
        if parameters.get("rope_type", "default") != "default":
            added["rope_scaling"] = parameters
    if "num_experts" not in config and "num_local_experts" in config:
        added["num_experts"] = config["num_local_experts"]
    return added


def _measured_frequencies(model: Any, head_dim: int) -> Frequencies:
    """Frequencies that the loaded model turns by, read off the angle of each pair at position 1."""
    import mlx.core as mx

    rotate = model.layers[0].self_attn.rope
    half = head_dim // 2
    unit = np.zeros((1, 1, 1, head_dim), np.float32)
    unit[..., :half] = 1.0
    turned = np.array(rotate(mx.array(unit), offset=1)).reshape(head_dim)
    return np.arctan2(turned[half:].astype(np.float64), turned[:half].astype(np.float64))


def _with_frequencies(identity: ModelIdentity, used: Frequencies) -> ModelIdentity:
    from dataclasses import replace

    return replace(identity, frequencies=frequencies_digest(used))
