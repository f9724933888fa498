"""The trace arena: one scatter, generations, and a second process that writes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.errors import BusyError, InternalError, UnavailableError
from sparkray.metis.arena import Progress, Slot, TraceArena
from sparkray.metis.fields import NUM_FIELDS


def token(value: float, rows: int = 1) -> np.ndarray:
    return np.full((rows, NUM_FIELDS), value, dtype=np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[TraceArena]:
    made = TraceArena.create(4, 8, tmp_path)
    yield made
    made.close()


def test_a_scatter_lands_where_it_is_sent(arena: TraceArena) -> None:
    first, second = arena.claim(), arena.claim()
    tokens = np.stack([np.arange(NUM_FIELDS), np.arange(NUM_FIELDS) + 100]).astype(np.float32)
    arena.write(ints(second.index, first.index), ints(second.generation, first.generation), ints(0, 3), tokens)

    assert arena.read(second, 0, 1).tolist() == [list(range(NUM_FIELDS))]
    assert arena.read(first, 3, 4).tolist() == [[value + 100 for value in range(NUM_FIELDS)]]
    assert np.isnan(arena.read(first, 0, 3)).all()
    assert arena.progress(second) == Progress(committed=0, written=1)
    assert arena.progress(first) == Progress(committed=3, written=4)


def test_writing_a_position_again_replaces_it_and_counts_it_once(arena: TraceArena) -> None:
    slot = arena.claim()
    for value in (1.0, 2.0, 3.0):
        arena.write(ints(slot.index), ints(slot.generation), ints(0), token(value))
    assert arena.progress(slot).written == 1
    assert arena.read(slot, 0, 8)[0].tolist() == [3.0] * NUM_FIELDS


def test_several_rows_of_one_request_in_one_scatter(arena: TraceArena) -> None:
    slot = arena.claim()
    tokens = np.concatenate([token(1), token(2), token(3)])
    arena.write(ints(*[slot.index] * 3), ints(*[slot.generation] * 3), ints(4, 5, 6), tokens, committed_B=ints(4, 4, 4))
    assert arena.progress(slot) == Progress(committed=4, written=7)
    assert arena.read(slot, 4, 7)[:, 0].tolist() == [1, 2, 3]


def test_tokens_beyond_the_bound_are_dropped_but_counted(arena: TraceArena) -> None:
    slot = arena.claim()
    neighbour = arena.claim()
    for position in range(12):
        arena.write(ints(slot.index), ints(slot.generation), ints(position), token(position))
    assert arena.progress(slot) == Progress(committed=11, written=12)
    assert arena.read(slot, 0, 12)[:, 0].tolist() == list(range(8))
    assert np.isnan(arena.read(neighbour, 0, 8)).all()


def test_a_late_writer_cannot_touch_a_reused_slot(tmp_path: Path) -> None:
    arena = TraceArena.create(1, 8, tmp_path)
    old = arena.claim()
    arena.write(ints(old.index), ints(old.generation), ints(0), token(1))
    arena.release(old)
    arena.write(ints(old.index), ints(old.generation), ints(1), token(1))  # between two requests
    new = arena.claim()
    assert new.index == old.index
    arena.write(ints(old.index), ints(old.generation), ints(2), token(1))  # while the next one holds the slot
    assert arena.progress(new) == Progress()
    assert np.isnan(arena.read(new, 0, 8)).all()
    assert arena.progress(old) == Progress(committed=0, written=1)
    arena.write(ints(new.index), ints(new.generation), ints(0), token(7))
    assert arena.read(new, 0, 1)[0, 0] == 7
    assert np.isnan(arena.read(old, 0, 1)).all()
    arena.close()


def test_mixed_scatter_keeps_the_living(arena: TraceArena) -> None:
    living, dead = arena.claim(), arena.claim()
    arena.release(dead)
    tokens = np.concatenate([token(1), token(2), token(3)])
    arena.write(ints(dead.index, living.index, -1), ints(dead.generation, living.generation, 0), ints(0, 0, 0), tokens)
    assert arena.read(living, 0, 1)[0, 0] == 2
    assert np.isnan(arena.read(dead, 0, 1)).all()


def test_restarts_add_up_and_belong_to_one_request(arena: TraceArena) -> None:
    for _ in range(2):
        slot = arena.claim()
        for position, restarted in ((0, False), (1, True), (2, True)):
            arena.write(
                ints(slot.index),
                ints(slot.generation),
                ints(position),
                token(0),
                restarted_B=np.array([restarted]),
            )
        assert arena.progress(slot).restarts == 2
        arena.release(slot)


def test_full_then_free_again(arena: TraceArena) -> None:
    slots = [arena.claim() for _ in range(4)]
    assert arena.num_active == 4
    with pytest.raises(BusyError, match="all 4 slots"):
        arena.claim()
    arena.release(slots[2])
    assert arena.num_active == 3
    assert arena.claim().index == slots[2].index
    with pytest.raises(InternalError, match="released twice"):
        arena.release(slots[2])


def test_slots_are_reused_in_the_order_they_were_freed(arena: TraceArena) -> None:
    slots = [arena.claim() for _ in range(4)]
    for index in (3, 0, 2):
        arena.release(slots[index])
    assert [arena.claim().index for _ in range(3)] == [3, 0, 2]


def test_closing_removes_the_file_and_a_second_arena_gets_its_own(tmp_path: Path) -> None:
    first = TraceArena.create(1, 1, tmp_path)
    second = TraceArena.create(1, 1, tmp_path)
    assert first.path.name.endswith("-0.arena")
    assert second.path.name.endswith("-1.arena")
    first.close()
    assert not first.path.exists()
    assert second.path.exists()
    third = TraceArena.create(1, 1, tmp_path)
    assert third.path == first.path
    second.close()
    third.close()
    assert list(tmp_path.iterdir()) == []


def _create_and_crash(folder: Path) -> None:
    TraceArena.create(2, 2, folder)
    os._exit(9)


def test_what_a_crashed_owner_left_is_replaced(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_create_and_crash, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    (leftover,) = tmp_path.iterdir()
    with leftover.open("rb") as old:
        arena = TraceArena.create(3, 3, tmp_path)
        assert list(tmp_path.iterdir()) == [arena.path] == [leftover]
        # A new file: what an orphaned worker still writes goes to the old one, which no name leads to any more.
        assert os.fstat(old.fileno()).st_nlink == 0
    assert arena.num_slots == 3
    arena.close()


def test_no_room_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no room for the \d+ MiB .*max_trace_tokens"):
        TraceArena.create(1 << 24, 1 << 20, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_attach_refuses_what_is_no_arena(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be opened"):
        TraceArena.attach(tmp_path / "absent")
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"x" * 256)
    with pytest.raises(UnavailableError, match="not trace memory of version"):
        TraceArena.attach(stranger)


NUM_TOKENS = 200


def _write_from_another_process(path: Path, slots: list[Slot], doomed: Slot, ready: Event, go: Event) -> None:
    arena = TraceArena.attach(path)
    everyone = [*slots, doomed]
    indices, generations = ints(*[slot.index for slot in everyone]), ints(*[slot.generation for slot in everyone])
    for position in range(NUM_TOKENS):
        if position == NUM_TOKENS // 2:
            ready.set()
            assert go.wait(30)
        tokens = np.zeros((len(everyone), NUM_FIELDS), dtype=np.float32)
        tokens[:] = (indices * 1000 + position)[:, None]
        arena.write(indices, generations, np.full(len(everyone), position), tokens)


def test_a_second_process_writes_while_this_one_reads_and_releases(tmp_path: Path) -> None:
    arena = TraceArena.create(8, NUM_TOKENS, tmp_path)
    slots, doomed = [arena.claim() for _ in range(7)], arena.claim()
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    writer = context.Process(target=_write_from_another_process, args=(arena.path, slots, doomed, ready, go))
    writer.start()
    seen = 0
    while not ready.is_set():
        # Whatever is committed has arrived whole, at any moment.
        committed = arena.progress(slots[0]).committed
        assert committed >= seen
        seen = committed
        expected = slots[0].index * 1000 + np.arange(committed)
        assert arena.read(slots[0], 0, committed)[:, 3].tolist() == expected.tolist()
    arena.release(doomed)
    heir = arena.claim()
    assert heir.index == doomed.index
    go.set()
    writer.join(60)
    assert writer.exitcode == 0
    for slot in slots:
        assert arena.progress(slot) == Progress(committed=NUM_TOKENS - 1, written=NUM_TOKENS)
        assert arena.read(slot, 0, NUM_TOKENS)[:, 5].tolist() == [slot.index * 1000 + p for p in range(NUM_TOKENS)]
    assert arena.progress(heir) == Progress()
    assert np.isnan(arena.read(heir, 0, NUM_TOKENS)).all()
    arena.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["claim", "release", "write", "late"]), st.integers(0, 5)), max_size=60))
def test_any_history_reads_back_what_a_dictionary_holds(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int]]
) -> None:
    arena = TraceArena.create(3, 4, tmp_path_factory.mktemp("arena"))
    held: dict[Slot, list[float]] = {}
    gone: list[Slot] = []
    for step, (what, which) in enumerate(history):
        if what == "claim" and len(held) < 3:
            held[arena.claim()] = []
        elif what == "late" and gone:
            slot = gone[which % len(gone)]
            arena.write(ints(slot.index), ints(slot.generation), ints(which % 4), token(-1))
        elif held:
            slot = list(held)[which % len(held)]
            if what == "release":
                del held[slot]
                gone.append(slot)
                arena.release(slot)
            elif what == "write":
                arena.write(ints(slot.index), ints(slot.generation), ints(len(held[slot])), token(step))
                held[slot].append(step)
    assert arena.num_active == len(held)
    for slot, values in held.items():
        assert arena.read(slot, 0, len(values))[:, 0].tolist() == values[:4]
        assert arena.progress(slot).written == len(values)
    arena.close()
