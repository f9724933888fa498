"""`/tokenize` takes a text and a chat, and hands the replica the one that came; the replica finds vLLM's side of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.llm._internal.serve.core.configs.openai_api_models import TokenizeResponse
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

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


@pytest.mark.parametrize(
    ("found_by_ray", "state", "expected"),
    [
        (None, {"serving_tokenization": "renamed"}, "renamed"),
        ("as ray knows it", {"serving_tokenization": "renamed"}, "as ray knows it"),
        (None, {}, None),
    ],
)
async def test_the_replica_finds_the_tokenizer_under_either_name(
    found_by_ray: str | None, state: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparkray.serving.deployment import WatchedVLLMEngine

    async def start(engine: Any) -> None:
        engine._oai_serving_tokenization = found_by_ray
        engine._app_state = SimpleNamespace(**state)

    monkeypatch.setattr(VLLMEngine, "start", start)
    engine = object.__new__(WatchedVLLMEngine)
    await engine.start()
    assert engine._oai_serving_tokenization == expected
