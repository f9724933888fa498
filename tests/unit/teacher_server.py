"""A small OpenAI-compatible host with one fixed distribution a token, and faults on demand."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCAB_SIZE = 64


def distribution(token_id: int) -> np.ndarray:
    """The distribution after a token: geometric over the tokens in an order that the token turns, (V,)."""
    weights = 0.8 ** np.arange(VOCAB_SIZE)
    return np.roll(weights / weights.sum(), token_id)


@dataclass
class Fault:
    """What one request gets instead of an answer; status 0 closes the connection without one."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class TeacherServer:
    """What the host did and shall do."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    asked: list[int] = field(default_factory=list)
    latency_seconds: float = 0.0
    in_flight: int = 0
    peak_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, request: dict[str, Any]) -> Any:
        if path == "/tokenize":
            return {"tokens": [byte % VOCAB_SIZE for byte in request["prompt"].encode()]}
        if path == "/v1/chat/completions":
            return self._chat(request)
        ids = request["prompt"]
        if "prompt_logprobs" in request:
            positions: list[Any] = [None]
            for before, token in itertools.pairwise(ids):
                probabilities = distribution(before)
                likeliest = np.argsort(-probabilities)[: request["prompt_logprobs"]]
                named = dict.fromkeys([*likeliest.tolist(), token])
                positions.append(
                    {
                        str(number): {
                            "logprob": float(np.log(probabilities[number])),
                            "rank": int((probabilities > probabilities[number]).sum()) + 1,
                            "decoded_token": "�",
                        }
                        for number in named
                    }
                )
            return {"choices": [{"prompt_logprobs": positions}]}
        own, tables = [None], [None]
        for before, token in itertools.pairwise(ids):
            probabilities = distribution(before)
            likeliest = np.argsort(-probabilities)[: request["logprobs"]]
            own.append(float(np.log(probabilities[token])))
            tables.append({f"token_id:{number}": float(np.log(probabilities[number])) for number in likeliest})
        return {"choices": [{"logprobs": {"token_logprobs": own, "top_logprobs": tables}}]}

    @staticmethod
    def _chat(request: dict[str, Any]) -> Any:
        content = []
        for number in (3, 5):
            probabilities = distribution(number)
            likeliest = np.argsort(-probabilities)[: request["top_logprobs"]]
            entries = [
                {"token": "�", "bytes": [int(token)], "logprob": float(np.log(probabilities[token]))}
                for token in likeliest
            ]
            content.append(entries[0] | {"top_logprobs": entries})
        return {"choices": [{"logprobs": {"content": content}}]}


@contextmanager
def serve_teacher(address: str = "127.0.0.1") -> Iterator[TeacherServer]:
    """A running host."""
    state = TeacherServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, json.dumps({"version": "0.32.0"}), {})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.in_flight += 1
                state.peak_in_flight = max(state.peak_in_flight, state.in_flight)
                if "prompt_logprobs" in request:
                    state.asked.append(request["prompt_logprobs"])
                fault = state.always or (state.faults.pop(0) if state.faults else None)
            try:
                time.sleep(state.latency_seconds)
                if fault is None:
                    self._send(200, json.dumps(state.answer(self.path, request)), {})
                elif fault.status == 0:
                    self.close_connection = True
                else:
                    self._send(fault.status, fault.body, fault.headers)
            finally:
                with state.lock:
                    state.in_flight -= 1

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, text: str, headers: dict[str, str]) -> None:
            body = text.encode()
            # Counted out before the client can ask again.
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://{address}:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
