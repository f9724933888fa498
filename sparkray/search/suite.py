"""The comparison that `sparkray search eval` and the benchmark print: every policy, and ours at its error rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparkray.config.search import DEFAULT_RISK
from sparkray.errors import InputError
from sparkray.search.calibration import false_prune_losses
from sparkray.search.evaluate import PolicyFigures, PolicyOfTask, bootstrap_resamples, compare
from sparkray.search.policies import (
    AdaptiveConsistency,
    DeepConfOffline,
    DeepConfOnline,
    EarlyStopping,
    Full,
    Metis,
    Policy,
)
from sparkray.search.profile import SearchProfile
from sparkray.search.recording import RecordedQuestion, Recording

OURS = "ours"
ALPHAS = (0.05, 0.1)


@dataclass(frozen=True, slots=True)
class FalsePruning:
    """How often a right path was pruned on questions that calibration had not seen.

    Attributes:
        alpha: the rate that was chosen.
        rate: mean over the questions of the part of their right paths that was pruned.
        interval: 95 %, by resampling questions.
        num_pruned, num_right: right paths that were pruned, and all of them.
        prune_below: the threshold; 0 prunes nothing.
    """

    alpha: float
    rate: float
    interval: tuple[float, float]
    num_pruned: int
    num_right: int
    prune_below: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of one evaluation."""

    figures: Mapping[str, PolicyFigures]
    false_pruning: tuple[FalsePruning, ...]
    num_questions: int
    num_paths: int
    tasks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The keys of the benchmark: one a policy, ours with its rates of false pruning."""
        rows = {name: asdict(figures) for name, figures in self.figures.items()}
        for found in self.false_pruning:
            rows[OURS][f"false_prune_at_{f'{found.alpha:g}'.replace('.', '_')}"] = found.rate
        return {
            **rows,
            "realised_false_prune": {f"{found.alpha:g}": asdict(found) for found in self.false_pruning},
            "num_questions": self.num_questions,
            "num_paths": self.num_paths,
            "tasks": list(self.tasks),
        }


def rivals() -> dict[str, Policy]:
    """The published policies at the settings of their papers, with windows that fit short paths."""
    return {
        "full": Full(),
        "adaptive_consistency": AdaptiveConsistency(),
        "esc": EarlyStopping(),
        "deepconf_offline": DeepConfOffline(),
        "deepconf_online": DeepConfOnline(),
        "metis": Metis(checkpoints=(8, 16, 32)),
    }


def compare_all(
    recording: Recording,
    profile: SearchProfile,
    *,
    split: str = "held_out",
    alpha: float = 0.05,
    risk: float = DEFAULT_RISK,
    num_orders: int = 8,
    seed: int = 0,
) -> Comparison:
    """Replay every policy on the questions of `split` that the profile is made for.

    Raises:
        InputError: the profile is for another model or temperature, or there are no such questions.
    """
    profile.check(recording.info.model, recording.info.temperature)
    questions = recording.select(split, profile.tasks)
    if not questions:
        raise InputError(
            f"the recording has no questions of the split {split!r} in the profile's tasks "
            f"({', '.join(profile.tasks)}); it has the tasks {', '.join(recording.tasks) or 'none'}."
        )
    tasks = sorted({question.task for question in questions})
    policies: dict[str, Policy | PolicyOfTask] = {
        **rivals(),
        OURS: {task: profile.policy(alpha, risk, task=task) for task in tasks},
    }
    return Comparison(
        figures=compare(policies, questions, num_orders, seed),
        false_pruning=tuple(false_pruning(profile, questions, level, seed) for level in ALPHAS),
        num_questions=len(questions),
        num_paths=recording.info.num_paths,
        tasks=tuple(tasks),
    )


def false_pruning(
    profile: SearchProfile, questions: Sequence[RecordedQuestion], alpha: float, seed: int = 0
) -> FalsePruning:
    """How often the rule of `alpha` prunes a right path, counted on all paths as if no search ended early."""
    threshold = profile.policy(alpha).prune_below
    least = false_prune_losses(profile.scorer, questions)
    rates = np.array([np.mean([value < threshold for value in values]) for values in least])
    low, high = np.quantile(rates[bootstrap_resamples(len(rates), seed)].mean(axis=1), [0.025, 0.975])
    return FalsePruning(
        alpha=alpha,
        rate=float(rates.mean()),
        interval=(float(low), float(high)),
        num_pruned=sum(value < threshold for values in least for value in values),
        num_right=sum(len(values) for values in least),
        prune_below=threshold,
    )
