"""`/tokenize` takes a text and a chat, and hands the replica the one that came."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.llm._internal.serve.core.configs.openai_api_models import TokenizeResponse

from sparkray.serving.ingress import ENDPOINTS, SparkrayIngress

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("body", "kind", "count"),
    [
        ({"prompt": "one two three"}, "TokenizeCompletionRequest", 3),
        ({"messages": [{"role": "user", "content": "one two"}]}, "TokenizeChatRequest", 2),
    ],
)
def test_tokenize_takes_texts_and_messages(body: dict[str, Any], kind: str, count: int) -> None:
    app = FastAPI()

    class Ingress(SparkrayIngress):
        def __init__(self) -> None:
            self.seen: list[str] = []

        async def _get_response(self, *, body: Any, **_: Any) -> AsyncIterator[TokenizeResponse]:
            self.seen.append(type(body).__name__)
            text = body.prompt if kind == "TokenizeCompletionRequest" else body.messages[0]["content"]
            words = text.split()
            yield TokenizeResponse(count=len(words), max_model_len=10, tokens=list(range(len(words))))

    ingress = Ingress()
    ENDPOINTS["tokenize"](app)(ingress.tokenize)
    reply = TestClient(app).post("/tokenize", json={"model": "any", **body})
    assert reply.status_code == 200, reply.text
    assert reply.json()["count"] == count
    assert ingress.seen == [kind]
