"""`sparkray metis record` against a small HTTP server that answers as the real one does, and `fit` on what it wrote."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sparkray.cli.metis import app
from sparkray.errors import InputError, SparkrayError, UnavailableError, UsageError
from sparkray.metis.batch_input import read_prompts
from sparkray.metis.recordings import read_recording
from sparkray.serving.record import record

NUM_TOKENS = 60


def entropies_of(question: str) -> list[float | None]:
    """What the server says of an answer: drawn by its question; the first question's third token has no record."""
    found: list[float | None] = np.random.default_rng(len(question)).gamma(1.0, 1.0, NUM_TOKENS).tolist()
    if question == "q0":
        found[2] = None
    return found


class _Handler(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]]

    def log_message(self, *_: object) -> None: ...

    def _reply(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._reply(200, '{"data": [{"id": "Org/Model-1"}]}')
            return
        question = self.path.rsplit("/", 1)[1].removeprefix("chat-")
        events = [{"token_entropy": value} for value in entropies_of(question)]
        self._reply(200, json.dumps({"finish_reason": "stop", "events": events}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "too long":
            self._reply(400, '{"error": {"message": "the prompt is too long"}}')
            return
        pieces = [{"id": f"chat-{question}", "choices": [{"delta": {"content": "x"}}]}] * 3
        self._reply(200, "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (_Handler,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()
        thread.join()


def prompts_file(path: Path, questions: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"id-{text}", "prompt": text}) + "\n" for text in questions))
    return path


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_what_is_recorded_can_be_fitted(server: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    url, asked = server
    questions = [f"q{'0' * number}" for number in range(1, 13)]
    out = tmp_path / "answers.jsonl"
    flags = ["--temperature", 0.3, "--max-tokens", NUM_TOKENS, "--concurrency", 4, "--json"]
    result = invoke("record", prompts_file(tmp_path / "in.jsonl", questions), "--out", out, "--url", url, *flags)
    assert json.loads(result.stdout) == {"path": str(out), "num_answers": 12, "num_tokens": 12 * NUM_TOKENS}
    answers = {answer["id"]: answer for answer in map(json.loads, out.read_text().splitlines())}
    assert {name: answer["entropies"] for name, answer in answers.items()} == {
        f"id-{question}": entropies_of(question) for question in questions
    }
    for body in asked:
        assert (body["temperature"], body["max_tokens"], body["vllm_xargs"]) == (0.3, NUM_TOKENS, {"metis": 1})
    recording = read_recording(out)
    assert (recording.model, recording.temperature) == ("Org/Model-1", 0.3)
    assert sorted(len(stream) for stream in recording.streams) == [2, NUM_TOKENS - 3, *[NUM_TOKENS] * 11]
    told = json.loads(invoke("fit", out, "--into", tmp_path, "--hold-out", 0, "--json").stdout)
    assert (told["name"], told["num_tokens"]) == ("model-1/t0.3/chat", 12 * NUM_TOKENS - 1)


def test_a_refused_prompt_ends_the_recording_and_is_named(
    server: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, _ = server
    prompts = prompts_file(tmp_path / "in.jsonl", ["q", "too long"])
    with pytest.raises(InputError, match=r"'id-too long'.*the prompt is too long"):
        invoke("record", prompts, "--out", tmp_path / "out.jsonl", "--url", url)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_cannot_be_recorded_says_why(server: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    url, asked = server
    prompts = prompts_file(tmp_path / "in.jsonl", ["q"])
    with pytest.raises(UnavailableError, match="cannot be written"):
        invoke("record", prompts, "--out", tmp_path / "no" / "out.jsonl", "--url", url)
    assert asked == []
    prompts.write_text("[]")
    with pytest.raises(SparkrayError, match="line 1"):
        invoke("record", prompts, "--out", tmp_path / "out.jsonl", "--url", url)


@pytest.mark.parametrize("key", ["model", "temperature"])
def test_answers_made_in_different_ways_are_not_one_recording(key: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"entropies": [1.0], key: value}) + "\n" for value in (1, 2)))
    with pytest.raises(UsageError, match=f"several {key}s: 1, 2"):
        read_recording(file)


def test_a_recording_that_is_stopped_closes_its_streams(tmp_path: Path) -> None:
    """One answer is whole, the others go on for ever until the recording is closed."""
    running, closed = threading.Semaphore(0), threading.Semaphore(0)

    class _EndlessClient:
        def chat(self, messages: list[dict[str, str]], **_: object) -> Iterator[tuple[str, str]]:
            if messages[-1]["content"] == "short":
                assert all(running.acquire(timeout=60) for _ in range(2))
                yield "short", "x"
                return
            running.release()
            try:
                while True:
                    yield "endless", "x"
            finally:
                closed.release()

        def trace(self, request_id: str) -> dict[str, Any]:
            return {"finish_reason": "stop", "events": [{"token_entropy": 1.5}]}

    prompts = read_prompts(prompts_file(tmp_path / "in.jsonl", ["endless", "short", "endless too"]))
    client: Any = _EndlessClient()
    answers = record(client, prompts, model="m", temperature=0.0, max_tokens=1, concurrency=3)
    assert next(answers)["entropies"] == [1.5]
    answers.close()  # type: ignore[attr-defined]
    assert all(closed.acquire(timeout=60) for _ in range(2))
