"""The plain route: an OpenAI server's stream, and what is said where it is none."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from sparkray.errors import InputError, SparkrayError, UnavailableError
from sparkray.handoff.plain_route import plain_answer

MESSAGES = [{"role": "user", "content": "hi"}]


async def read(handle: Callable[[httpx.Request], httpx.Response]) -> str:
    pieces = plain_answer(
        "http://mac:11434/v1/", MESSAGES, model="m", max_tokens=5, transport=httpx.MockTransport(handle)
    )
    return "".join([piece async for piece in pieces])


def event(content: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': content}}]})}\n\n"


async def test_the_prompt_goes_as_text_and_the_answer_streams() -> None:
    asked = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append((str(request.url), json.loads(request.content)))
        return httpx.Response(200, text=event("Hel") + ": a comment\n\n" + event("lo") + "data: [DONE]\n\n")

    assert await read(handle) == "Hello"
    url, body = asked[0]
    assert url == "http://mac:11434/v1/chat/completions"
    assert body["messages"] == MESSAGES and body["max_tokens"] == 5 and body["stream"] is True


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (httpx.Response(404, text="no model m"), InputError, "404: no model m"),
        (httpx.Response(200, text=event("Hel")), UnavailableError, "before"),
        (httpx.Response(200, text="data: {}\n\n"), UnavailableError, "not OpenAI's"),
    ],
)
async def test_a_server_that_fails_is_named(reply: httpx.Response, kind: type[SparkrayError], said: str) -> None:
    with pytest.raises(kind, match=said):
        await read(lambda request: reply)


async def test_nobody_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(UnavailableError, match="cannot be reached"):
        await read(refuse)
