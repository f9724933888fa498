"""What a stretch of tokens was like: fluent, recall, reasoning, exploration or confusion; and where entropy goes.

The five phases and the window of 8 are METIS's. METIS tells exploration from confusion by how much the embeddings of
the likeliest candidates differ, which is not recorded. Here exploration is an entropy half a standard deviation
above the request's own, and confusion a whole one that is not coming down while no candidate leads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from sparkray.metis.labels import Decision, Phase, Trend

PHASE_WINDOW_TOKENS = 8
TREND_WINDOW_TOKENS = 10


class PhaseRule:
    """Feeds on one request's tokens in order; "high" and "low" are against the request so far."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, float, float, Decision]] = deque(maxlen=PHASE_WINDOW_TOKENS)
        self._num_tokens = 0
        self._entropy_mean = self._entropy_squares = self._confidence_mean = 0.0

    def step(self, entropy: float, confidence: float, momentum: float, decision: Decision) -> Phase:
        """The phase after this token; RECALL until the window is full."""
        self._num_tokens += 1
        delta = entropy - self._entropy_mean
        self._entropy_mean += delta / self._num_tokens
        self._entropy_squares += delta * (entropy - self._entropy_mean)
        self._confidence_mean += (confidence - self._confidence_mean) / self._num_tokens
        self._window.append((entropy, confidence, momentum, decision))
        if len(self._window) < PHASE_WINDOW_TOKENS:
            return Phase.RECALL
        return self._classify()

    def _classify(self) -> Phase:
        entropies, confidences, momenta, decisions = zip(*self._window, strict=True)
        std = max(math.sqrt(self._entropy_squares / self._num_tokens), 0.01)
        height = (_mean(entropies) - self._entropy_mean) / std
        confidence = _mean(confidences)
        share_deep = decisions.count(Decision.DEEP) / PHASE_WINDOW_TOKENS
        share_fast = decisions.count(Decision.FAST) / PHASE_WINDOW_TOKENS
        if height > 0.5:
            stuck = height > 1.0 and _mean(momenta) >= 0 and confidence < 0.5
            return Phase.CONFUSION if stuck else Phase.EXPLORATION
        if share_deep > 0.3 or height > 0.3:
            return Phase.REASONING
        if height < -0.5 and confidence > 0.85 and share_fast > 0.7:
            return Phase.FLUENT
        if confidence >= self._confidence_mean:
            return Phase.RECALL
        return Phase.REASONING


def trend_of(entropies: Sequence[float]) -> Trend:
    """The trend of the last ten entropies: by how often they turn, else by the slope of a line through them."""
    recent = entropies[-TREND_WINDOW_TOKENS:]
    if len(recent) < TREND_WINDOW_TOKENS:
        return Trend.STABLE
    steps = [later - earlier for earlier, later in pairwise(recent)]
    turns = sum(a * b < 0 for a, b in pairwise(steps))
    if turns / (len(steps) - 1) > 0.6:
        return Trend.OSCILLATING
    middle, mean = (len(recent) - 1) / 2, _mean(recent)
    covariance = sum((at - middle) * (value - mean) for at, value in enumerate(recent))
    return _direction(covariance / sum((at - middle) ** 2 for at in range(len(recent))), 0.1)


def trend_of_whole(entropies: Sequence[float]) -> Trend:
    """Second half against first half: a change of more than one standard deviation counts."""
    half, num = len(entropies) // 2, len(entropies)
    if half == 0:
        return Trend.STABLE
    mean = _mean(entropies)
    variance = sum((value - mean) ** 2 for value in entropies) / (num - 1)
    change = _mean(entropies[half:]) - _mean(entropies[:half])
    return _direction(change, math.sqrt(variance) if variance > 0 else 0.1)


def _direction(change: float, least: float) -> Trend:
    if change > least:
        return Trend.RISING
    return Trend.FALLING if change < -least else Trend.STABLE


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
