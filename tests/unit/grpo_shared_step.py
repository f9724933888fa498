"""One step over fixed groups, for tests that make it on one rank and on several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tiny_llama import draw_groups, tiny_llama

from sparkray.config.grpo import GrpoConfig
from sparkray.grpo.optimizer import create_optimizer
from sparkray.grpo.policy import Policy
from sparkray.grpo.ranks import Ranks
from sparkray.grpo.step import StepReport, Trainee, train_step

NUM_GROUPS = 4
CANARY = tuple(range(3, 20))


def step_config(method: str) -> GrpoConfig:
    return GrpoConfig(
        dataset="d",
        output_dir="o",
        method=method,
        lora_rank=4,
        num_generations=4,
        max_completion_tokens=8,
        micro_batch_tokens=32,
        learning_rate=1e-2,
        loss={"name": "dapo"},
    )


def one_step(policy: Policy, numbers: Sequence[int], config: GrpoConfig, ranks: Ranks) -> StepReport:
    """The step of a rank that has these of the groups."""
    groups = draw_groups(tiny_llama(4), NUM_GROUPS, 4, seed=2)
    rewards = np.random.default_rng(1).random((NUM_GROUPS, 4))
    optimizer = create_optimizer(policy.parameters, config)
    trainee = Trainee(policy.scorer, optimizer, policy.parameters, policy.device)
    return train_step(trainee, [groups[n] for n in numbers], rewards[list(numbers)], config, ranks)
