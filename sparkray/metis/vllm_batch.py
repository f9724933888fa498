"""Ray Data's vLLM stage with a watched engine inside, so that a row leaves the engine with its trace.

Ray Data builds one of these in each engine's actor, on whatever node that is. The trace is read there, in the process
that owns the engine and on the host where its trace memory is; only the finished row crosses the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from sparkray.config.metis import MetisConfig
from sparkray.metis.fields import NUM_FIELDS
from sparkray.models import prepare_model

if TYPE_CHECKING:
    from sparkray.metis.store import TraceEntry

# One type a column, whatever became of the row: Arrow joins the blocks of all engines into one table.
NO_ANSWER: dict[str, Any] = {
    "text": "",
    "token_ids": b"",
    "tokens": b"",
    "finish_reason": "",
    "num_prompt_tokens": 0,
    "error": "",
}


class WatchedStageUDF(vLLMEngineStageUDF):
    """The stage's worker. Each row has `content`, the JSON of a prompt; each leaves with the keys of `NO_ANSWER`.

    Args:
        model: `embedded`, a directory or a hub id; made ready on this node.
        engine_kwargs: arguments of vLLM's AsyncEngineArgs.
        sampling: arguments of vLLM's SamplingParams, the switches of METIS among them; the same for all rows.
        metis: what `MetisConfig` is made of.
        chat: whether a bare prompt is wrapped as a user's message.
        on_finish: called here with every finished trace and the number of those still running.
        stage_kwargs: what Ray's own stage takes beside these.
    """

    def __init__(
        self,
        *,
        model: str,
        engine_kwargs: Mapping[str, Any],
        sampling: Mapping[str, Any],
        metis: Mapping[str, Any],
        chat: bool,
        on_finish: Callable[[TraceEntry, int], None] | None,
        **stage_kwargs: Any,
    ) -> None:
        # Here, because the driver imports this file too, and has no use for vLLM.
        from vllm.engine.arg_utils import AsyncEngineArgs

        from sparkray.metis.vllm_engine import WatchedEngine, prepare

        # vLLM lets this older variable override the size that the settings give.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        path = str(prepare_model(model))
        metis_config = MetisConfig.model_validate(metis)
        # Ray's stage builds its engine from arguments, and what METIS needs is put into a config: so a config is
        # made for METIS, and what METIS has put in goes into the arguments.
        arguments = {key: value for key, value in engine_kwargs.items() if key != "task_type"}
        vllm_config = AsyncEngineArgs(model=path, **arguments).create_engine_config()
        arena = prepare(vllm_config, metis_config)
        watched_kwargs = {
            **engine_kwargs,
            "additional_config": vllm_config.additional_config,
            "logits_processors": vllm_config.model_config.logits_processors,
        }
        # Its own check of a row's keys is for parameters that come with the row.
        stage_kwargs |= {"expected_input_keys": [], "should_continue_on_error": True}
        try:
            super().__init__(model=path, engine_kwargs=watched_kwargs, **stage_kwargs)
        except BaseException:
            arena.close()
            raise
        self._on_finish = on_finish
        self._sampling = dict(sampling)
        self._chat = chat
        self._watched = WatchedEngine(self.llm.engine, arena, metis_config, on_finish=self._count)
        self.llm.engine = self._watched
        self._tokenizer = self._watched.get_tokenizer()

    async def _generate_with_error_handling(self, row: dict[str, Any], batch_uuid: UUID) -> dict[str, Any]:
        place = {self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN]}
        try:
            asked = self._asked(json.loads(row["content"]))
        except Exception as failure:  # a chat template is a program of the model's maker, and may raise anything
            return {**place, **NO_ANSWER, "error": f"the chat template refused it: {failure}"}
        request = {**place, **asked, "sampling_params": dict(self._sampling)}
        answer = await super()._generate_with_error_handling(request, batch_uuid)
        if answer["__inference_error__"]:
            return {**place, **NO_ANSWER, "error": answer["__inference_error__"]}
        entry = self._watched.traces.get(str(answer["request_id"]))
        tokens_TF = entry.tokens() if entry.options is not None else np.empty((0, NUM_FIELDS), dtype=np.float32)
        return {
            **place,
            "text": answer["generated_text"],
            "token_ids": np.asarray(entry.token_ids, dtype=np.int32).tobytes(),
            "tokens": tokens_TF.astype(np.float32).tobytes(),
            "finish_reason": entry.finish_reason,
            "num_prompt_tokens": entry.num_prompt_tokens,
            "error": "",
        }

    def _asked(self, content: Mapping[str, Any]) -> dict[str, Any]:
        messages = content.get("messages")
        if self._chat and messages is None:
            messages = [{"role": "user", "content": content["prompt"]}]
        if messages is None:
            return {"prompt": content["prompt"]}
        # As ids and not as text, since a template writes its own first token and a tokenizer would add another.
        token_ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return {"prompt": "", "tokenized_prompt": list(token_ids)}

    def _count(self, entry: TraceEntry) -> None:
        if self._on_finish is not None:
            self._on_finish(entry, self._watched.num_active_traces)
