"""Fast, normal or deep, token by token: METIS's adaptive controller, run over recorded entropies.

The rules are those of METIS's core (CARBON-XXX/METIS): an exponential mean and variance whose memory shortens while
predictions fail, a two-sided CUSUM with Siegmund's threshold for an average run length of 200, an empirical-Bayes
belief that the model is in a hard passage, and thresholds from the window's quantiles by the Cornish-Fisher
expansion. One thing differs: every decision enters the history of the circuit breaker, where METIS leaves out those
that the open breaker made, so that its breaker, once open, stays open.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from sparkray.metis.labels import Decision, EpistemicState

_WINDOW_TOKENS = 500
_MIN_TOKENS = 10
_MIN_TOKENS_FOR_QUANTILES = 30
_BASE_MEMORY = 0.995
_DRIFT = 0.5
_TARGET_ARL_TOKENS = 200
_ALARM = math.log(2 * _DRIFT**2 * _TARGET_ARL_TOKENS + 1) / (2 * _DRIFT)
_STD_FLOOR_BITS = 0.15
_OUTLIER_Z = 2.25  # 0.05 shared among four tests (Bonferroni)
_POSTERIOR_ALARM = 1 / 6  # a miss costs five times a false alarm
_BREAKER_HISTORY = 50
_BREAKER_MIN_HISTORY = 20
_BREAKER_FAST = 0.8
_BREAKER_DEEP = 0.4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the controller says of one token."""

    decision: Decision
    epistemic_state: EpistemicState


class DecisionRule:
    """Feeds on (entropy, confidence, z) of one request's tokens in order."""

    def __init__(self) -> None:
        self._entropies = Moments(_WINDOW_TOKENS)
        self._confidences = Moments(_WINDOW_TOKENS)
        self._num_tokens = 0
        self._mean, self._variance = 1.0, 1.0
        self._error = 0.0
        self._above = self._below = 0.0
        self._posterior, self._hits, self._misses = 0.1, 1.0, 9.0
        self._num_high, self._min_high = 0, 2
        self._high_runs: deque[int] = deque(maxlen=50)
        self._history: deque[Decision] = deque(maxlen=_BREAKER_HISTORY)

    def step(self, entropy: float, confidence: float, z: float) -> Verdict:
        """One token: entropy in bits, probability of the likeliest token, and the detector's z."""
        self._num_tokens += 1
        self._entropies.push(entropy)
        self._confidences.push(confidence)
        alarm = self._track(entropy)
        decision = self._decide(entropy, confidence, alarm)
        self._history.append(decision)
        return Verdict(decision, self._state(confidence, z))

    def _track(self, entropy: float) -> bool:
        """Update every running statistic; whether the CUSUM says that the level changed."""
        error = abs(entropy - self._mean)
        self._error = 0.95 * self._error + 0.05 * error
        memory = _BASE_MEMORY / (1.0 + 0.1 * self._error / max(math.sqrt(self._variance), 0.1))
        delta = entropy - self._mean
        self._mean += (1.0 - memory) * delta
        self._variance = memory * (self._variance + (1.0 - memory) * delta**2)
        z = (entropy - self._mean) / max(math.sqrt(self._variance), _STD_FLOOR_BITS)
        self._above = max(0.0, self._above + z - _DRIFT)
        self._below = max(0.0, self._below - z - _DRIFT)
        self._believe(z > 1.0)
        return max(self._above, self._below) > _ALARM

    def _believe(self, high: bool) -> None:
        self._hits = _BASE_MEMORY * self._hits + (1.0 - _BASE_MEMORY) * high
        self._misses = _BASE_MEMORY * self._misses + (1.0 - _BASE_MEMORY) * (not high)
        if_hard, if_easy = (0.8, 0.2) if high else (0.2, 0.8)
        hard = if_hard * self._posterior
        hard /= hard + if_easy * (1.0 - self._posterior)
        self._posterior = 0.9 * hard + 0.1 * self._hits / (self._hits + self._misses)
        if high:
            self._num_high += 1
            return
        if self._num_high:
            self._high_runs.append(self._num_high)
            if len(self._high_runs) >= 5:
                median = statistics.median_high(self._high_runs)
                spread = statistics.median_high(abs(run - median) for run in self._high_runs)
                self._min_high = max(2, median + spread)
        self._num_high = 0

    def _decide(self, entropy: float, confidence: float, alarm: bool) -> Decision:
        if self._breaker_is_open():
            return Decision.NORMAL
        if self._num_tokens < _MIN_TOKENS:
            if entropy <= 1.5:
                return Decision.FAST if confidence >= 0.5 else Decision.NORMAL
            return Decision.DEEP if entropy >= 2.0 else Decision.NORMAL
        mean, std = self._entropies.mean, self._entropies.std
        if entropy <= max(0.0, min(mean + self._entropies.quantile_z(-0.5) * std, mean)):
            confident = self._confidences.mean - 0.5 * self._confidences.std
            return Decision.FAST if confidence >= confident else Decision.NORMAL
        signs = (
            (entropy - mean) / max(std, _STD_FLOOR_BITS) > _OUTLIER_Z,
            self._num_high >= self._min_high,
            self._posterior > _POSTERIOR_ALARM,
            alarm,
        )
        return Decision.DEEP if sum(signs) >= 2 else Decision.NORMAL

    def _breaker_is_open(self) -> bool:
        total = len(self._history)
        if total < _BREAKER_MIN_HISTORY:
            return False
        return (
            self._history.count(Decision.FAST) / total > _BREAKER_FAST
            or self._history.count(Decision.DEEP) / total > _BREAKER_DEEP
        )

    def _state(self, confidence: float, z: float) -> EpistemicState:
        uncertain, unknown = 1.0, 1.2
        if len(self._entropies) >= _MIN_TOKENS_FOR_QUANTILES:
            uncertain = max(0.5, self._entropies.quantile_z(1.0))
            unknown = max(1.5, self._entropies.quantile_z(2.0))
            if unknown <= uncertain:
                unknown = uncertain + 1.0
        if z > unknown:
            return EpistemicState.UNKNOWN
        if z > uncertain:
            return EpistemicState.UNCERTAIN
        if z < -0.5 and confidence > 0.7:
            return EpistemicState.KNOWN
        return EpistemicState.LIKELY


