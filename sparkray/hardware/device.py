"""Devices that a model can run on, from what was read of a machine.

A GB10 (DGX Spark) and a Mac have one memory for CPU and GPU. There the driver does not report a memory of the
GPU's own, so the machine's is used: what is available, not what is free, since page cache gives way.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparkray.hardware.reading import MachineReading


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """The processor and its main memory."""

    name: str
    num_cores: int
    memory_total_bytes: int
    memory_available_bytes: int


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A GPU with memory of its own."""

    name: str
    compute_capability: str
    memory_total_bytes: int
    memory_available_bytes: int


@dataclass(frozen=True, slots=True)
class UnifiedDevice:
    """A GPU that shares the machine's memory; the numbers are the machine's."""

    name: str
    compute_capability: str | None
    memory_total_bytes: int
    memory_available_bytes: int


Device = CpuDevice | CudaDevice | UnifiedDevice


def identify_devices(reading: MachineReading) -> tuple[Device, ...]:
    """The devices of a machine, GPUs first, the processor last."""
    memory = reading.memory
    devices: list[Device] = []
    for gpu in reading.gpus:
        if gpu.memory_total_bytes is None or gpu.memory_free_bytes is None:
            devices.append(UnifiedDevice(gpu.name, gpu.compute_capability, memory.total_bytes, memory.available_bytes))
        else:
            devices.append(CudaDevice(gpu.name, gpu.compute_capability, gpu.memory_total_bytes, gpu.memory_free_bytes))
    if reading.system == "Darwin" and reading.machine == "arm64":
        devices.append(UnifiedDevice("Apple silicon", None, memory.total_bytes, memory.available_bytes))
    devices.append(CpuDevice(reading.machine, reading.num_cores, memory.total_bytes, memory.available_bytes))
    return tuple(devices)
