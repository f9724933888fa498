"""A teacher's rows in the student's vocabulary.

Where one token of each covers the same bytes, the teacher's head is carried over token by token, by bytes. What has
no counterpart is left out of the head and so falls to the tail bucket; its probabilities may also be compared by rank
(ULD). Where several tokens cover the same bytes, what both models say about exactly these bytes is compared: the
product of their probabilities by the chain rule, as one event against all others.

Shapes: L rows of the student, K entries of a head, U uncommon entries, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparkray.distill.alignment.spans import SpanGroup, share_one_to_one
from sparkray.distill.scores import TokenScores, head_only
from sparkray.errors import InputError


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """Tokens of two vocabularies that spell the same bytes.

    Attributes:
        student_of_teacher: the student's id of each teacher id, or -1.
        uncommon_student: True for student ids that no teacher token spells.
    """

    student_of_teacher: NDArray[np.int32]
    uncommon_student: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class AlignedScores:
    """What a student can learn from a teacher of another tokenizer, for one text.

    Attributes:
        rows: the student's rows that the head belongs to.
        head: the head in the student's ids.
        uncommon_logprobs_LU: the teacher's entries without a counterpart, likeliest first, -inf where there are fewer.
        span_starts, span_stops: rows of the student that predict the tokens of one span.
        span_logprobs: the teacher's log-probability of the span's bytes.
        byte_share: share of the bytes in groups of one token each.
        mass_share: share of the heads' probability that has a counterpart.
    """

    rows: NDArray[np.int64]
    head: TokenScores
    uncommon_logprobs_LU: NDArray[np.float32]
    span_starts: NDArray[np.int64]
    span_stops: NDArray[np.int64]
    span_logprobs: NDArray[np.float32]
    byte_share: float
    mass_share: float


def map_vocabularies(
    teacher: Sequence[bytes], student: Sequence[bytes], special: Sequence[tuple[int, int]] = ()
) -> VocabularyMap:
    """Pair ids by their bytes.

    Args:
        teacher, student: pieces of every id; empty pieces (special tokens) are paired by `special` only.
        special: pairs of ids with the same role, such as the two ends of text.
    """
    by_bytes: dict[bytes, int] = {}
    for number, piece in enumerate(student):
        if piece:
            by_bytes.setdefault(piece, number)
    paired = np.array([by_bytes.get(piece, -1) for piece in teacher], np.int32)
    for teacher_id, student_id in special:
        paired[teacher_id] = student_id
    uncommon = np.ones(len(student), np.bool_)
    uncommon[paired[paired >= 0]] = False
    return VocabularyMap(paired, uncommon)


def align_scores(scores: TokenScores, groups: Sequence[SpanGroup], vocabularies: VocabularyMap) -> AlignedScores:
    """Carry a teacher's rows over to the student's tokens.

    Args:
        scores: the teacher's rows over its own tokens; the first token of a text has no row and teaches nothing.
        groups: of `align_pieces`.
        vocabularies: of `map_vocabularies`.
    """
    singles = [group for group in groups if group.one_to_one and group.teacher_start > 0 and group.student_start > 0]
    spans = [
        group
        for group in groups
        if not group.one_to_one and group.num_bytes and group.teacher_start > 0 and group.student_start > 0
    ]
    teacher_rows = np.array([group.teacher_start - 1 for group in singles], np.int64)
    ids_LK, logprobs_LK = scores.head_ids_LK[teacher_rows], scores.head_logprobs_LK[teacher_rows]
    mapped_LK = np.where(ids_LK >= 0, vocabularies.student_of_teacher[np.maximum(ids_LK, 0)], -1)
    carried_LK = np.where(mapped_LK >= 0, logprobs_LK, -np.inf).astype(np.float32)
    # A stable sort by "has no counterpart" keeps the likeliest first among those that have one.
    order_LK = np.argsort(mapped_LK < 0, axis=1, kind="stable")
    head = head_only(
        np.take_along_axis(mapped_LK, order_LK, 1).astype(np.int32),
        np.take_along_axis(carried_LK, order_LK, 1),
        scores.token_logprobs_L[teacher_rows],
    )
    uncommon_LU = np.where(mapped_LK < 0, logprobs_LK, -np.inf).astype(np.float32)
    mass, carried = float(np.exp(logprobs_LK).sum()), float(np.exp(carried_LK).sum())
    return AlignedScores(
        rows=np.array([group.student_start - 1 for group in singles], np.int64),
        head=head,
        uncommon_logprobs_LU=-np.sort(-uncommon_LU, axis=1),
        span_starts=np.array([group.student_start - 1 for group in spans], np.int64),
        span_stops=np.array([group.student_stop - 1 for group in spans], np.int64),
        span_logprobs=np.array(
            [scores.token_logprobs_L[group.teacher_start - 1 : group.teacher_stop - 1].sum() for group in spans],
            np.float32,
        ),
        byte_share=share_one_to_one(groups),
        mass_share=carried / mass if mass else 1.0,
    )


def require_coverage(aligned: AlignedScores, min_share: float) -> None:
    """Refuse an alignment that would teach too little.

    Raises:
        InputError: less than `min_share` of the probability has a counterpart.
    """
    if aligned.mass_share < min_share:
        raise InputError(
            f"{aligned.mass_share:.1%} of the teacher's probability has a counterpart in the student's vocabulary,"
            f" and at least {min_share:.1%} is asked for ({aligned.byte_share:.1%} of the bytes align one to one).",
            hint="Lower alignment.min_mass_share, or take a teacher with a closer tokenizer.",
            param="alignment.min_mass_share",
        )


def span_losses(token_logprobs_L: Tensor, aligned: AlignedScores) -> Tensor:
    """KL of "these bytes" against "anything else", teacher from student, in nats, a value a span.

    Args:
        token_logprobs_L: the student's log-probabilities of the tokens that follow each of its rows.
    """
    sums_L = torch.cat([token_logprobs_L.new_zeros(1), token_logprobs_L.double().cumsum(0)])
    starts, stops = torch.from_numpy(aligned.span_starts), torch.from_numpy(aligned.span_stops)
    student_S = (sums_L[stops] - sums_L[starts]).clamp_max(-1e-9)
    teacher_S = torch.from_numpy(aligned.span_logprobs).double().clamp_max(-1e-9)
    inside_S = teacher_S.exp() * (teacher_S - student_S)
    other_teacher_S, other_student_S = (-torch.expm1(side).clamp_max(-1e-12) for side in (teacher_S, student_S))
    return (inside_S + other_teacher_S * (other_teacher_S.log() - other_student_S.log())).float()


def uncommon_losses(logits_LV: Tensor, aligned: AlignedScores, vocabularies: VocabularyMap) -> Tensor:
    """Distance by rank between what the two vocabularies do not share, a value a row of `aligned.rows`.

    Args:
        logits_LV: the student's logits at `aligned.rows`.
    """
    width = aligned.uncommon_logprobs_LU.shape[1]
    shared_V = torch.from_numpy(~vocabularies.uncommon_student)
    student_LV = logits_LV.log_softmax(-1).exp().masked_fill(shared_V, 0.0)
    student_LU = student_LV.topk(min(width, student_LV.shape[-1]), -1).values
    student_LU = torch.nn.functional.pad(student_LU, (0, width - student_LU.shape[-1]))
    teacher_LU = torch.from_numpy(np.exp(aligned.uncommon_logprobs_LU))
    return (teacher_LU - student_LU).abs().sum(-1)
