"""One watched exchange with a server, and the loop of many."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

from rich.console import Console
from rich.live import Live

from sparkray.errors import InputError, NotFoundError, SparkrayError
from sparkray.serving.chat_view import live_view, report, report_lines
from sparkray.serving.client import ChatClient

FIRST_TOKEN_TIMEOUT_SECONDS = 300.0

HELP = """/detector metis|calibrated   which detector watches
/boost off|published|careful which chain-of-thought boost is applied
/temperature T   /max N      how tokens are drawn
/trace                       the last trace as JSON
/reset                       forget the conversation
/quit                        leave (also Ctrl-D); Ctrl-C stops a reply"""


@dataclass(frozen=True)
class Reply:
    """A finished reply with the rows of its tokens."""

    request_id: str
    text: str
    rows: list[dict[str, Any]]


class _Stream:
    """A chat stream consumed on a thread, since its trace is read at the same time."""

    def __init__(self, client: ChatClient, messages: list[dict[str, str]], model: str, options: dict[str, Any]) -> None:
        self.text = ""
        self._ids: Queue[str | SparkrayError] = Queue(maxsize=1)
        self._stopped = threading.Event()
        self._failure: SparkrayError | None = None
        self._thread = threading.Thread(
            target=self._run, args=(client, messages, model, options), name="chat-stream", daemon=True
        )
        self._thread.start()

    def _run(self, client: ChatClient, messages: list[dict[str, str]], model: str, options: dict[str, Any]) -> None:
        announced = False
        try:
            for request_id, piece in client.chat(messages, model=model, options=options):
                if not announced:
                    self._ids.put(request_id)
                    announced = True
                self.text += piece
                if self._stopped.is_set():
                    return
        except SparkrayError as failure:
            self._failure = failure
            if not announced:
                self._ids.put(failure)

    def request_id(self) -> str:
        try:
            first = self._ids.get(timeout=FIRST_TOKEN_TIMEOUT_SECONDS)
        except Empty:
            raise SparkrayError(f"no token came within {FIRST_TOKEN_TIMEOUT_SECONDS:.0f} s.") from None
        if isinstance(first, SparkrayError):
            raise first
        return first

    def stop(self) -> None:
        """Close the connection at the next piece, which ends the work on the server."""
        self._stopped.set()

    def join(self) -> None:
        self._thread.join(timeout=FIRST_TOKEN_TIMEOUT_SECONDS)
        if self._failure is not None:
            raise self._failure


def exchange(
    client: ChatClient,
    messages: list[dict[str, str]],
    *,
    model: str,
    options: dict[str, Any],
    show: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Reply:
    """Ask, follow the trace while the reply is written, and return both.

    Args:
        client: the server.
        messages: the conversation, OpenAI's way.
        model: the model's id.
        options: further fields of the request.
        show: called with all rows so far, after each update.
    """
    stream = _Stream(client, messages, model, options)
    rows: list[dict[str, Any]] = []
    request_id = stream.request_id()
    try:
        for update in client.trace_stream(request_id):
            rows.extend(update["tokens"])
            show(rows)
    except NotFoundError:
        # The request asked not to be watched: there is a reply and no trace.
        pass
    except KeyboardInterrupt:
        stream.stop()
        raise
    stream.join()
    return Reply(request_id, stream.text, rows)


@dataclass
class Repl:
    """A conversation at a terminal."""

    client: ChatClient
    model: str
    console: Console
    options: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 256, "temperature": 0.7, "vllm_xargs": {}})
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Reply | None = None

    def run(self) -> None:
        """Read lines until /quit or the end of input."""
        self.console.print(f"[bold]{self.model}[/] at {self.client.base_url}; /help lists commands")
        while True:
            try:
                line = self.console.input("[bold blue]you[/] ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            if not line:
                continue
            try:
                self._command(line) if line.startswith("/") else self.ask(line)
            except SparkrayError as failure:
                self.console.print(f"[red]error:[/] {failure}", highlight=False)

    def ask(self, question: str) -> None:
        """One question; Ctrl-C stops the reply and keeps the conversation."""
        messages = [*self.messages, {"role": "user", "content": question}]
        options = {key: value for key, value in self.options.items() if value not in ({}, None)}
        try:
            self.last = self._follow(messages, options)
        except KeyboardInterrupt:
            self.console.print("[dim]stopped[/]")
            return
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def _follow(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Reply:
        if not self.console.is_terminal:
            reply = exchange(self.client, messages, model=self.model, options=options)
            for line in [reply.text, *report_lines(reply.rows)]:
                self.console.print(line, markup=False, highlight=False)
            return reply
        with Live(live_view([]), console=self.console, refresh_per_second=8, vertical_overflow="visible") as live:
            reply = exchange(
                self.client, messages, model=self.model, options=options, show=lambda rows: live.update(live_view(rows))
            )
        if not reply.rows:
            self.console.print(reply.text, markup=False)
        self.console.print(report(reply.rows))
        return reply

    def _command(self, line: str) -> None:
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        match name:
            case "help":
                self.console.print(HELP, markup=False)
            case "reset":
                self.messages = []
            case "trace":
                if self.last is not None:
                    self.console.print_json(data=self.client.trace(self.last.request_id))
            case "detector" | "boost":
                # The server checks the value and says what it accepts.
                self.options["vllm_xargs"] = {**self.options["vllm_xargs"], f"metis_{name}": value}
            case "temperature" | "max":
                self.options["temperature" if name == "temperature" else "max_tokens"] = _number(name, value)
            case _:
                raise InputError(f"/{name} is not a command.", hint="/help lists them.")


def _number(name: str, value: str) -> float | int:
    try:
        return float(value) if name == "temperature" else int(value)
    except ValueError:
        raise InputError(f"/{name} takes a number, and {value!r} was given.") from None
