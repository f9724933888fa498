"""What fits on a DGX Spark, in decimal gigabytes worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.hardware import DGX_SPARK, Demand, ModelShape, NodeMemory, fit, fit_inference, fit_training
from sparkray.hardware.fit import KNOWN_SHAPES, most_bits

SHAPES = {shape.name: shape for shape in KNOWN_SHAPES}
GB = 1e9


def test_a_spark_has_104_usable_gb() -> None:
    # 121.69 * 2**30 = 130.66e9; 80 % of it.
    assert pytest.approx(130.66e9, rel=1e-4) == DGX_SPARK.total_bytes
    assert pytest.approx(104.53e9, rel=1e-4) == DGX_SPARK.usable_bytes


def test_what_is_available_bounds_what_is_usable() -> None:
    assert replace(DGX_SPARK, available_bytes=50 * GB).usable_bytes == 50 * GB
    assert replace(DGX_SPARK, available_bytes=120 * GB).usable_bytes == DGX_SPARK.usable_bytes


@pytest.mark.parametrize(
    ("name", "bits", "weights_gb"),
    [("7B", 16, 15.2), ("14B", 16, 29.6), ("32B", 16, 65.6), ("72B", 16, 145.4), ("72B", 4, 40.9), ("30B-A3B", 16, 61)],
)
def test_weights(name: str, bits: int, weights_gb: float) -> None:
    assert replace(SHAPES[name], bits=bits).weight_bytes / GB == pytest.approx(weights_gb, abs=0.05)


def test_kv_cache_of_one_token() -> None:
    # 72B: 2 * 80 layers * 8 heads * 128 * 2 bytes; 30B-A3B: 2 * 48 * 4 * 128 * 2.
    assert SHAPES["72B"].kv_bytes_per_token == 327_680
    assert SHAPES["30B-A3B"].kv_bytes_per_token == 98_304
    assert replace(SHAPES["72B"], kv_bits=8).kv_bytes_per_token == 163_840


@pytest.mark.parametrize(
    ("name", "bits", "num_nodes", "fits", "needed_gb"),
    [
        ("72B", 16, 1, False, 145.4 + 10.74),  # 32768 * 327680 = 10.74e9
        ("72B", 16, 2, True, 72.7 + 5.37),
        ("72B", 4, 1, True, 40.89 + 10.74),
        ("32B", 16, 1, True, 65.6 + 8.59),
        ("30B-A3B", 16, 1, True, 61.0 + 3.22),
    ],
)
def test_serving_on_sparks(name: str, bits: int, num_nodes: int, fits: bool, needed_gb: float) -> None:
    found = fit_inference(replace(SHAPES[name], bits=bits), DGX_SPARK, num_nodes=num_nodes)
    assert found.fits is fits
    assert found.needed_bytes_per_node / GB == pytest.approx(needed_gb, abs=0.02)


def test_the_reason_carries_the_numbers() -> None:
    why = fit_inference(SHAPES["72B"], DGX_SPARK, context_tokens=1000).why
    assert why == (
        "72B weights at 16 bits 145.4 GB + KV cache of 1000 tokens 0.3 GB = 145.7 GB a node does not fit "
        "in the 104.5 GB usable of 130.7 GB on DGX Spark"
    )
    assert "72.7 GB (1/2 of 145.4 GB)" in fit_inference(SHAPES["72B"], DGX_SPARK, num_nodes=2).why


@pytest.mark.parametrize(
    ("name", "num_nodes", "fits", "needed_gb"),
    [("7B", 1, False, 121.6), ("7B", 2, True, 60.8), ("14B", 2, False, 118.4), ("32B", 2, False, 262.4)],
)
def test_full_training_over_sparks(name: str, num_nodes: int, fits: bool, needed_gb: float) -> None:
    found = fit_training(SHAPES[name], DGX_SPARK, method="full", num_nodes=num_nodes)
    assert found.fits is fits
    assert found.needed_bytes_per_node / GB == pytest.approx(needed_gb, abs=0.05)


def test_training_beside_an_engine() -> None:
    engine_7b = Demand("engine", SHAPES["7B"].weight_bytes)
    assert fit_training(SHAPES["7B"], DGX_SPARK, method="full", num_nodes=2, beside=[engine_7b]).fits
    # 72B in bf16 with LoRA, 72.7 GB a node, and a second bf16 copy in the engine: 145.4 GB a node.
    large = SHAPES["72B"]
    copy = Demand("engine", large.weight_bytes, num_shards=2)
    found = fit_training(large, DGX_SPARK, method="lora", num_nodes=2, beside=[copy])
    assert not found.fits
    assert found.needed_bytes_per_node / GB == pytest.approx(145.4, abs=0.05)
    # The way out: 4 bits in the engine, 20.4 GB a node.
    small_copy = Demand("engine", replace(large, bits=4).weight_bytes, num_shards=2)
    assert fit_training(large, DGX_SPARK, method="lora", num_nodes=2, beside=[small_copy]).fits
    assert fit_training(replace(large, bits=4), DGX_SPARK, method="lora").fits


def test_most_bits() -> None:
    found = {name: most_bits(shape, DGX_SPARK) for name, shape in SHAPES.items()}
    assert found == {"7B": 16, "14B": 16, "30B-A3B": 16, "32B": 16, "72B": 8}
    assert most_bits(SHAPES["72B"], DGX_SPARK, num_nodes=2) == 16
    assert most_bits(replace(SHAPES["72B"], bits=4), DGX_SPARK, num_nodes=2) == 4
    assert most_bits(SHAPES["72B"], NodeMemory("laptop", 16 * GB)) is None


@given(
    parts=st.lists(st.tuples(st.floats(0, 1e12), st.integers(1, 64)), min_size=1, max_size=5),
    total=st.floats(1e6, 1e12),
)
def test_fit_is_the_sum_against_the_limit(parts: list[tuple[float, int]], total: float) -> None:
    node = NodeMemory("node", total)
    found = fit([Demand("part", size, shards) for size, shards in parts], node)
    assert found.needed_bytes_per_node == pytest.approx(sum(size / shards for size, shards in parts))
    assert found.fits is (found.needed_bytes_per_node <= 0.8 * total)


@given(num_nodes=st.integers(1, 64))
def test_the_kv_cache_is_copied_beyond_the_number_of_heads(num_nodes: int) -> None:
    shape = ModelShape("tiny", 0, 1, 4, 1, kv_bits=8)  # 8 bytes a token
    found = fit_inference(shape, DGX_SPARK, num_nodes=num_nodes, context_tokens=100)
    assert found.needed_bytes_per_node == pytest.approx(800 / min(num_nodes, 4))
