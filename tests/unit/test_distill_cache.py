"""The cache file: what answers, what is kept, and what a kill, another process or another program's file does to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkray.config.distill import CacheConfig
from sparkray.distill.cache.file import ScoreCache
from sparkray.distill.cache.payload import pack_scores, unpack_scores
from sparkray.distill.cache.schema import MIGRATIONS, VERSION
from sparkray.distill.identity import TeacherIdentity, score_key
from sparkray.distill.scores import TokenScores
from sparkray.errors import UnavailableError

IDENTITY = TeacherIdentity("m", "r", "gptq", "t", "vllm 0.32.0", "bfloat16", "http://a/v1", "prompt_logprobs")


def scores(top_logprobs: int, *, rows: int = 3, draws: int = 2, mark: int = 0) -> TokenScores:
    generator = np.random.default_rng(mark)
    logprobs = -np.sort(generator.exponential(2, (rows, top_logprobs)).astype(np.float32), axis=1) - 3
    return TokenScores(
        np.argsort(generator.random((rows, 99)), axis=1)[:, :top_logprobs].astype(np.int32),
        logprobs,
        logprobs[:, -1],
        generator.integers(0, 9, (rows, draws)).astype(np.int32),
        generator.random(rows).astype(np.float32),
        1.5,
    )


def same(left: TokenScores, right: TokenScores) -> bool:
    return pack_scores(left) == pack_scores(right)


def cache_at(path: Path, **values: object) -> ScoreCache:
    return ScoreCache(CacheConfig.model_validate({"path": path / "c.sqlite", **values}))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 4))
def test_payloads_come_back_whole_and_damage_is_seen(top_logprobs: int, rows: int, draws: int) -> None:
    made = scores(top_logprobs, rows=rows, draws=draws)
    data = pack_scores(made)
    back = unpack_scores(data)
    assert back is not None
    assert same(back, made)
    assert back.temperature == 1.5
    for place in {4, len(data) // 2, len(data) - 1}:
        assert unpack_scores(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is None
    assert unpack_scores(data[:-1]) is None
    assert unpack_scores(b"") is None


def test_every_part_of_the_identity_is_in_the_key() -> None:
    base = score_key(IDENTITY, [1, 2], "p")
    assert base == score_key(replace(IDENTITY), [1, 2], "p")
    changed = [score_key(replace(IDENTITY, **{name: "other"}), [1, 2], "p") for name in IDENTITY.__dataclass_fields__]
    others = [score_key(IDENTITY, [12], "p"), score_key(IDENTITY, [1, 2, 0], "p"), score_key(IDENTITY, [1, 2], "q")]
    assert len({base, *changed, *others}) == 1 + len(changed) + len(others)


def test_a_longer_row_answers_a_shorter_request(tmp_path: Path) -> None:
    with cache_at(tmp_path) as cache:
        cache.put(b"k", scores(20))
        for pending in (True, False):
            found = cache.get(b"k", top_logprobs=10)
            assert found is not None
            assert same(found.scores, scores(20).narrowed(10))
            assert found.scores.tail_mass[0] > scores(20).tail_mass[0]
            assert cache.get(b"k", top_logprobs=21) is None
            shorter = cache.get(b"k", top_logprobs=30, min_top_logprobs=20)
            assert shorter is not None
            assert shorter.scores.top_logprobs == 20
            if pending:
                cache.flush()
        cache.put(b"k", scores(10, mark=1))
        cache.flush()
        kept = cache.get(b"k", top_logprobs=20)
        assert kept is not None
        assert same(kept.scores, scores(20))


def test_age_is_judged_on_reading(tmp_path: Path) -> None:
    with cache_at(tmp_path) as cache:
        cache.put(b"k", scores(4))
        cache.flush()
        with sqlite3.connect(cache.config.path) as connection:
            connection.execute("UPDATE teacher_scores SET created_at = ?", (time.time() - 400 * 86_400,))
        assert cache.get(b"k", top_logprobs=4) is None
        stale = cache.get(b"k", top_logprobs=4, allow_stale=True)
        assert stale is not None
        assert stale.stale
        # A shorter row that is fresh is worth more than a longer one past its time.
        cache.put(b"k", scores(2))
        cache.flush()
        fresh = cache.get(b"k", top_logprobs=2)
        assert fresh is not None
        assert not fresh.stale
        assert cache.sweep() == 0
    with cache_at(tmp_path, ttl_seconds=1e-9) as cache:
        assert cache.sweep() == 1
        assert len(cache) == 0


def test_the_oldest_rows_go_first(tmp_path: Path) -> None:
    with cache_at(tmp_path, max_rows=3, write_batch_rows=1) as cache:
        for number in range(5):
            cache.put(bytes([number]), scores(2))
        assert len(cache) == 3
        assert [cache.get(bytes([number]), top_logprobs=2) is None for number in range(5)] == [True, True, *[False] * 3]


def test_read_only_reads_and_never_writes(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="there is none"):
        cache_at(tmp_path, read_only=True)
    with cache_at(tmp_path) as cache:
        cache.put(b"k", scores(4))
    before = (tmp_path / "c.sqlite").read_bytes()
    with cache_at(tmp_path, read_only=True) as cache:
        assert cache.get(b"k", top_logprobs=4) is not None
        cache.put(b"other", scores(4))
        cache.flush()
        assert cache.get(b"other", top_logprobs=4) is None
    assert (tmp_path / "c.sqlite").read_bytes() == before


def test_files_of_other_programs_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE kd_cache (cache_key TEXT PRIMARY KEY, teacher_output TEXT, timestamp REAL)")
        old.execute("INSERT INTO kd_cache VALUES ('k', '{}', 0)")
    old.close()
    with cache_at(tmp_path) as cache:
        cache.put(b"k", scores(4))
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM kd_cache").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM teacher_scores").fetchone() == (1,)
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(UnavailableError, match=f"version {VERSION + 1}"):
        cache_at(tmp_path)
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(UnavailableError, match="not a database"):
        cache_at(tmp_path)


def test_a_file_of_the_first_version_is_brought_to_this_one(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "c.sqlite") as first:
        first.execute(MIGRATIONS[0].strip().rstrip(";"))
        first.execute("INSERT INTO teacher_scores VALUES (?, 4, ?, ?)", (b"k", pack_scores(scores(4)), time.time()))
        first.execute("PRAGMA user_version = 1")
    first.close()
    with pytest.raises(UnavailableError, match="older version"):
        cache_at(tmp_path, read_only=True)
    with cache_at(tmp_path) as cache:
        found = cache.get(b"k", top_logprobs=4)
        assert found is not None
        assert same(found.scores, scores(4))
        cache.put(b"l", scores(4))


def test_a_damaged_row_is_a_miss_that_is_counted(tmp_path: Path) -> None:
    with cache_at(tmp_path) as cache:
        cache.put(b"k", scores(4))
        cache.flush()
        with sqlite3.connect(cache.config.path) as connection:
            connection.execute("UPDATE teacher_scores SET payload = substr(payload, 1, 40)")
        assert cache.get(b"k", top_logprobs=4) is None
        assert cache.num_damaged_rows == 1


def _fill(path: Path, first: int) -> None:
    with cache_at(path, write_batch_rows=5) as cache:
        for number in range(first, first + 60):
            cache.put(number.to_bytes(2, "big"), scores(4, mark=number))


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, first)) for first in (0, 30)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with cache_at(tmp_path) as cache:
        assert len(cache) == 90
        found = cache.get((45).to_bytes(2, "big"), top_logprobs=4)
        assert found is not None
        assert same(found.scores, scores(4, mark=45))


def test_a_kill_while_writing_leaves_whole_rows(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from test_distill_cache import cache_at, scores\n"
        "cache = cache_at(Path(sys.argv[1]), write_batch_rows=1)\n"
        "for number in range(10**6):\n"
        "    cache.put((number % 500).to_bytes(2, 'big'), scores(20, rows=40, mark=number % 500))\n"
        "    print(number, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 40:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait(30)
    writer.stdout.close()
    with cache_at(tmp_path) as cache:
        assert len(cache) >= 40
        for number in range(len(cache)):
            found = cache.get(number.to_bytes(2, "big"), top_logprobs=20)
            assert found is not None
            assert same(found.scores, scores(20, rows=40, mark=number))
        assert cache.num_damaged_rows == 0
