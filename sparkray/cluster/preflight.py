"""Looking at each node of a cluster file before anything starts: one probe through ssh, judged here.

The limits come from measurements that others published of two Sparks: 3 GB/s of NCCL bandwidth with one RDMA
device and an MTU of 1500, 23.7 GB/s with both devices and 9000 (NVIDIA/dgx-spark-playbooks issues 102, 103).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sparkray.cluster.launch import NodeCommand, Role

Level = Literal["ok", "warning", "problem"]

MIN_MTU = 9000
NUM_HCAS = 2
MIN_AVAILABLE_GIB = 16.0

# Prints one key=value a line. Every part may be missing on a node; then its value is empty.
PROBE = r"""
interface=$(ip -o -4 addr show | awk -v want="$NODE_IP" '{split($4, a, "/"); if (a[1] == want) print $2}')
echo "interface=$interface"
echo "mtu=$(cat /sys/class/net/"${interface:-none}"/mtu 2>/dev/null)"
echo "active_hcas=$(grep -l ACTIVE /sys/class/infiniband/*/ports/1/state 2>/dev/null | wc -l)"
echo "available_kib=$(awk '/^MemAvailable/ {print $2}' /proc/meminfo)"
echo "num_gpus=$(nvidia-smi -L 2>/dev/null | wc -l)"
echo "ray=$(PATH=$HOME/sparkray/.venv/bin:$PATH ray --version 2>/dev/null | awk '{print $NF}')"
echo "token=$(sha256sum "$HOME"/.sparkray/cluster.token 2>/dev/null | cut -c1-12)"
"""


@dataclass(frozen=True, slots=True)
class NodeFinding:
    """One line of the report: what was found on a node, how bad it is, and what mends it."""

    node_ip: str
    level: Level
    found: str
    mend: str = ""


def probe_command(node_ip: str, role: Role) -> NodeCommand:
    """The probe as a command of that node."""
    return NodeCommand(node_ip, role, "probe", f"NODE_IP={node_ip}\n{PROBE}")


def parse_probe(output: str) -> dict[str, str]:
    """The probe's `key=value` lines; anything else that a login shell prints is left out."""
    pairs = (line.split("=", 1) for line in output.splitlines() if "=" in line)
    return {key: value.strip() for key, value in pairs}


def judge_node(node_ip: str, probe: Mapping[str, str]) -> list[NodeFinding]:
    """What one node's probe means, for that node alone."""

    def finding(good: bool, level: Level, found: str, mend: str) -> NodeFinding:
        return NodeFinding(node_ip, "ok", found) if good else NodeFinding(node_ip, level, found, mend)

    interface, mtu = probe.get("interface", ""), _number(probe, "mtu")
    hcas, gpus = _number(probe, "active_hcas"), _number(probe, "num_gpus")
    available_gib = _number(probe, "available_kib") / 2**20
    return [
        finding(
            bool(interface),
            "problem",
            f"the address is on {interface}" if interface else "no interface has this address",
            "Give the link its address, or put the right one under `provider`.",
        ),
        finding(mtu >= MIN_MTU, "warning", f"MTU {mtu:.0f}", f"Set it to {MIN_MTU} on both ends of the cable."),
        finding(
            hcas >= NUM_HCAS,
            "warning",
            f"{hcas:.0f} RDMA devices active",
            "One cable has two halves; bring both up (`ibstat`), or half of the bandwidth is lost.",
        ),
        finding(gpus >= 1, "problem", f"{gpus:.0f} GPUs", "See `nvidia-smi` on the node."),
        finding(
            available_gib >= MIN_AVAILABLE_GIB,
            "warning",
            f"{available_gib:.0f} GiB available",
            "End what holds it, or drop the page cache: `sync; echo 3 | sudo tee /proc/sys/vm/drop_caches`.",
        ),
        finding(
            bool(probe.get("ray")),
            "problem",
            f"ray {probe.get('ray') or 'is not there'}",
            "Run `make setup EXTRAS=cuda,train` in ~/sparkray on the node.",
        ),
        finding(
            bool(probe.get("token")),
            "warning",
            "the token file is there" if probe.get("token") else "no token file",
            "`sparkray cluster launch` copies it there; for `ray start` by hand copy ~/.sparkray/cluster.token.",
        ),
    ]


def judge_together(probes: Mapping[str, Mapping[str, str]]) -> list[NodeFinding]:
    """What has to be the same on every node and is not: Ray's version, and the token."""
    findings = []
    for key, name, mend in (
        ("ray", "Ray", "Install the same constraints.txt on every node."),
        ("token", "the token", "Copy one ~/.sparkray/cluster.token to every node."),
    ):
        values = {node_ip: probe[key] for node_ip, probe in probes.items() if probe.get(key)}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{node_ip} has {value}" for node_ip, value in values.items())
            findings.append(NodeFinding("all", "problem", f"{name} differs: {said}", mend))
    return findings


def _number(probe: Mapping[str, str], key: str) -> float:
    text = probe.get(key, "")
    return float(text) if text.isdigit() else 0.0
