"""AdamW over what is trained, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from sparkray.config.grpo import GrpoConfig


def create_optimizer(parameters: Sequence[nn.Parameter], config: GrpoConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases) do not."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: GrpoConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of each step, from 0 to `num_steps` - 1."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, config, num_steps))


def rate_share(step: int, config: GrpoConfig, num_steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return max(0.0, 1.0 - done) if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
