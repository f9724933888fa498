"""The body of a search and its events on the wire."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import pytest
from pydantic import ValidationError

from sparkray.config.search import SearchConfig
from sparkray.errors import InputError
from sparkray.search.events import TokensEvent, VoteEvent, event_to_dict
from sparkray.serving.page import page_folder
from sparkray.serving.search_api import SearchBody, error_event, event_stream


def test_a_body_carries_the_settings_of_a_search() -> None:
    body = SearchBody.model_validate({"question": "why?", "num_paths": 3, "policy": "esc", "stream": True})
    assert body.config == SearchConfig(num_paths=3, policy="esc")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "question"),
        ({"question": "why?", "alpha": 0}, "alpha"),
        ({"question": "why?", "alpha": 1}, "alpha"),
        ({"question": "why?", "num_paths": 0}, "num_paths"),
        ({"question": "why?", "num_paths": 100_000}, "num_paths"),
        ({"question": "why?", "policy": "certified"}, "needs a profile"),
        ({"question": "why?", "profile": "/etc/passwd"}, "over HTTP the profile is 'packaged'"),
        ({"question": "why?", "colour": "red"}, "colour"),
        ({"question": "why?", "rounds": {"rounds": 5}}, "5 rounds"),
        ({"question": "x" * 100_001}, "100000"),
    ],
)
def test_bodies_that_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SearchBody.model_validate(given)


async def test_the_stream_is_server_sent_events() -> None:
    async def others() -> AsyncIterator[dict[str, object]]:
        yield event_to_dict(VoteEvent(0, "18", False, (("18", 1.0),)))
        yield error_event(InputError("no room.", param="question"))

    first = event_to_dict(TokensEvent(0, " 3", (0.5, None), (0.0, None), 2))
    frames = [frame async for frame in event_stream(first, others())]
    assert all(frame.startswith("data: ") and frame.endswith("\n\n") for frame in frames)
    assert frames[-1] == "data: [DONE]\n\n"
    read = [json.loads(frame[6:]) for frame in frames[:-1]]
    assert read[0] == {
        "kind": "tokens",
        "path": 0,
        "text": " 3",
        "entropies": [0.5, None],
        "statistics": [0.0, None],
        "num_tokens": 2,
    }
    assert read[1]["votes"] == [["18", 1.0]]
    assert read[2]["error"]["param"] == "question"


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    parser = _Links()
    parser.feed((page_folder() / "index.html").read_text(encoding="utf-8"))
    assert parser.found
    for link in parser.found:
        assert link.startswith(("/", "#")), link
        if link.startswith("/page/"):
            assert (page_folder() / link.removeprefix("/page/")).is_file(), link
    for file in page_folder().iterdir():
        text = file.read_text(encoding="utf-8")
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
