"""What a token does to the state of its request: the two detectors and the boost, as formulas over columns.

A request is a column of numbers in the order of `Row`: its settings first, then what runs from token to token. Both
detectors are computed for every column and the one that the request asked for is kept, so a batch may mix them and
no Python loop runs over requests.

**metis** is the rule of METIS's vLLM processor (CARBON-XXX/METIS): z against the request's own mean and standard
deviation, the current token included; one statistic that decays on confident tokens and restarts after an alarm;
HEDGE at 4, REFUSE at 8.

**calibrated** takes z against a stored reference profile: what the entropy before this one leads to expect, so no
token is part of its own yardstick and a request that is confused throughout still looks confused. HEDGE and REFUSE
are two CUSUM statistics (Page, 1954) with thresholds from the profile for the wanted average run length. Each
restarts after its own alarm.

The formulas are written against `xp`, which is numpy or torch: on a CPU numpy takes a tenth of the time of torch for
arrays this small, on a GPU torch keeps them where the logits are.

Shapes: B columns, N numbers of a state, F fields of a recorded token.
"""

from __future__ import annotations

import math
from enum import IntEnum, auto
from typing import Any

from sparkray.metis.fields import Action
from sparkray.metis.options import BOOSTS, DETECTORS

# The published rule: a higher drift while the answer finds its feet.
EARLY_TOKENS = 80
EARLY_DRIFT = 0.5
CONFIDENT = 0.9
STD_OF_NO_VARIANCE = 0.1
MIN_STD = 0.01

BOOST_TOKENS = 50  # published: boosted tokens after an alarm; careful: tokens within which a sentence must end
CAREFUL_COOLDOWN_TOKENS = 40
CAREFUL_MAX_BOOSTS = 3

CALIBRATED = DETECTORS.index("calibrated")
PUBLISHED = BOOSTS.index("published")
CAREFUL = BOOSTS.index("careful")


class Row(IntEnum):
    """Rows of a state."""

    # Settings.
    DETECTOR = 0
    HEDGE_THRESHOLD = auto()
    REFUSE_THRESHOLD = auto()
    HEDGE_DRIFT = auto()
    REFUSE_DRIFT = auto()
    DECAY = auto()
    REFERENCE_MEAN = auto()
    REFERENCE_STD = auto()
    REFERENCE_LAG1 = auto()
    BOOST_MODE = auto()
    BOOST_BONUS = auto()
    # What runs from token to token.
    NUM_TOKENS = auto()
    MEAN = auto()
    SQUARES = auto()
    PREVIOUS = auto()
    HEDGE_STATISTIC = auto()
    REFUSE_STATISTIC = auto()
    BOOST_REMAINING = auto()
    BOOST_COOLDOWN = auto()
    NUM_BOOSTS = auto()


FIRST_RUNNING = int(Row.NUM_TOKENS)

# An array of `xp`: numpy's or torch's.
Array = Any


def advance(
    xp: Any,
    state_NB: Array,
    entropy_B: Array,
    max_prob_B: Array,
    keep_B: Array,
    sentence_end_B: Array,
    log2_vocab: float,
) -> tuple[Array, Array]:
    """One token of every column.

    Args:
        xp: numpy or torch, whichever the arrays are of.
        state_NB: floating point; not changed.
        entropy_B: bits, of the state's dtype; NaN or infinite where the logits held no distribution.
        max_prob_B: of the state's dtype.
        keep_B: bool; columns that are False keep their running rows.
        sentence_end_B: bool, whether the token before this one ended a sentence.
        log2_vocab: the largest entropy there can be, in bits.

    Returns:
        The running rows after the token, [N - FIRST_RUNNING, B], and the recorded fields, [F, B].
    """
    has_distribution = xp.isfinite(entropy_B)
    entropy = xp.where(has_distribution, entropy_B, 0.0)
    share = entropy / log2_vocab
    confidence = 1.0 - xp.where(share < 1.0, share, 1.0)
    calibrated = state_NB[Row.DETECTOR] == CALIBRATED

    # Welford's running mean and sum of squared deviations.
    count = state_NB[Row.NUM_TOKENS] + 1.0
    delta = entropy - state_NB[Row.MEAN]
    mean = state_NB[Row.MEAN] + delta / count
    squares = state_NB[Row.SQUARES] + delta * (entropy - mean)

    own_z = _own_z(xp, entropy, mean, squares, count)
    own_statistic = _own_statistic(xp, state_NB, own_z, confidence, count)
    reference_z = _reference_z(xp, state_NB, entropy)
    z = xp.where(calibrated, reference_z, own_z)
    hedge_page = _page(xp, state_NB[Row.HEDGE_STATISTIC], reference_z, state_NB[Row.HEDGE_DRIFT])
    refuse_page = _page(xp, state_NB[Row.REFUSE_STATISTIC], reference_z, state_NB[Row.REFUSE_DRIFT])
    hedge_statistic = xp.where(calibrated, hedge_page, own_statistic)
    refuse_statistic = xp.where(calibrated, refuse_page, own_statistic)

    hedges = (hedge_statistic >= state_NB[Row.HEDGE_THRESHOLD]) & has_distribution
    refuses = (refuse_statistic >= state_NB[Row.REFUSE_THRESHOLD]) & has_distribution
    action = xp.where(refuses, float(Action.REFUSE), float(Action.HEDGE) * hedges)
    # The published rule has one statistic, so either alarm restarts it.
    restarts_both = (hedges | refuses) & ~calibrated
    boosted, *boost = _step_boost(xp, state_NB, hedges & ~refuses, sentence_end_B)

    running = xp.stack(
        (
            count,
            mean,
            squares,
            entropy,
            xp.where(hedges | restarts_both, 0.0, hedge_statistic),
            xp.where(refuses | restarts_both, 0.0, refuse_statistic),
            *boost,
        )
    )
    unknown = xp.where(has_distribution, 0.0 * entropy, math.nan)
    tokens = xp.stack(
        (
            entropy + unknown,
            confidence + unknown,
            max_prob_B,
            z + unknown,
            hedge_statistic,
            refuse_statistic,
            action + 0.0 * entropy,
            xp.where(boosted, 1.0 + 0.0 * entropy, 0.0),
        )
    )
    return xp.where(has_distribution & keep_B, running, state_NB[FIRST_RUNNING:]), tokens


