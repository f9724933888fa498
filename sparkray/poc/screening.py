"""What a received batch may contain. Each proof is accepted or refused for itself, with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from sparkray.errors import InputError
from sparkray.poc.proofs import ProofBatch

MAX_NONCE = 2**63 - 1


class Reason(StrEnum):
    """Why a proof is refused before anything is computed."""

    NOT_A_DISTANCE = "the distance is not a number from 0 to 2"
    NOT_BELOW_TARGET = "the distance is not below r_target"
    NOT_A_NONCE = "the nonce is negative or above 2^63 - 1"
    DUPLICATE = "the nonce was already given"
    OTHER_NODE = "the nonce belongs to another node"


@dataclass(frozen=True, slots=True)
class Screened:
    """A received batch, sorted out.

    Attributes:
        accepted: proofs worth computing again, their nonces distinct.
        rejected: reason by index in the received batch.
    """

    accepted: ProofBatch
    rejected: Mapping[int, Reason]


def screen(
    batch: ProofBatch, *, r_target: float, block_hash: str | None = None, node_count: int | None = None
) -> Screened:
    """Sort out the proofs of a batch.

    Args:
        r_target: claimed distances must be below.
        block_hash: the block that is being validated; None accepts any.
        node_count: where given, nonces must be of the class `batch.node_id` modulo this.

    Raises:
        InputError: the batch as a whole is of another block, names an impossible node, or r_target is not positive.
    """
    if not r_target > 0.0 or not math.isfinite(r_target):
        raise InputError(f"r_target={r_target} was given, and a number above 0 is expected.", param="r_target")
    if block_hash is not None and batch.block_hash != block_hash:
        raise InputError(
            f"the batch is of block {batch.block_hash!r}, and block {block_hash!r} is being validated.",
            param="block_hash",
        )
    if node_count is not None and not 0 <= batch.node_id < node_count:
        raise InputError(f"node_id={batch.node_id} was given, and 0 to {node_count - 1} is accepted.", param="node_id")
    rejected: dict[int, Reason] = {}
    seen: set[int] = set()
    for index, (nonce, distance) in enumerate(zip(batch.nonces, batch.dist, strict=True)):
        reason = _reason(nonce, distance, r_target, seen, batch.node_id, node_count)
        if reason is None:
            seen.add(nonce)
        else:
            rejected[index] = reason
    kept = [index for index in range(len(batch)) if index not in rejected]
    accepted = replace(
        batch,
        nonces=tuple(batch.nonces[index] for index in kept),
        dist=tuple(batch.dist[index] for index in kept),
    )
    return Screened(accepted, rejected)


def _reason(
    nonce: int, distance: float, r_target: float, seen: set[int], node_id: int, node_count: int | None
) -> Reason | None:
    if not 0 <= nonce <= MAX_NONCE:
        return Reason.NOT_A_NONCE
    if node_count is not None and nonce % node_count != node_id:
        return Reason.OTHER_NODE
    if nonce in seen:
        return Reason.DUPLICATE
    if not 0.0 <= distance <= 2.0:
        return Reason.NOT_A_DISTANCE
    if not distance < r_target:
        return Reason.NOT_BELOW_TARGET
    return None
