"""The detector `metis` against the published rule, written down a second time in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.metis import rules
from sparkray.metis.detectors import DetectorBank
from sparkray.metis.entropy import EntropyStats
from sparkray.metis.fields import TOKEN_FIELDS, Action
from sparkray.metis.options import WatchOptions
from sparkray.metis.rules import Row

VOCAB = 49_152
GENERATE, HEDGE, REFUSE = 0, 1, 2


@dataclass
class Rule:
    """One request of METIS's processor: float64, one token at a time."""

    k: float = 0.5
    hedge: float = 4.0
    refuse: float = 8.0
    decay: float = 0.85
    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    s: float = 0.0
    boost: int = 0

    def token(self, entropy: float, vocab: int = VOCAB) -> tuple[float, float, float, int, bool]:
        self.n += 1
        before = entropy - self.mean
        self.mean += before / self.n
        self.m2 += before * (entropy - self.mean)
        variance = self.m2 / max(self.n - 1, 1)
        std = math.sqrt(variance) if variance > 0 else 0.1
        z = (entropy - self.mean) / std if std > 0.01 else 0.0
        confidence = 1.0 - min(entropy / math.log2(vocab), 1.0)
        k = self.k + (0.5 if self.n <= 80 else 0.0)
        if z > k:
            self.s += (z - k) * confidence
        elif confidence > 0.9:
            self.s *= self.decay
        seen = self.s
        action = GENERATE
        if self.s >= self.refuse:
            action, self.s = REFUSE, 0.0
        elif self.s >= self.hedge:
            action, self.s, self.boost = HEDGE, 0.0, 50
        boosted = self.boost > 0
        self.boost -= boosted
        return confidence, z, seen, action, boosted


def watch(bank: DetectorBank, rows: Sequence[int], entropies: Sequence[float], keep: Sequence[bool] | None = None):  # noqa: ANN201
    stats = EntropyStats(torch.tensor(entropies, dtype=torch.float32), torch.full((len(rows),), 0.5))
    keep_B = None if keep is None else torch.tensor(keep)
    tokens = bank.observe(torch.tensor(rows), stats, VOCAB, keep_B)
    assert tokens.shape == (len(rows), len(TOKEN_FIELDS))
    return [dict(zip(TOKEN_FIELDS, row, strict=True)) for row in tokens.tolist()]


def streams(seed: int) -> dict[str, np.ndarray]:
    """Ordinary and awkward streams of entropies in bits, as float32 can hold them."""
    rng = np.random.default_rng(seed)
    shift = np.concatenate([rng.gamma(1.0, 0.5, 150), rng.gamma(2.0, 2.0, 150)])
    spikes = rng.gamma(1.0, 0.2, 300)
    spikes[::37] = 15.0
    leap = 0.5 + rng.normal(0, 0.01, 300)
    leap[[150, 250]] = 3.0
    made = {
        "leap": leap,
        "ordinary": rng.gamma(1.0, 1.2, 300),
        "shift": shift,
        "spikes": spikes,
        "constant": np.full(300, 1.25),
        "zero": np.zeros(300),
        "nearly constant": 1.0 + rng.normal(0, 1e-4, 300),
        "around the least deviation": 1.0 + rng.normal(0, 1e-2, 300),
        "alternating": np.tile([0.0, 6.0], 150),
        "rising": np.linspace(0, 16, 300),
        "at the ceiling": np.full(300, math.log2(VOCAB)),
        "drift": np.cumsum(np.abs(rng.normal(0, 0.05, 300))),
    }
    return {name: values.astype(np.float32).astype(np.float64) for name, values in made.items()}


@pytest.mark.parametrize("seed", range(5))
def test_every_stream_in_one_mixed_batch(seed: int) -> None:
    """All streams side by side, rows shuffled at every step: statistics within 1e-5, actions and boosts equal."""
    rng = np.random.default_rng(100 + seed)
    made = list(streams(seed).values())
    rules = [Rule() for _ in made]
    bank = DetectorBank(len(made) + 3, "cpu")
    places = rng.permutation(len(made) + 3)[: len(made)]
    for place in places:
        bank.reset(int(place), WatchOptions(boost="published", boost_bonus=5.0))
    alarms = {HEDGE: 0, REFUSE: 0}
    for step in range(300):
        order = rng.permutation(len(made))
        got = watch(bank, [int(places[i]) for i in order], [made[i][step] for i in order])
        for i, row in zip(order, got, strict=True):
            confidence, z, seen, action, boosted = rules[i].token(float(made[i][step]))
            assert row["entropy"] == pytest.approx(made[i][step], abs=1e-6)
            assert row["confidence"] == pytest.approx(confidence, abs=1e-6)
            assert row["z"] == pytest.approx(z, abs=1e-5)
            assert row["hedge_statistic"] == row["refuse_statistic"] == pytest.approx(seen, abs=1e-5)
            assert (row["action"], row["boosted"]) == (action, boosted)
            if action:
                alarms[action] += 1
    assert alarms[HEDGE] > 3, "streams that never alarm prove little"
    assert alarms[REFUSE] > 0


