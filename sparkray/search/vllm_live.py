"""A search on a watched vLLM engine: every path is a request of its own, pruning is abort.

The prompt is tokenised once and sent as token ids, so that the engine's prefix cache shares it between the paths. The
policy is asked after every step in which a path wrote tokens. What a pruned path wrote after the step that pruned it
was never delivered, and the engine frees its KV blocks at the abort.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np
from vllm.sampling_params import RequestOutputKind

from sparkray.config.search import SearchConfig
from sparkray.errors import InputError, NotFoundError, WaitTimeoutError
from sparkray.metis.fields import TOKEN_FIELDS
from sparkray.metis.vllm_engine import WatchedEngine
from sparkray.search.answers import extract_answer
from sparkray.search.events import (
    DoneEvent,
    PruneEvent,
    SearchEvent,
    TokensEvent,
    VoteEvent,
    WaveEvent,
    standing,
)
from sparkray.search.forks import Fork
from sparkray.search.paths import FinishReason, Lane
from sparkray.search.policies import Policy
from sparkray.search.policies.base import PolicyRun
from sparkray.search.report import build_report
from sparkray.search.signals import COLUMN, FloatArray, empty_signals, signals_from_watching
from sparkray.search.vllm_recorder import fill_logprobs, path_params
from sparkray.types import SamplingOptions

STUB = "\nThe answer is"
_SIGNAL_WAIT_SECONDS = 1.0
_SIGNAL_POLL_SECONDS = 0.002


@dataclass(slots=True)
class _Running:
    """A lane with the request that writes it."""

    lane: Lane
    request_id: str
    temperature: float
    prefix_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    is_stub: bool = False


class LiveSearch:
    """One question on one engine; make a new one for each.

    Args:
        engine: the watched engine.
        policy: what decides.
        config: how paths are drawn, and the limits.
        prompt_ids: the prompt as tokens, at least one.
        question: shown in the report.
        forks: by the number of a path, the beginning that it continues.

    Raises:
        InputError: an empty prompt, or one that leaves no room for an answer.
    """

    def __init__(
        self,
        engine: WatchedEngine,
        policy: Policy,
        config: SearchConfig,
        prompt_ids: Sequence[int],
        question: str,
        forks: Mapping[int, Fork] | None = None,
    ) -> None:
        self._forks = dict(forks or {})
        longest = max((len(fork.token_ids) for fork in self._forks.values()), default=0)
        room = engine.vllm_config.model_config.max_model_len - len(prompt_ids) - longest - config.stub_tokens
        if not question.strip() or not prompt_ids:
            raise InputError("the question is empty, and some text is expected.", param="question")
        if room < 1:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for an answer within the "
                f"{engine.vllm_config.model_config.max_model_len} of the model.",
                param="question",
            )
        self.lanes: list[Lane] = []
        self.request_ids: list[str] = []
        self.token_ids: dict[int, tuple[int, ...]] = {}
        self._engine = engine
        self._policy = policy
        self._config = config
        self._prompt_ids = tuple(prompt_ids)
        self._question = question
        self._max_tokens = min(config.max_tokens, room)
        self._tokenizer = engine.get_tokenizer()
        self._running: dict[int, _Running] = {}
        self._changed = asyncio.Event()
        self._pending: list[SearchEvent] = []
        self._failure: BaseException | None = None

    async def events(self) -> AsyncGenerator[SearchEvent, None]:
        """Run the search. The last event is a `DoneEvent`; leaving early aborts all paths.

        Raises:
            WaitTimeoutError: the settings' `timeout_seconds` passed.
        """
        begin = time.monotonic()
        run = self._policy.start(self._config.num_paths)
        closed_by: str | None = None
        num_waves = 0
        try:
            while closed_by is None:
                if not self._running:
                    num_new = run.next_wave(self.lanes)
                    if num_new <= 0:
                        break
                    yield self._launch(num_new, num_waves)
                    num_waves += 1
                await self._next_step(begin)
                for event in self._take_pending(run):
                    yield event
                closed_by, events = await self._decide(run)
                for event in events:
                    yield event
        finally:
            await self._abort(FinishReason.CLOSED)
        report = build_report(
            self._question,
            self._policy.name,
            run.vote(self.lanes),
            self.lanes,
            max_paths=self._config.num_paths,
            closed_by=closed_by,
            seconds=time.monotonic() - begin,
        )
        yield DoneEvent(report)

    def _launch(self, count: int, wave: int) -> WaveEvent:
        first = len(self.lanes)
        for index in range(first, first + count):
            fork = self._forks.get(index)
            lane = Lane(index, wave, text=fork.text if fork else "")
            self.lanes.append(lane)
            prefix = (*self._prompt_ids, *fork.token_ids) if fork else self._prompt_ids
            self._start(lane, prefix, self._temperature(index), self._max_tokens)
        return WaveEvent(wave, tuple(range(first, first + count)))

    def _temperature(self, index: int) -> float:
        last = max(1, self._config.num_paths - 1)
        return self._config.temperature + self._config.temperature_spread * (index / last - 0.5)

    def _start(
        self, lane: Lane, prefix_ids: tuple[int, ...], temperature: float, max_tokens: int, *, is_stub: bool = False
    ) -> None:
        request_id = f"path-{uuid.uuid4().hex}"
        running = _Running(lane, request_id, temperature, prefix_ids, is_stub=is_stub)
        self._running[lane.index] = running
        self.request_ids.append(request_id)
        running.task = asyncio.create_task(self._write(running, max_tokens))

    async def _write(self, running: _Running, max_tokens: int) -> None:
        """Follow one request, and bring its lane up to date with every output."""
        lane = running.lane
        options = SamplingOptions(max_tokens, running.temperature, self._config.top_p, stop=self._config.stop)
        params = path_params(options, RequestOutputKind.DELTA)
        stream = self._engine.generate({"prompt_token_ids": list(running.prefix_ids)}, params, running.request_id)
        try:
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    written = output.outputs[0]
                    start = len(running.token_ids)
                    running.token_ids.extend(written.token_ids)
                    signals = await self._signals(running, start)
                    fill_logprobs(signals[start:], written)
                    if running.is_stub:
                        lane.text += written.text
                    else:
                        self._grow(lane, running.token_ids, signals, written.text, start)
                    if written.finish_reason is not None and written.finish_reason != "abort":
                        self._end(running, written.finish_reason)
        except Exception as failure:
            self._failure = failure
        finally:
            self._changed.set()

    async def _signals(self, running: _Running, start: int) -> FloatArray:
        """The lane's rows with room for the tokens that just came, their watched columns filled."""
        signals = empty_signals(len(running.token_ids))
        signals[:start] = running.lane.signals[:start] if not running.is_stub else np.nan
        deadline = time.monotonic() + _SIGNAL_WAIT_SECONDS
        while True:
            try:
                watched = self._engine.traces.get(running.request_id).tokens(start)
            except NotFoundError:
                return signals
            if len(watched) >= len(signals) - start or time.monotonic() >= deadline:
                break
            await asyncio.sleep(_SIGNAL_POLL_SECONDS)
        fresh = signals_from_watching(np.asarray(watched, dtype=np.float32), TOKEN_FIELDS)[: len(signals) - start]
        signals[start : start + len(fresh)] = fresh
        return signals

    def _grow(self, lane: Lane, token_ids: Sequence[int], signals: FloatArray, text: str, start: int) -> None:
        lane.signals = signals
        lane.text += text
        self.token_ids[lane.index] = tuple(token_ids)
        self._pending.append(
            TokensEvent(
                lane.index,
                text,
                _plain(signals[start:, COLUMN["entropy"]]),
                _plain(signals[start:, COLUMN["hedge_statistic"]]),
                len(signals),
            )
        )
        self._changed.set()

    def _end(self, running: _Running, reason: str) -> None:
        lane = running.lane
        complete = reason != "length"
        lane.answer = extract_answer(lane.text, self._config.answer_kind, complete=complete or running.is_stub)
        if running.is_stub:
            lane.is_stub = lane.answer is not None
        else:
            lane.finish_reason = FinishReason.STOP if complete else FinishReason.LENGTH
        self._running.pop(lane.index, None)
        self._pending.append(VoteEvent(lane.index, lane.answer.shown if lane.answer else None, running.is_stub, ()))
        self._changed.set()

    async def _next_step(self, begin: float) -> None:
        remaining = self._config.timeout_seconds - (time.monotonic() - begin)
        try:
            async with asyncio.timeout(remaining):
                await self._changed.wait()
        except TimeoutError as failure:
            raise WaitTimeoutError(
                f"the search was not done after {self._config.timeout_seconds:g} s; {len(self.lanes)} of at most "
                f"{self._config.num_paths} paths had been launched.",
                hint="Raise timeout_seconds, or lower num_paths or max_tokens.",
            ) from failure
        # One engine step wakes the tasks of all its paths one after the other: let all of them have their turn.
        await asyncio.sleep(0)
        self._changed.clear()
        if self._failure is not None:
            raise self._failure

    def _take_pending(self, run: PolicyRun) -> list[SearchEvent]:
        taken, self._pending = self._pending, []
        if not any(isinstance(event, VoteEvent) for event in taken):
            return taken
        votes = standing(run.vote(self.lanes))
        return [replace(event, votes=votes) if isinstance(event, VoteEvent) else event for event in taken]

    async def _decide(self, run: PolicyRun) -> tuple[str | None, list[SearchEvent]]:
        events: list[SearchEvent] = []
        decision = run.after_step(self.lanes)
        for index in decision.prune:
            running = self._running.get(index)
            if running is None or running.is_stub or not running.lane.running:
                continue
            running.lane.finish_reason = FinishReason.PRUNED
            await self._stop(running)
            events.append(PruneEvent(index, running.lane.num_tokens))
            if self._config.stub_tokens and decision.close is None:
                self._ask_for_answer(running)
        return decision.close, events

    def _ask_for_answer(self, pruned: _Running) -> None:
        stub_ids = self._tokenizer.encode(STUB, add_special_tokens=False)
        prefix = (*pruned.prefix_ids, *pruned.token_ids, *stub_ids)
        pruned.lane.text += STUB
        self._start(pruned.lane, prefix, 0.0, self._config.stub_tokens, is_stub=True)

    async def _stop(self, running: _Running) -> None:
        """Abort a request; when this returns its task is over, and nothing is written to its lane any more."""
        self._running.pop(running.lane.index, None)
        if running.task is not None:
            running.task.cancel()
        await self._engine.abort(running.request_id)
        if running.task is not None:
            await asyncio.gather(running.task, return_exceptions=True)

    async def _abort(self, reason: FinishReason) -> None:
        for running in list(self._running.values()):
            if running.lane.running:
                running.lane.finish_reason = reason
            await self._stop(running)


def _plain(values: FloatArray) -> tuple[float | None, ...]:
    return tuple(float(value) if np.isfinite(value) else None for value in values)
