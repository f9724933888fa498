"""What every training rank runs under Ray Train: draw, score, step, push, check, keep.

Each rank draws and scores its own prompts. Gradients, counts and decisions are shared: whether a drawing failed is
agreed upon by all, so that all push again and all ask again. Rank 0 pushes, checks the canary and writes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from ray import train
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import UnavailableError, WaitTimeoutError
from sparkray.grpo.actors import RewardPool
from sparkray.grpo.checkpoint import ADAPTER, MODEL, RunState, read_state, restore_trainer, save_checkpoint
from sparkray.grpo.data import encode_rows, num_steps, read_rows, rows_of_step
from sparkray.grpo.errors import StaleEngineError
from sparkray.grpo.metrics_log import MetricsLog, means, reward_matrix, reward_sums
from sparkray.grpo.optimizer import create_optimizer, create_scheduler
from sparkray.grpo.policy import Policy, load_policy, shard
from sparkray.grpo.progress import step_line
from sparkray.grpo.ranks import ProcessGroupRanks
from sparkray.grpo.ray_metrics import RunMetrics
from sparkray.grpo.rewards import Sample, Score
from sparkray.grpo.rollouts import Drawing, PromptRequest, RolloutGroup
from sparkray.grpo.step import Trainee, train_step
from sparkray.grpo.sync import Canary, CanaryReading, payloads
from sparkray.models import prepare_model

_ASK_AGAIN_SECONDS = 2.0
T = TypeVar("T")


def train_loop(setup: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every rank.

    Args:
        setup: `config` (what `GrpoConfig` is made of), `engines` (handles of the rollout actors) and `run_dir`.
    """
    config = GrpoConfig.model_validate(setup["config"])
    rank = _Rank(config, setup["engines"], Path(setup["run_dir"]))
    try:
        rank.run()
    finally:
        rank.close()


