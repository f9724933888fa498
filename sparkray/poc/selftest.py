"""Is this machine computing what it should? The share of valid nonces must be the one that theory gives.

A broken kernel, a wrong weight or a stuck input shows as a share that honest noise does not explain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparkray.poc.statistics import share_z_score, valid_share

ALARM_SIGMAS = 5.0


@dataclass(slots=True)
class ShareMonitor:
    """Counts nonces and compares the valid ones with theory.

    Attributes:
        r_target: a nonce is valid below it.
        vocab_size: dimensions of the logits.
    """

    r_target: float
    vocab_size: int
    num_valid: int = field(default=0)
    num_total: int = field(default=0)

    def add(self, num_valid: int, num_total: int) -> None:
        """Count a batch."""
        self.num_valid += num_valid
        self.num_total += num_total

    @property
    def expected_share(self) -> float:
        return valid_share(self.r_target, self.vocab_size)

    @property
    def observed_share(self) -> float:
        return self.num_valid / self.num_total if self.num_total else 0.0

    @property
    def z_score(self) -> float:
        """Standard deviations between the two; 0 before the first nonce."""
        return share_z_score(self.num_valid, self.num_total, self.r_target, self.vocab_size) if self.num_total else 0.0

    @property
    def alarm(self) -> bool:
        """Beyond 5 sigma, once so many nonces are counted that the normal law holds for them."""
        expected = self.num_total * min(self.expected_share, 1.0 - self.expected_share)
        # With r_target above 2 every nonce is valid: a single one that is not is proof enough.
        return (expected >= 10.0 or self.expected_share in (0.0, 1.0)) and abs(self.z_score) > ALARM_SIGMAS
