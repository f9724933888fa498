"""vLLM's engine with METIS around it: every request may have a trace.

`prepare` makes the engine that is about to be built load the processor and creates the memory that traces leave by.
`WatchedEngine` stands in front of the built engine: it gives each watched request a slot of that memory, notes which
tokens went to the client, and files the trace when the request ends, however it ends.

A trace holds exactly the tokens that were delivered. What the engine computed beyond them (after a stop string, or
before an abort reached it) is left out; of a request cut before its one answer, nothing was delivered.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from sparkray.config.metis import MetisConfig
from sparkray.errors import BusyError, InputError, NotFoundError, UsageError
from sparkray.metis.arena import FloatArray, Progress, Slot, TraceArena
from sparkray.metis.options import WatchOptions, parse_xargs
from sparkray.metis.profile import ProfileStore
from sparkray.metis.store import TraceEntry, TraceStore
from sparkray.metis.vllm_processor import CONFIG_KEY, PROCESSOR, SEVERAL_ANSWERS

_CLAIM_POLL_SECONDS = 0.1
# On a GPU the last numbers may arrive after the last token.
_LAST_RECORD_SECONDS = 1.0
_LAST_RECORD_POLL_SECONDS = 0.002

FinishHook = Callable[[TraceEntry], None]


class RejectedRequestError(InputError, VLLMValidationError):
    """A request that is refused before it reaches the engine; an error of ours and of vLLM's (HTTP 400) at once."""

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint=hint, param=param)
        self.parameter = param


def num_slots(max_num_seqs: int) -> int:
    """Slots of the arena: those that run, as many that wait behind them, and a margin for those that just ended."""
    return 2 * max_num_seqs + 64


def prepare(vllm_config: Any, config: MetisConfig) -> TraceArena:
    """Make the engine that will be built from `vllm_config` load METIS, and create its trace memory.

    Call it in the process that builds the engine, before building. The folder of profiles, if the settings name one,
    goes into the environment, from where the engine's processes take it; under tensor parallelism over several hosts
    it must exist on each.

    Raises:
        UsageError: these settings of vLLM rule processors out.
        UnavailableError: no room for the trace memory.
    """
    model_config, scheduler_config = vllm_config.model_config, vllm_config.scheduler_config
    if model_config.runner_type == "pooling":
        raise UsageError(f"{model_config.model} is a pooling model, and only models that generate can be watched.")
    if vllm_config.speculative_config is not None and not _uses_v2(vllm_config):
        raise UsageError(
            "speculative_config was given, and vLLM's V1 model runner takes no processors beside speculation.",
            hint="Leave speculative_config out, or use the V2 runner (VLLM_USE_V2_MODEL_RUNNER=1).",
        )
    if config.profile_dir is not None:
        listed = os.environ.get("SPARKRAY_METIS_PROFILES", "").split(os.pathsep)
        if config.profile_dir not in listed:
            folders = [*filter(None, listed), config.profile_dir]
            os.environ["SPARKRAY_METIS_PROFILES"] = os.pathsep.join(folders)
    arena = TraceArena.create(
        num_slots(scheduler_config.max_num_seqs), min(config.max_trace_tokens, model_config.max_model_len)
    )
    vllm_config.additional_config[CONFIG_KEY] = {"arena": str(arena.path)}
    others = [processor for processor in model_config.logits_processors or () if processor != PROCESSOR]
    model_config.logits_processors = [*others, PROCESSOR]
    return arena


@dataclass(frozen=True)
class _Choice:
    """What a request's switches come to: watched with `options` as said by `xargs`, or not; `note` explains."""

    options: WatchOptions | None = None
    xargs: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True)
class _SlotSource:
    """The tokens of one slot."""

    arena: TraceArena
    slot: Slot

    def progress(self) -> Progress:
        return self.arena.progress(self.slot)

    def read(self, start: int, stop: int) -> FloatArray:
        return self.arena.read(self.slot, start, stop)


