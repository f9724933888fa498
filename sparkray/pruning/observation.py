"""Running the calibration set through a model, resident or streamed, one shard's sums at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import psutil
import torch

from sparkray.config.pruning import ObserveConfig
from sparkray.pruning.calibration import CalibrationSet, CalibrationShard, TokenSequence
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.layered_model import LayeredModel, open_device, resolve_dtype
from sparkray.pruning.layout import read_layout
from sparkray.pruning.observe import ExpertObserver
from sparkray.pruning.partials import ObservationKey, PartialStore
from sparkray.pruning.placement import choose_placement
from sparkray.pruning.statistics import Statistics

MicroBatch = tuple[torch.Tensor, torch.Tensor]
Progress = Callable[[int, int], None]


class ShardObserver:
    """Turns shards of a calibration set into statistics. Its state is the model alone, so it may run anywhere.

    Args:
        checkpoint: the model.
        config: how the forwards run; `placement` must be decided (`resident` or `streaming`).
    """

    def __init__(self, checkpoint: Checkpoint, config: ObserveConfig) -> None:
        self.config = config
        self.checkpoint = checkpoint
        dtype = resolve_dtype(config.dtype, checkpoint)
        self._model = LayeredModel(checkpoint, dtype, config.device)
        if config.placement == "resident":
            self._model.load_layers(range(self._model.num_layers))

    def observe(self, shards: Sequence[CalibrationShard]) -> list[Statistics]:
        """Statistics of every shard. Streaming reads the checkpoint once for all of them."""
        with expert_observer(self._model.model, self.checkpoint, self.config) as observer:
            if self.config.placement == "resident":
                return [self._observe_resident(observer, shard) for shard in shards]
            return self._observe_streaming(observer, shards)

    def _observe_resident(self, observer: ExpertObserver, shard: CalibrationShard) -> Statistics:
        for ids_BT, mask_BT in micro_batches(shard.sequences, self.config.micro_batch_sequences):
            with observer.watching(mask_BT.to(self._model.device)):
                self._model.run(ids_BT, mask_BT)
        return observer.take()

    def _observe_streaming(self, observer: ExpertObserver, shards: Sequence[CalibrationShard]) -> list[Statistics]:
        batches = [list(micro_batches(shard.sequences, self.config.micro_batch_sequences)) for shard in shards]
        hidden: list[list[torch.Tensor | None]] = [[None] * len(part) for part in batches]
        statistics = [Statistics() for _ in shards]
        for layer in range(self._model.num_layers):
            self._model.load_layers([layer])
            for shard, part in enumerate(batches):
                for place, (ids_BT, mask_BT) in enumerate(part):
                    with observer.watching(mask_BT.to(self._model.device)):
                        hidden[shard][place] = self._model.step(layer, ids_BT, mask_BT, hidden[shard][place])
                statistics[shard].merge(observer.take())
            self._model.free_layer(layer)
        return statistics


def observe(
    checkpoint: Checkpoint,
    data: CalibrationSet,
    config: ObserveConfig,
    store: PartialStore,
    progress: Progress | None = None,
) -> Statistics:
    """Observe the shards that `store` lacks and return the sum over all of them.

    Args:
        checkpoint: the model.
        data: the calibration set.
        config: how the forwards run.
        store: where partial sums are kept; a killed run goes on from there.
        progress: called with (shards done, shards in all).
    """
    check_data(checkpoint, data)
    shards = data.shards(config.shard_sequences)
    missing = [shard for shard in shards if not store.has(shard.number)]
    if missing:
        placement = choose_placement(checkpoint, config, [available_bytes(config.device)])
        config = config.model_copy(update={"placement": placement})
        observer = ShardObserver(checkpoint, config)
        for group in shard_groups(missing, checkpoint, config):
            for shard, statistics in zip(group, observer.observe(group), strict=True):
                store.write(shard.number, statistics)
            if progress is not None:
                progress(sum(store.has(shard.number) for shard in shards), len(shards))
    return store.merged(len(shards))


def observation_key(checkpoint: Checkpoint, data: CalibrationSet, config: ObserveConfig) -> ObservationKey:
    """The key under which this observation's partial sums are kept."""
    dtype = str(resolve_dtype(config.dtype, checkpoint))
    return ObservationKey.of(checkpoint.identity, data.identity, config, dtype)


def check_data(checkpoint: Checkpoint, data: CalibrationSet) -> None:
    """Refuse data that the model cannot read, and a model that has no known experts, before anything is loaded."""
    read_layout(checkpoint)
    config = text_config(checkpoint.config, checkpoint.family)
    max_position = config.get("max_position_embeddings")
    data.check_vocabulary(int(config["vocab_size"]), max_position if isinstance(max_position, int) else None)


def expert_observer(model: torch.nn.Module, checkpoint: Checkpoint, config: ObserveConfig) -> ExpertObserver:
    """The observer that the settings describe, for a model of this checkpoint."""
    renormalize = config.renormalize_upstream
    if renormalize is None:
        renormalize = bool(text_config(checkpoint.config, checkpoint.family).get("norm_topk_prob", False))
    return ExpertObserver(model, checkpoint.family.interface, config.gate_source, renormalize)


def shard_groups(
    shards: Sequence[CalibrationShard], checkpoint: Checkpoint, config: ObserveConfig
) -> Iterator[Sequence[CalibrationShard]]:
    """Shards that go through the model together: one by one when resident; as many as their hidden states allow."""
    if config.placement != "streaming":
        yield from ([shard] for shard in shards)
        return
    hidden_size = int(text_config(checkpoint.config, checkpoint.family)["hidden_size"])
    itemsize = resolve_dtype(config.dtype, checkpoint).itemsize
    group: list[CalibrationShard] = []
    used = 0.0
    for shard in shards:
        needed = sum(len(sequence.ids) for sequence in shard.sequences) * hidden_size * itemsize / 1e9
        if group and used + needed > config.streamed_hidden_gb:
            yield group
            group, used = [], 0.0
        group.append(shard)
        used += needed
    yield group


def micro_batches(sequences: Sequence[TokenSequence], size: int) -> Iterator[MicroBatch]:
    """(ids [B, T], mask [B, T]) of `size` sequences each, padded at the end with zeros."""
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        length = max(len(sequence.ids) for sequence in part)
        ids = [(*sequence.ids, *(0,) * (length - len(sequence.ids))) for sequence in part]
        mask = [(*sequence.mask, *(0,) * (length - len(sequence.ids))) for sequence in part]
        yield torch.tensor(ids), torch.tensor(mask)


def available_bytes(device: str) -> int:
    """Memory of this machine that a model on `device` may take."""
    if open_device(device).type == "cuda":
        # Unified memory reports the machine's: the smaller of the two is what can be used.
        return min(torch.cuda.mem_get_info(device)[0], psutil.virtual_memory().available)
    return psutil.virtual_memory().available
