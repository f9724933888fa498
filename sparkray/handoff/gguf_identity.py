"""What a GGUF file says of its model: shape, rotary frequencies, tokenizer, lineage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.errors import InputError
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import ModelIdentity, lineage_hash, tokenizer_hash
from sparkray.handoff.gguf_weights import GGUF_ARCHITECTURES, TOKENIZER_KEY
from sparkray.handoff.rope import frequencies_digest
from sparkray.handoff.rows import Floats

# Converters fill a vocabulary up to a round size with tokens of this form.
_FILLING = re.compile(r"\[PAD\d+\]")


def read_gguf_identity(path: Path, lineage: str | None = None) -> tuple[ModelIdentity, bool]:
    """The identity, and whether rotary pairs are neighbours in this architecture.

    Args:
        path: the file.
        lineage: name of the base checkpoint, where the file should not be asked.

    Raises:
        InputError: not a GGUF file.
        ProtocolError: an architecture, a window or a scaling that cannot be handed off.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError) as failure:
        raise InputError(f"{path} cannot be read as a GGUF file: {failure}.") from failure
    architecture = str(_value(reader, "general.architecture"))
    known = {gguf: (theirs, adjacent) for theirs, (gguf, adjacent) in reversed(GGUF_ARCHITECTURES.items())}
    if architecture not in known:
        raise ProtocolError(
            Reason.UNSUPPORTED, f"{path} holds architecture {architecture!r}; {', '.join(known)} can be handed off."
        )
    if _value(reader, f"{architecture}.attention.sliding_window"):
        raise ProtocolError(Reason.UNSUPPORTED, f"{path} attends within a sliding window; its cache cannot move yet.")
    model_type, pairs_adjacent = known[architecture]
    num_heads = int(_required(reader, f"{architecture}.attention.head_count"))
    hidden = int(_required(reader, f"{architecture}.embedding_length"))
    key_dim = int(_value(reader, f"{architecture}.attention.key_length") or hidden // num_heads)
    num_layers = int(_required(reader, f"{architecture}.block_count"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    identity = ModelIdentity(
        architecture=model_type,
        num_layers=num_layers,
        num_kv_heads=int(_value(reader, f"{architecture}.attention.head_count_kv") or num_heads),
        key_dim=key_dim,
        value_dim=int(_value(reader, f"{architecture}.attention.value_length") or hidden // num_heads),
        frequencies=frequencies_digest(_frequencies(reader, architecture, key_dim, tensors)),
        tokenizer=str(_value(reader, TOKENIZER_KEY) or _hash_tokens(reader)),
        lineage=lineage or lineage_hash(_gains(tensors, num_layers)),
        weights=Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1).most_common(1)[
            0
        ][0],
        engine="llama.cpp",
    )
    return identity, pairs_adjacent


def _frequencies(reader: Any, architecture: str, key_dim: int, tensors: dict[str, Any]) -> Any:
    """Frequencies as llama.cpp takes them from the file: base, linear factor, and divisors by channel."""
    width = int(_value(reader, f"{architecture}.rope.dimension_count") or key_dim)
    base = float(_value(reader, f"{architecture}.rope.freq_base") or 10_000.0)
    kind = _value(reader, f"{architecture}.rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise ProtocolError(Reason.UNSUPPORTED, f"rotary scaling {kind!r} is not supported; linear and llama3 are.")
    frequencies = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if kind == "linear":
        frequencies = frequencies / float(_required(reader, f"{architecture}.rope.scaling.factor"))
    if "rope_freqs.weight" in tensors:
        frequencies = frequencies / np.asarray(tensors["rope_freqs.weight"].data, np.float64).ravel()
    return frequencies


def _gains(tensors: dict[str, Any], num_layers: int) -> Iterator[Floats]:
    """Norm gains in the order of `model_files.folder_lineage`; GGUF keeps them in float32."""
    names = [f"blk.{layer}.{norm}.weight" for layer in range(num_layers) for norm in ("attn_norm", "ffn_norm")]
    for name in [*names, "output_norm.weight"]:
        if name not in tensors:
            raise InputError(f"the GGUF file holds no tensor {name}.")
        yield np.asarray(tensors[name].data, np.float32).ravel()


def _hash_tokens(reader: Any) -> str:
    tokens = _value(reader, "tokenizer.ggml.tokens")
    if not tokens:
        return "none"
    while tokens and _FILLING.fullmatch(tokens[-1]):
        tokens.pop()
    return tokenizer_hash(tokens)


def _value(reader: Any, key: str) -> Any:
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def _required(reader: Any, key: str) -> Any:
    value = _value(reader, key)
    if value is None:
        raise InputError(f"the GGUF file states no {key}.")
    return value
