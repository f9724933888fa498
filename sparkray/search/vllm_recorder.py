"""Recording paths on a watched vLLM engine: every path is a request of its own, every signal of every token is kept.

Paths are recorded to their end and without pruning, so that any policy can be replayed on them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sparkray.errors import InternalError
from sparkray.metis.fields import TOKEN_FIELDS
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.search.answers import AnswerKind, extract_answer
from sparkray.search.paths import FinishReason, Path
from sparkray.search.signals import COLUMN, FloatArray, signals_from_watching, top_confidence
from sparkray.types import SamplingOptions

TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class PathRequest:
    """One prompt of which several paths are wanted."""

    prompt_ids: tuple[int, ...]
    answer_kind: AnswerKind
    num_paths: int


def path_params(options: SamplingOptions, kind: RequestOutputKind) -> SamplingParams:
    """vLLM's parameters of one watched path."""
    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        stop=list(options.stop) or None,
        logprobs=TOP_LOGPROBS,
        output_kind=kind,
        extra_args={"metis": True, "metis_detector": "metis", "metis_boost": "off"},
    )


def fill_logprobs(signals: FloatArray, output: CompletionOutput, start: int = 0) -> None:
    """Write the columns that come from log-probabilities, from row `start` on."""
    if output.logprobs is None:
        return
    rows = zip(output.token_ids, output.logprobs, strict=True)
    for row, (token_id, likeliest) in enumerate(rows, start=start):
        if row >= len(signals):
            break
        ranked = sorted((entry.logprob for entry in likeliest.values()), reverse=True)[:TOP_LOGPROBS]
        signals[row, COLUMN["logprob"]] = likeliest[token_id].logprob
        signals[row, COLUMN["top_confidence"]] = top_confidence(ranked)


async def record_paths(
    engine: WatchedEngine,
    requests: Sequence[PathRequest],
    options: SamplingOptions,
    *,
    max_running: int = 64,
    on_question: Callable[[int, tuple[Path, ...]], None],
) -> None:
    """Record all paths of all requests, at most `max_running` at a time.

    Args:
        engine: the watched engine.
        requests: prompts with the number of paths of each.
        options: how tokens are drawn; the same for all.
        max_running: paths in flight.
        on_question: called with the number of a request and its paths as soon as the last of them ended.
    """
    permits = asyncio.Semaphore(max_running)

    async def one_path(request: PathRequest) -> Path:
        async with permits:
            return await _record_path(engine, request, options)

    async def one_question(number: int, request: PathRequest) -> None:
        paths = await asyncio.gather(*(one_path(request) for _ in range(request.num_paths)))
        on_question(number, tuple(paths))

    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(requests):
            group.create_task(one_question(number, request))


async def _record_path(engine: WatchedEngine, request: PathRequest, options: SamplingOptions) -> Path:
    request_id = f"record-{uuid.uuid4().hex}"
    params = path_params(options, RequestOutputKind.FINAL_ONLY)
    final: CompletionOutput | None = None
    async for output in engine.generate({"prompt_token_ids": list(request.prompt_ids)}, params, request_id):
        final = output.outputs[0]
    if final is None:
        raise InternalError(f"the engine ended the path {request_id} without any output.")
    watched = np.asarray(engine.traces.get(request_id).tokens(), dtype=np.float32)
    if len(watched) != len(final.token_ids):
        raise InternalError(f"{len(watched)} of the {len(final.token_ids)} tokens of {request_id} were recorded.")
    signals = signals_from_watching(watched, TOKEN_FIELDS)
    fill_logprobs(signals, final)
    reason = FinishReason.LENGTH if final.finish_reason == "length" else FinishReason.STOP
    answer = extract_answer(final.text, request.answer_kind, complete=reason is FinishReason.STOP)
    return Path(tuple(final.token_ids), signals, final.text, answer, reason)
