"""What must agree before one byte of KV is sent: shape, rotary frequencies, tokenizer, weights.

Each side builds its identity from what its engine really uses, not from what a file claims where the two can differ.
Equal parts are hashed into one digest. Weights may be quantised differently only for pairs that a canary measured.

Where do quantised weights say what they were? In their norm gains: every format keeps those in full. Their hash,
rounded to bfloat16, is the lineage of a checkpoint and all its quantisations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.rope import frequencies_digest, inverse_frequencies
from sparkray.handoff.rows import Floats, from_float32

# Architectures whose keys and values are plain rows of every layer, with rotary positions. By transformers' names.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
# The same layers under two names; GGUF knows one of them only.
_SAME_LAYERS = {"mistral": "llama"}
# What is compared; the rest of an identity informs.
_COMPARED = (
    "architecture", "num_layers", "num_kv_heads", "key_dim", "value_dim", "frequencies", "tokenizer", "lineage",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """One side's reading of its model.

    Attributes:
        architecture: transformers' model type, as "llama".
        frequencies: rotary frequencies rounded to six digits, as the engine uses them.
        tokenizer: hash over all tokens by id.
        lineage: hash over norm gains, or a name that both sides were given.
        weights: type of the weights, as "bfloat16" or "Q4_1".
        engine: name and version; informs.
    """

    architecture: str
    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    frequencies: tuple[float, ...]
    tokenizer: str
    lineage: str
    weights: str
    engine: str = ""

    @property
    def digest(self) -> str:
        """Hash of the parts that must be equal on both sides."""
        return _sha256([getattr(self, name) for name in _COMPARED])

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def identity_from_wire(body: Mapping[str, Any]) -> ModelIdentity:
    """Read an identity from a HELLO.

    Raises:
        ProtocolError: keys or types other than an identity's.
    """
    try:
        return ModelIdentity(**{**body, "frequencies": tuple(float(each) for each in body["frequencies"])})
    except (KeyError, TypeError, ValueError) as failure:
        raise ProtocolError(Reason.MALFORMED, f"the peer's identity cannot be read: {failure}.") from failure


def compare_identities(prefill: ModelIdentity, decode: ModelIdentity) -> None:
    """Refuse two models between which rows mean nothing.

    Raises:
        ProtocolError: names the parts that differ, with both values where they are short.
    """
    different = [name for name in _COMPARED if getattr(prefill, name) != getattr(decode, name)]
    if not different:
        return
    said = []
    for name in different:
        here, there = getattr(decode, name), getattr(prefill, name)
        if name == "frequencies":
            here, there = _describe_frequencies(here), _describe_frequencies(there)
        said.append(f"{name} ({there} there, {here} here)")
    raise ProtocolError(
        Reason.FINGERPRINT,
        f"the prefill side has another model than the decode side: {'; '.join(said)}.",
        hint="Serve the same checkpoint on both sides; a quantised copy of it will do.",
    )


def check_supported(config: Mapping[str, Any]) -> None:
    """Refuse models whose cache is more than rows of keys and values.

    Raises:
        ProtocolError: latent attention, sliding windows, state-space layers, or an architecture not on the list.
    """
    kind = config.get("model_type")
    if config.get("kv_lora_rank"):
        raise ProtocolError(Reason.UNSUPPORTED, f"{kind} compresses its cache (latent attention); it cannot move yet.")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ProtocolError(
            Reason.UNSUPPORTED,
            f"{kind} attends within a window of {config['sliding_window']} tokens; engines drop rows at different"
            " times, so its cache cannot move yet.",
        )
    if kind not in SUPPORTED:
        raise ProtocolError(
            Reason.UNSUPPORTED, f"model type {kind!r} was given; {', '.join(SUPPORTED)} can be handed off."
        )


def identity_of_config(
    config: Mapping[str, Any], *, tokenizer: str, lineage: str, weights: str, engine: str
) -> ModelIdentity:
    """The identity that a `config.json` of transformers states.

    Raises:
        ProtocolError: as `check_supported` and `inverse_frequencies`.
    """
    check_supported(config)
    num_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
    return ModelIdentity(
        architecture=_SAME_LAYERS.get(config["model_type"], config["model_type"]),
        num_layers=int(config["num_hidden_layers"]),
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        key_dim=head_dim,
        value_dim=head_dim,
        frequencies=frequencies_digest(inverse_frequencies(config, head_dim)),
        tokenizer=tokenizer,
        lineage=lineage,
        weights=weights,
        engine=engine,
    )


def tokenizer_hash(tokens: Iterable[str]) -> str:
    """Hash of all tokens in order of their ids."""
    hasher = hashlib.sha256()
    for token in tokens:
        hasher.update(token.encode("utf-8", "surrogatepass"))
        hasher.update(b"\0")
    return hasher.hexdigest()


def lineage_hash(gains: Iterable[Floats]) -> str:
    """Hash of norm gains in order of the layers, each rounded to bfloat16."""
    hasher = hashlib.sha256()
    for gain in gains:
        hasher.update(np.ascontiguousarray(from_float32(gain, "bfloat16")).tobytes())
    return hasher.hexdigest()


def prompt_hash(token_ids: Iterable[int]) -> str:
    """Hash of a prompt's token ids."""
    return hashlib.sha256(np.asarray(list(token_ids), "<u4").tobytes()).hexdigest()


def _describe_frequencies(frequencies: tuple[float, ...]) -> str:
    return f"{len(frequencies)} from {frequencies[1]:g} to {frequencies[-1]:g}" if len(frequencies) > 1 else "none"


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