class _Rank:
    """One rank of a run."""

    def __init__(self, config: GrpoConfig, engines: Sequence[ActorHandle], run_dir: Path) -> None:
        from transformers import AutoTokenizer

        self.config = config
        self.device = train.torch.get_device()
        on_cpu = self.device.type == "cpu"
        self.ranks = ProcessGroupRanks(sharded=not on_cpu and dist.get_world_size() > 1)
        self.model_path = prepare_model(config.model)
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.model_path))
        self.rows = read_rows(Path(config.dataset))
        self.prompts = encode_rows(self.tokenizer, self.rows, config)
        self.num_steps = num_steps(config, len(self.rows))
        self.eval_rows = read_rows(Path(config.eval_dataset)) if config.eval_dataset else []
        self.eval_prompts = encode_rows(self.tokenizer, self.eval_rows, config)
        self.all_engines = list(engines)
        self.engines = engines[self.ranks.rank :: self.ranks.size] or [engines[self.ranks.rank % len(engines)]]
        self.rewards = RewardPool(config.reward)
        self.step, self.version = 0, 0
        self._restore()
        self.log = MetricsLog(run_dir, next_step=self.step) if self.is_first else None
        self.metrics = RunMetrics(config.run_name, run_dir) if self.is_first else None
        fp32 = not config.bf16 and config.engine.dtype == "float32"
        self.canary = Canary(config.sync, fp32=fp32)
        self.canary_ids = tuple(self.tokenizer(config.sync.canary).input_ids)

    @property
    def is_first(self) -> bool:
        return self.ranks.rank == 0

    def run(self) -> None:
        config = self.config
        reading = self._push()
        ahead = None
        for step in range(self.step, self.num_steps):
            started = time.monotonic()
            row: dict[str, Any] = {"step": step}
            if self.eval_rows and step % config.eval_steps == 0:
                row |= self._evaluate()
            groups = self._drawn(step, ahead)
            drawn = time.monotonic()
            ahead = self._ask(step + 1) if config.steps_off and step + 1 < self.num_steps else None
            scores = self._score(groups)
            scored = time.monotonic()
            fresh = [group.oldest_version >= self.version - config.max_staleness for group in groups]
            groups = [group for group, is_fresh in zip(groups, fresh, strict=True) if is_fresh]
            kept = [score for score, is_fresh in zip(scores, fresh, strict=True) if is_fresh]
            rewards_PG = reward_matrix(kept).reshape(len(groups), config.num_generations)
            report = train_step(self.trainee, groups, rewards_PG, config, self.ranks, step=step)
            self.scheduler.step()
            trained = time.monotonic()
            self.version += 1
            self.step = step + 1
            reading = self._push()
            pushed = time.monotonic()
            if self.eval_rows and self.step == self.num_steps:
                row |= {f"{name}_after": value for name, value in self._evaluate().items()}
            row |= self._means(groups, kept) | report.to_dict()
            row |= {
                "weight_version": self.version,
                "staleness": self.version
                - 1
                - min((group.oldest_version for group in groups), default=self.version - 1),
                "rows": self._rows(step),
                "learning_rate": self.scheduler.get_last_lr()[0],
                "seconds": time.monotonic() - started,
                "draw_seconds": drawn - started,
                "score_seconds": scored - drawn,
                "train_seconds": trained - scored,
                "push_seconds": pushed - trained,
                "tokens_per_second": report.num_tokens / max(1e-9, time.monotonic() - started),
            }
            if reading is not None:  # on rank 0
                row |= {f"canary_{name}": value for name, value in reading.to_dict().items() if name != "version"}
            self._keep(row)

    def close(self) -> None:
        self.rewards.close()
        if self.metrics is not None:
            self.metrics.close()

    def _restore(self) -> None:
        config = self.config
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            self._load(self.model_path, None)
            return
        with checkpoint.as_directory() as path:
            folder = Path(path)
            state = read_state(folder, config.fixed_by_run())
            adapter = folder / ADAPTER if config.method != "full" else None
            self._load(folder / MODEL if adapter is None else self.model_path, adapter)
            restore_trainer(folder, self.policy, self.optimizer, self.scheduler)
        self.step, self.version = state.step, state.weight_version

    def _load(self, path: Path, adapter: Path | None) -> None:
        config = self.config
        policy = load_policy(path, config, self.device, adapter_from=adapter)
        self.policy: Policy = shard(policy, num_ranks=self.ranks.size) if self.ranks.sharded else policy
        self.optimizer = create_optimizer(self.policy.parameters, config)
        self.scheduler = create_scheduler(self.optimizer, config, self.num_steps)
        reference = self.policy.reference() if config.loss.kl_beta > 0 else None
        self.trainee = Trainee(
            self.policy.scorer, self.optimizer, self.policy.parameters, self.device, reference, self.policy.autocast
        )

    def _rows(self, step: int) -> list[int]:
        config = self.config
        return rows_of_step(step, num_rows=len(self.rows), prompts_per_step=config.prompts_per_step, seed=config.seed)

    # Drawing

    def _ask(self, step: int) -> list[Any]:
        mine = self._rows(step)[self.ranks.rank :: self.ranks.size]
        requests = [PromptRequest(row, self.prompts[row], self.config.num_generations) for row in mine]
        return self._send(requests, greedy=False, watch=True)

    def _send(self, requests: Sequence[PromptRequest], *, greedy: bool, watch: bool) -> list[Any]:
        config = self.config
        drawing = Drawing(
            temperature=0.0 if greedy else config.temperature,
            max_tokens=config.max_completion_tokens,
            stop=config.stop,
            watch=watch,
        )
        return [
            engine.generate.remote(part, drawing, version=self.version)
            for engine, part in (
                (engine, list(requests[at :: len(self.engines)])) for at, engine in enumerate(self.engines)
            )
            if part
        ]

    def _drawn(self, step: int, ahead: list[Any] | None) -> list[RolloutGroup]:
        mine = self._rows(step)[self.ranks.rank :: self.ranks.size]
        place = {row: at for at, row in enumerate(mine)}
        groups = self._collect(lambda: self._ask(step), ahead)
        ordered = sorted(groups, key=lambda group: place[group.row_index])
        return [replace(group, row=self.rows[group.row_index]) for group in ordered]

    def _collect(self, ask: Callable[[], list[Any]], ahead: list[Any] | None = None) -> list[RolloutGroup]:
        """What was drawn. When an engine dies on any rank, all push again and those that miss rollouts ask again."""
        waiting = ask() if ahead is None else ahead
        found: list[RolloutGroup] | None = None
        for _ in range(self.config.max_failures + 1):
            trouble: Exception | None = None
            if found is None:
                try:
                    answers = ray.get(waiting, timeout=self.config.step_timeout_seconds)
                    found = [group for answer in answers for group in answer]
                except (RayActorError, RayTaskError, GetTimeoutError) as failure:
                    if not _can_recover(failure):
                        raise
                    trouble = failure
            if not self._any(trouble is not None):
                assert found is not None
                return found
            self._push()
            if found is None:
                waiting = ask()
        raise UnavailableError(
            f"an engine died {self.config.max_failures + 1} times while step {self.step} was drawn.",
            hint="What it wrote stands in the logs above; start the run again to go on from the last checkpoint.",
        )

    def _any(self, value: bool) -> bool:
        return self.ranks.max(torch.tensor([float(value)], device=self.device)).item() > 0

    def _evaluate(self) -> dict[str, float]:
        """Mean rewards on the held-out rows: `eval_reward` of greedy answers, `eval_reward_drawn` of drawn ones."""
        found = {"eval_reward": self._held_out_reward(1, greedy=True)}
        if self.config.eval_generations:
            found["eval_reward_drawn"] = self._held_out_reward(self.config.eval_generations, greedy=False)
        return found

    def _held_out_reward(self, num_answers: int, *, greedy: bool) -> float:
        """Mean reward of `num_answers` to each held-out row, over all ranks."""
        mine = range(self.ranks.rank, len(self.eval_rows), self.ranks.size)
        requests = [PromptRequest(row, self.eval_prompts[row], num_answers) for row in mine]
        groups = self._collect(lambda: self._send(requests, greedy=greedy, watch=False))
        found = self._score([replace(group, row=self.eval_rows[group.row_index]) for group in groups], verifiable=True)
        totals = [score.total for group in found for score in group if score.total == score.total]
        sums = self.ranks.sum(torch.tensor([sum(totals), len(totals)], dtype=torch.float64, device=self.device))
        return (sums[0] / sums[1].clamp(min=1)).item()

    def _score(self, groups: Sequence[RolloutGroup], *, verifiable: bool = False) -> list[list[Score]]:
        samples = [[Sample(group.row, rollout) for rollout in group.rollouts] for group in groups]
        return self.rewards.score(samples, verifiable=verifiable)

    def _means(self, groups: list[RolloutGroup], scores: list[list[Score]]) -> dict[str, float]:
        """Means over all ranks of what was drawn and scored."""
        gathered: list[dict[str, float] | None] = [None] * self.ranks.size
        dist.all_gather_object(gathered, reward_sums(groups, scores))
        total: dict[str, float] = {}
        for sums in gathered:
            for name, value in (sums or {}).items():
                total[name] = total.get(name, 0.0) + value
        return means(total)

    # Pushing

    def _push(self) -> CanaryReading | None:
        """Bring every engine to the current version and check that it computes what the trainer does."""
        config = self.config
        self._wait_for_engines()
        dtype = torch.float32 if config.engine.dtype == "float32" else torch.bfloat16
        self._on_engines(lambda engine: engine.begin.remote())
        if config.sync.transport == "lora":
            self._push_adapter()
        else:
            for payload in self._payloads(dtype):
                if self.is_first:
                    self._load_into_engines(payload)
        self._on_engines(lambda engine: engine.finish.remote(self.version))
        return self._check_canary()

    def _load_into_engines(self, payload: bytes, adapter_config: Mapping[str, Any] | None = None) -> None:
        held = ray.put(payload)
        self._on_engines(lambda engine: engine.load.remote(held, adapter_config))

    def _payloads(self, dtype: torch.dtype) -> Any:
        tensors = self.policy.changed_weights(dtype)
        if self.is_first:
            return payloads(tensors)
        if self.policy.sharded:
            for _ in tensors:  # what rank 0 sends is gathered from all
                pass
        return ()

    def _push_adapter(self) -> None:
        from safetensors.torch import save

        weights = self.policy.adapter_weights()
        if not self.is_first:
            return
        described = self.policy.model.peft_config["default"].to_dict()
        described = {name: list(value) if isinstance(value, set) else value for name, value in described.items()}
        self._load_into_engines(save({name: value.contiguous() for name, value in weights.items()}), described)

    def _check_canary(self) -> CanaryReading | None:
        trainer_T = self.policy.score_text(self.canary_ids)
        reading = None
        trouble: Exception | None = None
        if self.is_first:
            try:
                for engine in self.all_engines:
                    answer = ray.get(engine.score.remote(self.canary_ids), timeout=self.config.step_timeout_seconds)
                    reading = self.canary.check(self.version, trainer_T, torch.tensor(answer))
            except Exception as failure:  # raised again below, once the other ranks know
                trouble = failure
        if self._any(trouble is not None):
            raise trouble if trouble is not None else UnavailableError("rank 0 found that a push did not arrive.")
        return reading

    def _wait_for_engines(self) -> None:
        """Until every engine answers, those that are being started again too."""
        deadline = time.monotonic() + self.config.start_timeout_seconds
        for engine in self.all_engines if self.is_first else ():
            while True:
                try:
                    ray.get(engine.ready.remote(), timeout=max(1.0, deadline - time.monotonic()))
                    break
                except RayActorError as failure:
                    if time.monotonic() > deadline:
                        raise WaitTimeoutError(
                            f"an engine did not answer within {self.config.start_timeout_seconds:g} s: {failure}."
                        ) from failure
                    time.sleep(_ASK_AGAIN_SECONDS)
        dist.barrier()

    def _on_engines(self, call: Callable[[ActorHandle], Any]) -> None:
        if self.is_first:
            ray.get([call(engine) for engine in self.all_engines], timeout=self.config.step_timeout_seconds)

    # Keeping

    def _keep(self, row: dict[str, Any]) -> None:
        if self.log is not None and self.metrics is not None:
            self.log.add(row)
            self.metrics.observe(row)
            print(step_line(row, self.num_steps), flush=True)  # noqa: T201 - Ray carries it to the driver's log
        reported = {name: value for name, value in row.items() if isinstance(value, int | float)}
        if self.step % self.config.checkpoint_steps and self.step != self.num_steps:
            train.report(reported)
            return
        with tempfile.TemporaryDirectory(prefix="sparkray-checkpoint-") as folder:
            state = RunState(self.step, self.version, self.config.fixed_by_run())
            save_checkpoint(
                Path(folder),
                self.policy,
                self.tokenizer,
                self.optimizer,
                self.scheduler,
                state,
                writes=self.is_first,
            )
            checkpoint = train.Checkpoint.from_directory(folder) if self.is_first else None
            train.report(reported, checkpoint=checkpoint)


def _can_recover(failure: Exception) -> bool:
    """Whether pushing again may help: the engine died, or was started again and holds the base weights."""
    if isinstance(failure, RayTaskError):
        return isinstance(failure.cause, StaleEngineError)
    return isinstance(failure, RayActorError)
