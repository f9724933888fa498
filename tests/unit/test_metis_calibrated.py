"""The detector `calibrated`: what it expects, how often it cries wolf, how soon it sees a shift; and its profiles."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparkray.errors import InputError, NotFoundError, UsageError
from sparkray.metis.calibration import AlarmCount, count_alarms, fit_profile
from sparkray.metis.detectors import DetectorBank
from sparkray.metis.entropy import EntropyStats
from sparkray.metis.fields import COLUMN, TOKEN_FIELDS, Action
from sparkray.metis.options import WatchOptions
from sparkray.metis.profile import ProfileStore, ReferenceProfile, model_slug

VOCAB = 49_152
MODEL, TASK = "toy", "noise"


def process(num_streams: int, num_tokens: int, seed: int, shift: float = 0.0) -> NDArray[np.float64]:
    """Skewed, autocorrelated, never negative, like entropies: H = H' / 2 + gamma; mean 1 + 2 * shift bits."""
    rng = np.random.default_rng(seed)
    entropies = np.empty((num_streams, num_tokens))
    now = np.full(num_streams, 1.0)
    for step in range(-50, num_tokens):
        now = 0.5 * now + rng.gamma(0.5, 1.0, num_streams) + shift
        if step >= 0:
            entropies[:, step] = now
    return entropies


@pytest.fixture(scope="module")
def profile() -> ReferenceProfile:
    return fit_profile(list(process(100, 400, seed=1)), model=MODEL, temperature=0.7, task=TASK, seed=5)


@pytest.fixture
def store(profile: ReferenceProfile, tmp_path: Path) -> ProfileStore:
    profile.save(tmp_path)
    return ProfileStore([tmp_path])


def calibrated(profile: ReferenceProfile, arl_tokens: float = 1000.0) -> WatchOptions:
    return WatchOptions(detector="calibrated", profile=profile.name, arl_tokens=arl_tokens)


def run(bank: DetectorBank, entropies: NDArray[np.float64]) -> NDArray[np.float32]:
    """[T, B, F] of streams [B, T] in rows 0..B-1."""
    rows_B = torch.arange(len(entropies))
    top = torch.full((len(entropies),), 0.5)
    return np.stack(
        [bank.observe(rows_B, EntropyStats(column, top), VOCAB).numpy() for column in torch.tensor(entropies.T)]
    )


def test_the_fit_finds_the_process(profile: ReferenceProfile) -> None:
    """Mean 0.5 / (1 - 0.5) = 1, variance 0.5 / (1 - 0.25) = 2/3, correlation 0.5."""
    assert profile.mean_bits == pytest.approx(1.0, abs=0.05)
    assert profile.std_bits == pytest.approx(math.sqrt(2 / 3), rel=0.05)
    assert profile.lag1 == pytest.approx(0.5, abs=0.03)
    assert (profile.num_streams, profile.num_tokens) == (100, 40_000)


def test_z_is_what_the_previous_token_leads_to_expect(store: ProfileStore, profile: ReferenceProfile) -> None:
    """By hand with mean 1, deviation 0.8, correlation 0.6 (innovation 0.64), drifts 0.25 and 0.75."""
    by_hand = replace(profile, mean_bits=1.0, std_bits=0.8, lag1=0.6, task="hand")
    by_hand.save(store._folders[-1])
    bank = DetectorBank(1, "cpu", store)
    bank.reset(0, calibrated(by_hand))
    tokens = run(bank, np.array([[2.6, 2.6, 0.0, 3.0]]))[:, 0]
    expected_z = [(2.6 - 1) / 0.8, (2.6 - 1.96) / 0.64, (0 - 1.96) / 0.64, (3.0 - 0.4) / 0.64]
    np.testing.assert_allclose(tokens[:, COLUMN["z"]], expected_z, rtol=1e-6)
    np.testing.assert_allclose(tokens[:, COLUMN["hedge_statistic"]], [1.75, 2.5, 0.0, 3.8125], rtol=1e-6)
    np.testing.assert_allclose(tokens[:, COLUMN["refuse_statistic"]], [1.25, 1.5, 0.0, 3.3125], rtol=1e-6)
    np.testing.assert_allclose(by_hand.z_scores(np.array([2.6, 2.6, 0.0, 3.0])), expected_z)


def test_z_of_a_token_does_not_depend_on_the_token_itself_or_later_ones(
    store: ProfileStore, profile: ReferenceProfile
) -> None:
    """z is linear in the token's entropy with a slope fixed in advance; a self-standardised z is not."""
    z = []
    for last in (0.0, 1.0, 2.0, 15.0):
        bank = DetectorBank(1, "cpu", store)
        bank.reset(0, calibrated(profile))
        z.append(run(bank, np.array([[0.3, 2.0, last]]))[-1, 0, COLUMN["z"]])
    assert np.diff(z) / np.diff([0.0, 1.0, 2.0, 15.0]) == pytest.approx(1 / profile.innovation_std_bits, rel=1e-5)


