"""The sending end of one transfer: slices of rows out of a feed, frames onto a connection, again after a break.

The feed keeps the rows where the engine has them, so nothing is buffered here: a slice is read when its bytes may
leave, and read once more if a connection broke before the peer had it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from sparkray.config.handoff import CodecName, LinkConfig
from sparkray.errors import UnavailableError, WaitTimeoutError
from sparkray.handoff.codecs import encode_rows
from sparkray.handoff.errors import PeerRefusedError, ProtocolError, Reason
from sparkray.handoff.messages import Accept, Ack, Commit, Done, Hello, Ranges
from sparkray.handoff.rows import Array
from sparkray.handoff.tcp import Connection
from sparkray.handoff.wire import Buffer, FrameKind, root_digest

# A peer that refuses for one of these may take the same request in a moment.
_PASSING = (Reason.CUT, Reason.CHECKSUM, Reason.TIMEOUT, Reason.BUSY)


@dataclass(frozen=True, slots=True)
class RowSlice:
    """Rows `start .. start + count` of one layer, which the engine has computed."""

    layer: int
    start: int
    count: int


class RowFeed(Protocol):
    """Where slices come from."""

    def slice(self, index: int, timeout_seconds: float) -> RowSlice | None:
        """The slice of that number, once it exists; None where the feed ends before it.

        Raises:
            WaitTimeoutError: neither in time.
            ProtocolError: the request was cancelled, or its rows are lost.
        """
        ...

    def read(self, piece: RowSlice) -> tuple[Array, Array]:
        """Keys (T, H, Dk) and values (T, H, Dv) of a slice, contiguous, in the transfer's type."""
        ...


@dataclass(slots=True)
class SendReport:
    """What a transfer did.

    Attributes:
        codec: how rows were written.
        num_frames: frames of the whole transfer.
        payload_bytes: bytes of KV payloads, those sent again included.
        connections: 1, and one for each break.
        last_slice_at: when the last slice was there, monotonic seconds.
        done_at: when the peer had everything.
        waited_seconds: spent waiting for the peer's credit.
    """

    codec: CodecName = "raw"
    num_frames: int = 0
    payload_bytes: int = 0
    connections: int = 0
    last_slice_at: float = 0.0
    done_at: float = 0.0
    waited_seconds: float = 0.0
    done: Done = field(default_factory=Done)


class RowSender:
    """Sends one request's rows.

    Args:
        connect: opens a connection to the peer.
        hello: what to announce; its geometry is the feed's.
        feed: where rows come from.
        link: time limits and retries.
    """

    def __init__(self, connect: Callable[[], Connection], hello: Hello, feed: RowFeed, link: LinkConfig) -> None:
        self._connect = connect
        self._hello = hello
        self._geometry = hello.kv_geometry
        self._feed = feed
        self._link = link
        self._digests: list[int] = []
        self._credit = 0
        self._sent = 0
        self._acknowledged = 0
        self.report = SendReport()

    def run(self) -> SendReport:
        """Send everything.

        Raises:
            PeerRefusedError: the peer will not take this transfer.
            ProtocolError: the feed was cancelled, or the peer breaks the protocol.
            UnavailableError: the peer stayed away through all retries.
            WaitTimeoutError: the transfer's whole time is over.
        """
        deadline = time.monotonic() + self._link.total_timeout_seconds
        for attempt in range(self._link.retries + 1):
            try:
                return self._attempt(deadline)
            except PeerRefusedError as refusal:
                if refusal.reason not in _PASSING or attempt == self._link.retries:
                    raise
            except (UnavailableError, WaitTimeoutError, OSError, EOFError) as failure:
                if attempt == self._link.retries or time.monotonic() > deadline:
                    raise UnavailableError(
                        f"the decode side was lost {attempt + 1} times, the last time with: {failure!r}."
                    ) from failure
            time.sleep(self._link.retry_delay_seconds * 2**attempt)
        raise AssertionError("the loop returns or raises")

    def _attempt(self, deadline: float) -> SendReport:
        with self._connect() as connection:
            self.report.connections += 1
            connection.send(self._hello)
            answer = connection.receive_message()
            if not isinstance(answer, Accept) or answer.codec not in self._hello.codecs:
                raise ProtocolError(Reason.ORDER, f"the peer answered HELLO with {answer!r}.")
            self.report.codec = answer.codec
            self._credit, self._sent, self._acknowledged = answer.credit_bytes, 0, 0
            try:
                self._send_slices(connection, answer, deadline)
            except ProtocolError as failure:
                # Said in order, so that the peer keeps what has come: a connection that breaks takes it along.
                connection.refuse(failure)
                raise
            root = root_digest(self._digests)
            connection.send(Commit(len(self._digests), self._hello.num_rows, f"{root:016x}"))
            while not isinstance(message := connection.receive_message(), Done):
                if not isinstance(message, Ack):
                    raise ProtocolError(Reason.ORDER, f"the peer answered COMMIT with {message!r}.")
            self.report.done_at = time.monotonic()
            self.report.num_frames = len(self._digests)
            self.report.done = message
            return replace(self.report)

    def _send_slices(self, connection: Connection, accept: Accept, deadline: float) -> None:
        index = 0
        while (piece := self._feed.slice(index, max(0.0, deadline - time.monotonic()))) is not None:
            if index >= len(self._digests) or not _within(index, accept.have):
                self.report.last_slice_at = time.monotonic()
                keys, values = self._feed.read(piece)
                pieces = encode_rows(accept.codec, self._geometry, piece.layer, piece.start, keys, values)
                self._await_credit(connection, pieces)
                digest = connection.send_frame(FrameKind.KV, pieces, index)
                if index < len(self._digests):
                    self._digests[index] = digest
                else:
                    self._digests.append(digest)
            index += 1

    def _await_credit(self, connection: Connection, pieces: list[Buffer]) -> None:
        """Take acknowledgements as they come, and wait for one where the peer's credit is used up."""
        size = sum(memoryview(piece).nbytes for piece in pieces)
        begin = time.monotonic()
        # One frame may always be on the way, however small the credit.
        while connection.is_readable(0.0) or (self._sent > self._acknowledged and self._over(size)):
            message = connection.receive_message(self._link.stall_timeout_seconds)
            if not isinstance(message, Ack):
                raise ProtocolError(Reason.ORDER, f"the peer sent {message!r} while rows were coming.")
            self._acknowledged = message.taken_bytes
        self.report.waited_seconds += time.monotonic() - begin
        self._sent += size
        self.report.payload_bytes += size

    def _over(self, size: int) -> bool:
        return self._sent + size - self._acknowledged > self._credit


def _within(index: int, ranges: Ranges) -> bool:
    return any(first <= index < last for first, last in ranges)
