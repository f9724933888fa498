"""Comparing two models by the likeliest tokens of each place, as an engine gives them for a prompt.

Shapes: N places, K tokens a place (the token that came, then the likeliest).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError
from sparkray.pruning.validate import Comparison

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """What one model says of every place of a prompt but the first.

    Attributes:
        ids_NK: token ids, the one that came first, then by rank; `NO_TOKEN` where there are fewer.
        logprobs_NK: their natural log-probabilities.
    """

    ids_NK: NDArray[np.int64]
    logprobs_NK: NDArray[np.float64]


def compare_top(before: Sequence[TopLogprobs], after: Sequence[TopLogprobs], note: str | None = None) -> Comparison:
    """Perplexities, agreement of the likeliest token, and the KL over the tokens that both models name.

    All tokens that are not named by both are one cell of the distribution, so by the data-processing inequality the
    KL is a lower bound; it is exact where every token is named.

    Raises:
        InputError: there is no place to compare.
    """
    num_tokens = agreed = 0
    nll_before = nll_after = divergence = 0.0
    for left, right in zip(before, after, strict=True):
        for place in range(len(left.ids_NK)):
            old, new = _named(left, place), _named(right, place)
            came = int(left.ids_NK[place, 0])
            nll_before -= old[came]
            nll_after -= new[came]
            divergence += _partition_kl(old, new)
            agreed += _likeliest(old) == _likeliest(new)
            num_tokens += 1
    if num_tokens == 0:
        raise InputError("no sequence has two tokens, so no next token can be compared.")
    return Comparison(
        num_tokens,
        math.exp(nll_before / num_tokens),
        math.exp(nll_after / num_tokens),
        divergence / num_tokens,
        agreed / num_tokens,
        engine="vllm",
        note=note,
    )


def _named(top: TopLogprobs, place: int) -> dict[int, float]:
    pairs = zip(top.ids_NK[place].tolist(), top.logprobs_NK[place].tolist(), strict=True)
    return {token: logprob for token, logprob in pairs if token != NO_TOKEN}


def _likeliest(named: dict[int, float]) -> int:
    return max(named, key=lambda token: (named[token], -token))


def _partition_kl(old: dict[int, float], new: dict[int, float]) -> float:
    total = rest_old = rest_new = 0.0
    for token in old.keys() & new.keys():
        p, q = math.exp(old[token]), math.exp(new[token])
        total += p * (old[token] - new[token])
        rest_old, rest_new = rest_old + p, rest_new + q
    # What rounding leaves of a whole distribution is no cell of its own.
    left_old, left_new = 1.0 - rest_old, 1.0 - rest_new
    if left_old > 1e-6 and left_new > 1e-6:
        total += left_old * math.log(left_old / left_new)
    return max(0.0, total)
