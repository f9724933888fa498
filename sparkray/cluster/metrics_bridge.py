"""METIS's metrics, given to Ray by the process that holds the engine; Ray brings them to Prometheus.

Metrics are made when they are first used, since they belong to the worker process that uses them. Outside of Ray
nothing is counted and nothing fails.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import ray
from numpy.typing import NDArray
from ray.util import metrics as ray_metrics

from sparkray.telemetry import metrics

# Where a recorded token has what is counted: the order of `sparkray.metis.fields.TOKEN_FIELDS`, held by a test.
ENTROPY, ACTION, BOOSTED = 0, 6, 7
ALARM_NAMES = {1: "hedge", 2: "refuse"}


class Detecting(Protocol):
    """The switches of a watched request, as far as they are counted by."""

    @property
    def detector(self) -> str: ...


class FinishedTrace(Protocol):
    """The trace of a request that ended; `options` is None where it was not recorded."""

    @property
    def options(self) -> Detecting | None: ...

    @property
    def finish_reason(self) -> str | None: ...

    def tokens(self) -> NDArray[Any]: ...


def observe_trace(trace: FinishedTrace, *, model: str = "") -> None:
    """Add a finished trace to the metrics: some thirty updates of counters, whatever its length."""
    if trace.options is None or not ray.is_initialized():
        return
    tokens_TF = trace.tokens()
    found = metrics.tally(tokens_TF[:, ENTROPY], tokens_TF[:, ACTION], tokens_TF[:, BOOSTED], ALARM_NAMES)
    tags = {"model": model, "detector": trace.options.detector}
    _add(metrics.TRACES, 1, {**tags, "finish_reason": trace.finish_reason or ""})
    _add(metrics.TOKENS, found.num_tokens, tags)
    _add(metrics.BOOSTS, found.num_boosts, tags)
    _add(metrics.ENTROPY_SUM, found.entropy_sum_bits, tags)
    for action, num_alarms in found.num_alarms.items():
        _add(metrics.ALARMS, num_alarms, {**tags, "action": action})
    for label, num_at_most in zip(metrics.BUCKET_LABELS, found.num_at_most, strict=True):
        _add(metrics.ENTROPY_BUCKETS, num_at_most, {**tags, "le": label})
    if found.mean_entropy_bits is not None:
        _metric(metrics.MEAN_ENTROPY).observe(found.mean_entropy_bits, tags)


def set_active_traces(num_active: int) -> None:
    """Tell how many watched requests run in this process now."""
    if ray.is_initialized():
        _metric(metrics.ACTIVE_TRACES).set(num_active)


def observe_finish(trace: FinishedTrace, num_active: int, *, model: str = "") -> None:
    """Both at once, as the hook of an engine that tells how many requests still run."""
    observe_trace(trace, model=model)
    set_active_traces(num_active)


def _add(definition: metrics.MetricDefinition, amount: float, tags: dict[str, str]) -> None:
    if amount > 0:  # Ray refuses to count up by nothing
        _metric(definition).inc(amount, tags)


@cache
def _metric(definition: metrics.MetricDefinition) -> Any:
    if definition.kind == "histogram":
        return ray_metrics.Histogram(
            definition.name, definition.description, list(definition.boundaries), definition.tags
        )
    kinds = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}
    return kinds[definition.kind](definition.name, definition.description, definition.tags)
