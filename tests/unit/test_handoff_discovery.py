"""Peers are found by multicast DNS over the loopback, and not guessed where it is unclear which is meant."""

from __future__ import annotations

import pytest
from handoff_toy import identity

from sparkray.errors import NotFoundError
from sparkray.handoff.discovery import announced, find_one, find_peers

pytest.importorskip("zeroconf")
LOOPBACK = ("127.0.0.1",)


def test_a_peer_that_announces_itself_is_found_and_forgotten() -> None:
    known = identity(engine="mlx-lm 0.32.2")
    with announced("127.0.0.1:7070", known, LOOPBACK):
        peer = find_one(1.5, LOOPBACK)
        assert (peer.address, peer.engine) == ("127.0.0.1:7070", "mlx-lm 0.32.2")
        assert peer.fingerprint == known.digest[:32] and peer.name.endswith("-7070")
        with announced("127.0.0.1:7071", known, LOOPBACK), pytest.raises(NotFoundError, match="2 decode peers"):
            find_one(1.5, LOOPBACK)
    with pytest.raises(NotFoundError, match=r"0 decode peers answered on the local network \(none\)"):
        find_one(1.0, LOOPBACK)
    assert find_peers(0.5, LOOPBACK) == []
