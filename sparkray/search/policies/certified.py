"""Waves of paths with a pruning rule and a stopping rule whose error rates are chosen.

- A path is pruned at a checkpoint when its estimated probability of being right falls below a threshold. The
  threshold was calibrated so that a path whose answer is right is pruned with probability at most alpha.
- Votes are weighted by each path's probability of being right.
- The search closes when the winner can no longer be overtaken (exact), or when the estimated regret of stopping falls
  below a threshold. That threshold was calibrated so that the vote over all paths is right, and this answer wrong, with
  probability at most `risk`.

Both promises hold for questions exchangeable with those of calibration: same model, task and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkray.search.certificates import is_locked_in
from sparkray.search.logistic import Features, Logistic
from sparkray.search.paths import Lane
from sparkray.search.policies.base import MajorityRun, StepDecision, newly_ended
from sparkray.search.scorer import PathScorer
from sparkray.search.stopping import vote_state
from sparkray.search.votes import VoteResult, vote


@dataclass(frozen=True, slots=True)
class Certified:
    """Ours.

    Attributes:
        scorer: estimates P(right) of a path.
        prune_below: a running path is pruned when its estimate at a checkpoint is below this; 0 prunes none.
        regret: estimates what stopping now costs, from `STATE_FEATURES`; None leaves the exact certificate alone.
        stop_below: the search closes when that estimate is below this.
        wave: paths launched together.
        task: of the questions, where it is known; it chooses the scorer's model of ends.
    """

    scorer: PathScorer
    prune_below: float = 0.0
    regret: Logistic | None = None
    stop_below: float = 0.0
    wave: int = 4
    task: str | None = None
    name: str = "certified"

    def start(self, max_paths: int) -> CertifiedRun:
        return CertifiedRun(self, max_paths)


class CertifiedRun(MajorityRun):
    """One search; keeps each path's probability of being right as soon as it ended."""

    def __init__(self, policy: Certified, max_paths: int) -> None:
        super().__init__(max_paths)
        self._policy = policy
        self._ended: set[int] = set()
        self._judged_tokens: dict[int, int] = {}
        self.probabilities: dict[int, float] = {}

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        return min(self._policy.wave, self.max_paths - len(lanes))

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        fresh = newly_ended(lanes, self._ended)
        prune = tuple(lane.index for lane in lanes if lane.running and self._is_hopeless(lane))
        return StepDecision(prune, self.certificate(lanes) if fresh else None)

    def vote(self, lanes: Sequence[Lane]) -> VoteResult:
        return vote(lanes, self._probability)

    def certificate(self, lanes: Sequence[Lane]) -> str | None:
        """Why the search may close now, or None."""
        result = self.vote(lanes)
        if result.winner is None:
            return None
        # A path to come weighs at most 1.
        num_to_come = self.max_paths - sum(not lane.running for lane in lanes)
        if is_locked_in(result, float(num_to_come)):
            return "lock_in"
        return "regret" if not result.tied and self.close_by_regret(result, lanes) else None

    def close_by_regret(self, result: VoteResult, lanes: Sequence[Lane]) -> bool:
        """Whether stopping now is estimated to cost too little to go on; `result` has a winner that is not tied."""
        regret = self._policy.regret
        return regret is not None and regret.probability(self.state(result, lanes)) < self._policy.stop_below

    def state(self, result: VoteResult, lanes: Sequence[Lane]) -> Features:
        """The state of the vote, as the regret is estimated from."""
        known = {lane.index: self._probability(lane) for lane in lanes if lane.answer is not None}
        return vote_state(result, lanes, known, self.max_paths)

    def at_end(self, lane: Lane) -> float:
        """P(right) of a lane that ended with an answer."""
        return self._policy.scorer.at_end(lane.signals, self._policy.task)

    def at_checkpoint(self, lane: Lane, mark: int) -> float:
        """P(right) of a lane when it had written `mark` tokens."""
        return self._policy.scorer.at_checkpoint(lane.signals, mark)

    def _probability(self, lane: Lane) -> float:
        if lane.index not in self.probabilities:
            self.probabilities[lane.index] = self.at_end(lane)
        return self.probabilities[lane.index]

    def _is_hopeless(self, lane: Lane) -> bool:
        if self._policy.prune_below <= 0:
            return False
        # A live path may have written several tokens since the last step.
        judged, self._judged_tokens[lane.index] = self._judged_tokens.get(lane.index, 0), lane.num_tokens
        marks = [mark for mark in self._policy.scorer.checkpoints if judged < mark <= lane.num_tokens]
        return any(self.at_checkpoint(lane, mark) < self._policy.prune_below for mark in marks)
