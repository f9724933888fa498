"""Where Serve's replicas listen for each other.

Each replica of Serve has an inner gRPC server, over which other replicas call it. Ray 2.60 binds it to every interface,
whatever the settings say, asks no token there and unpickles what comes. Callers reach it by the node's own address, so
that is the one it needs.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica

_EVERYWHERE = "[::]"


def listen_on_node_address() -> None:
    """Bind the inner server of this process's replica to its node's address; to be called before it starts."""
    bind = replica.add_port_to_grpc_server
    if getattr(bind, "on_node_address", False):
        return

    def bind_on_node(server: Any, address: str) -> int:
        host = ray.util.get_node_ip_address()
        return int(bind(server, address.replace(_EVERYWHERE, f"[{host}]" if ":" in host else host)))

    bind_on_node.on_node_address = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = bind_on_node
