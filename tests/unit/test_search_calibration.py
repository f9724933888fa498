"""Calibration keeps its promises on questions it has not seen, and finds nothing where there is nothing to find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path as FilePath

import numpy as np
import pytest
from search_paths import INFO, path, toy_questions

from sparkray.errors import InputError, NotFoundError
from sparkray.search.bounds import clopper_pearson
from sparkray.search.calibration import (
    CalibrationOptions,
    _certify_stopping,
    _Replays,
    calibrate,
    divide,
    false_prune_losses,
)
from sparkray.search.evaluate import bootstrap_resamples, compare, figures_of, run_policy
from sparkray.search.logistic import fit_logistic
from sparkray.search.policies import AdaptiveConsistency, Full
from sparkray.search.profile import SearchProfile, load_profile
from sparkray.search.replay import shuffled_orders
from sparkray.search.scorer import Example, fit_scorer, scorer_from_dict, scorer_to_dict
from sparkray.search.trajectories import Moment, Trajectory

OPTIONS = CalibrationOptions(checkpoints=(4, 8, 16), num_orders=2)


@pytest.fixture(scope="module")
def profile() -> SearchProfile:
    return calibrate(INFO, toy_questions(160, seed=1), OPTIONS)


def test_logistic_finds_the_weights_of_its_maker() -> None:
    draw = np.random.default_rng(0)
    features = draw.standard_normal((20_000, 2)) * [1.0, 5.0] + [3.0, -2.0]
    logit = 0.5 + 2.0 * (features[:, 0] - 3.0) - 0.2 * (features[:, 1] + 2.0)
    target = draw.random(20_000) < 1 / (1 + np.exp(-logit))
    fitted = fit_logistic(features, target, np.ones(20_000))
    # In standardised units: 2 * 1, -0.2 * 5, and the logit at the mean.
    assert fitted.weights == pytest.approx((2.0, -1.0), abs=0.08)
    assert fitted.bias == pytest.approx(0.5, abs=0.08)
    assert fitted.probability(np.array([4.0, -2.0])) == pytest.approx(1 / (1 + np.exp(-2.5)), abs=0.02)


def test_weights_of_examples_count_as_copies() -> None:
    features = np.array([[0.0], [1.0], [1.0], [2.0]])
    target = np.array([False, True, False, True])
    once = fit_logistic(features[[0, 0, 0, 1, 2, 3]], target[[0, 0, 0, 1, 2, 3]], np.ones(6))
    # Standardisation looks at the examples and not at their weights, so probabilities are compared and not weights.
    weighted = fit_logistic(features, target, np.array([3.0, 1.0, 1.0, 1.0]), ridge=1.0)
    assert weighted.probability(np.array([0.0])) == pytest.approx(once.probability(np.array([0.0])), abs=0.1)


def test_each_task_has_its_own_model_of_ends() -> None:
    """In one task calm paths are right and in the other excited ones; together they tell nothing."""
    draw = np.random.default_rng(0)
    examples = []
    for number in range(400):
        right, task = bool(draw.random() < 0.5), ("calm", "excited")[number % 2]
        entropy = 1 + draw.standard_normal() * 0.5 + (1 if right == (task == "excited") else -1)
        examples.append(Example(path("a", 6, entropy=entropy).signals, right, True, task=task))
    rare = [Example(path("a", 6).signals, True, True, task="rare")] * 5
    scorer = scorer_from_dict(json.loads(json.dumps(scorer_to_dict(fit_scorer(examples + rare, (4,))))))
    low, high = path("a", 6, entropy=0.0).signals, path("a", 6, entropy=2.0).signals
    assert scorer.at_end(low, "calm") > 0.9 > 0.1 > scorer.at_end(high, "calm")
    assert scorer.at_end(high, "excited") > 0.9 > 0.1 > scorer.at_end(low, "excited")
    # Five paths are too few for a model, and an unknown task has none: all tasks together speak.
    assert scorer.at_end(low, "rare") == scorer.at_end(low, "unheard of") == scorer.at_end(low)
    assert scorer.at_end(low) == pytest.approx(0.5, abs=0.2)


def test_a_policy_may_be_set_up_for_each_task() -> None:
    questions = toy_questions(6, seed=8)
    questions = [replace(one, task=("few", "many")[number % 2]) for number, one in enumerate(questions)]
    runs = run_policy({"few": AdaptiveConsistency(0.6), "many": Full()}, questions, num_orders=1)
    assert (runs.paths[1::2] == 16).all()
    assert (runs.paths[::2] < 16).all()


def test_false_pruning_on_unseen_questions_is_as_chosen(profile: SearchProfile) -> None:
    unseen = toy_questions(300, seed=2, split="held_out")
    assert profile.prune_below[0.1] is not None
    for alpha in (0.05, 0.1, 0.2):
        threshold = profile.prune_below[alpha] or 0.0
        rates = [
            np.mean([value < threshold for value in least]) for least in false_prune_losses(profile.scorer, unseen)
        ]
        assert np.mean(rates) <= alpha
    # And it does prune: at 0.2 more than one wrong path in ten.
    wrong = [
        profile.scorer.least_so_far(found.signals) < (profile.prune_below[0.2] or 0.0)
        for question in unseen
        for found, correct in zip(question.paths, question.correct, strict=True)
        if not correct
    ]
    assert np.mean(wrong) > 0.1


def test_bolder_levels_prune_and_stop_more(profile: SearchProfile) -> None:
    levels = [profile.prune_below[alpha] or 0.0 for alpha in sorted(profile.prune_below)]
    assert levels == sorted(levels)
    unseen = toy_questions(60, seed=3, split="held_out")
    found = compare({"certified": profile.policy(0.1, 0.1)}, unseen, num_orders=2)
    assert found["certified"].tokens_saved > 0.3
    assert found["full"].tokens_saved == 0.0
    assert found["certified"].accuracy_delta > -0.1


def test_signals_that_say_nothing_gain_nothing_over_random_pruning() -> None:
    """The negative control: with the signals of all paths shuffled, pruned paths are right as often as any others."""
    draw = np.random.default_rng(4)

    def shuffled(count: int, seed: int) -> list:
        questions = toy_questions(count, seed, told=1.0)
        pool = [found for question in questions for found in question.paths]
        places = iter(draw.permutation(len(pool)))
        return [
            replace(
                question,
                paths=tuple(replace(found, signals=pool[next(places)].signals) for found in question.paths),
            )
            for question in questions
        ]

    fitting, unseen = shuffled(120, 5), shuffled(250, 6)
    scorer = fit_scorer(
        [
            Example(found.signals, correct, True)
            for question in fitting
            for found, correct in zip(question.paths, question.correct, strict=True)
        ],
        (4, 8),
    )
    least = [
        (scorer.least_so_far(found.signals), correct)
        for question in unseen
        for found, correct in zip(question.paths, question.correct, strict=True)
    ]
    cut = np.quantile([value for value, _ in least], 0.25)
    pruned = [correct for value, correct in least if value < cut]
    low, high = clopper_pearson(sum(pruned), len(pruned), 0.999)
    assert low <= np.mean([correct for _, correct in least]) <= high
    # With the true signals the same procedure prunes wrong paths, which shows that the control could have failed.
    telling = toy_questions(250, 6)
    scorer = fit_scorer(
        [
            Example(found.signals, correct, True)
            for question in toy_questions(120, 5)
            for found, correct in zip(question.paths, question.correct, strict=True)
        ],
        (4, 8),
    )
    told = [
        (scorer.least_so_far(found.signals), correct)
        for question in telling
        for found, correct in zip(question.paths, question.correct, strict=True)
    ]
    cut = np.quantile([value for value, _ in told], 0.25)
    assert np.mean([correct for value, correct in told if value < cut]) < 0.15


def test_what_pruning_costs_does_not_forbid_stopping() -> None:
    def replays(estimate: float, leader_right: bool, last_right: bool) -> tuple[list[Trajectory], list[list[float]]]:
        moment = Moment(np.zeros(1), leader_right)
        return [Trajectory((moment,), last_right, full_right=True)], [[estimate]]

    # Of 200 questions 2 are lost whenever the search stops: pruning took their right paths.
    lost = [replays(0.3, False, False)] * 2
    kept = [replays(0.3, True, True)] * 196
    harmless = [*lost, *kept, *[replays(0.3, True, True)] * 2]
    # Of these, 2 more are lost by stopping at estimates of 0.02: 1 % of the questions, and 0.5 % may be.
    harmful = [*lost, *kept, *[replays(0.02, False, True)] * 2]

    def level_of(found: list[tuple[list[Trajectory], list[list[float]]]]) -> float | None:
        both = _Replays([runs for runs, _ in found], [estimates for _, estimates in found])
        return _certify_stopping(both, both, 0.05, OPTIONS)

    assert level_of(harmless) == pytest.approx(0.6)
    level = level_of(harmful)
    assert level is not None
    assert 0.0175 < level <= 0.02


def test_too_few_questions_certify_nothing() -> None:
    certified = calibrate(INFO, toy_questions(24, seed=7), OPTIONS)
    assert certified.prune_below[0.01] is None
    assert certified.policy(0.01, 0.02).prune_below == 0.0
    assert certified.policy(0.01, 0.02).regret is None
    with pytest.raises(InputError, match="12 calibration questions were given, and at least 20"):
        calibrate(INFO, toy_questions(12, seed=7), OPTIONS)


def test_paths_that_are_all_right_cannot_be_learnt_from() -> None:
    questions = [replace(question, correct=(True,) * len(question.paths)) for question in toy_questions(24, seed=8)]
    with pytest.raises(InputError, match="some right and some wrong"):
        calibrate(INFO, questions, OPTIONS)


def test_a_profile_survives_the_file(profile: SearchProfile, tmp_path: FilePath) -> None:
    profile.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "sparkray-search-profile", "version": 999}', "\x00"])
def test_a_damaged_profile_is_refused(content: str, tmp_path: FilePath) -> None:
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(InputError, match="profile"):
        load_profile(tmp_path / "profile.json")
    with pytest.raises(NotFoundError, match="there is no search profile"):
        load_profile(tmp_path / "other.json")


def test_a_profile_is_refused_beyond_what_it_was_made_for(profile: SearchProfile) -> None:
    profile.check("toy", 0.7, "toy")
    with pytest.raises(InputError, match="calibrated for the model 'toy', and the model is 'other'"):
        profile.check("other", 0.7)
    with pytest.raises(InputError, match=r"at temperature 0\.7, and the temperature is 1"):
        profile.check("toy", 1.0)
    with pytest.raises(InputError, match="on the tasks toy, and the task is 'zebra'"):
        profile.check("toy", 0.7, "zebra")


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_level_outside_of_its_range_is_refused(profile: SearchProfile, level: float) -> None:
    with pytest.raises(InputError, match="alpha is"):
        profile.policy(alpha=level)
    with pytest.raises(InputError, match="risk is"):
        profile.policy(risk=level)


def test_dividing_keeps_tasks_in_proportion_and_loses_nothing() -> None:
    questions = toy_questions(10, 0) + [replace(question, task="other") for question in toy_questions(20, 1)]
    first, second = divide(questions, 0.4, seed=0)
    assert sum(question.task == "toy" for question in first) == 4
    assert sum(question.task == "other" for question in first) == 8
    assert len(second) == 18
    assert not {id(question) for question in first} & {id(question) for question in second}


def test_orders_are_the_same_for_every_policy_and_differ_by_question() -> None:
    one, two = toy_questions(2, 0)
    assert shuffled_orders(one, 3, 0) == shuffled_orders(one, 3, 0)
    assert shuffled_orders(one, 3, 0) != shuffled_orders(two, 3, 0)
    assert all(sorted(order) == list(range(16)) for order in shuffled_orders(one, 3, 0))


def test_figures_by_hand() -> None:
    questions = [
        replace(
            toy_questions(1, 0)[0], paths=tuple(path(a, n) for a, n in rows), correct=tuple(a == "y" for a, _ in rows)
        )
        for rows in ([("y", 2), ("y", 2), ("n", 6)], [("n", 1), ("n", 1), ("n", 8)])
    ]
    full = run_policy(Full(), questions, num_orders=1)
    assert full.right.tolist() == [1.0, 0.0]
    assert full.tokens.tolist() == [10.0, 10.0]
    assert full.steps.tolist() == [6.0, 8.0]
    figures = figures_of(full, full, bootstrap_resamples(2, 0))
    assert (figures.accuracy, figures.tokens, figures.tokens_saved, figures.accuracy_delta) == (0.5, 10.0, 0.0, 0.0)
    # Two questions, one right: resampled accuracies are 0, 1/2 and 1 with chances 1/4, 1/2, 1/4.
    assert figures.interval == (0.0, 1.0)
    assert figures.accuracy_delta_interval == (0.0, 0.0)
    with pytest.raises(InputError, match="no recorded questions"):
        compare({"adaptive": AdaptiveConsistency()}, [])
