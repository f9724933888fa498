"""Prompts of given lengths for checks: plain sentences, or spread token ids where a model has no tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_SENTENCES = (
    "The lighthouse keeper wrote the same three numbers in his book every evening: the height of the tide, the hour of"
    " the first star, and how many ships had passed.",
    "In the second year a storm took the bridge, and the village learned to row.",
    "A compiler reads a program twice, once to learn its names and once to believe them.",
    "Grandmother kept 14 hens, 3 goats and a clock that ran backwards on Sundays; nobody asked her why.",
    "Water boils at a lower temperature on a mountain because there is less air above it to hold it down.",
    "The mathematician proved that the list was finite, and then spent her life on its last entry.",
    "def area(radius): return 3.14159 * radius ** 2  # the caller promises that radius is not negative",
    "To bake the bread, mix 500 grams of flour with water, wait until it has doubled, and do not open the oven early.",
    "Their letters crossed in the mail, so each answered a question that the other had not yet asked.",
    "Question: why does the moon look larger near the horizon? Answer: it does not, but the trees beside it do.",
)
DEFAULT_LENGTHS = (19, 37, 90, 190, 380, 600, 1087, 2000)


def prompts_of(folder: Path, vocabulary: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """One prompt for each length, token ids; each begins with another sentence, so that none is another's prefix."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        return [
            [int(token) for token in np.random.default_rng(length).integers(0, vocabulary, length)]
            for length in lengths
        ]
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    return [_text_ids(encode, first, length) for first, length in enumerate(lengths)]


def _text_ids(encode: object, first: int, length: int) -> list[int]:
    ids: list[int] = []
    number = first
    while len(ids) < length:
        sentence = f"{number + 1}. {_SENTENCES[number % len(_SENTENCES)]}\n"
        ids += encode(sentence).ids  # type: ignore[operator]
        number += 1
    return ids[:length]
