"""The metrics of METIS: their definitions as data, and how a finished trace is added up.

The entropies of a trace enter their histogram as one count a bucket, not as one observation a token: an observation
costs about 3 microseconds of the serving process, so a trace of 8,000 tokens would hold it up for 25 ms, and adding
up costs the same for any length. Ray's Histogram takes single observations only, so that histogram is a counter with
the label `le`, which PromQL's `histogram_quantile` reads like any other; the mean entropy of a trace is one
observation, and a Ray Histogram.

Shapes: T tokens of one trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricDefinition:
    """One metric. Ray exposes it as `ray_<name>`, a counter as `ray_<name>_total`."""

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exposed_names(self) -> tuple[str, ...]:
        """The names under which Prometheus finds it."""
        if self.kind == "histogram":
            return tuple(f"ray_{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}",)


# Upper ends in bits; a vocabulary of 49,152 tokens ends at log2(49152) = 15.6.
ENTROPY_BOUNDARIES_BITS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
BUCKET_LABELS = (*(f"{boundary:g}" for boundary in ENTROPY_BOUNDARIES_BITS), "+Inf")

_BY = ("model", "detector")
TRACES = MetricDefinition("sparkray_metis_traces", "counter", "Watched requests that ended.", (*_BY, "finish_reason"))
TOKENS = MetricDefinition("sparkray_metis_tokens", "counter", "Tokens of watched requests.", _BY)
ALARMS = MetricDefinition("sparkray_metis_alarms", "counter", "Tokens at which the detector alarmed.", (*_BY, "action"))
BOOSTS = MetricDefinition("sparkray_metis_boosts", "counter", "Times that the chain-of-thought boost set in.", _BY)
ENTROPY_BUCKETS = MetricDefinition(
    "sparkray_metis_entropy_bits_bucket", "counter", "Tokens with an entropy of at most `le` bits.", (*_BY, "le")
)
ENTROPY_SUM = MetricDefinition("sparkray_metis_entropy_bits_sum", "counter", "Sum of token entropies, in bits.", _BY)
MEAN_ENTROPY = MetricDefinition(
    "sparkray_metis_mean_entropy_bits", "histogram", "Mean token entropy of a trace.", _BY, ENTROPY_BOUNDARIES_BITS
)
ACTIVE_TRACES = MetricDefinition("sparkray_metis_active_traces", "gauge", "Watched requests that run now.")

DEFINITIONS = (TRACES, TOKENS, ALARMS, BOOSTS, ENTROPY_BUCKETS, ENTROPY_SUM, MEAN_ENTROPY, ACTIVE_TRACES)


@dataclass(frozen=True, slots=True)
class TraceTally:
    """What one trace adds to the metrics.

    Attributes:
        num_tokens: tokens recorded.
        num_at_most: for each of `BUCKET_LABELS` the tokens with at most that entropy; the last counts all that have
            one.
        entropy_sum_bits: sum over the tokens that have an entropy.
        num_alarms: tokens by the detector's action, without the ones it let pass.
        num_boosts: times that the boost set in.
    """

    num_tokens: int
    num_at_most: tuple[int, ...]
    entropy_sum_bits: float
    num_alarms: Mapping[str, int]
    num_boosts: int

    @property
    def mean_entropy_bits(self) -> float | None:
        """None where no token has an entropy."""
        return self.entropy_sum_bits / self.num_at_most[-1] if self.num_at_most[-1] else None


def tally(
    entropy_T: ArrayLike, action_T: ArrayLike, boosted_T: ArrayLike, action_names: Mapping[int, str]
) -> TraceTally:
    """Add one trace up, in a few vector operations whatever its length.

    Args:
        entropy_T: bits; NaN where a token has none.
        action_T: the detector's verdicts.
        boosted_T: 0 or 1, whether the boost was added at that token.
        action_names: the verdicts that count as alarms, with their names.
    """
    entropies: NDArray[np.float64] = np.asarray(entropy_T, dtype=np.float64)
    actions, boosted = np.asarray(action_T), np.asarray(boosted_T, dtype=bool)
    known = np.sort(entropies[~np.isnan(entropies)])
    at_most = np.searchsorted(known, ENTROPY_BOUNDARIES_BITS, side="right")
    num_alarms = {name: int((actions == action).sum()) for action, name in action_names.items()}
    num_boosts = int((boosted[1:] & ~boosted[:-1]).sum() + boosted[:1].sum())
    return TraceTally(
        num_tokens=entropies.size,
        num_at_most=(*(int(count) for count in at_most), known.size),
        entropy_sum_bits=float(known.sum()),
        num_alarms={name: count for name, count in num_alarms.items() if count},
        num_boosts=num_boosts,
    )
