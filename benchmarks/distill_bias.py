"""How far each target is from the full distribution: `python benchmarks/distill_bias.py --json`.

The teacher is a real model on real text; the student is the same model with noise on its weights, so that it errs as a
trained student does. For one batch of positions the gradient of the mean loss with respect to the logits is compared
with the one of the full vocabulary. The sampled tail's gradient is averaged over its draws, since the claim is that it
has no bias; the error of one draw stands beside it. `bytes_per_token` is the size of a store with the same settings.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkray.config.distill import LossConfig, PackConfig, StoreConfig, TeacherConfig
from sparkray.distill.alignment.fingerprint import tokenizer_sha256
from sparkray.distill.data.pack import Pack, pack_documents
from sparkray.distill.data.sources import read_documents
from sparkray.distill.losses import dense_loss, distillation_loss
from sparkray.distill.store.capture import capture_store, sequence_scorer, store_header
from sparkray.distill.targets import TargetRows, scores_from_logits, target_rows
from sparkray.distill.teachers.create import teacher_tokenizer
from sparkray.distill.teachers.forward import ForwardTeacher
from sparkray.models import prepare_model

END_OF_TEXT = "<|endoftext|>"
NUM_TEXTS, POSITIONS_EACH, TOKENS_EACH = 6, 64, 192


def main() -> None:
    """Print the errors; the last line is one JSON object under `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--top-logprobs", type=int, default=20)
    parser.add_argument("--tail-draws", type=int, default=StoreConfig().tail_draws)
    parser.add_argument(
        "--num-draws", type=int, default=24, help="Repetitions that the sampled gradient is averaged over."
    )
    parser.add_argument(
        "--noise", type=float, default=0.1, help="Noise on the student's weights, relative to their size."
    )
    parser.add_argument("--store-sequences", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = measure(arguments)
    for key, value in report.items():
        print(f"{key:34} {value:.4g}" if isinstance(value, float) else f"{key:34} {value}")
    if arguments.json:
        print(json.dumps(report))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of the report."""
    torch.manual_seed(arguments.seed)
    config = TeacherConfig(model=arguments.model)
    store = StoreConfig(top_logprobs=arguments.top_logprobs, tail_draws=arguments.tail_draws)
    tokenizer = teacher_tokenizer(config)
    teacher = ForwardTeacher(prepare_model(arguments.model), config, store, tokenizer_sha256(tokenizer))
    pack = pack_documents(
        read_documents("python-docs"),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        PackConfig(sequence_tokens=TOKENS_EACH, validation_share=0.0),
        end_id=tokenizer.token_to_id(END_OF_TEXT),
        vocab_size=teacher.vocab_size,
        tokenizer_sha256=teacher.identity.tokenizer_sha256,
    )
    bytes_per_token = store_bytes_per_token(pack, teacher, store, arguments.store_sequences)
    chosen = [(number + 1) * (len(pack.train) // (NUM_TEXTS + 1)) for number in range(NUM_TEXTS)]
    texts = [pack.train.tokens(sequence) for sequence in chosen]
    teacher_NV = torch.cat([teacher.logits(tokens)[-POSITIONS_EACH:] for tokens in texts])
    following_N = torch.tensor([token for tokens in texts for token in tokens[-POSITIONS_EACH:]])
    add_noise(teacher.model, arguments.noise, arguments.seed)
    student_NV = torch.cat([teacher.logits(tokens)[-POSITIONS_EACH:] for tokens in texts]).clone()

    def rows(seed: int) -> TargetRows:
        generator = torch.Generator().manual_seed(seed)
        return target_rows(
            [
                scores_from_logits(
                    teacher_NV,
                    following_N,
                    top_logprobs=store.top_logprobs,
                    tail_draws=store.tail_draws,
                    generator=generator,
                )
            ]
        )

    full_NV, true_kl = gradient(student_NV, lambda logits: dense_loss(logits, teacher_NV, loss("tail_bucket")))
    fixed = rows(0)
    bucket_NV, bucket_kl = gradient(student_NV, lambda logits: distillation_loss(logits, fixed, loss("tail_bucket")))
    renormalised_NV, renormalised_kl = gradient(
        student_NV, lambda logits: distillation_loss(logits, fixed, loss("renormalised"))
    )
    single_errors, sampled_kls = [], []
    mean_NV = torch.zeros_like(full_NV)
    for draw in range(arguments.num_draws):
        drawn = rows(draw + 1)
        drawn_NV, kl = gradient(
            student_NV, lambda logits, drawn=drawn: distillation_loss(logits, drawn, loss("sampled_tail"))
        )
        mean_NV += drawn_NV / arguments.num_draws
        single_errors.append(batch_error(drawn_NV, full_NV))
        sampled_kls.append(kl)
    head_mass_N = fixed.head_logprobs_NK.exp().sum(-1)
    return {
        "sampled_tail_error": batch_error(mean_NV, full_NV),
        "sampled_tail_error_one_draw": sum(single_errors) / len(single_errors),
        "tail_bucket_error": batch_error(bucket_NV, full_NV),
        "renormalised_error": batch_error(renormalised_NV, full_NV),
        "tail_bucket_position_error": position_error(bucket_NV, full_NV),
        "renormalised_position_error": position_error(renormalised_NV, full_NV),
        "true_kl": true_kl,
        "sampled_tail_kl": sum(sampled_kls) / len(sampled_kls),
        "tail_bucket_kl": bucket_kl,
        "renormalised_kl": renormalised_kl,
        "head_mass_mean": head_mass_N.mean().item(),
        "head_mass_p5": head_mass_N.quantile(0.05).item(),
        "bytes_per_token": bytes_per_token,
        "num_positions": int(teacher_NV.shape[0]),
        "num_draws": arguments.num_draws,
        "top_logprobs": store.top_logprobs,
        "tail_draws": store.tail_draws,
    }


def loss(target: str) -> LossConfig:
    """Forward KL at temperature 1 against that target."""
    return LossConfig.model_validate({"target": target})


def gradient(logits_NV: Tensor, compute: Any) -> tuple[Tensor, float]:
    """Gradient of the summed loss, a row a position, and the mean loss."""
    leaf_NV = logits_NV.clone().requires_grad_()
    losses_N = compute(leaf_NV)
    losses_N.sum().backward()
    assert leaf_NV.grad is not None
    return leaf_NV.grad, losses_N.mean().item()


def batch_error(found_NV: Tensor, true_NV: Tensor) -> float:
    """Relative error of the gradient of the batch's mean."""
    found_V, true_V = found_NV.mean(0), true_NV.mean(0)
    return ((found_V - true_V).norm() / true_V.norm()).item()


def position_error(found_NV: Tensor, true_NV: Tensor) -> float:
    """Mean over positions of the relative error of each position's gradient."""
    return ((found_NV - true_NV).norm(dim=-1) / true_NV.norm(dim=-1)).mean().item()


def add_noise(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Add Gaussian noise to every matrix, relative to the spread of its entries."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std() * scale
            parameter.data.add_(noise.to(parameter.dtype))


def store_bytes_per_token(pack: Pack, teacher: ForwardTeacher, config: StoreConfig, num_sequences: int) -> float:
    """Size of a store of the first sequences, over their tokens."""
    train = pack.train
    part = Pack(
        pack.header, type(train)(train.ids_ST[:num_sequences], train.documents_ST[:num_sequences]), pack.validation
    )
    with tempfile.TemporaryDirectory() as folder:
        header = store_header(part, teacher.identity, config)
        return capture_store(Path(folder), part, header, sequence_scorer(teacher, config, 0)).bytes_per_token


if __name__ == "__main__":
    main()
