"""Serve's inner server: bound to the node's address, by a hook that Ray finds by its name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from sparkray.config.cluster import LISTEN_ON_NODE_ADDRESS


@pytest.mark.parametrize(("node", "bound"), [("10.0.0.7", "10.0.0.7:0"), ("fd00::7", "[fd00::7]:0")])
def test_a_replica_listens_on_its_nodes_address(monkeypatch: pytest.MonkeyPatch, node: str, bound: str) -> None:
    import ray
    from ray.serve._private import replica

    asked: list[str] = []

    def bind(_server: Any, address: str) -> int:
        asked.append(address)
        return 4711

    monkeypatch.setattr(replica, "add_port_to_grpc_server", bind)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    module, _, name = LISTEN_ON_NODE_ADDRESS.rpartition(".")
    hook = getattr(import_module(module), name)
    hook()
    hook()
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 4711
    assert asked == [bound], "once, however often the hook runs"
