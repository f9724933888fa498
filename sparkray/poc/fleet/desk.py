"""Received batches on their way to a verdict: screened proof by proof, computed again, judged, answered.

A proof that cannot be right is refused by itself with its reason; the network's fraud test judges the others. A
batch of which more than half is refused is called fraud, or nothing but nonsense would pass as an empty batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparkray.errors import BusyError
from sparkray.poc.fleet.messages import CheckedChunk, Run
from sparkray.poc.fleet.work_pool import WorkPool
from sparkray.poc.proofs import InValidation, ProofBatch, ValidatedBatch
from sparkray.poc.screening import Screened, screen
from sparkray.poc.statistics import SequentialTest
from sparkray.poc.validation import NoiseBand, compare_distances


@dataclass(frozen=True, slots=True)
class Receipt:
    """A received batch and the key of its answer."""

    key: str
    screened: Screened
    validation: InValidation


@dataclass(slots=True)
class ValidationDesk:
    """All batches of one run that have no verdict yet.

    Attributes:
        max_batches: of them, at most.
        deadline_seconds: after which a batch without a verdict is answered as not judged.
        band: noise between honest machines, for what the answer says beyond the network's verdict.
    """

    run: Run
    pool: WorkPool
    max_batches: int
    deadline_seconds: float
    band: NoiseBand = field(default_factory=NoiseBand)
    _open: list[Receipt] = field(default_factory=list)

    @property
    def num_open(self) -> int:
        """Batches without a verdict."""
        return len(self._open)

    def receive(self, key: str, batch: ProofBatch, chunk_size: int, now: float, node_count: int | None = None) -> None:
        """Take a batch.

        Args:
            key: names the answer.
            node_count: of the sender, where it is known: its nonces must then be of its class.

        Raises:
            InputError: the batch as a whole cannot be validated here (another block, an impossible node).
            BusyError: too much is waiting.
        """
        if len(self._open) >= self.max_batches:
            raise BusyError(
                f"{len(self._open)} batches wait for their verdict, and {self.max_batches} are allowed.",
                hint="Send it again later.",
            )
        screened = screen(batch, r_target=self.run.r_target, block_hash=self.run.block_hash, node_count=node_count)
        self.pool.put(batch.public_key, screened.accepted.nonces, chunk_size)
        validation = InValidation(screened.accepted, now + self.deadline_seconds)
        self._open.append(Receipt(key, screened, validation))

    def take(self, group_id: int, checked: CheckedChunk) -> None:
        """A group computed a chunk."""
        chunk = self.pool.done(group_id, checked.chunk_id)
        if chunk is None:
            return
        for receipt in self._open:
            batch = receipt.validation.batch
            if batch.public_key == chunk.public_key:
                part = ProofBatch(*batch.identity[:2], batch.block_height, chunk.nonces, checked.dist, batch.node_id)
                receipt.validation.process(part)

    def answers(self, now: float) -> list[tuple[Receipt, dict[str, Any]]]:
        """Batches that are done or too late, with the bodies of their callbacks; `close` them once recorded."""
        return [
            (receipt, verdict_body(self.run, receipt, self.band))
            for receipt in self._open
            if receipt.validation.is_ready or receipt.validation.is_expired(now)
        ]

    def close(self, receipt: Receipt) -> None:
        """The answer is recorded."""
        self._open.remove(receipt)


def verdict_body(run: Run, receipt: Receipt, band: NoiseBand) -> dict[str, Any]:
    """The callback's body: the network's ValidatedBatch and, beyond it, what sees more.

    `n_outside_band` counts claimed distances that are not the computed ones within the noise, `sequential_test` is
    the decision over mismatches of either kind, and `rejected` says what was refused, where something was. The
    network's own `fraud_detected` is its own test, and half of a batch refused.
    """
    validation, rejected = receipt.validation, receipt.screened.rejected
    if validation.is_ready:
        judged = validation.validated(run.r_target, run.fraud_threshold)
        test = SequentialTest()
        outside = compare_distances(judged.batch, judged.received_dist, run.r_target, band, test)
        body = judged.to_wire() | {"n_outside_band": len(outside), "sequential_test": test.decision.value}
    else:
        # -1 is the network's own mark of a batch that was not judged.
        unjudged = ValidatedBatch(
            validation.batch, validation.batch.dist, run.r_target, run.fraud_threshold, -1, -1.0, False
        )
        body = unjudged.to_wire() | {"error": f"{len(validation.missing)} nonces were not computed in time"}
    if rejected:
        body["rejected"] = [{"index": index, "reason": reason.value} for index, reason in sorted(rejected.items())]
        body["fraud_detected"] = body["fraud_detected"] or len(rejected) > len(validation.batch)
    return body
