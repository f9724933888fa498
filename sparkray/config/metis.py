"""Settings of METIS: how a model is watched while it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparkray.config.base import Settings

DetectorName = Literal["metis", "calibrated"]
BoostName = Literal["off", "published", "careful"]


class MetisConfig(Settings):
    """What is watched when a request says nothing, and the bounds of the trace memory."""

    watch_by_default: bool = Field(True, description="Watch requests that do not say `metis` themselves.")
    detector: DetectorName = Field("metis", description="Detector of requests that name none.")
    boost: BoostName = Field("off", description="CoT boost of requests that name none.")
    profile_dir: str | None = Field(None, description="Folder of profiles; the packaged ones are always found.")
    max_traces: int = Field(512, ge=1, le=100_000, description="Finished traces kept for GET /v1/metis/traces.")
    trace_ttl_seconds: float = Field(3600.0, gt=0, description="Age at which a finished trace is dropped.")
    max_trace_tokens: int = Field(8192, ge=1, le=1_048_576, description="Tokens recorded for one request.")
