"""The adaptive controller: its moments against numpy, and its rules where they can be told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparkray.metis.decisions import DecisionRule, Moments
from sparkray.metis.labels import Decision, EpistemicState


def test_moments_of_a_sliding_window() -> None:
    """Mean, deviation and the bent quantile of the last 50 of 400 skewed values, recomputed from scratch each time."""
    values = np.random.default_rng(0).gamma(2.0, 1.0, 400)
    moments = Moments(50)
    for count, value in enumerate(values, start=1):
        moments.push(float(value))
        window = values[max(0, count - 50) : count]
        num = len(window)
        assert len(moments) == num
        assert moments.mean == pytest.approx(window.mean(), rel=1e-9)
        if num < 4:
            continue
        std = window.std()
        assert moments.std == pytest.approx(window.std(ddof=1), rel=1e-9)
        g1 = ((window - window.mean()) ** 3).mean() / std**3
        g2 = ((window - window.mean()) ** 4).mean() / std**4 - 3
        skewness = float(np.clip(g1 * math.sqrt(num * (num - 1)) / (num - 2), -2, 2))
        kurtosis = float(np.clip(((num + 1) * g2 + 6) * (num - 1) / ((num - 2) * (num - 3)), -2, 2))
        for z in (-0.5, 1.0, 2.0):
            bent = z + (z**2 - 1) * skewness / 6 + (z**3 - 3 * z) * kurtosis / 24
            assert moments.quantile_z(z) == pytest.approx(bent, abs=1e-6)


def test_moments_without_variation() -> None:
    moments = Moments(10)
    moments.push(2.0)
    assert (moments.mean, moments.std) == (2.0, 0.1)
    for _ in range(20):
        moments.push(2.0)
    assert moments.std == 0.01
    assert moments.quantile_z(1.0) == 1.0


def decide(entropies: list[float], confidences: list[float] | float = 0.9) -> list[Decision]:
    rule = DecisionRule()
    if isinstance(confidences, float):
        confidences = [confidences] * len(entropies)
    return [
        rule.step(entropy, confidence, 0.0).decision for entropy, confidence in zip(entropies, confidences, strict=True)
    ]


def test_a_hard_passage_is_deep_and_the_easy_text_before_it_is_not() -> None:
    rng = np.random.default_rng(1)
    easy = list(np.abs(rng.normal(1.0, 0.3, 100)))
    decisions = decide([*easy, *([6.0] * 6)])
    assert Decision.DEEP not in decisions[20:100]
    assert decisions[102:106] == [Decision.DEEP] * 4


def test_one_outlier_alone_is_not_deep() -> None:
    """It takes two signs of four; a single high token after a long calm is an outlier and nothing else."""
    rng = np.random.default_rng(2)
    calm = list(np.abs(rng.normal(1.0, 0.1, 200)))
    assert decide([*calm, 1.35])[-1] is Decision.NORMAL


def test_low_entropy_without_confidence_is_not_fast() -> None:
    rng = np.random.default_rng(3)
    entropies = [*np.abs(rng.normal(2.0, 0.5, 100)), 0.1]
    confidences = [*rng.uniform(0.4, 0.6, 100)]
    assert decide(entropies, [*confidences, 0.6])[-1] is Decision.FAST
    assert decide(entropies, [*confidences, 0.1])[-1] is Decision.NORMAL


def test_the_breaker_opens_on_nothing_but_fast_and_closes_again() -> None:
    """Nine cold FAST tokens are too short a history; from twenty on, more than 80 % FAST turns NORMAL for a while."""
    decisions = decide([0.1 + 0.001 * (step % 7) for step in range(200)])
    assert decisions[:9] == [Decision.FAST] * 9
    assert Decision.NORMAL in decisions[20:]
    assert Decision.FAST in decisions[100:], "a breaker that stays open says nothing any more"


def test_quantiles_bend_the_epistemic_bounds_after_thirty_tokens() -> None:
    """A right-skewed window moves the bound of UNKNOWN from 1.2 to the bent 2 sigma, never under 1.5."""
    rule = DecisionRule()
    rng = np.random.default_rng(4)
    states = [rule.step(float(value), 0.5, 1.3).epistemic_state for value in rng.gamma(1.0, 1.0, 60)]
    assert set(states[:29]) == {EpistemicState.UNKNOWN}
    assert EpistemicState.UNKNOWN not in states[29:]
