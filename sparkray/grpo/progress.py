"""A step as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SHOWN = (
    ("reward", "reward {:.3f}"),
    ("eval_reward", "held-out {:.3f}"),
    ("entropy_nats", "entropy {:.2f}"),
    ("kl_nats", "KL {:.4f}"),
    ("completion_tokens", "length {:.1f}"),
    ("gap_max", "gap {:.1e}"),
    ("canary_gap_max", "canary {:.1e}"),
    ("tokens_per_second", "{:.0f} tok/s"),
)


def step_line(row: Mapping[str, Any], num_steps: int) -> str:
    """The numbers of a step that a person watches; what was not measured is left out."""
    parts = [form.format(row[name]) for name, form in _SHOWN if row.get(name) is not None]
    alarm = f"  ALARM: {row['canary_alarm']}" if row.get("canary_alarm") else ""
    return f"step {row['step'] + 1}/{num_steps}  " + "  ".join(parts) + alarm
