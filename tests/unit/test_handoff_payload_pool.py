"""Payload memory is used again only when no row points into it any more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sparkray.handoff.payload_pool import PayloadPool

SIZE = 1 << 20


def test_a_buffer_that_rows_point_into_is_left_alone() -> None:
    pool = PayloadPool()
    first = pool.take(SIZE)
    first[:3] = b"abc"
    address = id(first)
    rows = np.frombuffer(memoryview(first)[24:], "<u2").reshape(-1, 2)[5:]
    del first
    assert id(pool.take(SIZE)) != address, "a view of a view of it is alive"
    del rows
    again = pool.take(SIZE)
    assert id(again) == address and again[:3] == b"abc"


def test_another_size_is_another_buffer() -> None:
    pool = PayloadPool()
    assert [len(pool.take(size)) for size in (SIZE, SIZE // 2, 0, 17, SIZE)] == [SIZE, SIZE // 2, 0, 17, SIZE]
    assert len(pool._buffers) == 2, "the two large sizes; small ones are not kept"


def test_what_is_kept_is_bounded() -> None:
    pool = PayloadPool()
    held = [pool.take(SIZE + number) for number in range(100)]
    assert len(held) == 100 and sum(map(len, pool._buffers)) <= 64 << 20
    assert len(pool.take(100 << 20)) == 100 << 20 and sum(map(len, pool._buffers)) <= 64 << 20


def test_threads_never_share_a_buffer() -> None:
    pool = PayloadPool()

    def held() -> list[int]:
        kept = [pool.take(1 << 16) for _ in range(50)]
        for number, buffer in enumerate(kept):
            buffer[:2] = number.to_bytes(2, "big")
        return [int.from_bytes(buffer[:2], "big") for buffer in kept]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: held(), range(40))) == [list(range(50))] * 40
