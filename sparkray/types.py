"""The nouns that packages share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn; the names are OpenAI's."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished piece of text.

    Attributes:
        text: what was written.
        token_ids: its tokens.
        finish_reason: "stop", "length" or "abort".
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    entropies: tuple[float, ...] = field(default=())
