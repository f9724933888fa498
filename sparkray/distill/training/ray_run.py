"""A training run on a Ray cluster, from the driver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sparkray.config.distill import TrainJobConfig
from sparkray.distill.data.pack import read_pack
from sparkray.distill.run import check_training
from sparkray.distill.training.train_loop import train_loop
from sparkray.errors import UnavailableError, UsageError, error_inside, last_line

_SETTINGS = "job.json"


def train_on_cluster(job: TrainJobConfig) -> dict[str, Any]:
    """Train as `job` says in the cluster that this process is a driver of; killed, it goes on when called again.

    Returns:
        Steps, the last losses, restarts and where things are.

    Raises:
        UsageError: settings that cannot be, or a folder of another run.
        NotFoundError, InputError: no such pack or store.
        UnavailableError: the cluster is too small, or workers failed too often.
    """
    out, pack_folder = Path(job.out).absolute(), Path(job.pack).absolute()
    store = None if job.store is None else Path(job.store).absolute()
    # Workers start in folders of their own.
    job = job.model_copy(
        update={"pack": str(pack_folder), "out": str(out), "store": None if store is None else str(store)}
    )
    check_training(read_pack(pack_folder), job.distill, store, live=job.live)
    _claim(job, out)
    workers = job.workers
    on_gpu = workers.accelerator == "gpu" or (
        workers.accelerator == "auto" and ray.cluster_resources().get("GPU", 0.0) >= workers.num_workers
    )
    fewest = workers.min_workers or workers.num_workers
    resources = {"CPU": workers.cpus_per_worker} | ({"GPU": 1.0} if on_gpu else {})
    if workers.spread and fewest < workers.num_workers:
        _require_one_worker_a_node(resources)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job.model_dump(mode="json")},
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers if fewest == workers.num_workers else (fewest, workers.num_workers),
            use_gpu=on_gpu,
            resources_per_worker=resources,
            placement_strategy="STRICT_SPREAD" if workers.spread else "PACK",
            elastic_resize_monitor_interval_s=workers.resize_seconds,
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(out.parent),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.distill.train.keep_checkpoints),
        ),
    )
    try:
        trainer.fit()
    except Exception as failure:  # Ray Train wraps what a worker raised; ours is inside
        ours = error_inside(failure)
        if ours is not None:
            raise ours from failure
        raise UnavailableError(
            f"training ended after {workers.max_failures} restarts: {last_line(failure)}",
            hint="Start it again with the same settings to go on from the last checkpoint.",
        ) from failure
    return _summary(out)


def _require_one_worker_a_node(resources: Mapping[str, float]) -> None:
    # Ray counts the workers that fit into what is left of the nodes, and would wait for ever for a node of their own.
    for node in ray.nodes():
        room = min(node["Resources"].get(name, 0.0) // amount for name, amount in resources.items())
        if node["Alive"] and room > 1:
            raise UsageError(
                f"workers.spread and workers.min_workers were set, and the node {node['NodeManagerAddress']} has room"
                f" for {room:.0f} workers of {resources}: two would be put there when another node leaves.",
                hint=f"Raise workers.cpus_per_worker above {node['Resources']['CPU'] / 2:g}.",
                param="workers.cpus_per_worker",
            )


def _claim(job: TrainJobConfig, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / _SETTINGS
    described = job.model_dump(mode="json", exclude={"workers"})
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != described:
        raise UsageError(
            f"{out} holds a run with other settings.",
            hint="Give another folder, or the same settings.",
            param="out",
        )
    building = path.with_suffix(".building")
    building.write_text(json.dumps(described, indent=1), encoding="utf-8")
    building.rename(path)


def _summary(out: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = rows[-1]
    return {
        "out": str(out),
        "num_steps": last["step"],
        "num_steps_done_again": len(rows) - len({row["step"] for row in rows}),
        "loss": last["loss"],
        "cross_entropy": last["cross_entropy"],
        "distillation": last["distillation"],
        "model": str(out / "model"),
    }
