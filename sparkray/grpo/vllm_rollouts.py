"""A watched vLLM engine that draws rollouts and takes new weights in flight.

Every completion is a request of its own, so that METIS records each; the prompt is computed once for its group, by
vLLM's prefix cache. Log-probabilities are those of the distribution that was drawn from, at the group's temperature
with top_p = 1: cutting the tail off would make them wrong by the mass that was kept.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from sparkray.config.grpo import GrpoConfig
from sparkray.config.metis import MetisConfig
from sparkray.errors import InternalError
from sparkray.grpo.errors import StaleEngineError
from sparkray.grpo.rollouts import Drawing, PromptRequest, Rollout, RolloutGroup
from sparkray.grpo.vllm_transfer import BACKEND, write_shared
from sparkray.metis.vllm_engine import WatchedEngine

_WATCHED = {"metis": True, "metis_detector": "metis", "metis_boost": "off"}
NO_VERSION = -1


class VllmRollouts:
    """One engine. It draws for the version that was pushed last, and for no other.

    Attributes:
        version: of its weights; -1 before the first push, also after a restart: then it has the base weights.
    """

    def __init__(self, model_path: Path, config: GrpoConfig, *, engine_arguments: Mapping[str, Any]) -> None:
        self.version = NO_VERSION
        self._by_adapter = config.sync.transport == "lora"
        self._numbers = itertools.count()
        self._adapter: LoRARequest | None = None
        self._adapters: dict[int, Path] = {}
        self._loading = False
        arguments = {
            **engine_arguments,
            "model": str(model_path),
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "sparkray.grpo.vllm_transfer.WorkerExtension",
            "disable_log_stats": True,
        }
        if self._by_adapter:
            arguments |= {"enable_lora": True, "max_lora_rank": _lora_rank(config.lora_rank), "max_loras": 2}
        else:
            arguments |= {"weight_transfer_config": {"backend": BACKEND}}
        metis = MetisConfig(max_trace_tokens=config.engine.max_model_len, watch_by_default=False, max_traces=4096)
        self._engine = WatchedEngine.start(AsyncEngineArgs(**arguments), metis)

    @property
    def is_dead(self) -> bool:
        """Whether vLLM's own process has ended."""
        return bool(self._engine.errored)

    async def prepare(self) -> None:
        """Open vLLM's weight transfer; once, before the first push."""
        if not self._by_adapter:
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))

    async def generate(
        self, requests: Sequence[PromptRequest], drawing: Drawing, *, version: int
    ) -> list[RolloutGroup]:
        """A group of each prompt.

        Raises:
            StaleEngineError: other weights than `version` are loaded when drawing begins.
        """
        if self.version != version:
            raise StaleEngineError(
                f"rollouts of version {version} were asked for, and this engine holds version {self.version}.",
                hint="Push the weights to it first.",
            )
        return list(await asyncio.gather(*(self._group(request, drawing) for request in requests)))

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of a text after its first token, at temperature 1."""
        params = SamplingParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        final = None
        async for output in self._engine.generate(
            {"prompt_token_ids": list(token_ids)},
            params,
            f"canary-{next(self._numbers)}",
            lora_request=self._adapter,
        ):
            final = output
        if final is None or final.prompt_logprobs is None:
            raise InternalError("the engine scored no token of the canary.")
        scored = zip(token_ids[1:], final.prompt_logprobs[1:], strict=True)
        return [entry[token].logprob for token, entry in scored]

    async def begin(self) -> None:
        """Hold generation and make ready for tensors; what is under way goes on after `finish`.

        A push whose sender died half-way is closed first: vLLM begins no other before.
        """
        self.version = NO_VERSION
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        if not self._by_adapter:
            if self._loading:
                await self._engine.finish_weight_update(weight_version=str(NO_VERSION))
            await self._engine.start_weight_update()
        self._loading = True

    async def load(self, payload: bytes, adapter_config: Mapping[str, Any] | None = None) -> None:
        """Take tensors in the safetensors format; with `adapter_config` they are an adapter."""
        if adapter_config is not None:
            await self._load_adapter(payload, adapter_config)
            return
        path = write_shared(payload, str(next(self._numbers)))
        try:
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": str(path)}))
        except Exception:
            self._loading = False  # the worker has given the push up, whatever went wrong
            raise
        finally:
            path.unlink()

    async def finish(self, version: int) -> None:
        """Compute with what was loaded, forget what the old weights left in the prefix cache, and go on."""
        if not self._loading:
            raise InternalError("a push was finished that was not begun.")
        if not self._by_adapter:
            await self._engine.finish_weight_update(weight_version=str(version))
        await self._engine.reset_prefix_cache()
        await self._engine.resume_generation()
        self._loading = False
        self.version = version

    def shutdown(self) -> None:
        self._engine.shutdown()
        for folder in self._adapters.values():
            shutil.rmtree(folder, ignore_errors=True)

    async def _load_adapter(self, payload: bytes, adapter_config: Mapping[str, Any]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="sparkray-adapter-"))
        (folder / "adapter_model.safetensors").write_bytes(payload)
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config), encoding="utf-8")
        # Always a new id: under a known one vLLM keeps the adapter that it has, and says nothing.
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
        fresh = LoRARequest(lora_name=f"policy-{number}", lora_int_id=number, lora_path=str(folder))
        await self._engine.add_lora(fresh)
        self._adapters[number] = folder
        self._adapter = fresh
        # Requests under way were begun with the adapter before, which stays; the one before that has none left.
        for old in [one for one in self._adapters if one < number - 1]:
            await self._engine.remove_lora(old)
            shutil.rmtree(self._adapters.pop(old), ignore_errors=True)

    async def _group(self, request: PromptRequest, drawing: Drawing) -> RolloutGroup:
        drawn = await asyncio.gather(
            *(self._complete(request.token_ids, drawing) for _ in range(request.num_completions))
        )
        return RolloutGroup(request.row_index, request.token_ids, tuple(drawn))

    async def _complete(self, prompt: tuple[int, ...], drawing: Drawing) -> Rollout:
        version = self.version
        request_id = f"rollout-{next(self._numbers)}"
        params = SamplingParams(
            temperature=drawing.temperature,
            top_p=1.0,
            max_tokens=drawing.max_tokens,
            stop=list(drawing.stop) or None,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=dict(_WATCHED) if drawing.watch else None,
        )
        final: CompletionOutput | None = None
        async for output in self._engine.generate(
            {"prompt_token_ids": list(prompt)}, params, request_id, lora_request=self._adapter
        ):
            final = output.outputs[0]
        if final is None or final.logprobs is None:
            raise InternalError(f"the engine ended {request_id} without an answer.")
        scored = zip(final.token_ids, final.logprobs, strict=True)
        logprobs = np.array([entry[token].logprob for token, entry in scored], dtype=np.float32)
        return Rollout(
            token_ids=tuple(final.token_ids),
            text=final.text,
            engine_logprobs_T=logprobs,
            finish_reason="length" if final.finish_reason == "length" else "stop",
            weight_version=version,
            recorded_TF=self._recorded(request_id, len(final.token_ids)) if drawing.watch else None,
        )

    def _recorded(self, request_id: str, num_tokens: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        entry = self._engine.traces.get(request_id)
        if entry.options is None:  # no slot of the trace memory was free: drawn, but not watched
            return None
        tokens_TF = np.asarray(entry.tokens(), dtype=np.float32)
        return tokens_TF if len(tokens_TF) == num_tokens else None


def _lora_rank(rank: int) -> int:
    """The smallest size that vLLM has room for."""
    return next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)
