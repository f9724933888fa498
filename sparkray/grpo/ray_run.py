"""A whole run from the driver: check everything that can be checked, start engines and ranks, and show the result.

Killed and started again with the same settings it goes on: Ray Train finds the last checkpoint of the run's folder,
and engines are pushed to before they draw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import UnavailableError, WaitTimeoutError, error_inside, last_line
from sparkray.grpo.actors import start_engines
from sparkray.grpo.checkpoint import check_same_run, export_model, newest_checkpoint
from sparkray.grpo.curves import entropy_collapse, write_report
from sparkray.grpo.data import encode_rows, num_steps, read_rows
from sparkray.grpo.metrics_log import read_log
from sparkray.grpo.ray_dpo import dpo_run
from sparkray.grpo.rewards import RewardScorer
from sparkray.grpo.run_folder import lasting_folder, with_own_data
from sparkray.grpo.train_loop import train_loop
from sparkray.models import prepare_model

SETTINGS_NAME, SUMMARY_NAME, FINAL_NAME = "settings.json", "summary.json", "final"
_NUM_KEPT_CHECKPOINTS = 2

EngineArguments = Callable[..., dict[str, Any]]


@contextmanager
def rollout_engines(config: GrpoConfig, engine_arguments: EngineArguments) -> Iterator[list[ActorHandle]]:
    """The engines of a run, ready to be pushed to; several runs of one model and engine may share them.

    Args:
        config: of the run.
        engine_arguments: makes vLLM's arguments of `config.engine`, given also the keyword `on_cpu`.
    """
    on_cpu = _on_cpu(config)
    engines = start_engines(config, engine_arguments(config.engine, on_cpu=on_cpu), on_cpu=on_cpu)
    try:
        _await_engines(engines, config.start_timeout_seconds)
        yield engines
    finally:
        for engine in engines:
            ray.kill(engine)


def train_run(
    config: GrpoConfig, *, engine_arguments: EngineArguments, engines: Sequence[ActorHandle] | None = None
) -> dict[str, Any]:
    """Train as `config` says, in the Ray cluster that this process is a driver of.

    Args:
        config: of the run.
        engine_arguments: as of `rollout_engines`.
        engines: of `rollout_engines`; by default the run has its own.

    Returns:
        The summary, which is also in the run's folder: steps, rewards first and last, entropy, where things are.

    Raises:
        InputError, NotFoundError, UsageError: dataset, model, rewards or settings; before anything is started.
        UnavailableError: the cluster has not what the run needs, or something died too often.
        WaitTimeoutError: the engines were not ready in time.
    """
    run_dir = lasting_folder(config.output_dir) / config.run_name
    config = with_own_data(config, run_dir)
    model_path, total = _check(config, run_dir)
    on_cpu = _on_cpu(config)
    held = nullcontext(engines) if engines is not None else rollout_engines(config, engine_arguments)
    with held as ready:
        if config.algorithm == "dpo":
            return dpo_run(config, ready, read_rows(Path(config.dataset)), run_dir, on_cpu=on_cpu)
        _fit(config, ready, run_dir, on_cpu=on_cpu)
    return _finish(config, run_dir, model_path, total)


def _check(config: GrpoConfig, run_dir: Path) -> tuple[Path, int]:
    """Everything that can be refused ahead; the model's folder and the number of steps."""
    from transformers import AutoTokenizer

    rows = read_rows(Path(config.dataset))
    eval_rows = read_rows(Path(config.eval_dataset)) if config.eval_dataset else []
    RewardScorer(config.reward)
    model_path = prepare_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(str(model_path))
    encode_rows(tokenizer, rows, config)
    encode_rows(tokenizer, eval_rows, config)
    run_dir.mkdir(parents=True, exist_ok=True)
    held = run_dir / SETTINGS_NAME
    if held.is_file():
        check_same_run(json.loads(held.read_text(encoding="utf-8"))["fixed"], config.fixed_by_run(), run_dir)
    text = json.dumps({"fixed": config.fixed_by_run(), "settings": config.model_dump(mode="json")}, indent=2)
    draft = held.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(held)
    return model_path, num_steps(config, len(rows))


