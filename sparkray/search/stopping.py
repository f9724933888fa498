"""The state of a vote under way, and what stopping now may cost.

The cost of stopping is regret: the vote over all paths would have been right, and the leader is wrong. It is small
where the leader is nearly certain, and as small where no vote would be right: there, more paths buy nothing. A logistic
regression fitted on calibration questions estimates it; how far the estimate may be trusted is settled afterwards, on
other questions, by `learn_then_test`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparkray.search.certificates import beta_certainty
from sparkray.search.logistic import Features
from sparkray.search.paths import FinishReason, Lane
from sparkray.search.votes import AnswerVotes, VoteResult

STATE_FEATURES = (
    "log_num_votes",
    "leader_share",
    "runner_up_share",
    "beta_certainty",
    "leader_probability",
    "best_probability",
    "mean_probability",
    "distinct_share",
    "pruned_share",
)


def as_votes(result: VoteResult) -> VoteResult:
    """The same vote with weights scaled so that they add up to the number of paths that voted.

    A certificate counts evidence in votes; weights alone say which votes count more than others.
    """
    num_votes = sum(len(entry.paths) for entry in result.ranking)
    total = result.total_weight
    if total <= 0:
        return result
    scale = num_votes / total
    ranking = tuple(AnswerVotes(entry.answer, entry.weight * scale, entry.paths) for entry in result.ranking)
    return VoteResult(ranking, result.tied, result.num_without_answer)


def vote_state(result: VoteResult, lanes: Sequence[Lane], probabilities: Mapping[int, float]) -> Features:
    """The `STATE_FEATURES` of a search, shape [num_state_features].

    Args:
        result: the weighted vote over the lanes that ended; at least one has an answer.
        lanes: all lanes.
        probabilities: P(right) of each lane that ended with an answer, by index.
    """
    votes = as_votes(result)
    num_votes = sum(len(entry.paths) for entry in votes.ranking)
    leader = votes.ranking[0]
    runner_up = votes.ranking[1].weight if len(votes.ranking) > 1 else 0.0
    leading = [probabilities[index] for index in leader.paths]
    values: dict[str, Any] = {
        "log_num_votes": math.log(num_votes),
        "leader_share": leader.weight / num_votes,
        "runner_up_share": runner_up / num_votes,
        "beta_certainty": beta_certainty(votes),
        "leader_probability": sum(leading) / len(leading),
        "best_probability": max(leading),
        "mean_probability": sum(probabilities.values()) / len(probabilities),
        "distinct_share": len(votes.ranking) / num_votes,
        "pruned_share": sum(lane.finish_reason is FinishReason.PRUNED for lane in lanes) / len(lanes),
    }
    return np.array([values[name] for name in STATE_FEATURES], dtype=np.float64)
