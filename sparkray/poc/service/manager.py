"""Brings the fleet to what was last asked for.

A request says what is wanted and returns; one thread makes it so: it stops an earlier run (recording what it has),
starts the new one, and orders the phase once all groups are loaded. What is wanted is on disk, so a new process
goes on where the old one was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparkray.config.poc import PocServiceConfig
from sparkray.errors import BusyError, InputError, SparkrayError, TooLargeError
from sparkray.poc.fleet.controller import Controller
from sparkray.poc.fleet.ledger import Ledger
from sparkray.poc.fleet.messages import Run
from sparkray.poc.fleet.runner import FleetRunner
from sparkray.poc.phases import Phase, pow_state
from sparkray.poc.proofs import ProofBatch
from sparkray.poc.service.bodies import InitRequest

_log = logging.getLogger(__name__)

_WANTED = "wanted"
_RECONCILE_SECONDS = 0.2

StartFleet = Callable[[Run, Ledger], FleetRunner]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was last asked for; no request means nothing shall run."""

    request: InitRequest | None = None
    phase: Phase = Phase.IDLE


class PocManager:
    """The service behind the routes; all methods may be called from any thread and none waits for a model to load.

    Args:
        start_fleet: launches the groups of a run and returns at once.
    """

    def __init__(self, config: PocServiceConfig, ledger: Ledger, start_fleet: StartFleet) -> None:
        self._config = config
        self._ledger = ledger
        self._start_fleet = start_fleet
        self._changed = threading.Condition()
        self._wanted = _recall(ledger)
        self._settled: Wanted | None = None
        self._fleet: FleetRunner | None = None
        self._fleet_request: InitRequest | None = None
        self._started_at = time.monotonic()
        self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._reconcile, name="poc-manager", daemon=True)
        self._thread.start()

    def init(self, request: InitRequest, phase: Phase) -> dict[str, Any]:
        """Want a run and a phase; the same request again changes the phase alone.

        Raises:
            InputError: the phase is GENERATE, and node_id or node_count is not given; node_id >= node_count.
            UnavailableError: the wish cannot be written down.
        """
        run = request.run(self._config.weights)
        if phase is Phase.GENERATE:
            _must_know_its_nonces(run)
        self._want(Wanted(request, phase), wait=False)
        return self.status()

    def change_phase(self, phase: Phase) -> dict[str, Any]:
        """Want another phase of the run; waits a limited time for groups that are loaded to follow.

        Raises:
            InputError: nothing was initialised, or GENERATE without node_id and node_count.
        """
        request = self._running()
        if phase is Phase.GENERATE:
            _must_know_its_nonces(request.run(self._config.weights))
        self._want(Wanted(request, phase), wait=True)
        return self.status()

    def validate(self, key: str, batch: ProofBatch, node_count: int | None) -> None:
        """Take a batch to validate; its answer is a callback.

        Raises:
            InputError: nothing was initialised, or the batch is of another block.
            TooLargeError: more nonces than are allowed.
            BusyError: too much is waiting.
        """
        request = self._running()
        if len(batch) > self._config.max_batch_nonces:
            raise TooLargeError(
                f"a batch of {len(batch)} nonces was given, and {self._config.max_batch_nonces} are allowed.",
                param="nonces",
            )
        if batch.block_hash != request.block_hash:
            raise InputError(
                f"the batch is of block {batch.block_hash!r}, and block {request.block_hash!r} is being computed.",
                param="block_hash",
            )
        with self._changed:
            if not self._changed.wait_for(lambda: self._fleet_request == request, self._config.phase_timeout_seconds):
                raise BusyError("the groups of this block are being started.", hint="Send the batch again later.")
            fleet = self._fleet
        assert fleet is not None
        fleet.receive(key, batch, node_count)

    def stop(self) -> dict[str, Any]:
        """Want nothing; waits a limited time until everything computed is recorded."""
        self._want(Wanted(), wait=True)
        return self.status()

    def status(self) -> dict[str, Any]:
        """State, whether the model is there, and how far every part is."""
        with self._changed:
            wanted, fleet, settled, failure = self._wanted, self._fleet, self._settled == self._wanted, self._failure
            current = self._fleet_request == wanted.request
            seconds = time.monotonic() - self._started_at
        if wanted.request is None or fleet is None or not current:
            state = pow_state(None if wanted.request is None else Phase.IDLE, all_loaded=False)
            progress: dict[str, Any] = {"num_unsent": self._ledger.num_unsent()}
            if failure:
                progress["failure"] = failure
            return {"status": state.value, "is_model_initialized": False, "progress": progress}
        with fleet.locked():
            controller = fleet.controller
            loaded, phase = controller.all_loaded, controller.phase
            # Workers that are made anew do not bring a phase back to LOADING.
            progress = controller.summary() | {"settled": settled, "seconds": seconds}
        progress["num_unsent"] = self._ledger.num_unsent()
        state = pow_state(phase, all_loaded=loaded)
        return {"status": state.value, "is_model_initialized": loaded, "progress": progress}

    def close(self) -> None:
        """End the groups; what is wanted stays written, for the next process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(self._config.stop_timeout_seconds + 5)

    def _running(self) -> InitRequest:
        with self._changed:
            request = self._wanted.request
        if request is None:
            raise InputError("PoW is not running.", hint="Call /pow/init first.")
        return request

    def _want(self, wanted: Wanted, *, wait: bool) -> None:
        body = {"request": wanted.request.model_dump() if wanted.request else None, "phase": int(wanted.phase)}
        self._ledger.remember(_WANTED, body)
        with self._changed:
            if wanted.request != self._wanted.request:
                self._started_at = time.monotonic()
            self._wanted = wanted
            self._changed.notify_all()
            if wait:
                self._changed.wait_for(
                    lambda: self._settled == wanted or self._is_loading(), self._config.phase_timeout_seconds
                )

    def _is_loading(self) -> bool:
        fleet = self._fleet
        return self._wanted.request is not None and (fleet is None or not fleet.controller.all_loaded)

    def _reconcile(self) -> None:
        while True:
            with self._changed:
                if self._settled == self._wanted and not self._closed:
                    self._changed.wait()
                wanted, closed = self._wanted, self._closed
                if self._settled != wanted:
                    # From the first step on the earlier wish does not hold any more, even if it comes back.
                    self._settled = None
            if closed:
                self._end_fleet()
                return
            try:
                done = self._step(wanted)
                failure = None
            except SparkrayError as problem:
                done, failure = False, str(problem)
            except Exception as problem:  # the top of this thread: status tells it, and the next step is tried
                _log.exception("the fleet could not be brought to what was asked for")
                done, failure = False, f"{type(problem).__name__}: {problem}"
            with self._changed:
                self._failure = failure
                self._settled = wanted if done else self._settled
                self._changed.notify_all()
                if not done:
                    self._changed.wait(_RECONCILE_SECONDS)

    def _step(self, wanted: Wanted) -> bool:
        """One step towards what is wanted; whether it is reached."""
        if self._fleet is not None and self._fleet_request != wanted.request:
            self._end_fleet()
        if wanted.request is None:
            return True
        if self._fleet is None:
            fleet = self._start_fleet(wanted.request.run(self._config.weights), self._ledger)
            with self._changed:
                self._fleet, self._fleet_request = fleet, wanted.request
                self._changed.notify_all()
        assert self._fleet is not None
        controller = self._fleet.controller
        with self._fleet.locked():
            if controller.phase is Phase.IDLE and not (controller.all_loaded or self._is_patient_enough(controller)):
                return False
            if controller.phase is wanted.phase:
                # It began there, or it was ordered before: done when all have followed.
                return controller.barrier is None or controller.barrier.opened.is_set()
        self._fleet.change_phase(wanted.phase, self._config.phase_timeout_seconds)
        return True

    def _is_patient_enough(self, controller: Controller) -> bool:
        """Whether those groups that are loaded shall begin without the others."""
        waited = time.monotonic() - self._started_at
        return controller.any_loaded and waited >= self._config.load_patience_seconds

    def _end_fleet(self) -> None:
        fleet = self._fleet
        with self._changed:
            self._fleet = self._fleet_request = None
        if fleet is not None:
            fleet.stop(self._config.stop_timeout_seconds)


def _must_know_its_nonces(run: Run) -> None:
    if not run.may_generate:
        raise InputError("node_id and node_count are needed to generate, and one of them is not set.", param="node_id")


def _recall(ledger: Ledger) -> Wanted:
    body = ledger.recall(_WANTED)
    if body is None or body["request"] is None:
        return Wanted()
    return Wanted(InitRequest.model_validate(body["request"]), Phase(body["phase"]))
