"""The shipped coordinator on Ray Serve: OpenAI's routes over a real vLLM on a node and llama.cpp in another network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from sparkray.cluster.processes import free_port
from sparkray.config.handoff import DecodeConfig, HandoffConfig
from sparkray.handoff.local_peers import LocalPeer
from tests.ray.conftest import RayCluster

pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SERVED = Path(__file__).parents[2] / "serve_apps/handoff.yaml"
STORY = "Tell me about the sea, the tides and the moon, in plain words that a child of ten years understands."


@pytest.fixture(scope="module")
def url(cluster: RayCluster, ray_connection: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from serve_apps.handoff import build

    root = tmp_path_factory.mktemp("handoff")
    (root / "secret").write_text("a secret for tests")
    config = DecodeConfig(
        engine="llamacpp", host=cluster.network.node_ip, insecure=True, secret_file=str(root / "secret"),
        context_tokens=1024, max_sequences=4,
    )  # fmt: skip
    args = yaml.safe_load(SERVED.read_text())["applications"][0]["args"]
    with LocalPeer(config, root / "peer.log", cluster.network.prefix) as peer:
        args |= {"peers": [peer.wait_ready()], "secret_file": str(root / "secret"), "force_route": "handoff"}
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        try:
            serve.run(build(HandoffConfig(**args)), name="sparkray-handoff", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


def test_a_conversation_is_handed_off_and_goes_on(url: str) -> None:
    with httpx.Client(base_url=url, timeout=280) as http:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": STORY}], "max_tokens": 24, "temperature": 0, "conversation": "one",
        }  # fmt: skip
        first = http.post("/v1/chat/completions", json=body)
        assert first.status_code == 200, first.text
        assert first.headers["X-Sparkray-Handoff"] == "full; reason=none"
        said = first.json()["choices"][0]["message"]["content"]
        assert len(said) > 20

        # Once more, streamed and under no name.
        with http.stream("POST", "/v1/chat/completions", json={**body, "conversation": "", "stream": True}) as reply:
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == said
        assert events[-1]["sparkray_handoff"]["verdict"] == "full"

        body["messages"] = [
            *body["messages"], {"role": "assistant", "content": said}, {"role": "user", "content": "And the wind?"}
        ]  # fmt: skip
        second = http.post("/v1/chat/completions", json=body).json()["sparkray_handoff"]
        assert second["verdict"] == "full" and second["rows_cached"] > 20
        assert second["rows_received"] < second["rows_cached"]

        health = http.get("/health").json()
        assert health["status"] == "ok" and health["peers"][0]["is_paired"]
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 0}).status_code == 400


def test_the_file_for_two_sparks_is_what_ray_takes() -> None:
    """vLLM on both sides is Ray's own pattern; NIXL and a second GPU are missing here, so its arguments are judged."""
    from ray.llm._internal.serve.serving_patterns.prefill_decode.builder import PDServingArgs

    served = yaml.safe_load(SERVED.with_name("handoff_vllm.yaml").read_text())["applications"][0]
    assert served["import_path"] == "ray.serve.llm:build_pd_openai_app"
    taken = PDServingArgs.model_validate(served["args"])
    for side in (taken.prefill_config, taken.decode_config):
        assert side.engine_kwargs["kv_transfer_config"]["kv_connector"] == "NixlConnector"
