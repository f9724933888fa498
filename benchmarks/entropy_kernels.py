"""Ways to get the entropy of every row of a batch of logits: CPU milliseconds a call, and how far from float64.

    python benchmarks/entropy_kernels.py --json

The kernels take turns on the same logits: the formula as plain tensor operations (`eager`), a row at a time
(`rows`), compiled into one loop (`compiled`), and for scale a softmax alone. Medians of CPU seconds of the process,
which depend little on who else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable

import torch

from sparkray.metis.entropy import compiled_kernel, fused_kernel, row_kernel


def milliseconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    call()
    return 1e3 * (time.process_time() - started)


def main() -> None:
    """Run, print, and with --json print one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logits_BV = 3.0 * torch.randn(options.batch, options.vocab, generator=torch.Generator().manual_seed(0))
    logprobs_BV = logits_BV.double().log_softmax(-1)
    exact_B = -(logprobs_BV.exp() * logprobs_BV).sum(-1) / math.log(2)
    kernels = {"eager": fused_kernel, "rows": row_kernel, "compiled": compiled_kernel()}
    report: dict[str, object] = {
        f"{name}_largest_error_bits": float((kernel(logits_BV)[0].double() - exact_B).abs().max())
        for name, kernel in kernels.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in (*kernels, "softmax")}
    for _ in range(options.rounds):
        for name, kernel in kernels.items():
            taken[name].append(milliseconds(lambda kernel=kernel: kernel(logits_BV)))
        taken["softmax"].append(milliseconds(lambda: torch.softmax(logits_BV, -1)))
    report |= {f"{name}_cpu_ms": round(statistics.median(values), 3) for name, values in taken.items()}
    report |= {name: getattr(options, name) for name in ("batch", "vocab", "threads", "rounds")}
    if not options.json:
        for key, value in report.items():
            print(f"{key:28} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
