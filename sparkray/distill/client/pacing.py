"""How hard a host is pressed: entries asked for, pauses, and requests at the same time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparkray.config.distill import ClientConfig
from sparkray.errors import WaitTimeoutError


class TopLogprobsPolicy:
    """Entries to ask for: the full number, fewer after a 429, the full number again after enough answers in a row."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._reduced = False
        self._successes = 0

    @property
    def current(self) -> int:
        return self._config.reduced_top_logprobs if self._reduced else self._config.top_logprobs

    def rate_limited(self) -> None:
        """The host said 429."""
        with self._lock:
            self._reduced, self._successes = True, 0

    def succeeded(self) -> None:
        """The host, not the cache, answered."""
        with self._lock:
            self._successes += 1
            if self._reduced and self._successes >= self._config.successes_to_recover:
                self._reduced = False


def backoff_seconds(config: ClientConfig, attempt: int, retry_after_seconds: float | None, draw: float) -> float:
    """Pause before attempt `attempt` + 1 (the first attempt is 1).

    Args:
        config: first and longest pause.
        attempt: attempts made.
        retry_after_seconds: what the host asked for; never waited less than this.
        draw: in [0, 1); spreads clients that failed together over the upper half of the pause.
    """
    pause = min(config.backoff_seconds * 2.0 ** (attempt - 1), config.max_backoff_seconds) * (0.5 + draw / 2)
    return pause if retry_after_seconds is None else max(pause, retry_after_seconds * (1 + draw / 10))


class RequestGate:
    """At most so many requests at once, from threads and event loops alike, and none before a pause is over."""

    def __init__(
        self,
        max_in_flight: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._slots = threading.BoundedSemaphore(max_in_flight)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._not_before = float("-inf")
        self._clock = clock
        self._sleep = sleep
        self.peak_in_flight = 0

    def pause(self, seconds: float) -> None:
        """Let no request start for so long; a 429 concerns all of them."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    @contextmanager
    def request(self, deadline: float) -> Iterator[None]:
        """Hold one of the places.

        Raises:
            WaitTimeoutError: none was free, or the pause not over, before `deadline` (of the gate's clock).
        """
        while True:
            wait = self._not_before - self._clock()
            if wait > 0:
                if self._clock() + wait > deadline:
                    raise self._late("the host's pause is longer than what is left")
                self._sleep(wait)
            elif not self._slots.acquire(timeout=max(0.0, deadline - self._clock())):
                raise self._late("no place among the requests in flight was free")
            elif self._not_before > self._clock():
                self._slots.release()  # a pause began while this request waited for its place
            else:
                break
        try:
            with self._lock:
                self._in_flight += 1
                self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
            yield
        finally:
            with self._lock:
                self._in_flight -= 1
            self._slots.release()

    @staticmethod
    def _late(reason: str) -> WaitTimeoutError:
        return WaitTimeoutError(
            f"{reason} before the request's deadline.", hint="Raise client.deadline_seconds, or ask for less at once."
        )


def uniform_draw() -> float:
    """A draw in [0, 1) that does not touch the seeds of training."""
    return _RANDOM.random()


_RANDOM = random.SystemRandom()
