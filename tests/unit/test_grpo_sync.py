"""The canary: each way in which a push is known to fail silently fails it, and 20 honest steps pass.

The engine is a second model that takes checkpoint tensors as vLLM does; its faults are those that were seen in vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from tiny_llama import draw_groups, plain_logprobs, tiny_llama
from torch import Tensor

from sparkray.config.grpo import GrpoConfig, SyncConfig
from sparkray.grpo.checkpoint import (
    RunState,
    export_model,
    newest_checkpoint,
    read_state,
    restore_trainer,
    save_checkpoint,
)
from sparkray.grpo.errors import WeightSyncError
from sparkray.grpo.optimizer import create_optimizer, create_scheduler, rate_share
from sparkray.grpo.policy import Policy, load_policy
from sparkray.grpo.ranks import OneRank
from sparkray.grpo.step import Trainee, train_step
from sparkray.grpo.sync import Canary, payloads, push

CANARY = tuple(range(3, 25))


class Engine:
    """A model behind the receiver's interface."""

    def __init__(self, path: Path) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
        # As in an engine: the head that computes is a copy of the embedding.
        self.model.lm_head.weight = torch.nn.Parameter(self.model.model.embed_tokens.weight.detach().clone())
        self.version = -1
        self.loaded: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.version = -1

    def load(self, payload: bytes) -> None:
        self.loaded |= load(payload)

    def finish(self, version: int) -> None:
        self.take(self.loaded)
        self.version = version

    def take(self, tensors: dict[str, Tensor]) -> None:
        missing = self.model.load_state_dict(tensors, strict=False)
        assert not missing.unexpected_keys
        self.model.lm_head.weight.data.copy_(self.model.model.embed_tokens.weight)

    def score(self) -> Tensor:
        return plain_logprobs(self.model, CANARY[:1], CANARY[1:])