@pytest.mark.parametrize("arl_tokens", [200.0, 1000.0])
def test_false_alarms_come_as_seldom_as_asked(
    store: ProfileStore, profile: ReferenceProfile, arl_tokens: float
) -> None:
    """On 400,000 fresh tokens of the same process the run length of each statistic is within 30 % of the asked.

    Of that, the count of alarms accounts for 5 % (2 sigma at 1000), the mean that was fitted on 40,000 tokens for
    about 20 %: an error of 0.01 in z moves the run length by a factor exp(2 * 0.01 * threshold).
    """
    bank = DetectorBank(500, "cpu", store)
    for row in range(500):
        bank.reset(row, calibrated(profile, arl_tokens))
    tokens = run(bank, process(500, 800, seed=2))
    hedge, refuse = profile.thresholds(arl_tokens)
    for field, threshold in (("hedge_statistic", hedge), ("refuse_statistic", refuse)):
        num_alarms = (tokens[..., COLUMN[field]] >= threshold).sum()
        assert 400_000 / num_alarms == pytest.approx(arl_tokens, rel=0.30), field


def test_counting_alarms_agrees_with_the_detector(store: ProfileStore, profile: ReferenceProfile) -> None:
    entropies = process(20, 500, seed=11, shift=0.15)
    bank = DetectorBank(20, "cpu", store)
    for row in range(20):
        bank.reset(row, calibrated(profile, 300.0))
    tokens = run(bank, entropies)
    hedge, refuse = profile.thresholds(300.0)
    hedges = int((tokens[..., COLUMN["hedge_statistic"]] >= hedge).sum())
    refuses = int((tokens[..., COLUMN["refuse_statistic"]] >= refuse).sum())
    assert count_alarms(profile, list(entropies), 300.0) == AlarmCount(10_000, hedges, refuses)
    assert hedges > 30


def test_a_shift_is_seen_long_before_a_false_alarm(store: ProfileStore, profile: ReferenceProfile) -> None:
    """The level up by 1 bit, which is z up by 0.7: HEDGE within 60 tokens in the mean, at one false alarm in 5,000."""
    num = 200
    bank = DetectorBank(num, "cpu", store)
    for row in range(num):
        bank.reset(row, calibrated(profile, 5000.0))
    shifted = process(num, 400, seed=3, shift=0.5)
    tokens = run(bank, np.concatenate([process(num, 20, seed=4), shifted], axis=1))[20:]
    alarms = tokens[..., COLUMN["hedge_statistic"]] >= profile.thresholds(5000.0)[0]
    assert alarms.any(axis=0).all()
    assert alarms.argmax(axis=0).mean() < 60


def test_an_answer_confused_throughout_is_seen_only_by_the_calibrated_one(
    store: ProfileStore, profile: ReferenceProfile
) -> None:
    """A level twice the reference's from the first token on looks calm to a rule that measures by itself."""
    rng = np.random.default_rng(6)
    entropies = np.clip(2.0 + rng.normal(0, 0.3, (1, 300)), 0, None)
    found = {}
    for name, options in (("metis", WatchOptions()), ("calibrated", calibrated(profile, 5000.0))):
        bank = DetectorBank(1, "cpu", store)
        bank.reset(0, options)
        actions = run(bank, entropies)[:, 0, COLUMN["action"]]
        found[name] = int(np.argmax(actions > 0)) if actions.any() else None
    assert found["calibrated"] is not None
    assert found["calibrated"] < 40
    assert found["metis"] is None or found["metis"] > found["calibrated"]


def test_each_statistic_restarts_after_its_own_alarm_alone(store: ProfileStore, profile: ReferenceProfile) -> None:
    bank = DetectorBank(1, "cpu", store)
    bank.reset(0, calibrated(profile, 500.0))
    hedge, refuse = profile.thresholds(500.0)
    tokens = run(bank, process(1, 400, seed=7, shift=0.3))[:, 0]
    hedge_seen, refuse_seen = tokens[:, COLUMN["hedge_statistic"]], tokens[:, COLUMN["refuse_statistic"]]
    z = tokens[:, COLUMN["z"]].astype(np.float64)
    expected_hedge = expected_refuse = 0.0
    for step in range(400):
        expected_hedge = max(0.0, expected_hedge + z[step] - 0.25)
        expected_refuse = max(0.0, expected_refuse + z[step] - 0.75)
        assert hedge_seen[step] == pytest.approx(expected_hedge, abs=1e-3)
        assert refuse_seen[step] == pytest.approx(expected_refuse, abs=1e-3)
        refuses, hedges = refuse_seen[step] >= refuse, hedge_seen[step] >= hedge
        wanted = Action.REFUSE if refuses else Action.HEDGE if hedges else Action.GENERATE
        assert tokens[step, COLUMN["action"]] == wanted
        # Go on from what was recorded, so that float32 rounding does not add up.
        expected_hedge = 0.0 if hedges else float(hedge_seen[step])
        expected_refuse = 0.0 if refuses else float(refuse_seen[step])
    hedged, refused = hedge_seen >= hedge, refuse_seen >= refuse
    assert (hedged & ~refused).any()
    assert refused.any()


