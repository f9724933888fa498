"""When more paths would not change the answer: four ways to be sure, from certain to likely.

All take the weights for and against. Weights are votes, or probabilities of being right in units of one vote.
"""

from __future__ import annotations

import math

from sparkray.search.bounds import beta_cdf
from sparkray.search.votes import VoteResult


def is_locked_in(result: VoteResult, weight_to_come: float) -> bool:
    """Whether the winner stays the winner however the rest votes: certain, and late."""
    if not result.ranking or result.tied:
        return False
    runner_up = result.ranking[1].weight if len(result.ranking) > 1 else 0.0
    return result.ranking[0].weight > runner_up + weight_to_come


def beta_certainty(result: VoteResult) -> float:
    """Probability that the winner is likelier than the runner-up, after a uniform prior (arXiv 2305.11860).

    With v and w votes for the two this is P(Beta(v + 1, w + 1) > 1/2).
    """
    if not result.ranking:
        return 0.0
    runner_up = result.ranking[1].weight if len(result.ranking) > 1 else 0.0
    return 1 - beta_cdf(0.5, result.ranking[0].weight + 1, runner_up + 1)


def mixture_e_value(result: VoteResult) -> float:
    """Evidence, valid at any time, against "the winner is no likelier than every other answer".

    For each other answer the votes for it and for the winner are a coin; under the hypothesis the winner's side has
    probability at most 1/2. Betting on all coins theta > 1/2 at once (a uniform mixture) gives a martingale, whose
    value after v and w votes is 2 * 2^(v+w) * integral_{1/2}^{1} theta^v (1 - theta)^w dtheta. The least of these over
    the other answers, divided by the number of answers that could have won (the winner was chosen by looking), is an
    e-value: above 1/delta the winner is the likeliest answer with confidence 1 - delta, whenever one looks.
    """
    if not result.ranking:
        return 0.0
    top = result.ranking[0].weight
    others = [entry.weight for entry in result.ranking[1:]] or [0.0]
    least = min(_coin_log_e_value(top, other) for other in others)
    return math.exp(min(700.0, least - math.log(len(result.ranking) + 1)))


def _coin_log_e_value(heads: float, tails: float) -> float:
    log_beta = math.lgamma(heads + 1) + math.lgamma(tails + 1) - math.lgamma(heads + tails + 2)
    upper = 1 - beta_cdf(0.5, heads + 1, tails + 1)
    if upper <= 0:
        return -math.inf
    return math.log(2) + (heads + tails) * math.log(2) + log_beta + math.log(upper)
