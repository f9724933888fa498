"""One GPU group: a thread that computes what the phase says, between bounded buffers.

Generated parts stay here until the controller says that they are recorded, so a lost answer costs nothing, and a
full buffer stops the computation instead of growing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sparkray.errors import BusyError, WaitTimeoutError
from sparkray.poc.engine import Computed
from sparkray.poc.fleet.messages import Ack, CheckChunk, CheckedChunk, GeneratedPart, GroupPlace, Run, WorkerReport
from sparkray.poc.phases import Phase

MAX_BUFFERED_BATCHES = 64
MAX_WAITING_CHUNKS = 4
ACK_TIMEOUT_SECONDS = 120.0


class Computes(Protocol):
    """What a worker needs of an engine."""

    batch_size: int

    def stream(self, public_key: str, nonces: Iterable[int]) -> Generator[Computed]: ...

    def distances(self, public_key: str, nonces: Sequence[int]) -> npt.NDArray[np.float64]: ...


class GroupWorker:
    """Computes for one run; all methods may be called from any thread.

    Args:
        place: the group's share, with the cursor to go on from.
        make_engine: called once, in the worker's own thread, since it takes seconds to a minute.
        max_buffered: batches computed and not recorded yet, at most.
    """

    def __init__(
        self,
        run: Run,
        place: GroupPlace,
        phase: Phase,
        generation: int,
        make_engine: Callable[[], Computes],
        max_buffered: int = MAX_BUFFERED_BATCHES,
    ) -> None:
        self._run = run
        self._place = place
        self._make_engine = make_engine
        self._max_buffered = max_buffered
        self._changed = threading.Condition()
        self._wanted = (phase, generation)
        self._acked = generation
        self._loaded = False
        self._failure: str | None = None
        self._cursor = place.cursor
        self._generated: deque[GeneratedPart] = deque()
        self._waiting: deque[CheckChunk] = deque()
        self._checked: dict[int, CheckedChunk] = {}
        self._num_computed = 0
        self._batch_size = 0
        self._thread = threading.Thread(target=self._work, name=f"poc-group-{place.group_id}", daemon=True)

    def start(self) -> None:
        """Load, then work as the phase says."""
        self._thread.start()

    def set_phase(self, phase: Phase, generation: int, timeout_seconds: float = ACK_TIMEOUT_SECONDS) -> Ack:
        """Change the phase, and return when nothing of the earlier one is computed any more.

        A generation at or below the current one is an echo and changes nothing.

        Raises:
            WaitTimeoutError: the batch in hand was not done in time; the change stays ordered.
        """
        with self._changed:
            if generation > self._wanted[1]:
                self._wanted = (phase, generation)
                self._changed.notify_all()
            if not self._changed.wait_for(self._is_acked, timeout_seconds):
                raise WaitTimeoutError(
                    f"group {self._place.group_id} did not finish its batch within {timeout_seconds:g} s."
                )
            return Ack(self._place.group_id, *self._wanted)

    def collect(self, committed: int) -> WorkerReport:
        """Everything since the cursor `committed`, which is recorded and forgotten here."""
        with self._changed:
            while self._generated and self._generated[0].stop <= committed:
                self._generated.popleft()
            generated = GeneratedPart.join(tuple(self._generated)) if self._generated else None
            checked = tuple(self._checked.values())
            self._checked.clear()
            self._changed.notify_all()
            return WorkerReport(
                self._place.group_id,
                self._loaded,
                generated,
                checked,
                len(self._waiting),
                self._num_computed,
                self._batch_size,
                self._failure,
            )

    def check(self, chunks: Sequence[CheckChunk]) -> None:
        """Compute these in the VALIDATE phase.

        Raises:
            BusyError: more than four chunks would wait.
        """
        with self._changed:
            if len(self._waiting) + len(chunks) > MAX_WAITING_CHUNKS:
                raise BusyError(f"group {self._place.group_id} has {len(self._waiting)} chunks waiting already.")
            self._waiting.extend(chunks)
            self._changed.notify_all()

    def _is_acked(self) -> bool:
        # A worker that loads, or failed to, computes nothing of any phase.
        return self._acked >= self._wanted[1] or not self._loaded

    def _work(self) -> None:
        try:
            engine = self._make_engine()
            with self._changed:
                self._loaded = True
                self._batch_size = engine.batch_size
            while (phase := self._take_phase()) is not Phase.STOP:
                if phase is Phase.GENERATE:
                    self._generate(engine)
                elif phase is Phase.VALIDATE:
                    self._validate(engine)
                else:
                    self._pause()
        except Exception as failure:  # the top of this thread: the controller is told instead of nobody
            with self._changed:
                self._failure = f"{type(failure).__name__}: {failure}"
                self._loaded = False
                self._changed.notify_all()

    def _take_phase(self) -> Phase:
        with self._changed:
            phase, self._acked = self._wanted
            self._changed.notify_all()
            return phase

    def _is_over(self) -> bool:
        return self._wanted[1] != self._acked

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(self._is_over)

    def _generate(self, engine: Computes) -> None:
        nonces = self._place.nonces(self._run, self._cursor)
        with closing(engine.stream(self._run.public_key, nonces)) as stream:
            for computed in stream:
                valid = np.flatnonzero(computed.dist < self._run.r_target)
                part = GeneratedPart(
                    self._place.group_id,
                    self._cursor,
                    self._cursor + len(computed.nonces),
                    tuple(computed.nonces[index] for index in valid),
                    tuple(computed.dist[valid].tolist()),
                )
                with self._changed:
                    self._cursor = part.stop
                    self._num_computed += len(computed.nonces)
                    self._generated.append(part)
                    self._changed.wait_for(lambda: len(self._generated) < self._max_buffered or self._is_over())
                    if self._is_over():
                        return

    def _validate(self, engine: Computes) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._is_over())
                if self._is_over():
                    return
                # Those of one key go in one stream, so that inputs of the next are made during this one.
                chunks = [self._waiting.popleft()]
                while self._waiting and self._waiting[0].public_key == chunks[0].public_key:
                    chunks.append(self._waiting.popleft())
            nonces = [nonce for chunk in chunks for nonce in chunk.nonces]
            dist = iter(engine.distances(chunks[0].public_key, nonces).tolist())
            with self._changed:
                for chunk in chunks:
                    self._checked[chunk.chunk_id] = CheckedChunk(chunk.chunk_id, tuple(islice(dist, len(chunk.nonces))))
                self._num_computed += len(nonces)
