"""Traces by request: live while a request runs, finished ones for a while after.

The store is bounded twice: by a number of finished traces, of which the one looked at longest ago goes first, and by
their age. Live requests are bounded by the engine.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sparkray.errors import NotFoundError
from sparkray.metis.arena import FloatArray, Progress
from sparkray.metis.fields import NUM_FIELDS
from sparkray.metis.options import WatchOptions
from sparkray.metis.trace import CognitiveTrace

_PREFIX = re.compile(r"^(?:chatcmpl|cmpl|resp)-")
# The number of a prompt among several of one request.
_OF_SEVERAL_PROMPTS = re.compile(r"(cmpl-.+)-\d+|(chatcmpl-.+)_\d+")
# vLLM makes ids its own by eight random hex digits.
_VLLM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
# Shared memory tells nobody that it was written to; a waiting reader looks this often.
_POLL_SECONDS = 0.05


class TokenSource(Protocol):
    """Where a running request's tokens are read."""

    def progress(self) -> Progress: ...

    def read(self, start: int, stop: int) -> FloatArray: ...


@dataclass(eq=False)
class TraceEntry:
    """The trace of one request.

    Attributes:
        request_id: as the engine was given it.
        options: the request's switches; None where it is not recorded.
        note: why it is not recorded, or None.
        max_tokens: tokens recorded; of a longer request the rest is missing.
        token_ids: tokens delivered so far.
        finish_reason: "stop", "length", "abort" or "error" once it ended, else None.
        num_prompt_tokens: known once the first token is delivered, else 0.
        restarts: times the detector had to begin anew because what it knew of the request was lost.
    """

    request_id: str
    options: WatchOptions | None = None
    note: str | None = None
    max_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    restarts: int = 0
    _source: TokenSource | None = None
    _tokens: FloatArray = field(default_factory=lambda: np.empty((0, NUM_FIELDS), dtype=np.float32))
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Recorded tokens that may be shown: delivered, or accepted by the engine and on their way."""
        if self._source is None:
            return len(self._tokens)
        progress = self._source.progress()
        return min(max(len(self.token_ids), progress.committed), progress.written, self.max_tokens)

    @property
    def truncated(self) -> bool:
        """Whether tokens at the end went unrecorded: the request is longer than its record."""
        recorded = len(self._tokens) if self.finished else self.max_tokens
        return self.options is not None and len(self.token_ids) > recorded

    def tokens(self, start: int = 0) -> FloatArray:
        """The recorded tokens from `start` on, as rows in the order of `TOKEN_FIELDS`."""
        if self._source is None:
            return self._tokens[start:]
        return self._source.read(start, self.num_tokens)

    def trace(self, decode: Callable[[int], str] | None = None) -> CognitiveTrace:
        """The delivered part as a `CognitiveTrace`; `decode` gives a token's text."""
        tokens_TF = self.tokens()[: len(self.token_ids)]
        token_ids = self.token_ids[: len(tokens_TF)]
        texts = None if decode is None else [decode(token_id) for token_id in token_ids]
        return CognitiveTrace.from_tokens(tokens_TF, token_ids=token_ids, texts=texts, request_id=self.request_id)

    def delivered(self, token_ids: list[int]) -> None:
        """Note tokens that went to the client."""
        self.token_ids.extend(token_ids)
        self._notify()

    def attach(self, source: TokenSource) -> None:
        """Read tokens from `source` from now on, until `finish`."""
        self._source = source

    def finish(self, reason: str) -> None:
        """Keep exactly the delivered tokens and let go of the source."""
        if self._source is not None:
            progress = self._source.progress()
            self._tokens = self._source.read(0, min(len(self.token_ids), progress.written, self.max_tokens))
            self.restarts = progress.restarts
            self._source = None
        self.finish_reason = reason
        self._notify()

    async def wait(self, num_seen: int, timeout_seconds: float) -> bool:
        """Wait until there are more than `num_seen` tokens, or the request ended.

        Returns False where neither came within the time.
        """
        deadline = time.monotonic() + timeout_seconds
        while self.num_tokens <= num_seen and not self.finished:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            changed = self._changed
            try:
                async with asyncio.timeout(min(remaining, _POLL_SECONDS)):
                    await changed.wait()
            except TimeoutError:
                continue
        return True

    def _notify(self) -> None:
        # A new event for the next change: whoever waits on the old one wakes up once.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class TraceStore:
    """Finished traces, bounded, and those of running requests.

    Args:
        max_traces: finished traces kept.
        ttl_seconds: age at which a finished trace is dropped.
        clock: seconds, monotonic.
    """

    def __init__(self, max_traces: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_traces = max_traces
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._live: dict[str, TraceEntry] = {}
        self._finished: OrderedDict[str, tuple[float, TraceEntry]] = OrderedDict()
        self._aliases: dict[str, str] = {}

    def open(self, entry: TraceEntry) -> None:
        """Make a running request findable. A request of the same id that was there before is replaced."""
        self._drop(entry.request_id)
        self._live[entry.request_id] = entry
        for name in _short_names(entry.request_id):
            self._aliases.setdefault(name, entry.request_id)

    def close(self, entry: TraceEntry) -> None:
        """Move a request that ended among the finished ones."""
        if self._live.get(entry.request_id) is not entry:
            return
        del self._live[entry.request_id]
        self._finished[entry.request_id] = (self._clock(), entry)
        while len(self._finished) > self._max_traces or self._is_expired(next(iter(self._finished))):
            self._drop(next(iter(self._finished)))

    def get(self, request_id: str) -> TraceEntry:
        """The trace of a request, by the id in the answer's body or any form of it that vLLM uses.

        Raises:
            NotFoundError: it never was here, or was dropped.
        """
        for name in _spellings(request_id):
            known = self._aliases.get(name, name)
            if known in self._live:
                return self._live[known]
            if known in self._finished and not self._is_expired(known):
                self._finished.move_to_end(known)
                return self._finished[known][1]
        raise NotFoundError(
            f"there is no trace of the request {request_id[:200]!r}.",
            hint=f"The last {self._max_traces} traces are kept, for {self._ttl_seconds:g} s; the id to ask for is "
            "that of the answer's body.",
            param="request_id",
        )

    def __len__(self) -> int:
        return len(self._live) + len(self._finished)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def _is_expired(self, request_id: str) -> bool:
        closed, _ = self._finished[request_id]
        return self._clock() - closed > self._ttl_seconds

    def _drop(self, request_id: str) -> None:
        self._finished.pop(request_id, None)
        for name in _short_names(request_id):
            if self._aliases.get(name) == request_id:
                del self._aliases[name]


def _short_names(request_id: str) -> set[str]:
    """Other names under which a stored request is found: without the route's prefix and the number of its prompt."""
    names = {_PREFIX.sub("", request_id)}
    if numbered := _OF_SEVERAL_PROMPTS.fullmatch(request_id):
        whole = numbered[1] or numbered[2]
        names |= {whole, _PREFIX.sub("", whole)}
    return names - {request_id, ""}


def _spellings(request_id: str) -> Iterator[str]:
    """What may be meant by an id that a client asks for, the most literal first."""
    for name in (request_id, _VLLM_SUFFIX.sub("", request_id)):
        yield name
        yield _PREFIX.sub("", name)
