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


class Stage:
    """A run of blocks on one device, with the final norm and the head where the last block is among them.

    Args:
        load_stage: gives a reader of the named weights on a device.
    """

    def __init__(
        self, params: ModelParams, layers: range, load_stage: LoadStage, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layers = layers
        self._is_last = layers.stop == params.n_layers
        self._model = Transformer(params, load_stage(stage_names(params, layers), device), device, dtype)

    def __call__(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """The state after these blocks, or from the last stage logits (B, V) float32; on this stage's device."""
        moved_BSD = hidden_BSD.to(self._model.device, non_blocking=True)
        after_BSD = self._model.blocks(moved_BSD, self._layers, with_last=self._is_last)
        return self._model.head(after_BSD) if self._is_last else after_BSD


class PipelinedTransformer:
    """The forward pass over `devices`; in and out are on the first one.

    Args:
        load_stage: see Stage.
    """

    def __init__(
        self, params: ModelParams, load_stage: LoadStage, devices: Sequence[torch.device], dtype: torch.dtype
    ) -> None:
        self.params = params
        self.device = devices[0]
        self.dtype = dtype
        self._stages = [
            Stage(params, layers, load_stage, device, dtype)
            for layers, device in zip(split_layers(params.n_layers, len(devices)), devices, strict=True)
        ]

    @torch.inference_mode()
    def last_logits(self, inputs_BSD: torch.Tensor) -> torch.Tensor:
        """Logits of the last position, (B, V) float32."""
        return torch.cat([self._through(part_BSD) for part_BSD in micro_batches(inputs_BSD, len(self._stages))])

    def _through(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        for stage in self._stages:
            hidden_BSD = stage(hidden_BSD)
        return hidden_BSD.to(self.device, non_blocking=True)


def micro_batches(inputs_BSD: torch.Tensor, num_stages: int) -> Sequence[torch.Tensor]:
    """A batch in as many pieces as keep `num_stages` busy, and no empty ones."""
    return torch.tensor_split(inputs_BSD, min(len(inputs_BSD), MICRO_BATCHES_A_STAGE * num_stages))


def stage_names(params: ModelParams, layers: range) -> frozenset[str]:
    """Parameters that a stage reads: its blocks', and the final norm and head in the last one."""
    suffixes = (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    names = {f"layers.{layer}.{suffix}.weight" for layer in layers for suffix in suffixes}
    return frozenset(names | {"norm.weight", "output.weight"} if layers.stop == params.n_layers else names)