def _on_cpu(config: GrpoConfig) -> bool:
    """Whether the run is on CPUs; refuses what the cluster cannot hold."""
    resources = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if config.spread and config.num_ranks > len(nodes):
        raise UnavailableError(
            f"{config.num_ranks} ranks were to be on a node each, and the cluster has {len(nodes)} "
            f"node{'s' if len(nodes) != 1 else ''}.",
            hint="Lower num_ranks, set spread to false, or join more nodes.",
        )
    num_gpus = resources.get("GPU", 0.0)
    needed = config.num_ranks + config.num_engines * config.engine.tensor_parallel_size
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and num_gpus == 0)
    if not on_cpu and num_gpus < needed:
        raise UnavailableError(
            f"{config.num_ranks} ranks and {config.num_engines} engines need {needed} GPUs, and the cluster has "
            f"{num_gpus:g}.",
            hint="Lower num_ranks or num_engines, or set accelerator to cpu.",
        )
    cpus = config.num_ranks * config.cpus_per_rank + config.num_engines * config.cpus_per_engine
    if cpus > resources.get("CPU", 0.0):
        raise UnavailableError(
            f"{config.num_ranks} ranks and {config.num_engines} engines ask for {cpus:g} CPUs, and the cluster has "
            f"{resources.get('CPU', 0.0):g}.",
            hint="Lower num_ranks, num_engines, cpus_per_rank or cpus_per_engine.",
        )
    return on_cpu


def _await_engines(engines: Sequence[ActorHandle], timeout_seconds: float) -> None:
    try:
        ray.get([engine.ready.remote() for engine in engines], timeout=timeout_seconds)
    except GetTimeoutError as slow:
        raise WaitTimeoutError(
            f"the engines were not ready within {timeout_seconds:g} s.",
            hint="See `ray status` for what they wait for, or set start_timeout_seconds higher.",
        ) from slow
    except (RayActorError, RayTaskError) as failure:
        raise UnavailableError(f"an engine could not start: {last_line(failure)}") from failure


def _fit(config: GrpoConfig, engines: Sequence[ActorHandle], run_dir: Path, *, on_cpu: bool) -> None:
    resources = {"CPU": config.cpus_per_rank} | ({} if on_cpu else {"GPU": 1.0})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"config": config.model_dump(mode="json"), "engines": list(engines), "run_dir": str(run_dir)},
        scaling_config=ScalingConfig(
            num_workers=config.num_ranks,
            use_gpu=not on_cpu,
            resources_per_worker=resources,
            placement_strategy="STRICT_SPREAD" if config.spread else "PACK",
        ),
        torch_config=TorchConfig(backend="gloo" if on_cpu else "nccl"),
        run_config=RunConfig(
            name=config.run_name,
            storage_path=str(run_dir.parent),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=_NUM_KEPT_CHECKPOINTS),
        ),
    )
    try:
        trainer.fit()
    except Exception as failure:  # Ray Train wraps what a rank raised; ours is inside
        cause = error_inside(failure)
        if cause is not None:
            raise cause from failure
        raise UnavailableError(
            f"training ended after {config.max_failures} restarts: {last_line(failure)}",
            hint="Start it again with the same settings to go on from the last checkpoint.",
        ) from failure


def _finish(config: GrpoConfig, run_dir: Path, model_path: Path, total: int) -> dict[str, Any]:
    rows = read_log(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if not rows or checkpoint is None:
        raise UnavailableError(f"{run_dir} holds no finished step.")
    final = run_dir / FINAL_NAME
    if config.method != "qlora" and not final.exists():
        export_model(model_path, checkpoint, final)
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    before = next((row for row in rows if row.get("eval_reward") is not None), {})
    summary: dict[str, Any] = {
        "run": config.run_name,
        "num_steps": len(rows),
        "planned_steps": total,
        "reward_first": rewards[0] if rewards else None,
        "reward_last": rewards[-1] if rewards else None,
        "eval_before": before.get("eval_reward"),
        "eval_after": rows[-1].get("eval_reward_after"),
        "eval_drawn_before": before.get("eval_reward_drawn"),
        "eval_drawn_after": rows[-1].get("eval_reward_drawn_after"),
        **entropy_collapse(rows),
        "num_tokens": sum(row["num_tokens"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "canary_gap_max": max(
            (row["canary_gap_max"] for row in rows if row.get("canary_gap_max") is not None), default=None
        ),
        "canary_alarms": sum(1 for row in rows if row.get("canary_alarm")),
        "checkpoint": str(checkpoint),
        "model": str(final) if final.exists() else None,
        "log": str(run_dir / "metrics.jsonl"),
    }
    summary["report"] = str(write_report(rows, config.model_dump(mode="json"), summary, run_dir))
    draft = run_dir / f"{SUMMARY_NAME}.tmp"
    draft.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    draft.replace(run_dir / SUMMARY_NAME)
    return summary
