"""The noun of this package: what a teacher says about given tokens.

Row t is the teacher's distribution of token t + 1 given tokens 0..t, so a sequence of n tokens has L = n - 1 rows, and
row t belongs to the student's logits at position t.

Shapes: L rows, K entries of the head, M draws from the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.distill.errors import TeacherReplyError

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]

# Logarithms of probabilities in bfloat16 engines come out a little above zero where one token is certain.
_ROUNDING = 1e-2


@dataclass(frozen=True, slots=True)
class TokenScores:
    """A teacher's rows.

    Attributes:
        head_ids_LK: the likeliest tokens, likeliest first; -1 where a row has fewer than K.
        head_logprobs_LK: their log-probabilities in nats; -inf where the id is -1.
        token_logprobs_L: of the token that follows in the sequence.
        tail_ids_LM: tokens drawn from what the head leaves, ascending; the M draws of a row belong together. M is 0
            where the full vocabulary was not at hand.
        entropy_L: of the whole distribution, in nats; NaN where the full vocabulary was not at hand.
        temperature: at which all of it was taken.
    """

    head_ids_LK: Ids
    head_logprobs_LK: Floats
    token_logprobs_L: Floats
    tail_ids_LM: Ids
    entropy_L: Floats
    temperature: float = 1.0

    @property
    def num_rows(self) -> int:
        return int(self.head_ids_LK.shape[0])

    @property
    def top_logprobs(self) -> int:
        return int(self.head_ids_LK.shape[1])

    @property
    def tail_mass(self) -> Floats:
        """Probability that the head leaves, (L,)."""
        head_mass: NDArray[np.float64] = np.exp(self.head_logprobs_LK.astype(np.float64)).sum(axis=1)
        return (1.0 - head_mass).clip(0.0, 1.0).astype(np.float32)

    def narrowed(self, top_logprobs: int) -> TokenScores:
        """The same rows with a shorter head, as a request for fewer would have given them.

        Draws from the tail go: they were drawn from what the longer head left.
        """
        if top_logprobs >= self.top_logprobs:
            return self
        return replace(
            self,
            head_ids_LK=self.head_ids_LK[:, :top_logprobs],
            head_logprobs_LK=self.head_logprobs_LK[:, :top_logprobs],
            tail_ids_LM=self.tail_ids_LM[:, :0],
        )

    def rows(self, start: int, stop: int) -> TokenScores:
        """Rows start..stop-1."""
        return replace(
            self,
            head_ids_LK=self.head_ids_LK[start:stop],
            head_logprobs_LK=self.head_logprobs_LK[start:stop],
            token_logprobs_L=self.token_logprobs_L[start:stop],
            tail_ids_LM=self.tail_ids_LM[start:stop],
            entropy_L=self.entropy_L[start:stop],
        )

    def checked(self, num_rows: int) -> TokenScores:
        """Itself, if it can be a teacher's answer about `num_rows + 1` tokens.

        Raises:
            TeacherReplyError: too few or too many rows, NaN, a log-probability above zero, a probability above one, or
                a token twice in one row.
        """
        if self.num_rows != num_rows:
            raise TeacherReplyError(f"the teacher answered {self.num_rows} positions, and {num_rows} were asked for.")
        for name, values in (("head", self.head_logprobs_LK), ("token", self.token_logprobs_L)):
            if np.isnan(values).any():
                row = int(np.argwhere(np.isnan(values))[0][0])
                raise TeacherReplyError(f"the teacher answered NaN in the {name} log-probabilities of position {row}.")
            if values.size and float(values.max()) > _ROUNDING:
                raise TeacherReplyError(
                    f"the teacher answered a log-probability of {float(values.max()):g}, and none above 0 is possible."
                )
        mass_L = np.exp(self.head_logprobs_LK.astype(np.float64)).sum(axis=1)
        if mass_L.size and float(mass_L.max()) > 1.0 + 5 * _ROUNDING:
            raise TeacherReplyError(f"the teacher's probabilities of one position sum to {float(mass_L.max()):g}.")
        sorted_LK = np.sort(self.head_ids_LK, axis=1)
        if ((sorted_LK[:, 1:] == sorted_LK[:, :-1]) & (sorted_LK[:, 1:] >= 0)).any():
            raise TeacherReplyError("the teacher answered the same token twice in one position.")
        return self


def head_only(head_ids_LK: Ids, head_logprobs_LK: Floats, token_logprobs_L: Floats) -> TokenScores:
    """Rows of a teacher that shows no more than the likeliest tokens."""
    num_rows = head_ids_LK.shape[0]
    return TokenScores(
        head_ids_LK,
        head_logprobs_LK,
        token_logprobs_L,
        tail_ids_LM=np.empty((num_rows, 0), np.int32),
        entropy_L=np.full(num_rows, np.nan, np.float32),
    )


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """Rows after one another; heads are padded to the longest. Draws stay where all parts have as many.

    The draws of a row belong together, so they cannot be cut to the fewest.
    """
    longest = max(part.top_logprobs for part in parts)
    num_draws = {part.tail_ids_LM.shape[1] for part in parts}
    kept = num_draws.pop() if len(num_draws) == 1 else 0
    return TokenScores(
        np.concatenate([_padded(part.head_ids_LK, longest, -1) for part in parts]),
        np.concatenate([_padded(part.head_logprobs_LK, longest, -np.inf) for part in parts]),
        np.concatenate([part.token_logprobs_L for part in parts]),
        np.concatenate([part.tail_ids_LM[:, :kept] for part in parts]),
        np.concatenate([part.entropy_L for part in parts]),
        parts[0].temperature,
    )


def _padded(values_LK: NDArray[Any], width: int, filler: float) -> NDArray[Any]:
    return np.pad(values_LK, ((0, 0), (0, width - values_LK.shape[1])), constant_values=filler)
