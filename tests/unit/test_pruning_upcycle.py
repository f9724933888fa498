"""A mixture made of a dense model: without noise it answers as the dense one does, and so does what a prune leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_moe import write_inputs, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from sparkray.config.pruning import CalibrationConfig, ObserveConfig, PlanConfig
from sparkray.errors import InputError, UsageError
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.observation import ShardObserver
from sparkray.pruning.plan import make_plan
from sparkray.pruning.rewrite import rewrite
from sparkray.pruning.upcycle import upcycle


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    return tmp_path / "dense"


def logits(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).reshape(2, 20)).logits


def test_a_mixture_of_copies_answers_as_the_dense_model(dense: Path, tmp_path: Path) -> None:
    num_bytes = upcycle(dense, tmp_path / "moe", num_experts=4, noise=0.0)
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), atol=1e-5, rtol=1e-4)
    assert (tmp_path / "moe" / "tokenizer.json").is_file()
    checkpoint = Checkpoint(tmp_path / "moe")
    assert num_bytes == sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    data = read_calibration(write_inputs(tmp_path / "inputs.json"), CalibrationConfig())
    parts = ShardObserver(checkpoint, ObserveConfig(placement="resident")).observe(data.shards(6))
    plan = make_plan(checkpoint, parts, PlanConfig(ratio=0.25), data=data.identity)
    rewrite(checkpoint, plan, tmp_path / "pruned")
    torch.testing.assert_close(logits(tmp_path / "pruned"), logits(dense), atol=1e-5, rtol=1e-4)


def test_noise_makes_experts_differ(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", noise=0.05)
    moved = (logits(tmp_path / "moe") - logits(dense)).abs().max()
    assert 1e-5 < float(moved) < 1.0


def test_other_models_and_an_existing_output_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no Llama model"):
        upcycle(write_tiny(tmp_path / "moe", "qwen3_moe"), tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        upcycle(dense, dense)
    assert json.loads((dense / "config.json").read_text())["model_type"] == "llama"
