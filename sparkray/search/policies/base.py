"""What a policy is: it says how many paths to start, which to prune, when to stop, and what the answer is.

A run of a policy is asked the same questions by the live search and by the replay of a recording, step by step:

    while True:
        if no lane is running:  launch `next_wave(lanes)` paths; 0 ends the search
        every running lane writes one token
        `after_step(lanes)` says which lanes to prune, and whether the search is closed

A lane shows a policy the tokens written so far and, once it ended, its answer; nothing of the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sparkray.search.paths import Lane
from sparkray.search.votes import VoteResult, vote


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What follows from one step.

    Attributes:
        prune: indices of running lanes that write no further token.
        close: why the search ends now, or None; all running lanes are aborted.
    """

    prune: tuple[int, ...] = ()
    close: str | None = None


CONTINUE = StepDecision()


class PolicyRun(Protocol):
    """One search under a policy."""

    def next_wave(self, lanes: Sequence[Lane]) -> int: ...

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision: ...

    def vote(self, lanes: Sequence[Lane]) -> VoteResult: ...


class Policy(Protocol):
    """A way of spending at most `max_paths` paths on a question."""

    @property
    def name(self) -> str: ...

    def start(self, max_paths: int) -> PolicyRun: ...


class MajorityRun:
    """All paths at once, all to their end, one vote each; the base of the other runs."""

    def __init__(self, max_paths: int) -> None:
        self.max_paths = max_paths

    def next_wave(self, lanes: Sequence[Lane]) -> int:
        return self.max_paths - len(lanes)

    def after_step(self, lanes: Sequence[Lane]) -> StepDecision:
        return CONTINUE

    def vote(self, lanes: Sequence[Lane]) -> VoteResult:
        return vote(lanes)


def newly_ended(lanes: Sequence[Lane], known: set[int]) -> list[Lane]:
    """Lanes that ended by themselves since `known` was last brought up to date; brings it up to date."""
    fresh = [lane for lane in lanes if lane.ended_by_itself and lane.index not in known]
    known.update(lane.index for lane in fresh)
    return fresh
