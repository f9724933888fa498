"""The protocol of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores


class Teacher(Protocol):
    """Scores given tokens; one call is one attempt, and may run in several threads at once."""

    @property
    def identity(self) -> TeacherIdentity:
        """Everything that decides its numbers."""

    @property
    def parameters(self) -> str:
        """What else decides them: the draws from the tail and the temperature, where it has them."""

    @property
    def max_model_tokens(self) -> int:
        """The longest text of one call."""

    def score(self, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
        """Rows for the tokens after the first: len(token_ids) - 1.

        Raises:
            RateLimitedError: 429.
            TeacherDownError: no connection, a 5xx, or a time limit; another attempt may work.
            TeacherRefusedError: the same request will be refused again.
            TeacherReplyError: the answer cannot be read.
        """

    def close(self) -> None:
        """Let go of connections or memory."""
