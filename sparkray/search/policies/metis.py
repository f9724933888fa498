"""METIS's parallel search with its knobs made to work.

The original (CARBON-XXX/METIS, `dgx/parallel_search.py`) declares checkpoints and a prune ratio and never uses them,
and takes the path with the highest score. Here a checkpoint prunes; the score is theirs, with the confidence term
that they declare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparkray.search.paths import Lane
from sparkray.search.policies.base import CONTINUE, MajorityRun, StepDecision
from sparkray.search.votes import VoteResult, vote

_HEDGE, _REFUSE = 1.0, 2.0


@dataclass(frozen=True, slots=True)
class Metis:
    """Prunes the lowest `prune_ratio` of the running paths at each checkpoint (in tokens); the best score answers.

    With `majority` the survivors vote instead, all alike.
    """

    prune_ratio: float = 0.5
    checkpoints: tuple[int, ...] = (64, 128, 256)
    hedge_weight: float = -0.1
    entropy_weight: float = 0.05
    confidence_weight: float = 0.3
    majority: bool = False
    name: str = "metis"

    def start(self, max_paths: int) -> _Run:
        return _Run(self, max_paths)

    def score(self, lane: Lane) -> float:
        """Their score of a path: hedges cost, tokens at middling entropy pay, refusals cost much."""
        num_tokens = lane.num_tokens
        if not num_tokens:
            return 0.0
        entropy = float(lane.column("entropy").mean())
        action = lane.column("action")
        score = self.hedge_weight * float((action == _HEDGE).sum()) - 0.5 * float((action == _REFUSE).sum())
        if 0.5 <= entropy <= 2.0:
            score += self.entropy_weight * num_tokens
        elif entropy > 3.0:
            score -= 0.2
        score += 0.1 * (num_tokens > 50) + 0.1 * (num_tokens > 200)
        return score + self.confidence_weight * float(lane.column("confidence").mean())


class _Run(MajorityRun):
    def __init__(self, policy: Metis, max_paths: int) -> None:
        super().__init__(max_paths)
        self._policy = policy
        self._passed = 0

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        running = [lane for lane in lanes if lane.running]
        due = [mark for mark in self._policy.checkpoints[self._passed :] if all(x.num_tokens >= mark for x in running)]
        if not running or not due:
            return CONTINUE
        self._passed += len(due)
        worst_first = sorted(running, key=lambda lane: (self._policy.score(lane), -lane.index))
        num_pruned = min(math.floor(self._policy.prune_ratio * len(running)), len(lanes) - 1)
        return StepDecision(tuple(lane.index for lane in worst_first[:num_pruned]))

    def vote(self, lanes: Sequence[Lane]) -> VoteResult:
        finished = [lane for lane in lanes if lane.ended_by_itself]
        if self._policy.majority:
            return vote(finished)
        scores = {lane.index: self._policy.score(lane) for lane in finished if lane.answer}
        if not scores:
            return vote(lanes)
        best = max(scores, key=lambda index: (scores[index], -index))
        return vote(finished, weight=lambda lane: float(lane.index == best))
