"""The route without rows: any OpenAI server, Ollama's among them, gets the prompt as text and reads it itself.

Ollama cannot import keys and values, so this is all that it can be asked for; the reply says so
(`local; reason=plain_route`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from sparkray.errors import InputError, UnavailableError

REASON = "plain_route"
# An event of a stream is one line; a server that sends more without a line break is no OpenAI server.
_MAX_LINE_BYTES = 1 << 20


async def plain_answer(
    base_url: str,
    messages: Sequence[dict[str, Any]],
    *,
    model: str,
    max_tokens: int,
    temperature: float = 0.0,
    timeout_seconds: float = 120.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncGenerator[str]:
    """Pieces of the answer as they come.

    Args:
        base_url: up to and with `/v1`.
        transport: stands in for the network in tests.

    Raises:
        UnavailableError: nobody answers there, or the server ends the stream before its end.
        InputError: the server refuses; the message has its words.
    """
    body = {
        "model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature,
        "stream": True,
    }  # fmt: skip
    url = f"{base_url.rstrip('/')}/chat/completions"
    try:
        async with (
            httpx.AsyncClient(timeout=timeout_seconds, transport=transport) as client,
            client.stream("POST", url, json=body) as reply,
        ):
            if reply.status_code != httpx.codes.OK:
                said = (await reply.aread())[:600].decode(errors="replace")
                raise InputError(f"{url} answered {reply.status_code}: {said}")
            async for line in reply.aiter_lines():
                if len(line) > _MAX_LINE_BYTES:
                    raise UnavailableError(f"{url} sent a line of {len(line)} characters, and events are expected.")
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield _content(line.removeprefix("data: "), url)
    except httpx.HTTPError as failure:
        raise UnavailableError(f"{url} cannot be reached: {failure!r}.") from failure
    raise UnavailableError(f"{url} ended its stream before [DONE].")


def _content(event: str, url: str) -> str:
    try:
        choices = json.loads(event)["choices"]
        return str(choices[0]["delta"].get("content") or "") if choices else ""
    except (ValueError, KeyError, TypeError, IndexError) as failure:
        raise UnavailableError(f"{url} sent an event that is not OpenAI's: {event[:200]}") from failure