def test_three_tokens_by_hand() -> None:
    """Entropies 1, 1, 4: mean 2, sum of squares 6, deviation sqrt 3, z = 2 / sqrt 3; drift 1 while early."""
    bank = DetectorBank(1, "cpu")
    bank.reset(0, WatchOptions())
    first, second, third = (watch(bank, [0], [value])[0] for value in (1.0, 1.0, 4.0))
    assert first["z"] == second["z"] == 0.0
    z = 2 / math.sqrt(3)
    confidence = 1 - 4 / math.log2(VOCAB)
    assert third["z"] == pytest.approx(z)
    assert third["hedge_statistic"] == pytest.approx((z - 1.0) * confidence)


def test_one_statistic_crosses_both_thresholds_once() -> None:
    """A jump over 8 refuses and restarts; METIS needs such a jump because HEDGE restarts the statistic at 4."""
    bank = DetectorBank(1, "cpu")
    bank.reset(0, WatchOptions(hedge=4.0, refuse=8.0))
    calm = [0.5 + 0.02 * (i % 2) for i in range(400)]
    for value in calm:
        watch(bank, [0], [value])
    jump = watch(bank, [0], [3.0])[0]
    assert jump["z"] > 10
    assert jump["refuse_statistic"] >= 8
    assert jump["action"] == Action.REFUSE
    after = watch(bank, [0], [0.5])[0]
    assert after["hedge_statistic"] == 0.0
    assert after["action"] == Action.GENERATE


def test_the_drift_falls_after_eighty_tokens() -> None:
    """z between 0.5 and 1 adds to the statistic at token 81 and not at token 80."""
    for num_before, counts in ((79, False), (80, True)):
        bank, rule = DetectorBank(1, "cpu"), Rule()
        bank.reset(0, WatchOptions())
        for i in range(num_before):
            value = 5.0 + (-1) ** i
            watch(bank, [0], [value])
            rule.token(value)
        row = watch(bank, [0], [5.75])[0]
        assert 0.5 < row["z"] < 1.0
        assert (row["hedge_statistic"] > 0) is counts
        assert row["hedge_statistic"] == pytest.approx(rule.token(5.75)[2], abs=1e-5)


def test_own_thresholds_of_neighbouring_rows() -> None:
    values = streams(3)["shift"]
    settings_of = [
        {"k": 0.2, "hedge": 2.0, "refuse": 3.0, "decay": 0.5},
        {"k": 0.9, "hedge": 6.0, "refuse": 20.0, "decay": 1.0},
    ]
    bank = DetectorBank(2, "cpu")
    for row, own in enumerate(settings_of):
        bank.reset(row, WatchOptions(drift=own["k"], hedge=own["hedge"], refuse=own["refuse"], decay=own["decay"]))
    rules = [Rule(**own) for own in settings_of]  # type: ignore[arg-type]
    for value in values.tolist():
        got = watch(bank, [0, 1], [value, value])
        for rule, row in zip(rules, got, strict=True):
            _, _, seen, action, _ = rule.token(value)
            assert row["hedge_statistic"] == pytest.approx(seen, abs=1e-5)
            assert row["action"] == action


def test_the_boost_lasts_fifty_tokens_and_starts_over() -> None:
    """An alarm in the middle of a boost makes it last 50 tokens from there."""
    bank, rule = DetectorBank(1, "cpu"), Rule(hedge=1.0, refuse=1e9)
    bank.reset(0, WatchOptions(hedge=1.0, refuse=1e9, boost="published", boost_bonus=5.0))
    values = np.full(400, 0.5)
    values[[100, 120, 300]] = 9.0
    boosted = []
    for value in values.astype(np.float32).tolist():
        row = watch(bank, [0], [value])[0]
        assert row["boosted"] == rule.token(value)[4]
        boosted.append(bool(row["boosted"]))
    assert [i for i, on in enumerate(boosted) if on] == [*range(100, 170), *range(300, 350)]


def test_tokens_that_are_not_kept_leave_no_trace() -> None:
    values = streams(1)["shift"].tolist()
    plain, chunked = DetectorBank(2, "cpu"), DetectorBank(2, "cpu")
    for bank in (plain, chunked):
        bank.reset(0, WatchOptions())
        bank.reset(1, WatchOptions())
    for i, value in enumerate(values):
        wanted = watch(plain, [0, 1], [value, value])
        watch(chunked, [0, 1], [7.0, 9.0], keep=[False, False])
        assert watch(chunked, [1, 0], [value, value], keep=[True, True])[::-1] == wanted
        if i % 3 == 0:
            watch(chunked, [0], [0.1], keep=[False])
    assert torch.equal(plain.state, chunked.state)


