"""Adaptive-Consistency: one path after the other, until the leader is likely the mode (arXiv 2305.11860)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkray.search.certificates import beta_certainty
from sparkray.search.paths import Lane
from sparkray.search.policies.base import CONTINUE, MajorityRun, StepDecision, newly_ended


@dataclass(frozen=True, slots=True)
class AdaptiveConsistency:
    """Stops once P(leader beats runner-up) under a Beta posterior reaches `threshold`.

    `wave` paths run at a time; 1, as in the paper, costs the fewest tokens and the most time.
    """

    threshold: float = 0.95
    wave: int = 1
    name: str = "adaptive_consistency"

    def start(self, max_paths: int) -> _Run:
        return _Run(self, max_paths)


class _Run(MajorityRun):
    def __init__(self, policy: AdaptiveConsistency, max_paths: int) -> None:
        super().__init__(max_paths)
        self._policy = policy
        self._ended: set[int] = set()

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        return min(self._policy.wave, self.max_paths - len(lanes))

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        if newly_ended(lanes, self._ended) and beta_certainty(self.vote(lanes)) >= self._policy.threshold:
            return StepDecision(close="beta")
        return CONTINUE
