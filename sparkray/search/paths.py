"""A path is one candidate of a search: the tokens that were written and what is known of each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sparkray.search.answers import Answer
from sparkray.search.signals import COLUMN, FloatArray, empty_signals


class FinishReason(StrEnum):
    """How a path ended."""

    STOP = "stop"
    LENGTH = "length"
    PRUNED = "pruned"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Path:
    """A path that ended.

    Attributes:
        token_ids: what was written, without the prompt.
        signals: one row for each token, shape [num_tokens, NUM_SIGNALS].
        text: the tokens as text.
        answer: what the text says the answer is, or None.
        finish_reason: "stop" (the model ended it) or "length" (the limit did) in a recording.
    """

    token_ids: tuple[int, ...]
    signals: FloatArray
    text: str
    answer: Answer | None
    finish_reason: FinishReason

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def column(self, name: str) -> FloatArray:
        """One signal of all tokens, shape [num_tokens]."""
        values: FloatArray = self.signals[:, COLUMN[name]]
        return values


@dataclass(slots=True)
class Lane:
    """A path while a search runs: what a policy may know at this step, and nothing beyond it.

    Attributes:
        index: number of the path in the order of launching, from 0.
        signals: rows of the tokens written so far, shape [num_tokens, NUM_SIGNALS].
        finish_reason: None while it runs.
        answer: known once it ended by itself, or by a forced stub after pruning.
        wave: number of the wave it was launched in, from 0.
        is_stub: whether `answer` was forced after pruning, so that its vote weighs little.
    """

    index: int
    wave: int = 0
    signals: FloatArray = field(default_factory=lambda: empty_signals(0))
    finish_reason: FinishReason | None = None
    answer: Answer | None = None
    text: str = ""
    is_stub: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.signals)

    @property
    def running(self) -> bool:
        return self.finish_reason is None

    @property
    def ended_by_itself(self) -> bool:
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    def column(self, name: str) -> FloatArray:
        """One signal of the tokens so far, shape [num_tokens]."""
        values: FloatArray = self.signals[:, COLUMN[name]]
        return values
