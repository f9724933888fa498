"""The entropy kernels beside each other: compiled, a row at a time, and the formula in eager tensor operations.

Run `python benchmarks/entropy_kernels.py [--rows 16 64] [--device cuda] [--json]`. All kernels take the same logits in
turn, round after round; the last line is one JSON object with the median milliseconds and the ratios to compiled.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

from sparkray.metis.entropy import Kernel, compiled_kernel, fused_kernel, row_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def milliseconds(kernel: Kernel, logits_BV: torch.Tensor) -> float:
    """One run, the device's queue drained around it."""
    if logits_BV.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    kernel(logits_BV)
    if logits_BV.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kernels: dict[str, Kernel] = {"compiled": compiled_kernel(), "row": row_kernel, "eager": fused_kernel}
    report: dict[str, object] = {
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "device": options.device,
        "dtype": options.dtype,
        "vocab_size": options.vocab,
        "num_rounds": options.rounds,
    }
    with torch.inference_mode():
        for num_rows in options.rows:
            logits_BV = torch.randn(num_rows, options.vocab, device=options.device).to(DTYPES[options.dtype])
            for kernel in kernels.values():
                kernel(logits_BV)
            times: dict[str, list[float]] = {name: [] for name in kernels}
            for _ in range(options.rounds):
                for name, kernel in kernels.items():
                    times[name].append(milliseconds(kernel, logits_BV))
            medians = {name: statistics.median(values) for name, values in times.items()}
            report[f"milliseconds_b{num_rows}"] = medians
            report[f"ratio_row_b{num_rows}"] = medians["row"] / medians["compiled"]
            report[f"ratio_eager_b{num_rows}"] = medians["eager"] / medians["compiled"]
            if not options.json:
                shown = ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items())
                print(f"{num_rows} rows of {options.vocab}: {shown}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
