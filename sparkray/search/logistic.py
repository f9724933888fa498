"""Logistic regression with a ridge penalty, by Newton's method in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CLIP = 4.0
_MAX_STEP = 4.0

Features = NDArray[np.float64]
"""One example, shape [num_features], or several, shape [num_examples, num_features]."""


@dataclass(frozen=True, slots=True)
class Logistic:
    """P = 1 / (1 + exp(-(bias + weights . (features - mean) / std)))."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def probability(self, features: Features) -> float:
        """P for one example."""
        # A feature far outside of what was seen says no more than one at the edge of it.
        standard = np.clip((features - np.array(self.mean)) / np.array(self.std), -_CLIP, _CLIP)
        return float(1 / (1 + np.exp(-(self.bias + standard @ np.array(self.weights)))))


def fit_logistic(
    features: Features, target: NDArray[np.bool_], weight: NDArray[np.float64], ridge: float = 1.0
) -> Logistic:
    """Fit P(target) on examples whose `weight` says how much each counts (only its proportions matter).

    Args:
        features: shape [num_examples, num_features].
        target: shape [num_examples].
        weight: shape [num_examples], positive.
        ridge: penalty on the squared weights of standardised features.
    """
    weight = weight * len(weight) / weight.sum()
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-6, std, 1.0)
    design = np.column_stack([np.ones(len(features)), np.clip((features - mean) / std, -_CLIP, _CLIP)])
    penalty = np.full(design.shape[1], ridge)
    penalty[0] = 1e-3
    coefficients = np.zeros(design.shape[1])
    for _ in range(100):
        probability = 1 / (1 + np.exp(-design @ coefficients))
        gradient = design.T @ (weight * (probability - target)) + penalty * coefficients
        curvature = (design.T * (weight * probability * (1 - probability))) @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        largest = float(np.abs(step).max())
        coefficients = coefficients - step * min(1.0, _MAX_STEP / max(largest, 1e-12))
        if largest < 1e-8:
            break
    return Logistic(tuple(mean.tolist()), tuple(std.tolist()), tuple(coefficients[1:].tolist()), float(coefficients[0]))


def logistic_to_dict(model: Logistic) -> dict[str, Any]:
    """As plain values for JSON."""
    return {"mean": list(model.mean), "std": list(model.std), "weights": list(model.weights), "bias": model.bias}


def logistic_from_dict(data: Mapping[str, Any], num_features: int) -> Logistic:
    """What `logistic_to_dict` gave. Raises KeyError, TypeError or ValueError where it is something else."""

    def numbers(name: str) -> tuple[float, ...]:
        values = tuple(float(value) for value in data[name])
        if len(values) != num_features:
            raise ValueError(f"{name} holds {len(values)} numbers, and {num_features} are expected")
        return values

    return Logistic(numbers("mean"), numbers("std"), numbers("weights"), float(data["bias"]))
