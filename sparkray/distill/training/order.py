"""Which sequences a step sees, and the rate it learns at: functions of the step alone, so a resumed run goes on."""

from __future__ import annotations

import math

import numpy as np

from sparkray.config.distill import TrainConfig


def batch_of_step(step: int, num_sequences: int, config: TrainConfig) -> list[int]:
    """Numbers of the sequences of one step (counted from 0), whatever the number of workers.

    Every epoch has an order of its own, drawn from the seed; a batch may span two epochs.
    """
    first = step * config.batch_sequences
    numbers = []
    for place in range(first, first + config.batch_sequences):
        epoch, index = divmod(place, num_sequences)
        numbers.append(int(epoch_order(epoch, num_sequences, config.seed)[index]))
    return numbers


def epoch_order(epoch: int, num_sequences: int, seed: int) -> np.ndarray:
    """The order of all sequences in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def share_of_rank(numbers: list[int], rank: int, world_size: int) -> list[int]:
    """A worker's part of a batch; parts differ by one sequence at most."""
    return numbers[rank::world_size]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of a step (counted from 0): linear warm-up, then a cosine down to `min_rate_share`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    share = config.min_rate_share + (1 - config.min_rate_share) * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * share
