"""Prompts from a file of any common shape, each with a key that says which answer belongs to it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkray.errors import InputError, NotFoundError

_TEXT_KEYS = ("prompt", "text", "question", "input", "content", "instruction")
_KEY_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class BatchPrompt:
    """One prompt.

    Attributes:
        index: its place in the file, from 0.
        id: the caller's own name for it, or the index as text.
        category: name of the list that it stood in, where the file has several.
        messages: the chat that is sent, without a system message of the settings.
    """

    index: int
    id: str
    category: str | None
    messages: tuple[Mapping[str, Any], ...]

    @property
    def text(self) -> str:
        """What is shown: the last message."""
        return str(self.messages[-1].get("content") or "")


def read_prompt_file(path: Path) -> list[BatchPrompt]:
    """All prompts of a file, in order.

    JSON: a list, an object with lists (`{"prompts": [...]}`, or one list a category), or an object of texts by name.
    JSONL: one value a line. txt: one prompt a line. A prompt is a text, or an object with one of
    prompt/text/question/input/content/instruction, or `messages`; `id`, `name` and `category` are kept.

    Raises:
        NotFoundError, InputError: the file is missing, cannot be read, holds no prompt, or a row is none; rows are
            named by number.
    """
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"{path} holds no prompt.")
    return [_prompt(index, category, row, path) for index, (category, row) in enumerate(rows)]


def prompt_keys(prompts: Sequence[BatchPrompt], *, model: str, system: str | None, sampling: Any) -> list[str]:
    """A key for every prompt: what is asked, of whom, and how. Equal prompts are told apart by their count."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        asked = json.dumps([model, system, sampling, list(prompt.messages)], sort_keys=True, ensure_ascii=False)
        seen[asked] += 1
        digest = hashlib.sha256(f"{seen[asked]}:{asked}".encode()).hexdigest()
        keys.append(digest[:_KEY_CHARACTERS])
    return keys


def _rows(path: Path) -> Iterator[tuple[str | None, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as failure:
        raise NotFoundError(f"the prompt file {path} does not exist.") from failure
    except (OSError, UnicodeDecodeError) as failure:
        raise InputError(f"the prompt file {path} cannot be read as UTF-8 text: {failure}.") from failure
    if path.suffix == ".json":
        yield from _flatten(_parse(text, str(path)), path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield None, _parse(line, f"line {number} of {path}")
    elif path.suffix == ".txt":
        yield from ((None, line.strip()) for line in text.splitlines() if line.strip())
    else:
        raise InputError(f"{path} is no prompt file: .json, .jsonl or .txt is expected.")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as failure:
        raise InputError(f"{where} is not JSON: {failure}.") from failure


def _flatten(data: Any, path: Path) -> Iterator[tuple[str | None, Any]]:
    if isinstance(data, list):
        yield from ((None, row) for row in data)
        return
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}, and a list or an object of prompts is expected.")
    lists = {name: rows for name, rows in data.items() if isinstance(rows, list)}
    nested = {name: rows for name, rows in data.items() if isinstance(rows, dict)}
    if lists:
        for name, rows in lists.items():
            yield from ((name if len(lists) > 1 else None, row) for row in rows)
    elif nested:
        for name, inside in nested.items():
            inner = list(_flatten(inside, path)) if _has_lists(inside) else [(name, inside)]
            yield from ((category or name, row) for category, row in inner)
    else:
        yield from ((None, {"id": name, "prompt": row}) for name, row in data.items())


def _has_lists(data: Mapping[str, Any]) -> bool:
    return any(isinstance(value, list) and key != "messages" for key, value in data.items())


def _prompt(index: int, category: str | None, row: Any, path: Path) -> BatchPrompt:
    fields: Mapping[str, Any] = row if isinstance(row, dict) else {"prompt": row}
    messages = fields.get("messages")
    if messages is None:
        text = next((fields[key] for key in _TEXT_KEYS if fields.get(key)), None)
        messages = [{"role": "user", "content": text}]
    good = isinstance(messages, list) and bool(messages) and all(_is_message(message) for message in messages)
    if not good:
        raise InputError(
            f"row {index} of {path} is no prompt: a text, an object with one of {', '.join(_TEXT_KEYS)}, or messages"
            " with role and content is expected."
        )
    named = next((fields[key] for key in ("id", "name") if fields.get(key) is not None), index)
    stated = fields.get("category")
    return BatchPrompt(index, str(named), str(stated) if stated is not None else category, tuple(messages))


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and bool(message["content"])
    )
