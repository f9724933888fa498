"""The HTTP routes over a coordinator with the toy engine: text, headers, streams, errors in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from handoff_toy import QUICK, SECRET, ToyEngine, ToyPrefiller, monolithic

from sparkray.config.handoff import DecodeConfig, LinkRates, MachineRates, ModelShape, RouteConfig
from sparkray.handoff.agent import DecodeAgent
from sparkray.handoff.client import Peer
from sparkray.handoff.coordinator import Coordinator
from sparkray.handoff.http_api import create_http_app
from sparkray.handoff.text import TextStream


class Letters:
    """A tokenizer in one line: token t is the character 32 + t."""

    stop_ids: tuple[int, ...] = ()

    def encode_text(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode_text("".join(message["content"] for message in messages))

    def decode(self, token_ids: Any) -> str:
        return "".join(chr(32 + token) for token in token_ids)

    def stream(self) -> TextStream:
        return TextStream(self)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    secret: Path = tmp_path_factory.mktemp("http") / "secret"
    secret.write_bytes(SECRET)
    agent = DecodeAgent(DecodeConfig(secret_file=str(secret), context_tokens=128, link=QUICK), ToyEngine)
    agent.start()
    machine = MachineRates(name="m", prefill_tokens_per_second=1, decode_tokens_per_second=1, source="test")
    coordinator = Coordinator(
        ToyPrefiller(), [Peer(agent.address, SECRET, link=QUICK)], config=RouteConfig(), prefill=machine,
        shape=ModelShape(name="toy", num_layers=3, num_kv_heads=2, head_dim=4, active_params=1), decode=machine,
        link=LinkRates(bytes_per_second=1e9), force="handoff", context_tokens=128,
    )  # fmt: skip
    with TestClient(create_http_app(coordinator, Letters(), "toy")) as made:  # type: ignore[arg-type]
        yield made
    agent.stop()


PROMPT = "hello there"
EXPECTED = Letters().decode(monolithic(Letters().encode_text(PROMPT), 8))
BODY = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}


def test_a_completion_is_that_of_one_engine(client: TestClient) -> None:
    reply = client.post("/v1/completions", json=BODY)
    assert reply.status_code == 200 and reply.headers["X-Sparkray-Handoff"] == "full; reason=none"
    body = reply.json()
    assert body["choices"][0]["text"] == EXPECTED and body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == 11 and body["usage"]["completion_tokens"] == 8
    assert body["sparkray_handoff"]["rows_received"] == 10 and body["sparkray_handoff"]["route"] == "handoff"


def test_token_ids_are_a_prompt_as_well(client: TestClient) -> None:
    reply = client.post("/v1/completions", json={**BODY, "prompt": Letters().encode_text(PROMPT)})
    assert reply.json()["choices"][0]["text"] == EXPECTED


def test_a_chat_streams_as_openai_frames_it(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.headers["X-Sparkray-Handoff"] == "full; reason=none"
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == EXPECTED
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["sparkray_handoff"]["verdict"] == "full"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_the_second_turn_says_what_was_cached(client: TestClient) -> None:
    first = client.post("/v1/completions", json={**BODY, "user": "ann"}).json()
    longer = PROMPT + first["choices"][0]["text"] + " and?"
    second = client.post("/v1/completions", json={**BODY, "prompt": longer, "user": "ann"}).json()
    # 11 + 8 - 1 rows are kept; 24 tokens need 23.
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 18
    assert second["sparkray_handoff"]["rows_received"] == 5


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": PROMPT, "max_tokens": 0}, 400, "invalid_input"),
        ({"max_tokens": 4}, 400, "invalid_input"),
        ({**BODY, "temperature": -1}, 400, "invalid_input"),
        ({**BODY, "prompt": "x" * (9 << 20)}, 413, "too_large"),
    ],
)
def test_bad_bodies_are_answered_in_openais_form(
    client: TestClient, body: dict[str, Any], status: int, code: str
) -> None:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == status and reply.json()["error"]["code"] == code


def test_a_prompt_longer_than_the_context_goes_where_it_fits(client: TestClient) -> None:
    reply = client.post("/v1/completions", json={**BODY, "prompt": "y" * 130})
    assert reply.headers["X-Sparkray-Handoff"] == "local; reason=prefill_node"
    assert reply.json()["choices"][0]["text"] == Letters().decode(monolithic([ord("y") - 32] * 130, 8))


def test_health_and_models(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["peers"][0]["is_paired"] is True
