"""Frames over a socket: TCP with or without TLS, or a socket pair inside one process.

Payloads of KV frames are read straight into their own memory, which the rows then point into; sending hands the
arrays' memory to the kernel. Every wait has a limit.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from os.path import expanduser
from typing import Self

from sparkray.config.handoff import LinkConfig, TlsConfig, WireLimits
from sparkray.errors import UnavailableError, UsageError, WaitTimeoutError
from sparkray.handoff.errors import PeerRefusedError, ProtocolError, Reason
from sparkray.handoff.messages import Abort, Message, decode_message, encode_message
from sparkray.handoff.payload_pool import SHARED_POOL
from sparkray.handoff.wire import (
    HEADER_BYTES,
    Buffer,
    Frame,
    FrameKind,
    check_frame,
    encode_header,
    parse_header,
)


class Connection:
    """One end of a connection. Not safe for two threads that read, or two that write."""

    def __init__(self, sock: socket.socket, limits: WireLimits, link: LinkConfig) -> None:
        self._socket = sock
        self._limits = limits
        self._header = bytearray(HEADER_BYTES)
        self.sent_bytes = 0
        sock.settimeout(link.stall_timeout_seconds)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        """Send a control message."""
        self._send_all(encode_message(message))

    def send_frame(self, kind: FrameKind, pieces: Sequence[Buffer], sequence: int = 0) -> int:
        """Send a frame whose payload is the pieces in a row; gives its digest."""
        header, digest = encode_header(kind, tuple(pieces), sequence)
        # Small pieces go together with the header, so that no packet carries 24 bytes alone.
        self._send_all(header + bytes(pieces[0]))
        for piece in pieces[1:]:
            self._send_all(piece)
        return digest

    def receive(self, timeout_seconds: float | None = None) -> Frame:
        """The next frame.

        Args:
            timeout_seconds: how long the peer may be silent; None: as the settings say.

        Raises:
            ProtocolError: the frame is not acceptable, or the connection ended inside it (`CUT`).
            WaitTimeoutError: silence.
            EOFError: the connection ended between two frames.
        """
        if timeout_seconds is not None:
            self._socket.settimeout(timeout_seconds)
        self._receive_into(memoryview(self._header), at_boundary=True)
        header = parse_header(self._header, self._limits)
        payload = SHARED_POOL.take(header.payload_bytes)
        self._receive_into(memoryview(payload), at_boundary=False)
        return check_frame(header, payload)

    def receive_message(self, timeout_seconds: float | None = None) -> Message:
        """The next control message.

        Raises:
            PeerRefusedError: it is ABORT.
            ProtocolError, WaitTimeoutError, EOFError: as `receive`.
        """
        message = decode_message(self.receive(timeout_seconds))
        if isinstance(message, Abort):
            raise PeerRefusedError(message.reason, message.message)
        return message

    def is_readable(self, timeout_seconds: float) -> bool:
        """Whether something has come, or the peer has gone."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        # poll and not select, which knows descriptors below 1024 alone.
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(1000 * timeout_seconds))

    def refuse(self, failure: ProtocolError) -> None:
        """Tell the peer why, as far as it still listens, and close."""
        try:
            self._socket.settimeout(1.0)
            self.send(Abort(failure.reason, failure.message))
            self._drain()
        except OSError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        self._socket.close()

    def interrupt(self) -> None:
        """End the connection in both directions; a thread that waits on it wakes."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _drain(self) -> None:
        """Read what is on its way for a moment: closing over unread bytes would reset the peer before it reads why."""
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 0.5
        scratch = bytearray(1 << 16)
        while time.monotonic() < deadline and self._socket.recv_into(scratch):
            continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_all(self, data: Buffer) -> None:
        try:
            self._socket.sendall(data)
        except TimeoutError as failure:
            raise WaitTimeoutError("the peer took no bytes for the whole time limit.") from failure
        self.sent_bytes += memoryview(data).nbytes

    def _receive_into(self, target: memoryview, *, at_boundary: bool) -> None:
        filled = 0
        while filled < len(target):
            try:
                count = self._socket.recv_into(target[filled:])
            except TimeoutError as failure:
                raise WaitTimeoutError("the peer sent nothing for the whole time limit.") from failure
            if count == 0:
                if at_boundary and filled == 0:
                    raise EOFError
                raise ProtocolError(
                    Reason.CUT, f"the connection ended inside a frame, {filled} of {len(target)} bytes in."
                )
            filled += count


def connect(address: str, tls: TlsConfig | None, limits: WireLimits, link: LinkConfig) -> Connection:
    """Open a connection to `host:port`.

    Raises:
        UsageError: an address of another form.
        UnavailableError: nothing listens there, or TLS does not come up.
    """
    host, port = split_address(address)
    try:
        sock = socket.create_connection((host, port), timeout=link.connect_timeout_seconds)
        set_up_sending(sock, link)
        if tls is not None:
            sock = tls_context(tls, server=False).wrap_socket(sock)
    except OSError as failure:
        raise UnavailableError(
            f"the decode side at {address} cannot be reached: {failure}.",
            hint="Start it there with: sparkray handoff decode --listen HOST:PORT.",
        ) from failure
    return Connection(sock, limits, link)


def set_up_sending(sock: socket.socket, link: LinkConfig) -> None:
    """Buffer and congestion control of a connected socket; one that the system does not have leaves it at its own."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, link.socket_buffer_bytes)
    if link.congestion_control != "system" and hasattr(socket, "TCP_CONGESTION"):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, link.congestion_control.encode())


def listen(host: str, port: int, link: LinkConfig) -> socket.socket:
    """A listening socket.

    Raises:
        UnavailableError: the port is taken or the address is not this machine's.
    """
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Set before connections come up: the window's scale is fixed then.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, link.socket_buffer_bytes)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as failure:
        raise UnavailableError(f"{host}:{port} cannot be listened at: {failure.strerror}.") from failure
    return sock


def tls_context(tls: TlsConfig, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides; who may speak is decided by the authority, not by host names.

    Raises:
        UsageError: a file that cannot be read or does not fit its partner.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    if server:
        # Session tickets arrive unasked: the sender would take them for an acknowledgement that is not there.
        context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        certificate, key, authority = map(expanduser, (tls.certificate, tls.private_key, tls.authority))
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as failure:
        raise UsageError(
            f"the TLS files {tls.certificate}, {tls.private_key}, {tls.authority} do not load: {failure}."
        ) from failure
    return context


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        UsageError: another form.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65_535:
        raise UsageError(f"address {address!r} was given, and HOST:PORT is expected, as mac.local:7070.")
    return host.strip("[]"), int(port)
