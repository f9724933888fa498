"""Putting right that the engine drew from another policy than the one that is trained.

Engine and trainer give the same token different probabilities: other kernels, other rounding, and with one step off
older weights. Each token is weighed by the trainer's probability over the engine's, cut off above (truncated
importance sampling, Espeholt et al. 1802.01561; for LLM engines Yao et al. 2025), and a completion whose geometric
mean ratio is far from 1 is left out: there the two sides do not mean the same policy.

The raw ratios are what is reported: after truncation they would hide what they are there to show.

Shapes: B completions, T positions of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Weights and the raw figures behind them. Sums add up over micro-batches, maxima are taken.

    Attributes:
        weights_BT: for the loss, without gradient; 0 where masked.
        ratio_sum: sum of the raw token ratios.
        max_ratio: the largest raw token ratio.
        gap_sum: sum of |log-probability of the trainer - that of the engine|.
        max_gap: the largest of them.
        k3_sum: sum of ratio - 1 - log ratio: the KL of engine to trainer, without bias.
        truncated_sum: tokens above the cap.
        masked_completions: completions outside the geometric bounds.
    """

    weights_BT: Tensor
    ratio_sum: Tensor
    max_ratio: Tensor
    gap_sum: Tensor
    max_gap: Tensor
    k3_sum: Tensor
    truncated_sum: Tensor
    masked_completions: Tensor


@torch.no_grad()
def correct(
    trainer_BT: Tensor,
    engine_BT: Tensor,
    mask_BT: Tensor,
    *,
    token_ratio_cap: float,
    geometric_low: float,
    geometric_high: float,
) -> Correction:
    """Weigh the tokens of B completions.

    Args:
        trainer_BT: log-probabilities under the trainer's weights at the start of the step.
        engine_BT: log-probabilities as the engine drew them.
        mask_BT: 1 where a token is the completion's.
        token_ratio_cap: ratios above it count as this.
        geometric_low: a completion with a lower geometric mean ratio gets weights of 0.
        geometric_high: a completion with a higher one does too.
    """
    mask_BT = mask_BT > 0
    log_ratio_BT = torch.where(mask_BT, trainer_BT - engine_BT, 0.0)
    ratio_BT = torch.where(mask_BT, log_ratio_BT.exp(), 0.0)
    mean_B = (log_ratio_BT.sum(1) / mask_BT.sum(1).clamp(min=1)).exp()
    outside_B = (mean_B < geometric_low) | (mean_B > geometric_high)
    weights_BT = torch.where(outside_B.unsqueeze(1), 0.0, ratio_BT.clamp(max=token_ratio_cap))
    return Correction(
        weights_BT=weights_BT,
        ratio_sum=ratio_BT.sum(),
        max_ratio=ratio_BT.max(),
        gap_sum=log_ratio_BT.abs().sum(),
        max_gap=log_ratio_BT.abs().max(),
        k3_sum=torch.where(mask_BT, ratio_BT - 1.0 - log_ratio_BT, 0.0).sum(),
        truncated_sum=(ratio_BT > token_ratio_cap).sum(),
        masked_completions=outside_B.sum(),
    )
