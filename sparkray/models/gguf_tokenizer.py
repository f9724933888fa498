"""The byte-level BPE tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparkray.errors import InputError

# llama.cpp's token types: what is not ordinary text.
_CONTROL = 3
_USER_DEFINED = 4
# The pre-tokenizers that are written here, by the names of `tokenizer.ggml.pre`; True splits every digit off.
_PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}


def write_tokenizer(fields: dict[str, Any], folder: Path, *, max_length: int) -> None:
    """Write the two files from GGUF metadata.

    Args:
        fields: the metadata, by key.
        folder: an existing folder.
        max_length: tokens that the model was made for.

    Raises:
        InputError: the tokenizer is not byte-level BPE, or splits text in a way that is not known here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    kind, splitter = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or splitter not in _PRE_TOKENIZERS:
        raise InputError(
            f"the GGUF file's tokenizer is {kind!r} with the pre-tokenizer {splitter!r}; "
            f"'gpt2' with one of {', '.join(map(repr, _PRE_TOKENIZERS))} can be converted."
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if _PRE_TOKENIZERS[splitter]:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    for special in (_CONTROL, _USER_DEFINED):
        added = [
            AddedToken(token, special=special == _CONTROL, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == special
        ]
        tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        # The class that takes tokenizer.json as it stands; a model's own class would build its own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields.get("tokenizer.ggml.padding_token_id", fields["tokenizer.ggml.eos_token_id"])],
        "unk_token": tokens[fields.get("tokenizer.ggml.unknown_token_id", fields["tokenizer.ggml.eos_token_id"])],
    }
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
