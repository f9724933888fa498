"""The statistics of a model over ready-made token ids, as one JSON object."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sparkray.config.pruning import CalibrationConfig, ObserveConfig
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.observation import Progress, observation_key, observe
from sparkray.pruning.partials import PartialStore


def saliency_report(
    directory: Path, inputs: Path, config: ObserveConfig, progress: Progress | None = None
) -> dict[str, Any]:
    """Every statistic of every sparse layer.

    Args:
        directory: the model.
        inputs: a JSON file with `input_ids` and `attention_mask` of shape [batches, rows, tokens], or any
            calibration file whose rows are token ids.
        config: how the forwards run.
        progress: called with (shards done, shards in all).

    Returns:
        `{"family", "gate_source", "masked_padding", "layers": {layer: fields}}`.
    """
    checkpoint = Checkpoint(directory)
    context = int(text_config(checkpoint.config, checkpoint.family).get("max_position_embeddings", 1 << 20))
    data = read_calibration(inputs, CalibrationConfig(max_sequence_tokens=max(2, context)))
    with tempfile.TemporaryDirectory(prefix="sparkray-saliency-") as folder:
        store = PartialStore(Path(folder), observation_key(checkpoint, data, config))
        statistics = observe(checkpoint, data, config, store, progress)
    return {
        "family": checkpoint.family.model_type,
        "gate_source": config.gate_source,
        "masked_padding": True,
        "layers": {layer: sums.to_json() for layer, sums in statistics.items()},
    }
