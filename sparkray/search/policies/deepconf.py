"""DeepConf: keep the paths whose least confident stretch is confident enough (Fu et al., arXiv 2508.15260).

The confidence of a token is minus the mean log-probability of the likeliest tokens; that of a group is the mean over
a sliding window of tokens. The window of the paper is 2,048 tokens; ours is a setting, as paths may be short: a window
longer than the path so far is the whole path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparkray.search.paths import Lane
from sparkray.search.policies.base import CONTINUE, MajorityRun, StepDecision, newly_ended
from sparkray.search.votes import VoteResult, vote


def lowest_group_confidence(lane: Lane, window: int) -> float:
    """The least mean of `top_confidence` over `window` neighbouring tokens; +inf before there is a token."""
    confidence = lane.column("top_confidence").astype(np.float64)
    if not len(confidence):
        return float("inf")
    if len(confidence) <= window:
        return float(confidence.mean())
    sums = np.concatenate(([0.0], np.cumsum(confidence)))
    return float((sums[window:] - sums[:-window]).min() / window)


@dataclass(frozen=True, slots=True)
class DeepConfOffline:
    """All paths to their end; of these the `keep` part with the highest lowest-group confidence votes, by confidence.

    Saves nothing, and may be more often right.
    """

    keep: float = 0.9
    window: int = 16
    name: str = "deepconf_offline"

    def start(self, max_paths: int) -> _OfflineRun:
        return _OfflineRun(self, max_paths)


class _OfflineRun(MajorityRun):
    def __init__(self, policy: DeepConfOffline, max_paths: int) -> None:
        super().__init__(max_paths)
        self._policy = policy

    def vote(self, lanes: Sequence[Lane]) -> VoteResult:
        confidence = {lane.index: lowest_group_confidence(lane, self._policy.window) for lane in lanes if lane.answer}
        if not confidence:
            return vote(lanes)
        ranked = sorted(confidence, key=lambda index: (-confidence[index], index))
        kept = set(ranked[: max(1, round(self._policy.keep * len(ranked)))])
        return vote(
            (lane for lane in lanes if lane.index in kept or lane.answer is None),
            weight=lambda lane: confidence[lane.index],
        )


@dataclass(frozen=True, slots=True)
class DeepConfOnline:
    """Warm-up paths set a threshold; a later path is pruned once a group of its tokens is less confident.

    Attributes:
        warm_up: paths that run to their end first.
        keep: part of the warm-up paths that the threshold would have kept (0.1 and 0.9 in the paper).
        consensus: the search stops when the winner has this share of the weight.
        window: tokens in a group; a path is judged from its `window`-th token on.
        wave: paths at a time after the warm-up.
    """

    warm_up: int = 8
    keep: float = 0.9
    consensus: float = 0.95
    window: int = 16
    wave: int = 1
    name: str = "deepconf_online"

    def start(self, max_paths: int) -> _OnlineRun:
        return _OnlineRun(self, max_paths)


class _OnlineRun(MajorityRun):
    def __init__(self, policy: DeepConfOnline, max_paths: int) -> None:
        super().__init__(max_paths)
        self._policy = policy
        self._threshold: float | None = None
        self._ended: set[int] = set()
        self._confidence: dict[int, float] = {}

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        wanted = self._policy.wave if lanes else self._policy.warm_up
        return min(wanted, self.max_paths - len(lanes))

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        fresh = newly_ended(lanes, self._ended)
        self._bring_up_to_date(lanes)
        if self._threshold is None:
            if any(lane.running for lane in lanes):
                return CONTINUE
            self._threshold = float(np.quantile(list(self._confidence.values()), 1 - self._policy.keep))
        prune = tuple(lane.index for lane in lanes if lane.running and self._newest_group(lane) < self._threshold)
        return StepDecision(prune, "consensus" if fresh and self._has_consensus(lanes) else None)

    def vote(self, lanes: Sequence[Lane]) -> VoteResult:
        # A vote may be asked for between the end of a path and the step that decides on it.
        self._bring_up_to_date(lanes)
        # Warm-up paths below the threshold do not vote either, unless that leaves nobody.
        threshold = -np.inf if self._threshold is None else self._threshold
        kept = [lane for lane in lanes if self._confidence.get(lane.index, -np.inf) >= threshold]
        voters = kept if any(lane.answer for lane in kept) else [lane for lane in lanes if lane.ended_by_itself]
        return vote(voters, weight=lambda lane: self._confidence[lane.index])

    def _bring_up_to_date(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            if lane.ended_by_itself and lane.index not in self._confidence:
                self._confidence[lane.index] = lowest_group_confidence(lane, self._policy.window)

    def _has_consensus(self, lanes: Sequence[Lane]) -> bool:
        result = self.vote(lanes)
        return bool(result.ranking) and not result.tied and result.share >= self._policy.consensus

    def _newest_group(self, lane: Lane) -> float:
        """The mean over the last window; the windows before it were judged at earlier steps."""
        if lane.num_tokens < self._policy.window:
            return float("inf")
        return float(lane.column("top_confidence")[-self._policy.window :].astype(np.float64).mean())
