"""Every setting, as frozen pydantic models. This package imports neither torch, ray, vllm nor transformers."""

from sparkray.config.base import Settings, load_settings
from sparkray.config.cluster import ClusterConfig
from sparkray.config.metis import MetisConfig
from sparkray.config.serve import AutoscalingConfig, EngineConfig, ServeConfig

__all__ = [
    "AutoscalingConfig",
    "ClusterConfig",
    "EngineConfig",
    "MetisConfig",
    "ServeConfig",
    "Settings",
    "load_settings",
]
