"""Controller, workers and ledger together, on threads instead of Ray: nothing is lost and nothing comes twice."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from poc_threads import (
    WAIT_SECONDS,
    CountingEngine,
    Fleet,
    LocalHandle,
    distance_of,
    make_run,
    of_cursors,
    wait_for,
)

from sparkray.errors import BusyError, InputError, UnavailableError
from sparkray.poc.fleet.barrier import Barrier
from sparkray.poc.fleet.ledger import Ledger, read_cursors, resume_cursors
from sparkray.poc.fleet.messages import Ack, CheckChunk, GeneratedPart, GroupPlace
from sparkray.poc.fleet.proof_file import ProofFile
from sparkray.poc.fleet.work_pool import WorkPool
from sparkray.poc.fleet.worker import GroupWorker
from sparkray.poc.phases import Phase
from sparkray.poc.proofs import ProofBatch


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, make_run(), 3)
    made.runner.start()
    yield made
    made.runner.stop(5)
    made.ledger.close()


def test_killed_workers_cost_no_nonce_and_repeat_none(fleet: Fleet) -> None:
    fleet.runner.change_phase(Phase.GENERATE, WAIT_SECONDS)
    for victim in range(3):
        wait_for(lambda: len(fleet.received()) > 60 * (victim + 1))  # noqa: B023
        with fleet.runner.locked():
            handle = fleet.controller.seats[victim].handle
        assert isinstance(handle, LocalHandle)
        handle.kill()
    wait_for(lambda: len(fleet.places) >= 6 and min(seat.cursor for seat in fleet.controller.seats) > 60)
    assert fleet.runner.stop(WAIT_SECONDS)

    received = fleet.received()
    assert len(received) == len(set(received))
    assert sorted(received) == sorted(of_cursors(fleet.path, fleet.controller.run))
    assert all(nonce % 3 == 1 for nonce in received)
    assert fleet.controller.monitor.num_total == len(received)
    # Successors begin where the record ends, not where the dead worker was.
    assert all(place.cursor > 0 for place in fleet.places[3:])


def test_only_valid_nonces_are_sent_and_the_cursor_counts_all(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(r_target=1.25), 2)
    made.runner.start()
    made.runner.change_phase(Phase.GENERATE, WAIT_SECONDS)
    wait_for(lambda: made.controller.monitor.num_total > 100)
    assert made.runner.stop(WAIT_SECONDS)
    computed = of_cursors(made.path, made.controller.run)
    assert sorted(made.received()) == sorted(nonce for nonce in computed if distance_of(nonce) < 1.25)
    for body in made.bodies():
        assert body["dist"] == [distance_of(nonce) for nonce in body["nonces"]]
        assert (body["block_hash"], body["block_height"], body["public_key"], body["node_id"]) == ("0x1", 7, "key", 1)
    made.ledger.close()


def test_a_phase_is_acknowledged_by_all_and_nothing_is_computed_behind_the_barrier(fleet: Fleet) -> None:
    fleet.runner.change_phase(Phase.GENERATE, WAIT_SECONDS)
    wait_for(lambda: all(handle.engine.seen for handle in fleet.handles))
    barrier = fleet.runner.change_phase(Phase.IDLE, WAIT_SECONDS)
    counts = [len(handle.engine.seen) for handle in fleet.handles]
    assert barrier.num_acknowledged == 3
    time.sleep(0.1)
    assert [len(handle.engine.seen) for handle in fleet.handles] == counts
    # What was computed before is recorded afterwards, in whatever phase.
    wait_for(lambda: len(fleet.received()) == sum(counts))


def test_a_full_buffer_stops_a_worker_until_its_parts_are_recorded() -> None:
    engine = CountingEngine()
    worker = GroupWorker(make_run(), GroupPlace(0, 1), Phase.GENERATE, 1, lambda: engine, max_buffered=5)
    worker.start()
    wait_for(lambda: len(engine.seen) == 20)
    time.sleep(0.05)
    assert len(engine.seen) == 20
    report = worker.collect(0)
    assert report.generated is not None
    assert (report.generated.start, report.generated.stop) == (0, 20)
    # Not recorded: the same again. Recorded up to 12: only what is behind that, and two more batches may be made.
    again = worker.collect(0).generated
    assert again is not None
    assert again.nonces[:20] == report.generated.nonces
    worker.collect(12)
    wait_for(lambda: len(engine.seen) == 32)
    worker.set_phase(Phase.STOP, 2)
    rest = worker.collect(12).generated
    assert rest is not None
    assert (rest.start, rest.stop) == (12, 32)


def test_a_late_echo_of_an_earlier_phase_changes_nothing() -> None:
    worker = GroupWorker(make_run(), GroupPlace(0, 1), Phase.IDLE, 5, CountingEngine)
    worker.start()
    assert worker.set_phase(Phase.GENERATE, 6) == Ack(0, Phase.GENERATE, 6)
    assert worker.set_phase(Phase.IDLE, 5) == Ack(0, Phase.GENERATE, 6)
    worker.set_phase(Phase.STOP, 7)


def test_chunks_of_several_keys_get_their_own_distances() -> None:
    engine = CountingEngine()
    worker = GroupWorker(make_run(), GroupPlace(0, 1), Phase.IDLE, 1, lambda: engine)
    worker.start()
    chunks = [
        CheckChunk(1, "a", (3, 4)),
        CheckChunk(2, "a", (5,)),
        CheckChunk(3, "b", (6, 7)),
        CheckChunk(4, "a", (8,)),
    ]
    worker.check(chunks)
    with pytest.raises(BusyError, match="4 chunks waiting"):
        worker.check([CheckChunk(5, "a", (9,))])
    assert worker.collect(0).num_waiting == 4
    worker.set_phase(Phase.VALIDATE, 2)
    wait_for(lambda: len(engine.seen) == 6)
    worker.set_phase(Phase.STOP, 3)
    found = {checked.chunk_id: checked.dist for checked in worker.collect(0).checked}
    assert found == {chunk.chunk_id: tuple(map(distance_of, chunk.nonces)) for chunk in chunks}


def test_a_worker_tells_why_it_cannot_load() -> None:
    def broken() -> CountingEngine:
        raise UnavailableError("no such device.")

    worker = GroupWorker(make_run(), GroupPlace(0, 1), Phase.GENERATE, 1, broken)
    worker.start()
    wait_for(lambda: worker.collect(0).failure is not None)
    assert worker.collect(0).failure == "UnavailableError: no such device."
    assert not worker.collect(0).loaded
    assert worker.set_phase(Phase.STOP, 2).generation == 2


def test_validation_judges_good_proofs_and_refuses_bad_ones_one_by_one(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(r_target=1.9), 2)
    made.runner.start()
    made.runner.change_phase(Phase.VALIDATE, WAIT_SECONDS)
    good = [nonce for nonce in range(400) if distance_of(nonce) < 1.9]
    nonces = (*good, 3, -1, good[0], 10**6)
    dist = (*(distance_of(nonce) for nonce in good), float("nan"), 1.0, 1.0, 1.95)
    made.runner.receive("a", ProofBatch("other", "0x1", 7, nonces, dist, 0))
    liar = tuple(nonce for nonce in range(400) if distance_of(nonce) > 1.9)
    made.runner.receive("b", ProofBatch("liar", "0x1", 7, liar, (1.1,) * len(liar), 0))
    made.runner.receive("c", ProofBatch("nonsense", "0x1", 7, (1, 2, 3), (5.0, float("inf"), -1.0), 0))
    wait_for(lambda: len(made.bodies()) == 3)
    honest, fraud, nonsense = sorted(
        made.bodies(), key=lambda body: ["other", "liar", "nonsense"].index(body["public_key"])
    )
    assert honest["nonces"] == good
    assert honest["dist"] == pytest.approx([distance_of(nonce) for nonce in good], abs=0)
    assert (honest["n_invalid"], honest["fraud_detected"]) == (0, False)
    assert (honest["n_outside_band"], fraud["n_outside_band"]) == (0, len(liar))
    assert (honest["sequential_test"], fraud["sequential_test"]) == ("honest", "fraud")
    assert [entry["index"] for entry in honest["rejected"]] == [len(good) + offset for offset in range(4)]
    assert (fraud["n_invalid"], fraud["fraud_detected"]) == (len(liar), True)
    assert (nonsense["nonces"], nonsense["fraud_detected"]) == ([], True)
    # Both groups had a share of the work.
    assert all(handle.engine.seen for handle in made.handles)
    assert made.runner.stop(WAIT_SECONDS)
    made.ledger.close()


def test_a_group_that_dies_in_validation_leaves_its_chunks_to_others(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(), 2)
    made.runner.start()
    wait_for(lambda: made.controller.all_loaded)
    made.handles[0].engine.gate.clear()
    made.runner.change_phase(Phase.VALIDATE, WAIT_SECONDS)
    made.runner.receive("a", ProofBatch("k", "0x1", 7, tuple(range(100)), tuple(map(distance_of, range(100))), 0))
    wait_for(lambda: made.controller.desk.pool.num_open <= 2)
    made.handles[0].kill()
    wait_for(lambda: len(made.bodies()) == 1)
    assert made.bodies()[0]["n_invalid"] == 0
    assert len(made.bodies()[0]["nonces"]) == 100
    assert made.runner.stop(WAIT_SECONDS)
    made.ledger.close()


def test_a_batch_without_a_verdict_in_time_is_answered_as_not_judged(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(), 1, deadline_seconds=0.05)
    made.runner.start()
    made.runner.receive("late", ProofBatch("k", "0x1", 7, (1,), (1.0,), 0))  # the phase is IDLE: nobody computes it
    wait_for(lambda: len(made.bodies()) == 1)
    body = made.bodies()[0]
    assert (body["n_invalid"], body["probability_honest"], body["fraud_detected"]) == (-1, -1.0, False)
    assert "in time" in body["error"]
    assert made.controller.desk.num_open == 0
    made.runner.stop(5)
    made.ledger.close()


def test_batches_of_another_block_or_beyond_the_bounds_are_refused(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(), 1, max_batches=1, max_chunks=2)
    with pytest.raises(InputError, match="block '0x2'"):
        made.runner.receive("a", ProofBatch("k", "0x2", 7, (1,), (1.0,), 0))
    with pytest.raises(InputError, match="node_id=4"):
        made.runner.receive("a", ProofBatch("k", "0x1", 7, (1,), (1.0,), 4), node_count=4)
    with pytest.raises(BusyError, match="2 are allowed"):
        made.runner.receive("a", ProofBatch("k", "0x1", 7, tuple(range(97)), (1.0,) * 97, 0))
    made.runner.receive("a", ProofBatch("k", "0x1", 7, (1,), (1.0,), 0))
    with pytest.raises(BusyError, match="1 are allowed"):
        made.runner.receive("b", ProofBatch("k", "0x1", 7, (1,), (1.0,), 0))


def test_a_full_disk_holds_the_fleet_up_and_loses_nothing(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(), 2)
    made.runner.start()
    made.runner.change_phase(Phase.GENERATE, WAIT_SECONDS)
    wait_for(lambda: made.controller.monitor.num_total > 20)
    made.ledger.limit_pages(1)  # SQLite keeps the present size: no page more
    wait_for(lambda: made.controller.ledger_error is not None)
    assert "full" in str(made.controller.ledger_error)
    wait_for(lambda: all(len(handle.worker._generated) >= 8 for handle in made.handles))
    with pytest.raises(UnavailableError, match="full"):
        made.ledger.enqueue("x", "http://host", {"text": "x" * 100_000})
    made.ledger.limit_pages(100_000)
    before = made.controller.monitor.num_total
    wait_for(lambda: made.controller.monitor.num_total > before + 100)
    assert made.controller.ledger_error is None
    assert made.runner.stop(WAIT_SECONDS)
    received = made.received()
    assert len(received) == len(set(received))
    assert sorted(received) == sorted(of_cursors(made.path, made.controller.run))
    made.ledger.close()


def test_a_full_outbox_stops_the_generation(tmp_path: Path) -> None:
    made = Fleet(tmp_path, make_run(), 1, max_unsent=3)
    made.runner.start()
    made.runner.change_phase(Phase.GENERATE, WAIT_SECONDS)
    wait_for(lambda: made.ledger.num_unsent() == 3 and len(made.handles[0].worker._generated) >= 8)
    assert made.ledger.num_unsent() == 3
    for delivery in made.ledger.due(time.time(), 10):
        made.ledger.mark_sent(delivery)
    wait_for(lambda: made.ledger.num_unsent() > 0)
    made.runner.stop(5)
    made.ledger.close()


def test_an_echo_of_a_lost_worker_is_not_recorded_again(tmp_path: Path) -> None:
    ledger, run = Ledger(tmp_path / "l.sqlite"), make_run()
    part = GeneratedPart(0, 0, 2, (1, 4), (0.5, 0.5))
    assert ledger.commit(run, 1, [part]) == {0: 2}
    assert ledger.commit(run, 1, [part]) == {}
    assert ledger.commit(run, 1, [GeneratedPart(0, 3, 4, (10,), (0.5,))]) == {}
    assert ledger.cursors(run.series, 1) == (2,)
    assert [json.loads(delivery.body)["nonces"] for delivery in ledger.due(0.0, 10)] == [[1, 4]]
    # Another block is another series.
    assert ledger.cursors(make_run(block_hash="0x2").series, 1) == (0,)


def test_a_callback_is_kept_until_it_is_marked_and_the_same_key_enters_once(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.enqueue("k1", "http://host/generated", {"a": 1})
    ledger.enqueue("k1", "http://host/generated", {"a": 2})
    ledger.enqueue("k2", "http://host/generated", {"b": 1})
    first, second = ledger.due(10.0, 10)
    assert (first.key, json.loads(first.body), first.attempts) == ("k1", {"a": 1}, 0)
    ledger.mark_failed(first, 20.0, "refused")
    assert [delivery.key for delivery in ledger.due(10.0, 10)] == ["k2"]
    ledger.mark_sent(second)
    ledger.close()
    # A crash later all of it is still there.
    ledger = Ledger(path)
    assert [(delivery.key, delivery.attempts) for delivery in ledger.due(20.0, 10)] == [("k1", 1)]
    ledger.enqueue("k2", "http://host/generated", {"b": 2})
    assert ledger.num_unsent() == 1


def test_a_file_of_proofs_holds_each_body_once_whatever_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "ledger.sqlite", tmp_path / "proofs.jsonl"

    def lines() -> list[int]:
        return [json.loads(line)["number"] for line in out.read_text().splitlines()]

    def enqueue(*numbers: int) -> None:
        for number in numbers:
            ledger.enqueue(f"key-{number}", "/generated", {"number": number})

    ledger = Ledger(path)
    enqueue(0, 1)
    with ProofFile(out, ledger) as proofs:
        assert proofs.drain() == 2
        enqueue(2)
        # Written, and the process ends before the ledger knows.
        monkeypatch.setattr(ledger, "hand_over", lambda *_: (_ for _ in ()).throw(UnavailableError("ended")))
        with pytest.raises(UnavailableError, match="ended"):
            proofs.drain()
    assert lines() == [0, 1, 2]
    ledger.close()
    with out.open("a") as half:
        half.write('{"number": 9')

    ledger = Ledger(path)
    enqueue(3)
    with ProofFile(out, ledger) as proofs:
        assert lines() == [0, 1]
        assert proofs.drain() == 2
    assert lines() == [0, 1, 2, 3]
    assert ledger.num_unsent() == 0
    # A file that was taken away begins anew; what was in it is not written again.
    out.unlink()
    enqueue(4)
    with ProofFile(out, ledger) as proofs:
        proofs.drain()
    assert lines() == [4]
    ledger.close()


def test_a_ledger_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "no.sqlite").write_text("this is not a database, and long enough to be read as one" * 100)
    with pytest.raises(UnavailableError, match="cannot be opened"):
        Ledger(tmp_path / "no.sqlite")
    with pytest.raises(sqlite3.Error):
        read_cursors(tmp_path / "missing.sqlite")


@given(
    st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(0, 30), min_size=7, max_size=7)), max_size=4),
    st.integers(1, 7),
)
@settings(max_examples=200, deadline=None)
def test_another_number_of_groups_never_repeats_a_nonce(history: list[tuple[int, list[int]]], final: int) -> None:
    done: set[int] = set()
    rows: dict[tuple[int, int], int] = {}
    for num_groups, progress in [*history, (final, [5] * 7)]:
        recorded = [(group_id, groups, cursor) for (group_id, groups), cursor in rows.items()]
        for group_id, start in enumerate(resume_cursors(recorded, num_groups)):
            computed = {group_id + index * num_groups for index in range(start, start + progress[group_id])}
            assert not computed & done
            done |= computed
            if progress[group_id]:
                rows[group_id, num_groups] = start + progress[group_id]


def test_the_pool_gives_each_chunk_once_and_steals_only_for_the_idle() -> None:
    pool = WorkPool(max_chunks=10)
    pool.put("key", tuple(range(10)), 2)
    first = pool.take(0)
    second = pool.take(1)
    assert [chunk.nonces for chunk in (*first, *second)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert pool.take(0) == ()
    assert pool.done(0, first[0].chunk_id) == first[0]
    assert [chunk.nonces for chunk in pool.take(0)] == [(8, 9)]
    # Group 2 has nothing and nothing is queued: it takes the second chunk of a group that holds two.
    (stolen,) = pool.take(2)
    assert stolen.nonces == (8, 9)
    assert pool.done(2, stolen.chunk_id) == stolen
    assert pool.done(0, stolen.chunk_id) is None
    pool.lost(1)
    assert [chunk.nonces for chunk in pool.take(3)] == [(4, 5), (6, 7)]


@given(
    st.lists(st.tuples(st.sampled_from(["take", "done", "lost"]), st.integers(0, 3)), max_size=60), st.integers(1, 40)
)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_every_chunk_is_computed(story: list[tuple[str, int]], num_nonces: int) -> None:
    pool = WorkPool(max_chunks=100)
    pool.put("key", tuple(range(num_nonces)), 3)
    held: dict[int, list[CheckChunk]] = {group: [] for group in range(4)}
    finished: list[int] = []
    for what, group in story + [(what, 0) for _ in range(40) for what in ("take", "done", "done")]:
        if what == "take":
            held[group] += pool.take(group)
        elif what == "lost":
            pool.lost(group)
            held[group] = []
        elif held[group]:
            chunk = pool.done(group, held[group].pop(0).chunk_id)
            finished += chunk.nonces if chunk else ()
        if what == "done" and len(story) and group == 0 and not held[0] and pool.num_open:
            for other in (1, 2, 3):
                pool.lost(other)
                held[other] = []
    assert sorted(finished) == list(range(num_nonces))
    assert pool.num_open == 0


def test_a_barrier_opens_with_its_last_word_and_not_for_another_generation() -> None:
    barrier = Barrier(Phase.GENERATE, 4, ordered_at=1.0)
    barrier.expect(0)
    barrier.expect(1)
    barrier.acknowledge(Ack(0, Phase.IDLE, 3), 2.0)
    assert barrier.missing == (0, 1)
    barrier.acknowledge(Ack(0, Phase.GENERATE, 4), 3.0)
    assert not barrier.opened.is_set()
    barrier.leave(1, 5.0)
    assert barrier.opened.is_set()
    assert (barrier.opened_at, barrier.num_acknowledged) == (5.0, 1)
