"""Memory of a run, in bytes: what torch holds on a device, and what the system has left.

On a GB10 both are one pool, so the system's number is the one that ends a run.
"""

from __future__ import annotations

import psutil
import torch


def memory_report(device: torch.device) -> dict[str, int]:
    """Peak allocated and reserved since the last report (CUDA only), resident memory, and the system's available."""
    report = {
        "resident_bytes": int(psutil.Process().memory_info().rss),
        "system_available_bytes": int(psutil.virtual_memory().available),
    }
    if device.type == "cuda":
        report["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        report["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    return report
