"""Talking to a running server: one chat stream, and the trace of how sure the model was."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx

from sparkray.errors import InputError, NotFoundError, SparkrayError, UnavailableError, WaitTimeoutError

CONNECT_TIMEOUT_SECONDS = 5.0
# A cold prefill on a small CPU is slow; a server that says nothing for this long has a problem.
READ_TIMEOUT_SECONDS = 300.0


class ChatClient:
    """A client of the OpenAI routes and of ours."""

    def __init__(self, base_url: str, *, timeout_seconds: float = READ_TIMEOUT_SECONDS) -> None:
        self.base_url = base_url.rstrip("/")
        self._http = httpx.Client(timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS))

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """The ids of the models that the server has."""
        return [str(model["id"]) for model in self._get("/v1/models")["data"]]

    def trace(self, request_id: str) -> dict[str, Any]:
        """The trace of one request."""
        return self._get(f"/v1/metis/traces/{request_id}")

    def trace_stream(self, request_id: str) -> Iterator[dict[str, Any]]:
        """The rows of one request's tokens while they are written; the last update says `finished`."""
        return self._events("GET", f"/v1/metis/traces/{request_id}/stream")

    def chat(
        self, messages: Sequence[dict[str, str]], *, model: str, options: dict[str, Any] | None = None
    ) -> Generator[tuple[str, str], None, None]:
        """Stream one reply as `(request id, piece of text)`.

        Closing the iterator closes the connection, which ends the work on the server.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **(options or {})}
        for chunk in self._events("POST", "/v1/chat/completions", body):
            for choice in chunk.get("choices", []):
                yield str(chunk["id"]), str(choice.get("delta", {}).get("content") or "")

    def search(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of one search, the last of which is `done` with the report; closing the iterator ends it."""
        yield from self._events("POST", "/v1/search", {**body, "stream": True})

    def _events(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        with _reporting(self.base_url), self._http.stream(method, self.base_url + path, json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                raise _error_of(reply)
            for line in reply.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise SparkrayError(f"the server ended the stream: {event['error'].get('message')}")
                yield event

    def _get(self, path: str) -> dict[str, Any]:
        with _reporting(self.base_url):
            reply = self._http.get(self.base_url + path)
        if reply.status_code != 200:
            raise _error_of(reply)
        return dict(reply.json())


class _reporting:  # noqa: N801 - reads as a verb at its uses
    """Turns httpx's errors into ours."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
            raise UnavailableError(
                f"no server answers at {self.url}.", hint="Start one by `sparkray serve up`, or name it by --url."
            ) from failure
        if isinstance(failure, httpx.TimeoutException):
            raise WaitTimeoutError(f"the server at {self.url} did not answer in time.") from failure
        if isinstance(failure, httpx.HTTPError):
            raise UnavailableError(f"the connection to {self.url} broke: {failure}.") from failure


def _error_of(reply: httpx.Response) -> SparkrayError:
    try:
        message = str(reply.json()["error"]["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        message = reply.text[:500]
    text = f"the server answered {reply.status_code}: {message}"
    if reply.status_code == 404:
        return NotFoundError(text)
    return InputError(text) if reply.status_code < 500 else UnavailableError(text)
