"""Nonce classes, batches of proofs, statistics, batch sizes, groups, phases."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.base import load_settings
from sparkray.config.poc import TINY, V1, V2, ModelParams, PocConfig, WeightsConfig
from sparkray.errors import InputError, UnavailableError, UsageError
from sparkray.poc import batch_size
from sparkray.poc.batch_size import batch_size_v1, batch_size_v2, formula_batch_size
from sparkray.poc.groups import create_gpu_groups, device_vram, get_min_group_vram, network_min_group_vram
from sparkray.poc.local import make_engine
from sparkray.poc.nonces import NonceIterator
from sparkray.poc.phases import Phase, PowState, pow_state
from sparkray.poc.proofs import InValidation, ProofBatch, ValidatedBatch
from sparkray.poc.statistics import (
    Decision,
    SequentialTest,
    binomial_tail,
    mismatch_probability,
    share_z_score,
    valid_density,
    valid_share,
)

BATCH = ProofBatch("key", "0x1", 7, (5, 3, 9), (1.5, 1.2, 1.3), 0)


@given(node_groups=st.lists(st.integers(1, 4), min_size=1, max_size=5), count=st.integers(1, 20))
def test_nonces_of_all_groups_are_disjoint_and_complete(node_groups: list[int], count: int) -> None:
    num_nodes = len(node_groups)
    bound = num_nodes * count
    seen: list[int] = []
    for node_id, num_groups in enumerate(node_groups):
        for group_id in range(num_groups):
            nonces = NonceIterator(node_id, num_nodes, group_id, num_groups)
            while (nonce := next(nonces)) < bound:
                seen.append(nonce)
    assert sorted(seen) == list(range(bound))


def test_a_stored_cursor_goes_on_where_the_worker_was() -> None:
    nonces = NonceIterator(1, 2, 1, 3)
    assert nonces.take(3) == (3, 9, 15)
    assert NonceIterator(1, 2, 1, 3, cursor=nonces.cursor).take(2) == (21, 27)
    with pytest.raises(InputError, match="node_id=2"):
        NonceIterator(2, 2)


def test_batches_merge_split_and_sort() -> None:
    other = replace(BATCH, nonces=(1,), dist=(1.4,), node_id=3)
    merged = ProofBatch.merge([BATCH, other])
    assert (merged.nonces, merged.dist, merged.node_id) == ((5, 3, 9, 1), (1.5, 1.2, 1.3, 1.4), 0)
    assert merged.sort_by_nonce().dist == (1.4, 1.2, 1.5, 1.3)
    assert merged.sub_batch(1.4).nonces == (3, 9)
    assert [part.nonces for part in merged.split(3)] == [(5, 3, 9), (1,)]
    assert ProofBatch.merge([]) == ProofBatch.empty() and not ProofBatch.empty().split(4)
    foreign = replace(other, public_key="another")
    with pytest.raises(InputError, match="another"):
        ProofBatch.merge([BATCH, foreign])
    assert [len(batch) for batch in ProofBatch.merge_by_public_key([BATCH, foreign, other])] == [1, 4]
    assert ProofBatch.from_wire(merged.to_wire()) == merged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonces": [1, 2]}, "2 nonces and 3 distances"),
        ({"nonces": [1, 2, "x"]}, "whole numbers"),
        ({"nonces": [1, 2, True]}, "whole numbers"),
        ({"dist": None}, "could not be read"),
        ({"public_key": 5}, "a text is expected"),
    ],
)
def test_a_body_that_is_no_batch_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProofBatch.from_wire({**BATCH.to_wire(), **change})
    with pytest.raises(InputError, match="without 'nonces'"):
        ProofBatch.from_wire({"public_key": "k", "block_hash": "h", "block_height": 1})


def test_validation_waits_for_every_nonce_and_knows_its_deadline() -> None:
    waiting = InValidation(BATCH, deadline=10.0)
    waiting.process(replace(BATCH, nonces=(3, 5, 77), dist=(1.2, 1.6, 1.0)))
    waiting.process(replace(BATCH, nonces=(9,), dist=(1.3,), block_hash="0x2"))
    assert waiting.missing == (9,) and not waiting.is_ready
    assert waiting.is_expired(10.0) and not waiting.is_expired(9.9)
    with pytest.raises(InputError, match="1 of 3"):
        waiting.validated(1.55, 0.01)
    waiting.process(replace(BATCH, nonces=(9,), dist=(1.3,)))
    verdict = waiting.validated(1.55, 0.01)
    assert verdict.batch.dist == (1.6, 1.2, 1.3) and verdict.received_dist == BATCH.dist
    assert verdict.n_invalid == 1
    assert verdict.probability_honest == pytest.approx(1 - (1 - 5e-4) ** 3)
    assert verdict.fraud_detected


def test_an_empty_batch_is_honest_and_the_target_itself_is_valid() -> None:
    assert ValidatedBatch.judge(ProofBatch.empty(), (), 1.4, 1e-7).probability_honest == 1.0
    at_target = replace(BATCH, dist=(1.4, 1.4, 1.4))
    assert ValidatedBatch.judge(at_target, BATCH.dist, 1.4, 1e-7).n_invalid == 0
    assert len(at_target.sub_batch(1.4)) == 0


@given(n=st.integers(1, 60), k=st.integers(0, 60), p=st.fractions(Fraction(1, 1000), Fraction(999, 1000)))
def test_binomial_tail_is_the_exact_sum(n: int, k: int, p: Fraction) -> None:
    exact = sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)), Fraction(0))
    assert binomial_tail(k, n, float(p)) == pytest.approx(float(exact), rel=1e-10, abs=1e-300)


def test_fraud_verdict_of_the_original() -> None:
    assert binomial_tail(30, 100, 5e-4) == pytest.approx(2.6443893291706105e-74, rel=1e-10)
    needed = {n: next(k for k in range(n) if binomial_tail(k, n, 5e-4) < 1e-7) for n in (100, 200, 1000, 2000)}
    assert needed == {100: 5, 200: 5, 1000: 8, 2000: 11}


def test_share_of_valid_nonces() -> None:
    assert valid_share(1.4013564660458173, 8196) == pytest.approx(0.0506, abs=5e-5)
    assert valid_share(1.39635417620795, 128) == pytest.approx(0.389, abs=5e-4)
    assert valid_share(math.sqrt(2), 8196) == pytest.approx(0.5, abs=1e-12)
    # On a circle the share is an angle, on a sphere the height of a cap.
    assert valid_share(1.0, 2) == pytest.approx(1 / 3, rel=1e-12)
    assert valid_share(1.0, 3) == pytest.approx(1 / 4, rel=1e-12)
    assert valid_share(1.8, 3) == pytest.approx(1.8**2 / 4, rel=1e-12)
    assert (valid_share(0.0, 9), valid_share(5.0, 9)) == (0.0, 1.0)
    assert valid_density(1.0, 3) == pytest.approx(0.5, rel=1e-6)


def test_observed_share_as_a_z_score() -> None:
    share = valid_share(1.0, 3)
    assert share_z_score(250 + 40, 1000, 1.0, 3) == pytest.approx(40 / math.sqrt(1000 * share * (1 - share)))
    assert share_z_score(10, 10, 2.5, 3) == 0.0
    assert share_z_score(9, 10, 2.5, 3) == -math.inf


def test_mismatch_probability_follows_the_noise() -> None:
    # The network's constant 5e-4 holds for a noise of 4.8e-6 at its default target.
    assert mismatch_probability(4.8e-6, 1.4013564660458173, 8196) == pytest.approx(5e-4, rel=0.01)


def test_sequential_test_accepts_and_refuses_by_walds_bounds() -> None:
    honest = SequentialTest(p_honest=5e-4, p_fraud=0.05, false_alarm=1e-7, missed=1e-3)
    while honest.observe(False) is Decision.CONTINUE:
        pass
    assert (honest.decision, honest.num_checked) == (Decision.HONEST, 136)
    fraud = SequentialTest(p_honest=5e-4, p_fraud=0.05, false_alarm=1e-7, missed=1e-3)
    while fraud.observe(True) is Decision.CONTINUE:
        pass
    # ln(0.999e7) / ln(100) = 3.5
    assert (fraud.decision, fraud.num_checked) == (Decision.FRAUD, 4)
    assert fraud.observe(False) is Decision.FRAUD and fraud.num_checked == 4


def test_batch_sizes_of_the_original() -> None:
    sizes = {8192: 28, 16384: 270, 24268: 502, 81559: 2193, 131072: 3654}
    assert {total: batch_size_v1(total) for total in sizes} == sizes
    with pytest.raises(UnavailableError, match="7000 MB"):
        batch_size_v1(7000)
    free = {(80000,): 243, (47000,): 33, (40000,): 1, (23500,) * 2: 16, (80000, 40000): 121}
    assert {memory: batch_size_v2(memory, V2) for memory in free} == free


def test_the_formulas_are_had_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1024**2
    monkeypatch.setattr(batch_size, "memory_bytes", lambda _: (80_000 * mib, 81_559 * mib))
    config = PocConfig(block_hash="0x1", public_key="key", params=TINY, device="cpu", batch_size="v1")
    assert make_engine(config).batch_size == 2193
    assert formula_batch_size("v2", V2, [torch.device("cpu")]) == 243
    with pytest.raises(UsageError, match="batch_size"):
        load_settings(PocConfig, values=config.model_dump() | {"batch_size": "v3"})


def test_groups_are_greedy_from_the_first_device() -> None:
    def group(vram: list[float], least: float) -> list[tuple[int, ...]]:
        return [found.device_ids for found in create_gpu_groups(vram, least)]

    assert group([12] * 4, 23) == [(0, 1), (2, 3)]
    assert group([24, 12, 12], 23) == [(0,), (1, 2)]
    assert group([12, 12, 12], 23) == [(0, 1)]
    assert group([16] * 3, 38) == []
    assert group([4, 4, 24], 23) == [(1, 2)]
    assert [found.primary_device for found in create_gpu_groups([], 23)] == ["cpu"]
    assert create_gpu_groups([12, 12], 23)[0].primary_device == "cuda:0"


def test_memory_of_a_group() -> None:
    assert [network_min_group_vram(params) for params in (V1, V2, ModelParams())] == [10.0, 38.0, 38.0]
    pool, sequential = WeightsConfig(), WeightsConfig(name="sequential", pool_fraction=None)
    difference = get_min_group_vram(V2, sequential) - get_min_group_vram(V2, pool)
    # Eight pools of 5 % are 40 % of the model.
    assert difference == pytest.approx(0.6 * 2 * V2.num_params / 1024**3)
    assert get_min_group_vram(V1, pool) < get_min_group_vram(V1, pool, batch_size=64)


def test_memory_of_a_device_that_shares_the_blocks() -> None:
    size = 2 * V2.num_params / 1024**3
    beside = get_min_group_vram(V2, WeightsConfig()) - 0.4 * size
    # With two the eight shifted pools are still less than a pool and half of the blocks; with eight they are not.
    assert device_vram(V2, WeightsConfig(), 2) == pytest.approx(0.4 * size + beside)
    assert device_vram(V2, WeightsConfig(), 8) == pytest.approx((0.125 + 0.05) * size + beside)
    sequential = WeightsConfig(name="sequential", pool_fraction=None)
    assert device_vram(V2, sequential, 4) == pytest.approx(0.25 * size + beside)


def test_states_of_phases() -> None:
    assert pow_state(None, all_loaded=False) is PowState.NOT_LOADED
    assert pow_state(Phase.IDLE, all_loaded=False) is PowState.LOADING
    assert pow_state(Phase.IDLE, all_loaded=True) is PowState.IDLE
    assert pow_state(Phase.GENERATE, all_loaded=False) is PowState.GENERATING
    assert [int(phase) for phase in Phase] == [0, 1, 2, 3]
