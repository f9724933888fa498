"""Advantages by hand, and groups that say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparkray.errors import InputError
from sparkray.grpo.advantages import group_advantages, shuffled

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])


def test_group_normalised_by_hand() -> None:
    found = group_advantages(REWARDS, "group")
    first = 0.5 / (math.sqrt(4 * 0.25 / 3) + 1e-4)
    np.testing.assert_allclose(found.values_PG[0], [first, -first, -first, first])
    np.testing.assert_allclose(found.values_PG[1], np.array([1.5, -0.5, -0.5, -0.5]) / (1.0 + 1e-4))


def test_dr_grpo_and_leave_one_out_by_hand() -> None:
    np.testing.assert_allclose(group_advantages(REWARDS, "dr_grpo").values_PG[1], [1.5, -0.5, -0.5, -0.5])
    # 3 against the mean of 1, 1, 1; 1 against the mean of 3, 1, 1.
    np.testing.assert_allclose(group_advantages(REWARDS, "leave_one_out").values_PG[1], [2, -2 / 3, -2 / 3, -2 / 3])


@pytest.mark.parametrize("method", ["group", "dr_grpo", "leave_one_out"])
def test_equal_rewards_are_dropped_and_their_share_reported(method: str) -> None:
    found = group_advantages(np.array([[0.5] * 3, [0.0, 0.0, 1.0], [0.0] * 3, [2.0, 1.0, 0.0]]), method)
    assert found.num_zero_variance == 2
    assert found.zero_variance_share == 0.5
    assert found.used_PG.any(axis=1).tolist() == [False, True, False, True]
    assert not found.values_PG[[0, 2]].any()


def test_a_reward_that_is_nan_costs_its_sample() -> None:
    found = group_advantages(np.array([[1.0, np.nan, 0.0, 0.5], [np.nan, np.nan, 1.0, np.nan]]), "dr_grpo")
    np.testing.assert_allclose(found.values_PG[0], [0.5, 0.0, -0.5, 0.0])
    assert found.used_PG.tolist() == [[True, False, True, True], [False] * 4]
    assert found.num_unscored == 1
    assert found.num_zero_variance == 0


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(InputError, match="at least two completions"):
        group_advantages(np.ones((3, 1)), "group")


def test_shuffled_keeps_the_values_and_loses_their_places() -> None:
    found = group_advantages(np.random.default_rng(0).random((8, 8)), "group")
    dealt = shuffled(found, seed=1)
    assert sorted(dealt.values_PG.ravel()) == sorted(found.values_PG.ravel())
    assert abs(np.corrcoef(dealt.values_PG.ravel(), found.values_PG.ravel())[0, 1]) < 0.3


@given(
    rewards=hnp.arrays(np.float64, (3, 5), elements=st.floats(-10, 10, width=32)),
    method=st.sampled_from(["group", "dr_grpo", "leave_one_out"]),
)
def test_advantages_add_to_zero_and_keep_the_order(rewards: np.ndarray, method: str) -> None:
    found = group_advantages(rewards, method)
    np.testing.assert_allclose(found.values_PG.sum(axis=1), 0, atol=1e-9)
    for values, given_rewards, used in zip(found.values_PG, rewards, found.used_PG, strict=True):
        if used.all():
            assert (np.diff(values[np.argsort(given_rewards, kind="stable")]) >= -1e-12).all()
