"""The numbers of a run for Ray's metrics (and so Prometheus), and for TensorBoard where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

_GAUGES = {
    "reward": "Mean reward of a step.",
    "entropy_nats": "Mean entropy of a trained token.",
    "kl_nats": "Mean KL to the reference a token.",
    "completion_tokens": "Mean length of a completion.",
    "tokens_per_second": "Completion tokens trained a second.",
    "zero_variance_share": "Share of groups whose rewards are all the same.",
    "gap_max": "Largest raw log-probability gap between trainer and engine.",
    "canary_gap_max": "Largest gap of the canary after the last push.",
    "seconds": "Duration of a step.",
}


class RunMetrics:
    """Gauges called `sparkray_grpo_<name>` with the label `run`, and event files below `run_dir`/tensorboard."""

    def __init__(self, run_name: str, run_dir: Path) -> None:
        self._gauges = {
            name: Gauge(f"sparkray_grpo_{name}", description=text, tag_keys=("run",)) for name, text in _GAUGES.items()
        }
        self._tags = {"run": run_name}
        self._writer: Any = None
        if find_spec("tensorboardX") is not None:
            self._writer = import_module("tensorboardX").SummaryWriter(str(run_dir / "tensorboard"))

    def observe(self, row: Mapping[str, Any]) -> None:
        """The numbers of one step."""
        for name, gauge in self._gauges.items():
            if row.get(name) is not None:
                gauge.set(row[name], tags=self._tags)
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