def test_neighbours_of_the_other_kind_change_nothing(store: ProfileStore, profile: ReferenceProfile) -> None:
    entropies = process(6, 200, seed=8, shift=0.1)
    kinds = [WatchOptions(), calibrated(profile), WatchOptions(hedge=1.0), calibrated(profile, 100.0)] * 2
    mixed = DetectorBank(6, "cpu", store)
    for row in range(6):
        mixed.reset(row, kinds[row])
    together = run(mixed, entropies)
    for row in range(6):
        alone = DetectorBank(1, "cpu", store)
        alone.reset(0, kinds[row])
        np.testing.assert_array_equal(run(alone, entropies[row : row + 1])[:, 0], together[:, row])


def test_thresholds_rise_with_the_run_length_and_meet_the_table(profile: ReferenceProfile) -> None:
    at = [50, 75, 200, 640, 5000, 12_345, 50_000]
    hedge, refuse = zip(*(profile.thresholds(arl) for arl in at), strict=True)
    assert list(hedge) == sorted(set(hedge))
    assert list(refuse) == sorted(set(refuse))
    arl, table_hedge, table_refuse = profile.table[3]
    assert profile.thresholds(arl) == (pytest.approx(table_hedge), pytest.approx(table_refuse))
    between = profile.thresholds(math.sqrt(profile.table[3][0] * profile.table[4][0]))[0]
    assert between == pytest.approx((profile.table[3][1] + profile.table[4][1]) / 2)


@pytest.mark.parametrize("arl_tokens", [0.0, 49.0, 50_001.0, math.nan, math.inf])
def test_a_run_length_outside_the_table_is_refused(profile: ReferenceProfile, arl_tokens: float) -> None:
    with pytest.raises(InputError) as caught:
        profile.thresholds(arl_tokens)
    assert caught.value.param == "metis_arl"


def test_the_same_streams_and_seed_give_the_same_profile() -> None:
    streams = list(process(20, 100, seed=9))
    first, again = (fit_profile(streams, model="a/B-c", temperature=1, seed=3) for _ in range(2))
    assert first == again
    assert first.name == "b-c/t1/chat"
    assert fit_profile(streams, model="a/B-c", temperature=1, seed=4).table != first.table


def test_save_and_load(profile: ReferenceProfile, tmp_path: Path) -> None:
    path = profile.save(tmp_path)
    assert path == tmp_path / "toy" / "t0.7" / "noise.json"
    assert [item.name for item in path.parent.iterdir()] == ["noise.json"], "a temporary file stayed behind"
    store = ProfileStore([tmp_path])
    assert profile.name in store.names()
    assert store.load("toy/t0.7/noise") == profile


def test_find_by_model_temperature_and_task(profile: ReferenceProfile, tmp_path: Path) -> None:
    for temperature in (0.0, 0.6, 0.8):
        replace(profile, temperature=temperature).save(tmp_path)
    store = ProfileStore([tmp_path])
    assert store.find("org/Toy", 0.82, TASK).temperature == 0.8
    assert store.find("/models/toy/", 0.7, TASK).temperature == 0.6
    for model, temperature, task in (("toy", 0.3, TASK), ("toy", 0.8, "chat"), ("toy-2", 0.8, TASK)):
        with pytest.raises(NotFoundError, match=r"toy/t0\.8/noise"):
            store.find(model, temperature, task)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("/cache/models/SmolLM2-135M-Instruct-0.1.2-c1/", "smollm2-135m-instruct"),
        ("Qwen/Qwen2.5-1.5B", "qwen2.5-1.5b"),
        ("my model (2)", "my-model-2"),
        ("///", "model"),
    ],
)
def test_the_short_name_of_a_model(model: str, slug: str) -> None:
    assert model_slug(model) == slug


@pytest.mark.parametrize("name", ["toy", "../../secret/x", "toy/t0.7/../x", "/etc/passwd/x", "Toy/t0.7/noise", ""])
def test_names_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        ProfileStore([tmp_path]).load(name)
    assert caught.value.param == "metis_profile"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "sparkray-metis-profile", "version": 99}', "\x00\x01"]
)
def test_a_damaged_file_says_which(text: str, tmp_path: Path) -> None:
    path = tmp_path / "toy" / "t0.7" / "noise.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UsageError, match=r"noise\.json"):
        ProfileStore([tmp_path]).load("toy/t0.7/noise")


def test_a_file_with_a_field_missing_says_which(profile: ReferenceProfile, tmp_path: Path) -> None:
    path = profile.save(tmp_path)
    data = json.loads(path.read_text())
    del data["lag1"]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="lag1"):
        ProfileStore([tmp_path]).load(profile.name)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([], "at least 500"),
        ([np.ones(499)], "at least 500"),
        ([np.ones(600)], "do not vary"),
        ([np.append(np.arange(600.0), math.nan)], "not finite"),
        ([np.append(np.arange(600.0), -1)], "not finite"),
    ],
)
def test_streams_that_cannot_be_fitted(streams: list[NDArray[np.float64]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_profile(streams, model="toy", temperature=0.7)


def test_the_columns_are_those_that_are_recorded() -> None:
    assert [COLUMN[name] for name in TOKEN_FIELDS] == list(range(len(TOKEN_FIELDS)))
