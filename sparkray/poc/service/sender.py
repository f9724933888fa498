"""Empties the outbox: every callback is tried until its receiver has said yes.

A receiver that does not answer is left alone for a while, longer each time; one that refuses a body gets the
others meanwhile. Each attempt carries the same `Idempotency-Key`, since an answer may be lost after the receiver
has taken the body.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self

import httpx

from sparkray.errors import UnavailableError
from sparkray.poc.fleet.ledger import Delivery, Ledger

FIRST_BACKOFF_SECONDS = 1.0
_BATCH = 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one attempt.

    Attributes:
        error: None where the receiver has it.
        reached: whether the receiver answered at all.
    """

    error: str | None = None
    reached: bool = True


class Post(Protocol):
    """Tries one delivery."""

    def __call__(self, delivery: Delivery) -> Outcome: ...


@dataclass(slots=True)
class Backoff:
    """When an address may be tried again.

    Attributes:
        max_seconds: longest pause.
        draw: uniform numbers from 0 to 1; pauses differ, so that many senders do not come back together.
    """

    max_seconds: float
    draw: Callable[[], float] = random.random
    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)

    def pause(self, num_failures: int) -> float:
        """Seconds after so many failures in a row: doubled each time, of which a random half."""
        longest = min(self.max_seconds, FIRST_BACKOFF_SECONDS * 2.0 ** min(num_failures - 1, 30))
        return longest * (0.5 + 0.5 * self.draw())

    def failed(self, url: str, now: float) -> None:
        """The address did not answer."""
        count = self._failures.get(url, (0, 0.0))[0] + 1
        self._failures[url] = (count, now + self.pause(count))

    def reached(self, url: str) -> None:
        """The address answered."""
        self._failures.pop(url, None)

    def blocked(self, now: float) -> tuple[str, ...]:
        """Addresses to leave alone."""
        return tuple(url for url, (_, until) in self._failures.items() if until > now)


def send_due(ledger: Ledger, post: Post, backoff: Backoff, clock: Callable[[], float]) -> int:
    """Try everything that is due, once; how many arrived."""
    num_sent = 0
    for delivery in ledger.due(clock(), _BATCH, backoff.blocked(clock())):
        if delivery.url in backoff.blocked(clock()):
            continue
        outcome = post(delivery)
        if outcome.error is None:
            backoff.reached(delivery.url)
            ledger.mark_sent(delivery)
            num_sent += 1
            continue
        now = clock()
        if outcome.reached:
            # Its answer concerns this body; others to the same address need not wait for it.
            backoff.reached(delivery.url)
            due = now + backoff.pause(delivery.attempts + 1)
        else:
            backoff.failed(delivery.url, now)
            due = now
        ledger.mark_failed(delivery, due, outcome.error)
    return num_sent


class HttpPost:
    """A delivery as one POST of JSON."""

    def __init__(self, timeout_seconds: float) -> None:
        self._client = httpx.Client(timeout=timeout_seconds, follow_redirects=False)

    def __call__(self, delivery: Delivery) -> Outcome:
        headers = {"Content-Type": "application/json", "Idempotency-Key": delivery.key}
        try:
            answer = self._client.post(delivery.url, content=delivery.body, headers=headers)
        except httpx.HTTPError as failure:
            return Outcome(f"{type(failure).__name__}: {failure}", reached=False)
        if answer.is_success:
            return Outcome()
        # A server in trouble is not asked again at once; one that refuses this body is.
        return Outcome(f"HTTP {answer.status_code}: {answer.text[:200]}", reached=answer.status_code < 500)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class Sender:
    """Runs `send_due` in a thread."""

    def __init__(
        self, ledger: Ledger, *, timeout_seconds: float, interval_seconds: float, max_backoff_seconds: float
    ) -> None:
        self._ledger = ledger
        self._post = HttpPost(timeout_seconds)
        self._interval_seconds = interval_seconds
        self._backoff = Backoff(max_backoff_seconds)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poc-sender", daemon=True)
        self.last_error: str | None = None

    def start(self) -> Self:
        """Begin to send."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End after the attempt in hand."""
        self._ended.set()
        self._thread.join()
        self._post.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                num_sent = send_due(self._ledger, self._post, self._backoff, time.time)
                self.last_error = None
            except UnavailableError as failure:
                # The disk is full: what was sent is sent again under the same key once it is not.
                num_sent, self.last_error = 0, str(failure)
            if not num_sent:
                self._ended.wait(self._interval_seconds)
