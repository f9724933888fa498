"""BrierLM: the quality of a language model from its samples alone (Shao et al. 2025).

The Brier score of an n-gram y, 2 p(y) - sum p^2, has the unbiased estimate 1{a = y} + 1{b = y} - 1{a = b} from two
independent samples a and b. BrierLM is the geometric mean over n = 1..4, times 100; higher is better, and an
autoregressive model can be measured the same way.

Shapes: N positions, K tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_NGRAM = 4


def brier_scores(first_NK: Tensor, second_NK: Tensor, truth_NK: Tensor) -> Tensor:
    """Brier-1 to Brier-4 over the first n tokens of each position, averaged over positions, (min(K, 4),)."""
    scores = []
    for length in range(1, min(MAX_NGRAM, truth_NK.shape[-1]) + 1):
        first, second, truth = (ids[:, :length] for ids in (first_NK, second_NK, truth_NK))
        hits = _equal(first, truth) + _equal(second, truth) - _equal(first, second)
        scores.append(hits.mean())
    return torch.stack(scores)


def brier_lm(scores: Tensor) -> float:
    """The geometric mean times 100; 0 where an estimate is not above zero."""
    if (scores <= 0).any():
        return 0.0
    return 100 * scores.log().mean().exp().item()


def _equal(left: Tensor, right: Tensor) -> Tensor:
    return (left == right).all(-1).double()
