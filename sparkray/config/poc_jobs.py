"""Settings of the jobs of proof of compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from sparkray.config.base import Settings
from sparkray.config.poc import PocConfig, PocServiceConfig


def _must_be_compatible(config: PocConfig) -> PocConfig:
    if config.mode != "compatible":
        raise ValueError("groups compute the compatible mode; `sparkray poc generate --mode hardened` the other one")
    return config


def _named(name: str) -> Callable[[Any], Any]:
    """Seeds for a run whose nonces nobody wants, where they are not given beside other settings."""
    return lambda value: {"block_hash": name, "public_key": name, **value} if isinstance(value, dict) else value


CompatiblePoc = Annotated[PocConfig, AfterValidator(_must_be_compatible)]
RatePoc = Annotated[CompatiblePoc, BeforeValidator(_named("rate"))]
CrossCheckPoc = Annotated[CompatiblePoc, BeforeValidator(_named("cross-check"))]


class PocGenerateConfig(Settings):
    """One run of `jobs/poc_generate.py`."""

    poc: CompatiblePoc = Field(description="What is computed.")
    fleet: PocServiceConfig = Field(PocServiceConfig(), description="Groups and bounds.")
    output: str = Field(min_length=1, description="Valid nonces, one ProofBatch a line; cursors lie beside it.")
    count: int = Field(1000, ge=1, description="Nonces to compute in this run.")
    start_timeout_seconds: float = Field(600.0, gt=0, description="Limit for all groups to load.")


class PocNonceRateConfig(Settings):
    """One run of `jobs/poc_nonce_rate.py`."""

    poc: RatePoc = Field(PocConfig(block_hash="rate", public_key="rate"), description="What is computed.")
    fleet: PocServiceConfig = Field(PocServiceConfig(), description="Groups and bounds.")
    seconds: float = Field(60.0, gt=0, description="How long to measure.")
    warmup_seconds: float = Field(5.0, ge=0, description="Computed and not counted.")
    start_timeout_seconds: float = Field(600.0, gt=0, description="Limit for all groups to load.")


class PocCrossCheckConfig(Settings):
    """One run of `jobs/poc_cross_check.py`."""

    poc: CrossCheckPoc = Field(
        PocConfig(block_hash="cross-check", public_key="cross-check"), description="What is computed."
    )
    num_nonces: int = Field(512, ge=16, le=1_000_000, description="Nonces that every server computes, twice.")
    num_cpus: float = Field(1.0, gt=0, description="Logical CPUs that Ray sets aside on each server.")
    timeout_seconds: float = Field(3600.0, gt=0, description="Limit for every server to answer.")