def _own_z(xp: Any, entropy: Array, mean: Array, squares: Array, count: Array) -> Array:
    """Against the request's own statistics, this token included."""
    variance = squares / xp.where(count > 2.0, count - 1.0, 1.0)
    std = xp.where(variance > 0, xp.sqrt(variance), STD_OF_NO_VARIANCE)
    return xp.where(std > MIN_STD, (entropy - mean) / std, 0.0)


def _own_statistic(xp: Any, state: Array, z: Array, confidence: Array, count: Array) -> Array:
    statistic = state[Row.HEDGE_STATISTIC]
    drift = state[Row.HEDGE_DRIFT] + EARLY_DRIFT * (count <= EARLY_TOKENS)
    calm = xp.where(confidence > CONFIDENT, statistic * state[Row.DECAY], statistic)
    return xp.where(z > drift, statistic + (z - drift) * confidence, calm)


def _reference_z(xp: Any, state: Array, entropy: Array) -> Array:
    """Against what the profile expects after the previous entropy; the first token against the plain mean."""
    mean, lag1 = state[Row.REFERENCE_MEAN], state[Row.REFERENCE_LAG1]
    expected = mean + lag1 * (state[Row.PREVIOUS] - mean)
    shrink = xp.where(state[Row.NUM_TOKENS] > 0, xp.sqrt(1.0 - lag1 * lag1), 1.0)
    return (entropy - expected) / (state[Row.REFERENCE_STD] * shrink)


def _page(xp: Any, statistic: Array, z: Array, drift: Array) -> Array:
    moved = statistic + z - drift
    return xp.where(moved > 0, moved, 0.0)


def _step_boost(xp: Any, state: Array, alarm: Array, sentence_end: Array) -> tuple[Array, Array, Array, Array]:
    """(boosted, remaining, cooldown, number of boosts) after this token.

    published: an alarm boosts this token and the 49 after it, and a new alarm starts over.
    careful: an alarm outside the cooldown waits up to 50 tokens for a sentence to end, and boosts the one token that
    begins the next sentence; then 40 tokens of cooldown, and at most 3 boosts a request.
    """
    published, careful = state[Row.BOOST_MODE] == PUBLISHED, state[Row.BOOST_MODE] == CAREFUL
    remaining, cooldown, num_boosts = state[Row.BOOST_REMAINING], state[Row.BOOST_COOLDOWN], state[Row.NUM_BOOSTS]
    may_arm = published | (careful & (cooldown == 0) & (num_boosts < CAREFUL_MAX_BOOSTS))
    remaining = xp.where(alarm & may_arm, float(BOOST_TOKENS), remaining)
    boosted = (remaining > 0) & (published | sentence_end)
    spent = boosted & careful
    return (
        boosted,
        xp.where(spent | (remaining <= 1), 0.0, remaining - 1.0),
        xp.where(spent, float(CAREFUL_COOLDOWN_TOKENS), xp.where(cooldown > 1, cooldown - 1.0, 0.0)),
        num_boosts + 1.0 * boosted,
    )
