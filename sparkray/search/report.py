"""What a search came to, in values that JSON can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparkray.search.paths import FinishReason, Lane
from sparkray.search.votes import VoteResult


@dataclass(frozen=True, slots=True)
class PathReport:
    """One path at the end. `mean_entropy` is in bits; `peak_statistic` is that of the CUSUM detector."""

    index: int
    wave: int
    num_tokens: int
    finish_reason: str
    answer: str | None
    forced: bool
    mean_entropy: float | None
    peak_statistic: float | None
    text: str


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The outcome of one search.

    Attributes:
        best_response: text of a path that gave the winning answer: the one with the lowest mean entropy that ended by
            itself. Where no path had an answer, that of any path, best ended ones first.
        answer: the winning answer as that path wrote it, or None.
        share: the winner's part of the votes, 0 to 1.
        votes: answers with their weights and paths, the winner first.
        tied: the answers that share first place, where several do.
        num_paths, num_pruned, num_aborted: launched; pruned by the policy; aborted when the search closed.
        num_tokens: written by all paths.
        max_paths: that the search might have launched.
        closed_by: why it ended early, or None.
        policy: its name. seconds: wall time.
        note: what a user should know, or None.
    """

    question: str
    policy: str
    best_response: str
    answer: str | None
    share: float
    votes: tuple[dict[str, Any], ...]
    tied: tuple[str, ...]
    num_paths: int
    max_paths: int
    num_pruned: int
    num_aborted: int
    num_tokens: int
    closed_by: str | None
    seconds: float
    note: str | None
    paths: tuple[PathReport, ...]

    @property
    def cognitive_report(self) -> dict[str, Any]:
        """Everything but the answer's text."""
        data = asdict(self)
        data.pop("best_response")
        return data

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def build_report(
    question: str,
    policy: str,
    result: VoteResult,
    lanes: Sequence[Lane],
    *,
    max_paths: int,
    closed_by: str | None,
    seconds: float,
) -> SearchReport:
    """The report of a search that ended."""
    best = _best_lane(result, lanes)
    return SearchReport(
        question=question,
        policy=policy,
        best_response=best.text if best else "",
        answer=result.winner.answer.shown if result.winner else None,
        share=result.share,
        votes=tuple(
            {"answer": entry.answer.shown, "weight": entry.weight, "paths": list(entry.paths)}
            for entry in result.ranking
        ),
        tied=tuple(answer.shown for answer in result.tied),
        num_paths=len(lanes),
        max_paths=max_paths,
        num_pruned=sum(lane.finish_reason is FinishReason.PRUNED for lane in lanes),
        num_aborted=sum(lane.finish_reason is FinishReason.CLOSED for lane in lanes),
        num_tokens=sum(lane.num_tokens for lane in lanes),
        closed_by=closed_by,
        seconds=seconds,
        note=_note(result, lanes),
        paths=tuple(_path_report(lane) for lane in lanes),
    )


def _best_lane(result: VoteResult, lanes: Sequence[Lane]) -> Lane | None:
    voters = set(result.winner.paths) if result.winner else {lane.index for lane in lanes}
    candidates = [lane for lane in lanes if lane.index in voters]
    return min(
        candidates,
        key=lambda lane: (not lane.ended_by_itself, _mean(lane, "entropy") or math.inf, lane.index),
        default=None,
    )


def _note(result: VoteResult, lanes: Sequence[Lane]) -> str | None:
    if result.tied:
        return f"{len(result.tied)} answers are tied; the one with most paths, and of these the earliest, was taken."
    if result.winner is None and all(lane.finish_reason is FinishReason.PRUNED for lane in lanes):
        return "all paths were pruned before they gave an answer."
    if result.winner is None:
        return "no path gave an answer of the kind asked for; best_response is its least uncertain text."
    return None


def _path_report(lane: Lane) -> PathReport:
    return PathReport(
        index=lane.index,
        wave=lane.wave,
        num_tokens=lane.num_tokens,
        finish_reason=lane.finish_reason.value if lane.finish_reason else "running",
        answer=lane.answer.shown if lane.answer else None,
        forced=lane.is_stub,
        mean_entropy=_mean(lane, "entropy"),
        peak_statistic=_peak(lane, "hedge_statistic"),
        text=lane.text,
    )


def _mean(lane: Lane, column: str) -> float | None:
    values = lane.column(column)
    mean = float(values.mean()) if len(values) else math.nan
    return mean if math.isfinite(mean) else None


def _peak(lane: Lane, column: str) -> float | None:
    values = lane.column(column)
    peak = float(values.max()) if len(values) else math.nan
    return peak if math.isfinite(peak) else None
