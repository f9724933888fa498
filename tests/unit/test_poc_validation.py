"""Screening, the engine's stream, the judgement of honest and cheating workers, and the identity flaw."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.poc import TINY, ModelParams, WeightsConfig
from sparkray.errors import InputError, UnavailableError
from sparkray.poc.engine import Engine
from sparkray.poc.proofs import ProofBatch
from sparkray.poc.replay import replay
from sparkray.poc.screening import Reason, screen
from sparkray.poc.selftest import ShareMonitor
from sparkray.poc.statistics import Decision, SequentialTest
from sparkray.poc.tuning import sweep
from sparkray.poc.validation import NoiseBand, validate

POOL = WeightsConfig()
SMALL = TINY.model_copy(update={"multiple_of": 128, "n_layers": 2, "seq_len": 8})
WIDE = ModelParams(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=2048, ffn_dim_multiplier=2.0, multiple_of=64,
    rope_theta=1e4, seq_len=8,
)  # fmt: skip


def batch_of(nonces: list[int], dist: list[float], node_id: int = 0) -> ProofBatch:
    return ProofBatch("key", "0x1", 7, tuple(nonces), tuple(dist), node_id)


def test_one_bad_proof_is_refused_alone_and_with_its_reason() -> None:
    batch = batch_of(
        [1, 3, 1, -5, 5, 7, 9, 4, 11, 2**63],
        [1.2, 1.4, 1.2, 1.2, math.nan, math.inf, -0.1, 1.2, 1.1, 1.2],
        node_id=1,
    )
    screened = screen(batch, r_target=1.4, node_count=2)
    assert screened.accepted.nonces == (1, 11)
    assert screened.rejected == {
        1: Reason.NOT_BELOW_TARGET,
        2: Reason.DUPLICATE,
        3: Reason.NOT_A_NONCE,
        4: Reason.NOT_A_DISTANCE,
        5: Reason.NOT_A_DISTANCE,
        6: Reason.NOT_A_DISTANCE,
        7: Reason.OTHER_NODE,
        9: Reason.NOT_A_NONCE,
    }


def test_a_batch_of_another_block_or_node_is_refused_whole() -> None:
    batch = batch_of([1], [1.2], node_id=2)
    with pytest.raises(InputError, match="'0x1', and block '0x2'"):
        screen(batch, r_target=1.4, block_hash="0x2")
    with pytest.raises(InputError, match="node_id=2"):
        screen(batch, r_target=1.4, node_count=2)
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="r_target"):
            screen(batch, r_target=target)


@given(
    st.lists(st.integers(-3, 12), max_size=12).flatmap(
        lambda nonces: st.tuples(
            st.just(nonces), st.lists(st.floats(), min_size=len(nonces), max_size=len(nonces)), st.integers(1, 4)
        )
    )
)
def test_what_is_accepted_is_distinct_below_target_and_of_the_node(case: tuple[list[int], list[float], int]) -> None:
    nonces, dist, node_count = case
    screened = screen(batch_of(nonces, dist), r_target=1.3, node_count=node_count)
    kept = screened.accepted
    assert len(set(kept.nonces)) == len(kept)
    assert all(nonce >= 0 and nonce % node_count == 0 for nonce in kept.nonces)
    assert all(0 <= distance < 1.3 for distance in kept.dist)
    assert len(kept) + len(screened.rejected) == len(nonces)


@pytest.mark.parametrize(("batch_size", "threads", "depth"), [(1, 1, 1), (4, 2, 3), (7, 3, 2), (64, 2, 2)])
def test_the_stream_gives_every_nonce_once_in_order(batch_size: int, threads: int, depth: int) -> None:
    engine = Engine("0x1", SMALL, POOL, device="cpu", batch_size=batch_size, prep_threads=threads, prep_depth=depth)
    nonces = list(range(3, 60, 3))
    found = list(engine.stream("key", nonces))
    assert [nonce for part in found for nonce in part.nonces] == nonces
    np.testing.assert_allclose(
        np.concatenate([part.dist for part in found]), replay("0x1", "key", nonces, SMALL, POOL), atol=1e-7
    )


def test_an_endless_stream_can_be_left() -> None:
    engine = Engine("0x1", SMALL, POOL, device="cpu", batch_size=4)
    stream = engine.stream("key", count(0, 5))
    assert [part.nonces for part in islice(stream, 2)] == [(0, 5, 10, 15), (20, 25, 30, 35)]
    stream.close()
    assert engine.distances("key", []).shape == (0,)


def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(UnavailableError, match="'cuda:99'"):
        Engine("0x1", SMALL, POOL, device="cuda:99")


def test_batch_size_follows_the_measured_rate_under_the_bound() -> None:
    rates = {1: 10.0, 2: 19.0, 4: 30.0, 8: 30.5, 16: 30.6, 32: 90.0}
    assert sweep(rates.__getitem__, 32, 60.0) == 4
    rising = {size: float(size) for size in (1, 2, 4, 8, 11)}
    assert sweep(rising.__getitem__, 11, 60.0) == 11
    assert sweep({1: 1.0}.__getitem__, 1, 60.0) == 1


def test_an_honest_worker_passes_and_a_liar_does_not() -> None:
    engine = Engine("0x1", WIDE, POOL, device="cpu", batch_size=32)
    nonces = list(range(400))
    dist = engine.distances("key", nonces).tolist()
    # Low enough that all is fast, high enough that 200 nonces are valid.
    r_target = sorted(dist)[200]
    honest = batch_of(nonces, dist).sub_batch(r_target)
    rules = {"r_target": r_target, "fraud_threshold": 1e-7, "band": NoiseBand(1e-7)}
    judged = validate(honest, engine.distances, **rules)
    assert (judged.verdict.n_invalid, judged.outside_band, judged.is_fraud) == (0, (), False)
    assert judged.decision is Decision.HONEST and judged.num_computed == 200

    early = validate(honest, engine.distances, **rules, chunk_size=32)
    # 136 clean nonces suffice at the default rates; the test is looked at every 32.
    assert (early.decision, early.num_computed) == (Decision.HONEST, 160)

    invented = replace(honest, nonces=tuple(range(1000, 1200)))
    judged = validate(invented, engine.distances, **rules, chunk_size=8)
    assert judged.is_fraud and judged.num_computed == 8

    # True nonces with made-up distances: the network's own test does not look at them.
    vague = replace(honest, dist=tuple(distance - 1e-3 for distance in honest.dist))
    judged = validate(vague, engine.distances, **rules)
    assert not judged.verdict.fraud_detected and len(judged.outside_band) == 200 and judged.is_fraud


def test_the_band_is_measured_from_pairs() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(1.3, 1.5, 4000)
    band = NoiseBand.measure(first.tolist(), (first + rng.normal(0, 2e-5, 4000)).tolist())
    assert band.sd == pytest.approx(2e-5, rel=0.05)
    assert band.contains(1.4, 1.4 + 1.1e-4) and not band.contains(1.4, 1.4 + 1.3e-4)
    assert not band.contains(math.nan, 1.4)
    with pytest.raises(InputError, match="16 pairs"):
        NoiseBand.measure([1.0], [1.0])


def test_the_identity_flaw_of_the_compatible_mode() -> None:
    """Skipping every block passes the network's fraud test."""
    nonces = list(range(600))
    true = replay("0xabc123", "pubkey1", nonces, WIDE, POOL)
    short = replay("0xabc123", "pubkey1", nonces, WIDE, POOL, layers=())
    assert np.corrcoef(true, short)[0, 1] > 0.9999
    r_target = float(np.quantile(true, 0.2))
    claimed = batch_of(nonces, short.tolist()).sub_batch(r_target - 1e-4)
    assert len(claimed) > 100

    def distances(_: str, chosen: object) -> np.ndarray:
        return true[list(chosen)]  # type: ignore[call-overload]

    judged = validate(claimed, distances, r_target=r_target, fraud_threshold=0.01, band=NoiseBand())
    assert judged.verdict.n_invalid == 0 and not judged.verdict.fraud_detected
    # Even the band helps only between machines whose noise is smaller than the shortcut's error.
    exact = validate(claimed, distances, r_target=r_target, fraud_threshold=0.01, band=NoiseBand(1e-8))
    assert len(exact.outside_band) > 0.9 * len(claimed) and exact.is_fraud


