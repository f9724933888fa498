"""The second path in a cluster: engines draw, actors score, Ray Train runs TRL's trainer on the pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.actor import ActorHandle
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sparkray.config.grpo import GrpoConfig
from sparkray.grpo.actors import RewardPool
from sparkray.grpo.checkpoint import ADAPTER, export_model
from sparkray.grpo.data import Row, encode_rows
from sparkray.grpo.dpo import preference_pairs, train_on_pairs, write_pairs
from sparkray.grpo.rewards import Sample
from sparkray.grpo.rollouts import Drawing, PromptRequest, RolloutGroup
from sparkray.models import prepare_model

_UNTRAINED = -1  # the version of an engine that nothing was pushed to


def dpo_run(
    config: GrpoConfig, engines: Sequence[ActorHandle], rows: Sequence[Row], run_dir: Path, *, on_cpu: bool
) -> dict[str, Any]:
    """Draw, score, pair and train; the summary.

    Raises:
        InputError: no group has a better and a worse completion.
    """
    from transformers import AutoTokenizer

    model_path = prepare_model(config.model)
    prompts = encode_rows(AutoTokenizer.from_pretrained(str(model_path)), rows, config)
    groups = _draw(config, engines, rows, prompts)
    pool = RewardPool(config.reward)
    try:
        scores = pool.score([[Sample(group.row, one) for one in group.rollouts] for group in groups])
    finally:
        pool.close()
    pairs = preference_pairs(groups, scores)
    write_pairs(pairs, run_dir / "pairs.jsonl")
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"config": config.model_dump(mode="json"), "run_dir": str(run_dir), "on_cpu": on_cpu},
        scaling_config=ScalingConfig(
            num_workers=config.num_ranks,
            use_gpu=not on_cpu,
            resources_per_worker={"CPU": config.cpus_per_rank} | ({} if on_cpu else {"GPU": 1.0}),
            placement_strategy="STRICT_SPREAD" if config.spread else "PACK",
        ),
        torch_config=TorchConfig(backend="gloo" if on_cpu else "nccl"),
        run_config=RunConfig(name=f"{config.run_name}-dpo", storage_path=str(run_dir)),
    )
    trainer.fit()
    final = run_dir / "final"
    if not final.exists():
        export_model(model_path, run_dir / "dpo", final)
    log = [json.loads(line) for line in (run_dir / "dpo.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "run": config.run_name,
        "algorithm": "dpo",
        "num_groups": len(groups),
        "num_pairs": len(pairs),
        "num_steps": len(log),
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "accuracy_last": log[-1].get("rewards/accuracies"),
        "checkpoint": str(run_dir / "dpo"),
        "model": str(final),
    }


def _draw(
    config: GrpoConfig, engines: Sequence[ActorHandle], rows: Sequence[Row], prompts: Sequence[tuple[int, ...]]
) -> list[RolloutGroup]:
    """A group of every row, a step's worth at a time on each engine."""
    drawing = Drawing(config.temperature, config.max_completion_tokens, config.stop)
    asked = [PromptRequest(row, prompt, config.num_generations) for row, prompt in enumerate(prompts)]
    size = config.prompts_per_step
    groups: list[RolloutGroup] = []
    for start in range(0, len(asked), size * len(engines)):
        waiting = []
        for number, engine in enumerate(engines):
            part = asked[start + number * size : start + (number + 1) * size]
            if part:
                waiting.append(engine.generate.remote(part, drawing, version=_UNTRAINED))
        answers = ray.get(waiting, timeout=config.step_timeout_seconds)
        groups += [replace(group, row=rows[group.row_index]) for answer in answers for group in answer]
    return groups


def _loop(setup: Mapping[str, Any]) -> None:
    config, run_dir = GrpoConfig.model_validate(setup["config"]), Path(setup["run_dir"])
    log = train_on_pairs(
        prepare_model(config.model),
        run_dir / "pairs.jsonl",
        config,
        run_dir / "dpo" / ADAPTER,
        on_cpu=setup["on_cpu"],
    )
    if train.get_context().get_world_rank() == 0:
        (run_dir / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
