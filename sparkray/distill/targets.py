"""Rows of a teacher as tensors to learn from, and how they are taken from a full vocabulary.

Three ways to stand for the tokens outside of the head:

- `sampled_tail`: the head exactly, and M draws from the rest, each weighing (tail mass) / M. In expectation over the
  draws this is the full cross entropy and its gradient (the idea of Sparse Logit Sampling, Anshumann et al. 2025, kept
  to the tail only, where it is needed).
- `tail_bucket`: the rest as one more outcome. By the data-processing inequality its divergence is a lower bound.
- `renormalised`: the head scaled to sum 1, as if the rest could not happen. Biased, and kept by name to compare with.

Shapes: N rows, K entries of the head, M draws, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparkray.config.distill import TargetKind
from sparkray.distill.scores import TokenScores, joined
from sparkray.errors import UsageError

# Stands for log(0): its exponential is 0 and products with it stay finite, so gradients do too.
LOG_ZERO = -1e4
# Least mass of a tail bucket: heads come rounded, and a reverse divergence must not turn infinite by that.
MIN_TAIL_MASS = 1e-8


@dataclass(frozen=True, slots=True)
class TargetRows:
    """The teacher's side of a loss.

    Attributes:
        head_ids_NK: token ids, -1 where a row has fewer than K.
        head_logprobs_NK: natural logarithms; LOG_ZERO where the id is -1.
        tail_ids_NM: draws from the rest; M may be 0.
        entropy_N: nats, NaN where unknown.
        temperature: at which the rows were taken.
    """

    head_ids_NK: Tensor
    head_logprobs_NK: Tensor
    tail_ids_NM: Tensor
    entropy_N: Tensor
    temperature: float = 1.0

    @property
    def num_rows(self) -> int:
        return self.head_ids_NK.shape[0]

    @property
    def log_tail_mass(self) -> Tensor:
        """Logarithm of what the head leaves, (N,), at least log(MIN_TAIL_MASS)."""
        head_mass_N = self.head_logprobs_NK.double().exp().sum(-1)
        return (1.0 - head_mass_N).clamp_min(MIN_TAIL_MASS).log().float()

    def select(self, index: Tensor | slice) -> TargetRows:
        """Some of the rows."""
        return TargetRows(
            self.head_ids_NK[index],
            self.head_logprobs_NK[index],
            self.tail_ids_NM[index],
            self.entropy_N[index],
            self.temperature,
        )

    def to(self, device: torch.device | str) -> TargetRows:
        """The same rows on another device."""
        return TargetRows(
            self.head_ids_NK.to(device),
            self.head_logprobs_NK.to(device),
            self.tail_ids_NM.to(device),
            self.entropy_N.to(device),
            self.temperature,
        )

    def shuffled(self, generator: torch.Generator) -> TargetRows:
        """The same rows in the wrong places: what no student should learn from."""
        return self.select(torch.randperm(self.num_rows, generator=generator))


def target_rows(scores: Sequence[TokenScores]) -> TargetRows:
    """Scores of some sequences, one after the other."""
    together = joined(scores)
    logprobs_NK = np.maximum(together.head_logprobs_LK, LOG_ZERO).astype(np.float32)
    return TargetRows(
        torch.from_numpy(together.head_ids_LK.astype(np.int64)),
        torch.from_numpy(logprobs_NK),
        torch.from_numpy(together.tail_ids_LM.astype(np.int64)),
        torch.from_numpy(together.entropy_L.astype(np.float32)),
        together.temperature,
    )


def require_kind(rows: TargetRows, kind: TargetKind, temperature: float) -> None:
    """Refuse a target that the rows cannot give.

    Raises:
        UsageError: `sampled_tail` without draws, or a temperature that the rows were not taken at and that cannot be
            derived from them.
    """
    if kind == "sampled_tail" and rows.tail_ids_NM.shape[1] == 0:
        raise UsageError(
            "target='sampled_tail' was asked for, and these rows hold the head only.",
            hint="Take target='tail_bucket', or a teacher that has the full vocabulary at hand (kind='transformers').",
            param="loss.target",
        )
    derivable = rows.temperature == 1.0 and kind != "sampled_tail"
    if temperature != rows.temperature and not derivable:
        raise UsageError(
            f"the loss wants temperature {temperature:g}, and the rows were taken at {rows.temperature:g}.",
            hint="Capture them at the temperature of the loss (store.temperature), or use target='tail_bucket'.",
            param="loss.temperature",
        )


def bucket_logprobs(rows: TargetRows, kind: TargetKind, temperature: float, vocab_size: int) -> Tensor:
    """The teacher over K + 1 outcomes, the last one being every token outside of the head.

    A temperature other than the rows' own flattens the head exactly up to the normaliser, and the tail as if its mass
    were spread evenly over the tokens outside of the head, which is the most that a tail of that mass can weigh at
    temperatures above 1.

    Returns:
        Log-probabilities (N, K + 1); LOG_ZERO for entries that do not exist, and for the tail of `renormalised`.
    """
    head_NK, log_tail_N = rows.head_logprobs_NK, rows.log_tail_mass
    exists_NK = rows.head_ids_NK >= 0
    if kind == "renormalised":
        scaled_NK = (head_NK / (temperature / rows.temperature)).masked_fill(~exists_NK, LOG_ZERO)
        log_head_NK = scaled_NK - scaled_NK.logsumexp(-1, keepdim=True)
        return torch.cat([log_head_NK, torch.full_like(log_tail_N, LOG_ZERO)[:, None]], -1)
    if temperature != rows.temperature:
        log_num_outside_N = (vocab_size - exists_NK.sum(-1)).clamp_min(1).log()
        log_tail_N = log_num_outside_N + (log_tail_N - log_num_outside_N) / temperature
        head_NK = (head_NK / temperature).masked_fill(~exists_NK, LOG_ZERO)
    outcomes_NC = torch.cat([head_NK, log_tail_N[:, None]], -1)
    return outcomes_NC - outcomes_NC.logsumexp(-1, keepdim=True)


def scores_from_logits(
    logits_LV: Tensor,
    next_ids_L: Tensor,
    *,
    top_logprobs: int,
    tail_draws: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> TokenScores:
    """Head, draws from the tail and entropy of full rows.

    Args:
        logits_LV: the teacher's logits at positions 0..L-1.
        next_ids_L: the tokens that follow.
        top_logprobs: entries of the head, at most V.
        tail_draws: draws from the rest; none where the head is the whole vocabulary.
        generator: of the draws; on the logits' device.
        temperature: at which all of it is taken.
    """
    logprobs_LV = (logits_LV.float() / temperature).log_softmax(-1)
    probabilities_LV = logprobs_LV.exp()
    head_LK = logprobs_LV.topk(top_logprobs, -1)
    entropy_L = -(probabilities_LV * logprobs_LV.clamp_min(LOG_ZERO)).sum(-1)
    num_draws = tail_draws if top_logprobs < logits_LV.shape[-1] else 0
    if num_draws:
        # The smallest normal number keeps a tail of zero mass drawable; its weight is zero all the same.
        tail_LV = probabilities_LV.clamp_min(torch.finfo(torch.float32).tiny).scatter(-1, head_LK.indices, 0.0)
        tail_ids_LM = _systematic_draws(tail_LV, num_draws, generator)
    else:
        tail_ids_LM = head_LK.indices[:, :0]
    return TokenScores(
        head_LK.indices.int().cpu().numpy(),
        head_LK.values.cpu().numpy(),
        logprobs_LV.gather(-1, next_ids_L[:, None])[:, 0].cpu().numpy(),
        tail_ids_LM.int().cpu().numpy(),
        entropy_L.cpu().numpy(),
        temperature,
    )


def _systematic_draws(weights_LV: Tensor, num_draws: int, generator: torch.Generator | None) -> Tensor:
    """Systematic sampling (Madow 1949): one random offset a row, then equal steps through the cumulated weights.

    The expected count of each token is that of independent draws, so nothing is biased; its spread is smaller, since no
    token comes twice before its weight fills a step. The draws of a row ascend, and belong together: fewer of them
    stand for a part of the vocabulary only.
    """
    cumulated_LV = weights_LV.double().cumsum(-1)
    offset_L1 = torch.rand((len(weights_LV), 1), dtype=torch.float64, generator=generator, device=weights_LV.device)
    places_LM = (offset_L1 + torch.arange(num_draws, device=weights_LV.device)) / num_draws * cumulated_LV[:, -1:]
    return torch.searchsorted(cumulated_LV, places_LM, right=True).clamp_max(weights_LV.shape[-1] - 1)


def draw_generator(seed: int, token_ids: Sequence[int], device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one sequence's draws: the same tokens and seed give the same draws in any order of work."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, token_ids))}".encode()).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator
