"""Calibration sets: token sequences from local files, in shards whose names do not depend on who observes them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparkray.config.pruning import CalibrationConfig
from sparkray.errors import InputError, NotFoundError, UsageError
from sparkray.pruning.calibration_sources import CalibrationSource, dataset_rows, parse_sources

_TEXT_KEYS = ("prompt", "text", "question", "input", "content", "instruction")
_ROW_KEYS = ("messages", "input_ids", "attention_mask")


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids and a mask of the same length; a zero marks padding, which is never counted."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]

    @classmethod
    def of(cls, ids: Sequence[int], mask: Sequence[int] | None = None) -> TokenSequence:
        """A sequence without its padding at the end."""
        mask = [1] * len(ids) if mask is None else list(mask)
        if len(mask) != len(ids):
            raise InputError(f"a row has {len(ids)} ids and a mask of {len(mask)}.")
        end = max((place + 1 for place, kept in enumerate(mask) if kept), default=0)
        if end == 0:
            raise InputError("a row has no token outside of its padding.")
        return cls(tuple(ids[:end]), tuple(mask[:end]))


@dataclass(frozen=True, slots=True)
class CalibrationShard:
    """A run of sequences that is observed as a whole, and counted once."""

    number: int
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences in a fixed order."""

    sequences: tuple[TokenSequence, ...]

    @cached_property
    def identity(self) -> str:
        """Hex digest that names this set."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(json.dumps([sequence.ids, sequence.mask]).encode())
        return digest.hexdigest()

    @property
    def num_tokens(self) -> int:
        return sum(sum(sequence.mask) for sequence in self.sequences)

    def shards(self, num_sequences: int) -> tuple[CalibrationShard, ...]:
        """Shards of `num_sequences` each; the last may be shorter."""
        starts = range(0, len(self.sequences), num_sequences)
        return tuple(
            CalibrationShard(number, self.sequences[start : start + num_sequences])
            for number, start in enumerate(starts)
        )

    def check_vocabulary(self, vocab_size: int, max_position: int | None) -> None:
        """Refuse ids that the model does not have, and sequences longer than its context."""
        for row, sequence in enumerate(self.sequences):
            if not 0 <= min(sequence.ids) <= max(sequence.ids) < vocab_size:
                raise InputError(
                    f"row {row} of the calibration set holds token ids outside of the model's {vocab_size}."
                )
            if max_position is not None and len(sequence.ids) > max_position:
                raise InputError(
                    f"row {row} of the calibration set has {len(sequence.ids)} tokens, and the model's context is"
                    f" {max_position}.",
                    hint="Say --long-text truncate or split, with --max-tokens at most that.",
                )


def read_calibration(
    source: Path | str, config: CalibrationConfig, tokenize: Callable[[Any], list[int]] | None = None
) -> CalibrationSet:
    """A calibration set from a .json, .jsonl or .txt file, or from the sources that calibration_sources.py names.

    A row is a text, an object with one of prompt/text/question/input/content or `messages`, or token ids
    (`input_ids`, with an optional `attention_mask`). One object whose `input_ids` are nested lists of rows holds
    them all. Rows may stand in a list, in one list a category, or under a name each. A .txt file has one text a line.

    Args:
        source: the file, or a text such as `a.json,reasoning-gym[chain_sum]:64`.
        config: how it is cut.
        tokenize: turns a text, or a list of chat messages, into ids; needed where a row is not ids already.

    Raises:
        NotFoundError, InputError: the file is missing, not parsable, empty, or a row cannot be used, by its number.
        UsageError: a row needs a tokenizer and the model has none.
    """
    sequences: list[TokenSequence] = []
    for where, rows in _source_rows(source, config):
        for number, row in rows:
            sequences += _cut(_sequence(where, number, row, tokenize), config, where, number)
    return CalibrationSet(tuple(sequences))


def _source_rows(source: Path | str, config: CalibrationConfig) -> Iterator[tuple[str, list[tuple[int, Any]]]]:
    """(name, numbered rows) of every part of a calibration set; `num_samples` are drawn from each."""
    for part in [CalibrationSource(str(source))] if isinstance(source, Path) else parse_sources(source):
        if part.is_file or isinstance(source, Path):
            rows = list(enumerate(_rows(Path(part.name))))
        else:
            rows = list(enumerate(dataset_rows(part, config.seed)))
        if not rows:
            raise InputError(f"{part.name} holds no calibration row.")
        wanted = min(count for count in (part.num_rows, config.num_samples, len(rows)) if count is not None)
        if wanted < len(rows):
            picked = sorted(random.Random(config.seed).sample(range(len(rows)), wanted))
            rows = [rows[place] for place in picked]
        yield part.name, rows


def _rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as failure:
        raise NotFoundError(f"the calibration file {path} does not exist.") from failure
    except (OSError, UnicodeDecodeError) as failure:
        raise InputError(f"the calibration file {path} cannot be read as UTF-8 text: {failure}.") from failure
    if path.suffix == ".txt":
        yield from (line for line in text.splitlines() if line.strip())
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _parse(line, f"line {number} of {path}")
    elif path.suffix == ".json":
        yield from _flatten(_parse(text, str(path)), path)
    else:
        raise InputError(f"{path} is not a calibration file: .json, .jsonl or .txt is expected.")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as failure:
        raise InputError(f"{where} is not JSON: {failure}.") from failure


def _flatten(data: Any, path: Path) -> Iterator[Any]:
    if isinstance(data, list):
        yield from data
        return
    if isinstance(data, dict) and isinstance(data.get("input_ids"), list):
        yield from _rows_of_ids(data["input_ids"], data.get("attention_mask"), path)
        return
    values = list(data.values()) if isinstance(data, dict) else []
    lists = [value for value in values if isinstance(value, list)]
    nested = [value for value in values if isinstance(value, dict)]
    if lists:
        for rows in lists:  # one list, or one a category
            yield from rows
    elif nested:
        for inside in nested:  # rows by name, or categories of them
            has_rows = any(isinstance(value, list | dict) for key, value in inside.items() if key not in _ROW_KEYS)
            yield from _flatten(inside, path) if has_rows else [inside]
    elif values and all(isinstance(value, str) for value in values):
        yield from values
    else:
        raise InputError(f"{path} holds neither a list of rows nor an object with lists of them.")


def _rows_of_ids(ids: list[Any], masks: Any, path: Path) -> Iterator[dict[str, Any]]:
    if ids and not isinstance(ids[0], list):
        yield {"input_ids": ids, "attention_mask": masks}
        return
    if masks is not None and (not isinstance(masks, list) or len(masks) != len(ids)):
        raise InputError(f"{path}: attention_mask does not have the shape of input_ids.")
    for place, row in enumerate(ids):
        yield from _rows_of_ids(row, None if masks is None else masks[place], path)


def _sequence(path: str, number: int, row: Any, tokenize: Callable[[Any], list[int]] | None) -> TokenSequence:
    where = f"row {number} of {path}"
    if isinstance(row, dict) and "input_ids" in row:
        ids, mask = row["input_ids"], row.get("attention_mask")
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise InputError(f"{where}: input_ids is not a list of token ids.")
        return TokenSequence.of(ids, mask)
    source: Any = row
    if isinstance(row, dict):
        source = row.get("messages") or next((row[key] for key in _TEXT_KEYS if row.get(key)), None)
    if not isinstance(source, str | list) or not source:
        raise InputError(f"{where} has no text: a string, {', '.join(_TEXT_KEYS)}, messages or input_ids is expected.")
    if tokenize is None:
        raise UsageError(
            f"{where} is text, and the model directory has no tokenizer.",
            hint="Put tokenizer.json beside the shards, or give rows of input_ids.",
        )
    ids = tokenize(source)
    if not ids:
        raise InputError(f"{where} has no token after tokenization.")
    return TokenSequence.of(ids)


def _cut(sequence: TokenSequence, config: CalibrationConfig, path: str, number: int) -> list[TokenSequence]:
    limit = config.max_sequence_tokens
    if len(sequence.ids) <= limit:
        return [sequence]
    if config.long_text == "refuse":
        raise InputError(
            f"row {number} of {path} has {len(sequence.ids)} tokens, and at most {limit} are watched in one sequence.",
            hint="Say --long-text truncate or split, or raise --max-tokens up to the model's context.",
        )
    starts = [0] if config.long_text == "truncate" else range(0, len(sequence.ids), limit)
    return [
        TokenSequence.of(sequence.ids[start : start + limit], sequence.mask[start : start + limit]) for start in starts
    ]
