"""Servers against each other: the same nonces, how far apart their distances are, and what that means for verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from sparkray.poc.statistics import mismatch_probability
from sparkray.poc.validation import NoiseBand


@dataclass(frozen=True, slots=True)
class ServerResult:
    """What one server did.

    Attributes:
        groups: device indices of each group that its devices make.
        repeats_equal: whether a second pass, in another batch size, gave the same bits.
        peak_memory_gib: of the process and of its device.
    """

    server: str
    device: str
    groups: tuple[tuple[int, ...], ...]
    init_seconds: float
    raw_per_minute: float
    batch_size: int
    peak_memory_gib: float
    repeats_equal: bool
    dist: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """Without the distances."""
        return {key: value for key, value in asdict(self).items() if key != "dist"}


def cross_check(
    results: Sequence[ServerResult], nonces: Sequence[int], r_target: float, vocab_size: int
) -> dict[str, Any]:
    """Every pair of servers compared.

    Returns:
        `servers`: rates, memory and grouping; `pairs`: noise between two, the share of honest nonces that it would
        turn invalid, and the nonces whose verdict changed; `same_verdicts`: whether there are none.
    """
    pairs = [_pair(first, second, nonces, r_target, vocab_size) for first, second in combinations(results, 2)]
    return {
        "servers": [result.row() for result in results],
        "pairs": pairs,
        "num_nonces": len(nonces),
        "same_verdicts": not any(pair["changed_verdicts"] for pair in pairs),
        "raw_per_minute": sum(result.raw_per_minute for result in results),
    }


def _pair(
    first: ServerResult, second: ServerResult, nonces: Sequence[int], r_target: float, vocab_size: int
) -> Mapping[str, Any]:
    one, other = np.asarray(first.dist), np.asarray(second.dist)
    noise = NoiseBand.measure(first.dist, second.dist).sd
    changed = np.flatnonzero((one < r_target) != (other < r_target))
    return {
        "servers": [first.server, second.server],
        "noise_sd": noise,
        "largest_difference": float(np.abs(one - other).max()),
        "same_bits": bool((one == other).all()),
        "p_mismatch": mismatch_probability(noise, r_target, vocab_size),
        "changed_verdicts": [nonces[index] for index in changed],
    }
