"""Before and after by vLLM: its log-probabilities of the same prompts, one engine after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from sparkray.config.pruning import ValidateConfig
from sparkray.pruning.calibration import CalibrationSet, TokenSequence
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.layered_model import resolve_dtype
from sparkray.pruning.top_logprobs import NO_TOKEN, TopLogprobs, compare_top
from sparkray.pruning.validate import Comparison, check_pair, compare

Progress = Callable[[int, int], None]

# Measured on vLLM 0.32's CPU build against transformers and an independent float64 forward.
_WRONG_ON_CPU = {
    "deepseek_v2": "its attention differs from transformers' by up to 0.9 nats",
    "ernie4_5_moe": "its router passes over e_score_correction_bias",
}


def compare_by_vllm(
    before: Checkpoint,
    after: Checkpoint,
    data: CalibrationSet,
    config: ValidateConfig,
    progress: Progress | None = None,
) -> Comparison:
    """Like `validate.compare`, by vLLM's prompt log-probabilities.

    Families that vLLM's CPU build computes wrongly are compared by transformers there, and `note` says so.

    Raises:
        InputError: the vocabularies differ, or no sequence has two tokens.
    """
    check_pair(before, after)
    reason = _WRONG_ON_CPU.get(before.family.model_type) if current_platform.is_cpu() else None
    if reason is not None:
        found = compare(before, after, data, config, progress)
        note = f"by transformers, since vLLM's CPU build computes {before.family.model_type} wrongly: {reason}"
        return replace(found, note=note)
    sides = []
    for number, checkpoint in enumerate((before, after), 1):
        sides.append(prompt_logprobs(checkpoint, data.sequences, config))
        if progress is not None:
            progress(number, 2)
    vocab_size = int(text_config(before.config, before.family)["vocab_size"])
    bound = f"token_kl is a lower bound, from the {config.vllm_top_logprobs} likeliest tokens a place"
    return compare_top(sides[0], sides[1], note=bound if config.vllm_top_logprobs < vocab_size else None)


def prompt_logprobs(
    checkpoint: Checkpoint, sequences: Sequence[TokenSequence], config: ValidateConfig
) -> list[TopLogprobs]:
    """One engine start: what the model says of every place of every sequence.

    Masked tokens in the middle of a sequence are read like any others: an engine has no mask.
    """
    vocab_size = int(text_config(checkpoint.config, checkpoint.family)["vocab_size"])
    num_top = min(config.vllm_top_logprobs, vocab_size)
    longest = max(len(sequence.ids) for sequence in sequences)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.vllm_kv_cache_gib)))
    limits: dict[str, Any] = {} if current_platform.is_cpu() else {"gpu_memory_utilization": config.vllm_gpu_memory}
    engine = LLM(
        model=str(checkpoint.directory),
        skip_tokenizer_init=True,
        dtype=str(resolve_dtype(config.dtype, checkpoint)).removeprefix("torch."),
        max_model_len=longest + 1,
        max_num_seqs=config.micro_batch_sequences,
        max_logprobs=num_top,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **limits,
    )
    try:
        asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num_top, detokenize=False)
        prompts = [{"prompt_token_ids": list(sequence.ids)} for sequence in sequences]
        answers = engine.generate(prompts, asked, use_tqdm=False)
        return [_top(answer.prompt_token_ids, answer.prompt_logprobs, num_top) for answer in answers]
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _top(ids: Sequence[int], logprobs: Sequence[Any], num_top: int) -> TopLogprobs:
    """Rows of the places 1, 2, ...; vLLM has no distribution for the first token."""
    places = len(ids) - 1
    ids_NK = np.full((places, num_top + 1), NO_TOKEN, dtype=np.int64)
    logprobs_NK = np.zeros((places, num_top + 1))
    for place, (came, named) in enumerate(zip(ids[1:], logprobs[1:], strict=True)):
        others = sorted((token for token in named if token != came), key=lambda token: -named[token].logprob)
        for column, token in enumerate([came, *others[:num_top]]):
            ids_NK[place, column] = token
            logprobs_NK[place, column] = named[token].logprob
    return TopLogprobs(ids_NK, logprobs_NK)
