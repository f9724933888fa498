"""Texts longer than a teacher's context, as windows that overlap.

A row is taken from the first window that holds it, so every row but those of a text's beginning has at least
`overlap` tokens of context before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparkray.distill.scores import TokenScores, joined
from sparkray.errors import InputError


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens start..stop-1 of a text; its rows from `first_row` (counted in the window) are the new ones."""

    start: int
    stop: int
    first_row: int


def windows(num_tokens: int, max_tokens: int, overlap_tokens: int) -> list[Window]:
    """Cut a text into windows of at most `max_tokens` that share `overlap_tokens` with the one before."""
    cut = [Window(0, min(num_tokens, max_tokens), 0)]
    while cut[-1].stop < num_tokens:
        start = cut[-1].stop - overlap_tokens
        # The window before has no row for its last token: that row belongs to the next token, which it does not see.
        cut.append(Window(start, min(num_tokens, start + max_tokens), overlap_tokens - 1))
    return cut


def score_in_windows(
    score: Callable[[Sequence[int]], TokenScores], token_ids: Sequence[int], max_tokens: int, overlap_tokens: int
) -> TokenScores:
    """Scores of a text of any length, checked.

    Raises:
        InputError: fewer than two tokens, which have no row.
        TeacherReplyError: an answer that is not one about these tokens.
    """
    if len(token_ids) < 2:
        raise InputError(
            f"a text of {len(token_ids)} tokens was given, and two are the fewest that have a next token to score.",
            param="token_ids",
        )
    parts = []
    for window in windows(len(token_ids), max_tokens, max(overlap_tokens, 1)):
        length = window.stop - window.start
        scores = score(token_ids[window.start : window.stop]).checked(length - 1)
        parts.append(scores.rows(window.first_row, scores.num_rows))
    return parts[0] if len(parts) == 1 else joined(parts)
