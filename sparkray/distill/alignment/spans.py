"""Groups of tokens that cover the same bytes: both tokenizers agree at every edge of a group and nowhere inside.

The grouping by byte offsets is the one of GOLD (Patiño et al. 2025), with the cases of empty pieces made explicit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparkray.errors import InputError


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """Tokens teacher_start..teacher_stop-1 of the teacher and student_start..student_stop-1 of the student."""

    teacher_start: int
    teacher_stop: int
    student_start: int
    student_stop: int
    num_bytes: int

    @property
    def one_to_one(self) -> bool:
        return self.teacher_stop - self.teacher_start == self.student_stop - self.student_start == 1


def align_pieces(teacher: Sequence[bytes], student: Sequence[bytes]) -> list[SpanGroup]:
    """The finest groups over which two spellings of one text agree; they cover every token of both, in order.

    Empty pieces (special tokens) are grouped with the other side's at the same place; where that side has none, they
    join the group before them, or the first one.

    Raises:
        InputError: the spellings differ.
    """
    if b"".join(teacher) != b"".join(student):
        raise InputError("the two token sequences spell different texts, and alignment needs the same bytes of both.")
    groups: list[SpanGroup] = []
    i = j = 0
    while i < len(teacher) or j < len(student):
        start_i, start_j = i, j
        i, j = _after_empty(teacher, i), _after_empty(student, j)
        if i > start_i and j > start_j:
            groups.append(SpanGroup(start_i, i, start_j, j, 0))
            continue
        if (i > start_i or j > start_j) and groups:
            last = groups.pop()
            groups.append(SpanGroup(last.teacher_start, i, last.student_start, j, last.num_bytes))
            continue
        if i == len(teacher) and j == len(student):
            groups.append(SpanGroup(start_i, i, start_j, j, 0))
            break
        # One piece of each, then more of whichever side is behind, until both end at the same byte.
        taken_i, taken_j = len(teacher[i]), len(student[j])
        i, j = i + 1, j + 1
        while taken_i != taken_j:
            if taken_i < taken_j:
                taken_i += len(teacher[i])
                i += 1
            else:
                taken_j += len(student[j])
                j += 1
        groups.append(SpanGroup(start_i, i, start_j, j, taken_i))
    return groups


def share_one_to_one(groups: Sequence[SpanGroup]) -> float:
    """Share of the bytes that lie in groups of one token on each side; 1 for a text without bytes."""
    total = sum(group.num_bytes for group in groups)
    alone = sum(group.num_bytes for group in groups if group.one_to_one)
    return alone / total if total else 1.0


def _after_empty(pieces: Sequence[bytes], index: int) -> int:
    while index < len(pieces) and not pieces[index]:
        index += 1
    return index
