"""Cross entropy over a large vocabulary from some of its tokens (after Bengio and Senécal 2008).

The tokens that a batch has are all there; of the others some are drawn, each standing for as many as it was drawn from,
so that the sum under the softmax is right in expectation.

Shapes: N rows, H width, V vocabulary, C tokens that stand for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


@dataclass(frozen=True, slots=True)
class Standing:
    """Tokens that stand for a vocabulary.

    Attributes:
        ids_C: different tokens of the batch, ascending, then drawn ones.
        num_own: how many of them the batch has.
        others_each: vocabulary beside the batch's tokens for each drawn one; 1 where all are there.
    """

    ids_C: Tensor
    num_own: int
    others_each: float

    def places(self, ids: Tensor) -> Tensor:
        """Where the batch's own tokens stand."""
        return torch.searchsorted(self.ids_C[: self.num_own], ids)


def standing_for(ids_N: Tensor, vocab_size: int, num_negatives: int) -> Standing:
    """The batch's tokens and up to `num_negatives` others, drawn with repetition; all where that is not fewer."""
    is_own_V = torch.bincount(ids_N, minlength=vocab_size) > 0
    own_C = is_own_V.nonzero()[:, 0]
    num_others = vocab_size - len(own_C)
    if num_others <= num_negatives:
        return Standing(torch.cat([own_C, (~is_own_V).nonzero()[:, 0]]), len(own_C), 1.0)
    drawn = torch.randint(vocab_size, (num_negatives,), device=ids_N.device)
    drawn = drawn[~is_own_V[drawn]]
    return Standing(torch.cat([own_C, drawn]), len(own_C), num_others / max(1, len(drawn)))


def sampled_cross_entropy(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, ids_N: Tensor, num_negatives: int
) -> Tensor:
    """Cross entropy of each row, (N,), in nats; exact where `num_negatives` is not below the vocabulary."""
    standing = standing_for(ids_N, len(weight_VH), num_negatives)
    for_each_C = bias_V[standing.ids_C].clone()
    for_each_C[standing.num_own :] += math.log(standing.others_each)
    logits_NC = linear(states_NH, weight_VH[standing.ids_C], for_each_C)
    return cross_entropy(logits_NC, standing.places(ids_N), reduction="none")
