"""The state of all watched requests as one tensor, and one step of every detector as tensor operations.

A column of `state` is a request, a row one of its numbers (`Row`): its settings above, what runs above the line
below. Both detectors are computed for every request and the one that the request asked for is kept, so a batch may
mix them and no Python loop runs over requests.

**metis** is the rule of METIS's vLLM processor (CARBON-XXX/METIS): z against the request's own mean and standard
deviation, the current token included; one statistic that decays on confident tokens and restarts after an alarm;
HEDGE at 4, REFUSE at 8.

**calibrated** takes z against a stored reference profile: what the entropy before this one leads to expect, so no
token is part of its own yardstick and a request that is confused throughout still looks confused. HEDGE and REFUSE
are two CUSUM statistics (Page, 1954) with thresholds from the profile for the wanted average run length. Each
restarts after its own alarm.

Shapes: B rows given to `observe`, R requests the bank has room for, F numbers of a recorded token, N of a state.
"""

from __future__ import annotations

import math
from enum import IntEnum, auto

import torch
from torch import Tensor

from sparkray.metis.entropy import EntropyStats
from sparkray.metis.fields import Action
from sparkray.metis.options import BOOSTS, DETECTORS, WatchOptions
from sparkray.metis.profile import ProfileStore

# The published rule: a higher drift while the answer finds its feet.
EARLY_TOKENS = 80
EARLY_DRIFT = 0.5
CONFIDENT = 0.9
STD_OF_NO_VARIANCE = 0.1
MIN_STD = 0.01

BOOST_TOKENS = 50  # published: boosted tokens after an alarm; careful: tokens within which a sentence must end
CAREFUL_COOLDOWN_TOKENS = 40
CAREFUL_MAX_BOOSTS = 3


class Row(IntEnum):
    """Rows of `DetectorBank.state`."""

    # Settings, written by `reset`.
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
    # What `observe` carries from token to token.
    NUM_TOKENS = auto()
    MEAN = auto()
    SQUARES = auto()
    PREVIOUS = auto()
    HEDGE_STATISTIC = auto()
    REFUSE_STATISTIC = auto()
    BOOST_REMAINING = auto()
    BOOST_COOLDOWN = auto()
    NUM_BOOSTS = auto()


FIRST_RUNNING = Row.NUM_TOKENS
NUM_ROWS = len(Row)

_METIS = DETECTORS.index("metis")
_CALIBRATED = DETECTORS.index("calibrated")
PUBLISHED = BOOSTS.index("published")
CAREFUL = BOOSTS.index("careful")


