"""Processes that are killed and a cable that is pulled: the client's stream is the undisturbed one every time.

Prefill is stock vLLM here, the decode peers are processes of their own in another network namespace where this process
may make one. A relay before a peer sees its rows go by, so that a kill comes at the layer that was drawn.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
from handoff_relay import FrameRelay
from handoff_tiny import LAYERS, VOCABULARY, write_tiny

from sparkray.config.handoff import DecodeConfig, LinkRates, MachineRates, ModelShape, PrefillConfig, RouteConfig
from sparkray.handoff.client import Peer
from sparkray.handoff.coordinator import Coordinator, Outcome, Piece
from sparkray.handoff.handing import Ask
from sparkray.handoff.local_peers import LocalPeer
from tests.second_network import SecondNetwork, second_network

pytest.importorskip("mlx_lm")
pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SECRET = b"a secret for tests"
CHUNK_TOKENS = 64
NUM_TOKENS = 200
PROMPT = tuple(int(token) for token in np.random.default_rng(11).integers(0, VOCABULARY, 500))
# Frames of the prompt's transfer: a slice of each layer for each chunk; the last token's row is not sent.
NUM_FRAMES = LAYERS * -(-(len(PROMPT) - 1) // CHUNK_TOKENS)
CUT_SECONDS = 5.0
SHAPE = ModelShape(name="tiny", num_layers=LAYERS, num_kv_heads=2, head_dim=64, active_params=1, kv_bits=32)
ResultT = TypeVar("ResultT")


class Loop:
    """An event loop on a thread of its own: vLLM's client belongs to the loop that it began on."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(600)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


