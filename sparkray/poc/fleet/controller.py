"""Decides for all groups of a node: phases behind a barrier, cursors, restarts, and who validates what.

Nothing here blocks. `tick` looks at what has been answered, records it, and asks anew; it is called in a loop by
whoever owns the controller (see `runner`). Workers are reached through handles, so Ray is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sparkray.errors import SparkrayError, UnavailableError, WaitTimeoutError
from sparkray.poc.fleet.barrier import Barrier
from sparkray.poc.fleet.desk import ValidationDesk
from sparkray.poc.fleet.ledger import Ledger
from sparkray.poc.fleet.messages import Ack, GeneratedPart, GroupPlace, Launch, Run, WorkerHandle, WorkerReport
from sparkray.poc.fleet.work_pool import CHUNKS_HELD, WorkPool
from sparkray.poc.phases import Phase
from sparkray.poc.proofs import ProofBatch
from sparkray.poc.selftest import ShareMonitor
from sparkray.poc.validation import NoiseBand

_RESTART_SECONDS = 1.0
_MAX_RESTART_SECONDS = 30.0
# Groups hold a few chunks only, so while there are some they are asked more often.
_SHARE_WHILE_VALIDATING = 0.2


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """Bounds and intervals of a controller.

    Attributes:
        poll_seconds: between two looks at what workers report.
        max_unsent: callbacks in the outbox beyond which no more nonces are taken from the workers.
        max_batches: received batches without a verdict.
        max_chunks: pieces of them.
        deadline_seconds: until a verdict.
        band: noise between honest machines.
    """

    poll_seconds: float = 1.0
    max_unsent: int = 10_000
    max_batches: int = 1000
    max_chunks: int = 100_000
    deadline_seconds: float = 900.0
    band: NoiseBand = field(default_factory=NoiseBand)


@dataclass(slots=True)
class Seat:
    """One group's place at the table; the worker in it may change.

    Attributes:
        cursor: recorded nonces of the group.
        report: the worker's latest word; None until it has answered once.
        asked_at: when the worker was last asked.
        answered_of: when the question was asked that `report` answers.
        restart_at: when to launch the next worker, where there is none.
    """

    group_id: int
    cursor: int
    handle: WorkerHandle | None = None
    collecting: Future[WorkerReport] | None = None
    acking: Future[Ack] | None = None
    report: WorkerReport | None = None
    asked_at: float = 0.0
    answered_of: float = 0.0
    restart_at: float = 0.0
    num_launches: int = 0
    num_computed: int = 0
    last_failure: str | None = None

    @property
    def loaded(self) -> bool:
        return self.report is not None and self.report.loaded


@dataclass(slots=True)
class Controller:
    """All groups of one run.

    Attributes:
        run: what is computed.
        num_groups: groups that share the node's nonces.
        generation: rises with each phase; a word of an earlier one is known as such.
        wake: called from any thread when a phase was acknowledged, so that the owner need not wait.
        look_at: when to take reports next.
    """

    run: Run
    num_groups: int
    ledger: Ledger
    launch: Launch
    limits: FleetLimits = field(default_factory=FleetLimits)
    wake: Callable[[], None] = lambda: None
    phase: Phase = Phase.IDLE
    generation: int = 0
    barrier: Barrier | None = None
    ledger_error: str | None = None
    look_at: float = 0.0

    seats: list[Seat] = field(init=False)
    desk: ValidationDesk = field(init=False)
    monitor: ShareMonitor = field(init=False)

    def __post_init__(self) -> None:
        cursors = self.ledger.cursors(self.run.series, self.num_groups)
        self.seats = [Seat(group_id, cursor) for group_id, cursor in enumerate(cursors)]
        pool = WorkPool(self.limits.max_chunks)
        self.desk = ValidationDesk(
            self.run, pool, self.limits.max_batches, self.limits.deadline_seconds, self.limits.band
        )
        self.monitor = ShareMonitor(self.run.r_target, self.run.params.vocab_size)

    @property
    def all_loaded(self) -> bool:
        return all(seat.loaded for seat in self.seats)

    @property
    def any_loaded(self) -> bool:
        return any(seat.loaded for seat in self.seats)

    @property
    def num_computed(self) -> int:
        """Nonces computed by all workers that ever sat here, as far as they told."""
        return sum(seat.num_computed + (seat.report.num_computed if seat.report else 0) for seat in self.seats)

    def order(self, phase: Phase, now: float) -> Barrier:
        """Begin a phase. The barrier opens when every worker that answers has acknowledged it."""
        self.phase = phase
        self.generation += 1
        self.barrier = Barrier(phase, self.generation, now)
        for seat in self.seats:
            if seat.handle is None:
                continue
            if seat.report is not None:
                self.barrier.expect(seat.group_id)
            seat.acking = self._watched(seat.handle.set_phase(phase, self.generation))
        self.barrier.update(now)
        self.look_at_once()
        return self.barrier

    def receive(self, key: str, batch: ProofBatch, now: float, node_count: int | None = None) -> None:
        """Take a batch to validate; see `ValidationDesk.receive`."""
        sizes = [seat.report.batch_size for seat in self.seats if seat.report and seat.report.batch_size]
        self.desk.receive(key, batch, min(sizes, default=32), now, node_count)
        self.look_at_once()

    def tick(self, now: float) -> None:
        """Look at every answer, record what is new, ask again.

        Acknowledgements are taken at every call. Reports are taken together, once an interval: each look is one
        transaction and one callback, however many groups there are.
        """
        for seat in self.seats:
            self._take_ack(seat, now)
        if now < self.look_at:
            return
        is_validating = self.phase is Phase.VALIDATE and self.desk.pool.num_open
        self.look_at = now + self.limits.poll_seconds * (_SHARE_WHILE_VALIDATING if is_validating else 1.0)
        parts: list[GeneratedPart] = []
        for seat in self.seats:
            self._take_report(seat, parts, now)
        self._record(parts)
        self._answer(now)
        for seat in self.seats:
            self._seat_worker(seat, now)
            self._assign(seat)
            if seat.handle is not None and seat.collecting is None:
                seat.asked_at = now
                seat.collecting = seat.handle.collect(seat.cursor)

    def look_at_once(self) -> None:
        """Let the next tick take reports, however long ago the last one did."""
        self.look_at = 0.0

    @property
    def is_drained(self) -> bool:
        """Whether everything that the workers computed before the barrier opened is recorded."""
        if self.barrier is None or self.barrier.opened_at is None:
            return False
        opened_at = self.barrier.opened_at
        return all(
            seat.handle is None
            or seat.report is None
            or (seat.report.generated is None and seat.answered_of >= opened_at)
            for seat in self.seats
        )

    def end(self) -> None:
        """Let every worker go."""
        for seat in self.seats:
            if seat.handle is not None:
                seat.handle.end()
                seat.handle = None

    def summary(self) -> dict[str, Any]:
        """How far everything is, as plain values."""
        loaded = [seat for seat in self.seats if seat.loaded]
        failures = {str(seat.group_id): seat.last_failure for seat in self.seats if seat.last_failure}
        return {
            "num_groups": self.num_groups,
            "num_loaded": len(loaded),
            "generation": self.generation,
            "num_computed": self.num_computed,
            "num_valid": self.monitor.num_valid,
            "num_recorded": self.monitor.num_total,
            "share_z_score": round(max(-1e6, min(1e6, self.monitor.z_score)), 3),
            "share_alarm": self.monitor.alarm,
            "cursors": [seat.cursor for seat in self.seats],
            "num_restarts": sum(max(0, seat.num_launches - 1) for seat in self.seats),
            "num_batches_waiting": self.desk.num_open,
            "num_chunks_waiting": self.desk.pool.num_open,
            "ledger_error": self.ledger_error,
            "last_failures": failures,
        }

    def _take_ack(self, seat: Seat, now: float) -> None:
        if seat.acking is None or not seat.acking.done():
            return
        acking, seat.acking = seat.acking, None
        failure = acking.exception()
        if isinstance(failure, WaitTimeoutError) and seat.handle is not None:
            # Its batch takes long: it is asked again, and will answer when that is done.
            seat.acking = self._watched(seat.handle.set_phase(self.phase, self.generation))
        elif failure is not None:
            self._lose(seat, str(failure), now)
        elif self.barrier is not None:
            self.barrier.acknowledge(acking.result(), now)

    def _take_report(self, seat: Seat, parts: list[GeneratedPart], now: float) -> None:
        if seat.collecting is None or not seat.collecting.done():
            return
        collecting, seat.collecting = seat.collecting, None
        failure = collecting.exception()
        if failure is not None:
            self._lose(seat, str(failure), now)
            return
        report = collecting.result()
        seat.report, seat.answered_of = report, seat.asked_at
        for checked in report.checked:
            self.desk.take(seat.group_id, checked)
        if report.generated is not None:
            parts.append(report.generated)
        if report.failure is not None:
            self._lose(seat, report.failure, now)

    def _record(self, parts: list[GeneratedPart]) -> None:
        if not parts:
            return
        try:
            if self.ledger.num_unsent() >= self.limits.max_unsent:
                # Not taken: the workers keep it, and stop when their buffers are full.
                self.ledger_error = f"{self.limits.max_unsent} callbacks wait to be sent"
                return
            recorded = self.ledger.commit(self.run, self.num_groups, parts)
        except UnavailableError as failure:
            self.ledger_error = str(failure)
            return
        self.ledger_error = None
        for part in parts:
            if recorded.get(part.group_id) == part.stop:
                self.seats[part.group_id].cursor = part.stop
                self.monitor.add(len(part.nonces), part.stop - part.start)

    def _answer(self, now: float) -> None:
        try:
            for receipt, body in self.desk.answers(now):
                if self.ledger.num_unsent() >= self.limits.max_unsent:
                    return  # they stay open, and new ones are refused when too many are
                self.ledger.enqueue(receipt.key, f"{self.run.url}/validated", body)
                self.desk.close(receipt)
        except UnavailableError as failure:
            self.ledger_error = str(failure)

    def _seat_worker(self, seat: Seat, now: float) -> None:
        if seat.handle is not None or self.phase is Phase.STOP or now < seat.restart_at:
            return
        seat.num_launches += 1
        place = GroupPlace(seat.group_id, self.num_groups, seat.cursor)
        try:
            seat.handle = self.launch(self.run, place, self.phase, self.generation)
        except SparkrayError as failure:
            self._lose(seat, str(failure), now)

    def _assign(self, seat: Seat) -> None:
        if self.phase is not Phase.VALIDATE or seat.handle is None or not seat.loaded or seat.report is None:
            return
        # Chunks that another group was quicker with may still wait in this one.
        if seat.report.num_waiting < CHUNKS_HELD and (chunks := self.desk.pool.take(seat.group_id)):
            seat.handle.check(chunks)

    def _lose(self, seat: Seat, reason: str, now: float) -> None:
        if seat.handle is not None:
            seat.handle.end()
        if seat.report is not None:
            seat.num_computed += seat.report.num_computed
        seat.handle = seat.collecting = seat.acking = seat.report = None
        seat.last_failure = reason
        seat.restart_at = now + min(_MAX_RESTART_SECONDS, _RESTART_SECONDS * 2 ** min(seat.num_launches, 5))
        self.desk.pool.lost(seat.group_id)
        if self.barrier is not None:
            self.barrier.leave(seat.group_id, now)

    def _watched(self, future: Future[Ack]) -> Future[Ack]:
        future.add_done_callback(lambda _: self.wake())
        return future
