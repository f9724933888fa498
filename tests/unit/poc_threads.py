"""A fleet on threads of this process instead of Ray: real controller, workers and ledger, distances from a hash."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sparkray.config.poc import TINY, WeightsConfig
from sparkray.poc.engine import Computed, batched
from sparkray.poc.fleet.controller import Controller, FleetLimits
from sparkray.poc.fleet.ledger import Ledger, read_cursors
from sparkray.poc.fleet.messages import (
    Ack,
    CheckChunk,
    GroupPlace,
    Run,
    WorkerHandle,
    WorkerLostError,
    WorkerReport,
)
from sparkray.poc.fleet.runner import FleetRunner
from sparkray.poc.fleet.worker import GroupWorker
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.phases import Phase

ResultT = TypeVar("ResultT")
WAIT_SECONDS = 30.0


def distance_of(nonce: int) -> float:
    """1 to 2, from the nonce alone."""
    return 1.0 + int.from_bytes(hashlib.sha256(str(nonce).encode()).digest()[:4], "big") / 2**32


class CountingEngine:
    """An engine whose distances follow from the nonce; it tells which key it was asked for."""

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size
        self.seen: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def stream(self, public_key: str, nonces: Iterable[int]) -> Generator[Computed]:
        for batch in batched(nonces, self.batch_size):
            assert self.gate.wait(WAIT_SECONDS)
            time.sleep(0.002)
            self.seen += batch
            yield Computed(batch, np.array([distance_of(nonce) for nonce in batch]))

    def distances(self, public_key: str, nonces: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        assert self.gate.wait(WAIT_SECONDS)
        self.seen += nonces
        return np.array([distance_of(nonce) for nonce in nonces])


class LocalHandle:
    """A worker of this process; `kill` makes it answer like a dead actor."""

    def __init__(self, worker: GroupWorker, engine: CountingEngine) -> None:
        self.worker = worker
        self.engine = engine
        self.alive = True
        self.ended = False
        self._calls = ThreadPoolExecutor(4)
        worker.start()

    def set_phase(self, phase: Phase, generation: int) -> Future[Ack]:
        return self._call(lambda: self.worker.set_phase(phase, generation))

    def collect(self, committed: int) -> Future[WorkerReport]:
        return self._call(lambda: self.worker.collect(committed))

    def check(self, chunks: tuple[CheckChunk, ...]) -> Future[None]:
        return self._call(lambda: self.worker.check(chunks))

    def end(self) -> None:
        self.ended = True
        self.kill()

    def kill(self) -> None:
        self.alive = False
        self.engine.gate.set()
        self._calls.submit(self.worker.set_phase, Phase.STOP, 10**9)

    def _call(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        def answer() -> ResultT:
            if not self.alive:
                raise WorkerLostError("it was killed")
            result = work()
            if not self.alive:
                raise WorkerLostError("it was killed while it answered")
            return result

        return self._calls.submit(answer)


class Fleet:
    """A controller over local workers."""

    def __init__(self, tmp_path: Path, run: Run, num_groups: int, ledger: Ledger | None = None, **limits: Any) -> None:
        self.path = tmp_path / "ledger.sqlite"
        self.ledger = ledger or Ledger(self.path)
        self.handles: list[LocalHandle] = []
        self.places: list[GroupPlace] = []
        bounds = FleetLimits(**{"poll_seconds": 0.01, **limits})
        self.controller = Controller(run, num_groups, self.ledger, self._launch, bounds)
        self.runner = FleetRunner(self.controller)

    def _launch(self, run: Run, place: GroupPlace, phase: Phase, generation: int) -> WorkerHandle:
        engine = CountingEngine()
        self.places.append(place)
        self.handles.append(LocalHandle(GroupWorker(run, place, phase, generation, lambda: engine, 8), engine))
        return self.handles[-1]

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(delivery.body) for delivery in self.ledger.due(time.time(), 100_000)]

    def received(self) -> list[int]:
        return [nonce for body in self.bodies() for nonce in body["nonces"]]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def make_run(**changes: Any) -> Run:
    values = {
        "block_hash": "0x1", "block_height": 7, "public_key": "key", "r_target": 2.5, "fraud_threshold": 0.01,
        "params": TINY, "weights": WeightsConfig(), "node_id": 1, "node_count": 3, "url": "http://host",
    }  # fmt: skip
    return Run(**{**values, **changes})


def of_cursors(path: Path, run: Run) -> list[int]:
    """The nonces that the recorded cursors say are done."""
    return [
        nonce
        for _, group_id, num_groups, cursor in read_cursors(path)
        for nonce in NonceIterator(run.node_id, run.node_count, group_id, num_groups).take(cursor)
    ]
