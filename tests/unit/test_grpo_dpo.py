"""Pairs by hand, and TRL's trainer on them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InputError
from sparkray.grpo.dpo import preference_pairs, train_on_pairs, write_pairs
from sparkray.grpo.rewards import Score
from sparkray.grpo.rollouts import Rollout, RolloutGroup


def group(row: int, *texts: str) -> RolloutGroup:
    rollouts = tuple(Rollout((1,), text, np.zeros(1, np.float32), "stop", 0) for text in texts)
    return RolloutGroup(row, (1,), rollouts, {"prompt": f"question {row}"})


def test_the_best_and_the_worst_are_paired() -> None:
    groups = [group(0, "a", "b", "c"), group(1, "same", "same"), group(2, "x", "broken", "y")]
    rewards = [[0.2, 1.0, -1.0], [0.5, 0.5], [1.0, math.nan, 0.0]]
    pairs = preference_pairs(groups, [[Score(value) for value in row] for row in rewards])
    assert pairs == [
        {"prompt": "question 0", "chosen": "b", "rejected": "c", "margin": 2.0},
        {"prompt": "question 2", "chosen": "x", "rejected": "y", "margin": 1.0},
    ]


def test_nothing_to_prefer_is_said_so() -> None:
    with pytest.raises(InputError, match="none of 1 groups"):
        preference_pairs([group(0, "a", "b")], [[Score(1.0), Score(1.0)]])


def test_trls_trainer_learns_the_preference(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sparkray.models import prepare_model

    tokenizer = AutoTokenizer.from_pretrained(str(prepare_model("embedded")))
    model_path = tmp_path / "model"
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(small).save_pretrained(str(model_path))
    tokenizer.save_pretrained(str(model_path))
    pairs = tmp_path / "pairs.jsonl"
    write_pairs([{"prompt": f"word {n}:", "chosen": " yes", "rejected": " no", "margin": 1.0} for n in range(8)], pairs)
    config = GrpoConfig(
        dataset="d", output_dir="o", algorithm="dpo", prompts_per_step=4, max_steps=12, learning_rate=2e-2
    )
    log = train_on_pairs(model_path, pairs, config, tmp_path / "adapter", on_cpu=True)
    assert len(log) == 12
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert log[-1]["loss"] < 0.66
    assert log[-1]["rewards/accuracies"] == 1.0
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 16
