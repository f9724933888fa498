"""A teacher behind HTTP: what is read, what is repeated, what is refused, and how hard the host is pressed."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from teacher_server import VOCAB_SIZE, Fault, TeacherServer, distribution, serve_teacher

from sparkray.config.base import validate_settings
from sparkray.config.distill import CacheConfig, ClientConfig, TeacherConfig
from sparkray.distill.cache.file import ScoreCache
from sparkray.distill.client.client import TeacherClient
from sparkray.distill.client.counters import quantile
from sparkray.distill.client.pacing import RequestGate, TopLogprobsPolicy, backoff_seconds
from sparkray.distill.errors import RateLimitedError, TeacherDownError, TeacherRefusedError, TeacherReplyError
from sparkray.distill.scores import TokenScores
from sparkray.distill.teachers.api import ApiTeacher, retry_after_seconds
from sparkray.distill.teachers.handshake import handshake
from sparkray.distill.training.supervision import FromClient
from sparkray.distill.windows import Window, score_in_windows, windows
from sparkray.errors import InputError, UsageError, WaitTimeoutError

PIECES = [bytes([number]) for number in range(VOCAB_SIZE)]
TEXT = [7, 3, 60, 3, 1]


@pytest.fixture
def host() -> Iterator[TeacherServer]:
    with serve_teacher() as server:
        yield server


def teacher(host: TeacherServer, mode: str = "prompt_logprobs", **values: object) -> ApiTeacher:
    config = validate_settings(
        TeacherConfig, {"kind": "api", "model": "m", "base_url": host.url, "mode": mode, "dtype": "bfloat16", **values}
    )
    return ApiTeacher(config, PIECES, "0" * 64, request_timeout_seconds=10)


def client(host: TeacherServer, cache: ScoreCache | None = None, **values: object) -> TeacherClient:
    quick = {"backoff_seconds": 0.001, "max_backoff_seconds": 0.002, "deadline_seconds": 20.0}
    return TeacherClient(teacher(host), validate_settings(ClientConfig, quick | values), cache)


@pytest.mark.parametrize("mode", ["prompt_logprobs", "echo"])
def test_rows_are_the_hosts_distribution_after_each_token(host: TeacherServer, mode: str) -> None:
    scores = teacher(host, mode).score(TEXT, 4).checked(4)
    for row, (before, token) in enumerate(itertools.pairwise(TEXT)):
        expected = distribution(before)
        likeliest = np.argsort(-expected)[:4]
        assert scores.head_ids_LK[row].tolist() == likeliest.tolist()
        np.testing.assert_allclose(np.exp(scores.head_logprobs_LK[row]), expected[likeliest], rtol=1e-5)
        assert math.exp(scores.token_logprobs_L[row]) == pytest.approx(expected[token], rel=1e-5)
    assert scores.tail_mass[0] == pytest.approx(1 - distribution(7)[np.argsort(-distribution(7))[:4]].sum(), rel=1e-4)


def test_a_host_that_can_only_complete_says_so_and_is_read_by_bytes(host: TeacherServer) -> None:
    completing = teacher(host, "completion")
    with pytest.raises(UsageError, match="cannot score given tokens"):
        completing.score(TEXT, 4)
    reply = completing.complete([{"role": "user", "content": "hi"}], 8, 3)
    # Both tokens show as the same replacement mark; their bytes tell them apart.
    assert reply.token_ids == [3, 5]
    assert reply.scores.head_ids_LK.tolist() == [[3, 4, 5], [5, 6, 7]]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault(401, "no key"), TeacherRefusedError, "401"),
        (Fault(400, "logprobs too large"), TeacherRefusedError, "max-logprobs"),
        (Fault(200, "<html>"), TeacherReplyError, "not JSON"),
        (Fault(200, "{}"), TeacherReplyError, "no choices"),
        (Fault(200, '{"choices": [{"prompt_logprobs": [null, {}]}]}'), TeacherReplyError, "2 positions"),
        (
            Fault(200, '{"choices": [{"prompt_logprobs": [null' + ', {"3": {"logprob": NaN}}' * 4 + "]}]}"),
            TeacherReplyError,
            "without its token",
        ),
    ],
)
def test_answers_that_are_none(host: TeacherServer, fault: Fault, kind: type[Exception], message: str) -> None:
    host.always = fault
    with client(host) as asking, pytest.raises(kind, match=message):
        asking.score(TEXT)
    assert asking.metrics.num_retries == 0


def test_nan_is_refused(host: TeacherServer) -> None:
    host.faults = [Fault(200, '{"choices": [{"prompt_logprobs": [null, {"3": {"logprob": NaN, "rank": 1}}]}]}')]
    with client(host) as asking, pytest.raises(TeacherReplyError, match="NaN"):
        asking.score([1, 3])


def test_entries_drop_after_429_and_return_after_ten_answers(host: TeacherServer) -> None:
    with client(host, max_in_flight=1) as asking:
        asking.score([1, 2])
        host.faults = [Fault(429, "slow down", {"Retry-After": "0"})]
        for number in range(12):
            asking.score([1, 3, number])
    assert host.asked == [20, 20, *[10] * 10, 20, 20]
    assert asking.metrics.num_rate_limits == 1
    assert asking.metrics.current_top_logprobs == 20


def test_errors_of_the_host_are_repeated_until_the_deadline(host: TeacherServer) -> None:
    host.faults = [Fault(500, "oops"), Fault(503, "loading")]
    with client(host) as asking:
        assert asking.score(TEXT).source == "teacher"
        assert asking.metrics.num_retries == 2
        host.always = Fault(500, "oops")
    with client(host, deadline_seconds=0.05) as asking, pytest.raises(TeacherDownError, match="500: oops"):
        asking.score(TEXT)
    host.always = Fault(429, "", {"Retry-After": "100"})
    with client(host, deadline_seconds=1.0) as asking, pytest.raises(RateLimitedError, match="429"):
        asking.score(TEXT)
    assert asking.metrics.num_failures == 1


def test_a_host_that_is_not_there(host: TeacherServer) -> None:
    gone = validate_settings(TeacherConfig, {"kind": "api", "model": "m", "base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(TeacherDownError, match="did not answer"):
        ApiTeacher(gone, PIECES, "", request_timeout_seconds=5).score(TEXT, 4)


def test_twenty_threads_and_an_event_loop_stay_within_the_bound(host: TeacherServer) -> None:
    host.latency_seconds = 0.02
    with client(host, max_in_flight=3) as asking:
        threads = [threading.Thread(target=asking.score, args=([1, number],)) for number in range(20)]
        for thread in threads:
            thread.start()

        async def many() -> None:
            await asyncio.gather(*(asking.score_async([2, number]) for number in range(10)))

        asyncio.run(many())
        for thread in threads:
            thread.join()
    assert asking.metrics.num_from_teacher == 30
    assert asking.metrics.peak_in_flight == 3
    assert host.peak_in_flight <= 3


def test_the_second_epoch_is_the_caches_and_the_same_to_the_bit(host: TeacherServer, tmp_path: Path) -> None:
    texts = [[1, number, 5] for number in range(12)]
    host.faults = [Fault(429)]
    with ScoreCache(CacheConfig(path=tmp_path / "c.sqlite")) as cache, client(host, cache, max_in_flight=1) as asking:
        first = [asking.score(text) for text in texts]
        second = [asking.score(text) for text in texts]
        assert {scored.source for scored in first} == {"teacher"}
        # Rows that a 429 made short are what the first epoch trained on, so they are hits.
        assert [scored.source for scored in second] == ["short_cache"] * 10 + ["cache"] * 2
        assert asking.metrics.hit_rate == 0.5
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left.scores.head_logprobs_LK, right.scores.head_logprobs_LK)
    assert len(host.asked) == 13


def test_a_failing_host_is_stood_in_for_and_the_answer_marked(host: TeacherServer, tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    with ScoreCache(CacheConfig(path=path)) as cache, client(host, cache) as asking:
        asking.score(TEXT)
        short_text = [9, 9]
        key_free = client(host, cache, top_logprobs=5, reduced_top_logprobs=5)
        key_free.score(short_text)
    host.always = Fault(500, "down")
    with (
        ScoreCache(CacheConfig(path=path, ttl_seconds=1e-9)) as cache,
        client(host, cache, deadline_seconds=0.02) as asking,
    ):
        assert asking.score(TEXT).source == "stale_cache"
        with pytest.raises(TeacherDownError):
            asking.score([1, 2])
        assert asking.metrics.num_fallbacks == 1
        assert asking.metrics.hit_rate == 0
    with ScoreCache(CacheConfig(path=path)) as cache, client(host, cache, deadline_seconds=0.02) as asking:
        found = asking.score(short_text)
        assert (found.source, found.scores.top_logprobs) == ("short_cache", 5)
        assert asking.metrics.num_fallbacks == 1
    host.always = Fault(401, "key expired")
    with (
        ScoreCache(CacheConfig(path=path, ttl_seconds=1e-9)) as cache,
        client(host, cache) as asking,
        pytest.raises(TeacherRefusedError),
    ):
        asking.score(TEXT)


def test_a_vllm_server_must_cut_text_as_the_tokenizer_given(host: TeacherServer) -> None:
    class Cutting:
        def __init__(self, shift: int) -> None:
            self.shift = shift

        def encode(self, text: str, add_special_tokens: bool) -> Cutting:
            self.ids = [(byte + self.shift) % VOCAB_SIZE for byte in text.encode()]
            return self

    assert handshake(host.url, "m", Cutting(0), 10) == "vllm 0.32.0"  # type: ignore[arg-type]
    with pytest.raises(InputError, match="differ from token 0 on"):
        handshake(host.url, "m", Cutting(1), 10)  # type: ignore[arg-type]
    with pytest.raises(TeacherDownError, match="cannot be asked"):
        handshake("http://127.0.0.1:9/v1", "m", Cutting(0), 5)  # type: ignore[arg-type]


def test_rows_are_asked_for_ahead_in_order_and_within_the_depth(host: TeacherServer) -> None:
    with client(host, prefetch_depth=3, max_in_flight=1) as asking:
        drawn: list[int] = []

        def tokens(sequence: int) -> list[int]:
            drawn.append(sequence)
            return [sequence, 1]

        rows = FromClient(asking, tokens)
        for first in range(0, 10, 2):
            found = rows.rows([first, first + 1], list(range(first + 2, 10)))
            assert found is not None
            for sequence, scores in zip((first, first + 1), found, strict=True):
                assert scores.head_ids_LK[0, 0] == int(np.argmax(distribution(sequence)))
            assert len(drawn) <= first + 2 + 3
        # Each was asked for once, in the order of the loop.
        assert drawn == list(range(10))
    assert len(host.asked) == 10


def test_a_failure_is_raised_where_it_belongs(host: TeacherServer) -> None:
    with client(host, max_in_flight=1) as asking:
        rows = FromClient(asking, lambda sequence: [sequence, 1])
        assert rows.rows([0], []) is not None
        host.faults = [Fault(), Fault(401)]
        host.faults[0].body = '{"choices": [{"prompt_logprobs": [null, {"1": {"logprob": -0.5, "rank": 1}}]}]}'
        assert rows.rows([1], [2]) is not None
        with pytest.raises(TeacherRefusedError):
            rows.rows([2], [])


def test_policy_by_hand() -> None:
    policy = TopLogprobsPolicy(ClientConfig(successes_to_recover=2))
    assert policy.current == 20
    policy.rate_limited()
    policy.succeeded()
    policy.rate_limited()
    policy.succeeded()
    assert policy.current == 10
    policy.succeeded()
    assert policy.current == 20


def test_pauses_by_hand() -> None:
    config = ClientConfig(backoff_seconds=1, max_backoff_seconds=5)
    assert [backoff_seconds(config, attempt, None, 0.0) for attempt in (1, 2, 3, 4)] == [0.5, 1, 2, 2.5]
    assert backoff_seconds(config, 2, None, 0.5) == 1.5
    assert backoff_seconds(config, 1, 60.0, 0.0) == 60
    assert retry_after_seconds("3", 0) == 3
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT", 1445412420.0) == 60
    assert retry_after_seconds("soon", 0) is None
    assert retry_after_seconds(None, 0) is None


def test_a_pause_holds_every_request_and_the_deadline_ends_it() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    gate = RequestGate(1, clock=lambda: now[0], sleep=sleep)
    gate.pause(4)
    with pytest.raises(WaitTimeoutError, match="longer than what is left"), gate.request(3.0):
        pass
    with gate.request(10.0):
        assert slept == [4.0]
        with pytest.raises(WaitTimeoutError, match="no place"), gate.request(now[0]):
            pass


def test_quantiles_by_hand() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([1.0, 3.0], 0.95) == pytest.approx(2.9)
    assert quantile([], 0.5) is None


@given(st.integers(2, 200), st.integers(4, 50), st.integers(1, 3))
def test_windows_give_every_row_once_with_its_context(num_tokens: int, size: int, overlap: int) -> None:
    covered = []
    for window in windows(num_tokens, size, overlap):
        assert window.stop - window.start <= size
        rows = range(window.start + window.first_row, window.stop - 1)
        assert all(row - window.start >= min(row, overlap - 1) for row in rows)
        covered.extend(rows)
    assert covered == list(range(num_tokens - 1))


def test_long_texts_are_scored_with_overlap(host: TeacherServer) -> None:
    assert windows(10, 6, 2) == [Window(0, 6, 0), Window(4, 10, 1)]
    long_text = [number % VOCAB_SIZE for number in range(40)]
    short, whole = teacher(host), teacher(host)
    scores: TokenScores = score_in_windows(lambda ids: short.score(ids, 3), long_text, 16, 4)
    np.testing.assert_array_equal(scores.head_ids_LK, whole.score(long_text, 3).head_ids_LK)
    with pytest.raises(InputError, match="two are the fewest"):
        score_in_windows(lambda ids: short.score(ids, 3), [1], 16, 4)
