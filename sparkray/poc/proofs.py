"""Proofs: batches of nonces with their distances, as the network sends them.

Field names are the wire's. A batch may hold anything that its sender wrote, NaN and duplicates included: what is
acceptable is said nonce by nonce in `screening`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Self

from sparkray.errors import InputError
from sparkray.poc.statistics import P_MISMATCH, binomial_tail


@dataclass(frozen=True, slots=True)
class ProofBatch:
    """Nonces of one key and block with their distances, pairwise in order."""

    public_key: str
    block_hash: str
    block_height: int
    nonces: tuple[int, ...]
    dist: tuple[float, ...]
    node_id: int

    def __post_init__(self) -> None:
        if len(self.nonces) != len(self.dist):
            raise InputError(
                f"{len(self.nonces)} nonces and {len(self.dist)} distances were given, and one distance a nonce"
                " is expected.",
                param="dist",
            )

    def __len__(self) -> int:
        return len(self.nonces)

    @classmethod
    def empty(cls) -> ProofBatch:
        """A batch of nothing, as merging nothing gives."""
        return ProofBatch("", "", -1, (), (), -1)

    @property
    def identity(self) -> tuple[str, str, int]:
        """What two batches must share to be merged: key, block hash, block height."""
        return self.public_key, self.block_hash, self.block_height

    def sub_batch(self, r_target: float) -> ProofBatch:
        """The nonces whose distance is below `r_target`."""
        return self._pick(index for index, distance in enumerate(self.dist) if distance < r_target)

    def split(self, max_nonces: int) -> list[ProofBatch]:
        """Neighbouring batches of at most `max_nonces`; an empty batch gives none."""
        if max_nonces < 1:
            raise InputError(f"a split into batches of {max_nonces} was asked for, and 1 or more is accepted.")
        return [
            self._pick(range(start, min(start + max_nonces, len(self)))) for start in range(0, len(self), max_nonces)
        ]

    def sort_by_nonce(self) -> ProofBatch:
        """The same proofs, the smallest nonce first."""
        return self._pick(sorted(range(len(self)), key=self.nonces.__getitem__))

    @staticmethod
    def merge(batches: Iterable[ProofBatch]) -> ProofBatch:
        """One batch of all; its node is the first one's.

        Raises:
            InputError: batches of different keys, block hashes or heights.
        """
        parts = list(batches)
        if not parts:
            return ProofBatch.empty()
        first = parts[0]
        for part in parts:
            if part.identity != first.identity:
                raise InputError(
                    f"batches of {first.identity} and {part.identity} were to be merged, and one key, block hash"
                    " and height are expected.",
                    hint="Use merge_by_public_key for mixed ones.",
                )
        nonces = tuple(nonce for part in parts for nonce in part.nonces)
        return replace(first, nonces=nonces, dist=tuple(distance for part in parts for distance in part.dist))

    @staticmethod
    def merge_by_public_key(batches: Iterable[ProofBatch]) -> list[ProofBatch]:
        """One batch for each key, block hash and height, in that order."""
        ordered = sorted(batches, key=lambda batch: batch.identity)
        return [ProofBatch.merge(same) for _, same in groupby(ordered, key=lambda batch: batch.identity)]

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Self:
        """Read a JSON body; extra keys are ignored.

        Raises:
            InputError: a key is missing or not of its type.
        """
        try:
            return cls(
                public_key=_text(body, "public_key"),
                block_hash=_text(body, "block_hash"),
                block_height=_integer(body["block_height"], "block_height"),
                nonces=tuple(_integer(nonce, "nonces") for nonce in body["nonces"]),
                dist=tuple(float(distance) for distance in body["dist"]),
                node_id=_integer(body["node_id"], "node_id"),
            )
        except KeyError as missing:
            raise InputError(f"a proof batch without {missing} was given.", param=str(missing.args[0])) from missing
        except (TypeError, ValueError) as failure:
            raise InputError(f"a proof batch could not be read: {failure}.") from failure

    def to_wire(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "public_key": self.public_key,
            "block_hash": self.block_hash,
            "block_height": self.block_height,
            "nonces": list(self.nonces),
            "dist": list(self.dist),
            "node_id": self.node_id,
        }

    def _pick(self, indices: Iterable[int]) -> ProofBatch:
        chosen = list(indices)
        return replace(
            self,
            nonces=tuple(self.nonces[index] for index in chosen),
            dist=tuple(self.dist[index] for index in chosen),
        )


@dataclass(frozen=True, slots=True)
class ValidatedBatch:
    """A batch after it was computed again, with the network's verdict.

    Attributes:
        batch: the nonces with the distances that the verifier computed.
        received_dist: the distances that were claimed.
        n_invalid: nonces whose computed distance is above `r_target`.
        probability_honest: P(at least n_invalid mismatches) of an honest worker.
        fraud_detected: whether that is below `fraud_threshold`.
    """

    batch: ProofBatch
    received_dist: tuple[float, ...]
    r_target: float
    fraud_threshold: float
    n_invalid: int
    probability_honest: float
    fraud_detected: bool

    @classmethod
    def judge(
        cls,
        batch: ProofBatch,
        received_dist: tuple[float, ...],
        r_target: float,
        fraud_threshold: float,
        p_mismatch: float = P_MISMATCH,
    ) -> ValidatedBatch:
        """The binomial test on computed distances; an empty batch is honest."""
        n_invalid = sum(distance > r_target for distance in batch.dist)
        probability = binomial_tail(n_invalid, len(batch), p_mismatch)
        return cls(
            batch, received_dist, r_target, fraud_threshold, n_invalid, probability, probability < fraud_threshold
        )

    def to_wire(self) -> dict[str, Any]:
        """The JSON body of the `/validated` callback."""
        return {
            **self.batch.to_wire(),
            "received_dist": list(self.received_dist),
            "r_target": self.r_target,
            "fraud_threshold": self.fraud_threshold,
            "n_invalid": self.n_invalid,
            "probability_honest": self.probability_honest,
            "fraud_detected": self.fraud_detected,
        }


@dataclass(slots=True)
class InValidation:
    """A received batch on its way through validation; computed parts may come in any order.

    Attributes:
        batch: what was received; its nonces are distinct (see `screening`).
        deadline: time, on the caller's clock, after which a missing part means failure.
        computed: distance by nonce, so far.
    """

    batch: ProofBatch
    deadline: float
    computed: dict[int, float] = field(default_factory=dict)

    def process(self, part: ProofBatch) -> None:
        """Take distances computed for this batch's key, block hash and height; others are not ours."""
        if part.identity != self.batch.identity:
            return
        wanted = set(self.batch.nonces)
        self.computed.update(
            (nonce, distance) for nonce, distance in zip(part.nonces, part.dist, strict=True) if nonce in wanted
        )

    @property
    def is_ready(self) -> bool:
        return all(nonce in self.computed for nonce in self.batch.nonces)

    def is_expired(self, now: float) -> bool:
        """Whether the deadline passed with parts still missing."""
        return now >= self.deadline and not self.is_ready

    @property
    def missing(self) -> tuple[int, ...]:
        """Nonces without a computed distance."""
        return tuple(nonce for nonce in self.batch.nonces if nonce not in self.computed)

    def validated(self, r_target: float, fraud_threshold: float) -> ValidatedBatch:
        """The verdict once every nonce is computed.

        Raises:
            InputError: some are missing.
        """
        if not self.is_ready:
            raise InputError(f"{len(self.missing)} of {len(self.batch)} nonces are not computed yet.")
        computed = replace(self.batch, dist=tuple(self.computed[nonce] for nonce in self.batch.nonces))
        return ValidatedBatch.judge(computed, self.batch.dist, r_target, fraud_threshold)


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body[key]
    if not isinstance(value, str):
        raise InputError(f"{key}={value!r} was given, and a text is expected.", param=key)
    return value


def _integer(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{key} holds {value!r}, and whole numbers are expected.", param=key)
    return value
