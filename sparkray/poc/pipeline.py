"""One model over several devices: each has a run of blocks, and micro-batches follow one another through them.

Launches on CUDA do not wait, and a copy between devices keeps the order of both, so while one micro-batch is in the
second device the next one is in the first. Where a device holds the whole model, independent groups are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from sparkray.config.poc import ModelParams
from sparkray.errors import UsageError
from sparkray.poc.model import ReadWeight, Transformer

# So many a device keep it busy for all but 1 / (1 + 4) of the time that the pipeline fills and drains.
MICRO_BATCHES_A_STAGE = 4

LoadStage = Callable[[frozenset[str], torch.device], ReadWeight]


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Neighbouring runs of blocks, as even as can be, the longer ones first.

    Raises:
        UsageError: more stages than blocks.
    """
    if not 1 <= num_stages <= num_layers:
        raise UsageError(f"{num_stages} devices were given for a model of {num_layers} blocks, and 1 to that many fit.")
    ends = [0]
    for stage in range(num_stages):
        ends.append(ends[-1] + num_layers // num_stages + (stage < num_layers % num_stages))
    return [range(start, stop) for start, stop in pairwise(ends)]


class PipelinedTransformer:
    """The forward pass over `devices`; in and out are on the first one.

    Args:
        load_stage: gives a reader of the named weights on a device.
    """

    def __init__(
        self, params: ModelParams, load_stage: LoadStage, devices: Sequence[torch.device], dtype: torch.dtype
    ) -> None:
        self.params = params
        self.device = devices[0]
        self.dtype = dtype
        self._layers = split_layers(params.n_layers, len(devices))
        self._stages = [
            Transformer(params, load_stage(stage_names(params, layers), device), device, dtype)
            for layers, device in zip(self._layers, devices, strict=True)
        ]

    @torch.inference_mode()
    def last_logits(self, inputs_BSD: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, (B, V) float32."""
        num_parts = min(len(inputs_BSD), MICRO_BATCHES_A_STAGE * len(self._stages))
        parts = torch.tensor_split(inputs_BSD, num_parts)
        return torch.cat([self._through(part_BSD) for part_BSD in parts])

    def _through(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        for stage, layers in zip(self._stages, self._layers, strict=True):
            moved_BSD = hidden_BSD.to(stage.device, non_blocking=True)
            hidden_BSD = stage.blocks(moved_BSD, layers, with_last=stage is self._stages[-1])
        return self._stages[-1].head(hidden_BSD).to(self.device, non_blocking=True)


def stage_names(params: ModelParams, layers: range) -> frozenset[str]:
    """Parameters that a stage reads: its blocks', and the final norm and head in the last one."""
    suffixes = (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    names = {f"layers.{layer}.{suffix}.weight" for layer in layers for suffix in suffixes}
    return frozenset(names | {"norm.weight", "output.weight"} if layers.stop == params.n_layers else names)
