"""How the sending side's sockets are set up."""

from __future__ import annotations

import socket

import pytest
from handoff_toy import QUICK

from sparkray.handoff.tcp import listen, set_up_sending

CONGESTION = getattr(socket, "TCP_CONGESTION", None)


@pytest.mark.skipif(
    CONGESTION is None, reason="Linux chooses congestion control for each socket, other systems do not."
)
def test_congestion_control_is_chosen_where_the_system_has_it() -> None:
    assert CONGESTION is not None

    def found(name: str) -> bytes:
        with listen("127.0.0.1", 0, QUICK) as listener, socket.create_connection(listener.getsockname()) as sock:
            set_up_sending(sock, QUICK.model_copy(update={"congestion_control": name}))
            return sock.getsockopt(socket.IPPROTO_TCP, CONGESTION, 16).rstrip(b"\0")

    own = found("system")
    assert found("reno") == b"reno", "every Linux has it"
    assert found("nosuch") == own, "one that is not there leaves the system's own"


def test_buffers_are_as_large_as_set() -> None:
    with listen("127.0.0.1", 0, QUICK) as listener, socket.create_connection(listener.getsockname()) as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        set_up_sending(sock, QUICK.model_copy(update={"socket_buffer_bytes": 65_536}))
        # Linux keeps twice what is asked for, as it counts its own bookkeeping.
        after = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert after in (65_536, 131_072)
        assert after != before
