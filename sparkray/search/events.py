"""What happens in a live search, as it happens. Each event knows how it reads as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sparkray.search.report import SearchReport
from sparkray.search.votes import VoteResult


@dataclass(frozen=True, slots=True)
class WaveEvent:
    """Paths were launched."""

    wave: int
    paths: tuple[int, ...]
    kind: str = field(default="wave", init=False)


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """A path wrote tokens: their text, and of each the entropy in bits and the CUSUM statistic (None if unknown)."""

    path: int
    text: str
    entropies: tuple[float | None, ...]
    statistics: tuple[float | None, ...]
    num_tokens: int
    kind: str = field(default="tokens", init=False)


@dataclass(frozen=True, slots=True)
class PruneEvent:
    """The policy pruned a path after `num_tokens` tokens."""

    path: int
    num_tokens: int
    kind: str = field(default="prune", init=False)


@dataclass(frozen=True, slots=True)
class VoteEvent:
    """A path ended, or was asked for its answer, and the votes stand so now: (answer, weight), the leader first."""

    path: int
    answer: str | None
    forced: bool
    votes: tuple[tuple[str, float], ...]
    kind: str = field(default="vote", init=False)


@dataclass(frozen=True, slots=True)
class DoneEvent:
    """The search ended."""

    report: SearchReport
    kind: str = field(default="done", init=False)


SearchEvent = WaveEvent | TokensEvent | PruneEvent | VoteEvent | DoneEvent


def event_to_dict(event: SearchEvent) -> dict[str, Any]:
    """As plain values for JSON, with `kind` saying which event it is."""
    return asdict(event)


def standing(result: VoteResult) -> tuple[tuple[str, float], ...]:
    """The votes as an event carries them."""
    return tuple((entry.answer.shown, entry.weight) for entry in result.ranking)
