"""Where the two connections of one request meet: rows arrive on one thread, the answer waits on another."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Condition

from sparkray.config.handoff import WireLimits
from sparkray.handoff.assembly import RowAssembly
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import prompt_hash
from sparkray.handoff.messages import Confirm, Generate, Hello
from sparkray.handoff.rows import KvRows

# Between two looks at the client's connection.
_LISTEN_SECONDS = 0.05
# How long the first connection of a prefill side that has ended may still be on its way.
_ARRIVAL_SECONDS = 1.0


class Transfer:
    """The rows of one request as they come in.

    Args:
        request: what was asked for.
        start: first row that is not here yet.
        sink: takes whole rows, in order, on the engine's thread.
    """

    def __init__(self, request: Generate, start: int, sink: Callable[[KvRows], None]) -> None:
        self.request = request
        self.start = start
        self.sink = sink
        self.assembly: RowAssembly | None = None
        self.confirm: Confirm | None = None
        self.last_reason = ""
        self.complete_at = 0.0
        self._changed = Condition()
        self._progress_at = time.monotonic()
        self._is_complete = False
        self._is_closed = False
        self._is_connected = False
        self._sender_ended_at: float | None = None

    @property
    def received_bytes(self) -> int:
        """Payload bytes of KV frames so far."""
        return self.assembly.received_bytes if self.assembly else 0

    @property
    def is_closed(self) -> bool:
        """Whether rows that come now are too late."""
        return self._is_closed

    def begin(self, hello: Hello, limits: WireLimits) -> RowAssembly:
        """Open the transfer, or take it up after a break.

        Raises:
            ProtocolError: another prompt or start than what was asked for, or the answer goes on without it.
        """
        with self._changed:
            if self._is_closed or self._is_complete:
                raise ProtocolError(Reason.REPLAYED, f"the rows of request {hello.request!r} are not awaited any more.")
            if hello.prompt_hash != prompt_hash(self.request.prompt) or hello.start != self.start:
                raise ProtocolError(
                    Reason.ORDER,
                    f"rows from {hello.start} on came; those of the given prompt from {self.start} on are due.",
                )
            if self.assembly is None:
                self.assembly = RowAssembly(hello, limits)
            elif self.assembly.hello != hello:
                raise ProtocolError(Reason.ORDER, "the transfer was taken up with another HELLO than it began with.")
            self._is_connected = True
            self._progress_at = time.monotonic()
            self._changed.notify_all()
            return self.assembly

    def note_progress(self) -> None:
        """Rows came: waiting begins anew."""
        with self._changed:
            self._progress_at = time.monotonic()
            self._changed.notify_all()

    def finish(self) -> None:
        """Every row is in the engine."""
        with self._changed:
            self._is_complete = True
            self.complete_at = time.time()
            self._changed.notify_all()

    def note_break(self, reason: str) -> None:
        """The connection is gone; another may come until the wait ends."""
        with self._changed:
            self.last_reason = reason
            self._is_connected = False
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """No more rows will come."""
        with self._changed:
            self.last_reason = reason
            self._is_closed = True
            self._changed.notify_all()

    def put_confirm(self, confirm: Confirm) -> None:
        """The prefill side's first token has come, or the word that it has ended; a token told before stays."""
        with self._changed:
            if confirm.token_ids or self.confirm is None:
                self.confirm = confirm
            if not confirm.token_ids:
                self._sender_ended_at = time.monotonic()
            self._changed.notify_all()

    def wait_for_rows(self, timeout_seconds: float, listen: Callable[[float], None]) -> bool:
        """Wait until all rows are here, failed, or nothing came for so long; then the transfer is closed.

        A prefill side that has ended is not waited for once what it sent has been read.

        Args:
            timeout_seconds: longest time without any row.
            listen: hears the client for so many seconds at most; raises where it is gone.

        Returns:
            Whether all are here.
        """
        while True:
            with self._changed:
                left = self._progress_at + timeout_seconds - time.monotonic()
                if not (self._is_complete or self._is_closed or self._is_lost or left <= 0):
                    self._changed.wait(min(left, _LISTEN_SECONDS))
                if self._is_complete or self._is_closed or self._is_lost or left <= 0:
                    if self._is_lost and not (self._is_complete or self._is_closed):
                        self.last_reason = Reason.PREFILL_LOST
                    if not self._is_complete:
                        self.last_reason = self.last_reason or Reason.TIMEOUT
                    self._is_closed = True
                    return self._is_complete
            listen(0.0)

    @property
    def _is_lost(self) -> bool:
        if self._sender_ended_at is None or self._is_connected:
            return False
        # The word comes on a connection of its own and may overtake the rows that were sent before it.
        return self.assembly is not None or time.monotonic() > self._sender_ended_at + _ARRIVAL_SECONDS

    def wait_for_confirm(self, timeout_seconds: float, listen: Callable[[float], None]) -> Confirm | None:
        """Wait for the prefill side's first token."""
        deadline = time.monotonic() + timeout_seconds
        while self.confirm is None and (left := deadline - time.monotonic()) > 0:
            listen(min(left, 1.0))
        return self.confirm
