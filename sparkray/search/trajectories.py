"""Replays of `certified` that note every moment at which it might have stopped, instead of stopping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparkray.search.logistic import Features
from sparkray.search.paths import Lane
from sparkray.search.policies.base import PolicyRun
from sparkray.search.policies.certified import Certified, CertifiedRun
from sparkray.search.policies.full import Full
from sparkray.search.recording import RecordedQuestion
from sparkray.search.replay import replay, shuffled_orders
from sparkray.search.scorer import PathScorer
from sparkray.search.votes import VoteResult


@dataclass(frozen=True, slots=True)
class Moment:
    """What was known at one moment of a replay: the state, and whether the leader was right."""

    state: Features
    leader_right: bool


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One replay without early stopping: its moments, and whether its last vote and the vote over all are right."""

    moments: tuple[Moment, ...]
    last_right: bool
    full_right: bool

    def right_when_stopped(self, estimates: Sequence[float], stop_below: float) -> bool:
        """Whether the answer is right if the search stops at the first estimate below `stop_below`."""
        for moment, estimate in zip(self.moments, estimates, strict=True):
            if estimate < stop_below:
                return moment.leader_right
        return self.last_right


@dataclass(frozen=True, slots=True)
class JudgedQuestion:
    """A question whose paths were all judged by a scorer, so that many replays can look the estimates up.

    Attributes:
        question: the question.
        orders: in which its paths are launched, one for each replay.
        full_right: whether the vote over all paths is right, for each order; ties are broken by order.
        at_end: P(right) of each path at its end.
        at_checkpoints: P(right) of each path at each checkpoint that it passed.
    """

    question: RecordedQuestion
    orders: tuple[Sequence[int], ...]
    full_right: tuple[bool, ...]
    at_end: tuple[float, ...]
    at_checkpoints: tuple[Mapping[int, float], ...]


def judge(scorer: PathScorer, question: RecordedQuestion, *, num_orders: int, seed: int) -> JudgedQuestion:
    """All paths of a question under `scorer`, for `num_orders` replays; a path without a token counts as wrong."""
    written = [path.signals for path in question.paths]
    orders = shuffled_orders(question, num_orders, seed)
    return JudgedQuestion(
        question,
        tuple(orders),
        tuple(question.is_right(replay(Full(), question.paths, order).result.key) for order in orders),
        tuple(scorer.at_end(signals, question.task) if len(signals) else 0.0 for signals in written),
        tuple(
            {mark: scorer.at_checkpoint(signals, mark) for mark in scorer.checkpoints if mark <= len(signals)}
            for signals in written
        ),
    )


def trajectories(policy: Certified, judged: JudgedQuestion) -> list[Trajectory]:
    """Replays of one question under `policy`, which must not stop early, with every moment noted.

    `policy` prunes at its threshold, and `judged` must come from its scorer.
    """
    question = judged.question
    found = []
    for order, full_right in zip(judged.orders, judged.full_right, strict=True):
        tracing = _Tracing(policy, judged, order)
        outcome = replay(tracing, question.paths, order)
        found.append(Trajectory(tuple(tracing.moments), question.is_right(outcome.result.key), full_right))
    return found


class _Tracing:
    """The policy of one replay."""

    name = "certified"

    def __init__(self, policy: Certified, judged: JudgedQuestion, order: Sequence[int]) -> None:
        self._policy = policy
        self._judged = judged
        self._order = order
        self.moments: list[Moment] = []

    def start(self, max_paths: int) -> PolicyRun:
        return _TracingRun(self._policy, max_paths, self._judged, self._order, self.moments)


class _TracingRun(CertifiedRun):
    def __init__(
        self,
        policy: Certified,
        max_paths: int,
        judged: JudgedQuestion,
        order: Sequence[int],
        moments: list[Moment],
    ) -> None:
        super().__init__(policy, max_paths)
        self._judged = judged
        self._order = order
        self._moments = moments

    def at_end(self, lane: Lane) -> float:
        return self._judged.at_end[self._order[lane.index]]

    def at_checkpoint(self, lane: Lane, mark: int) -> float:
        return self._judged.at_checkpoints[self._order[lane.index]][mark]

    def close_by_regret(self, result: VoteResult, lanes: Sequence[Lane]) -> bool:
        state = self.state(result, lanes)
        self._moments.append(Moment(state, self._judged.question.is_right(result.key)))
        return False
