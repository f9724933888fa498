"""Divergences between a teacher's rows and a student's logits, a value a row; gradients flow to the student only.

Sources: forward and reverse KL after Hinton et al. (2015) and MiniLLM (Gu et al. 2023); the generalised Jensen-Shannon
divergence of GKD (Agarwal et al. 2024); the skewed forms of DistiLLM (Ko et al. 2024). A temperature T divides both
sides' logits, and the result is scaled by T^2, so that gradients keep their size.

Shapes: N rows, V vocabulary, K entries of a head, C = K + 1 outcomes, M draws, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from sparkray.config.distill import Divergence, LossConfig
from sparkray.distill.targets import LOG_ZERO, TargetRows, bucket_logprobs, require_kind

# A head of more than this leaves less than a tenth, and float32 knows that to 1e-6 of itself.
_NEARLY_ALL = 0.9


def distillation_loss(logits_NV: Tensor, rows: TargetRows, config: LossConfig) -> Tensor:
    """The distillation term of each row, in nats times T^2.

    For `sampled_tail` the value needs the teacher's entropy; where that is unknown the cross entropy is returned,
    whose gradient is the same.

    Raises:
        UsageError: the rows cannot give the target that the settings name.
    """
    require_kind(rows, config.target, config.temperature)
    scaled_NV = logits_NV.float() if config.temperature == 1 else logits_NV.float() / config.temperature
    if config.target == "sampled_tail":
        losses_N = _sampled_forward_kl(scaled_NV, rows)
    else:
        teacher_NC = bucket_logprobs(rows, config.target, config.temperature, logits_NV.shape[-1])
        student_NC = student_bucket_logprobs(scaled_NV, rows.head_ids_NK)
        losses_N = divergence(teacher_NC, student_NC, config.divergence, skew=config.skew, beta=config.beta)
    return losses_N * config.temperature**2


def dense_loss(logits_NV: Tensor, teacher_logits_NV: Tensor, config: LossConfig) -> Tensor:
    """The same term against a teacher's full rows; `config.target` plays no part."""
    teacher_NV = (teacher_logits_NV.float() / config.temperature).log_softmax(-1)
    student_NV = (logits_NV.float() / config.temperature).log_softmax(-1)
    losses_N = divergence(teacher_NV, student_NV, config.divergence, skew=config.skew, beta=config.beta)
    return losses_N * config.temperature**2


def divergence(
    teacher_NC: Tensor, student_NC: Tensor, name: Divergence, *, skew: float = 0.1, beta: float = 0.5
) -> Tensor:
    """Divergence of two sets of log-probabilities over the same outcomes, in nats.

    With p the teacher and q the student: `forward_kl` KL(p|q); `reverse_kl` KL(q|p); `skewed_forward_kl`
    KL(p | skew p + (1-skew) q); `skewed_reverse_kl` KL(q | (1-skew) p + skew q); `jensen_shannon`
    beta KL(p|m) + (1-beta) KL(q|m) with m = beta p + (1-beta) q.
    """
    if name == "forward_kl":
        return _kl(teacher_NC, student_NC)
    if name == "reverse_kl":
        return _kl(student_NC, teacher_NC)
    if name == "skewed_forward_kl":
        return _kl(teacher_NC, _mixture(teacher_NC, student_NC, skew))
    if name == "skewed_reverse_kl":
        return _kl(student_NC, _mixture(student_NC, teacher_NC, skew))
    middle_NC = _mixture(teacher_NC, student_NC, beta)
    return beta * _kl(teacher_NC, middle_NC) + (1 - beta) * _kl(student_NC, middle_NC)


def student_bucket_logprobs(logits_NV: Tensor, head_ids_NK: Tensor) -> Tensor:
    """The student over the head's tokens and one outcome for all others, (N, K + 1).

    The tail is one minus the head, save in rows where the head is nearly all and rounding would take the tail: there it
    is summed over its own logits, which costs a second pass over the vocabulary.
    """
    exists_NK = head_ids_NK >= 0
    log_total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    head_NK = (logits_NV.gather(-1, head_ids_NK.clamp_min(0)) - log_total_N1).masked_fill(~exists_NK, LOG_ZERO)
    head_mass_N = head_NK.exp().sum(-1)
    tail_N = torch.log1p(-head_mass_N.clamp_max(_NEARLY_ALL))
    (narrow_R,) = (head_mass_N > _NEARLY_ALL).nonzero(as_tuple=True)
    if len(narrow_R):
        rows, columns = exists_NK[narrow_R].nonzero(as_tuple=True)
        ids = head_ids_NK[narrow_R[rows], columns]
        outside_RV = logits_NV[narrow_R].index_put((rows, ids), logits_NV.new_tensor(LOG_ZERO))
        tail_N = tail_N.index_put((narrow_R,), outside_RV.logsumexp(-1) - log_total_N1[narrow_R, 0])
    return torch.cat([head_NK, tail_N[:, None]], -1)