def test_share_monitor_raises_its_alarm_beyond_five_sigma() -> None:
    monitor = ShareMonitor(1.0, 3)
    assert (monitor.expected_share, monitor.z_score, monitor.alarm) == (pytest.approx(0.25), 0.0, False)
    monitor.add(250 + 68, 1000)
    # One sigma is 13.69 nonces.
    assert monitor.z_score == pytest.approx(68 / 13.693, rel=1e-4) and not monitor.alarm
    monitor.add(1, 1)
    monitor.add(1, 1)
    assert monitor.alarm == (abs(monitor.z_score) > 5.0)
    broken = ShareMonitor(1.0, 3)
    broken.add(0, 20)
    assert not broken.alarm
    broken.add(0, 180)
    assert broken.alarm


def test_engine_computes_the_share_that_theory_gives() -> None:
    engine = Engine("0x1", WIDE, POOL, device="cpu", batch_size=64)
    dist = engine.distances("key", range(2000))
    monitor = ShareMonitor(1.39, WIDE.vocab_size)
    monitor.add(int((dist < 1.39).sum()), len(dist))
    assert monitor.num_valid > 80 and abs(monitor.z_score) < 4.0


def test_sequential_rates_can_be_chosen() -> None:
    strict = SequentialTest(p_honest=0.01, p_fraud=0.5, false_alarm=0.01, missed=0.01)
    assert [strict.observe(mismatch) for mismatch in (True, True)][-1] is Decision.FRAUD
