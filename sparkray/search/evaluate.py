"""Comparing policies on recorded questions: the same paths, in the same orders, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError
from sparkray.search.policies.base import Policy
from sparkray.search.policies.full import Full
from sparkray.search.recording import RecordedQuestion
from sparkray.search.replay import replay, shuffled_orders

NUM_BOOTSTRAP = 4000
PerQuestion = NDArray[np.float64]

PolicyOfTask = Mapping[str, Policy]
"""A policy that is set up for each task; by the tasks' names."""


@dataclass(frozen=True, slots=True)
class Runs:
    """What a policy did, one number a question, each the mean over the orders.

    Attributes:
        right: part of the replays with the right answer.
        tokens, steps, paths: written, passed, launched.
    """

    right: PerQuestion
    tokens: PerQuestion
    steps: PerQuestion
    paths: PerQuestion


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """A policy's line in the comparison.

    Attributes:
        accuracy: part of the questions answered right.
        interval: of the accuracy, 95 %.
        tokens: written for one question, mean.
        tokens_saved: part of `full`'s tokens that was not written.
        tokens_saved_interval: its interval, 95 %, paired.
        accuracy_delta: accuracy minus that of `full`.
        accuracy_delta_interval: its interval, 95 %, paired.
        steps: decode steps until the answer, mean.
        paths: launched for one question, mean.
    """

    accuracy: float
    interval: tuple[float, float]
    tokens: float
    tokens_saved: float
    tokens_saved_interval: tuple[float, float]
    accuracy_delta: float
    accuracy_delta_interval: tuple[float, float]
    steps: float
    paths: float


def run_policy(
    policy: Policy | PolicyOfTask, questions: Sequence[RecordedQuestion], num_orders: int = 8, seed: int = 0
) -> Runs:
    """Replay `policy` on every question in the same `num_orders` orders that every other policy gets."""
    rows = []
    for question in questions:
        chosen = policy[question.task] if isinstance(policy, Mapping) else policy
        outcomes = [replay(chosen, question.paths, order) for order in shuffled_orders(question, num_orders, seed)]
        rows.append(
            [
                np.mean([question.is_right(outcome.result.key) for outcome in outcomes]),
                np.mean([outcome.num_tokens for outcome in outcomes]),
                np.mean([outcome.num_steps for outcome in outcomes]),
                np.mean([outcome.num_paths for outcome in outcomes]),
            ]
        )
    return Runs(*np.array(rows, dtype=np.float64).T)


def compare(
    policies: Mapping[str, Policy | PolicyOfTask],
    questions: Sequence[RecordedQuestion],
    num_orders: int = 8,
    seed: int = 0,
) -> dict[str, PolicyFigures]:
    """Figures of each policy and of `full`, over the same questions and orders.

    Raises:
        InputError: no questions.
    """
    if not questions:
        raise InputError("there are no recorded questions to compare policies on.")
    full = run_policy(Full(), questions, num_orders, seed)
    resamples = bootstrap_resamples(len(questions), seed)
    figures = {"full": figures_of(full, full, resamples)}
    for name, policy in policies.items():
        if name != "full":
            figures[name] = figures_of(run_policy(policy, questions, num_orders, seed), full, resamples)
    return figures


def bootstrap_resamples(num_questions: int, seed: int) -> NDArray[np.int64]:
    """Questions drawn with replacement, shape [NUM_BOOTSTRAP, num_questions]; shared by all policies."""
    return np.random.default_rng(seed).integers(num_questions, size=(NUM_BOOTSTRAP, num_questions))


def figures_of(runs: Runs, full: Runs, resamples: NDArray[np.int64]) -> PolicyFigures:
    """The figures of a policy against those of `full`."""
    return PolicyFigures(
        accuracy=float(runs.right.mean()),
        interval=_interval(runs.right[resamples].mean(axis=1)),
        tokens=float(runs.tokens.mean()),
        tokens_saved=float(1 - runs.tokens.mean() / full.tokens.mean()),
        tokens_saved_interval=_interval(1 - runs.tokens[resamples].mean(axis=1) / full.tokens[resamples].mean(axis=1)),
        accuracy_delta=float((runs.right - full.right).mean()),
        accuracy_delta_interval=_interval((runs.right - full.right)[resamples].mean(axis=1)),
        steps=float(runs.steps.mean()),
        paths=float(runs.paths.mean()),
    )


def _interval(values: PerQuestion) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
