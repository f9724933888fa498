"""A real engine for tests: vLLM with METIS around it, in an event loop of its own thread, with its statistics kept.

Its cache holds far less than the requests that it runs at a time, and a step takes fewer tokens than most prompts
have. So prompts are read in pieces and requests are preempted, as on a busy server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from sparkray.config.metis import MetisConfig
from sparkray.metis.vllm_engine import WatchedEngine, prepare

MAX_STEP_TOKENS = 32
MAX_NUM_SEQS = 12
SCARCE: dict[str, Any] = {
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "max_model_len": 256,
    "max_num_seqs": MAX_NUM_SEQS,
    "max_num_batched_tokens": MAX_STEP_TOKENS,
    "block_size": 32,
    "num_gpu_blocks_override": 11,
    "max_logprobs": -1,
    "enable_logging_iteration_details": True,
}

# Read while an engine starts. The last lets a CPU engine compute in the process that schedules: one less to start.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

ResultT = TypeVar("ResultT")


@dataclass
class StepLog(StatLoggerBase):
    """What the engine itself says of its steps.

    Attributes:
        num_preemptions: times a running request lost its place.
        num_prompt_rows: requests summed over steps that had no output yet; one a request unless read in pieces.
        step_tokens: tokens of each step.
        kv_cache_usage: part of the KV blocks that requests hold, 0 to 1, after each step.
    """

    num_preemptions: int = 0
    num_prompt_rows: int = 0
    step_tokens: list[int] = field(default_factory=list)
    kv_cache_usage: list[float] = field(default_factory=list)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs
        details = scheduler_stats.iteration_details if scheduler_stats is not None else None
        if scheduler_stats is not None:
            self.kv_cache_usage.append(scheduler_stats.kv_cache_usage)
        if details is not None:
            self.num_prompt_rows += details.num_ctx_requests
            self.step_tokens.append(details.num_ctx_tokens + details.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing to say at the start."""


@dataclass(frozen=True)
class LiveEngine:
    """A running engine.

    Attributes:
        engine: as the server has it; use it inside `run` only.
        steps: its statistics.
        model: the folder of its model.
    """

    engine: WatchedEngine
    steps: StepLog
    model: str
    _loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, ResultT], timeout_seconds: float = 600.0) -> ResultT:
        """Run a coroutine in the engine's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_seconds)


@contextmanager
def live_engine(model: str, dtype: str, **engine_args: Any) -> Iterator[LiveEngine]:
    """Start an engine, and end it with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine-loop")
    thread.start()
    steps = StepLog()

    async def start() -> WatchedEngine:
        args = AsyncEngineArgs(model=model, dtype=dtype, **{**SCARCE, **engine_args})
        vllm_config = args.create_engine_config()
        config = MetisConfig()
        arena = prepare(vllm_config, config)
        try:
            engine = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[lambda *_: steps])
        except BaseException:
            arena.close()
            raise
        return WatchedEngine(engine, arena, config)

    async def end(engine: WatchedEngine) -> None:
        engine.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    try:
        with pytest.MonkeyPatch.context() as patch:
            # Not for longer: other tests start servers, which inherit the environment.
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            engine = asyncio.run_coroutine_threadsafe(start(), loop).result(600.0)
        try:
            yield LiveEngine(engine, steps, model, loop)
        finally:
            # Its tasks end in their loop, before the loop does.
            asyncio.run_coroutine_threadsafe(end(engine), loop).result(60.0)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30.0)
        loop.close()
