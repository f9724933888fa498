"""The asking side of a decode peer: one connection an answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from sparkray.config.handoff import LinkConfig, TlsConfig, WireLimits
from sparkray.errors import SparkrayError
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import prompt_hash
from sparkray.handoff.messages import Abort, Confirm, Done, Generate, Release, Status, Tokens
from sparkray.handoff.tcp import Connection, connect
from sparkray.handoff.tickets import sign_ticket

_TICKET_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A decode peer and how to reach it.

    Attributes:
        address: HOST:PORT.
        secret: what it shares with whoever signs tickets.
        tls: certificates; None: plain TCP.
        limits: of what it may send.
        link: time limits.
    """

    address: str
    secret: bytes
    tls: TlsConfig | None = None
    limits: WireLimits = field(default_factory=WireLimits)
    link: LinkConfig = field(default_factory=LinkConfig)

    def connect(self) -> Connection:
        """A new connection.

        Raises:
            UnavailableError: it cannot be reached.
        """
        return connect(self.address, self.tls, self.limits, self.link)

    def ticket(self, request: str, prompt: tuple[int, ...]) -> str:
        """A ticket for ten minutes."""
        return sign_ticket(self.secret, request, prompt_hash(prompt), time.time() + _TICKET_SECONDS)

    def release(self, conversation: str) -> None:
        """Let the rows of a conversation go."""
        with self.connect() as connection:
            connection.send(Release(conversation))
            connection.receive_message()


def request_name() -> str:
    """A name that no other request has."""
    return secrets.token_hex(12)


class Answer:
    """One answer as it comes.

    Opening asks; `status` says how many rows the peer has, before any token.

    Raises:
        UnavailableError: the peer cannot be reached.
        PeerRefusedError: it will not answer; the reason says why.
    """

    def __init__(self, peer: Peer, request: Generate) -> None:
        self._connection = peer.connect()
        self._request = request
        self.done: Done | None = None
        try:
            self._connection.send(request)
            status = self._connection.receive_message(peer.link.total_timeout_seconds)
            if not isinstance(status, Status):
                raise ProtocolError(Reason.ORDER, f"the peer answered GENERATE with {type(status).__name__}.")
        except BaseException:
            self._connection.close()
            raise
        self.status = status

    def confirm(self, token_ids: tuple[int, ...], logprobs: tuple[float, ...]) -> None:
        """Tell the prefill side's likeliest first tokens; none of them: it has ended."""
        self._connection.send(Confirm(self._request.request, token_ids, logprobs))

    def tokens(self, timeout_seconds: float) -> Iterator[Tokens]:
        """Tokens in order; `done` is set when they end.

        Args:
            timeout_seconds: longest wait for the next one.

        Raises:
            PeerRefusedError, ProtocolError, WaitTimeoutError, OSError, EOFError: the peer ended before the answer did.
        """
        expected = len(self._request.resume)
        with self._connection as connection:
            while True:
                message = connection.receive_message(timeout_seconds)
                if isinstance(message, Done):
                    self.done = message
                    return
                if not isinstance(message, Tokens) or message.index != expected:
                    raise ProtocolError(Reason.ORDER, f"token {expected} was expected, and {message!r} came.")
                expected += len(message.token_ids)
                yield message

    def cancel(self) -> None:
        """Give the answer up."""
        with suppress(OSError, SparkrayError):
            self._connection.send(Abort(Reason.CANCELLED))
        # A thread may be waiting for the next token; it closes what it reads from.
        self._connection.interrupt()