class DetectorBank:
    """Detectors for up to `num_rows` requests at a time.

    Args:
        num_rows: rows that may be watched at once (the engine's largest batch).
        device: where the logits are.
        profiles: where calibrated rows find their reference; the packaged ones by default.

    The state is float64 where the device has it, so that a statistic after 100,000 tokens is what the formula says
    and not what float32 made of it; float32 on Apple's GPUs.

    Attributes:
        state: [N, R]; a copy of columns taken before `observe` and put back later undoes it.
    """

    def __init__(self, num_rows: int, device: torch.device | str, profiles: ProfileStore | None = None) -> None:
        self.device = torch.device(device)
        self.num_rows = num_rows
        self._profiles = profiles if profiles is not None else ProfileStore.from_environment()
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._idle_N = torch.tensor(_column(), dtype=dtype, device=self.device)
        self.state = self._idle_N.unsqueeze(1).repeat(1, num_rows)

    def reset(self, row: int, options: WatchOptions) -> None:
        """Begin a new request in `row`.

        Raises:
            NotFoundError: the reference profile does not exist.
        """
        self.state[:, row] = self._column_of(options)

    def clear(self, row: int) -> None:
        """Make `row` one that never raises an alarm and is never boosted."""
        self.state[:, row] = self._idle_N

    def save(self, row: int) -> Tensor:
        """A copy of everything that is known of the request in `row`, for `restore`."""
        return self.state[:, row].clone()

    def restore(self, row: int, saved_N: Tensor) -> None:
        self.state[:, row] = saved_N

    def move(self, source: int, target: int) -> None:
        """Carry a request to another row; `source` becomes idle."""
        self.state[:, target] = self.state[:, source]
        self.clear(source)

    def swap(self, first: int, second: int) -> None:
        self.state[:, [first, second]] = self.state[:, [second, first]]

    def observe(
        self,
        rows_B: Tensor,
        stats: EntropyStats,
        vocab_size: int,
        keep_B: Tensor | None = None,
        sentence_end_B: Tensor | None = None,
    ) -> Tensor:
        """Take in one token of each row.

        Args:
            rows_B: int64, distinct rows of this bank, in the order of `stats`.
            stats: of the logits that the tokens are about to be drawn from.
            vocab_size: V of those logits.
            keep_B: bool; rows that are False are answered and then forgotten (a chunk of a prompt). None keeps all.
            sentence_end_B: bool, whether the token before this one ended a sentence; needed by the careful boost,
                which without it never acts.

        Returns:
            tokens_BF, float32, the `TOKEN_FIELDS` of each row.
        """
        state = self.state.index_select(1, rows_B)
        entropy = stats.entropy_B.to(state.dtype)
        has_distribution = torch.isfinite(entropy)
        entropy = torch.where(has_distribution, entropy, 0.0)
        confidence = 1.0 - (entropy / math.log2(max(vocab_size, 2))).clamp_max(1.0)
        calibrated = state[Row.DETECTOR] == _CALIBRATED

        count = state[Row.NUM_TOKENS] + 1
        delta = entropy - state[Row.MEAN]
        mean = state[Row.MEAN] + delta / count
        squares = state[Row.SQUARES] + delta * (entropy - mean)

        own_z = _own_z(entropy, mean, squares, count)
        own_statistic = _published_statistic(state, own_z, confidence, count)
        reference_z = _reference_z(state, entropy)
        z = torch.where(calibrated, reference_z, own_z)
        hedge_statistic = torch.where(
            calibrated, _page(state, Row.HEDGE_STATISTIC, Row.HEDGE_DRIFT, reference_z), own_statistic
        )
        refuse_statistic = torch.where(
            calibrated, _page(state, Row.REFUSE_STATISTIC, Row.REFUSE_DRIFT, reference_z), own_statistic
        )
        hedges = (hedge_statistic >= state[Row.HEDGE_THRESHOLD]) & has_distribution
        refuses = (refuse_statistic >= state[Row.REFUSE_THRESHOLD]) & has_distribution
        either = (hedges | refuses) & ~calibrated
        action = torch.where(refuses, float(Action.REFUSE), torch.where(hedges, float(Action.HEDGE), 0.0))
        boosted, *boost = _step_boost(state, action == Action.HEDGE, sentence_end_B)

        running = torch.stack(
            (
                count,
                mean,
                squares,
                entropy,
                torch.where(hedges | either, 0.0, hedge_statistic),
                torch.where(refuses | either, 0.0, refuse_statistic),
                *boost,
            )
        )
        kept = has_distribution if keep_B is None else has_distribution & keep_B
        self.state[FIRST_RUNNING:].index_copy_(1, rows_B, torch.where(kept, running, state[FIRST_RUNNING:]))
        missing = torch.where(has_distribution, 0.0, math.nan)
        return torch.stack(
            (
                entropy + missing,
                confidence + missing,
                stats.max_prob_B.to(state.dtype),
                z + missing,
                hedge_statistic,
                refuse_statistic,
                action,
                boosted.to(state.dtype),
            ),
            dim=1,
        ).float()

    def boost_bonus(self, rows_B: Tensor, tokens_BF: Tensor) -> tuple[Tensor, Tensor]:
        """(mode_B, bonus_B): which phrase table each row uses and what is added now; 0 where it is not boosted."""
        settings = self.state[Row.BOOST_MODE : Row.BOOST_BONUS + 1].index_select(1, rows_B)
        return settings[0], settings[1] * tokens_BF[:, -1]

    def _column_of(self, options: WatchOptions) -> Tensor:
        values = {
            Row.DETECTOR: float(DETECTORS.index(options.detector)),
            Row.BOOST_MODE: float(BOOSTS.index(options.boost)),
            Row.BOOST_BONUS: options.boost_bonus,
        }
        if options.detector == "metis":
            values |= {
                Row.HEDGE_THRESHOLD: options.hedge,
                Row.REFUSE_THRESHOLD: options.refuse,
                Row.HEDGE_DRIFT: options.drift,
                Row.DECAY: options.decay,
            }
        else:
            profile = self._profiles.load(options.profile or "")
            hedge, refuse = profile.thresholds(options.arl_tokens)
            values |= {
                Row.HEDGE_THRESHOLD: hedge,
                Row.REFUSE_THRESHOLD: refuse,
                Row.HEDGE_DRIFT: profile.hedge_drift,
                Row.REFUSE_DRIFT: profile.refuse_drift,
                Row.REFERENCE_MEAN: profile.mean_bits,
                Row.REFERENCE_STD: profile.std_bits,
                Row.REFERENCE_LAG1: profile.lag1,
                Row.PREVIOUS: profile.mean_bits,
            }
        return torch.tensor(_column(values), dtype=self.state.dtype, device=self.device)


