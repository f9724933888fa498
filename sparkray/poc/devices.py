"""Which device a name means."""

from __future__ import annotations

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
