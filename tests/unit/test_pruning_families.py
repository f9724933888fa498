"""Every further family of the registry: watched without a token lost, cut as slicing its modules in memory cuts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_moe import CONTEXT, FAMILY_SETTINGS, NUM_EXPERTS, TOP_K, VOCAB, read_inputs, write_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from sparkray.config.pruning import CalibrationConfig, ObserveConfig, PlanConfig
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import FAMILIES
from sparkray.pruning.layered_model import LayeredModel
from sparkray.pruning.observation import ShardObserver
from sparkray.pruning.plan import make_plan
from sparkray.pruning.rewrite import rewrite

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "n_routed_experts": NUM_EXPERTS,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
_GROUPED = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": NUM_EXPERTS,
    "shared_expert_intermediate_size": 24,
}
_NUMBERED = {"num_experts": NUM_EXPERTS}
SETTINGS: dict[str, dict[str, Any]] = {
    "afmoe": {**_NUMBERED, "num_dense_layers": 1},
    "deepseek_v3": {**_LATENT, **_GROUPED},
    "deepseek_v32": {**_LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"], "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, **_GROUPED},
    "exaone_moe": _NUMBERED,
    "flex_olmo": _NUMBERED,
    "glm4_moe_lite": _LATENT,
    "hunyuan_v1_moe": {**_NUMBERED, "moe_topk": TOP_K},
    "jamba": {
        **_NUMBERED,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "lfm2_moe": {**_NUMBERED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "mimo_v2_flash": {"n_routed_experts": NUM_EXPERTS, "num_key_value_heads": 1},
    "minimax_m2": {"num_local_experts": NUM_EXPERTS},
    "olmoe": _NUMBERED,
    "phimoe": {"num_local_experts": NUM_EXPERTS},
    "qwen2_moe": {**_NUMBERED, "shared_expert_intermediate_size": 24},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "solar_open": {"n_routed_experts": NUM_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1},
}


def write_model(family: str, directory: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_COMMON, **SETTINGS[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("correction_bias", "expert_bias")):
                tensor.copy_(torch.rand_like(tensor) * 0.4)
            elif "experts" in name or "gate" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.15)
    model.save_pretrained(directory)


@torch.no_grad()
def logits_of(model: Any, inputs: Path) -> torch.Tensor:
    ids, mask = read_inputs(inputs)
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def sliced_state(model: Any, kept: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The model's tensors with the rows of cut experts taken out, wherever a sparse block has one row an expert."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, rest = name.partition("layers.")[2].partition(".")
        inside = rest.startswith(("mlp.", "feed_forward.", "block_sparse_moe.")) and "shared" not in rest
        rows = layer in kept and inside and tensor.shape[:1] == (NUM_EXPERTS,)
        state[name] = tensor[list(kept[layer])] if rows else tensor
    return state


def test_the_registry_has_no_family_without_a_test() -> None:
    assert set(FAMILIES) == {*FAMILY_SETTINGS, *SETTINGS, "llama4"}


@pytest.mark.parametrize("family", SETTINGS)
def test_a_family_of_the_same_contract(family: str, tmp_path: Path) -> None:
    write_model(family, tmp_path / "model")
    inputs = write_inputs(tmp_path / "inputs.json", num_batches=1)
    checkpoint, data = Checkpoint(tmp_path / "model"), read_calibration(inputs, CalibrationConfig())
    parts = ShardObserver(checkpoint, ObserveConfig(placement="streaming")).observe(data.shards(3))
    for sums in parts[0].values():
        fields = sums.to_json()
        assert fields["total_tokens"] == data.num_tokens
        assert sum(fields["expert_frequency"]) == TOP_K * data.num_tokens
        assert all(score > 0 for score, count in zip(fields["reap"], fields["expert_frequency"], strict=True) if count)

    plan = make_plan(checkpoint, parts, PlanConfig(ratio=0.25), data=data.identity)
    rewrite(checkpoint, plan, tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    found = logits_of(pruned, inputs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    before = logits_of(model, inputs)
    pruned.load_state_dict(sliced_state(model, plan.kept), strict=True)
    assert float((logits_of(pruned, inputs) - found).abs().max()) == 0.0
    assert float((found - before).abs().max()) > 1e-4
    layered = LayeredModel(Checkpoint(tmp_path / "pruned"), torch.float32)
    layered.load_layers(range(layered.num_layers))
    ids, mask = read_inputs(inputs)
    assert torch.equal(layered.run(ids, mask), found)
