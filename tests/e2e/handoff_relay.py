"""A relay in front of a decode peer: passes everything on, counts rows as they go by, and strikes at a given frame."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from sparkray.config.handoff import WireLimits
from sparkray.handoff.tcp import split_address
from sparkray.handoff.wire import HEADER_BYTES, FrameKind, parse_header

_LIMITS = WireLimits()


class FrameRelay:
    """Use as a context manager; `address` takes the peer's place.

    Attributes:
        num_frames: KV frames that have gone by since `arm`.
    """

    def __init__(self, target: str) -> None:
        self._target = split_address(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._at = -1
        self._strike: Callable[[], bool] = lambda: True
        self.num_frames = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, at: int, strike: Callable[[], bool]) -> None:
        """Before KV frame `at` passes `strike` is called; False: neither it nor anything after it passes."""
        self._at, self._strike, self.num_frames = at, strike, 0

    def __enter__(self) -> FrameRelay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            peer = socket.create_connection(self._target, timeout=30)
            peer.settimeout(None)
            threading.Thread(target=self._pass_frames, args=(client, peer), daemon=True).start()
            threading.Thread(target=_pass_bytes, args=(peer, client), daemon=True).start()

    def _pass_frames(self, client: socket.socket, peer: socket.socket) -> None:
        with suppress(OSError, EOFError):
            while True:
                raw = _exactly(client, HEADER_BYTES)
                header = parse_header(raw, _LIMITS)
                payload = _exactly(client, header.payload_bytes)
                if header.kind is FrameKind.KV:
                    if self.num_frames == self._at and not self._strike():
                        break
                    self.num_frames += 1
                peer.sendall(raw + payload)
        # What has passed still arrives: the other thread reads on until the peer ends, so nothing is reset.
        with suppress(OSError):
            peer.shutdown(socket.SHUT_WR)


def _pass_bytes(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            with suppress(OSError):
                target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


def _exactly(source: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        some = source.recv(count - len(data))
        if not some:
            raise EOFError
        data += some
    return bytes(data)