class StaleHead(Engine):
    def take(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(tensors, strict=False)


class OldAdapter(Engine):
    """What was loaded first stays, under whatever version."""

    def load(self, payload: bytes) -> None:
        self.loaded = load(payload) | self.loaded


class DroppedLayer(Engine):
    def take(self, tensors: dict[str, Tensor]) -> None:
        super().take({name: value for name, value in tensors.items() if ".layers.1." not in name})


class SkippedPush(Engine):
    """Takes the first push, and then says that it took the others."""

    def take(self, tensors: dict[str, Tensor]) -> None:
        if self.version < 0 and not hasattr(self, "first"):
            self.first = True
            super().take(tensors)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(4).save_pretrained(str(path))
    return path


def run_config(method: str = "lora", **values: Any) -> GrpoConfig:
    values = {"learning_rate": 3e-3, "lora_rank": 4, "lora_alpha": 8, **values}
    return GrpoConfig(dataset="d", output_dir="o", method=method, max_completion_tokens=8, num_generations=4, **values)


class Run:
    """A run of one rank without Ray."""

    def __init__(self, path: Path, config: GrpoConfig) -> None:
        self.config = config
        self.policy: Policy = load_policy(path, config, torch.device("cpu"))
        self.optimizer = create_optimizer(self.policy.parameters, config)
        self.scheduler = create_scheduler(self.optimizer, config, 100)

    def step(self, number: int) -> None:
        trainee = Trainee(self.policy.scorer, self.optimizer, self.policy.parameters, self.policy.device)
        groups = draw_groups(self.policy.model, 2, 4, seed=number)
        rewards = np.random.default_rng(number).random((2, 4))
        train_step(trainee, groups, rewards, self.config, OneRank(), step=number)
        self.scheduler.step()

    def push(self, engine: Engine, version: int) -> int:
        return push(engine, self.policy.changed_weights(torch.float32), version)

    def score(self) -> Tensor:
        return self.policy.score_text(CANARY)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_twenty_honest_steps_pass(model_path: Path, method: str) -> None:
    run, engine, canary = Run(model_path, run_config(method)), Engine(model_path), Canary(SyncConfig(), fp32=True)
    readings = []
    for step in range(21):
        run.push(engine, step)
        readings.append(canary.check(step, run.score(), engine.score()))
        run.step(step)
    assert max(reading.gap_max for reading in readings) < 1e-4
    # The policy did move, so agreeing meant something.
    assert all(reading.moved > 1e-3 for reading in readings[1:])


@pytest.mark.parametrize(
    ("engine_kind", "method"),
    [
        (StaleHead, "full"),
        (OldAdapter, "lora"),
        (OldAdapter, "full"),
        (DroppedLayer, "lora"),
        (DroppedLayer, "full"),
        (SkippedPush, "lora"),
        (SkippedPush, "full"),
    ],
)
def test_each_silent_failure_fails(model_path: Path, engine_kind: type[Engine], method: str) -> None:
    run, engine, canary = Run(model_path, run_config(method)), engine_kind(model_path), Canary(SyncConfig(), fp32=True)
    run.push(engine, 0)
    canary.check(0, run.score(), engine.score())
    run.step(0)
    run.push(engine, 1)
    assert engine.version == 1  # what the engine says is right, and means nothing
    with pytest.raises(WeightSyncError, match="version 1 was pushed"):
        canary.check(1, run.score(), engine.score())


def test_a_skipped_push_is_found_below_the_bound(model_path: Path) -> None:
    """A step so small that it moves the canary by less than 1e-3."""
    run = Run(model_path, run_config("full", learning_rate=1e-6))
    engine, canary = SkippedPush(model_path), Canary(SyncConfig(), fp32=True)
    run.push(engine, 0)
    canary.check(0, run.score(), engine.score())
    for step in range(6):
        run.step(step)
    run.push(engine, 1)
    assert (run.score() - engine.score()).abs().max() < 1e-3
    with pytest.raises(WeightSyncError, match="did not follow"):
        canary.check(1, run.score(), engine.score())


def test_a_layer_that_stays_behind_is_found_below_the_bound() -> None:
    """Numbers of one layer of 30 in a step of full fine-tuning: far from the bound, and far from rounding."""
    canary, zero = Canary(SyncConfig(), fp32=True), torch.zeros(4)
    canary.check(0, zero, zero + 4e-5)
    moved = zero + 0.04
    canary.check(1, moved, moved + 6e-5)
    with pytest.raises(WeightSyncError, match="did not follow"):
        canary.check(2, moved + 0.04, moved + 0.04 + 6e-4)


def test_rounding_that_grows_slowly_passes() -> None:
    canary, zero = Canary(SyncConfig(), fp32=True), torch.zeros(4, dtype=torch.float64)
    for step, gap in enumerate((2e-5, 5e-5, 1.1e-4, 3e-4, 9e-4)):
        assert canary.check(step, zero + 0.01 * step, zero + 0.01 * step + gap).alarm is None


def test_bf16_alarms_on_growth_and_goes_on() -> None:
    canary = Canary(SyncConfig(max_growth=3.0), fp32=False)
    zero = torch.zeros(4)
    assert canary.check(0, zero, zero + 0.02).alarm is None
    assert canary.check(1, zero, zero + 0.05).alarm is None
    alarm = canary.check(2, zero, zero + 0.07).alarm
    assert alarm is not None and "0.02" in alarm


def test_an_engine_that_answers_with_nan_fails() -> None:
    canary = Canary(SyncConfig(), fp32=True)
    with pytest.raises(WeightSyncError, match="inf"):
        canary.check(0, torch.zeros(2), torch.tensor([0.0, float("nan")]))


def test_an_adapter_pushes_only_what_changed(model_path: Path) -> None:
    config = run_config(lora_layers=(1, 2), lora_targets=("q_proj", "down_proj"))
    run = Run(model_path, config)
    run.step(0)
    pushed = dict(run.policy.changed_weights(torch.float32))
    layer = "model.layers.1"
    # Whole matrices that an engine joins: q with k and v, down with gate and up.
    assert {name.removeprefix(f"{layer}.") for name in pushed} == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    before = tiny_llama(4).state_dict()
    changed = {name for name, value in pushed.items() if not torch.equal(value, before[name])}
    assert changed == {f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.down_proj.weight"}


def test_payloads_keep_to_their_size_and_lose_nothing() -> None:
    tensors = {f"t{number}": torch.full((100,), float(number)) for number in range(10)}
    pieces = list(payloads(iter(tensors.items()), max_bytes=1000))
    assert len(pieces) == 5
    joined: dict[str, Tensor] = {}
    for piece in pieces:
        joined |= load(piece)
    assert all(torch.equal(joined[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_the_run_that_was_not_killed(model_path: Path, tmp_path: Path, method: str) -> None:
    config = run_config(method, schedule="linear")
    straight, killed = Run(model_path, config), Run(model_path, config)
    for step in range(4):
        straight.step(step)
    for step in range(2):
        killed.step(step)
    state = RunState(2, 2, config.fixed_by_run())
    tokenizer: Any = type("Tokenizer", (), {"save_pretrained": lambda self, path: None})()
    folder = tmp_path / "checkpoint_2"
    folder.mkdir()
    save_checkpoint(folder, killed.policy, tokenizer, killed.optimizer, killed.scheduler, state, writes=True)
    assert newest_checkpoint(tmp_path) == folder
    assert read_state(folder, config.fixed_by_run()) == state

    resumed = Run(model_path, config)
    adapter = folder / "adapter" if method == "lora" else None
    resumed.policy = load_policy(
        model_path if adapter else folder / "model", config, torch.device("cpu"), adapter_from=adapter
    )
    resumed.optimizer = create_optimizer(resumed.policy.parameters, config)
    resumed.scheduler = create_scheduler(resumed.optimizer, config, 100)
    restore_trainer(folder, resumed.policy, resumed.optimizer, resumed.scheduler)
    for step in range(2, 4):
        resumed.step(step)
    for one, other in zip(straight.policy.parameters, resumed.policy.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert resumed.scheduler.get_last_lr() == straight.scheduler.get_last_lr()


def test_a_checkpoint_of_another_model_is_refused(model_path: Path, tmp_path: Path) -> None:
    from sparkray.errors import UsageError

    (tmp_path / "run.json").write_text('{"step": 1, "weight_version": 1, "fixed": {"model": "other", "seed": 0}}')
    with pytest.raises(UsageError, match="model was 'other' and is 'embedded'"):
        read_state(tmp_path, {"model": "embedded", "seed": 0})


def test_a_full_disk_is_said_so(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from sparkray.errors import UnavailableError

    run = Run(model_path, run_config())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UnavailableError, match="disk was full while the checkpoint of step 3"):
        save_checkpoint(tmp_path, run.policy, None, run.optimizer, run.scheduler, RunState(3, 3, {}), writes=True)


def test_export_merges_the_adapter(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer: Any = type("Tokenizer", (), {"save_pretrained": lambda self, path: None})()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_: tokenizer)
    run = Run(model_path, run_config())
    run.step(0)
    checkpoint = tmp_path / "c"
    checkpoint.mkdir()
    save_checkpoint(checkpoint, run.policy, tokenizer, run.optimizer, run.scheduler, RunState(1, 1, {}), writes=True)
    merged = export_model(model_path, checkpoint, tmp_path / "merged")
    model = LlamaForCausalLM.from_pretrained(str(merged), dtype=torch.float32).eval()
    torch.testing.assert_close(plain_logprobs(model, CANARY[:1], CANARY[1:]), run.score(), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "merged.tmp").exists()


def test_learning_rates_by_hand() -> None:
    config = run_config(warmup_steps=2, schedule="linear")
    assert [rate_share(step, config, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = run_config(schedule="cosine")
    assert rate_share(5, cosine, 10) == pytest.approx(0.5)
