"""A student on held-out text: against the data, and against the teacher's full vocabulary.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sparkray.distill.data.pack import Sequences
from sparkray.distill.losses import divergence
from sparkray.distill.students.causal import CausalStudent

_NUM_BINS = 15


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the rows that count.

    Attributes:
        cross_entropy: nats a token, on the data.
        perplexity: its exponential.
        calibration_error: expected difference of confidence and accuracy, fifteen bins.
        kl_to_teacher, reverse_kl: KL(teacher | student) and back, in nats, over the whole vocabulary; None without a
            teacher.
        top1_agreement: share of rows whose likeliest token is the teacher's; None without a teacher.
        num_rows: rows counted.
    """

    cross_entropy: float
    perplexity: float
    calibration_error: float
    kl_to_teacher: float | None
    reverse_kl: float | None
    top1_agreement: float | None
    num_rows: int

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    student: CausalStudent,
    data: Sequences,
    numbers: Sequence[int],
    teacher_logits: Callable[[int], Tensor] | None,
    device: torch.device,
) -> Evaluation:
    """Evaluate on some held-out sequences.

    Args:
        student: the model.
        data: held-out sequences.
        numbers: which of them.
        teacher_logits: full rows of a sequence by its number, (len - 1, V).
        device: of the student.
    """
    student.eval()
    entropies: list[Tensor] = []
    forwards: list[Tensor] = []
    reverses: list[Tensor] = []
    agreements: list[Tensor] = []
    confidences: list[Tensor] = []
    hits: list[Tensor] = []
    for number in numbers:
        tokens = data.tokens(number)
        mask = torch.from_numpy(data.row_mask(number)[: len(tokens) - 1])
        ids = torch.tensor([tokens], device=device)
        student_NV = student.logits(ids[:, :-1])[0][mask.to(device)].log_softmax(-1).cpu()
        following_N = torch.tensor(tokens[1:])[mask]
        entropies.append(-student_NV.gather(-1, following_N[:, None])[:, 0])
        best = student_NV.max(-1)
        confidences.append(best.values.exp())
        hits.append((best.indices == following_N).float())
        if teacher_logits is not None:
            teacher_NV = teacher_logits(number)[mask][:, : student_NV.shape[-1]].log_softmax(-1)
            forwards.append(divergence(teacher_NV, student_NV, "forward_kl"))
            reverses.append(divergence(teacher_NV, student_NV, "reverse_kl"))
            agreements.append((teacher_NV.argmax(-1) == best.indices).float())
    student.train()
    cross_entropy = torch.cat(entropies).mean().item()
    return Evaluation(
        cross_entropy=cross_entropy,
        perplexity=math.exp(cross_entropy),
        calibration_error=calibration_error(torch.cat(confidences), torch.cat(hits)),
        kl_to_teacher=torch.cat(forwards).mean().item() if forwards else None,
        reverse_kl=torch.cat(reverses).mean().item() if reverses else None,
        top1_agreement=torch.cat(agreements).mean().item() if agreements else None,
        num_rows=sum(len(part) for part in entropies),
    )


def calibration_error(confidence_N: Tensor, hit_N: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017): mean over rows of |confidence - accuracy| of the row's bin."""
    bins_N = (confidence_N * _NUM_BINS).long().clamp_max(_NUM_BINS - 1)
    sums = torch.zeros(_NUM_BINS).index_add_(0, bins_N, confidence_N - hit_N)
    return (sums.abs().sum() / confidence_N.shape[0]).item()
