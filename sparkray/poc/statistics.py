"""The numbers behind a verdict: the binomial fraud test, the law of distances, and Wald's sequential test."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

P_MISMATCH = 5e-4


def binomial_tail(num_hits: int, num_trials: int, probability: float) -> float:
    """P(X >= num_hits) for X ~ Binomial(num_trials, probability); relative error about 1e-12."""
    if num_hits <= 0:
        return 1.0
    if num_hits > num_trials or probability <= 0.0:
        return 0.0
    if probability >= 1.0:
        return 1.0
    log_term = (
        math.lgamma(num_trials + 1) - math.lgamma(num_hits + 1) - math.lgamma(num_trials - num_hits + 1)
        + num_hits * math.log(probability) + (num_trials - num_hits) * math.log1p(-probability)
    )  # fmt: skip
    odds = probability / (1.0 - probability)
    # Terms relative to the first one; once they fall below double precision the rest adds nothing.
    total = term = 1.0
    for hits in range(num_hits, num_trials):
        term *= (num_trials - hits) / (hits + 1) * odds
        total += term
        if term < 1e-17 * total and hits > num_trials * probability:
            break
    return min(1.0, math.exp(log_term + math.log(total)))


def valid_share(r_target: float, vocab_size: int) -> float:
    """P(distance < r_target) for a random direction of `vocab_size` dimensions against a fixed unit vector."""
    if r_target <= 0.0:
        return 0.0
    if r_target >= 2.0:
        return 1.0
    cosine = 1.0 - r_target * r_target / 2.0
    cap = 0.5 * _regularised_beta(1.0 - cosine * cosine, (vocab_size - 1) / 2.0, 0.5)
    return cap if cosine >= 0.0 else 1.0 - cap


def valid_density(r_target: float, vocab_size: int) -> float:
    """Density of all distances at `r_target`, per unit of distance."""
    step = 1e-6
    return (valid_share(r_target + step, vocab_size) - valid_share(r_target - step, vocab_size)) / (2 * step)


def mismatch_probability(noise_sd: float, r_target: float, vocab_size: int) -> float:
    """Share of honest valid nonces that a verifier calls invalid, where distances differ by `noise_sd`.

    A nonce flips where its distance lies within the noise of `r_target`: density * sd / sqrt(2 pi), of the valid.
    """
    density = valid_density(r_target, vocab_size) / valid_share(r_target, vocab_size)
    return density * noise_sd / math.sqrt(2.0 * math.pi)


def share_z_score(num_valid: int, num_total: int, r_target: float, vocab_size: int) -> float:
    """How many standard deviations the observed number of valid nonces lies from theory."""
    expected = valid_share(r_target, vocab_size)
    spread = math.sqrt(num_total * expected * (1.0 - expected))
    difference = num_valid - num_total * expected
    if spread == 0.0:
        return 0.0 if difference == 0.0 else math.copysign(math.inf, difference)
    return difference / spread


class Decision(StrEnum):
    """What a sequential test says so far."""

    CONTINUE = "continue"
    HONEST = "honest"
    FRAUD = "fraud"


@dataclass(slots=True)
class SequentialTest:
    """Wald's sequential probability ratio test on a stream of checked nonces.

    Attributes:
        p_honest: share of mismatches of an honest worker.
        p_fraud: share of mismatches that counts as fraud.
        false_alarm: accepted chance of calling an honest worker a fraud.
        missed: accepted chance of calling a fraud honest.
    """

    p_honest: float = P_MISMATCH
    p_fraud: float = 0.05
    false_alarm: float = 1e-7
    missed: float = 1e-3
    log_ratio: float = field(default=0.0)
    num_checked: int = field(default=0)
    decision: Decision = field(default=Decision.CONTINUE)

    def observe(self, mismatch: bool) -> Decision:
        """Count one checked nonce; a decision once made stays."""
        if self.decision is not Decision.CONTINUE:
            return self.decision
        self.num_checked += 1
        if mismatch:
            self.log_ratio += math.log(self.p_fraud / self.p_honest)
        else:
            self.log_ratio += math.log((1.0 - self.p_fraud) / (1.0 - self.p_honest))
        if self.log_ratio >= math.log((1.0 - self.missed) / self.false_alarm):
            self.decision = Decision.FRAUD
        elif self.log_ratio <= math.log(self.missed / (1.0 - self.false_alarm)):
            self.decision = Decision.HONEST
        return self.decision


def _regularised_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction (Lentz's method), about 1e-13."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _regularised_beta(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    numerator, denominator = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1.0), tiny)
    fraction = denominator
    for m in range(1, 10_000):
        for coefficient in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            denominator = 1.0 / (1.0 + coefficient * denominator or tiny)
            numerator = 1.0 + coefficient / numerator or tiny
            change = numerator * denominator
            fraction *= change
        if abs(change - 1.0) < 1e-15:
            break
    return math.exp(log_front) * fraction / a
