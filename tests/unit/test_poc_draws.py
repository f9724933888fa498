"""Seeds, weights, inputs and targets against values recorded from the original."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.poc import TINY, V1, V2, ModelParams, WeightsConfig
from sparkray.errors import UsageError
from sparkray.poc.inputs import draw_input, draw_permutation, draw_target
from sparkray.poc.seeds import generator, to_float16, words
from sparkray.poc.weights import MIN_POOL_NUMEL, draw_pool, draw_sequential, place, pool_layout, pool_numel


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def test_words_are_the_digests_as_little_endian_words() -> None:
    first, second = hashlib.sha256(b"abc_0").digest(), hashlib.sha256(b"abc_1").digest()
    assert words("abc", 2).tolist() == list(struct.unpack("<16I", first + second))
    assert words("0x00", 1)[:3].tolist() == [509108904, 3324738972, 2898260372]


def test_generator_state_and_normals_are_the_originals() -> None:
    rng = generator("0xabc123", 4)
    assert hex(rng.bit_generator.state["state"]["state"]) == "0x5cfeba536219f68a451d0008e0ac79fb"
    assert rng.standard_normal(2).tolist() == [-0.4773369875485631, 0.47848960899706583]
    assert generator("test", 1).permutation(8).tolist() == [7, 2, 3, 0, 5, 1, 6, 4]


def test_input_permutation_and_target_digests() -> None:
    params = ModelParams(dim=1024, seq_len=128, n_heads=32, n_kv_heads=32)
    values = draw_input("test", "test", 0, params)
    assert digest(values) == "507c26e0f71185acea666223d1f8ab35bd3ac2eef2a4daf339d17c1a1dda6d3d"
    assert digest(to_float16(values)) == "ef6b222c751f6df5b6663e5789fe26a9d4ac6903f70296b4b60dace116d1582f"
    # The two ways of rounding differ here, so the digest above proves the double one.
    assert int((to_float16(values) != values.astype(np.float16)).sum()) == 6
    assert digest(draw_permutation("test", "test", 0, 8196)) == (
        "bd6b3536ebc4f4ca4ad8df575a8217f597f6e74d173e001cafb06e702423c137"
    )
    assert digest(draw_target("0x00", 8196)) == "23e46e6dc7e58dadb39df6dd08798a8b307d6c2f5ccc373d05b38fc19e8f6133"


def test_sizes_of_the_presets() -> None:
    assert (V1.num_params, V1.ffn_hidden) == (2_969_641_984, 28_672)
    assert (V2.num_params, V2.ffn_hidden) == (17_763_122_944, 49_152)
    assert (TINY.num_params, TINY.ffn_hidden, pool_numel(TINY, 0.05)) == (1_868_928, 1024, 93_446)
    assert pool_numel(TINY, 0.01) == MIN_POOL_NUMEL
    assert V1.flop_per_nonce == pytest.approx(0.758e12, rel=1e-3)


def test_pool_weights_in_both_branches() -> None:
    layout, pool = pool_layout("0x00", TINY, 0.05), draw_pool("0x00", TINY, 0.05)
    sliced, tiled = layout["layers.0.attention.wq.weight"], layout["layers.0.feed_forward.w1.weight"]
    assert (sliced.branch, sliced.start) == ("slice", 64_897)
    assert (tiled.branch, tiled.start) == ("tile", 101_588)
    assert digest(sliced.values(pool)) == "4bcbeb5eda3f2b320d3162947db6b49e5355896d5404fe4bb44fd6570b238d08"
    assert sliced.values(pool).base is pool
    everything = hashlib.sha256()
    for where in layout.values():
        everything.update(where.values(pool).tobytes())
    assert everything.hexdigest() == "73185d57deb68cfe269c7bef97bdd2eb0278d2cbb8850a905fea09ac1f822523"


def test_sequential_weights() -> None:
    everything = hashlib.sha256()
    for _, values in draw_sequential("0x00", TINY):
        everything.update(values.tobytes())
    assert everything.hexdigest() == "9abcf269dbb427ea17b85b817aa592d40b3d02bb6f31e0dc2a3772817d050aa9"


@given(numel=st.integers(1, 5000), pool_size=st.integers(1, 5000), name=st.text(max_size=8))
def test_a_placement_reads_the_pool_as_the_rule_says(numel: int, pool_size: int, name: str) -> None:
    pool = np.arange(pool_size).astype(np.float16)
    where = place("hash", name, numel, pool_size)
    number = int(hashlib.sha256(f"hash_{name}".encode()).hexdigest()[:8], 16)
    if numel <= pool_size:
        start = number % (pool_size - numel + 1)
        expected = [pool[start + index] for index in range(numel)]
    else:
        expected = [pool[((index + number % numel) % numel) % pool_size] for index in range(numel)]
    assert where.values(pool).tolist() == [float(value) for value in expected]


def test_each_way_of_drawing_has_a_name_of_its_own() -> None:
    assert WeightsConfig.parse("pool:0.01").label == "pool:0.01"
    assert WeightsConfig.parse("sequential").pool_fraction is None
    for bad in ("pool", "sequential:0.05", "pool:0", "pool:2", "tiles", "pool:x"):
        with pytest.raises(UsageError, match="pool"):
            WeightsConfig.parse(bad)
