"""METIS's published processor for vLLM, ported as it stands: one request at a time, in plain Python.

The foil of `processor_overhead.py`. The rule is that of METIS's dgx/vllm_processor.py (CARBON-XXX/METIS, Apache-2.0):
softmax, -sum p log2(p + 1e-10), Welford's mean and deviation with the token included, one CUSUM statistic, HEDGE at
4, REFUSE at 8. vLLM calls it for every request of the batch through its adapter for per-request processors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

DRIFT, EARLY_DRIFT, EARLY_TOKENS = 0.5, 0.5, 80
HEDGE, REFUSE, DECAY, CONFIDENT = 4.0, 8.0, 0.85, 0.9


class PlainWatcher:
    """One request: its statistics and its events."""

    def __init__(self) -> None:
        self.mean = self.squares = self.statistic = 0.0
        self.events: list[dict[str, Any]] = []

    def __call__(self, token_ids: list[int], logits_V: Tensor) -> Tensor:
        probabilities_V = torch.softmax(logits_V.float(), dim=-1)
        entropy = -(probabilities_V * torch.log2(probabilities_V + 1e-10)).sum().item()
        confidence = 1.0 - min(entropy / math.log2(logits_V.shape[-1]), 1.0)
        count = len(self.events) + 1
        delta = entropy - self.mean
        self.mean += delta / count
        self.squares += delta * (entropy - self.mean)
        variance = self.squares / max(count - 1, 1)
        std = math.sqrt(variance) if variance > 0 else 0.1
        z = (entropy - self.mean) / std if std > 0.01 else 0.0
        drift = DRIFT + (EARLY_DRIFT if count <= EARLY_TOKENS else 0.0)
        if z > drift:
            self.statistic += (z - drift) * confidence
        elif confidence > CONFIDENT:
            self.statistic *= DECAY
        statistic, action = self.statistic, "GENERATE"
        if statistic >= HEDGE:
            action = "REFUSE" if statistic >= REFUSE else "HEDGE"
            self.statistic = 0.0
        self.events.append(
            {
                "step": len(token_ids),
                "entropy": entropy,
                "z_score": z,
                "confidence": confidence,
                "cusum": statistic,
                "action": action,
            }
        )
        return logits_V


class PlainMetisProcessor(AdapterLogitsProcessor):
    """Watches every request that has `metis` among its extra arguments."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> PlainWatcher | None:
        return PlainWatcher() if (params.extra_args or {}).get("metis") else None
