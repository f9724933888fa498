"""From our settings to the values of `ray.serve.llm.LLMConfig`: pure, so that it is tested without a cluster."""

from __future__ import annotations

from typing import Any

from sparkray.config.serve import EngineConfig, ServeConfig

METIS_KEY = "sparkray_metis"
MODEL_KEY = "sparkray_model"


def llm_config_values(
    config: ServeConfig, *, model_path: str, model_id: str, on_cpu: bool, num_gpus_per_node: int = 1
) -> dict[str, Any]:
    """The keyword arguments of `LLMConfig` for one served model.

    Args:
        config: the settings.
        model_path: local directory or hub id that vLLM loads.
        model_id: the name that clients use.
        on_cpu: whether the engine is the CPU build.
        num_gpus_per_node: GPUs of one node; a tensor-parallel size above it spreads over nodes.
    """
    values: dict[str, Any] = {
        "model_loading_config": {"model_id": model_id, "model_source": model_path},
        "engine_kwargs": engine_kwargs(config.engine, on_cpu=on_cpu),
        "deployment_config": deployment_options(config),
        "experimental_configs": {METIS_KEY: config.metis.model_dump(), "stream_batching_interval_ms": 0},
    }
    if on_cpu:
        values["accelerator_config"] = {"kind": "cpu"}
    elif config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size > num_gpus_per_node:
        values["placement_group_config"] = {"bundle_per_worker": {"GPU": 1, "CPU": 1}, "strategy": "SPREAD"}
    return values


def engine_kwargs(engine: EngineConfig, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`."""
    kwargs: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
    }
    optional = {
        "quantization": engine.quantization,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "num_gpu_blocks_override": engine.num_gpu_blocks_override,
    }
    kwargs.update({key: value for key, value in optional.items() if value is not None})
    if on_cpu:
        kwargs["kv_cache_memory_bytes"] = int(engine.kv_cache_gib * 2**30)
    else:
        kwargs["gpu_memory_utilization"] = engine.gpu_memory_utilization
    kwargs.update(engine.extra)
    return kwargs


def deployment_options(config: ServeConfig) -> dict[str, Any]:
    """Options of the Serve deployment that holds the engine."""
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        # An engine that cannot start is reported at once; starting it three times over would take minutes.
        "max_constructor_retry_count": 1,
        "health_check_period_s": 10,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 20,
    }
    if config.autoscaling is None:
        options["autoscaling_config"] = None
        options["num_replicas"] = config.replicas
    else:
        options["autoscaling_config"] = config.autoscaling.model_dump()
    return options
