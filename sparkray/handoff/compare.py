"""How close two engines are: tokens, distributions, rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparkray.handoff.rows import Array, Floats, KvRows, to_float32


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or where one sequence ends; None where they are equal."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def log_softmax(logits_V: Floats) -> Floats:
    """Natural log probabilities, in float64 inside."""
    wide = logits_V.astype(np.float64)
    shifted = wide - wide.max()
    result: Floats = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return result


def kl_divergence(logits_V: Floats, reference_V: Floats) -> float:
    """KL(reference || other) in nats."""
    one = log_softmax(logits_V).astype(np.float64)
    reference = log_softmax(reference_V).astype(np.float64)
    return float(max(0.0, np.sum(np.exp(reference) * (reference - one))))


def top2_margin(logits_V: Floats) -> float:
    """Difference of the two largest logits: below an engine's noise, the greedy token is a coin toss."""
    second, first = np.partition(logits_V, -2)[-2:]
    return float(first - second)


def row_errors(rows: KvRows, reference: KvRows) -> tuple[list[float], list[float]]:
    """For each layer, the largest difference of keys over the layer's largest key; the same for values."""

    def errors(given: Sequence[Array], wanted: Sequence[Array]) -> list[float]:
        found = []
        for one, other in zip(given, wanted, strict=True):
            wide = to_float32(other, reference.dtype)
            distance = np.abs(to_float32(one, rows.dtype) - wide).max()
            found.append(float(distance / max(float(np.abs(wide).max()), 1e-30)))
        return found

    return errors(rows.keys_L, reference.keys_L), errors(rows.values_L, reference.values_L)
