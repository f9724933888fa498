"""A teacher in an engine of this process: vLLM, whose prompt log-probabilities score the given tokens in batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.config.distill import TeacherConfig
from sparkray.distill.errors import TeacherReplyError
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores, head_only
from sparkray.distill.teachers.forward import weights_sha256


class VllmTeacher:
    """Scores by vLLM. One call at a time enters the engine, which batches inside of a call.

    Args:
        folder: of the model.
        config: dtype, quantisation, context, share of memory.
        max_top_logprobs: the most entries that will be asked for.
        tokenizer_sha256: hash of its tokenizer.
    """

    def __init__(self, folder: Path, config: TeacherConfig, max_top_logprobs: int, tokenizer_sha256: str) -> None:
        # Set before the import reads it: a command's standard output is its result.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        import vllm
        from vllm.platforms import current_platform

        self._config = config
        self._lock = threading.Lock()
        options: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
        self._llm = vllm.LLM(
            model=str(folder),
            dtype=config.dtype,
            quantization=config.quantization,
            max_model_len=config.max_model_tokens,
            max_logprobs=max_top_logprobs,
            # A cached prefix has no log-probabilities of its own, so scoring must not read from one.
            enable_prefix_caching=False,
            # On CPUs compiling takes longer than scoring a small corpus.
            enforce_eager=current_platform.is_cpu(),
            **options,
        )
        self._sampling = vllm.SamplingParams
        self._identity = TeacherIdentity(
            model=weights_sha256(folder),
            revision=config.revision or "",
            quantization=config.quantization or "",
            tokenizer_sha256=tokenizer_sha256,
            engine=f"vllm {vllm.__version__}",
            dtype=config.dtype,
            endpoint="local",
            mode="prompt_logprobs",
        )

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    @property
    def parameters(self) -> str:
        return "temperature=1"

    @property
    def max_model_tokens(self) -> int:
        return self._config.max_model_tokens - 1  # the engine must write one token to answer

    def score(self, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
        """Rows of one text."""
        return self.score_many([token_ids], top_logprobs)[0]

    def score_many(self, sequences: Sequence[Sequence[int]], top_logprobs: int) -> list[TokenScores]:
        """Rows of several texts, scored together."""
        sampling = self._sampling(max_tokens=1, temperature=0.0, prompt_logprobs=top_logprobs, detokenize=False)
        prompts = [{"prompt_token_ids": list(token_ids)} for token_ids in sequences]
        with self._lock:
            outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        return [
            _scores(token_ids, output.prompt_logprobs, top_logprobs)
            for token_ids, output in zip(sequences, outputs, strict=True)
        ]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _scores(token_ids: Sequence[int], positions: Any, top_logprobs: int) -> TokenScores:
    if positions is None or len(positions) != len(token_ids):
        raise TeacherReplyError(f"vLLM answered no prompt log-probabilities for {len(token_ids)} tokens.")
    num_rows = len(token_ids) - 1
    ids = np.full((num_rows, top_logprobs), -1, np.int32)
    logprobs = np.full((num_rows, top_logprobs), -np.inf, np.float32)
    tokens = np.empty(num_rows, np.float32)
    for row, (token_id, position) in enumerate(zip(token_ids[1:], positions[1:], strict=True)):
        tokens[row] = position[token_id].logprob
        for number, entry in position.items():
            if entry.rank <= top_logprobs:
                ids[row, entry.rank - 1], logprobs[row, entry.rank - 1] = number, entry.logprob
    # Ranks of equal log-probabilities may leave a place empty; the filled ones move up.
    order = np.argsort(-logprobs, axis=1, kind="stable")
    return head_only(np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1), tokens)
