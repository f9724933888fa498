"""Request bodies are checked before anything parses them: size, syntax, depth.

A deeply nested JSON text overflows the parser's stack, and a huge one fills memory; both are refused with
OpenAI's error body and the right status while they are still bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sparkray.errors import InputError, SparkrayError, TooLargeError, http_status, openai_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


def json_depth(body: bytes) -> int:
    """How deep the brackets of a JSON text nest, strings left out; one pass, no recursion."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in body:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:  # backslash
                escaped = True
            elif byte == 0x22:  # quote
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def check_json_body(body: bytes, *, max_depth: int) -> None:
    """Raise an InputError unless `body` is one JSON object that nests at most `max_depth` deep."""
    # A short text cannot nest deeply, and the count of opening brackets is a quick upper bound.
    if body.count(b"[") + body.count(b"{") > max_depth and (depth := json_depth(body)) > max_depth:
        raise InputError(f"the body nests {depth} levels deep, and at most {max_depth} are accepted.", param="body")
    try:
        value = json.loads(body)
    except (UnicodeDecodeError, json.JSONDecodeError) as failure:
        raise InputError(f"the body is not JSON: {failure}.", hint="Send one JSON object.", param="body") from failure
    if not isinstance(value, dict):
        raise InputError(f"the body is a JSON {type(value).__name__}, and an object is expected.", param="body")


class BodyGuard:
    """ASGI middleware that reads, checks and replays the body of JSON POST requests."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_depth: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_depth = max_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _is_form(scope):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(receive)
            if body:
                check_json_body(body, max_depth=self.max_depth)
        except SparkrayError as error:
            await _answer(send, error)
            return
        if body is None:
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None when the client went away before it was sent."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.max_body_bytes:
                raise TooLargeError(
                    f"the body is over {self.max_body_bytes} bytes, which is the limit (max_body_bytes).", param="body"
                )
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _is_form(scope: Scope) -> bool:
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return bool(content_type.startswith((b"multipart/form-data", b"application/x-www-form-urlencoded")))


def _replay(body: bytes, receive: Receive) -> Receive:
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            # Whatever comes now is the client's disconnect, which cancels the work.
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, error: SparkrayError) -> None:
    content = json.dumps(openai_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": http_status(error), "headers": headers})
    await send({"type": "http.response.body", "body": content})
