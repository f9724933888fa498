"""What the latent pair reaches on real text: `python benchmarks/distill_latent.py --json`.

An autoencoder over chunks of four tokens of the embedded model's tokenizer, then a latent student over it, both on
the sources of Python's standard library. Measured on held-out files: the share of chunks that come back whole, and
BrierLM before training, on the way and after it. The control learns the same chunks in an order without meaning, so
that the rest of a text says nothing about a chunk but how frequent it is. `samples` are continuations at
temperature 1/4.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_common import kept_pack, report_of, small_shape
from torch.multiprocessing import get_context

from sparkray.config.base import validate_settings
from sparkray.config.distill import DistillConfig
from sparkray.distill.data.pack import Pack, Sequences, read_pack
from sparkray.distill.generate import write_latent
from sparkray.distill.run import student_tokenizer
from sparkray.distill.students.latent import LatentStudent
from sparkray.distill.training.autoencoder import aligned_chunks, load_autoencoder, save_autoencoder, train_autoencoder
from sparkray.distill.training.latent_evaluate import LatentEvaluation, evaluate_latent
from sparkray.distill.training.objective import LatentObjective
from sparkray.distill.training.supervision import DataOnly
from sparkray.distill.training.trainer import Trainer

CPU = torch.device("cpu")
PROMPTS = ("    def __init__(self", "import os\n", "        if not isinstance(")


@dataclass(frozen=True)
class Learnt:
    """A trained student: its evaluations in order, its size, and what it writes after some prompts."""

    looks: tuple[LatentEvaluation, ...]
    num_parameters: int
    samples: dict[str, str]


def main() -> None:
    """Print the numbers; the last line is one JSON object under `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--batch-sequences", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--ce-weight", type=float, default=1.0)
    parser.add_argument("--latent-weight", type=float, default=0.1)
    parser.add_argument("--targets", type=int, default=16, help="Samples of the posterior in the energy score.")
    parser.add_argument("--validation-sequences", type=int, default=64)
    parser.add_argument("--draws", type=int, default=8, help="Pairs of draws for each held-out chunk.")
    parser.add_argument("--looks", type=int, default=3, help="Evaluations, the last one after the last step.")
    report_of(parser, measure, show_report)


def show_report(report: dict[str, Any]) -> None:
    """One line a number."""
    for key, value in report.items():
        print(f"{key:34} {value}")


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both models, and the control."""
    config = validate_settings(
        DistillConfig,
        {
            "pack": {"sequence_tokens": 128},
            "autoencoder": {"num_steps": arguments.autoencoder_steps},
            "latent": {
                **small_shape(arguments.hidden_size),
                "ce_weight": arguments.ce_weight,
                "latent_weight": arguments.latent_weight,
                "token_choice": "drawn" if arguments.ce_weight else "likeliest",
                "num_targets": arguments.targets,
            },
            "train": {
                "num_steps": arguments.steps,
                "batch_sequences": arguments.batch_sequences,
                "micro_batch_sequences": arguments.batch_sequences,
                "learning_rate": arguments.learning_rate,
                "warmup_steps": 20,
            },
        },
    )
    pack = kept_pack("python-stdlib", work / "pack", config)
    if not (work / "autoencoder" / "autoencoder.json").is_file():
        begun = time.monotonic()

        def show(step: int, cross_entropy: float) -> None:
            if step % 100 == 0:
                print(f"autoencoder {step}  {cross_entropy:.3f} nats  {time.monotonic() - begun:.0f} s", flush=True)

        made = train_autoencoder(pack, config.autoencoder, CPU, show)
        save_autoencoder(made, work / "autoencoder", pack.header.tokenizer_sha256)
    autoencoder = load_autoencoder(work / "autoencoder", pack.header.tokenizer_sha256)
    held_out = aligned_chunks(pack.validation, config.autoencoder.chunk_tokens)
    # Two processes of a thread each wait for nobody; two threads of one process wait for each other at every operation.
    with get_context("spawn").Pool(2) as pool:
        student, control = pool.map(partial(learn, config=config, work=work, arguments=arguments), (False, True))
    return {
        "validation_exact_match": autoencoder.exact_match(held_out),
        "num_validation_chunks": len(held_out),
        "brier_lm": [look.brier_lm for look in student.looks],
        "brier": [list(look.brier) for look in student.looks],
        "brier_lm_of_control": [look.brier_lm for look in control.looks],
        "brier_of_control": [list(look.brier) for look in control.looks],
        "num_chunks_drawn_for": student.looks[-1].num_chunks,
        "num_draws": arguments.draws,
        "num_steps": arguments.steps,
        "num_tokens": arguments.steps * arguments.batch_sequences * config.pack.sequence_tokens,
        "ce_weight": arguments.ce_weight,
        "latent_weight": arguments.latent_weight,
        "num_autoencoder_steps": autoencoder.config.num_steps,
        "num_parameters": student.num_parameters,
        "samples": student.samples,
    }


def learn(is_control: bool, config: DistillConfig, work: Path, arguments: argparse.Namespace) -> Learnt:
    """Train a student on the text, or on its chunks in another order; what it is worth before, on the way and after."""
    torch.set_num_threads(1)
    torch.manual_seed(config.train.seed)
    pack = read_pack(work / "pack")
    autoencoder = load_autoencoder(work / "autoencoder", pack.header.tokenizer_sha256)
    chunk = autoencoder.config.chunk_tokens
    log_shares_V = torch.from_numpy(pack.train.log_shares(pack.header.vocab_size))
    student = LatentStudent(config.latent, autoencoder, config.pack.sequence_tokens // chunk, log_shares_V)
    objective = LatentObjective(config.latent, config.loss, chunk)
    trainer = Trainer(student, shuffled(pack) if is_control else pack, DataOnly(), objective, config.train, {})
    # Of all held-out files, and not of the first.
    numbers = np.random.default_rng(1).permutation(len(pack.validation))[: arguments.validation_sequences].tolist()
    looks: list[LatentEvaluation] = []

    def look() -> None:
        found = evaluate_latent(student, pack.validation, numbers, arguments.draws, config.train.seed)
        looks.append(found)
        name = "control" if is_control else "student"
        print(f"{name}  step {trainer.step}  BrierLM {found.brier_lm:.3f}  {found.brier}", flush=True)

    look()
    for step in range(config.train.num_steps):
        trainer.run_step()
        if (step + 1) * arguments.looks // arguments.steps > step * arguments.looks // arguments.steps:
            look()
    tokenizer = student_tokenizer(config)
    samples = {}
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        samples[prompt] = tokenizer.decode(write_latent(student, ids, 32, 0.25, pack.header.end_id, seed=0))
    num_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return Learnt(tuple(looks), num_parameters, samples)


def shuffled(pack: Pack) -> Pack:
    """The same chunks in another order, over all sequences."""
    train, chunk = pack.train, pack.header.chunk_tokens
    order = np.random.default_rng(0).permutation(train.ids_ST.size // chunk)
    ids_ST, documents_ST = (
        part.reshape(-1, chunk)[order].reshape(part.shape) for part in (train.ids_ST, train.documents_ST)
    )
    return Pack(pack.header, Sequences(ids_ST, documents_ST), pack.validation)


if __name__ == "__main__":
    main()
