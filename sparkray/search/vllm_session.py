"""An engine of one's own for recording and for searches outside of a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from sparkray.config.metis import MetisConfig
from sparkray.config.serve import EngineConfig
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.models import prepare_model

CPU_FLAGS = Path("/proc/cpuinfo")


def quick_dtype() -> Literal["auto", "float32"]:
    """`float32` on a CPU that has no instructions for bfloat16, where it is several times quicker, else `auto`."""
    if not current_platform.is_cpu():
        return "auto"
    flags = CPU_FLAGS.read_text().split() if CPU_FLAGS.is_file() else []
    return "auto" if not flags or {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


@contextmanager
def own_engine(model: str, limits: EngineConfig) -> Iterator[WatchedEngine]:
    """A watched engine that ends with the block. Starting takes as long as loading the model does.

    Args:
        model: `embedded`, a local directory or a hub id.
        limits: of the engine.

    Raises:
        NotFoundError, InputError, UnavailableError: as `prepare_model` says.
    """
    memory = (
        {"kv_cache_memory_bytes": int(limits.kv_cache_gib * 2**30)}
        if current_platform.is_cpu()
        else {"gpu_memory_utilization": limits.gpu_memory_utilization}
    )
    arguments = AsyncEngineArgs(
        model=str(prepare_model(model)),
        dtype=limits.dtype,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        enforce_eager=limits.enforce_eager,
        tensor_parallel_size=limits.tensor_parallel_size,
        num_gpu_blocks_override=limits.num_gpu_blocks_override,
        **memory,
        **limits.extra,
    )
    engine = WatchedEngine.start(arguments, MetisConfig(watch_by_default=False, max_traces=4096))
    try:
        yield engine
    finally:
        engine.shutdown()
