"""Tiny random models as transformers writes them: llama (GGUF turns neighbours) and Qwen3-MoE (it does not)."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS = 512, 128, 3, 4, 2, 64, 256, 4


def write_tiny(folder: Path, kind: str, *, seed: int = 0, **config: Any) -> Path:
    """A model folder; `kind` is "llama" or "qwen3_moe". Other keys go into its configuration."""
    draw = np.random.default_rng(seed)

    def weight(*shape: int, size: float = 0.08) -> np.ndarray[Any, Any]:
        return (draw.standard_normal(shape) * size).astype(np.float32)

    def gain(width: int) -> np.ndarray[Any, Any]:
        return (1 + 0.2 * draw.standard_normal(width)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weight(VOCABULARY, HIDDEN, size=1.0),
        "lm_head.weight": weight(VOCABULARY, HIDDEN, size=0.3),
        "model.norm.weight": gain(HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": weight(HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": weight(KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_DIM),
            prefix + "input_layernorm.weight": gain(HIDDEN),
            prefix + "post_attention_layernorm.weight": gain(HIDDEN),
        }
        mlps = [f"{prefix}mlp."] if kind == "llama" else [f"{prefix}mlp.experts.{each}." for each in range(EXPERTS)]
        for mlp in mlps:
            tensors |= {
                mlp + "gate_proj.weight": weight(FFN, HIDDEN),
                mlp + "up_proj.weight": weight(FFN, HIDDEN),
                mlp + "down_proj.weight": weight(HIDDEN, FFN),
            }
        if kind == "qwen3_moe":
            tensors[prefix + "mlp.gate.weight"] = weight(EXPERTS, HIDDEN)
            tensors[prefix + "self_attn.q_norm.weight"] = gain(HEAD_DIM)
            tensors[prefix + "self_attn.k_norm.weight"] = gain(HEAD_DIM)
    theta = 100_000.0
    values = {
        "model_type": kind, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": FFN, "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": theta, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "attention_bias": False, "dtype": "float32",
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen3MoeForCausalLM"], "hidden_act": "silu",
    }  # fmt: skip
    if kind == "qwen3_moe":
        values |= {
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": FFN, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    header, offset = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))
