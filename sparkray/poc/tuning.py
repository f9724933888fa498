"""Which batch size: measured, under a bound of memory, instead of guessed from constants."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sparkray.config.poc import ModelParams
from sparkray.poc.devices import memory_bytes
from sparkray.poc.model import Forward

MAX_BATCH_SIZE = 4096
MEMORY_SHARE = 0.9
# A larger batch must be this much faster to be worth its memory and its wait.
MIN_GAIN = 1.03
_SWEEP_SECONDS = 5.0
_MIN_RUNS, _MAX_RUNS, _MIN_MEASURED_SECONDS = 2, 20, 0.1


def activation_bytes(params: ModelParams, device_type: str) -> int:
    """Memory that one more nonce in a batch takes at its widest point, with its logits and its place in the ring."""
    element = 2 if device_type == "cuda" else 4
    wide = 3 * params.ffn_hidden if device_type == "cuda" else 0
    position = element * (wide + 4 * params.dim + 2 * params.kv_dim) + 4 * 2 * params.dim
    return params.seq_len * position + params.vocab_size * (4 + 8 + 8 + 8) + 4 * params.seq_len * params.dim * 2


def memory_bound(params: ModelParams, device: torch.device) -> int:
    """The largest batch that 90 % of the free memory holds; at least 1."""
    free, _ = memory_bytes(device)
    return max(1, min(MAX_BATCH_SIZE, int(free * MEMORY_SHARE) // activation_bytes(params, device.type)))


def choose_batch_size(model: Forward, bound: int) -> int:
    """The smallest power of two (or `bound`) that no larger size beats by 3 %, measured for a few seconds."""

    def measure(batch_size: int) -> float:
        params = model.params
        inputs = torch.zeros(batch_size, params.seq_len, params.dim, dtype=torch.float16, device=model.device)
        model.last_logits(inputs)
        # The best of several: on a busy machine a single run of a millisecond says nothing.
        times = [_timed(model, inputs)]
        while len(times) < _MIN_RUNS or (sum(times) < _MIN_MEASURED_SECONDS and len(times) < _MAX_RUNS):
            times.append(_timed(model, inputs))
        return batch_size / min(times)

    return sweep(measure, bound, _SWEEP_SECONDS)


def sweep(measure: Callable[[int], float], bound: int, seconds: float) -> int:
    """Double the batch while it pays.

    Args:
        measure: nonces a second at a batch size.
        bound: largest size allowed.
        seconds: no further size is tried after this time.
    """
    started = time.monotonic()
    best, best_rate = 1, measure(1)
    size = 2
    misses = 0
    while best < bound and size // 2 < bound and misses < 2 and time.monotonic() - started < seconds:
        tried = min(size, bound)
        rate = measure(tried)
        if rate >= best_rate * MIN_GAIN:
            best, best_rate, misses = tried, rate, 0
        else:
            misses += 1
        size *= 2
    return best


def _timed(model: Forward, inputs_BSD: torch.Tensor) -> float:
    started = time.perf_counter()
    # Reading one value back waits for a GPU.
    model.last_logits(inputs_BSD)[0, 0].item()
    return time.perf_counter() - started
