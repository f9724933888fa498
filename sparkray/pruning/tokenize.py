"""The tokenizer of a model directory, as a function from text or chat messages to ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparkray.errors import InputError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def tokenizer_of(directory: Path) -> Callable[[Any], list[int]] | None:
    """A function from a text, or a list of chat messages, to token ids; None where the directory has no tokenizer."""
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def tokenize(source: Any) -> list[int]:
        if isinstance(source, str):
            return [int(token) for token in tokenizer(source)["input_ids"]]
        if tokenizer.chat_template is None:
            raise InputError(f"a row holds chat messages, and the tokenizer in {directory} has no chat template.")
        encoded = tokenizer.apply_chat_template(source, tokenize=True, return_dict=True)
        return [int(token) for token in encoded["input_ids"]]

    return tokenize
