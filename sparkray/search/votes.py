"""Votes over the answers of paths. A tie is broken the same way every time, and is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sparkray.search.answers import Answer
from sparkray.search.paths import Lane

STUB_WEIGHT = 0.25
"""What a vote forced out of a pruned path counts, in units of that of a path that ended by itself."""

_TIE = 1e-9

Weight = Callable[[Lane], float]
"""How much a path's vote counts; at least 0."""


@dataclass(frozen=True, slots=True)
class AnswerVotes:
    """One answer with the votes for it.

    Attributes:
        answer: as the first path that gave it wrote it.
        weight: sum of the weights of its paths.
        paths: indices of those paths, rising.
    """

    answer: Answer
    weight: float
    paths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VoteResult:
    """The outcome of a vote.

    Attributes:
        ranking: all answers, the winner first. Equal weights are ordered by number of paths, then by the path that
            came first, then by the answer's key, so that the same paths always give the same winner.
        tied: the answers that share the highest weight, where that is more than one.
        num_without_answer: paths that had no vote because no answer was found in them.
    """

    ranking: tuple[AnswerVotes, ...]
    tied: tuple[Answer, ...]
    num_without_answer: int

    @property
    def winner(self) -> AnswerVotes | None:
        return self.ranking[0] if self.ranking else None

    @property
    def key(self) -> str | None:
        """The winner's key, or None where no path had an answer."""
        return self.ranking[0].answer.key if self.ranking else None

    @property
    def total_weight(self) -> float:
        return sum(entry.weight for entry in self.ranking)

    @property
    def share(self) -> float:
        """The winner's part of all weight, 0 to 1."""
        total = self.total_weight
        return self.ranking[0].weight / total if total > 0 else 0.0


def equal_weight(_lane: Lane) -> float:
    """Majority vote: every path counts alike."""
    return 1.0


def vote(lanes: Iterable[Lane], weight: Weight = equal_weight) -> VoteResult:
    """Count the votes of all lanes that have an answer."""
    voters: dict[str, list[tuple[Lane, Answer]]] = {}
    num_without = 0
    for lane in sorted(lanes, key=lambda lane: lane.index):
        if lane.answer is None:
            num_without += lane.ended_by_itself
        else:
            voters.setdefault(lane.answer.key, []).append((lane, lane.answer))
    entries = [
        AnswerVotes(
            answer=given[0][1],
            weight=sum(weight(lane) * (STUB_WEIGHT if lane.is_stub else 1.0) for lane, _ in given),
            paths=tuple(lane.index for lane, _ in given),
        )
        for given in voters.values()
    ]
    return VoteResult(*_rank(entries), num_without)


def _rank(entries: Sequence[AnswerVotes]) -> tuple[tuple[AnswerVotes, ...], tuple[Answer, ...]]:
    highest = max((entry.weight for entry in entries), default=0.0)
    at_top = [entry for entry in entries if entry.weight >= highest - _TIE]
    # Sums of floats that differ in their last bits are a tie as well: it must not depend on the order of addition.
    ranking = sorted(
        entries,
        key=lambda entry: (
            -(highest if entry.weight >= highest - _TIE else entry.weight),
            -len(entry.paths),
            entry.paths[0],
            entry.answer.key,
        ),
    )
    tied = tuple(entry.answer for entry in ranking[: len(at_top)]) if len(at_top) > 1 else ()
    return tuple(ranking), tied
