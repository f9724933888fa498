"""The chain-of-thought boost: raise the logits of tokens with which a second thought begins.

**published** follows METIS: the first token of each of 22 phrases, encoded as if nothing stood before it, gets +5 on
this token and the 49 after it. Two traits of it are kept because they are what was published: inside a text most of
these words carry a leading space and are other tokens, and the first token of a long word may be a fragment.

**careful** boosts both forms, with and without the leading space, only of words that are one token; only the token
that begins a sentence; less; and not often (`rules` has the cooldown and the cap).

Shapes: B rows, V vocabulary, K token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from sparkray.metis.rules import CAREFUL, PUBLISHED

PHRASES = (
    "Let me think",
    "Wait",
    "Actually",
    "However",
    "But",
    "On the other hand",
    "Consider",
    "First",
    "Second",
    "Therefore",
    "Because",
    "Since",
    "If we",
    "Suppose",
    "Assume",
    "Let's",
    "Step",
    "Note that",
    "Important",
    "Key",
    "Alternatively",
    "\n\n",
)

_SENTENCE_MARKS = (".", "!", "?", "…", "。", "！", "？")
_CLOSING = "\"'”’»)]}*_` "


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]: ...
    def __len__(self) -> int: ...


class BoostTable:
    """The boosted token ids of one tokenizer.

    Attributes:
        published_K, careful_K: int64, sorted, distinct, on `device`.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str = "cpu") -> None:
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self.published_K = self._ids(_published_ids(tokenizer))
        self.careful_K = self._ids(_careful_ids(tokenizer))

    def ends_sentence(self, token_ids_B: Tensor) -> Tensor:
        """bool, whether each token's text ends a sentence or a line; int64 ids.

        An id without a text (-1 for no token yet; the padding of a model's vocabulary) ends none.
        """
        ends = self._sentence_ends
        has_text_B = (token_ids_B >= 0) & (token_ids_B < len(ends))
        return has_text_B & ends.index_select(0, torch.where(has_text_B, token_ids_B, 0))

    @cached_property
    def _sentence_ends(self) -> Tensor:
        # Decoding the vocabulary takes a moment; only the careful boost needs it.
        texts = self._tokenizer.batch_decode([[token_id] for token_id in range(len(self._tokenizer))])
        return torch.tensor([_ends_sentence(text) for text in texts], device=self._device)

    def _ids(self, token_ids: set[int]) -> Tensor:
        return torch.tensor(sorted(token_ids), dtype=torch.int64, device=self._device)


def apply_boost(logits_BV: Tensor, rows_B: Tensor | None, mode_B: Tensor, bonus_B: Tensor, table: BoostTable) -> Tensor:
    """Add each row's bonus to the tokens of its phrase table, in place.

    A token that is forbidden (-inf) stays so. Reads nothing back from the device.

    Args:
        logits_BV: raw logits.
        rows_B: the rows of `logits_BV` that `mode_B` and `bonus_B` speak of; None where they speak of all, in order.
        mode_B, bonus_B: from `DetectorBank.boost_bonus`.
        table: of the model's tokenizer.

    Returns:
        `logits_BV`.
    """
    with torch.inference_mode():
        for mode, token_ids_K in ((PUBLISHED, table.published_K), (CAREFUL, table.careful_K)):
            added_B = torch.where(mode_B == mode, bonus_B, 0.0).to(logits_BV.dtype)
            added_BK = added_B.unsqueeze(1).expand(-1, len(token_ids_K))
            if rows_B is None:
                logits_BV.index_add_(1, token_ids_K, added_BK)
            else:
                logits_BV.index_put_((rows_B.unsqueeze(1), token_ids_K), added_BK, accumulate=True)
    return logits_BV


def _published_ids(tokenizer: Tokenizer) -> set[int]:
    return {_encode(tokenizer, phrase)[0] for phrase in PHRASES}


def _careful_ids(tokenizer: Tokenizer) -> set[int]:
    words = {phrase.split()[0] for phrase in PHRASES if phrase.strip()}
    encoded = (_encode(tokenizer, form) for word in words for form in (word, f" {word}"))
    return {token_ids[0] for token_ids in encoded if len(token_ids) == 1}


def _encode(tokenizer: Tokenizer, text: str) -> list[Any]:
    return tokenizer.encode(text, add_special_tokens=False)


def _ends_sentence(text: str) -> bool:
    return text.endswith("\n") or text.rstrip(_CLOSING).endswith(_SENTENCE_MARKS)
