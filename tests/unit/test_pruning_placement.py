"""Where a model goes while it is observed, and layers that are cut into runs; numbers by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_moe import FAMILIES, write_inputs, write_tiny

from sparkray.config.pruning import CalibrationConfig, ObserveConfig, PlacementName
from sparkray.errors import UnavailableError, UsageError
from sparkray.pruning.calibration import read_calibration
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.layer_range import LayerRangeObserver
from sparkray.pruning.observation import ShardObserver
from sparkray.pruning.placement import choose_placement, layer_parts, split_layers


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 6))
def test_runs_cover_all_layers_and_the_largest_is_as_small_as_can_be(sizes: list[int], num_parts: int) -> None:
    parts = split_layers(sizes, num_parts)
    assert [layer for part in parts for layer in part] == list(range(len(sizes)))
    assert len(parts) == min(num_parts, len(sizes)) and all(parts)

    def best(start: int, left: int) -> int:
        if left == 1:
            return sum(sizes[start:])
        return min(max(sum(sizes[start:end]), best(end, left - 1)) for end in range(start + 1, len(sizes) - left + 2))

    assert max(sum(sizes[part.start : part.stop]) for part in parts) == best(0, len(parts))


def checkpoint_of(*layers: int, outside: int) -> Any:
    """Stands for headers alone: one tensor a layer of that many values."""
    tensors = {"embed": outside} | {f"model.layers.{number}.w": size for number, size in enumerate(layers)}
    entries = {name: SimpleNamespace(shape=(size,), dtype="BF16") for name, size in tensors.items()}
    config = {"num_hidden_layers": len(layers), "dtype": "bfloat16"}
    return SimpleNamespace(tensors=entries, config=config, family=SimpleNamespace(text_config=None))


@pytest.mark.parametrize(
    ("available", "placement"),
    [
        ([1000], "resident"),  # 2 * (100 + 4 * 100) bytes
        ([999], "streaming"),  # an embedding and one layer take 400
        ([999, 999], "layers"),  # an embedding and two layers take 600
        ([600, 700], "layers"),
        ([599, 700], "streaming"),
        ([400], "streaming"),
        ([2000, 1000, 1500], "resident"),
        ([450, 450, 450, 450], "layers"),
    ],
)
def test_the_first_placement_that_fits(available: list[int], placement: PlacementName) -> None:
    checkpoint = checkpoint_of(100, 100, 100, 100, outside=100)
    assert choose_placement(checkpoint, ObserveConfig(resident_share=1.0), available) == placement
    halved = ObserveConfig(resident_share=0.5)
    assert choose_placement(checkpoint, halved, [2 * size for size in available]) == placement


def test_what_cannot_be_placed_is_refused() -> None:
    checkpoint = checkpoint_of(100, 300, outside=100)
    with pytest.raises(UnavailableError, match="the largest layer takes"):
        choose_placement(checkpoint, ObserveConfig(resident_share=1.0), [799])
    with pytest.raises(UsageError, match="there is one node"):
        choose_placement(checkpoint, ObserveConfig(placement="layers"), [10**9])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_nodes_sum_to_the_same_bits(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny(tmp_path / "model", family))
    data = read_calibration(write_inputs(tmp_path / "inputs.json"), CalibrationConfig())
    config = ObserveConfig(placement="streaming", micro_batch_sequences=2)
    first, second = (
        LayerRangeObserver(checkpoint, config, part) for part in layer_parts(checkpoint, itemsize=4, num_parts=2)
    )
    shards = data.shards(4)
    for shard, whole in zip(shards, ShardObserver(checkpoint, config).observe(shards), strict=True):
        hidden, sums = first.observe(shard, None)
        sums.merge(second.observe(shard, hidden)[1])
        assert set(sums) == set(whole)
        for name, array in whole.to_arrays().items():
            np.testing.assert_array_equal(sums.to_arrays()[name], array, err_msg=name)
