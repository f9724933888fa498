"""Prompts to train on: TRL's dataset format, checked as a whole ahead, in an order that a step's number decides.

A row has `prompt`, a text or a list of messages; its other columns go to the rewards. Since the rows of a step follow
from the seed and the number of the step, a resumed run needs no cursor but that number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InputError, NotFoundError

Row = Mapping[str, Any]
_ACCEPTED = "Accepted: .jsonl (an object a line), .json (a list of objects) or .parquet."


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a dataset.

    Raises:
        NotFoundError: no such file.
        InputError: another ending, a line that is not an object, no rows, or a row without a usable prompt.
    """
    if not path.is_file():
        raise NotFoundError(f"dataset {str(path)!r} was given, and there is no such file.", param="dataset")
    rows = _parse(path)
    if not rows:
        raise InputError(f"dataset {str(path)!r} is empty, and at least one row is needed.", param="dataset")
    for number, row in enumerate(rows):
        _check_prompt(row, number, path)
    return rows


def rows_of_step(step: int, *, num_rows: int, prompts_per_step: int, seed: int) -> list[int]:
    """The rows of a step (from 0), in order. Each pass over the dataset has its own permutation."""
    places = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    orders = {epoch: _order(epoch, num_rows, seed) for epoch in {place // num_rows for place in places}}
    return [int(orders[place // num_rows][place % num_rows]) for place in places]


def num_steps(config: GrpoConfig, num_rows: int) -> int:
    """Optimizer steps of a run."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.epochs * num_rows / config.prompts_per_step))


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Token ids of a prompt; messages go through the tokenizer's chat template."""
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt).input_ids)
    ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
    return tuple(ids)


def encode_rows(tokenizer: Any, rows: Sequence[Row], config: GrpoConfig) -> list[tuple[int, ...]]:
    """Token ids of every row's prompt.

    Raises:
        InputError: a prompt that is longer than `max_prompt_tokens`, or that has no token; nothing is cut off.
    """
    encoded = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    for number, ids in enumerate(encoded):
        if not 1 <= len(ids) <= config.max_prompt_tokens:
            raise InputError(
                f"the prompt of row {number} has {len(ids)} tokens, and 1 to {config.max_prompt_tokens} are accepted.",
                hint="Raise max_prompt_tokens (and engine.max_model_len), or take the row out.",
                param="dataset",
            )
    return encoded


def _order(epoch: int, num_rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _parse(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [_object(line, f"line {at}", path) for at, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".json":
        whole = _json(path.read_text(encoding="utf-8"), "the file", path)
        if not isinstance(whole, list) or not all(isinstance(row, dict) for row in whole):
            raise InputError(f"{path} is JSON, and a list of objects is expected.", param="dataset")
        return whole
    raise InputError(f"dataset {path.name!r} ends in {path.suffix!r}. {_ACCEPTED}", param="dataset")


def _object(text: str, where: str, path: Path) -> dict[str, Any]:
    row = _json(text, where, path)
    if not isinstance(row, dict):
        raise InputError(f"{where} of {path} is a {type(row).__name__}, and an object is expected.", param="dataset")
    return row


def _json(text: str, where: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as failure:
        raise InputError(f"{where} of {path} is not JSON: {failure}.", param="dataset") from failure


def _check_prompt(row: Row, number: int, path: Path) -> None:
    prompt = row.get("prompt")
    is_text = isinstance(prompt, str) and bool(prompt.strip())
    is_messages = (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    )
    if not (is_text or is_messages):
        given = "none" if prompt is None else repr(prompt)[:60]
        raise InputError(
            f"row {number} of {path} needs a `prompt`, a text or a list of messages with role and content, and has "
            f"{given}; its columns are {', '.join(sorted(row)) or 'none'}.",
            param="dataset",
        )
