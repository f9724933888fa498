"""Text to token ids and back, with the model's own template: on the coordinator's side alone, peers see ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparkray.models.prepare import prepare_model


class TextCodec:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()

    @classmethod
    def load(cls, model: str) -> TextCodec:
        """The tokenizer of a model folder.

        Raises:
            NotFoundError: there is no such model.
        """
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(prepare_model(model))))

    def encode_text(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A conversation up to where the assistant speaks."""
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, token_ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Tokens to text as they come; a character of several tokens is held back until it is whole."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        self._shown = ""

    def feed(self, token: int) -> str:
        """The text that this token adds."""
        self._ids.append(token)
        text = self._codec.decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        added = text[len(self._shown) :]
        self._shown = text
        return added
