"""Where to fork a path: after a token that the model was sure of, so that what is kept is kept for a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparkray.search.paths import Lane
from sparkray.search.signals import FloatArray


@dataclass(frozen=True, slots=True)
class Fork:
    """The beginning of a path of an earlier round, which a new path continues."""

    origin: int
    token_ids: tuple[int, ...]
    text: str


def fork_length(entropies: FloatArray) -> int:
    """How many tokens a fork keeps: up to the surest token of the middle half, the last of equals.

    A fork near the start would repeat the whole path, one near the end could change nothing. A path of fewer than
    four tokens is not worth forking and gives 0.
    """
    num_tokens = len(entropies)
    if num_tokens < 4:
        return 0
    first, last = num_tokens // 4, 3 * num_tokens // 4
    middle = np.nan_to_num(entropies[first:last], nan=np.inf)
    return last - int(np.argmin(middle[::-1]))


def survivors(lanes: Sequence[Lane], count: int) -> list[Lane]:
    """The `count` calmest paths that ended by themselves with an answer: those of least mean entropy."""
    ended = [lane for lane in lanes if lane.ended_by_itself and lane.answer is not None and lane.num_tokens]
    return sorted(ended, key=lambda lane: (float(lane.column("entropy").mean()), lane.index))[:count]
