"""Does a teacher's knowledge arrive: `python benchmarks/distill_learns.py --json`.

A student of about 7 M parameters learns real text in the same order for the same number of steps, from the data alone
and from the embedded model's rows: tail bucket, exact head with sampled tail, and, as the control that must not pass,
rows in the wrong places. Measured on held-out text: the divergence from the teacher over the whole vocabulary, and the
perplexity. Every seed runs all variants before the next seed begins.

`kl_ratio_to_ce` is the worse of the two targets' mean divergence over the one of the data alone; `control_ratio` is the
shuffled rows' over the same. Only both together show anything (`shown`): a student that is still learning how frequent
tokens are learns that from rows in the wrong places too, and after 40 steps of 512 tokens it had learnt nothing else.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_common import kept_pack, report_of, small_shape
from torch import Tensor
from torch.multiprocessing import get_context

from sparkray.config.base import validate_settings
from sparkray.config.distill import DistillConfig
from sparkray.distill.data.pack import Pack, read_pack
from sparkray.distill.scores import TokenScores
from sparkray.distill.store.capture import capture_store, sequence_scorer, store_header
from sparkray.distill.store.reader import LogitStore
from sparkray.distill.students.causal import create_causal_student
from sparkray.distill.teachers.create import create_teacher
from sparkray.distill.teachers.forward import ForwardTeacher
from sparkray.distill.training.evaluate import Evaluation, evaluate
from sparkray.distill.training.objective import CausalObjective
from sparkray.distill.training.supervision import FromStore
from sparkray.distill.training.trainer import Trainer

CPU = torch.device("cpu")
MOST = 0.95
VARIANTS: dict[str, dict[str, Any]] = {
    "ce": {"ce_weight": 1.0, "kd_weight": 0.0},
    "tail_bucket": {"ce_weight": 0.0, "kd_weight": 1.0, "target": "tail_bucket"},
    "sampled_tail": {"ce_weight": 0.0, "kd_weight": 1.0, "target": "sampled_tail"},
    "shuffled": {"ce_weight": 0.0, "kd_weight": 1.0, "target": "tail_bucket"},
}


def main() -> None:
    """Print one line a run and the summary; the last line is one JSON object under `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-sequences", type=int, default=4)
    parser.add_argument("--sequence-tokens", type=int, default=128)
    parser.add_argument("--max-sequences", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--validation-sequences", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="Students that learn at the same time.")
    parser.add_argument("--data", default="python-docs")
    report_of(parser, measure, show_report)


def show_report(report: dict[str, Any]) -> None:
    """Means over the seeds, and the two ratios."""
    for name in VARIANTS:
        print(f"{name:14} KL {report['kl'][name]:.3f}  perplexity {report['perplexity'][name]:.1f}")
    print(f"kl_ratio_to_ce {report['kl_ratio_to_ce']:.3f}  control_ratio {report['control_ratio']:.3f}")


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs of all seeds."""
    config = validate_settings(
        DistillConfig,
        {
            "pack": {"sequence_tokens": arguments.sequence_tokens, "max_sequences": arguments.max_sequences},
            "student": small_shape(arguments.hidden_size),
            "train": {
                "num_steps": arguments.steps,
                "batch_sequences": arguments.batch_sequences,
                "micro_batch_sequences": arguments.batch_sequences,
                "learning_rate": arguments.learning_rate,
                "warmup_steps": 20,
            },
        },
    )
    pack = kept_pack(arguments.data, work / "pack", config)
    teacher = create_teacher(config.teacher, config.store, config.client)
    assert isinstance(teacher, ForwardTeacher)
    header = store_header(pack, teacher.identity, config.store)
    capture_store(work / "store", pack, header, sequence_scorer(teacher, config.store, 0), show)
    numbers = range(min(arguments.validation_sequences, len(pack.validation)))
    held_out = {number: teacher.logits(pack.validation.tokens(number)).half() for number in numbers}
    teacher.close()
    results: dict[str, list[Evaluation]] = {name: [] for name in VARIANTS}
    runs = [(name, seed) for seed in range(arguments.seeds) for name in VARIANTS]
    # Two processes of a thread each wait for nobody; two threads of one process wait for each other at every operation.
    with get_context("spawn").Pool(arguments.processes) as pool:
        evaluations = pool.imap(partial(run_variant, config=config, work=work, held_out=held_out), runs)
        for (name, seed), found in zip(runs, evaluations, strict=True):
            results[name].append(found)
            print(f"seed {seed}  {name:14} KL {found.kl_to_teacher:.3f}  perplexity {found.perplexity:.1f}", flush=True)
    kl = {name: statistics.fmean(run.kl_to_teacher or 0.0 for run in runs) for name, runs in results.items()}
    ratio, control_ratio = max(kl["tail_bucket"], kl["sampled_tail"]) / kl["ce"], kl["shuffled"] / kl["ce"]
    return {
        "kl_ratio_to_ce": ratio,
        "control_ratio": control_ratio,
        "shown": ratio <= MOST < control_ratio,
        "kl": kl,
        "perplexity": {name: statistics.fmean(run.perplexity for run in runs) for name, runs in results.items()},
        "top1_agreement": {
            name: statistics.fmean(run.top1_agreement or 0.0 for run in runs) for name, runs in results.items()
        },
        "num_seeds": arguments.seeds,
        "num_steps": arguments.steps,
        "num_tokens": arguments.steps * arguments.batch_sequences * arguments.sequence_tokens,
        "num_validation_rows": results["ce"][0].num_rows,
        "num_parameters": num_parameters(config, pack),
    }


def run_variant(run: tuple[str, int], config: DistillConfig, work: Path, held_out: dict[int, Tensor]) -> Evaluation:
    """Train the student of a variant and a seed, on one thread, and evaluate it."""
    torch.set_num_threads(1)
    name, seed = run
    pack = read_pack(work / "pack")
    store = LogitStore(work / "store", pack)
    train = config.train.model_copy(update={"seed": seed})
    student = create_causal_student(
        config.student, vocab_size=pack.header.vocab_size, max_tokens=pack.header.sequence_tokens, seed=seed
    )
    loss = config.loss.model_copy(update=VARIANTS[name])
    read: Callable[[int], TokenScores] = store.__getitem__
    if name == "shuffled":
        read = partial(misplaced, store, np.random.default_rng(seed))
    trainer = Trainer(student, pack, FromStore(read), CausalObjective(loss), train, {})
    for _ in range(train.num_steps):
        trainer.run_step()
    return evaluate(student, pack.validation, list(held_out), lambda number: held_out[number].float(), CPU)


def misplaced(store: LogitStore, order: np.random.Generator, sequence: int) -> TokenScores:
    """Rows of another sequence, in another order."""
    rows = store[sequence]
    other = store[int(order.integers(0, store.manifest.header.num_sequences))]
    places = order.integers(0, other.num_rows, rows.num_rows)
    return replace(
        rows,
        head_ids_LK=other.head_ids_LK[places],
        head_logprobs_LK=other.head_logprobs_LK[places],
        token_logprobs_L=other.token_logprobs_L[places],
        tail_ids_LM=other.tail_ids_LM[places],
        entropy_L=other.entropy_L[places],
    )


def num_parameters(config: DistillConfig, pack: Pack) -> int:
    """Size of the student."""
    student = create_causal_student(
        config.student, vocab_size=pack.header.vocab_size, max_tokens=pack.header.sequence_tokens, seed=0
    )
    return sum(parameter.numel() for parameter in student.parameters())


def show(done: int, total: int) -> None:
    """Say how far the capture is."""
    print(f"captured {done}/{total} shards", flush=True)


if __name__ == "__main__":
    main()
