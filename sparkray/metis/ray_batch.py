"""Prompts through watched engines, as a Ray Data pipeline that ends in the driver.

The driver alone writes, on its own node, so a cluster needs no shared folder and a prompt has one writer. Work in
flight is bounded by Ray Data's backpressure and by the engines' own queues.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data.llm import Processor, build_processor, vLLMEngineProcessorConfig
from ray.exceptions import GetTimeoutError, RayError

from sparkray.config.batch import WatchPromptsConfig
from sparkray.config.metis import MetisConfig
from sparkray.config.serve import EngineConfig
from sparkray.errors import UnavailableError, WaitTimeoutError
from sparkray.metis.batch_input import PromptRow
from sparkray.metis.batch_output import answered_row, refused_row
from sparkray.metis.fields import NUM_FIELDS
from sparkray.metis.vllm_batch import NO_ANSWER, WatchedStageUDF

if TYPE_CHECKING:
    from sparkray.metis.store import TraceEntry

# An engine that dies is started anew this often in one run; a model that kills its engine ends the run then.
_MAX_ENGINE_RESTARTS = 2
_ENGINE_STAGE = "vLLMEngineStage"
_ASKED = ("id", "content", "digest")

EngineArguments = Callable[..., dict[str, Any]]
FinishHook = Callable[["TraceEntry", int], None]


def answers(
    config: WatchPromptsConfig,
    prompts: Sequence[PromptRow],
    xargs: Mapping[str, Any],
    *,
    engine_arguments: EngineArguments,
    on_finish: FinishHook | None = None,
) -> Iterator[dict[str, Any]]:
    """Start the engines and yield the finished row of each prompt, in the order in which they come back.

    Args:
        config: the run's settings.
        prompts: what is asked; ids are unique.
        xargs: the switches of METIS for every prompt.
        engine_arguments: makes vLLM's arguments of `config.engine`, given also the keyword `on_cpu`.
        on_finish: called in each engine's process with every finished trace and the number of those still running.

    The caller holds a connection to the cluster.

    Raises:
        UnavailableError: not enough GPUs, an engine that cannot start or keeps dying.
        WaitTimeoutError: the engines were not ready within `start_timeout_seconds`.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Fails at once where an engine cannot start, and in the end where none can be placed.
    context.wait_for_min_actors_s = math.ceil(config.start_timeout_seconds)
    asked = {prompt.id: prompt for prompt in prompts}
    try:
        answered = _pipeline(config, prompts, xargs, engine_arguments, on_finish)
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for answer in batch.to_pylist():
                yield _row(asked.pop(answer["id"]), answer)
    except GetTimeoutError as slow:
        raise WaitTimeoutError(
            f"the engines were not ready within {config.start_timeout_seconds:g} s.",
            hint="See `ray status` for what they wait for, or set start_timeout_seconds higher.",
        ) from slow
    except RayError as failure:
        raise UnavailableError(
            f"an engine could not start, or died more than {_MAX_ENGINE_RESTARTS} times: {_cause(failure)}",
            hint="What it wrote stands in the job's log above. Prompts that came back are kept: submit again.",
        ) from failure


def _pipeline(
    config: WatchPromptsConfig,
    prompts: Sequence[PromptRow],
    xargs: Mapping[str, Any],
    engine_arguments: EngineArguments,
    on_finish: FinishHook | None,
) -> Dataset:
    processor = watched_processor(config, xargs, engine_arguments, on_finish, on_cpu=_on_cpu(config))
    # A block is what comes back at once, so a block is a batch.
    size = config.batch_size
    blocks = [
        pa.Table.from_pylist([{key: getattr(row, key) for key in _ASKED} for row in prompts[start : start + size]])
        for start in range(0, len(prompts), size)
    ]
    return processor(ray.data.from_arrow(blocks))


def watched_processor(
    config: WatchPromptsConfig,
    xargs: Mapping[str, Any],
    engine_arguments: EngineArguments,
    on_finish: FinishHook | None,
    *,
    on_cpu: bool,
) -> Processor:
    """Ray Data's processor for vLLM with `WatchedStageUDF` as the worker of its engine stage; see `answers`."""
    engine = config.engine
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=config.model,
            engine_kwargs=engine_arguments(engine, on_cpu=on_cpu),
            placement_group_config=_placement(engine, on_cpu),
            concurrency=(config.concurrency, config.concurrency),
            batch_size=config.batch_size,
            # So many batches that the engine's rows stay filled while one batch waits for its longest answer.
            max_concurrent_batches=2 * math.ceil(engine.max_num_seqs / config.batch_size),
            # The engine's own process does these: three more pools of actors would each load a tokenizer.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            runtime_env={"env_vars": {"VLLM_LOGGING_LEVEL": "WARNING"}},
        ),
        postprocess=_answer_columns,
        preprocess_map_kwargs={"num_cpus": 0.1},
        postprocess_map_kwargs={"num_cpus": 0.1},
    )
    metis = MetisConfig(max_trace_tokens=engine.max_model_len, profile_dir=config.profile_dir)
    stage = processor.get_stage_by_name(_ENGINE_STAGE)
    ours = {
        "sampling": {
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "stop": list(config.stop),
            "extra_args": dict(xargs),
        },
        "metis": metis.model_dump(),
        "chat": config.chat,
        "on_finish": on_finish,
    }
    # A copy, because setting a field makes the stage work out its resources anew, from a placement that it has
    # already taken out of its arguments: it would then ask for a GPU.
    processor.stages[_ENGINE_STAGE] = stage.model_copy(
        update={
            "fn": WatchedStageUDF,
            "fn_constructor_kwargs": {**stage.fn_constructor_kwargs, **ours},
            "map_batches_kwargs": {**stage.map_batches_kwargs, "max_restarts": _MAX_ENGINE_RESTARTS},
        }
    )
    return processor


def _on_cpu(config: WatchPromptsConfig) -> bool:
    """Whether the engines run on CPUs; refuses GPUs that the cluster does not have."""
    num_gpus = ray.cluster_resources().get("GPU", 0)
    needed = config.concurrency * config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size
    if config.accelerator == "cpu" or (config.accelerator == "auto" and num_gpus == 0):
        return True
    if num_gpus < needed:
        raise UnavailableError(
            f"{config.concurrency} engines of this size need {needed} GPUs, and the cluster has {num_gpus:g}.",
            hint="Lower concurrency or engine.tensor_parallel_size, or set accelerator to cpu.",
        )
    return False


def _placement(engine: EngineConfig, on_cpu: bool) -> dict[str, Any] | None:
    if on_cpu:
        return {"bundles": [{"CPU": 1}]}
    if engine.tensor_parallel_size * engine.pipeline_parallel_size > 1:
        return {"bundle_per_worker": {"GPU": 1, "CPU": 1}, "strategy": "PACK"}
    return None


def _answer_columns(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in (*_ASKED, *NO_ANSWER)}


def _row(prompt: PromptRow, answer: Mapping[str, Any]) -> dict[str, Any]:
    if answer["error"]:
        return refused_row(prompt, answer["error"])
    return answered_row(
        prompt,
        text=answer["text"],
        token_ids=np.frombuffer(answer["token_ids"], dtype=np.int32).tolist(),
        finish_reason=answer["finish_reason"],
        num_prompt_tokens=answer["num_prompt_tokens"],
        tokens_TF=np.frombuffer(answer["tokens"], dtype=np.float32).reshape(-1, NUM_FIELDS),
    )


def _cause(failure: RayError) -> str:
    """The last line of what happened, which is the one that names it."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__
