"""The real vLLM loads and answers pruned checkpoints of seven families, and agrees with transformers on them.

On vLLM's CPU build deepseek_v2 (attention) and ernie4_5_moe with a correction bias are computed wrongly whether they
are pruned or not: they must load and answer, and their numbers are held to transformers.
"""

from __future__ import annotations

import gc
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparkray.config.pruning import CalibrationConfig, ObserveConfig, PlanConfig, ValidateConfig
from sparkray.pruning.calibration import CalibrationSet, read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.observation import ShardObserver
from sparkray.pruning.plan import make_plan
from sparkray.pruning.rewrite import rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from tiny_moe import FAMILIES, write_inputs, write_tiny

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

WRONG_IN_VLLM = {"deepseek_v2", "ernie4_5_moe"}
# What vLLM's kernels want of a tiny model: heads of 32 and more, chunks of attention that are whole blocks, one expert
# a token where the gate multiplies the input, the real latent sizes of DeepSeek, and yarn's fields in gpt-oss.
CHANGED: dict[str, dict[str, Any]] = {
    "llama4_text": {"attention_chunk_size": 128, "num_experts_per_tok": 1},
    "deepseek_v2": {
        "head_dim": 64,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
    "gpt_oss": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
}


@pytest.fixture(autouse=True)
def _engine_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process for all engines: half a minute of imports is paid once."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pruned(family: str, folder: Path) -> tuple[Checkpoint, Checkpoint, CalibrationSet]:
    directory = write_tiny(folder / "model", family, **{"head_dim": 32, **CHANGED.get(family, {})})
    before = Checkpoint(directory)
    data = read_calibration(write_inputs(folder / "inputs.json"), CalibrationConfig())
    parts = ShardObserver(before, ObserveConfig(placement="resident")).observe(data.shards(3))
    plan = make_plan(before, parts, PlanConfig(ratio=0.25), data=data.identity)
    rewrite(before, plan, folder / "pruned")
    return before, Checkpoint(folder / "pruned"), data


@torch.no_grad()
def log_likelihoods(checkpoint: Checkpoint, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of the places after the first, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_loads_and_answers_a_pruned_model(family: str, tmp_path: Path) -> None:
    from sparkray.pruning.vllm_compare import prompt_logprobs

    _, after, data = pruned(family, tmp_path)
    config = ValidateConfig(dtype="float32", vllm_top_logprobs=96)
    found = prompt_logprobs(after, data.sequences, config)
    gc.collect()
    assert len(found) == len(data.sequences)
    for sequence, top in zip(data.sequences, found, strict=True):
        assert top.ids_NK[:, 0].tolist() == list(sequence.ids[1:])
        assert np.isfinite(top.logprobs_NK).all()
        if family in WRONG_IN_VLLM:
            continue
        expected = log_likelihoods(after, sequence.ids)
        for place in range(len(top.ids_NK)):
            np.testing.assert_allclose(
                top.logprobs_NK[place, :-1], expected[place, top.ids_NK[place, :-1]].numpy(), atol=2e-4
            )


def test_a_comparison_by_vllm_equals_that_by_transformers(tmp_path: Path) -> None:
    from sparkray.pruning.validate import compare
    from sparkray.pruning.vllm_compare import compare_by_vllm

    before, after, data = pruned("qwen3_moe", tmp_path)
    config = ValidateConfig(dtype="float32", vllm_top_logprobs=96)
    by_vllm, by_transformers = compare_by_vllm(before, after, data, config), compare(before, after, data, config)
    assert (by_vllm.engine, by_vllm.note, by_vllm.num_tokens) == ("vllm", None, by_transformers.num_tokens)
    for name in ("perplexity_before", "perplexity_after", "token_kl"):
        assert getattr(by_vllm, name) == pytest.approx(getattr(by_transformers, name), rel=1e-3), name
    assert by_vllm.top1_agreement == by_transformers.top1_agreement
    assert math.isfinite(by_vllm.perplexity_ratio)


def test_a_family_that_vllm_computes_wrongly_is_compared_by_transformers(tmp_path: Path) -> None:
    from sparkray.pruning.vllm_compare import compare_by_vllm

    before, after, data = pruned("ernie4_5_moe", tmp_path)
    found = compare_by_vllm(before, after, data, ValidateConfig(dtype="float32"))
    assert found.engine == "transformers"
    assert found.note is not None and "e_score_correction_bias" in found.note
