"""The state of all watched requests as one tensor, and one step of their detectors for a whole batch.

Shapes: B rows given to `observe`, R requests the bank has room for, F fields of a recorded token, N numbers of a
state, V vocabulary. `rules` has the formulas.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparkray.metis.entropy import EntropyStats
from sparkray.metis.options import BOOSTS, DETECTORS, WatchOptions
from sparkray.metis.profile import ProfileStore
from sparkray.metis.rules import FIRST_RUNNING, Row, advance

NUM_ROWS = len(Row)


class DetectorBank:
    """Detectors for up to `num_rows` requests at a time.

    Args:
        num_rows: rows that may be watched at once (the engine's largest batch).
        device: where the logits are.
        profiles: where calibrated rows find their reference; the packaged ones by default.

    The state is float64 where the device has it, so that a statistic after 100,000 tokens is what the formula says
    and not what float32 made of it; float32 on Apple's GPUs.

    Attributes:
        state: [N, R]; a copy of columns taken before `observe` and written back later undoes it. Write into it, never
            replace it.
    """

    def __init__(self, num_rows: int, device: torch.device | str, profiles: ProfileStore | None = None) -> None:
        self.device = torch.device(device)
        self.num_rows = num_rows
        self._profiles = profiles if profiles is not None else ProfileStore.from_environment()
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._idle_N = torch.tensor(_column({}), dtype=dtype, device=self.device)
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
            tokens_BF, float32, the `TOKEN_FIELDS` of each row, on the bank's device.
        """
        log2_vocab = math.log2(max(vocab_size, 2))
        if self.device.type == "cpu":
            return self._observe_numpy(rows_B, stats, log2_vocab, keep_B, sentence_end_B)
        dtype = self.state.dtype
        running, tokens_FB = advance(
            torch,
            self.state.index_select(1, rows_B),
            stats.entropy_B.to(dtype),
            stats.max_prob_B.to(dtype),
            torch.ones_like(rows_B, dtype=torch.bool) if keep_B is None else keep_B,
            torch.zeros_like(rows_B, dtype=torch.bool) if sentence_end_B is None else sentence_end_B,
            log2_vocab,
        )
        self.state[FIRST_RUNNING:].index_copy_(1, rows_B, running)
        tokens_BF: Tensor = tokens_FB.T.float()
        return tokens_BF

    def boost_bonus(self, rows_B: Tensor, tokens_BF: Tensor) -> tuple[Tensor, Tensor]:
        """(mode_B, bonus_B): which phrase table each row uses and what is added now; 0 where it is not boosted."""
        settings = self.state[Row.BOOST_MODE : Row.BOOST_BONUS + 1].index_select(1, rows_B)
        return settings[0], settings[1] * tokens_BF[:, -1]

    def _observe_numpy(
        self,
        rows_B: Tensor,
        stats: EntropyStats,
        log2_vocab: float,
        keep_B: Tensor | None,
        sentence_end_B: Tensor | None,
    ) -> Tensor:
        state, rows = self.state.numpy(), rows_B.numpy()
        running, tokens_FB = advance(
            np,
            state[:, rows],
            stats.entropy_B.numpy().astype(np.float64),
            stats.max_prob_B.numpy().astype(np.float64),
            True if keep_B is None else keep_B.numpy(),
            False if sentence_end_B is None else sentence_end_B.numpy(),
            log2_vocab,
        )
        state[FIRST_RUNNING:, rows] = running
        return torch.from_numpy(np.ascontiguousarray(tokens_FB.T, dtype=np.float32))

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


def _column(values: dict[Row, float]) -> list[float]:
    idle = {Row.HEDGE_THRESHOLD: math.inf, Row.REFUSE_THRESHOLD: math.inf, Row.DECAY: 1.0, Row.REFERENCE_STD: 1.0}
    column = {**idle, **values}
    return [column.get(row, 0.0) for row in Row]