def _column(values: dict[Row, float] | None = None) -> list[float]:
    idle = {Row.HEDGE_THRESHOLD: math.inf, Row.REFUSE_THRESHOLD: math.inf, Row.DECAY: 1.0, Row.REFERENCE_STD: 1.0}
    return [{**idle, **(values or {})}.get(row, 0.0) for row in Row]


def _own_z(entropy: Tensor, mean: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Against the request's own statistics (Welford), this token included."""
    variance = squares / (count - 1).clamp_min(1.0)
    std = torch.where(variance > 0, variance.sqrt(), STD_OF_NO_VARIANCE)
    return torch.where(std > MIN_STD, (entropy - mean) / std, 0.0)


def _published_statistic(state: Tensor, z: Tensor, confidence: Tensor, count: Tensor) -> Tensor:
    statistic = state[Row.HEDGE_STATISTIC]
    drift = state[Row.HEDGE_DRIFT] + EARLY_DRIFT * (count <= EARLY_TOKENS)
    calm = torch.where(confidence > CONFIDENT, statistic * state[Row.DECAY], statistic)
    return torch.where(z > drift, statistic + (z - drift) * confidence, calm)


def _reference_z(state: Tensor, entropy: Tensor) -> Tensor:
    """Against what the profile expects after the previous entropy; the first token against the plain mean."""
    mean, std, lag1 = state[Row.REFERENCE_MEAN], state[Row.REFERENCE_STD], state[Row.REFERENCE_LAG1]
    expected = mean + lag1 * (state[Row.PREVIOUS] - mean)
    innovation_std = std * torch.where(state[Row.NUM_TOKENS] > 0, (1.0 - lag1 * lag1).sqrt(), 1.0)
    return (entropy - expected) / innovation_std


def _page(state: Tensor, statistic: Row, drift: Row, z: Tensor) -> Tensor:
    return (state[statistic] + z - state[drift]).clamp_min(0.0)


def _step_boost(state: Tensor, alarm: Tensor, sentence_end: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(boosted, remaining, cooldown, number of boosts) after this token.

    published: an alarm boosts this token and the 49 after it, and a new alarm starts over.
    careful: an alarm outside the cooldown waits up to 50 tokens for a sentence to end, and boosts the one token that
    begins the next sentence; then 40 tokens of cooldown, and at most 3 boosts a request.
    """
    published, careful = state[Row.BOOST_MODE] == PUBLISHED, state[Row.BOOST_MODE] == CAREFUL
    remaining, cooldown, num_boosts = state[Row.BOOST_REMAINING], state[Row.BOOST_COOLDOWN], state[Row.NUM_BOOSTS]
    may_arm = published | (careful & (cooldown == 0) & (num_boosts < CAREFUL_MAX_BOOSTS))
    remaining = torch.where(alarm & may_arm, float(BOOST_TOKENS), remaining)
    here = published if sentence_end is None else published | sentence_end
    boosted = (remaining > 0) & here
    spent = boosted & careful
    return (
        boosted,
        torch.where(spent, 0.0, (remaining - 1).clamp_min(0.0)),
        torch.where(spent, float(CAREFUL_COOLDOWN_TOKENS), (cooldown - 1).clamp_min(0.0)),
        num_boosts + boosted,
    )
