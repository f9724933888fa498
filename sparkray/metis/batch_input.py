"""Prompts for a batch run, read from JSONL and checked whole before an engine is started.

A line is an object with `prompt` (text) or `messages` (a chat), and `id` where the caller has names of its own; other
keys belong to the caller and are passed over. Ids decide what a resumed run has done already, so they have to be
unique: a given id that comes twice is refused, and a line without one is named by the hash of its content, with `-2`,
`-3`, ... for further lines of the same content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkray.errors import InputError, NotFoundError

# Findings shown of a file in which more is wrong.
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt.

    Attributes:
        id: unique within the file.
        content: canonical JSON, `{"prompt": ...}` or `{"messages": [...]}`.
        digest: SHA-256 of `content`, hexadecimal.
    """

    id: str
    content: str
    digest: str

    @property
    def prompt(self) -> str | None:
        """The text to go on with, or None where it is a chat."""
        text: str | None = json.loads(self.content).get("prompt")
        return text

    @property
    def messages_json(self) -> str | None:
        """The chat as JSON, or None where it is a text."""
        messages = json.loads(self.content).get("messages")
        return None if messages is None else json.dumps(messages, ensure_ascii=False)


def read_prompts(path: Path) -> list[PromptRow]:
    """Every prompt of a JSONL file, in order. Blank lines are passed over.

    Raises:
        NotFoundError: there is no such file.
        InputError: the file cannot be read, holds no prompt, or has lines that are not accepted; the message names
            the first of them by number.
    """
    rows: list[PromptRow] = []
    line_of: dict[str, int] = {}
    findings: list[str] = []
    num_same: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            given_id, row = _parse(line)
            if given_id is None:
                num_same[row.id] = num_same.get(row.id, 0) + 1
                if num_same[row.id] > 1:
                    row = PromptRow(f"{row.id}-{num_same[row.id]}", row.content, row.digest)
            if row.id in line_of:
                raise InputError(f"id {row.id!r} is that of line {line_of[row.id]} too, and ids are to be unique")
        except InputError as failure:
            findings.append(f"line {number}: {failure.message}")
            continue
        line_of[row.id] = number
        rows.append(row)
    if findings:
        shown = "; ".join(findings[:_MAX_SHOWN])
        more = f"; and {len(findings) - _MAX_SHOWN} more" if len(findings) > _MAX_SHOWN else ""
        raise InputError(f"input {path}: {shown}{more}.", param="input")
    if not rows:
        raise InputError(f"input {path} holds no prompt.", param="input")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except FileNotFoundError as failure:
        raise NotFoundError(f"input {path} does not exist.", param="input") from failure
    except OSError as failure:
        raise InputError(f"input {path} cannot be read: {failure.strerror}.", param="input") from failure


def _parse(line: bytes) -> tuple[str | None, PromptRow]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as failure:
        raise InputError(f"byte {failure.start} is not UTF-8") from failure
    except json.JSONDecodeError as failure:
        raise InputError(f"not JSON at column {failure.colno} ({failure.msg})") from failure
    except RecursionError as failure:
        raise InputError("nested too deeply") from failure
    if not isinstance(value, dict):
        raise InputError(f"a {type(value).__name__} was given, and an object is expected")
    content = _content(value)
    digest = hashlib.sha256(content.encode()).hexdigest()
    given_id = _given_id(value)
    return given_id, PromptRow(digest[:16] if given_id is None else given_id, content, digest)


def _given_id(value: dict[str, Any]) -> str | None:
    given = value.get("id")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise InputError(f"id is {_short(given)}, and text or a whole number is expected")
    return str(given)


def _content(value: dict[str, Any]) -> str:
    if ("prompt" in value) == ("messages" in value):
        raise InputError("either `prompt` or `messages` is expected")
    key = "prompt" if "prompt" in value else "messages"
    given = value[key]
    if key == "prompt":
        if not isinstance(given, str):
            raise InputError(f"prompt is {_short(given)}, and text is expected")
        if not given.strip():
            raise InputError("prompt is empty")
    else:
        _check_messages(given)
    try:
        # Also refuses half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        return json.dumps({key: given}, ensure_ascii=False, sort_keys=True).encode().decode()
    except UnicodeEncodeError as failure:
        raise InputError(f"{key} holds a character that is no Unicode text") from failure


def _check_messages(given: Any) -> None:
    if not isinstance(given, list) or not given:
        raise InputError(f"messages is {_short(given)}, and a list of at least one message is expected")
    for message in given:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"message {_short(message)} has no text under `role` and `content`")
    if not any(message["content"].strip() for message in given):
        raise InputError("all messages are empty")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
