"""The loop of a rank, with Ray's calls answered in this process: order, recovery, staleness, what is kept.

The engine is a small model that draws, takes pushes, and can die or come back with the weights that it started with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, RayTaskError

from sparkray.cluster.processes import free_port
from sparkray.config.grpo import GrpoConfig
from sparkray.errors import UnavailableError
from sparkray.grpo import train_loop
from sparkray.grpo.data import rows_of_step
from sparkray.grpo.errors import StaleEngineError, WeightSyncError
from sparkray.grpo.metrics_log import read_log
from sparkray.grpo.rewards import RewardScorer, Sample, Score
from sparkray.grpo.rollouts import Drawing, PromptRequest, Rollout, RolloutGroup

NUM_ROWS = 6


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 numbers a token, with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sparkray.models import prepare_model

    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(str(prepare_model("embedded")))
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(small).save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return path


class Engine:
    """Draws with a model of its own. `faults` are called by the name of the method that is about to run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[Callable[[Engine, str], None]] = []
        self.num_pushes = 0
        self.restart()

    def restart(self) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(self.path), dtype=torch.float32).eval()
        self.version = -1

    def __getattr__(self, name: str) -> Any:
        # `engine.score.remote(...)` gives a thunk, which `get` below calls: a future without a process.
        method = object.__getattribute__(self, f"do_{name}")

        def remote(*args: Any, **kwargs: Any) -> Callable[[], Any]:
            def call() -> Any:
                for fault in list(self.faults):
                    fault(self, name)
                return method(*args, **kwargs)

            return call

        return SimpleNamespace(remote=remote)

    def do_ready(self) -> int:
        return self.version

    def do_begin(self) -> None:
        self.version = -1

    def do_load(self, payload: bytes, adapter_config: Any = None) -> None:
        assert adapter_config is None
        assert not self.model.load_state_dict(load(payload), strict=False).unexpected_keys

    def do_finish(self, version: int) -> None:
        self.version = version
        self.num_pushes += 1

    @torch.no_grad()
    def do_score(self, token_ids: Sequence[int]) -> list[float]:
        logprobs = self.model(input_ids=torch.tensor([list(token_ids)])).logits[0].log_softmax(-1)
        return logprobs[:-1].gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()

    @torch.no_grad()
    def do_generate(self, requests: Sequence[PromptRequest], drawing: Drawing, *, version: int) -> list[RolloutGroup]:
        if self.version != version:
            error = StaleEngineError(f"{version} was asked for, and this is {self.version}")
            raise RayTaskError("generate", "", error)
        return [
            RolloutGroup(
                asked.row_index, asked.token_ids, tuple(self._one(asked, drawing) for _ in range(asked.num_completions))
            )
            for asked in requests
        ]

    def _one(self, asked: PromptRequest, drawing: Drawing) -> Rollout:
        logits = self.model(input_ids=torch.tensor([asked.token_ids])).logits[0, -1]
        scale = drawing.temperature or 1.0
        logprobs = (logits / scale).log_softmax(-1)
        token = int(logits.argmax() if not drawing.temperature else torch.multinomial(logprobs.exp(), 1))
        return Rollout((token,), str(token % 2), np.array([logprobs[token]], np.float32), "length", self.version)


class Scores:
    def __init__(self, config: Any) -> None:
        self._scorer = RewardScorer(config)

    def score(self, groups: Sequence[Sequence[Sample]], *, verifiable: bool = False) -> list[list[Score]]:
        return [self._scorer.score(samples) for samples in groups]

    def close(self) -> None: ...


