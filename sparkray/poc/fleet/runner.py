"""Turns a controller's crank in a thread, and gives others a blocking way to talk to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from sparkray.errors import WaitTimeoutError
from sparkray.poc.fleet.barrier import Barrier
from sparkray.poc.fleet.controller import Controller
from sparkray.poc.phases import Phase
from sparkray.poc.proofs import ProofBatch

_log = logging.getLogger(__name__)

STOP_TIMEOUT_SECONDS = 60.0
_TICK_SECONDS = 0.1
_OBSERVE_SECONDS = 5.0


class FleetRunner:
    """Owns a controller: every touch of it happens under one lock.

    Args:
        observe: called every few seconds with the controller's summary, outside of the lock.
    """

    def __init__(self, controller: Controller, observe: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.controller = controller
        self._observe = observe
        self._observed_at = 0.0
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._ended = threading.Event()
        controller.wake = self._wake.set
        self._thread = threading.Thread(target=self._turn, name="poc-controller", daemon=True)

    def start(self) -> Self:
        """Begin to launch workers."""
        self._thread.start()
        return self

    def order(self, phase: Phase) -> Barrier:
        """Begin a phase; wait on the barrier's event for all acknowledgements."""
        with self._lock:
            return self.controller.order(phase, time.monotonic())

    def change_phase(self, phase: Phase, timeout_seconds: float) -> Barrier:
        """Begin a phase and wait until all workers that answer have acknowledged it.

        Raises:
            WaitTimeoutError: some have not; the phase stays ordered.
        """
        barrier = self.order(phase)
        if not barrier.opened.wait(timeout_seconds):
            raise WaitTimeoutError(
                f"groups {', '.join(map(str, barrier.missing))} did not acknowledge {phase.name} within"
                f" {timeout_seconds:g} s.",
                hint="They will when their batch is done; the phase stays ordered.",
            )
        return barrier

    def receive(self, key: str, batch: ProofBatch, node_count: int | None = None) -> None:
        """Take a batch to validate; see `ValidationDesk.receive`."""
        with self._lock:
            self.controller.receive(key, batch, time.monotonic(), node_count)

    def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> bool:
        """Stop all workers, record what they have computed, and let them go; whether all was recorded in time.

        A second call does nothing.
        """
        if self._ended.is_set():
            return True
        deadline = time.monotonic() + timeout_seconds
        barrier = self.order(Phase.STOP)
        barrier.opened.wait(timeout_seconds)
        drained = False
        while not drained and time.monotonic() < deadline:
            with self._lock:
                self.controller.look_at_once()
                self.controller.tick(time.monotonic())
                drained = self.controller.is_drained
            time.sleep(0.0 if drained else _TICK_SECONDS)
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        with self._lock:
            self.controller.end()
        return drained

    def locked(self) -> threading.RLock:
        """Hold this to read several facts of the controller at one moment."""
        return self._lock

    def _turn(self) -> None:
        while not self._ended.is_set():
            try:
                with self._lock:
                    self.controller.tick(time.monotonic())
                self._show()
            except Exception:  # the top of this thread: without it nothing would be recorded any more
                _log.exception("a look at the groups failed; the next one is tried")
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()

    def _show(self) -> None:
        now = time.monotonic()
        if self._observe is None or now - self._observed_at < _OBSERVE_SECONDS:
            return
        self._observed_at = now
        with self._lock:
            summary = self.controller.summary()
        self._observe(summary)