def test_save_move_swap_clear_and_roll_back() -> None:
    values = streams(2)["ordinary"].tolist()
    bank, rule = DetectorBank(4, "cpu"), Rule()
    bank.reset(2, WatchOptions())
    bank.reset(1, WatchOptions(hedge=1.0))
    row = 2
    for i, value in enumerate(values):
        if i == 50:  # preempted and brought back elsewhere
            saved = bank.save(row)
            bank.clear(row)
            bank.restore(0, saved)
            row = 0
        elif i == 100:
            bank.move(0, 3)
            row = 3
        elif i == 150:
            bank.swap(3, 1)
            row = 1
        elif i == 200:
            before = bank.state.clone()
            watch(bank, [row], [15.0])
            bank.state.copy_(before)
        got = watch(bank, [row], [value])[0]
        assert got["hedge_statistic"] == pytest.approx(rule.token(value)[2], abs=1e-5)


def test_a_cleared_row_never_alarms_and_is_never_boosted() -> None:
    bank = DetectorBank(1, "cpu")
    bank.reset(0, WatchOptions(hedge=0.1, boost="published", boost_bonus=5.0))
    bank.clear(0)
    for value in [0.1] * 100 + [12.0] * 20:
        row = watch(bank, [0], [value])[0]
        assert row["action"] == Action.GENERATE
        assert row["boosted"] == 0


def test_a_token_without_distribution_is_told_and_forgotten() -> None:
    bank, rule = DetectorBank(2, "cpu"), Rule()
    bank.reset(0, WatchOptions())
    bank.reset(1, WatchOptions())
    for value in (1.0, 2.0, 1.5):
        watch(bank, [0, 1], [value, value])
        rule.token(value)
    before = bank.state.clone()
    lost, kept = watch(bank, [0, 1], [math.nan, 3.0])
    assert all(math.isnan(lost[name]) for name in ("entropy", "confidence", "z"))
    assert lost["action"] == Action.GENERATE
    assert torch.equal(bank.state[:, 0], before[:, 0])
    assert kept["z"] == pytest.approx(rule.token(3.0)[1], abs=1e-6)


def test_the_running_statistics_keep_ten_digits() -> None:
    """Mean and sum of squares of 3,000 tokens around 10 bits are numpy's; float32 would be off in the sixth digit."""
    values = np.random.default_rng(0).normal(10.0, 0.1, 3_000).astype(np.float32)
    bank = DetectorBank(1, "cpu")
    bank.reset(0, WatchOptions())
    row_B, top = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for value in torch.from_numpy(values).split(1):
        bank.observe(row_B, EntropyStats(value, top), VOCAB)
    wide = values.astype(np.float64)
    assert bank.state[Row.MEAN, 0].item() == pytest.approx(wide.mean(), rel=1e-10)
    assert bank.state[Row.SQUARES, 0].item() == pytest.approx(((wide - wide.mean()) ** 2).sum(), rel=1e-10)


def test_torch_and_numpy_say_the_same() -> None:
    """The path of a GPU, run on a CPU tensor: the same formulas to the last bit that float64 keeps."""
    rng = np.random.default_rng(4)
    bank = DetectorBank(32, "cpu")
    for row in range(32):
        bank.reset(row, WatchOptions(boost=("off", "published", "careful")[row % 3], boost_bonus=1.0, hedge=1.0))
    state = bank.state.clone()
    for step in range(200):
        entropy, keep, ends = rng.gamma(1, 1.5, 32), rng.random(32) < 0.9, rng.random(32) < 0.2
        entropy[step % 32] = np.nan
        top = np.full(32, 0.5)
        by_numpy = rules.advance(np, state.numpy(), entropy, top, keep, ends, 15.0)
        arrays = [torch.from_numpy(array) for array in (entropy, top, keep, ends)]
        by_torch = rules.advance(torch, state, *arrays, 15.0)
        for ours, theirs in zip(by_numpy, by_torch, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)
        state[rules.FIRST_RUNNING :] = by_torch[0]


@given(st.lists(st.floats(0, 15.5, width=32), min_size=1, max_size=120))
@settings(max_examples=60, deadline=None)
def test_any_stream(values: list[float]) -> None:
    bank, rule = DetectorBank(1, "cpu"), Rule()
    bank.reset(0, WatchOptions())
    for value in values:
        row = watch(bank, [0], [value])[0]
        _, z, seen, action, _ = rule.token(value)
        assert row["z"] == pytest.approx(z, abs=1e-5, rel=1e-6)
        assert row["hedge_statistic"] == pytest.approx(seen, abs=1e-5, rel=1e-6)
        assert row["action"] == action
