"""Judging a received batch: the network's test, and three that see more.

The network counts nonces whose recomputed distance is above the target and asks whether an honest worker would
have that many. Here the claimed distance must also agree with the recomputed one within the noise that was
measured between two machines, proofs are screened one by one, and a sequential test stops as soon as its error
rates are met instead of after a fixed number of nonces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

import numpy as np
import numpy.typing as npt

from sparkray.errors import InputError
from sparkray.poc.proofs import ProofBatch, ValidatedBatch
from sparkray.poc.screening import Screened, screen
from sparkray.poc.statistics import Decision, SequentialTest

Distances = Callable[[str, Sequence[int]], npt.NDArray[np.float64]]

# Float16 on one side at the V1 preset: 1.9e-5 measured against float32.
DEFAULT_NOISE_SD = 1.9e-5
BAND_SIGMAS = 6.0
MIN_NOISE_PAIRS = 16


@dataclass(frozen=True, slots=True)
class NoiseBand:
    """How far two honest machines may be apart.

    Attributes:
        sd: standard deviation of the difference of their distances.
        sigmas: half width of the band, in standard deviations.
    """

    sd: float = DEFAULT_NOISE_SD
    sigmas: float = BAND_SIGMAS

    @classmethod
    def measure(cls, first: Sequence[float], second: Sequence[float], sigmas: float = BAND_SIGMAS) -> Self:
        """From the distances of the same nonces by two trusted machines.

        Raises:
            InputError: fewer than 16 pairs, or not pairs.
        """
        if len(first) != len(second) or len(first) < MIN_NOISE_PAIRS:
            raise InputError(
                f"{len(first)} and {len(second)} distances were given, and {MIN_NOISE_PAIRS} pairs or more are needed."
            )
        differences = np.asarray(first) - np.asarray(second)
        # Machines of the same kind may agree to the bit; float64 rounding is the floor of any band.
        return cls(max(float(np.sqrt(np.square(differences).mean())), 1e-9), sigmas)

    @property
    def half_width(self) -> float:
        return self.sd * self.sigmas

    def contains(self, received: float, computed: float) -> bool:
        """Whether the two may be of one nonce, honestly computed."""
        return abs(received - computed) <= self.half_width


@dataclass(frozen=True, slots=True)
class Validation:
    """Everything that is known about a received batch.

    Attributes:
        screened: what was refused before computing, and why.
        verdict: the network's own, on the accepted proofs that were computed.
        outside_band: nonces whose claimed distance is not the computed one.
        decision: of the sequential test over mismatches of either kind.
        num_computed: nonces that were computed before the decision.
    """

    screened: Screened
    verdict: ValidatedBatch
    outside_band: tuple[int, ...]
    decision: Decision
    num_computed: int

    @property
    def is_fraud(self) -> bool:
        """Whether either test says so."""
        return self.verdict.fraud_detected or self.decision is Decision.FRAUD


def validate(
    batch: ProofBatch,
    distances: Distances,
    *,
    r_target: float,
    fraud_threshold: float,
    band: NoiseBand,
    block_hash: str | None = None,
    node_count: int | None = None,
    test: SequentialTest | None = None,
    chunk_size: int | None = None,
) -> Validation:
    """Screen a batch, compute it again and judge it.

    Args:
        distances: gives distances of nonces for a public key, such as `Engine.distances`.
        band: noise between the sender's machine and this one.
        test: the sequential test to use; default error rates where None.
        chunk_size: nonces to compute between two looks at the sequential test; None computes all of them.
    """
    screened = screen(batch, r_target=r_target, block_hash=block_hash, node_count=node_count)
    accepted = screened.accepted
    test = test or SequentialTest()
    computed: list[float] = []
    outside: list[int] = []
    for indices in _chunks(len(accepted), chunk_size):
        nonces = tuple(accepted.nonces[index] for index in indices)
        found = tuple(distances(batch.public_key, nonces).tolist())
        claimed = [accepted.dist[index] for index in indices]
        computed += found
        outside += compare_distances(replace(accepted, nonces=nonces, dist=found), claimed, r_target, band, test)
        if chunk_size is not None and test.decision is not Decision.CONTINUE:
            break
    count = len(computed)
    recomputed = replace(accepted, nonces=accepted.nonces[:count], dist=tuple(computed))
    verdict = ValidatedBatch.judge(recomputed, accepted.dist[:count], r_target, fraud_threshold)
    return Validation(screened, verdict, tuple(outside), test.decision, count)


def compare_distances(
    computed: ProofBatch, received_dist: Sequence[float], r_target: float, band: NoiseBand, test: SequentialTest
) -> list[int]:
    """Nonces whose claimed distance is outside of the band; `test` observes every mismatch of either kind."""
    outside = []
    for nonce, distance, received in zip(computed.nonces, computed.dist, received_dist, strict=True):
        agrees = band.contains(received, distance)
        if not agrees:
            outside.append(nonce)
        test.observe(distance > r_target + band.half_width or not agrees)
    return outside


def _chunks(count: int, size: int | None) -> Iterator[list[int]]:
    indices = iter(range(count))
    while chunk := list(islice(indices, size or max(1, count))):
        yield chunk
