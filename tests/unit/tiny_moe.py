"""Tiny checkpoints of seven families, and their saliencies recomputed in float64 by hand.

The reference takes each sparse block's input from a float64 forward that knows nothing of the observer, and re-states
routing and expert maths with explicit loops over tokens and experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

NUM_EXPERTS = 8
TOP_K = 2
VOCAB = 96
CONTEXT = 128

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "num_experts_per_tok": TOP_K,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": NUM_EXPERTS, "sliding_window": None},
    "gpt_oss": {
        "num_local_experts": NUM_EXPERTS,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama4_text": {
        "num_local_experts": NUM_EXPERTS,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
    },
    "deepseek_v2": {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_shared_experts": 1,
        "head_dim": 8,
    },
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": TOP_K,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
    },
    "glm4_moe": {
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 2,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.0,
    },
}
FAMILIES = tuple(FAMILY_SETTINGS)


def tiny_model(family: str, seed: int = 0, **changed: Any) -> Any:
    """A randomly initialised float32 model whose routers, biases and norms all matter."""
    settings = {**_COMMON, **FAMILY_SETTINGS[family], **changed}
    if family == "ernie4_5_moe":
        del settings["num_experts_per_tok"]
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                tensor.copy_(torch.rand_like(tensor) * 0.4)
            elif "inv_freq" in name:
                continue
            elif "norm" in name:
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) * 0.15)
    return model


def write_tiny(directory: Path, family: str, seed: int = 0, **changed: Any) -> Path:
    """The tiny model as transformers writes it, in the layout of the family's real checkpoints."""
    save_options = {key: changed.pop(key) for key in ("max_shard_size",) if key in changed}
    tiny_model(family, seed, **changed).save_pretrained(directory, **save_options)
    return directory


