"""What can be known before anything is started: whether the model and its KV cache fit this machine's memory."""

from __future__ import annotations

import json
from pathlib import Path

from sparkray.config.serve import ServeConfig
from sparkray.errors import UnavailableError

# vLLM, its workers and Ray's own processes beside the weights, measured on a CPU-only machine.
OVERHEAD_BYTES = 3 * 2**30


def weight_bytes(path: Path) -> int:
    """Bytes of the safetensors files of a model directory, 0 where they are not on this machine."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0


def kv_bytes_per_token(path: Path, *, bytes_per_value: int = 2) -> int:
    """Bytes of KV cache for one token, by the model's own config.json; 0 where it does not say."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return 2 * int(layers) * int(config.get("num_key_value_heads") or heads) * int(head_dim) * bytes_per_value
    except (OSError, KeyError, json.JSONDecodeError):
        return 0


def check_memory(config: ServeConfig, *, num_weight_bytes: int, available_bytes: int, on_cpu: bool) -> None:
    """Raise an UnavailableError where weights, KV cache and overhead are over the memory that is free.

    Only the CPU engine is checked: on a GPU vLLM measures for itself.
    """
    if not on_cpu:
        return
    kv_bytes = int(config.engine.kv_cache_gib * 2**30)
    needed = config.replicas * (num_weight_bytes + kv_bytes + OVERHEAD_BYTES)
    if needed > available_bytes:
        raise UnavailableError(
            f"{config.model} needs {needed / 2**30:.1f} GiB ({config.replicas} replica(s): weights "
            f"{num_weight_bytes / 2**30:.1f}, KV cache {kv_bytes / 2**30:.1f}, overhead "
            f"{OVERHEAD_BYTES / 2**30:.1f} each), and {available_bytes / 2**30:.1f} GiB are free.",
            hint="Free memory, or lower engine.kv_cache_gib or replicas.",
        )
