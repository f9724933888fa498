"""Comparing the completions of a prompt with each other.

- `group`: (reward - mean) / (standard deviation + 1e-4), as GRPO has it (DeepSeekMath, 2402.03300).
- `dr_grpo`: reward - mean; no division, so hard and easy prompts are not blown up (Dr. GRPO, 2503.20783).
- `leave_one_out`: reward - mean of the others (RLOO, 2402.14740).

A group whose rewards are all the same says nothing: its advantages are zero whatever the method, so it is dropped
and its share is reported. A reward that is NaN costs its sample: the others are compared without it.

Shapes: P prompts, G completions of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparkray.config.grpo import AdvantageName
from sparkray.errors import InputError

_LEAST_DEVIATION = 1e-4
_SAME = 1e-8

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """What each completion is worth beside the others of its group.

    Attributes:
        values_PG: 0 where a sample or its group does not count.
        used_PG: whether a sample is trained on.
        num_zero_variance: groups dropped because all their rewards are the same.
        num_unscored: groups dropped because fewer than two of their samples have a reward.
    """

    values_PG: FloatArray
    used_PG: NDArray[np.bool_]
    num_zero_variance: int
    num_unscored: int

    @property
    def zero_variance_share(self) -> float:
        """Of all groups."""
        return self.num_zero_variance / max(1, len(self.values_PG))


def group_advantages(rewards_PG: FloatArray, method: AdvantageName) -> Advantages:
    """The advantages of P groups.

    Args:
        rewards_PG: NaN where a reward could not be had.
        method: see the top of this file; deviations are those of a sample (divided by n - 1).

    Raises:
        InputError: not two-dimensional, or groups of one.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise InputError(
            f"rewards of shape {rewards_PG.shape} were given, and [prompts, completions] with at least two "
            "completions is expected: a completion can only be compared with others."
        )
    values_PG = np.zeros(rewards_PG.shape)
    used_PG = np.zeros(rewards_PG.shape, dtype=bool)
    num_zero_variance = num_unscored = 0
    for group, rewards_G in enumerate(rewards_PG):
        scored_G = np.isfinite(rewards_G)
        rewards = rewards_G[scored_G]
        if rewards.size < 2:
            num_unscored += 1
        elif rewards.max() - rewards.min() <= _SAME * max(1.0, float(np.abs(rewards).max())):
            num_zero_variance += 1
        else:
            values_PG[group, scored_G] = _compare(rewards, method)
            used_PG[group] = scored_G
    return Advantages(values_PG, used_PG, num_zero_variance, num_unscored)


def shuffled(advantages: Advantages, seed: int) -> Advantages:
    """The same advantages dealt out anew among all samples that count: a control that has no signal to learn from."""
    values_PG = advantages.values_PG.copy()
    values_PG[advantages.used_PG] = np.random.default_rng(seed).permutation(values_PG[advantages.used_PG])
    return Advantages(values_PG, advantages.used_PG, advantages.num_zero_variance, advantages.num_unscored)


def _compare(rewards: FloatArray, method: AdvantageName) -> FloatArray:
    centred: FloatArray = rewards - rewards.mean()
    if method == "group":
        return centred / (float(rewards.std(ddof=1)) + _LEAST_DEVIATION)
    if method == "leave_one_out":
        return centred * rewards.size / (rewards.size - 1)
    return centred
