"""Bodies are refused as bytes: depth, syntax, size, and a client that leaves while it sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.errors import InputError
from sparkray.serving.body_guard import BodyGuard, check_json_body, json_depth


def depth_by_parsing(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((depth_by_parsing(child) for child in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth_by_parsing(child) for child in value), default=0)
    return 0


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[]{}'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='k"\\[{'), inner, max_size=3),
)


@given(JSON_VALUES)
def test_depth_equals_that_of_the_parsed_value(value: Any) -> None:
    assert json_depth(json.dumps(value).encode()) == depth_by_parsing(value)


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests 100001 levels deep"),
        (b'{"a": ' + b"[" * 100_000, "nests 100001 levels deep"),
        (b"{nope", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "a JSON list"),
        (b'"text"', "a JSON str"),
    ],
)
def test_bad_bodies_are_refused_with_the_reason(body: bytes, fragment: str) -> None:
    with pytest.raises(InputError, match=fragment):
        check_json_body(body, max_depth=32)


def test_brackets_in_strings_do_not_count() -> None:
    check_json_body(json.dumps({"a": "[" * 1000}).encode(), max_depth=4)


async def drive(messages: list[dict[str, Any]], **limits: int) -> tuple[list[dict[str, Any]], list[bytes]]:
    sent: list[dict[str, Any]] = []
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])
        seen.append((await receive())["type"].encode())

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    guard = BodyGuard(app, max_body_bytes=limits.get("max_body_bytes", 1000), max_depth=8)
    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    await guard(scope, receive, send)
    return sent, seen


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_a_body_in_pieces_is_replayed_whole_and_the_disconnect_follows() -> None:
    sent, seen = await drive([part(b'{"a"', True), part(b": 1}"), {"type": "http.disconnect"}])
    assert (sent, seen) == ([], [b'{"a": 1}', b"http.disconnect"])


async def test_a_body_over_the_limit_is_answered_413_before_its_end() -> None:
    sent, seen = await drive([part(b" " * 600, True), part(b" " * 600, True)], max_body_bytes=1000)
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "too_large"
    assert seen == []


async def test_a_client_that_leaves_while_sending_reaches_nobody() -> None:
    assert await drive([part(b"{", True), {"type": "http.disconnect"}]) == ([], [])
