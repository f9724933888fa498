"""The policy losses, as functions of tensors.

With r the ratio of the trained policy's probability of a token to that of the policy at the start of the step, and A
the advantage of its completion:

- `grpo`: -min(r A, clip(r) A), mean over tokens of a completion, then over completions (2402.03300)
- `dr_grpo`: the same terms over a constant length, so that long completions are not favoured (2503.20783)
- `dapo`: the same terms, mean over all tokens (2503.14476)
- `cispo`: -stop_gradient(min(r, cap)) A log p, mean over all tokens (MiniMax-M1, 2506.13585)
- `gspo`: as `grpo`, with r the geometric mean over the completion (2507.18071)

Counts are given and not taken from the tensors: a step is cut into micro-batches and spread over ranks, and the sum
of their losses must be the loss of the whole. TRL's `GRPOTrainer` has the same formulas; tests hold the two together.

Shapes: B completions, T positions of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparkray.config.grpo import LossConfig


@dataclass(frozen=True, slots=True)
class Counts:
    """What a whole step has, over all ranks and micro-batches.

    Attributes:
        num_completions: that are trained on.
        num_tokens: of them.
        max_completion_tokens: the constant length of `dr_grpo`.
    """

    num_completions: int
    num_tokens: int
    max_completion_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class LossParts:
    """A loss and the sums that its metrics are made of; sums add up over micro-batches and ranks.

    Attributes:
        loss: scalar with a gradient.
        clipped_sum: tokens whose gradient the clip took away (for `gspo` of whole completions).
        kl_sum: sum over tokens of the k3 estimate of KL(policy || reference), in nats.
    """

    loss: Tensor
    clipped_sum: Tensor
    kl_sum: Tensor


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    config: LossConfig,
    counts: Counts,
    *,
    correction_BT: Tensor | None = None,
    reference_BT: Tensor | None = None,
) -> LossParts:
    """The part of a step's loss that these completions make.

    Args:
        logprobs_BT: of the trained policy, with a gradient.
        old_logprobs_BT: of the policy at the start of the step.
        advantages_B: one a completion.
        mask_BT: 1 where a token is the completion's.
        config: which loss.
        counts: of the whole step.
        correction_BT: weights for what the engine drew differently (`correction`); 1 without.
        reference_BT: log-probabilities of the reference; needed where `kl_beta` is above 0.
    """
    mask_BT = mask_BT.to(logprobs_BT.dtype)
    advantages_B1 = advantages_B.to(logprobs_BT.dtype).unsqueeze(1)
    log_ratio_BT = (logprobs_BT - old_logprobs_BT) * mask_BT
    lengths_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1.0)
    if config.name == "gspo":
        log_ratio_BT = (log_ratio_BT.sum(1, keepdim=True) / lengths_B1).expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.exp()
    if config.name == "cispo":
        weight_BT = ratio_BT.clamp(max=config.cispo_max_ratio).detach()
        token_loss_BT = -weight_BT * advantages_B1 * logprobs_BT
        clipped_BT = (ratio_BT > config.cispo_max_ratio) & (advantages_B1 > 0)
    else:
        clipped_ratio_BT = ratio_BT.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
        token_loss_BT = -torch.min(ratio_BT * advantages_B1, clipped_ratio_BT * advantages_B1)
        low_BT = (ratio_BT < 1.0 - config.clip_low) & (advantages_B1 < 0)
        clipped_BT = low_BT | ((ratio_BT > 1.0 + config.clip_high) & (advantages_B1 > 0))
    if correction_BT is not None:
        token_loss_BT = token_loss_BT * correction_BT
    kl_BT = torch.zeros_like(token_loss_BT)
    if reference_BT is not None:
        gap_BT = (reference_BT - logprobs_BT) * mask_BT
        kl_BT = gap_BT.exp() - gap_BT - 1.0
        token_loss_BT = token_loss_BT + config.kl_beta * kl_BT
    # Where the mask is 0 a token may hold anything, an infinity too: it is left out, not multiplied away.
    token_loss_BT = torch.where(mask_BT > 0, token_loss_BT, 0.0)
    return LossParts(
        loss=(token_loss_BT * _token_weights(config, counts, lengths_B1)).sum(),
        clipped_sum=(clipped_BT * mask_BT).sum().detach(),
        kl_sum=(kl_BT * mask_BT).sum().detach(),
    )


def _token_weights(config: LossConfig, counts: Counts, lengths_B1: Tensor) -> Tensor:
    if config.name in ("grpo", "gspo"):
        return 1.0 / (lengths_B1 * max(1, counts.num_completions))
    if config.name == "dr_grpo":
        divisor = max(1, counts.num_completions) * counts.max_completion_tokens
        return torch.full_like(lengths_B1, 1.0 / divisor)
    return torch.full_like(lengths_B1, 1.0 / max(1, counts.num_tokens))
