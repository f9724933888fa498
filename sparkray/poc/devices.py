"""Which device a name means, in what precision it computes, and its memory."""

from __future__ import annotations

import psutil
import torch

from sparkray.errors import UnavailableError


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA where there is some.

    Raises:
        UnavailableError: a CUDA device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"device {name!r} was asked for, and {torch.cuda.device_count()} CUDA devices are there.",
            hint="Use --device cpu, or a number below that.",
            param="device",
        )
    return device


def prepare_dtype(device: torch.device) -> torch.dtype:
    """float16 on CUDA, as the network computes, and float32 on a CPU, where float16 is several times slower."""
    if device.type != "cuda":
        return torch.float32
    # Sums of products stay in float32 all the way, or distances would depend on how a kernel splits them.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return torch.float16


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Free memory and all of it, of the device or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total
