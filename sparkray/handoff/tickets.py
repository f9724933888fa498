"""Tickets: the coordinator's word that this request, with this model, may bring rows here until a time.

A ticket is `expiry.nonce.signature`, the signature an HMAC-SHA256 of everything it speaks for. The book remembers
finished requests until their tickets expire, so none can be played again.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import OrderedDict

from sparkray.handoff.errors import ProtocolError, Reason

MIN_SECRET_BYTES = 16


def sign_ticket(secret: bytes, request: str, subject: str, expires_at: float) -> str:
    """A ticket for one request.

    Args:
        secret: what coordinator and decode side share.
        request: name of the request.
        subject: what else is bound: the hash of its prompt.
        expires_at: Unix time, seconds.
    """
    expiry, nonce = str(int(expires_at)), secrets.token_hex(8)
    return f"{expiry}.{nonce}.{_signature(secret, request, subject, expiry, nonce)}"


class TicketBook:
    """Checks tickets, and that no finished request comes back. Holds at most `capacity` finished ones."""

    def __init__(self, secret: bytes, capacity: int = 65_536) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ProtocolError(
                Reason.TICKET, f"a secret of {len(secret)} bytes was given; {MIN_SECRET_BYTES} or more are accepted."
            )
        self._secret = secret
        self._capacity = capacity
        self._finished: OrderedDict[str, float] = OrderedDict()

    def check(self, ticket: str, request: str, subject: str, now: float) -> None:
        """Accept or refuse a ticket.

        Raises:
            ProtocolError: forged, expired, for something else, or of a request that is finished.
        """
        parts = ticket.split(".")
        if len(parts) != 3 or not parts[0].isdecimal() or len(parts[0]) > 12:
            raise ProtocolError(Reason.TICKET, "the ticket has another form than expiry.nonce.signature.")
        expiry, nonce, signature = parts
        expected = _signature(self._secret, request, subject, expiry, nonce)
        if not hmac.compare_digest(signature.encode(), expected.encode()):
            raise ProtocolError(
                Reason.TICKET,
                f"the ticket of request {request!r} was not signed with this side's secret for this prompt.",
                hint="Give both sides the same secret file.",
            )
        if now > float(expiry):
            raise ProtocolError(
                Reason.TICKET, f"the ticket of request {request!r} expired {now - float(expiry):.0f} s ago."
            )
        if request in self._finished:
            raise ProtocolError(Reason.REPLAYED, f"request {request!r} is finished; its ticket cannot be used again.")

    def finish(self, request: str, ticket: str, now: float) -> None:
        """Remember that the request is over, until its ticket expires."""
        self._finished[request] = float(ticket.split(".")[0])
        while self._finished and (len(self._finished) > self._capacity or next(iter(self._finished.values())) < now):
            self._finished.popitem(last=False)


def _signature(secret: bytes, request: str, subject: str, expiry: str, nonce: str) -> str:
    text = "\n".join(("sparkray-handoff-1", request, subject, expiry, nonce))
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
