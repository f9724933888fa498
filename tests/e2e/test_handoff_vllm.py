"""Stock vLLM reads, real MLX and real llama.cpp write: the tokens of vLLM alone, in float32, on a tiny random model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from handoff_tiny import LAYERS, VOCABULARY, write_tiny

from sparkray.config.handoff import DecodeConfig, LinkRates, MachineRates, ModelShape, PrefillConfig, RouteConfig

pytest.importorskip("mlx_lm")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.engine

from sparkray.handoff.agent import DecodeAgent  # noqa: E402
from sparkray.handoff.client import Peer  # noqa: E402
from sparkray.handoff.coordinator import Coordinator, Outcome  # noqa: E402
from sparkray.handoff.engine import create_engine  # noqa: E402
from sparkray.handoff.handing import Ask, Told, answer, collect, pair  # noqa: E402
from sparkray.handoff.verify import verify  # noqa: E402

SECRET = b"a secret for tests"
CHUNK_TOKENS = 64
# One token of 3 layers x 2 heads x 128 channels in float32.
ROW_BYTES = 3 * 2 * 128 * 4
SHAPE = ModelShape(name="tiny", num_layers=LAYERS, num_kv_heads=2, head_dim=64, active_params=1, kv_bits=32)
ResultT = TypeVar("ResultT")


class Sides:
    """One prefill engine and a peer of each kind, on an event loop that outlives single tests."""

    def __init__(self, folder: Path, secret: Path) -> None:
        from sparkray.handoff.vllm_prefill import PrefillEngine

        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.agents = {
            name: DecodeAgent(
                DecodeConfig(
                    engine=name, model=str(folder), context_tokens=768, max_sequences=8, num_threads=1,
                    secret_file=str(secret),
                ),
                create_engine,
            )
            for name in ("mlx", "llamacpp")
        }  # fmt: skip
        for agent in self.agents.values():
            agent.start()
        self.peers = {name: Peer(agent.address, SECRET) for name, agent in self.agents.items()}

        async def start() -> PrefillEngine:
            config = PrefillConfig(model=str(folder), codec="raw", chunk_tokens=CHUNK_TOKENS, max_model_len=768)
            return PrefillEngine(config, max_num_seqs=8)

        self.prefiller = self.run(start())

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(280)

    def close(self) -> None:
        self.prefiller.close()
        for agent in self.agents.values():
            agent.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKRAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        root = tmp_path_factory.mktemp("handoff")
        (root / "secret").write_bytes(SECRET)
        made = Sides(write_tiny(root / "llama", "llama"), root / "secret")
        yield made
        made.close()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng((length, seed)).integers(0, VOCABULARY, length)]


async def alone(sides: Sides, prompt: list[int], num_tokens: int) -> list[int]:
    return [token async for token, _ in sides.prefiller.generate(prompt, num_tokens)]


async def handed(sides: Sides, name: str, ask: Ask) -> Told:
    told = Told()
    return await collect(answer(sides.peers[name], ask, sides.prefiller, told), told)


@pytest.fixture(scope="module")
def paired(sides: Sides) -> Sides:
    for peer in sides.peers.values():
        report = sides.run(pair(peer, sides.prefiller)).report
        assert report["passed"] and report["keys_error"] < 1e-4 and report["values_error"] < 1e-4
    return sides


def test_verify_finds_the_same_tokens_on_both_engines(sides: Sides) -> None:
    # Shorter than a chunk, a chunk and one, several chunks and vLLM's blocks of 128 tokens.
    prompts = [prompt_of(length) for length in (19, 64, 65, 128, 129, 300, 650)]
    report = sides.run(verify(sides.prefiller, sides.peers, prompts, 64, exact=True))
    assert report["ok"] and report["token_match"] == 1.0
    for engine in report["engines"].values():
        assert engine["num_full"] == 7
        for row, prompt in zip(engine["prompts"], prompts, strict=True):
            rows = len(prompt) - 1
            # Each chunk of each layer is a frame with 24 bytes of header.
            frames = LAYERS * -(-rows // CHUNK_TOKENS)
            assert rows * ROW_BYTES <= row["kv_bytes"] <= rows * ROW_BYTES + 24 * (frames + LAYERS)


@pytest.mark.parametrize("name", ["mlx", "llamacpp"])
def test_many_at_once_and_again_from_the_prefix_cache(paired: Sides, name: str) -> None:
    shared = prompt_of(200, seed=9)

    async def run() -> None:
        prompts = [[*shared, *prompt_of(11 + number, seed=number)] for number in range(6)]
        expected = [await alone(paired, prompt, 24) for prompt in prompts]
        told = await asyncio.gather(*(handed(paired, name, Ask(tuple(prompt), 24)) for prompt in prompts))
        assert [each.tokens for each in told] == expected
        assert all(each.done is not None and each.done.verdict == "full" for each in told)

    paired.run(run())


@pytest.mark.parametrize("name", ["mlx", "llamacpp"])
def test_the_next_turn_sends_only_new_rows(paired: Sides, name: str) -> None:
    async def run() -> None:
        history: list[int] = []
        for turn, new in enumerate((90, 30, 12)):
            prompt = [*history, *prompt_of(new, seed=turn)]
            told = await handed(paired, name, Ask(tuple(prompt), 16, conversation=f"{name} conversation"))
            assert told.tokens == await alone(paired, prompt, 16)
            known = len(history) - 1 if turn else 0
            assert told.done is not None and told.done.verdict == "full"
            assert (told.done.rows_cached, told.done.rows_received) == (known, len(prompt) - 1 - known)
            history = [*prompt, *told.tokens]

    paired.run(run())


def test_sixteen_conversations_over_two_peers_send_only_new_rows(paired: Sides) -> None:
    """Three turns each, all at once: every text is vLLM's alone, and every byte that crossed is accounted for."""
    rates = MachineRates(name="m", source="set", prefill_tokens_per_second=1e3, decode_tokens_per_second=1e2)
    made = Coordinator(
        paired.prefiller, list(paired.peers.values()), shape=SHAPE, config=RouteConfig(), prefill=rates, decode=rates,
        link=LinkRates(bytes_per_second=1e9), force="handoff",
    )  # fmt: skip
    per_peer = [0, 0]

    async def converse(number: int) -> list[tuple[list[int], list[int]]]:
        history: list[int] = []
        turns = []
        for turn, new in enumerate((60 + 7 * number, 25, 9)):
            prompt = [*history, *prompt_of(new, seed=100 * number + turn)]
            outcome = Outcome()
            ask = Ask(tuple(prompt), 12, conversation=f"conversation {number}")
            tokens = [piece.token async for piece in made.answer(ask, outcome)]
            # The peer has rows of all but the last token that it wrote, and computes the last of the prompt itself.
            known = len(history) - 1 if turn else 0
            assert outcome.verdict == "full"
            assert (outcome.rows_cached, outcome.rows_received) == (known, len(prompt) - 1 - known)
            payload = outcome.rows_received * ROW_BYTES
            # 24 bytes of header in each frame; a frame has at least one row of a layer and at most a step's rows.
            most = LAYERS * (2 + outcome.rows_received // 8)
            assert payload < outcome.kv_bytes <= payload + 24 * most
            history = [*prompt, *tokens]
            turns.append((prompt, tokens))
        per_peer[made._conversations[f"conversation {number}"].state.peer is made._peers[1].peer] += 1
        return turns

    async def run() -> None:
        talks = await asyncio.gather(*(converse(number) for number in range(16)))
        for prompt, tokens in (turn for talk in talks for turn in talk):
            assert tokens == await alone(paired, prompt, 12)

    paired.run(run())
    assert per_peer == [8, 8], "both peers had their part"


def test_a_peer_that_is_not_there_costs_the_others_nothing(paired: Sides) -> None:
    from sparkray.handoff.handing import PrefillOrder

    async def run() -> None:
        prompt = prompt_of(100, seed=5)
        nowhere = PrefillOrder("r", "t", "127.0.0.1:9", 0)
        first = await paired.prefiller.prefill(prompt, nowhere, 60.0)
        expected = await alone(paired, prompt, 8)
        assert first.token_ids[0] == expected[0]
        told = await handed(paired, "llamacpp", Ask(tuple(prompt), 8))
        assert told.tokens == expected

    paired.run(run())
