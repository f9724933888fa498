"""Two network namespaces with a cable between them, on one Linux machine: what tests and benchmarks run over.

`tbf` shapes each end of the cable. Needs root and the `ip` command; nothing of it survives `close`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sparkray.errors import UnavailableError

PREFILL_ADDRESS = "10.77.0.1"
DECODE_ADDRESS = "10.77.0.2"
_TIMEOUT_SECONDS = 20.0


@dataclass
class Cable:
    """Namespaces `prefill` and `decode`, joined by a virtual Ethernet pair.

    Use as a context manager; on leaving, both namespaces are deleted.

    Attributes:
        gigabits_per_second: rate of each direction; None: as fast as memory.
        mtu: largest packet.
    """

    gigabits_per_second: float | None = None
    mtu: int = 9000

    def __post_init__(self) -> None:
        name = uuid.uuid4().hex[:6]
        self.prefill, self.decode = f"spk-p-{name}", f"spk-d-{name}"
        self._ends = (f"spkp{name}", f"spkd{name}")

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise UnavailableError(
                "network namespaces need root and the command ip.",
                hint="Run over the loopback with --network loopback.",
            )
        try:
            for namespace in (self.prefill, self.decode):
                _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
            sides = ((self.prefill, self._ends[0], PREFILL_ADDRESS), (self.decode, self._ends[1], DECODE_ADDRESS))
            for namespace, end, address in sides:
                _run("ip", "link", "set", end, "netns", namespace)
                _run("ip", "-n", namespace, "addr", "add", f"{address}/30", "dev", end)
                _run("ip", "-n", namespace, "link", "set", end, "mtu", str(self.mtu), "up")
                _run("ip", "-n", namespace, "link", "set", "lo", "up")
            if self.gigabits_per_second is not None:
                self.shape(self.gigabits_per_second)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def shape(self, gigabits_per_second: float) -> None:
        """Set the rate of both directions."""
        rate = f"{int(gigabits_per_second * 1e6)}kbit"
        # A bucket of 2 ms, and no smaller than a few packets, keeps the timer's grain out of the rate.
        burst = max(int(gigabits_per_second * 1e9 / 8 * 0.002), 4 * self.mtu)
        for namespace, end in zip((self.prefill, self.decode), self._ends, strict=True):
            _run(
                "tc", "-n", namespace, "qdisc", "replace", "dev", end, "root", "tbf",
                "rate", rate, "burst", str(burst), "latency", "50ms",
            )  # fmt: skip

    def set_up(self, up: bool) -> None:
        """Pull the cable out, or plug it in again."""
        _run("ip", "-n", self.prefill, "link", "set", self._ends[0], "up" if up else "down")

    def inside(self, namespace: str, command: list[str]) -> list[str]:
        """The command as it runs inside a namespace."""
        return ["ip", "netns", "exec", namespace, *command]

    def close(self) -> None:
        """Delete both namespaces, and the cable with them."""
        for namespace in (self.prefill, self.decode):
            subprocess.run(
                ["ip", "netns", "del", namespace], capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
            )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()}.")
