"""Finite-sample bounds: how sure a rate measured on few questions is.

`LossTest`s give a p-value for "the mean loss is above alpha"; `learn_then_test` walks a family of rules from careful
to bold and keeps the boldest that all of them reject (Angelopoulos et al., arXiv 2110.01052).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Losses = NDArray[np.float64]
"""One loss in [0, 1] a question, exchangeable."""

LossTest = Callable[[Losses, float], float]
"""(losses, alpha) -> p-value of "mean loss > alpha"."""


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_cdf(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1.0 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = value
        for term in (even, odd):
            d = 1.0 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            value *= c * d
        if abs(value - before) < 1e-15 * abs(value):
            break
    return front * value / a


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k)."""
    if k < 0:
        return 0.0
    return 1.0 if k >= n else beta_cdf(1 - p, n - k, k + 1)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a rate of which `k` of `n` trials are known."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else _bisect(lambda p: 1 - binomial_cdf(k - 1, n, p), tail)
    high = 1.0 if k == n else _bisect(lambda p: 1 - binomial_cdf(k, n, p), 1 - tail)
    return low, high


def hoeffding_bentkus(losses: Losses, alpha: float) -> float:
    """The smaller of Hoeffding's and Bentkus's p-value (Bates et al., arXiv 2101.02703)."""
    n, mean = len(losses), float(np.mean(losses)) if len(losses) else 1.0
    if n == 0 or mean >= alpha:
        return 1.0
    hoeffding = math.exp(-n * _bernoulli_divergence(mean, alpha))
    bentkus = math.e * binomial_cdf(math.ceil(n * mean - 1e-9), n, alpha)
    return min(1.0, hoeffding, bentkus)


def betting(losses: Losses, alpha: float) -> float:
    """The p-value of a bet against "mean loss > alpha" (Waudby-Smith and Ramdas, arXiv 2010.09686).

    The wealth of a gambler who bets on every loss being below alpha, with stakes chosen from the losses before it, is
    a supermartingale if the mean is above alpha; by Ville's inequality 1 / (its maximum) is a p-value. It is sharper
    than Hoeffding-Bentkus where losses vary little. The losses must be in random order.
    """
    wealth, best, total, squares = 1.0, 1.0, 0.5, 0.25
    for number, loss in enumerate(losses, start=1):
        variance = squares / number
        stake = min(0.9 / (1 - alpha), math.sqrt(2 * math.log(10) / (variance * len(losses))))
        wealth *= 1 - stake * (float(loss) - alpha)
        best = max(best, wealth)
        total += float(loss)
        squares += (float(loss) - total / (number + 1)) ** 2
    return 1 / best


def learn_then_test(
    losses_of: Callable[[float], Losses],
    candidates: Sequence[float],
    alpha: float,
    delta: float,
    test: LossTest = betting,
) -> float | None:
    """The boldest candidate whose mean loss is at most `alpha`, with confidence 1 - `delta`; None if none is.

    Args:
        losses_of: the losses of the rule with a given parameter on the calibration questions.
        candidates: parameters from the most careful to the boldest. They are tested in this order until one fails
            (fixed-sequence testing), so that no correction for their number is needed; the order must not come from
            the calibration questions.
    """
    chosen = None
    for candidate in candidates:
        if test(losses_of(candidate), alpha) > delta:
            break
        chosen = candidate
    return chosen


def conformal_risk(losses_of: Callable[[float], Losses], candidates: Sequence[float], alpha: float) -> float | None:
    """The boldest candidate whose expected loss on a new question is at most `alpha` (arXiv 2208.02814).

    Losses must rise from candidate to candidate. The promise holds on average over calibrations, not for this one
    with high confidence as `learn_then_test` gives; it prunes more.
    """
    chosen = None
    for candidate in candidates:
        losses = losses_of(candidate)
        if (float(losses.sum()) + 1) / (len(losses) + 1) > alpha:
            break
        chosen = candidate
    return chosen


def _bernoulli_divergence(p: float, q: float) -> float:
    left = p * math.log(p / q) if p > 0 else 0.0
    return left + (1 - p) * math.log((1 - p) / (1 - q))


def _bisect(rising: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


def _away_from_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
