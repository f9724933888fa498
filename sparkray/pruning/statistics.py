"""Sums per (layer, expert) that every criterion is computed from. Merging two of them is adding them.

Arrays are float64 of shape [num_experts]; the maxima merge by maximum. Counts are held as float64 integers, exact
up to 2**53 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError

Array = NDArray[np.float64]

# n is ||f(x)|| of one routed token, g its gate: what multiplies the expert's output (Llama 4: its input).
SUM_FIELDS = ("count", "norm", "norm_squared", "gated_norm", "gated_norm_squared", "gate", "contribution")
MAX_FIELDS = ("max_signed", "max_absolute")
FIELDS = SUM_FIELDS + MAX_FIELDS


@dataclass(slots=True)
class LayerStatistics:
    """Sums of one sparse layer.

    Attributes:
        num_tokens: tokens that reached the layer, padding left out.
        values: field name -> [num_experts]. `contribution` sums the norm of what the expert adds to the residual
            stream: ||g f(x)||, which for Llama 4 is ||f(g x)||. `max_signed` starts at zero, as upstream's does.
    """

    num_tokens: int
    values: dict[str, Array]

    @classmethod
    def zeros(cls, num_experts: int) -> LayerStatistics:
        return cls(0, {name: np.zeros(num_experts) for name in FIELDS})

    @property
    def num_experts(self) -> int:
        return len(self.values["count"])

    def add(self, other: LayerStatistics) -> None:
        """Merge `other` into this one."""
        if other.num_experts != self.num_experts:
            raise InputError(f"statistics of {other.num_experts} experts cannot be added to {self.num_experts}.")
        self.num_tokens += other.num_tokens
        for name in SUM_FIELDS:
            self.values[name] += other.values[name]
        for name in MAX_FIELDS:
            np.maximum(self.values[name], other.values[name], out=self.values[name])

    def mean(self, field: str) -> Array:
        """A sum over routed tokens, divided by their number; zero for an expert that got none."""
        mean: Array = self.values[field] / np.maximum(self.values["count"], 1.0)
        return mean

    def to_json(self) -> dict[str, Any]:
        """All fields under the names of REAP's observer, with the means that are derived from the sums."""
        values = self.values
        fields = {
            "expert_frequency": values["count"],
            "ean_sum": values["norm"],
            "ean_sumsq": values["norm_squared"],
            "weighted_ean_sum": values["gated_norm"],
            "weighted_ean_sumsq": values["gated_norm_squared"],
            "weighted_expert_frequency_sum": values["gate"],
            "contrib_sum": values["contribution"],
            "ean_mean": self.mean("norm"),
            "reap": self.mean("gated_norm"),
            "reap_contrib": self.mean("contribution"),
            "reap_l2": np.sqrt(self.mean("gated_norm_squared")),
            "msan": self.mean("norm_squared"),
            "max_activations_signed": values["max_signed"],
            "max_abs_activation": values["max_absolute"],
        }
        return {"total_tokens": self.num_tokens} | {name: array.tolist() for name, array in fields.items()}


class Statistics(dict[str, LayerStatistics]):
    """Layer id -> sums; an associative, commutative merge."""

    def merge(self, other: Mapping[str, LayerStatistics]) -> Statistics:
        for layer, statistics in other.items():
            if layer not in self:
                self[layer] = LayerStatistics.zeros(statistics.num_experts)
            self[layer].add(statistics)
        return self

    @classmethod
    def merged(cls, parts: Iterable[Mapping[str, LayerStatistics]]) -> Statistics:
        """The sum of `parts`, in their order: float sums are then the same bits on every run."""
        total = cls()
        for part in parts:
            total.merge(part)
        return total

    def to_arrays(self) -> dict[str, Array]:
        """Flat name -> array, as numpy's npz wants them."""
        flat: dict[str, Array] = {}
        for layer, statistics in self.items():
            flat[f"{layer}/num_tokens"] = np.array([statistics.num_tokens], dtype=np.float64)
            for name, array in statistics.values.items():
                flat[f"{layer}/{name}"] = array
        return flat

    @classmethod
    def from_arrays(cls, flat: Mapping[str, Array]) -> Statistics:
        statistics = cls()
        for layer in dict.fromkeys(key.rsplit("/", 1)[0] for key in flat):
            values = {name: np.asarray(flat[f"{layer}/{name}"], dtype=np.float64) for name in FIELDS}
            statistics[layer] = LayerStatistics(int(flat[f"{layer}/num_tokens"][0]), values)
        return statistics
