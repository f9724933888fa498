"""A server of chat completions for tests of the batch runner, which counts what it is asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """OpenAI's routes in a thread: the answer is the prompt reversed, a token is a word."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.status: Callable[[str], int] = lambda _prompt: 200
        self.delay_seconds = 0.0
        self.num_open = 0
        self.holds_from: int | None = None  # requests from this number on wait for `released`
        self.released = threading.Event()
        self.has_tokenize = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, answer = outer.answer(self.path, body)
                self.reply(status, answer)

            def reply(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:
                    self.close_connection = True  # the runner was killed

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/tokenize":
            if not self.has_tokenize:
                return 404, {"error": {"message": "no such route"}}
            text = body.get("prompt") or " ".join(message["content"] for message in body["messages"])
            return 200, {"count": len(text.split())}
        prompt = body["messages"][-1]["content"]
        self.num_open += 1
        self.asked[prompt] += 1
        if self.holds_from is not None and self.asked.total() > self.holds_from:
            self.released.wait(60)
        time.sleep(self.delay_seconds)
        self.num_open -= 1
        status = self.status(prompt)
        if status != 200:
            return status, {"error": {"message": f"refused {prompt}"}}
        words = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": len(prompt.split()), "total_tokens": 2 * words}
        choice = {"message": {"content": prompt[::-1]}, "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": usage}
