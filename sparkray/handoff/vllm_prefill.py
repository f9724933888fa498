"""The prefill engine: stock vLLM with the connector, asked for one token or for a whole answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from sparkray.config.handoff import PrefillConfig
from sparkray.errors import InputError, InternalError, UnavailableError
from sparkray.handoff.fingerprint import ModelIdentity, identity_of_config
from sparkray.handoff.handing import FirstToken, PrefillOrder
from sparkray.handoff.model_files import folder_lineage, folder_tokenizer, folder_weights, read_config
from sparkray.handoff.vllm_connector import PARAMS_KEY
from sparkray.models.prepare import prepare_model

# The prefill side's likeliest first tokens, for the decode side to compare.
_FIRST_TOKENS = 5


class PrefillEngine:
    """An engine that reads prompts and sends their rows.

    Args:
        config: the settings.
        engine_args: further arguments of vLLM's `AsyncEngineArgs`.
    """

    def __init__(self, config: PrefillConfig, **engine_args: Any) -> None:
        folder = Path(prepare_model(config.model))
        self.config = config
        self.folder = folder
        self.identity: ModelIdentity = identity_of_config(
            read_config(folder),
            tokenizer=folder_tokenizer(folder),
            lineage=folder_lineage(folder),
            weights=folder_weights(folder),
            engine="vllm",
        )
        self.vocabulary = int(read_config(folder)["vocab_size"])
        extra: dict[str, Any] = {
            "identity": self.identity.to_wire(),
            "link": config.link.model_dump(),
            "codec": config.codec,
            "max_streams": config.max_streams,
            "tls": config.tls.model_dump() if config.tls else None,
        }
        arguments: dict[str, Any] = {
            "model": str(folder),
            "dtype": config.dtype,
            "max_model_len": config.max_model_len,
            "max_num_batched_tokens": config.chunk_tokens,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": config.prefix_caching,
            "enforce_eager": True,
            # Ids in, ids out: text is made by whoever asks.
            "skip_tokenizer_init": True,
            "kv_transfer_config": KVTransferConfig(
                kv_connector="SparkrayConnector",
                kv_role="kv_producer",
                kv_connector_module_path="sparkray.handoff.vllm_connector",
                kv_connector_extra_config=extra,
            ),
            **({"block_size": config.block_size} if config.block_size else {}),
            **engine_args,
        }
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def prefill(self, prompt: list[int], order: PrefillOrder, timeout_seconds: float) -> FirstToken:
        """Read the prompt and send its rows; returns when the engine has read it.

        Raises:
            InputError: the prompt is longer than the engine takes.
            UnavailableError: the engine has ended.
            TimeoutError: it took longer.
        """
        self._check_length(prompt, 1)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=_FIRST_TOKENS,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": {PARAMS_KEY: asdict(order)}},
        )
        async with asyncio.timeout(timeout_seconds), aclosing(self._outputs(prompt, params)) as outputs:
            async for output in outputs:
                ranked = sorted(output.outputs[0].logprobs[0].items(), key=lambda item: -item[1].logprob)
                ranked = ranked[:_FIRST_TOKENS]
                return FirstToken(tuple(token for token, _ in ranked), tuple(each.logprob for _, each in ranked))
        raise InternalError("vLLM ended a prefill without an output.")

    async def generate(
        self, prompt: list[int], max_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        seed: int | None = None, stop_ids: tuple[int, ...] = (),
    ) -> AsyncIterator[tuple[int, float]]:  # fmt: skip
        """The whole answer by this engine alone: tokens, with the margin between the two likeliest."""
        self._check_length(prompt, max_tokens)
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, logprobs=2, ignore_eos=True,
            detokenize=False, stop_token_ids=list(stop_ids), output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        async with aclosing(self._outputs(prompt, params)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
                    if token in stop_ids:
                        return
                    first, second, *_ = sorted((each.logprob for each in logprobs.values()), reverse=True)
                    yield token, first - second

    @property
    def is_alive(self) -> bool:
        """Whether the engine still runs; one that died does not come back."""
        return not self._engine.errored

    async def _outputs(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[Any]:
        try:
            async for output in self._engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
                yield output
        except EngineDeadError as failure:
            raise UnavailableError("the prefill engine has ended; its log says why.") from failure

    def close(self) -> None:
        self._engine.shutdown()

    def _check_length(self, prompt: list[int], max_tokens: int) -> None:
        if len(prompt) < 2 or len(prompt) + max_tokens > self.config.max_model_len:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {max_tokens} of answer were asked for; 2 tokens or more, and"
                f" {self.config.max_model_len} in all, are accepted.",
                param="prompt",
            )
