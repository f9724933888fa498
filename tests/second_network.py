"""A network namespace joined to this one by a veth pair: a second machine, as far as networks go."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class SecondNetwork:
    """The two ends of the link, and what a command of the second node begins with."""

    head_ip: str
    node_ip: str
    prefix: tuple[str, ...]
    interfaces: tuple[str, str]


# Not 127.0.0.1, for which Ray would put the machine's own address.
LOOPBACK = SecondNetwork("127.0.0.2", "127.0.0.3", (), ("lo", "lo"))
_numbers = itertools.count()


@contextmanager
def second_network() -> Iterator[SecondNetwork]:
    """A namespace where this process may make one (as root), else two addresses of the loopback."""
    pid, number = os.getpid(), next(_numbers)
    name, near, far = (f"{prefix}{pid}x{number}" for prefix in ("spk", "spa", "spb"))
    # A /30 of its own in the range that RFC 2544 keeps for tests, so that two do not meet.
    head_ip, node_ip = (f"198.{18 + number % 2}.{pid >> 6 & 255}.{(pid & 63) * 4 + host}" for host in (1, 2))
    commands = [
        f"ip netns add {name}",
        f"ip link add {near} type veth peer name {far} netns {name}",
        f"ip addr add {head_ip}/30 dev {near}",
        f"ip link set {near} up",
        f"ip -n {name} addr add {node_ip}/30 dev {far}",
        f"ip -n {name} link set {far} up",
        f"ip -n {name} link set lo up",
    ]
    try:
        made = os.geteuid() == 0 and all(_works(command) for command in commands)
        yield SecondNetwork(head_ip, node_ip, ("ip", "netns", "exec", name), (near, far)) if made else LOOPBACK
    finally:
        # The pair goes with the namespace.
        _works(f"ip netns del {name}")


def _works(command: str) -> bool:
    try:
        return subprocess.run(command.split(), capture_output=True, timeout=20, check=False).returncode == 0
    except FileNotFoundError:
        return False
