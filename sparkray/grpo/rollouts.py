"""The nouns of training: a rollout is one completion with what is known of it, a group is all those of one prompt.

Shapes: T tokens of one completion, F fields of a recorded token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError
from sparkray.metis.fields import COLUMN, NUM_FIELDS
from sparkray.metis.trace import CognitiveTrace

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One completion.

    Attributes:
        token_ids: T tokens that were drawn, the one that ended it included.
        text: the same, decoded.
        engine_logprobs_T: natural log-probability of each token under the distribution that it was drawn from.
        finish_reason: "stop" or "length".
        weight_version: of the engine's weights when its first token was drawn.
        recorded_TF: what METIS recorded while it was written, in the order of `TOKEN_FIELDS`; None if not watched.
    """

    token_ids: tuple[int, ...]
    text: str
    engine_logprobs_T: FloatArray
    finish_reason: Literal["stop", "length"]
    weight_version: int
    recorded_TF: FloatArray | None = None

    def __post_init__(self) -> None:
        if len(self.engine_logprobs_T) != len(self.token_ids):
            raise InputError(
                f"a completion of {len(self.token_ids)} tokens came with {len(self.engine_logprobs_T)} "
                "log-probabilities; one each is expected."
            )
        if self.recorded_TF is not None and self.recorded_TF.shape != (len(self.token_ids), NUM_FIELDS):
            raise InputError(
                f"a completion of {len(self.token_ids)} tokens came with records of shape {self.recorded_TF.shape}."
            )

    @property
    def mean_entropy_bits(self) -> float:
        """Mean entropy of the recorded tokens; NaN where none was recorded."""
        if self.recorded_TF is None:
            return math.nan
        known = self.recorded_TF[:, COLUMN["entropy"]]
        known = known[~np.isnan(known)]
        return float(known.mean()) if known.size else math.nan

    def trace(self) -> CognitiveTrace:
        """How it was thought. Surprises come from the engine's log-probabilities; no second forward is made.

        Raises:
            InputError: it was not watched.
        """
        if self.recorded_TF is None:
            raise InputError("this completion was drawn unwatched, so it has no trace.")
        bits = (-self.engine_logprobs_T / math.log(2)).tolist()
        trace = CognitiveTrace.from_tokens(self.recorded_TF, token_ids=self.token_ids, surprises=bits)
        return CognitiveTrace.from_events(trace.events, text=self.text)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """All completions of one prompt, drawn at one temperature and top_p = 1.

    Attributes:
        row_index: the dataset's row.
        row: its columns, `prompt` included, as the dataset has them.
        prompt_token_ids: what the engine was given.
        rollouts: in the order in which they were asked for.
    """

    row_index: int
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Completion tokens."""
        return sum(len(rollout.token_ids) for rollout in self.rollouts)

    @property
    def oldest_version(self) -> int:
        return min(rollout.weight_version for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A prompt of which a group is wanted: the dataset's row, its tokens, and how many completions."""

    row_index: int
    token_ids: tuple[int, ...]
    num_completions: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """How completions are drawn: the same for a whole group, and never with the tail cut off (top_p = 1).

    Attributes:
        temperature: 0 takes the likeliest token.
        max_tokens: a completion is cut there.
        stop: texts that end it.
        watch: whether METIS records it.
    """

    temperature: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    watch: bool = True
