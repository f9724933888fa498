"""One prompt to one server: the answer, why it ended, and its tokens by the server's usage and by its tokenizer."""

from __future__ import annotations

import time
from typing import Any

import httpx

from sparkray.config.batch_prompts import BatchPromptsConfig
from sparkray.errors import NotFoundError, UnavailableError
from sparkray.serving.batch.prompt_file import BatchPrompt

_CONNECT_SECONDS = 5.0
_ERROR_CHARACTERS = 500


class ServerFailedError(UnavailableError):
    """The server did not answer, or says that it cannot now: the same request may work later or elsewhere."""


class Asker:
    """Sends prompts to one server.

    Args:
        url: the server, without `/v1`.
        config: how is asked; `model` must be settled for `ask`.
    """

    def __init__(self, url: str, config: BatchPromptsConfig) -> None:
        self.url = url
        self._config = config
        timeout = httpx.Timeout(config.timeout_seconds, connect=_CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=config.concurrency + 2)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)
        self._counts_tokens = config.count_tokens

    async def aclose(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """The ids of the server's models.

        Raises:
            ServerFailedError: no server answers, or it is none of OpenAI's kind.
        """
        reply = await self._send("GET", "/v1/models")
        if reply.status_code != 200:
            raise ServerFailedError(f"{self.url}/v1/models answered {reply.status_code}: {_message(reply)}")
        return [str(model["id"]) for model in reply.json()["data"]]

    async def ask(self, prompt: BatchPrompt) -> dict[str, Any]:
        """The answer's row, or one with `error` where the server refuses this prompt.

        Raises:
            ServerFailedError: see there.
            NotFoundError: the server does not know the model or the route: no prompt will fare better.
        """
        messages = self._messages(prompt)
        body = {"model": self._config.model, "messages": messages, **self._config.sampling()}
        started = time.monotonic()
        reply = await self._send("POST", "/v1/chat/completions", body)
        if reply.status_code == 404:
            raise NotFoundError(f"{self.url} answered 404: {_message(reply)}")
        if reply.status_code != 200:
            return {"error": f"{reply.status_code}: {_message(reply)}", "server": self.url}
        answer = reply.json()
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        usage = answer.get("usage") or {}
        return {
            "response": text,
            "finish_reason": choice.get("finish_reason"),
            "usage": {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
            "latency_seconds": round(time.monotonic() - started, 3),
            "tokenizer": await self._count(messages, text),
            "server": self.url,
        }

    def _messages(self, prompt: BatchPrompt) -> list[dict[str, Any]]:
        before = [{"role": "system", "content": self._config.system}] if self._config.system else []
        return [*before, *(dict(message) for message in prompt.messages)]

    async def _count(self, messages: list[dict[str, Any]], text: str) -> dict[str, int] | None:
        """Tokens of prompt and answer by `/tokenize`; None where the server has no such route.

        The answer's count need not equal `usage`: decoding and encoding again may join tokens otherwise.
        """
        if not self._counts_tokens:
            return None
        bodies = {
            "prompt_tokens": {"messages": messages, "add_generation_prompt": True},
            "completion_tokens": {"prompt": text, "add_special_tokens": False},
        }
        counts: dict[str, int] = {}
        for name, body in bodies.items():
            reply = await self._send("POST", "/tokenize", {"model": self._config.model, **body})
            if reply.status_code != 200:
                self._counts_tokens = reply.status_code not in (404, 405)
                return None
            counts[name] = int(reply.json()["count"])
        return counts

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            reply = await self._http.request(method, path, json=body)
        except httpx.HTTPError as failure:
            what = str(failure) or type(failure).__name__
            raise ServerFailedError(
                f"no server answers at {self.url}: {what}.",
                hint="Start one by `sparkray serve up`, or name it by --url.",
            ) from failure
        if reply.status_code >= 500 or reply.status_code in (408, 429):
            raise ServerFailedError(f"{self.url} answered {reply.status_code}: {_message(reply)}")
        return reply


def _message(reply: httpx.Response) -> str:
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:_ERROR_CHARACTERS]
    except (ValueError, KeyError, TypeError):
        return reply.text[:_ERROR_CHARACTERS]
