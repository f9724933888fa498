"""Settings of the batch job that watches a file of prompts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sparkray.config.base import Settings
from sparkray.config.metis import BoostName, DetectorName
from sparkray.config.serve import EngineConfig


class WatchPromptsConfig(Settings):
    """One run of `jobs/watch_prompts.py`: what is read, how it is answered and watched, where it is written."""

    input: str = Field(min_length=1, description="JSONL file: one object with `prompt` or `messages` a line.")
    output: str = Field(min_length=1, description="Folder of Parquet parts, on the node where the job's driver runs.")
    model: str = Field("embedded", min_length=1, description="`embedded`, a local directory or a hub id.")
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    chat: bool = Field(False, description="Wrap each `prompt` as one user message; `messages` are always templated.")
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()
    detector: DetectorName = "metis"
    boost: BoostName = "off"
    profile: str | None = Field(None, description="Reference profile of the calibrated detector.")
    profile_dir: str | None = Field(None, description="Folder of profiles; the packaged ones are always found.")
    concurrency: int = Field(1, ge=1, le=1024, description="Engines that run at once.")
    batch_size: int = Field(8, ge=1, le=1024, description="Prompts that go to an engine, and come back, together.")
    rows_per_part: int = Field(64, ge=1, le=100_000, description="A part is written at this many rows at the latest.")
    part_seconds: float = Field(30.0, gt=0, description="A part is written at this age at the latest.")
    start_timeout_seconds: float = Field(900.0, gt=0, description="Limit for the first answer to come back.")
    engine: EngineConfig = Field(default_factory=EngineConfig)

    def xargs(self) -> dict[str, Any]:
        """The switches of METIS for every prompt, as a client would send them."""
        given = {"metis": True, "metis_detector": self.detector, "metis_boost": self.boost}
        return {**given, "metis_profile": self.profile} if self.profile else given

    def fixed_by_output(self) -> dict[str, Any]:
        """What all rows of one output folder have in common: a run with other values may not add to it."""
        names = {"model", "chat", "max_tokens", "temperature", "top_p", "stop", "detector", "boost", "profile"}
        return self.model_dump(mode="json", include=names)
