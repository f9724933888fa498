"""A run of neighbouring layers on one node: hidden states come in, hidden states and statistics go out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparkray.config.pruning import ObserveConfig
from sparkray.pruning.calibration import CalibrationShard
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.layered_model import LayeredModel, resolve_dtype
from sparkray.pruning.observation import expert_observer, micro_batches
from sparkray.pruning.statistics import Statistics

Hidden = list[torch.Tensor]


class LayerRangeObserver:
    """Holds the layers `layers` of a model and runs shards through them.

    Args:
        checkpoint: the model.
        config: how the forwards run.
        layers: numbers of the layers, neighbours in ascending order.
    """

    def __init__(self, checkpoint: Checkpoint, config: ObserveConfig, layers: range) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.layers = layers
        self._model = LayeredModel(checkpoint, resolve_dtype(config.dtype, checkpoint), config.device)
        self._model.load_layers(layers)

    def observe(self, shard: CalibrationShard, hidden: Sequence[torch.Tensor] | None) -> tuple[Hidden, Statistics]:
        """Run one shard.

        Args:
            shard: the shard's tokens; masks and positions are made from them at every node.
            hidden: hidden states [B, T, H] before the first of these layers, one tensor a micro-batch; None for
                layer 0.

        Returns:
            Hidden states after the last of these layers, on the CPU, and the statistics of these layers.
        """
        model = self._model
        before: Sequence[torch.Tensor | None] = hidden or []
        after: Hidden = []
        with expert_observer(model.model, self.checkpoint, self.config) as observer:
            for place, (ids_BT, mask_BT) in enumerate(
                micro_batches(shard.sequences, self.config.micro_batch_sequences)
            ):
                state_BTH = before[place] if before else None
                if state_BTH is not None:
                    state_BTH = state_BTH.to(model.device)
                with observer.watching(mask_BT.to(model.device)):
                    for layer in self.layers:
                        state_BTH = model.step(layer, ids_BT, mask_BT, state_BTH)
                assert state_BTH is not None
                after.append(state_BTH.cpu())
            return after, observer.take()
