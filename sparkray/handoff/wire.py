"""Frames: a fixed header, a payload, and a checksum over both.

    offset  bytes  field
    0       4      magic "SPKV"
    4       2      version
    6       2      kind
    8       4      sequence number: KV frames count from 0, others carry 0
    12      4      zero
    16      8      payload length
    24      8      XXH3-64 of the first 24 bytes and the payload

All integers are little-endian. The length is checked against the limit of its kind before anything is read, so a
peer cannot make this side allocate. The checksum finds damage, not forgery: that is what tickets and TLS are for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from sparkray.config.handoff import WireLimits
from sparkray.handoff.errors import ProtocolError, Reason

MAGIC = b"SPKV"
VERSION = 1
_PREFIX = struct.Struct("<4sHHIIQ")
_DIGEST = struct.Struct("<Q")
HEADER_BYTES = _PREFIX.size + _DIGEST.size

Buffer = bytes | bytearray | memoryview


class FrameKind(IntEnum):
    """What a frame is."""

    HELLO = 1
    ACCEPT = 2
    KV = 3
    COMMIT = 4
    ABORT = 5
    ACK = 6
    GENERATE = 7
    TOKENS = 8
    CONFIRM = 9
    DONE = 10
    STATUS = 11
    RELEASE = 12


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A header whose fields are in bounds; the payload is still to come."""

    kind: FrameKind
    sequence: int
    payload_bytes: int
    digest: int
    prefix: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame whose checksum agreed."""

    kind: FrameKind
    sequence: int
    digest: int
    payload: memoryview


def encode_header(kind: FrameKind, payloads: tuple[Buffer, ...], sequence: int = 0) -> tuple[bytes, int]:
    """Header of a frame whose payload is the given pieces in a row, and its digest.

    Pieces let a caller hand memory to the socket without joining it first.
    """
    length = sum(memoryview(piece).nbytes for piece in payloads)
    prefix = _PREFIX.pack(MAGIC, VERSION, kind, sequence, 0, length)
    digest = _digest_of(prefix, payloads)
    return prefix + _DIGEST.pack(digest), digest


def encode_frame(kind: FrameKind, payload: Buffer, sequence: int = 0) -> bytes:
    """A whole frame as bytes; for control frames, which are small."""
    header, _ = encode_header(kind, (payload,), sequence)
    return header + bytes(payload)


def parse_header(data: Buffer, limits: WireLimits) -> FrameHeader:
    """Read `HEADER_BYTES` bytes.

    Raises:
        ProtocolError: not this protocol, another version, an unknown kind, or a payload over its limit.
    """
    prefix = bytes(data[: _PREFIX.size])
    magic, version, kind, sequence, zero, length = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ProtocolError(Reason.MALFORMED, f"a frame begins with {magic!r}, and {MAGIC!r} is expected.")
    if version != VERSION:
        raise ProtocolError(
            Reason.VERSION,
            f"the peer speaks version {version} of the handoff, and this side speaks {VERSION}.",
            hint="Install the same sparkray on both sides.",
        )
    if kind not in FrameKind.__members__.values() or zero:
        raise ProtocolError(Reason.MALFORMED, f"a frame of kind {kind} with reserved field {zero} is not known.")
    limit = limits.max_frame_bytes if kind == FrameKind.KV else limits.max_control_bytes
    if length > limit:
        raise ProtocolError(
            Reason.TOO_LARGE, f"a {FrameKind(kind).name} frame of {length} bytes was announced; {limit} are accepted."
        )
    (digest,) = _DIGEST.unpack_from(data, _PREFIX.size)
    return FrameHeader(FrameKind(kind), sequence, length, digest, prefix)


def check_frame(header: FrameHeader, payload: Buffer) -> Frame:
    """Join a header with its payload.

    Raises:
        ProtocolError: the checksum does not agree.
    """
    if _digest_of(header.prefix, (payload,)) != header.digest:
        raise ProtocolError(
            Reason.CHECKSUM, f"{header.kind.name} frame {header.sequence} was damaged: its checksum does not agree."
        )
    return Frame(header.kind, header.sequence, header.digest, memoryview(payload).cast("B"))


class FrameReader:
    """Takes bytes in any pieces and gives whole frames; holds at most one unfinished frame.

    For files, memory and tests; a socket reads straight into the payload's memory instead (`tcp.py`).
    """

    def __init__(self, limits: WireLimits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._header: FrameHeader | None = None

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Frames that `data` completes.

        Raises:
            ProtocolError: as `parse_header` and `check_frame`; the reader is of no use after that.
        """
        self._buffer += data
        while True:
            if self._header is None:
                if len(self._buffer) < HEADER_BYTES:
                    return
                self._header = parse_header(self._buffer, self._limits)
                del self._buffer[:HEADER_BYTES]
            length = self._header.payload_bytes
            if len(self._buffer) < length:
                return
            payload = bytes(memoryview(self._buffer)[:length])
            frame = check_frame(self._header, payload)
            del self._buffer[:length]
            self._header = None
            yield frame

    @property
    def is_between_frames(self) -> bool:
        """Whether the bytes so far end with a whole frame."""
        return self._header is None and not self._buffer


def root_digest(digests: list[int]) -> int:
    """One checksum over the digests of all KV frames, in order of their sequence numbers."""
    return xxhash.xxh3_64_intdigest(b"".join(map(_DIGEST.pack, digests)))


def _digest_of(prefix: bytes, payloads: tuple[Buffer, ...]) -> int:
    hasher = xxhash.xxh3_64(prefix)
    for piece in payloads:
        hasher.update(piece)
    return hasher.intdigest()
