"""A GGUF file of the llama family as a folder that transformers, vLLM and mlx-lm load: bfloat16 safetensors.

GGUF keeps the query and key projections in another row order than transformers: llama.cpp rotates neighbouring
dimensions (2i, 2i+1), transformers rotates (i, i + head_dim/2). Reading a file without undoing that gives a model
that runs and talks nonsense, so `rotary_rows_to_halves` is the one line of this file that matters most.

Nothing here needs torch: `gguf` dequantises and rounds to bfloat16, and the safetensors format is a JSON header
followed by the raw tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkray.errors import InputError
from sparkray.models.gguf_tokenizer import write_tokenizer

Floats = npt.NDArray[np.float32]


def convert_gguf(source: Path, folder: Path) -> None:
    """Write `model.safetensors`, the configuration and the tokenizer of a GGUF file into an empty folder.

    Raises:
        InputError: the file is not GGUF, or not of the llama architecture.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError) as failure:
        raise InputError(f"{source} cannot be read as a GGUF file: {failure}.") from failure
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{source} holds the architecture {architecture!r}; only 'llama' can be converted.")
    quantized = {tensor.name: tensor for tensor in reader.tensors}
    config = llama_config(fields, tied="output.weight" not in quantized)
    _write_safetensors(folder / "model.safetensors", config, quantized)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    write_tokenizer(fields, folder, max_length=config["max_position_embeddings"])


def llama_config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The `config.json` of a llama model from GGUF metadata; `tied` says that the embedding is the output head."""
    num_heads = fields["llama.attention.head_count"]
    hidden_size = fields["llama.embedding_length"]
    rope_theta = _shortest(fields.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "head_dim": fields.get("llama.rope.dimension_count", hidden_size // num_heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        # Twice, because transformers 5 and vLLM read the second, mlx-lm and older readers the first.
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", fields["tokenizer.ggml.eos_token_id"]),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def llama_tensor_names(num_layers: int, *, tied: bool) -> Iterator[str]:
    """The names that transformers gives to the tensors of a llama model."""
    yield "model.embed_tokens.weight"
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        yield from (f"{prefix}.self_attn.{part}_proj.weight" for part in "qkvo")
        yield from (f"{prefix}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        yield from (f"{prefix}.{part}_layernorm.weight" for part in ("input", "post_attention"))
    yield "model.norm.weight"
    if not tied:
        yield "lm_head.weight"


def rotary_rows_to_halves(weight: Floats, num_heads: int) -> Floats:
    """Rows of a projection from GGUF's rotary order (pairs side by side) to transformers' (first halves, then second).

    Args:
        weight: (num_heads * head_dim, in_features).
        num_heads: query heads, or key heads, of the projection.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def dequantize_tensor(name: str, tensor: Any, config: dict[str, Any]) -> Floats:
    """One GGUF tensor in float32, in transformers' row order; `name` is transformers' name of it."""
    from gguf.quants import dequantize

    weight: Floats = dequantize(tensor.data, tensor.tensor_type)
    if name.endswith("q_proj.weight"):
        return rotary_rows_to_halves(weight, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return rotary_rows_to_halves(weight, config["num_key_value_heads"])
    return weight


def _write_safetensors(path: Path, config: dict[str, Any], quantized: dict[str, Any]) -> None:
    # One tensor at a time: the whole model never stands in memory.
    from gguf import MODEL_ARCH, GGMLQuantizationType
    from gguf.quants import quantize
    from gguf.tensor_mapping import get_tensor_name_map

    num_layers = config["num_hidden_layers"]
    gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, num_layers)
    names = list(llama_tensor_names(num_layers, tied=config["tie_word_embeddings"]))
    sources = [quantized[gguf_names.get_name(name, try_suffixes=(".weight",))] for name in names]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in zip(names, sources, strict=True):
        shape = [int(size) for size in reversed(tensor.shape)]
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header_bytes)) + header_bytes)
        for name, tensor in zip(names, sources, strict=True):
            weight = np.ascontiguousarray(dequantize_tensor(name, tensor, config))
            stream.write(quantize(weight, GGMLQuantizationType.BF16).tobytes())


def _shortest(value: float) -> float:
    # GGUF stores float32: 1e-05 must not become 9.999999747378752e-06 on its way to JSON.
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
