"""What the machines are: devices and their memory, what fits on them, and what is wrong with this one."""

from sparkray.hardware.device import CpuDevice, CudaDevice, Device, UnifiedDevice, identify_devices
from sparkray.hardware.diagnose import Finding, Level, diagnose
from sparkray.hardware.fit import DGX_SPARK, Demand, Fit, ModelShape, NodeMemory, fit, fit_inference, fit_training
from sparkray.hardware.reading import GpuReading, MachineReading, MemoryReading

__all__ = [
    "DGX_SPARK",
    "CpuDevice",
    "CudaDevice",
    "Demand",
    "Device",
    "Finding",
    "Fit",
    "GpuReading",
    "Level",
    "MachineReading",
    "MemoryReading",
    "ModelShape",
    "NodeMemory",
    "UnifiedDevice",
    "diagnose",
    "fit",
    "fit_inference",
    "fit_training",
    "identify_devices",
]
