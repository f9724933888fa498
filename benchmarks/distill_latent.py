"""What the latent pair reaches on real text: `python benchmarks/distill_latent.py --json`.

An autoencoder over chunks of four tokens of the embedded model's tokenizer, then a latent student over it, both on
Python's documentation. Measured on held-out documents: the share of chunks that come back whole, and BrierLM before
training, on the way and after it. The control learns the same chunks in an order without meaning, so that the rest of a
text says nothing about a chunk but how frequent it is. `samples` are continuations at temperature 1/4.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distill_common import kept_pack, report_of, small_shape

from sparkray.config.base import validate_settings
from sparkray.config.distill import DistillConfig
from sparkray.distill.data.pack import Pack, Sequences
from sparkray.distill.generate import write_latent
from sparkray.distill.run import student_tokenizer
from sparkray.distill.students.autoencoder import ChunkAutoencoder
from sparkray.distill.students.latent import LatentStudent
from sparkray.distill.training.autoencoder import aligned_chunks, load_autoencoder, save_autoencoder, train_autoencoder
from sparkray.distill.training.latent_evaluate import LatentEvaluation, evaluate_latent
from sparkray.distill.training.objective import LatentObjective
from sparkray.distill.training.supervision import DataOnly
from sparkray.distill.training.trainer import Trainer

CPU = torch.device("cpu")
PROMPTS = ("The following example", "If the argument is", "This function returns")


def main() -> None:
    """Print the numbers; the last line is one JSON object under `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--validation-sequences", type=int, default=16)
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
            "latent": small_shape(arguments.hidden_size),
            "train": {"num_steps": arguments.steps, "batch_sequences": 16, "micro_batch_sequences": 16},
        },
    )
    pack = kept_pack("python-docs", work / "pack", config)
    if not (work / "autoencoder" / "autoencoder.json").is_file():
        begun = time.monotonic()

        def show(step: int, cross_entropy: float) -> None:
            if step % 100 == 0:
                print(f"autoencoder {step}  {cross_entropy:.3f} nats  {time.monotonic() - begun:.0f} s", flush=True)

        made = train_autoencoder(pack, config.autoencoder, CPU, show)
        save_autoencoder(made, work / "autoencoder", pack.header.tokenizer_sha256)
    autoencoder = load_autoencoder(work / "autoencoder", pack.header.tokenizer_sha256)
    numbers = range(min(arguments.validation_sequences, len(pack.validation)))
    student, looks = learn(config, pack, pack, autoencoder, list(numbers), arguments.looks)
    control = learn(config, shuffled(pack), pack, autoencoder, list(numbers), 1)[1][-1]
    tokenizer, end_id = student_tokenizer(config), pack.header.end_id
    held_out = aligned_chunks(pack.validation, config.autoencoder.chunk_tokens)
    return {
        "validation_exact_match": autoencoder.exact_match(held_out),
        "num_validation_chunks": len(held_out),
        "brier_lm": [look.brier_lm for look in looks],
        "brier": [list(look.brier) for look in looks],
        "brier_lm_of_control": control.brier_lm,
        "brier_of_control": list(control.brier),
        "num_chunks_drawn_for": looks[-1].num_chunks,
        "num_steps": arguments.steps,
        "num_autoencoder_steps": autoencoder.config.num_steps,
        "num_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "samples": {
            prompt: tokenizer.decode(
                write_latent(student, tokenizer.encode(prompt, add_special_tokens=False).ids, 32, 0.25, end_id, seed=0)
            )
            for prompt in PROMPTS
        },
    }


def learn(
    config: DistillConfig,
    learnt: Pack,
    measured: Pack,
    autoencoder: ChunkAutoencoder,
    numbers: list[int],
    num_looks: int,
) -> tuple[LatentStudent, list[LatentEvaluation]]:
    """Train a student on one pack; what it is worth on another's held-out part before, on the way and after."""
    torch.manual_seed(config.train.seed)
    chunk = autoencoder.config.chunk_tokens
    student = LatentStudent(config.latent, autoencoder, config.pack.sequence_tokens // chunk)
    trainer = Trainer(student, learnt, DataOnly(), LatentObjective(config.latent, config.loss, chunk), config.train, {})

    def look() -> LatentEvaluation:
        found = evaluate_latent(student, measured.validation, numbers, 4, config.train.seed)
        print(f"step {trainer.step}  BrierLM {found.brier_lm:.3f}  {found.brier}", flush=True)
        return found

    looks = [look()]
    for step in range(config.train.num_steps):
        trainer.run_step()
        if (step + 1) * num_looks // config.train.num_steps > step * num_looks // config.train.num_steps:
            looks.append(look())
    return student, looks


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
