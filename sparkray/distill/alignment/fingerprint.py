"""A tokenizer's identity: a hash over what decides its ids. Names do not count: two folders of one name may differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkray.errors import InputError, NotFoundError
from sparkray.models import prepare_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How a text is cut to length or filled up is a caller's setting and changes no id.
_NOT_IDENTITY = ("truncation", "padding")


def tokenizer_folder(name: str) -> Path:
    """Where the tokenizer of that name lies: a folder that may hold nothing else, or a model, made ready.

    Raises:
        NotFoundError, InputError: no such folder or model.
    """
    folder = Path(name)
    return folder if (folder / "tokenizer.json").is_file() else prepare_model(name)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Raises:
        NotFoundError: the folder holds no tokenizer.json.
        InputError: the file is not one.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(
            f"{folder} holds no tokenizer.json.", hint="Give a model folder with a fast tokenizer.", param="tokenizer"
        )
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as failure:  # the library raises nothing narrower
        raise InputError(f"{path} cannot be read as a tokenizer: {failure}.") from failure
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hex SHA-256 over vocabulary, merges, normaliser, pre-tokeniser, decoder and special tokens."""
    return _sha256(json.loads(tokenizer.to_str()))


def require_same_tokenizer(teacher: str, student: str) -> None:
    """Refuse to compare ids of two tokenizers.

    Args:
        teacher, student: their hashes.

    Raises:
        InputError: they differ.
    """
    if teacher != student:
        raise InputError(
            f"the teacher's tokenizer ({teacher[:12]}) is not the student's ({student[:12]}), so their ids do not"
            " name the same tokens.",
            hint="Train the student on the teacher's tokenizer, or turn alignment on (alignment='bytes').",
            param="alignment",
        )


def _sha256(described: dict[str, Any]) -> str:
    identity = {key: value for key, value in described.items() if key not in _NOT_IDENTITY}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
