"""Entropy and top probability of every row of a logits tensor, in one fused pass.

With m = max x, d = x - m, s = sum e^d and t = sum d e^d, the entropy in bits is H = (ln s - t / s) / ln 2 and the
top probability is 1 / s, so one read of the logits gives both. Written as separate tensor operations the same
formula writes several temporaries the size of the logits, which on a CPU costs more than a loop over rows whose
temporaries stay in cache. So there are two kernels: the formula compiled into one loop, and the row loop where no
compiler is found. `benchmarks/entropy_kernels.py` compares them.

Shapes: B rows (requests), V vocabulary.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_INVERSE_LN2 = 1.0 / math.log(2.0)
# -inf (a token that a grammar or a ban forbids) becomes this below the maximum: e^d is 0 in float32 and 0 * d is 0.
_FLOOR = -1.0e4
# Below this many rows the compiled kernel would be specialised (1) or gains nothing that a person could measure.
_MIN_COMPILED_ROWS = 2

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class EntropyStats:
    """Per-row results.

    Attributes:
        entropy_B: bits, float32, >= 0; NaN where a row holds no distribution.
        max_prob_B: probability of the likeliest token, float32.
    """

    entropy_B: Tensor
    max_prob_B: Tensor


def entropy_stats(logits_BV: Tensor) -> EntropyStats:
    """Entropy in bits and top probability of each row.

    Accepts float32, float16 and bfloat16; the arithmetic is float32. A logit of -inf is a token of probability 0: a
    row with a single finite logit has entropy 0 and top probability 1. The logits are not changed.

    Uses the kernel that `warm_up` chose for this kind of device and dtype; compiles nothing by itself.
    """
    kind = (logits_BV.device.type, logits_BV.dtype)
    with torch.inference_mode():
        if kind in _compiled_kinds and logits_BV.shape[0] >= _MIN_COMPILED_ROWS:
            return EntropyStats(*_run_compiled(logits_BV))
        return EntropyStats(*_uncompiled(kind[0])(logits_BV))


def warm_up(device: torch.device | str, dtype: torch.dtype, vocab_size: int, num_rows: int = 64) -> bool:
    """Compile the kernel for this device, dtype and vocabulary now, time it, and keep it where it is the faster.

    Takes seconds (tens of them on a machine that never did it: the compiler's output is cached on disk), so an engine
    calls it while it starts. `num_rows` is the batch size at which the two kernels are compared.

    Returns whether `entropy_stats` uses the compiled kernel from now on.
    """
    device = torch.device(device)
    kind = (device.type, dtype)
    with torch.inference_mode():
        logits_BV = torch.randn(max(num_rows, _MIN_COMPILED_ROWS), vocab_size, device=device).to(dtype)
        _compiled_kinds.add(kind)
        _run_compiled(logits_BV)
        if kind in _compiled_kinds and _seconds(_run_compiled, logits_BV) > _seconds(_uncompiled(kind[0]), logits_BV):
            _compiled_kinds.discard(kind)
    return kind in _compiled_kinds


def fused_kernel(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The formula over the whole batch; fast only once compiled (or on a GPU)."""
    logits_BV = logits_BV.float()
    below_max_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).clamp_min(_FLOOR)
    weight_BV = below_max_BV.exp()
    sum_B = weight_BV.sum(-1)
    moment_B = (weight_BV * below_max_BV).sum(-1)
    return (sum_B.log() - moment_B / sum_B) * _INVERSE_LN2, sum_B.reciprocal()


def row_kernel(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The formula a row at a time, in two scratch rows that stay in cache: for a CPU without a compiler."""
    num_rows, vocab_size = logits_BV.shape
    below_max_V = torch.empty(vocab_size, dtype=torch.float32, device=logits_BV.device)
    weight_V = torch.empty_like(below_max_V)
    sum_B = torch.empty(num_rows, dtype=torch.float32, device=logits_BV.device)
    moment_B = torch.empty_like(sum_B)
    for row in range(num_rows):
        below_max_V.copy_(logits_BV[row])
        below_max_V.sub_(below_max_V.max()).clamp_min_(_FLOOR)
        torch.exp(below_max_V, out=weight_V)
        torch.sum(weight_V, dim=0, out=sum_B[row])
        torch.dot(weight_V, below_max_V, out=moment_B[row])
    return (sum_B.log() - moment_B / sum_B) * _INVERSE_LN2, sum_B.reciprocal()


# Kinds of logits (device type, dtype) for which `warm_up` found the compiled kernel to be the faster one.
_compiled_kinds: set[tuple[str, torch.dtype]] = set()


@cache
def compiled_kernel() -> Kernel:
    """`fused_kernel` through torch.compile; each new dtype or vocabulary is compiled at its first call."""
    return torch.compile(fused_kernel)


def _run_compiled(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    torch._dynamo.maybe_mark_dynamic(logits_BV, 0)
    try:
        return compiled_kernel()(logits_BV)
    except Exception as failure:
        # A missing C++ compiler or Triton, a read-only cache folder, a compiler that crashes: whatever it is,
        # requests go on without the compiled kernel.
        _compiled_kinds.clear()
        reason = str(failure).strip().splitlines()
        logger.warning(
            "the entropy kernel could not be compiled (%s: %s); going on with the uncompiled one",
            type(failure).__name__,
            reason[0] if reason else "no message",
        )
        return _uncompiled(logits_BV.device.type)(logits_BV)


def _uncompiled(device_type: str) -> Kernel:
    return row_kernel if device_type == "cpu" else fused_kernel


def _seconds(kernel: Kernel, logits_BV: Tensor) -> float:
    """Median of five runs, the device's queue drained around each."""
    runs = []
    for _ in range(5):
        _drain(logits_BV.device)
        start = time.perf_counter()
        kernel(logits_BV)
        _drain(logits_BV.device)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


def _drain(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
