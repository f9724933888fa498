"""Bounds against numbers computed by hand and by enumeration."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.search.bounds import (
    beta_cdf,
    betting,
    binomial_cdf,
    clopper_pearson,
    conformal_risk,
    hoeffding_bentkus,
    learn_then_test,
)


@given(st.integers(1, 40), st.data())
def test_binomial_cdf_is_the_sum(n: int, data: st.DataObject) -> None:
    k, p = data.draw(st.integers(0, n)), Fraction(data.draw(st.integers(1, 99)), 100)
    exact = sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k + 1))
    assert binomial_cdf(k, n, float(p)) == pytest.approx(float(exact), abs=1e-10)


def test_beta_cdf_by_hand() -> None:
    assert beta_cdf(0.5, 1, 1) == pytest.approx(0.5)
    assert beta_cdf(0.25, 2, 1) == pytest.approx(0.0625)
    assert beta_cdf(0.25, 1, 2) == pytest.approx(1 - 0.75**2)
    assert (beta_cdf(0, 2, 2), beta_cdf(1, 2, 2)) == (0.0, 1.0)


def test_clopper_pearson_by_hand() -> None:
    # No success in n: the upper end solves (1 - p)^n = 0.025; all: the lower end solves p^n = 0.025.
    assert clopper_pearson(0, 30) == pytest.approx((0, 1 - 0.025 ** (1 / 30)))
    assert clopper_pearson(30, 30) == pytest.approx((0.025 ** (1 / 30), 1))
    # The value that tables give for 8 of 20.
    assert clopper_pearson(8, 20) == pytest.approx((0.1912, 0.6395), abs=1e-4)
    assert clopper_pearson(0, 0) == (0, 1)


def test_hoeffding_bentkus_of_no_loss() -> None:
    # Hoeffding: exp(-n ln(1/(1-alpha))) = (1-alpha)^n, below Bentkus's e (1-alpha)^n.
    assert hoeffding_bentkus(np.zeros(50), 0.05) == pytest.approx(0.95**50)
    assert hoeffding_bentkus(np.full(50, 0.06), 0.05) == 1.0
    assert hoeffding_bentkus(np.zeros(0), 0.05) == 1.0


@pytest.mark.parametrize("test", [hoeffding_bentkus, betting])
def test_p_values_are_valid(test: object) -> None:
    # At the edge of the hypothesis, mean = alpha, at most delta of the p-values may be below delta.
    draw = np.random.default_rng(0)
    for make in (
        lambda: (draw.random(80) < 0.1).astype(float),
        lambda: draw.uniform(0, 0.2, 80),
        lambda: draw.beta(0.1, 0.9, 80),
    ):
        small = sum(test(make(), 0.1) <= 0.1 for _ in range(400))  # type: ignore[operator]
        # 40 expected at most; 58 is three standard deviations above.
        assert small <= 58


def test_learn_then_test_walks_until_the_first_failure() -> None:
    # Mean losses 0, 0, 0.3, 0: the last is not reached.
    losses = {0.1: 0.0, 0.2: 0.0, 0.3: 0.3, 0.4: 0.0}
    chosen = learn_then_test(lambda level: np.full(100, losses[level]), list(losses), alpha=0.1, delta=0.1)
    assert chosen == 0.2
    # (1 - 0.1)^20 = 0.12 > 0.1 and (1 - 0.1)^22 = 0.098: this many questions without loss are needed.
    for count, expected in ((20, None), (22, 1.0)):
        assert learn_then_test(lambda _, n=count: np.zeros(n), [1.0], 0.1, 0.1, hoeffding_bentkus) == expected


def test_conformal_risk_by_hand() -> None:
    # (sum + 1) / (n + 1) <= alpha: with n = 19 and alpha = 0.1 a sum of 1 fits exactly and 1.1 does not.
    losses = {1.0: 0.5 / 19, 2.0: 1.0 / 19, 3.0: 1.1 / 19}
    assert conformal_risk(lambda level: np.full(19, losses[level]), list(losses), 0.1 + 1e-12) == 2.0
    assert conformal_risk(lambda _: np.zeros(8), [1.0], 0.1) is None
