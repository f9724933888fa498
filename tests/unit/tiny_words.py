"""A tokenizer of whole words w0, w1, ... for the tiny models, with a chat template."""

from __future__ import annotations

from pathlib import Path

from tiny_moe import VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def add_tokenizer(directory: Path) -> None:
    words = {f"w{number}": number for number in range(VOCAB - 2)} | {"[UNK]": VOCAB - 2, "[BOS]": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]")
    fast.chat_template = "{% for m in messages %}[BOS] {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(directory)
