"""Answers of OpenAI-compatible hosts as scores: three shapes, read strictly.

Token ids are taken as ids wherever a host can say them. Strings are mapped by their bytes; a string that several tokens
share (half a character shows as a replacement mark) names none of them, and its probability stays in the tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparkray.distill.errors import TeacherReplyError
from sparkray.distill.scores import TokenScores, head_only

_ID_PREFIX = "token_id:"


class PieceIndex:
    """Ids by the bytes of their tokens; bytes that several ids share belong to none."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._ids: dict[bytes, int] = {}
        for number, piece in enumerate(pieces):
            if piece:
                self._ids[piece] = -1 if piece in self._ids else number

    def of_text(self, token: str) -> int:
        """The id of a token as a host writes it, or -1."""
        if token.startswith(_ID_PREFIX):
            return int(token.removeprefix(_ID_PREFIX))
        return self._ids.get(token.encode(), -1)

    def of_bytes(self, token: Sequence[int]) -> int:
        """The id of a token given as bytes, or -1."""
        return self._ids.get(bytes(token), -1)


def read_prompt_logprobs(body: Any, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
    """vLLM's extension: `choices[0].prompt_logprobs`, a table by token id for each position, None for the first.

    Raises:
        TeacherReplyError: another shape, or a position without its own token.
    """
    positions = _at(body, "choices", 0, "prompt_logprobs")
    if not isinstance(positions, list) or len(positions) != len(token_ids):
        found = len(positions) if isinstance(positions, list) else "no"
        raise TeacherReplyError(
            f"the teacher answered {found} positions, and {len(token_ids)} were asked for.",
            hint="Does the host know prompt_logprobs? Others score with mode='echo', or can only complete.",
        )
    heads: list[list[tuple[int, float]]] = []
    tokens: list[float] = []
    for token_id, position in zip(token_ids[1:], positions[1:], strict=True):
        entries = {int(key): _number(_at(value, "logprob")) for key, value in _table(position).items()}
        if token_id not in entries:
            raise TeacherReplyError(f"the teacher answered a position without its token {token_id}.")
        tokens.append(entries[token_id])
        heads.append(_without_extra(entries, token_id, top_logprobs))
    return _scores(heads, tokens, top_logprobs)


def read_echo(body: Any, token_ids: Sequence[int], top_logprobs: int, index: PieceIndex) -> TokenScores:
    """OpenAI's older completions with `echo`: `choices[0].logprobs.{token_logprobs, top_logprobs}`, keyed by text.

    Raises:
        TeacherReplyError: another shape, or fewer positions than tokens.
    """
    logprobs = _at(body, "choices", 0, "logprobs")
    own, tables = _at(logprobs, "token_logprobs"), _at(logprobs, "top_logprobs")
    if not isinstance(own, list) or not isinstance(tables, list) or min(len(own), len(tables)) < len(token_ids):
        raise TeacherReplyError(f"the teacher answered fewer positions than the {len(token_ids)} asked for.")
    heads, tokens = [], []
    for token_id, logprob, table in zip(token_ids[1:], own[1:], tables[1:], strict=False):
        named = ((index.of_text(text), _number(value)) for text, value in _table(table).items())
        entries = {number: value for number, value in named if number >= 0}
        tokens.append(_number(logprob))
        heads.append(_without_extra(entries, token_id, top_logprobs))
    return _scores(heads, tokens, top_logprobs)


def read_completion(body: Any, top_logprobs: int, index: PieceIndex) -> tuple[list[int], TokenScores]:
    """A chat reply with logprobs: the reply's own tokens and one row for each of them.

    Raises:
        TeacherReplyError: another shape, or a token of the reply that the tokenizer does not have.
    """
    content = _at(body, "choices", 0, "logprobs", "content")
    if not isinstance(content, list):
        raise TeacherReplyError("the teacher's reply carries no logprobs.content.", hint="Does the host give logprobs?")
    reply, heads, tokens = [], [], []
    for position in content:
        token_id = _token_id(position, index)
        if token_id < 0:
            raise TeacherReplyError(
                f"the teacher wrote {_at(position, 'token')!r}, which is no single token of the tokenizer given.",
                hint="Give the teacher's own tokenizer (teacher.tokenizer).",
            )
        named = ((_token_id(entry, index), _number(_at(entry, "logprob"))) for entry in _at(position, "top_logprobs"))
        entries = {number: value for number, value in named if number >= 0}
        reply.append(token_id)
        tokens.append(_number(_at(position, "logprob")))
        heads.append(_without_extra(entries, token_id, top_logprobs))
    return reply, _scores(heads, tokens, top_logprobs)


def _without_extra(entries: Mapping[int, float], token_id: int, top_logprobs: int) -> list[tuple[int, float]]:
    """The likeliest entries; hosts add the position's own token below them, which is no part of the head."""
    ordered = sorted(entries.items(), key=lambda entry: (-entry[1], entry[0] == token_id))
    return ordered[:top_logprobs]


def _scores(heads: Sequence[Sequence[tuple[int, float]]], tokens: Sequence[float], top_logprobs: int) -> TokenScores:
    ids = np.full((len(heads), top_logprobs), -1, np.int32)
    logprobs = np.full((len(heads), top_logprobs), -np.inf, np.float32)
    for row, head in enumerate(heads):
        for column, (token, logprob) in enumerate(head):
            ids[row, column], logprobs[row, column] = token, logprob
    return head_only(ids, logprobs, np.array(tokens, np.float32))


def _token_id(entry: Any, index: PieceIndex) -> int:
    spelt = entry.get("bytes") if isinstance(entry, dict) else None
    return index.of_bytes(spelt) if spelt else index.of_text(str(_at(entry, "token")))


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TeacherReplyError(f"the teacher answered {value!r:.80} for a position, and a table is expected.")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TeacherReplyError(f"the teacher answered {value!r:.80} for a log-probability, and a number is expected.")
    return float(value)


def _at(value: Any, *path: str | int) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise TeacherReplyError(
                f"the teacher's answer has no {'.'.join(map(str, path))}: {str(value)[:120]}."
            ) from None
    return value
