"""Text of token ids without an engine: the tokenizer file alone, so that nothing heavy is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparkray.errors import MissingExtraError
from sparkray.models import prepare_model


def decoder(model: str) -> Callable[[Sequence[int]], str]:
    """A function from token ids to text, for a model that can be made ready.

    Raises:
        MissingExtraError: the package `tokenizers` is not installed.
        NotFoundError: there is no such model.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("tokenizers", "embedded") from failure
    tokenizer = Tokenizer.from_file(str(prepare_model(model) / "tokenizer.json"))
    return lambda token_ids: str(tokenizer.decode(list(token_ids)))
