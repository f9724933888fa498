"""Acceptance gates: a bound that was set and could not be measured is broken, not passed over."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparkray.distill.client.counters import quantile

_NUM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on one number of a report; None sets none."""

    name: str
    bound: float | None
    side: Literal["at_most", "at_least"]


def check_gates(report: Mapping[str, Any], gates: Sequence[Gate]) -> list[str]:
    """What is broken, in words; empty where every bound that was set holds."""
    broken = []
    for gate in gates:
        if gate.bound is None:
            continue
        value = report.get(gate.name)
        if not isinstance(value, int | float) or not math.isfinite(value):
            broken.append(f"{gate.name} was not measured ({value!r}), and {gate.side} {gate.bound:g} is asked for")
        elif (value > gate.bound) if gate.side == "at_most" else (value < gate.bound):
            broken.append(f"{gate.name} is {value:.4g}, and {gate.side} {gate.bound:g} is asked for")
    return broken


def measure_writing(model: Path) -> dict[str, float | int | None]:
    """How fast a student writes: tokens that it really wrote, and the latency of a token."""
    from sparkray.distill.generate import sample_stream
    from sparkray.distill.run import load_student

    student = load_student(model)
    latencies = []
    begun = last = time.perf_counter()
    for _ in sample_stream(student, [0], max_tokens=_NUM_TOKENS, temperature=1.0, top_p=1.0, end_id=-1, seed=0):
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    ordered = sorted(latencies)
    return {
        "tokens_per_second": len(latencies) / (last - begun),
        "num_tokens_written": len(latencies),
        "latency_p50_seconds": quantile(ordered, 0.5),
        "latency_p95_seconds": quantile(ordered, 0.95),
    }