class WatchedEngine:
    """An engine client that does all that the wrapped one does, and keeps traces.

    Args:
        engine: built from a config that went through `prepare`.
        arena: what `prepare` returned; closed with the engine.
        config: what is watched when a request says nothing, and how long traces are kept.
        on_finish: called with every trace when its request ended, e.g. for metrics.

    A request takes one slot. All slots are taken only while more requests than the engine runs at a time are under
    way; then a further one waits here instead of in the engine's queue. Where the engine has room and slots are still
    missing (clients that do not fetch their last tokens hold them), the request runs unwatched and its trace says so:
    the answer matters more than its trace.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        arena: TraceArena,
        config: MetisConfig,
        *,
        on_finish: FinishHook | None = None,
    ) -> None:
        self.traces = TraceStore(config.max_traces, config.trace_ttl_seconds)
        self._engine = engine
        self._arena = arena
        self._config = config
        self._on_finish = on_finish
        self._profiles = ProfileStore.from_environment()
        self._slot_freed = asyncio.Event()
        scheduler_config = engine.vllm_config.scheduler_config
        self._max_num_seqs = scheduler_config.max_num_seqs
        self._seed_is_fatal = current_platform.is_cpu() and scheduler_config.enable_chunked_prefill

    @classmethod
    def start(
        cls, engine_args: AsyncEngineArgs, config: MetisConfig, *, on_finish: FinishHook | None = None
    ) -> WatchedEngine:
        """Build an engine and watch it. Takes as long as loading the model does, and blocks."""
        if current_platform.is_cpu():
            # Else vLLM computes in a process of its own, and the one that schedules waits for it in a busy loop, which
            # took a third of all CPU seconds of a run of GRPO.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm_config = engine_args.create_engine_config()
        arena = prepare(vllm_config, config)
        try:
            engine = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=engine_args.disable_log_stats)
        except BaseException:
            arena.close()
            raise
        return cls(engine, arena, config, on_finish=on_finish)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def num_active_traces(self) -> int:
        """Requests that hold a slot."""
        return self._arena.num_active

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop the engine and remove the trace memory."""
        self._engine.shutdown(timeout=timeout)
        self._arena.close()

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's; the request's switches are checked at once, not when the first output is asked for.

        Raises:
            RejectedRequestError: switches that cannot be obeyed, or a seed where it would stop the engine.
        """
        self._refuse_fatal_seed(sampling_params)
        choice = self._choose(sampling_params)
        if isinstance(prompt, AsyncGenerator) and choice.options is not None:
            choice = _Choice(note="not recorded: its prompt arrives as a stream")
        if choice.options is None and choice.note is None:
            unwatched: AsyncGenerator[RequestOutput, None] = self._engine.generate(
                prompt, sampling_params, request_id, **kwargs
            )
            return unwatched
        return self._generate(choice, prompt, sampling_params, request_id, kwargs)

    async def _generate(
        self,
        choice: _Choice,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        kwargs: Mapping[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        entry = TraceEntry(request_id, choice.options, choice.note, max_tokens=self._arena.max_tokens)
        slot: Slot | None = None
        reason = "error"
        self.traces.open(entry)
        try:
            if entry.options is not None:
                slot = await self._claim()
            if slot is not None:
                entry.attach(_SlotSource(self._arena, slot))
            elif entry.options is not None:
                entry.options, entry.note = None, "not recorded: the trace memory was full"
            params = _with_slot(sampling_params, choice, slot)
            async with aclosing(self._engine.generate(prompt, params, request_id, **kwargs)) as stream:
                async for output in stream:
                    _note_delivery(entry, output, params.output_kind)
                    if output.finished:
                        reason = output.outputs[0].finish_reason or "stop"
                        await self._last_record(entry, slot)
                        # Now, because whoever has the last output may not come back for the end.
                        entry.finish(reason)
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            reason = "abort" if reason == "error" else reason
            raise
        finally:
            entry.finish(reason)
            if slot is not None:
                self._arena.release(slot)
                self._slot_freed.set()
            self.traces.close(entry)
            if self._on_finish is not None:
                self._on_finish(entry)

    def _refuse_fatal_seed(self, params: SamplingParams) -> None:
        # vLLM's V1 runner moves the offset of a request's random generator back after each piece of a prompt; a CPU
        # generator has no offset, and the exception ends the engine for everybody.
        if params.seed is not None and self._seed_is_fatal:
            raise RejectedRequestError(
                f"seed was given, and on a CPU vLLM {vllm_version} cannot combine it with prompts read in pieces.",
                hint="Leave seed out, or start the engine with enable_chunked_prefill=false.",
                param="seed",
            )

    def _choose(self, params: SamplingParams) -> _Choice:
        given = {key: value for key, value in (params.extra_args or {}).items() if key.startswith("metis")}
        if not given and not self._config.watch_by_default:
            return _Choice()
        xargs = {"metis": True, "metis_detector": self._config.detector, "metis_boost": self._config.boost, **given}
        note = None
        try:
            if xargs["metis_detector"] == "calibrated" and "metis_profile" not in xargs:
                note = self._find_profile(xargs, params.temperature, must="metis_detector" in given)
            options = parse_xargs(xargs, profiles=self._profiles, from_client=True)
            if options is not None and params.n > 1:
                if given:
                    raise InputError(SEVERAL_ANSWERS, param="n")
                return _Choice(note="not recorded: several answers were asked for in one request")
        except (InputError, NotFoundError) as error:
            raise RejectedRequestError(error.message, hint=error.hint, param=error.param) from error
        return _Choice(options, xargs, note) if options is not None else _Choice()

    def _find_profile(self, xargs: dict[str, Any], temperature: float, *, must: bool) -> str | None:
        """Put the fitting profile into the switches, or the other detector where none fits and none was asked for."""
        try:
            model = self._engine.vllm_config.model_config.model
            xargs["metis_profile"] = self._profiles.find(model, temperature).name
        except NotFoundError as error:
            if must:
                raise
            xargs["metis_detector"] = "metis"
            return f"watched by the detector 'metis': {error.message}"
        return None

    async def _claim(self) -> Slot | None:
        """A slot; None where none is free although the engine has room."""
        while True:
            try:
                return self._arena.claim()
            except BusyError:
                if self._engine.output_processor.get_num_unfinished_requests() < self._max_num_seqs:
                    return None
                self._slot_freed.clear()
                try:
                    async with asyncio.timeout(_CLAIM_POLL_SECONDS):
                        await self._slot_freed.wait()
                except TimeoutError:
                    continue

    async def _last_record(self, entry: TraceEntry, slot: Slot | None) -> None:
        if slot is None:
            return
        deadline = time.monotonic() + _LAST_RECORD_SECONDS
        while self._arena.progress(slot).written < len(entry.token_ids) and time.monotonic() < deadline:
            await asyncio.sleep(_LAST_RECORD_POLL_SECONDS)


# What Ray Serve and vLLM's own server ask of an engine is answered by delegation.
EngineClient.register(WatchedEngine)


def _with_slot(params: SamplingParams, choice: _Choice, slot: Slot | None) -> SamplingParams:
    """A copy of the parameters for this request alone (others may share the client's object)."""
    own = copy.copy(params)
    others = {key: value for key, value in (params.extra_args or {}).items() if not key.startswith("metis")}
    if slot is None:
        own.extra_args = {**others, "metis": False}
    else:
        own.extra_args = {**others, **choice.xargs, "metis_slot": slot.index, "metis_generation": slot.generation}
    return own


def _note_delivery(entry: TraceEntry, output: RequestOutput, kind: RequestOutputKind) -> None:
    if not entry.num_prompt_tokens:
        entry.num_prompt_tokens = len(output.prompt_token_ids or ())
    token_ids = output.outputs[0].token_ids
    known = 0 if kind is RequestOutputKind.DELTA else len(entry.token_ids)
    entry.delivered(list(token_ids[known:]))


def _uses_v2(vllm_config: Any) -> bool:
    # vllm before 0.32 has no such setting and no processors for its V2 runner.
    return bool(getattr(vllm_config, "use_v2_model_runner", False))
