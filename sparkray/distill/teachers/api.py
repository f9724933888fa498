"""A teacher behind an OpenAI-compatible address: a vLLM on another machine, or a hosted API.

`prompt_logprobs` (vLLM) and `echo` (OpenAI's older completions) score the tokens they are given. Hosts that offer
chat only cannot: in the mode `completion` they write a reply and the student learns from that reply, which is
distillation on the teacher's sequences and not on the data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import httpx

from sparkray.config.distill import TeacherConfig
from sparkray.distill.errors import RateLimitedError, TeacherDownError, TeacherRefusedError, TeacherReplyError
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores
from sparkray.distill.teachers.wire import PieceIndex, read_completion, read_echo, read_prompt_logprobs
from sparkray.errors import UsageError


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply and the teacher's rows of it: row t is the distribution that `token_ids[t]` was drawn from."""

    token_ids: list[int]
    scores: TokenScores


class ApiTeacher:
    """One attempt a call; `TeacherClient` repeats.

    Args:
        config: address, model name and mode.
        pieces: bytes of every id of the teacher's tokenizer.
        tokenizer_sha256: its hash.
        request_timeout_seconds: of one attempt.
        engine: engine and version where the host says it.
    """

    def __init__(
        self,
        config: TeacherConfig,
        pieces: Sequence[bytes],
        tokenizer_sha256: str,
        *,
        request_timeout_seconds: float,
        engine: str = "",
    ) -> None:
        self._config = config
        self._index = PieceIndex(pieces)
        base_url = str(config.base_url).rstrip("/")
        key = os.environ.get(config.api_key_env)
        self._http = httpx.Client(
            base_url=base_url,
            timeout=request_timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._identity = TeacherIdentity(
            model=config.model,
            revision=config.revision or "",
            quantization=config.quantization or "",
            tokenizer_sha256=tokenizer_sha256,
            engine=engine,
            dtype=config.dtype,
            endpoint=base_url,
            mode=config.mode,
        )

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    @property
    def parameters(self) -> str:
        return "temperature=1"

    @property
    def max_model_tokens(self) -> int:
        return self._config.max_model_tokens - 1  # a host wants room for the token that it must write

    def score(self, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
        """Rows of the given tokens.

        Raises:
            UsageError: in the mode `completion`, which cannot score; `complete` is what it can do.
        """
        request: dict[str, Any] = {"model": self._config.model, "prompt": list(token_ids), "temperature": 1.0}
        if self._config.mode == "prompt_logprobs":
            body = self._post("/completions", request | {"max_tokens": 1, "prompt_logprobs": top_logprobs})
            return read_prompt_logprobs(body, token_ids, top_logprobs)
        if self._config.mode == "echo":
            asked = {"max_tokens": 0, "echo": True, "logprobs": top_logprobs, "return_tokens_as_token_ids": True}
            return read_echo(self._post("/completions", request | asked), token_ids, top_logprobs, self._index)
        raise UsageError(
            "mode='completion' was set, and it cannot score given tokens: the host writes a reply instead.",
            hint="Use a host with prompt_logprobs or echo, or distil on the teacher's replies (ApiTeacher.complete).",
            param="teacher.mode",
        )

    def complete(self, messages: Sequence[dict[str, str]], max_tokens: int, top_logprobs: int) -> Completion:
        """Let the teacher reply to a chat; its tokens and their rows.

        Raises:
            TeacherReplyError: a reply without log-probabilities, or in tokens that the tokenizer does not have.
        """
        body = self._post(
            "/chat/completions",
            {
                "model": self._config.model,
                "messages": list(messages),
                "max_tokens": max_tokens,
                "temperature": 1.0,
                "logprobs": True,
                "top_logprobs": top_logprobs,
            },
        )
        token_ids, scores = read_completion(body, top_logprobs, self._index)
        return Completion(token_ids, scores.checked(len(token_ids)))

    def close(self) -> None:
        self._http.close()

    def _post(self, path: str, request: dict[str, Any]) -> Any:
        try:
            response = self._http.post(path, json=request)
        except httpx.HTTPError as failure:
            raise TeacherDownError(
                f"the teacher at {self._identity.endpoint} did not answer: {type(failure).__name__} {failure}.",
                hint="Is it running, and is base_url its address?",
            ) from failure
        return read_response(response, self._identity.endpoint)


def read_response(response: httpx.Response, endpoint: str) -> Any:
    """The JSON of an answer, or the error that its status stands for.

    Raises:
        RateLimitedError, TeacherDownError, TeacherRefusedError, TeacherReplyError: as `Teacher.score` says.
    """
    status, excerpt = response.status_code, response.text[:200].strip()
    if status == 429:
        limited = RateLimitedError(f"the teacher at {endpoint} answers 429: too many requests.")
        limited.retry_after_seconds = retry_after_seconds(response.headers.get("Retry-After"), time())
        raise limited
    if status >= 500 or status == 408:
        raise TeacherDownError(f"the teacher at {endpoint} answers {status}: {excerpt}.")
    if status >= 400:
        hint = {
            401: "Set the API key in the environment variable that teacher.api_key_env names.",
            403: "The key is known and may not use this model.",
            404: "Compare teacher.model with the names that GET /v1/models lists.",
            400: "A vLLM server refuses more log-probabilities than its --max-logprobs, 20 by default.",
        }.get(status)
        raise TeacherRefusedError(f"the teacher at {endpoint} refuses with {status}: {excerpt}.", hint=hint)
    try:
        return response.json()
    except ValueError:
        raise TeacherReplyError(f"the teacher at {endpoint} answered what is not JSON: {excerpt!r}.") from None


def retry_after_seconds(header: str | None, now: float) -> float | None:
    """A Retry-After header, in seconds or as a date; None where it says neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return None