class Moments:
    """Mean, deviation, skewness and kurtosis of the last `size` values, in constant time a value."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._sums = [0.0, 0.0, 0.0, 0.0]
        self._shape_now: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self._values)

    def push(self, value: float) -> None:
        if len(self._values) == self._values.maxlen:
            self._add(self._values[0], -1.0)
        self._values.append(value)
        self._add(value, 1.0)
        self._shape_now = None

    def _add(self, value: float, sign: float) -> None:
        power = sign
        for order in range(4):
            power *= value
            self._sums[order] += power

    @property
    def mean(self) -> float:
        return self._sums[0] / len(self._values)

    @property
    def std(self) -> float:
        """With n - 1; 0.01 where the values are all alike."""
        num = len(self._values)
        if num < 2:
            return 0.1
        variance = (self._sums[1] - num * self.mean**2) / (num - 1)
        return math.sqrt(variance) if variance > 1e-10 else 0.01

    def quantile_z(self, z: float) -> float:
        """The normal quantile `z` bent to the window's skewness and kurtosis (Cornish-Fisher)."""
        if self._shape_now is None:
            self._shape_now = self._shape()
        skewness, kurtosis = self._shape_now
        return z + (z**2 - 1) * skewness / 6 + (z**3 - 3 * z) * kurtosis / 24

    def _shape(self) -> tuple[float, float]:
        """Bias-corrected skewness and excess kurtosis, held to +-2; 0 where they are not defined."""
        num, mean = len(self._values), self.mean
        first, second, third, fourth = (total / num for total in self._sums)
        variance = second - mean**2
        if num < 4 or variance < 1e-10:
            return 0.0, 0.0
        central3 = third - 3 * mean * second + 2 * mean**3
        central4 = fourth - 4 * mean * third + 6 * mean**2 * second - 4 * mean**3 * first + mean**4
        skewness = central3 / variance**1.5 * math.sqrt(num * (num - 1)) / (num - 2)
        kurtosis = ((num + 1) * (central4 / variance**2 - 3.0) + 6) * (num - 1) / ((num - 2) * (num - 3))
        return max(-2.0, min(2.0, skewness)), max(-2.0, min(2.0, kurtosis))
