"""What the models of a search look at, by hand: the tokens of a path, and the state of a vote."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparkray.search.answers import Answer
from sparkray.search.paths import FinishReason, Lane
from sparkray.search.scorer import FEATURES, path_features
from sparkray.search.signals import COLUMN, empty_signals
from sparkray.search.stopping import STATE_FEATURES, vote_state
from sparkray.search.votes import vote


def test_path_features_of_six_tokens() -> None:
    signals = empty_signals(6)
    signals[:, COLUMN["entropy"]] = [1, 2, 3, 4, 5, 9]
    signals[:, COLUMN["logprob"]] = [-1, -2, -3, -4, -5, -6]
    signals[:, COLUMN["max_prob"]] = [0.25, 0.5, 0.75, 1.0, 0.5, 0.75]
    signals[:, COLUMN["top_confidence"]] = [6, 5, 4, 3, 2, 1]
    found = dict(zip(FEATURES, path_features(signals), strict=True))
    assert found == pytest.approx(
        {
            "mean_entropy": 4.0,
            "peak_entropy": 9.0,
            "total_entropy": 24.0,
            "start_entropy": 2.5,
            "recent_entropy": 4.0,
            "entropy_of_last_2": 7.0,
            "entropy_of_last_3": 6.0,
            "entropy_of_last_4": 5.25,
            "entropy_of_last_5": 4.6,
            "mean_logprob": -3.5,
            "least_logprob": -6.0,
            "total_logprob": -21.0,
            "start_logprob": -10.0,
            "recent_logprob": -3.5,
            "logprob_of_last_2": -11.0,
            "logprob_of_last_3": -15.0,
            "logprob_of_last_4": -18.0,
            "logprob_of_last_5": -20.0,
            "mean_max_prob": 3.75 / 6,
            "least_max_prob": 0.25,
            "least_max_prob_of_last_4": 0.5,
            "mean_top_confidence": 3.5,
            "least_top_confidence": 1.0,
            "top_confidence_of_last_4": 2.5,
            "peak_statistic": 0.0,
            "log_num_tokens": math.log(6),
        }
    )


def test_path_features_of_one_token_are_finite() -> None:
    assert np.isfinite(path_features(empty_signals(1))).all()


def _lane(index: int, answer: str | None, reason: FinishReason | None) -> Lane:
    lane = Lane(index, 0)
    lane.answer = None if answer is None else Answer(answer, answer)
    lane.finish_reason = reason
    return lane


def test_the_state_of_a_vote() -> None:
    lanes = [
        _lane(0, "7", FinishReason.STOP),
        _lane(1, "7", FinishReason.STOP),
        _lane(2, "8", FinishReason.STOP),
        _lane(3, None, FinishReason.PRUNED),
        _lane(4, None, None),
    ]
    known = {0: 0.5, 1: 0.3, 2: 0.2}
    result = vote(lanes, lambda lane: known[lane.index])
    found = dict(zip(STATE_FEATURES, vote_state(result, lanes, known, max_paths=8), strict=True))
    # 0.8 of a weight of 1.0, on 3 votes: 2.4 votes against 0.6.
    certainty = found.pop("beta_certainty")
    assert found == pytest.approx(
        {
            "log_num_votes": math.log(3),
            "leader_share": 0.8,
            "runner_up_share": 0.2,
            "leader_part_of_paths": 2 / 3,
            "leader_probability": 0.4,
            "best_leader_probability": 0.5,
            "runner_up_probability": 0.2,
            "best_other_probability": 0.2,
            "best_probability": 0.5,
            "mean_probability": 1 / 3,
            "any_of_three_right": 1 - 0.6 * 0.8,
            "distinct_share": 2 / 3,
            "answer_entropy": -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)),
            "no_answer_share": 1 / 4,
            "margin_to_come": (2.4 - 0.6) / math.sqrt(4 + 1),
            "share_to_come": 4 / 8,
        }
    )
    # P(Beta(3.4, 1.6) > 1/2) by the midpoint rule with four million points.
    assert certainty == pytest.approx(0.813186, abs=1e-6)