@dataclass
class Place:
    """Where everything lies, and the cable."""

    folder: Path
    root: Path
    network: SecondNetwork

    def peer(self, engine: str, number: int) -> LocalPeer:
        config = DecodeConfig(
            engine=engine, model=str(self.folder), context_tokens=1024, max_sequences=3, num_threads=1,
            host=self.network.node_ip, insecure=True, secret_file=str(self.root / "secret"),
        )  # fmt: skip
        return LocalPeer(config, self.root / f"{engine}-{number}.log", self.network.prefix)

    def set_cable(self, up: bool) -> None:
        subprocess.run(["ip", "link", "set", self.network.interfaces[0], "up" if up else "down"], check=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch, second_network() as network:
        patch.setenv("SPARKRAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        root = tmp_path_factory.mktemp("handoff")
        (root / "secret").write_bytes(SECRET)
        yield Place(write_tiny(root / "llama", "llama"), root, network)


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def start_prefill(place: Place, loop: Loop) -> Any:
    from sparkray.handoff.vllm_prefill import PrefillEngine

    async def start() -> PrefillEngine:
        config = PrefillConfig(
            model=str(place.folder), codec="raw", chunk_tokens=CHUNK_TOKENS, max_model_len=1024,
            # Frames are counted: a prompt that was read before would be sent in fewer.
            prefix_caching=False,
        )  # fmt: skip
        return PrefillEngine(config, max_num_seqs=4)

    return loop.run(start())


@pytest.fixture(scope="module")
def prefiller(place: Place, loop: Loop) -> Iterator[Any]:
    made = start_prefill(place, loop)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(place: Place, loop: Loop, prefiller: Any) -> list[int]:
    async def alone() -> list[int]:
        return [token async for token, _ in prefiller.generate(list(PROMPT), NUM_TOKENS)]

    return loop.run(alone())


def coordinator(prefiller: Any, addresses: list[str], force: Any = "handoff") -> Coordinator:
    rates = MachineRates(name="m", source="set", prefill_tokens_per_second=1e3, decode_tokens_per_second=1e2)
    return Coordinator(
        prefiller, [Peer(address, SECRET) for address in addresses], shape=SHAPE, config=RouteConfig(), prefill=rates,
        decode=rates, link=LinkRates(bytes_per_second=1e9), force=force,
    )  # fmt: skip


async def stream(
    made: Coordinator, on_piece: Callable[[Piece], None] = lambda piece: None
) -> tuple[list[int], Outcome]:
    outcome, tokens = Outcome(), []
    async for piece in made.answer(Ask(PROMPT, NUM_TOKENS), outcome):
        assert piece.index == len(tokens), "no token is lost, none comes twice"
        tokens.append(piece.token)
        on_piece(piece)
    return tokens, outcome


def test_decode_peers_killed_at_ten_tokens(place: Place, loop: Loop, prefiller: Any, undisturbed: list[int]) -> None:
    engines = ("mlx", "llamacpp")
    peers = {engine: place.peer(engine, 0) for engine in engines}
    addresses = {engine: peer.wait_ready() for engine, peer in peers.items()}
    try:
        for number, at in enumerate(random.Random(5).sample(range(NUM_TOKENS // 2), 10)):
            # Whichever stands first is asked first: the two engines are killed in turns.
            victim, other = engines[number % 2], engines[1 - number % 2]

            def kill(piece: Piece, at: int = at, peer: LocalPeer = peers[victim]) -> None:
                if piece.index == at:
                    peer.kill()

            made = coordinator(prefiller, [addresses[victim], addresses[other]])
            tokens, outcome = loop.run(stream(made, kill))
            assert tokens == undisturbed, f"{victim} killed at token {at}"
            assert (outcome.verdict, outcome.reason, outcome.num_peers_lost) == ("partial", "peer_lost", 1)
            peers[victim].close()
            peers[victim] = place.peer(victim, number + 1)
            addresses[victim] = peers[victim].wait_ready()
    finally:
        for peer in peers.values():
            peer.close()


@pytest.fixture(scope="module")
def steady(place: Place) -> Iterator[str]:
    """A peer that nobody kills."""
    with place.peer("llamacpp", 100) as peer:
        yield peer.wait_ready()


@pytest.fixture(scope="module")
def alone(loop: Loop, steady: str) -> list[int]:
    """What that peer writes by itself."""
    tokens, outcome = loop.run(stream(coordinator(None, [steady], force=None)))
    assert (outcome.verdict, outcome.reason) == ("local", "decode_node")
    return tokens


@pytest.mark.parametrize("moment", ["rows", "tokens"])
def test_a_cable_pulled_for_five_seconds(
    place: Place, loop: Loop, prefiller: Any, undisturbed: list[int], steady: str, moment: str
) -> None:
    if not place.network.prefix:
        pytest.skip("a cable to pull needs root")
    pulled: list[threading.Timer] = []

    def pull() -> bool:
        place.set_cable(False)
        pulled.append(threading.Timer(CUT_SECONDS, place.set_cable, (True,)))
        pulled[0].start()
        return True

    with FrameRelay(steady) as relay:
        made = coordinator(prefiller, [relay.address])
        loop.run(stream(made))
        if moment == "rows":
            relay.arm(random.Random(8).randrange(1, NUM_FRAMES), pull)
        tokens, outcome = loop.run(
            stream(made, lambda piece: pull() and None if moment == "tokens" and piece.index == 5 else None)
        )
        assert tokens == undisturbed and outcome.verdict == "full"
        assert len(pulled) == 1
        pulled[0].join()


@pytest.mark.parametrize("at", sorted(random.Random(7).sample(range(NUM_FRAMES), 10)))
def test_a_prefill_engine_killed_at_a_layer(place: Place, loop: Loop, alone: list[int], steady: str, at: int) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    prefiller = start_prefill(place, loop)
    engine = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]

    def kill() -> bool:
        for process in engine:
            process.kill()
        return False

    try:
        with FrameRelay(steady) as relay:
            made = coordinator(prefiller, [relay.address])
            loop.run(made._pair(made._peers[0], prefiller))
            relay.arm(at, kill)
            tokens, outcome = loop.run(stream(made))
            assert tokens == alone, f"killed at frame {at}"
            whole = min(at // LAYERS * CHUNK_TOKENS, len(PROMPT) - 1)
            assert outcome.rows_received == whole
            assert (outcome.verdict, outcome.reason) == ("partial" if whole else "local", "prefill_lost")
            # The engine does not come back: the next request is answered without it, and says so.
            tokens, outcome = loop.run(stream(made))
            assert tokens == alone
            assert (outcome.verdict, outcome.reason) == ("local", "prefill_lost")
    finally:
        prefiller.close()
