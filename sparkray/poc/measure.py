"""What this machine does: draws, products and nonces a second, and whether the cost model predicts them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch

from sparkray.config.poc import ModelParams, WeightsConfig
from sparkray.poc.devices import resolve_device
from sparkray.poc.engine import Engine
from sparkray.poc.planner import Machine, predict
from sparkray.poc.seeds import generator

_DRAWN = 2_000_000
_MATRIX = {"cpu": 1024, "cuda": 8192}
# Two shapes unlike each other: the share of peak is taken from the first and tried on the second.
CALIBRATED_ON = ModelParams(
    dim=512, n_layers=4, n_heads=8, n_kv_heads=8, vocab_size=1024, ffn_dim_multiplier=2.0, multiple_of=256,
    seq_len=32,
)  # fmt: skip
TRIED_ON = ModelParams(
    dim=256, n_layers=12, n_heads=8, n_kv_heads=8, vocab_size=2048, ffn_dim_multiplier=6.0, multiple_of=256,
    seq_len=48,
)  # fmt: skip


def measure_machine(device_name: str = "auto") -> Machine:
    """Draw rate and product rate of this machine; the utilisation is that of a first small shape."""
    device = resolve_device(device_name)
    started = time.perf_counter()
    generator("measure", 4).standard_normal(_DRAWN)
    normals = _DRAWN / (time.perf_counter() - started)
    size = _MATRIX[device.type]
    left = torch.randn(size, size, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)

    def multiply() -> None:
        # Reading one value back waits for a GPU.
        (left @ left)[0, 0].item()

    peak = 2.0 * size**3 / _best_seconds(multiply) / 1e12
    machine = Machine(str(device), peak, 0.0, 1.0, normals, prep_threads=2)
    ideal = predict(CALIBRATED_ON, WeightsConfig(), machine).raw_per_hour
    return replace(machine, utilisation=_rate(CALIBRATED_ON, device_name) * 3600 / ideal)


def check_cost_model(machine: Machine) -> dict[str, float]:
    """Predicted and measured nonces a second of a shape that was not used to calibrate."""
    predicted = predict(TRIED_ON, WeightsConfig(), machine).raw_per_hour / 3600
    measured = _rate(TRIED_ON, machine.name)
    return {"predicted": predicted, "measured": measured, "predicted_over_measured": predicted / measured}


def _rate(params: ModelParams, device_name: str, seconds: float = 2.0) -> float:
    engine = Engine("measure", params, WeightsConfig(), device=device_name, batch_size=32)
    stream = engine.stream("measure", count())
    next(stream)
    started, num_nonces = time.perf_counter(), 0
    for computed in stream:
        num_nonces += len(computed.nonces)
        if time.perf_counter() - started >= seconds:
            break
    stream.close()
    return num_nonces / (time.perf_counter() - started)


def _best_seconds(work: Callable[[], None], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
