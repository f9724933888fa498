"""Weights pushed into a real engine: 20 honest steps pass the canary, and each known silent failure fails it.

The faults are put where they happened: in vLLM's worker (the head that is not packed anew), in what is sent (a layer
left out, nothing at all) and in the identity under which an adapter is loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import save

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from sparkray.config.grpo import GrpoConfig
from sparkray.grpo.errors import WeightSyncError
from sparkray.grpo.optimizer import create_optimizer
from sparkray.grpo.policy import Policy, load_policy
from sparkray.grpo.ranks import OneRank
from sparkray.grpo.rollouts import Drawing, PromptRequest, RolloutGroup
from sparkray.grpo.step import StepReport, Trainee, train_step
from sparkray.grpo.sync import Canary, CanaryReading, payloads
from sparkray.grpo.vllm_rollouts import VllmRollouts
from sparkray.serving.app import engine_kwargs

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = ("2 + 3 =", "The sea is", "A horse and a", "Once upon a time")
NUM_GENERATIONS, NUM_TOKENS = 4, 6
RATES = {"lora": 3e-4, "full": 1e-5}
ResultT = TypeVar("ResultT")


def run_config(method: str, transport: str = "object_store") -> GrpoConfig:
    return GrpoConfig.model_validate(
        {
            "dataset": "d",
            "output_dir": "o",
            "method": method,
            "lora_layers": (24, 30) if method == "lora" else None,
            "num_generations": NUM_GENERATIONS,
            "max_completion_tokens": NUM_TOKENS,
            "max_prompt_tokens": 64,
            "learning_rate": RATES[method],
            "sync": {"transport": transport},
            "engine": {
                "dtype": "float32",
                "max_model_len": 128,
                "max_num_seqs": 16,
                "kv_cache_gib": 0.25,
                "enforce_eager": True,
                "extra": {"block_size": 32, "distributed_executor_backend": "uni"},
            },
        }
    )


@dataclass
class Live:
    """A real engine, and the loop that its coroutines run in."""

    rollouts: VllmRollouts
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return self.loop.run_until_complete(asyncio.wait_for(work, 300))

    def in_worker(self, change: Callable[[Any], None]) -> None:
        """Call a function of this file in vLLM's worker."""
        self.run(self.rollouts._engine.collective_rpc(change))

    def close(self) -> None:
        self.rollouts.shutdown()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()


