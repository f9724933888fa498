"""What every worker runs under Ray Train: the trainer of one process, with checkpoints that Ray keeps.

Each worker asks for the rows of its own share. Worker 0 writes metrics and hands the checkpoint over; it counts once
Ray has put it into the run's folder, and a restart, on as many workers or fewer, begins from the newest that is there.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import train

from sparkray.config.distill import TrainJobConfig
from sparkray.distill.data.pack import read_pack
from sparkray.distill.run import causal_trainer, save_student, supervision
from sparkray.distill.students.causal import CausalStudent
from sparkray.distill.training.trainer import StepReport, Trainer
from sparkray.distill.training.workers import ProcessGroupWorkers


def train_loop(setup: Mapping[str, Any]) -> None:
    """The function that Ray Train runs on every worker.

    Args:
        setup: `job`, what `TrainJobConfig` is made of.
    """
    job = TrainJobConfig.model_validate(setup["job"])
    pack, out = read_pack(Path(job.pack)), Path(job.out)
    store = None if job.store is None else Path(job.store)
    workers = ProcessGroupWorkers()
    with supervision(pack, job.distill, store, live=job.live) as (rows, client):
        trainer = causal_trainer(pack, job.distill, store, rows, train.torch.get_device(), workers, client=client)
        _restore(trainer)
        while trainer.step < job.distill.train.num_steps:
            report = trainer.run_step()
            if workers.rank == 0:
                _log(out, report, workers.world_size)
            last = trainer.step == job.distill.train.num_steps
            if last or trainer.step % job.distill.train.checkpoint_steps == 0:
                _keep(trainer, report, workers.rank)
        if workers.rank == 0:
            assert isinstance(trainer.student, CausalStudent)
            save_student(trainer.student, out / "model", job.distill)


def _restore(trainer: Trainer) -> None:
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.resume(Path(folder))


def _keep(trainer: Trainer, report: StepReport, rank: int) -> None:
    if rank:
        train.report(asdict(report))
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(Path(folder))
        train.report(asdict(report), checkpoint=train.Checkpoint.from_directory(folder))


def _log(out: Path, report: StepReport, world_size: int) -> None:
    # A step that is done again after a restart is written again; readers take the last.
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(asdict(report) | {"num_workers": world_size}) + "\n")
