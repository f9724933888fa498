"""What was read from a machine, as plain values: everything that is decided about it is decided from these."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU as its driver reports it. Memory is None where the driver says "Not Supported" (GB10, Jetson)."""

    name: str
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    driver: str
    compute_capability: str


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Main memory, within the limit of a container if there is one.

    Attributes:
        total_bytes: what exists.
        available_bytes: what a program can get, page cache that can be dropped included.
        free_bytes: what nobody uses, page cache excluded; CUDA on unified memory counts only this.
    """

    total_bytes: int
    available_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class DiskReading:
    """A file system, at the folder that is of interest."""

    folder: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class PortReading:
    """A TCP port of this machine and who listens on it, as far as that can be seen."""

    port: int
    use: str
    free: bool
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class RayAuthReading:
    """What decides Ray's token authentication: variables, and whether the files are there."""

    mode: str | None = None
    token_in_environment: bool = False
    token_path: str | None = None
    token_path_exists: bool = False
    default_token_exists: bool = False


@dataclass(frozen=True, slots=True)
class EmbeddedReading:
    """The embedded model: whether its wheel is installed, and whether it has been prepared."""

    installed: bool
    prepared: bool


@dataclass(frozen=True, slots=True)
class MachineReading:
    """All that `diagnose` looks at.

    Attributes:
        system: "Linux" or "Darwin".
        machine: "x86_64", "aarch64", "arm64".
        python: version of this interpreter.
        num_cores: cores that this process may use.
        shm: the file system of shared memory, None where there is none (macOS).
        versions: installed distributions, by name; absent means not installed.
        memory_monitor: RAY_memory_monitor_refresh_ms, or None.
        hub_offline: whether HF_HUB_OFFLINE is set.
    """

    system: str
    machine: str
    python: str
    num_cores: int
    memory: MemoryReading
    gpus: tuple[GpuReading, ...] = ()
    shm: DiskReading | None = None
    disks: tuple[DiskReading, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    ports: tuple[PortReading, ...] = ()
    ray_auth: RayAuthReading = field(default_factory=RayAuthReading)
    memory_monitor: str | None = None
    hub_offline: bool = False
    embedded: EmbeddedReading = field(default_factory=lambda: EmbeddedReading(installed=True, prepared=True))
