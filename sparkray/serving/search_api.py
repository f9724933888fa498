"""`POST /v1/search`: what a client may ask, and how the events of a search read on the wire."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from sparkray.config.search import IterativeConfig, SearchConfig
from sparkray.errors import SparkrayError, http_status, openai_body

PACKAGED_PROFILE = "packaged"
_MAX_QUESTION_CHARS = 100_000


class SearchBody(SearchConfig):
    """The body of a search: a question, and any of the settings of a search."""

    question: str = Field(max_length=_MAX_QUESTION_CHARS)
    model: str | None = Field(None, description="The served model; may be left out where there is one.")
    stream: bool = Field(False, description="Server-sent events: one a wave, prune, vote and piece of text.")
    rounds: IterativeConfig | None = Field(None, description="Search in rounds that fork the calmest paths.")

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.profile not in (None, PACKAGED_PROFILE):
            # A name from outside must not choose which of the server's files is read.
            raise ValueError(f"over HTTP the profile is {PACKAGED_PROFILE!r} or none, and {self.profile!r} was given")
        return self

    @property
    def config(self) -> SearchConfig:
        """The settings alone."""
        return SearchConfig.model_validate(self.model_dump(include=set(SearchConfig.model_fields)))


def error_event(error: SparkrayError) -> dict[str, Any]:
    """An error as a replica sends it to the front."""
    return {"kind": "error", "status": http_status(error), **openai_body(error)}


async def event_stream(first: Mapping[str, Any], others: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    """Server-sent events, ended by `[DONE]`; an error in their midst is an event as well."""
    yield _frame(first)
    async for event in others:
        yield _frame(event)
    yield "data: [DONE]\n\n"


def _frame(event: Mapping[str, Any]) -> str:
    shown = {"error": event["error"]} if event["kind"] == "error" else event
    return f"data: {json.dumps(shown, allow_nan=False)}\n\n"
