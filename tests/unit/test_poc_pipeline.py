"""A model over several devices gives the verdicts of one; devices are logical here, on `tests/gpu` they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.poc import R_TARGET_DEFAULT, TINY, ModelParams, WeightsConfig
from sparkray.errors import UsageError
from sparkray.poc.engine import Engine
from sparkray.poc.pipeline import split_layers, stage_names
from sparkray.poc.proofs import ProofBatch
from sparkray.poc.validation import NoiseBand, validate
from sparkray.poc.weights import parameter_shapes

NUM_NONCES = 2048


def engine(num_devices: int, batch_size: int, **changes: object) -> Engine:
    params = TINY.model_copy(update=changes)
    return Engine("0x5", params, WeightsConfig(), device="cpu", batch_size=batch_size, num_devices=num_devices)


def test_no_verdict_changes_between_four_shards_and_one() -> None:
    # Another batch size too, so that products have other shapes on the two sides.
    engines = {4: engine(4, 64), 1: engine(1, 100)}
    distances = {shards: made.distances("key", range(NUM_NONCES)) for shards, made in engines.items()}
    assert np.array_equal(distances[4] < R_TARGET_DEFAULT, distances[1] < R_TARGET_DEFAULT)
    for maker, checker in ((4, 1), (1, 4)):
        dist = distances[maker]
        batch = ProofBatch("key", "0x5", 1, tuple(range(NUM_NONCES)), tuple(dist.tolist()), 0).sub_batch(
            R_TARGET_DEFAULT
        )
        assert len(batch) > NUM_NONCES // 3
        result = validate(
            batch, engines[checker].distances, r_target=R_TARGET_DEFAULT, fraud_threshold=0.01, band=NoiseBand(1e-6)
        )
        assert result.num_computed == len(batch)
        assert result.verdict.n_invalid == 0
        assert result.outside_band == ()


def test_shards_compute_what_one_device_computes_with_grouped_heads_and_uneven_stages() -> None:
    one = engine(1, 8, n_layers=5, n_kv_heads=2)
    for num_devices in (2, 3, 5):
        assert engine(num_devices, 8, n_layers=5, n_kv_heads=2).distances("key", range(20)) == pytest.approx(
            one.distances("key", range(20)), abs=1e-6
        )


def test_every_stage_matters() -> None:
    made = engine(4, 8)
    inputs = torch.randn(4, TINY.seq_len, TINY.dim, generator=torch.Generator().manual_seed(1)).half()
    whole = made._model.last_logits(inputs)
    made._model._stages[2] = lambda hidden: hidden  # type: ignore[union-attr,call-overload,assignment]
    assert not torch.equal(made._model.last_logits(inputs), whole)


@given(st.integers(1, 80), st.integers(1, 80))
def test_stages_cover_every_block_once_and_are_even(num_layers: int, num_stages: int) -> None:
    if num_stages > num_layers:
        with pytest.raises(UsageError, match="blocks"):
            split_layers(num_layers, num_stages)
        return
    stages = split_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert {len(stage) for stage in stages} <= {num_layers // num_stages, -(-num_layers // num_stages)}


def test_stages_read_each_parameter_once_but_the_embedding() -> None:
    params = ModelParams(dim=64, n_layers=3, n_heads=2, n_kv_heads=2)
    names = [name for layers in split_layers(3, 2) for name in stage_names(params, layers)]
    assert sorted(names) == sorted(set(parameter_shapes(params)) - {"tok_embeddings.weight"})
