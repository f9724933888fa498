"""What a fleet tells Prometheus through Ray: nonces, their rate, model FLOP/s, and how deep the queues are."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

from ray.util import metrics as ray_metrics

from sparkray.config.poc import ModelParams
from sparkray.telemetry.metrics import MetricDefinition

NONCES = MetricDefinition("sparkray_poc_nonces", "counter", "Nonces computed and recorded.")
VALID_NONCES = MetricDefinition("sparkray_poc_valid_nonces", "counter", "Of them, those below the target.")
RAW_PER_MINUTE = MetricDefinition("sparkray_poc_raw_per_minute", "gauge", "Nonces recorded a minute, of all groups.")
VALID_PER_MINUTE = MetricDefinition("sparkray_poc_valid_per_minute", "gauge", "Valid nonces recorded a minute.")
MODEL_TFLOPS = MetricDefinition("sparkray_poc_model_tflops", "gauge", "Model operations a second, in 1e12.")
MFU = MetricDefinition("sparkray_poc_mfu", "gauge", "Model operations by the GPUs' peak, where all peaks are known.")
GROUPS_LOADED = MetricDefinition("sparkray_poc_groups_loaded", "gauge", "Groups whose model is loaded.")
RESTARTS = MetricDefinition("sparkray_poc_restarts", "gauge", "Workers that were made anew in this run.")
UNSENT = MetricDefinition("sparkray_poc_unsent_callbacks", "gauge", "Callbacks that no receiver has confirmed.")
BATCHES_WAITING = MetricDefinition("sparkray_poc_batches_waiting", "gauge", "Received batches without a verdict.")
CHUNKS_WAITING = MetricDefinition("sparkray_poc_chunks_waiting", "gauge", "Pieces of them that nobody computed yet.")
SHARE_Z = MetricDefinition("sparkray_poc_share_z_score", "gauge", "Valid share against theory, in deviations.")

DEFINITIONS = (
    NONCES, VALID_NONCES, RAW_PER_MINUTE, VALID_PER_MINUTE, MODEL_TFLOPS, MFU, GROUPS_LOADED, RESTARTS, UNSENT,
    BATCHES_WAITING, CHUNKS_WAITING, SHARE_Z,
)  # fmt: skip


class FleetMetrics:
    """Turns a fleet's summaries into metrics.

    Args:
        peak_tflops: of all groups together; None where it is not known.
        set_value: gives (definition, value) on; a counter's value is what it rose by.
    """

    def __init__(
        self,
        params: ModelParams,
        peak_tflops: float | None = None,
        set_value: Callable[[MetricDefinition, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flop_per_nonce = params.flop_per_nonce
        self._peak_tflops = peak_tflops
        self._set = set_value or _to_ray
        self._clock = clock
        self._last: tuple[float, int, int] | None = None

    def publish(self, summary: dict[str, Any], num_unsent: int) -> None:
        """Tell the state of now, and rates since the last call."""
        now, total, valid = self._clock(), summary["num_recorded"], summary["num_valid"]
        if self._last is not None and now > self._last[0]:
            minutes = (now - self._last[0]) / 60
            raw, good = total - self._last[1], valid - self._last[2]
            self._set(NONCES, raw)
            self._set(VALID_NONCES, good)
            self._set(RAW_PER_MINUTE, raw / minutes)
            self._set(VALID_PER_MINUTE, good / minutes)
            tflops = raw / minutes / 60 * self._flop_per_nonce / 1e12
            self._set(MODEL_TFLOPS, tflops)
            if self._peak_tflops is not None:
                self._set(MFU, tflops / self._peak_tflops)
        self._last = (now, total, valid)
        self._set(GROUPS_LOADED, summary["num_loaded"])
        self._set(RESTARTS, summary["num_restarts"])
        self._set(UNSENT, num_unsent)
        self._set(BATCHES_WAITING, summary["num_batches_waiting"])
        self._set(CHUNKS_WAITING, summary["num_chunks_waiting"])
        self._set(SHARE_Z, summary["share_z_score"])


def _to_ray(definition: MetricDefinition, value: float) -> None:
    if definition.kind == "gauge":
        _metric(definition).set(value)
    elif value > 0:  # Ray refuses to count up by nothing
        _metric(definition).inc(value)


@cache
def _metric(definition: MetricDefinition) -> Any:
    kind = ray_metrics.Gauge if definition.kind == "gauge" else ray_metrics.Counter
    return kind(definition.name, definition.description)
