"""Why a handoff was refused or broke off. `reason` is one word that travels in ABORT frames and reply headers."""

from __future__ import annotations

from enum import StrEnum

from sparkray.errors import InputError, UnavailableError


class Reason(StrEnum):
    """One word for each way in which rows are not used."""

    VERSION = "version"
    MALFORMED = "malformed"
    CHECKSUM = "checksum"
    TOO_LARGE = "too_large"
    TICKET = "ticket"
    REPLAYED = "replayed"
    FINGERPRINT = "fingerprint"
    GEOMETRY = "geometry"
    UNSUPPORTED = "unsupported"
    NOT_PAIRED = "not_paired"
    CANARY = "canary"
    CONTEXT = "context"
    BUSY = "busy"
    ORDER = "order"
    CUT = "cut"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    PREFILL_LOST = "prefill_lost"
    ENGINE = "engine"


class ProtocolError(InputError):
    """What the peer sent is not accepted; the connection ends with an ABORT that carries the reason.

    Args:
        reason: the word.
        message: the sentence.
    """

    def __init__(self, reason: Reason, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.reason, self.message, self.hint))


class PeerRefusedError(UnavailableError):
    """The peer answered ABORT."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"the peer refused ({reason}): {message}")
        self.reason = reason
        self.peer_message = message

    def __reduce__(self) -> tuple[object, ...]:
        return (PeerRefusedError, (self.reason, self.peer_message))


def _rebuild(reason: Reason, message: str, hint: str | None) -> ProtocolError:
    return ProtocolError(reason, message, hint=hint)
