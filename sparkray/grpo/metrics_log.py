"""The numbers of a run, one line of JSON a step, and what is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.grpo.rewards import Score
from sparkray.grpo.rollouts import RolloutGroup

LOG_NAME = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` of a run. A run that goes on from a checkpoint takes back the lines of steps that it repeats."""

    def __init__(self, run_dir: Path, *, next_step: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / LOG_NAME
        kept = [row for row in read_log(run_dir) if row["step"] < next_step]
        draft = self._path.with_suffix(".tmp")
        draft.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        draft.replace(self._path)

    def add(self, row: Mapping[str, Any]) -> None:
        """One step; numbers that are not finite become null."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _plain(value) for name, value in row.items()}) + "\n")


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """All lines so far; a last line that was cut off by a kill is left out."""
    path = run_dir / LOG_NAME
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def reward_matrix(scores: list[list[Score]]) -> NDArray[np.float64]:
    """[P, G] totals, NaN where a reward failed."""
    return np.array([[score.total for score in group] for group in scores], dtype=np.float64)


def reward_sums(groups: list[RolloutGroup], scores: list[list[Score]]) -> dict[str, float]:
    """Sums and counts of what was drawn and scored, which add up over ranks: `name` with `num_name` under it."""
    sums: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        if math.isfinite(value):
            sums[name] = sums.get(name, 0.0) + value
            sums[f"num_{name}"] = sums.get(f"num_{name}", 0.0) + 1

    for group, group_scores in zip(groups, scores, strict=True):
        for rollout, score in zip(group.rollouts, group_scores, strict=True):
            add("reward", score.total)
            add("reward_squared", score.total**2)
            add("reward_failed", float(score.failure is not None))
            add("completion_tokens", len(rollout.token_ids))
            add("truncated", float(rollout.finish_reason == "length"))
            add("engine_entropy_bits", rollout.mean_entropy_bits)
            for name, value in score.terms.items():
                add(f"reward/{name}", value)
            for name, value in score.cognitive.items():
                add(f"cognitive/{name}", value)
    return sums


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """The means of `reward_sums`, with `reward_std` in place of the sum of squares."""
    found = {
        name: value / sums[f"num_{name}"] for name, value in sums.items() if f"num_{name}" in sums and name != "num_"
    }
    squared = found.pop("reward_squared", None)
    if squared is not None:
        found["reward_std"] = math.sqrt(max(0.0, squared - found["reward"] ** 2))
    return found


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