def sampled_reverse_kl(student_logprobs_N: Tensor, teacher_logprobs_N: Tensor) -> Tensor:
    """Score-function loss of the reverse KL at tokens that the student wrote itself.

    Its gradient is, in expectation over the student's tokens, that of KL(student | teacher) with the sequence's
    earlier tokens held fixed. Its value is (log q - log p) log q; report `student - teacher` for the KL instead.
    """
    return (student_logprobs_N - teacher_logprobs_N).detach() * student_logprobs_N


def uld_loss(teacher_logprobs_NC: Tensor, student_logprobs_NC: Tensor) -> Tensor:
    """Distance between probabilities sorted by size, for vocabularies that share no tokens (Boizard et al. 2024, ULD).

    The shorter side is padded with zeros. Between 0 (equal up to renaming tokens) and 2.
    """
    teacher_NC = teacher_logprobs_NC.exp().sort(-1, descending=True).values
    student_NC = student_logprobs_NC.exp().sort(-1, descending=True).values
    width = max(teacher_NC.shape[-1], student_NC.shape[-1])
    teacher_NC = torch.nn.functional.pad(teacher_NC, (0, width - teacher_NC.shape[-1]))
    student_NC = torch.nn.functional.pad(student_NC, (0, width - student_NC.shape[-1]))
    return (teacher_NC - student_NC).abs().sum(-1)


def data_loss(logits_NV: Tensor, next_ids_N: Tensor) -> Tensor:
    """Cross entropy on the data, a value a row, in nats."""
    return cross_entropy(logits_NV.float(), next_ids_N, reduction="none")


def chunked_rows(
    hidden_NH: Tensor, head_VH: Tensor, compute: Callable[[Tensor, slice], Tensor], chunk_rows: int
) -> Tensor:
    """`compute(logits, rows)` over slices of rows, without all logits in memory at once.

    Args:
        hidden_NH: the student's last hidden states.
        head_VH: its output matrix.
        compute: gives a tensor whose first dimension is the slice's rows.
        chunk_rows: rows at a time; all logits but the last part's are computed again in the backward pass.
    """
    parts = []
    for start in range(0, hidden_NH.shape[0], chunk_rows):
        rows = slice(start, min(start + chunk_rows, hidden_NH.shape[0]))

        def part(hidden: Tensor, head: Tensor, rows: slice = rows) -> Tensor:
            return compute(linear(hidden, head), rows)

        # The backward pass of one part has its logits in memory anyway, so of the last part they may stay.
        kept = rows.stop == hidden_NH.shape[0]
        arguments = hidden_NH[rows], head_VH
        parts.append(part(*arguments) if kept else checkpoint(part, *arguments, use_reentrant=False))
    return torch.cat(parts)


def _kl(left_NC: Tensor, right_NC: Tensor) -> Tensor:
    return (left_NC.exp() * (left_NC - right_NC)).sum(-1)


def _mixture(left_NC: Tensor, right_NC: Tensor, share: float) -> Tensor:
    """log(share * left + (1 - share) * right)."""
    return torch.logaddexp(left_NC + math.log(share), right_NC + math.log1p(-share))


def _sampled_forward_kl(logits_NV: Tensor, rows: TargetRows) -> Tensor:
    log_total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    head_NK = logits_NV.gather(-1, rows.head_ids_NK.clamp_min(0)) - log_total_N1
    tail_NM = logits_NV.gather(-1, rows.tail_ids_NM) - log_total_N1
    head_N = (rows.head_logprobs_NK.exp() * head_NK).sum(-1)
    cross_entropy_N = -(head_N + rows.log_tail_mass.exp() * tail_NM.mean(-1))
    return cross_entropy_N - rows.entropy_N.nan_to_num(nan=0.0)
