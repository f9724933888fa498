"""Scores for a sequence: from the cache, else from the host with patience, else from the cache as a fallback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sparkray.config.distill import ClientConfig
from sparkray.distill.cache.file import ScoreCache
from sparkray.distill.client.counters import ClientMetrics, Counters, Source
from sparkray.distill.client.pacing import RequestGate, TopLogprobsPolicy, backoff_seconds, uniform_draw
from sparkray.distill.errors import RateLimitedError, TeacherDownError, TeacherReplyError
from sparkray.distill.identity import score_key
from sparkray.distill.scores import TokenScores
from sparkray.distill.teachers.base import Teacher
from sparkray.distill.windows import score_in_windows
from sparkray.errors import WaitTimeoutError


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """Scores and where they came from: `teacher`, `cache`, or what stood in for a teacher that failed."""

    scores: TokenScores
    source: Source


class TeacherClient:
    """Thread-safe; `score_async` serves event loops. One instance a process.

    Args:
        teacher: makes one attempt a call.
        config: bounds, pauses and the number of entries.
        cache: None asks the teacher every time.
        overlap_tokens: context that a window of a text longer than the teacher's context sees again.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: ClientConfig,
        cache: ScoreCache | None = None,
        *,
        overlap_tokens: int = 1024,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.teacher = teacher
        self.config = config
        self._cache = cache
        self._overlap_tokens = min(overlap_tokens, teacher.max_model_tokens // 2)
        self._clock = clock
        self._sleep = sleep
        self._policy = TopLogprobsPolicy(config)
        self._gate = RequestGate(config.max_in_flight, clock=clock, sleep=sleep)
        self._counters = Counters()
        self._threads = ThreadPoolExecutor(config.max_in_flight, thread_name_prefix="teacher")
        self._identity = teacher.identity

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, token_ids: Sequence[int]) -> ScoredSequence:
        """Scores of given tokens.

        A row that was written with the reduced number of entries counts as a hit, so that a second epoch sees what
        the first one saw.

        Raises:
            InputError: fewer than two tokens.
            TeacherRefusedError: the host refused; the cache is not asked again, since settings must be mended.
            RateLimitedError, TeacherDownError, TeacherReplyError, WaitTimeoutError: no answer until the deadline, and
                nothing in the cache to stand in.
        """
        key = score_key(self._identity, token_ids, self.teacher.parameters)
        found = self._cached(key, self.config.reduced_top_logprobs)
        if found is not None:
            self._counters.answered(found.source)
            return found
        try:
            scores = score_in_windows(
                self._ask, token_ids, self.teacher.max_model_tokens, overlap_tokens=self._overlap_tokens
            )
        except (RateLimitedError, TeacherDownError, TeacherReplyError, WaitTimeoutError):
            stand_in = self._cached(key, 1, allow_stale=True)
            if stand_in is None:
                self._counters.failed()
                raise
            self._counters.answered(stand_in.source, fallback=True)
            return stand_in
        if self._cache is not None:
            self._cache.put(key, scores, self._identity.sha256)
        self._counters.answered("teacher")
        return ScoredSequence(scores, "teacher")

    def submit(self, token_ids: Sequence[int]) -> Future[ScoredSequence]:
        """`score` in one of the client's threads."""
        return self._threads.submit(self.score, token_ids)

    async def score_async(self, token_ids: Sequence[int]) -> ScoredSequence:
        """`score` for an event loop."""
        return await asyncio.wrap_future(self.submit(token_ids))

    @property
    def metrics(self) -> ClientMetrics:
        return self._counters.snapshot(
            peak_in_flight=self._gate.peak_in_flight, current_top_logprobs=self._policy.current
        )

    def close(self) -> None:
        """Wait for what runs, drop what has not begun, write the cache's pending rows."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._cache is not None:
            self._cache.flush()
        self.teacher.close()

    def _cached(self, key: bytes, min_top_logprobs: int, *, allow_stale: bool = False) -> ScoredSequence | None:
        if self._cache is None:
            return None
        row = self._cache.get(
            key,
            top_logprobs=self.config.top_logprobs,
            min_top_logprobs=min_top_logprobs,
            allow_stale=allow_stale,
        )
        if row is None:
            return None
        short = row.scores.top_logprobs < self.config.top_logprobs
        return ScoredSequence(row.scores, "stale_cache" if row.stale else "short_cache" if short else "cache")

    def _ask(self, token_ids: Sequence[int]) -> TokenScores:
        """Attempts until one is answered or the deadline has passed."""
        deadline = self._clock() + self.config.deadline_seconds
        attempt = 0
        while True:
            attempt += 1
            try:
                with self._gate.request(deadline):
                    # Read late: a 429 that came while this request waited concerns it too.
                    begun = self._clock()
                    scores = self.teacher.score(token_ids, self._policy.current)
                    self._counters.latency(self._clock() - begun)
            except RateLimitedError as failure:
                self._policy.rate_limited()
                self._counters.rate_limited()
                pause = backoff_seconds(self.config, attempt, failure.retry_after_seconds, uniform_draw())
                if self._clock() + pause > deadline:
                    raise
                self._gate.pause(pause)
            except TeacherDownError:
                pause = backoff_seconds(self.config, attempt, None, uniform_draw())
                if self._clock() + pause > deadline:
                    raise
                self._sleep(pause)
            else:
                self._policy.succeeded()
                return scores
            self._counters.retried()
