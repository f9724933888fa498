"""Reading a machine: each function asks one thing and returns plain values; nothing here decides anything.

No heavy module is imported: versions come from the metadata of installed distributions, GPUs from `nvidia-smi`.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import psutil

from sparkray.hardware.reading import (
    DiskReading,
    EmbeddedReading,
    GpuReading,
    MachineReading,
    MemoryReading,
    PortReading,
    RayAuthReading,
)
from sparkray.hardware.tested import CUDA_ONLY_BESIDE_CPU, TESTED

NVIDIA_SMI_TIMEOUT_SECONDS = 5.0
_GPU_FIELDS = "name,memory.total,memory.free,driver_version,compute_cap"
_CGROUP = Path("/sys/fs/cgroup")
_SHM = Path("/dev/shm")


def read_machine(
    *, ports: Mapping[int, str], folders: Sequence[Path], embedded: EmbeddedReading, hub_offline: bool
) -> MachineReading:
    """Read this machine, in well under a second where `nvidia-smi` answers.

    Args:
        ports: TCP ports to look at, with what each is used for.
        folders: places whose disks matter; one that does not exist yet stands for its nearest parent.
        embedded: state of the embedded model.
        hub_offline: whether the hub is switched off.
    """
    return MachineReading(
        system=platform.system(),
        machine=platform.machine(),
        python=platform.python_version(),
        num_cores=read_num_cores(),
        memory=read_memory(),
        gpus=read_gpus(),
        shm=read_disk(_SHM) if _SHM.is_dir() else None,
        disks=read_disks(folders),
        versions=read_versions([*TESTED, *CUDA_ONLY_BESIDE_CPU]),
        ports=tuple(read_port(port, use) for port, use in ports.items()),
        ray_auth=read_ray_auth(os.environ, Path.home()),
        memory_monitor=os.environ.get("RAY_memory_monitor_refresh_ms"),  # noqa: SIM112 - Ray spells it so
        hub_offline=hub_offline,
        embedded=embedded,
    )


def read_num_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use: its affinity, and the quota of its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _first_line(cgroup / "cpu.max").partition(" ")
    return min(affinity, math.ceil(int(quota) / int(period))) if quota.isdigit() else affinity


def read_memory(cgroup: Path = _CGROUP) -> MemoryReading:
    """Main memory from the kernel (MemTotal, MemAvailable, MemFree), cut to the limit of a container (cgroup v2)."""
    machine = psutil.virtual_memory()
    limit, used = _first_line(cgroup / "memory.max"), _first_line(cgroup / "memory.current")
    if not limit.isdigit() or int(limit) >= machine.total:
        return MemoryReading(machine.total, machine.available, machine.free)
    stat = dict(line.split(" ", 1) for line in (cgroup / "memory.stat").read_text().splitlines())
    left = max(0, int(limit) - int(used))
    # File pages that nobody touched lately count as used, and are given up under pressure.
    available = min(left + int(stat["inactive_file"]), machine.available)
    return MemoryReading(int(limit), available, min(left, machine.free))


def read_gpus() -> tuple[GpuReading, ...]:
    """NVIDIA GPUs by `nvidia-smi`; none where it is missing, fails or does not answer in time."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout)


def parse_gpus(rows: str) -> tuple[GpuReading, ...]:
    """Rows of `nvidia-smi` in CSV without header and units; a memory that is not a number is None."""
    found = []
    for row in rows.splitlines():
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) == len(_GPU_FIELDS.split(",")):
            name, total, free, driver, compute_capability = cells
            found.append(GpuReading(name, _mebibytes(total), _mebibytes(free), driver, compute_capability))
    return tuple(found)


def read_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of the distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_disk(folder: Path) -> DiskReading:
    """The file system of a folder, or of the nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return DiskReading(str(folder), usage.total, usage.free)


def read_disks(folders: Sequence[Path]) -> tuple[DiskReading, ...]:
    """One reading a file system, under the first folder that lies on it."""
    by_device: dict[int, DiskReading] = {}
    for folder in folders:
        reading = read_disk(folder)
        by_device.setdefault(Path(reading.folder).stat().st_dev, reading)
    return tuple(by_device.values())


def read_port(port: int, use: str) -> PortReading:
    """Whether a server could listen on a port of this machine, on loopback and on all addresses."""
    for address in ("127.0.0.1", ""):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return PortReading(port, use, free=False, owner=_listener(port))
    return PortReading(port, use, free=True)


def read_ray_auth(environment: Mapping[str, str], home: Path) -> RayAuthReading:
    """What decides Ray's token authentication, in the order in which Ray looks."""
    token_path = environment.get("RAY_AUTH_TOKEN_PATH")
    return RayAuthReading(
        mode=environment.get("RAY_AUTH_MODE", "").lower() or None,
        token_in_environment=bool(environment.get("RAY_AUTH_TOKEN")),
        token_path=token_path,
        token_path_exists=token_path is not None and Path(token_path).expanduser().is_file(),
        default_token_exists=(home / ".ray" / "auth_token").is_file(),
    )


def _listener(port: int) -> str | None:
    # Other users' processes are hidden, and macOS shows none without root: then the owner is not known.
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        return None
    return None


def _mebibytes(cell: str) -> int | None:
    return int(cell) * 2**20 if cell.isdigit() else None


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""
