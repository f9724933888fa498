"""The coordinator over agents with the toy engine: routes, peers that die at any token, conversations, bounds."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from handoff_toy import QUICK, SECRET, ToyEngine, ToyPrefiller, monolithic

from sparkray.config.handoff import DecodeConfig, LinkRates, MachineRates, ModelShape, RouteConfig
from sparkray.errors import BusyError, UnavailableError
from sparkray.handoff.agent import DecodeAgent
from sparkray.handoff.client import Peer
from sparkray.handoff.coordinator import Coordinator, Outcome
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.handing import Ask, FirstToken, PrefillOrder, pair

PROMPT = (5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 54, 90)
NUM_TOKENS = 16
# One row: 3 layers x 2 heads x 8 channels x 4 bytes.
ROW_BYTES = 192
SHAPE = ModelShape(name="toy", num_layers=3, num_kv_heads=2, head_dim=4, active_params=1, kv_bits=32)


def rates(prefill: float, decode: float) -> MachineRates:
    return MachineRates(name="m", prefill_tokens_per_second=prefill, decode_tokens_per_second=decode, source="test")


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    (tmp_path / "secret").write_bytes(SECRET)
    return str(tmp_path / "secret")


class Peers:
    """Agents that can be killed: their sockets are cut as a power cut does."""

    def __init__(self, secret_file: str, number: int, step_seconds: float = 0.0, **settings: Any) -> None:
        config = DecodeConfig(**{"secret_file": secret_file, "context_tokens": 256, "link": QUICK, **settings})
        self.agents = [DecodeAgent(config, lambda c: ToyEngine(c, step_seconds=step_seconds)) for _ in range(number)]
        self.sockets: list[list[socket.socket]] = [[] for _ in self.agents]
        for agent, sockets in zip(self.agents, self.sockets, strict=True):
            answer = agent._answer

            def record(sock: socket.socket, answer: Any = answer, sockets: Any = sockets) -> None:
                sockets.append(sock)
                answer(sock)

            agent._answer = record  # type: ignore[method-assign]
            agent.start()
        self.peers = [Peer(agent.address, SECRET, link=QUICK) for agent in self.agents]

    def kill(self, address: str) -> None:
        for agent, sockets in zip(self.agents, self.sockets, strict=True):
            if agent.address == address:
                agent._listener.close()
                for sock in sockets:
                    if sock.fileno() >= 0:
                        sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        for agent in self.agents:
            agent.stop()


@pytest.fixture
def two(secret_file: str) -> Iterator[Peers]:
    made = Peers(secret_file, 2)
    yield made
    made.stop()


def coordinator(peers: Peers, prefiller: Any = None, **changes: Any) -> Coordinator:
    values: dict[str, Any] = {
        "shape": SHAPE, "config": RouteConfig(), "prefill": rates(1e4, 10), "decode": rates(100, 1000),
        "link": LinkRates(bytes_per_second=1e9), "force": "handoff", **changes,
    }  # fmt: skip
    return Coordinator(prefiller or ToyPrefiller(), peers.peers, **values)


async def run(made: Coordinator, ask: Ask, on_token: Any = lambda index: None) -> tuple[list[int], Outcome]:
    outcome, tokens = Outcome(), []
    async for piece in made.answer(ask, outcome):
        assert piece.index == len(ask.resume) + len(tokens), "no token is lost, none comes twice"
        tokens.append(piece.token)
        on_token(piece)
    return tokens, outcome


async def test_the_answer_is_that_of_one_engine(two: Peers) -> None:
    tokens, outcome = await run(coordinator(two), Ask(PROMPT, NUM_TOKENS))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert (outcome.verdict, outcome.reason, outcome.rows_received) == ("full", "", 12)


@pytest.mark.parametrize("route", ["handoff", "decode_node", "prefill_node"])
async def test_every_route_gives_the_same_text(two: Peers, route: Any) -> None:
    tokens, outcome = await run(coordinator(two, force=route), Ask(PROMPT, NUM_TOKENS))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    expected = ("full", "") if route == "handoff" else ("local", route)
    assert (outcome.verdict, outcome.reason) == expected


@pytest.mark.parametrize("at", sorted(random.Random(3).sample(range(1, NUM_TOKENS), 10)))
async def test_a_peer_killed_at_a_token_changes_nothing_for_the_client(secret_file: str, at: int) -> None:
    peers = Peers(secret_file, 2, step_seconds=0.03)
    made = coordinator(peers)

    def kill(piece: Any) -> None:
        if piece.index == at:
            busy = [state.peer.address for state in made._peers if state.num_running]
            peers.kill(busy[0])

    tokens, outcome = await run(made, Ask(PROMPT, NUM_TOKENS), kill)
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    if outcome.num_peers_lost:
        assert (outcome.verdict, outcome.reason) == ("partial", "peer_lost")
    else:
        assert at == NUM_TOKENS - 1, "only its last token may have been out before the kill"
    peers.stop()


@pytest.mark.parametrize("at", range(0, 9))
async def test_a_prefill_side_killed_at_a_layer_changes_nothing_for_the_client(two: Peers, at: int) -> None:
    def die(index: int) -> None:
        if index == at:
            raise ProtocolError(Reason.CANCELLED, "killed")

    made = coordinator(two, ToyPrefiller(before=die))
    for state in made._peers:
        await pair(state.peer, ToyPrefiller())
        state.is_paired = True
    tokens, outcome = await run(made, Ask(PROMPT, NUM_TOKENS, timeout_seconds=5))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert outcome.verdict == ("partial" if at >= 3 else "local") and outcome.reason == Reason.CANCELLED
    assert outcome.rows_received == 5 * (at // 3)


class DyingPrefiller(ToyPrefiller):
    """Its process is gone after some slices: the connection ends, and no last word is said on it."""

    async def prefill(self, prompt: list[int], order: PrefillOrder, timeout_seconds: float) -> FirstToken:
        await super().prefill(prompt, order, timeout_seconds)
        self.is_alive = False
        raise UnavailableError("the prefill engine has ended.")


@pytest.mark.parametrize("at", [0, 2, 4, 7])
async def test_a_prefill_process_that_is_gone_is_not_waited_for(two: Peers, at: int) -> None:
    def die(index: int) -> None:
        if index >= at:
            raise UnavailableError("killed")

    made = coordinator(two, DyingPrefiller(before=die))
    for state in made._peers:
        await pair(state.peer, ToyPrefiller())
        state.is_paired = True
    # Longer than a test may take: what ends the wait is the word that no more will come.
    tokens, outcome = await run(made, Ask(PROMPT, NUM_TOKENS, timeout_seconds=600))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert outcome.verdict == ("partial" if at >= 3 else "local") and outcome.reason == Reason.PREFILL_LOST
    assert outcome.rows_received == 5 * (at // 3)
    tokens, outcome = await run(made, Ask(PROMPT, NUM_TOKENS))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert (outcome.verdict, outcome.reason) == ("local", Reason.PREFILL_LOST)
    assert outcome.decision is not None and outcome.decision.route == "decode_node"


class DyingSender(ToyPrefiller):
    """It has read the prompt, and its process goes while the rows are still leaving."""

    async def prefill(self, prompt: list[int], order: PrefillOrder, timeout_seconds: float) -> FirstToken:
        first = await super().prefill(prompt, order, timeout_seconds)
        asyncio.get_running_loop().call_later(0.3, setattr, self, "is_alive", False)
        return first


@pytest.mark.parametrize("at", [0, 4])
async def test_a_prefill_process_that_goes_after_reading_is_not_waited_for(two: Peers, at: int) -> None:
    def die(index: int) -> None:
        if index >= at:
            raise UnavailableError("killed")

    made = coordinator(two, DyingSender(before=die))
    for state in made._peers:
        await pair(state.peer, ToyPrefiller())
        state.is_paired = True
    async with asyncio.timeout(30):
        tokens, outcome = await run(made, Ask(PROMPT, NUM_TOKENS, timeout_seconds=600))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert outcome.verdict == ("partial" if at >= 3 else "local") and outcome.reason == Reason.PREFILL_LOST
    assert outcome.rows_received == 5 * (at // 3)


async def test_where_all_peers_are_gone_the_prefill_side_goes_on(secret_file: str) -> None:
    peers = Peers(secret_file, 2, step_seconds=0.03)

    def kill_all(piece: Any) -> None:
        if piece.index == 4:
            for peer in peers.peers:
                peers.kill(peer.address)

    tokens, outcome = await run(coordinator(peers), Ask(PROMPT, NUM_TOKENS), kill_all)
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert outcome.verdict == "partial" and outcome.num_peers_lost >= 1
    peers.stop()


async def test_where_nobody_is_left_it_is_said(secret_file: str) -> None:
    peers = Peers(secret_file, 1)
    peers.kill(peers.peers[0].address)
    made = Coordinator(
        None, peers.peers, shape=SHAPE, config=RouteConfig(), prefill=rates(1, 1), decode=rates(1, 1),
        link=LinkRates(bytes_per_second=1),
    )  # fmt: skip
    with pytest.raises(UnavailableError, match="nobody is left"):
        await run(made, Ask(PROMPT, 4))
    peers.stop()


async def test_sixteen_conversations_of_three_turns_send_only_new_rows(secret_file: str) -> None:
    peers = Peers(secret_file, 2, max_sequences=16)
    made = coordinator(peers)

    async def converse(number: int) -> None:
        draw = random.Random(number)
        history: list[int] = []
        for turn, new in enumerate((9, 6, 4)):
            prompt = [*history, *(draw.randrange(97) for _ in range(new))]
            ask = Ask(tuple(prompt), 7, conversation=f"c{number}")
            tokens, outcome = await run(made, ask)
            assert tokens == monolithic(prompt, 7)
            assert outcome.verdict == "full"
            # The peer has rows of all but the last token that it wrote; the last of the prompt it computes itself.
            known = len(history) - 1 if turn else 0
            assert (outcome.rows_cached, outcome.rows_received) == (known, len(prompt) - 1 - known)
            frames = 3 * -(-outcome.rows_received // 5)
            assert outcome.kv_bytes == outcome.rows_received * ROW_BYTES + 24 * frames
            history = [*prompt, *tokens]

    await asyncio.gather(*(converse(number) for number in range(16)))
    assert all(agent.engine.num_computed for agent in peers.agents), "both peers worked"  # type: ignore[attr-defined]
    peers.stop()


async def test_another_model_is_never_used_for_rows(secret_file: str) -> None:
    peers = Peers(secret_file, 1)
    tokens, outcome = await run(coordinator(peers, ToyPrefiller(lineage="stale")), Ask(PROMPT, NUM_TOKENS))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)
    assert outcome.rows_received == 0 and outcome.verdict == "partial"
    peers.stop()


async def test_requests_are_bounded(two: Peers) -> None:
    made = coordinator(two, max_requests=1)
    first = made.answer(Ask(PROMPT, NUM_TOKENS), Outcome())
    await anext(first)
    with pytest.raises(BusyError, match="1 requests are running"):
        await run(made, Ask(PROMPT, NUM_TOKENS))
    await first.aclose()
    tokens, _ = await run(made, Ask(PROMPT, NUM_TOKENS))
    assert tokens == monolithic(list(PROMPT), NUM_TOKENS)


async def test_the_route_follows_what_was_measured(two: Peers) -> None:
    made = coordinator(two, force=None, config=RouteConfig(min_gain_seconds=0, min_gain_share=0))
    _, outcome = await run(made, Ask(PROMPT, 2))
    assert outcome.decision is not None and outcome.decision.route == "handoff"
    for _ in range(20):
        made.own_prefill_rate.observe(len(PROMPT), 1e-6)
    _, outcome = await run(made, Ask(PROMPT, 2))
    assert outcome.decision is not None and outcome.decision.route == "decode_node"
