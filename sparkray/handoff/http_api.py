"""OpenAI's chat and completion routes over a coordinator; every reply says how its prompt's rows came.

`X-Sparkray-Handoff: full|partial|local; reason=WORD` is in the headers, which are sent with the first token; what
happens after that is in the last chunk's `sparkray_handoff`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from sparkray.errors import InputError, SparkrayError, TooLargeError, http_status, openai_body
from sparkray.handoff.coordinator import Coordinator, Outcome, Piece
from sparkray.handoff.handing import Ask
from sparkray.handoff.text import TextCodec

MAX_BODY_BYTES = 8 << 20
HEADER = "X-Sparkray-Handoff"


class _Body(BaseModel):
    """What both routes take; other keys of OpenAI's are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int = Field(256, ge=1, le=1 << 20)
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=1 << 63)
    stream: bool = False
    # The conversation whose rows are kept; OpenAI's `user` does as well.
    conversation: str = Field("", max_length=200)
    user: str = Field("", max_length=200)


class _Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str


class ChatBody(_Body):
    """`POST /v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1, max_length=4096)


class CompletionBody(_Body):
    """`POST /v1/completions`."""

    prompt: str | list[int]


def create_http_app(coordinator: Coordinator, text: TextCodec, model_id: str) -> FastAPI:
    """The application."""
    app = FastAPI(title="sparkray handoff")

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return _failed(TooLargeError(f"a body of {length} bytes was sent; {MAX_BODY_BYTES} are accepted."))
        return await call_next(request)

    @app.exception_handler(SparkrayError)
    async def on_error(request: Request, failure: SparkrayError) -> JSONResponse:
        return _failed(failure)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, failure: RequestValidationError) -> JSONResponse:
        first = failure.errors()[0]
        param = ".".join(str(part) for part in first["loc"] if part != "body")
        return _failed(InputError(f"{param or 'the body'}: {first['msg']}.", param=param or None))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody) -> Any:
        ids = text.encode_chat([message.model_dump() for message in body.messages])
        return await _respond(coordinator, text, model_id, body, ids, "chat.completion")

    @app.post("/v1/completions")
    async def complete(body: CompletionBody) -> Any:
        ids = text.encode_text(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await _respond(coordinator, text, model_id, body, ids, "text_completion")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model_id, "object": "model", "owned_by": "sparkray"}]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **coordinator.status()}

    return app


async def _respond(
    coordinator: Coordinator, text: TextCodec, model_id: str, body: _Body, ids: list[int], kind: str
) -> Any:
    ask = Ask(
        tuple(ids), body.max_tokens, body.conversation or body.user, body.temperature, body.top_p, body.seed,
        text.stop_ids,
    )  # fmt: skip
    outcome = Outcome()
    pieces = coordinator.answer(ask, outcome)
    # The first token decides the header: until it is there, an error can still have its own status.
    first = await anext(pieces, None)
    verdict = (first.verdict, first.reason) if first is not None else (outcome.verdict, outcome.reason)
    head = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_id}
    headers = {HEADER: f"{verdict[0]}; reason={verdict[1] or 'none'}"}
    if body.stream:
        events = _events(pieces, first, text, head, kind, outcome)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    tokens = [first.token] if first is not None else []
    async with aclosing(pieces):
        tokens += [piece.token async for piece in pieces]
    content = text.decode(tokens)
    choice: dict[str, Any] = {"index": 0, "finish_reason": outcome.finish_reason}
    if kind == "chat.completion":
        choice["message"] = {"role": "assistant", "content": content}
    else:
        choice["text"] = content
    usage = {
        "prompt_tokens": len(ids),
        "completion_tokens": len(tokens),
        "total_tokens": len(ids) + len(tokens),
        "prompt_tokens_details": {"cached_tokens": outcome.rows_cached},
    }
    final = {**head, "object": kind, "choices": [choice], "usage": usage, "sparkray_handoff": _told(outcome)}
    return JSONResponse(final, headers={HEADER: f"{outcome.verdict}; reason={outcome.reason or 'none'}"})


async def _events(
    pieces: AsyncGenerator[Piece], first: Piece | None, text: TextCodec, head: dict[str, Any], kind: str,
    outcome: Outcome,
) -> AsyncGenerator[str]:  # fmt: skip
    """Server-sent events as OpenAI frames them. A client that goes away ends the generator, and with it the answer."""
    chunk_kind = "chat.completion.chunk" if kind == "chat.completion" else kind
    shown = text.stream()

    def event(content: str | None, finish_reason: str | None, **more: Any) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if kind == "chat.completion":
            choice["delta"] = {} if content is None else {"role": "assistant", "content": content}
        else:
            choice["text"] = content or ""
        return f"data: {json.dumps({**head, 'object': chunk_kind, 'choices': [choice], **more})}\n\n"

    async with aclosing(pieces):
        try:
            if first is not None:
                yield event(shown.feed(first.token), None)
            async for piece in pieces:
                if added := shown.feed(piece.token):
                    yield event(added, None)
        except SparkrayError as failure:
            # The status is out already; the error travels as OpenAI's clients read it from a stream.
            yield f"data: {json.dumps(openai_body(failure))}\n\n"
            return
    yield event(None, outcome.finish_reason, sparkray_handoff=_told(outcome))
    yield "data: [DONE]\n\n"


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "route": outcome.decision.route if outcome.decision else None,
        "rows_received": outcome.rows_received,
        "rows_cached": outcome.rows_cached,
        "kv_bytes": outcome.kv_bytes,
        "num_peers_lost": outcome.num_peers_lost,
    }


def _failed(failure: SparkrayError) -> JSONResponse:
    return JSONResponse(openai_body(failure), status_code=http_status(failure))
