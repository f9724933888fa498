"""The state of a vote under way, and what stopping now may cost.

The cost of stopping is regret: the vote over all paths would have been right, and the leader is wrong. It is small
where the leader is nearly certain, and as small where no vote would be right: there, more paths buy nothing. A logistic
regression fitted on calibration questions estimates it; how far the estimate may be trusted is settled afterwards, on
other questions, by `learn_then_test`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sparkray.search.certificates import beta_certainty
from sparkray.search.logistic import Features
from sparkray.search.paths import Lane
from sparkray.search.votes import AnswerVotes, VoteResult

STATE_FEATURES = (
    "log_num_votes",
    "leader_share",
    "runner_up_share",
    "leader_part_of_paths",
    "beta_certainty",
    "leader_probability",
    "best_leader_probability",
    "runner_up_probability",
    "best_other_probability",
    "best_probability",
    "mean_probability",
    "any_of_three_right",
    "distinct_share",
    "answer_entropy",
    "no_answer_share",
    "margin_to_come",
    "share_to_come",
)
_NUM_LEADING = 3


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


def vote_state(
    result: VoteResult, lanes: Sequence[Lane], probabilities: Mapping[int, float], max_paths: int
) -> Features:
    """The `STATE_FEATURES` of a search, shape [num_state_features].

    Args:
        result: the weighted vote over the lanes that ended; at least one has an answer.
        lanes: all lanes.
        probabilities: P(right) of each lane that ended with an answer, by index.
        max_paths: paths that the search may launch.
    """
    votes = as_votes(result)
    num_votes = sum(len(entry.paths) for entry in votes.ranking)
    shares = [entry.weight / num_votes for entry in votes.ranking]
    of_answers = [[probabilities[index] for index in entry.paths] for entry in votes.ranking]
    means = [sum(values) / len(values) for values in of_answers]
    num_ended = sum(not lane.running for lane in lanes)
    num_to_come = max_paths - num_ended
    runner_up = shares[1] if len(shares) > 1 else 0.0
    best_other = max((max(values) for values in of_answers[1:]), default=0.0)
    values: dict[str, float] = {
        "log_num_votes": math.log(num_votes),
        "leader_share": shares[0],
        "runner_up_share": runner_up,
        "leader_part_of_paths": len(of_answers[0]) / num_votes,
        "beta_certainty": beta_certainty(votes),
        "leader_probability": means[0],
        "best_leader_probability": max(of_answers[0]),
        "runner_up_probability": means[1] if len(means) > 1 else 0.0,
        "best_other_probability": best_other,
        "best_probability": max(probabilities.values()),
        "mean_probability": sum(probabilities.values()) / len(probabilities),
        "any_of_three_right": 1 - math.prod(1 - mean for mean in means[:_NUM_LEADING]),
        "distinct_share": len(shares) / num_votes,
        "answer_entropy": -sum(share * math.log(share) for share in shares if share > 0),
        "no_answer_share": 1 - num_votes / max(num_ended, num_votes),
        # A lead in units of what chance moves votes by in the paths to come.
        "margin_to_come": (shares[0] - runner_up) * num_votes / math.sqrt(num_to_come + 1),
        "share_to_come": num_to_come / max_paths,
    }
    return np.array([values[name] for name in STATE_FEATURES], dtype=np.float64)
