"""The bytes of every token, exactly: decoding half a character alone shows a question mark, and its bytes are lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from sparkray.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MARK = "▁"


def vocabulary_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id; empty for special tokens and for ids that the vocabulary leaves out."""
    described = json.loads(tokenizer.to_str())
    special = {token["id"] for token in described.get("added_tokens", ()) if token["special"]}
    added = {token["id"] for token in described.get("added_tokens", ())}
    byte_level = "ByteLevel" in json.dumps([described.get("decoder"), described.get("pre_tokenizer")])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if number in special:
            continue
        if number in added:
            pieces[number] = token.encode()
        else:
            pieces[number] = _byte_level(token) if byte_level else _marked(token)
    return pieces


def token_pieces(text: bytes, token_ids: Sequence[int], pieces: Sequence[bytes]) -> list[bytes]:
    """The bytes of each token of an encoded text.

    Args:
        text: what was encoded.
        token_ids: what it became, special tokens allowed.
        pieces: of `vocabulary_pieces`.

    Raises:
        InputError: the tokens do not spell the text, because the tokenizer changes it before it cuts it.
    """
    parts = [pieces[number] for number in token_ids]
    spelt = b"".join(parts)
    if spelt == b" " + text:
        # Tokenizers of the sentencepiece family set a space before the first word.
        first = next(index for index, part in enumerate(parts) if part)
        parts[first] = parts[first][1:]
    elif spelt != text:
        raise InputError(
            f"the {len(token_ids)} tokens spell {len(spelt)} bytes that are not the {len(text)} bytes of the text.",
            hint="Byte alignment needs a tokenizer that keeps the text as it is; this one changes it first.",
            param="alignment",
        )
    return parts


@cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table of printable stand-ins for the 256 bytes, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    table = _bytes_of_characters()
    return bytes(table[character] for character in token) if all(c in table for c in token) else token.encode()


def _marked(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_WORD_MARK, " ").encode()
