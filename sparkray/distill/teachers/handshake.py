"""Before a vLLM server teaches: which engine it is, and whether it cuts text as the tokenizer given does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from sparkray.distill.errors import TeacherDownError
from sparkray.distill.teachers.api import read_response
from sparkray.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Cases in which tokenizers of one family differ: digits, spaces, code, accents, other scripts, half characters.
PROBE = "def f(x):\n\treturn 3.14159 * x  # naïve café\n\nΑθήνα 東京 🦊 1234567890 don't  stop.\r\n"


def handshake(base_url: str, model: str, tokenizer: Tokenizer, timeout_seconds: float) -> str:
    """The server's engine and version.

    Raises:
        TeacherDownError: no server, or one that is not vLLM's and cannot be asked.
        InputError: it cuts the probe into other tokens than `tokenizer` does.
    """
    root = base_url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=root, timeout=timeout_seconds) as http:
            version = read_response(http.get("/version"), root)["version"]
            request = {"model": model, "prompt": PROBE, "add_special_tokens": False}
            theirs = read_response(http.post("/tokenize", json=request), root)["tokens"]
    except (httpx.HTTPError, KeyError, TypeError) as failure:
        raise TeacherDownError(
            f"the teacher at {root} cannot be asked for its version and tokenizer: {type(failure).__name__} {failure}.",
            hint="Is it a running vLLM server? Other hosts are kind='api'.",
        ) from failure
    ours = tokenizer.encode(PROBE, add_special_tokens=False).ids
    if theirs != ours:
        place = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        raise InputError(
            f"the teacher at {root} cuts a probe into {len(theirs)} tokens and the tokenizer given into {len(ours)};"
            f" they differ from token {place} on.",
            hint="Give the tokenizer of the model that is served (teacher.tokenizer).",
            param="teacher.tokenizer",
        )
    return f"vllm {version}"
