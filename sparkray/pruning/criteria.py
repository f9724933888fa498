"""Scores of experts, all computed from one pass of statistics; the lowest are cut.

reap and frequency: Lasby et al. (2510.13999). EAN: sums and means of activation norms (2504.05586 and others).
MAN and MSAN: mean and mean squared norm over routed tokens, gate-free (2606.15716).
"""

from __future__ import annotations

import zlib

import numpy as np

from sparkray.config.pruning import CriterionName
from sparkray.errors import UsageError
from sparkray.pruning.statistics import Array, LayerStatistics


def expert_scores(statistics: LayerStatistics, criterion: CriterionName, *, layer: str = "", seed: int = 0) -> Array:
    """Score of every expert of a layer, shape [num_experts].

    `layer` and `seed` matter to `random` alone.
    """
    values = statistics.values
    match criterion:
        case "reap":
            return statistics.mean("gated_norm")
        case "reap_l2":
            return np.sqrt(statistics.mean("gated_norm_squared"))
        case "contribution":
            return statistics.mean("contribution")
        case "frequency":
            return values["count"].copy()
        case "ean_sum":
            return values["norm"].copy()
        case "ean_mean" | "man":
            return statistics.mean("norm")
        case "msan":
            return statistics.mean("norm_squared")
        case "weighted_ean_sum":
            return values["gated_norm"].copy()
        case "weighted_ean_sum_l2":
            return np.sqrt(values["gated_norm_squared"])
        case "weighted_frequency_sum":
            return values["gate"].copy()
        case "max_activations":
            return values["max_absolute"].copy()
        case "random":
            return np.random.default_rng([seed, zlib.crc32(layer.encode())]).random(statistics.num_experts)
        case _:
            raise UsageError(f"the criterion {criterion!r} is not known.")
