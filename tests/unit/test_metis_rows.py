"""The row table: what was not kept is undone, and a state follows its request wherever it goes."""

from __future__ import annotations

import pytest
import torch

from sparkray.metis.entropy import EntropyStats
from sparkray.metis.options import WatchOptions
from sparkray.metis.rows import Occupant, RequestRows
from sparkray.metis.rules import Row

VOCAB = 1024
CPU = torch.device("cpu")


def occupant(name: str, **options: object) -> Occupant:
    return Occupant(name, WatchOptions(**options))  # type: ignore[arg-type]


def rows_of(num_rows: int = 4, *, max_drafts: int = 0, stash_size: int = 8) -> RequestRows:
    return RequestRows(num_rows, CPU, max_drafts=max_drafts, stash_size=stash_size)


def see(rows: RequestRows, seen: dict[int, tuple[int, float]], *, keep: bool = True) -> dict[int, bool]:
    """One step: row -> (position, entropy). Returns row -> restarted."""
    rows_B = torch.tensor(list(seen))
    positions_B = torch.tensor([position for position, _ in seen.values()])
    keep_B = torch.full((len(seen),), keep)
    restarted_B = rows.settle(rows_B, positions_B, keep_B)
    entropy_B = torch.tensor([entropy for _, entropy in seen.values()])
    rows.bank.observe(rows_B, EntropyStats(entropy_B, torch.full_like(entropy_B, 0.5)), VOCAB, keep_B)
    return dict(zip(seen, restarted_B.tolist(), strict=True))


def counted(rows: RequestRows, row: int) -> tuple[int, float]:
    """(tokens, their mean entropy) as the detector knows them."""
    state = rows.bank.state
    return int(state[Row.NUM_TOKENS, row]), round(float(state[Row.MEAN, row]), 6)


def test_a_token_that_was_not_kept_is_taken_back() -> None:
    rows = rows_of()
    rows.admit(0, occupant("a"))
    for entropy in (9.0, 8.0, 1.0):  # a prompt in three pieces
        assert not see(rows, {0: (0, entropy)})[0]
    see(rows, {0: (1, 2.0)})
    see(rows, {0: (1, 4.0)})
    see(rows, {0: (2, 6.0)})
    assert counted(rows, 0) == (3, pytest.approx((1 + 4 + 6) / 3, abs=1e-6))


def test_a_row_that_is_not_kept_is_left_alone() -> None:
    rows = rows_of()
    rows.admit(0, occupant("a"))
    see(rows, {0: (0, 3.0)})
    assert not see(rows, {0: (5, 9.0)}, keep=False)[0]
    assert not see(rows, {0: (1, 5.0)})[0]
    assert counted(rows, 0) == (2, 4.0)


def test_moves_and_swaps_carry_the_state_and_the_last_position() -> None:
    rows = rows_of()
    for row, name in enumerate("abc"):
        rows.admit(row, occupant(name))
    see(rows, {0: (0, 1.0), 1: (0, 2.0), 2: (0, 3.0)})
    rows.vacate(0)
    rows.move(2, 0)  # c sits in 0
    rows.swap(0, 1)  # b in 0, c in 1
    assert rows.watched.tolist() == [True, True, False, False]
    assert see(rows, {0: (1, 4.0), 1: (0, 5.0)}) == {0: False, 1: False}
    assert counted(rows, 0) == (2, 3.0)
    assert counted(rows, 1) == (1, 5.0)  # its first token was thrown away


def test_a_move_onto_a_row_whose_request_left_unannounced() -> None:
    rows = rows_of()
    rows.admit(0, occupant("a"))
    rows.admit(1, occupant("b"))
    see(rows, {0: (0, 1.0), 1: (0, 2.0)})
    rows.move(1, 0)
    assert not see(rows, {0: (1, 4.0)})[0]
    assert counted(rows, 0) == (2, 3.0)
    rows.admit(3, occupant("a"))  # and it comes back
    assert not see(rows, {3: (1, 7.0)})[3]
    assert counted(rows, 3) == (2, 4.0)


@pytest.mark.parametrize(("position", "tokens"), [(2, (3, 5.0)), (1, (2, 5.0))])
def test_who_comes_back_goes_on(position: int, tokens: tuple[int, float]) -> None:
    rows = rows_of()
    rows.admit(0, occupant("a"))
    see(rows, {0: (0, 2.0)})
    see(rows, {0: (1, 5.0)})
    rows.vacate(0)
    rows.admit(0, occupant("b"))
    see(rows, {0: (0, 9.0)})
    rows.admit(1, occupant("a"))
    assert not see(rows, {1: (position, 8.0)})[1]
    assert counted(rows, 1) == tokens
    assert counted(rows, 0) == (1, 9.0)


