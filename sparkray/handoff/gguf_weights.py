"""A model folder as a GGUF file in float32 or bfloat16, so that llama.cpp computes with the very weights vLLM has.

The file carries what llama.cpp needs to run on token ids, and the tokenizer's hash for the fingerprint; text is made
elsewhere. Query and key rows of the llama family go into GGUF's rotary order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.handoff import KvDtypeName
from sparkray.errors import InputError
from sparkray.handoff.fingerprint import check_supported
from sparkray.handoff.model_files import TensorFolder, folder_tokenizer, read_config
from sparkray.handoff.rows import Floats, from_float32
from sparkray.models.cache import cache_root, ensure_folder

# transformers' model type -> GGUF's architecture, and whether its rotary pairs are neighbours there.
GGUF_ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3_moe": ("qwen3moe", False),
}
TOKENIZER_KEY = "sparkray.tokenizer"
_FILE = "model.gguf"
# Part of the cache folder's name: raise it when what is written changes.
_FORM = 1

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def prepare_gguf(folder: Path, dtype: KvDtypeName) -> Path:
    """The GGUF file of a model folder, made once and kept in the cache.

    Raises:
        InputError: a type other than float32 and bfloat16, or a tensor that has no place in GGUF.
        ProtocolError: the architecture cannot be handed off.
    """
    if dtype == "float16":
        raise InputError("a GGUF file in float16 was asked for; float32 and bfloat16 keep bfloat16 weights exactly.")
    target = cache_root() / "models" / f"{folder.name}-{dtype}-gguf{_FORM}"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{folder} holds no .safetensors file to make a GGUF file from.")
    return ensure_folder(target, weights[0], lambda empty: write_gguf(folder, empty / _FILE, dtype)) / _FILE


def write_gguf(folder: Path, path: Path, dtype: KvDtypeName) -> None:
    """Write the file; norms and biases stay in float32, as llama.cpp wants them."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = read_config(folder)
    check_supported(config)
    architecture, pairs_adjacent = GGUF_ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, architecture)
    _write_metadata(writer, config, folder)
    for name, array in _tensors(folder, config, pairs_adjacent):
        if array.ndim == 1 or dtype == "float32":
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, from_float32(array, dtype).view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: Any, config: dict[str, Any], folder: Path) -> None:
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise InputError("rotary scaling is not written to GGUF here; convert the model with llama.cpp's own script.")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.get("rope_theta") or scaling["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_string(TOKENIZER_KEY, folder_tokenizer(folder))


def _tensors(folder: Path, config: dict[str, Any], pairs_adjacent: bool) -> Iterator[tuple[str, Floats]]:
    num_heads = config["num_attention_heads"]
    heads = {"q_proj": num_heads, "k_proj": config.get("num_key_value_heads") or num_heads}
    held = TensorFolder(folder)
    yield "token_embd.weight", held("model.embed_tokens.weight")
    yield "output_norm.weight", held("model.norm.weight")
    if not config.get("tie_word_embeddings", False):
        yield "output.weight", held("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, ours in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                name = f"{prefix}{theirs}.{kind}"
                if name not in held.names:
                    continue
                array = held(name)
                projection = theirs.rpartition(".")[2]
                if pairs_adjacent and projection in heads:
                    array = _rows_to_pairs(array, heads[projection])
                yield f"blk.{layer}.{ours}.{kind}", array
        if f"{prefix}mlp.experts.0.gate_proj.weight" not in held.names:
            continue
        for theirs, ours in _EXPERT_NAMES.items():
            experts = range(config["num_experts"])
            stacked = np.stack([held(f"{prefix}mlp.experts.{expert}.{theirs}.weight") for expert in experts])
            yield f"blk.{layer}.{ours}.weight", stacked


def _rows_to_pairs(array: Floats, num_heads: int) -> Floats:
    """Rows of a projection from halves to neighbouring pairs, head by head."""
    halves = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
