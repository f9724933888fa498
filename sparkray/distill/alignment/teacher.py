"""A teacher of another tokenizer, answering in the student's ids.

The student's tokens are spelt out, cut again by the teacher's tokenizer, scored, and carried back by bytes. A row of
the student whose token has no counterpart gets an empty head: the whole distribution is then one tail bucket, equal on
both sides, and teaches nothing. So the rows serve `tail_bucket` targets as any others do.

Shapes: L rows of the student, K entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sparkray.distill.alignment.pieces import token_pieces
from sparkray.distill.alignment.project import align_scores, map_vocabularies, require_coverage
from sparkray.distill.alignment.spans import align_pieces
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores, head_only
from sparkray.distill.teachers.base import Teacher


class AlignedTeacher:
    """Wraps a teacher.

    Args:
        inner: scores its own tokens.
        encode: the teacher's tokenizer, without special tokens.
        teacher_pieces, student_pieces: bytes of every id of both.
        ends: the end-of-text ids of teacher and student.
        student_sha256: hash of the student's tokenizer.
        min_mass_share: least share of the teacher's probability that must have a counterpart.
    """

    def __init__(
        self,
        inner: Teacher,
        encode: Callable[[str], Sequence[int]],
        teacher_pieces: Sequence[bytes],
        student_pieces: Sequence[bytes],
        ends: tuple[int, int],
        student_sha256: str,
        *,
        min_mass_share: float,
    ) -> None:
        self._inner = inner
        self._encode = encode
        self._pieces = teacher_pieces, student_pieces
        self._ends = ends
        self._student_sha256 = student_sha256
        self._min_mass_share = min_mass_share
        self._vocabularies = map_vocabularies(teacher_pieces, student_pieces, special=[ends])

    @property
    def identity(self) -> TeacherIdentity:
        return replace(self._inner.identity, tokenizer_sha256=self._student_sha256)

    @property
    def parameters(self) -> str:
        return f"{self._inner.parameters} aligned_from={self._inner.identity.tokenizer_sha256}"

    @property
    def max_model_tokens(self) -> int:
        # The teacher may need more tokens for the same text; half leaves room for twice as many.
        return self._inner.max_model_tokens // 2

    def score(self, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
        """Rows in the student's ids.

        Raises:
            InputError: a tokenizer that changes the text before it cuts it, or too little in common.
        """
        teacher_end, student_end = self._ends
        teacher_ids: list[int] = []
        teacher_parts: list[bytes] = []
        student_parts: list[bytes] = []
        first, last = _spelt_range(token_ids, self._pieces[1])
        for segment in _segments(token_ids[first:last], student_end):
            spelt = [self._pieces[1][token] for token in segment]
            student_parts.extend(spelt)
            text, ended = b"".join(spelt), segment[-1] == student_end
            encoded = list(self._encode(text.decode()))
            teacher_ids.extend([*encoded, teacher_end] if ended else encoded)
            teacher_parts.extend(token_pieces(text, encoded, self._pieces[0]))
            if ended:
                teacher_parts.append(b"")
        num_rows = len(token_ids) - 1
        if len(teacher_ids) < 2:
            return _empty(num_rows, top_logprobs)
        scores = self._inner.score(teacher_ids, top_logprobs).checked(len(teacher_ids) - 1)
        aligned = align_scores(scores, align_pieces(teacher_parts, student_parts), self._vocabularies)
        require_coverage(aligned, self._min_mass_share)
        rows = _empty(num_rows, top_logprobs)
        places = aligned.rows + first
        rows.head_ids_LK[places] = aligned.head.head_ids_LK
        rows.head_logprobs_LK[places] = aligned.head.head_logprobs_LK
        rows.token_logprobs_L[places] = aligned.head.token_logprobs_L
        return rows

    def close(self) -> None:
        self._inner.close()


def _empty(num_rows: int, top_logprobs: int) -> TokenScores:
    return head_only(
        np.full((num_rows, top_logprobs), -1, np.int32),
        np.full((num_rows, top_logprobs), -np.inf, np.float32),
        np.full(num_rows, -np.inf, np.float32),
    )


def _spelt_range(token_ids: Sequence[int], pieces: Sequence[bytes]) -> tuple[int, int]:
    """The tokens without a cut character at either end of the sequence."""
    first, last = 0, len(token_ids)
    while first < last and pieces[token_ids[first]][:1] and 0x80 <= pieces[token_ids[first]][0] < 0xC0:
        first += 1
    while first < last:
        try:
            b"".join(pieces[token] for token in token_ids[first:last]).decode()
            break
        except UnicodeDecodeError:
            last -= 1
    return first, last


def _segments(token_ids: Sequence[int], end_id: int) -> list[list[int]]:
    """Runs of tokens, each up to and with its end of text."""
    segments: list[list[int]] = [[]]
    for token in token_ids:
        segments[-1].append(token)
        if token == end_id:
            segments.append([])
    return [segment for segment in segments if segment]
