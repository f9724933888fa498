"""Traces by request: names, bounds, live views, waiting."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from sparkray.errors import NotFoundError
from sparkray.metis.arena import FloatArray, Progress
from sparkray.metis.fields import COLUMN, NUM_FIELDS
from sparkray.metis.options import WatchOptions
from sparkray.metis.store import TraceEntry, TraceStore


class Source:
    """Tokens 0, 1, 2, ... of which so many are committed and written."""

    def __init__(self, committed: int = 0, written: int = 0, restarts: int = 0) -> None:
        self.now = Progress(committed, written, restarts)

    def progress(self) -> Progress:
        return self.now

    def read(self, start: int, stop: int) -> FloatArray:
        entropies = np.arange(start, stop, dtype=np.float32)
        tokens = np.zeros((len(entropies), NUM_FIELDS), dtype=np.float32)
        tokens[:, COLUMN["entropy"]] = entropies
        return tokens


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def entry_of(request_id: str, **values: object) -> TraceEntry:
    return TraceEntry(request_id, WatchOptions(), max_tokens=10, **values)  # type: ignore[arg-type]


def entropies(entry: TraceEntry, start: int = 0) -> list[float]:
    return entry.tokens(start)[:, COLUMN["entropy"]].tolist()


def test_a_live_view_shows_what_was_delivered_or_committed() -> None:
    entry = entry_of("r")
    assert entry.num_tokens == 0
    entry.attach(Source(committed=3, written=4))
    assert entropies(entry) == [0, 1, 2]  # the fourth may still be taken back
    entry.delivered([7, 8, 9, 5])
    assert entropies(entry) == [0, 1, 2, 3]
    assert entropies(entry, 2) == [2, 3]
    assert not entry.finished
    assert not entry.truncated


def test_a_finished_trace_is_exactly_what_was_delivered() -> None:
    entry = entry_of("r")
    entry.attach(Source(committed=6, written=7, restarts=2))
    entry.delivered([1, 2])
    entry.delivered([3])
    entry.finish("stop")
    assert entropies(entry) == [0, 1, 2]
    assert (entry.finish_reason, entry.finished, entry.truncated, entry.restarts) == ("stop", True, False, 2)
    assert [event.token_id for event in entry.trace().events] == [1, 2, 3]
    assert [event.text for event in entry.trace(lambda token_id: f"<{token_id}>").events] == ["<1>", "<2>", "<3>"]


@pytest.mark.parametrize("written", [10, 5])
def test_tokens_that_were_not_recorded_are_marked_missing(written: int) -> None:
    entry = entry_of("r")
    entry.attach(Source(committed=11, written=written))
    entry.delivered(list(range(12)))
    entry.finish("length")
    assert entropies(entry) == list(range(written))
    assert entry.truncated
    assert entry.trace().total_tokens == written


def test_an_unwatched_request_has_a_note_and_no_tokens() -> None:
    entry = TraceEntry("r", None, "not recorded: full")
    entry.delivered([1, 2])
    entry.finish("stop")
    assert entry.num_tokens == 0
    assert not entry.truncated
    assert entry.trace().total_tokens == 0


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("chatcmpl-abc", "chatcmpl-abc"),
        ("chatcmpl-abc", "abc"),
        ("chatcmpl-abc", "chatcmpl-abc-0123abcd"),
        ("chatcmpl-abc_1", "chatcmpl-abc"),
        ("cmpl-abc-0", "cmpl-abc"),
        ("cmpl-abc-0", "abc"),
        ("cmpl-abc-0", "abc-0"),
        ("cmpl-abc-0", "cmpl-abc-0-89abcdef"),
        ("abc", "chatcmpl-abc"),
        ("abc", "abc-0011aabb"),
    ],
)
def test_every_spelling_of_an_id_finds_the_trace(stored: str, asked: str) -> None:
    store = TraceStore(4, 60)
    entry = entry_of(stored)
    store.open(entry)
    assert store.get(asked) is entry
    entry.finish("stop")
    store.close(entry)
    assert store.get(asked) is entry


@pytest.mark.parametrize("asked", ["abc-1", "cmpl-abc-1", "cmpl", "ab", "", "abcd", "x" * 5000])
def test_no_other_id_finds_it(asked: str) -> None:
    store = TraceStore(4, 60)
    store.open(entry_of("cmpl-abc-0"))
    with pytest.raises(NotFoundError, match="no trace of the request"):
        store.get(asked)


def test_the_first_of_several_prompts_answers_to_the_common_name() -> None:
    store = TraceStore(4, 60)
    entries = [entry_of(f"cmpl-abc-{number}") for number in range(2)]
    for entry in entries:
        store.open(entry)
    assert store.get("cmpl-abc") is entries[0]
    assert store.get("cmpl-abc-1") is entries[1]


def test_the_trace_looked_at_longest_ago_goes_first() -> None:
    store = TraceStore(2, 60)
    for name in "abc":
        entry = entry_of(name)
        store.open(entry)
        store.close(entry)
        if name == "b":
            store.get("a")
    assert len(store) == 2
    with pytest.raises(NotFoundError):
        store.get("b")
    assert store.get("a").request_id == "a"


def test_a_finished_trace_expires_and_a_live_one_does_not() -> None:
    clock = Clock()
    store = TraceStore(9, 60, clock)
    old, live = entry_of("chatcmpl-old"), entry_of("live")
    store.open(old)
    store.open(live)
    store.close(old)
    clock.now += 60
    assert store.get("old") is old
    clock.now += 0.5
    with pytest.raises(NotFoundError, match="60 s"):
        store.get("old")
    assert store.get("live") is live
    store.close(live)
    assert (len(store), store.num_live) == (1, 0)


def test_a_request_of_the_same_id_replaces_and_the_first_one_cannot_come_back() -> None:
    store = TraceStore(9, 60)
    first, second = entry_of("r"), entry_of("r")
    store.open(first)
    store.open(second)
    store.close(first)
    assert store.get("r") is second
    store.close(second)
    assert store.get("r") is second
    assert len(store) == 1


def test_dropped_traces_leave_no_names_behind() -> None:
    store = TraceStore(3, 60)
    for number in range(50):
        entry = entry_of(f"chatcmpl-{number}")
        store.open(entry)
        store.close(entry)
    assert len(store) == 3
    assert len(store._aliases) == 3


async def test_waiting_ends_with_a_token_with_the_end_and_with_the_time() -> None:
    entry = entry_of("r")
    source = Source()
    entry.attach(source)
    assert not await entry.wait(0, 0.01)

    waiting = asyncio.create_task(entry.wait(0, 30))
    await asyncio.sleep(0)
    source.now = Progress(committed=0, written=1)
    entry.delivered([4])
    assert await waiting

    # Nobody says so when the engine commits a token of an answer that is delivered at its end only.
    waiting = asyncio.create_task(entry.wait(1, 30))
    await asyncio.sleep(0)
    source.now = Progress(committed=2, written=3)
    assert await waiting

    waiting = asyncio.create_task(entry.wait(2, 30))
    await asyncio.sleep(0)
    entry.finish("abort")
    assert await waiting


async def test_all_who_wait_are_woken() -> None:
    entry = entry_of("r")
    entry.attach(Source(committed=0, written=1))
    waiting = [asyncio.create_task(entry.wait(0, 30)) for _ in range(20)]
    await asyncio.sleep(0)
    entry.delivered([4])
    assert await asyncio.gather(*waiting) == [True] * 20