@contextmanager
def live(config: GrpoConfig, path: str, kind: type[VllmRollouts] = VllmRollouts) -> Iterator[Live]:
    """A started engine, ended with the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `in_worker`
        found = Live(kind(Path(path), config, engine_arguments=engine_kwargs(config.engine, on_cpu=True)))
        try:
            found.run(found.rollouts.prepare())
            yield found
        finally:
            found.close()


@pytest.fixture(scope="module")
def engine(embedded_path: str) -> Iterator[Live]:
    with live(run_config("full"), embedded_path) as found:
        yield found


class Run:
    """A policy that is trained on what the engine draws, and pushed to it."""

    def __init__(self, path: str, engine: Live, method: str, transport: str = "object_store") -> None:
        from transformers import AutoTokenizer

        self.engine = engine
        self.config = run_config(method, transport)
        self.policy: Policy = load_policy(Path(path), self.config, torch.device("cpu"))
        self.optimizer = create_optimizer(self.policy.parameters, self.config)
        self.canary = Canary(self.config.sync, fp32=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.canary_ids = tuple(tokenizer(self.config.sync.canary).input_ids)
        self.requests = [
            PromptRequest(at, tuple(tokenizer(text).input_ids), NUM_GENERATIONS) for at, text in enumerate(PROMPTS)
        ]
        self.version = -1

    def draw(self) -> list[RolloutGroup]:
        drawing = Drawing(1.0, NUM_TOKENS)
        return self.engine.run(self.engine.rollouts.generate(self.requests, drawing, version=self.version))

    def step(self) -> StepReport:
        trainee = Trainee(self.policy.scorer, self.optimizer, self.policy.parameters, self.policy.device)
        rewards = np.random.default_rng(self.version).random((len(PROMPTS), NUM_GENERATIONS))
        return train_step(trainee, self.draw(), rewards, self.config, OneRank(), step=self.version)

    def push(self, *, left_out: Callable[[str], bool] = lambda name: False) -> None:
        rollouts, run = self.engine.rollouts, self.engine.run
        self.version += 1
        run(rollouts.begin())
        if self.config.sync.transport == "lora":
            run(rollouts.load(self.adapter(), self.adapter_config()))
        else:
            kept = ((name, value) for name, value in self.policy.changed_weights(torch.float32) if not left_out(name))
            for payload in payloads(kept):
                run(rollouts.load(payload))
        run(rollouts.finish(self.version))
        assert rollouts.version == self.version  # what the engine says is right, and means nothing

    def adapter(self) -> bytes:
        return save({name: value.contiguous() for name, value in self.policy.adapter_weights().items()})

    def adapter_config(self) -> Mapping[str, Any]:
        described = self.policy.model.peft_config["default"].to_dict()
        return {name: list(value) if isinstance(value, set) else value for name, value in described.items()}

    def check(self) -> CanaryReading:
        found = self.engine.run(self.engine.rollouts.score(self.canary_ids))
        return self.canary.check(self.version, self.policy.score_text(self.canary_ids), torch.tensor(found))


@pytest.fixture
def start(embedded_path: str, engine: Live) -> Callable[[str], Run]:
    """A run whose first push has passed; it brings back whatever tensors an earlier test left changed."""

    def begin(method: str) -> Run:
        untrained = Run(embedded_path, engine, "full")
        untrained.push()
        untrained.check()
        run = Run(embedded_path, engine, method) if method != "full" else untrained
        run.push()
        run.check()
        return run

    return begin


def leave_the_head(worker: Any) -> None:
    from sparkray.grpo import vllm_transfer

    worker.prepared_before = vllm_transfer.prepare_tied_head
    vllm_transfer.prepare_tied_head = lambda model: None


def prepare_the_head_again(worker: Any) -> None:
    from sparkray.grpo import vllm_transfer

    vllm_transfer.prepare_tied_head = worker.prepared_before


def test_an_honest_step_passes_and_the_engine_draws_what_is_trained(start: Callable[[str], Run]) -> None:
    run = start("full")
    report = run.step()
    # The engine's log-probabilities of what it drew are those of the trainer.
    assert report.gap_max < 1e-3
    run.push()
    reading = run.check()
    assert reading.gap_max < 1e-3 and reading.moved > 1e-3
    assert run.step().gap_max < 1e-3


def test_a_head_that_stays_old_fails(start: Callable[[str], Run], engine: Live) -> None:
    run = start("full")
    run.step()
    engine.in_worker(leave_the_head)
    try:
        run.push()
    finally:
        engine.in_worker(prepare_the_head_again)
    with pytest.raises(WeightSyncError, match="was pushed"):
        run.check()
    run.push()
    run.check()  # and the same weights, prepared, pass


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_layer_left_out_fails(start: Callable[[str], Run], method: str) -> None:
    run = start(method)
    run.step()
    run.push(left_out=lambda name: ".layers.27." in name)
    with pytest.raises(WeightSyncError, match="was pushed"):
        run.check()
    run.push()
    run.check()


def test_a_push_that_was_skipped_fails(start: Callable[[str], Run]) -> None:
    run = start("lora")
    run.step()
    run.push(left_out=lambda name: True)
    with pytest.raises(WeightSyncError, match="was pushed"):
        run.check()
    run.push()
    run.check()


def test_a_push_whose_sender_died_does_not_stop_the_next(start: Callable[[str], Run], engine: Live) -> None:
    run = start("lora")
    run.step()
    engine.run(engine.rollouts.begin())
    some = [(name, value) for name, value in run.policy.changed_weights(torch.float32) if ".layers.25." in name]
    for payload in payloads(some):
        engine.run(engine.rollouts.load(payload))
    run.push()
    reading = run.check()
    assert reading.gap_max < 1e-3 and reading.moved > 1e-4


@pytest.mark.slow
def test_twenty_honest_steps_pass(start: Callable[[str], Run]) -> None:
    run = start("full")
    readings, gaps = [], []
    for _ in range(20):
        gaps.append(run.step().gap_max)
        run.push()
        readings.append(run.check())
    assert max(reading.gap_max for reading in readings) < 1e-3
    assert max(gaps) < 1e-3
    # The policy did move, so agreeing meant something.
    assert all(reading.moved > 1e-4 for reading in readings)


class UnderOneId(VllmRollouts):
    """Loads every adapter under the id of the first, as long as `wrong`: vLLM then keeps the first."""

    wrong = False

    async def _load_adapter(self, payload: bytes, adapter_config: Mapping[str, Any]) -> None:
        before = self._adapter
        await super()._load_adapter(payload, adapter_config)
        if self.wrong and before is not None and self._adapter is not None:
            path = self._adapter.lora_path
            self._adapter = LoRARequest(before.lora_name, before.lora_int_id, path)
            await self._engine.add_lora(self._adapter)


@pytest.mark.slow
def test_adapters(embedded_path: str) -> None:
    """Pushed under new ids they arrive, 5 steps long; under a known id the old one stays, and the canary says so."""
    with live(run_config("lora", "lora"), embedded_path, UnderOneId) as engine:
        run = Run(embedded_path, engine, "lora", "lora")
        run.push()
        run.check()
        for _ in range(5):
            assert run.step().gap_max < 1e-3
            run.push()
            reading = run.check()
            assert reading.gap_max < 1e-3 and reading.moved > 1e-4
        run.step()
        engine.rollouts.wrong = True  # type: ignore[attr-defined]
        run.push()
        with pytest.raises(WeightSyncError, match="was pushed"):
            run.check()
