"""A live trace as JSON, one row a token; what a client draws while the model writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.metis.fields import TOKEN_FIELDS, Action
from sparkray.metis.store import TraceEntry
from sparkray.metis.trace import CognitiveTrace

MAX_ROWS = 512


def token_rows(
    tokens_TF: NDArray[np.float32], token_ids: Sequence[int], *, start: int, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """Recorded tokens as dictionaries; the action by name, a number that is none as null."""
    rows = []
    for offset, (token_id, values) in enumerate(zip(token_ids, tokens_TF.tolist(), strict=True)):
        row: dict[str, Any] = {"step": start + offset, "token_id": token_id, "text": decode([token_id])}
        for name, value in zip(TOKEN_FIELDS, values, strict=True):
            row[name] = round(value, 6) if math.isfinite(value) else None
        row["action"] = Action(int(values[TOKEN_FIELDS.index("action")])).name.lower()
        row["boosted"] = bool(row["boosted"])
        rows.append(row)
    return rows


def update_of(entry: TraceEntry, start: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """What is new since token `start`: at most `MAX_ROWS` rows, and where to go on from.

    Only tokens that went to the client are shown, so that a row always has its token.
    """
    recorded_TF = entry.tokens(start)
    stop = min(len(entry.token_ids), start + len(recorded_TF), start + MAX_ROWS)
    rows = token_rows(recorded_TF[: max(0, stop - start)], entry.token_ids[start:stop], start=start, decode=decode)
    reached = start + len(rows)
    last = entry.finished and reached >= len(entry.tokens())
    return {
        "request_id": entry.request_id,
        "start": start,
        "next": reached,
        "tokens": rows,
        "finished": last,
        "finish_reason": entry.finish_reason if last else None,
        "note": entry.note,
    }


def trace_json(entry: TraceEntry, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The whole trace of a request, or what there is of it so far.

    Beside the keys of `CognitiveTrace.to_dict`: `finished`, `finish_reason`, `detector`, `num_prompt_tokens`,
    `truncated` (the request is longer than its record) and `note` (why something is missing, or null).
    """
    tokens_TF = entry.tokens()
    token_ids = entry.token_ids[: len(tokens_TF)]
    trace = CognitiveTrace.from_tokens(
        tokens_TF[: len(token_ids)],
        token_ids=token_ids,
        texts=[decode([token_id]) for token_id in token_ids],
        request_id=entry.request_id,
    )
    return {
        **trace.to_dict(),
        "finished": entry.finished,
        "finish_reason": entry.finish_reason,
        "detector": None if entry.options is None else entry.options.detector,
        "num_prompt_tokens": entry.num_prompt_tokens,
        "truncated": entry.truncated,
        "note": entry.note,
    }
