"""Replaying a search on recorded paths, step by step, with every token counted.

The paths of a wave decode in lockstep, one token a step each, as they do in one engine batch. What a policy learns at
a step it may act on at once, and not before; a token that any lane wrote up to that step is counted, for every
policy alike. So a wave pays for the tokens that its other paths wrote while the decision was not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparkray.errors import InternalError
from sparkray.search.paths import FinishReason, Lane, Path
from sparkray.search.policies.base import Policy
from sparkray.search.recording import RecordedQuestion
from sparkray.search.votes import VoteResult


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a search under a policy would have come to.

    Attributes:
        result: the vote.
        num_tokens: tokens written by all paths.
        num_steps: decode steps from the first token to the decision, a measure of time.
        num_paths: paths launched.
        pruned: numbers of the recorded paths that were pruned.
        closed_by: why it ended before all paths were spent, or None.
        lanes: the paths as they stood at the end.
    """

    result: VoteResult
    num_tokens: int
    num_steps: int
    num_paths: int
    pruned: tuple[int, ...]
    closed_by: str | None
    lanes: tuple[Lane, ...]


def replay(policy: Policy, paths: Sequence[Path], order: Sequence[int] | None = None) -> ReplayResult:
    """Run `policy` on recorded paths.

    Args:
        policy: what decides.
        paths: whole paths of one question; the search may spend all of them.
        order: the order in which they are launched; as recorded by default.
    """
    order = range(len(paths)) if order is None else order
    run = policy.start(len(order))
    lanes: list[Lane] = []
    running: list[Lane] = []
    num_steps = num_waves = 0
    closed_by: str | None = None
    while closed_by is None:
        if not running:
            num_new = run.next_wave(lanes)
            if num_new <= 0:
                break
            if len(lanes) + num_new > len(order):
                raise InternalError(f"{policy.name} asked for {len(lanes) + num_new} paths of {len(order)}.")
            running = [Lane(len(lanes) + offset, num_waves) for offset in range(num_new)]
            lanes.extend(running)
            num_waves += 1
        num_steps += 1
        for lane in running:
            _write_token(lane, paths[order[lane.index]])
        decision = run.after_step(lanes)
        closed_by = decision.close
        for index in decision.prune:
            if lanes[index].running:
                lanes[index].finish_reason = FinishReason.PRUNED
        running = [lane for lane in running if lane.running]
    for lane in running:
        lane.finish_reason = FinishReason.CLOSED
    return ReplayResult(
        result=run.vote(lanes),
        num_tokens=sum(lane.num_tokens for lane in lanes),
        num_steps=num_steps,
        num_paths=len(lanes),
        pruned=tuple(order[lane.index] for lane in lanes if lane.finish_reason is FinishReason.PRUNED),
        closed_by=closed_by,
        lanes=tuple(lanes),
    )


def shuffled_orders(question: RecordedQuestion, num_orders: int, seed: int) -> list[list[int]]:
    """Orders of the paths of a question, the same for every policy, so that comparisons are paired."""
    seeds = [seed, question.index, *question.task.encode(), *question.split.encode()]
    generator = np.random.default_rng(seeds)
    return [generator.permutation(len(question.paths)).tolist() for _ in range(num_orders)]


def _write_token(lane: Lane, path: Path) -> None:
    written = lane.num_tokens + 1
    lane.signals = path.signals[:written]
    if written >= path.num_tokens:
        lane.finish_reason = path.finish_reason
        lane.answer = path.answer
        lane.text = path.text
