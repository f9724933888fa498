"""The rows of an engine's batch: which request sits where, and its detector's state through every turn of its life.

An engine computes a request's next token more often than it keeps one. A prompt that is read in pieces yields a
distribution a piece, of which the last alone counts; a speculated token may be rejected; a preempted request leaves
the batch and comes back to another row. The rows here follow one rule for all of that. With every distribution
comes its *position*, the number of tokens that the request has kept so far, and a row remembers the position q that
it saw last and its state before (S0) and after (S1) that token, with speculation also after each draft (S2..). The
next position tells how many of them were kept:

    q      none: go back to S0        (a piece of a prompt; a token thrown away)
    q + j  j of them: go on from Sj   (j = 1 without speculation)
    other  state and request do not belong together: begin anew, and say so (a *restart*)

Shapes: B rows taking part in a step, F fields of the detector's state, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparkray.metis.detectors import DetectorBank
from sparkray.metis.options import BOOSTS, WatchOptions

_NEVER = -(1 << 40)


@dataclass(frozen=True, slots=True)
class Occupant:
    """A watched request in a row.

    Attributes:
        identity: what tells this request from all others that the engine may hold now.
        options: its switches.
        anchor: an object kept alive as long as the identity is in use (an identity made by `id` needs it).
    """

    identity: Hashable
    options: WatchOptions
    anchor: object = None


@dataclass(frozen=True, slots=True)
class _Stashed:
    occupant: Occupant
    columns: tuple[Tensor, ...]
    last: Tensor


class RequestRows:
    """Detector state of every row of the batch.

    Args:
        num_rows: the most requests that the engine runs at one time.
        device: where the logits are.
        max_drafts: speculated tokens a request may have in one step.
        stash_size: requests out of the batch whose state is kept; the longest gone is dropped first.

    Attributes:
        bank: the detectors; `settle` its rows before each `observe`.
        watched: which rows hold a watched request.
        boosts: number of each row's boost in `BOOSTS`, 0 for none.
        slots, generations: each row's place in the trace arena, slot -1 for none.
    """

    def __init__(self, num_rows: int, device: torch.device, *, max_drafts: int = 0, stash_size: int) -> None:
        self.bank = DetectorBank(num_rows, device)
        self.watched = np.zeros(num_rows, dtype=np.bool_)
        self.boosts = np.zeros(num_rows, dtype=np.int8)
        self.slots = np.full(num_rows, -1, dtype=np.int64)
        self.generations = np.zeros(num_rows, dtype=np.int64)
        self._device = device
        self._max_drafts = max_drafts
        self._stash_size = stash_size
        self._fresh = self.bank.state.clone()
        self._before = [self.bank.state.clone() for _ in range(max_drafts + 1)]
        self._last = torch.full((num_rows,), _NEVER, dtype=torch.int64, device=device)
        self._occupants: list[Occupant | None] = [None] * num_rows
        self._row_of: dict[Hashable, int] = {}
        self._stash: OrderedDict[Hashable, _Stashed] = OrderedDict()

    def admit(self, row: int, occupant: Occupant | None) -> None:
        """Put a request, or None for one that is not watched, into a row; whoever sat there is stashed.

        A request that was here before goes on with the state it had.
        """
        self.vacate(row)
        if occupant is None:
            return
        earlier = self._row_of.get(occupant.identity)
        if earlier is not None:
            self.vacate(earlier)
        stashed = self._stash.pop(occupant.identity, None)
        self.bank.reset(row, occupant.options)
        self._fresh[:, row] = self.bank.state[:, row]
        if stashed is not None and stashed.occupant.options == occupant.options:
            for tensor, column in zip(self._columns(), stashed.columns, strict=True):
                tensor[:, row] = column
            self._last[row] = stashed.last
        else:
            self._last[row] = _NEVER
        self._seat(row, occupant)

    def vacate(self, row: int) -> None:
        """Empty a row, keeping its state for the case that the request comes back."""
        if self._occupants[row] is not None:
            self.stash(row)
            self._unseat(row)

    def stash(self, row: int) -> None:
        """Keep a copy of the row's state; the row itself stays as it is."""
        occupant = self._occupants[row]
        if occupant is None:
            return
        columns = tuple(tensor[:, row].clone() for tensor in self._columns())
        self._stash[occupant.identity] = _Stashed(occupant, columns, self._last[row].clone())
        self._stash.move_to_end(occupant.identity)
        while len(self._stash) > self._stash_size:
            self._stash.popitem(last=False)

    def move(self, source: int, target: int) -> None:
        """The request of row `source` now sits in `target`, whose own request has left the batch."""
        self.vacate(target)
        occupant = self._occupants[source]
        if occupant is None:
            return
        for tensor in (*self._columns(), self._fresh):
            tensor[:, target] = tensor[:, source]
        self._last[target] = self._last[source]
        self._unseat(source)
        self._seat(target, occupant)

    def swap(self, a: int, b: int) -> None:
        """The requests of two rows change places."""
        pair, crossed = [a, b], [b, a]
        for tensor in (*self._columns(), self._fresh):
            tensor[:, pair] = tensor[:, crossed]
        self._last[pair] = self._last[crossed]
        at_a, at_b = self._occupants[a], self._occupants[b]
        for row in pair:
            self._unseat(row)
        for row, occupant in ((a, at_b), (b, at_a)):
            if occupant is not None:
                self._seat(row, occupant)

    def settle(self, rows_B: Tensor, positions_B: Tensor, keep_B: Tensor | None) -> Tensor:
        """Bring the state of each row to where its request stands, by the rule at the top of this file.

        Call it once a step, before the step's `observe`.

        Args:
            rows_B: rows taking part, each at most once.
            positions_B: tokens that each request has kept so far.
            keep_B: rows to touch; None means all.

        Returns:
            rows that began anew although there was something to go on with, bool.
        """
        state_FB = self.bank.state.index_select(1, rows_B)
        last_B = self._last.index_select(0, rows_B)
        num_kept_B = positions_B - last_B
        settled_FB = torch.where(num_kept_B == len(self._before), state_FB, self._fresh.index_select(1, rows_B))
        for num_kept, before in enumerate(self._before):
            settled_FB = torch.where(num_kept_B == num_kept, before.index_select(1, rows_B), settled_FB)
        restarted_B = (num_kept_B < 0) | (num_kept_B > len(self._before))
        restarted_B &= (last_B != _NEVER) | (positions_B > 0)
        if keep_B is not None:
            settled_FB = torch.where(keep_B, settled_FB, state_FB)
            positions_B = torch.where(keep_B, positions_B, last_B)
            restarted_B &= keep_B
        self.bank.state.index_copy_(1, rows_B, settled_FB)
        self._last.index_copy_(0, rows_B, positions_B)
        self.remember(rows_B, 0, keep_B)
        return restarted_B

    def remember(self, rows_B: Tensor, num_observed: int, keep_B: Tensor | None) -> None:
        """Note the state after `num_observed` of the step's tokens; with speculation, call it between two `observe`.

        `keep_B` are the rows that `settle` touched.
        """
        # The later ones too: a request with fewer drafts than others has no more states than these.
        state_FB = self.bank.state.index_select(1, rows_B)
        for before in self._before[num_observed:]:
            noted_FB = state_FB if keep_B is None else torch.where(keep_B, state_FB, before.index_select(1, rows_B))
            before.index_copy_(1, rows_B, noted_FB)

    def _columns(self) -> tuple[Tensor, ...]:
        return (self.bank.state, *self._before)

    def _seat(self, row: int, occupant: Occupant) -> None:
        options = occupant.options
        self._occupants[row] = occupant
        self._row_of[occupant.identity] = row
        self.watched[row] = True
        self.boosts[row] = BOOSTS.index(options.boost)
        self.slots[row] = -1 if options.slot is None else options.slot
        self.generations[row] = options.generation or 0

    def _unseat(self, row: int) -> None:
        occupant = self._occupants[row]
        if occupant is None:
            return
        self._occupants[row] = None
        del self._row_of[occupant.identity]
        self.watched[row] = False
        self.boosts[row] = 0
        self.slots[row] = -1
        self.generations[row] = 0
