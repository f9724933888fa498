"""Proof of compute on a CUDA device: graphs, streams and shifted pools give what the CPU gives."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from sparkray.config.poc import R_TARGET_DEFAULT, TINY, V1, ModelParams, WeightsConfig
from sparkray.poc.engine import Engine
from sparkray.poc.hardened.proof import HardenedProver
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.statistics import share_z_score

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SEQUENTIAL = WeightsConfig(name="sequential", pool_fraction=None)
# The widest difference of the original's float16 to float32 at vocabularies of this size.
FLOAT16_TOLERANCE = 3e-4
WIDE = ModelParams(
    dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=2049, ffn_dim_multiplier=2.0, multiple_of=256, seq_len=24
)
HARDENED = ModelParams(
    dim=64, n_layers=5, n_heads=4, n_kv_heads=2, vocab_size=1021, ffn_dim_multiplier=2.0, multiple_of=64,
    rope_theta=1e4, seq_len=8,
)  # fmt: skip


@pytest.mark.parametrize("weights", [WeightsConfig(), WeightsConfig(pool_fraction=0.5), SEQUENTIAL])
@pytest.mark.parametrize("params", [TINY, WIDE])
def test_distances_are_those_of_the_cpu(params: ModelParams, weights: WeightsConfig) -> None:
    on_cpu = Engine("0x5", params, weights, device="cpu", batch_size=32).distances("key", range(100))
    on_cuda = Engine("0x5", params, weights, device="cuda", batch_size=32).distances("key", range(100))
    assert on_cuda == pytest.approx(on_cpu, abs=FLOAT16_TOLERANCE)


def test_graphs_and_a_short_last_batch_change_no_bit() -> None:
    with_graphs = Engine("0x5", WIDE, WeightsConfig(), device="cuda", batch_size=16)
    without = Engine("0x5", WIDE, WeightsConfig(), device="cuda", batch_size=16, graphs=False)
    nonces = range(3 * 16 + 5)
    first = with_graphs.distances("key", nonces)
    assert np.array_equal(first, without.distances("key", nonces))
    # The batch's shape is fixed, so a nonce's bits do not depend on its neighbours.
    assert np.array_equal(with_graphs.distances("key", [40]), first[40:41])


def test_a_long_stream_keeps_nonces_and_distances_together() -> None:
    engine = Engine("0x5", TINY, WeightsConfig(), device="cuda", batch_size=64)
    stream = engine.stream("key", NonceIterator(1, 3))
    found = {
        nonce: value
        for part in islice(stream, 40)
        for nonce, value in zip(part.nonces, part.dist.tolist(), strict=True)
    }
    stream.close()
    sample = sorted(found)[::97]
    expected = Engine("0x5", TINY, WeightsConfig(), device="cpu", batch_size=64).distances("key", sample)
    assert [found[nonce] for nonce in sample] == pytest.approx(expected, abs=FLOAT16_TOLERANCE)


def test_the_on_chain_shape_gives_the_recorded_distances() -> None:
    engine = Engine("0xabc123", V1, WeightsConfig(), device="cuda", batch_size=8)
    expected = [1.4097441, 1.4021943, 1.4237222, 1.4102133]
    assert engine.distances("pubkey1", range(4)) == pytest.approx(expected, abs=1e-4)


def test_the_share_of_valid_nonces_is_the_one_of_theory() -> None:
    dist = Engine("0x5", WIDE, WeightsConfig(), device="cuda", batch_size=256).distances("key", range(4096))
    num_valid = int((dist < R_TARGET_DEFAULT).sum())
    assert abs(share_z_score(num_valid, 4096, R_TARGET_DEFAULT, WIDE.vocab_size)) < 5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_share_a_model() -> None:
    one = Engine("0x5", WIDE, WeightsConfig(), device="cuda:0", batch_size=32).distances("key", range(100))
    two = Engine("0x5", WIDE, WeightsConfig(), device="cuda:0", batch_size=32, num_devices=2)
    assert two.distances("key", range(100)) == pytest.approx(one, abs=FLOAT16_TOLERANCE)


def test_hardened_proofs_are_the_same_bits_on_the_device() -> None:
    on_cpu = HardenedProver("0xabc", "key", HARDENED, "cpu").prove(range(40))
    on_cuda = HardenedProver("0xabc", "key", HARDENED, "cuda")
    for size in (1, 7, 40):
        found = [proof for start in range(0, 40, size) for proof in on_cuda.prove(range(start, min(start + size, 40)))]
        assert found == on_cpu
