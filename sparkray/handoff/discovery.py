"""Decode peers of the local network, found by multicast DNS: no address has to be typed.

A peer that is told to be found announces `_sparkray._tcp.local.` with its address, engine and fingerprint. Whoever may
use it is still decided by the secret and by TLS: an announcement gives nothing but a place to ask.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparkray.errors import MissingExtraError, NotFoundError
from sparkray.handoff.fingerprint import ModelIdentity
from sparkray.handoff.tcp import split_address

SERVICE = "_sparkray._tcp.local."
# Values of a record hold 255 bytes with their key; a digest's first half is plenty to tell models apart.
_FINGERPRINT_LETTERS = 32
_RESOLVE_MILLISECONDS = 1500


@dataclass(frozen=True, slots=True)
class FoundPeer:
    """A peer that announced itself.

    Attributes:
        name: of the announcement, as "mac-7070".
        address: HOST:PORT.
        engine: name and version of its engine.
        fingerprint: beginning of its model's fingerprint.
    """

    name: str
    address: str
    engine: str
    fingerprint: str


@contextmanager
def announced(address: str, identity: ModelIdentity, interfaces: Sequence[str] | None = None) -> Iterator[None]:
    """Announce a peer for as long as the context lasts.

    Args:
        address: where it listens; 0.0.0.0 stands for all addresses of this machine.
        identity: of its model.
        interfaces: addresses of the interfaces to announce on; None: all.

    Raises:
        MissingExtraError: the package zeroconf is not installed.
    """
    zeroconf = _zeroconf()
    host, port = split_address(address)
    hosts = _own_addresses() if host in ("0.0.0.0", "::") else [host]
    short = socket.gethostname().split(".")[0] or "peer"
    record = zeroconf.ServiceInfo(
        SERVICE,
        f"{short}-{port}.{SERVICE}",
        port=port,
        parsed_addresses=hosts,
        server=f"{short}-{port}.local.",
        properties={"engine": identity.engine, "fingerprint": identity.digest[:_FINGERPRINT_LETTERS]},
    )
    daemon = zeroconf.Zeroconf(**_bound(interfaces))
    try:
        daemon.register_service(record)
        yield
    finally:
        daemon.unregister_service(record)
        daemon.close()


def find_peers(seconds: float = 3.0, interfaces: Sequence[str] | None = None) -> list[FoundPeer]:
    """Peers that answer within `seconds`, by name.

    Raises:
        MissingExtraError: the package zeroconf is not installed.
    """
    zeroconf = _zeroconf()
    names: set[str] = set()
    daemon = zeroconf.Zeroconf(**_bound(interfaces))

    def note(name: str, state_change: Any, **_: Any) -> None:
        if state_change is not zeroconf.ServiceStateChange.Removed:
            names.add(name)

    try:
        zeroconf.ServiceBrowser(daemon, SERVICE, handlers=[note])
        time.sleep(seconds)
        records = [daemon.get_service_info(SERVICE, name, timeout=_RESOLVE_MILLISECONDS) for name in sorted(names)]
    finally:
        daemon.close()
    return [_found(record) for record in records if record is not None and record.parsed_addresses()]


def find_one(seconds: float = 3.0, interfaces: Sequence[str] | None = None) -> FoundPeer:
    """The only peer of the network.

    Raises:
        NotFoundError: none answered, or more than one.
    """
    found = find_peers(seconds, interfaces)
    if len(found) != 1:
        listed = ", ".join(f"{peer.name} at {peer.address}" for peer in found) or "none"
        raise NotFoundError(
            f"{len(found)} decode peers answered on the local network ({listed}), and one is expected.",
            hint="Name it: --peer HOST:PORT. A peer is found where it was started with --announce.",
        )
    return found[0]


def _found(record: Any) -> FoundPeer:
    texts = {key.decode(): (value or b"").decode("utf-8", "replace") for key, value in record.properties.items()}
    host = record.parsed_addresses()[0]
    return FoundPeer(
        record.name.removesuffix(f".{SERVICE}"),
        f"[{host}]:{record.port}" if ":" in host else f"{host}:{record.port}",
        texts.get("engine", ""),
        texts.get("fingerprint", ""),
    )


def _own_addresses() -> list[str]:
    """IPv4 addresses of this machine, those that other machines can reach first."""
    import ifaddr

    addresses = [str(each.ip) for adapter in ifaddr.get_adapters() for each in adapter.ips if each.is_IPv4]
    return sorted(addresses, key=lambda address: (address.startswith("127."), address))


def _bound(interfaces: Sequence[str] | None) -> dict[str, Any]:
    return {"interfaces": list(interfaces)} if interfaces else {}


def _zeroconf() -> Any:
    try:
        import zeroconf
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("zeroconf", "handoff") from failure
    return zeroconf