def test_who_comes_back_to_another_row_before_its_own_was_reused() -> None:
    rows = rows_of()
    rows.admit(2, occupant("a"))
    see(rows, {2: (0, 2.0)})
    rows.admit(0, occupant("a"))
    assert rows.watched.tolist() == [True, False, False, False]
    assert not see(rows, {0: (1, 4.0)})[0]
    assert counted(rows, 0) == (2, 3.0)


@pytest.mark.parametrize("position", [0, 3, 7])
def test_a_state_that_does_not_fit_is_dropped_and_reported(position: int) -> None:
    rows = rows_of()
    rows.admit(0, occupant("a"))
    see(rows, {0: (0, 2.0)})
    see(rows, {0: (1, 2.0)})
    rows.vacate(0)
    rows.admit(1, occupant("a"))
    assert see(rows, {1: (position, 4.0)})[1]
    assert counted(rows, 1) == (1, 4.0)
    assert not see(rows, {1: (position + 1, 6.0)})[1]
    assert counted(rows, 1) == (2, 5.0)


def test_a_state_dropped_from_a_full_stash_is_reported() -> None:
    rows = rows_of(stash_size=1)
    for name in "ab":
        rows.admit(0, occupant(name))
        see(rows, {0: (0, 2.0)})
        rows.vacate(0)
    rows.admit(1, occupant("b"))
    rows.admit(2, occupant("a"))
    assert see(rows, {1: (1, 4.0), 2: (1, 4.0)}) == {1: False, 2: True}


def test_the_same_name_with_other_switches_is_another_request() -> None:
    rows = rows_of()
    rows.admit(0, occupant("slot 3", generation=1))
    see(rows, {0: (0, 2.0)})
    rows.admit(1, occupant("slot 3", generation=3))
    assert rows.generations.tolist() == [0, 3, 0, 0]
    assert not see(rows, {1: (0, 6.0)})[1]
    assert counted(rows, 1) == (1, 6.0)


def test_drafts_go_back_to_the_last_one_kept() -> None:
    rows = rows_of(max_drafts=2)
    rows.admit(0, occupant("a"))
    rows.admit(1, occupant("b"))

    def step(positions: tuple[int, int], drafts: list[tuple[float, float | None]]) -> list[bool]:
        rows_B, positions_B, all_B = torch.tensor([0, 1]), torch.tensor(positions), torch.tensor([True, True])
        restarted_B = rows.settle(rows_B, positions_B, all_B)
        for number, pair in enumerate(drafts):
            keep_B = torch.tensor([entropy is not None for entropy in pair])
            entropy_B = torch.tensor([entropy or 0.0 for entropy in pair])
            rows.bank.observe(rows_B, EntropyStats(entropy_B, entropy_B), VOCAB, keep_B)
            rows.remember(rows_B, number + 1, all_B)
        return restarted_B.tolist()

    step((0, 0), [(1.0, 2.0), (3.0, None), (5.0, None)])
    # a kept two of three, b its only one
    assert step((2, 1), [(5.0, 4.0), (9.0, 9.0), (9.0, 9.0)]) == [False, False]
    # a kept one of three, b all three
    assert step((3, 4), [(7.0, 1.0), (0.0, 1.0), (0.0, 1.0)]) == [False, False]
    # a kept none, b two
    assert step((3, 6), [(7.0, 1.0), (9.0, None), (9.0, None)]) == [False, False]
    assert step((4, 7), [(4.0, 0.0), (9.0, 9.0), (9.0, 9.0)]) == [False, False]
    assert step((5, 8), [(0.0, 0.0), (0.0, None), (0.0, None)]) == [False, False]
    kept_a, kept_b = [1, 3, 5, 7, 4, 0, 0, 0], [2, 4, 9, 9, 1, 1, 1, 0, 0]
    assert counted(rows, 0) == (len(kept_a), pytest.approx(sum(kept_a) / len(kept_a), abs=1e-6))
    assert counted(rows, 1) == (len(kept_b), pytest.approx(sum(kept_b) / len(kept_b), abs=1e-6))
    assert step((9, 8), [(0.0, 0.0)] * 3) == [True, False]  # four of three cannot be
