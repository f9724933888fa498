"""What a client did, as numbers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Source = Literal["teacher", "cache", "short_cache", "stale_cache"]
_MAX_LATENCIES = 8192


@dataclass(frozen=True, slots=True)
class ClientMetrics:
    """A snapshot.

    Attributes:
        num_from_teacher: sequences that the host answered.
        num_from_cache: that the cache answered, fallbacks included ("trained from cache").
        num_fallbacks: of those, after the host had failed: shorter or past their time to live.
        num_rate_limits: answers 429.
        num_retries: attempts after the first.
        num_failures: sequences that nothing answered.
        peak_in_flight: most requests at once.
        current_top_logprobs: entries asked for now.
        latency_p50_seconds, latency_p95_seconds: of single attempts that were answered; None before the first.
    """

    num_from_teacher: int
    num_from_cache: int
    num_fallbacks: int
    num_rate_limits: int
    num_retries: int
    num_failures: int
    peak_in_flight: int
    current_top_logprobs: int
    latency_p50_seconds: float | None
    latency_p95_seconds: float | None

    @property
    def hit_rate(self) -> float | None:
        """Share of the sequences that the cache answered without the host having failed; None before the first."""
        total = self.num_from_teacher + self.num_from_cache + self.num_failures
        return (self.num_from_cache - self.num_fallbacks) / total if total else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hit_rate": self.hit_rate}


class Counters:
    """Counts from any thread; keeps the latest latencies only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[Source, int] = {"teacher": 0, "cache": 0, "short_cache": 0, "stale_cache": 0}
        self._latencies: deque[float] = deque(maxlen=_MAX_LATENCIES)
        self._num_fallbacks = 0
        self._num_rate_limits = 0
        self._num_retries = 0
        self._num_failures = 0

    def answered(self, source: Source, *, fallback: bool = False) -> None:
        """A sequence got its scores."""
        with self._lock:
            self._answers[source] += 1
            self._num_fallbacks += fallback

    def latency(self, seconds: float) -> None:
        """An attempt was answered."""
        with self._lock:
            self._latencies.append(seconds)

    def rate_limited(self) -> None:
        """An attempt was answered with 429."""
        with self._lock:
            self._num_rate_limits += 1

    def retried(self) -> None:
        """Another attempt begins."""
        with self._lock:
            self._num_retries += 1

    def failed(self) -> None:
        """A sequence got no scores."""
        with self._lock:
            self._num_failures += 1

    def snapshot(self, *, peak_in_flight: int, current_top_logprobs: int) -> ClientMetrics:
        """The numbers as of now."""
        with self._lock:
            latencies = sorted(self._latencies)
            return ClientMetrics(
                num_from_teacher=self._answers["teacher"],
                num_from_cache=sum(count for source, count in self._answers.items() if source != "teacher"),
                num_fallbacks=self._num_fallbacks,
                num_rate_limits=self._num_rate_limits,
                num_retries=self._num_retries,
                num_failures=self._num_failures,
                peak_in_flight=peak_in_flight,
                current_top_logprobs=current_top_logprobs,
                latency_p50_seconds=quantile(latencies, 0.5),
                latency_p95_seconds=quantile(latencies, 0.95),
            )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Quantile of sorted values by linear interpolation, or None of none."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
