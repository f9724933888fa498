"""Settings of a batch of prompts that a running server answers."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from sparkray.config.base import Settings


class BatchPromptsConfig(Settings):
    """One run of `sparkray batch` or `jobs/batch_prompts.py`: what is asked, whom, how, and where answers go."""

    input: str = Field(min_length=1, description="Prompts: .json, .jsonl or .txt.")
    url: str = Field(
        "http://127.0.0.1:8000", min_length=1, description="Server with OpenAI's routes; several joined by commas."
    )
    out: str = Field(min_length=1, description="JSON file of the answers; the journal lies beside it.")
    model: str | None = Field(None, description="Served model; unset: the first that the server names.")
    system: str | None = Field(None, description="System message before every prompt.")
    max_tokens: int = Field(256, ge=1, description="Longest answer.")
    temperature: float = Field(0.0, ge=0, le=2, description="Zero takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of sampling.")
    seed: int | None = Field(None, ge=0, description="Seed of sampling.")
    concurrency: int = Field(4, ge=1, le=4096, description="Requests in flight at each server.")
    limit: int | None = Field(None, ge=1, description="Ask the first so many prompts only.")
    count_tokens: bool = Field(True, description="Ask the server's /tokenize for counts beside its usage.")
    max_attempts: int = Field(5, ge=1, le=100, description="Times that a prompt is sent when a server fails.")
    retry_seconds: float = Field(0.5, ge=0, le=60, description="Wait before the second attempt; doubles after each.")
    timeout_seconds: float = Field(600.0, gt=0, description="Limit for one answer.")

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        for url in value.split(","):
            if not url.strip().startswith(("http://", "https://")):
                raise ValueError(f"{url.strip()!r} is no http:// or https:// address")
        return value

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers, without `/v1` or a slash at the end."""
        return tuple(url.strip().rstrip("/").removesuffix("/v1") for url in self.url.split(","))

    def sampling(self) -> dict[str, Any]:
        """What decides an answer besides prompt and model: part of its key, and of the request."""
        given = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return given if self.seed is None else {**given, "seed": self.seed}
