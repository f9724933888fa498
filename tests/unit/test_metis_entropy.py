"""Entropy against a float64 computation that shares no code with it, for every kernel."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.metis import entropy
from sparkray.metis.entropy import entropy_stats, fused_kernel, row_kernel

KERNELS = {"rows": row_kernel, "fused": fused_kernel, "chosen": lambda x: _pair(entropy_stats(x))}


def _pair(stats: entropy.EntropyStats) -> tuple[torch.Tensor, torch.Tensor]:
    return stats.entropy_B, stats.max_prob_B


def reference(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Plain Python floats over numpy rows; a forbidden token contributes nothing."""
    entropies, tops = [], []
    for row in logits.double().numpy():
        finite = [value for value in row.tolist() if value != -math.inf]
        top = max(finite)
        total = math.fsum(math.exp(value - top) for value in finite)
        probabilities = [math.exp(value - top) / total for value in finite]
        entropies.append(-math.fsum(p * math.log2(p) for p in probabilities if p > 0))
        tops.append(max(probabilities))
    return np.array(entropies), np.array(tops)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 4), ("float32", 60), ("float16", 4), ("bfloat16", 8)])
def test_random_rows(kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: str, scale: float) -> None:
    logits = (torch.randn(7, 3000, generator=torch.Generator().manual_seed(1)) * scale).to(getattr(torch, dtype))
    before = logits.clone()
    got, top = kernel(logits)
    wanted, wanted_top = reference(logits)
    assert got.dtype == top.dtype == torch.float32
    np.testing.assert_allclose(got, wanted, atol=4e-5)
    np.testing.assert_allclose(top, wanted_top, atol=1e-6, rtol=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_known_distributions(kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    inf = math.inf
    logits = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0],  # uniform over four
            [5.0, -inf, -inf, -inf],  # one allowed token
            [1.0, 1.0, -inf, -inf],  # a fair coin behind a grammar
            [math.log(0.5), math.log(0.25), math.log(0.125), math.log(0.125)],
            [1e4, -1e4, -1e4, -1e4],  # certain, far apart
        ]
    )
    got, top = kernel(logits)
    np.testing.assert_allclose(got, [2.0, 0.0, 1.0, 1.75, 0.0], atol=1e-6)
    np.testing.assert_allclose(top, [0.25, 1.0, 0.5, 0.5, 1.0], atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_row_without_distribution_is_nan_and_leaves_the_others_alone(
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> None:
    logits = torch.zeros(3, 8)
    logits[0] = -math.inf
    logits[1, 3] = math.nan
    got, _ = kernel(logits)
    assert torch.isnan(got[:2]).all()
    assert got[2].item() == pytest.approx(3.0)


@given(
    st.lists(st.one_of(st.floats(-80, 80), st.just(-math.inf)), min_size=2, max_size=40).filter(
        lambda row: max(row) > -math.inf
    )
)
@settings(max_examples=200, deadline=None)
def test_bounds_and_agreement(row: list[float]) -> None:
    logits = torch.tensor([row, row])
    stats = entropy_stats(logits)
    wanted, wanted_top = reference(logits)
    allowed = sum(value > -math.inf for value in row)
    assert 0 <= stats.entropy_B[0] <= math.log2(allowed) + 1e-5
    assert 1 / allowed - 1e-6 <= stats.max_prob_B[0] <= 1
    np.testing.assert_allclose(stats.entropy_B, wanted, atol=2e-5)
    np.testing.assert_allclose(stats.max_prob_B, wanted_top, atol=1e-6)


def test_the_published_formula_differs_by_less_than_a_ten_thousandth() -> None:
    logits = torch.randn(4, 49_152, generator=torch.Generator().manual_seed(2)) * 3
    p = torch.softmax(logits, -1)
    published = -(p * torch.log2(p + 1e-10)).sum(-1)
    np.testing.assert_allclose(entropy_stats(logits).entropy_B, published, atol=1e-4)


def test_a_compiler_that_fails_costs_one_warning_and_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def broken(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        raise OSError("no C++ compiler")

    monkeypatch.setattr(entropy, "compiled_kernel", lambda: broken)
    monkeypatch.setattr(entropy, "_compiled_kinds", set())
    monkeypatch.setattr(logging.getLogger("sparkray"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="sparkray.metis.entropy"):
        assert entropy.warm_up("cpu", torch.float32, 64) is False
        got = entropy_stats(torch.zeros(4, 64)).entropy_B
    assert got.tolist() == [6.0] * 4
    assert calls == 1
    assert [record.message for record in caplog.records] == [
        "the entropy kernel could not be compiled (OSError: no C++ compiler); going on with the uncompiled one"
    ]


def test_a_compiled_kernel_that_is_slower_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "compiled_kernel", lambda: fused_kernel)
    monkeypatch.setattr(entropy, "_compiled_kinds", set())
    timings = iter([2.0, 1.0])
    monkeypatch.setattr(entropy, "_seconds", lambda kernel, logits: next(timings))
    assert entropy.warm_up("cpu", torch.float32, 64) is False
    timings = iter([1.0, 2.0])
    assert entropy.warm_up("cpu", torch.float32, 64) is True


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_the_kernel_really_compiles_once_for_all_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "_compiled_kinds", {("cpu", torch.float32)})
    torch._dynamo.utils.counters.clear()
    for num_rows in (3, 5, 17):
        logits = torch.randn(num_rows, 515, generator=torch.Generator().manual_seed(num_rows)) * 4
        stats = entropy_stats(logits)
        np.testing.assert_allclose(stats.entropy_B, reference(logits)[0], atol=4e-5)
    assert ("cpu", torch.float32) in entropy._compiled_kinds, "the compiled kernel was given up"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
