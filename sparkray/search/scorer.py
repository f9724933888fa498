"""The probability that a path is right, from the signals of its tokens so far.

A small logistic regression for each checkpoint (number of tokens written) and one for paths that ended, fitted on
calibration questions whose answers are known. What tells a right end from a wrong one differs from task to task, so
each task has a model of its ends; where the task is not known, one of all tasks speaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparkray.errors import InputError
from sparkray.search.logistic import Features, Logistic, fit_logistic, logistic_from_dict, logistic_to_dict
from sparkray.search.signals import COLUMN, FloatArray

# An answer stands in the last few tokens of a path, and nobody says in how many.
_ENDS = (2, 3, 4, 5)
_START_TOKENS = 4
_RECENT_TOKENS = 8
FEATURES = (
    "mean_entropy",
    "peak_entropy",
    "total_entropy",
    "start_entropy",
    "recent_entropy",
    *(f"entropy_of_last_{count}" for count in _ENDS),
    "mean_logprob",
    "least_logprob",
    "total_logprob",
    "start_logprob",
    "recent_logprob",
    *(f"logprob_of_last_{count}" for count in _ENDS),
    "mean_max_prob",
    "least_max_prob",
    "least_max_prob_of_last_4",
    "mean_top_confidence",
    "least_top_confidence",
    "top_confidence_of_last_4",
    "peak_statistic",
    "log_num_tokens",
)
_MIN_EXAMPLES = 30
# The paths of one task are few questions' paths, much alike.
_TASK_RIDGE = 5.0


def path_features(signals: FloatArray) -> Features:
    """The `FEATURES` of the tokens in `signals` (at least one), shape [num_features]; unknown signals count as 0.

    Entropies are in bits and log-probabilities in nats. `start_logprob` and `logprob_of_last_*` are sums, so that the
    latter is that of an answer as a whole; `recent_logprob` and the entropies of few tokens are means.
    """
    rows = np.nan_to_num(signals.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    entropy, logprob = rows[:, COLUMN["entropy"]], rows[:, COLUMN["logprob"]]
    max_prob, confidence = rows[:, COLUMN["max_prob"]], rows[:, COLUMN["top_confidence"]]
    num_tokens = len(rows)
    # Python is quicker than numpy on a handful of numbers, and a search judges many paths many times.
    last_entropy, last_logprob = entropy[-_RECENT_TOKENS:].tolist(), logprob[-_RECENT_TOKENS:].tolist()
    last_confidence = confidence[-4:].tolist()
    total_entropy, total_logprob = float(entropy.sum()), float(logprob.sum())
    return np.array(
        [
            total_entropy / num_tokens,
            entropy.max(),
            total_entropy,
            _mean(entropy[:_START_TOKENS].tolist()),
            _mean(last_entropy),
            *(_mean(last_entropy[-count:]) for count in _ENDS),
            total_logprob / num_tokens,
            logprob.min(),
            total_logprob,
            sum(logprob[:_START_TOKENS].tolist()),
            _mean(last_logprob),
            *(sum(last_logprob[-count:]) for count in _ENDS),
            max_prob.sum() / num_tokens,
            max_prob.min(),
            min(max_prob[-4:].tolist()),
            confidence.sum() / num_tokens,
            confidence.min(),
            _mean(last_confidence),
            rows[:, COLUMN["hedge_statistic"]].max(),
            np.log(num_tokens),
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, slots=True)
class PathScorer:
    """P(right) of a running path at its checkpoints, and of one that ended.

    Attributes:
        checkpoints: numbers of tokens, rising, at which a running path is judged.
        running: one model for each checkpoint.
        ended: the model of paths that ended with an answer.
        ended_of_task: the same for tasks that have one of their own.
    """

    checkpoints: tuple[int, ...]
    running: tuple[Logistic, ...]
    ended: Logistic
    ended_of_task: Mapping[str, Logistic] = field(default_factory=dict)

    def at_checkpoint(self, signals: FloatArray, mark: int) -> float:
        """P(right) of a running path, judged when it had written `mark` tokens, which must be a checkpoint."""
        return self.running[self.checkpoints.index(mark)].probability(path_features(signals[:mark]))

    def at_end(self, signals: FloatArray, task: str | None = None) -> float:
        """P(right) of a path that ended with an answer, to a question of a task where that is known."""
        model = self.ended if task is None else self.ended_of_task.get(task, self.ended)
        return model.probability(path_features(signals))

    def least_so_far(self, signals: FloatArray) -> float:
        """The least P(right) at any checkpoint that a path passed while running; 1 where it passed none."""
        passed = [mark for mark in self.checkpoints if mark < len(signals)]
        return min((self.at_checkpoint(signals, mark) for mark in passed), default=1.0)


@dataclass(frozen=True, slots=True)
class Example:
    """One path to learn from: its signals, and whether its answer is right; `weight` makes questions count alike."""

    signals: FloatArray
    correct: bool
    has_answer: bool
    weight: float = 1.0
    task: str | None = None


def fit_scorer(examples: Sequence[Example], checkpoints: Sequence[int]) -> PathScorer:
    """Fit on paths of calibration questions.

    Checkpoints that fewer than 30 paths are still running at, or at which all are right or all are wrong, are dropped.

    Raises:
        InputError: fewer than 30 paths with an answer, or all of them right or all wrong.
    """
    ended = [example for example in examples if example.has_answer and len(example.signals)]
    if not _is_learnable(ended):
        raise InputError(
            f"{len(ended)} paths with an answer were given, of which {sum(e.correct for e in ended)} are right; "
            f"at least {_MIN_EXAMPLES}, some right and some wrong, are needed to calibrate."
        )
    marks, models = [], []
    for mark in sorted(set(checkpoints)):
        reached = [example for example in examples if len(example.signals) > mark]
        if _is_learnable(reached):
            marks.append(mark)
            models.append(_fit(reached, mark))
    of_task = {
        task: [example for example in ended if example.task == task]
        for task in sorted({example.task for example in ended if example.task is not None})
    }
    return PathScorer(
        tuple(marks),
        tuple(models),
        _fit(ended, None),
        {task: _fit(own, None, _TASK_RIDGE) for task, own in of_task.items() if _is_learnable(own)},
    )


def scorer_to_dict(scorer: PathScorer) -> dict[str, Any]:
    """As plain values for JSON."""
    return {
        "features": list(FEATURES),
        "checkpoints": list(scorer.checkpoints),
        "running": [logistic_to_dict(model) for model in scorer.running],
        "ended": logistic_to_dict(scorer.ended),
        "ended_of_task": {task: logistic_to_dict(model) for task, model in scorer.ended_of_task.items()},
    }


def scorer_from_dict(data: Mapping[str, Any]) -> PathScorer:
    """What `scorer_to_dict` gave. Raises KeyError, TypeError or ValueError where it is something else."""
    if tuple(data["features"]) != FEATURES:
        raise ValueError(f"its features are {data['features']}, and {list(FEATURES)} are computed here")
    return PathScorer(
        tuple(int(mark) for mark in data["checkpoints"]),
        tuple(logistic_from_dict(model, len(FEATURES)) for model in data["running"]),
        logistic_from_dict(data["ended"], len(FEATURES)),
        {task: logistic_from_dict(model, len(FEATURES)) for task, model in data["ended_of_task"].items()},
    )


def _is_learnable(examples: Sequence[Example]) -> bool:
    num_right = sum(example.correct for example in examples)
    return len(examples) >= _MIN_EXAMPLES and 0 < num_right < len(examples)


def _fit(examples: Sequence[Example], num_tokens: int | None, ridge: float = 1.0) -> Logistic:
    return fit_logistic(
        np.stack([path_features(example.signals[:num_tokens]) for example in examples]),
        np.array([example.correct for example in examples]),
        np.array([example.weight for example in examples]),
        ridge,
    )
