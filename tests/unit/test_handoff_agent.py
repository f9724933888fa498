"""A decode agent over real sockets: whole, partial and local answers, breaks, refusals, planted faults."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparkray.config.handoff import DecodeConfig, WireLimits
from sparkray.errors import UnavailableError
from sparkray.handoff.agent import DecodeAgent
from sparkray.handoff.client import Answer, Peer, request_name
from sparkray.handoff.errors import PeerRefusedError, ProtocolError, Reason
from sparkray.handoff.messages import Done, Generate
from sparkray.handoff.rows import KvRows
from tests.unit.handoff_toy import QUICK, SECRET, LostFeed, ToyEngine, ToyFeed, monolithic, send_rows

PROMPT = [5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 54, 90]
NUM_TOKENS = 12


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    (tmp_path / "secret").write_bytes(SECRET)
    return str(tmp_path / "secret")


class Side:
    """An agent with the toy engine, and a peer that reaches it."""

    def __init__(self, secret_file: str, *, step_seconds: float = 0.0, **settings: Any) -> None:
        values: dict[str, Any] = {
            "secret_file": secret_file, "require_pairing": False, "context_tokens": 64, "link": QUICK, **settings
        }  # fmt: skip
        self.agent = DecodeAgent(DecodeConfig(**values), lambda c: ToyEngine(c, step_seconds=step_seconds))
        self.agent.start()
        self.peer = Peer(self.agent.address, SECRET, link=QUICK)
        self.engine: Any = self.agent.engine

    def request(self, prompt: list[int] = PROMPT, **changes: Any) -> Generate:
        name = request_name()
        ticket = self.peer.ticket(name, tuple(prompt))
        values: dict[str, Any] = {"max_tokens": NUM_TOKENS, "rows_timeout_seconds": 5.0, **changes}
        return Generate(name, ticket, tuple(prompt), **values)

    def ask(self, request: Generate, feed: Any = None, **hello: Any) -> tuple[list[int], Done]:
        """Open the answer, send rows beside it, and read the answer to its end."""
        answer = Answer(self.peer, request)
        if feed is not None:
            start = answer.status.cached_rows
            feed = feed if hasattr(feed, "slice") else feed(start)
            sending = threading.Thread(target=quietly, args=(self.peer, request, feed, start), kwargs=hello)
            sending.start()
        tokens = [token for message in answer.tokens(10) for token in message.token_ids]
        if feed is not None:
            sending.join(10)
        assert answer.done is not None
        return tokens, answer.done


def quietly(*arguments: Any, **options: Any) -> None:
    """Send rows; what the agent refuses, the answer tells."""
    try:
        send_rows(*arguments, **options)
    except (PeerRefusedError, ProtocolError, UnavailableError):
        return


@pytest.fixture
def side(secret_file: str) -> Iterator[Side]:
    made = Side(secret_file)
    yield made
    made.agent.stop()


def test_rows_that_came_give_the_text_of_one_engine_alone(side: Side) -> None:
    tokens, done = side.ask(side.request(), ToyFeed(PROMPT))
    assert tokens == monolithic(PROMPT, NUM_TOKENS)
    assert (done.verdict, done.rows_received, done.finish_reason) == ("full", 12, "length")
    # The last prompt token and all answer tokens but the last were computed here, nothing else.
    assert side.engine.num_computed == 1 + NUM_TOKENS - 1
    # 12 rows x 3 layers x 2 heads x 8 channels x 4 bytes, and 24 of header in each of 9 frames.
    assert done.kv_bytes == 12 * 3 * 2 * 8 * 4 + 9 * 24


def test_without_rows_they_are_computed_here(side: Side) -> None:
    tokens, done = side.ask(side.request(route="local"))
    assert tokens == monolithic(PROMPT, NUM_TOKENS) and done.verdict == "local"


@pytest.mark.parametrize("at", range(9))
def test_a_prefill_side_that_dies_leaves_its_whole_rows(side: Side, at: int) -> None:
    """Rows 0-4 are whole after slice 3, 5-9 after slice 6, 10-11 after slice 9."""
    # Waited for after the last row that comes; a busy machine may be half a second late with one.
    tokens, done = side.ask(side.request(rows_timeout_seconds=2.0), LostFeed(PROMPT, at))
    assert tokens == monolithic(PROMPT, NUM_TOKENS)
    assert done.rows_received == 5 * (at // 3)
    assert done.verdict == ("partial" if at >= 3 else "local") and done.reason
    assert done.rows_received + done.rows_computed == len(PROMPT)


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_broken_connection_is_taken_up_where_it_broke(side: Side, at: int) -> None:
    made: list[Any] = []

    def cut(index: int) -> None:
        if index == at and len(made) == 1:
            made[0]._socket.shutdown(socket.SHUT_RDWR)

    class Cutting(Peer):
        def connect(self) -> Any:
            made.append(super().connect())
            return made[-1]

    request = side.request()
    answer = Answer(side.peer, request)
    report = send_rows(Cutting(side.peer.address, SECRET, link=QUICK), request, ToyFeed(PROMPT, before=cut))
    tokens = [token for message in answer.tokens(10) for token in message.token_ids]
    assert tokens == monolithic(PROMPT, NUM_TOKENS)
    assert answer.done is not None and answer.done.verdict == "full"
    assert report.connections == 2 and report.num_frames == 9


def test_the_next_turn_sends_only_new_tokens(side: Side) -> None:
    first, _ = side.ask(side.request(conversation="c"), ToyFeed(PROMPT))
    second_prompt = [*PROMPT, *first, 7, 8, 9]
    tokens, done = side.ask(
        side.request(second_prompt, conversation="c"), lambda start: ToyFeed(second_prompt, start=start)
    )
    assert tokens == monolithic(second_prompt, NUM_TOKENS)
    # 13 prompt and 11 answer rows were here; of the 27 wanted, 3 are new (the last answer token's, and 7, 8).
    assert (done.rows_cached, done.rows_received, done.verdict) == (24, 3, "full")
    third = [*PROMPT, 1, 2, 3]
    tokens, done = side.ask(side.request(third, conversation="c"), lambda start: ToyFeed(third, start=start))
    assert tokens == monolithic(third, NUM_TOKENS) and done.rows_cached == 13, "what differs is forgotten"


def test_the_end_is_told_when_the_rows_are_in_their_place(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    close_transfer = side.agent._close_transfer

    def close_late(*arguments: Any) -> None:
        time.sleep(0.2)
        close_transfer(*arguments)

    monkeypatch.setattr(side.agent, "_close_transfer", close_late)
    side.ask(side.request(route="local", conversation="c"))
    _, done = side.ask(side.request(route="local", conversation="c"))
    assert done.rows_cached == len(PROMPT) - 1, "the next turn, asked at once, finds them"


def test_an_answer_goes_on_where_another_peer_ended(side: Side) -> None:
    whole = monolithic(PROMPT, NUM_TOKENS)
    for given in (1, 5, 11):
        tokens, _ = side.ask(side.request(resume=tuple(whole[:given])), ToyFeed(PROMPT))
        assert tokens == whole[given:]


def test_drawn_tokens_do_not_depend_on_who_draws(side: Side) -> None:
    options: dict[str, Any] = {"route": "local", "temperature": 5.0, "top_p": 0.9, "seed": 11}
    whole, _ = side.ask(side.request(**options))
    rest, _ = side.ask(side.request(**options, resume=tuple(whole[:4])))
    assert rest == whole[4:] and whole != monolithic(PROMPT, NUM_TOKENS)


def test_the_first_token_is_compared_with_the_prefill_sides(side: Side) -> None:
    expected = monolithic(PROMPT, NUM_TOKENS)
    for likely, verdict in ((expected[0], "full"), ((expected[0] + 1) % 97, "local")):
        request = side.request(confirm=True)
        answer = Answer(side.peer, request)
        send_rows(side.peer, request, ToyFeed(PROMPT))
        answer.confirm((likely,), (-0.01,))
        assert [t for m in answer.tokens(10) for t in m.token_ids] == expected, "a wrong word costs time, not text"
        assert answer.done is not None and answer.done.verdict == verdict
        assert answer.done.reason == ("" if verdict == "full" else Reason.CANARY)


def refusal_of(side: Side, request: Generate, feed: Any = None, **hello: Any) -> str:
    answer = Answer(side.peer, request)
    with pytest.raises(PeerRefusedError) as caught:
        send_rows(side.peer, request, feed or ToyFeed(PROMPT), **hello)
    tokens = [token for message in answer.tokens(10) for token in message.token_ids]
    assert tokens == monolithic(PROMPT, NUM_TOKENS), "the answer comes all the same"
    assert answer.done is not None and answer.done.verdict == "local" and answer.done.reason == caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"identity": {"lineage": "stale"}}, Reason.FINGERPRINT),
        ({"identity": {"frequencies": (1.0, 0.02)}}, Reason.FINGERPRINT),
        ({"identity": {"tokenizer": "other"}}, Reason.FINGERPRINT),
        ({"fingerprint": "forged"}, Reason.FINGERPRINT),
        ({"start": 1}, Reason.ORDER),
        ({"prompt_tokens": 64}, Reason.CONTEXT),
    ],
)
def test_another_model_is_refused_before_rows_come(side: Side, hello: dict[str, Any], reason: Reason) -> None:
    assert refusal_of(side, side.request(rows_timeout_seconds=0.5), **hello) == reason


def test_n_rows_where_n_minus_one_belong_are_refused(side: Side) -> None:
    longer = ToyFeed([*PROMPT, 1], chunk=13)
    assert refusal_of(side, side.request(rows_timeout_seconds=0.5), longer) == Reason.GEOMETRY


def test_unpaired_models_are_refused(secret_file: str) -> None:
    side = Side(secret_file, require_pairing=True)
    assert refusal_of(side, side.request(rows_timeout_seconds=0.5)) == Reason.NOT_PAIRED
    _, done = side.ask(side.request(purpose="canary", max_tokens=1), ToyFeed(PROMPT))
    assert done.report["passed"] and done.report["keys_error"] == 0 and done.report["kl"] < 1e-9
    _, done = side.ask(side.request(), ToyFeed(PROMPT))
    assert done.verdict == "full"
    side.agent.stop()


def swap_halves(rows: KvRows) -> KvRows:
    return replace(rows, keys_L=tuple(np.ascontiguousarray(keys[..., [0, 2, 1, 3]]) for keys in rows.keys_L))


def shift_rows(rows: KvRows) -> KvRows:
    return replace(rows, keys_L=tuple(np.roll(keys, 1, axis=0) for keys in rows.keys_L))


def swap_parts(rows: KvRows) -> KvRows:
    return replace(rows, keys_L=rows.values_L, values_L=rows.keys_L)


@pytest.mark.parametrize("change", [swap_halves, shift_rows, swap_parts])
def test_the_canary_finds_planted_faults(secret_file: str, change: Any) -> None:
    side = Side(secret_file, require_pairing=True)
    _, done = side.ask(side.request(purpose="canary", max_tokens=1), ToyFeed(PROMPT, change=change))
    assert not done.report["passed"] and max(done.report["keys_error"], done.report["values_error"]) > 0.5
    assert refusal_of(side, side.request(rows_timeout_seconds=0.5)) == Reason.NOT_PAIRED
    side.agent.stop()


def test_a_finished_request_cannot_be_played_again(side: Side) -> None:
    request = side.request()
    side.ask(request, ToyFeed(PROMPT))
    with pytest.raises(PeerRefusedError, match="replayed"):
        Answer(side.peer, request)
    with pytest.raises(PeerRefusedError, match="replayed"):
        send_rows(side.peer, request, ToyFeed(PROMPT))


def test_forged_tickets_are_refused(side: Side) -> None:
    forger = Peer(side.peer.address, b"another secret, 16 bytes", link=QUICK)
    request = replace(side.request(), ticket=forger.ticket("r", tuple(PROMPT)), request="r")
    with pytest.raises(PeerRefusedError, match="ticket"):
        Answer(forger, request)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": 60}, "exceed the context of 64"),
        ({"max_tokens": 0}, "max_tokens of 1"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_requests_out_of_bounds_are_refused(side: Side, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PeerRefusedError, match=said):
        Answer(side.peer, side.request(**changes))


def test_connections_are_bounded(secret_file: str) -> None:
    """A thousand connect; the agent holds four, turns the others away, and answers once there is room."""
    side = Side(secret_file, max_connections=4)
    sockets = [socket.create_connection(("127.0.0.1", side.agent.port), timeout=10) for _ in range(1000)]
    assert threading.active_count() < 100
    for sock in sockets:
        sock.close()
    for _ in range(50):
        try:
            tokens, _ = side.ask(side.request(route="local"))
            break
        except (PeerRefusedError, ConnectionError):
            continue
    assert tokens == monolithic(PROMPT, NUM_TOKENS)
    side.agent.stop()


def test_sequences_are_bounded_and_old_conversations_give_way(secret_file: str) -> None:
    side = Side(secret_file, max_sequences=2)
    for name in ("a", "b", "c"):
        side.ask(side.request(conversation=name), ToyFeed(PROMPT))
    assert side.engine.num_open == 2
    _, done = side.ask(side.request(conversation="a"), lambda start: ToyFeed(PROMPT, start=start))
    assert done.rows_cached == 0, "the oldest gave way"
    _, done = side.ask(side.request(conversation="c"), lambda start: ToyFeed(PROMPT, start=start))
    assert done.rows_cached == 12
    side.agent.stop()


def test_a_client_that_goes_away_ends_its_answer(secret_file: str) -> None:
    side = Side(secret_file, step_seconds=0.01, context_tokens=4096)
    answer = Answer(side.peer, side.request(route="local", max_tokens=4000))
    next(answer.tokens(10))
    answer.cancel()
    tokens, _ = side.ask(side.request(route="local"))
    assert tokens == monolithic(PROMPT, NUM_TOKENS)
    assert side.engine.num_computed < 1000
    side.agent.stop()


def test_a_peer_that_holds_too_much_back_is_refused(secret_file: str) -> None:
    # One layer of 12 rows is 768 bytes; a sender that sends layers in the wrong order fills what is held.
    side = Side(secret_file, limits=WireLimits(max_pending_bytes=1024, max_frame_bytes=1024))
    feed = ToyFeed(PROMPT, chunk=12)
    assert refusal_of(side, side.request(rows_timeout_seconds=0.5), feed) == Reason.TOO_LARGE
    side.agent.stop()
