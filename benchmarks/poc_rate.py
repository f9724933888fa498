"""Nonces by CPU-second: the plain way against the engine, the same nonces, interleaved; on CUDA also the V1 preset.

    python benchmarks/poc_rate.py --json

Both sides run in this process, in turns, on the same number of threads, and both sets of distances are compared,
so the ratio is one of equal work. CPU seconds are counted because they do not depend on who else uses the machine.
On a CUDA device the V1 preset is run as well: nonces a minute and `mfu`, the share of the device's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import count

import numpy as np
import torch
from poc_plain import PlainWorker

from sparkray.config.poc import TINY, V1, ModelParams, WeightsConfig
from sparkray.poc.engine import Engine
from sparkray.poc.statistics import share_z_score

BLOCK_HASH, PUBLIC_KEY, POOL_FRACTION = "0xabc123", "pubkey1", 0.05
MEDIUM = ModelParams(dim=512, n_layers=16, n_heads=16, n_kv_heads=16, vocab_size=8192, seq_len=32)
CONFIGS = {"small": (TINY, 100, 100), "medium": (MEDIUM, 16, 16)}
# float16 with float32 accumulation, dense, by vendor data sheets.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "4090": 165.0, "3090": 71.0, "GB10": 125.0}
# Noise of float16 on a CPU falls with the vocabulary.
LARGEST_DIFFERENCE = {"small": 3e-4, "medium": 1e-4}


def cpu_seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """CPU seconds of this process for `work`, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def compare(name: str, rounds: int) -> dict[str, float]:
    """Both sides in turns on one configuration."""
    params, batch_size, num_nonces = CONFIGS[name]
    plain = PlainWorker(BLOCK_HASH, PUBLIC_KEY, params, POOL_FRACTION)
    weights = WeightsConfig(pool_fraction=POOL_FRACTION)
    ours = Engine(BLOCK_HASH, params, weights, device="cpu", batch_size=batch_size, prep_threads=1)
    ours.distances(PUBLIC_KEY, range(4))
    plain.distances([0], 1)
    plain_rates, our_rates, largest = [], [], 0.0
    for number in range(rounds):
        nonces = list(range(number * num_nonces, (number + 1) * num_nonces))
        seconds, expected = cpu_seconds(lambda nonces=nonces: plain.distances(nonces, batch_size))
        plain_rates.append(num_nonces / seconds)
        seconds, found = cpu_seconds(lambda nonces=nonces: ours.distances(PUBLIC_KEY, nonces))
        our_rates.append(num_nonces / seconds)
        largest = max(largest, float(np.abs(found - expected).max()))
    if largest > LARGEST_DIFFERENCE[name]:
        raise SystemExit(f"{name}: distances differ by {largest:.2e}, so the two sides did not do the same work")
    return {
        f"ratio_cpu_{name}": statistics.median(our_rates) / statistics.median(plain_rates),
        f"plain_nonces_per_cpu_second_{name}": statistics.median(plain_rates),
        f"ours_nonces_per_cpu_second_{name}": statistics.median(our_rates),
        f"largest_difference_{name}": largest,
    }


def on_cuda(seconds: float) -> dict[str, object]:
    """The V1 preset on the first CUDA device for about `seconds`."""
    device = torch.cuda.get_device_name(0)
    started = time.perf_counter()
    engine = Engine(BLOCK_HASH, V1, WeightsConfig(pool_fraction=POOL_FRACTION), device="cuda", prep_threads=12)
    init_seconds = time.perf_counter() - started
    num_nonces, found = 0, []
    warm = False
    for computed in engine.stream(PUBLIC_KEY, count()):
        if not warm:
            started, warm = time.perf_counter(), True
            continue
        num_nonces += len(computed.nonces)
        found.append(computed.dist)
        if time.perf_counter() - started > seconds:
            break
    elapsed = time.perf_counter() - started
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in device), None)
    rate = num_nonces / elapsed
    num_valid = int((np.concatenate(found) < 1.4013564660458173).sum())
    return {
        "device": device,
        "batch_size": engine.batch_size,
        "init_seconds": init_seconds,
        "nonces_per_minute": 60 * rate,
        "mfu": rate * V1.flop_per_nonce / (peak * 1e12) if peak else None,
        "share_z_score": share_z_score(num_valid, num_nonces, 1.4013564660458173, V1.vocab_size),
    }


def main() -> None:
    """Run, print, and with --json print one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu-seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, object] = {"threads": arguments.threads, "rounds": arguments.rounds}
    for name in CONFIGS:
        result.update(compare(name, arguments.rounds))
        if not arguments.json:
            print(f"{name}: {result[f'ratio_cpu_{name}']:.2f} times the nonces by CPU-second")
    if torch.cuda.is_available():
        result.update(on_cuda(arguments.gpu_seconds))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
