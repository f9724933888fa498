"""What controller and workers tell each other; every message names its run, so one of an earlier run is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from sparkray.config.poc import ModelParams, WeightsConfig
from sparkray.errors import SparkrayError
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.phases import Phase


class WorkerLostError(SparkrayError):
    """The process behind a worker is gone, or cannot be reached any more."""


@dataclass(frozen=True, slots=True)
class Run:
    """One initialisation: what all groups compute until the next one.

    Attributes:
        node_id: residue class of this node's nonces; -1 where the run only validates.
        node_count: nodes that share the nonces; -1 where the run only validates.
    """

    block_hash: str
    block_height: int
    public_key: str
    r_target: float
    fraud_threshold: float
    params: ModelParams
    weights: WeightsConfig
    node_id: int = -1
    node_count: int = -1
    url: str = ""

    @property
    def may_generate(self) -> bool:
        """Whether the nonces to compute are known."""
        return self.node_id >= 0 and self.node_count >= 1

    @property
    def series(self) -> str:
        """Hash of everything that tells two series of nonces apart; runs of one series share their cursors."""
        parts = (
            self.block_hash, self.block_height, self.public_key, self.node_id, self.node_count,
            self.params.model_dump_json(), self.weights.label,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Which share of a node's nonces one group has.

    Attributes:
        cursor: nonces of this group that are done and recorded; the next one to compute.
    """

    group_id: int
    num_groups: int
    cursor: int = 0

    def nonces(self, run: Run, cursor: int) -> NonceIterator:
        """The group's nonces from `cursor` on."""
        return NonceIterator(run.node_id, run.node_count, self.group_id, self.num_groups, cursor)


@dataclass(frozen=True, slots=True)
class GeneratedPart:
    """Consecutive nonces of one group, `start` up to but without `stop` by its cursor.

    Attributes:
        nonces: the valid ones among them, with their distances in `dist`.
    """

    group_id: int
    start: int
    stop: int
    nonces: tuple[int, ...] = ()
    dist: tuple[float, ...] = ()

    @staticmethod
    def join(parts: Sequence[GeneratedPart]) -> GeneratedPart:
        """One part of neighbours, in their order; there is at least one."""
        return GeneratedPart(
            parts[0].group_id,
            parts[0].start,
            parts[-1].stop,
            tuple(nonce for part in parts for nonce in part.nonces),
            tuple(distance for part in parts for distance in part.dist),
        )


@dataclass(frozen=True, slots=True)
class CheckChunk:
    """Nonces of one key to compute again."""

    chunk_id: int
    public_key: str
    nonces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckedChunk:
    """Their distances, pairwise."""

    chunk_id: int
    dist: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ack:
    """A worker's word that it does nothing of an earlier phase any more."""

    group_id: int
    phase: Phase
    generation: int


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker has to tell when it is asked.

    Attributes:
        generated: everything computed since the cursor that was asked from; None where nothing was.
        checked: chunks that are done.
        num_waiting: chunks that are not.
        num_computed: nonces computed since the worker started, for either purpose.
        batch_size: nonces in a batch; 0 before it is loaded.
        failure: why it cannot work, where it cannot.
    """

    group_id: int
    loaded: bool
    generated: GeneratedPart | None = None
    checked: tuple[CheckedChunk, ...] = ()
    num_waiting: int = 0
    num_computed: int = 0
    batch_size: int = 0
    failure: str | None = field(default=None)


class WorkerHandle(Protocol):
    """A worker as the controller sees it. No call blocks; a future fails with WorkerLostError where it is gone."""

    def set_phase(self, phase: Phase, generation: int) -> Future[Ack]: ...

    def collect(self, committed: int) -> Future[WorkerReport]: ...

    def check(self, chunks: tuple[CheckChunk, ...]) -> Future[None]: ...

    def end(self) -> None:
        """Let it go; nothing that it has is needed any more."""


class Launch(Protocol):
    """Starts a worker; returns at once, and its first report says when it is there."""

    def __call__(self, run: Run, place: GroupPlace, phase: Phase, generation: int) -> WorkerHandle: ...