def write_inputs(path: Path, num_batches: int = 2, batch: int = 3, length: int = 20, seed: int = 1) -> Path:
    """Random ids in [batches, rows, tokens] with padding at the end of every second row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (num_batches, batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 1, length - 7 :] = 0
    path.write_text(json.dumps({"input_ids": ids.tolist(), "attention_mask": mask.tolist()}))
    return path


def read_inputs(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    data = json.loads(path.read_text())
    ids, mask = torch.tensor(data["input_ids"]), torch.tensor(data["attention_mask"])
    return ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1])


@torch.no_grad()
def reference_saliency(directory: Path, inputs: Path, gates: str = "model", renormalize: bool = True) -> dict[str, Any]:
    """Layer id -> the fields of the saliency schema, in float64, one token and one expert at a time."""
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager" if config.model_type != "llama4_text" else None
    ).eval()
    captured: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
        if hasattr(block, "experts"):
            block.register_forward_pre_hook(
                lambda _module, args, number=number: captured.__setitem__(str(number), args[0].detach())
            )
    ids, mask = read_inputs(inputs)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    valid = mask.reshape(-1).bool()
    layers = {}
    for number, hidden in captured.items():
        layer = model.model.layers[int(number)]
        block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])[valid]
        layers[number] = _layer_fields(config, block, hidden_TH, gates, renormalize)
    return layers


def _layer_fields(config: Any, block: Any, hidden_TH: torch.Tensor, gates: str, renormalize: bool) -> dict[str, Any]:
    names = [
        "expert_frequency",
        "ean_sum",
        "ean_sumsq",
        "weighted_ean_sum",
        "weighted_ean_sumsq",
        "weighted_expert_frequency_sum",
        "contrib_sum",
        "max_activations_signed",
        "max_abs_activation",
    ]
    fields = {name: [0.0] * NUM_EXPERTS for name in names}
    for hidden_H in hidden_TH:
        for expert, gate in _route(config, block, hidden_H, gates, renormalize):
            output = _expert(config, block.experts, expert, hidden_H)
            norm = float(torch.sqrt((output * output).sum()))
            added = output * gate
            if config.model_type == "llama4_text" and gates == "model":
                added = _expert(config, block.experts, expert, hidden_H * gate)
            for name, value in (
                ("expert_frequency", 1.0),
                ("ean_sum", norm),
                ("ean_sumsq", norm**2),
                ("weighted_ean_sum", gate * norm),
                ("weighted_ean_sumsq", (gate * norm) ** 2),
                ("weighted_expert_frequency_sum", gate),
                ("contrib_sum", float(torch.sqrt((added * added).sum()))),
            ):
                fields[name][expert] += value
            fields["max_activations_signed"][expert] = max(
                fields["max_activations_signed"][expert], float(output.max())
            )
            fields["max_abs_activation"][expert] = max(fields["max_abs_activation"][expert], float(output.abs().max()))
    count = [max(value, 1.0) for value in fields["expert_frequency"]]

    def mean(name: str) -> list[float]:
        return [value / number for value, number in zip(fields[name], count, strict=True)]

    return fields | {
        "total_tokens": len(hidden_TH),
        "ean_mean": mean("ean_sum"),
        "reap": mean("weighted_ean_sum"),
        "reap_contrib": mean("contrib_sum"),
        "reap_l2": [value**0.5 for value in mean("weighted_ean_sumsq")],
        "msan": mean("ean_sumsq"),
    }


def _route(config: Any, block: Any, hidden_H: torch.Tensor, gates: str, renormalize: bool) -> list[tuple[int, float]]:
    router = block.gate if hasattr(block, "gate") else block.router
    logits = router.weight.double() @ hidden_H
    if getattr(router, "bias", None) is not None:
        logits = logits + router.bias
    if gates == "upstream":
        chosen = logits.topk(TOP_K).indices.tolist()
        weights = logits.softmax(-1)[chosen]
        weights = weights / weights.sum() if renormalize else weights
        return list(zip(chosen, weights.tolist(), strict=True))
    family = config.model_type
    if family == "gpt_oss":
        chosen = logits.topk(TOP_K).indices.tolist()
        return list(zip(chosen, logits[chosen].softmax(-1).tolist(), strict=True))
    if family == "llama4_text":
        chosen = logits.topk(TOP_K).indices.tolist()
        return list(zip(chosen, logits[chosen].sigmoid().tolist(), strict=True))
    scores = logits.sigmoid() if family == "glm4_moe" else logits.softmax(-1)
    choice = scores.clone()
    if family == "glm4_moe":
        choice = choice + router.e_score_correction_bias
        per_group = choice.view(config.n_group, -1).topk(2).values.sum(-1)
    elif family == "ernie4_5_moe":
        choice = choice + router.moe_statics.e_score_correction_bias.squeeze()
    elif family == "deepseek_v2":
        per_group = choice.view(config.n_group, -1).max(-1).values
    if family in ("glm4_moe", "deepseek_v2"):
        open_groups = per_group.topk(config.topk_group).indices.tolist()
        size = NUM_EXPERTS // config.n_group
        for expert in range(NUM_EXPERTS):
            if expert // size not in open_groups:
                choice[expert] = -1.0
    chosen = choice.topk(TOP_K).indices.tolist()
    weights = scores[chosen]
    if family in ("mixtral", "ernie4_5_moe") or (family != "deepseek_v2" and config.norm_topk_prob):
        weights = weights / weights.sum()
    if family in ("glm4_moe", "deepseek_v2"):
        weights = weights * config.routed_scaling_factor
    return list(zip(chosen, weights.tolist(), strict=True))


def _expert(config: Any, experts: Any, expert: int, hidden_H: torch.Tensor) -> torch.Tensor:
    first, last = experts.gate_up_proj[expert], experts.down_proj[expert]
    if config.model_type == "gpt_oss":
        inner = hidden_H @ first + experts.gate_up_proj_bias[expert]
        gate, up = inner[0::2].clamp(max=7.0), inner[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ last + experts.down_proj_bias[expert]
    inner = hidden_H @ first if config.model_type == "llama4_text" else first @ hidden_H
    gate, up = inner.chunk(2)
    middle = up * gate * torch.sigmoid(gate)
    return middle @ last if config.model_type == "llama4_text" else last @ middle
