"""Settings of serving: which model, which engine limits, how many replicas, where it listens."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sparkray.config.base import Settings
from sparkray.config.metis import MetisConfig


class EngineConfig(Settings):
    """The vLLM limits that matter on these machines. `extra` passes any other engine argument through."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str | None = Field(None, description="vLLM's name of a quantisation, where the files do not say it.")
    max_model_len: int = Field(2048, ge=16)
    max_num_seqs: int = Field(32, ge=1, le=4096)
    max_num_batched_tokens: int | None = Field(None, ge=16)
    enforce_eager: bool = Field(True, description="No CUDA graphs: quicker start, slower decode on a GPU.")
    gpu_memory_utilization: float = Field(0.80, gt=0, le=0.95, description="0.92, vLLM's own, wedges a GB10.")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of the CPU engine, in GiB.")
    num_gpu_blocks_override: int | None = Field(None, ge=1, description="A fixed number of KV blocks, for tests.")
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    pipeline_parallel_size: int = Field(1, ge=1, le=64)
    extra: dict[str, Any] = Field(default_factory=dict, description="More arguments of vLLM's AsyncEngineArgs.")


class AutoscalingConfig(Settings):
    """Ray Serve's autoscaling: replicas follow the number of requests in flight."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(16, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self


class ServeConfig(Settings):
    """One served model with its routes."""

    model: str = Field("embedded", min_length=1, description="`embedded`, a local directory or a hub id.")
    model_id: str | None = Field(None, description="The name clients use; by default derived from `model`.")
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback is a choice of yours.")
    port: int = Field(8000, ge=1, le=65535)
    replicas: int = Field(1, ge=1, le=1024)
    autoscaling: AutoscalingConfig | None = Field(None, description="Replaces `replicas` when given.")
    max_ongoing_requests: int = Field(256, ge=1, description="Requests that a replica accepts at once.")
    max_queued_requests: int = Field(1024, ge=-1, description="Requests that may wait; beyond it a client gets 503.")
    max_body_bytes: int = Field(8 * 2**20, ge=1024)
    max_json_depth: int = Field(32, ge=4, le=512)
    start_timeout_seconds: float = Field(900.0, gt=0)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    metis: MetisConfig = Field(default_factory=MetisConfig)