class Checkpoints:
    """Ray Train's side: keeps what is reported."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] | None = None
        self.reported: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any], checkpoint: Any = None) -> None:
        self.reported.append(metrics)
        if checkpoint is not None:
            folder = Path(checkpoint)
            self.files = {
                str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }

    def get(self, folder: Path) -> Any:
        if self.files is None:
            return None
        for name, held in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(held)

        class Checkpoint:
            def as_directory(self) -> Any:
                from contextlib import nullcontext

                return nullcontext(str(folder))

        return Checkpoint()


def get(refs: Any, timeout: float) -> Any:
    return [ref() for ref in refs] if isinstance(refs, list) else refs()


@pytest.fixture
def run(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Engine, Path, Checkpoints]]]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    kept = Checkpoints()
    dataset = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"number {n} is", "answer": "1"} for n in range(NUM_ROWS)]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fake_train = SimpleNamespace(
        torch=SimpleNamespace(get_device=lambda: torch.device("cpu")),
        get_checkpoint=lambda: kept.get(tmp_path / "restored"),
        report=kept.report,
        Checkpoint=SimpleNamespace(from_directory=lambda folder: folder),
    )
    monkeypatch.setattr(train_loop, "train", fake_train)
    monkeypatch.setattr(train_loop, "ray", SimpleNamespace(get=get, put=lambda value: value))
    monkeypatch.setattr(train_loop, "RewardPool", Scores)
    monkeypatch.setattr(
        train_loop, "RunMetrics", lambda *_: SimpleNamespace(observe=lambda row: None, close=lambda: None)
    )
    monkeypatch.setattr(train_loop, "_ASK_AGAIN_SECONDS", 0.0)

    def start(engine: Engine | None = None, **values: Any) -> tuple[Engine, Path, Checkpoints]:
        engine = engine if engine is not None else Engine(model_path)
        given = {"max_steps": 5, "prompts_per_step": 3, "num_generations": 4, "learning_rate": 1e-2, **values}
        config = GrpoConfig(
            model=str(model_path), dataset=str(dataset), output_dir=str(tmp_path), max_completion_tokens=1, **given
        )
        setup = {"config": config.model_dump(mode="json"), "engines": [engine], "run_dir": str(tmp_path / "run")}
        train_loop.train_loop(setup)
        return engine, tmp_path / "run", kept

    yield start
    dist.destroy_process_group()


Start = Callable[..., tuple[Engine, Path, Checkpoints]]


def expect_whole(run_dir: Path, num_steps: int = 5) -> list[dict[str, Any]]:
    """Every step once, on the rows of an undisturbed run."""
    rows = read_log(run_dir)
    assert [row["step"] for row in rows] == list(range(num_steps))
    assert [row["weight_version"] for row in rows] == list(range(1, num_steps + 1))
    expected = [rows_of_step(step, num_rows=NUM_ROWS, prompts_per_step=3, seed=0) for step in range(num_steps)]
    assert [row["rows"] for row in rows] == expected
    return rows


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run(run: Start, method: str) -> None:
    engine, run_dir, kept = run(method=method)
    rows = expect_whole(run_dir)
    assert engine.version == 5 and engine.num_pushes == 6
    assert all(row["canary_gap_max"] < 1e-4 for row in rows)
    assert rows[-1]["canary_moved"] > 0
    assert all(row["gap_max"] < 1e-3 and row["staleness"] == 0 for row in rows)
    assert len(kept.reported) == 5


def test_one_step_off_trains_on_the_version_before(run: Start) -> None:
    _, run_dir, _ = run(steps_off=1)
    rows = expect_whole(run_dir)
    # The double draws when it is asked for the result, so what it drew ahead is refused or of the version before.
    assert all(row["staleness"] <= 1 for row in rows)


def test_held_out_rows_are_scored_before_and_after(run: Start, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "number 77 is", "answer": "1"}\n')
    _, run_dir, _ = run(eval_dataset=str(held_out), eval_steps=3)
    rows = expect_whole(run_dir)
    assert [row["step"] for row in rows if row.get("eval_reward") is not None] == [0, 3]
    assert rows[-1]["eval_reward_after"] in (0.0, 1.0)
    assert "eval_reward_drawn" not in rows[0]


def test_held_out_rows_are_answered_by_drawing_too(run: Start, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "number 77 is", "answer": "1"}\n')
    _, run_dir, _ = run(eval_dataset=str(held_out), eval_steps=100, eval_generations=4)
    rows = expect_whole(run_dir)
    for share in (rows[0]["eval_reward_drawn"], rows[-1]["eval_reward_drawn_after"]):
        assert share in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_an_engine_that_dies_is_pushed_to_and_asked_again(run: Start, model_path: Path) -> None:
    engine = Engine(model_path)
    deaths = iter([False, False, True, False, True])

    def die(one: Engine, name: str) -> None:
        if name == "generate" and next(deaths, False):
            one.restart()
            raise ActorDiedError()

    engine.faults.append(die)
    _, run_dir, _ = run(engine)
    expect_whole(run_dir)
    assert engine.num_pushes == 6 + 2


def test_an_engine_that_came_back_with_base_weights_draws_nothing(run: Start, model_path: Path) -> None:
    engine = Engine(model_path)
    back: list[bool] = []

    def come_back(one: Engine, name: str) -> None:
        if name == "generate" and one.version == 2 and not back:
            back.append(True)
            one.restart()

    engine.faults.append(come_back)
    _, run_dir, _ = run(engine)
    rows = expect_whole(run_dir)
    assert back and engine.num_pushes == 6 + 1
    assert all(row["gap_max"] < 1e-3 for row in rows)


def test_an_engine_that_dies_every_time_ends_the_run(run: Start, model_path: Path) -> None:
    engine = Engine(model_path)

    def die(one: Engine, name: str) -> None:
        if name == "generate":
            raise ActorDiedError()

    engine.faults.append(die)
    with pytest.raises(UnavailableError, match="an engine died 4 times while step 0"):
        run(engine)


def test_a_push_that_does_not_arrive_ends_the_run(run: Start, model_path: Path) -> None:
    engine = Engine(model_path)
    engine.do_load = lambda payload, adapter_config=None: None  # type: ignore[method-assign]
    with pytest.raises(WeightSyncError, match="version 1 was pushed"):
        run(engine)


def test_a_killed_run_goes_on_as_if_it_had_not_been(run: Start, model_path: Path) -> None:
    engine = Engine(model_path)
    calls: list[str] = []

    def kill(one: Engine, name: str) -> None:
        calls.append(name)
        if name == "generate" and calls.count("generate") == 4:
            raise KeyboardInterrupt

    engine.faults.append(kill)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    engine.restart()  # a new driver starts new engines
    _, run_dir, kept = run(engine)
    expect_whole(run_dir)
    assert len(kept.reported) == 5


def test_a_run_of_other_settings_is_refused(run: Start) -> None:
    from sparkray.errors import UsageError

    run(max_steps=1)
    with pytest.raises(UsageError, match="num_generations was 4 and is 2"):
        run(num_generations=2)
